//! A process that is told to end takes its engines out of the metadata first.

use std::sync::Once;
use std::thread::Builder;

use mooncake_efa::{Code, Error, Result};
use parking_lot::Mutex;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

extern "C" fn at_exit() {
    // Panics may not leave this function.
    let _ = mooncake_efa::boundary::caught(|| {
        withdraw_all();
        Ok(())
    });
}

fn withdraw_all() {
    super::all().iter().for_each(|engine| engine.withdraw());
}

/// Begins to watch for signals and for the process's exit, once a process (a forked child is another).
///
/// # Errors
/// [`Code::Context`] if the handlers cannot be set.
pub fn enable() -> Result<()> {
    static WATCHED_BY: Mutex<u32> = Mutex::new(0);
    static AT_EXIT: Once = Once::new();
    let mut watched_by = WATCHED_BY.lock();
    if *watched_by == std::process::id() {
        return Ok(());
    }
    let failed =
        |why: std::io::Error| Error::new(Code::Context, format!("watching for signals: {why}"));
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(failed)?;
    let life = move || {
        if let Some(signal) = signals.forever().next() {
            withdraw_all();
            low_level::exit(128 + signal);
        }
    };
    Builder::new().name("mefa-te-signals".into()).spawn(life).map_err(failed)?;
    AT_EXIT.call_once(|| {
        // SAFETY: the function is there for as long as this library, which has threads of its own, so nobody can
        // unload it.
        unsafe { libc::atexit(at_exit) };
    });
    *watched_by = std::process::id();
    Ok(())
}
