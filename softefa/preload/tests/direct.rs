//! The direct data path: the provider fills the device's queues itself, and rings doorbells.
//!
//! Descriptors are put together by hand here, from rdma-core's efa_io_defs.h, so that what the library's
//! own wire.rs says is not taken for granted.

mod harness;

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use harness::verbs::*;
use harness::*;

const SETTINGS: &[(&str, &str)] = &[("SOFTEFA_DATA_PATH", "direct")];
const SEND: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;

fn doorbell(at: *mut u32) -> &'static AtomicU32 {
    // SAFETY: the device's, aligned, for longer than these tests use it.
    unsafe { AtomicU32::from_ptr(at) }
}

/// A queue that descriptors of `N` bytes are written to.
struct Queue<const N: usize> {
    attr: WqAttr,
    written: u16,
}

impl<const N: usize> Queue<N> {
    fn write(&mut self, descriptor: [u8; N]) {
        assert_eq!(self.attr.entry_size as usize, N);
        let slot = u32::from(self.written) % self.attr.num_entries;
        // SAFETY: within the queue, and free as its completion has been seen.
        unsafe { self.attr.buffer.cast::<[u8; N]>().add(slot as usize).write_volatile(descriptor) };
        self.written = self.written.wrapping_add(1);
    }
    fn ring(&self) {
        doorbell(self.attr.doorbell).store(self.written.into(), Ordering::Release);
    }
}

/// A completion queue that is read by its phase bits.
struct Reader {
    attr: CqAttr,
    read: u32,
    asked: u32,
}

impl Reader {
    fn poll(&mut self) -> Option<[u8; 32]> {
        let at = (self.read % self.attr.num_entries) as usize * 32;
        let phase = u8::from(self.read / self.attr.num_entries % 2 == 0);
        // SAFETY: within the queue; the flags are written last.
        unsafe {
            let flags = std::sync::atomic::AtomicU8::from_ptr(self.attr.buffer.add(at + 3));
            if flags.load(Ordering::Acquire) & 1 != phase {
                return None;
            }
            self.read += 1;
            Some(self.attr.buffer.add(at).cast::<[u8; 32]>().read_volatile())
        }
    }
    fn wait(&mut self) -> [u8; 32] {
        let begun = Instant::now();
        loop {
            if let Some(entry) = self.poll() {
                // So far we have read.
                doorbell(self.attr.doorbell).store(self.read & 0xffff, Ordering::Release);
                return entry;
            }
            assert!(begun.elapsed() < PATIENCE, "no completion came");
            std::thread::yield_now();
        }
    }
    /// Asks for an event: bit 31, and a number of two bits that differs from question to question.
    fn arm(&mut self) {
        self.asked += 1;
        let word = 1 << 31 | (self.asked & 3) << 29 | self.read & 0xffff;
        doorbell(self.attr.doorbell).store(word, Ordering::Release);
    }
}

/// The mapped queues of a side.
struct Mapped {
    sq: Queue<64>,
    rq: Queue<16>,
    cq: Reader,
}

fn map(qp: &QueuePair, cq: &Cq) -> Mapped {
    // SAFETY: zeroes are values of these structs; an opened device's queues.
    unsafe {
        let (mut sq, mut rq): (WqAttr, WqAttr) = (std::mem::zeroed(), std::mem::zeroed());
        let size = size_of::<WqAttr>() as u32;
        assert_eq!((api().efadv_query_qp_wqs)(qp.qp.cast(), &mut sq, &mut rq, size), 0);
        let mut attr: CqAttr = std::mem::zeroed();
        let size = size_of::<CqAttr>() as u32;
        assert_eq!((api().efadv_query_cq)(cq.cq.cast(), &mut attr, size), 0);
        assert_eq!(attr.entry_size, 32);
        Mapped {
            sq: Queue { attr: sq, written: 0 },
            rq: Queue { attr: rq, written: 0 },
            cq: Reader { attr, read: 0, asked: 0 },
        }
    }
}

