//! Which GPU this process uses, for libraries that would take the first one.

use std::ptr::null_mut;

use super::cuda::{Context, Driver, SUCCESS, driver};

/// Whether this process uses a GPU: it has made a context, as the CUDA runtime does at the latest with the first
/// allocation.
pub fn gpu_in_use() -> bool {
    driver().is_some_and(|driver| has_current(driver) || active(driver).is_some())
}

/// Makes a call to code that may use CUDA on the calling thread (libfabric tries whether NICs reach a GPU's memory). On
/// a thread that uses no GPU the runtime would make a context on the first one, some 600 MB that stay there: a context
/// of the process's own is current meanwhile instead, if it has one.
pub fn in_used_context<T>(call: impl FnOnce() -> T) -> T {
    let context = driver().filter(|driver| !has_current(driver)).and_then(|driver| {
        let device = active(driver)?;
        Context::primary(driver, device).ok()
    });
    let _entered = context.as_ref().and_then(|context| context.enter().ok());
    call()
}

/// Whether a context is current on this thread.
fn has_current(driver: &Driver) -> bool {
    let mut context = null_mut();
    // SAFETY: one pointer is written.
    let ret = unsafe { (driver.current)(&raw mut context) };
    ret == SUCCESS && !context.is_null()
}

/// The first device whose primary context somebody has made.
fn active(driver: &Driver) -> Option<i32> {
    let mut count = 0;
    // SAFETY: numbers are written; fails where CUDA has not been initialised, and then nobody uses it.
    let ret = unsafe { (driver.device_count)(&raw mut count) };
    (0..if ret == SUCCESS { count } else { 0 }).find(|&device| {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: as above.
        let ret = unsafe { (driver.primary_state)(device, &raw mut flags, &raw mut active) };
        ret == SUCCESS && active != 0
    })
}
