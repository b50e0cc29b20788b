//! The peers of one rail: their places in the provider's address vector, and what each has in flight.

use std::collections::{HashMap, VecDeque};

use super::nic::{Nic, PeerAddress};
use super::rail::Span;
use crate::error::{Code, Result};
use crate::sync::{AtomicBool, Mutex, Ordering};

/// A peer's number on one rail.
pub(super) type PeerIndex = u32;

/// How many times as many operations one peer may have in flight as there are free: the rule of dynamic
/// thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches",
/// 1998). A peer alone may take three quarters of the rail, `n` of them 3/(3n+1) each; some are left always
/// for one that comes new, so that those who do not answer cannot keep others from being served.
const THRESHOLD: usize = 3;

#[derive(Debug)]
pub(super) struct Peer {
    pub address: PeerAddress,
    /// Its endpoint's address.
    endpoint: Box<[u8]>,
    /// Operations in flight.
    pub flying: u32,
    /// Targets that use it.
    users: u32,
    /// It is to be connected anew when nothing is in flight to it, and not [`Self::met`] until then.
    pub broken: bool,
    /// Its endpoint does not exist any more: without users it is of no use.
    gone: bool,
    /// Taken from the rail's queue, and kept until the peer may have more in flight.
    pub waiting: VecDeque<Span>,
    /// Poll up to which the provider is not asked to take more for it.
    pub held_until: u64,
    /// It answered our greeting.
    pub met: bool,
    /// When it was first greeted, nanoseconds; 0: not yet.
    pub greeted: u64,
}

impl Peer {
    /// Whether one more operation may be posted to it, with `free` slots left.
    pub fn may_fly(&self, free: usize) -> bool {
        (self.flying as usize) < THRESHOLD * free
    }

    /// It need not be kept when nobody uses it: it cannot be transferring to us.
    fn is_useless(&self) -> bool {
        self.broken || self.gone
    }

    fn is_quiet(&self) -> bool {
        self.flying == 0 && self.waiting.is_empty()
    }
}

/// The peers of one rail.
#[derive(Debug)]
pub(super) struct Peers {
    entries: Vec<Peer>,
    /// Places of peers that were forgotten.
    free: Vec<PeerIndex>,
    by_address: HashMap<u64, PeerIndex>,
    /// Those without users, the oldest first. They stay in the address vector, since a peer may be
    /// transferring to us, for which its device wants to be in ours.
    unused: VecDeque<PeerIndex>,
    /// How many of them may stay.
    keep: usize,
    /// Some of them may be broken or gone.
    useless: bool,
    /// Those that could not be connected anew.
    lost: Vec<PeerIndex>,
    /// Peers with something waiting, in turn.
    pub blocked: VecDeque<PeerIndex>,
}

