//! Peers' segments, as the engine needs them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::health::{Health, Use};
use super::peers::{PeerIndex, Released};
use super::region::{RangeMap, RemoteRegion};
use crate::error::{Error, Result};
use crate::fault::{Class, Faults};

/// A peer's segment. The number is opaque, and its engine's own; 0 is never one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TargetId(pub u64);

/// One NIC of a peer.
#[derive(Clone, Debug, Default)]
pub struct RemoteNic {
    /// Its name there.
    pub name: String,
    /// Its endpoint's address; `None` until a handshake brings it.
    pub address: Option<Box<[u8]>>,
}

/// One registered range of a peer.
#[derive(Clone, Debug)]
pub struct RemoteBuffer {
    /// First byte, in the peer's address space.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Key by NIC of the peer; 0 where it is not registered.
    pub keys: Vec<u64>,
    /// The peer's NICs nearest to it; empty if unknown.
    pub preferred: Vec<u16>,
}

/// What a descriptor says of a peer.
#[derive(Clone, Debug, Default)]
pub struct RemoteSegment {
    /// The segment's name.
    pub name: String,
    /// The server that answers its handshakes; mostly the same.
    pub server: String,
    /// Its NICs.
    pub nics: Vec<RemoteNic>,
    /// Its registered memory.
    pub buffers: Vec<RemoteBuffer>,
}

/// A [`RemoteSegment`], ready for use.
pub(super) struct Target {
    pub name: Arc<str>,
    pub server: String,
    pub nics: Box<[Nic]>,
    pub regions: RangeMap<RemoteRegion>,
    /// Another one for a peer that was restarted: what went to one life's memory in part must not go to the next
    /// one's for the rest.
    pub life: u32,
    rails: usize,
    /// What each rail knows the peer's NICs as: `rail * nics + nic`.
    peers: Box<[AtomicU32]>,
    released: Arc<Released>,
    /// It said that something is not as its descriptor has it.
    stale: AtomicBool,
    /// That may be so: something failed for good.
    doubtful: AtomicBool,
    pub faults: Arc<PeerFaults>,
}

pub(super) struct Nic {
    pub name: Arc<str>,
    pub health: Arc<Health>,
    /// From the descriptor, or by a handshake.
    pub address: ArcSwapOption<Box<[u8]>>,
    /// The descriptor did not give it.
    by_handshake: bool,
}

/// How often the descriptor of a peer that does not answer is asked for, nanoseconds.
const ASK_EVERY: u64 = 1_000_000_000;
/// How long the descriptor of a peer is not asked for after that was in vain for the first time, nanoseconds; each time
/// after that twice as long, [`ASK_EVERY`] at most.
const IN_VAIN: u64 = 1_000_000;

const UNKNOWN: PeerIndex = PeerIndex::MAX;

/// What failed with a peer, as long as its segment is open.
#[derive(Debug, Default)]
pub(super) struct PeerFaults {
    faults: [AtomicU64; Class::ALL.len()],
    pub retried: AtomicU64,
    /// The cause of the last failure that was its own.
    pub last: Mutex<String>,
    /// When its descriptor may be asked for again because it does not answer.
    ask_from: AtomicU64,
    /// Its descriptor was asked for because it lacked a range. Held while it is asked for.
    pub asked: Mutex<Asked>,
}

/// When a descriptor was asked for last, and how soon it may be again; nanoseconds.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// When that began; `None`: never.
    last: Option<u64>,
    /// How long not to ask after that: 0 where it brought something new.
    pause: u64,
}

impl Asked {
    /// Somebody asked after this time, so that there is nothing newer than what we have.
    pub fn is_newer(&self, since: u64) -> bool {
        self.last.is_some_and(|last| last >= since)
    }

    /// Whether to ask now.
    pub fn may_ask(&self, now: u64) -> bool {
        self.last.is_none_or(|last| now >= last.saturating_add(self.pause))
    }