/// The 32 bytes that all send descriptors begin with; `length`: buffers, or bytes if inline.
fn wqe(op: u8, id: u16, to: &Side, from: &Side, length: u16) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[0..2].copy_from_slice(&id.to_le_bytes());
    bytes[2] = op | 1 << 7; // a meta descriptor
    bytes[3] = 1 << 2 | 1 << 3 | 1 << 4; // first, last, completion wanted
    bytes[4..6].copy_from_slice(&(to.qp.number() as u16).to_le_bytes());
    bytes[6..8].copy_from_slice(&length.to_le_bytes());
    let ah = from.ah.as_ref().unwrap().number() as u16;
    bytes[12..14].copy_from_slice(&ah.to_le_bytes());
    bytes[16..20].copy_from_slice(&QKEY.to_le_bytes());
    bytes
}

/// `efa_io_tx_buf_desc`.
fn buffer(sge: ibv_sge) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..4].copy_from_slice(&sge.length.to_le_bytes());
    bytes[4..8].copy_from_slice(&sge.lkey.to_le_bytes());
    bytes[8..16].copy_from_slice(&sge.addr.to_le_bytes());
    bytes
}

/// A read or write: `efa_io_rdma_req` has the remote side first.
fn rdma(op: u8, id: u16, to: &Side, from: &Side, near: ibv_sge, far: ibv_sge) -> [u8; 64] {
    let mut bytes = wqe(op, id, to, from, 1);
    bytes[32..48].copy_from_slice(&buffer(far));
    bytes[48..64].copy_from_slice(&buffer(near));
    bytes
}

/// `efa_io_rx_desc`.
fn rx(id: u16, sge: ibv_sge, first: bool, last: bool) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&sge.addr.to_le_bytes());
    bytes[8..10].copy_from_slice(&id.to_le_bytes());
    bytes[10..12].copy_from_slice(&(sge.length as u16).to_le_bytes());
    let control = sge.lkey | u32::from(first) << 30 | u32::from(last) << 31;
    bytes[12..16].copy_from_slice(&control.to_le_bytes());
    bytes
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Request id, status, and operation of a send completion of `side`.
fn sent(side: &Side, entry: [u8; 32]) -> (u16, u8, u8) {
    assert_eq!(entry[3] >> 1 & 3, 1, "of a send queue");
    assert_eq!(u32::from(word(&entry, 4)), side.qp.number());
    (word(&entry, 0), entry[2], entry[3] >> 4 & 7)
}

#[test]
fn descriptors_and_doorbells_move_data() {
    if !alone("descriptors_and_doorbells_move_data", SETTINGS) {
        return;
    }
    let (_turn, a, b) = pair();
    let (mut near, mut far) = (map(&a.qp, &a.cq), map(&b.qp, &b.cq));

    // A receive in two pieces, a send in two pieces with immediate data.
    far.rq.write(rx(7, b.region.sge(0, 10), true, false));
    far.rq.write(rx(7, b.region.sge(50, 100), false, true));
    far.rq.ring();
    let mut send = wqe(SEND, 0x1234, &b, &a, 2);
    send[2] |= 1 << 4; // immediate data
    send[8..12].copy_from_slice(&0x0102_0304_u32.to_le_bytes());
    send[32..48].copy_from_slice(&buffer(a.region.sge(100, 33)));
    send[48..64].copy_from_slice(&buffer(a.region.sge(5000, 20)));
    near.sq.write(send);
    near.sq.ring();
    assert_eq!(sent(&a, near.cq.wait()), (0x1234, 0, SEND));
    let entry = far.cq.wait();
    assert_eq!((word(&entry, 0), entry[2], entry[3] & !1), (7, 0, 2 << 1 | 1 << 3));
    assert_eq!((u32::from(word(&entry, 4)), word(&entry, 6)), (b.qp.number(), 53));
    assert_eq!(u32::from(word(&entry, 8)), b.ah.as_ref().unwrap().number());
    assert_eq!(u32::from(word(&entry, 10)), a.qp.number());
    assert_eq!(entry[12..16], 0x0102_0304_u32.to_le_bytes());
    let expected = [a.region.read(100, 33), a.region.read(5000, 20)].concat();
    assert_eq!([b.region.read(0, 10), b.region.read(50, 43)].concat(), expected);

    // Inline.
    far.rq.write(rx(8, b.region.sge(200, 100), true, true));
    far.rq.ring();
    let mut inline = wqe(SEND, 2, &b, &a, 5);
    inline[2] |= 1 << 5;
    inline[32..37].copy_from_slice(b"hello");
    near.sq.write(inline);
    near.sq.ring();
    assert_eq!(sent(&a, near.cq.wait()), (2, 0, SEND));
    assert_eq!((word(&far.cq.wait(), 6), b.region.read(200, 5)), (5, b"hello".to_vec()));

    // Write and read in one ring of the doorbell, then a write beyond the region's end.
    let size = b.region.bytes.len();
    near.sq.write(rdma(WRITE, 3, &b, &a, a.region.sge(1000, 6000), b.region.sge(2000, 6000)));
    near.sq.write(rdma(READ, 4, &b, &a, a.region.sge(20_000, 70), b.region.sge(40_000, 70)));
    near.sq.ring();
    assert_eq!(sent(&a, near.cq.wait()), (3, 0, WRITE));
    assert_eq!(sent(&a, near.cq.wait()), (4, 0, READ));
    assert_eq!(b.region.read(2000, 6000), a.region.read(1000, 6000));
    assert_eq!(a.region.read(20_000, 70), b.region.read(40_000, 70));
    near.sq.write(rdma(WRITE, 5, &b, &a, a.region.sge(0, 8), b.region.sge(size - 7, 8)));
    near.sq.ring();
    assert_eq!(sent(&a, near.cq.wait()), (5, 7, WRITE));
    assert_eq!((near.cq.poll(), far.cq.poll()), (None, None));
}

