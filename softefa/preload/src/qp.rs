//! Queue pairs: what the device does with a descriptor.
//!
//! A send queue's descriptors come from the verbs functions, one by one, or from the mapped queue that
//! the provider fills; from there on there is one way. Nothing waits here: what cannot be done now
//! stays in `waiting` and is tried again whenever somebody polls, and by the helper thread otherwise.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering, fence};

use parking_lot::Mutex;
use softefa_core::cluster::now;
use softefa_core::rules::{Fired, ForQueue, NicState, Op, Operation, Place, Verdict};
use softefa_core::shared::{
    Claim, Counter, Found, Front, MTU, NicShared, Packet, QP_UD, QP_UNSOLICITED, QpShared, SLOTS,
};
use softefa_core::sysfs::gid;

use crate::cq::Cq;
use crate::device::{Context, Peer};
use crate::faults::{self, View};
use crate::verbs::*;
use crate::wire::{self, Buffer, Cdesc, INLINE, RxDesc, TxWqe, status};

/// A work request that was accepted.
struct Work {
    wqe: TxWqe,
    verdict: Verdict,
    /// When it first had to wait.
    since: u64,
    /// A rule keeps it from being executed until then; 0: none does.
    held_until: u64,
    /// The data is where it belongs; only the notice is missing.
    moved: bool,
    length: u32,
    saw_rnr: bool,
}

enum Step {
    /// Status, and when it is to be told (0: now).
    Done(u8, u64),
    Wait,
}

/// The send side, under its lock.
#[derive(Default)]
pub struct Sender {
    /// Built between wr_start and wr_complete.
    pub batch: Vec<TxWqe>,
    /// Why wr_complete will refuse the batch.
    pub error: c_int,
    posted: u64,
    attempts: u64,
    waiting: Vec<Work>,
    rules: Option<(u32, ForQueue)>,
    /// Descriptors taken from the mapped queue so far.
    taken: u16,
}

struct Receiver {
    ids: Box<[u64]>,
    free: Vec<u16>,
    /// Descriptors written, and taken.
    written: u16,
    taken: u16,
    /// On the direct path: up to where requests were counted, and how many they were.
    counted: u16,
    posted: u64,
    /// Packets so far, which the rules count by.
    packets: u64,
    rules: Option<(u32, ForQueue)>,
}

/// A queue pair. The first field is what applications hold.
#[repr(C)]
pub struct Qp {
    pub ex: ibv_qp_ex,
    context: *const Context,
    pub number: u16,
    pub shared: &'static QpShared,
    packets: &'static [Packet; SLOTS],
    is_ud: bool,
    unsolicited: bool,
    /// Every work request is reported.
    pub signal_all: bool,
    /// Retries after RNR; 7 is without end.
    pub rnr_retry: AtomicU32,
    pub sq: Queue<TxWqe>,
    pub rq: Queue<RxDesc>,
    /// Work requests accepted and not yet reported to the application.
    used: AtomicU32,
    pub send: Mutex<Sender>,
    waiting: AtomicUsize,
    recv: Mutex<Receiver>,
    direct: AtomicBool,
}

/// A queue in memory, with its doorbell.
pub struct Queue<T> {
    entries: Box<[UnsafeCell<T>]>,
    pub doorbell: AtomicU32,
}

impl<T: Copy + Default> Queue<T> {
    fn new(size: usize) -> Self {
        Queue {
            entries: (0..size).map(|_| UnsafeCell::default()).collect(),
            doorbell: AtomicU32::new(0),
        }
    }
    /// Entries, a power of two.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    /// Where it lies.
    pub fn base(&self) -> *mut u8 {
        self.entries.as_ptr() as *mut u8
    }
    fn slot(&self, count: u16) -> *mut T {
        self.entries[usize::from(count) & (self.entries.len() - 1)].get()
    }
}

// SAFETY: its pointers are to objects that outlive it; the queues' cells belong to whoever the doorbells say.
unsafe impl Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

/// What a new queue pair is to be.
pub struct Wanted {
    pub is_ud: bool,
    pub unsolicited: bool,
    pub signal_all: bool,
    pub send_wr: u32,
    pub recv_wr: u32,
    pub recv_sge: u32,
}

