//! What the fuzzers call with bytes of their making (docs/fuzzing.md): each target takes any bytes, and
//! panics where a promise does not hold. `tests/corpus.rs` calls them with the bytes that are kept.

mod capi;
#[path = "../../capi/src/lib.rs"]
pub mod door;
// The command is a program, not a library; this file of it stands alone.
#[allow(dead_code)]
#[path = "../../cli/src/control.rs"]
mod control_line;

// As is this pair.
#[allow(dead_code)]
#[path = "../../src/nic/message.rs"]
mod message_line;
#[allow(dead_code)]
#[path = "../../src/nic/process.rs"]
mod process;

use std::io::{BufReader, ErrorKind, Read};

use mooncake_efa::Result;
use mooncake_efa::config::Config;
use mooncake_efa::segment::{self, Handshake, Segment};
use mooncake_efa::topology::Topology;
use softefa::rules::{Op, Operation, Place, Script};
use transfer_engine::wire::{Frame, Reader};

pub use capi::capi;

/// A target's function, by its name.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 10] = [
    ("segment", segment),
    ("handshake", handshake),
    ("topology", topology),
    ("names", names),
    ("config", config),
    ("control", control),
    ("frame", frame),
    ("message", message),
    ("faults", faults),
    ("capi", capi),
];

/// What was refused must be told in one line that is safe in a log.
fn told<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(taken) => Some(taken),
        Err(error) => {
            one_line(&error.text);
            None
        }
    }
}

fn one_line(text: &str) {
    assert!(!text.is_empty() && text.len() < 10_000, "{} bytes: {text:?}", text.len());
    assert!(!text.contains(char::is_control), "{text:?}");
}

/// A peer's or the metadata service's segment descriptor, as JSON.
pub fn segment(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(segment) = told(Segment::from_json(text)) else { return };
    // What was taken has the promised shape, and is the same when it is written and read again.
    assert!(segment.devices.len() <= segment::MAX_DEVICES);
    for buffer in &segment.buffers {
        assert!(buffer.addr > 0 && buffer.length > 0);
        assert!(buffer.addr.checked_add(buffer.length).is_some());
        assert!(buffer.rkey.is_empty() || buffer.rkey.len() == segment.devices.len());
    }
    assert!(!segment.server_name().contains(char::is_control));
    let again = Segment::from_json(&segment.to_json());
    assert_eq!(again.expect("we read what we write"), segment);
    let names: Vec<String> = segment.devices.iter().map(|device| device.name.clone()).collect();
    for buffer in segment.buffers.iter().take(64) {
        near(&segment.topology, &buffer.name, &names);
    }
}

fn near(topology: &Topology, location: &str, names: &[String]) {
    let (preferred, others) = topology.nics_for(location, names);
    assert_eq!(preferred.is_empty(), names.is_empty());
    let mut seen = vec![false; names.len()];
    for index in preferred.into_iter().chain(others) {
        assert!(!std::mem::replace(&mut seen[index], true), "NIC {index} twice");
    }
}

/// A handshake from a peer, as JSON.
pub fn handshake(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(message) = told(Handshake::from_json(text)) else { return };
    let address = segment::hex_decode(&message.efa_addr).expect("it was checked");
    assert!(address.len() <= segment::MAX_ADDRESS);
    assert!(!message.local_nic_path.contains(char::is_control));
    let again = Handshake::from_json(&message.to_json());
    assert_eq!(again.expect("we read what we write"), message);
}

/// A NIC priority matrix, as JSON: of a peer, of the host, or of a file.
pub fn topology(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(topology) = told(Topology::from_json(text)) else { return };
    let again = Topology::from_json(&topology.to_json());
    assert_eq!(again.expect("we read what we write"), topology);
    let names: Vec<String> = topology.devices().into_iter().take(64).collect();
    for location in topology.entries.keys().take(64).map(String::as_str).chain(["*", "cpu:0"]) {
        near(&topology, location, &names);
    }
    let some = &names[..names.len() / 2];
    assert!(topology.only(some).devices().iter().all(|name| some.contains(name)));
}

/// A device's `gid`, hexadecimal digits, and the path of a NIC.
pub fn names(data: &[u8]) {
    let hex = segment::hex_encode(data);
    assert_eq!(segment::hex_decode(&hex).as_deref(), Some(data));
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some((provider, address)) = segment::decode_gid(text) {
        assert!(!provider.is_empty() && (1..=segment::MAX_ADDRESS).contains(&address.len()));
        let written = segment::encode_gid(provider, &address);
        assert!(written.eq_ignore_ascii_case(text));
        assert_eq!(segment::decode_gid(&written), Some((provider, address)));
    }
    if let Some(bytes) = segment::hex_decode(text) {
        assert!(segment::hex_encode(&bytes).eq_ignore_ascii_case(text));
    }
    if let Some(nic) = segment::nic_of_path(text) {
        let (server, _) = text.split_once('@').expect("there is a NIC");
        assert_eq!(segment::nic_path(server, nic), text);
    }
}