#[test]
fn queues_go_round_many_times() {
    if !alone("queues_go_round_many_times", SETTINGS) {
        return;
    }
    let (_turn, a, b) = pair();
    let (mut near, mut far) = (map(&a.qp, &a.cq), map(&b.qp, &b.cq));
    // More than 2^16 descriptors, so that doorbells and counts wrap too.
    let rounds = (1 << 16) / DEPTH + 100;
    for round in 0..rounds {
        for k in 0..DEPTH as u16 {
            far.rq.write(rx(k, b.region.sge(usize::from(k) * 8, 8), true, true));
        }
        far.rq.ring();
        for k in 0..DEPTH as u16 {
            let mut send = wqe(SEND, k, &b, &a, 8);
            send[2] |= 1 << 5;
            send[32..36].copy_from_slice(&round.to_le_bytes());
            send[36..38].copy_from_slice(&k.to_le_bytes());
            near.sq.write(send);
            // One doorbell for some, and for each of the others.
            if k >= DEPTH as u16 / 2 {
                near.sq.ring();
            }
        }
        // A send that came before its receive was seen lets others pass.
        let mut done: Vec<_> = (0..DEPTH).map(|_| sent(&a, near.cq.wait())).collect();
        done.sort_unstable();
        assert!(done.into_iter().eq((0..DEPTH as u16).map(|k| (k, 0, SEND))), "round {round}");
        let mut payloads = Vec::new();
        for k in 0..DEPTH as u16 {
            let entry = far.cq.wait();
            assert_eq!((word(&entry, 0), entry[2], word(&entry, 6)), (k, 0, 8), "round {round}");
            let bytes = b.region.read(usize::from(k) * 8, 6);
            assert_eq!(bytes[..4], round.to_le_bytes());
            payloads.push(word(&bytes, 4));
        }
        payloads.sort_unstable();
        assert!(payloads.into_iter().eq(0..DEPTH as u16), "round {round}");
    }
}