impl Qp {
    /// # Safety
    /// `qp` is one that [`crate::abi`] gave out, and it is not destroyed.
    pub unsafe fn of<'a>(qp: *mut ibv_qp_ex) -> &'a Qp {
        // SAFETY: `ex` is the first field.
        unsafe { &*qp.cast::<Qp>() }
    }

    /// None: the NIC has no number left.
    pub fn new(context: &Context, ex: ibv_qp_ex, wanted: &Wanted) -> Option<Box<Qp>> {
        let number = context.nic.take_qp(context.world.me())?;
        let shared = &context.nic.qps[usize::from(number)];
        let flags = if wanted.is_ud { QP_UD } else { 0 }
            | if wanted.unsolicited { QP_UNSOLICITED } else { 0 };
        shared.flags.store(flags, Ordering::Release);
        let requests = wanted.recv_wr.max(1).next_power_of_two();
        let descriptors = (requests * wanted.recv_sge.max(1).next_power_of_two()).min(1 << 16);
        Some(Box::new(Qp {
            ex,
            context: ptr::from_ref(context),
            number,
            shared,
            packets: &context.nic.packets[usize::from(number)],
            is_ud: wanted.is_ud,
            unsolicited: wanted.unsolicited,
            signal_all: wanted.signal_all,
            rnr_retry: AtomicU32::new(7),
            sq: Queue::new(wanted.send_wr.max(1).next_power_of_two() as usize),
            rq: Queue::new(descriptors as usize),
            used: AtomicU32::new(0),
            send: Mutex::default(),
            waiting: AtomicUsize::new(0),
            recv: Mutex::new(Receiver {
                ids: vec![0; requests as usize].into(),
                free: (0..requests).rev().map(|id| id as u16).collect(),
                written: 0,
                taken: 0,
                counted: 0,
                posted: 0,
                packets: 0,
                rules: None,
            }),
            direct: AtomicBool::new(false),
        }))
    }

    fn context(&self) -> &Context {
        // SAFETY: a device is closed after its queue pairs are destroyed.
        unsafe { &*self.context }
    }
    pub fn send_cq(&self) -> &Cq {
        // SAFETY: a completion queue is destroyed after its queue pairs.
        unsafe { Cq::of(self.ex.qp_base.send_cq.cast()) }
    }
    pub fn recv_cq(&self) -> &Cq {
        // SAFETY: as above.
        unsafe { Cq::of(self.ex.qp_base.recv_cq.cast()) }
    }

