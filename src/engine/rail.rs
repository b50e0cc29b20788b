//! A rail: one local NIC with the queue in front of it.
//!
//! Whoever gets the driver's lock posts and polls for all. Submitters append to the queue under a
//! short lock of its own and never wait for the driver.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::batch::{Batches, Ended, GroupRef, Groups, Status};
use super::failure::Failure;
use super::health::Health;
use super::nic::{Nic, Operation, Post};
use super::peers::{Peer, PeerIndex, Peers, Released};
use super::region::Users;
use super::table::Table;
use super::target::Target;
use crate::error::{Code, Error, Result};
use crate::fault::{Class, Fault, Faults};
use crate::sync::{ArcSwapOption, AtomicU64, Mutex, Ordering};

/// Posts between two looks at the completion queue: completions are not kept waiting by a long
/// queue, nor the queue by completions.
const TURN: usize = 32;
/// Turns before a driver must publish what ended: with a provider that completes at once, others'
/// submissions could keep it here forever.
const TURNS: usize = 8;
/// Polls without a completion before a post that was put off is tried again. Trying at once only gets
/// in the provider's way: with `shm` it takes a lock that the target needs to make room.
const HOLD_OFF: u64 = 32;
/// How long a peer may take to answer the provider's greeting, nanoseconds.
const GREETING: u64 = 5_000_000_000;
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
    /// Address in the peer's memory.
    pub remote: u64,
    /// What the device wants remote addresses relative to.
    pub base: u64,
    pub length: u64,
    pub key: u64,
    pub peer: PeerIndex,
    pub region: u32,
    /// How often it was tried before.
    pub tries: u8,
    pub write: bool,
}

/// One operation in flight: of its [`Span`] what is needed to try it again.
#[derive(Clone, Copy, Debug)]
struct Flight {
    group: GroupRef,
    local: u64,
    remote: u64,
    length: u32,
    peer: PeerIndex,
    region: u32,
    tries: u8,
    state: State,
    /// Its group was told that its deadline passed.
    told: bool,
}

/// A part of a group whose operation failed. It still counts as load of its rail and as a use of its region.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    pub rail: usize,
    pub group: GroupRef,
    pub local: u64,
    pub remote: u64,
    pub length: u64,
    pub peer: PeerIndex,
    pub region: u32,
    /// How often it was tried.
    pub tries: u8,
    pub write: bool,
    pub fault: Fault,
}

/// What is needed to post.
struct Posting<'a, N> {
    rail: &'a Rail<N>,
    shared: &'a Shared,
    groups: Groups<'a>,
    nic: &'a mut N,
    flights: &'a mut [Flight],
    free: &'a mut Vec<u32>,
    slice: u64,
    now: u64,
    outcome: &'a mut Outcome,
}

