//! The conversation of initiator and target beside the transfers: lines of JSON over TCP.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::time::{Duration, Instant};

use mooncake_efa::{Code, Error, Result};
use rustix::net::sockopt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most bytes of a target's [`Hello`]: a descriptor of very many regions.
pub const HELLO: usize = 64 << 20;
/// Most bytes of an [`Order`] or an [`Answer`].
pub const WORD: usize = 1024;
/// Longest wait for an answer, or for the other side to take a line: filling or checking a buffer of
/// some hundred GiB takes its time.
pub const ANSWER: Duration = Duration::from_secs(120);
/// Longest time from a line's first byte to its last.
const LINE: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(5);
/// A host that says nothing for so long is asked whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Where a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// First byte, as its owner has it.
    pub address: u64,
    /// The GPU, by CUDA's number in its owner's process; on the host without.
    pub gpu: Option<u32>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.gpu {
            Some(gpu) => write!(f, "cuda:{gpu}"),
            None => f.write_str("host"),
        }
    }
}

/// Which bytes the threads of an initiator use: blocks of all of them alternate, up to `length`.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Layout {
    pub length: u64,
    pub block: u64,
    pub threads: u64,
}

impl Layout {
    /// What is used of the `index`th of `of` buffers: the threads have them in turn.
    pub fn ranges(&self, index: u64, of: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let Self { length, block, threads } = *self;
        // A single buffer is used whole.
        let block = if of == 1 { length.max(1) } else { block };
        (0..length.div_ceil(block))
            .filter(move |at| of == 1 || at % threads % of == index)
            .map(move |at| at * block..((at + 1) * block).min(length))
    }
}

/// What the target says first.
#[derive(Serialize, Deserialize)]
pub struct Hello {
    /// Its segment descriptor, Mooncake's JSON.
    pub descriptor: String,
    /// Its buffers, at least one.
    pub buffers: Vec<Place>,
    /// Bytes of each.
    pub length: u64,
}

/// What the initiator asks.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// Fill what threads use with the pattern of `seed`.
    Fill { layout: Layout, seed: u64 },
    /// Check it.
    Check { layout: Layout, seed: u64 },
    /// How much CPU time have you used?
    CpuTime,
}

/// What the target answers.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    /// Done; checked bytes were right.
    Done,
    /// The first wrong byte, and the number of its buffer.
    Wrong { buffer: usize, offset: u64, expected: u8, found: u8 },
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

/// Waits for bytes, or for the end. `before` is called before each wait.
fn fill<R: BufRead>(
    reader: &mut R,
    before: &mut impl FnMut(&R) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        before(reader)?;
        match reader.fill_buf() {
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

/// Reads a line of JSON of at most `most` bytes; `None` at the end. `before` is called before each wait.
pub fn hear<R: BufRead, T: DeserializeOwned>(
    reader: &mut R,
    most: usize,
    before: &mut impl FnMut(&R) -> io::Result<()>,
) -> Result<Option<T>> {
    let silent = |why| failed("the other side does not answer", why);
    let strange = |why: String| {
        // It may repeat what came, and goes into one line of a log.
        let safe = |c: char| if c.is_control() { '?' } else { c };
        let why: String = why.chars().take(200).map(safe).collect();
        failed("the other side is not a mooncake-efa bench of this version", why)
    };
    let mut line = Vec::new();
    loop {
        fill(reader, before).map_err(silent)?;
        let seen = reader.fill_buf().map_err(silent)?;
        if seen.is_empty() && line.is_empty() {
            return Ok(None);
        }
        let (part, ended) = match seen.iter().position(|&byte| byte == b'\n') {
            Some(end) => (end, true),
            None => (seen.len(), seen.is_empty()),
        };
        if line.len() + part > most {
            return Err(strange(format!("a line of more than {most} bytes")));
        }
        line.extend_from_slice(&seen[..part]);
        let used = part + usize::from(part < seen.len());
        reader.consume(used);
        if ended {
            return serde_json::from_slice(&line).map(Some).map_err(|why| strange(why.to_string()));
        }
    }
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
        let set = || -> io::Result<()> {
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(ANSWER))?;
            sockopt::set_socket_keepalive(&stream, true)?;
            Ok(sockopt::set_tcp_keepidle(&stream, KEEP_ALIVE)?)
        };
        set().map_err(|why| failed("control connection", why))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Says something.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message).map_err(|why| failed("control message", why))?;
        line.push(b'\n');
        let stream = self.reader.get_mut();
        stream.write_all(&line).map_err(|why| failed("the other side is gone", why))
    }

    /// Hears something of at most `most` bytes; `None` if the other side hung up. Waits `patience` for
    /// it to begin.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        most: usize,
        patience: Duration,
    ) -> Result<Option<T>> {
        let wait = |stream: &TcpStream, limit: Instant| {
            let left = limit.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))
        };
        let limit = Instant::now() + patience;
        fill(&mut self.reader, &mut |reader| wait(reader.get_ref(), limit))
            .map_err(|why| failed("the other side does not answer", why))?;
        let limit = Instant::now() + LINE;
        hear(&mut self.reader, most, &mut |reader| wait(reader.get_ref(), limit))
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
        self.receive(WORD, ANSWER)?.ok_or_else(|| failed("the target", "hung up"))
    }
}

