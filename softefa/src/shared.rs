//! The state of one emulated NIC, in a file that every process of the cluster maps.
//!
//! Only atomics: a process may be killed at any instruction, and what it leaves must be readable.
//! What belongs to a process carries its [`Owner`], so that others can tell what the dead left.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::ring::Ring;
pub use crate::ring::{Claim, Front, Owner};

/// Queue pairs of a NIC; a power of two, because libfabric masks queue pair numbers.
pub const QPS: usize = 256;
/// Memory regions of a NIC: the index is 16 of a key's 24 bits, the generation the other 8.
pub const MRS: usize = 1 << 16;
/// Address handles of all processes on a NIC.
pub const AHS: usize = 4096;
/// Packets that a queue pair's ring holds.
pub const SLOTS: usize = 128;
/// Bytes of a packet (`max_msg_sz` of p4d and later).
pub const MTU: usize = 8928;
/// Changes whenever a layout below does.
pub const VERSION: u64 = 0x5efa_0000_0000_0001;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What is counted, for a queue pair and, summed up, for a NIC.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[allow(non_camel_case_types)]
        pub enum Counter { $($(#[$doc])* $name),* }
        /// All of them, in the order of a [`Counters`] array.
        pub const COUNTERS: &[Counter] = &[$(Counter::$name),*];
        impl Counter {
            /// Its name in `softefa stat`.
            pub fn name(self) -> &'static str {
                match self { $(Counter::$name => stringify!($name)),* }
            }
        }
    };
}

counters! {
    /// Sends posted.
    sends,
    /// RDMA reads posted.
    reads,
    /// RDMA writes posted.
    writes,
    /// Receives posted.
    receives,
    /// Bytes sent, by all three operations, successful or not.
    sent_bytes,
    /// Bytes read.
    read_bytes,
    /// Bytes written.
    written_bytes,
    /// Packets received.
    packets,
    /// Bytes of these.
    received_bytes,
    /// Completions with a status other than 0.
    errors,
    /// Work requests that met a receiver without a posted receive, once each.
    rnr,
    /// Posts refused because the queue was full.
    refused,
    /// Work requests that had to wait: for the receiver, for a link, for somebody silent.
    deferred,
    /// Faults injected.
    faults,
    /// Completions that found the completion queue full, and are lost.
    overruns,
}

/// One number a [`Counter`]. Each is added to by one process only.
#[repr(C)]
pub struct Counters([AtomicU64; COUNTERS.len()]);

impl Counters {
    /// Adds to one of them. Not for two threads at once: an addition might be lost, never more.
    pub fn add(&self, counter: Counter, n: u64) {
        let cell = &self.0[counter as usize];
        cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }
    /// The present value.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].load(Ordering::Relaxed)
    }
    /// All to 0.
    pub fn reset(&self) {
        self.0.iter().for_each(|cell| cell.store(0, Ordering::Relaxed));
    }
    /// Adds another's numbers to these, by several processes at once if need be.
    pub fn merge(&self, other: &Counters) {
        for (to, from) in self.0.iter().zip(&other.0) {
            to.fetch_add(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

/// What a queue pair is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum QpState {
    /// Nobody's.
    Free = 0,
    /// Created, and not or no longer ready to receive.
    Reset = 1,
    /// Receives.
    Ready = 2,
}

/// An unreliable datagram queue pair.
pub const QP_UD: u32 = 1;
/// Writes with immediate data use no receive request.
pub const QP_UNSOLICITED: u32 = 2;

/// A queue pair, as its peers see it.
#[repr(C, align(64))]
pub struct QpShared {
    /// Whose; 0 is nobody's.
    pub owner: AtomicU32,
    /// [`QpState`].
    pub state: AtomicU32,
    /// What a sender has to know.
    pub qkey: AtomicU32,
    /// QP_UD, QP_UNSOLICITED.
    pub flags: AtomicU32,
    /// The receiver sleeps: wake it after a packet.
    pub armed: AtomicU32,
    _pad: AtomicU32,
    /// The owner's, and the owner's only.
    pub counters: Counters,
    head: Line<AtomicU64>,
    tail: Line<AtomicU64>,
    limit: Line<AtomicU64>,
    states: [AtomicU64; SLOTS],
}

#[repr(C, align(64))]
struct Line<T>(T);

impl QpShared {
    /// Its receive ring.
    pub fn ring(&self) -> Ring<'_, SLOTS> {
        Ring::new(&self.head.0, &self.tail.0, &self.limit.0, &self.states)
    }
    /// Ready to receive.
    pub fn is_ready(&self) -> bool {
        self.state.load(Ordering::Acquire) == QpState::Ready as u32
    }
}

/// A registered memory region. `key` is the last to be set and the first to be cleared.
#[repr(C)]
pub struct MrShared {
    /// Whose; 0 is nobody's.
    pub owner: AtomicU32,
    /// Remote and local key, index << 8 | generation; 0 while not valid.
    pub key: AtomicU32,
    /// IBV_ACCESS_*.
    pub access: AtomicU32,
    /// Of the key, 8 bits.
    pub generation: AtomicU32,
    /// Address in the owner's memory.
    pub address: AtomicU64,
    /// Bytes.
    pub length: AtomicU64,
    /// What remote sides call the first byte.
    pub iova: AtomicU64,
    /// Page table entries that it takes.
    pub pages: AtomicU64,
}

/// What one byte range of a region is, as a peer finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The process whose memory it is.
    pub owner: Owner,
    /// The address there.
    pub address: u64,
}

