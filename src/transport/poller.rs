//! Progress while nobody waits: threads that poll the NICs, and sleep when there is nothing to do.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use crate::engine::Engine;
use crate::error::Result;
use crate::fabric::Waiter;
use crate::nic::FabricNic;

/// How long a poller goes on looking at once after there was something to do, nanoseconds.
const HOT: u64 = 200_000;
/// After that it sleeps for this part of the time since there was something to do: soon after work it
/// looks often, since there may be more; long after, seldom.
const SLEEP_PART: u64 = 16;
/// How long it sleeps at most when no file descriptor will wake it: providers with manual progress need
/// its answers.
const HEARTBEAT: Duration = Duration::from_millis(10);
/// How long it sleeps at most when one will.
const LONG_SLEEP: Duration = Duration::from_secs(1);
/// How long it looks away while others make the progress.
const LOOK_AWAY: Duration = Duration::from_micros(100);
/// How often it looks between two sleeps: a peer that got its answer may ask again at once.
const LOOKS: u32 = 16;
/// By how much the first poll after a sleep, and the others, differ in time though they find nothing;
/// nanoseconds. Too low costs an idle process CPU time, too high costs a peer's first operations time.
const COLD_SLACK: u64 = 5000;
const WARM_SLACK: u64 = 200;

/// One poller's bed, and whether it is in it.
pub(super) struct Sleeper {
    waiter: Waiter,
    asleep: AtomicBool,
}

impl Sleeper {
    pub fn new() -> Result<Self> {
        Ok(Self { waiter: Waiter::new()?, asleep: AtomicBool::new(false) })
    }

    /// There is work, or it is time to stop.
    pub fn wake(&self) {
        // Either we see that it is asleep, or it sees the work (or the stop) before it sleeps.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.waiter.wake();
        }
    }
}

/// One poller's life, until `stop`: it polls these rails. `clock` gives nanoseconds.
pub(super) fn run(
    engine: &Engine<FabricNic>,
    rails: &[usize],
    sleeper: &Sleeper,
    stop: &AtomicBool,
    clock: impl Fn() -> u64,
) {
    let mut turns: Vec<u64> = rails.iter().map(|&rail| engine.turns(rail)).collect();
    // After a sleep everything is slow, so the first look has a measure of its own.
    let mut efforts = vec![[Effort::default(); 2]; rails.len()];
    let mut patience = Patience::default();
    let (mut looks, mut last_active) = (0, clock());
    while !stop.load(Ordering::Acquire) {
        let mut now = clock();
        let (mut work, mut others, mut active) = (false, false, false);
        for ((&rail, seen), effort) in rails.iter().zip(&mut turns).zip(&mut efforts) {
            let busy = engine.load(rail) > 0;
            work |= busy;
            if busy && engine.turns(rail) != *seen {
                others = true;
            } else {
                active |= engine.poll(rail, now).unwrap_or(0) > 0;
                let before = std::mem::replace(&mut now, clock());
                let slack = if looks == 0 { COLD_SLACK } else { WARM_SLACK };
                active |= effort[usize::from(looks > 0)].is_unusual(now - before, slack);
            }
            *seen = engine.turns(rail);
        }
        looks += 1;
        if active || work {
            last_active = now;
        }
        let idle = now - last_active;
        if active {
            patience = Patience::default();
        } else if others {
            // Whoever waits for these transfers makes their progress: do not get in the way.
            std::thread::sleep(LOOK_AWAY);
        } else if work || idle < HOT {
            patience.pause();
        } else if looks > LOOKS {
            let longest = HEARTBEAT.min(Duration::from_nanos(idle / SLEEP_PART));
            sleep(engine, rails, sleeper, stop, longest);
            looks = 0;
        }
    }
}

fn sleep(
    engine: &Engine<FabricNic>,
    rails: &[usize],
    sleeper: &Sleeper,
    stop: &AtomicBool,
    longest: Duration,
) {
    sleeper.asleep.store(true, Ordering::Relaxed);
    fence(Ordering::SeqCst); // see Sleeper::wake
    let work = rails.iter().any(|&rail| engine.load(rail) > 0);
    if !work && !stop.load(Ordering::Acquire) {
        let mut fds = Vec::with_capacity(rails.len());
        let mut quiet = true;
        for &rail in rails {
            let looked = engine.with_nic(rail, |nic| {
                fds.extend(nic.fd());
                nic.fd().is_none() || nic.may_sleep()
            });
            quiet &= looked.unwrap_or(false);
        }
        if quiet {
            let longest = if fds.len() == rails.len() { LONG_SLEEP } else { longest };
            sleeper.waiter.sleep(&fds, longest);
        }
    }
    sleeper.asleep.store(false, Ordering::Relaxed);
}

/// How to wait for something that has no way to wake us: look again at once for a while, then let
/// others run, then sleep a little between looks.
#[derive(Default)]
pub(super) struct Patience {
    rounds: u32,
}

impl Patience {
    const SPIN: u32 = 100;
    const YIELD: u32 = 2000;

    pub fn pause(&mut self) {
        self.rounds = self.rounds.saturating_add(1);
        match self.rounds {
            0..Self::SPIN => std::hint::spin_loop(),
            Self::SPIN..Self::YIELD => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}

/// Tells whether a poll did something for a peer. Providers with manual progress answer peers inside
/// a poll without saying so, and such a poll takes several times as long as one that finds nothing.
#[derive(Clone, Copy, Default)]
struct Effort {
    /// How long a poll that finds nothing takes, nanoseconds; 0 until the first.
    idle: u64,
    polls: u32,
}

impl Effort {
    /// Polls after which the idle time may rise, in case the machine became slower.
    const RELAX_EVERY: u32 = 1024;

    /// Whether a poll of `took` nanoseconds did something. `slack` is how much polls that find
    /// nothing differ.
    fn is_unusual(&mut self, took: u64, slack: u64) -> bool {
        self.polls = self.polls.wrapping_add(1);
        if self.idle == 0 || took < self.idle {
            self.idle = took.max(1);
        } else if self.polls % Self::RELAX_EVERY == 0 {
            self.idle += self.idle / 16 + 1;
        }
        took > 2 * self.idle + slack
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_poll_among_short_ones_is_unusual() {
        let mut effort = Effort::default();
        assert!(!effort.is_unusual(100, 50));
        assert!(!effort.is_unusual(240, 50));
        assert!(effort.is_unusual(260, 50));
        // A machine that becomes slower is not busy for ever.
        let busy = (0..100_000).filter(|_| effort.is_unusual(1000, 50)).count();
        assert!(busy < 60_000, "{busy}");
        assert!(!effort.is_unusual(1000, 50));
    }
}
