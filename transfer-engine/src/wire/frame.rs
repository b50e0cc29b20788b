//! Frames, read as their bytes come.

use std::fmt;
use std::io::{self, ErrorKind, Read};

use super::Kind;

/// Bytes of a frame's length.
const HEADER: usize = 8;
/// Most bytes taken at a time, so that who sends much and fast is not the only one who is read.
const STEP: usize = 64 << 10;

/// One request or answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// `None`: the oldest form, which does not say, and is a [`Kind::Connection`].
    pub kind: Option<Kind>,
    /// JSON, if the other side keeps to the rules.
    pub text: String,
}

impl Frame {
    /// As it goes over the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        let kind = self.kind.map(|kind| kind as u8);
        let length = kind.iter().len() + self.text.len();
        let mut bytes = Vec::with_capacity(HEADER + length);
        bytes.extend((length as u64).to_ne_bytes());
        bytes.extend(kind);
        bytes.extend(self.text.as_bytes());
        bytes
    }

    fn new(mut body: Vec<u8>) -> Result<Self, Broken> {
        let kind = match body[0] {
            byte if usize::from(byte) < Kind::ALL.len() => {
                body.remove(0);
                Some(Kind::ALL[usize::from(byte)])
            }
            // What JSON can begin with, or nearly: whoever reads it will see.
            byte if byte.is_ascii_graphic() || byte.is_ascii_whitespace() => None,
            byte => return Err(Broken::Bad(format!("a frame of unknown kind {byte}"))),
        };
        match String::from_utf8(body) {
            Ok(text) => Ok(Self { kind, text }),
            Err(_) => Err(Broken::Bad("a frame that is not UTF-8".to_owned())),
        }
    }
}

/// Why a frame was not read.
#[derive(Debug)]
pub enum Broken {
    /// The connection was closed before the first byte.
    Nothing,
    /// The connection was closed before the last byte: how much came, in words.
    Cut(String),
    /// What came is no frame, or too long: what, in words.
    Bad(String),
    /// The connection broke, or its time was up.
    Io(io::Error),
}

impl fmt::Display for Broken {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => to.write_str("nothing came"),
            Self::Cut(what) | Self::Bad(what) => to.write_str(what),
            Self::Io(why) => why.fmt(to),
        }
    }
}

/// Reads one frame. Room is taken for what has come, whatever length is announced.
#[derive(Debug)]
pub struct Reader {
    most: usize,
    /// At first less than [`HEADER`] bytes.
    header: Vec<u8>,
    body: Vec<u8>,
}

impl Reader {
    /// For a frame whose length (of what follows it) is `most` bytes at most.
    pub fn new(most: usize) -> Self {
        Self { most, header: Vec::new(), body: Vec::new() }
    }

    /// Reads some of what is there: `None` if more has to come, whether it is there already or not. Never takes what
    /// is behind the frame. Not to be called again after that or an error.
    ///
    /// # Errors
    /// What is wrong with it. Would-block errors are none.
    pub fn read(&mut self, from: &mut impl Read) -> Result<Option<Frame>, Broken> {
        if !self.fill_header(from)? {
            return Ok(None);
        }
        let length = self.length()?;
        match fill(from, &mut self.body, length) {
            Ok(true) => Frame::new(std::mem::take(&mut self.body)).map(Some),
            Ok(false) => Ok(None),
            Err(why) if why.kind() == ErrorKind::UnexpectedEof => {
                let came = self.body.len();
                Err(Broken::Cut(format!("{came} of a frame's {length} bytes, then the end")))
            }
            Err(why) => Err(Broken::Io(why)),
        }
    }

    fn fill_header(&mut self, from: &mut impl Read) -> Result<bool, Broken> {
        fill(from, &mut self.header, HEADER).map_err(|why| match (why.kind(), self.header.len()) {
            (ErrorKind::UnexpectedEof, 0) => Broken::Nothing,
            (ErrorKind::UnexpectedEof, came) => {
                Broken::Cut(format!("{came} of the {HEADER} bytes of a length, then the end"))
            }
            _ => Broken::Io(why),
        })
    }

    /// The announced length, if it is one that is taken.
    fn length(&self) -> Result<usize, Broken> {
        let mut bytes = [0; HEADER];
        bytes.copy_from_slice(&self.header);
        let (length, most) = (u64::from_ne_bytes(bytes), self.most);
        match usize::try_from(length) {
            Ok(0) => Err(Broken::Bad("a frame of no bytes".to_owned())),
            Ok(length) if length <= most => Ok(length),
            _ => Err(Broken::Bad(format!("a frame of {length} bytes, at most {most} are taken"))),
        }
    }

    /// Bytes of memory it holds.
    pub fn held(&self) -> usize {
        self.body.capacity()
    }
}