/// One packet of a ring.
#[repr(C, align(64))]
pub struct Packet {
    /// Bytes of payload; of an RDMA write with immediate data the bytes written.
    pub length: AtomicU32,
    /// As the sender gave it.
    pub imm: AtomicU32,
    /// Sender's queue pair.
    pub source_qp: AtomicU16,
    /// Sender's host and NIC.
    pub source_host: AtomicU16,
    /// See `source_host`.
    pub source_nic: AtomicU16,
    /// The operation, as in descriptors: 0 send, 2 write.
    pub op: AtomicU8,
    /// Whether `imm` is meant.
    pub has_imm: AtomicU8,
    /// When it arrives, CLOCK_MONOTONIC ns; 0 at once.
    pub due: AtomicU64,
    /// Payload of a send. Whoever has the slot of the ring may touch it.
    pub data: UnsafeCell<[u8; MTU]>,
}

/// Serialises one direction of a link: when the wire is free again.
#[repr(C, align(64))]
pub struct Wire(AtomicI64);

impl Wire {
    /// Takes the wire for `ns` nanoseconds, not before `from`; both and the result, the end, in
    /// CLOCK_MONOTONIC ns.
    pub fn reserve(&self, from: i64, ns: i64) -> i64 {
        let mut free = self.0.load(Ordering::Relaxed);
        loop {
            let end = free.max(from) + ns;
            match self.0.compare_exchange_weak(free, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return end,
                Err(now) => free = now,
            }
        }
    }
}

/// An emulated NIC. Zeroes are its initial state.
#[repr(C, align(4096))]
pub struct NicShared {
    next_qp: AtomicU32,
    next_mr: AtomicU32,
    /// Page table entries in use.
    pub pages: AtomicU64,
    /// What leaves.
    pub outgoing: Wire,
    /// What arrives.
    pub incoming: Wire,
    /// Sums of the queue pairs that are gone.
    pub retired: Counters,
    /// Queue pairs by number. Number 0 is not used.
    pub qps: [QpShared; QPS],
    /// Regions by key >> 8. Index 0 is not used.
    pub mrs: [MrShared; MRS],
    /// Which process has an address handle of which NIC: owner << 32 | host << 16 | nic + 1.
    pub ahs: [AtomicU64; AHS],
    /// The packets, by queue pair.
    pub packets: [[Packet; SLOTS]; QPS],
}

// SAFETY: all but the packets' payload is atomic, and of the payload only the holder of a slot,
// which the ring gives to one at a time, makes use.
unsafe impl Sync for NicShared {}

impl NicShared {
    /// Takes a free queue pair number for `owner`, round robin, so that numbers come back late.
    pub fn take_qp(&self, owner: Owner) -> Option<u16> {
        for _ in 0..QPS {
            let number = self.next_qp.fetch_add(1, Ordering::Relaxed) as usize % (QPS - 1) + 1;
            let qp = &self.qps[number];
            if qp.owner.compare_exchange(0, owner, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                qp.armed.store(0, Ordering::Relaxed);
                qp.counters.reset();
                qp.ring().reset();
                qp.state.store(QpState::Reset as u32, Ordering::Release);
                return Some(number as u16);
            }
        }
        None
    }

