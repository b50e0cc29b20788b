//! The engine: batches, requests, slices; NIC choice, deadlines, progress.
//!
//! It has no threads, no clock and no I/O: time comes in as nanoseconds, completions from a
//! [`Nic`], and progress is made by whoever calls [`Engine::progress`].
#![forbid(unsafe_code)]

mod batch;
mod failure;
mod health;
#[cfg(test)]
mod histories;
#[cfg(all(test, loom))]
pub(crate) mod models;
mod nic;
mod peers;
mod plan;
mod rail;
mod recovery;
mod region;
#[cfg(test)]
mod sim;
mod table;
mod target;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::error::{Code, Error, Result};
use crate::fabric::Memory;
use crate::lines::Lines;
#[cfg(loom)]
use crate::sync::Local as _;
use crate::sync::{ArcSwapOption, AtomicU64};
use batch::{Aim, Ended};
pub use batch::{BatchId, MAX_BATCH, Status};
use failure::UnderWay;
pub use nic::{Nic, Operation, PeerAddress, Post};
use peers::{PeerIndex, Released};
pub use plan::MERGE;
use plan::Plan;
pub use rail::RailCounters;
use rail::{Outcome, Rail, STUCK, Shared, Span};
use recovery::Later;
pub use recovery::PeerState;
use region::{LocalRegion, Number, RangeMap};
use table::Seal;
pub use table::Table;
use target::Target;
pub use target::{RemoteBuffer, RemoteNic, RemoteSegment, TargetId};

/// One transfer request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Write to the target; otherwise read from it.
    pub write: bool,
    /// Address of our memory, registered.
    pub local: u64,
    /// Whose memory is at the other end.
    pub target: TargetId,
    /// Address in the target's memory.
    pub remote: u64,
    /// Bytes; 0 completes at once.
    pub length: u64,
    /// The caller's; handed to [`Observer`].
    pub cookie: u64,
}

/// A task that got its final status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// As in its [`Request`].
    pub cookie: u64,
    /// Bytes moved: all or 0.
    pub bytes: u64,
    /// Its status.
    pub status: Status,
}

/// What [`Engine::progress`] brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Operations posted or finished.
    pub events: usize,
    /// Somebody else was at a rail that has work.
    pub contended: bool,
}

/// Called with tasks that got their final status, before the status can be seen. Called by whatever
/// thread made the progress, under no lock of the engine; it may submit, and must not block. It is not
/// called inside itself: what ends by its own calls is told when it has returned.
pub type Observer = Box<dyn Fn(&[Finished]) + Send + Sync>;

/// Settings of an engine.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Longest single operation, bytes.
    pub slice: u64,
    /// Merge neighbours that are contiguous on both sides.
    pub merge: bool,
    /// Take rails in turn, instead of the one with the least bytes queued and in flight.
    pub round_robin: bool,
    /// Rails that register memory at the same time, at least 1.
    pub registering: usize,
    /// Tries of one operation before its request fails, at least 1.
    pub tries: u8,
    /// Peers that stay known to a NIC after their segments are closed, or that only came to us.
    pub keep_peers: usize,
}

/// Why a submission was not started.
#[derive(Debug)]
pub enum Refusal {
    /// The request or the batch is wrong, or the device failed.
    Error(Error),
    /// The remote range is not in what we know of the target, which may be out of date.
    NotThere {
        /// Whose range.
        target: TargetId,
        /// What to say if it is not out of date.
        error: Error,
    },
    /// The target does not answer, or does not have what its descriptor says it has: what we know of it may
    /// be out of date.
    OutOfDate {
        /// Which one.
        target: TargetId,
        /// What to say if there is nothing newer; `None`: it is worth a try all the same.
        error: Option<Error>,
    },
    /// The endpoint address of this NIC of the target is not known: shake hands, tell
    /// [`Engine::set_address`], submit again.
    NeedsHandshake {
        /// Local rail.
        rail: usize,
        /// NIC of the target, by index.
        nic: u16,
        /// Whose.
        target: TargetId,
    },
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Refusal {
    fn context(self, context: impl FnOnce() -> String) -> Self {
        match self {
            Self::Error(error) => Self::Error(error.context(context())),
            Self::NotThere { target, error } => {
                Self::NotThere { target, error: error.context(context()) }
            }
            Self::OutOfDate { target, error: Some(error) } => {
                Self::OutOfDate { target, error: Some(error.context(context())) }
            }
            other => other,
        }
    }
}

/// What was registered: one range, known to peers by one key a rail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Key by rail; 0 where it is not registered.
    pub keys: Vec<u64>,
}

/// Memory to register.
#[derive(Clone, Debug)]
pub struct Registration {
    /// The range.
    pub memory: Memory,
    /// Rails to register it on.
    pub rails: Vec<u16>,
    /// Of these, the ones to send over; empty for all.
    pub preferred: Vec<u16>,
    /// Longest single region: what is longer becomes several.
    pub largest: u64,
    /// Neighbouring requests on it that are contiguous on both sides are moved as one up to this length, bytes.
    pub merge: u64,
    /// At most as many as rails: the range is cut into so many parts, and each part is registered on its
    /// share of the rails. 1: all of it on each.
    pub shares: u64,
}

