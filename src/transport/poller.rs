//! Progress while nobody waits: threads that poll the NICs, and sleep when there is nothing to do. And one that
//! sees to deadlines when these are stuck.

use std::time::Duration;

#[cfg(all(test, loom))]
use models::Waiter;

use crate::engine::{Engine, Nic};
use crate::error::Result;
#[cfg(not(all(test, loom)))]
use crate::fabric::Waiter;
use crate::fabric::thread_cpu_time;
use crate::nic::FabricNic;
use crate::sync::{AtomicBool, Ordering, fence};

/// How long a poller goes on looking at once after there was something to do, nanoseconds.
const HOT: u64 = 200_000;
/// After that it sleeps for this part of the time since there was something to do: soon after work it
/// looks often, since there may be more; long after, seldom.
const SLEEP_PART: u64 = 4;
/// How long it sleeps at most when no file descriptor will wake it: providers with manual progress need
/// its answers.
const HEARTBEAT: Duration = Duration::from_millis(10);
/// How long it sleeps at most when one will.
const LONG_SLEEP: Duration = Duration::from_secs(1);
/// How often the watchdog looks while something is under way.
const WATCH: Duration = Duration::from_secs(1);
/// Until it is woken.
const FOR_GOOD: Duration = Duration::from_secs(u32::MAX as u64);
/// How long it looks away while others make the progress.
const LOOK_AWAY: Duration = Duration::from_micros(100);
/// How long it looks between two sleeps, nanoseconds: a peer that got its answer may ask again at once.
const LOOK: u64 = 10_000;
/// By how much polls that find nothing differ in time: the first after a sleep, and the others;
/// nanoseconds. Too low costs an idle process CPU time, too high costs a peer's first operations time.
const COLD_SLACK: u64 = 5000;
const WARM_SLACK: u64 = 250;
/// A first poll that takes so much longer than an empty one is no accident.
const COLD_CERTAIN: u64 = 20_000;
/// And one that takes so long may have been interrupted by another thread: then it did not run for that long.
const INTERRUPTED: u64 = 1_000_000;
/// Time between two polls from which the second is slow too, because another thread ran.
const GAP: u64 = 5000;
/// Unusual polls, since it slept or was last sure, that make it sure that a peer is at work. A single
/// one may be an interrupt.
const EVIDENCE: u32 = 2;

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

    /// Wakes it whatever it does; at the next sleep, if it does not sleep now.
    pub fn rouse(&self) {
        self.waiter.wake();
    }
}

/// The life of the poller in bed `index`, until `stop`: it polls these rails. `clock` gives nanoseconds.
pub(super) fn run(
    engine: &Engine<FabricNic>,
    rails: &[usize],
    sleepers: &[Sleeper],
    index: usize,
    stop: &AtomicBool,
    clock: impl Fn() -> u64,
) {
    // Turns on each rail as last seen, and when somebody else took one.
    let mut turns: Vec<(u64, u64)> = rails.iter().map(|&rail| (engine.turns(rail), 0)).collect();
    // After a sleep everything is slow, so the first look has a measure of its own. And unusual polls of
    // each rail: what slows one down after a sleep slows down all.
    let mut efforts = vec![([Effort::default(); 2], 0); rails.len()];
    let serves = |nic: &mut FabricNic| Ok(nic.peers_need_polls());
    let serves = rails.iter().any(|&rail| engine.with_nic(rail, serves).unwrap_or(true));
    let mut patience = Patience::default();
    let mut moves = 0;
    let mut cold = true;
    let (mut last_active, mut woken) = (clock(), 0);
    let mut looked = last_active;
    // When it was, and how long this thread had run: at the last sleep or long poll.
    let mut ran = (looked, thread_cpu_time());
    while !stop.load(Ordering::Acquire) {
        let mut now = clock();
        // If others ran meanwhile, their data are in the cache.
        let slack = if now - looked > GAP { COLD_SLACK } else { WARM_SLACK };
        let (mut work, mut others, mut active) = (false, false, false);
        for ((&rail, (seen, driven)), ([first, later], evidence)) in
            rails.iter().zip(&mut turns).zip(&mut efforts)
        {
            let busy = engine.load(rail) > 0;
            work |= busy;
            if engine.turns(rail) != *seen {
                *driven = now;
            }
            // Not between two turns of theirs either, nor between two batches: two threads that take
            // turns at a rail are slower than one.
            if now - *driven < LOOK_AWAY.as_nanos() as u64 {
                others = true;
            } else {
                match engine.poll(rail, now) {
                    Some(events) => active |= events > 0,
                    None => (*driven, others) = (now, true),
                }
                let before = std::mem::replace(&mut now, clock());
                *evidence += match now - before {
                    took @ INTERRUPTED.. => {
                        let was = std::mem::replace(&mut ran, (now, thread_cpu_time()));
                        let stolen =
                            (now - was.0).saturating_sub((ran.1 - was.1).as_nanos() as u64);
                        if stolen < took / 2 { EVIDENCE } else { 0 }
                    }
                    took if cold => {
                        let excess = first.excess(took);
                        u32::from(excess > COLD_SLACK) + u32::from(excess > COLD_CERTAIN)
                    }
                    took => u32::from(later.excess(took) > slack),
                };
                active |= serves && *evidence >= EVIDENCE;
            }
            *seen = engine.turns(rail);
        }
        (cold, looked) = (false, now);
        if engine.moves() != moves {
            // What failed here may go over a rail whose poller sleeps.
            moves = engine.moves();
            sleepers.iter().for_each(Sleeper::wake);
        }
        if active {
            patience = Patience::default();
            efforts.iter_mut().for_each(|(_, evidence)| *evidence = 0);
        }
        if active || work {
            last_active = now;
        }
        let idle = now - last_active;
        if active {
            // There may be more.
        } else if others {
            // Whoever waits for these transfers makes their progress: do not get in the way.
            std::thread::sleep(LOOK_AWAY);
        } else if work || idle < HOT {
            patience.pause();
        } else if now - woken > LOOK {
            let longest = HEARTBEAT.min(Duration::from_nanos(idle / SLEEP_PART));
            let sleep = |waiter: &Waiter| sleep(engine, rails, waiter, longest);
            sleep_unless_needed(engine, rails, &sleepers[index], stop, moves, sleep);
            efforts.iter_mut().for_each(|(_, evidence)| *evidence = 0);
            (cold, woken) = (true, clock());
            ran = (woken, thread_cpu_time());
        }
    }
}

