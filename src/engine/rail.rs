//! A rail: one local NIC with the queue in front of it.
//!
//! Whoever gets the driver's lock posts and polls for all. Submitters append to the queue under a
//! short lock of its own and never wait for the driver.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use crossbeam_utils::CachePadded;
use parking_lot::Mutex;

use super::batch::{Batches, Ended, GroupRef, Groups, Status};
use super::failure::Failure;
use super::nic::{Nic, Operation, PeerAddress, Post};
use super::region::Users;
use super::table::Table;
use super::target::Target;
use crate::error::{Code, Error, Result};

/// Posts between two looks at the completion queue: completions are not kept waiting by a long
/// queue, nor the queue by completions.
const TURN: usize = 32;
/// Turns before a driver must publish what ended: with a provider that completes at once, others'
/// submissions could keep it here forever.
const TURNS: usize = 8;
/// Polls without a completion before a post that was put off is tried again. Trying at once only gets
/// in the provider's way: with `shm` it takes a lock that the target needs to make room.
const HOLD_OFF: u32 = 32;
/// Longest wait for the NIC while someone else is using it: no call of a healthy provider takes so long.
const UNRESPONSIVE: Duration = Duration::from_secs(10);
/// How often the processor is offered to others in [`Rail::give_way`], some 0.3 us each if none takes it.
const GIVE_WAY: usize = 100;
/// Longest wait of a cancel for whoever is driving.
const SWEEP_WAIT: Duration = Duration::from_millis(500);
/// How often deadlines are looked at, nanoseconds.
const SCAN_EVERY: u64 = 20_000_000;

/// Causes that are not the provider's words.
const NOT_POSTED: &str = "its deadline passed before all of it was posted";
const NOT_BACK: &str = "its deadline passed and the provider has not given it back";
pub(super) const STUCK: &str = "its deadline passed and the provider does not return from a call";

/// A range of one group on its way over one rail. Cut into operations when it is posted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub group: GroupRef,
    pub local: u64,
    pub remote: u64,
    pub length: u64,
    pub key: u64,
    pub peer: PeerAddress,
    pub region: u32,
    pub write: bool,
}

/// One operation in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    group: GroupRef,
    length: u64,
    peer: PeerAddress,
    region: u32,
    state: State,
    /// Its group was told that its deadline passed.
    told: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Write,
    Read,
}

/// What the rails of an engine share.
pub(super) struct Shared {
    pub batches: Batches,
    pub users: Users,
    pub targets: Table<ArcSwapOption<Target>>,
    /// Longest operation to post, bytes.
    pub slice: u64,
}

impl Shared {
    /// The target of a group, which must be held; `None` if it is closed.
    fn target(&self, group: GroupRef) -> Option<Arc<Target>> {
        self.targets.at(self.batches.group(group).aim().target)?.load_full()
    }

    /// A failure of (a part of) a group, which must be held.
    pub fn failure(
        &self,
        group: GroupRef,
        length: u64,
        nic: Option<&Arc<str>>,
        now: u64,
        cause: Cow<'static, str>,
    ) -> Failure {
        let peer = self.target(group);
        let group = self.batches.group(group);
        Failure {
            write: group.aim().write,
            length,
            peer: peer.map(|target| target.name.clone()),
            nic: nic.cloned(),
            age: group.age(now),
            cause,
        }
    }
}

/// Counters of one rail since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RailCounters {
    /// Operations posted.
    pub posted: u64,
    /// Operations completed without an error.
    pub completed: u64,
    /// Operations that ended with an error, or were refused when posted.
    pub failed: u64,
    /// Bytes of completed writes.
    pub bytes_written: u64,
    /// Bytes of completed reads.
    pub bytes_read: u64,
    /// Posts that the provider put off (`EAGAIN`).
    pub put_off: u64,
    /// Turns that left work queued for lack of credits.
    pub starved: u64,
    /// Completions that belong to no operation in flight.
    pub strays: u64,
    /// Operations whose deadline passed.
    pub overdue: u64,
    /// Bytes queued or in flight now.
    pub pending_bytes: u64,
}

#[derive(Default)]
struct Counters {
    posted: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    bytes_written: AtomicU64,
    bytes_read: AtomicU64,
    put_off: AtomicU64,
    starved: AtomicU64,
    strays: AtomicU64,
    overdue: AtomicU64,
}

/// Adds without a locked instruction: counters are only written under the driver's lock.
fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Ordering::Relaxed) + value, Ordering::Relaxed);
}

