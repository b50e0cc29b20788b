//! Batches and their tasks: what a caller holds a handle of and asks the status of.
//!
//! A task is one request. Neighbouring requests may be merged into a *group*, which is moved as one
//! range; a group's bookkeeping is in its first task. Two counts say when a batch is done with:
//! `unfinished` tasks have no final status yet; `holds` counts groups whose memory the provider may
//! still touch, and apart from these who else keeps the batch: its owner until he frees it, and pins.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::failure::Failure;
use super::table::{Seal, Table};
use crate::error::{Code, Error, Result};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, OnceLock, Ordering};

/// Status of a task or a batch, in Mooncake's numbers (`TransferStatusEnum`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Not submitted yet.
    Waiting = 0,
    /// Under way.
    Pending = 1,
    /// Refused.
    Invalid = 2,
    /// Cancelled by the caller; its memory is quiet.
    Canceled = 3,
    /// All bytes are in the target's memory (write) or ours (read); its memory is quiet.
    Completed = 4,
    /// The deadline passed. The provider may still touch its memory: see [`super::Engine::is_quiet`].
    Timeout = 5,
    /// A piece failed; its memory is quiet.
    Failed = 6,
}

impl Status {
    pub(super) fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Waiting,
            1 => Self::Pending,
            3 => Self::Canceled,
            4 => Self::Completed,
            5 => Self::Timeout,
            6 => Self::Failed,
            _ => Self::Invalid,
        }
    }

    /// No further change will come.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Waiting | Self::Pending)
    }
}

/// A batch: up to a fixed number of tasks. The number is opaque, and its engine's own; 0 is never a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchId(pub u64);

/// Where a group's first task is. Valid while the group holds its batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GroupRef {
    slot: u32,
    pub first: u32,
}

impl GroupRef {
    /// Stands for the group whose first request is number `first` of a submission, until it is started.
    pub fn planned(first: u32) -> Self {
        Self { slot: 0, first }
    }
}

/// A group whose status is to be published: it ended, or its deadline passed. Carries one hold of
/// the batch, which [`Batches::finish`] gives up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub group: GroupRef,
    pub status: Status,
    /// This one publishes the group (set by [`Batches::claim`]'s caller).
    pub claimed: bool,
}

impl Ended {
    pub fn new(group: GroupRef, status: Status) -> Self {
        Self { group, status, claimed: false }
    }
}

/// What a group does: for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Aim {
    /// Slot of the target, below 2^31.
    pub target: u32,
    /// The slot's generation: it may be another target's before the group ends.
    pub generation: u32,
    /// See [`super::target::Target::life`].
    pub life: u32,
    pub write: bool,
}

#[derive(Default)]
pub(super) struct Task {
    status: AtomicU32,
    /// Tasks in this group; 0 for a task that is not its first.
    members: AtomicU32,
    /// Bytes of the group that are neither moved nor given up.
    remaining: AtomicU64,
    /// 0, or the final status that the group will get instead of `Completed`; and [`PUBLISHED`].
    verdict: AtomicU32,
    /// The group's [`Aim`]: `target << 1 | write`.
    aim: AtomicU32,
    generation: AtomicU32,
    life: AtomicU32,
    /// When the group was submitted, microseconds: the low bits, which go round in 71 minutes.
    started: AtomicU32,
    /// When the group must have ended, nanoseconds.
    deadline: AtomicU64,
    length: AtomicU64,
    cookie: AtomicU64,
}

/// How long after a deadline it is not left to the rail any more, nanoseconds: several of its looks.
const OVERDUE: u64 = 200_000_000;

fn microseconds(nanoseconds: u64) -> u32 {
    (nanoseconds / 1000) as u32
}

/// Past a deadline by so much that its rail should have seen to it.
fn late(now: u64, deadline: u64) -> bool {
    now >= deadline.saturating_add(OVERDUE)
}

/// In a verdict: the group's status has been published.
const PUBLISHED: u32 = 1 << 31;