#[cfg(test)]
mod tests {
    use std::iter::once;
    use std::net::TcpListener;

    use super::*;

    fn heard(text: &[u8], most: usize) -> Result<Option<u64>> {
        // Byte by byte: a line comes in as many parts as the network likes.
        hear(&mut BufReader::with_capacity(1, text), most, &mut |_| Ok(()))
    }

    fn refused<T>(result: Result<T>, part: &str) {
        let Err(error) = result else { panic!("taken; it should say {part}") };
        assert!(error.text.contains(part), "{error} lacks {part}");
    }

    #[test]
    fn lines_are_heard_one_by_one() {
        let mut reader = BufReader::with_capacity(3, &b"17\n\"ab\"\n[1]"[..]);
        assert_eq!(hear(&mut reader, 9, &mut |_| Ok(())).unwrap(), Some(17));
        assert_eq!(hear(&mut reader, 9, &mut |_| Ok(())).unwrap(), Some("ab".to_owned()));
        assert_eq!(hear(&mut reader, 9, &mut |_| Ok(())).unwrap(), Some(vec![1]));
        assert_eq!(hear::<_, u64>(&mut reader, 9, &mut |_| Ok(())).unwrap(), None);
    }

    #[test]
    fn a_line_is_no_longer_than_it_may_be() {
        assert_eq!(heard(b"1234\n", 4).unwrap(), Some(1234));
        refused(heard(b"12345\n", 4), "a line of more than 4 bytes");
        // One without an end, too: nothing waits for it.
        refused(
            hear::<_, u64>(&mut BufReader::new(io::repeat(b' ')), 9, &mut |_| Ok(())),
            "more than 9",
        );
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for text in ["\n", "x\n", "{\n", "1 2\n", "1", "\u{e9}\n"] {
            match heard(text.as_bytes(), 99) {
                Ok(heard) => assert_eq!(heard, Some(1), "{text:?}"),
                Err(error) => assert!(error.text.contains("bench of this version"), "{error}"),
            }
        }
        let order = r#"{"\r\nEvil: yes":1}"#;
        let Err(error) = hear::<_, Order>(&mut order.as_bytes(), 99, &mut |_| Ok(())) else {
            panic!()
        };
        assert!(error.text.contains("??Evil"), "{error}");
    }

    #[test]
    fn who_begins_a_line_must_end_it() {
        // The wait's limit, as receive() keeps it, is looked at before each part.
        let mut waits = 0;
        let limit = &mut |_: &_| {
            waits += 1;
            if waits > 3 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        };
        let drip = &mut BufReader::with_capacity(1, io::repeat(b' '));
        refused(hear::<_, u64>(drip, 99, limit), "does not answer");
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut line = Line::new(listener.accept().unwrap().0).unwrap();
        refused(line.receive::<Order>(WORD, Duration::from_millis(20)), "does not answer");
    }

    #[test]
    fn buffers_have_the_blocks_of_their_threads() {
        let layout = Layout { length: 70, block: 10, threads: 3 };
        let of = |index, of| layout.ranges(index, of).collect::<Vec<_>>();
        assert!(of(0, 1).into_iter().eq(once(0..70)));
        assert_eq!(of(0, 2), [0..10, 20..30, 30..40, 50..60, 60..70]);
        assert_eq!(of(1, 2), [10..20, 40..50]);
        assert_eq!(of(3, 4), [], "more buffers than threads");
    }
}
