//! What threads do to each other in the engine, in every order that they can come in (loom). Each model is as
//! small as what it is about allows; `make test` runs them.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread::{self, JoinHandle};

use super::batch::{Aim, BatchId, Batches, Ended, GroupRef, Status};
use super::failure::Failure;
use super::health::{Health, Use};
use super::peers::Released;
use super::region::{Number, Users};
use super::table::{Seal, Table};
use super::{
    Engine, Nic, Operation, PeerAddress, Post, Registration, RemoteBuffer, RemoteNic,
    RemoteSegment, Request, Settings, TargetId,
};
use crate::error::Result;
use crate::fabric::Memory;
use crate::fault::{Class, Fault};
use crate::sync::{AtomicU32, Ordering};

/// Checks a model in all orders with at most so many preemptions, or in all.
pub(crate) fn check(
    preemptions: impl Into<Option<usize>>,
    model: impl Fn() + Send + Sync + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions.into();
    builder.max_branches = 10_000;
    let orders = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = orders.clone();
    let start = std::time::Instant::now();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    eprintln!("{orders:?} orders in {:?}", start.elapsed());
}

/// A thread with a share in something.
pub(crate) fn spawn<S: 'static, R: 'static>(
    shared: &Arc<S>,
    run: impl FnOnce(&S) -> R + 'static,
) -> JoinHandle<R> {
    let shared = shared.clone();
    thread::spawn(move || run(&shared))
}

pub(crate) fn join<R>(thread: JoinHandle<R>) -> R {
    thread.join().expect("it does not panic")
}

/// Memory that is not for two at a time, unless both read. That one is seen by the other to be ready is up to
/// the models; loom finds where it is not.
#[derive(Default)]
struct Bytes(UnsafeCell<()>);

impl Bytes {
    fn write(&self) {
        self.0.with_mut(|_| ());
    }

    fn read(&self) {
        self.0.with(|_| ());
    }
}

// ---- table --------------------------------------------------------------------------------------

#[test]
fn a_slot_has_one_user_at_a_time() {
    check(None, || {
        let table = Arc::new(Table::<Bytes>::default());
        let kept = table.take(Bytes::default).expect("room");
        let user = |table: &Table<Bytes>| {
            let (index, generation) = table.take(Bytes::default).expect("room");
            table.get(index, generation).expect("in use").write();
            assert!(table.retire(index, generation));
            table.at(index).expect("there").write();
            table.give_back(index);
        };
        let other = spawn(&table, user);
        user(&table);
        join(other);
        assert!(table.get(kept.0, kept.1).is_some());
    });
}

#[test]
fn a_slot_is_retired_once() {
    check(None, || {
        let table = Arc::new(Table::<Bytes>::default());
        let (index, old) = table.take(Bytes::default).expect("room");
        let close = move |table: &Table<Bytes>| {
            let last = table.retire(index, old);
            if last {
                table.give_back(index);
            }
            last
        };
        let other = spawn(&table, move |table| {
            let closed = close(table);
            let again = table.take(Bytes::default).expect("room");
            assert_ne!(again, (index, old));
            table.get(again.0, again.1).expect("in use").write();
            closed
        });
        let closed = close(&table);
        assert!(table.get(index, old).is_none());
        assert!(closed != join(other));
        let (a, b) = (table.take(Bytes::default), table.take(Bytes::default));
        assert_ne!(a.expect("room").0, b.expect("room").0, "given back once");
    });
}

// ---- batches ------------------------------------------------------------------------------------

const AIM: Aim = Aim { target: 0, generation: 1, life: 0, write: true };
const LATE: u64 = 1_000_000_000;

fn failure() -> Failure {
    Failure {
        write: true,
        length: 1,
        peer: None,
        peer_nic: None,
        nic: None,
        age: 0,
        tries: 1,
        cause: "why".into(),
    }
}

struct World {
    seal: Seal,
    batches: Batches,
    /// What a group moves.
    memory: Bytes,
    /// How often an observer was told.
    told: AtomicU32,
}

