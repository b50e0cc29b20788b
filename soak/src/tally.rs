//! What is counted of the transfers to one peer.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Counts of transfers; one is one request of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Given to the transport.
    pub tried: u64,
    /// Ended as completed.
    pub completed: u64,
    /// Failed or refused, with a cause that the scenario explains.
    pub failed: u64,
    /// Failed, refused or timed out with another cause, or with none.
    pub unexplained: u64,
    /// Ended as timed out, and said that it was the deadline.
    pub timed_out: u64,
    /// Cancelled by us.
    pub canceled: u64,
    /// Never got a final status, or their end was not told exactly once.
    pub lost: u64,
    /// Memory that was not as it should be, in ranges looked at.
    pub corrupted: u64,
    /// Completed, and their target was gone before its memory could be looked at.
    pub unchecked: u64,
    /// Whose memory the transport has not called quiet, now.
    pub unquiet: u64,
    /// Bytes of memory that lanes have given up, since the transport did not call it quiet. It stays registered.
    pub kept: u64,
    /// Bytes of those completed.
    pub bytes: u64,
    /// Time with something under way, milliseconds.
    pub busy_ms: u64,
    /// Longest time without a completion while work was under way, milliseconds.
    pub stall_ms: u64,
}

impl Tally {
    /// Adds another's counts; of stalls the longest counts.
    pub fn add(&mut self, other: &Self) {
        let Self { tried, completed, failed, unexplained, timed_out, canceled, .. } = *other;
        let Self { lost, corrupted, unchecked, unquiet, kept, bytes, .. } = *other;
        let Self { busy_ms, stall_ms, .. } = *other;
        self.tried += tried;
        self.completed += completed;
        self.failed += failed;
        self.unexplained += unexplained;
        self.timed_out += timed_out;
        self.canceled += canceled;
        self.lost += lost;
        self.corrupted += corrupted;
        self.unchecked += unchecked;
        self.unquiet += unquiet;
        self.kept += kept;
        self.bytes += bytes;
        self.busy_ms += busy_ms;
        self.stall_ms = self.stall_ms.max(stall_ms);
    }
}

/// Transfers to one peer, of all lanes.
#[derive(Default)]
pub struct Link {
    tally: Mutex<Tally>,
    clock: Mutex<StallClock>,
}

impl Link {
    /// Changes counts.
    pub fn count(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.tally.lock());
    }

    /// The counts now.
    pub fn tally(&self) -> Tally {
        let (clock, now) = (self.clock.lock(), Instant::now());
        let stall_ms = clock.longest(now).as_millis() as u64;
        let busy_ms = (clock.busy + clock.running(now)).as_millis() as u64;
        Tally { stall_ms, busy_ms, ..*self.tally.lock() }
    }

    /// Stalls count from now on.
    pub fn forget_stalls(&self) {
        let (mut clock, now) = (self.clock.lock(), Instant::now());
        let running = clock.running(now);
        clock.busy += running;
        (clock.longest, clock.carried, clock.since) = (Duration::ZERO, Duration::ZERO, now);
    }

    /// So many transfers are started.
    pub fn start(&self, count: u64) {
        self.clock.lock().start(count, Instant::now());
    }

    /// So many have ended.
    pub fn end(&self, count: u64, completed: bool) {
        self.clock.lock().end(count, completed, Instant::now());
    }
}

/// Measures how long nothing completes while something is under way.
struct StallClock {
    under_way: u64,
    /// Since when: the last completion, or the start of the first.
    since: Instant,
    /// Time with something under way, before that.
    busy: Duration,
    /// What had passed without one when nothing was under way any more.
    carried: Duration,
    longest: Duration,
}

impl Default for StallClock {
    fn default() -> Self {
        let zero = Duration::ZERO;
        Self { under_way: 0, since: Instant::now(), busy: zero, carried: zero, longest: zero }
    }
}

impl StallClock {
    fn start(&mut self, count: u64, now: Instant) {
        if self.under_way == 0 {
            self.since = now;
        }
        self.under_way += count;
    }

    fn end(&mut self, count: u64, completed: bool, now: Instant) {
        self.longest = self.longest(now);
        let running = self.running(now);
        self.busy += running;
        self.carried = if completed { Duration::ZERO } else { self.carried + running };
        self.since = now;
        self.under_way = self.under_way.saturating_sub(count);
    }

    fn running(&self, now: Instant) -> Duration {
        if self.under_way > 0 { now - self.since } else { Duration::ZERO }
    }

    fn longest(&self, now: Instant) -> Duration {
        self.longest.max(self.carried + self.running(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_with_work_under_way_is_a_stall() {
        let mut clock = StallClock::default();
        let start = clock.since;
        let at = |seconds| start + Duration::from_secs(seconds);
        clock.start(2, at(10));
        assert_eq!(clock.longest(at(11)).as_secs(), 1);
        clock.end(1, false, at(12));
        clock.end(1, false, at(13));
        // Idle, and then on: the failures completed nothing.
        clock.start(1, at(20));
        assert_eq!(clock.longest(at(21)).as_secs(), 4);
        clock.end(1, true, at(22));
        assert_eq!(clock.longest(at(30)).as_secs(), 5);
        clock.start(1, at(40));
        assert_eq!(clock.longest(at(42)).as_secs(), 5);
        assert_eq!((clock.busy + clock.running(at(42))).as_secs(), 3 + 2 + 2);
    }
}
