//! Bytes that differ for every round and place, so that stale or misplaced ones are seen.

/// Endless bytes that follow from a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    key: u64,
}

impl Pattern {
    /// That of a round of a lane; `what` tells several of one round apart.
    pub fn new(seed: u64, lane: u64, round: u64, what: u64) -> Self {
        Self { key: [seed, lane, round, what].into_iter().fold(0, mix) }
    }

    fn word(self, index: u64) -> [u8; 8] {
        let word = (self.key ^ index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (word ^ (word >> 32)).to_le_bytes()
    }

    /// The bytes from `offset` on.
    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        let skip = (offset % 8) as usize;
        let head = if skip == 0 { 0 } else { (8 - skip).min(bytes.len()) };
        let (first, rest) = bytes.split_at_mut(head);
        first.copy_from_slice(&self.word(offset / 8)[skip..][..head]);
        let mut index = (offset + head as u64) / 8;
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.word(index));
            index += 1;
        }
        let last = words.into_remainder();
        last.copy_from_slice(&self.word(index)[..last.len()]);
    }
}

fn mix(state: u64, value: u64) -> u64 {
    let mut x = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_as_the_whole_has_it() {
        let pattern = Pattern::new(1, 2, 3, 4);
        let mut whole = vec![0; 100];
        pattern.fill(0, &mut whole);
        for offset in 0..20 {
            for length in 0..40 {
                let mut part = vec![0; length];
                pattern.fill(offset as u64, &mut part);
                assert_eq!(part, whole[offset..offset + length]);
            }
        }
    }

    #[test]
    fn rounds_differ_almost_everywhere() {
        let (mut one, mut other) = (vec![0; 4096], vec![0; 4096]);
        Pattern::new(7, 0, 1, 0).fill(0, &mut one);
        Pattern::new(7, 0, 2, 0).fill(0, &mut other);
        let same = one.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(same < 100, "{same} of 4096 bytes are the same");
    }
}
