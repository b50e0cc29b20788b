//! Registered memory, ours and our peers': which region is an address in, and what is it called on
//! which NIC.

use std::sync::Arc;

use super::table::Table;
use crate::sync::{AtomicI64, Ordering};

/// A local region: one registration, on some or all rails.
#[derive(Clone, Debug)]
pub(super) struct LocalRegion {
    pub start: u64,
    pub end: u64,
    /// Its number, at every NIC and in [`Users`].
    pub number: Number,
    /// Rails that pieces of it are sent over: those it is registered on, and of these only the ones
    /// nearest to the memory. Never empty.
    pub rails: Arc<[u16]>,
    /// As in [`Registration`](super::Registration).
    pub merge: u64,
}

/// A remote region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteRegion {
    pub start: u64,
    pub end: u64,
    /// (NIC of the peer, key), nearest to the memory first. Never empty.
    pub keys: Box<[(u16, u64)]>,
}

impl RemoteRegion {
    /// The peer's NIC that `rail` uses, and the key there. Rails meet the peer's NICs in the same order, so
    /// that neighbours do not crowd on one.
    pub fn key(&self, rail: usize) -> (u16, u64) {
        self.keys[rail % self.keys.len()]
    }

    /// All of them, in the order in which this rail should use them.
    pub fn keys_from(&self, rail: usize) -> impl Iterator<Item = (u16, u64)> {
        let (before, from) = self.keys.split_at(rail % self.keys.len());
        from.iter().chain(before).copied()
    }
}

/// A range that can be searched for.
pub(super) trait Range {
    fn start(&self) -> u64;
    fn end(&self) -> u64;
}

impl Range for LocalRegion {
    fn start(&self) -> u64 {
        self.start
    }
    fn end(&self) -> u64 {
        self.end
    }
}

impl Range for RemoteRegion {
    fn start(&self) -> u64 {
        self.start
    }
    fn end(&self) -> u64 {
        self.end
    }
}

/// log2 of the most ranges of a chunk.
const CHUNK_BITS: u32 = 9;
const CHUNK: usize = 1 << CHUNK_BITS;

/// Ranges sorted by start, to be shared and replaced as a whole. A changed copy shares all chunks of
/// ranges that have not changed, so that a change costs about the same however many ranges there are.
#[derive(Clone, Debug)]
pub(super) struct RangeMap<R> {
    /// None is empty.
    chunks: Vec<Arc<[R]>>,
    /// Each chunk's first start.
    starts: Vec<u64>,
    /// Each chunk's highest end, and the highest of it and all before it: where it is no use to look on.
    ends: Vec<(u64, u64)>,
}

impl<R> Default for RangeMap<R> {
    fn default() -> Self {
        Self { chunks: Vec::new(), starts: Vec::new(), ends: Vec::new() }
    }
}

impl<R: Range + Clone> RangeMap<R> {
    pub fn new(ranges: Vec<R>) -> Self {
        Self::default().with(ranges)
    }

    /// With these ranges too.
    pub fn with(&self, mut added: Vec<R>) -> Self {
        added.sort_by_key(Range::start);
        let mut rest = added.as_slice();
        let mut new = Self::default();
        for (index, chunk) in self.chunks.iter().enumerate() {
            let here = match self.starts.get(index + 1) {
                Some(&next) => rest.partition_point(|range| range.start() < next),
                None => rest.len(),
            };
            let (mine, others) = rest.split_at(here);
            rest = others;
            if mine.is_empty() {
                new.push(chunk.clone(), self.ends[index].0);
            } else {
                let mut merged = [chunk, mine].concat();
                merged.sort_by_key(Range::start);
                new.extend(&merged);
            }
        }
        new.extend(rest);
        new
    }

    /// Without the ranges that start here; sorted.
    pub fn without(&self, starts: &[u64]) -> Self {
        let mut new = Self::default();
        let mut touched = vec![false; self.chunks.len()];
        for start in starts {
            let after = self.starts.partition_point(|first| first <= start);
            touched[..after].last_mut().into_iter().for_each(|touched| *touched = true);
        }
        for (index, chunk) in self.chunks.iter().enumerate() {
            if touched[index] {
                let left = |range: &&R| starts.binary_search(&range.start()).is_err();
                let left: Vec<R> = chunk.iter().filter(left).cloned().collect();
                new.extend(&left);
            } else {
                new.push(chunk.clone(), self.ends[index].0);
            }
        }
        new
    }

