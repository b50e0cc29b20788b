//! The simulated NICs: everything here that implements [`Nic`].

use std::collections::HashMap;
use std::sync::Arc;

use mooncake_efa::Result;
use mooncake_efa::engine::{Nic, Operation, PeerAddress, Post, RemoteNic};
use mooncake_efa::fabric::Memory;
use mooncake_efa::fault::Fault;

use crate::network::Port;
use crate::world::World;

/// Longest operation of either, bytes: as the `efa` provider's.
const LONGEST: u64 = 1 << 30;
/// Completions read at once, as the real NIC does.
const READ_AT_ONCE: usize = 64;

/// What libfabric costs the thread that calls it, nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallCosts {
    pub post: u64,
    pub poll: u64,
    pub completion: u64,
}

/// A simulated NIC: what all have in common, around what tells them apart.
pub(crate) struct SimulatedNic<D> {
    pub depth: u32,
    pub device: D,
}

/// What tells simulated NICs apart.
pub(crate) trait Device: Send {
    fn connect(&mut self, address: &[u8]) -> PeerAddress;

    fn disconnect(&mut self, _: PeerAddress) {}

    fn post(&mut self, operation: &Operation);

    /// Appends the slots of operations that completed.
    fn poll(&mut self, completed: &mut Vec<u32>);
}

impl<D: Device> Nic for SimulatedNic<D> {
    fn depth(&self) -> u32 {
        self.depth
    }

    fn max_length(&self) -> u64 {
        LONGEST
    }

    fn virtual_addresses(&self) -> bool {
        true
    }

    fn register(&mut self, region: u32, _: &Memory) -> Result<u64> {
        Ok(u64::from(region) + 1)
    }

    fn unregister(&mut self, _: u32) -> Result<()> {
        Ok(())
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerAddress> {
        Ok(self.device.connect(address))
    }

    fn disconnect(&mut self, peer: PeerAddress) -> Result<()> {
        self.device.disconnect(peer);
        Ok(())
    }

    fn post(&mut self, operation: &Operation) -> Post {
        self.device.post(operation);
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, _: &mut Vec<(u32, Fault)>) {
        self.device.poll(completed);
    }

    fn explain(&self, errno: i32) -> Fault {
        Fault::new(errno, None, "simulated")
    }
}

/// A peer's NIC as the engine knows it: its address, which is as long as EFA's, begins with its port.
pub(crate) fn remote_nic(port: Port) -> RemoteNic {
    let mut address = [0; 32];
    address[..8].copy_from_slice(&(port as u64).to_le_bytes());
    RemoteNic { name: format!("port{port}"), address: Some(address.into()) }
}

fn port(address: &[u8]) -> PeerAddress {
    let port = address.first_chunk().expect("made by remote_nic");
    PeerAddress(u64::from_le_bytes(*port))
}

/// On the lines of a [`World`].
pub(crate) struct Line {
    pub world: Arc<World>,
    pub port: Port,
    pub costs: CallCosts,
}

pub(crate) type LineNic = SimulatedNic<Line>;

impl Device for Line {
    fn connect(&mut self, address: &[u8]) -> PeerAddress {
        port(address)
    }

    fn post(&mut self, operation: &Operation) {
        let Operation { write, slot, length, peer, .. } = *operation;
        self.world.spend(self.costs.post);
        self.world.turn();
        self.world.network(|network, now| {
            network.post(now, self.port, peer.0 as Port, write, slot, length);
        });
    }

    fn poll(&mut self, completed: &mut Vec<u32>) {
        self.world.spend(self.costs.poll);
        self.world.turn();
        let before = completed.len();
        self.world.network(|network, now| {
            network.poll(now, self.port, READ_AT_ONCE, completed);
        });
        self.world.spend(self.costs.completion * (completed.len() - before) as u64);
    }
}

/// Has completed an operation when it is next polled, or keeps it for ever. Peers are kept as the real NIC
/// keeps them.
pub(crate) struct NoLine {
    /// Operations never complete.
    keeps: bool,
    done: Vec<u32>,
    peers: HashMap<Box<[u8]>, PeerAddress>,
}

pub(crate) type InstantNic = SimulatedNic<NoLine>;

impl InstantNic {
    pub fn new(depth: u32, keeps: bool) -> Self {
        let done = Vec::with_capacity(if keeps { 0 } else { depth as usize });
        Self { depth, device: NoLine { keeps, done, peers: HashMap::new() } }
    }
}

impl Device for NoLine {
    fn connect(&mut self, address: &[u8]) -> PeerAddress {
        if let Some(&peer) = self.peers.get(address) {
            return peer;
        }
        let peer = port(address);
        self.peers.insert(address.into(), peer);
        peer
    }

    fn disconnect(&mut self, peer: PeerAddress) {
        self.peers.retain(|_, known| *known != peer);
    }

    fn post(&mut self, operation: &Operation) {
        if !self.keeps {
            self.done.push(operation.slot);
        }
    }

    fn poll(&mut self, completed: &mut Vec<u32>) {
        completed.append(&mut self.done);
    }
}