/// Reads until `into` has `whole` bytes, but not more than a step: whether it has.
fn fill(from: &mut impl Read, into: &mut Vec<u8>, whole: usize) -> io::Result<bool> {
    let most = STEP.min(whole - into.len());
    // Grows with what comes.
    match from.take(most as u64).read_to_end(into) {
        Ok(came) if came < most => Err(ErrorKind::UnexpectedEof.into()),
        Err(why) if why.kind() != ErrorKind::WouldBlock => Err(why),
        _ => Ok(into.len() == whole),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 1000;

    /// What comes as so many bytes at a time, and then nothing for now, or the end.
    struct Parts<'a> {
        bytes: &'a [u8],
        size: usize,
        ends: bool,
    }

    impl Read for Parts<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.bytes.is_empty() && !self.ends {
                return Err(ErrorKind::WouldBlock.into());
            }
            let most = into.len().min(self.size);
            self.bytes.read(&mut into[..most])
        }
    }

    fn read(bytes: &[u8], size: usize, ends: bool) -> Result<Option<Frame>, Broken> {
        let mut reader = Reader::new(MOST);
        let mut parts = Parts { bytes, size, ends };
        loop {
            match reader.read(&mut parts) {
                // There was more, but it takes a step at a time.
                Ok(None) if ends || !parts.bytes.is_empty() => {}
                result => return result,
            }
        }
    }

    fn raw(length: u64, body: &[u8]) -> Vec<u8> {
        [&length.to_ne_bytes(), body].concat()
    }

    fn refused(bytes: &[u8], what: &str) {
        for size in [1, 9, usize::MAX] {
            let error = read(bytes, size, true).expect_err(what);
            assert!(error.to_string().contains(what), "{error}, not: {what}");
        }
    }

    #[test]
    fn frames_have_mooncakes_form() {
        let text = String::from(r#"{"a":1}"#);
        let frame = Frame { kind: Some(Kind::Notify), text: text.clone() };
        assert_eq!(frame.to_bytes(), b"\x08\0\0\0\0\0\0\0\x02{\"a\":1}");
        assert_eq!(Frame { kind: None, text }.to_bytes(), b"\x07\0\0\0\0\0\0\0{\"a\":1}");
    }

    #[test]
    fn every_form_is_read_in_parts_of_every_size() {
        let kinds = Kind::ALL.map(Some).into_iter().chain([None]);
        for (kind, text) in kinds.flat_map(|kind| {
            ["{}", "[1, 2]", " \n{\"a\": \"\u{e9}\"}\n", "no JSON", "x"].map(|text| (kind, text))
        }) {
            let frame = Frame { kind, text: text.to_owned() };
            let bytes = frame.to_bytes();
            for size in 1..=bytes.len() {
                assert_eq!(read(&bytes, size, true).unwrap().as_ref(), Some(&frame));
                for came in 0..bytes.len() {
                    assert_eq!(read(&bytes[..came], size, false).unwrap(), None);
                }
            }
        }
        let empty = Frame { kind: Some(Kind::Probe), text: String::new() };
        assert_eq!(read(&empty.to_bytes(), 1, true).unwrap(), Some(empty));
    }

    #[test]
    fn the_longest_is_read_and_one_that_is_longer_refused() {
        let frame = |length| Frame { kind: Some(Kind::Metadata), text: "x".repeat(length) };
        let longest = frame(MOST - 1);
        assert_eq!(read(&longest.to_bytes(), 7, true).unwrap(), Some(longest));
        refused(&frame(MOST).to_bytes(), "a frame of 1001 bytes, at most 1000 are taken");
        refused(&raw(1 << 63, b"{}"), "a frame of 9223372036854775808 bytes");
        refused(&raw(u64::MAX, b"{}"), "a frame of 18446744073709551615 bytes");
        refused(b"HTTP/1.1 400 Bad Request\r\n", "a frame of 35");
    }

    #[test]
    fn no_room_is_taken_for_what_is_only_announced() {
        let bytes = raw(1 << 40, &[b' '; 5000]);
        let mut reader = Reader::new(1 << 41);
        let mut parts = Parts { bytes: &bytes, size: usize::MAX, ends: false };
        assert_eq!(reader.read(&mut parts).unwrap(), None);
        assert!(parts.bytes.is_empty());
        assert!((5000..5000 * 4).contains(&reader.held()), "{}", reader.held());
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        refused(&raw(0, b""), "a frame of no bytes");
        refused(&raw(3, b"\x04{}"), "unknown kind 4");
        refused(&raw(3, b"\xfe{}"), "unknown kind 254");
        refused(&raw(4, b"\x00\"\xff\""), "not UTF-8");
        refused(&raw(1, b""), "0 of a frame's 1 bytes");
        refused(&raw(5, b"\x01{}"), "3 of a frame's 5 bytes");
        refused(b"\x05\0", "2 of the 8 bytes of a length");
        assert!(matches!(read(b"", 1, true), Err(Broken::Nothing)));
    }

    #[test]
    fn what_is_behind_a_frame_is_left_there() {
        let frame = Frame { kind: None, text: "{}".to_owned() };
        let bytes = [frame.to_bytes(), frame.to_bytes()].concat();
        let mut from = &bytes[..];
        assert_eq!(Reader::new(MOST).read(&mut from).unwrap().as_ref(), Some(&frame));
        assert_eq!(from, frame.to_bytes());
    }

    #[test]
    fn a_long_one_is_taken_step_by_step() {
        let frame = Frame { kind: None, text: "x".repeat(3 * STEP) };
        let bytes = frame.to_bytes();
        let mut reader = Reader::new(bytes.len());
        let mut from = &bytes[..];
        assert_eq!(reader.read(&mut from).unwrap(), None);
        assert_eq!(from.len(), 2 * STEP);
        assert_eq!(reader.read(&mut from).unwrap(), None);
        assert_eq!(reader.read(&mut from).unwrap(), Some(frame));
    }
}
