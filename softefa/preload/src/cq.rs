//! Completion queues: a ring of entries as the device writes them, read here or, on the direct data path,
//! by the provider.

use std::cell::UnsafeCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};

use parking_lot::lock_api::RawMutex as _;
use parking_lot::{Mutex, RawMutex};
use softefa_core::cluster::now;
use softefa_core::shared::{Counter, Front};

use crate::device::Context;
use crate::qp::Qp;
use crate::verbs::*;
use crate::wire::{self, Cdesc, status};

/// `efadv_cq` as libefa has it since 2022; older headers know its beginning.
#[repr(C)]
pub struct DvCq {
    pub comp_mask: u64,
    pub wc_read_sgid: Option<unsafe extern "C" fn(*mut DvCq, *mut ibv_gid) -> c_int>,
    pub wc_is_unsolicited: Option<unsafe extern "C" fn(*mut DvCq) -> bool>,
}

struct Late {
    due: u64,
    /// Keeps those due at the same time in order.
    number: u64,
    entry: Cdesc,
}

impl PartialEq for Late {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Late {}
impl PartialOrd for Late {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Late {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

#[derive(Default)]
struct Writer {
    late: BinaryHeap<Reverse<Late>>,
    numbers: u64,
    overran: bool,
}

/// A completion queue. The first field is what applications hold.
#[repr(C)]
pub struct Cq {
    pub ex: ibv_cq_ex,
    pub dv: DvCq,
    context: *const Context,
    entries: Box<[UnsafeCell<Cdesc>]>,
    writer: Mutex<Writer>,
    produced: AtomicU32,
    consumed: AtomicU32,
    late: AtomicUsize,
    /// Held from a start_poll that found something to end_poll.
    reader: RawMutex,
    current: UnsafeCell<Cdesc>,
    idle: AtomicU32,
    /// An event is wanted.
    pub armed: AtomicBool,
    /// Also held by whoever does the device's work for these queue pairs.
    pub qps: Mutex<Vec<*const Qp>>,
    /// On the direct data path: what the provider rings, and what was last seen there.
    pub doorbell: AtomicU32,
    rung: AtomicU32,
    /// On the direct data path: so many completions at least have been read, or the provider could not
    /// have posted what it has.
    made_room: AtomicU32,
    direct: AtomicBool,
    /// Whether overruns can be told: on the direct path not any more once a queue pair is gone.
    countable: AtomicBool,
}

// SAFETY: the pointers are to objects that outlive the queue, and the cells are guarded: entries by
// `writer` and by their phase bit, `current` by `reader`.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    /// # Safety
    /// `cq` is one that [`crate::abi`] gave out, and it is not destroyed.
    pub unsafe fn of<'a>(cq: *mut ibv_cq_ex) -> &'a Cq {
        // SAFETY: `ex` is the first field.
        unsafe { &*cq.cast::<Cq>() }
    }

    /// `wanted` entries, rounded up to a power of two.
    pub fn new(context: &Context, ex: ibv_cq_ex, dv: DvCq, wanted: u32) -> Box<Cq> {
        let size = wanted.max(2).next_power_of_two() as usize;
        Box::new(Cq {
            ex,
            dv,
            context: ptr::from_ref(context),
            entries: (0..size).map(|_| UnsafeCell::default()).collect(),
            writer: Mutex::default(),
            produced: AtomicU32::new(0),
            consumed: AtomicU32::new(0),
            late: AtomicUsize::new(0),
            reader: RawMutex::INIT,
            current: UnsafeCell::default(),
            idle: AtomicU32::new(0),
            armed: AtomicBool::new(false),
            qps: Mutex::default(),
            doorbell: AtomicU32::new(0),
            rung: AtomicU32::new(0),
            made_room: AtomicU32::new(0),
            direct: AtomicBool::new(false),
            countable: AtomicBool::new(true),
        })
    }

    pub fn context(&self) -> &Context {
        // SAFETY: a device is closed after its queues are destroyed.
        unsafe { &*self.context }
    }