/// What a turn of a rail brought: to be published, and logged.
#[derive(Default)]
pub(super) struct Outcome {
    pub ended: Vec<Ended>,
    pub failures: Vec<Failure>,
}

pub(super) struct Rail<N> {
    pub name: Arc<str>,
    /// Among the engine's rails.
    pub index: usize,
    /// Bytes queued or in flight: the load by which rails are chosen, and "is there work".
    load: CachePadded<AtomicU64>,
    queue: CachePadded<Mutex<VecDeque<Span>>>,
    driver: CachePadded<Mutex<Driver<N>>>,
    /// Turns driven, so that a poller sees that others do its work.
    turns: AtomicU64,
    counters: Counters,
}

/// Parts of groups that are done with, one way or another: their uses of regions and their load end, and
/// with the last of a group the group. Regions and load are told when it is dropped, or another region's
/// turn comes: that is cheaper than one by one.
struct Ends<'a, N> {
    rail: &'a Rail<N>,
    shared: &'a Shared,
    groups: Groups<'a>,
    ended: &'a mut Vec<Ended>,
    region: u32,
    /// Of that region.
    uses: u32,
    bytes: u64,
}

impl<'a, N> Ends<'a, N> {
    fn new(rail: &'a Rail<N>, shared: &'a Shared, outcome: &'a mut Outcome) -> Self {
        let (groups, ended) = (shared.batches.groups(), &mut outcome.ended);
        Self { rail, shared, groups, ended, region: 0, uses: 0, bytes: 0 }
    }

    /// `length` bytes of a group, in `region`, are done with.
    #[inline]
    fn end(&mut self, group: GroupRef, length: u64, region: u32) {
        if region != self.region {
            self.leave();
            self.region = region;
        }
        self.uses += 1;
        self.bytes += length;
        if let Some(status) = self.groups.get(group).subtract(length) {
            self.ended.push(Ended::new(group, status));
        }
    }

    fn leave(&mut self) {
        if self.uses > 0 {
            self.shared.users.leave(self.region, self.uses);
            self.uses = 0;
        }
    }
}

impl<N> Drop for Ends<'_, N> {
    fn drop(&mut self) {
        self.leave();
        if self.bytes > 0 {
            self.rail.load.fetch_sub(self.bytes, Ordering::Release);
        }
    }
}

struct Driver<N> {
    nic: N,
    flights: Box<[Flight]>,
    free: Vec<u32>,
    /// Taken from the queue, not posted yet.
    taken: VecDeque<Span>,
    completed: Vec<u32>,
    failed: Vec<(u32, String)>,
    /// Polls to go before the provider is asked again after it said "again".
    hold_off: u32,
    next_scan: u64,
}

impl<N: Nic> Rail<N> {
    pub fn new(name: String, index: usize, nic: N) -> Self {
        let depth = nic.depth();
        let idle = Flight {
            group: GroupRef::default(),
            length: 0,
            peer: PeerAddress(0),
            region: 0,
            state: State::Free,
            told: false,
        };
        let driver = Driver {
            nic,
            flights: vec![idle; depth as usize].into(),
            // Lowest last, so that it is used first and a light load stays in few cache lines.
            free: (0..depth).rev().collect(),
            taken: VecDeque::with_capacity(1024),
            completed: Vec::with_capacity(2 * TURN),
            failed: Vec::new(),
            hold_off: 0,
            next_scan: 0,
        };
        Self {
            name: name.into(),
            index,
            load: CachePadded::default(),
            queue: CachePadded::new(Mutex::new(VecDeque::with_capacity(1024))),
            driver: CachePadded::new(Mutex::new(driver)),
            turns: AtomicU64::new(0),
            counters: Counters::default(),
        }
    }

    /// Bytes queued or in flight.
    pub fn load(&self) -> u64 {
        self.load.load(Ordering::Acquire)
    }

    /// Turns driven so far, by anyone.
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Calls `f` with the NIC, when no one else uses it.
    ///
    /// # Errors
    /// Those of `f`; [`Code::Busy`] if whoever uses it does not return from the provider in 10 seconds. (Seen with
    /// `shm`, where a peer that is killed can leave a lock in shared memory taken for ever.)
    pub fn with_nic<R>(&self, f: impl FnOnce(&mut N) -> Result<R>) -> Result<R> {
        match self.driver.try_lock_for(UNRESPONSIVE) {
            Some(mut driver) => f(&mut driver.nic),
            None => Err(Error::new(
                Code::Busy,
                format!(
                    "{} does not respond: the provider has not returned for {UNRESPONSIVE:?}",
                    self.name
                ),
            )),
        }
    }

