//! Mooncake's handshake: one request and one answer a TCP connection, each a frame: the length of what follows (8
//! bytes, the host's order), a byte that says which request it is, JSON. The oldest form has no such byte.
//!
//! Whoever reaches the port is served, so what is read here is limited in length, number and time.
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use mooncake_efa::{Error, Result};

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

/// How long and how much, for both sides.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest wait for all of a frame.
    pub frame: Duration,
    /// Most bytes of a frame.
    pub length: usize,
    /// Addresses are IPv6 ones.
    pub ipv6: bool,
}

/// Sends a request to a server and returns its answer. Blocks for as long as `limits` allows.
///
/// # Errors
/// `Code::Metadata`, with the host and what went wrong.
pub fn ask(host: &str, port: u16, kind: Kind, request: &str, limits: &Limits) -> Result<String> {
    let _ = (kind, request, limits);
    Err(Error::invalid(format!("{host}:{port}")))
}

/// Answers requests. Called on several threads at once.
pub trait Answer: Send + Sync {
    /// The answer (JSON) to a request (text, perhaps JSON); an error closes the connection without one.
    fn answer(&self, kind: Kind, request: &str) -> Result<String>;
}

/// Threads that answer what comes to a port. Dropping it ends them.
pub struct Server {}

impl Server {
    /// Starts them.
    pub fn start(listener: TcpListener, answers: Arc<dyn Answer>, limits: Limits) -> Result<Self> {
        let _ = (listener, answers, limits);
        Ok(Self {})
    }
}