/// Calls `sleep`, unless there is something to do: work on these rails, work that moved to others' since there were
/// so many `moves`, or to stop.
fn sleep_unless_needed<N: Nic>(
    engine: &Engine<N>,
    rails: &[usize],
    sleeper: &Sleeper,
    stop: &AtomicBool,
    moves: u64,
    sleep: impl FnOnce(&Waiter),
) {
    sleeper.asleep.store(true, Ordering::Relaxed);
    fence(Ordering::SeqCst); // see Sleeper::wake
    let work = rails.iter().any(|&rail| engine.load(rail) > 0);
    // In this order: where work is gone because it moved, that is seen.
    if !work && engine.moves() == moves && !stop.load(Ordering::Acquire) {
        sleep(&sleeper.waiter);
    }
    sleeper.asleep.store(false, Ordering::Relaxed);
}

/// Sleeps until a device has something, somebody calls, or `longest` passes. Not where a device cannot tell.
fn sleep(engine: &Engine<FabricNic>, rails: &[usize], waiter: &Waiter, longest: Duration) {
    let mut fds = Vec::with_capacity(rails.len());
    let mut quiet = true;
    for &rail in rails {
        let looked = engine.with_nic(rail, |nic| {
            fds.extend(nic.fd());
            Ok(nic.may_sleep())
        });
        quiet &= looked.unwrap_or(false);
    }
    if quiet {
        let longest = if fds.len() == rails.len() { LONG_SLEEP } else { longest };
        waiter.sleep(&fds, longest);
    }
}