    /// Between two of many uses of the NIC: lets whoever drives the rail have a turn, if there is work for
    /// one. Drivers only try the lock, and would hardly ever find it free.
    pub fn give_way(&self) {
        let seen = self.turns();
        for _ in 0..GIVE_WAY {
            if self.load() == 0 || self.turns() != seen {
                break;
            }
            std::thread::yield_now();
        }
    }

    /// Appends spans, whose bytes are `bytes`.
    pub fn push(&self, spans: &[Span], bytes: u64) {
        self.load.fetch_add(bytes, Ordering::AcqRel);
        self.queue.lock().extend(spans);
    }

    /// One turn of posting and polling, unless someone else is at it (`None`). The count of
    /// operations posted or finished. Groups that ended are appended to `outcome`; publish them.
    pub fn drive(&self, shared: &Shared, now: u64, outcome: &mut Outcome) -> Option<usize> {
        // Looking first leaves the lock's cache line with whoever has it.
        if self.driver.is_locked() {
            return None;
        }
        let mut driver = self.driver.try_lock()?;
        add(&self.turns, 1);
        let mut events = 0;
        for _ in 0..TURNS {
            let finished = self.poll(&mut driver, shared, now, outcome);
            events += finished;
            if driver.hold_off > 0 {
                driver.hold_off = if finished > 0 { 0 } else { driver.hold_off - 1 };
                if driver.hold_off > 0 {
                    break;
                }
            }
            let posted = self.post(&mut driver, shared, now, outcome);
            events += posted;
            if posted < TURN {
                break;
            }
        }
        if now >= driver.next_scan {
            driver.next_scan = now + SCAN_EVERY;
            self.scan(&mut driver, shared, now, outcome);
        }
        Some(events)
    }

    fn poll(
        &self,
        driver: &mut Driver<N>,
        shared: &Shared,
        now: u64,
        outcome: &mut Outcome,
    ) -> usize {
        let Driver { nic, flights, free, completed, failed, .. } = driver;
        completed.clear();
        nic.poll(completed, failed);
        let mut land = |slot: u32| {
            let flight = flights.get_mut(slot as usize).filter(|it| it.state != State::Free);
            let Some(flight) = flight else {
                add(&self.counters.strays, 1);
                return None;
            };
            free.push(slot);
            Some(std::mem::replace(flight, Flight { state: State::Free, ..*flight }))
        };
        let (mut count, mut written, mut read) = (0, 0, 0);
        let mut ends = Ends::new(self, shared, outcome);
        for flight in completed.iter().filter_map(|&slot| land(slot)) {
            count += 1;
            *(if flight.state == State::Write { &mut written } else { &mut read }) += flight.length;
            ends.end(flight.group, flight.length, flight.region);
        }
        drop(ends);
        if count > 0 {
            add(&self.counters.completed, count);
            add(&self.counters.bytes_written, written);
            add(&self.counters.bytes_read, read);
        }
        let events = completed.len() + failed.len();
        for (slot, cause) in failed.drain(..) {
            let Some(flight) = land(slot) else { continue };
            self.fail(shared, flight.group, flight.length, now, cause, outcome);
            self.forget(shared, flight.group, flight.peer);
            Ends::new(self, shared, outcome).end(flight.group, flight.length, flight.region);
        }
        events
    }

    /// An operation failed, and its group with it.
    fn fail(
        &self,
        shared: &Shared,
        group: GroupRef,
        length: u64,
        now: u64,
        cause: String,
        outcome: &mut Outcome,
    ) {
        add(&self.counters.failed, 1);
        let failure = shared.failure(group, length, Some(&self.name), now, cause.into());
        shared.batches.fail(group, Status::Failed, &failure);
        outcome.failures.push(failure);
    }

    /// See [`Target::forget`].
    fn forget(&self, shared: &Shared, group: GroupRef, peer: PeerAddress) {
        if let Some(target) = shared.target(group) {
            target.forget(self.index, peer);
        }
    }

    /// The deadline of (a part of) a group passed.
    fn time_out(
        &self,
        shared: &Shared,
        group: GroupRef,
        length: u64,
        now: u64,
        cause: &'static str,
        outcome: &mut Outcome,
    ) {
        let failure = shared.failure(group, length, Some(&self.name), now, cause.into());
        // Its other parts are late too: once is enough.
        if shared.batches.fail(group, Status::Timeout, &failure) {
            outcome.failures.push(failure);
        }
    }