/// In a batch's holds: one that is no group.
const PIN: u64 = 1 << 32;

#[derive(Default)]
pub(super) struct Batch {
    capacity: AtomicU32,
    used: AtomicU32,
    unfinished: AtomicU32,
    /// Tasks that ended with something else than `Completed`.
    failed: AtomicU32,
    /// Groups in the lower half, others ([`PIN`]) in the upper one; 0: not in use.
    holds: AtomicU64,
    /// The earliest deadline of its groups.
    earliest: AtomicU64,
    /// Why groups failed or timed out, by first task.
    failures: Mutex<BTreeMap<u32, Failure>>,
    /// There are some, so that success never looks. (`failed` does not tell: a group that was found overdue may
    /// complete all the same, if it was about to.)
    explained: AtomicBool,
    /// Made when the slot is first used: a slot is small, its tasks may be many.
    tasks: OnceLock<Box<[Task]>>,
}

/// Largest batch: 2^20 tasks.
pub const MAX_BATCH: u32 = 1 << (CLASSES - 1);
const CLASSES: u32 = if cfg!(loom) { 2 } else { 21 };
const INDEX_BITS: u32 = 27;

/// A slot's size class, and its index there.
fn split(slot: u32) -> (usize, u32) {
    ((slot >> INDEX_BITS) as usize, slot & ((1 << INDEX_BITS) - 1))
}

/// All batches, by size class (capacities rounded up to powers of two), so that one that is freed
/// serves the next of its size without an allocation.
pub(super) struct Batches {
    classes: [Table<Batch>; CLASSES as usize],
    seal: Seal,
}

/// Finds groups, faster where one follows another of the same batch.
pub(super) struct Groups<'a> {
    all: &'a Batches,
    slot: u32,
    tasks: &'a [Task],
}

impl<'a> Groups<'a> {
    /// A group, which must be held.
    #[inline]
    pub fn get(&mut self, group: GroupRef) -> &'a Task {
        if group.slot != self.slot {
            (self.slot, self.tasks) = (group.slot, self.all.at(group.slot).tasks());
        }
        &self.tasks[group.first as usize]
    }

    /// Claims the publication of a group: true for one caller. `each` is called with every member's
    /// cookie, bytes moved and status; then [`Batches::finish`] makes the status visible.
    pub fn claim(&mut self, ended: &Ended, mut each: impl FnMut(u64, u64, Status)) -> bool {
        let leader = self.get(ended.group);
        if leader.verdict.fetch_or(PUBLISHED, Ordering::AcqRel) & PUBLISHED != 0 {
            return false;
        }
        let count = leader.members.load(Ordering::Relaxed);
        for task in &self.tasks[ended.group.first as usize..][..count as usize] {
            let moved = match ended.status {
                Status::Completed => task.length.load(Ordering::Relaxed),
                _ => 0,
            };
            each(task.cookie.load(Ordering::Relaxed), moved, ended.status);
        }
        true
    }
}

/// A batch that cannot be recycled while this exists.
pub(super) struct Pin<'a> {
    all: &'a Batches,
    pub slot: u32,
    pub batch: &'a Batch,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.all.release(self.slot, self.batch, PIN);
    }
}

impl Batches {
    pub fn new(seal: Seal) -> Self {
        Self { classes: std::array::from_fn(|_| Table::default()), seal }
    }