impl World {
    fn new() -> Arc<Self> {
        let seal = Seal::new();
        Arc::new(Self {
            seal,
            batches: Batches::new(seal),
            memory: Bytes::default(),
            told: AtomicU32::new(0),
        })
    }

    fn slot(&self, batch: BatchId) -> u32 {
        self.seal.place(batch.0).0
    }

    /// Starts one group of one task.
    fn start(&self, batch: BatchId, bytes: u64, deadline: u64) -> GroupRef {
        let pin = self.batches.pin(batch).expect("a batch");
        let first = pin.reserve(1).expect("room");
        pin.begin(1, 1, deadline);
        pin.start_group(first, &[(bytes, 0)], bytes, AIM, 0, deadline)
    }

    /// Some bytes of a group are done with.
    fn end(&self, group: GroupRef, bytes: u64) {
        if let Some(status) = self.batches.group(group).subtract(bytes) {
            self.publish(Ended::new(group, status));
        }
    }

    /// As the engine does.
    fn publish(&self, mut ended: Ended) {
        ended.claimed = self.batches.groups().claim(&ended, |_, _, _| {
            self.told.fetch_add(1, Ordering::Relaxed);
        });
        self.batches.finish(std::iter::once(ended));
    }

    /// Asks for what is overdue, as the engine does.
    fn expire(&self, batch: BatchId) {
        let pin = self.batches.pin(batch).expect("a batch");
        for late in pin.overdue(LATE) {
            self.batches.fail(late.group, Status::Timeout, &failure());
            self.publish(late);
        }
    }

    /// Nothing is held, and each of the first slots was given back once.
    fn check_free(&self, capacity: u32) {
        let place = |_| self.slot(self.batches.allocate(capacity).expect("room")) & 0xff;
        let mut places: Vec<u32> = (0..2).map(place).collect();
        places.sort_unstable();
        assert_eq!(places, [0, 1]);
    }
}

#[test]
fn a_pinned_batch_is_not_recycled() {
    check(None, || {
        let world = World::new();
        let old = world.batches.allocate(1).expect("room");
        let group = world.start(old, 1, u64::MAX);
        world.end(group, 1);
        let stale = spawn(&world, move |world| {
            if let Ok(pin) = world.batches.pin(old) {
                assert_eq!(pin.used(), 1);
                assert_eq!(pin.task(0).expect("a task").0, Status::Completed);
            }
        });
        world.batches.free(old).expect("ended");
        let new = world.batches.allocate(1).expect("room");
        assert_eq!(world.batches.pin(new).expect("a batch").used(), 0);
        join(stale);
        world.batches.free(new).expect("empty");
        world.check_free(1);
    });
}

/// [`a_pinned_batch_is_not_recycled`], where it is found by looking through all, not by its number.
#[test]
fn whoever_looks_through_all_batches_finds_whole_ones() {
    check(3, || {
        let world = World::new();
        let old = world.batches.allocate(2).expect("room");
        let pin = world.batches.pin(old).expect("a batch");
        let first = pin.reserve(2).expect("room");
        pin.begin(1, 2, 0);
        let group = pin.start_group(first, &[(1, 0), (1, 0)], 2, AIM, 0, 0);
        drop(pin);
        world.end(group, 2);
        let other = spawn(&world, |world| {
            // Its former life was overdue, the new one is not.
            world.batches.overdue(LATE, |late| panic!("{late:?}"));
        });
        world.batches.free(old).expect("ended");
        let new = world.batches.allocate(2).expect("room");
        let groups = [world.start(new, 1, u64::MAX), world.start(new, 1, u64::MAX)];
        join(other);
        groups.into_iter().for_each(|group| world.end(group, 1));
        world.batches.free(new).expect("ended");
        world.check_free(2);
    });
}

