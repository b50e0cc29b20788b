//! Who owns which slot of a queue pair's receive ring: many senders in many processes, one receiver.
//!
//! Only positions are kept here; the packets themselves lie beside, in an array of the same length,
//! and may be touched by whoever was told a position and not yet gave it back. Any process may be
//! killed between any two instructions: a slot claimed by one that died is taken back by the receiver,
//! and nobody ever waits for somebody who is gone.
//!
//! Position `p` stands for the receive request number `p`: senders get a position only below
//! `limit`, which the receiver raises by one for each receive that it posts. Taking a slot and
//! taking a receive request are one step therefore, and a dead sender cannot take one of them alone.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Identifies a process of the cluster; never 0. See `Cluster::join`.
pub type Owner = u32;

// A slot's state: position (30 bits) | owner (32 bits) | tag (2 bits).
const FREE: u64 = 0;
const CLAIMED: u64 = 1;
const FULL: u64 = 2;
const POSITIONS: u64 = (1 << 30) - 1;

fn state(position: u64, owner: Owner, tag: u64) -> u64 {
    (position & POSITIONS) << 34 | u64::from(owner) << 2 | tag
}

fn position_is(state: u64, position: u64) -> bool {
    state >> 34 == position & POSITIONS
}

/// What came of asking for a slot.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Claim {
    /// The caller fills the slot of this position and calls [`Ring::publish`].
    Slot(u64),
    /// The receiver has posted no receive request (RNR).
    NotReady,
    /// Every slot holds a packet that was not yet received.
    Full,
}

/// What is at the receiving end.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Front {
    /// Nothing was sent.
    Empty,
    /// The packet of this position; call [`Ring::release`] after it was read.
    Packet(u64),
    /// A sender is at it. If that process is dead, [`Ring::abandon`] frees the slot.
    Unfinished(u64, Owner),
}

/// The words of a ring, wherever they lie. `N` slots, a power of two.
pub struct Ring<'a, const N: usize> {
    head: &'a AtomicU64,
    tail: &'a AtomicU64,
    limit: &'a AtomicU64,
    states: &'a [AtomicU64; N],
}

impl<'a, const N: usize> Ring<'a, N> {
    /// `head`, `tail`, `limit` and `states` of one ring.
    pub fn new(
        head: &'a AtomicU64,
        tail: &'a AtomicU64,
        limit: &'a AtomicU64,
        states: &'a [AtomicU64; N],
    ) -> Self {
        const { assert!(N.is_power_of_two()) };
        Ring { head, tail, limit, states }
    }