    /// A new batch for up to `capacity` tasks, 1 to [`MAX_BATCH`].
    pub fn allocate(&self, capacity: u32) -> Result<BatchId> {
        if capacity == 0 || capacity > MAX_BATCH {
            return Err(Error::invalid(format!(
                "a batch of {capacity} requests: 1 to {MAX_BATCH} are possible"
            )));
        }
        let class = capacity.next_power_of_two().ilog2();
        let full = || Error::new(Code::TooManyRequests, "too many batches are allocated");
        let (index, generation) =
            self.classes[class as usize].take(Batch::default).ok_or_else(full)?;
        if index >= 1 << INDEX_BITS {
            return Err(full());
        }
        let slot = class << INDEX_BITS | index;
        let batch = self.at(slot);
        batch.tasks.get_or_init(|| (0..1_u32 << class).map(|_| Task::default()).collect());
        batch.capacity.store(capacity, Ordering::Relaxed);
        batch.used.store(0, Ordering::Relaxed);
        batch.unfinished.store(0, Ordering::Relaxed);
        batch.failed.store(0, Ordering::Relaxed);
        batch.earliest.store(u64::MAX, Ordering::Relaxed);
        // Last: a stale pin sees 0 and refuses until the rest is set.
        batch.holds.store(PIN, Ordering::Release);
        Ok(BatchId(self.seal.number(slot, generation)))
    }

    /// Keeps a batch from being recycled; an error for a number that is not a batch.
    pub fn pin(&self, id: BatchId) -> Result<Pin<'_>> {
        let (slot, generation) = self.seal.place(id.0);
        let unknown = || {
            Error::invalid(format!("{:#x} is not a batch of this transport (or was freed)", id.0))
        };
        let (class, index) = split(slot);
        let table = self.classes.get(class).ok_or_else(unknown)?;
        let batch = table.get(index, generation).ok_or_else(unknown)?;
        if !batch.hold_if_used() {
            return Err(unknown());
        }
        let pin = Pin { all: self, slot, batch };
        // It may have been freed between the look-up and the hold.
        if table.get(index, generation).is_none() {
            return Err(unknown());
        }
        Ok(pin)
    }

    /// Frees a batch whose tasks all have a final status.
    pub fn free(&self, id: BatchId) -> Result<()> {
        let pin = self.pin(id)?;
        let unfinished = pin.batch.unfinished.load(Ordering::Acquire);
        if unfinished > 0 {
            return Err(Error::new(
                Code::Busy,
                format!("the batch has {unfinished} requests under way; wait or cancel first"),
            ));
        }
        self.detach(id);
        Ok(())
    }

    /// Gives up a batch's number now, and the batch when its last group ends.
    pub fn detach(&self, id: BatchId) {
        let (slot, generation) = self.seal.place(id.0);
        let (class, index) = split(slot);
        if self.classes[class].retire(index, generation) {
            self.release(slot, self.at(slot), PIN); // the owner's
        }
    }

    /// How many places for batches of up to `capacity` tasks have ever been used.
    #[cfg(test)]
    pub fn places(&self, capacity: u32) -> usize {
        let class = capacity.next_power_of_two().ilog2();
        let used = |batch: &&Batch| batch.tasks.get().is_some();
        self.classes[class as usize].iter().filter(used).count()
    }

    /// [`Pin::overdue`] of every batch.
    pub fn overdue(&self, now: u64, mut each: impl FnMut(Ended)) {
        for (class, table) in (0_u32..).zip(&self.classes) {
            for (index, batch) in (0_u32..).zip(table.iter()) {
                if batch.may_be_late(now) && batch.hold_if_used() {
                    let pin = Pin { all: self, slot: class << INDEX_BITS | index, batch };
                    pin.overdue(now).for_each(&mut each);
                }
            }
        }
    }

    /// Gives up `holds` holds.
    fn release(&self, slot: u32, batch: &Batch, holds: u64) {
        if batch.holds.fetch_sub(holds, Ordering::AcqRel) == holds {
            if batch.explained.load(Ordering::Relaxed) {
                batch.failures.lock().clear();
                batch.explained.store(false, Ordering::Relaxed);
            }
            let (class, index) = split(slot);
            self.classes[class].give_back(index);
        }
    }

    fn at(&self, slot: u32) -> &Batch {
        let (class, index) = split(slot);
        self.classes[class].at(index).expect("a held batch's slot exists")
    }

    pub fn group(&self, group: GroupRef) -> &Task {
        &self.at(group.slot).tasks()[group.first as usize]
    }

    /// Bytes of a group, moved or not.
    pub fn length(&self, group: GroupRef) -> u64 {
        let tasks = &self.at(group.slot).tasks()[group.first as usize..];
        let count = tasks[0].members.load(Ordering::Relaxed) as usize;
        tasks[..count].iter().map(|task| task.length.load(Ordering::Relaxed)).sum()
    }

    /// [`Self::group`] for many groups.
    pub fn groups(&self) -> Groups<'_> {
        Groups { all: self, slot: u32::MAX, tasks: &[] }
    }

    /// One more hold on a group's batch, for an [`Ended`] besides the one of its last byte.
    pub fn hold(&self, group: GroupRef) {
        self.at(group.slot).holds.fetch_add(1, Ordering::Relaxed);
    }

    /// Condemns a group (see [`Task::condemn`]) and keeps `failure` as the reason, unless it has one. True
    /// if it had none.
    pub fn fail(&self, group: GroupRef, verdict: Status, failure: &Failure) -> bool {
        let batch = self.at(group.slot);
        // Under the lock: whoever else finds the group condemned finds the reason too.
        let mut failures = batch.failures.lock();
        batch.tasks()[group.first as usize].condemn(verdict);
        let Entry::Vacant(place) = failures.entry(group.first) else { return false };
        place.insert(failure.clone());
        batch.explained.store(true, Ordering::Relaxed);
        true
    }

    /// Makes the status of claimed groups visible, and gives up the holds in `ended`. What is counted is
    /// counted once for neighbours of one batch.
    pub fn finish(&self, ended: impl Iterator<Item = Ended>) {
        let mut ended = ended.peekable();
        while let Some(first) = ended.next() {
            let slot = first.group.slot;
            let batch = self.at(slot);
            let tasks = batch.tasks();
            let mut count = batch.finish(tasks, &first);
            let mut holds = 1;
            while let Some(next) = ended.next_if(|next| next.group.slot == slot) {
                count += batch.finish(tasks, &next);
                holds += 1;
            }
            batch.unfinished.fetch_sub(count, Ordering::Release);
            self.release(slot, batch, holds);
        }
    }

    /// [`Pin::condemn`] for every batch.
    pub fn condemn_all(&self, verdict: Status) {
        self.classes.iter().flat_map(Table::iter).for_each(|batch| batch.condemn(verdict));
    }
}