#[test]
fn cancelling_all_meets_a_batch_that_is_being_made() {
    check(None, || {
        let world = World::new();
        world.batches.allocate(1).expect("room"); // makes the chunk
        let other = spawn(&world, |world| world.batches.condemn_all(Status::Canceled));
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 1, u64::MAX);
        world.end(group, 1);
        let (status, _) = world.batches.pin(batch).expect("a batch").task(0).expect("a task");
        assert!(matches!(status, Status::Completed | Status::Canceled));
        join(other);
    });
}

#[test]
fn tasks_are_reserved_once() {
    check(None, || {
        let world = World::new();
        let batch = world.batches.allocate(2).expect("room");
        let reserve = move |world: &World| {
            let pin = world.batches.pin(batch).expect("a batch");
            [pin.reserve(1).ok(), pin.reserve(1).ok()]
        };
        let other = spawn(&world, reserve);
        let mut places = [reserve(&world), join(other)].concat();
        places.sort_unstable();
        assert_eq!(places, [None, None, Some(0), Some(1)]);
    });
}

/// Two rails end the parts of one group: one of them ends the group, and then the memory is quiet, for it and
/// for whoever sees the status.
#[test]
fn the_last_part_ends_a_group() {
    check(3, || {
        let world = World::new();
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 5, u64::MAX);
        let part = move |world: &World, bytes| {
            world.memory.read(); // the device does, until it says so
            if let Some(status) = world.batches.group(group).subtract(bytes) {
                world.memory.write();
                assert_eq!(status, Status::Completed);
                world.publish(Ended::new(group, status));
            }
        };
        let others = [2, 2].map(|bytes| spawn(&world, move |world| part(world, bytes)));
        part(&world, 1);
        if world.batches.pin(batch).expect("a batch").status() == Status::Completed {
            world.memory.write();
            assert_eq!(world.told.load(Ordering::Relaxed), 1);
        }
        others.into_iter().for_each(join);
        assert_eq!(world.told.load(Ordering::Relaxed), 1);
        assert_eq!(world.batches.pin(batch).expect("a batch").status(), Status::Completed);
        world.batches.free(batch).expect("ended");
        world.check_free(1);
    });
}

#[test]
fn a_task_that_failed_says_why() {
    check(3, || {
        let world = World::new();
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 2, u64::MAX);
        let failing = spawn(&world, move |world| {
            world.batches.fail(group, Status::Failed, &failure());
            world.end(group, 1);
        });
        let other = spawn(&world, move |world| world.end(group, 1));
        let pin = world.batches.pin(batch).expect("a batch");
        let (status, _) = pin.task(0).expect("a task");
        assert!(matches!(status, Status::Pending | Status::Failed));
        assert!(status == Status::Pending || pin.failure(0).expect("a task").is_some());
        drop(pin);
        join(failing);
        join(other);
        let pin = world.batches.pin(batch).expect("a batch");
        assert_eq!(
            (pin.status(), pin.task(0).expect("a task").0),
            (Status::Failed, Status::Failed)
        );
        assert!(pin.failure(0).expect("a task").is_some());
    });
}

/// Two groups end on two threads: who sees the batch ended sees both.
#[test]
fn a_batch_that_ended_tells_of_every_task() {
    check(3, || {
        let world = World::new();
        let batch = world.batches.allocate(2).expect("room");
        let groups = [world.start(batch, 1, u64::MAX), world.start(batch, 1, u64::MAX)];
        let failing = spawn(&world, move |world| {
            world.batches.fail(groups[0], Status::Failed, &failure());
            world.end(groups[0], 1);
        });
        let other = spawn(&world, move |world| world.end(groups[1], 1));
        let pin = world.batches.pin(batch).expect("a batch");
        let status = pin.status();
        if status.is_final() {
            assert_eq!(status, Status::Failed);
            assert_eq!(pin.task(0).expect("a task").0, Status::Failed);
            assert_eq!(pin.task(1).expect("a task").0, Status::Completed);
            assert!(pin.failure(0).expect("a task").is_some());
        }
        drop(pin);
        join(failing);
        join(other);
    });
}

