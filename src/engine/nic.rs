//! What the engine asks of a network device. The real one is [`crate::nic`]; tests have a simulated
//! one.

use std::time::Duration;

use crate::error::Result;
use crate::fabric::Memory;
pub use crate::fabric::{PeerAddress, Post};
use crate::fault::Fault;

/// One RMA operation on registered memory.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Write to the peer; otherwise read from it.
    pub write: bool,
    /// Local address, inside `region`.
    pub local: u64,
    /// Bytes, at most [`Nic::max_length`].
    pub length: u64,
    /// The number that the local region was registered with.
    pub region: u32,
    /// The peer.
    pub peer: PeerAddress,
    /// Remote address as the device wants it: virtual, or an offset (see
    /// [`Nic::virtual_addresses`]).
    pub remote: u64,
    /// The remote region's key.
    pub key: u64,
    /// The engine's slot, below [`Nic::depth`]; not in use by another operation in flight.
    pub slot: u32,
}

/// One network device. All calls come from one thread at a time.
pub trait Nic: Send {
    /// Most operations in flight: strictly below what the device's queues hold.
    fn depth(&self) -> u32;

    /// Longest operation in bytes.
    fn max_length(&self) -> u64;

    /// Remote addresses are virtual; otherwise offsets from the start of the remote region.
    fn virtual_addresses(&self) -> bool;

    /// Registers memory under a number of the engine's; returns the key for peers, never 0.
    fn register(&mut self, region: u32, memory: &Memory) -> Result<u64>;

    /// Ends a registration. Nothing in flight may use it.
    fn unregister(&mut self, region: u32) -> Result<()>;

    /// Makes a peer reachable by its endpoint's address; the same peer for the same address. Refuses with
    /// [`Code::Endpoint`](crate::error::Code::Endpoint) where there may be no room for another.
    fn connect(&mut self, address: &[u8]) -> Result<PeerAddress>;

    /// Forgets a peer; nothing is in flight to it. Its address may be connected again, as another peer.
    fn disconnect(&mut self, peer: PeerAddress) -> Result<()>;

    /// Peers are connections, which break with the first failure, whatever it was, and are made anew by
    /// [`Self::disconnect`] and [`Self::connect`]; else a failed operation says nothing about the next.
    fn connects(&self) -> bool {
        false
    }

    /// Whether a peer that nothing was posted to yet has answered this NIC: [`Post::Again`] until it has. The
    /// address and key are those of the first operation. (Where the provider has to hear from a peer first, it
    /// keeps what is posted before that, and never gives it back if no answer comes.)
    fn greet(&mut self, peer: PeerAddress, remote: u64, key: u64) -> Post {
        let _ = (peer, remote, key);
        Post::Done
    }

    /// Why a peer has not answered for so long.
    fn unanswered(&mut self, waited: Duration) -> Fault {
        Fault::unanswered(waited)
    }

    /// How long one operation between this region and the peer's memory with this key may be, bytes, where that is
    /// not what the settings say.
    fn longest(&mut self, region: u32, peer: PeerAddress, key: u64) -> Option<u64> {
        let _ = (region, peer, key);
        None
    }

    /// Posts an operation. After [`Post::Done`] it completes or fails, exactly once.
    fn post(&mut self, operation: &Operation) -> Post;

    /// Makes progress, and appends the slots of operations that completed, and of those that failed
    /// and why. A slot with nothing in flight is a stray.
    fn poll(&mut self, completed: &mut Vec<u32>, failed: &mut Vec<(u32, Fault)>);

    /// What is to be done now and then, and takes longer than a poll that finds nothing.
    fn tend(&mut self) {}

    /// What the errno of a [`Post::Failed`] means.
    fn explain(&self, errno: i32) -> Fault;
}
