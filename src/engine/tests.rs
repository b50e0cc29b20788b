//! The engine on a simulated NIC, in virtual time.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::sim::{GONE, LOCAL, OURS, PEER, PERMANENT, PRESSURE, RAIL, REMOTE, SimNic, World};
use super::*;
use crate::fabric::Buffer;

const FOREVER: u64 = u64::MAX;

struct Bench {
    engine: Engine<SimNic>,
    world: Arc<Mutex<World>>,
    seen: Arc<Mutex<HashMap<u64, Vec<Finished>>>>,
    target: TargetId,
    now: u64,
}

impl Bench {
    /// An engine over NICs of this depth, with 4 MiB registered here and 4 MiB known there.
    fn new(nics: usize, depth: u32, slice: u64, merge: bool) -> Self {
        Self::with_tries(nics, depth, slice, merge, 1)
    }

    fn with_tries(nics: usize, depth: u32, slice: u64, merge: bool, tries: u8) -> Self {
        let world = Arc::new(Mutex::new(World {
            local: (0..SIZE).map(|i| (i % 251) as u8).collect(),
            remote: vec![0; SIZE as usize],
            ..World::default()
        }));
        let seen: Arc<Mutex<HashMap<u64, Vec<Finished>>>> = Arc::default();
        let sims = (0..nics)
            .map(|index| (format!("sim{index}"), SimNic { index, depth, world: world.clone() }));
        let observed = seen.clone();
        let observer: Observer = Box::new(move |finished| {
            for task in finished {
                observed.lock().entry(task.cookie).or_default().push(*task);
            }
        });
        let settings =
            Settings { slice, merge, round_robin: false, registering: nics, tries, keep_peers: 2 };
        let engine = Engine::new(sims.collect(), settings, Some(observer));
        let rails: Vec<u16> = (0..nics as u16).collect();
        for part in 0..4 {
            let (start, length) = (LOCAL + part * SIZE / 4, SIZE / 4);
            engine.register_for_test(start, length, rails.clone());
        }
        let target = engine.add_target(remote_segment(nics)).expect("target");
        Self { engine, world, seen, target, now: 0 }
    }

    fn request(&self, write: bool, offset: u64, length: u64, cookie: u64) -> Request {
        Request {
            write,
            local: LOCAL + offset,
            target: self.target,
            remote: REMOTE + offset,
            length,
            cookie,
        }
    }

    fn submit(&self, batch: BatchId, requests: &[Request]) -> Result<u32, Refusal> {
        self.submit_until(batch, requests, FOREVER)
    }

    /// Submits as one who has no newer descriptor to give.
    fn submit_until(
        &self,
        batch: BatchId,
        requests: &[Request],
        deadline: u64,
    ) -> Result<u32, Refusal> {
        loop {
            match self.engine.submit(batch, requests.iter().copied(), self.now, deadline) {
                Err(Refusal::OutOfDate { error: None, .. }) => {}
                done => return done,
            }
        }
    }

    fn status(&self, batch: BatchId) -> Status {
        self.engine.batch_status(batch).expect("a batch").0
    }

    /// Ends everything in flight, again and again, until the engine is idle. Time passes for what is to be
    /// tried again, as little as that needs.
    fn settle(&self) {
        let mut now = self.now;
        while !self.engine.is_idle() {
            self.world.lock().end_all();
            if self.engine.progress(now).events == 0 {
                now += 1_000_000;
            }
        }
    }
}

const SIZE: u64 = 4 << 20;

fn remote_segment(nics: usize) -> RemoteSegment {
    let nic = |index: usize| RemoteNic {
        name: format!("far{index}"),
        address: Some(Box::new([index as u8])),
    };
    RemoteSegment {
        name: "far:1".into(),
        server: "far:1".into(),
        nics: (0..nics).map(nic).collect(),
        // Two regions, so that some requests cross from one to the other.
        buffers: [(0, SIZE / 2), (SIZE / 2, SIZE / 2)]
            .map(|(offset, length)| RemoteBuffer {
                address: REMOTE + offset,
                length,
                keys: vec![9; nics],
                preferred: Vec::new(),
            })
            .into(),
    }
}

impl Engine<SimNic> {
    fn register_for_test(&self, start: u64, length: u64, rails: Vec<u16>) {
        let memory = Memory::simulated(start, length);
        let registration = Registration {
            memory,
            rails,
            preferred: Vec::new(),
            largest: u64::MAX,
            merge: MERGE,
            shares: 1,
        };
        self.register(&[registration]).expect("registered");
    }
}

#[test]
fn bytes_arrive_and_every_task_ends_once() {
    let bench = Bench::new(2, 8, 64 << 10, true);
    let batch = bench.engine.allocate_batch(3).expect("batch");
    let requests = [
        bench.request(true, 100, 1000, 1),
        bench.request(true, 500_000, 3_000_000, 2),
        bench.request(true, 7, 0, 3),
    ];
    assert_eq!(bench.submit(batch, &requests).expect("started"), 0);
    assert_eq!(bench.status(batch), Status::Pending);
    assert_eq!(bench.engine.task_status(batch, 2).expect("task"), (Status::Completed, 0));
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
    assert_eq!(bench.engine.task_status(batch, 1).expect("task"), (Status::Completed, 3_000_000));
    let world = bench.world.lock();
    for range in [100..1100, 500_000..3_500_000_usize] {
        assert!(world.remote[range.clone()] == world.local[range]);
    }
    assert!(world.remote[1100..500_000].iter().all(|&byte| byte == 0), "nothing else was written");
    let seen = bench.seen.lock();
    assert_eq!(seen.len(), 3);
    assert!(seen.values().all(|ends| ends.len() == 1 && ends[0].status == Status::Completed));
    bench.engine.free_batch(batch).expect("freed");
    assert!(bench.engine.free_batch(batch).is_err(), "freed once");
    assert!(bench.engine.batch_status(batch).is_err());
}

#[test]
fn neighbours_are_merged_and_reported_one_by_one() {
    for (merge, operations) in [(true, 1), (false, 16)] {
        let bench = Bench::new(1, 64, 1 << 20, merge);
        let batch = bench.engine.allocate_batch(16).expect("batch");
        let requests: Vec<_> = (0..16).map(|i| bench.request(true, i * 4096, 4096, i)).collect();
        bench.submit(batch, &requests).expect("started");
        assert_eq!(bench.world.lock().in_flight(), operations);
        bench.settle();
        let seen = bench.seen.lock();
        assert_eq!(seen.len(), 16);
        assert!(seen.values().all(|ends| ends.len() == 1 && ends[0].bytes == 4096));
    }
}

