//! Random histories of an engine on simulated NICs, in virtual time: submissions, completions, failures, cancels,
//! registrations that end, peers and NICs that go and come back. Whatever happens, every request ends exactly once,
//! with what its status says; and when all is over nothing is held.
//!
//! `MEFA_HISTORIES` is how many, `MEFA_SEED` the first one's seed. A history that fails is cut down to the steps that
//! it needs, and printed.

mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fastrand::Rng;
use parking_lot::Mutex;

use super::sim::{LOCAL, OURS, PEER, PERMANENT, PRESSURE, RAIL, REMOTE};
use super::{
    BatchId, Engine, Observer, Refusal, Registration, Request, Settings, Status, TargetId,
};
use crate::fabric::Memory;
use world::{End, LOCAL_REGION, MET, Met, Mood, REMOTE_REGION, State, World, WorldNic};

const MS: u64 = 1_000_000;
const FOREVER: u64 = u64::MAX;

/// One thing that happens. Numbers are reduced to what there is when it happens, so that any selection of steps is
/// a history too.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// What is submitted follows from this seed.
    Submit(u64),
    /// One operation in flight ends.
    End(usize, End),
    /// All of them do.
    EndAll(End),
    Progress,
    /// A rail is driven.
    Poll(usize),
    /// Time, nanoseconds.
    Pass(u64),
    /// A batch is cancelled.
    Cancel(usize),
    CancelAll,
    Expire,
    /// A batch is freed, or that is refused.
    Free(usize),
    /// We ask whether a batch is quiet.
    IsQuiet(usize),
    /// A region is unregistered, or that is refused.
    Unregister(usize),
    /// A region is registered on some rails, in parts of so many cells.
    Register(usize, u16, u64),
    /// A peer dies.
    Kill(usize),
    /// A peer is started again, `same`: with the endpoints that it had, `told`: and so are we.
    Restart {
        peer: usize,
        same: bool,
        registered: [u8; 2],
        told: bool,
    },
    /// A target's descriptor comes.
    Tell(usize),
    /// A target is closed.
    Close(usize),
    /// A peer's segment is opened.
    Open(usize),
    /// A target's connections are made.
    WarmUp(usize),
    /// A rail gets to know a peer.
    Admit(usize, usize),
    /// A rail's NIC changes.
    Mood(usize, Mood),
    /// A rail's NIC takes no posts for one peer.
    AgainFor(usize, Option<u32>),
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    cell: u64,
    nics: usize,
    far_nics: u8,
    peers: usize,
    regions: usize,
    depth: usize,
    connects: bool,
    virtual_addresses: bool,
    by_handshake: bool,
    settings: Settings,
    steps: Vec<Step>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        // Bytes, or pages: only long requests are spread over rails.
        let cell = if rng.bool() { 1 } else { 4096 };
        let nics = rng.usize(1..=4);
        Self {
            seed,
            cell,
            nics,
            far_nics: rng.u8(1..=3),
            peers: rng.usize(1..=3),
            regions: rng.usize(1..=3),
            depth: rng.usize(1..=8),
            connects: rng.bool(),
            virtual_addresses: rng.bool(),
            by_handshake: rng.bool(),
            settings: Settings {
                slice: rng.u64(1..=64) * cell,
                merge: rng.bool(),
                round_robin: rng.u8(..4) == 0,
                registering: 1,
                tries: rng.u8(1..=5),
                keep_peers: rng.usize(0..=3),
            },
            steps: (0..rng.usize(5..=80)).map(|_| Step::random(rng)).collect(),
        }
    }
}