    /// The ring, for the provider to read; its doorbell is then what says how far it read.
    pub fn expose(&self) -> (*mut u8, u32) {
        self.direct.store(true, Ordering::Release);
        (self.entries.as_ptr() as *mut u8, self.entries.len() as u32)
    }

    fn phase(&self, count: u32) -> u8 {
        u8::from(count / self.entries.len() as u32 % 2 == 0)
    }

    /// Writes a completion, at once or when it is due (CLOCK_MONOTONIC ns, 0: at once).
    pub fn push(&self, qp: &Qp, entry: Cdesc, due: u64) {
        let mut writer = self.writer.lock();
        if due != 0 && due > now() {
            writer.numbers += 1;
            let number = writer.numbers;
            writer.late.push(Reverse(Late { due, number, entry }));
            self.late.store(writer.late.len(), Ordering::Release);
            drop(writer);
            crate::agent::call(self.context().world);
            return;
        }
        self.write(&mut writer, Some(qp), entry);
        drop(writer);
        self.fire();
    }

    /// So many work requests were posted for which only completions that were read can have made room.
    pub fn made_room(&self, n: u32) {
        self.made_room.fetch_add(n, Ordering::Release);
    }

    /// Completions that nobody has read. On the direct data path: at most so many, for the provider says
    /// how far it is only when it asks for an event or leaves something unread.
    fn outstanding(&self) -> u32 {
        let produced = self.produced.load(Ordering::Relaxed);
        if self.direct.load(Ordering::Relaxed) {
            // The doorbell has 16 bits of the reader's count.
            let read = self.doorbell.load(Ordering::Acquire) & 0xffff;
            let by_doorbell = (produced & 0xffff).wrapping_sub(read) & 0xffff;
            return by_doorbell.min(produced.wrapping_sub(self.made_room.load(Ordering::Acquire)));
        }
        produced.wrapping_sub(self.consumed.load(Ordering::Acquire))
    }

    fn write(&self, writer: &mut Writer, qp: Option<&Qp>, entry: Cdesc) {
        let size = self.entries.len() as u32;
        if self.outstanding() >= size && self.countable.load(Ordering::Relaxed) {
            if let Some(qp) = qp {
                qp.shared.counters.add(Counter::overruns, 1);
            }
            if !writer.overran {
                writer.overran = true;
                eprintln!(
                    "softefa[{}]: {}: COMPLETION QUEUE OVERRUN: a completion of queue pair {} found all {size} entries \
                     unread and is lost; the real device overwrites entries then. Post less than the queue holds, or make it larger",
                    std::process::id(),
                    self.context().name(),
                    entry.qp,
                );
                if self.context().world.config.abort_on_overrun {
                    std::process::abort();
                }
            }
            return;
        }
        let count = self.produced.load(Ordering::Relaxed);
        let phase = self.phase(count);
        let slot = self.entries[(count & (size - 1)) as usize].get();
        // SAFETY: under the writer's lock, and the reader looks at nothing but the flags until these
        // have the new phase; they are written last.
        unsafe {
            let flags = &*slot.cast::<u8>().add(Cdesc::FLAGS_OFFSET).cast::<AtomicU8>();
            let entry = entry.with_phase(phase);
            let bytes = ptr::from_ref(&entry).cast::<u8>();
            let at = slot.cast::<u8>();
            ptr::copy_nonoverlapping(bytes, at, Cdesc::FLAGS_OFFSET);
            let after = Cdesc::FLAGS_OFFSET + 1;
            ptr::copy_nonoverlapping(bytes.add(after), at.add(after), size_of::<Cdesc>() - after);
            flags.store(*bytes.add(Cdesc::FLAGS_OFFSET), Ordering::Release);
        }
        self.produced.store(count.wrapping_add(1), Ordering::Release);
    }