#[test]
fn what_is_not_contiguous_is_not_merged() {
    let bench = Bench::new(1, 64, 1 << 20, true);
    let batch = bench.engine.allocate_batch(8).expect("batch");
    let mut swapped = bench.request(true, 8192, 4096, 2);
    swapped.remote += 4096;
    let requests = [
        bench.request(true, 0, 4096, 0),
        bench.request(false, 4096, 4096, 1), // another direction
        swapped,                             // a gap on the far side
        bench.request(true, 12288, 4096, 3), // overlaps the far side of the one before
    ];
    bench.submit(batch, &requests).expect("started");
    assert_eq!(bench.world.lock().in_flight(), 4);
    bench.settle();
}

#[test]
fn a_long_request_uses_all_rails_evenly() {
    let bench = Bench::new(4, 64, 1 << 20, true);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 1 << 20, 0)]).expect("started");
    let world = bench.world.lock();
    let bytes: Vec<u64> =
        world.flying.values().map(|ops| ops.iter().map(|op| op.length).sum()).collect();
    assert_eq!(bytes, [256 << 10; 4]);
    drop(world);
    bench.settle();
}

#[test]
fn short_requests_go_to_the_least_loaded_rail() {
    let bench = Bench::new(4, 64, 1 << 20, false);
    let batch = bench.engine.allocate_batch(64).expect("batch");
    let requests: Vec<_> = (0..64).map(|i| bench.request(true, i * 8192, 8192, i)).collect();
    bench.submit(batch, &requests).expect("started");
    assert!(bench.world.lock().flying.values().all(|ops| ops.len() == 16));
    bench.settle();
}

#[test]
fn few_short_requests_stay_together() {
    let bench = Bench::new(4, 64, 1 << 20, false);
    let requests: Vec<_> = (0..16).map(|i| bench.request(true, i * 8192, 8192, i)).collect();
    for rails in 1..=4 {
        let batch = bench.engine.allocate_batch(16).expect("batch");
        bench.submit(batch, &requests).expect("started");
        let world = bench.world.lock();
        let used: Vec<usize> = world.flying.values().map(Vec::len).filter(|&it| it > 0).collect();
        assert_eq!(used, vec![16; rails], "each on a rail of its own that had nothing to do");
    }
    bench.settle();
}

#[test]
fn without_credits_work_waits() {
    let bench = Bench::new(1, 2, 4096, true);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 10 * 4096, 0)]).expect("started");
    assert_eq!(bench.world.lock().in_flight(), 2);
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
    assert_eq!(bench.world.lock().posted, [4096; 10]);
    assert!(bench.engine.counters(0).starved > 0);
}

#[test]
fn again_is_never_a_failure() {
    let bench = Bench::new(1, 8, 4096, true);
    bench.world.lock().again = true;
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 4096, 0)]).expect("started");
    for _ in 0..100 {
        bench.engine.progress(bench.now);
    }
    assert_eq!(bench.status(batch), Status::Pending);
    bench.world.lock().again = false;
    bench.engine.progress(bench.now);
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
}

#[test]
fn one_failed_piece_fails_its_task_when_the_rest_is_back() {
    let mut bench = Bench::new(1, 4, 4096, true);
    let batch = bench.engine.allocate_batch(2).expect("batch");
    let requests = [bench.request(true, 0, 16 * 4096, 1), bench.request(true, 1 << 20, 4096, 2)];
    bench.submit(batch, &requests).expect("started");
    bench.world.lock().end(0, 0, 5);
    bench.now = 2_000_000;
    bench.engine.progress(bench.now);
    assert_eq!(bench.status(batch), Status::Pending, "three pieces are still in flight");
    assert_eq!(bench.engine.task_error(batch, 0).expect("task"), None, "it has not failed yet");
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Pending);
    bench.settle();
    assert_eq!(bench.engine.task_status(batch, 0).expect("task"), (Status::Failed, 0));
    let why = bench.engine.task_error(batch, 0).expect("task").expect("it failed");
    assert_eq!(
        why,
        "write of 4096 bytes to far:1 over sim0 and its far0 failed after 2.000ms: error 5"
    );
    assert_eq!(bench.engine.task_status(batch, 1).expect("task"), (Status::Completed, 4096));
    assert_eq!(bench.engine.task_error(batch, 1).expect("task"), None);
    assert_eq!(bench.status(batch), Status::Failed);
    assert_eq!(bench.world.lock().posted.len(), 5, "no more pieces were posted after the failure");
}

thread_local! {
    /// What this thread logged: other tests log too.
    static LINES: RefCell<Vec<String>> = RefCell::default();
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        LINES.with_borrow_mut(|lines| lines.push(record.args().to_string()));
    }

    fn flush(&self) {}
}

#[test]
fn a_flood_of_failures_is_counted_not_logged() {
    log::set_logger(&Logger).expect("the only logger of these tests");
    log::set_max_level(log::LevelFilter::Error);
    let mut bench = Bench::new(1, 4, 4096, false);
    bench.world.lock().refuse = Some(22);
    let batch = bench.engine.allocate_batch(100).expect("batch");
    let requests: Vec<_> = (0..100).map(|i| bench.request(true, i * 8192, 4096, i)).collect();
    bench.submit(batch, &requests).expect("started");
    bench.settle();
    assert!(bench.engine.task_error(batch, 99).expect("task").is_some(), "each has its reason");
    bench.now = 999_000_000;
    bench.engine.poll(0, bench.now);
    assert_eq!(LINES.with_borrow(Vec::len), 10);
    bench.now = 1_000_000_000;
    bench.engine.poll(0, bench.now);
    bench.engine.poll(0, bench.now);
    assert_eq!(LINES.with_borrow(|lines| lines[10..].to_vec()), ["and 90 more failures like it"]);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &requests[..1]).expect("started");
    bench.settle();
    assert_eq!(LINES.with_borrow(Vec::len), 12, "another second, another line");
}

#[test]
fn a_refused_post_fails_its_task() {
    let bench = Bench::new(1, 4, 4096, true);
    bench.world.lock().refuse = Some(22);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 3 * 4096, 1)]).expect("started");
    assert_eq!(bench.status(batch), Status::Failed);
    let why = bench.engine.task_error(batch, 0).expect("task").expect("it failed");
    assert_eq!(
        why,
        "write of 12288 bytes to far:1 over sim0 and its far0 failed after 0.000ns: error 22"
    );
    assert!(bench.engine.is_idle());
    bench.engine.free_batch(batch).expect("freed");
}