/// A rail's driver completes what somebody else finds overdue: told once; and the next life of the place
/// does not inherit a reason.
#[test]
fn overdue_and_completed_at_once() {
    check(None, || {
        let world = World::new();
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 1, 0);
        let driver = spawn(&world, move |world| world.end(group, 1));
        world.expire(batch);
        join(driver);
        assert_eq!(world.told.load(Ordering::Relaxed), 1);
        let pin = world.batches.pin(batch).expect("a batch");
        let (status, _) = pin.task(0).expect("a task");
        assert!(matches!(status, Status::Completed | Status::Timeout));
        assert_eq!(pin.failure(0).expect("a task").is_some(), status == Status::Timeout);
        assert_eq!(pin.in_use(), 0);
        drop(pin);
        world.batches.free(batch).expect("ended");
        let again = world.batches.allocate(1).expect("room");
        assert_eq!(world.slot(again), world.slot(batch));
        let group = world.start(again, 1, u64::MAX);
        assert!(world.batches.fail(group, Status::Failed, &failure()), "its first reason");
        world.end(group, 1);
        world.batches.free(again).expect("ended");
        world.check_free(1);
    });
}

/// The caller frees a batch that timed out: until its memory is quiet the batch says so, and its place is not
/// used again.
#[test]
fn a_late_group_holds_its_batch_until_it_is_back() {
    check(3, || {
        let world = World::new();
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 1, 0);
        let driver = spawn(&world, move |world| {
            // The scan of a rail, then the operation comes back.
            world.batches.fail(group, Status::Timeout, &failure());
            world.batches.hold(group);
            world.publish(Ended::new(group, Status::Timeout));
            world.memory.write();
            world.end(group, 1);
        });
        let pin = world.batches.pin(batch).expect("a batch");
        let status = pin.status();
        if pin.in_use() == 0 {
            world.memory.write();
        }
        drop(pin);
        if status.is_final() {
            world.batches.free(batch).expect("ended");
            let other = world.batches.allocate(1).expect("room");
            if world.slot(other) == world.slot(batch) {
                world.memory.write();
            }
            world.batches.free(other).expect("empty");
            join(driver);
        } else {
            join(driver);
            assert!(world.batches.pin(batch).expect("a batch").in_use() == 0);
            world.batches.free(batch).expect("ended");
        }
        assert_eq!(world.told.load(Ordering::Relaxed), 1);
        world.check_free(1);
    });
}

/// Nobody has the number of the batch any more when its last group ends, or the other way round.
#[test]
fn a_detached_batch_is_given_back_once() {
    check(None, || {
        let world = World::new();
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 1, u64::MAX);
        let driver = spawn(&world, move |world| world.end(group, 1));
        let other = spawn(&world, |world| world.batches.overdue(LATE, |late| panic!("{late:?}")));
        world.batches.detach(batch);
        join(driver);
        join(other);
        world.check_free(1);
    });
}

/// Cancelled, failed and complete at once: one of them, told once, and it stays.
#[test]
fn the_first_verdict_stands() {
    check(3, || {
        let world = World::new();
        let batch = world.batches.allocate(1).expect("room");
        let group = world.start(batch, 2, u64::MAX);
        let driver = spawn(&world, move |world| {
            world.end(group, 1);
            world.batches.fail(group, Status::Failed, &failure());
            world.end(group, 1);
        });
        let other = spawn(&world, move |world| world.batches.condemn_all(Status::Canceled));
        let pin = world.batches.pin(batch).expect("a batch");
        let (seen, _) = pin.task(0).expect("a task");
        join(driver);
        join(other);
        let (status, _) = pin.task(0).expect("a task");
        assert!(matches!(status, Status::Failed | Status::Canceled));
        assert!(seen == Status::Pending || seen == status);
        assert_eq!(world.told.load(Ordering::Relaxed), 1);
        assert_eq!(pin.failure(0).expect("a task").is_some(), status == Status::Failed);
    });
}

// ---- regions ------------------------------------------------------------------------------------

#[derive(Default)]
struct Regions {
    users: Users,
    /// The first region's registration: read while it is used, written when it ends.
    registered: Bytes,
}