impl Registration {
    /// The rails of a part: neighbours in the order of `rails`.
    fn rails_of(&self, share: u64) -> &[u16] {
        let at = |share: u64| (share * self.rails.len() as u64 / self.shares.max(1)) as usize;
        &self.rails[at(share)..at(share + 1)]
    }

    /// Those of them to send over.
    fn senders_of(&self, share: u64) -> Arc<[u16]> {
        let rails = self.rails_of(share);
        let near: Vec<u16> =
            rails.iter().copied().filter(|rail| self.preferred.contains(rail)).collect();
        if near.is_empty() { rails.into() } else { near.into() }
    }
}

/// Parts of a range that is shared out are a multiple of this long, so that huge pages stay whole.
const SHARE_ALIGN: u64 = 2 << 20;

/// A region to make.
struct Making {
    /// Of which registration, and which of its shares.
    index: usize,
    share: u64,
    memory: Memory,
    number: Number,
}

/// Bytes from which it is worth a thread a rail to register them: to start one costs as much as to pin a
/// few MiB.
const WORTH_THREADS: u64 = 16 << 20;

/// Longest slice, bytes: a page below what 32 bits hold.
const LONGEST_SLICE: u64 = (1 << 32) - 4096;

struct BufferRecord {
    end: u64,
    /// Regions it became: number, first byte, and the rails that have it.
    regions: Vec<(Number, u64, Vec<u16>)>,
}

/// See the module's documentation.
pub struct Engine<N> {
    rails: Box<[Rail<N>]>,
    shared: Shared,
    locals: ArcSwap<RangeMap<LocalRegion>>,
    /// What callers registered, by first byte. Held while registrations change.
    buffers: Mutex<BTreeMap<u64, BufferRecord>>,
    seal: Seal,
    /// A peer that dies fails all that is under way to it at once.
    failures: Lines,
    /// Parts of groups that failed and are to be tried again.
    later: Later,
    /// See [`Self::moves`].
    moves: AtomicU64,
    observer: Option<Observer>,
    settings: Settings,
    /// Lives of peers so far, for [`Target::life`].
    lives: AtomicU32,
    /// Rails given out in turn so far, where that is wanted.
    rotation: AtomicUsize,
    virtual_addresses: bool,
}

#[derive(Default)]
struct Scratch {
    plan: Plan,
    /// By rail.
    spans: Vec<Vec<Span>>,
    loads: Vec<u64>,
    /// While NICs may be paused: the others of the current region's.
    healthy: Vec<u16>,
}

#[derive(Default)]
struct Events {
    outcome: Outcome,
    finished: Vec<Finished>,
}

crate::sync::thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static EVENTS: RefCell<Events> = RefCell::default();
    static DELIVERY: RefCell<Delivery> = RefCell::default();
}

/// What this thread is telling observers. An observer may submit, and what ends by that waits here until
/// it returns, instead of the observer being called again inside itself, deeper and deeper.
#[derive(Default)]
struct Delivery {
    /// Seals of the engines whose observer is being called, in the order of the calls.
    callers: Vec<Seal>,
    /// What ended meanwhile, and in which engine.
    waiting: Vec<(Seal, Ended)>,
}

/// Takes the last caller off the list, also if the observer panics.
struct Calling;

impl Drop for Calling {
    fn drop(&mut self) {
        DELIVERY.with_borrow_mut(|delivery| delivery.callers.pop());
    }
}

impl<N: Nic> Engine<N> {
    /// An engine over these NICs, by name. At least one.
    pub fn new(nics: Vec<(String, N)>, settings: Settings, observer: Option<Observer>) -> Self {
        let virtual_addresses = nics.iter().all(|(_, nic)| nic.virtual_addresses());
        let rails: Box<[Rail<N>]> = nics
            .into_iter()
            .enumerate()
            .map(|(index, (name, nic))| Rail::new(name, index, nic, settings.keep_peers))
            .collect();
        let seal = Seal::new();
        Self {
            shared: Shared {
                batches: batch::Batches::new(seal),
                users: region::Users::default(),
                targets: Table::default(),
                released: Arc::new(Released::new(rails.len())),
                ailing_until: AtomicU64::new(0),
                slice: settings.slice.clamp(1, LONGEST_SLICE),
            },
            rails,
            later: Later::default(),
            moves: AtomicU64::new(0),
            locals: ArcSwap::default(),
            buffers: Mutex::default(),
            seal,
            failures: Lines::new(log::Level::Error, "failures like it"),
            observer,
            settings,
            lives: AtomicU32::new(0),
            rotation: AtomicUsize::new(0),
            virtual_addresses,
        }
    }

    /// Counters of a rail.
    pub fn counters(&self, rail: usize) -> RailCounters {
        self.rails[rail].counters()
    }

    /// Calls `f` with a rail's NIC, when no one else uses it; [`Code::Busy`] if the one who does stays
    /// in the provider for 10 seconds.
    pub fn with_nic<R>(&self, rail: usize, f: impl FnOnce(&mut N) -> Result<R>) -> Result<R> {
        self.rails[rail].with_nic(f)
    }

