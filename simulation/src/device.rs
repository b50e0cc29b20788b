//! The simulated NICs: everything here that implements [`Nic`].

use std::collections::HashMap;
use std::sync::Arc;

use mooncake_efa::Result;
use mooncake_efa::engine::{Nic, Operation, PeerAddress, Post, RemoteNic};
use mooncake_efa::fabric::Memory;

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

/// A NIC on the lines of a [`World`].
pub(crate) struct LineNic {
    pub world: Arc<World>,
    pub port: Port,
    pub depth: u32,
    pub costs: CallCosts,
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

impl Nic for LineNic {
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
        Ok(port(address))
    }

    fn post(&mut self, operation: &Operation) -> Post {
        let Operation { write, slot, length, peer, .. } = *operation;
        self.world.spend(self.costs.post);
        self.world.turn();
        self.world.network(|network, now| {
            network.post(now, self.port, peer.0 as Port, write, slot, length);
        });
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, _: &mut Vec<(u32, String)>) {
        self.world.spend(self.costs.poll);
        self.world.turn();
        let before = completed.len();
        self.world.network(|network, now| {
            network.poll(now, self.port, READ_AT_ONCE, completed);
        });
        self.world.spend(self.costs.completion * (completed.len() - before) as u64);
    }

    fn explain(&self, errno: i32) -> String {
        format!("error {errno}")
    }
}

/// A NIC that has completed an operation when it is next polled, or keeps it for ever. Peers are kept
/// as the real NIC keeps them.
pub(crate) struct InstantNic {
    depth: u32,
    /// Operations never complete.
    keeps: bool,
    done: Vec<u32>,
    peers: HashMap<Box<[u8]>, PeerAddress>,
}

impl InstantNic {
    pub fn new(depth: u32, keeps: bool) -> Self {
        let done = Vec::with_capacity(if keeps { 0 } else { depth as usize });
        Self { depth, keeps, done, peers: HashMap::new() }
    }
}

impl Nic for InstantNic {
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
        if let Some(&peer) = self.peers.get(address) {
            return Ok(peer);
        }
        let peer = port(address);
        self.peers.insert(address.into(), peer);
        Ok(peer)
    }

    fn post(&mut self, operation: &Operation) -> Post {
        if !self.keeps {
            self.done.push(operation.slot);
        }
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, _: &mut Vec<(u32, String)>) {
        completed.append(&mut self.done);
    }

    fn explain(&self, errno: i32) -> String {
        format!("error {errno}")
    }
}
