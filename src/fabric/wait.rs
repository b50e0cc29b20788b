//! Sleeping until a device or another thread has something for us.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::{Code, Error, Result};

/// How long this thread has run on a core so far.
pub fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A thread's bed: sleeps on file descriptors, and can be woken by others.
pub struct Waiter {
    wake: OwnedFd,
}

impl Waiter {
    /// A waiter that nobody has woken yet.
    pub fn new() -> Result<Self> {
        // SAFETY: creates a file descriptor; touches no memory.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            let why = std::io::Error::last_os_error();
            return Err(Error::new(Code::Context, format!("eventfd failed: {why}")));
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Self { wake: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Ends the current sleep, or the next one at once.
    pub fn wake(&self) {
        let one = 1_u64;
        // SAFETY: writes 8 bytes from a live value; a full counter means it is awake anyway.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Sleeps until one of `fds` is readable, [`Self::wake`] was called, or `longest` passed.
    /// A descriptor that was closed meanwhile ends the sleep too.
    pub fn sleep(&self, fds: &[RawFd], longest: Duration) {
        let mut polled: Vec<libc::pollfd> = std::iter::once(self.wake.as_raw_fd())
            .chain(fds.iter().copied())
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        let time = libc::timespec {
            tv_sec: longest.as_secs() as libc::time_t,
            tv_nsec: longest.subsec_nanos().into(),
        };
        // SAFETY: the array and its length belong together; no signal mask is given.
        unsafe {
            libc::ppoll(polled.as_mut_ptr(), polled.len() as _, &raw const time, std::ptr::null());
        }
        let mut count = 0_u64;
        // SAFETY: reads at most 8 bytes into a live value; nothing to read is an error we ignore.
        unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}