    /// It was asked for at this time, and did or did not bring something `new`.
    pub fn ask(&mut self, now: u64, new: bool) {
        let rested = self.last.is_none_or(|last| now >= last.saturating_add(2 * ASK_EVERY));
        self.pause = match (new, rested) {
            (true, _) => 0,
            (false, true) => IN_VAIN,
            (false, false) => (2 * self.pause).clamp(IN_VAIN, ASK_EVERY),
        };
        self.last = Some(now);
    }
}

impl PeerFaults {
    pub fn add(&self, class: Class) {
        self.faults[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the peer's descriptor may be asked for again; it counts as asked for then.
    pub fn may_ask(&self, now: u64) -> bool {
        let may = now >= self.ask_from.load(Ordering::Relaxed);
        if may {
            self.ask_from.store(now.saturating_add(ASK_EVERY), Ordering::Relaxed);
        }
        may
    }

    pub fn get(&self) -> Faults {
        self.faults.each_ref().map(|count| count.load(Ordering::Relaxed)).into()
    }
}

impl Target {
    pub fn new(segment: RemoteSegment, life: u32, rails: usize, released: Arc<Released>) -> Self {
        let RemoteSegment { name, server, nics, buffers } = segment;
        let regions = buffers.into_iter().filter_map(|buffer| {
            let key = |nic: u16| {
                buffer.keys.get(usize::from(nic)).filter(|&&key| key != 0).map(|&key| (nic, key))
            };
            let mut keys: Vec<_> = buffer.preferred.iter().copied().filter_map(key).collect();
            if keys.is_empty() {
                keys = (0..nics.len() as u16).filter_map(key).collect();
            }
            let end = buffer.address.checked_add(buffer.length)?;
            (!keys.is_empty() && buffer.length > 0).then(|| RemoteRegion {
                start: buffer.address,
                end,
                keys: keys.into(),
            })
        });
        let regions = RangeMap::new(regions.collect());
        let nics: Box<[Nic]> = nics
            .into_iter()
            .map(|nic| Nic {
                name: nic.name.into(),
                health: Arc::default(),
                by_handshake: nic.address.is_none(),
                address: ArcSwapOption::new(nic.address.map(Arc::new)),
            })
            .collect();
        let peers = (0..rails * nics.len()).map(|_| AtomicU32::new(UNKNOWN)).collect();
        Self {
            name: name.into(),
            server,
            nics,
            regions,
            life,
            rails,
            peers,
            released,
            stale: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
            faults: Arc::default(),
        }
    }

    pub fn nic(&self, nic: u16) -> Result<&Nic> {
        self.nics
            .get(usize::from(nic))
            .ok_or_else(|| Error::invalid(format!("{} has no NIC number {nic}", self.name)))
    }

    /// The peer's NIC `nic` as rail `rail` knows it, if it has been connected.
    pub fn peer(&self, rail: usize, nic: u16) -> Option<PeerIndex> {
        Some(self.slot(rail, nic).load(Ordering::Acquire)).filter(|&peer| peer != UNKNOWN)
    }

    /// Keeps a peer that was connected for this target, and gives it back when the target is dropped. The
    /// one to use: somebody else may have been first.
    pub fn set_peer(&self, rail: usize, nic: u16, peer: PeerIndex) -> PeerIndex {
        let slot = self.slot(rail, nic);
        match slot.compare_exchange(UNKNOWN, peer, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => peer,
            Err(first) => {
                self.released.add(rail, peer);
                first
            }
        }
    }

    /// The NIC that `rail` knows as `peer`.
    pub fn nic_of(&self, rail: usize, peer: PeerIndex) -> Option<u16> {
        (0..self.nics.len() as u16).find(|&nic| self.peer(rail, nic) == Some(peer))
    }

    /// The same target, with its peers to be connected anew. Who uses the old one may go on; when nobody does,
    /// it gives its peers back.
    pub fn anew(&self) -> Self {
        let nic = |nic: &Nic| Nic {
            name: nic.name.clone(),
            health: nic.health.clone(),
            address: ArcSwapOption::new(nic.address.load_full()),
            by_handshake: nic.by_handshake,
        };
        Self {
            name: self.name.clone(),
            server: self.server.clone(),
            nics: self.nics.iter().map(nic).collect(),
            regions: self.regions.clone(),
            life: self.life,
            rails: self.rails,
            peers: self.peers.iter().map(|_| AtomicU32::new(UNKNOWN)).collect(),
            released: self.released.clone(),
            stale: AtomicBool::new(self.stale.load(Ordering::Relaxed)),
            doubtful: AtomicBool::new(self.doubtful.load(Ordering::Relaxed)),
            faults: self.faults.clone(),
        }
    }

    /// Forgets the address of NIC `nic`, if a handshake told it: the peer may have been restarted and have
    /// another one now, so that the next submission should ask again. True if it did.
    pub fn forget(&self, nic: u16) -> bool {
        let own = &self.nics[usize::from(nic)];
        own.by_handshake && own.address.swap(None).is_some()
    }

    /// As [`RemoteRegion::key`], of the NICs that are not paused if there are any.
    pub fn healthy_key(&self, region: &RemoteRegion, rail: usize, now: u64) -> (u16, u64) {
        let usable = |&(nic, _): &(u16, u64)| {
            self.nics.get(usize::from(nic)).is_none_or(|nic| nic.health.ask(now) == Use::Yes)
        };
        region.keys_from(rail).find(usable).unwrap_or_else(|| region.key(rail))
    }

    /// An operation of `rail` to `peer` succeeded, while others fail.
    pub fn well(&self, rail: usize, peer: PeerIndex) {
        let nic = self.nic_of(rail, peer).map(|nic| &self.nics[usize::from(nic)]);
        if let Some(nic) = nic.filter(|nic| nic.health.succeed()) {
            log::info!("{} of {} works again", nic.name, self.name);
        }
    }

    /// A request to the peer failed for good; `sure`: because the peer does not have what its descriptor says.
    pub fn set_stale(&self, sure: bool) {
        (if sure { &self.stale } else { &self.doubtful }).store(true, Ordering::Relaxed);
    }

    /// Whether the peer should be asked for a newer descriptor, for one caller. On a mere doubt it is not asked
    /// more often than [`PeerFaults::may_ask`] says: to ask one who is dead takes seconds.
    pub fn take_stale(&self, now: u64) -> bool {
        let take =
            |flag: &AtomicBool| flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::Relaxed);
        take(&self.stale)
            || self.doubtful.load(Ordering::Relaxed)
                && self.faults.may_ask(now)
                && take(&self.doubtful)
    }

    /// Takes over the handshakes done for an older descriptor of the same peer, where this one still
    /// names the same NIC without an address. Not if no region is as it was: then the peer was most
    /// likely restarted, and its endpoints are others. Where it was and a region is by chance the same,
    /// the first failure sets it right: [`Self::forget`].
    ///
    /// And what is known of the health of NICs that have the addresses that they had. If that is all of them, it is
    /// the same life.
    pub fn inherit(mut self, older: &Self) -> Self {
        self.faults = older.faults.clone();
        if !self.regions.iter().eq(older.regions.iter()) {
            // It was worth asking.
            self.faults.ask_from.store(0, Ordering::Relaxed);
        }
        self.inherit_nics(older);
        self
    }

    fn inherit_nics(&mut self, older: &Self) {
        let same = |old: &RemoteRegion| self.regions.find(old.start, &mut 0) == Some(old);
        if older.regions.iter().next().is_some() && !older.regions.iter().any(same) {
            return;
        }
        let mut same_life = true;
        for nic in &mut self.nics {
            let Some(old) = older.nics.iter().find(|old| old.name == nic.name) else { continue };
            if nic.by_handshake {
                nic.address.store(old.address.load_full());
            }
            if *nic.address.load() == *old.address.load() {
                nic.health = old.health.clone();
            } else {
                same_life = false;
            }
        }
        if same_life {
            self.life = older.life;
        }
    }

    fn slot(&self, rail: usize, nic: u16) -> &AtomicU32 {
        debug_assert!(rail < self.rails);
        &self.peers[rail * self.nics.len() + usize::from(nic)]
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        for rail in 0..self.rails {
            for nic in 0..self.nics.len() as u16 {
                if let Some(peer) = self.peer(rail, nic) {
                    self.released.add(rail, peer);
                }
            }
        }
    }
}
