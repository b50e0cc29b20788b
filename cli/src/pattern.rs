//! Bytes that differ for every place and round, so that stale or misplaced ones are seen.

use std::ops::Range;

use mooncake_efa::Result;

use crate::memory::Buffer;

const CHUNK: u64 = 1 << 20;

/// The byte that belongs at `offset` in round `seed`.
fn byte(seed: u64, offset: u64) -> u8 {
    let word = (offset ^ seed.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word >> 56) as u8
}

/// A byte that is not what it should be.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which of the buffers.
    pub buffer: usize,
    pub offset: u64,
    pub expected: u8,
    pub found: u8,
}

/// Parts of at most [`CHUNK`] bytes that make up a range: start and length.
fn chunks(range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let end = range.end;
    range.step_by(CHUNK as usize).map(move |start| (start, CHUNK.min(end - start)))
}

/// Fills ranges of a buffer.
///
/// # Errors
/// CUDA's, if the buffer is a GPU's.
pub fn fill(
    buffer: &Buffer,
    ranges: impl IntoIterator<Item = Range<u64>>,
    seed: u64,
) -> Result<()> {
    let mut bytes = vec![0; CHUNK as usize];
    for (start, count) in ranges.into_iter().flat_map(chunks) {
        let part = &mut bytes[..count as usize];
        for (at, slot) in (start..).zip(part.iter_mut()) {
            *slot = byte(seed, at);
        }
        buffer.write(start, part)?;
    }
    Ok(())
}

/// Checks ranges of a buffer: the first wrong byte.
///
/// # Errors
/// As [`fill`].
pub fn check(
    buffer: &Buffer,
    ranges: impl IntoIterator<Item = Range<u64>>,
    seed: u64,
) -> Result<Option<Wrong>> {
    let mut bytes = vec![0; CHUNK as usize];
    for (start, count) in ranges.into_iter().flat_map(chunks) {
        let part = &mut bytes[..count as usize];
        buffer.read(start, part)?;
        for (at, &found) in (start..).zip(part.iter()) {
            let expected = byte(seed, at);
            if found != expected {
                return Ok(Some(Wrong { buffer: 0, offset: at, expected, found }));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::iter::once;

    use super::*;

    #[test]
    fn one_wrong_byte_is_found() {
        let length = CHUNK + 77;
        let all = || once(0..length);
        let buffer = Buffer::host(length).expect("mapped");
        fill(&buffer, all(), 3).expect("host memory");
        assert_eq!(check(&buffer, all(), 3).expect("host memory"), None);
        assert!(check(&buffer, all(), 4).expect("host memory").is_some());
        let expected = byte(3, CHUNK + 5);
        buffer.write(CHUNK + 5, &[!expected]).expect("inside");
        let wrong = Wrong { buffer: 0, offset: CHUNK + 5, expected, found: !expected };
        assert_eq!(check(&buffer, all(), 3).expect("host memory"), Some(wrong));
    }
}