    /// Writes what is due by now. The next that is not, in CLOCK_MONOTONIC ns.
    pub fn write_due(&self) -> Option<u64> {
        if self.late.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut writer = self.writer.lock();
        let time = now();
        let mut wrote = false;
        let next = loop {
            match writer.late.peek() {
                None => break None,
                Some(Reverse(late)) if late.due > time => break Some(late.due),
                Some(_) => {}
            }
            let Some(Reverse(late)) = writer.late.pop() else { break None };
            self.write(&mut writer, None, late.entry);
            wrote = true;
        };
        self.late.store(writer.late.len(), Ordering::Release);
        drop(writer);
        if wrote {
            self.fire();
        }
        next
    }

    /// The queue pair is gone, and so are its completions: those not yet read name nobody's.
    pub fn forget(&self, number: u16) {
        let mut writer = self.writer.lock();
        let (size, produced) = (self.entries.len() as u32, self.produced.load(Ordering::Relaxed));
        let unread = if self.direct.load(Ordering::Relaxed) {
            // Its reader drops some without counting them.
            self.countable.store(false, Ordering::Relaxed);
            size.min(produced)
        } else {
            produced.wrapping_sub(self.consumed.load(Ordering::Acquire))
        };
        for count in (1..=unread).map(|back| produced.wrapping_sub(back)) {
            // SAFETY: under the writer's lock; a reader that is at this entry now reads one of two numbers.
            unsafe {
                let qp = &raw mut (*self.entries[(count & (size - 1)) as usize].get()).qp;
                if qp.read_volatile() == number {
                    qp.write_volatile(0);
                }
            }
        }
        writer.late.retain(|Reverse(late)| late.entry.qp != number);
        self.late.store(writer.late.len(), Ordering::Release);
    }

    /// Something to poll, now?
    pub fn is_ready(&self) -> bool {
        if self.produced.load(Ordering::Acquire) != self.consumed.load(Ordering::Acquire)
            && !self.direct.load(Ordering::Relaxed)
        {
            return true;
        }
        let qps = self.qps.lock();
        qps.iter().any(|&qp| {
            // SAFETY: a queue pair leaves this list before it is freed.
            let qp = unsafe { &*qp };
            ptr::eq(qp.recv_cq(), self) && qp.shared.ring().front() != Front::Empty
        })
    }

    /// Delivers one event if one was asked for.
    pub fn fire(&self) {
        if !self.armed.load(Ordering::Relaxed)
            || self.ex.channel.is_null()
            || !self.armed.swap(false, Ordering::AcqRel)
        {
            return;
        }
        // What ib_uverbs_comp_event_desc is: the queue's handle, eight bytes.
        let handle = ptr::from_ref(self) as u64;
        // SAFETY: the channel outlives the queue; the second descriptor is the pipe's other end.
        unsafe {
            let channel = &*self.ex.channel.cast::<Channel>();
            libc::write(channel.other, ptr::from_ref(&handle).cast::<c_void>(), 8);
        }
    }

    /// The provider asked for an event by the doorbell?
    pub fn arm_by_doorbell(&self) {
        let rung = self.doorbell.load(Ordering::Acquire);
        // Bit 31 asks; bits 29 and 30 tell one question from the next.
        if rung >> 31 != 0 && self.rung.swap(rung, Ordering::AcqRel) >> 29 != rung >> 29 {
            self.armed.store(true, Ordering::Release);
            if self.outstanding() > 0 {
                self.fire();
            }
        }
    }

    /// What the device does for these queue pairs, unless somebody is at it.
    pub fn progress(&self) {
        let Some(qps) = self.qps.try_lock() else { return };
        for &qp in qps.iter() {
            // SAFETY: a queue pair leaves this list before it is freed.
            let qp = unsafe { &*qp };
            qp.retry();
            if ptr::eq(qp.recv_cq(), self) {
                qp.receive(64);
            }
        }
        drop(qps);
        self.write_due();
    }

    // The reader's side, under `reader`.

    fn take(&self) -> bool {
        let count = self.consumed.load(Ordering::Relaxed);
        if count == self.produced.load(Ordering::Acquire) {
            return false;
        }
        let slot = self.entries[count as usize & (self.entries.len() - 1)].get();
        // SAFETY: produced, and not to be overwritten before it is counted as consumed.
        unsafe { *self.current.get() = *slot };
        self.consumed.store(count.wrapping_add(1), Ordering::Release);
        true
    }