impl Step {
    fn random(rng: &mut Rng) -> Self {
        let any = |rng: &mut Rng| rng.usize(..1 << 16);
        match rng.u8(..100) {
            0..22 => Self::Submit(rng.u64(..)),
            22..50 => Self::End(any(rng), end(rng)),
            50..53 => Self::EndAll(end(rng)),
            53..59 => Self::Progress,
            59..62 => Self::Poll(any(rng)),
            62..70 => Self::Pass(match rng.u8(..10) {
                0..6 => rng.u64(..5 * MS),
                6..9 => rng.u64(..200 * MS),
                _ => rng.u64(..6000 * MS),
            }),
            70..72 => Self::Cancel(any(rng)),
            72 => Self::CancelAll,
            73 => Self::Expire,
            74..78 => Self::Free(any(rng)),
            78..80 => Self::IsQuiet(any(rng)),
            80..82 => Self::Unregister(any(rng)),
            82..84 => {
                let largest = if rng.bool() { u64::MAX } else { rng.u64(32..=256) };
                Self::Register(any(rng), rng.u16(..), largest)
            }
            84 => Self::Kill(any(rng)),
            85..88 => Self::Restart {
                peer: any(rng),
                same: rng.u8(..4) == 0,
                registered: [rng.u8(..), rng.u8(..)],
                told: rng.bool(),
            },
            88 => Self::Tell(any(rng)),
            89 => Self::Close(any(rng)),
            90..92 => Self::Open(any(rng)),
            92 => Self::WarmUp(any(rng)),
            93 => Self::Admit(any(rng), any(rng)),
            94..98 => Self::Mood(
                any(rng),
                match rng.u8(..8) {
                    0..4 => Mood::Up,
                    4..6 => Mood::Again,
                    6 => Mood::Refuses(errno(rng)),
                    _ => Mood::Down,
                },
            ),
            _ => Self::AgainFor(any(rng), rng.bool().then(|| rng.u32(..6))),
        }
    }
}

fn errno(rng: &mut Rng) -> i32 {
    [PEER, PEER, RAIL, RAIL, PRESSURE, PRESSURE, PERMANENT, OURS][rng.usize(..8)]
}

fn end(rng: &mut Rng) -> End {
    match rng.u8(..10) {
        0..7 => End::Complete,
        7..9 => End::Fail(errno(rng)),
        _ => End::FailAfterwards(errno(rng)),
    }
}

struct Batch {
    id: BatchId,
    capacity: u32,
    cookies: Vec<u64>,
}

struct Target {
    id: TargetId,
    peer: usize,
    open: bool,
}

struct History<'a> {
    case: &'a Case,
    world: Arc<Mutex<World>>,
    engine: Engine<WorldNic>,
    now: u64,
    /// Not freed.
    batches: Vec<Batch>,
    /// Tasks of no batch, any more.
    detached: Vec<u64>,
    targets: Vec<Target>,
    /// Whether each of our regions is registered.
    registered: Vec<bool>,
}

impl<'a> History<'a> {
    fn new(case: &'a Case) -> Self {
        let mut world = World::new(case.nics, case.regions);
        world.cell = case.cell;
        world.depth = case.depth;
        world.connects = case.connects;
        world.virtual_addresses = case.virtual_addresses;
        world.far_nics = case.far_nics;
        (0..case.peers).for_each(|peer| world.start(peer, false, [u8::MAX; 2]));
        let world = Arc::new(Mutex::new(world));
        let nic = |index| (format!("nic{index}"), WorldNic { index, world: world.clone() });
        let nics = (0..case.nics).map(nic).collect();
        let told = world.clone();
        let observer: Observer = Box::new(move |finished| {
            let mut world = told.lock();
            finished.iter().for_each(|finished| world.finish(finished));
        });
        let mut history = Self {
            case,
            engine: Engine::new(nics, case.settings.clone(), Some(observer)),
            world,
            now: 0,
            batches: Vec::new(),
            detached: Vec::new(),
            targets: Vec::new(),
            registered: vec![false; case.regions],
        };
        (0..case.regions).for_each(|region| history.register(region, u16::MAX, u64::MAX));
        (0..case.peers).for_each(|peer| history.open(peer));
        history
    }

    /// What was met with, by [`Met`].
    fn run(case: &'a Case) -> [u64; MET] {
        let mut history = Self::new(case);
        for &step in &case.steps {
            history.step(step);
        }
        history.recover();
        history.settle();
        history.check_ended();
        let mut met = history.world.lock().met;
        for rail in 0..case.nics {
            let counters = history.engine.counters(rail);
            met[Met::Retried as usize] += counters.retried;
            met[Met::PutOff as usize] += counters.put_off;
        }
        history.check_works();
        history.close();
        met
    }