    /// Makes it empty. Nobody else may use it meanwhile.
    pub fn reset(&self) {
        self.limit.store(0, Ordering::Relaxed);
        self.head.store(0, Ordering::Relaxed);
        self.tail.store(0, Ordering::Relaxed);
        for (position, slot) in self.states.iter().enumerate() {
            slot.store(state(position as u64, 0, FREE), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    fn slot(&self, position: u64) -> &AtomicU64 {
        &self.states[position as usize & (N - 1)]
    }

    /// A sender asks for a slot. `unsolicited`: the packet needs no receive request.
    pub fn claim(&self, me: Owner, unsolicited: bool) -> Claim {
        loop {
            let tail = self.tail.load(Ordering::Acquire);
            let slot = self.slot(tail);
            let seen = slot.load(Ordering::Acquire);
            if position_is(seen, tail) {
                if seen & 3 == FREE {
                    // The limit only grows, so that what holds now holds at the exchange too.
                    if !unsolicited && tail >= self.limit.load(Ordering::Acquire) {
                        if self.tail.load(Ordering::Acquire) != tail {
                            continue;
                        }
                        return Claim::NotReady;
                    }
                    if slot
                        .compare_exchange(
                            seen,
                            state(tail, me, CLAIMED),
                            Ordering::AcqRel,
                            Ordering::Relaxed,
                        )
                        .is_err()
                    {
                        continue;
                    }
                    self.advance(tail);
                    return Claim::Slot(tail);
                }
                // Its claimer has not moved the tail yet, and may never.
                self.advance(tail);
            } else if position_is(seen, tail.wrapping_sub(N as u64))
                && self.tail.load(Ordering::Acquire) == tail
            {
                return Claim::Full;
            }
        }
    }

    fn advance(&self, tail: u64) {
        let _ = self.tail.compare_exchange(tail, tail + 1, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// The sender has filled the slot. Sequentially consistent: a look at the receiver's flag
    /// afterwards cannot come before it.
    pub fn publish(&self, position: u64) {
        self.slot(position).store(state(position, 0, FULL), Ordering::SeqCst);
    }

    /// What the receiver finds next.
    pub fn front(&self) -> Front {
        let head = self.head.load(Ordering::Relaxed);
        let seen = self.slot(head).load(Ordering::Acquire);
        match seen & 3 {
            FULL if position_is(seen, head) => Front::Packet(head),
            CLAIMED if position_is(seen, head) => Front::Unfinished(head, (seen >> 2) as Owner),
            _ => Front::Empty,
        }
    }

    /// The receiver has read the packet at the front.
    pub fn release(&self, position: u64) {
        self.slot(position).store(state(position + N as u64, 0, FREE), Ordering::Release);
        self.head.store(position + 1, Ordering::Release);
    }

    /// The process that claimed the front slot is dead: frees the slot, and gives back its receive request.
    pub fn abandon(&self, position: u64) {
        // It may have died before it moved the tail.
        self.advance(position);
        self.release(position);
        self.post(1);
    }

    /// The receiver has posted `n` receive requests more, or met `n` packets that used none.
    pub fn post(&self, n: u64) {
        self.limit.fetch_add(n, Ordering::Release);
    }

    /// Receive requests that no sender has taken. For a person to look at.
    pub fn ready(&self) -> u64 {
        self.limit.load(Ordering::Relaxed).saturating_sub(self.tail.load(Ordering::Relaxed))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Words<const N: usize> {
        head: AtomicU64,
        tail: AtomicU64,
        limit: AtomicU64,
        states: [AtomicU64; N],
    }

    impl<const N: usize> Words<N> {
        fn new() -> Self {
            let words = Words {
                head: AtomicU64::new(7),
                tail: AtomicU64::new(9),
                limit: AtomicU64::new(3),
                states: std::array::from_fn(|_| AtomicU64::new(0)),
            };
            words.ring().reset();
            words
        }
        fn ring(&self) -> Ring<'_, N> {
            Ring::new(&self.head, &self.tail, &self.limit, &self.states)
        }
    }

    #[test]
    fn a_packet_takes_a_receive_request_and_a_slot() {
        let words = Words::<2>::new();
        let ring = words.ring();
        assert_eq!(ring.claim(1, false), Claim::NotReady);
        assert_eq!(ring.front(), Front::Empty);
        ring.post(3);
        assert_eq!(ring.claim(1, false), Claim::Slot(0));
        assert_eq!(ring.claim(2, false), Claim::Slot(1));
        assert_eq!(ring.claim(1, false), Claim::Full);
        assert_eq!(ring.front(), Front::Unfinished(0, 1));
        ring.publish(1);
        assert_eq!(ring.front(), Front::Unfinished(0, 1));
        ring.publish(0);
        assert_eq!(ring.front(), Front::Packet(0));
        ring.release(0);
        assert_eq!(ring.claim(1, false), Claim::Slot(2));
        ring.publish(2);
        ring.release(1);
        assert_eq!(ring.claim(1, false), Claim::NotReady);
        assert_eq!(ring.front(), Front::Packet(2));
        ring.release(2);
        assert_eq!(ring.front(), Front::Empty);
    }

    #[test]
    fn an_unsolicited_packet_needs_no_receive_request() {
        let words = Words::<2>::new();
        let ring = words.ring();
        assert_eq!(ring.claim(1, true), Claim::Slot(0));
        ring.publish(0);
        ring.release(0);
        ring.post(1); // what the receiver does then
        assert_eq!(ring.claim(1, false), Claim::NotReady);
        ring.post(1);
        assert_eq!(ring.claim(1, false), Claim::Slot(1));
    }

    #[test]
    fn the_dead_leave_neither_a_slot_nor_a_receive_request_taken() {
        let words = Words::<2>::new();
        let ring = words.ring();
        ring.post(1);
        assert_eq!(ring.claim(9, false), Claim::Slot(0));
        ring.abandon(0);
        assert_eq!(ring.claim(1, false), Claim::Slot(1));
        // Killed between its claim and its step of the tail.
        ring.post(2);
        words.states[0].store(state(2, 9, CLAIMED), Ordering::Relaxed);
        ring.publish(1);
        ring.release(1);
        assert_eq!(ring.front(), Front::Unfinished(2, 9));
        ring.abandon(2);
        assert_eq!(ring.claim(1, false), Claim::Slot(3));
    }

    #[test]
    fn positions_wrap() {
        let words = Words::<4>::new();
        let ring = words.ring();
        for start in [POSITIONS - 5, (1 << 34) - 3] {
            words.head.store(start, Ordering::Relaxed);
            words.tail.store(start, Ordering::Relaxed);
            words.limit.store(start, Ordering::Relaxed);
            for p in start..start + 4 {
                words.states[p as usize & 3].store(state(p, 0, FREE), Ordering::Relaxed);
            }
            for p in start..start + 12 {
                ring.post(1);
                assert_eq!(ring.claim(1, false), Claim::Slot(p));
                ring.publish(p);
                assert_eq!(ring.front(), Front::Packet(p));
                ring.release(p);
            }
        }
    }

    #[test]
    fn many_senders_lose_and_double_nothing() {
        const EACH: u64 = 20_000;
        let words = Words::<8>::new();
        let data: [AtomicU64; 8] = std::array::from_fn(|_| AtomicU64::new(0));
        std::thread::scope(|scope| {
            for me in 1..=3u64 {
                let (words, data) = (&words, &data);
                scope.spawn(move || {
                    let ring = words.ring();
                    for k in 0..EACH {
                        let at = loop {
                            match ring.claim(me as Owner, false) {
                                Claim::Slot(at) => break at,
                                _ => std::thread::yield_now(),
                            }
                        };
                        data[at as usize & 7].store(me << 32 | k, Ordering::Relaxed);
                        ring.publish(at);
                    }
                });
            }
            let ring = words.ring();
            let mut next = [0u64; 4];
            ring.post(5);
            for _ in 0..3 * EACH {
                let at = loop {
                    match ring.front() {
                        Front::Packet(at) => break at,
                        _ => std::thread::yield_now(),
                    }
                };
                let got = data[at as usize & 7].load(Ordering::Relaxed);
                let me = (got >> 32) as usize;
                assert_eq!(got & 0xffff_ffff, next[me], "packets of one sender stay in order");
                next[me] += 1;
                ring.release(at);
                ring.post(1);
            }
            assert_eq!(next[1..], [EACH; 3]);
        });
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Shared {
        head: AtomicU64,
        tail: AtomicU64,
        limit: AtomicU64,
        states: [AtomicU64; 2],
        data: [UnsafeCell<u64>; 2],
    }

    impl Shared {
        fn new() -> Arc<Self> {
            let shared = Arc::new(Shared {
                head: AtomicU64::new(0),
                tail: AtomicU64::new(0),
                limit: AtomicU64::new(0),
                states: std::array::from_fn(|_| AtomicU64::new(0)),
                data: std::array::from_fn(|_| UnsafeCell::new(0)),
            });
            shared.ring().reset();
            shared
        }
        fn ring(&self) -> Ring<'_, 2> {
            Ring::new(&self.head, &self.tail, &self.limit, &self.states)
        }
        fn send(&self, me: Owner) -> bool {
            let Claim::Slot(at) = self.ring().claim(me, false) else { return false };
            self.data[at as usize & 1].with_mut(|p| {
                // SAFETY: the claim gave this slot to us; loom checks that.
                unsafe { *p = u64::from(me) }
            });
            self.ring().publish(at);
            true
        }
        fn receive(&self) -> Option<u64> {
            let Front::Packet(at) = self.ring().front() else { return None };
            // SAFETY: a published slot belongs to the receiver; loom checks that.
            let got = self.data[at as usize & 1].with(|p| unsafe { *p });
            self.ring().release(at);
            Some(got)
        }
    }

    /// Two senders, fewer receives than packets: what was taken arrives once, whole.
    #[test]
    fn two_senders_one_receiver() {
        loom::model(|| {
            let shared = Shared::new();
            shared.ring().post(2);
            let senders: Vec<_> = (1..=2)
                .map(|me| {
                    let shared = shared.clone();
                    thread::spawn(move || shared.send(me))
                })
                .collect();
            let mut sum = shared.receive().unwrap_or(0);
            for sender in senders {
                assert!(sender.join().unwrap(), "there were receives for both");
            }
            while let Some(got) = shared.receive() {
                sum += got;
            }
            assert_eq!(sum, 3);
        });
    }

    /// One claims and is gone; the other's packet gets through all the same.
    #[test]
    fn a_dead_claim_is_passed() {
        loom::model(|| {
            let shared = Shared::new();
            shared.ring().post(2);
            let dead = {
                let shared = shared.clone();
                thread::spawn(move || matches!(shared.ring().claim(9, false), Claim::Slot(_)))
            };
            let alive = {
                let shared = shared.clone();
                thread::spawn(move || shared.send(1))
            };
            assert!(dead.join().unwrap() && alive.join().unwrap());
            let mut got = None;
            for _ in 0..2 {
                match shared.ring().front() {
                    Front::Unfinished(at, 9) => shared.ring().abandon(at),
                    Front::Packet(_) => got = shared.receive(),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(got, Some(1));
            assert!(shared.send(2), "the dead one's receive request is there again");
        });
    }
}