impl Regions {
    fn open(&self) -> Number {
        let number = self.users.reserve().expect("room");
        self.users.open(number);
        number
    }
}

#[test]
fn a_region_is_not_unregistered_under_a_piece() {
    check(3, || {
        let regions = Arc::<Regions>::default();
        let number = regions.open();
        let submit = move |regions: &Regions| {
            if regions.users.enter(number) {
                regions.registered.read();
                regions.users.enter_more(number.index, 1);
                regions.users.leave(number.index, 1);
                regions.registered.read();
                regions.users.leave(number.index, 1);
            }
        };
        let others = [(); 2].map(|()| spawn(&regions, submit));
        let mut closed = regions.users.close(number).is_ok();
        if closed {
            regions.registered.write();
        }
        others.into_iter().for_each(join);
        if !closed {
            closed = regions.users.close(number).is_ok();
        }
        assert!(closed, "nobody is left inside");
        regions.users.give_back(number);
    });
}

/// A submission that looked a region up before it was unregistered comes in when its number is another's.
#[test]
fn a_number_used_again_starts_with_nobody_inside() {
    check(None, || {
        let regions = Arc::<Regions>::default();
        let old = regions.open();
        let late = spawn(&regions, move |regions| {
            if regions.users.enter(old) {
                regions.registered.read();
                regions.users.leave(old.index, 1);
            }
        });
        if regions.users.close(old).is_ok() {
            regions.registered.write();
            regions.users.give_back(old);
            let new = regions.open();
            assert_eq!(new.index, old.index);
            assert!(regions.users.enter(new), "it is open");
            regions.users.leave(new.index, 1);
            join(late);
            assert_eq!(regions.users.close(new), Ok(()));
        } else {
            join(late);
            assert_eq!(regions.users.close(old), Ok(()));
        }
    });
}

/// A buffer of two regions, of which one is in use, stays registered.
#[test]
fn what_was_closed_in_vain_is_open_again() {
    check(3, || {
        let regions = Arc::<Regions>::default();
        let numbers = [(); 2].map(|()| regions.open());
        assert!(regions.users.enter(numbers[1]));
        let other = spawn(&regions, move |regions| {
            let entered = regions.users.enter(numbers[0]);
            if entered {
                regions.registered.read();
                regions.users.leave(numbers[0].index, 1);
            }
        });
        if regions.users.close(numbers[0]).is_ok() {
            regions.registered.write();
            assert_eq!(regions.users.close(numbers[1]), Err(1));
            regions.users.open(numbers[0]);
        }
        join(other);
        assert!(regions.users.enter(numbers[0]));
        assert_eq!(regions.users.close(numbers[0]), Err(1));
    });
}

// ---- health -------------------------------------------------------------------------------------

#[test]
fn a_nic_that_works_does_not_stay_paused() {
    check(None, || {
        let health = Arc::<Health>::default();
        (0..3).for_each(|now| assert_eq!(health.fail(now), None));
        let other = spawn(&health, |health| {
            health.fail(3);
        });
        health.succeed();
        join(other);
        health.succeed();
        assert!(!health.is_paused());
    });
}

#[test]
fn a_pause_that_is_over_has_one_probe() {
    check(None, || {
        let health = Arc::<Health>::default();
        let pause = (0..4).find_map(|now| health.fail(now)).expect("paused");
        let ask = move |health: &Health| health.ask(3 + pause) == Use::Yes;
        let other = spawn(&health, ask);
        assert!(ask(&health) != join(other));
    });
}

// ---- peers --------------------------------------------------------------------------------------

#[test]
fn a_peer_that_is_released_is_taken_note_of_once() {
    check(None, || {
        let released = Arc::new(Released::new(1));
        let others = [1, 2].map(|peer| spawn(&released, move |it| it.add(0, peer)));
        let mut taken = Vec::new();
        released.take(0, |peer| taken.push(peer));
        others.into_iter().for_each(join);
        released.take(0, |peer| taken.push(peer));
        taken.sort_unstable();
        assert_eq!(taken, [1, 2]);
    });
}