    fn meet(&self, met: Met) {
        self.world.lock().met[met as usize] += 1;
    }

    fn step(&mut self, step: Step) {
        let one = |which: usize, count: usize| (count > 0).then(|| which % count.max(1));
        let (batches, targets) = (self.batches.len(), self.targets.len());
        match step {
            Step::Submit(seed) => self.submit(Rng::with_seed(seed)),
            Step::End(which, end) => {
                let mut world = self.world.lock();
                let total = world.in_flight();
                if let Some(which) = one(which, total) {
                    world.end(which, end);
                    drop(world);
                    self.engine.progress(self.now);
                }
            }
            Step::EndAll(end) => self.end_all(end),
            Step::Progress => drop(self.engine.progress(self.now)),
            Step::Poll(rail) => drop(self.engine.poll(rail % self.case.nics, self.now)),
            Step::Pass(nanoseconds) => {
                self.now += nanoseconds;
                self.engine.progress(self.now);
            }
            Step::Cancel(batch) => {
                if let Some(batch) = one(batch, batches) {
                    self.engine.cancel(self.batches[batch].id, self.now).expect("a batch");
                }
            }
            Step::CancelAll => self.engine.cancel_all(self.now),
            Step::Expire => self.engine.expire_all(self.now),
            Step::Free(batch) => one(batch, batches).into_iter().for_each(|it| self.free(it)),
            Step::IsQuiet(batch) => {
                one(batch, batches).into_iter().for_each(|it| self.check_quiet(it));
            }
            Step::Unregister(region) => self.unregister(region % self.case.regions),
            Step::Register(region, rails, largest) => {
                self.register(region % self.case.regions, rails, largest);
            }
            Step::Kill(peer) => self.world.lock().kill(peer % self.case.peers),
            Step::Restart { peer, same, registered, told } => {
                let peer = peer % self.case.peers;
                self.world.lock().start(peer, same, registered);
                for target in 0..targets {
                    if told && self.targets[target].peer == peer {
                        self.tell(target);
                    }
                }
            }
            Step::Tell(target) => one(target, targets).into_iter().for_each(|it| self.tell(it)),
            Step::Close(target) => {
                one(target, targets).into_iter().for_each(|it| self.close_target(it));
            }
            Step::Open(peer) => self.open(peer % self.case.peers),
            Step::WarmUp(target) => {
                if let Some(target) = one(target, targets) {
                    let warmed = self.engine.warm_up(self.targets[target].id);
                    assert!(self.targets[target].open || warmed.is_err());
                }
            }
            Step::Admit(rail, peer) => {
                let address = self.world.lock().address(peer % self.case.peers, 0);
                if let Some(address) = address {
                    let _ = self.engine.admit(rail % self.case.nics, &address);
                }
            }
            Step::Mood(rail, mood) => self.world.lock().nics[rail % self.case.nics].mood = mood,
            Step::AgainFor(rail, process) => {
                self.world.lock().nics[rail % self.case.nics].again_for = process;
            }
        }
    }

    // ---- memory -------------------------------------------------------------------------------

    fn register(&mut self, region: usize, rails: u16, largest: u64) {
        let rails: Vec<u16> =
            (0..self.case.nics as u16).filter(|rail| rails >> rail & 1 == 1).collect();
        let length = LOCAL_REGION as u64 * self.case.cell;
        let start = LOCAL + region as u64 * length;
        let registration = Registration {
            memory: Memory::simulated(start, length),
            rails: if rails.is_empty() { vec![0] } else { rails },
            preferred: Vec::new(),
            largest: largest.saturating_mul(self.case.cell),
            merge: super::MERGE,
            shares: 1,
        };
        let result = self.engine.register(&[registration]);
        let down = self.world.lock().nics.iter().any(|nic| nic.mood == Mood::Down);
        assert!(result.is_ok() || self.registered[region] || down);
        assert!(!(result.is_ok() && self.registered[region]), "registered once");
        self.registered[region] |= result.is_ok();
    }