impl<N: Nic> Posting<'_, N> {
    /// Posts a span to its peer, or as much of it as goes in one operation.
    #[inline(always)]
    fn post(&mut self, peer: &mut Peer, span: &mut Span) -> Step {
        let group = self.groups.get(span.group);
        if self.now >= group.deadline() && !group.is_condemned() {
            let (group, length) = (span.group, span.length);
            self.rail.time_out(self.shared, group, length, self.now, NOT_POSTED, self.outcome);
        }
        if group.is_condemned() {
            let mut ends = Ends::new(self.rail, self.shared, &mut self.outcome.ended);
            ends.end(span.group, span.length, span.region);
            return Step::Gone;
        }
        let Some(&slot) = self.free.last() else { return Step::Full };
        if !peer.met {
            match self.greet(peer, span) {
                Step::Whole => peer.met = true,
                step => return step,
            }
        }
        let longest = self.nic.longest(span.region, peer.address, span.key);
        let length = span.length.min(longest.unwrap_or(self.slice));
        let operation = Operation {
            write: span.write,
            local: span.local,
            length,
            region: span.region,
            peer: peer.address,
            remote: span.remote - span.base,
            key: span.key,
            slot,
        };
        match self.nic.post(&operation) {
            Post::Done => {
                self.free.pop();
                peer.flying += 1;
                self.flights[slot as usize] = Flight {
                    group: span.group,
                    local: span.local,
                    remote: span.remote,
                    length: length as u32,
                    peer: span.peer,
                    region: span.region,
                    tries: span.tries.saturating_add(1),
                    state: if span.write { State::Write } else { State::Read },
                    told: false,
                };
                if length == span.length {
                    // The operation takes over the span's use of the region.
                    return Step::Whole;
                }
                self.shared.users.enter_more(span.region, 1);
                span.local += length;
                span.remote += length;
                span.length -= length;
                Step::Part
            }
            Post::Again => Step::Again,
            Post::Failed(errno) => {
                self.refused(span, self.nic.explain(errno));
                Step::Gone
            }
        }
    }

    /// See [`Nic::greet`].
    #[cold]
    fn greet(&mut self, peer: &mut Peer, span: &Span) -> Step {
        if peer.broken {
            return Step::Again; // see `Rail::post`
        }
        match self.nic.greet(peer.address, span.remote - span.base, span.key) {
            Post::Done => return Step::Whole,
            Post::Again if peer.greeted == 0 => peer.greeted = self.now.max(1),
            Post::Again if self.now.saturating_sub(peer.greeted) < GREETING => {}
            Post::Again => {
                let fault = self.nic.unanswered(Duration::from_nanos(GREETING));
                self.refused(span, fault);
                peer.broken = true;
                return Step::Gone;
            }
            Post::Failed(errno) => {
                self.refused(span, self.nic.explain(errno));
                return Step::Gone;
            }
        }
        Step::Again
    }

    /// A peer cannot be connected anew: nothing that waits for it can be posted.
    #[cold]
    fn unreachable(&mut self, peer: &mut Peer, error: &Error) {
        for span in std::mem::take(&mut peer.waiting) {
            self.refused(&span, Fault::of(Class::Rail, error.text.clone()));
        }
    }

    fn refused(&mut self, span: &Span, fault: Fault) {
        self.rail.refused(span, fault, self.outcome);
    }
}

/// How a post of a span went.
enum Step {
    /// All of it is in flight.
    Whole,
    /// It is shorter now.
    Part,
    /// There is nothing to post any more: given up, or broken.
    Gone,
    /// There is no slot.
    Full,
    /// The provider does not want it now.
    Again,
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
    pub released: Arc<Released>,
    /// Until when it matters that operations succeed, because others failed.
    pub ailing_until: AtomicU64,
    /// Longest operation to post, bytes; fits in 32 bits.
    pub slice: u64,
}

impl Shared {
    /// Operations failed lately: NICs may be paused, and those that work again are to be noticed.
    pub fn is_ailing(&self, now: u64) -> bool {
        now < self.ailing_until.load(Ordering::Relaxed)
    }

    /// The target of a group, which must be held; `None` if it is closed.
    pub fn target(&self, group: GroupRef) -> Option<Arc<Target>> {
        let aim = self.batches.group(group).aim();
        self.target_at(aim.target, aim.generation)
    }