/// The environment: lines of `NAME=value`.
pub fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let variables: Vec<_> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let (config, warnings) = Config::from_lookup(|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).to_owned())
    });
    for warning in warnings {
        one_line(&warning);
    }
    assert!((1..=65535).contains(&config.max_cqe) && (1..=65536).contains(&config.av_size));
    assert!((1..=65535).contains(&config.max_wr.unwrap_or(1)) && config.max_mr_size > 0);
    assert!((1..=1 << 40).contains(&config.slice_size.unwrap_or(1)));
    assert!((1..=127).contains(&config.retry_count) && !config.slice_timeout.is_zero());
    assert!((1 << 20..=128 << 20).contains(&config.handshake_max_length));
    assert!(!config.rpc_ports.is_empty() && !config.provider.is_empty());
}

/// What comes over a bench's control connection, on either side. The first byte is how much of it
/// comes at a time.
pub fn control(data: &[u8]) {
    use control_line::{Answer, HELLO, Hello, Order, WORD, hear};
    let Some((&size, text)) = data.split_first() else { return };
    let reader = || BufReader::with_capacity(usize::from(size).max(1), text);
    let now = &mut |_: &_| Ok(());
    let mut orders = reader();
    while let Some(Some(order)) = told(hear::<_, Order>(&mut orders, WORD, now)) {
        let line = serde_json::to_vec(&order).expect("JSON");
        assert!(line.len() <= WORD && serde_json::from_slice::<Order>(&line).is_ok());
    }
    let mut answers = reader();
    while let Some(Some(answer)) = told(hear::<_, Answer>(&mut answers, WORD, now)) {
        serde_json::to_vec(&answer).expect("JSON");
    }
    if let Some(Some(hello)) = told(hear::<_, Hello>(&mut reader(), HELLO, now)) {
        segment(hello.descriptor.as_bytes());
    }
}

/// What comes to an endpoint about GPU memory. Short ones are as if the rest were 0.
pub fn message(data: &[u8]) {
    use message_line::{Body, LENGTH, Message};
    let mut bytes = [0; LENGTH];
    let length = data.len().min(LENGTH);
    bytes[..length].copy_from_slice(&data[..length]);
    if let Some(message) = Message::decode(&bytes) {
        // A text that is not UTF-8 gets longer by being made it, and is cut then.
        let again = Message::decode(&message.encode()).expect("it is one");
        assert_eq!(
            (again.id, again.life, &again.address),
            (message.id, message.life, &message.address)
        );
        if let Body::Ended { text, .. } = &message.body {
            assert!(!text.contains(char::is_control));
        } else {
            assert_eq!(again, message);
        }
    }
}

/// What comes to or from Mooncake's handshake port. The first byte is how much of it comes at a time.
pub fn frame(data: &[u8]) {
    const MOST: usize = 1024;
    let Some((&size, bytes)) = data.split_first() else { return };
    let whole = read_frame(bytes, usize::MAX, MOST);
    let parts = read_frame(bytes, usize::from(size).max(1), MOST);
    assert_eq!(parts, whole);
    if let Some(frame) = whole {
        // What was taken is what was sent, and nothing behind it.
        let written = frame.to_bytes();
        assert!(written.len() <= 8 + MOST && bytes.starts_with(&written));
        assert_eq!(read_frame(&written, 1, MOST), Some(frame));
    }
    // Whatever length is announced, what is held is what came, and some.
    read_frame(bytes, usize::from(size).max(1), usize::MAX);
}

fn read_frame(bytes: &[u8], size: usize, most: usize) -> Option<Frame> {
    struct Parts<'a> {
        bytes: &'a [u8],
        size: usize,
        /// Nothing is there before each part.
        waits: bool,
    }
    impl Read for Parts<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.waits = !self.waits;
            if self.waits {
                return Err(ErrorKind::WouldBlock.into());
            }
            let most = into.len().min(self.size);
            self.bytes.read(&mut into[..most])
        }
    }
    let mut parts = Parts { bytes, size, waits: false };
    let mut reader = Reader::new(most);
    loop {
        let result = reader.read(&mut parts);
        assert!(reader.held() <= 64 + 4 * bytes.len(), "{} bytes held", reader.held());
        match result {
            Ok(None) => {}
            Ok(Some(frame)) => {
                assert_eq!(bytes.len() - parts.bytes.len(), frame.to_bytes().len());
                return Some(frame);
            }
            Err(broken) => {
                one_line(&broken.to_string());
                return None;
            }
        }
    }
}

/// A script of softefa's faults.
pub fn faults(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut script = match Script::parse(text) {
        Ok(script) => script,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let again = Script::parse(&script.to_string()).expect("we read what we write");
    assert_eq!(again.to_string(), script.to_string());
    // And whatever it says can be asked, and ended.
    let mut queue = script.for_queue(Place { host: 1, nic: 2, qp: 3 });
    for number in 1..8 {
        let _ = queue.judge(&Operation { number, op: Op::Write, peer: 1 }, number << 20, &mut drop);
        let _ = queue.refuses(number, Op::Recv, number << 20, &mut drop);
    }
    let _ = script.link_state(1, 2, 1 << 20);
    let _ = script.next_change(1 << 20);
    let first = text.lines().next().unwrap_or_default();
    let _ = script.up(first);
    let _ = script.add(first, 5);
    Script::parse(&script.to_string()).expect("we read what we write");
}
