//! A simulated NIC: operations stay in flight until the test ends them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Nic, Operation, PeerAddress, Post};
use crate::error::{Code, Error, Result};
use crate::fabric::Memory;
use crate::fault::{Class, Fault};

/// What the test sees and steers. One for all NICs of an engine.
#[derive(Default)]
pub(super) struct World {
    /// The peer's memory, by virtual address from [`REMOTE`] on.
    pub remote: Vec<u8>,
    /// Our memory, by address from [`LOCAL`] on.
    pub local: Vec<u8>,
    /// In flight, by NIC.
    pub flying: BTreeMap<usize, Vec<Operation>>,
    /// Ended by the test, not polled yet: slots and errnos.
    pub ended: BTreeMap<usize, Vec<(u32, i32)>>,
    /// Regions by NIC.
    pub regions: BTreeSet<(usize, u32)>,
    /// Answer posts with "again".
    pub again: bool,
    /// Answer posts with this errno.
    pub refuse: Option<i32>,
    /// Refuse to register on this NIC.
    pub no_memory_on: Option<usize>,
    /// Answer posts to this peer with "again".
    pub again_for: Option<u64>,
    /// Peers that do not answer when they are greeted.
    pub deaf: BTreeSet<u64>,
    /// Lengths posted, in order.
    pub posted: Vec<u64>,
    /// Peers by NIC.
    pub peers: BTreeSet<(usize, u64)>,
    /// Refuse to connect more peers than these on a NIC.
    pub room: Option<usize>,
    /// How often NICs were tended.
    pub tended: u32,
    /// Not an address of a peer.
    pub bad_address: Option<u64>,
}

/// Errnos of the simulated NIC, one for each class.
pub(super) const PERMANENT: i32 = 5;
pub(super) const PEER: i32 = 13;
pub(super) const GONE: i32 = 9;
pub(super) const RAIL: i32 = 2;
pub(super) const PRESSURE: i32 = 10;
pub(super) const OURS: i32 = 22;

pub(super) const LOCAL: u64 = 0x1000_0000;
pub(super) const REMOTE: u64 = 0x7000_0000_0000;

pub(super) struct SimNic {
    pub index: usize,
    pub depth: u32,
    pub world: Arc<Mutex<World>>,
}

impl World {
    /// Ends an operation: moves its bytes if `errno` is 0.
    pub fn end(&mut self, nic: usize, which: usize, errno: i32) {
        let op = self.flying.get_mut(&nic).expect("a NIC").swap_remove(which);
        if errno == 0 {
            let (at, there) = ((op.local - LOCAL) as usize, (op.remote - REMOTE) as usize);
            let length = op.length as usize;
            let (ours, theirs) =
                (&mut self.local[at..at + length], &mut self.remote[there..there + length]);
            if op.write { theirs.copy_from_slice(ours) } else { ours.copy_from_slice(theirs) }
        }
        self.ended.entry(nic).or_default().push((op.slot, errno));
    }

    pub fn end_all(&mut self) {
        let nics: Vec<usize> = self.flying.keys().copied().collect();
        for nic in nics {
            while !self.flying[&nic].is_empty() {
                self.end(nic, 0, 0);
            }
        }
    }

    pub fn in_flight(&self) -> usize {
        self.flying.values().map(Vec::len).sum()
    }
}

impl Nic for SimNic {
    fn depth(&self) -> u32 {
        self.depth
    }

    fn max_length(&self) -> u64 {
        1 << 30
    }

    fn virtual_addresses(&self) -> bool {
        true
    }

    fn register(&mut self, region: u32, _: &Memory) -> Result<u64> {
        let mut world = self.world.lock();
        if world.no_memory_on == Some(self.index) {
            return Err(Error::new(Code::Memory, "no memory on this NIC"));
        }
        assert!(world.regions.insert((self.index, region)), "registered once");
        Ok(u64::from(region) + 1)
    }

    fn unregister(&mut self, region: u32) -> Result<()> {
        let mut world = self.world.lock();
        let used = |op: &Operation| op.region == region;
        assert!(!world.flying.get(&self.index).is_some_and(|ops| ops.iter().any(used)));
        assert!(world.regions.remove(&(self.index, region)), "unregistered once");
        Ok(())
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerAddress> {
        let peer = u64::from(address[0]);
        let mut world = self.world.lock();
        if world.bad_address == Some(peer) {
            return Err(Error::invalid("not an address"));
        }
        let known = world.peers.range((self.index, 0)..=(self.index, u64::MAX)).count();
        if world.room.is_some_and(|room| known >= room)
            && !world.peers.contains(&(self.index, peer))
        {
            return Err(Error::new(Code::Endpoint, "no room for another peer"));
        }
        world.peers.insert((self.index, peer));
        Ok(PeerAddress(peer))
    }

    fn disconnect(&mut self, peer: PeerAddress) -> Result<()> {
        let mut world = self.world.lock();
        let used = |op: &Operation| op.peer == peer;
        assert!(!world.flying.get(&self.index).is_some_and(|ops| ops.iter().any(used)));
        assert!(world.peers.remove(&(self.index, peer.0)), "disconnected once");
        Ok(())
    }

    fn greet(&mut self, peer: PeerAddress, _: u64, _: u64) -> Post {
        if self.world.lock().deaf.contains(&peer.0) { Post::Again } else { Post::Done }
    }

    fn post(&mut self, operation: &Operation) -> Post {
        let mut world = self.world.lock();
        assert!(world.peers.contains(&(self.index, operation.peer.0)), "the peer is connected");
        if world.again || world.again_for == Some(operation.peer.0) {
            return Post::Again;
        }
        if let Some(errno) = world.refuse {
            return Post::Failed(errno);
        }
        assert!(world.regions.contains(&(self.index, operation.region)), "region is open");
        let flying = world.flying.entry(self.index).or_default();
        assert!(flying.len() < self.depth as usize, "credits are kept");
        assert!(flying.iter().all(|other| other.slot != operation.slot), "one slot, one operation");
        flying.push(*operation);
        world.posted.push(operation.length);
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, failed: &mut Vec<(u32, Fault)>) {
        let mut world = self.world.lock();
        for (slot, errno) in world.ended.remove(&self.index).into_iter().flatten() {
            match errno {
                0 => completed.push(slot),
                errno => failed.push((slot, self.explain(errno))),
            }
        }
    }

    fn tend(&mut self) {
        self.world.lock().tended += 1;
    }

    fn explain(&self, errno: i32) -> Fault {
        let class = match errno {
            PERMANENT => Class::Permanent,
            PEER | GONE => Class::Peer,
            RAIL => Class::Rail,
            PRESSURE => Class::Pressure,
            _ => Class::Ours,
        };
        Fault { gone: errno == GONE, ..Fault::of(class, format!("error {errno}")) }
    }
}