    /// Gives one back. No packet gets in from now on.
    pub fn free_qp(&self, number: u16) {
        let qp = &self.qps[usize::from(number)];
        qp.state.store(QpState::Free as u32, Ordering::Release);
        self.retired.merge(&qp.counters);
        qp.owner.store(0, Ordering::Release);
    }

    /// Registers memory. None: no entry is left, or not so many pages (`most` in all).
    #[allow(clippy::too_many_arguments)]
    pub fn take_mr(
        &self,
        owner: Owner,
        address: u64,
        length: u64,
        iova: u64,
        access: u32,
        pages: u64,
        most: u64,
    ) -> Option<u32> {
        if self.pages.fetch_add(pages, Ordering::AcqRel) + pages > most {
            self.pages.fetch_sub(pages, Ordering::AcqRel);
            return None;
        }
        for _ in 0..MRS {
            let index = self.next_mr.fetch_add(1, Ordering::Relaxed) as usize % (MRS - 1) + 1;
            let mr = &self.mrs[index];
            if mr.owner.load(Ordering::Relaxed) != 0
                || mr.owner.compare_exchange(0, owner, Ordering::AcqRel, Ordering::Relaxed).is_err()
            {
                continue;
            }
            let generation = (mr.generation.load(Ordering::Relaxed) + 1) & 0xff;
            mr.generation.store(generation, Ordering::Relaxed);
            mr.pages.store(pages, Ordering::Relaxed);
            mr.access.store(access, Ordering::Relaxed);
            mr.address.store(address, Ordering::Relaxed);
            mr.length.store(length, Ordering::Relaxed);
            mr.iova.store(iova, Ordering::Relaxed);
            let key = (index as u32) << 8 | generation;
            mr.key.store(key, Ordering::Release);
            return Some(key);
        }
        self.pages.fetch_sub(pages, Ordering::AcqRel);
        None
    }

    /// Gives one back.
    pub fn free_mr(&self, key: u32) {
        let mr = &self.mrs[(key >> 8) as usize & (MRS - 1)];
        mr.key.store(0, Ordering::Release);
        self.pages.fetch_sub(mr.pages.swap(0, Ordering::AcqRel), Ordering::AcqRel);
        mr.owner.store(0, Ordering::Release);
    }

    /// Where `length` bytes at `address` of the region `key` are, if all of them are in it and
    /// it allows `access`.
    pub fn find(&self, key: u32, address: u64, length: u64, access: u32) -> Option<Found> {
        let index = (key >> 8) as usize;
        if index == 0 || index >= MRS {
            return None;
        }
        let mr = &self.mrs[index];
        if mr.key.load(Ordering::Acquire) != key
            || mr.access.load(Ordering::Relaxed) & access != access
        {
            return None;
        }
        let offset = address.checked_sub(mr.iova.load(Ordering::Relaxed))?;
        let size = mr.length.load(Ordering::Relaxed);
        if length > size || offset > size - length {
            return None;
        }
        let found = Found {
            owner: mr.owner.load(Ordering::Relaxed),
            address: mr.address.load(Ordering::Relaxed) + offset,
        };
        // Registered anew meanwhile: the numbers may be a mixture.
        std::sync::atomic::fence(Ordering::Acquire);
        (mr.key.load(Ordering::Relaxed) == key).then_some(found)
    }