#[test]
fn a_deadline_ends_the_task_but_not_the_memory() {
    let mut bench = Bench::new(1, 1, 4096, true);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    let request = bench.request(true, 0, 2 * 4096, 1);
    bench.engine.submit(batch, [request].into_iter(), 0, 1_000_000_000).expect("started");
    bench.now = 999_000_000;
    bench.engine.progress(bench.now);
    assert_eq!(bench.status(batch), Status::Pending);
    bench.now = 1_100_000_000;
    bench.engine.progress(bench.now);
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Timeout);
    let why = bench.engine.task_error(batch, 0).expect("task").expect("it is late");
    assert_eq!(
        why,
        "write of 4096 bytes to far:1 over sim0 failed after 1.100s: its deadline passed before \
         all of it was posted"
    );
    assert!(!bench.engine.is_quiet(batch).expect("batch"), "one piece is in flight");
    let busy = bench.engine.unregister(LOCAL).expect_err("its memory is in use");
    assert_eq!(busy.code, Code::Busy);
    // The batch may be freed; its slot is not used again before the piece comes back.
    bench.engine.free_batch(batch).expect("freed");
    let other = bench.engine.allocate_batch(1).expect("batch");
    assert_ne!(other.0 as u32, batch.0 as u32);
    bench.settle();
    bench.engine.unregister(LOCAL).expect("quiet now");
    assert_eq!(bench.seen.lock()[&1].len(), 1, "reported once");
}

#[test]
fn a_late_task_tells_what_it_waits_for() {
    let mut bench = Bench::new(1, 2, 4096, true);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    let request = bench.request(false, 0, 4096, 1);
    bench.engine.submit(batch, [request].into_iter(), 0, 1_000_000_000).expect("started");
    bench.now = 1_100_000_000;
    bench.engine.progress(bench.now);
    let why = bench.engine.task_error(batch, 0).expect("task").expect("it is late");
    assert_eq!(
        why,
        "read of 4096 bytes from far:1 over sim0 failed after 1.100s: its deadline passed and the \
         provider has not given it back"
    );
    bench.engine.free_batch(batch).expect("freed");
    bench.settle();
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[request]).expect("started");
    bench.settle();
    assert_eq!(bench.engine.task_error(batch, 0).expect("task"), None, "a new life of the slot");
}

#[test]
fn a_deadline_holds_though_the_rail_is_stuck() {
    let bench = Bench::new(1, 1, 4096, true);
    let batch = bench.engine.allocate_batch(2).expect("batch");
    let soon = bench.request(true, 0, 2 * 4096, 1);
    let later = bench.request(true, 1 << 20, 4096, 2);
    bench.engine.submit(batch, [soon].into_iter(), 0, 1_000_000_000).expect("started");
    bench.engine.submit(batch, [later].into_iter(), 0, 9_000_000_000).expect("started");
    // Whoever drives is inside the provider and does not come back: nobody calls progress.
    bench.engine.watch(batch).expect("a batch").expire(1_100_000_000);
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Pending, "the rail's");
    bench.engine.watch(batch).expect("a batch").expire(1_300_000_000);
    bench.engine.watch(batch).expect("a batch").expire(1_300_000_000);
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Timeout);
    let why = bench.engine.task_error(batch, 0).expect("task").expect("it is late");
    assert_eq!(
        why,
        "write of 8192 bytes to far:1 failed after 1.300s: its deadline passed and the provider \
         does not return from a call"
    );
    assert_eq!(bench.engine.task_status(batch, 1).expect("task").0, Status::Pending);
    assert!(!bench.engine.is_quiet(batch).expect("batch"));
    bench.settle();
    assert_eq!(bench.engine.task_status(batch, 1).expect("task").0, Status::Completed);
    assert!(bench.engine.is_quiet(batch).expect("batch"));
    assert_eq!(bench.seen.lock()[&1].len(), 1, "reported once");
    bench.engine.unregister(LOCAL).expect("quiet now");
}

#[test]
fn detached_requests_are_told_of_and_their_room_comes_back() {
    let bench = Bench::new(2, 4, 4096, true);
    for round in 0..100 {
        let requests = [
            bench.request(true, 0, 3 * 4096, round * 3),
            bench.request(false, 1 << 20, 100, round * 3 + 1),
            bench.request(true, 0, 0, round * 3 + 2),
        ];
        bench.engine.submit_detached(requests.into_iter(), bench.now, FOREVER).expect("started");
        bench.settle();
        for (cookie, bytes) in [(0, 3 * 4096), (1, 100), (2, 0)] {
            let seen = bench.seen.lock()[&(round * 3 + cookie)].clone();
            assert_eq!((seen.len(), seen[0].status, seen[0].bytes), (1, Status::Completed, bytes));
        }
    }
    // One that is refused leaves nothing behind either.
    let outside = Request { local: 1, ..bench.request(true, 0, 8, 999) };
    assert!(bench.engine.submit_detached([outside].into_iter(), 0, FOREVER).is_err());
    assert!(bench.engine.submit_detached([].into_iter(), 0, FOREVER).is_ok());
    assert!(!bench.seen.lock().contains_key(&999));
    // All rounds used one place in the table: it is still the first of its size that is taken.
    let places = bench.engine.shared.batches.places(4);
    assert_eq!(places, 1, "a detached batch's place is used again");
}

#[test]
fn a_stuck_rail_does_not_keep_detached_requests_past_their_deadline() {
    let bench = Bench::new(1, 1, 4096, false);
    let soon = bench.request(true, 0, 8192, 1);
    bench.engine.submit_detached([soon].into_iter(), 0, 1_000_000_000).expect("started");
    bench.engine.expire_all(1_100_000_000);
    assert!(bench.seen.lock().is_empty(), "the rail's");
    bench.engine.expire_all(1_300_000_000);
    bench.engine.expire_all(1_300_000_000);
    assert_eq!(
        bench.seen.lock()[&1].iter().map(|task| task.status).collect::<Vec<_>>(),
        [Status::Timeout]
    );
    bench.settle();
    assert_eq!(bench.seen.lock()[&1].len(), 1, "reported once");
}

#[test]
fn cancel_ends_what_is_queued_and_waits_for_what_flies() {
    let bench = Bench::new(1, 2, 4096, true);
    let batch = bench.engine.allocate_batch(2).expect("batch");
    let requests = [bench.request(true, 0, 4 * 4096, 1), bench.request(true, 1 << 20, 4096, 2)];
    bench.submit(batch, &requests).expect("started");
    bench.engine.cancel(batch, bench.now).expect("a batch");
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Pending);
    assert_eq!(bench.engine.task_status(batch, 1).expect("task").0, Status::Canceled);
    bench.settle();
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Canceled);
    assert_eq!(bench.engine.task_error(batch, 0).expect("task"), None);
    assert_eq!(bench.world.lock().posted.len(), 2);
    assert!(bench.engine.is_quiet(batch).expect("batch"));
}

