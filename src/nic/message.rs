//! What NICs of ours say to each other about GPU memory that no NIC can reach: the owner of the memory is asked to copy.
//!
//! One message is [`LENGTH`] bytes, little-endian, whoever sends it; what is not used is 0. It comes from whoever can
//! reach our endpoint, so nothing in it is taken for granted.

use super::process::Process;

/// Bytes of a message.
pub(super) const LENGTH: usize = 512;
/// Longest endpoint address in one: those of `efa` have 32 bytes, of `tcp` 16 or 28, ours of `shm` about 60.
const ADDRESS: usize = 128;
/// Longest reason in one.
const TEXT: usize = 200;

const MAGIC: u32 = u32::from_le_bytes(*b"mGPU");
const VERSION: u8 = 1;

/// Keys that no NIC gives or takes: of memory that only its owner's process can reach. In descriptors they are like
/// others; peers that do not know them are told by their provider that the key is wrong.
pub(super) const OWNERS_KEY: u64 = 0x6d67_7075 << 32;

/// Whether the key is one of an [`OWNERS_KEY`] kind.
pub(super) fn is_owners(key: u64) -> bool {
    key >> 32 == OWNERS_KEY >> 32
}

/// How a request ended, or why it did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Outcome {
    /// All bytes are where they belong.
    Done,
    /// The request is wrong: no such memory, or not so much of it.
    Refused,
    /// No room; another try may help.
    Full,
    /// A copy or a transfer failed.
    Failed,
    /// The memory cannot be mapped: ask in another way.
    NotShared,
    /// The memory is the host's: the NIC does it.
    OnHost,
}

/// Where the owner finds the other end of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Registered with the requester's NIC.
    Nic { address: u64, key: u64 },
    /// Device memory on the same host: CUDA's handle, and how far into the allocation.
    Cuda { handle: [u8; 64], offset: u64 },
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Copy from the source into your memory (`write`), or the other way round.
    Request { write: bool, key: u64, remote: u64, length: u64, source: Source },
    /// A request ended.
    Ended { outcome: Outcome, text: String },
    /// Are you at this request?
    Probe,
    /// I am.
    Busy,
    /// There is no such request.
    Unknown,
    /// Do we share a host?
    Hello,
    /// This is who I am.
    Welcome,
    /// Memory of this handle is not to be used any more.
    Forget { handle: [u8; 64] },
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The requester's number of the request.
    pub id: u64,
    /// Which NIC of which process the requester is, drawn at random.
    pub life: u64,
    /// The sender's process.
    pub sender: Process,
    /// The sender's endpoint.
    pub address: Box<[u8]>,
    pub body: Body,
}

impl Message {
    /// As it is sent. An address or a text that is too long is cut.
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut out = Writer { bytes: [0; LENGTH], at: 0 };
        let kind: u8 = match &self.body {
            Body::Request { .. } => 1,
            Body::Ended { .. } => 2,
            Body::Probe => 3,
            Body::Busy => 4,
            Body::Unknown => 5,
            Body::Hello => 6,
            Body::Welcome => 7,
            Body::Forget { .. } => 8,
        };
        out.put(&MAGIC.to_le_bytes());
        out.put(&[VERSION, kind]);
        out.put_numbers(&[self.id, self.life]);
        out.put_numbers(&self.sender.numbers());
        out.put_text(&self.address, ADDRESS);
        match &self.body {
            Body::Request { write, key, remote, length, source } => {
                out.put(&[u8::from(*write)]);
                out.put_numbers(&[*key, *remote, *length]);
                match source {
                    Source::Nic { address, key } => {
                        out.put(&[0]);
                        out.put_numbers(&[*address, *key]);
                    }
                    Source::Cuda { handle, offset } => {
                        out.put(&[1]);
                        out.put(&offset.to_le_bytes());
                        out.put(handle);
                    }
                }
            }
            Body::Ended { outcome, text } => {
                out.put(&[*outcome as u8]);
                out.put_text(text.as_bytes(), TEXT);
            }
            Body::Forget { handle } => out.put(handle),
            Body::Probe | Body::Busy | Body::Unknown | Body::Hello | Body::Welcome => {}
        }
        out.bytes
    }

    /// Reads one; `None` if it is not one.
    pub fn decode(bytes: &[u8; LENGTH]) -> Option<Self> {
        let mut from = Reader(bytes);
        let magic = u32::from_le_bytes(from.take()?);
        let [version, kind] = from.take()?;
        if magic != MAGIC || version != VERSION {
            return None;
        }
        let (id, life) = (from.number()?, from.number()?);
        let sender =
            Process::of_numbers([from.number()?, from.number()?, from.number()?, from.number()?]);
        let address = from.text(ADDRESS)?.into();
        let body = match kind {
            1 => {
                let [write] = from.take()?;
                let (key, remote, length) = (from.number()?, from.number()?, from.number()?);
                let source = match from.take()? {
                    [0] => Source::Nic { address: from.number()?, key: from.number()? },
                    [1] => {
                        let offset = from.number()?;
                        Source::Cuda { handle: from.take()?, offset }
                    }
                    _ => return None,
                };
                Body::Request { write: write != 0, key, remote, length, source }
            }
            2 => {
                let outcome = match from.take()? {
                    [0] => Outcome::Done,
                    [1] => Outcome::Refused,
                    [2] => Outcome::Full,
                    [3] => Outcome::Failed,
                    [4] => Outcome::NotShared,
                    [5] => Outcome::OnHost,
                    _ => return None,
                };
                let text = String::from_utf8_lossy(from.text(TEXT)?);
                let one_line = |c: char| if c.is_control() { ' ' } else { c };
                Body::Ended { outcome, text: text.chars().map(one_line).collect() }
            }
            3 => Body::Probe,
            4 => Body::Busy,
            5 => Body::Unknown,
            6 => Body::Hello,
            7 => Body::Welcome,
            8 => Body::Forget { handle: from.take()? },
            _ => return None,
        };
        Some(Self { id, life, sender, address, body })
    }
}