    /// The queues are the provider's to fill from now on.
    pub fn expose(&self) {
        self.direct.store(true, Ordering::Release);
        crate::agent::call(self.context().world);
    }
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire)
    }
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire) != 0
    }

    // ------------------------------------------------------------------- sending

    /// Room for one work request more? Otherwise it is refused with ENOMEM, which libfabric
    /// turns into -FI_EAGAIN.
    pub fn take_room(&self, sender: &mut Sender, op: u8) -> bool {
        let counters = &self.shared.counters;
        sender.attempts += 1;
        if self.used.load(Ordering::Relaxed) as usize >= self.sq.len() || self.refuses(sender, op) {
            counters.add(Counter::refused, 1);
            return false;
        }
        self.used.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Work requests that were given room and not posted after all.
    pub fn give_room(&self, n: u32) {
        self.used.fetch_sub(n, Ordering::Relaxed);
    }

    fn refuses(&self, sender: &mut Sender, op: u8) -> bool {
        let Some(view) = faults::current(self.context().world) else { return false };
        let attempts = sender.attempts;
        let rules = self.rules(&mut sender.rules, view);
        // Rules about others do not make this queue pair look at the clock.
        !rules.is_empty()
            && rules.refuses(attempts, rules_op(op), now(), &mut |fired| self.record(&fired))
    }

    fn judge(
        &self,
        rules: &mut Option<(u32, ForQueue)>,
        view: &View,
        operation: &Operation,
    ) -> Verdict {
        let rules = self.rules(rules, view);
        if rules.is_empty() {
            return Verdict::default();
        }
        rules.judge(operation, now(), &mut |fired| self.record(&fired))
    }

    fn record(&self, fired: &Fired) {
        self.shared.counters.add(Counter::faults, 1);
        faults::record(self.context().world, fired);
    }

    /// The rules of this queue pair, of this state of the script.
    fn rules<'r>(&self, rules: &'r mut Option<(u32, ForQueue)>, view: &View) -> &'r mut ForQueue {
        let context = self.context();
        if rules.as_ref().is_none_or(|(version, _)| *version != view.version) {
            let place =
                Place { host: context.world.host, nic: context.device.index, qp: self.number };
            let mut new = view.script.for_queue(place);
            if let Some((_, before)) = rules {
                new.keep_counts(before);
            }
            *rules = Some((view.version, new));
        }
        &mut rules.as_mut().expect("just set").1
    }

    /// Takes descriptors that the provider wrote and rang for.
    pub fn take_mapped(&self) -> bool {
        let rung = self.sq.doorbell.load(Ordering::Acquire) as u16;
        let Some(mut sender) = self.send.try_lock() else { return false };
        if sender.taken == rung {
            return false;
        }
        while sender.taken != rung {
            // SAFETY: rung for, and not written again before it is completed.
            let wqe = unsafe { self.sq.slot(sender.taken).read_volatile() };
            sender.taken = sender.taken.wrapping_add(1);
            self.used.fetch_add(1, Ordering::Relaxed);
            if sender.posted >= self.sq.len() as u64 {
                self.send_cq().made_room(1);
            }
            self.post(&mut sender, wqe);
        }
        true
    }

    /// Executes a work request that was given room.
    pub fn post(&self, sender: &mut Sender, wqe: TxWqe) {
        sender.posted += 1;
        let counters = &self.shared.counters;
        counters.add(
            match wqe.op() {
                wire::READ => Counter::reads,
                wire::WRITE => Counter::writes,
                _ => Counter::sends,
            },
            1,
        );
        let mut work = Work {
            wqe,
            verdict: Verdict::default(),
            since: 0,
            held_until: 0,
            moved: false,
            length: 0,
            saw_rnr: false,
        };
        let world = self.context().world;
        let view = faults::current(world);
        if let Some(view) = view {
            let peer = self.context().peer(work.wqe.ah).map_or(u16::MAX, |peer| peer.host);
            let operation = Operation { number: sender.posted, op: rules_op(work.wqe.op()), peer };
            work.verdict = self.judge(&mut sender.rules, view, &operation);
        }
        let step = match self.check(&mut work) {
            Err(status) => Step::Done(status, 0),
            Ok(()) if work.verdict.hold_ns > 0 => {
                work.held_until = now() + work.verdict.hold_ns;
                Step::Wait
            }
            Ok(()) if work.verdict.reorder => Step::Wait,
            Ok(()) => self.step(&mut work, view),
        };
        counters.add(
            match work.wqe.op() {
                wire::READ => Counter::read_bytes,
                wire::WRITE => Counter::written_bytes,
                _ => Counter::sent_bytes,
            },
            u64::from(work.length),
        );
        match step {
            Step::Done(status, due) => self.complete(&work, status, due),
            Step::Wait => {
                counters.add(Counter::deferred, 1);
                if work.since == 0 {
                    work.since = now();
                }
                sender.waiting.push(work);
                self.waiting.store(sender.waiting.len(), Ordering::Release);
                crate::agent::call(world);
            }
        }
    }

    /// Tries again what waits. The application may poll between wr_start and wr_complete: then
    /// the lock is taken, and it is left to the next time.
    pub fn retry(&self) {
        if !self.is_waiting() {
            return;
        }
        let Some(mut sender) = self.send.try_lock() else { return };
        let view = faults::current(self.context().world);
        let mut waiting = std::mem::take(&mut sender.waiting);
        waiting.retain_mut(|work| match self.step(work, view) {
            Step::Wait => true,
            Step::Done(status, due) => {
                self.complete(work, status, due);
                false
            }
        });
        sender.waiting = waiting;
        self.waiting.store(sender.waiting.len(), Ordering::Release);
    }

    /// What can be said at once of a work request.
    fn check(&self, work: &mut Work) -> Result<(), u8> {
        let wqe = &work.wqe;
        let nic = self.context().nic;
        let access = if wqe.op() == wire::READ { IBV_ACCESS_LOCAL_WRITE } else { 0 };
        if wqe.is_inline() {
            work.length = u32::from(wqe.length);
        } else {
            for Buffer { address, length, lkey } in wqe.buffers() {
                work.length = work.length.saturating_add(length);
                if nic.find(lkey, address, u64::from(length), access).is_none() {
                    return Err(status::BAD_LKEY);
                }
            }
        }
        if let Some(status) = work.verdict.fail {
            return Err(status);
        }
        let most = match wqe.op() {
            wire::SEND => MTU as u32,
            wire::READ | wire::WRITE => self.context().world.config.max_rdma,
            _ => return Err(status::UNSUPPORTED),
        };
        if work.length > most { Err(status::LOCAL_LENGTH) } else { Ok(()) }
    }

    fn waited(&self, work: &mut Work) -> u64 {
        let time = now();
        if work.since == 0 {
            work.since = time;
        }
        time - work.since
    }

    /// Waits, until that has been too long.
    fn wait(&self, work: &mut Work, most: u64, status: u8) -> Step {
        if self.waited(work) > most { Step::Done(status, 0) } else { Step::Wait }
    }

    /// One try.
    fn step(&self, work: &mut Work, view: Option<&View>) -> Step {
        let context = self.context();
        let world = context.world;
        let dead = world.config.dead_ns;
        if work.held_until != 0 {
            if now() < work.held_until {
                return Step::Wait;
            }
            // Only now it begins to wait for the peer.
            (work.held_until, work.since) = (0, 0);
        }
        let Some(peer) = context.peer(work.wqe.ah) else { return Step::Done(status::BAD_AH, 0) };
        let mut states = None;
        if let Some(view) = view {
            let time = now();
            let mine = view.nic(world.host, context.device.index, time);
            let its = view.nic(peer.host, peer.nic, time);
            if mine.down {
                return self.wait(work, dead / 3, status::UNREACHABLE);
            }
            if mine.silent || its.silent || its.down {
                return self.wait(work, dead, status::UNRESPONSIVE);
            }
            states = Some((mine, its, time));
        }
        let Some(nic) = peer.shared(world) else {
            return self.wait(work, dead, status::UNREACHABLE);
        };
        let Some(target) = nic.qps.get(usize::from(work.wqe.dest_qp)) else {
            return Step::Done(status::BAD_QPN, 0);
        };
        let owner = target.owner.load(Ordering::Acquire);
        if work.verdict.kill {
            work.verdict.kill = false;
            if let Some(pid) = world.cluster.pid(owner) {
                // SAFETY: a system call; the rule asked for it.
                unsafe { libc::kill(pid as i32, libc::SIGKILL) };
                // It is to be dead before the operation, not soon after it.
                let limit = now() + 1_000_000_000;
                while world.cluster.is_alive(owner) && now() < limit {
                    std::thread::yield_now();
                }
            }
        }
        let op = work.wqe.op();
        // Where memory is copied, the system says whether its owner is gone.
        let copies = op != wire::SEND && work.length > 0 && world.config.copy;
        if owner != 0 && (!copies || work.wqe.has_imm()) && !peer.is_alive(world, owner) {
            return if self.is_ud {
                Step::Done(status::OK, 0)
            } else {
                self.wait(work, dead, status::UNRESPONSIVE)
            };
        }
        if !target.is_ready() || target.qkey.load(Ordering::Relaxed) != work.wqe.qkey {
            // A datagram is lost without a word.
            return Step::Done(if self.is_ud { status::OK } else { status::BAD_QPN }, 0);
        }
        if op != wire::SEND && !work.moved {
            if !nic.knows(owner, world.host, context.device.index, &peer.known) {
                return Step::Done(status::UNKNOWN_PEER, 0);
            }
            match self.transfer(work, nic, peer) {
                Err(status::UNRESPONSIVE) => return self.wait(work, dead, status::UNRESPONSIVE),
                Err(status) => return Step::Done(status, 0),
                Ok(()) => {}
            }
            work.moved = true;
        }
        if op != wire::SEND && !work.wqe.has_imm() {
            return Step::Done(status::OK, self.due(work, peer, nic, states));
        }
        // A notice for the other side's receive queue.
        if work.verdict.rnr {
            return self.rnr(work);
        }
        let flags = target.flags.load(Ordering::Relaxed);
        let unsolicited = op == wire::WRITE && flags & QP_UNSOLICITED != 0;
        match target.ring().claim(world.me(), unsolicited) {
            Claim::Slot(at) => {
                let due = self.due(work, peer, nic, states);
                // One way takes half of a round trip; a rule's delay is of the completion only.
                let arrives = match states {
                    Some((mine, its, _)) if due != 0 => {
                        let back = mine.latency_ns.max(its.latency_ns) / 2;
                        due - work.verdict.delay_ns - back
                    }
                    _ => 0,
                };
                self.fill(
                    work,
                    &nic.packets[usize::from(work.wqe.dest_qp)][at as usize % SLOTS],
                    arrives,
                );
                target.ring().publish(at);
                fence(Ordering::SeqCst);
                if target.armed.load(Ordering::Relaxed) != 0
                    && target.armed.swap(0, Ordering::AcqRel) != 0
                {
                    world.cluster.wake(owner);
                }
                Step::Done(status::OK, due)
            }
            _ if flags & QP_UD != 0 => Step::Done(status::OK, 0),
            Claim::NotReady => self.rnr(work),
            Claim::Full => Step::Wait,
        }
    }

    /// The receiver has no receive posted.
    fn rnr(&self, work: &mut Work) -> Step {
        if !std::mem::replace(&mut work.saw_rnr, true) {
            self.shared.counters.add(Counter::rnr, 1);
        }
        let retries = u64::from(self.rnr_retry.load(Ordering::Relaxed));
        let each = self.context().world.config.rnr_ns;
        let waited = self.waited(work);
        if retries == 7 {
            // Asked for ever; a rule's own refusal ends after one interval.
            if waited > each {
                work.verdict.rnr = false;
            }
            return Step::Wait;
        }
        if waited > (retries + 1) * each { Step::Done(status::RNR, 0) } else { Step::Wait }
    }

    /// When the completion is due if links have a speed: the data takes both wires, one after the other but
    /// for what overlaps, and the answer takes the way back. 0: at once.
    fn due(
        &self,
        work: &Work,
        peer: &Peer,
        nic: &NicShared,
        states: Option<(NicState, NicState, u64)>,
    ) -> u64 {
        let Some((mine, its, time)) = states else { return 0 };
        let latency = mine.latency_ns.max(its.latency_ns);
        let mut end = time as i64;
        let here = self.context().nic;
        let is_self =
            peer.host == self.context().world.host && peer.nic == self.context().device.index;
        let (first, second) = match work.wqe.op() {
            wire::READ => ((&nic.outgoing, its), (&here.incoming, mine)),
            _ => ((&here.outgoing, mine), (&nic.incoming, its)),
        };
        let on = |state: NicState| match state.bytes_per_second {
            Some(rate) if rate > 0 => {
                (u128::from(work.length) * 1_000_000_000 / u128::from(rate)) as i64
            }
            _ => 0,
        };
        let (out, into) = (on(first.1), on(second.1));
        if out > 0 {
            end = first.0.reserve(end, out);
        }
        if into > 0 && !is_self {
            end = end.max(second.0.reserve(end - into, into));
        }
        let delay = work.verdict.delay_ns;
        if end as u64 == time && latency == 0 && delay == 0 {
            0
        } else {
            end as u64 + latency + delay
        }
    }

    fn complete(&self, work: &Work, status: u8, due: u64) {
        if status != status::OK {
            self.shared.counters.add(Counter::errors, 1);
            self.context().world.say(|| {
                let (address, rkey) = work.wqe.remote();
                format!(
                    "{} qp {}: operation {} of {} bytes to qp {} (key {rkey:#x}, address {address:#x}) ended with status {status}",
                    self.context().name(), self.number, work.wqe.op(), work.length, work.wqe.dest_qp
                )
            });
        } else if !work.wqe.is_signalled() {
            self.give_room(1);
            return;
        }
        if work.verdict.lose {
            return;
        }
        self.send_cq().push(self, Cdesc::sent(self.number, &work.wqe, status), due);
    }

    /// Moves the data of an RDMA operation, in this thread.
    fn transfer(&self, work: &Work, nic: &NicShared, peer: &Peer) -> Result<(), u8> {
        let context = self.context();
        let world = context.world;
        let read = work.wqe.op() == wire::READ;
        let (address, rkey) = work.wqe.remote();
        let access = if read { IBV_ACCESS_REMOTE_READ } else { IBV_ACCESS_REMOTE_WRITE };
        let length = work.length as usize;
        let Found { owner, address: remote } =
            nic.find(rkey, address, length as u64, access).ok_or(status::REMOTE_ADDRESS)?;
        let Some(buffer) = work.wqe.buffers().next() else { return Ok(()) };
        if length == 0 || !world.config.copy {
            return Ok(());
        }
        let local = context
            .nic
            .find(buffer.lkey, buffer.address, length as u64, 0)
            .ok_or(status::BAD_LKEY)?
            .address;
        let pid = if owner == world.me() {
            None
        } else {
            Some(world.cluster.pid(owner).ok_or(status::UNRESPONSIVE)? as i32)
        };
        let result = copy(pid, local, remote, length, read);
        if let Err(error) = &result {
            if *error == libc::EPERM {
                eprintln!(
                    "softefa[{}]: the kernel refuses access to the memory of process {} ({error}): run both as one user, \
                     and see /proc/sys/kernel/yama/ptrace_scope",
                    std::process::id(),
                    pid.unwrap_or(0)
                );
            }
            let dead = *error == libc::ESRCH || !peer.is_alive(world, owner);
            return Err(if dead { status::UNRESPONSIVE } else { status::REMOTE_ADDRESS });
        }
        if work.verdict.corrupt {
            // The first byte, where it arrived.
            let (pid, at) = if read { (None, local) } else { (pid, remote) };
            let byte = AtomicU8::new(0);
            let mine = byte.as_ptr() as u64;
            let _ = copy(pid, mine, at, 1, true);
            byte.fetch_xor(0xff, Ordering::SeqCst);
            let _ = copy(pid, mine, at, 1, false);
        }
        Ok(())
    }

    /// Puts the packet of a send, or the notice of a write, into a slot that is ours.
    fn fill(&self, work: &Work, packet: &Packet, due: u64) {
        let context = self.context();
        packet.length.store(work.length, Ordering::Relaxed);
        packet.imm.store(work.wqe.imm, Ordering::Relaxed);
        packet.has_imm.store(u8::from(work.wqe.has_imm()), Ordering::Relaxed);
        packet.op.store(work.wqe.op(), Ordering::Relaxed);
        packet.source_qp.store(self.number, Ordering::Relaxed);
        packet.source_host.store(context.world.host, Ordering::Relaxed);
        packet.source_nic.store(context.device.index, Ordering::Relaxed);
        packet.due.store(due, Ordering::Relaxed);
        if work.wqe.op() != wire::SEND {
            return;
        }
        // SAFETY: the claim gave us the slot, and nobody else touches it until it is published.
        let data = unsafe { &mut *packet.data.get() };
        let mut at = 0;
        if work.wqe.is_inline() {
            at = usize::from(work.wqe.length).min(INLINE);
            data[..at].copy_from_slice(&work.wqe.inline()[..at]);
        }
        for Buffer { address, length, lkey } in work.wqe.buffers() {
            let Some(found) = context.nic.find(lkey, address, u64::from(length), 0) else { break };
            let end = (at + length as usize).min(MTU);
            // SAFETY: registered memory of this process, which the application leaves alone until
            // the send is completed.
            data[at..end].copy_from_slice(unsafe {
                slice::from_raw_parts(found.address as *const u8, end - at)
            });
            at = end;
        }
        if work.verdict.corrupt && at > 0 {
            data[at / 2] ^= 0xff;
        }
    }

    // ----------------------------------------------------------------- receiving

    /// Posts a receive. ENOMEM: the queue is full. EINVAL: too many buffers.
    pub fn post_receive(&self, id: u64, buffers: &[ibv_sge]) -> Result<(), c_int> {
        let mut recv = self.recv.lock();
        let needed = buffers.len().max(1);
        if needed > self.rq.len() || needed > 4 {
            return Err(libc::EINVAL);
        }
        let room = self.rq.len() - usize::from(recv.written.wrapping_sub(recv.taken));
        if room < needed {
            return Err(libc::ENOMEM);
        }
        let Some(number) = recv.free.pop() else { return Err(libc::ENOMEM) };
        recv.ids[usize::from(number)] = id;
        for k in 0..needed {
            let buffer = buffers.get(k).map_or(Buffer { address: 0, length: 0, lkey: 0 }, |sge| {
                Buffer { address: sge.addr, length: sge.length, lkey: sge.lkey }
            });
            let desc = RxDesc::new(number, buffer, k == 0, k == needed - 1);
            // SAFETY: under the lock, and free.
            unsafe { self.rq.slot(recv.written).write(desc) };
            recv.written = recv.written.wrapping_add(1);
        }
        self.shared.counters.add(Counter::receives, 1);
        self.shared.ring().post(1);
        Ok(())
    }

    /// Counts the receives that the provider wrote and rang for.
    pub fn count_mapped(&self) {
        let rung = self.rq.doorbell.load(Ordering::Acquire) as u16;
        let Some(mut recv) = self.recv.try_lock() else { return };
        let mut posted = 0;
        while recv.counted != rung {
            // SAFETY: rung for, and not written again before it is completed.
            posted += u64::from(unsafe { self.rq.slot(recv.counted).read_volatile() }.is_last());
            recv.counted = recv.counted.wrapping_add(1);
        }
        if posted > 0 {
            let room = self.rq.len() as u64;
            let before = recv.posted.max(room);
            recv.posted += posted;
            self.recv_cq().made_room(recv.posted.saturating_sub(before) as u32);
            recv.written = rung;
            self.shared.counters.add(Counter::receives, posted);
            self.shared.ring().post(posted);
        }
    }

    /// A packet that was not handed on yet?
    pub fn has_arrived(&self) -> bool {
        self.shared.ring().front() != Front::Empty
    }

    /// Hands at most `most` packets that have arrived to the receives that were posted.
    pub fn receive(&self, most: usize) -> bool {
        let ring = self.shared.ring();
        if ring.front() == Front::Empty {
            return false;
        }
        let context = self.context();
        let Some(mut recv) = self.recv.try_lock() else { return false };
        for done in 0..most {
            let at = match ring.front() {
                Front::Packet(at) => at,
                Front::Unfinished(at, owner) if !context.world.cluster.is_alive(owner) => {
                    ring.abandon(at);
                    continue;
                }
                _ => return done > 0,
            };
            let packet = &self.packets[at as usize % SLOTS];
            let due = packet.due.load(Ordering::Relaxed);
            if due != 0 && due > now() {
                crate::agent::call(context.world);
                return done > 0;
            }
            let entry = self.deliver(&mut recv, packet);
            ring.release(at);
            if let Some((entry, due)) = entry {
                self.recv_cq().push(self, entry, due);
            }
        }
        true
    }

    /// The completion of a packet and when it is due (0: now). None: it gets none.
    fn deliver(&self, recv: &mut Receiver, packet: &Packet) -> Option<(Cdesc, u64)> {
        let context = self.context();
        let op = packet.op.load(Ordering::Relaxed);
        let length = packet.length.load(Ordering::Relaxed);
        let imm = (packet.has_imm.load(Ordering::Relaxed) != 0)
            .then(|| packet.imm.load(Ordering::Relaxed));
        let from =
            (packet.source_host.load(Ordering::Relaxed), packet.source_nic.load(Ordering::Relaxed));
        let source = (
            context.number_of(from.0, from.1),
            packet.source_qp.load(Ordering::Relaxed),
            gid(from.0, from.1),
        );
        let counters = &self.shared.counters;
        counters.add(Counter::packets, 1);
        counters.add(Counter::received_bytes, u64::from(length));
        recv.packets += 1;
        let mut verdict = Verdict::default();
        if let Some(view) = faults::current(context.world) {
            let operation = Operation { number: recv.packets, op: Op::Recv, peer: from.0 };
            verdict = self.judge(&mut recv.rules, view, &operation);
        }
        let due = if verdict.delay_ns > 0 { now() + verdict.delay_ns } else { 0 };
        // A datagram leaves room for a header of 40 bytes, and counts it.
        let header = if self.is_ud { 40 } else { 0 };
        let mut entry = Cdesc::received(self.number, op, length + header, imm, source);
        if op == wire::WRITE && self.unsolicited {
            entry.set_unsolicited();
            self.shared.ring().post(1);
            entry.status = verdict.fail.unwrap_or(status::OK);
            return (!verdict.lose).then_some((entry, due));
        }
        if recv.taken == recv.written {
            // Cannot be: the ring lets no packet in without a receive.
            eprintln!(
                "softefa[{}]: {}: a packet without a receive",
                std::process::id(),
                context.name()
            );
            return None;
        }
        // SAFETY: the packet is published, and ours until it is released.
        let payload: &[u8; MTU] = unsafe { &*packet.data.get() };
        let mut data = &payload[..if op == wire::SEND { (length as usize).min(MTU) } else { 0 }];
        let mut skip = header as usize;
        entry.status = verdict.fail.unwrap_or(status::OK);
        loop {
            // SAFETY: written, and not taken yet.
            let desc = unsafe { self.rq.slot(recv.taken).read_volatile() };
            recv.taken = recv.taken.wrapping_add(1);
            entry.req_id = desc.req_id;
            let skipped = skip.min(usize::from(desc.length));
            skip -= skipped;
            let n = data.len().min(usize::from(desc.length) - skipped);
            if n > 0 && entry.status == status::OK {
                match context.nic.find(
                    desc.lkey(),
                    desc.address(),
                    u64::from(desc.length),
                    IBV_ACCESS_LOCAL_WRITE,
                ) {
                    None => entry.status = status::BAD_LKEY,
                    Some(found) => {
                        // SAFETY: registered memory of this process, given to the device by the post.
                        unsafe {
                            let to = (found.address as *mut u8).add(skipped);
                            ptr::copy_nonoverlapping(data.as_ptr(), to, n);
                            if std::mem::take(&mut verdict.corrupt) {
                                *to ^= 0xff;
                            }
                        }
                        data = &data[n..];
                    }
                }
            }
            if desc.is_last() {
                break;
            }
        }
        if entry.status == status::OK && !data.is_empty() {
            entry.status = status::REMOTE_LENGTH;
        }
        if entry.status != status::OK {
            counters.add(Counter::errors, 1);
        }
        (!verdict.lose).then_some((entry, due))
    }

    /// The application has read this completion: what it took is free. Its id.
    pub fn finish(&self, entry: &Cdesc) -> u64 {
        if !entry.is_receive() {
            self.give_room(1);
            return entry.send_id();
        }
        if entry.is_unsolicited() {
            return 0;
        }
        let mut recv = self.recv.lock();
        recv.free.push(entry.req_id);
        recv.ids[usize::from(entry.req_id)]
    }
}