#[test]
fn a_bad_request_starts_nothing() {
    let bench = Bench::new(2, 8, 1 << 20, true);
    let batch = bench.engine.allocate_batch(4).expect("batch");
    let good = bench.request(true, 0, 4096, 0);
    let bad = |change: fn(&mut Request)| {
        let mut request = good;
        change(&mut request);
        request
    };
    let cases = [
        (bad(|r| r.local = 1), Code::AddressNotRegistered),
        (bad(|r| r.local = LOCAL + SIZE - 1), Code::AddressNotRegistered),
        (bad(|r| r.remote = REMOTE + SIZE), Code::AddressNotRegistered),
        (bad(|r| r.length = u64::MAX), Code::InvalidArgument),
        (bad(|r| r.remote = u64::MAX), Code::InvalidArgument),
        (bad(|r| r.target = TargetId(77)), Code::InvalidArgument),
    ];
    for (request, code) in cases {
        let error = match bench.submit(batch, &[good, request]) {
            Err(Refusal::Error(error) | Refusal::NotThere { error, .. }) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(error.code, code, "{error}");
        assert!(error.text.starts_with("request 1: "), "{error}");
    }
    assert!(bench.submit(batch, &[good; 5]).is_err(), "one more than fits");
    assert_eq!(bench.engine.batch_status(batch).expect("batch"), (Status::Completed, 0));
    assert_eq!(bench.world.lock().posted, [0; 0]);
    for part in 0..4 {
        bench.engine.unregister(LOCAL + part * SIZE / 4).expect("nothing uses it");
    }
    assert!(bench.world.lock().regions.is_empty());
}

#[test]
fn registration_is_all_or_nothing() {
    let bench = Bench::new(4, 8, 1 << 20, true);
    let before = bench.world.lock().regions.clone();
    bench.world.lock().no_memory_on = Some(2);
    let registration = |start: u64| Registration {
        memory: Memory::simulated(start, 4096),
        rails: vec![0, 1, 2, 3],
        preferred: vec![],
        largest: 1024,
        merge: MERGE,
        shares: 1,
    };
    let two = [registration(1 << 40), registration(2 << 40)];
    let error = bench.engine.register(&two).expect_err("refused by one NIC");
    assert_eq!(error.code, Code::Memory);
    assert!(error.text.contains("sim2"), "{error}");
    assert_eq!(bench.world.lock().regions, before);
    bench.world.lock().no_memory_on = None;
    let made = bench.engine.register(&two).expect("registered");
    assert_eq!(made.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4], "split at 1024 bytes");
    let overlapping = bench.engine.register(&[registration((1 << 40) + 4095)]);
    assert_eq!(overlapping.expect_err("overlaps").code, Code::AddressOverlapped);
    let twice = [registration(3 << 40), registration((3 << 40) - 1)];
    assert_eq!(bench.engine.register(&twice).expect_err("overlap").code, Code::AddressOverlapped);
    bench.engine.unregister(1 << 40).expect("unregistered");
    bench.engine.unregister(2 << 40).expect("unregistered");
    assert_eq!(bench.world.lock().regions, before);
}

#[test]
fn a_range_is_shared_out_among_rails() {
    let bench = Bench::new(5, 8, 1 << 20, true);
    let start = 1 << 40;
    let registration = Registration {
        memory: Memory::simulated(start, 7 << 20),
        rails: vec![4, 3, 2, 1, 0],
        preferred: vec![3, 0],
        largest: 3 << 20,
        merge: MERGE,
        shares: 2,
    };
    let before = bench.world.lock().regions.clone();
    let made = bench.engine.register(&[registration]).expect("registered").remove(0);
    let found: Vec<(u64, u64, Vec<bool>)> = made
        .iter()
        .map(|made| {
            (made.address - start, made.length, made.keys.iter().map(|&key| key != 0).collect())
        })
        .collect();
    let (first, second) = ([false, false, false, true, true], [true, true, true, false, false]);
    let expected = [(0, 3 << 20, first), (3 << 20, 1 << 20, first), (4 << 20, 3 << 20, second)];
    assert!(
        found
            .iter()
            .map(|(at, length, on)| (*at, *length, on.as_slice()))
            .eq(expected.iter().map(|(at, length, on)| (*at, *length, on.as_slice())))
    );
    let locals = bench.engine.locals.load();
    let senders = |at: u64| locals.find(start + at, &mut 0).expect("there").rails.to_vec();
    assert_eq!((senders(0), senders(6 << 20)), (vec![3], vec![0]), "the near ones of each part");
    bench.engine.unregister(start).expect("unregistered");
    assert_eq!(bench.world.lock().regions, before);
}

#[test]
fn an_observer_that_submits_is_not_called_inside_itself() {
    const COUNT: u64 = 100_000;
    static ENGINE: OnceLock<(Engine<SimNic>, BatchId)> = OnceLock::new();
    static TARGET: OnceLock<TargetId> = OnceLock::new();
    thread_local! {
        static INSIDE: Cell<bool> = const { Cell::new(false) };
    }
    let request = |cookie: u64| Request {
        write: true,
        local: LOCAL,
        target: *TARGET.get().expect("opened"),
        remote: REMOTE,
        length: 0,
        cookie,
    };
    let observer: Observer = Box::new(move |finished| {
        assert!(!INSIDE.replace(true), "called inside itself");
        let (engine, batch) = ENGINE.get().expect("made");
        for task in finished {
            let (status, _) = engine.task_status(*batch, task.cookie as u32).expect("a task");
            assert_eq!(status, Status::Pending, "told before it can be seen");
            if task.cookie + 1 < COUNT {
                let next = [request(task.cookie + 1)].into_iter();
                engine.submit(*batch, next, 0, FOREVER).expect("started");
            }
        }
        INSIDE.set(false);
    });
    let nic = SimNic { index: 0, depth: 1, world: Arc::default() };
    let settings = Settings {
        slice: 4096,
        merge: true,
        round_robin: false,
        registering: 1,
        tries: 9,
        keep_peers: 8192,
    };
    let engine = Engine::new(vec![("sim0".into(), nic)], settings, Some(observer));
    TARGET.set(engine.add_target(remote_segment(1)).expect("target")).expect("set once");
    let batch = engine.allocate_batch(COUNT as u32).expect("batch");
    let (engine, batch) = ENGINE.get_or_init(|| (engine, batch));
    engine.submit(*batch, [request(0)].into_iter(), 0, FOREVER).expect("started");
    assert_eq!(engine.batch_status(*batch).expect("batch"), (Status::Completed, COUNT as u32));
}

