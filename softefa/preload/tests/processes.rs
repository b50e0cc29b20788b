//! Several processes on the emulated NICs: some are killed, some fork, some are another user's.

mod harness;

use std::cell::Cell;
use std::time::{Duration, Instant};

use harness::verbs::*;
use harness::*;
use softefa_core::sysfs::gid;

const OK: u32 = 0;
const BAD_QPN: u32 = 9;
const UNRESPONSIVE: u32 = 13;

/// Where the other process's memory is, as it told.
#[derive(Clone, Copy)]
struct Target {
    qp: u32,
    address: u64,
    key: u32,
}

impl Target {
    fn of(words: &[u64]) -> Target {
        Target { qp: words[0] as u32, address: words[1], key: words[2] as u32 }
    }
    fn write_at(self, at: usize) -> Op {
        Op::Write { key: self.key, to: self.address + at as u64 }
    }
    fn read_at(self, at: usize) -> Op {
        Op::Read { key: self.key, from: self.address + at as u64 }
    }
}

fn tell_target(side: &Side) {
    tell(&[side.qp.number().into(), side.region.address(), side.region.key().into()]);
}

/// One operation with `length` bytes at `at` of our memory; its status.
fn status(side: &Side, target: Target, op: Op, at: usize, length: usize) -> u32 {
    let data = [side.region.sge(at, length)];
    assert_eq!(side.qp.post(1, op, Data::Buffers(&data), side.to(target.qp)), 0);
    side.cq.wait().status
}

// --------------------------------------------------------------------------- killed

#[test]
#[ignore = "run by other tests as a process of its own"]
fn victim() {
    if !is_child("victim") {
        return;
    }
    let mut side = side(0, Kind::default());
    side.ah = Some(Ah::new(&side.device, gid(0, 0)));
    (0..4).for_each(|id| side.receive(id, 4096, 64));
    tell_target(&side);
    // Until it is killed.
    hear();
}

#[test]
fn a_killed_peer_is_unresponsive_and_leaves_nothing() {
    let _turn = turn();
    let mut us = side(0, Kind::default());
    us.ah = Some(Ah::new(&us.device, gid(1, 0)));
    let mut victim = Other::start("victim", 1);
    let target = Target::of(&victim.hear());
    assert_eq!(status(&us, target, target.write_at(0), 500, 3000), OK);
    assert_eq!(status(&us, target, target.read_at(0), 10_000, 3000), OK);
    assert_eq!(us.region.read(10_000, 3000), us.region.read(500, 3000));
    assert_eq!(status(&us, target, Op::Send, 0, 64), OK);
    let before = nic_stat(1, 0);
    assert_eq!(
        (before.regions, before.queue_pairs.len(), before.queue_pairs[0].alive),
        (1, 1, true)
    );
    assert_eq!(before.queue_pairs[0].receives, 3);
    victim.kill();
    for op in [Op::Send, target.write_at(0), target.read_at(0)] {
        let begun = Instant::now();
        assert_eq!(status(&us, target, op, 0, 64), UNRESPONSIVE);
        assert!(begun.elapsed() >= DEAD, "{:?}", begun.elapsed());
    }
    let dead = nic_stat(1, 0);
    assert_eq!((dead.regions, dead.queue_pairs.len(), dead.queue_pairs[0].alive), (1, 1, false));
    let mut next = Other::start("victim", 1);
    let fresh = Target::of(&next.hear());
    let after = nic_stat(1, 0);
    assert_eq!((after.regions, after.queue_pairs.len(), after.queue_pairs[0].alive), (1, 1, true));
    assert_eq!(after.pages, before.pages);
    assert_eq!(status(&us, target, Op::Send, 0, 64), BAD_QPN, "the dead one's queue pair is gone");
    let old = target.write_at(0);
    assert_ne!(status(&us, fresh, old, 0, 64), OK, "and so is its memory's key");
    assert_eq!(status(&us, fresh, fresh.write_at(0), 0, 64), OK);
}

#[test]
fn a_rule_kills_the_peer() {
    let _turn = turn();
    let mut us = side(0, Kind::default());
    us.ah = Some(Ah::new(&us.device, gid(1, 0)));
    let mut victim = Other::start("victim", 1);
    let target = Target::of(&victim.hear());
    set_faults("kill at=3");
    assert_eq!(status(&us, target, target.write_at(0), 0, 64), OK);
    assert_eq!(status(&us, target, target.write_at(0), 0, 64), OK);
    let third = status(&us, target, target.write_at(0), 0, 64);
    assert!([OK, UNRESPONSIVE].contains(&third), "dying takes a while: {third}");
    let ended = victim.child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(libc::SIGKILL));
    assert_eq!(status(&us, target, target.write_at(0), 0, 64), UNRESPONSIVE);
}