    // ---- memory -------------------------------------------------------------------------------

    /// Registers ranges on their rails, all or nothing. The result has one list of regions a
    /// registration, in order of address.
    ///
    /// # Errors
    /// [`Code::AddressOverlapped`] if a range overlaps another of the call or one that is
    /// registered; the NIC's error if it refuses one.
    pub fn register(&self, wanted: &[Registration]) -> Result<Vec<Vec<Registered>>> {
        let mut buffers = self.buffers.lock();
        self.check_overlap(&buffers, wanted)?;
        let mut made: Vec<Making> = Vec::new();
        let give_back = |made: &[Making]| {
            for making in made {
                self.shared.users.give_back(making.number);
            }
        };
        for (index, registration) in wanted.iter().enumerate() {
            let (length, mut offset) = (registration.memory.length(), 0);
            let shared = length.div_ceil(registration.shares.max(1));
            let shared = shared.next_multiple_of(SHARE_ALIGN);
            while offset < length {
                let share = if registration.shares > 1 { offset / shared } else { 0 };
                let end = if registration.shares > 1 { (share + 1) * shared } else { length };
                let part = (end.min(length) - offset).min(registration.largest.max(1));
                let Some(number) = self.shared.users.reserve() else {
                    give_back(&made);
                    return Err(Error::new(Code::TooManyRequests, "too many memory regions"));
                };
                let memory = registration.memory.part(offset, part);
                made.push(Making { index, share, memory, number });
                offset += part;
            }
        }
        let keys = match self.register_on_rails(wanted, &made) {
            Ok(keys) => keys,
            Err(error) => {
                give_back(&made);
                return Err(error);
            }
        };
        let mut regions: Vec<LocalRegion> = Vec::with_capacity(made.len());
        let mut result = vec![Vec::new(); wanted.len()];
        for (region, Making { index, share, memory, number }) in made.iter().enumerate() {
            let (start, end) = (memory.address(), memory.address() + memory.length());
            let registration = &wanted[*index];
            // Regions of one share have their list in common.
            let rails = match regions.last() {
                Some(last)
                    if region > 0
                        && (made[region - 1].index, made[region - 1].share) == (*index, *share) =>
                {
                    last.rails.clone()
                }
                _ => registration.senders_of(*share),
            };
            self.shared.users.open(*number);
            let merge = registration.merge;
            regions.push(LocalRegion { start, end, number: *number, rails, merge });
            result[*index].push(Registered {
                address: start,
                length: memory.length(),
                keys: keys.iter().map(|keys| keys[region]).collect(),
            });
            let record = buffers
                .entry(registration.memory.address())
                .or_insert_with(|| BufferRecord { end, regions: Vec::new() });
            record.end = end;
            record.regions.push((*number, start, registration.rails_of(*share).to_vec()));
        }
        self.locals.store(Arc::new(self.locals.load().with(regions)));
        Ok(result)
    }

    fn check_overlap(
        &self,
        buffers: &BTreeMap<u64, BufferRecord>,
        wanted: &[Registration],
    ) -> Result<()> {
        let overlaps = |start: u64, end: u64, other: u64, other_end: u64| {
            Error::new(
                Code::AddressOverlapped,
                format!(
                    "{start:#x}-{end:#x} overlaps {other:#x}-{other_end:#x}, registered already"
                ),
            )
        };
        let mut new: BTreeMap<u64, u64> = BTreeMap::new();
        for registration in wanted {
            if registration.rails.is_empty()
                || registration.rails.iter().any(|&rail| usize::from(rail) >= self.rails.len())
            {
                return Err(Error::invalid("memory must be registered on at least one known NIC"));
            }
            let start = registration.memory.address();
            let end = start + registration.memory.length();
            let before =
                buffers.range(..end).next_back().map(|(&start, record)| (start, record.end));
            let sibling = new.range(..end).next_back().map(|(&start, &end)| (start, end));
            for (other, other_end) in before.into_iter().chain(sibling) {
                if other_end > start {
                    return Err(overlaps(start, end, other, other_end));
                }
            }
            new.insert(start, end);
        }
        Ok(())
    }

