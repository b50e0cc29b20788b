//! Room in the NICs' page tables. An EFA device translates registered memory by a table of its own, and a
//! region that does not fit is refused; so a large buffer goes to the NICs that have room, or is shared
//! out among them.

use crate::error::{Code, Error, Result};

/// Entries of one EFA NIC's table that are counted on. Mooncake's C++ transport counts on about as many
/// (`kDefaultMaxPteEntries`, 22 Mi, of roughly 24 million).
pub(super) const ENTRIES: u64 = 22_000_000;

/// Where a buffer is to be registered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub rails: Vec<u16>,
    /// In how many parts, each on its share of the rails; 1: all of it on each.
    pub shares: u64,
}

/// Entries left, by rail.
#[derive(Clone, Debug)]
pub(super) struct Tables(Vec<u64>);

impl Tables {
    pub fn new(rails: usize, entries: u64) -> Self {
        Self(vec![entries; rails])
    }

    /// A place among `rails` for memory of so many pages: whole on all rails that have room for it, or else
    /// in as few parts as fit.
    ///
    /// # Errors
    /// [`Code::Memory`] if there is none.
    pub fn place(&self, pages: u64, rails: &[u16]) -> Result<Place> {
        for shares in 1..=rails.len().max(1) as u64 {
            let part = part(pages, shares);
            let room = |rail: &u16| self.0[usize::from(*rail)] >= part;
            let rails: Vec<u16> = rails.iter().copied().filter(room).collect();
            if rails.len() as u64 >= shares && !rails.is_empty() {
                return Ok(Place { rails, shares });
            }
        }
        let left: u64 = rails.iter().map(|&rail| self.0[usize::from(rail)]).sum();
        Err(Error::new(
            Code::Memory,
            format!(
                "memory of {pages} pages does not fit into the page tables of {} NICs, which have \
                 {left} entries left: back it by huge pages, or register less",
                rails.len()
            ),
        ))
    }

    /// Memory of so many pages is registered on a rail.
    pub fn take(&mut self, rail: usize, pages: u64) {
        self.0[rail] = self.0[rail].saturating_sub(pages);
    }

    /// It is no more.
    pub fn give_back(&mut self, rail: usize, pages: u64) {
        self.0[rail] += pages;
    }
}

/// Pages of each of so many parts of memory, which may touch one page more at its end.
pub(super) fn part(pages: u64, shares: u64) -> u64 {
    pages.div_ceil(shares) + u64::from(shares > 1)
}

/// Pages of `page` bytes that a range touches.
pub(super) fn spanned(address: u64, length: u64, page: u64) -> u64 {
    (address + length).div_ceil(page) - address / page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_where_there_is_room() {
        let mut tables = Tables::new(4, 100);
        let place = |tables: &Tables, pages| tables.place(pages, &[2, 3, 0, 1]);
        let all = Place { rails: vec![2, 3, 0, 1], shares: 1 };
        assert_eq!(place(&tables, 100).unwrap(), all);
        assert_eq!(place(&tables, 101).unwrap(), Place { shares: 2, ..all });
        tables.take(3, 60);
        let three = Place { rails: vec![2, 0, 1], shares: 1 };
        assert_eq!(place(&tables, 41).unwrap(), three, "narrowed");
        assert_eq!(place(&tables, 40).unwrap().rails.len(), 4);
        assert_eq!(place(&tables, 198).unwrap(), Place { shares: 2, ..three });
        let error = place(&tables, 390).unwrap_err();
        assert_eq!(error.code, Code::Memory);
        assert!(error.text.contains("340 entries left: back it by huge pages"), "{error}");
        assert!(tables.place(101, &[3]).is_err());
        tables.give_back(3, 60);
        assert_eq!(place(&tables, 390).unwrap().shares, 4);
    }

    #[test]
    fn pages_are_those_touched() {
        assert_eq!(spanned(4095, 2, 4096), 2);
        assert_eq!(spanned(4096, 4096, 4096), 1);
    }
}