impl Peers {
    pub fn new(keep: usize) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            by_address: HashMap::new(),
            unused: VecDeque::new(),
            keep,
            useless: false,
            lost: Vec::new(),
            blocked: VecDeque::new(),
        }
    }

    /// A peer that a span or a flight refers to.
    #[inline]
    pub fn at(&mut self, peer: PeerIndex) -> &mut Peer {
        &mut self.entries[peer as usize]
    }

    /// Puts a span off until its peer may have more.
    pub fn wait(&mut self, span: Span) {
        let peer = self.at(span.peer);
        peer.waiting.push_back(span);
        if peer.waiting.len() == 1 {
            self.blocked.push_back(span.peer);
        }
    }

    /// How many are known.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// The peer with this address of an endpoint, known from now on, with one more user. `queued` as for
    /// [`Self::forget`].
    pub fn connect(
        &mut self,
        nic: &mut impl Nic,
        address: &[u8],
        queued: impl Fn(PeerIndex) -> bool,
    ) -> Result<PeerIndex> {
        // It may be one of them.
        for index in std::mem::take(&mut self.lost) {
            let _ = self.renew(nic, index);
        }
        let found = self.find_room(nic, address, queued)?;
        if let Some(&index) = self.by_address.get(&found.0) {
            let peer = self.at(index);
            peer.users += 1;
            if peer.users == 1 {
                self.unused.retain(|&unused| unused != index);
            }
            return Ok(index);
        }
        let peer = Peer {
            address: found,
            endpoint: address.into(),
            flying: 0,
            users: 1,
            broken: false,
            gone: false,
            waiting: VecDeque::new(),
            held_until: 0,
            met: false,
            greeted: 0,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.entries[index as usize] = peer;
                index
            }
            None => {
                self.entries.push(peer);
                (self.entries.len() - 1) as PeerIndex
            }
        };
        self.by_address.insert(found.0, index);
        Ok(index)
    }

    /// Connects. Where the device refuses an address that can be one, that may be for lack of room, and it has some for peers of one kind only
    /// (`efa` of libfabric 1.17: 128 of our own host), of which we do not know who is one: the older half of the peers
    /// without users is forgotten, and again, until it is taken or there are none. Not one by one: each refusal costs
    /// that provider 130 KiB for ever.
    fn find_room(
        &mut self,
        nic: &mut impl Nic,
        address: &[u8],
        queued: impl Fn(PeerIndex) -> bool,
    ) -> Result<PeerAddress> {
        loop {
            let refused = match nic.connect(address) {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            let half = self.unused.len().div_ceil(2);
            if refused.code != Code::Endpoint || self.forget_some(nic, half, &queued) == 0 {
                return Err(refused);
            }
        }
    }

    /// One user less.
    pub fn release(&mut self, index: PeerIndex) {
        let peer = self.at(index);
        peer.users -= 1;
        if peer.users == 0 {
            self.useless |= peer.is_useless();
            self.unused.push_back(index);
        }
    }

    /// The connection to a peer broke, or it does not answer.
    pub fn set_broken(&mut self, index: PeerIndex) {
        let peer = self.at(index);
        (peer.broken, peer.met) = (true, false);
        self.useless = true;
    }

    /// The peer's endpoint does not exist any more.
    pub fn set_gone(&mut self, index: PeerIndex) {
        self.at(index).gone = true;
        self.useless = true;
    }

    /// Connects a broken peer anew, to which nothing is in flight.
    pub fn renew(&mut self, nic: &mut impl Nic, index: PeerIndex) -> Result<()> {
        self.disconnect(nic, index);
        let peer = &mut self.entries[index as usize];
        match nic.connect(&peer.endpoint) {
            Ok(address) => {
                peer.address = address;
                (peer.broken, peer.greeted, peer.held_until) = (false, 0, 0);
                self.by_address.insert(address.0, index);
                Ok(())
            }
            Err(error) => {
                self.lost.push(index);
                Err(error)
            }
        }
    }

    fn disconnect(&mut self, nic: &mut impl Nic, index: PeerIndex) {
        let address = self.at(index).address;
        self.lost.retain(|&lost| lost != index);
        // Not where that is done, and it was not connected since.
        if self.by_address.remove(&address.0).is_some() {
            if let Err(error) = nic.disconnect(address) {
                log::warn!("forgetting a peer's address: {error}");
            }
        }
    }

    /// Forgets peers without users: those that are broken or gone, and the oldest if there are too many. Only what is
    /// quiet: nothing in flight, waiting, or (`queued`) on its way to be posted.
    pub fn forget(&mut self, nic: &mut impl Nic, queued: impl Fn(PeerIndex) -> bool) {
        let surplus = self.unused.len().saturating_sub(self.keep);
        if surplus > 0 || self.useless {
            self.forget_some(nic, surplus, queued);
        }
    }

    /// As [`Self::forget`], with so many too many. How many were forgotten.
    fn forget_some(
        &mut self,
        nic: &mut impl Nic,
        mut surplus: usize,
        queued: impl Fn(PeerIndex) -> bool,
    ) -> usize {
        let mut forgotten = 0;
        self.useless = false;
        for _ in 0..self.unused.len() {
            let index = self.unused.pop_front().expect("counted");
            let peer = self.at(index);
            let useless = peer.is_useless();
            if !(useless || surplus > 0) || !peer.is_quiet() || queued(index) {
                self.useless |= useless;
                self.unused.push_back(index);
                continue;
            }
            surplus = surplus.saturating_sub(1);
            self.disconnect(nic, index);
            self.free.push(index);
            forgotten += 1;
        }
        forgotten
    }

    /// Takes what waits for peers that nobody has met and no target uses any more: their descriptors were
    /// replaced, and an answer is no more to be expected.
    pub fn take_orphans(&mut self, mut each: impl FnMut(Span)) {
        let Self { entries, blocked, .. } = self;
        blocked.retain(|&index| {
            let peer = &mut entries[index as usize];
            if peer.users > 0 || peer.met {
                return true;
            }
            peer.waiting.drain(..).for_each(&mut each);
            false
        });
    }

    /// All that waits, to keep or to give up.
    pub fn retain_waiting(&mut self, mut keep: impl FnMut(&Span) -> bool) {
        let Self { entries, blocked, .. } = self;
        blocked.retain(|&index| {
            let peer = &mut entries[index as usize];
            peer.waiting.retain(&mut keep);
            !peer.waiting.is_empty()
        });
    }
}

/// Peers that targets have no use for any more, by rail, for their rails to take note of: a target is
/// dropped by whoever used it last, who may not wait for a rail.
pub(super) struct Released(Box<[OfRail]>);

#[derive(Default)]
struct OfRail {
    any: AtomicBool,
    peers: Mutex<Vec<PeerIndex>>,
}

impl Released {
    pub fn new(rails: usize) -> Self {
        Self((0..rails).map(|_| OfRail::default()).collect())
    }

    pub fn add(&self, rail: usize, peer: PeerIndex) {
        let own = &self.0[rail];
        own.peers.lock().push(peer);
        own.any.store(true, Ordering::Release);
    }

    /// Takes what was added for a rail. One load if that is nothing.
    pub fn take(&self, rail: usize, each: impl FnMut(PeerIndex)) {
        let own = &self.0[rail];
        if own.any.load(Ordering::Acquire) {
            let mut peers = own.peers.lock();
            own.any.store(false, Ordering::Relaxed);
            peers.drain(..).for_each(each);
        }
    }
}
