//! Peers' segments, as the engine needs them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use super::nic::PeerAddress;
use super::region::{RangeMap, RemoteRegion};
use crate::error::{Error, Result};

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
    rails: usize,
    /// The peer's address in each rail's address vector: `rail * nics + nic`.
    peers: Box<[AtomicU64]>,
}

pub(super) struct Nic {
    pub name: String,
    /// From the descriptor, or by a handshake.
    pub address: ArcSwapOption<Box<[u8]>>,
    /// The descriptor did not give it.
    by_handshake: bool,
}

const UNKNOWN: u64 = u64::MAX;

impl Target {
    pub fn new(segment: RemoteSegment, rails: usize) -> Self {
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
                name: nic.name,
                by_handshake: nic.address.is_none(),
                address: ArcSwapOption::new(nic.address.map(Arc::new)),
            })
            .collect();
        let peers = (0..rails * nics.len()).map(|_| AtomicU64::new(UNKNOWN)).collect();
        Self { name: name.into(), server, nics, regions, rails, peers }
    }

    pub fn nic(&self, nic: u16) -> Result<&Nic> {
        self.nics
            .get(usize::from(nic))
            .ok_or_else(|| Error::invalid(format!("{} has no NIC number {nic}", self.name)))
    }

    /// The peer's NIC `nic` as rail `rail` knows it, if it has been connected.
    pub fn peer(&self, rail: usize, nic: u16) -> Option<PeerAddress> {
        match self.slot(rail, nic).load(Ordering::Acquire) {
            UNKNOWN => None,
            peer => Some(PeerAddress(peer)),
        }
    }

    pub fn set_peer(&self, rail: usize, nic: u16, peer: PeerAddress) {
        self.slot(rail, nic).store(peer.0, Ordering::Release);
    }

    /// An operation of rail `rail` to `peer` failed. If a handshake told the address, the peer may have been
    /// restarted and have another one now: it is forgotten, so that the next submission asks again.
    pub fn forget(&self, rail: usize, peer: PeerAddress) {
        for nic in 0..self.nics.len() as u16 {
            let own = &self.nics[usize::from(nic)];
            // Not if it was forgotten, and maybe told anew, since the operation was submitted.
            if own.by_handshake && self.peer(rail, nic) == Some(peer) {
                own.address.store(None);
                for rail in 0..self.rails {
                    self.slot(rail, nic).store(UNKNOWN, Ordering::Release);
                }
            }
        }
    }

    /// Takes over the handshakes done for an older descriptor of the same peer, where this one still
    /// names the same NIC without an address. Not if no region is as it was: then the peer was most
    /// likely restarted, and its endpoints are others. Where it was and a region is by chance the same,
    /// the first failure sets it right: [`Self::forget`].
    pub fn inherit(&self, older: &Self) {
        let same = |old: &RemoteRegion| self.regions.find(old.start, &mut 0) == Some(old);
        if older.regions.iter().next().is_some() && !older.regions.iter().any(same) {
            return;
        }
        for nic in &self.nics {
            let same = older.nics.iter().find(|old| old.name == nic.name);
            if let Some(old) = same.filter(|_| nic.by_handshake) {
                nic.address.store(old.address.load_full());
            }
        }
    }

    fn slot(&self, rail: usize, nic: u16) -> &AtomicU64 {
        debug_assert!(rail < self.rails);
        &self.peers[rail * self.nics.len() + usize::from(nic)]
    }
}
