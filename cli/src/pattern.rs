//! Bytes that differ for every place and round, so that stale or misplaced ones are seen.

use mooncake_efa::fabric::Buffer;

const CHUNK: u64 = 1 << 20;

/// The byte that belongs at `offset` in round `seed`.
fn byte(seed: u64, offset: u64) -> u8 {
    let word = (offset ^ seed.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word >> 56) as u8
}

/// Ranges of at most [`CHUNK`] bytes that make up `0..length`.
fn chunks(length: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..length).step_by(CHUNK as usize).map(move |start| (start, CHUNK.min(length - start)))
}

/// Fills the first `length` bytes of a buffer.
pub fn fill(buffer: &Buffer, length: u64, seed: u64) {
    let mut bytes = vec![0; CHUNK as usize];
    for (start, count) in chunks(length) {
        let part = &mut bytes[..count as usize];
        for (at, slot) in (start..).zip(part.iter_mut()) {
            *slot = byte(seed, at);
        }
        buffer.write(start, part);
    }
}

/// Checks the first `length` bytes of a buffer: the first wrong one, with what it should be and is.
pub fn check(buffer: &Buffer, length: u64, seed: u64) -> Result<(), (u64, u8, u8)> {
    let mut bytes = vec![0; CHUNK as usize];
    for (start, count) in chunks(length) {
        let part = &mut bytes[..count as usize];
        buffer.read(start, part);
        for (at, &found) in (start..).zip(part.iter()) {
            let expected = byte(seed, at);
            if found != expected {
                return Err((at, expected, found));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_is_found() {
        let length = CHUNK + 77;
        let buffer = Buffer::new(length).expect("mapped");
        fill(&buffer, length, 3);
        assert_eq!(check(&buffer, length, 3), Ok(()));
        assert!(check(&buffer, length, 4).is_err());
        let right = byte(3, CHUNK + 5);
        buffer.write(CHUNK + 5, &[!right]);
        assert_eq!(check(&buffer, length, 3), Err((CHUNK + 5, right, !right)));
    }
}