/// The watchdog's life, until `stop`. It ends what is overdue while every other thread may be inside the provider,
/// and not come back. With nothing under way on `rails`, all of them, it sleeps until there is something.
pub(super) fn watch(
    engine: &Engine<FabricNic>,
    rails: &[usize],
    sleeper: &Sleeper,
    stop: &AtomicBool,
    clock: impl Fn() -> u64,
) {
    while !stop.load(Ordering::Acquire) {
        let for_good = |waiter: &Waiter| waiter.sleep(&[], FOR_GOOD);
        sleep_unless_needed(engine, rails, sleeper, stop, engine.moves(), for_good);
        if !stop.load(Ordering::Acquire) {
            // Submissions do not wake it from this: it is to look now and then, not to hurry.
            sleeper.waiter.sleep(&[], WATCH);
        }
        engine.expire_all(clock());
    }
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
    /// Polls after which the idle time may rise, in case the machine became slower. Rare, because it
    /// also rises while a peer keeps every poll busy.
    const RELAX_EVERY: u32 = 1 << 16;

    /// By how much a poll of `took` nanoseconds took longer than twice an empty one.
    fn excess(&mut self, took: u64) -> u64 {
        self.polls = self.polls.wrapping_add(1);
        if self.idle == 0 || took < self.idle {
            self.idle = took.max(1);
        } else if self.polls % Self::RELAX_EVERY == 0 {
            self.idle += self.idle / 16 + 1;
        }
        took.saturating_sub(2 * self.idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_poll_among_short_ones_is_unusual() {
        let mut effort = Effort::default();
        assert_eq!(effort.excess(100), 0);
        assert_eq!(effort.excess(200), 0);
        assert_eq!(effort.excess(500), 300);
        assert_eq!(effort.excess(90), 0);
        assert_eq!(effort.excess(500), 320);
        // A machine that became slower is not busy for ever.
        let relaxed = (0..20_000_000).position(|_| effort.excess(300) == 0);
        assert!(relaxed.is_some());
    }
}

/// What a poller and those who give it work do to each other, in every order (loom).
#[cfg(all(test, loom))]
mod models {
    use std::os::fd::RawFd;
    use std::sync::Arc;

    use loom::sync::Condvar;

    use super::*;
    use crate::engine::BatchId;
    use crate::engine::models::{Bench, QuickNic, check, join, spawn};
    use crate::sync::Mutex;

    /// A bed without an alarm clock: who is not woken sleeps for ever, and loom finds that.
    pub(super) struct Waiter {
        woken: Mutex<bool>,
        changed: Condvar,
    }

    impl Waiter {
        pub fn new() -> Result<Self> {
            Ok(Self { woken: Mutex::new(false), changed: Condvar::new() })
        }

        pub fn wake(&self) {
            *self.woken.lock() = true;
            self.changed.notify_one();
        }

        pub fn sleep(&self, _: &[RawFd], _: Duration) {
            let mut woken = self.woken.lock();
            while !*woken {
                woken = self.changed.wait(woken).expect("not poisoned");
            }
            *woken = false;
        }
    }

    struct World {
        bench: Bench,
        /// What is submitted: when it has ended, pollers stop.
        batch: BatchId,
        /// One a rail.
        sleepers: Vec<Sleeper>,
        stop: AtomicBool,
    }

    impl World {
        fn over(nics: Vec<QuickNic>) -> Arc<Self> {
            let sleepers = nics.iter().map(|_| Sleeper::new().expect("made")).collect();
            let bench = Bench::over(nics);
            let batch = bench.engine.allocate_batch(1).expect("room");
            Arc::new(Self { bench, batch, sleepers, stop: AtomicBool::new(false) })
        }

        /// As [`run`], without the clock, until the batch has ended.
        fn poll(&self, rail: usize) {
            let engine = &self.bench.engine;
            let mut moves = 0;
            let mut now = 0;
            while !self.stop.load(Ordering::Acquire) {
                let work = engine.load(rail) > 0;
                let mut idle = false;
                if work {
                    now += 10_000_000;
                    idle = engine.poll(rail, now).unwrap_or(0) == 0;
                }
                if engine.moves() != moves {
                    moves = engine.moves();
                    self.sleepers.iter().for_each(Sleeper::wake);
                }
                if work && self.bench.is_final(self.batch) {
                    self.stop();
                } else if idle {
                    loom::thread::yield_now();
                } else if !work {
                    let sleep = |waiter: &Waiter| waiter.sleep(&[], HEARTBEAT);
                    let own = &self.sleepers[rail];
                    sleep_unless_needed(engine, &[rail], own, &self.stop, moves, sleep);
                }
            }
        }

        fn submit(&self) {
            self.bench.submit(self.batch);
            self.sleepers.iter().for_each(Sleeper::wake);
        }

        fn stop(&self) {
            self.stop.store(true, Ordering::Release);
            self.sleepers.iter().for_each(Sleeper::wake);
        }
    }

    /// Somebody submits and goes, and does not look again: the poller does it all, however the two, and another
    /// who drives for a turn, meet.
    #[test]
    fn a_poller_does_what_is_left_to_it() {
        check(2, || {
            let world = World::over(vec![QuickNic::default()]);
            let poller = spawn(&world, |world| world.poll(0));
            let passer = spawn(&world, |world| world.bench.engine.progress(0));
            world.submit();
            join(passer);
            if world.bench.is_final(world.batch) {
                world.stop(); // it was one of these two who ended it
            }
            join(poller);
        });
    }

    #[test]
    fn a_sleeping_poller_is_stopped() {
        check(None, || {
            let world = World::over(vec![QuickNic::default()]);
            let poller = spawn(&world, |world| world.poll(0));
            world.stop();
            join(poller);
        });
    }

    /// What failed goes to the rail of another poller, which has nothing to do and sleeps.
    #[test]
    fn a_poller_is_woken_for_what_another_gives_it() {
        check(1, || {
            let failing = QuickNic::failing(1);
            let world = World::over(vec![failing, QuickNic::default()]);
            let pollers = [0, 1].map(|rail| spawn(&world, move |world| world.poll(rail)));
            world.submit();
            for now in 1..=2 {
                world.bench.engine.poll(0, now * 10_000_000);
            }
            if world.bench.is_final(world.batch) {
                world.stop();
            }
            pollers.into_iter().for_each(join);
        });
    }
}