#[test]
fn a_peer_without_an_address_needs_a_handshake() {
    let bench = Bench::new(2, 8, 1 << 20, true);
    let mut segment = remote_segment(2);
    segment.nics.iter_mut().for_each(|nic| nic.address = None);
    let target = bench.engine.add_target(segment.clone()).expect("target");
    let batch = bench.engine.allocate_batch(1).expect("batch");
    let request = Request { target, ..bench.request(true, 0, 4096, 0) };
    match bench.submit(batch, &[request]) {
        Err(Refusal::NeedsHandshake { nic, target: whose, .. }) => {
            assert_eq!(whose, target);
            bench.engine.set_address(target, nic, &[nic as u8]).expect("a NIC");
        }
        other => panic!("{other:?}"),
    }
    // What a handshake brought outlives a newer descriptor.
    bench.engine.update_target(target, segment.clone()).expect("updated");
    let mut shakes = 0;
    while let Err(Refusal::NeedsHandshake { nic, .. }) = bench.submit(batch, &[request]) {
        bench.engine.set_address(target, nic, &[nic as u8]).expect("a NIC");
        shakes += 1;
    }
    assert!(shakes <= 1);
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
    // But not a restart of the peer, whose regions are all others then.
    segment.buffers.iter_mut().for_each(|buffer| buffer.keys = vec![10; 2]);
    bench.engine.update_target(target, segment).expect("updated");
    let batch = bench.engine.allocate_batch(1).expect("batch");
    assert!(matches!(bench.submit(batch, &[request]), Err(Refusal::NeedsHandshake { .. })));
    bench.engine.remove_target(target).expect("closed");
    assert!(bench.engine.remove_target(target).is_err());
}

#[test]
fn a_failure_ends_what_a_handshake_told() {
    let bench = Bench::new(1, 8, 1 << 20, true);
    let mut segment = remote_segment(1);
    segment.nics[0].address = None;
    let target = bench.engine.add_target(segment.clone()).expect("target");
    // Submits one request; if that needs a handshake, `address` is what it tells. Whether it did.
    let submit = |address: u8| {
        let batch = bench.engine.allocate_batch(1).expect("batch");
        let request = [Request { target, ..bench.request(true, 0, 4096, 0) }];
        if bench.submit(batch, &request).is_ok() {
            return false;
        }
        bench.engine.set_address(target, 0, &[address]).expect("a NIC");
        bench.submit(batch, &request).expect("started");
        true
    };
    let fail = || {
        bench.world.lock().end(0, 0, 5); // the oldest; the newest takes its place
        bench.engine.progress(bench.now);
    };
    assert!(submit(7), "the first time");
    assert!(!submit(7), "it is known");
    fail();
    assert!(submit(8), "forgotten: the peer may have been restarted");
    fail(); // the other one to the old address
    assert!(!submit(9), "the new address is not blamed for the old");
    fail();
    assert!(submit(9));
    bench.settle();
    // An address from the descriptor stays: there is nobody to ask.
    segment.nics[0].address = Some(Box::new([1]));
    bench.engine.update_target(target, segment).expect("updated");
    assert!(!submit(10));
    fail();
    assert!(!submit(10));
    bench.settle();
}

#[test]
fn threads_share_an_engine() {
    let bench = Bench::new(2, 16, 4096, true);
    let stop = &std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let bench = &bench;
        let device = scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                bench.world.lock().end_all();
                std::thread::yield_now();
            }
        });
        let workers: Vec<_> = (0..8_u64)
            .map(|thread| {
                scope.spawn(move || {
                    for round in 0..200 {
                        let batch = bench.engine.allocate_batch(4).expect("batch");
                        let base = thread * (SIZE / 8);
                        let requests: Vec<_> = (0..4)
                            .map(|i| {
                                let cookie = (thread << 32) | (round << 8) | i;
                                bench.request(true, base + i * 10_000, 9_000, cookie)
                            })
                            .collect();
                        bench.submit(batch, &requests).expect("started");
                        while !bench.status(batch).is_final() {
                            bench.engine.progress(0);
                            std::thread::yield_now();
                        }
                        assert_eq!(bench.status(batch), Status::Completed);
                        bench.engine.free_batch(batch).expect("freed");
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().expect("worker"));
        stop.store(true, Ordering::Relaxed);
        device.join().expect("device");
    });
    let seen = bench.seen.lock();
    assert_eq!(seen.len(), 8 * 200 * 4);
    assert!(seen.values().all(|ends| ends.len() == 1));
    assert!(bench.engine.is_idle());
}

#[test]
fn a_buffer_keeps_its_memory() {
    let buffer = Buffer::new(8192).expect("mapped");
    let memory = Memory::from(&buffer);
    let address = buffer.address();
    drop(buffer);
    assert_eq!((memory.address(), memory.length()), (address, 8192));
    assert_eq!(memory.part(4096, 4096).address(), address + 4096);
}

// ---- faults -------------------------------------------------------------------------------------

const MS: u64 = 1_000_000;

impl Bench {
    /// Ends everything in flight on a NIC like this. How many operations that were.
    fn end_on(&self, nic: usize, errno: i32) -> usize {
        let mut world = self.world.lock();
        let count = world.flying.get(&nic).map_or(0, Vec::len);
        (0..count).for_each(|_| world.end(nic, 0, errno));
        count
    }

    fn pass(&mut self, nanoseconds: u64) {
        self.now += nanoseconds;
        self.engine.progress(self.now);
        self.engine.progress(self.now); // posts what the first found due
    }

    fn why(&self, batch: BatchId, task: u32) -> String {
        self.engine.task_error(batch, task).expect("a task").expect("it did not complete")
    }
}

#[test]
fn what_a_nic_fails_goes_over_another() {
    let mut bench = Bench::with_tries(2, 8, 1 << 20, true, 9);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 4096, 0)]).expect("started");
    let first = usize::from(bench.world.lock().flying.get(&0).is_none_or(Vec::is_empty));
    for errno in [RAIL, PEER, PRESSURE] {
        let nic = (0..2).find(|&nic| bench.end_on(nic, errno) > 0).expect("it is in flight");
        bench.pass(0);
        assert_eq!(bench.status(batch), Status::Pending);
        assert!(!bench.engine.is_idle(), "it waits for its next try");
        assert!(bench.engine.unregister(LOCAL).is_err(), "its memory is not given up meanwhile");
        assert_eq!(bench.world.lock().in_flight(), 0, "not at once");
        bench.pass(10 * MS);
        assert_eq!(bench.world.lock().flying[&(1 - nic)].len(), 1, "over the other");
    }
    assert_eq!(bench.end_on(1 - first, 0), 1);
    bench.pass(0);
    assert_eq!(bench.status(batch), Status::Completed);
    let world = bench.world.lock();
    assert!(world.remote[..4096] == world.local[..4096]);
    let counters = [0, 1].map(|rail| bench.engine.counters(rail));
    assert_eq!(counters.iter().map(|it| it.failed).sum::<u64>(), 3);
    assert_eq!(counters.iter().map(|it| it.retried).sum::<u64>(), 3);
    assert_eq!(counters.iter().map(|it| it.faults.pressure).sum::<u64>(), 1);
    let state = &bench.engine.peer_states()[0];
    assert_eq!((state.retried, state.faults.peer, state.paused.len()), (3, 1, 0));
}