impl Pin<'_> {
    /// Reserves `count` tasks and returns the first one's index.
    pub fn reserve(&self, count: u32) -> Result<u32> {
        let capacity = self.batch.capacity.load(Ordering::Relaxed);
        let reserved = self.batch.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| {
            used.checked_add(count).filter(|&used| used <= capacity)
        });
        reserved.map_err(|used| {
            Error::new(
                Code::TooManyRequests,
                format!("{count} requests do not fit: the batch holds {used} of {capacity}"),
            )
        })
    }

    /// Before `groups` groups of `tasks` tasks in all are started, with this deadline: counts them, at
    /// once for all of them. Each group holds the batch until it is published as quiet.
    pub fn begin(&self, groups: u32, tasks: u32, deadline: u64) {
        self.batch.unfinished.fetch_add(tasks, Ordering::Relaxed);
        self.batch.holds.fetch_add(u64::from(groups), Ordering::Relaxed);
        self.batch.earliest.fetch_min(deadline, Ordering::Release);
    }

    /// Makes the tasks from `first` on one group, counted by [`Self::begin`]: one task for each of `tasks`,
    /// which are lengths and cookies.
    pub fn start_group(
        &self,
        first: u32,
        tasks: &[(u64, u64)],
        bytes: u64,
        aim: Aim,
        now: u64,
        deadline: u64,
    ) -> GroupRef {
        let places = &self.batch.tasks()[first as usize..][..tasks.len()];
        for (place, &(length, cookie)) in places.iter().zip(tasks) {
            place.members.store(0, Ordering::Relaxed);
            place.length.store(length, Ordering::Relaxed);
            place.cookie.store(cookie, Ordering::Relaxed);
            place.status.store(Status::Pending as u32, Ordering::Release);
        }
        let leader = &places[0];
        leader.remaining.store(bytes, Ordering::Relaxed);
        leader.verdict.store(0, Ordering::Relaxed);
        leader.aim.store(aim.target << 1 | u32::from(aim.write), Ordering::Relaxed);
        leader.generation.store(aim.generation, Ordering::Relaxed);
        leader.life.store(aim.life, Ordering::Relaxed);
        leader.started.store(microseconds(now), Ordering::Relaxed);
        leader.deadline.store(deadline, Ordering::Relaxed);
        // Last: a group that others can see is whole.
        leader.members.store(tasks.len() as u32, Ordering::Release);
        self.group_at(first)
    }

    /// A [`GroupRef::planned`] group, when its submission's tasks start at `first`.
    pub fn started(&self, planned: GroupRef, first: u32) -> GroupRef {
        self.group_at(first + planned.first)
    }

    /// The group whose first task is `first`.
    fn group_at(&self, first: u32) -> GroupRef {
        GroupRef { slot: self.slot, first }
    }

    /// Groups started and not given back by the provider, whether or not their status is final.
    pub fn in_use(&self) -> u32 {
        self.batch.holds.load(Ordering::Acquire) as u32
    }

    /// Status and bytes moved of a task.
    pub fn task(&self, index: u32) -> Result<(Status, u64)> {
        let used = self.batch.used.load(Ordering::Acquire);
        if index >= used {
            return Err(Error::invalid(format!("the batch has {used} tasks, none number {index}")));
        }
        let task = &self.batch.tasks()[index as usize];
        let status = Status::from_number(task.status.load(Ordering::Acquire));
        let moved = match status {
            Status::Completed => task.length.load(Ordering::Relaxed),
            _ => 0,
        };
        Ok((status, moved))
    }

    /// Why task `index` failed or timed out.
    pub fn failure(&self, index: u32) -> Result<Option<Failure>> {
        let (status, _) = self.task(index)?;
        if !matches!(status, Status::Failed | Status::Timeout) {
            return Ok(None);
        }
        let tasks = &self.batch.tasks()[..=index as usize];
        let first = tasks.iter().rposition(|task| task.members.load(Ordering::Relaxed) > 0);
        Ok(first.and_then(|first| self.batch.failures.lock().get(&(first as u32)).cloned()))
    }

    /// Status of the batch as a whole: pending until every task has a final status, then completed
    /// or failed. A batch without tasks is completed.
    pub fn status(&self) -> Status {
        if self.batch.unfinished.load(Ordering::Acquire) > 0 {
            Status::Pending
        } else if self.batch.failed.load(Ordering::Relaxed) > 0 {
            Status::Failed
        } else {
            Status::Completed
        }
    }

    /// Tasks submitted.
    pub fn used(&self) -> u32 {
        self.batch.used.load(Ordering::Acquire)
    }

    /// See [`Batch::may_be_late`].
    pub fn may_be_late(&self, now: u64) -> bool {
        self.batch.may_be_late(now)
    }

    /// Groups whose deadline passed a while ago, each with a hold. Their rails see to deadlines
    /// themselves; these are for a rail whose driver does not come back from the provider.
    pub fn overdue(&self, now: u64) -> impl Iterator<Item = Ended> {
        (0..self.used()).zip(self.batch.tasks()).filter_map(move |(first, task)| {
            // In this order: a task that is pending has left its former life.
            let pending = task.status.load(Ordering::Acquire) == Status::Pending as u32
                && task.members.load(Ordering::Acquire) > 0
                && late(now, task.deadline.load(Ordering::Relaxed));
            pending.then(|| {
                self.batch.holds.fetch_add(1, Ordering::Relaxed);
                Ended::new(self.group_at(first), Status::Timeout)
            })
        })
    }

    /// Ends what has not been posted yet, and waits for the rest: see [`Task::condemn`].
    pub fn condemn(&self, verdict: Status) {
        self.batch.condemn(verdict);
    }
}

