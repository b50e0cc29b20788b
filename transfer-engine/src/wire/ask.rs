//! The side that asks.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use mooncake_efa::{Code, Error, Result};

use super::{Broken, Frame, Kind, Limits, Reader};
use crate::address;

/// What every peer takes, as long as nobody has set `MC_HANDSHAKE_MAX_LENGTH`.
const TAKEN: usize = 1 << 20;

/// Sends a request to a server and returns its answer. Blocks for as long as `limits` allows, and, where `host` is a
/// name, for as long as the system looks for its addresses.
///
/// # Errors
/// `Code::Metadata`, with the host and what went wrong.
pub fn ask(host: &str, port: u16, kind: Kind, request: &str, limits: &Limits) -> Result<String> {
    let failed = |why: String| {
        // A peer may have made up the host's name.
        let name: String = host.chars().take(255).flat_map(char::escape_debug).collect();
        Error::new(Code::Metadata, format!("{}: {why}", address::join(&name, port)))
    };
    let addresses = resolve(host, port, limits).map_err(failed)?;
    let stream = connect(&addresses, limits).map_err(failed)?;
    talk(&stream, kind, request, limits).map_err(failed)
}

fn resolve(host: &str, port: u16, limits: &Limits) -> Result<Vec<SocketAddr>, String> {
    let all = (host, port).to_socket_addrs().map_err(|why| {
        format!("the host is not found ({why}): check DNS and /etc/hosts, or use its IP address")
    })?;
    let addresses: Vec<_> = all.filter(|address| address.is_ipv6() == limits.ipv6).collect();
    if addresses.is_empty() {
        return Err(match limits.ipv6 {
            false => "the host has no IPv4 address; MC_USE_IPV6=1 asks for IPv6".to_owned(),
            true => "the host has no IPv6 address, which MC_USE_IPV6 asks for".to_owned(),
        });
    }
    Ok(addresses)
}

/// Connects to the first address that lets us.
fn connect(addresses: &[SocketAddr], limits: &Limits) -> Result<TcpStream, String> {
    let mut failures = Vec::new();
    for address in addresses {
        match TcpStream::connect_timeout(address, limits.connect) {
            Ok(stream) => return Ok(stream),
            Err(why) => failures.push((address, unreachable(&why, limits))),
        }
    }
    match &failures[..] {
        [(_, only)] => Err(only.clone()),
        several => {
            let list = several.iter().map(|(address, why)| format!("at {}: {why}", address.ip()));
            Err(list.collect::<Vec<_>>().join("; "))
        }
    }
}

fn unreachable(why: &io::Error, limits: &Limits) -> String {
    match why.kind() {
        ErrorKind::ConnectionRefused => {
            "nobody listens there: is the peer's process alive?".to_owned()
        }
        ErrorKind::TimedOut => format!(
            "no connection within {:?} (MC_HANDSHAKE_CONNECT_TIMEOUT): is the host up, and does its \
             security group let us in?",
            limits.connect
        ),
        _ => format!("no connection: {why}"),
    }
}

fn talk(stream: &TcpStream, kind: Kind, request: &str, limits: &Limits) -> Result<String, String> {
    let end = |why: &io::Error, what: &str| match why.kind() {
        ErrorKind::TimedOut => format!(
            "{what} within {:?}: the peer is connected, but stuck or too busy",
            limits.frame
        ),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe if request.len() >= TAKEN => format!(
            "the peer breaks off a request of {} bytes: is that more than its MC_HANDSHAKE_MAX_LENGTH?",
            request.len()
        ),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            "the peer breaks the connection off: did its process end?".to_owned()
        }
        _ => format!("{what}: {why}"),
    };
    let bytes = Frame { kind: Some(kind), text: request.to_owned() }.to_bytes();
    Timed::new(stream, limits.frame)
        .write_all(&bytes)
        .map_err(|why| end(&why, "the request was not taken"))?;

    let mut timed = Timed::new(stream, limits.frame);
    let mut reader = Reader::new(limits.length);
    let frame = loop {
        match reader.read(&mut timed) {
            Ok(Some(frame)) => break frame,
            Ok(None) => {}
            Err(Broken::Nothing) => {
                return Err("the peer closed the connection without an answer: it refuses the \
                            request (its log says why), or has installed no transport yet"
                    .to_owned());
            }
            Err(Broken::Io(why)) => return Err(end(&why, "no whole answer")),
            Err(Broken::Cut(what)) => {
                return Err(format!("the peer closed the connection amid its answer ({what})"));
            }
            Err(Broken::Bad(what)) => {
                return Err(format!(
                    "the answer is {what}: is it the handshake port of a Mooncake engine? \
                     (Long answers need MC_HANDSHAKE_MAX_LENGTH here.)"
                ));
            }
        }
    };
    match frame.kind {
        Some(answered) if answered == kind => Ok(frame.text),
        Some(answered) => Err(format!("a request {kind:?} is answered with {answered:?}")),
        None => Err(format!("a request {kind:?} is answered with none: is its Mooncake too old?")),
    }
}

/// A stream for as long as there is time. The time is for all that is read or written.
struct Timed<'a> {
    stream: &'a TcpStream,
    end: Instant,
}

impl<'a> Timed<'a> {
    fn new(stream: &'a TcpStream, time: Duration) -> Self {
        Self { stream, end: Instant::now() + time }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// What the system says when a socket's time is up.
fn in_time<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|why| match why.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => why,
    })
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        in_time(self.stream.read(into))
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        in_time(self.stream.write(from))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_have_a_scope() {
        let second = Duration::from_secs(1);
        let limits = Limits { connect: second, frame: second, length: 1, ipv6: true };
        let addresses = resolve("fe80::1%lo", 7, &limits).expect("an address");
        let [SocketAddr::V6(address)] = addresses[..] else { panic!("{addresses:?}") };
        assert_eq!((address.port(), address.ip().to_string().as_str()), (7, "fe80::1"));
        // The loopback interface is a host's first.
        assert_eq!(address.scope_id(), 1);
    }
}