#[test]
fn tries_come_to_an_end_and_are_told() {
    let mut bench = Bench::with_tries(1, 8, 1 << 20, true, 3);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 4096, 0)]).expect("started");
    for _ in 0..3 {
        assert_eq!(bench.status(batch), Status::Pending);
        assert_eq!(bench.end_on(0, PEER), 1);
        bench.pass(0);
        bench.pass(10 * MS);
    }
    assert_eq!(bench.status(batch), Status::Failed);
    let why = bench.why(batch, 0);
    assert!(why.ends_with("and 3 tries: error 13"), "{why}");
    assert!(bench.engine.is_idle());
}

#[test]
fn what_is_wrong_in_itself_is_not_tried_again() {
    for errno in [PERMANENT, OURS] {
        let mut bench = Bench::with_tries(2, 8, 1 << 20, true, 9);
        let batch = bench.engine.allocate_batch(1).expect("batch");
        bench.submit(batch, &[bench.request(true, 0, 4096, 0)]).expect("started");
        assert_eq!(bench.end_on(0, errno) + bench.end_on(1, errno), 1);
        bench.pass(0);
        assert_eq!(bench.status(batch), Status::Failed);
        // The peer may not have what its descriptor says: whoever submits next should ask.
        let batch = bench.engine.allocate_batch(1).expect("batch");
        let request = [bench.request(true, 0, 4096, 1)];
        let next = bench.engine.submit(batch, request.into_iter(), bench.now, FOREVER);
        let asks = matches!(next, Err(Refusal::OutOfDate { error: None, .. }));
        assert_eq!(asks, errno == PERMANENT, "{next:?}");
        bench.settle();
    }
}

#[test]
fn cancel_and_deadline_end_what_waits_for_its_next_try() {
    let mut bench = Bench::with_tries(1, 8, 1 << 20, true, 9);
    let canceled = bench.engine.allocate_batch(1).expect("batch");
    let late = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(canceled, &[bench.request(true, 0, 4096, 0)]).expect("started");
    bench.submit_until(late, &[bench.request(true, 8192, 4096, 1)], MS / 10).expect("started");
    assert_eq!(bench.end_on(0, PEER), 2);
    bench.pass(0);
    bench.engine.cancel(canceled, bench.now).expect("a batch");
    assert_eq!(bench.engine.task_status(canceled, 0).expect("task").0, Status::Canceled);
    assert_eq!(bench.status(late), Status::Pending);
    bench.pass(MS / 10);
    assert_eq!(bench.engine.task_status(late, 0).expect("task").0, Status::Timeout);
    assert!(bench.why(late, 0).ends_with("error 13"), "what kept it is told");
    assert!(bench.engine.is_idle());
    bench.engine.unregister(LOCAL).expect("quiet");
}

#[test]
fn a_nic_that_fails_is_left_out_probed_and_brought_back() {
    let mut bench = Bench::with_tries(2, 64, 1 << 20, false, 9);
    let submit = |bench: &Bench, from: u64| {
        let batch = bench.engine.allocate_batch(16).expect("batch");
        let requests: Vec<_> =
            (0..16).map(|i| bench.request(true, (from + i) * 65536, 32768, from + i)).collect();
        bench.submit(batch, &requests).expect("started");
        batch
    };
    let first = submit(&bench, 0);
    assert!(bench.end_on(0, RAIL) >= 4);
    bench.pass(0);
    assert!(bench.engine.counters(0).paused && !bench.engine.counters(1).paused);
    let second = submit(&bench, 16);
    assert_eq!(bench.world.lock().flying[&0].len(), 0, "left out");
    while !bench.status(first).is_final() || !bench.status(second).is_final() {
        bench.world.lock().end_all();
        bench.pass(MS);
        assert_eq!(bench.world.lock().flying[&0].len(), 0, "retries go elsewhere too");
    }
    assert_eq!((bench.status(first), bench.status(second)), (Status::Completed, Status::Completed));
    bench.pass(200 * MS);
    let third = submit(&bench, 0);
    assert!(!bench.world.lock().flying[&0].is_empty(), "a probe");
    bench.settle();
    assert_eq!(bench.status(third), Status::Completed);
    assert!(!bench.engine.counters(0).paused, "brought back");
}

#[test]
fn a_dead_peer_is_broken_off_and_others_are_served() {
    let mut bench = Bench::with_tries(2, 64, 1 << 20, true, 9);
    let other = RemoteSegment { name: "other:1".into(), ..remote_segment(2) };
    let other = bench.engine.add_target(other).expect("target");
    let mut ended = 0;
    let batch = bench.engine.allocate_batch(64).expect("batch");
    let requests: Vec<_> = (0..64).map(|i| bench.request(true, i * 40_000, 4096, i)).collect();
    bench.submit(batch, &requests).expect("started");
    while !bench.status(batch).is_final() {
        ended += bench.end_on(0, PEER) + bench.end_on(1, PEER);
        bench.pass(MS);
        assert!(ended < 64 * 9 && bench.now < 60_000 * MS);
    }
    assert_eq!(bench.status(batch), Status::Failed);
    let batch = bench.engine.allocate_batch(2).expect("batch");
    // It may have been restarted: its descriptor is to be asked for, once.
    let submit =
        |request: Request| bench.engine.submit(batch, [request].into_iter(), bench.now, FOREVER);
    let asks = submit(requests[0]);
    assert!(matches!(asks, Err(Refusal::OutOfDate { error: None, .. })), "{asks:?}");
    let refused = submit(requests[0]);
    let Err(Refusal::Error(error)) = refused else { panic!("{refused:?}") };
    assert!(error.text.contains("far:1 cannot be reached over any of its 2 NICs"), "{error}");
    assert!(error.text.ends_with("because: error 13"), "{error}");
    // Though all rails failed with it, another peer is served at once.
    let living = Request { target: other, ..requests[1] };
    bench.submit(batch, &[living]).expect("started");
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
    // A newer descriptor with other addresses is another peer.
    let mut restarted = remote_segment(2);
    restarted.nics.iter_mut().for_each(|nic| nic.address = Some(Box::new([77])));
    bench.engine.update_target(bench.target, restarted).expect("updated");
    bench.submit(batch, &requests[..1]).expect("started");
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
}