impl Batch {
    /// Makes the status of a claimed group visible, whose tasks are among these of the batch. How many
    /// tasks it has.
    fn finish(&self, tasks: &[Task], ended: &Ended) -> u32 {
        if !ended.claimed {
            return 0;
        }
        let tasks = &tasks[ended.group.first as usize..];
        let count = tasks[0].members.load(Ordering::Relaxed);
        if ended.status != Status::Completed {
            self.failed.fetch_add(count, Ordering::Relaxed);
        }
        for task in &tasks[..count as usize] {
            task.status.store(ended.status as u32, Ordering::Release);
        }
        count
    }

    /// A task may be [`late`]; false: none is.
    fn may_be_late(&self, now: u64) -> bool {
        late(now, self.earliest.load(Ordering::Acquire))
    }

    /// One more hold, unless nobody has any.
    fn hold_if_used(&self) -> bool {
        let more = |holds| (holds > 0).then_some(holds + PIN);
        self.holds.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).is_ok()
    }

    fn tasks(&self) -> &[Task] {
        self.tasks.get().map_or(&[], |tasks| tasks)
    }

    fn condemn(&self, verdict: Status) {
        // First: where some are used, they have been made. (Whoever condemns all meets batches that are not.)
        let used = self.used.load(Ordering::Acquire) as usize;
        for task in &self.tasks()[..used] {
            if task.members.load(Ordering::Relaxed) > 0 {
                task.condemn(verdict);
            }
        }
    }
}

