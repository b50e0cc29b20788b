//! Registered memory, ours and our peers': which region is an address in, and what is it called on
//! which NIC.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::table::Table;

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
}

/// A remote region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteRegion {
    pub start: u64,
    pub end: u64,
    /// (NIC of the peer, key), nearest to the memory first. Never empty.
    pub keys: Box<[(u16, u64)]>,
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

/// Ranges sorted by start, to be shared and replaced as a whole.
#[derive(Debug)]
pub(super) struct RangeMap<R>(Vec<R>);

impl<R> Default for RangeMap<R> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<R: Range> RangeMap<R> {
    pub fn new(mut ranges: Vec<R>) -> Self {
        ranges.sort_by_key(Range::start);
        Self(ranges)
    }

    /// The range that holds `address`. `hint` is where the last look-up ended: requests come in
    /// runs, so it mostly hits.
    pub fn find(&self, address: u64, hint: &mut usize) -> Option<&R> {
        let holds = |range: &&R| range.start() <= address && address < range.end();
        if let Some(range) = self.0.get(*hint).filter(holds) {
            return Some(range);
        }
        let after = self.0.partition_point(|range| range.start() <= address);
        // A peer's ranges may overlap, so the nearest start need not be the one that holds it.
        let index = self.0[..after].iter().rposition(|range| holds(&range))?;
        *hint = index;
        self.0.get(index)
    }

    /// The range that [`Self::find`] left its hint at.
    pub fn at(&self, index: usize) -> &R {
        &self.0[index]
    }

    pub fn iter(&self) -> impl Iterator<Item = &R> {
        self.0.iter()
    }
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
    /// A number for a new region; `None` when there are no more.
    pub fn open(&self) -> Option<Number> {
        let (index, generation) = self.0.take(AtomicI64::default)?;
        self.count(index).store(0, Ordering::Release);
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

    /// Undoes [`Self::close`].
    pub fn reopen(&self, number: Number) {
        self.count(number.index).fetch_sub(CLOSED, Ordering::AcqRel);
    }

    /// Ends the number's use by its region.
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
    fn closing_and_using_exclude_each_other() {
        let users = Users::default();
        let number = users.open().expect("room");
        assert!(users.enter(number));
        assert_eq!(users.close(number), Err(1));
        users.leave(number.index, 1);
        assert_eq!(users.close(number), Ok(()));
        assert!(!users.enter(number));
        assert!(users.close(number).is_err(), "closed once");
        users.reopen(number);
        assert!(users.enter(number));
    }

    #[test]
    fn a_number_used_again_is_another_region() {
        let users = Users::default();
        let old = users.open().expect("room");
        users.close(old).expect("unused");
        users.give_back(old);
        let new = users.open().expect("room");
        assert_eq!(new.index, old.index);
        assert!(!users.enter(old));
        assert!(users.enter(new));
        assert_eq!(users.close(new), Err(1), "the stale piece left no trace");
    }
}