fn rules_op(op: u8) -> Op {
    match op {
        wire::READ => Op::Read,
        wire::WRITE => Op::Write,
        _ => Op::Send,
    }
}

/// Between this process's memory at `local` and `remote` in process `pid`, or here.
fn copy(pid: Option<i32>, local: u64, remote: u64, length: usize, read: bool) -> Result<(), c_int> {
    let Some(pid) = pid else {
        let (from, to) = if read { (remote, local) } else { (local, remote) };
        // SAFETY: registered memory of this process; regions may overlap.
        unsafe { ptr::copy(from as *const u8, to as *mut u8, length) };
        return Ok(());
    };
    let mut done = 0;
    while done < length {
        let here = libc::iovec {
            iov_base: (local as usize + done) as *mut c_void,
            iov_len: length - done,
        };
        let there = libc::iovec {
            iov_base: (remote as usize + done) as *mut c_void,
            iov_len: length - done,
        };
        // SAFETY: the kernel checks both ranges.
        let n = unsafe {
            if read {
                libc::process_vm_readv(pid, &here, 1, &there, 1, 0)
            } else {
                libc::process_vm_writev(pid, &here, 1, &there, 1, 0)
            }
        };
        if n <= 0 {
            // SAFETY: errno is this thread's.
            return Err(if n < 0 { unsafe { *libc::__errno_location() } } else { libc::EFAULT });
        }
        done += n as usize;
    }
    Ok(())
}
