//! Slots with generations: made once, found by index without a lock, used again after a release.

use std::hash::{BuildHasher, RandomState};

use crate::sync::{AtomicU32, Mutex, OnceLock, Ordering};

// What loom follows costs it time for every order: few slots there.
const FIRST_CHUNK: u32 = if cfg!(loom) { 2 } else { 64 };
const CHUNKS: usize = if cfg!(loom) { 2 } else { 20 }; // 64 * (2^20 - 1): about 67 million slots

struct Entry<T> {
    /// Odd while in use. A handle carries the generation it was given out with, so one that is
    /// stale or made up finds nothing.
    generation: AtomicU32,
    value: T,
}

/// An append-only table of recycled `T`s. Values are shared, so they must be made of atomics.
pub struct Table<T> {
    chunks: [OnceLock<Box<[Entry<T>]>>; CHUNKS],
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    indexes: Vec<u32>,
    made: u32,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { chunks: std::array::from_fn(|_| OnceLock::new()), free: Mutex::default() }
    }
}

/// Which chunk, and where in it: chunk k holds `64 << k` entries.
fn place(index: u32) -> (usize, usize) {
    let bucket = index / FIRST_CHUNK + 1;
    let chunk = bucket.ilog2();
    (chunk as usize, (index - FIRST_CHUNK * ((1 << chunk) - 1)) as usize)
}

impl<T> Table<T> {
    /// Takes a slot: its index and generation. `make` fills a chunk of new slots when none is free.
    /// `None` when the table is full.
    pub fn take(&self, make: impl Fn() -> T) -> Option<(u32, u32)> {
        let mut free = self.free.lock();
        let index = match free.indexes.pop() {
            Some(index) => index,
            None => {
                let index = free.made;
                let (chunk, _) = place(index);
                let size = FIRST_CHUNK << chunk;
                self.chunks.get(chunk)?.get_or_init(|| {
                    (0..size)
                        .map(|_| Entry { generation: AtomicU32::new(0), value: make() })
                        .collect()
                });
                free.made += size;
                // Lowest index last, so that it is taken first; and room for all, so that giving
                // back never allocates.
                let made = free.made as usize;
                let had = free.indexes.len();
                free.indexes.reserve(made - had);
                free.indexes.extend((index + 1..index + size).rev());
                index
            }
        };
        drop(free);
        let entry = self.entry(index)?;
        let generation = entry.generation.load(Ordering::Relaxed).wrapping_add(1);
        entry.generation.store(generation, Ordering::Release);
        Some((index, generation))
    }

    /// The value in use under this index and generation.
    pub fn get(&self, index: u32, generation: u32) -> Option<&T> {
        let entry = self.entry(index)?;
        (generation % 2 == 1 && entry.generation.load(Ordering::Acquire) == generation)
            .then_some(&entry.value)
    }

    /// The value at an index, whoever has it: for holders of a counted reference.
    pub fn at(&self, index: u32) -> Option<&T> {
        self.entry(index).map(|entry| &entry.value)
    }

    /// Ends this generation's use: handles to it find nothing from now on. True for the one caller
    /// who ended it; that one calls [`Self::give_back`] once nothing refers to the slot.
    pub fn retire(&self, index: u32, generation: u32) -> bool {
        generation % 2 == 1
            && self.entry(index).is_some_and(|entry| {
                entry
                    .generation
                    .compare_exchange(
                        generation,
                        generation.wrapping_add(1),
                        Ordering::AcqRel,
                        Ordering::Relaxed,
                    )
                    .is_ok()
            })
    }

    /// Makes a retired slot available again.
    pub fn give_back(&self, index: u32) {
        self.free.lock().indexes.push(index);
    }

    /// All values, in use or not.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().map_while(OnceLock::get).flatten().map(|entry| &entry.value)
    }

    fn entry(&self, index: u32) -> Option<&Entry<T>> {
        let (chunk, offset) = place(index);
        self.chunks.get(chunk)?.get()?.get(offset)
    }
}

/// Makes the numbers that callers see of places in one engine's tables, and the other way round. Every
/// engine has a seal of its own, so that a number of another one names a place that is not in use: that
/// the 32 bits of the generation fit by chance too is as good as impossible.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Seal(u64);

impl Seal {
    /// Set in every seal, and not all of them in any index: no number is 0. (A batch's index has its size
    /// class there, which is 20 at most.)
    const NEVER_ZERO: u64 = 0b11111 << 27;

    pub fn new() -> Self {
        Self(RandomState::new().hash_one(0) | Self::NEVER_ZERO)
    }

    /// The number of a place.
    pub fn number(self, index: u32, generation: u32) -> u64 {
        self.0 ^ (u64::from(generation) << 32 | u64::from(index))
    }

    /// Index and generation. Any number has some; whether they are in use is for the table to say.
    pub fn place(self, number: u64) -> (u32, u32) {
        let raw = number ^ self.0;
        (raw as u32, (raw >> 32) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_dense() {
        let mut expected = (0, 0);
        for index in 0..100_000 {
            assert_eq!(place(index), expected);
            expected.1 += 1;
            if expected.1 == (64 << expected.0) as usize {
                expected = (expected.0 + 1, 0);
            }
        }
    }

    #[test]
    fn a_stale_handle_finds_nothing() {
        let table = Table::<AtomicU32>::default();
        let make = || AtomicU32::new(0);
        let (index, generation) = table.take(make).expect("room");
        assert!(table.get(index, generation).is_some());
        assert!(table.get(index, generation + 2).is_none());
        assert!(table.get(index, 0).is_none());
        assert!(table.get(u32::MAX, 1).is_none());
        assert!(table.retire(index, generation));
        assert!(!table.retire(index, generation), "only one caller retires");
        assert!(table.get(index, generation).is_none());
        table.give_back(index);
        let again = table.take(make).expect("room");
        assert_eq!(again.0, index);
        assert_ne!(again.1, generation);
        assert!(table.get(index, generation).is_none());
        assert_eq!(table.iter().count(), 64);
    }

    #[test]
    fn a_number_belongs_to_its_seal() {
        let (ours, theirs) = (Seal::new(), Seal::new());
        let number = ours.number(5, 7);
        assert_eq!(ours.place(number), (5, 7));
        assert!(ours.place(0).0 >> 27 == 31, "0 is no place");
        assert_ne!(theirs.place(number).1, 7);
    }

    #[test]
    fn grows_past_a_chunk() {
        let table = Table::<u8>::default();
        let taken: Vec<_> = (0..1000).map(|_| table.take(|| 7).expect("room")).collect();
        assert_eq!(
            taken.iter().map(|slot| slot.0).collect::<Vec<_>>(),
            (0..1000).collect::<Vec<_>>()
        );
        assert!(taken.iter().all(|&(index, generation)| table.get(index, generation) == Some(&7)));
    }
}