struct Writer {
    bytes: [u8; LENGTH],
    at: usize,
}

impl Writer {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.at..][..bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn put_numbers(&mut self, numbers: &[u64]) {
        numbers.iter().for_each(|number| self.put(&number.to_le_bytes()));
    }

    /// Its length in one byte, then `room` bytes.
    fn put_text(&mut self, text: &[u8], room: usize) {
        let text = &text[..text.len().min(room)];
        self.put(&[text.len() as u8]);
        self.bytes[self.at..][..text.len()].copy_from_slice(text);
        self.at += room;
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self, room: usize) -> Option<&'a [u8]> {
        let [length] = self.take()?;
        let (text, rest) = self.0.split_at_checked(room)?;
        self.0 = rest;
        text.get(..usize::from(length))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body() -> impl Strategy<Value = Body> {
        let handle =
            || any::<[u8; 32]>().prop_map(|half| [half, half].concat().try_into().expect("64"));
        let source = prop_oneof![
            any::<(u64, u64)>().prop_map(|(address, key)| Source::Nic { address, key }),
            (handle(), any::<u64>()).prop_map(|(handle, offset)| Source::Cuda { handle, offset }),
        ];
        let outcome = prop::sample::select(vec![
            Outcome::Done,
            Outcome::Refused,
            Outcome::Full,
            Outcome::Failed,
            Outcome::NotShared,
            Outcome::OnHost,
        ]);
        prop_oneof![
            (any::<(bool, u64, u64, u64)>(), source).prop_map(
                |((write, key, remote, length), source)| {
                    Body::Request { write, key, remote, length, source }
                }
            ),
            (outcome, "[ -~]{0,200}").prop_map(|(outcome, text)| Body::Ended { outcome, text }),
            Just(Body::Probe),
            Just(Body::Busy),
            Just(Body::Unknown),
            Just(Body::Hello),
            Just(Body::Welcome),
            handle().prop_map(|handle| Body::Forget { handle }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard(
            id: u64, life: u64, sender: [u64; 4], address in prop::collection::vec(any::<u8>(), 0..=ADDRESS), body in body()
        ) {
            let sender = Process::of_numbers(sender);
            let message = Message { id, life, sender, address: address.into(), body };
            prop_assert_eq!(Message::decode(&message.encode()), Some(message));
        }

        #[test]
        fn anything_may_come(start in prop::collection::vec(any::<u8>(), 0..=LENGTH), ours: bool) {
            let mut bytes = [0; LENGTH];
            bytes[..start.len()].copy_from_slice(&start);
            if ours {
                bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[4] = VERSION;
                bytes[5] %= 9;
            }
            // Read or not, it does not panic; and what was read can be said.
            if let Some(message) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&message.encode()).map(|again| again.id), Some(message.id));
            }
        }
    }

    #[test]
    fn owners_keys_are_like_no_other() {
        assert!(is_owners(OWNERS_KEY) && is_owners(OWNERS_KEY | 0xffff_ffff));
        assert!(!is_owners(0) && !is_owners(u64::MAX) && !is_owners(0x1_0000_0001));
    }
}