/// Sends to host 0's first NIC until it is killed: 37 bytes of the number of the message.
#[test]
#[ignore = "run by other tests as a process of its own"]
fn sender() {
    if !is_child("sender") {
        return;
    }
    let mut side = side(0, Kind::default());
    side.ah = Some(Ah::new(&side.device, gid(0, 0)));
    let to = side.to(hear()[0] as u32);
    for k in 0u32.. {
        let bytes: Vec<u8> = k.to_le_bytes().into_iter().cycle().take(37).collect();
        side.region.fill(0, &bytes);
        let data = [side.region.sge(0, 37)];
        assert_eq!(side.qp.post(k.into(), Op::SendImm(k), Data::Buffers(&data), to), 0);
        assert_eq!(side.cq.wait().status, OK);
    }
}

#[test]
fn senders_may_be_killed_at_any_moment() {
    let _turn = turn();
    let us = side(0, Kind { recv_wr: 8, ..Kind::default() });
    (0..8).for_each(|id| us.receive(id, 64 * id as usize, 64));
    let received = Cell::new(0);
    let receive = || {
        let got = us.cq.wait();
        assert_eq!((got.status, got.length), (OK, 37));
        let bytes = us.region.read(64 * got.id as usize, 37);
        let expected = got.imm.unwrap().to_le_bytes();
        assert!(bytes.iter().zip(expected.iter().cycle()).all(|(a, b)| a == b), "torn: {bytes:?}");
        us.receive(got.id, 64 * got.id as usize, 64);
        received.set(received.get() + 1);
    };
    let mut step = 1u32;
    for _ in 0..20 {
        let mut sender = Other::start("sender", 1);
        sender.tell(&[us.qp.number().into()]);
        // No two are killed after the same number.
        step = step.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (0..step >> 24).for_each(|_| receive());
        sender.kill();
    }
    let mut sender = Other::start("sender", 1);
    sender.tell(&[us.qp.number().into()]);
    (0..1000).for_each(|_| receive());
    sender.kill();
    // What was under way is finished or abandoned; all receives are there again.
    let begun = Instant::now();
    while nic_stat(0, 0).queue_pairs[0].receives != 8 {
        if us.cq.poll().is_ok_and(|got| {
            us.receive(got.id, 64 * got.id as usize, 64);
            true
        }) {
            continue;
        }
        assert!(begun.elapsed() < PATIENCE, "a receive is lost");
    }
}

// --------------------------------------------------------------------------- forked

/// Writes and sends from one end to the other.
fn traffic(a: &Side, b: &Side) {
    b.receive(1, 30_000, 64);
    assert_eq!(a.status(b, b.write_at(0), 100, 64), OK, "write");
    assert_eq!(a.status(b, Op::Send, 200, 64), OK, "send");
    assert_eq!(b.cq.wait().status, OK, "receive");
    assert_eq!(b.region.read(0, 64), a.region.read(100, 64));
    assert_eq!(b.region.read(30_000, 64), a.region.read(200, 64));
}

fn fresh_pair() -> (Side, Side) {
    let (mut a, mut b) = (side(0, Kind::default()), side(1, Kind::default()));
    a.ah = Some(Ah::new(&a.device, b.device.gid()));
    b.ah = Some(Ah::new(&b.device, a.device.gid()));
    (a, b)
}

/// A child after fork.
struct Forked(libc::pid_t);

impl Forked {
    fn start(child: impl FnOnce()) -> Forked {
        // SAFETY: the child ends in _exit, and never returns into the test.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: system calls. The alarm ends a child that hangs.
            unsafe {
                libc::alarm(PATIENCE.as_secs() as u32);
                let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
                libc::_exit(i32::from(good.is_err()));
            }
        }
        assert!(pid > 0);
        Forked(pid)
    }
    /// Waits for its end, which must be a good one.
    fn end(self) {
        let mut ended = 0;
        // SAFETY: our child.
        assert_eq!(unsafe { libc::waitpid(self.0, &mut ended, 0) }, self.0);
        assert_ne!(ended, libc::SIGALRM, "the child after fork hung");
        assert_eq!(ended, 0, "the child after fork failed");
    }
}

/// Runs `child` in a child after fork, and meanwhile `parent`.
fn fork(child: impl FnOnce(), parent: impl FnOnce()) {
    let forked = Forked::start(child);
    parent();
    forked.end();
}