    /// Notes that `owner` has an address handle of that NIC. None: the table is full.
    pub fn add_ah(&self, owner: Owner, host: u16, nic: u16) -> Option<usize> {
        let word = ah_word(owner, host, nic);
        self.ahs.iter().position(|ah| {
            ah.load(Ordering::Relaxed) == 0
                && ah.compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    /// The handle of this index is gone.
    pub fn remove_ah(&self, index: usize) {
        self.ahs[index].store(0, Ordering::Release);
    }

    /// Has `owner` a handle of that NIC? `hint` remembers where it was.
    pub fn knows(&self, owner: Owner, host: u16, nic: u16, hint: &AtomicU32) -> bool {
        let word = ah_word(owner, host, nic);
        let at = hint.load(Ordering::Relaxed) as usize;
        if self.ahs[at % AHS].load(Ordering::Acquire) == word {
            return true;
        }
        let found = self.ahs.iter().position(|ah| ah.load(Ordering::Acquire) == word);
        if let Some(at) = found {
            hint.store(at as u32, Ordering::Relaxed);
        }
        found.is_some()
    }

    /// Frees what processes left that are not `alive` any more.
    pub fn reap(&self, alive: impl Fn(Owner) -> bool) {
        let is_dead = |owner| owner != 0 && !alive(owner);
        for (number, qp) in self.qps.iter().enumerate() {
            if is_dead(qp.owner.load(Ordering::Acquire)) {
                self.free_qp(number as u16);
            }
        }
        let used = (self.next_mr.load(Ordering::Relaxed) as usize + 2).min(MRS);
        for (index, mr) in self.mrs[..used].iter().enumerate() {
            if is_dead(mr.owner.load(Ordering::Acquire)) {
                self.free_mr((index as u32) << 8);
            }
        }
        for ah in &self.ahs {
            let word = ah.load(Ordering::Acquire);
            if is_dead((word >> 32) as Owner) {
                let _ = ah.compare_exchange(word, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

fn ah_word(owner: Owner, host: u16, nic: u16) -> u64 {
    u64::from(owner) << 32 | u64::from(host) << 16 | u64::from(nic + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic() -> Box<NicShared> {
        // SAFETY: zeroes are a NIC's initial state. Never on the stack: it is 300 MB of address space.
        unsafe { Box::new_zeroed().assume_init() }
    }

    #[test]
    fn a_key_opens_its_region_and_nothing_beside_it() {
        let nic = nic();
        let key = nic.take_mr(5, 0x1000, 0x100, 0x8000, 3, 1, 100).unwrap();
        let find = |address, length, access| nic.find(key, address, length, access);
        assert_eq!(find(0x8000, 0x100, 3), Some(Found { owner: 5, address: 0x1000 }));
        assert_eq!(find(0x80ff, 1, 1), Some(Found { owner: 5, address: 0x10ff }));
        assert_eq!(find(0x8100, 0, 1).map(|f| f.address), Some(0x1100));
        for (address, length, access) in [
            (0x7fff, 1, 1),
            (0x80ff, 2, 1),
            (0x8000, 0x101, 1),
            (0x8100, 1, 1),
            (u64::MAX, 2, 1),
            (0x8000, 1, 4),
        ] {
            assert_eq!(find(address, length, access), None, "{address:x} {length:x} {access}");
        }
        nic.free_mr(key);
        assert_eq!(find(0x8000, 1, 1), None);
        for wrong in [0, 0xff, 0xff_ffff, u32::MAX] {
            assert_eq!(nic.find(wrong, 0x8000, 1, 1), None);
        }
    }

    #[test]
    fn the_page_table_has_an_end() {
        let nic = nic();
        let first = nic.take_mr(1, 0, 1, 0, 0, 60, 100).unwrap();
        assert_eq!(nic.take_mr(1, 0, 1, 0, 0, 41, 100), None);
        assert!(nic.take_mr(1, 0, 1, 0, 0, 40, 100).is_some());
        nic.free_mr(first);
        assert!(nic.take_mr(1, 0, 1, 0, 0, 60, 100).is_some());
        assert_eq!(nic.pages.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn what_the_dead_left_is_freed_and_what_the_living_have_is_not() {
        let nic = nic();
        let (dead, living) = (7, 8);
        let qps = [nic.take_qp(dead).unwrap(), nic.take_qp(living).unwrap()];
        let mrs = [dead, living].map(|o| nic.take_mr(o, 0, 10, 0, 0, 2, 100).unwrap());
        nic.add_ah(dead, 1, 2).unwrap();
        nic.add_ah(living, 1, 2).unwrap();
        nic.qps[usize::from(qps[0])].counters.add(Counter::sends, 3);
        nic.reap(|owner| owner == living);
        let hint = AtomicU32::new(0);
        assert!(nic.knows(living, 1, 2, &hint) && !nic.knows(dead, 1, 2, &hint));
        assert_eq!(nic.find(mrs[0], 0, 1, 0), None);
        assert!(nic.find(mrs[1], 0, 1, 0).is_some());
        assert_eq!(nic.qps[usize::from(qps[0])].owner.load(Ordering::Relaxed), 0);
        assert_eq!(nic.qps[usize::from(qps[1])].owner.load(Ordering::Relaxed), living);
        assert_eq!(nic.pages.load(Ordering::Relaxed), 2);
        assert_eq!(nic.retired.get(Counter::sends), 3);
    }

    #[test]
    fn a_wire_carries_one_thing_at_a_time() {
        let wire = Wire(AtomicI64::new(0));
        assert_eq!(wire.reserve(100, 10), 110);
        assert_eq!(wire.reserve(100, 10), 120);
        assert_eq!(wire.reserve(500, 10), 510);
    }
}