#[test]
fn the_doorbell_asks_for_events() {
    if !alone("the_doorbell_asks_for_events", SETTINGS) {
        return;
    }
    let (_turn, a, b) = pair();
    let mut near = map(&a.qp, &a.cq);
    // SAFETY: an opened device; the channel lives as long as the process.
    let channel = unsafe { (api().ibv_create_comp_channel)(b.device.context) };
    // SAFETY: a channel.
    let fd = unsafe { (*channel).fd };
    let cq = Cq::with_channel(&b.device, 64, channel, ptr::null_mut());
    let b = Side { qp: QueuePair::ready(&cq, Kind::default()), cq: cq.clone(), ..b };
    let mut far = map(&b.qp, &b.cq);
    let one_event = || {
        assert!(readable(fd, PATIENCE), "no event");
        let mut handle = 0u64;
        // SAFETY: eight bytes of ours.
        assert_eq!(unsafe { libc::read(fd, (&raw mut handle).cast(), 8) }, 8);
        assert_eq!(handle, cq.cq as u64);
        assert!(!readable(fd, Duration::from_millis(20)), "a second event");
    };
    let mut send = |far: &mut Mapped| {
        far.rq.write(rx(1, b.region.sge(0, 8), true, true));
        far.rq.ring();
        let mut send = wqe(SEND, 2, &b, &a, 3);
        send[2] |= 1 << 5;
        near.sq.write(send);
        near.sq.ring();
        assert_eq!(sent(&a, near.cq.wait()), (2, 0, SEND));
    };
    // More often than the question's number goes round.
    for _ in 0..6 {
        far.cq.arm();
        assert!(!readable(fd, Duration::from_millis(5)), "an event too early");
        send(&mut far);
        one_event();
        assert_eq!(word(&far.cq.wait(), 0), 1);
        // Unasked.
        send(&mut far);
        assert_eq!(word(&far.cq.wait(), 0), 1);
        assert!(!readable(fd, Duration::from_millis(5)), "an event unasked");
        // What is there already and was not read.
        send(&mut far);
        let begun = Instant::now();
        while far.cq.poll().is_none() {
            assert!(begun.elapsed() < PATIENCE);
        }
        far.cq.read -= 1;
        far.cq.arm();
        one_event();
        assert_eq!(word(&far.cq.wait(), 0), 1);
    }
}

#[test]
fn an_unread_queue_overruns() {
    let name = "an_unread_queue_overruns";
    if !is_child(name) {
        let (output, _dir) = run_alone(name, SETTINGS, "");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{told}");
        assert_eq!(told.matches("COMPLETION QUEUE OVERRUN").count(), 1, "{told}");
        return;
    }
    let (_turn, a, b) = pair();
    let cq = Cq::new(&a.device, 4);
    let near_side = Side { qp: QueuePair::ready(&cq, Kind::default()), cq: cq.clone(), ..a };
    let mut near = map(&near_side.qp, &cq);
    for id in 0..6 {
        let (from, to) = (near_side.region.sge(0, 8), b.region.sge(0, 8));
        near.sq.write(rdma(WRITE, id, &b, &near_side, from, to));
    }
    near.sq.ring();
    let begun = Instant::now();
    while nic_stat(0, 0).counters["overruns"] < 2 {
        assert!(begun.elapsed() < PATIENCE, "no overrun was counted");
    }
    (0..4).for_each(|id| assert_eq!(sent(&near_side, near.cq.wait()).0, id));
    assert_eq!(near.cq.poll(), None);
}

/// libfabric and rdma-core ring the completion queue's doorbell only when they leave something unread or
/// ask for an event: a queue that is always read to its end is never rung, and does not overrun.
#[test]
fn a_queue_that_is_always_read_to_its_end_does_not_overrun() {
    if !alone("a_queue_that_is_always_read_to_its_end_does_not_overrun", SETTINGS) {
        return;
    }
    let (_turn, a, b) = pair();
    let cq = Cq::new(&a.device, 256);
    let near_side = Side { qp: QueuePair::ready(&cq, Kind::default()), cq: cq.clone(), ..a };
    let mut near = map(&near_side.qp, &cq);
    let room = near.cq.attr.num_entries;
    assert!(near.sq.attr.num_entries <= room, "a queue pair that can overrun the queue");
    for id in 0..3 * room {
        let (from, to) = (near_side.region.sge(0, 8), b.region.sge(0, 8));
        near.sq.write(rdma(WRITE, id as u16, &b, &near_side, from, to));
        near.sq.ring();
        let begun = Instant::now();
        let entry = loop {
            if let Some(entry) = near.cq.poll() {
                break entry;
            }
            assert!(begun.elapsed() < PATIENCE, "completion {id} did not come");
            std::thread::yield_now();
        };
        assert_eq!(sent(&near_side, entry).0, id as u16);
    }
    assert_eq!(nic_stat(0, 0).counters["overruns"], 0);
}