    fn unregister(&mut self, region: usize) {
        let start = LOCAL + (region * LOCAL_REGION) as u64 * self.case.cell;
        let result = self.engine.unregister(start);
        let world = self.world.lock();
        let of_region = region * LOCAL_REGION..(region + 1) * LOCAL_REGION;
        let used = world.owners.iter().any(|&owner| {
            let local = &world.tasks[owner].local;
            local.start < of_region.end && of_region.start < local.end
        });
        match result {
            Ok(()) => self.registered[region] = false,
            Err(_) => assert!(used || !self.registered[region], "nothing uses it"),
        }
        drop(world);
        if used && self.registered[region] {
            self.meet(Met::Busy);
        }
    }

    // ---- targets ------------------------------------------------------------------------------

    fn open(&mut self, peer: usize) {
        let segment = self.world.lock().segment(peer, self.case.by_handshake);
        let id = self.engine.add_target(segment).expect("room");
        let most = self.targets.len() as u32;
        assert!(self.engine.seal.place(id.0).0 <= most, "places are used again");
        self.targets.push(Target { id, peer, open: true });
    }

    fn tell(&mut self, target: usize) {
        let Target { id, peer, open } = self.targets[target];
        let segment = self.world.lock().segment(peer, self.case.by_handshake);
        assert_eq!(self.engine.update_target(id, segment).is_ok(), open);
    }

    fn close_target(&mut self, target: usize) {
        let target = &mut self.targets[target];
        let open = std::mem::take(&mut target.open);
        assert_eq!(self.engine.remove_target(target.id).is_ok(), open);
    }

    // ---- requests -----------------------------------------------------------------------------

    fn submit(&mut self, mut rng: Rng) {
        let rng = &mut rng;
        let target = rng.usize(..self.targets.len().max(1));
        let Some(&Target { id, peer, open }) = self.targets.get(target) else { return };
        let count = if rng.u8(..8) == 0 { rng.usize(1..=16) } else { rng.usize(1..=3) };
        let longest = match rng.u8(..4) {
            0 => 250,
            1 => 40,
            _ => 6,
        };
        let cells = self.case.regions * LOCAL_REGION;
        let (write, neighbours) = (rng.bool(), rng.bool());
        let mut at = (rng.usize(..cells), rng.usize(..2 * REMOTE_REGION));
        let mut length = rng.usize(0..=longest);
        let mut requests = Vec::new();
        for _ in 0..count {
            if !neighbours {
                at = (rng.usize(..cells), rng.usize(..2 * REMOTE_REGION));
                length = rng.usize(0..=longest);
            }
            let claimed = self.world.lock().claim(peer, write, at.0..at.0 + length, at.1);
            let Some(cookie) = claimed else { continue };
            requests.push(Request {
                write,
                local: LOCAL + at.0 as u64 * self.case.cell,
                target: id,
                remote: REMOTE + at.1 as u64 * self.case.cell,
                length: length as u64 * self.case.cell,
                cookie,
            });
            at = (at.0 + length, at.1 + length);
        }
        let cookies: Vec<u64> = requests.iter().map(|request| request.cookie).collect();
        let bad = (rng.u8(..20) == 0 && !requests.is_empty()).then(|| rng.usize(..requests.len()));
        if let Some(bad) = bad {
            requests[bad].remote = if rng.bool() { 1 } else { u64::MAX };
            requests[bad].length = requests[bad].length.max(1);
        }
        let deadline = match rng.u8(..4) {
            0 => FOREVER,
            1 => self.now + rng.u64(..3 * MS),
            2 => self.now + rng.u64(..100 * MS),
            _ => self.now + rng.u64(..4000 * MS),
        };
        let batch = match rng.u8(..4) {
            0 => None,
            1 if !self.batches.is_empty() => Some(rng.usize(..self.batches.len())),
            _ => {
                let capacity = (requests.len() as u32 + rng.u32(..3)).max(1);
                Some(self.allocate(capacity))
            }
        };
        let fits = batch.is_none_or(|batch| {
            let batch = &self.batches[batch];
            batch.cookies.len() + requests.len() <= batch.capacity as usize
        });
        let started = self.try_submit(batch, &requests, deadline, rng.u8(..4) != 0);
        assert!(!started || (bad.is_none() && fits && (open || requests.is_empty())));
        if !started {
            for cookie in cookies {
                let mut world = self.world.lock();
                assert_eq!(world.tasks[cookie as usize].state, State::UnderWay, "never started");
                world.let_go(cookie);
            }
            self.meet(Met::Refused);
            return;
        }
        match batch {
            Some(batch) => self.batches[batch].cookies.extend(cookies),
            None => self.detached.extend(cookies),
        }
    }