impl Task {
    /// Takes `bytes` off the group's remaining ones. `Some` with its final status for the caller
    /// who took the last.
    pub fn subtract(&self, bytes: u64) -> Option<Status> {
        // If only these are left, nobody else has any to take off: a store will do.
        if self.remaining.load(Ordering::Acquire) == bytes {
            self.remaining.store(0, Ordering::Relaxed);
        } else if self.remaining.fetch_sub(bytes, Ordering::AcqRel) != bytes {
            return None;
        }
        Some(match self.verdict.load(Ordering::Acquire) & !PUBLISHED {
            0 => Status::Completed,
            verdict => Status::from_number(verdict),
        })
    }

    /// Settles that the group will end with `verdict`, unless it was settled already. Pieces that
    /// are not posted will be given up; posted ones must come back first.
    pub fn condemn(&self, verdict: Status) {
        let _ =
            self.verdict.compare_exchange(0, verdict as u32, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// What the group does.
    pub fn aim(&self) -> Aim {
        let aim = self.aim.load(Ordering::Relaxed);
        Aim {
            target: aim >> 1,
            generation: self.generation.load(Ordering::Relaxed),
            life: self.life.load(Ordering::Relaxed),
            write: aim & 1 == 1,
        }
    }

    /// All of the group goes to this life of its target.
    pub fn set_life(&self, life: u32) {
        self.life.store(life, Ordering::Relaxed);
    }

    /// Nanoseconds since the group was submitted, in whole microseconds.
    pub fn age(&self, now: u64) -> u64 {
        let age = microseconds(now).wrapping_sub(self.started.load(Ordering::Relaxed));
        u64::from(age) * 1000
    }

    /// When the group must have ended, nanoseconds.
    pub fn deadline(&self) -> u64 {
        self.deadline.load(Ordering::Relaxed)
    }

    /// Bytes of the group that have not ended.
    pub fn remaining(&self) -> u64 {
        self.remaining.load(Ordering::Relaxed)
    }

    /// The group's verdict is settled: nothing more of it should be posted.
    pub fn is_condemned(&self) -> bool {
        self.verdict.load(Ordering::Relaxed) & !PUBLISHED != 0
    }
}
