//! Why a transfer failed, in one line; and not too many such lines in the log.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// Lines that go to the log in one second. A peer that dies fails all that is under way to it at once.
const LINES: u32 = 10;
const SECOND: u64 = 1_000_000_000;

/// A failed operation, or one whose deadline passed. Put into words only when someone reads it.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub write: bool,
    pub length: u64,
    /// The peer's segment; `None` if it is closed.
    pub peer: Option<Arc<str>>,
    /// Its NIC, where it is known.
    pub peer_nic: Option<Arc<str>>,
    /// Our NIC; `None` where it is not known which one it hangs on.
    pub nic: Option<Arc<str>>,
    /// Nanoseconds since it was submitted.
    pub age: u64,
    /// How often it was tried.
    pub tries: u8,
    pub cause: Cow<'static, str>,
}

impl Failure {
    fn operation(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (operation, preposition) = if self.write { ("write", "to") } else { ("read", "from") };
        let peer = self.peer.as_deref().unwrap_or("a closed segment");
        write!(f, "{operation} of {} bytes {preposition} {peer}", self.length)?;
        match (&self.nic, &self.peer_nic) {
            (Some(nic), Some(peer_nic)) => write!(f, " over {nic} and its {peer_nic}"),
            (Some(nic), None) => write!(f, " over {nic}"),
            (None, _) => Ok(()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.operation(f)?;
        write!(f, " failed after {:.3?}", Duration::from_nanos(self.age))?;
        if self.tries > 1 {
            write!(f, " and {} tries", self.tries)?;
        }
        write!(f, ": {}", self.cause)
    }
}

/// One that has not failed yet, in words.
pub(super) struct UnderWay(pub Failure);

impl fmt::Display for UnderWay {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.operation(f)?;
        write!(f, ", for {:.3?}", Duration::from_nanos(self.0.age))
    }
}

/// Logs failures: the first few of a second, then how many more there were.
#[derive(Default)]
pub(super) struct FailureLog {
    held_back: AtomicU64,
    second: Mutex<Second>,
}

#[derive(Default)]
struct Second {
    end: u64,
    lines: u32,
}

impl FailureLog {
    pub fn add(&self, failure: &Failure, now: u64) {
        self.flush(now);
        let mut second = self.second.lock();
        if now >= second.end {
            *second = Second { end: now.saturating_add(SECOND), lines: 0 };
        }
        if second.lines == LINES {
            self.held_back.fetch_add(1, Ordering::Relaxed);
            return;
        }
        second.lines += 1;
        drop(second); // the host's log function may take its time
        log::error!("{failure}");
    }

    /// Tells how many lines were held back, when their second is over. To be called now and then; one load
    /// if there were none.
    pub fn flush(&self, now: u64) {
        if self.held_back.load(Ordering::Relaxed) > 0 && now >= self.second.lock().end {
            self.tell();
        }
    }

    fn tell(&self) {
        let count = self.held_back.swap(0, Ordering::Relaxed);
        if count > 0 {
            log::error!("and {count} more failures like it");
        }
    }
}

impl Drop for FailureLog {
    fn drop(&mut self) {
        self.tell();
    }
}