#[test]
fn a_child_after_fork_has_devices_of_its_own() {
    if !alone("a_child_after_fork_has_devices_of_its_own", &[]) {
        return;
    }
    let (_turn, a, b) = pair();
    traffic(&a, &b);
    for _ in 0..5 {
        let child = || {
            let (c, d) = fresh_pair();
            (0..20).for_each(|_| traffic(&c, &d));
        };
        fork(child, || (0..20).for_each(|_| traffic(&a, &b)));
    }
    traffic(&a, &b);
}

#[test]
fn a_fork_while_the_helper_works_does_not_hang_the_child() {
    if !alone("a_fork_while_the_helper_works_does_not_hang_the_child", &[]) {
        return;
    }
    let (_turn, a, b) = pair();
    // Waits for ever, and so the helper thread is busy at every fork.
    assert_eq!(a.post(&b, 1, Op::Send, Data::Inline(b"x")), 0);
    let mut arrived = 0;
    for _ in 0..50 {
        let child = || {
            let (c, d) = fresh_pair();
            traffic(&c, &d);
        };
        fork(child, || ());
        arrived += usize::from(b.cq.poll().is_ok());
    }
    b.receive(5, 0, 8);
    assert_eq!((arrived, b.cq.wait().id, a.cq.wait().id), (0, 5, 1));
    std::thread::sleep(Duration::from_millis(20));
    assert!(b.cq.is_empty(), "no child sent it a second time");
}