    /// Appends ranges, sorted and after all others, in chunks; with the last one there is if both are
    /// small, so that removals do not leave many small ones.
    fn extend(&mut self, ranges: &[R]) {
        if ranges.is_empty() {
            return;
        }
        if let Some(last) = self.chunks.last_mut() {
            if last.len() + ranges.len() <= CHUNK / 2 {
                *last = [last, ranges].concat().into();
                let (own, all) = self.ends.last_mut().expect("one a chunk");
                *own = highest(ranges).max(*own);
                *all = (*own).max(*all);
                return;
            }
        }
        let parts = ranges.len().div_ceil(CHUNK);
        for part in ranges.chunks(ranges.len().div_ceil(parts)) {
            self.push(part.into(), highest(part));
        }
    }

    fn push(&mut self, chunk: Arc<[R]>, end: u64) {
        let before = self.ends.last().map_or(0, |&(_, all)| all);
        self.ends.push((end, end.max(before)));
        self.starts.push(chunk[0].start());
        self.chunks.push(chunk);
    }

    /// The range that holds `address`. `hint` is where the last look-up ended: requests come in
    /// runs, so it mostly hits.
    pub fn find(&self, address: u64, hint: &mut usize) -> Option<&R> {
        let holds = |range: &&R| range.start() <= address && address < range.end();
        if let Some(range) = self.get(*hint).filter(holds) {
            return Some(range);
        }
        // A peer's ranges may overlap, so the nearest start need not be the one that holds it.
        let chunks = self.starts.partition_point(|&start| start <= address);
        for (index, chunk) in self.chunks[..chunks].iter().enumerate().rev() {
            if self.ends[index].1 <= address {
                return None;
            }
            let after = chunk.partition_point(|range| range.start() <= address);
            if let Some(offset) = chunk[..after].iter().rposition(|range| holds(&range)) {
                *hint = index << CHUNK_BITS | offset;
                return Some(&chunk[offset]);
            }
        }
        None
    }

    fn get(&self, index: usize) -> Option<&R> {
        self.chunks.get(index >> CHUNK_BITS)?.get(index & (CHUNK - 1))
    }

    /// The range that [`Self::find`] left its hint at.
    pub fn at(&self, index: usize) -> &R {
        &self.chunks[index >> CHUNK_BITS][index & (CHUNK - 1)]
    }

    pub fn iter(&self) -> impl Iterator<Item = &R> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }
}

/// The highest end of some ranges.
fn highest<R: Range>(ranges: &[R]) -> u64 {
    ranges.iter().map(Range::end).max().unwrap_or(0)
}

/// A local region's number. Numbers are used again; the generation tells whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number {
    pub index: u32,
    generation: u32,
}

/// How many pieces under way use each local region, and whether it is closing.
#[derive(Default)]
pub(super) struct Users(Table<AtomicI64>);

/// A closed region's count: no piece can enter any more.
const CLOSED: i64 = i64::MIN / 2;

impl Users {
    /// A number for a new region, which is closed; `None` when there are no more.
    pub fn reserve(&self) -> Option<Number> {
        let (index, generation) = self.0.take(|| AtomicI64::new(CLOSED))?;
        Some(Number { index, generation })
    }

    /// One more piece uses the region; false if it is closing or gone.
    pub fn enter(&self, number: Number) -> bool {
        let users = self.count(number.index);
        if users.fetch_add(1, Ordering::AcqRel) >= 0
            && self.0.get(number.index, number.generation).is_some()
        {
            return true;
        }
        users.fetch_sub(1, Ordering::Release);
        false
    }

    /// More pieces, on behalf of one that is inside.
    pub fn enter_more(&self, index: u32, pieces: u32) {
        self.count(index).fetch_add(i64::from(pieces), Ordering::Relaxed);
    }

    /// Some pieces less.
    pub fn leave(&self, index: u32, pieces: u32) {
        self.count(index).fetch_sub(i64::from(pieces), Ordering::Release);
    }