    fn post(
        &self,
        driver: &mut Driver<N>,
        shared: &Shared,
        now: u64,
        outcome: &mut Outcome,
    ) -> usize {
        let Driver { nic, flights, free, taken, hold_off, .. } = driver;
        let mut groups = shared.batches.groups();
        let slice = shared.slice.min(nic.max_length());
        let mut posted = 0;
        while posted < TURN {
            if taken.is_empty() {
                std::mem::swap(taken, &mut *self.queue.lock());
            }
            let Some(span) = taken.front_mut() else { break };
            let group = groups.get(span.group);
            if now >= group.deadline() && !group.is_condemned() {
                self.time_out(shared, span.group, span.length, now, NOT_POSTED, outcome);
            }
            if group.is_condemned() {
                let span = taken.pop_front().expect("it is the front");
                Ends::new(self, shared, outcome).end(span.group, span.length, span.region);
                continue;
            }
            let Some(&slot) = free.last() else {
                add(&self.counters.starved, 1);
                break;
            };
            let length = span.length.min(slice);
            let operation = Operation {
                write: span.write,
                local: span.local,
                length,
                region: span.region,
                peer: span.peer,
                remote: span.remote,
                key: span.key,
                slot,
            };
            match nic.post(&operation) {
                Post::Done => {
                    posted += 1;
                    free.pop();
                    flights[slot as usize] = Flight {
                        group: span.group,
                        length,
                        peer: span.peer,
                        region: span.region,
                        state: if span.write { State::Write } else { State::Read },
                        told: false,
                    };
                    if length == span.length {
                        // The operation takes over the span's use of the region.
                        taken.pop_front();
                    } else {
                        shared.users.enter_more(span.region, 1);
                        span.local += length;
                        span.remote += length;
                        span.length -= length;
                    }
                }
                Post::Again => {
                    add(&self.counters.put_off, 1);
                    *hold_off = HOLD_OFF;
                    break;
                }
                Post::Failed(errno) => {
                    // Condemned now, the span is given up in the next round.
                    self.fail(shared, span.group, length, now, nic.explain(errno), outcome);
                    self.forget(shared, span.group, span.peer);
                }
            }
        }
        if posted > 0 {
            add(&self.counters.posted, posted as u64);
        }
        posted
    }

    /// Ends what is past its deadline. What is queued is given up; what is in flight stays the
    /// provider's until it comes back, but its group is told now.
    fn scan(&self, driver: &mut Driver<N>, shared: &Shared, now: u64, outcome: &mut Outcome) {
        let mut groups = shared.batches.groups();
        for flight in driver.flights.iter_mut().filter(|it| it.state != State::Free && !it.told) {
            if now >= groups.get(flight.group).deadline() {
                flight.told = true;
                add(&self.counters.overdue, 1);
                self.time_out(shared, flight.group, flight.length, now, NOT_BACK, outcome);
                shared.batches.hold(flight.group);
                outcome.ended.push(Ended::new(flight.group, Status::Timeout));
            }
        }
        let mut keep = |span: &Span| {
            let group = groups.get(span.group);
            if now >= group.deadline() && !group.is_condemned() {
                self.time_out(shared, span.group, span.length, now, NOT_POSTED, outcome);
            }
            let keep = !group.is_condemned();
            if !keep {
                Ends::new(self, shared, outcome).end(span.group, span.length, span.region);
            }
            keep
        };
        driver.taken.retain(&mut keep);
        self.queue.lock().retain(&mut keep);
    }

    /// Gives up what is condemned without waiting for the next turn of its queue. If someone drives for
    /// longer than [`SWEEP_WAIT`], it is left to him.
    pub fn sweep(&self, shared: &Shared, now: u64, outcome: &mut Outcome) {
        if let Some(mut driver) = self.driver.try_lock_for(SWEEP_WAIT) {
            self.scan(&mut driver, shared, now, outcome);
        }
    }

    pub fn counters(&self) -> RailCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        RailCounters {
            posted: get(&counters.posted),
            completed: get(&counters.completed),
            failed: get(&counters.failed),
            bytes_written: get(&counters.bytes_written),
            bytes_read: get(&counters.bytes_read),
            put_off: get(&counters.put_off),
            starved: get(&counters.starved),
            strays: get(&counters.strays),
            overdue: get(&counters.overdue),
            pending_bytes: self.load(),
        }
    }
}