#[test]
fn a_child_after_fork_takes_nothing_of_its_parents() {
    if !alone("a_child_after_fork_takes_nothing_of_its_parents", &[]) {
        return;
    }
    let (_turn, a, b) = pair();
    // SAFETY: an opened device; the channel lives as long as the process.
    let channel = unsafe { (api().ibv_create_comp_channel)(b.device.context) };
    let cq = Cq::with_channel(&b.device, 64, channel, std::ptr::null_mut());
    let qp = QueuePair::ready(&cq, Kind::default());
    let event = || {
        // SAFETY: a channel, and room for the results.
        unsafe {
            assert!(readable((*channel).fd, PATIENCE), "no event");
            let (mut which, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
            assert_eq!((api().ibv_get_cq_event)(channel, &mut which, &mut context), 0);
        }
    };
    let send = || {
        assert_eq!(a.qp.post(1, Op::Send, Data::Inline(b"12345678"), a.to(qp.number())), 0);
        assert_eq!(a.cq.wait().status, OK);
    };
    for round in 0..5 {
        (0..2).for_each(|k| qp.receive(k, &[&[b.region.sge(0, 8)]]).unwrap());
        // The parent sleeps for a packet at the time of the fork.
        cq.arm();
        let (ready, done) = (Pipe::new(), Pipe::new());
        let child = || {
            let (c, d) = fresh_pair();
            traffic(&c, &d);
            // Waits for a receive, and so this process's helper thread is at work.
            assert_eq!(c.post(&d, 1, Op::Send, Data::Inline(b"x")), 0);
            ready.tell();
            assert!(done.is_told());
        };
        let parent = || {
            assert!(ready.is_told());
            send();
            event();
            assert_eq!(cq.wait().id, 0, "round {round}");
            // Now nobody looks for a while.
            send();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(cq.poll().map(|got| got.id), Ok(1), "round {round}");
            done.tell();
        };
        fork(child, parent);
    }
}

#[test]
fn processes_may_come_all_at_once() {
    if !alone("processes_may_come_all_at_once", &[]) {
        return;
    }
    let _turn = turn();
    for _ in 0..50 {
        let (begin, check) = (Pipe::new(), Pipe::new());
        let child = || {
            assert!(begin.is_told());
            // Its place in the table may be that of one that has died.
            let me = cluster().join().unwrap();
            assert!(check.is_told());
            assert!(cluster().is_alive(me), "somebody else has taken this process's place");
        };
        let children: Vec<Forked> = (0..4).map(|_| Forked::start(child)).collect();
        begin.tell();
        std::thread::sleep(Duration::from_millis(5));
        check.tell();
        children.into_iter().for_each(Forked::end);
    }
}

/// Tells one thing to other processes.
struct Pipe([i32; 2]);

impl Pipe {
    fn new() -> Pipe {
        let mut ends = [0; 2];
        // SAFETY: room for two.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
        Pipe(ends)
    }
    fn tell(&self) {
        // SAFETY: a byte that is there.
        assert_eq!(unsafe { libc::write(self.0[1], b"x".as_ptr().cast(), 1) }, 1);
    }
    fn is_told(&self) -> bool {
        readable(self.0[0], PATIENCE)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        for fd in self.0 {
            // SAFETY: ours.
            unsafe { libc::close(fd) };
        }
    }
}

// --------------------------------------------------------------------------- others

#[test]
fn another_users_directory_is_refused() {
    let name = "another_users_directory_is_refused";
    // SAFETY: has no way to fail.
    if !is_child(name) && unsafe { libc::getuid() } != 0 {
        eprintln!("{name}: SKIPPED: only root can become another user");
        return;
    }
    if is_child(name) {
        let api = api();
        // SAFETY: system calls, and a list that is freed.
        unsafe {
            assert_eq!(libc::setuid(65534), 0);
            let mut count = -1;
            let list = (api.ibv_get_device_list)(&mut count);
            (api.ibv_free_device_list)(list);
            assert_eq!(count, 0);
        }
        return;
    }
    let (output, dir) = run_alone(name, &[], "");
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    let line = format!("{} belongs to user 0, this is user 65534", dir.path().display());
    assert_eq!(told.matches(&line).count(), 1, "{told}");
}

const WORKERS: usize = 10;
const ROUNDS: usize = 20;
const PIECE: usize = 3000;

/// What one worker writes to another in a round.
fn pattern(from: usize, to: usize, round: usize) -> Vec<u8> {
    (0..PIECE).map(|k| (k * 7 + from * 31 + to * 17 + round * 101) as u8).collect()
}

/// Writes to every worker's memory, reads it back, and checks in the end what the others wrote here.
/// Even workers are on one NIC, odd ones on the other.
#[test]
#[ignore = "run by ten_processes_share_the_nics as a process of its own"]
fn worker() {
    if !is_child("worker") {
        return;
    }
    let me = hear()[0] as usize;
    let mut side = side(me % 2, Kind::default());
    let handles = [0, 1].map(|nic| Ah::new(&side.device, gid(0, nic)));
    (0..WORKERS).for_each(|id| side.receive(id as u64, 60_000, 8));
    tell_target(&side);
    let all: Vec<Target> = hear().chunks(3).map(Target::of).collect();
    let (out, back) = (WORKERS * PIECE, (WORKERS + 1) * PIECE);
    let run = |side: &Side, worker: usize, target: Target, op, at, length| {
        let to = To { ah: handles[worker % 2].ah, qp: target.qp, qkey: QKEY };
        let data = [side.region.sge(at, length)];
        assert_eq!(side.qp.post(9, op, Data::Buffers(&data), to), 0);
        // Among what the others send us there is its completion.
        let mut heard = 0;
        loop {
            let done = side.cq.wait();
            assert_eq!(done.status, OK);
            match done.opcode {
                IBV_WC_RECV => heard += 1,
                _ => break heard,
            }
        }
    };
    let mut heard = 0;
    for round in 0..ROUNDS {
        for (worker, target) in all.iter().enumerate() {
            let bytes = pattern(me, worker, round);
            side.region.fill(out, &bytes);
            side.region.fill(back, &[0; PIECE]);
            heard += run(&side, worker, *target, target.write_at(me * PIECE), out, PIECE);
            heard += run(&side, worker, *target, target.read_at(me * PIECE), back, PIECE);
            assert!(side.region.read(back, PIECE) == bytes, "{me} to {worker}, round {round}");
        }
    }
    for (worker, target) in all.iter().enumerate() {
        heard += run(&side, worker, *target, Op::Send, 0, 8);
    }
    while heard < WORKERS {
        assert_eq!(side.cq.wait().opcode, IBV_WC_RECV);
        heard += 1;
    }
    for worker in 0..WORKERS {
        let expected = pattern(worker, me, ROUNDS - 1);
        assert!(side.region.read(worker * PIECE, PIECE) == expected, "{worker} to {me}");
    }
    tell(&[1]);
    // Until all are done.
    hear();
}

#[test]
fn ten_processes_share_the_nics() {
    let _turn = turn();
    let mut workers: Vec<Other> = (0..WORKERS).map(|_| Other::start("worker", 0)).collect();
    (0..WORKERS).for_each(|k| workers[k].tell(&[k as u64]));
    let all: Vec<u64> = workers.iter_mut().flat_map(Other::hear).collect();
    workers.iter_mut().for_each(|worker| worker.tell(&all));
    workers.iter_mut().for_each(|worker| assert_eq!(worker.hear(), [1]));
    for nic in 0..2 {
        let queue_pairs = nic_stat(0, nic).queue_pairs;
        assert_eq!(queue_pairs.len(), WORKERS / 2);
        for qp in queue_pairs {
            let counted =
                ["writes", "reads", "sends", "packets", "errors"].map(|name| qp.counters[name]);
            let (all, one) = ((WORKERS * ROUNDS) as u64, WORKERS as u64);
            assert_eq!(counted, [all, all, one, one, 0]);
        }
    }
}