    /// Closes the region if nothing uses it; otherwise the count of pieces that do.
    pub fn close(&self, number: Number) -> Result<(), i64> {
        self.count(number.index)
            .compare_exchange(0, CLOSED, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// Opens a region that is closed.
    pub fn open(&self, number: Number) {
        // No store: someone who came too late for the number's last region may be on his way out.
        self.count(number.index).fetch_sub(CLOSED, Ordering::AcqRel);
    }

    /// Ends the number's use by its region, which is closed.
    pub fn give_back(&self, number: Number) {
        if self.0.retire(number.index, number.generation) {
            self.0.give_back(number.index);
        }
    }

    fn count(&self, index: u32) -> &AtomicI64 {
        self.0.at(index).expect("numbers come from open()")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, end: u64) -> RemoteRegion {
        RemoteRegion { start, end, keys: Box::new([(0, 1)]) }
    }

    #[test]
    fn finds_what_holds_an_address() {
        let map = RangeMap::new(vec![region(100, 200), region(0, 50), region(120, 130)]);
        let starts = |address| map.find(address, &mut 0).map(|range| range.start);
        assert_eq!(starts(0), Some(0));
        assert_eq!(starts(49), Some(0));
        assert_eq!(starts(50), None);
        assert_eq!(starts(125), Some(120));
        assert_eq!(starts(199), Some(100), "past an overlapping shorter one");
        assert_eq!(starts(200), None);
        let mut hint = 7;
        assert!(map.find(150, &mut hint).is_some());
        assert!(map.find(151, &mut hint).is_some());
        assert!(map.find(10, &mut hint).is_some(), "a wrong hint is only slower");
    }

    #[test]
    fn a_change_leaves_what_it_does_not_touch() {
        const MANY: u64 = 100_000;
        let all = RangeMap::new((0..MANY).map(|at| region(at * 10, at * 10 + 8)).collect());
        let shared = |a: &RangeMap<RemoteRegion>, b: &RangeMap<RemoteRegion>| {
            let of_b = |chunk| b.chunks.iter().any(|other| Arc::ptr_eq(chunk, other));
            a.chunks.iter().filter(|chunk| of_b(chunk)).count()
        };
        let more = all.with(vec![region(500_008, 500_010)]);
        assert!(shared(&all, &more) + 1 >= all.chunks.len(), "one chunk at most is copied");
        assert!(more.find(500_009, &mut 0).is_some() && all.find(500_009, &mut 0).is_none());
        let less = more.without(&[500_008]);
        assert!(shared(&less, &more) + 1 >= less.chunks.len());
        assert!(less.iter().eq(all.iter()));
        // One by one, in any order, and gone again.
        let mut map = RangeMap::default();
        let numbers = || (0..3000).map(|at| at * 7919 % 3000);
        for number in numbers() {
            map = map.with(vec![region(number * 10, number * 10 + 8)]);
        }
        assert_eq!(map.iter().count(), 3000);
        assert!(map.iter().is_sorted_by_key(|range| range.start));
        assert!(map.chunks.iter().all(|chunk| chunk.len() <= CHUNK));
        for number in numbers().take(2990) {
            let mut hint = 0;
            let found = map.find(number * 10 + 7, &mut hint).expect("there");
            assert_eq!((found.start, map.at(hint).start), (number * 10, number * 10));
            map = map.without(&[number * 10]);
            assert!(map.find(number * 10, &mut hint).is_none());
        }
        assert_eq!(map.iter().count(), 10);
        assert!(map.chunks.len() <= 10 && map.chunks.iter().all(|chunk| !chunk.is_empty()));
    }

    #[test]
    fn what_overlaps_is_found_and_what_is_missing_soon_known() {
        // One range over all, and small ones in between, added and removed in several ways.
        let small = |numbers: std::ops::Range<u64>| {
            numbers.map(|at| region(at * 10, at * 10 + 5)).collect::<Vec<_>>()
        };
        let mut map = RangeMap::new(small(1000..5000));
        map = map.with(vec![region(5, 100_000)]).with(small(0..1)).with(small(5000..5003));
        assert_eq!(map.find(49_997, &mut 0).map(|range| range.start), Some(5));
        assert_eq!(map.find(49_991, &mut 0).map(|range| range.start), Some(49_990));
        assert_eq!(map.find(100_000, &mut 0), None);
        map = map.without(&[5]);
        assert_eq!(map.find(49_997, &mut 0), None);
        assert_eq!(map.find(50_024, &mut 0).map(|range| range.start), Some(50_020));
        let mut all = 0;
        for (chunk, &(own, reach)) in map.chunks.iter().zip(&map.ends) {
            all = highest(chunk).max(all);
            assert_eq!((own, reach), (highest(chunk), all));
        }
        assert_eq!(map.ends.len(), map.chunks.len());
    }

    #[test]
    fn closing_and_using_exclude_each_other() {
        let users = Users::default();
        let number = users.reserve().expect("room");
        assert!(!users.enter(number), "not yet");
        users.open(number);
        assert!(users.enter(number));
        assert_eq!(users.close(number), Err(1));
        users.leave(number.index, 1);
        assert_eq!(users.close(number), Ok(()));
        assert!(!users.enter(number));
        assert!(users.close(number).is_err(), "closed once");
        users.open(number);
        assert!(users.enter(number));
    }

    #[test]
    fn a_number_used_again_is_another_region() {
        let users = Users::default();
        let old = users.reserve().expect("room");
        users.open(old);
        users.close(old).expect("unused");
        users.give_back(old);
        let new = users.reserve().expect("room");
        users.open(new);
        assert_eq!(new.index, old.index);
        assert!(!users.enter(old));
        assert!(users.enter(new));
        assert_eq!(users.close(new), Err(1), "the stale piece left no trace");
    }
}