    /// Submits as the transport does, where `host` has the descriptors of peers.
    fn try_submit(
        &mut self,
        batch: Option<usize>,
        requests: &[Request],
        deadline: u64,
        host: bool,
    ) -> bool {
        let mut fetched = false;
        for _ in 0..50 {
            let all = requests.iter().copied();
            let result = match batch {
                Some(batch) => {
                    let batch = self.batches[batch].id;
                    self.engine.submit(batch, all, self.now, deadline).map(drop)
                }
                None => self.engine.submit_detached(all, self.now, deadline),
            };
            let id = match result {
                Ok(()) => return true,
                Err(Refusal::Error(_)) => return false,
                Err(Refusal::NotThere { .. } | Refusal::OutOfDate { error: Some(_), .. })
                    if fetched || !host =>
                {
                    return false;
                }
                Err(Refusal::OutOfDate { error: None, .. }) if fetched || !host => continue,
                Err(Refusal::NotThere { target, .. } | Refusal::OutOfDate { target, .. }) => target,
                Err(Refusal::NeedsHandshake { nic, target, .. }) => {
                    let own = self.targets.iter().find(|it| it.id == target).expect("ours");
                    let address = self.world.lock().address(own.peer, nic);
                    let Some(address) = address else { return false };
                    self.engine.set_address(target, nic, &address).expect("an open target");
                    continue;
                }
            };
            fetched = true;
            let target = self.targets.iter().position(|it| it.id == id).expect("ours");
            self.tell(target);
        }
        panic!("the engine is never content");
    }

    fn allocate(&mut self, capacity: u32) -> usize {
        let id = self.engine.allocate_batch(capacity).expect("room");
        self.batches.push(Batch { id, capacity, cookies: Vec::new() });
        self.batches.len() - 1
    }

    /// Every task is told as it was observed.
    fn check_batch(&self, batch: &Batch) {
        let world = self.world.lock();
        let (mut pending, mut failed) = (false, false);
        for (index, &cookie) in batch.cookies.iter().enumerate() {
            let task = &world.tasks[cookie as usize];
            let (status, bytes) = self.engine.task_status(batch.id, index as u32).expect("a task");
            match task.state {
                State::UnderWay => assert_eq!(status, Status::Pending),
                State::Ended(ended) => assert_eq!(status, ended),
                State::Gone => assert_eq!(status, Status::Timeout, "the only ones let go"),
            }
            let all = task.local.len() as u64 * self.case.cell;
            assert_eq!(bytes, if status == Status::Completed { all } else { 0 });
            let why = self.engine.task_error(batch.id, index as u32).expect("a task");
            assert_eq!(why.is_some(), matches!(status, Status::Failed | Status::Timeout));
            pending |= status == Status::Pending;
            failed |= status.is_final() && status != Status::Completed;
        }
        let expected = match (pending, failed) {
            (true, _) => Status::Pending,
            (_, true) => Status::Failed,
            _ => Status::Completed,
        };
        let status = self.engine.batch_status(batch.id).expect("a batch");
        assert_eq!(status, (expected, batch.cookies.len() as u32));
    }