#[test]
fn one_peer_does_not_take_all_credits() {
    let bench = Bench::with_tries(1, 16, 4096, false, 9);
    let other = RemoteSegment {
        name: "other:1".into(),
        nics: vec![RemoteNic { name: "o".into(), address: Some(Box::new([99])) }],
        ..remote_segment(1)
    };
    let other = bench.engine.add_target(other).expect("target");
    let batch = bench.engine.allocate_batch(64).expect("batch");
    let silent: Vec<_> = (0..60).map(|i| bench.request(true, i * 8192, 4096, i)).collect();
    bench.submit(batch, &silent).expect("started");
    assert_eq!(bench.world.lock().in_flight(), 12, "three quarters");
    // The silent one's requests stay where they are; those of the other go on.
    for i in 60..64 {
        let living = Request { target: other, ..bench.request(true, i * 8192, 4096, i) };
        bench.submit(batch, &[living]).expect("started");
        let mut world = bench.world.lock();
        let at = world.flying[&0].iter().position(|op| op.peer.0 == 99).expect("posted at once");
        world.end(0, at, 0);
        drop(world);
        bench.engine.progress(bench.now);
        assert_eq!(bench.engine.task_status(batch, i as u32).expect("task").0, Status::Completed);
    }
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed, "nothing was left lying");
}

#[test]
fn a_peer_that_the_provider_puts_off_does_not_hold_up_others() {
    let bench = Bench::with_tries(1, 16, 1 << 20, false, 9);
    let other = RemoteSegment {
        name: "other:1".into(),
        nics: vec![RemoteNic { name: "o".into(), address: Some(Box::new([99])) }],
        ..remote_segment(1)
    };
    let other = bench.engine.add_target(other).expect("target");
    let batch = bench.engine.allocate_batch(2).expect("batch");
    bench.engine.warm_up(other).expect("connected");
    bench.world.lock().again_for = Some(0);
    bench.submit(batch, &[bench.request(true, 0, 4096, 0)]).expect("started");
    let living = Request { target: other, ..bench.request(true, 8192, 4096, 1) };
    bench.submit(batch, &[living]).expect("started");
    assert_eq!(bench.world.lock().in_flight(), 1, "posted at once");
    bench.end_on(0, 0);
    bench.engine.progress(bench.now);
    assert_eq!(bench.engine.task_status(batch, 1).expect("task").0, Status::Completed);
    assert_eq!(bench.engine.task_status(batch, 0).expect("task").0, Status::Pending);
    bench.world.lock().again_for = None;
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
}

#[test]
fn peers_that_come_and_go_leave_nothing_behind() {
    let bench = Bench::with_tries(1, 16, 1 << 20, false, 9);
    let known = |bench: &Bench| bench.engine.rails[0].peers(&bench.engine.shared);
    for round in 0..200_u8 {
        let segment = RemoteSegment {
            nics: vec![RemoteNic { name: "n".into(), address: Some(Box::new([round])) }],
            ..remote_segment(1)
        };
        let target = bench.engine.add_target(segment).expect("target");
        let batch = bench.engine.allocate_batch(1).expect("batch");
        let request = Request { target, ..bench.request(true, 0, 4096, u64::from(round)) };
        bench.submit(batch, &[request]).expect("started");
        if round % 3 == 0 {
            // Closed with an operation in flight: its peer stays until that is back.
            bench.engine.remove_target(target).expect("closed");
            assert!(bench.world.lock().peers.contains(&(0, u64::from(round))));
            bench.settle();
        } else {
            bench.settle();
            bench.engine.remove_target(target).expect("closed");
        }
        bench.engine.admit(0, &[200 + round % 50]).expect("known");
        bench.engine.free_batch(batch).expect("freed");
        assert!(known(&bench) <= 3, "two that may stay, and one more");
    }
    assert_eq!(bench.world.lock().peers.len(), known(&bench));
}

/// What takes time is not done in a poll of many: pollers take slow ones for a peer's work.
#[test]
fn devices_are_tended_now_and_then() {
    let mut bench = Bench::new(1, 16, 1 << 20, false);
    let start = bench.world.lock().tended;
    for _ in 0..10_000 {
        bench.engine.poll(0, bench.now);
    }
    assert!(bench.world.lock().tended <= start + 1);
    let start = bench.world.lock().tended;
    for _ in 0..1000 {
        bench.pass(MS);
        bench.engine.poll(0, bench.now);
    }
    assert_eq!(bench.world.lock().tended, start + 50, "every 20 ms");
}

#[test]
fn a_device_that_is_full_forgets_peers_without_users() {
    let bench = Bench::with_tries(1, 16, 1 << 20, false, 9);
    let engine = &bench.engine;
    let segment = |address: u8| RemoteSegment {
        nics: vec![RemoteNic { name: "n".into(), address: Some(Box::new([address])) }],
        ..remote_segment(1)
    };
    // Two that stay known without users, the older one with an operation in flight, and a third with one.
    let batch = engine.allocate_batch(1).expect("batch");
    for address in [101, 102] {
        let target = engine.add_target(segment(address)).expect("target");
        if address == 101 {
            let request = Request { target, ..bench.request(true, 0, 4096, 0) };
            bench.submit(batch, &[request]).expect("started");
        }
        engine.warm_up(target).expect("connected");
        engine.remove_target(target).expect("closed");
    }
    let third = engine.add_target(segment(103)).expect("target");
    engine.warm_up(third).expect("connected");
    let peers = || bench.world.lock().peers.iter().map(|&(_, peer)| peer).collect::<Vec<_>>();
    assert_eq!(peers(), [101, 102, 103]);
    bench.world.lock().room = Some(3);
    // Room is where nobody needs it.
    let fourth = engine.add_target(segment(104)).expect("target");
    engine.warm_up(fourth).expect("connected");
    assert_eq!(peers(), [101, 103, 104]);
    // There is none, and what is used stays.
    let fifth = engine.add_target(segment(105)).expect("target");
    assert!(
        matches!(engine.warm_up(fifth), Err(Refusal::Error(error)) if error.text.contains("no room"))
    );
    assert_eq!(peers(), [101, 103, 104]);
    bench.settle();
    // Not for an address that cannot be one.
    bench.world.lock().bad_address = Some(105);
    assert!(engine.warm_up(fifth).is_err());
    assert_eq!(peers(), [101, 103, 104]);
    bench.world.lock().bad_address = None;
    engine.warm_up(fifth).expect("connected");
    assert_eq!(peers(), [103, 104, 105]);
}