// ---- the engine ---------------------------------------------------------------------------------

/// A NIC that is done with every operation at the next poll.
#[derive(Default)]
pub(crate) struct QuickNic {
    posted: Vec<u32>,
    peers: Vec<u64>,
    /// So many operations fail first.
    failures: u32,
}

impl QuickNic {
    pub fn failing(failures: u32) -> Self {
        Self { failures, ..Self::default() }
    }
}

impl Nic for QuickNic {
    fn depth(&self) -> u32 {
        4
    }

    fn max_length(&self) -> u64 {
        1 << 30
    }

    fn virtual_addresses(&self) -> bool {
        true
    }

    fn register(&mut self, _: u32, _: &Memory) -> Result<u64> {
        Ok(1)
    }

    fn unregister(&mut self, _: u32) -> Result<()> {
        Ok(())
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerAddress> {
        let peer = u64::from(address[0]);
        if !self.peers.contains(&peer) {
            self.peers.push(peer);
        }
        Ok(PeerAddress(peer))
    }

    fn disconnect(&mut self, peer: PeerAddress) -> Result<()> {
        self.peers.retain(|&known| known != peer.0);
        Ok(())
    }

    fn post(&mut self, operation: &Operation) -> Post {
        assert!(self.peers.contains(&operation.peer.0), "the peer is connected");
        self.posted.push(operation.slot);
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, failed: &mut Vec<(u32, Fault)>) {
        for slot in self.posted.drain(..) {
            if self.failures > 0 {
                self.failures -= 1;
                failed.push((slot, Fault::of(Class::Rail, "")));
            } else {
                completed.push(slot);
            }
        }
    }

    fn explain(&self, _: i32) -> Fault {
        Fault::of(Class::Ours, "")
    }
}

/// An engine with a target, and what to ask of it.
pub(crate) struct Bench {
    pub engine: Engine<QuickNic>,
    target: TargetId,
}

fn segment(address: u8) -> RemoteSegment {
    RemoteSegment {
        name: "far".into(),
        server: "far".into(),
        nics: vec![RemoteNic { name: "nic".into(), address: Some(Box::new([address])) }],
        buffers: vec![RemoteBuffer {
            address: 0x1000,
            length: 0x1000,
            keys: vec![1],
            preferred: Vec::new(),
        }],
    }
}

impl Bench {
    pub fn new(rails: u16) -> Arc<Self> {
        Arc::new(Self::over((0..rails).map(|_| QuickNic::default()).collect()))
    }

    /// On these NICs, of which the first gets the first operation.
    pub fn over(nics: Vec<QuickNic>) -> Self {
        let rails = nics.len() as u16;
        let settings = Settings {
            slice: 1 << 20,
            merge: true,
            round_robin: true,
            registering: 1,
            tries: 3,
            keep_peers: 0,
        };
        let nics = nics.into_iter().map(|nic| ("nic".into(), nic)).collect();
        let engine = Engine::new(nics, settings, None);
        let registration = Registration {
            memory: Memory::simulated(0x1000, 0x1000),
            rails: (0..rails).collect(),
            preferred: Vec::new(),
            largest: u64::MAX,
            merge: super::MERGE,
            shares: 1,
        };
        engine.register(&[registration]).expect("registered");
        let target = engine.add_target(segment(1)).expect("target");
        Self { engine, target }
    }

    pub fn submit(&self, batch: BatchId) {
        let request = Request {
            write: true,
            local: 0x1000,
            target: self.target,
            remote: 0x1000,
            length: 64,
            cookie: 0,
        };
        self.engine.submit(batch, [request].into_iter(), 0, u64::MAX).expect("started");
    }

    /// The address of a target, if it is open.
    fn address(&self, target: TargetId) -> Option<u8> {
        let target = self.engine.target(target).ok()?;
        target.nics[0].address.load().as_ref().map(|address| address[0])
    }

