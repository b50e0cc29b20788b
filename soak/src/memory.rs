//! Memory of which every byte is known: what it should hold is kept beside it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use mooncake_efa::fabric::Buffer;

use crate::pattern::Pattern;

/// Memory that can be looked at and changed from here.
pub trait Bytes {
    /// Copies from `offset` on.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
    /// Copies to `offset`.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl Bytes for Arc<Buffer> {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        Buffer::read(self, offset, bytes);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Buffer::write(self, offset, bytes);
        Ok(())
    }
}

/// Memory of another process here, by the kernel: what is there is seen at once, with no help of that
/// process, and not by the way that is tested.
pub struct Foreign {
    memory: File,
    base: u64,
}

impl Foreign {
    /// That of process `pid` from address `base` on. An error once the process is gone, here or later.
    pub fn open(pid: u32, base: u64) -> io::Result<Self> {
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Self { memory, base })
    }
}

impl Bytes for Foreign {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(bytes, self.base + offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, self.base + offset)
    }
}

/// Bytes that are not as they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Offset of the first.
    pub at: u64,
    /// How many, in the range that was looked at.
    pub count: u64,
    /// Up to 8 bytes from the first on: as they should be.
    pub expected: Vec<u8>,
    /// As they are.
    pub found: Vec<u8>,
}

impl Wrong {
    fn between(start: u64, expected: &[u8], found: &[u8]) -> Option<Self> {
        if expected == found {
            return None;
        }
        let differ = |&at: &usize| expected[at] != found[at];
        let first = (0..expected.len()).find(differ)?;
        let count = (first..expected.len()).filter(differ).count() as u64;
        let some = first..expected.len().min(first + 8);
        Some(Self {
            at: start + first as u64,
            count,
            expected: expected[some.clone()].into(),
            found: found[some].into(),
        })
    }
}

/// Memory with what it should hold.
pub struct Known<B> {
    bytes: B,
    should: Vec<u8>,
    scratch: Vec<u8>,
}

fn range_of(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl<B: Bytes> Known<B> {
    /// The first `length` bytes, filled with a pattern.
    pub fn new(bytes: B, length: u64, pattern: Pattern) -> io::Result<Self> {
        Self::reusing(Vec::new(), bytes, length, pattern)
    }

    /// As [`Self::new`], with what another has left: see [`Self::leave`].
    pub fn reusing(
        mut should: Vec<u8>,
        bytes: B,
        length: u64,
        pattern: Pattern,
    ) -> io::Result<Self> {
        should.resize(length as usize, 0);
        let mut known = Self { bytes, should, scratch: Vec::new() };
        known.fill(0..length, pattern)?;
        Ok(known)
    }

    /// What was kept beside it, for the next: memory of that size that comes and goes would look like growth.
    pub fn leave(self) -> Vec<u8> {
        self.should
    }

    /// The memory itself.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// What a range should hold.
    pub fn should(&self, range: Range<u64>) -> &[u8] {
        &self.should[range_of(&range)]
    }

    /// Fills a range.
    pub fn fill(&mut self, range: Range<u64>, pattern: Pattern) -> io::Result<()> {
        let should = &mut self.should[range_of(&range)];
        pattern.fill(range.start, should);
        self.bytes.write(range.start, should)
    }

    /// Something else is to have written these bytes at `offset`.
    pub fn expect(&mut self, offset: u64, bytes: &[u8]) {
        self.should[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Looks at a range.
    pub fn check(&mut self, range: Range<u64>) -> io::Result<Option<Wrong>> {
        let length = (range.end - range.start) as usize;
        self.scratch.resize(length.max(self.scratch.len()), 0);
        let found = &mut self.scratch[..length];
        self.bytes.read(range.start, found)?;
        Ok(Wrong::between(range.start, &self.should[range_of(&range)], found))
    }

    /// Looks at a range in which each byte may be as it was or as `other` has it, and takes it as it is.
    pub fn settle(&mut self, offset: u64, other: &[u8]) -> io::Result<Option<Wrong>> {
        let mut found = vec![0; other.len()];
        self.bytes.read(offset, &mut found)?;
        let should = &mut self.should[offset as usize..][..other.len()];
        for (should, (&other, &found)) in should.iter_mut().zip(other.iter().zip(&found)) {
            if other == found {
                *should = other;
            }
        }
        let wrong = Wrong::between(offset, should, &found);
        should.copy_from_slice(&found);
        Ok(wrong)
    }

    /// Takes a range as it is.
    pub fn accept(&mut self, range: Range<u64>) -> io::Result<()> {
        self.bytes.read(range.start, &mut self.should[range_of(&range)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known<Arc<Buffer>> {
        let buffer = Buffer::new(4096).expect("mapped");
        Known::new(buffer, 4096, Pattern::new(1, 1, 1, 1)).expect("in memory")
    }

    #[test]
    fn one_wrong_byte_is_found() {
        let mut memory = known();
        assert_eq!(memory.check(0..4096).expect("in memory"), None);
        let right = memory.should(77..78)[0];
        memory.bytes.write(77, &[!right]).expect("in memory");
        let wrong = memory.check(0..4096).expect("in memory").expect("it is wrong");
        assert_eq!((wrong.at, wrong.count), (77, 1));
        assert_eq!((wrong.expected[0], wrong.found[0]), (right, !right));
        assert_eq!(memory.check(78..4096).expect("in memory"), None);
    }

    #[test]
    fn what_may_have_been_written_is_old_or_new() {
        let mut memory = known();
        let new = [1, 2, 3, 4];
        memory.bytes.write(10, &new[..2]).expect("in memory");
        assert_eq!(memory.settle(10, &new).expect("in memory"), None);
        assert_eq!(memory.should(10..12), &new[..2]);
        let neither = !memory.should(13..14)[0];
        memory.bytes.write(13, &[neither]).expect("in memory");
        let other = [0, 0, 0, neither ^ 1];
        assert_eq!(memory.settle(10, &other).expect("in memory").map(|it| it.at), Some(13));
    }

    #[test]
    fn memory_of_a_process_is_seen_from_outside() {
        let mut memory = known();
        let base = memory.bytes.address();
        let foreign = Foreign::open(std::process::id(), base).expect("ours");
        let mut foreign = Known::new(foreign, 8, Pattern::new(2, 2, 2, 2)).expect("writable");
        assert_eq!(foreign.check(0..8).expect("readable"), None);
        let mut here = [0; 8];
        memory.bytes.read(0, &mut here).expect("in memory");
        assert_eq!(foreign.should(0..8), here);
        assert_eq!(memory.check(8..4096).expect("in memory"), None);
    }
}