    /// Registers every region on its rails, rails in parallel if that is worth threads. Keys by rail, then
    /// region. Undoes all on an error.
    fn register_on_rails(&self, wanted: &[Registration], made: &[Making]) -> Result<Vec<Vec<u64>>> {
        let on_rail = |rail: usize| -> (Vec<u64>, Option<Error>) {
            let mut keys = vec![0; made.len()];
            for (key, Making { index, share, memory, number }) in keys.iter_mut().zip(made) {
                if !wanted[*index].rails_of(*share).contains(&(rail as u16)) {
                    continue;
                }
                let rail = &self.rails[rail];
                match rail.with_nic(|nic| nic.register(number.index, memory)) {
                    Ok(new) => {
                        *key = new;
                        rail.give_way();
                    }
                    Err(error) => {
                        let context = format!("registering memory on {}", rail.name);
                        return (keys, Some(error.context(context)));
                    }
                }
            }
            (keys, None)
        };
        let mut results: Vec<(Vec<u64>, Option<Error>)> = Vec::with_capacity(self.rails.len());
        let rails: Vec<usize> = (0..self.rails.len()).collect();
        let bytes: u64 = made.iter().map(|making| making.memory.length()).sum();
        let parallel = if bytes < WORTH_THREADS { 1 } else { self.settings.registering.max(1) };
        for together in rails.chunks(parallel) {
            if let [rail] = *together {
                results.push(on_rail(rail));
                continue;
            }
            std::thread::scope(|scope| {
                let on_rail = &on_rail;
                let threads: Vec<_> =
                    together.iter().map(|&rail| scope.spawn(move || on_rail(rail))).collect();
                let died = || (Vec::new(), Some(Error::new(Code::Internal, "registration died")));
                results.extend(threads.into_iter().map(|it| it.join().unwrap_or_else(|_| died())));
            });
        }
        if let Some(error) = results.iter().find_map(|(_, error)| error.clone()) {
            for (rail, (keys, _)) in results.iter().enumerate() {
                for (key, Making { number, .. }) in keys.iter().zip(made) {
                    if *key != 0 {
                        let undone = self.rails[rail].with_nic(|nic| nic.unregister(number.index));
                        if let Err(error) = undone {
                            log::warn!(
                                "undoing a registration on {}: {error}",
                                self.rails[rail].name
                            );
                        }
                    }
                }
            }
            return Err(error);
        }
        Ok(results.into_iter().map(|(keys, _)| keys).collect())
    }

    /// Ends the registration of the range that starts at `address`.
    ///
    /// # Errors
    /// [`Code::AddressNotRegistered`] if none starts there; [`Code::Busy`] while transfers use it
    /// (nothing has changed then).
    pub fn unregister(&self, address: u64) -> Result<()> {
        let mut buffers = self.buffers.lock();
        let record = buffers.get(&address).ok_or_else(|| not_registered(address))?;
        let users = &self.shared.users;
        for (closed, (number, ..)) in record.regions.iter().enumerate() {
            if let Err(count) = users.close(*number) {
                for (number, ..) in &record.regions[..closed] {
                    users.open(*number);
                }
                return Err(Error::new(
                    Code::Busy,
                    format!("memory at {address:#x} is used by {count} transfers under way"),
                ));
            }
        }
        let record = buffers.remove(&address).expect("found above");
        let starts: Vec<u64> = record.regions.iter().map(|(_, start, _)| *start).collect();
        self.locals.store(Arc::new(self.locals.load().without(&starts)));
        let (mut result, mut unresponsive) = (Ok(()), Vec::new());
        for (number, _, rails) in &record.regions {
            for &index in rails {
                let rail = &self.rails[usize::from(index)];
                if unresponsive.contains(&index) {
                    continue; // once is long enough to wait for it
                }
                if let Err(error) = rail.with_nic(|nic| nic.unregister(number.index)) {
                    if error.code == Code::Busy {
                        unresponsive.push(index);
                    }
                    // Not as "busy", whatever the reason: something has changed.
                    let error = Error { code: Code::Memory, ..error };
                    result = Err(error.context(format!("unregistering on {}", rail.name)));
                }
            }
            users.give_back(*number);
        }
        result
    }

    /// The oldest operation in flight on the registered range that starts at `address`, in words; `None` if
    /// there is none, or if whoever drives its rail does not let go of it.
    pub fn oldest_use(&self, address: u64, now: u64) -> Option<String> {
        let regions: Vec<u32> = {
            let buffers = self.buffers.lock();
            buffers.get(&address)?.regions.iter().map(|(number, ..)| number.index).collect()
        };
        let oldest = |rail: &Rail<N>| rail.oldest_use(&self.shared, &regions, now);
        let oldest = self.rails.iter().filter_map(oldest).max_by_key(|operation| operation.age)?;
        Some(UnderWay(oldest).to_string())
    }

    // ---- targets ------------------------------------------------------------------------------

    /// Makes a peer's segment known.
    pub fn add_target(&self, segment: RemoteSegment) -> Result<TargetId> {
        let (index, generation) = self
            .shared
            .targets
            .take(ArcSwapOption::empty)
            .ok_or_else(|| Error::new(Code::TooManyRequests, "too many segments are open"))?;
        let target = self.new_target(segment);
        self.shared.targets.at(index).expect("just taken").store(Some(Arc::new(target)));
        Ok(TargetId(self.seal.number(index, generation)))
    }

    fn new_target(&self, segment: RemoteSegment) -> Target {
        let life = self.lives.fetch_add(1, Ordering::Relaxed);
        Target::new(segment, life, self.rails.len(), self.shared.released.clone())
    }

