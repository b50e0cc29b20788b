//! Mooncake's handshake: one request and one answer a TCP connection, each a frame: the length of what follows (8
//! bytes, the host's order), a byte that says which request it is, JSON. The oldest form has no such byte.
//!
//! Whoever reaches the port is served, so what is read here is limited in length, number and time.
#![forbid(unsafe_code)]

mod ask;
mod frame;
mod server;

use std::time::Duration;

use mooncake_efa::Result;

pub use ask::ask;
pub use frame::{Broken, Frame, Reader};
pub use server::Server;

/// Longest wait for a frame: as long as Mooncake waits for one that comes.
pub const FRAME: Duration = Duration::from_secs(5);

/// Which request a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A NIC tells another where it is.
    Connection = 0,
    /// Asks for the segment descriptor.
    Metadata = 1,
    /// A notification.
    Notify = 2,
    /// Is anybody there?
    Probe = 3,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Connection, Self::Metadata, Self::Notify, Self::Probe];
}

/// How long and how much, for both sides.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest wait for all of a frame.
    pub frame: Duration,
    /// Most bytes of a frame that is read. The other side may take less, or more.
    pub length: usize,
    /// Addresses are IPv6 ones.
    pub ipv6: bool,
}

/// Answers requests. Called on several threads at once.
pub trait Answer: Send + Sync {
    /// The answer (JSON) to a request (text, perhaps JSON); an error closes the connection without one.
    fn answer(&self, kind: Kind, request: &str) -> Result<String>;
}