#[test]
fn a_descriptor_is_asked_for_while_that_brings_something_new() {
    let bench = Bench::with_tries(1, 16, 1 << 20, false, 9);
    let asks = Cell::new(0);
    // A submission at `since`, refused at `now`; what the host answers then.
    let refused = |since: u64, now: u64, answer: Result<RemoteSegment>| {
        bench.engine.refresh_target(
            bench.target,
            since,
            || now,
            |name| {
                assert_eq!(name, "far:1");
                asks.set(asks.get() + 1);
                answer
            },
        )
    };
    let asked = |since, now, answer| {
        let before = asks.get();
        (refused(since, now, answer).is_ok_and(|again| again), asks.get() - before)
    };
    let mut grown = remote_segment(1);
    let mut grow = || {
        let last = grown.buffers.last().expect("one").clone();
        let address = last.address + 2 * last.length;
        grown.buffers.push(RemoteBuffer { address, ..last });
        Ok(grown.clone())
    };
    // A peer that registers more and more is asked each time; by one, for all who came before that.
    for now in 10..20 {
        assert_eq!(asked(now, now, grow()), (true, 1));
        assert_eq!(asked(now - 1, now, grow()), (true, 0), "another thread");
    }
    // Who asks in vain does not at once again, and always later.
    let same = || Ok(grown.clone());
    let start = 100 * MS;
    let seen: Vec<_> = (0..10_000)
        .map(|i| asked(start + i * MS, start + i * MS, same()))
        .filter(|it| it.1 > 0)
        .collect();
    assert!((10..25).contains(&seen.len()), "{} asked in 10 s", seen.len());
    // So does one whose host fails.
    let start = start + 20_000 * MS;
    let fail = || Err(Error::new(Code::Metadata, "no answer"));
    let before = asks.get();
    (0..10_000).for_each(|i| drop(refused(start + i * MS, start + i * MS, fail())));
    assert!((10..25).contains(&(asks.get() - before)), "{} asked in 10 s", asks.get() - before);
    // Long after, it is at once; and from then on, if there was something new.
    let start = start + 20_000 * MS;
    let (first, second, third) = (start, start + 1, start + 2);
    let mut more = grown.clone();
    more.buffers.pop();
    assert_eq!(asked(first, first, Ok(more)), (true, 1));
    assert_eq!(asked(second, second, same()), (true, 1));
    assert_eq!(asked(third, third, same()), (true, 1));
    assert_eq!(asked(third + 1, third + 1, same()), (false, 0));
}

#[test]
fn a_peer_whose_endpoint_is_gone_is_not_kept() {
    let bench = Bench::new(1, 16, 1 << 20, true);
    let known = || bench.engine.rails[0].peers(&bench.engine.shared);
    for (address, errno, is_kept) in [(10, GONE, 0), (11, PEER, 1), (12, GONE, 0), (13, 0, 1)] {
        let before = known();
        let segment = RemoteSegment {
            nics: vec![RemoteNic { name: "n".into(), address: Some(Box::new([address])) }],
            ..remote_segment(1)
        };
        let target = bench.engine.add_target(segment).expect("target");
        let batch = bench.engine.allocate_batch(2).expect("batch");
        let requests = [0, 1].map(|i| Request { target, ..bench.request(true, i * 8192, 4096, i) });
        bench.submit(batch, &requests).expect("started");
        bench.world.lock().end(0, 0, errno);
        bench.engine.progress(bench.now);
        bench.engine.remove_target(target).expect("closed");
        assert_eq!(known(), before + 1, "something is in flight to {address}");
        bench.end_on(0, errno);
        bench.engine.progress(bench.now);
        assert_eq!(known(), before + is_kept, "{address}");
    }
}

#[test]
fn what_is_tried_again_does_not_go_to_another_peer_in_its_targets_place() {
    let mut bench = Bench::with_tries(1, 16, 1 << 20, false, 9);
    let batch = bench.engine.allocate_batch(1).expect("batch");
    bench.submit(batch, &[bench.request(true, 0, 4096, 0)]).expect("started");
    assert_eq!(bench.end_on(0, PEER), 1);
    bench.engine.remove_target(bench.target).expect("closed");
    // The same addresses are registered there too.
    let other = RemoteSegment { name: "other:1".into(), ..remote_segment(1) };
    let other = bench.engine.add_target(other).expect("target");
    assert_eq!(other.0 as u32, bench.target.0 as u32, "the same place");
    bench.pass(0);
    bench.pass(10 * MS);
    assert_eq!(bench.status(batch), Status::Failed);
    assert!(bench.why(batch, 0).contains("a closed segment"));
    assert_eq!(bench.world.lock().posted.len(), 1, "not tried with the other");
}

#[test]
fn nothing_is_posted_to_a_peer_that_has_not_answered() {
    let mut bench = Bench::with_tries(2, 16, 1 << 20, false, 9);
    bench.world.lock().deaf = [0, 1].into();
    let batch = bench.engine.allocate_batch(4).expect("batch");
    let requests: Vec<_> = (0..4).map(|i| bench.request(true, i * 8192, 4096, i)).collect();
    bench.submit(batch, &requests).expect("started");
    for _ in 0..100 {
        bench.pass(40 * MS);
    }
    assert_eq!(bench.world.lock().posted, [0; 0], "the provider would keep it for ever");
    assert_eq!(bench.status(batch), Status::Pending);
    // After five seconds it is somebody's fault, and the peer is learnt anew.
    while bench.engine.peer_states()[0].faults.peer == 0 {
        bench.pass(40 * MS);
    }
    assert!((5000..5200).contains(&(bench.now / MS)), "{}", bench.now / MS);
    assert_eq!(bench.status(batch), Status::Pending);
    bench.world.lock().deaf.clear();
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
    // Whoever never answers is given up.
    bench.world.lock().deaf = [7].into();
    let deaf = RemoteSegment {
        name: "deaf:1".into(),
        nics: vec![RemoteNic { name: "d".into(), address: Some(Box::new([7])) }],
        ..remote_segment(1)
    };
    let target = bench.engine.add_target(deaf).expect("target");
    let batch = bench.engine.allocate_batch(8).expect("batch");
    let requests: Vec<_> =
        (0..8).map(|i| Request { target, ..bench.request(true, i * 8192, 4096, 10 + i) }).collect();
    bench.submit(batch, &requests).expect("started");
    while !bench.status(batch).is_final() {
        bench.pass(40 * MS);
    }
    assert!(bench.why(batch, 0).contains("did not answer our greeting for 5s; is its process"));
    assert!(bench.engine.is_idle());
}

#[test]
fn what_waits_for_a_peer_that_was_replaced_goes_to_the_new_one() {
    let mut bench = Bench::with_tries(1, 16, 1 << 20, false, 9);
    bench.world.lock().deaf = [0].into();
    let batch = bench.engine.allocate_batch(2).expect("batch");
    let requests: Vec<_> = (0..2).map(|i| bench.request(true, i * 8192, 4096, i)).collect();
    bench.submit(batch, &requests).expect("started");
    let mut restarted = remote_segment(1);
    restarted.nics[0].address = Some(Box::new([77]));
    bench.engine.update_target(bench.target, restarted).expect("updated");
    for _ in 0..5 {
        bench.pass(20 * MS);
    }
    assert_eq!(bench.world.lock().flying[&0].len(), 2, "long before anybody gives up");
    bench.settle();
    assert_eq!(bench.status(batch), Status::Completed);
}