    /// Replaces what is known of a peer. Transfers under way are not touched.
    pub fn update_target(&self, id: TargetId, segment: RemoteSegment) -> Result<()> {
        let newer = self.new_target(segment);
        loop {
            let older = self.target(id)?;
            let inherits = Some(Arc::new(newer.anew().inherit(&older)));
            // Unless it was closed, or replaced, meanwhile.
            let before = self.target_slot(id)?.compare_and_swap(&older, inherits);
            if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, &older)) {
                return Ok(());
            }
        }
    }

    /// Replaces what is known of a peer that lacks a range ([`Refusal::NotThere`]) by what `fetch` gives for its name,
    /// unless that was done since the submission, at `since`, by another thread: one asks for all. What was asked
    /// for in vain is not asked for again at once, by nobody. Whether to submit again.
    ///
    /// # Errors
    /// Those of `fetch`.
    pub fn refresh_target(
        &self,
        id: TargetId,
        since: u64,
        clock: impl Fn() -> u64,
        fetch: impl FnOnce(&str) -> Result<RemoteSegment>,
    ) -> Result<bool> {
        let before = self.target(id)?;
        let mut asked = before.faults.asked.lock();
        let now = clock();
        if asked.is_newer(since) {
            return Ok(true);
        }
        if !asked.may_ask(now) {
            return Ok(false);
        }
        let updated = fetch(&before.name).and_then(|newer| self.update_target(id, newer));
        let after = updated.and_then(|()| self.target(id));
        let new = |after: &Arc<Target>| !after.regions.iter().eq(before.regions.iter());
        asked.ask(now, after.as_ref().is_ok_and(new));
        after.map(|_| true)
    }

    /// Forgets a peer. Transfers under way are not touched.
    pub fn remove_target(&self, id: TargetId) -> Result<()> {
        let slot = self.target_slot(id)?;
        let (index, generation) = self.seal.place(id.0);
        if !self.shared.targets.retire(index, generation) {
            return Err(unknown_target(id));
        }
        slot.store(None);
        self.shared.targets.give_back(index);
        Ok(())
    }

    /// A peer's segment name.
    pub fn target_name(&self, id: TargetId) -> Result<String> {
        Ok(self.target(id)?.name.to_string())
    }

    /// A peer's server, and the name of one of its NICs.
    pub fn target_nic(&self, id: TargetId, nic: u16) -> Result<(String, String)> {
        let target = self.target(id)?;
        Ok((target.server.clone(), target.nic(nic)?.name.to_string()))
    }

    /// Tells the endpoint address of a peer's NIC, as a handshake brought it.
    pub fn set_address(&self, id: TargetId, nic: u16, address: &[u8]) -> Result<()> {
        let target = self.target(id)?;
        target.nic(nic)?.address.store(Some(Arc::new(address.into())));
        Ok(())
    }

    /// Connects every pair of rail and peer's NIC that transfers would use now. (All pairs would be their
    /// product: 256 for 16 NICs on either side, of which 16 are used.)
    pub fn warm_up(&self, id: TargetId) -> Result<(), Refusal> {
        let target = self.target(id)?;
        for rail in 0..self.rails.len() {
            for region in target.regions.iter() {
                self.peer(id, &target, rail, region.key(rail).0)?;
            }
            // Nothing is registered there yet: mostly it will be on all NICs.
            if target.regions.iter().next().is_none() && !target.nics.is_empty() {
                self.peer(id, &target, rail, (rail % target.nics.len()) as u16)?;
            }
        }
        Ok(())
    }

    fn target_slot(&self, id: TargetId) -> Result<&ArcSwapOption<Target>> {
        let (index, generation) = self.seal.place(id.0);
        self.shared.targets.get(index, generation).ok_or_else(|| unknown_target(id))
    }

    fn target(&self, id: TargetId) -> Result<Arc<Target>> {
        let (index, generation) = self.seal.place(id.0);
        self.shared.target_at(index, generation).ok_or_else(|| unknown_target(id))
    }

    fn peer(
        &self,
        id: TargetId,
        target: &Target,
        rail: usize,
        nic: u16,
    ) -> Result<PeerIndex, Refusal> {
        if let Some(peer) = target.peer(rail, nic) {
            return Ok(peer);
        }
        let remote = target.nic(nic)?;
        let Some(address) = remote.address.load_full() else {
            return Err(Refusal::NeedsHandshake { rail, nic, target: id });
        };
        let connected = self.rails[rail].connect(&self.shared, &address);
        let peer = connected.map_err(|error| {
            // What a handshake told cannot be right: the next submission asks again.
            target.forget(nic);
            let rail = &self.rails[rail].name;
            error.context(format!("connecting {rail} to {} of {}", remote.name, target.name))
        })?;
        Ok(target.set_peer(rail, nic, peer))
    }

    /// Makes the endpoint with this address known to a rail, for a peer that is about to transfer to us.
    pub fn admit(&self, rail: usize, address: &[u8]) -> Result<()> {
        let peer = self.rails[rail].connect(&self.shared, address)?;
        self.shared.released.add(rail, peer);
        Ok(())
    }

    // ---- batches ------------------------------------------------------------------------------

    /// A new batch for up to `capacity` requests (1 to [`MAX_BATCH`]).
    pub fn allocate_batch(&self, capacity: u32) -> Result<BatchId> {
        self.shared.batches.allocate(capacity)
    }

    /// Frees a batch; [`Code::Busy`] while a request of it is under way.
    pub fn free_batch(&self, batch: BatchId) -> Result<()> {
        self.shared.batches.free(batch)
    }

    /// Adds requests to a batch and starts them; they end by `deadline` (nanoseconds). The number of
    /// the first one's task. Either all are started, or none.
    ///
    /// Allocates nothing once its buffers have grown to the size of the submission.
    pub fn submit(
        &self,
        batch: BatchId,
        requests: impl ExactSizeIterator<Item = Request>,
        now: u64,
        deadline: u64,
    ) -> Result<u32, Refusal> {
        let mut scratch = SCRATCH.take();
        let result = self.submit_with(&mut scratch, batch, requests, now, deadline);
        if result.is_ok() {
            for rail in self.home_first() {
                if !scratch.spans[rail.index].is_empty() {
                    self.drive(rail, now);
                }
            }
        }
        scratch.plan.targets.clear(); // they are Arcs
        SCRATCH.replace(scratch);
        result
    }

    /// As [`Self::submit`], for a caller who only wants to be told by the [`Observer`]: there is no
    /// batch to ask or to free.
    pub fn submit_detached(
        &self,
        requests: impl ExactSizeIterator<Item = Request>,
        now: u64,
        deadline: u64,
    ) -> Result<(), Refusal> {
        if requests.len() == 0 {
            return Ok(());
        }
        let batch = self.shared.batches.allocate(tasks(requests.len())?)?;
        let result = self.submit(batch, requests, now, deadline);
        self.shared.batches.detach(batch);
        result.map(drop)
    }

    fn submit_with(
        &self,
        scratch: &mut Scratch,
        batch: BatchId,
        requests: impl ExactSizeIterator<Item = Request>,
        now: u64,
        deadline: u64,
    ) -> Result<u32, Refusal> {
        let pin = self.shared.batches.pin(batch)?;
        let count = tasks(requests.len())?;
        let locals = self.locals.load();
        let users = &self.shared.users;
        scratch.plan.build(requests, &locals, users, |id| self.target(id), self.settings.merge)?;
        let placed = self.place(scratch, &locals, now);
        match placed.and_then(|()| Ok(pin.reserve(count)?)) {
            Ok(first) => {
                self.start(scratch, &locals, &pin, first, now, deadline);
                Ok(first)
            }
            Err(refusal) => {
                scratch.plan.abandon(&locals, users);
                Err(refusal)
            }
        }
    }

    /// Cuts pieces into spans and gives each to a rail.
    fn place(
        &self,
        scratch: &mut Scratch,
        locals: &RangeMap<LocalRegion>,
        now: u64,
    ) -> Result<(), Refusal> {
        let rails = self.rails.len();
        let ailing = self.shared.is_ailing(now);
        let Scratch { plan, spans, loads, healthy } = scratch;
        spans.resize_with(rails.max(spans.len()), Vec::new);
        spans.iter_mut().for_each(Vec::clear);
        loads.clear();
        loads.extend(self.rails.iter().map(|rail| rail.load() / plan::LOAD_COUNTS));
        self.look_at_targets(plan, now)?;
        let (mut lane, mut used) = (None::<plan::Lane>, 0);
        // Bytes that have no rail yet.
        let mut left = plan.bytes;
        for piece in &plan.pieces {
            if plan.uses[used].local_region != piece.way.local_region {
                used += 1;
            }
            let local = locals.at(piece.way.local_region as usize);
            let region = local.number.index;
            let same = lane.as_ref().filter(|lane| lane.way.local_region == piece.way.local_region);
            if ailing && same.is_none() {
                self.choose_healthy(&local.rails, now, healthy);
            }
            let usable: &[u16] = if ailing { healthy } else { &local.rails };
            let (stripe, level) = match same {
                Some(lane) => (lane.stripe, lane.level),
                None => (plan.stripe(usable.len()), plan::level(usable, loads, left)),
            };
            let part = plan::cut(piece.length, stripe);
            let mut done = 0;
            while done < piece.length {
                let lane = match &mut lane {
                    Some(lane) if lane.way == piece.way && lane.left > 0 => lane,
                    lane => {
                        let (id, target) = &plan.targets[piece.way.target as usize];
                        let rail = if self.settings.round_robin {
                            self.next_rail(usable)
                        } else {
                            plan::least_loaded(usable, home(), loads)
                        };
                        let remote = target.regions.at(piece.way.remote_region as usize);
                        let (nic, key) = if ailing {
                            target.healthy_key(remote, rail, now)
                        } else {
                            remote.key(rail)
                        };
                        lane.insert(plan::Lane {
                            way: piece.way,
                            stripe,
                            level,
                            rail,
                            peer: self.peer(*id, target, rail, nic)?,
                            key,
                            base: if self.virtual_addresses { 0 } else { remote.start },
                            left: if self.settings.round_robin {
                                1
                            } else {
                                plan::run(part).max(level.saturating_sub(loads[rail]))
                            },
                        })
                    }
                };
                let length = part.min(piece.length - done);
                spans[lane.rail].push(Span {
                    group: batch::GroupRef::planned(piece.first),
                    local: piece.local + done,
                    remote: piece.remote + done,
                    base: lane.base,
                    length,
                    key: lane.key,
                    peer: lane.peer,
                    region,
                    tries: 0,
                    write: piece.way.write,
                });
                plan.uses[used].spans += 1;
                loads[lane.rail] += length;
                left -= length;
                lane.left = lane.left.saturating_sub(length);
                done += length;
            }
        }
        Ok(())
    }

    /// The next of these rails, whatever they have to do.
    fn next_rail(&self, rails: &[u16]) -> usize {
        let turn = self.rotation.fetch_add(1, Ordering::Relaxed);
        usize::from(rails[turn % rails.len()])
    }

    /// Starts what was planned and placed, as the tasks from `first` on of a batch.
    fn start(
        &self,
        scratch: &mut Scratch,
        locals: &RangeMap<LocalRegion>,
        pin: &batch::Pin,
        first: u32,
        now: u64,
        deadline: u64,
    ) {
        let Scratch { plan, spans, .. } = scratch;
        let mut events = EVENTS.take();
        pin.begin(plan.groups.len() as u32, plan.tasks.len() as u32, deadline);
        for group in &plan.groups {
            let (id, target) = &plan.targets[group.target as usize];
            let life = target.life;
            let (target, generation) = self.seal.place(id.0);
            let aim = Aim { target, generation, life, write: group.write };
            let tasks = &plan.tasks[group.first as usize..][..group.tasks as usize];
            let at = first + group.first;
            let started = pin.start_group(at, tasks, group.bytes, aim, now, deadline);
            if group.bytes == 0 {
                events.outcome.ended.push(Ended::new(started, Status::Completed));
            }
        }
        // Each span uses its region; the first of an entry takes over the entry's own use.
        for used in &plan.uses {
            let number = locals.at(used.local_region as usize).number.index;
            self.shared.users.enter_more(number, used.spans - 1);
        }
        for (rail, spans) in self.rails.iter().zip(spans) {
            if spans.is_empty() {
                continue;
            }
            let mut bytes = 0;
            for span in spans.iter_mut() {
                span.group = pin.started(span.group, first);
                bytes += span.length;
            }
            rail.push(spans, bytes);
        }
        self.publish(&mut events, now);
        EVENTS.replace(events);
    }

    /// Status of one task, and its bytes moved.
    pub fn task_status(&self, batch: BatchId, task: u32) -> Result<(Status, u64)> {
        self.shared.batches.pin(batch)?.task(task)
    }

    /// Why a task failed or timed out, in one line; `None` if it did not.
    pub fn task_error(&self, batch: BatchId, task: u32) -> Result<Option<String>> {
        let pin = self.shared.batches.pin(batch)?;
        Ok(pin.failure(task)?.map(|failure| failure.to_string()))
    }

    /// Status of a batch: pending while a task is under way, then completed if every task did, or
    /// failed. And the count of tasks submitted.
    pub fn batch_status(&self, batch: BatchId) -> Result<(Status, u32)> {
        let pin = self.shared.batches.pin(batch)?;
        Ok((pin.status(), pin.used()))
    }

    /// Whether the provider has given back all memory of a batch's requests. Always so once no task
    /// is pending, but for those that timed out.
    pub fn is_quiet(&self, batch: BatchId) -> Result<bool> {
        Ok(self.shared.batches.pin(batch)?.in_use() == 0)
    }

    /// Cancels what a batch has under way. What is not posted ends at once; what is posted ends when
    /// the provider gives it back, so that [`Status::Canceled`] always means quiet memory.
    pub fn cancel(&self, batch: BatchId, now: u64) -> Result<()> {
        self.shared.batches.pin(batch)?.condemn(Status::Canceled);
        self.sweep(now);
        Ok(())
    }

    /// Cancels everything that is under way.
    pub fn cancel_all(&self, now: u64) {
        self.shared.batches.condemn_all(Status::Canceled);
        self.sweep(now);
    }

    /// Gives up what is condemned and still queued.
    fn sweep(&self, now: u64) {
        let mut events = EVENTS.take();
        for rail in &self.rails {
            rail.sweep(&self.shared, now, &mut events.outcome);
        }
        self.settle(&mut events.outcome, now);
        self.try_later(&mut events.outcome, now, true);
        self.publish(&mut events, now);
        EVENTS.replace(events);
    }

    // ---- progress -----------------------------------------------------------------------------

    /// Bytes queued or in flight on a rail.
    pub fn load(&self, rail: usize) -> u64 {
        self.rails[rail].load()
    }

    /// Whether nothing is queued or in flight.
    pub fn is_idle(&self) -> bool {
        // What failed may go to a rail that was looked at already, before its own is.
        let moves = self.moves();
        self.rails.iter().all(|rail| rail.load() == 0) && self.moves() == moves
    }

    /// Turns driven on a rail so far, by anyone.
    pub fn turns(&self, rail: usize) -> u64 {
        self.rails[rail].turns()
    }

    /// Makes progress on the rails that have work.
    pub fn progress(&self, now: u64) -> Progress {
        let mut progress = Progress::default();
        for rail in self.home_first().filter(|rail| rail.load() > 0) {
            match self.drive(rail, now) {
                Some(events) => progress.events += events,
                None => progress.contended = true,
            }
        }
        progress
    }

    /// All rails, this thread's own first.
    fn home_first(&self) -> impl Iterator<Item = &Rail<N>> {
        let (before, from) = self.rails.split_at(home() % self.rails.len());
        from.iter().chain(before)
    }

    /// To look at one batch often.
    pub fn watch(&self, batch: BatchId) -> Result<Watch<'_, N>> {
        Ok(Watch { engine: self, pin: self.shared.batches.pin(batch)? })
    }

    /// Ends requests whose deadline passed, though their rail may be stuck in the provider.
    pub fn expire_all(&self, now: u64) {
        self.time_out(now, |each| self.shared.batches.overdue(now, each));
    }

    fn time_out(&self, now: u64, overdue: impl FnOnce(&mut dyn FnMut(Ended))) {
        let mut events = EVENTS.take();
        let Outcome { ended, failures, .. } = &mut events.outcome;
        overdue(&mut |late| {
            let length = self.shared.batches.group(late.group).remaining();
            let failure = self.shared.failure(late.group, length, None, now, STUCK.into());
            if self.shared.batches.fail(late.group, Status::Timeout, &failure) {
                failures.push(failure);
            }
            ended.push(late);
        });
        self.publish(&mut events, now);
        EVENTS.replace(events);
    }

    /// Makes progress on one rail, whether or not it has work: peers may need its answers. `None` if
    /// someone else is at it.
    pub fn poll(&self, rail: usize, now: u64) -> Option<usize> {
        self.drive(&self.rails[rail], now)
    }

    fn drive(&self, rail: &Rail<N>, now: u64) -> Option<usize> {
        let mut events = EVENTS.take();
        let count = rail.drive(&self.shared, now, &mut events.outcome);
        self.settle(&mut events.outcome, now);
        self.try_later(&mut events.outcome, now, false);
        self.failures.flush(now);
        self.publish(&mut events, now);
        EVENTS.replace(events);
        count
    }

    /// Logs what failed, tells the observer of what ended, then makes it visible.
    fn publish(&self, events: &mut Events, now: u64) {
        let Events { outcome: Outcome { ended: all, failures, .. }, finished } = events;
        failures.drain(..).for_each(|failure| self.failures.add(&failure, now));
        if all.is_empty() {
            return;
        }
        let nested = DELIVERY.with_borrow_mut(|delivery| {
            let nested = delivery.callers.contains(&self.seal);
            if nested {
                delivery.waiting.extend(all.drain(..).map(|ended| (self.seal, ended)));
            } else {
                delivery.callers.push(self.seal);
            }
            nested
        });
        if nested {
            return;
        }
        let _calling = Calling;
        let batches = &self.shared.batches;
        while !all.is_empty() {
            let mut groups = batches.groups();
            for ended in all.iter_mut() {
                let observed = self.observer.is_some();
                ended.claimed = groups.claim(ended, |cookie, bytes, status| {
                    if observed {
                        finished.push(Finished { cookie, bytes, status });
                    }
                });
            }
            if let Some(observer) = self.observer.as_ref().filter(|_| !finished.is_empty()) {
                observer(finished);
                finished.clear();
            }
            batches.finish(all.drain(..));
            DELIVERY.with_borrow_mut(|delivery| {
                delivery.waiting.retain(|(seal, ended)| {
                    let ours = *seal == self.seal;
                    all.extend(ours.then_some(*ended));
                    !ours
                });
            });
        }
    }
}