    pub fn is_final(&self, batch: BatchId) -> bool {
        self.engine.batch_status(batch).expect("a batch").0.is_final()
    }
}

/// Two submitters, of whom one may find the other driving: what is left undone is seen as load.
#[test]
fn what_nobody_drives_is_seen() {
    check(3, || {
        let bench = Bench::new(1);
        let batches = [(); 2].map(|()| bench.engine.allocate_batch(1).expect("room"));
        let other = spawn(&bench, move |bench| bench.submit(batches[1]));
        bench.submit(batches[0]);
        assert!(bench.engine.load(0) <= 128, "never more than there is, nor less than nothing");
        join(other);
        while batches.iter().any(|&batch| !bench.is_final(batch)) {
            assert!(bench.engine.load(0) > 0);
            bench.engine.progress(0);
        }
        assert!(bench.engine.is_idle());
    });
}

/// What fails goes to the other rail and back: until it has ended, the engine is not seen idle.
#[test]
fn what_goes_to_another_rail_is_not_lost_from_sight() {
    check(3, || {
        let failing = || QuickNic::failing(1);
        let bench = Arc::new(Bench::over(vec![failing(), failing()]));
        let batch = bench.engine.allocate_batch(1).expect("room");
        bench.submit(batch);
        let driver = spawn(&bench, move |bench| {
            let mut now = 0;
            while !bench.is_final(batch) {
                now += 10_000_000;
                bench.engine.progress(now);
            }
        });
        let watcher = spawn(&bench, |bench| {
            if bench.engine.is_idle() {
                assert!(bench.engine.is_idle(), "and it stays so");
            }
        });
        join(driver);
        join(watcher);
        assert!(bench.engine.is_idle());
    });
}

/// A newer descriptor comes for a target that is closed at that time, and whose place is another's at once.
#[test]
fn a_closed_target_does_not_come_back_as_another() {
    check(3, || {
        let bench = Bench::new(1);
        let old = bench.target;
        let other = spawn(&bench, move |bench| drop(bench.engine.update_target(old, segment(2))));
        bench.engine.remove_target(old).expect("open");
        let new = bench.engine.add_target(segment(3)).expect("room");
        join(other);
        assert_eq!(bench.address(new), Some(3));
        assert_eq!(bench.address(old), None);
    });
}

#[test]
fn a_newer_descriptor_is_not_lost() {
    check(3, || {
        let bench = Bench::new(1);
        let other = spawn(&bench, |bench| {
            let old = bench.engine.target(bench.target).expect("open");
            bench.engine.replace(bench.engine.seal.place(bench.target.0).0, &old);
        });
        bench.engine.update_target(bench.target, segment(2)).expect("open");
        join(other);
        assert_eq!(bench.address(bench.target), Some(2));
    });
}

#[test]
fn a_stale_target_is_not_taken_for_another() {
    check(3, || {
        let bench = Bench::new(1);
        let old = bench.target;
        let other = spawn(&bench, move |bench| {
            let address = bench.address(old);
            assert!(matches!(address, None | Some(1)), "{address:?}");
        });
        bench.engine.remove_target(old).expect("open");
        bench.engine.add_target(segment(3)).expect("room");
        join(other);
    });
}

/// A segment is closed while a request to it is on its way to be posted: its peer is known until then.
#[test]
fn a_peer_is_known_as_long_as_it_is_used() {
    check(2, || {
        let bench = Bench::new(1);
        let batch = bench.engine.allocate_batch(1).expect("room");
        let other = spawn(&bench, |bench| {
            // Forgets who is not used.
            bench.engine.rails[0].peers(&bench.engine.shared);
        });
        bench.submit(batch);
        bench.engine.remove_target(bench.target).expect("open");
        join(other);
        while !bench.is_final(batch) {
            bench.engine.progress(0);
        }
        bench.engine.rails[0].peers(&bench.engine.shared);
        let known = bench.engine.with_nic(0, |nic| Ok(nic.peers.len()));
        assert_eq!(known.expect("a NIC"), 0);
    });
}