    /// If the engine says that a batch is quiet, it is; and it does say so when only tasks have ended whose status
    /// means that.
    fn check_quiet(&mut self, batch: usize) {
        let batch = &self.batches[batch];
        self.check_batch(batch);
        let quiet = self.engine.is_quiet(batch.id).expect("a batch");
        let mut world = self.world.lock();
        let mut must = true;
        for &cookie in &batch.cookies {
            let task = &world.tasks[cookie as usize];
            must &= matches!(task.state, State::Ended(it) if it != Status::Timeout);
            assert!(!quiet || task.state != State::UnderWay);
            if quiet && task.state == State::Ended(Status::Timeout) {
                assert!(!world.is_flying(task), "task {cookie} is quiet, and in flight");
                world.let_go(cookie);
            }
        }
        assert!(quiet || !must);
    }

    fn free(&mut self, batch: usize) {
        self.check_batch(&self.batches[batch]);
        let under_way =
            |cookie: &u64| self.world.lock().tasks[*cookie as usize].state == State::UnderWay;
        let id = self.batches[batch].id;
        let ended = !self.batches[batch].cookies.iter().any(under_way);
        assert_eq!(self.engine.free_batch(id).is_ok(), ended);
        if ended {
            let batch = self.batches.swap_remove(batch);
            // What timed out may be in flight yet.
            self.detached.extend(batch.cookies);
            assert!(self.engine.batch_status(id).is_err());
            assert!(self.engine.free_batch(id).is_err());
        }
    }

    // ---- the end ------------------------------------------------------------------------------

    fn end_all(&mut self, end: End) {
        let mut world = self.world.lock();
        while world.in_flight() > 0 {
            world.end(0, end);
        }
        drop(world);
        self.engine.progress(self.now);
    }

    /// All NICs are well.
    fn recover(&mut self) {
        for nic in &mut self.world.lock().nics {
            (nic.mood, nic.again_for) = (Mood::Up, None);
        }
    }

    /// Ends all that is in flight, again and again, until the engine is idle.
    fn settle(&mut self) {
        let mut rounds = 0;
        while !self.engine.is_idle() {
            rounds += 1;
            assert!(rounds < 20_000, "it hangs");
            let before = self.engine.progress(self.now).events;
            self.end_all(End::Complete);
            if before == 0 {
                self.now += MS << (rounds / 100).min(6);
            }
        }
    }

    fn check_ended(&mut self) {
        while !self.batches.is_empty() {
            self.check_quiet(0);
            assert!(self.engine.is_quiet(self.batches[0].id).expect("a batch"));
            self.free(0);
        }
        let mut world = self.world.lock();
        for cookie in self.detached.drain(..) {
            let state = world.tasks[cookie as usize].state;
            assert_ne!(state, State::UnderWay, "task {cookie} has not ended");
            world.let_go(cookie);
        }
    }

    /// When everything is well again, everything works: no credit, peer or NIC is left behind.
    fn check_works(&mut self) {
        self.now += 20_000 * MS; // failures so long ago are forgotten
        for region in 0..self.case.regions {
            if !self.registered[region] {
                self.register(region, u16::MAX, u64::MAX);
            }
        }
        for peer in 0..self.case.peers {
            let dead = !self.world.lock().processes.iter().any(|it| it.alive && it.peer == peer);
            if dead {
                self.world.lock().start(peer, false, [u8::MAX; 2]);
            }
            self.open(peer);
        }
        for target in 0..self.targets.len() {
            if self.targets[target].open {
                self.tell(target);
                assert_eq!(self.use_all(target), None, "everything is well");
            }
        }
    }

    /// Submits so much to a target that all NICs and credits are used. Why one of the requests failed.
    fn use_all(&mut self, target: usize) -> Option<String> {
        let Target { id, peer, .. } = self.targets[target];
        let mut requests = Vec::new();
        for at in (0..self.case.regions * LOCAL_REGION).step_by(32) {
            let remote = at % (2 * REMOTE_REGION);
            let cookie = self.world.lock().claim(peer, at % 64 == 0, at..at + 32, remote);
            requests.push(Request {
                write: at % 64 == 0,
                local: LOCAL + at as u64 * self.case.cell,
                target: id,
                remote: REMOTE + remote as u64 * self.case.cell,
                length: 32 * self.case.cell,
                cookie: cookie.expect("nothing is under way"),
            });
        }
        let batch = self.allocate(requests.len() as u32);
        assert!(self.try_submit(Some(batch), &requests, FOREVER, true), "it is accepted");
        self.batches[batch].cookies = requests.iter().map(|request| request.cookie).collect();
        self.settle();
        let id = self.batches[batch].id;
        let why = |task| self.engine.task_error(id, task as u32).expect("a task");
        let failed = (0..requests.len()).find_map(why);
        self.check_ended();
        failed
    }