    /// One completion into `current`. ENOENT: there is none; EINVAL: one of a queue pair that is gone.
    fn next(&self) -> c_int {
        if !self.take() {
            self.progress();
            if !self.take() {
                let every = self.context().world.config.yield_after;
                // Pollers spin: on a crowded machine let those run whom they wait for.
                if every != 0 && self.idle.fetch_add(1, Ordering::Relaxed) % every == every - 1 {
                    std::thread::yield_now();
                }
                return libc::ENOENT;
            }
        }
        let entry = self.current();
        let qp = self.context().qps[usize::from(entry.qp) % self.context().qps.len()]
            .load(Ordering::Acquire);
        // SAFETY: in the table until it is destroyed, which is not done while its queue is polled.
        let Some(qp) = (unsafe { qp.as_ref() }) else { return libc::EINVAL };
        let ex = ptr::from_ref(&self.ex).cast_mut();
        let id = qp.finish(&entry);
        // SAFETY: under the reader's lock; only the reader looks at these.
        unsafe {
            (&raw mut (*ex).wr_id).write(id);
            (&raw mut (*ex).status).write(wc_status(entry.status));
        }
        0
    }

    pub fn start_poll(&self) -> c_int {
        self.reader.lock();
        let result = self.next();
        if result != 0 {
            // SAFETY: locked above.
            unsafe { self.reader.unlock() };
        }
        result
    }

    pub fn next_poll(&self) -> c_int {
        self.next()
    }

    /// # Safety
    /// After a start_poll that returned 0, by the same thread.
    pub unsafe fn end_poll(&self) {
        // SAFETY: the caller holds it.
        unsafe { self.reader.unlock() };
    }

    /// What the read_* functions look at.
    pub fn current(&self) -> Cdesc {
        // SAFETY: the reader's lock is held by whoever polls.
        unsafe { *self.current.get() }
    }
}

/// A completion channel: a pipe. The first field is what applications hold.
#[repr(C)]
pub struct Channel {
    pub channel: ibv_comp_channel,
    pub other: c_int,
}

/// The verbs status of a device status, as rdma-core's efa maps them.
pub fn wc_status(device: u8) -> ibv_wc_status {
    match device {
        status::OK => IBV_WC_SUCCESS,
        1 => IBV_WC_WR_FLUSH_ERR,
        2 | status::UNSUPPORTED | status::BAD_AH => IBV_WC_LOC_QP_OP_ERR,
        status::BAD_LKEY => IBV_WC_LOC_PROT_ERR,
        status::LOCAL_LENGTH => IBV_WC_LOC_LEN_ERR,
        status::REMOTE_ADDRESS => IBV_WC_REM_ACCESS_ERR,
        8 => IBV_WC_REM_ABORT_ERR,
        status::BAD_QPN => IBV_WC_REM_INV_RD_REQ_ERR,
        status::RNR => IBV_WC_RNR_RETRY_EXC_ERR,
        status::REMOTE_LENGTH | 18 => IBV_WC_REM_INV_REQ_ERR,
        12 => IBV_WC_BAD_RESP_ERR,
        status::UNRESPONSIVE | status::UNREACHABLE => IBV_WC_RESP_TIMEOUT_ERR,
        status::UNKNOWN_PEER => IBV_WC_REM_OP_ERR,
        _ => IBV_WC_GENERAL_ERR,
    }
}

/// The verbs opcode of a completion; rdma-core's efa calls a READ a SEND.
pub fn wc_opcode(entry: &Cdesc) -> ibv_wc_opcode {
    match (entry.is_receive(), entry.op()) {
        (false, wire::WRITE) => IBV_WC_RDMA_WRITE,
        (false, _) => IBV_WC_SEND,
        (true, wire::WRITE) => IBV_WC_RECV_RDMA_WITH_IMM,
        (true, _) => IBV_WC_RECV,
    }
}
