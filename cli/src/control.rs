//! The conversation of initiator and target beside the transfers: lines of JSON over TCP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use mooncake_efa::{Code, Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest line: a descriptor of very many regions.
const MAX_LINE: u64 = 64 << 20;
/// Longest wait for an answer: filling or checking a buffer of some hundred GiB takes its time.
const ANSWER: Duration = Duration::from_secs(120);
const CONNECT: Duration = Duration::from_secs(5);

/// What the target says first.
#[derive(Serialize, Deserialize)]
pub struct Hello {
    /// Its segment descriptor, Mooncake's JSON.
    pub descriptor: String,
    /// Address of its buffer.
    pub address: u64,
    /// Bytes of it.
    pub length: u64,
}

/// What the initiator asks.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// Fill the first `length` bytes with the pattern of `seed`.
    Fill { length: u64, seed: u64 },
    /// Check them.
    Check { length: u64, seed: u64 },
    /// How much CPU time have you used?
    CpuTime,
}

/// What the target answers.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    /// Done; checked bytes were right.
    Done,
    /// The first wrong byte.
    Wrong { offset: u64, expected: u8, found: u8 },
    /// Seconds of CPU time since it started.
    CpuTime(f64),
}

/// One end of a conversation.
pub struct Line {
    reader: BufReader<TcpStream>,
}

fn failed(what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Code::Endpoint, format!("{what}: {why}"))
}

impl Line {
    /// Connects to a target.
    pub fn connect(address: &str) -> Result<Self> {
        let what = format!("cannot reach the target at {address}");
        let mut last = String::from("the name has no address");
        for socket in address.to_socket_addrs().map_err(|why| failed(&what, why))? {
            match TcpStream::connect_timeout(&socket, CONNECT) {
                Ok(stream) => return Self::new(stream),
                Err(why) => last = why.to_string(),
            }
        }
        Err(failed(&what, last))
    }

    /// Takes over a connection.
    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true).map_err(|why| failed("control connection", why))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Says something.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message).map_err(|why| failed("control message", why))?;
        line.push(b'\n');
        let stream = self.reader.get_mut();
        stream.write_all(&line).map_err(|why| failed("the other side is gone", why))
    }

    /// Hears something; `None` if the other side hung up. Waits for ever if `patient`.
    pub fn receive<T: DeserializeOwned>(&mut self, patient: bool) -> Result<Option<T>> {
        let wait = (!patient).then_some(ANSWER);
        let stream = self.reader.get_ref();
        stream.set_read_timeout(wait).map_err(|why| failed("control connection", why))?;
        let mut line = Vec::new();
        let mut limited = (&mut self.reader).take(MAX_LINE);
        limited
            .read_until(b'\n', &mut line)
            .map_err(|why| failed("the other side does not answer", why))?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(|why| {
            failed("the other side is not a mooncake-efa bench of this version", why)
        })
    }

    /// Whether the other side has closed the connection or died. Not for while an answer is awaited.
    pub fn hung_up(&self) -> bool {
        let stream = self.reader.get_ref();
        let look = || {
            stream.set_nonblocking(true)?;
            let seen = stream.peek(&mut [0]);
            stream.set_nonblocking(false)?;
            seen
        };
        match look() {
            Ok(bytes) => bytes == 0,
            Err(why) => why.kind() != std::io::ErrorKind::WouldBlock,
        }
    }

    /// Asks, and hears the answer.
    pub fn ask(&mut self, order: &Order) -> Result<Answer> {
        self.send(order)?;
        self.receive(false)?.ok_or_else(|| failed("the target", "hung up"))
    }
}
