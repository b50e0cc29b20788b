//! Circuit breakers: a NIC, ours or a peer's, that fails again and again is paused, probed, brought back.

use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Failures without a success between them that pause it. (Of operations of which one in two hundred
/// fails, four in a row do so once in a billion.)
const TRIP: u32 = 4;
/// The first pause, nanoseconds; each that follows without a success between is twice as long.
const PAUSE: u64 = 100_000_000;
/// log2 of how much longer than the first the longest pause is: 3.2 seconds.
const DOUBLINGS: u32 = 5;
/// Pauses in a row from which it is broken: it is not waited for any more, only probed.
const BROKEN: u32 = 2;
/// Longer ago failures are forgotten, nanoseconds; longer than any pause.
pub(super) const MEMORY: u64 = 10_000_000_000;

/// The health of one NIC. All methods may be called from any thread; when two do at once, a failure may be
/// counted once instead of twice.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// In a row.
    failures: AtomicU32,
    /// Pauses in a row.
    trips: AtomicU32,
    /// Until when it is paused; 0: it is not, and was not since its last success.
    until: AtomicU64,
    /// Its probe is under way.
    probing: AtomicBool,
    /// The last failure.
    last: AtomicU64,
}

/// Whether a NIC may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// Yes. Where it was paused, this use is the probe.
    Yes,
    /// Not before that time.
    NotBefore(u64),
    /// Not before that time, and it is no use to wait for it.
    Broken(u64),
}

impl Health {
    /// An operation failed. `Some` with nanoseconds if it is paused for that, from now on.
    pub fn fail(&self, now: u64) -> Option<u64> {
        let forgotten = now.saturating_sub(self.last.swap(now, Ordering::Relaxed)) > MEMORY;
        let until = self.until.load(Ordering::Relaxed);
        if !self.probing.swap(false, Ordering::Relaxed) && until > now {
            return None; // posted before it was paused
        }
        if forgotten {
            self.failures.store(0, Ordering::Relaxed);
            self.trips.store(0, Ordering::Relaxed);
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if until == 0 && failures < TRIP {
            return None;
        }
        let trips = self.trips.fetch_add(1, Ordering::Relaxed);
        let pause = PAUSE << trips.min(DOUBLINGS);
        self.until.store(now.saturating_add(pause), Ordering::Relaxed);
        Some(pause)
    }

    /// An operation succeeded. True if it was paused before.
    pub fn succeed(&self) -> bool {
        // The second too: a failure that is being counted may pause it after a success took its count away.
        if self.failures.load(Ordering::Relaxed) == 0 && self.until.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.failures.store(0, Ordering::Relaxed);
        self.trips.store(0, Ordering::Relaxed);
        self.until.swap(0, Ordering::Relaxed) != 0
    }

    /// Whether it may be used now; of those who ask when a pause is over, one may, as its probe.
    pub fn ask(&self, now: u64) -> Use {
        let until = self.until.load(Ordering::Relaxed);
        if until == 0 || now < until {
            return self.peek(now);
        }
        let trips = self.trips.load(Ordering::Relaxed).max(1);
        let next = now.saturating_add(PAUSE << (trips - 1).min(DOUBLINGS));
        match self.until.compare_exchange(until, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => {
                self.probing.store(true, Ordering::Relaxed);
                Use::Yes
            }
            Err(next) => Use::NotBefore(next),
        }
    }

    /// As [`Self::ask`], without a claim to be the probe.
    pub fn peek(&self, now: u64) -> Use {
        match self.until.load(Ordering::Relaxed) {
            until if now >= until => Use::Yes,
            until if self.trips.load(Ordering::Relaxed) >= BROKEN => Use::Broken(until),
            until => Use::NotBefore(until),
        }
    }

    /// It is paused, or was and has not been seen to work since.
    pub fn is_paused(&self) -> bool {
        self.until.load(Ordering::Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_pause_it_and_one_success_brings_it_back() {
        let health = Health::default();
        for now in 0..3 {
            assert_eq!(health.fail(now), None);
        }
        assert!(!health.succeed(), "it was not paused");
        for now in 3..6 {
            assert_eq!(health.fail(now), None, "the row was broken");
        }
        assert_eq!(health.fail(6), Some(PAUSE));
        assert_eq!(health.fail(7), None, "it is paused already");
        assert_eq!(health.ask(7), Use::NotBefore(PAUSE + 6));
        assert!(health.succeed());
        assert_eq!(health.ask(7), Use::Yes);
        assert!(!health.is_paused());
    }

    #[test]
    fn one_probe_at_a_time_and_each_failed_one_doubles_the_pause() {
        let health = Health::default();
        assert_eq!((0..TRIP).filter_map(|_| health.fail(0)).count(), 1);
        let mut now = PAUSE;
        let mut pauses = Vec::new();
        for _ in 0..7 {
            assert_eq!(health.ask(now), Use::Yes, "the probe");
            assert!(health.ask(now) != Use::Yes, "one is enough");
            now += 1;
            pauses.push(health.fail(now).expect("paused anew") / PAUSE);
            assert_eq!(health.fail(now), None, "it had company");
            let until = now + pauses.last().expect("one") * PAUSE;
            assert_eq!(health.ask(now), Use::Broken(until));
            now = until;
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 32, 32]);
    }

    #[test]
    fn what_failed_long_ago_does_not_count() {
        let health = Health::default();
        for round in 0..10 {
            assert_eq!(health.fail(round * (MEMORY + 1) + 1), None);
        }
        assert_eq!((0..TRIP).filter_map(|_| health.fail(1 << 40)).count(), 1);
        assert!(health.is_paused());
    }
}