    /// The target in a slot, if it is still the one of that generation.
    pub fn target_at(&self, slot: u32, generation: u32) -> Option<Arc<Target>> {
        let found = self.targets.get(slot, generation)?.load_full();
        // The slot may have become another's between the two.
        self.targets.get(slot, generation)?;
        found
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
            peer_nic: None,
            nic: nic.cloned(),
            age: group.age(now),
            tries: 1,
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
    /// Operations that ended with an error, or were refused when posted; most are tried again.
    pub failed: u64,
    /// The same by whose fault it was.
    pub faults: Faults,
    /// Operations of other rails and its own that failed and were given to this one to try again.
    pub retried: u64,
    /// It failed too often in a row, and has not been seen to work since.
    pub paused: bool,
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

impl RailCounters {
    /// Bytes of completed operations.
    pub fn bytes(&self) -> u64 {
        self.bytes_written + self.bytes_read
    }
}

#[derive(Default)]
struct Counters {
    posted: AtomicU64,
    completed: AtomicU64,
    faults: [AtomicU64; Class::ALL.len()],
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
    pub broken: Vec<Broken>,
}

pub(super) struct Rail<N> {
    pub name: Arc<str>,
    /// Among the engine's rails.
    pub index: usize,
    pub health: Health,
    /// See [`Nic::connects`].
    connects: bool,
    /// Operations that it was given after they had failed.
    pub retried: AtomicU64,
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
pub(super) struct Ends<'a, N> {
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
    pub fn new(rail: &'a Rail<N>, shared: &'a Shared, ended: &'a mut Vec<Ended>) -> Self {
        let groups = shared.batches.groups();
        Self { rail, shared, groups, ended, region: 0, uses: 0, bytes: 0 }
    }

    /// `length` bytes of a group, in `region`, are done with.
    #[inline]
    pub fn end(&mut self, group: GroupRef, length: u64, region: u32) {
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
    failed: Vec<(u32, Fault)>,
    peers: Peers,
    polls: u64,
    next_scan: u64,
}

impl<N: Nic> Rail<N> {
    /// `keep`: peers without users that stay known.
    pub fn new(name: String, index: usize, nic: N, keep: usize) -> Self {
        let depth = nic.depth();
        let connects = nic.connects();
        let idle = Flight {
            group: GroupRef::default(),
            local: 0,
            remote: 0,
            length: 0,
            peer: 0,
            region: 0,
            tries: 0,
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
            peers: Peers::new(keep),
            polls: 0,
            next_scan: 0,
        };
        Self {
            name: name.into(),
            index,
            health: Health::default(),
            connects,
            retried: AtomicU64::new(0),
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
        self.with_driver(|driver| f(&mut driver.nic))
    }

    fn with_driver<R>(&self, f: impl FnOnce(&mut Driver<N>) -> Result<R>) -> Result<R> {
        match self.driver.try_lock_for(UNRESPONSIVE) {
            Some(mut driver) => f(&mut driver),
            None => Err(Error::new(
                Code::Busy,
                format!(
                    "{} does not respond: the provider has not returned for {UNRESPONSIVE:?}",
                    self.name
                ),
            )),
        }
    }

    /// The peer with this address of an endpoint, which has one more user until [`Released::add`].
    ///
    /// # Errors
    /// The NIC's, and as [`Self::with_nic`].
    pub fn connect(&self, shared: &Shared, address: &[u8]) -> Result<PeerIndex> {
        self.with_driver(|driver| {
            self.tidy(driver, shared);
            let Driver { nic, peers, taken, .. } = driver;
            peers.connect(nic, address, |peer| self.has_queued(taken, peer))
        })
    }

    /// Operations that could be posted now.
    #[cfg(test)]
    pub fn credits(&self) -> usize {
        self.driver.lock().free.len()
    }

    /// How many peers it knows.
    #[cfg(test)]
    pub fn peers(&self, shared: &Shared) -> usize {
        let mut driver = self.driver.lock();
        self.tidy(&mut driver, shared);
        driver.peers.len()
    }

    /// Takes note of peers without users, and forgets those that are to be forgotten.
    fn tidy(&self, driver: &mut Driver<N>, shared: &Shared) {
        let Driver { nic, peers, taken, .. } = driver;
        shared.released.take(self.index, |peer| peers.release(peer));
        peers.forget(nic, |peer| self.has_queued(taken, peer));
    }

    /// Whether something is on its way to be posted to a peer.
    fn has_queued(&self, taken: &VecDeque<Span>, peer: PeerIndex) -> bool {
        let of_it = |span: &Span| span.peer == peer;
        taken.iter().any(of_it) || self.queue.lock().iter().any(of_it)
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

    /// So many bytes went to another rail.
    pub fn hand_over(&self, bytes: u64) {
        self.load.fetch_sub(bytes, Ordering::Release);
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
            events += self.poll(&mut driver, shared, now, outcome);
            let posted = self.post(&mut driver, shared, now, outcome);
            events += posted;
            if posted < TURN {
                break;
            }
        }
        if now >= driver.next_scan {
            driver.next_scan = now + SCAN_EVERY;
            driver.nic.tend();
            self.scan(&mut driver, shared, now, outcome);
            self.tidy(&mut driver, shared);
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
        let Driver { nic, flights, free, completed, failed, peers, polls, .. } = driver;
        *polls += 1;
        completed.clear();
        nic.poll(completed, failed);
        let mut land = |slot: u32, fault: Option<&Fault>| {
            let flight = flights.get_mut(slot as usize).filter(|it| it.state != State::Free);
            let Some(flight) = flight else {
                add(&self.counters.strays, 1);
                return None;
            };
            free.push(slot);
            let peer = peers.at(flight.peer);
            (peer.flying, peer.held_until) = (peer.flying - 1, 0);
            let landed = *flight;
            flight.state = State::Free;
            if fault.is_some() && self.connects {
                peers.set_broken(landed.peer);
            }
            if fault.is_some_and(|fault| fault.gone) {
                peers.set_gone(landed.peer);
            }
            Some(landed)
        };
        let ailing = shared.is_ailing(now);
        let (mut count, mut written, mut read) = (0, 0, 0);
        let mut ends = Ends::new(self, shared, &mut outcome.ended);
        for flight in completed.iter().filter_map(|&slot| land(slot, None)) {
            count += 1;
            let length = u64::from(flight.length);
            *(if flight.state == State::Write { &mut written } else { &mut read }) += length;
            if ailing {
                self.well(shared, &flight);
            }
            ends.end(flight.group, length, flight.region);
        }
        drop(ends);
        if count > 0 {
            add(&self.counters.completed, count);
            add(&self.counters.bytes_written, written);
            add(&self.counters.bytes_read, read);
        }
        let events = completed.len() + failed.len();
        for (slot, fault) in failed.drain(..) {
            let Some(flight) = land(slot, Some(&fault)) else { continue };
            add(&self.counters.faults[fault.class as usize], 1);
            outcome.broken.push(Broken {
                rail: self.index,
                group: flight.group,
                local: flight.local,
                remote: flight.remote,
                length: u64::from(flight.length),
                peer: flight.peer,
                region: flight.region,
                tries: flight.tries,
                write: flight.state == State::Write,
                fault,
            });
        }
        events
    }

    /// An operation succeeded, while others fail.
    #[cold]
    fn well(&self, shared: &Shared, flight: &Flight) {
        if self.health.succeed() {
            log::info!("{} works again", self.name);
        }
        if let Some(target) = shared.target(flight.group) {
            target.well(self.index, flight.peer);
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
        let Driver { nic, flights, free, taken, peers, polls, .. } = driver;
        let slice = shared.slice.min(nic.max_length());
        let groups = shared.batches.groups();
        let mut posting =
            Posting { rail: self, shared, groups, nic, flights, free, slice, now, outcome };
        let mut posted = 0;
        // Those who had to wait come first, each in turn, until none may have more.
        let mut idle = 0;
        while posted < TURN && idle < peers.blocked.len() {
            let Some(index) = peers.blocked.pop_front() else { break };
            idle += 1;
            if peers.at(index).broken && peers.at(index).flying == 0 {
                if let Err(error) = peers.renew(posting.nic, index) {
                    posting.unreachable(peers.at(index), &error);
                }
            }
            let peer = peers.at(index);
            if peer.may_fly(posting.free.len()) && *polls >= peer.held_until {
                if let Some(mut span) = peer.waiting.pop_front() {
                    let step = posting.post(peer, &mut span);
                    if let Step::Part | Step::Again | Step::Full = step {
                        peer.waiting.push_front(span);
                    }
                    match step {
                        Step::Whole | Step::Part => (posted, idle) = (posted + 1, 0),
                        Step::Gone => idle = 0,
                        Step::Full => {}
                        Step::Again => self.put_off(peer, *polls),
                    }
                }
            }
            if !peers.at(index).waiting.is_empty() {
                peers.blocked.push_back(index);
            }
        }
        while posted < TURN {
            if taken.is_empty() {
                std::mem::swap(taken, &mut *self.queue.lock());
            }
            let Some(span) = taken.front_mut() else { break };
            let free = posting.free.len();
            let peer = peers.at(span.peer);
            let may_fly = free == 0 || peer.may_fly(free);
            if !(may_fly && peer.waiting.is_empty()) {
                add(&self.counters.starved, u64::from(!may_fly));
                peers.wait(*span);
                taken.pop_front();
                continue;
            }
            match posting.post(peer, span) {
                Step::Whole => {
                    taken.pop_front();
                    posted += 1;
                }
                Step::Part => posted += 1,
                Step::Gone => drop(taken.pop_front()),
                Step::Full => {
                    add(&self.counters.starved, 1);
                    break;
                }
                Step::Again => {
                    // Others need not wait for this one.
                    self.put_off(peer, *polls);
                    peers.wait(*span);
                    taken.pop_front();
                }
            }
        }
        if posted > 0 {
            add(&self.counters.posted, posted as u64);
        }
        posted
    }

    /// The provider does not take more for this peer now.
    #[cold]
    fn put_off(&self, peer: &mut Peer, polls: u64) {
        add(&self.counters.put_off, 1);
        peer.held_until = polls + HOLD_OFF;
    }

    /// A span could not be posted.
    #[cold]
    fn refused(&self, span: &Span, fault: Fault, outcome: &mut Outcome) {
        add(&self.counters.faults[fault.class as usize], 1);
        outcome.broken.push(Broken {
            rail: self.index,
            group: span.group,
            local: span.local,
            remote: span.remote,
            length: span.length,
            peer: span.peer,
            region: span.region,
            tries: span.tries.saturating_add(1),
            write: span.write,
            fault,
        });
    }

    /// Ends what is past its deadline. What is queued is given up; what is in flight stays the
    /// provider's until it comes back, but its group is told now.
    fn scan(&self, driver: &mut Driver<N>, shared: &Shared, now: u64, outcome: &mut Outcome) {
        let mut groups = shared.batches.groups();
        for flight in driver.flights.iter_mut().filter(|it| it.state != State::Free && !it.told) {
            if now >= groups.get(flight.group).deadline() {
                flight.told = true;
                add(&self.counters.overdue, 1);
                self.time_out(shared, flight.group, flight.length.into(), now, NOT_BACK, outcome);
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
                let mut ends = Ends::new(self, shared, &mut outcome.ended);
                ends.end(span.group, span.length, span.region);
            }
            keep
        };
        driver.peers.retain_waiting(&mut keep);
        driver.taken.retain(&mut keep);
        self.queue.lock().retain(&mut keep);
        driver.peers.take_orphans(|span| {
            let text = "the peer's descriptor was replaced before it had answered";
            self.refused(&span, Fault::of(Class::Peer, text), outcome);
        });
    }

    /// Gives up what is condemned without waiting for the next turn of its queue. If someone drives for
    /// longer than [`SWEEP_WAIT`], it is left to him. Does not call the NIC, which may not return.
    pub fn sweep(&self, shared: &Shared, now: u64, outcome: &mut Outcome) {
        if let Some(mut driver) = self.driver.try_lock_for(SWEEP_WAIT) {
            self.scan(&mut driver, shared, now, outcome);
        }
    }

    /// The oldest operation in flight on one of these regions, if whoever drives lets go of the rail.
    pub fn oldest_use(&self, shared: &Shared, regions: &[u32], now: u64) -> Option<Failure> {
        let driver = self.driver.try_lock_for(SWEEP_WAIT)?;
        let uses = |it: &&Flight| it.state != State::Free && regions.contains(&it.region);
        let operations = driver.flights.iter().filter(uses).map(|it| {
            shared.failure(it.group, it.length.into(), Some(&self.name), now, Cow::default())
        });
        operations.max_by_key(|operation| operation.age)
    }

    pub fn counters(&self) -> RailCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        RailCounters {
            posted: get(&counters.posted),
            completed: get(&counters.completed),
            failed: counters.faults.iter().map(get).sum(),
            faults: counters.faults.each_ref().map(get).into(),
            retried: get(&self.retried),
            paused: self.health.is_paused(),
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