    fn close(&mut self) {
        for target in 0..self.targets.len() {
            self.close_target(target);
        }
        for region in 0..self.case.regions {
            self.unregister(region);
            assert!(!self.registered[region], "nothing uses it");
        }
        for capacity in [1, 2, 4, 8, 16, 32] {
            let places = self.engine.shared.batches.places(capacity);
            for _ in 0..places {
                self.allocate(capacity);
            }
            assert_eq!(self.engine.shared.batches.places(capacity), places, "all were given back");
        }
        let world = self.world.clone();
        for (index, rail) in self.engine.rails.iter().enumerate() {
            let peers = rail.peers(&self.engine.shared);
            let counters = rail.counters();
            let world = world.lock();
            assert_eq!((counters.pending_bytes, counters.strays), (0, 0));
            assert_eq!(rail.credits(), self.case.depth, "all credits are back");
            let nic = &world.nics[index];
            assert!(nic.regions.is_empty() && nic.flying.is_empty());
            assert_eq!(nic.known.len(), peers);
            assert!(peers <= self.case.settings.keep_peers, "{peers} peers are left");
        }
        assert!(world.lock().owners.is_empty());
    }
}

// ---- many of them -------------------------------------------------------------------------------

thread_local! {
    /// While this thread's panics are not to be printed, the last one.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// What went wrong in a history, if something did.
fn attempt(case: &Case) -> Result<[u64; MET], String> {
    PANIC.set(Some(String::new()));
    let result = catch_unwind(AssertUnwindSafe(|| History::run(case)));
    let panic = PANIC.take().unwrap_or_default();
    result.map_err(|_| panic)
}

/// Leaves out steps, as long as it fails without them.
fn shrink(mut case: Case) -> Case {
    let mut part = case.steps.len() / 2;
    while part > 0 {
        let mut from = 0;
        while from < case.steps.len() {
            let mut less = case.clone();
            less.steps.drain(from..(from + part).min(case.steps.len()));
            if attempt(&less).is_err() {
                case = less;
            } else {
                from += part;
            }
        }
        part /= 2;
    }
    case
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

#[test]
fn random_histories() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANIC.with_borrow_mut(|panic| match panic {
            Some(panic) => *panic = info.to_string(),
            None => print(info),
        });
    }));
    let first = setting("MEFA_SEED").unwrap_or(0);
    let count = setting("MEFA_HISTORIES").unwrap_or(20_000);
    let next = AtomicU64::new(first);
    let failed = Mutex::new(None);
    let met: [AtomicU64; MET] = Default::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed - first >= count {
                        break;
                    }
                    let case = Case::new(seed);
                    match attempt(&case) {
                        Ok(more) => met.iter().zip(more).for_each(|(sum, more)| {
                            sum.fetch_add(more, Ordering::Relaxed);
                        }),
                        Err(_) => {
                            stop.store(true, Ordering::Relaxed);
                            failed.lock().get_or_insert(case);
                        }
                    }
                }
            });
        }
    });
    if let Some(case) = failed.into_inner() {
        let case = shrink(case);
        let why = attempt(&case).expect_err("it did before");
        let Case { seed, steps, .. } = &case;
        let steps: String = steps.iter().map(|step| format!("\n    {step:?}")).collect();
        let settings = Case { steps: Vec::new(), ..case.clone() };
        panic!("MEFA_SEED={seed} fails: {why}\n{settings:?}{steps}");
    }
    let met = met.map(AtomicU64::into_inner);
    println!("{count} histories, in which: {:?}", Met::ALL.iter().zip(met).collect::<Vec<_>>());
    assert!(count < 1000 || met.iter().all(|&count| count > 0), "not much of a history");
}
