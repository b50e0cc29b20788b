//! Log lines of which there may be very many at once.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use log::Level;
use parking_lot::Mutex;

/// Lines that go to the log in one second.
const LINES: u32 = 10;
const SECOND: u64 = 1_000_000_000;

/// Lines of one kind: the first few of a second are logged, and then how many more there were.
pub struct Lines {
    level: Level,
    /// What they are, in the plural.
    what: &'static str,
    held_back: AtomicU64,
    second: Mutex<Second>,
}

#[derive(Default)]
struct Second {
    end: u64,
    lines: u32,
}

impl Lines {
    /// None yet.
    pub fn new(level: Level, what: &'static str) -> Self {
        Self { level, what, held_back: AtomicU64::new(0), second: Mutex::default() }
    }

    /// Logs a line, or counts it. `now`: nanoseconds.
    pub fn add(&self, line: impl fmt::Display, now: u64) {
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
        log::log!(self.level, "{line}");
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
            log::log!(self.level, "and {count} more {}", self.what);
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.tell();
    }
}