thread_local! {
    static HOME: Cell<usize> = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        Cell::new(NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id() as usize))
    };
}

/// This thread's number. Threads start with different rails, in what they submit and in what they drive: then
/// they meet less often, and a rail's data stay in the cache of one core. So do processes.
fn home() -> usize {
    HOME.get()
}

/// Chooses which rail this thread starts with (modulo their number), instead of one by the order of threads:
/// for one that is several in turn, as with coroutines.
pub fn set_home(rail: usize) {
    HOME.set(rail);
}

/// A batch that somebody waits for. It is not recycled while this exists.
pub struct Watch<'a, N> {
    engine: &'a Engine<N>,
    pin: batch::Pin<'a>,
}

impl<N: Nic> Watch<'_, N> {
    /// As [`Engine::batch_status`], with no more than a load.
    pub fn status(&self) -> Status {
        self.pin.status()
    }

    /// How many of its requests, neighbours that were merged counted once, the provider has not given back.
    pub fn in_use(&self) -> u32 {
        self.pin.in_use()
    }

    /// As [`Engine::expire_all`], for this batch.
    pub fn expire(&self, now: u64) {
        if self.pin.may_be_late(now) {
            self.engine.time_out(now, |each| self.pin.overdue(now).for_each(each));
        }
    }
}

/// A count of requests as one of tasks.
fn tasks(requests: usize) -> Result<u32> {
    u32::try_from(requests)
        .map_err(|_| Error::new(Code::TooManyRequests, "more requests than any batch holds"))
}

pub(crate) fn not_registered(address: u64) -> Error {
    let text = format!("no registered memory starts at {address:#x}");
    Error::new(Code::AddressNotRegistered, text)
}

fn unknown_target(id: TargetId) -> Error {
    Error::invalid(format!("{:#x} is not an open segment of this transport", id.0))
}
