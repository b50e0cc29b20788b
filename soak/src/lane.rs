//! One thread's transfers to one peer, in rounds: fill, move, and look at every byte on both sides.
//!
//! The memory of a transfer is used again the moment that the transport allows it: sources are
//! overwritten as soon as a transfer is completed, and so, often, is what it wrote. A transport that
//! calls a transfer completed while anything may still read or write its memory is caught by that.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use mooncake_efa::Code;
use mooncake_efa::engine::{BatchId, Finished, Request, Status, TargetId};
use mooncake_efa::fabric::{Buffer, Memory};
use mooncake_efa::transport::Transport;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::memory::{Bytes, Foreign, Known, Wrong};
use crate::pattern::Pattern;
use crate::peers::{Peer, Peers};
use crate::tally::Link;

/// Bytes of a slot: at most so many move at a time. Each transfer of a round has a slot of its own on
/// both sides; what it leaves of it must stay as it is.
pub const SLOT: u64 = 256 << 10;
/// Most transfers of a round.
pub const BATCH: usize = 64;
/// By how much any call may exceed its own limit on a busy machine.
pub const MARGIN: Duration = Duration::from_secs(10);
/// Rounds after which all memory is looked at, not only what was used.
const LOOK_EVERY: u64 = 8;
/// Pause between two batches to a peer that is gone.
const KNOCK: Duration = Duration::from_millis(10);

/// What a lane is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaneSpec {
    /// Where its memory starts in the peer's.
    pub remote: u64,
    /// Slots of its memory, on either side.
    pub slots: u32,
    /// Transfers of a round, at most [`BATCH`].
    pub batch: usize,
    /// Their deadline, milliseconds; 0: the transport's own.
    pub timeout_ms: u64,
}

/// What all lanes of a process have in common.
pub struct Common {
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// The transport's own deadline of a transfer.
    pub timeout: Duration,
    /// Cancel some batches.
    pub cancels: bool,
    /// Words, one of which a failure's cause must have.
    pub causes: Vec<String>,
    /// To say what is wrong: its kind, and one line.
    pub note: Box<dyn Fn(&'static str, String) + Send + Sync>,
}

/// How a round waits for its end, as different hosts do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// [`Transport::wait`].
    Wait,
    /// Asks for the status again and again.
    Poll,
    /// Without a batch; is told by the observer.
    Detached,
}

/// Told of ends by the transport's observer.
pub struct Ledger {
    /// The round that is under way.
    round: AtomicU64,
    /// By transfer: the round whose end was told last, and its status: `round << 8 | status`.
    ends: [AtomicU64; BATCH],
    /// Ends that were told twice, or of a round that was over.
    strays: AtomicU64,
}

impl Default for Ledger {
    fn default() -> Self {
        let ends = std::array::from_fn(|_| AtomicU64::default());
        Self { round: AtomicU64::default(), ends, strays: AtomicU64::default() }
    }
}

impl Ledger {
    /// What a request carries. `lane` is the number of the lane in its process.
    fn cookie(lane: usize, round: u64, index: usize) -> u64 {
        (lane as u64) << 48 | (round & 0xffff_ffff) << 8 | index as u64
    }

    /// The lane that a cookie is of.
    pub fn lane_of(cookie: u64) -> usize {
        (cookie >> 48) as usize
    }

    /// Takes down an end.
    pub fn tell(&self, finished: &Finished) {
        let (round, index) =
            ((finished.cookie >> 8) & 0xffff_ffff, (finished.cookie & 0xff) as usize);
        let end = round << 8 | finished.status as u64;
        let before = self.ends[index].swap(end, Ordering::AcqRel);
        if before >> 8 == round || round != self.round.load(Ordering::Acquire) {
            self.strays.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How a transfer of this round ended, if that was told.
    fn end(&self, round: u64, index: usize) -> Option<u8> {
        let end = self.ends[index].load(Ordering::Acquire);
        (end >> 8 == round).then_some(end as u8)
    }
}

/// A call into the transport that is under way.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Which.
    pub what: &'static str,
    /// Since when.
    pub since: Instant,
    /// How long it may take.
    pub limit: Duration,
}

/// What others see of a lane.
pub struct Shared {
    /// The peer's name.
    pub peer: String,
    /// Counts, with those of other lanes to that peer.
    pub link: Arc<Link>,
    /// Ends.
    pub ledger: Ledger,
    /// What it is waiting for.
    pub call: Mutex<Option<Call>>,
}

/// One transfer of a round: `length` bytes between these offsets of the lane's memory.
#[derive(Clone, Copy, Debug)]
struct Move {
    local: u64,
    remote: u64,
    length: u64,
}

impl Move {
    fn here(&self) -> Range<u64> {
        self.local..self.local + self.length
    }

    fn there(&self) -> Range<u64> {
        self.remote..self.remote + self.length
    }
}

fn slot_of(offset: u64) -> u32 {
    (offset / SLOT) as u32
}

fn slot_range(slot: u32) -> Range<u64> {
    u64::from(slot) * SLOT..u64::from(slot + 1) * SLOT
}

/// Memory of a batch that ended otherwise than completed, and is not quiet yet.
struct Burnt {
    /// None: nobody can say when it is.
    batch: Option<BatchId>,
    round: u64,
    write: bool,
    moves: Vec<Move>,
    /// Whether the other side is the one that it went to.
    attached: bool,
}

/// The other side.
struct Attached {
    target: TargetId,
    peer: Peer,
    memory: Known<Foreign>,
    /// Slots that nothing uses.
    free: Vec<u32>,
}

/// The other side's process is gone.
struct Gone;

impl From<std::io::Error> for Gone {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

/// See the module's documentation.
pub struct Lane {
    number: usize,
    spec: LaneSpec,
    shared: Arc<[Shared]>,
    common: Arc<Common>,
    transport: Arc<Transport>,
    peers: Peers,
    rng: Rng,
    round: u64,
    memory: Known<Arc<Buffer>>,
    free: Vec<u32>,
    junk: Vec<u8>,
    other: Option<Attached>,
    /// A peer that is gone, still in the transport, and what to send it there.
    former: Option<(TargetId, u64)>,
    burnt: Vec<Burnt>,
    /// Of the last peer's memory, for the next one's.
    spare: Vec<u8>,
}

impl Lane {
    /// Registers the lane's memory.
    pub fn new(
        number: usize,
        spec: LaneSpec,
        shared: Arc<[Shared]>,
        common: Arc<Common>,
        transport: Arc<Transport>,
        peers: Peers,
    ) -> anyhow::Result<Self> {
        let first = Pattern::new(common.seed, number as u64, 0, 0);
        Ok(Self {
            rng: Rng::with_seed(common.seed ^ (number as u64) << 32),
            memory: own_memory(&transport, &spec, first)?,
            free: (0..spec.slots).collect(),
            junk: vec![0; SLOT as usize],
            number,
            spec,
            shared,
            common,
            transport,
            peers,
            round: 0,
            other: None,
            former: None,
            burnt: Vec::new(),
            spare: Vec::new(),
        })
    }

    fn here(&self) -> &Shared {
        &self.shared[self.number]
    }

    fn timeout(&self) -> Duration {
        match self.spec.timeout_ms {
            0 => self.common.timeout,
            own => Duration::from_millis(own),
        }
    }

    fn note(&self, kind: &'static str, what: &str) {
        let (peer, seed) = (&self.here().peer, self.common.seed);
        let place = format!("lane {} to {peer}, round {}, seed {seed}", self.number, self.round);
        (self.common.note)(kind, format!("{place}: {what}"));
    }

    /// A call into the transport that may take so long and [`MARGIN`], under watch.
    fn watched<T>(&self, what: &'static str, limit: Duration, call: impl FnOnce() -> T) -> T {
        let limit = limit + MARGIN;
        *self.here().call.lock() = Some(Call { what, since: Instant::now(), limit });
        let result = call();
        *self.here().call.lock() = None;
        result
    }

    /// Round after round, until there is to be no more.
    pub fn run(mut self, running: impl Fn() -> bool) {
        while running() {
            if self.other.is_none() && !self.attach() {
                self.knock();
                continue;
            }
            self.round += 1;
            if self.one_round().is_err() {
                self.detach();
            }
        }
        // What must be quiet by now, and is still as it should be.
        let limit = Instant::now() + self.timeout();
        while self.burnt.iter().any(|burnt| burnt.batch.is_some()) && Instant::now() < limit {
            if self.cool().is_err() {
                self.detach();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.look_at_all().is_err() {
            self.detach();
        }
    }

    // ---- the other side -----------------------------------------------------------------------

    /// Finds the peer that has the name now, and makes it known to the transport.
    fn attach(&mut self) -> bool {
        let length = u64::from(self.spec.slots) * SLOT;
        let Ok(peer) = self.peers.find(&self.here().peer) else { return false };
        let base = peer.address + self.spec.remote;
        let Ok(memory) = Foreign::open(peer.pid, base) else { return false };
        let first = Pattern::new(self.common.seed, self.number as u64, self.round, 1);
        let spare = std::mem::take(&mut self.spare);
        let Ok(memory) = Known::reusing(spare, memory, length, first) else { return false };
        let segment = match peer.segment() {
            Ok(segment) => segment,
            Err(error) => {
                self.note("call", &format!("the peer's descriptor: {error}"));
                return false;
            }
        };
        // As hosts do either: a newer descriptor for the same segment, or another segment.
        let transport = self.transport.clone();
        let opened = match self.former.take() {
            Some((target, _)) if self.rng.bool() => self
                .watched("update_segment", MARGIN, || transport.update_segment(target, &segment))
                .map(|()| target),
            former => {
                if let Some((target, _)) = former {
                    let closed =
                        self.watched("close_segment", MARGIN, || transport.close_segment(target));
                    if let Err(error) = closed {
                        self.note("call", &format!("close_segment: {error}"));
                    }
                }
                self.watched("open_segment", MARGIN, || transport.open_segment(&segment))
            }
        };
        match opened {
            Ok(target) => {
                if self.rng.bool() {
                    let warm_up = || self.transport.warm_up(target);
                    if let Err(error) = self.watched("warm_up", MARGIN, warm_up) {
                        self.note("call", &format!("warm_up: {error}"));
                    }
                }
                let free = (0..self.spec.slots).collect();
                self.other = Some(Attached { target, peer, memory, free });
                true
            }
            Err(error) => {
                self.note("call", &format!("the segment cannot be opened: {error}"));
                false
            }
        }
    }

    /// The peer is gone. What was moved to or from it need only be quiet here.
    fn detach(&mut self) {
        if let Some(other) = self.other.take() {
            self.former = Some((other.target, other.peer.address + self.spec.remote));
            self.spare = other.memory.leave();
            self.burnt.iter_mut().for_each(|burnt| burnt.attached = false);
        }
    }

    /// Transfers to a peer that is gone, as of a host that does not know yet.
    fn knock(&mut self) {
        if let Some((target, base)) = self.former {
            self.round += 1;
            let cooled = self.cool();
            self.renew();
            if cooled.is_ok() && self.free.len() >= self.spec.batch {
                let write = self.rng.bool();
                let moves: Vec<Move> = self.free[..self.spec.batch]
                    .iter()
                    .map(|&slot| slot_range(slot).start)
                    .map(|at| Move { local: at, remote: at, length: SLOT })
                    .collect();
                let _ = self.transfer(target, base, write, &moves);
            }
        }
        std::thread::sleep(KNOCK);
    }

    // ---- a round ------------------------------------------------------------------------------

    fn one_round(&mut self) -> Result<(), Gone> {
        self.cool()?;
        self.renew();
        let Some(moves) = self.plan() else {
            // Every slot of the peer's is burnt, and stays so until the provider gives it back.
            std::thread::sleep(KNOCK);
            return Ok(());
        };
        let write = self.rng.bool();
        let pattern = Pattern::new(self.common.seed, self.number as u64, self.round, 2);
        let other = self.other.as_mut().expect("attached");
        for it in &moves {
            match write {
                true => self.memory.fill(it.here(), pattern)?,
                false => other.memory.fill(it.there(), pattern)?,
            }
        }
        let (target, base) = (other.target, other.peer.address + self.spec.remote);
        self.transfer(target, base, write, &moves)?;
        if self.round % LOOK_EVERY == 0 {
            self.look_at_all()?;
        }
        Ok(())
    }

    /// Slots and ranges in them: whole slots, small pieces, or anything; side by side or anywhere.
    fn plan(&mut self) -> Option<Vec<Move>> {
        let other = self.other.as_mut().expect("attached");
        let rng = &mut self.rng;
        let count = self.spec.batch.min(self.free.len()).min(other.free.len());
        if count == 0 {
            return None;
        }
        for free in [&mut self.free, &mut other.free] {
            match rng.bool() {
                true => free.sort_unstable(),
                false => rng.shuffle(free),
            }
        }
        let kind = rng.u8(0..20);
        let pick = |(&local, &remote): (&u32, &u32)| {
            let longest = match kind {
                0..12 => SLOT,
                12..17 => 16 << 10,
                _ => SLOT,
            };
            let length = if kind < 12 { SLOT } else { rng.u64(0..=longest) };
            let mut place = |slot: u32| slot_range(slot).start + rng.u64(0..=SLOT - length);
            Move { local: place(local), remote: place(remote), length }
        };
        Some(self.free[..count].iter().zip(&other.free[..count]).map(pick).collect())
    }

    /// One batch, from submission until its memory can be used again, or is put aside.
    fn transfer(
        &mut self,
        target: TargetId,
        base: u64,
        write: bool,
        moves: &[Move],
    ) -> Result<(), Gone> {
        let (transport, shared) = (self.transport.clone(), self.shared.clone());
        let (link, ledger) = (&shared[self.number].link, &shared[self.number].ledger);
        let count = moves.len() as u64;
        let style = match self.rng.u8(0..4) {
            0 | 1 => Style::Wait,
            2 => Style::Poll,
            _ => Style::Detached,
        };
        let junk = Pattern::new(self.common.seed, self.number as u64, self.round, 3);
        junk.fill(0, &mut self.junk);
        let (number, round) = (self.number, self.round);
        let address = self.memory.bytes().address();
        let requests = moves.iter().enumerate().map(|(index, it)| Request {
            write,
            local: address + it.local,
            target,
            remote: base + it.remote,
            length: it.length,
            cookie: Ledger::cookie(number, round, index),
        });
        ledger.round.store(round, Ordering::Release);
        link.count(|tally| tally.tried += count);
        link.start(count);

        let own = self.spec.timeout_ms == 0 && self.rng.bool();
        let timeout = (!own).then_some(self.timeout());
        let submitted = self.watched("submit", Duration::ZERO, || match style {
            Style::Detached => transport.submit_detached(requests, timeout).map(|()| None),
            _ => {
                let batch = transport.allocate_batch(moves.len() as u32)?;
                transport.submit(batch, requests, timeout).map(|_| Some(batch)).inspect_err(|_| {
                    if let Err(error) = transport.free_batch(batch) {
                        self.note("call", &format!("freeing a batch that was refused: {error}"));
                    }
                })
            }
        });
        let batch = match submitted {
            Ok(batch) => batch,
            Err(error) => {
                link.end(count, false);
                self.blame(count, Some(&error.text));
                return self.check(moves);
            }
        };
        if self.common.cancels && batch.is_some() && self.rng.u8(0..16) == 0 {
            std::thread::sleep(Duration::from_micros(self.rng.u64(0..2000)));
            let cancel = || transport.cancel(batch.expect("checked"));
            if let Err(error) = self.watched("cancel", Duration::ZERO, cancel) {
                self.note("call", &format!("cancel: {error}"));
            }
        }
        let ended = self.wait(style, batch, moves.len());

        // As soon as it is known: what was completed is ours again.
        let status_of = |index: usize| match batch {
            Some(batch) => {
                transport.task_status(batch, index as u32).ok().map(|(status, _)| status)
            }
            None => ledger.end(round, index).map(status_from),
        };
        let statuses: Vec<_> = (0..moves.len()).map(status_of).collect();
        let is_done = |status: &Option<Status>| *status == Some(Status::Completed);
        let done = moves.iter().zip(&statuses).filter(|(_, status)| is_done(status));
        let done: Vec<Move> = done.map(|(it, _)| *it).collect();
        let seen = self.overwrite(write, &done);

        let bytes = done.iter().map(|it| it.length).sum::<u64>();
        link.count(|tally| {
            tally.completed += done.len() as u64;
            tally.bytes += bytes;
        });
        for (index, status) in statuses.iter().enumerate() {
            let told = ledger.end(round, index);
            match *status {
                Some(status) if status.is_final() && told == Some(status as u8) => {
                    self.account(batch, index as u32, status);
                }
                status => {
                    link.count(|tally| tally.lost += 1);
                    let after = if ended { "" } else { " after its deadline and more" };
                    self.note(
                        "lost",
                        &format!(
                            "transfer {index} ({style:?}): status {status:?}{after}, told {told:?}"
                        ),
                    );
                }
            }
        }
        let strays = ledger.strays.swap(0, Ordering::Relaxed);
        if strays > 0 {
            link.count(|tally| tally.lost += strays);
            self.note("lost", &format!("{strays} ends were told twice, or of a round before"));
        }

        let rest = moves.iter().zip(&statuses).filter(|(_, status)| !is_done(status));
        let quiet = batch.is_some_and(|batch| transport.is_quiet(batch).unwrap_or(false));
        // Only after a timeout anything may still be done to the memory of what has ended.
        let is_quiet = |status: &Option<Status>| {
            quiet || matches!(status, Some(Status::Failed | Status::Canceled | Status::Invalid))
        };
        let (rest, hot): (Vec<_>, Vec<_>) = rest.partition(|(_, status)| is_quiet(status));
        let rest: Vec<Move> = rest.into_iter().map(|(it, _)| *it).collect();
        let hot: Vec<Move> = hot.into_iter().map(|(it, _)| *it).collect();
        let attached = self.other.is_some();
        if !hot.is_empty() {
            self.put_aside(Burnt { batch, round, write, moves: hot, attached });
            self.settle(round, write, &rest)?;
        } else {
            if let Some(Err(error)) = batch.map(|batch| transport.free_batch(batch)) {
                link.count(|tally| tally.unexplained += 1);
                self.note("unexplained", &format!("a batch that has ended is not freed: {error}"));
            }
            self.settle(round, write, &rest)?;
        }
        seen?;
        self.check(&done)?;
        if self.rng.bool() {
            // Nothing may land there any more.
            self.stamp(!write, &done)?;
        }
        Ok(())
    }

    /// Waits for the end of all; whether it came.
    fn wait(&mut self, style: Style, batch: Option<BatchId>, count: usize) -> bool {
        let (transport, shared) = (self.transport.clone(), self.shared.clone());
        let (ledger, round) = (&shared[self.number].ledger, self.round);
        let patience = self.timeout() + MARGIN;
        let limit = Instant::now() + patience;
        match (style, batch) {
            (Style::Wait, Some(batch)) => {
                let waited = self.watched("wait", patience, || transport.wait(batch, patience));
                match waited {
                    Ok(_) => true,
                    Err(error) => {
                        if error.code != Code::Timeout {
                            self.note("call", &format!("wait: {error}"));
                        }
                        false
                    }
                }
            }
            (_, Some(batch)) => loop {
                let status = || transport.batch_status(batch);
                match self.watched("batch_status", Duration::ZERO, status) {
                    Ok((status, _)) if status.is_final() => return true,
                    Ok(_) if Instant::now() < limit => std::thread::yield_now(),
                    Ok(_) => return false,
                    Err(error) => {
                        self.note("call", &format!("batch_status: {error}"));
                        return false;
                    }
                }
            },
            (_, None) => loop {
                if (0..count).all(|index| ledger.end(round, index).is_some()) {
                    return true;
                }
                if Instant::now() >= limit {
                    return false;
                }
                self.watched("progress", Duration::ZERO, || transport.progress());
                std::thread::yield_now();
            },
        }
    }

    /// Counts one that ended, by its status and the cause that is given.
    fn account(&self, batch: Option<BatchId>, index: u32, status: Status) {
        let link = &self.here().link;
        let cause = batch.map(|batch| self.transport.task_error(batch, index).ok().flatten());
        match (status, &cause) {
            (Status::Completed, _) => {}
            (Status::Canceled, _) if self.common.cancels => {
                link.count(|tally| tally.canceled += 1);
            }
            // Or what went wrong last, before there was no more time to try again.
            (Status::Timeout, Some(Some(text)))
                if text.contains("deadline") || self.explains(text) =>
            {
                link.count(|tally| tally.timed_out += 1);
                self.note("timed out", text);
            }
            // Without a batch no cause can be asked for.
            (Status::Timeout, None) => link.count(|tally| tally.timed_out += 1),
            (Status::Failed, None) if !self.common.causes.is_empty() => {
                link.count(|tally| tally.failed += 1);
            }
            (Status::Failed, Some(text)) => self.blame(1, text.as_deref()),
            _ => {
                link.count(|tally| tally.unexplained += 1);
                self.note(
                    "unexplained",
                    &format!("transfer {index} ended as {status:?}, cause {cause:?}"),
                );
            }
        }
    }

    fn explains(&self, text: &str) -> bool {
        self.common.causes.iter().any(|words| text.contains(words.as_str()))
    }

    /// Counts failures, by whether the scenario explains the cause.
    fn blame(&self, count: u64, cause: Option<&str>) {
        let link = &self.here().link;
        let text = cause.unwrap_or("no cause is given");
        if self.explains(text) {
            link.count(|tally| tally.failed += count);
            self.note("failed", text);
        } else {
            link.count(|tally| tally.unexplained += count);
            self.note("unexplained", text);
        }
    }

    // ---- memory -------------------------------------------------------------------------------

    /// What is moved is where it should be from now on, and its source is overwritten, that first.
    fn overwrite(&mut self, write: bool, done: &[Move]) -> Result<(), Gone> {
        let Some(other) = &mut self.other else {
            // It went to one that we cannot look into any more.
            self.here().link.count(|tally| tally.unchecked += done.len() as u64);
            for it in done {
                self.memory.accept(slot_range(slot_of(it.local)))?;
            }
            return Ok(());
        };
        let mut gone = Ok(());
        for it in done {
            let junk = &self.junk[..it.length as usize];
            gone = gone.and(match write {
                true => Bytes::write(self.memory.bytes(), it.local, junk),
                false => other.memory.bytes().write(it.remote, junk),
            });
        }
        for it in done {
            let junk = &self.junk[..it.length as usize];
            if write {
                other.memory.expect(it.remote, self.memory.should(it.here()));
                self.memory.expect(it.local, junk);
            } else {
                self.memory.expect(it.local, other.memory.should(it.there()));
                other.memory.expect(it.remote, junk);
            }
        }
        if gone.is_err() {
            self.here().link.count(|tally| tally.unchecked += done.len() as u64);
        }
        Ok(gone?)
    }

    /// Overwrites ranges on one side.
    fn stamp(&mut self, here: bool, moves: &[Move]) -> Result<(), Gone> {
        let stamp = Pattern::new(self.common.seed, self.number as u64, self.round, 4);
        for it in moves {
            match &mut self.other {
                _ if here => self.memory.fill(it.here(), stamp)?,
                Some(other) => other.memory.fill(it.there(), stamp)?,
                None => {}
            }
        }
        Ok(())
    }

    /// Memory of transfers that did not complete, and is quiet: their sources are as they were, and what
    /// they were to write is as it was or as it should have become.
    fn settle(&mut self, round: u64, write: bool, rest: &[Move]) -> Result<(), Gone> {
        for it in rest {
            let Some(other) = &mut self.other else {
                // Whoever wrote to it is gone, and with it what it should be.
                self.memory.accept(slot_range(slot_of(it.local)))?;
                continue;
            };
            let (source, wrong) = match write {
                true => {
                    let source = self.memory.should(it.here()).to_vec();
                    (self.memory.check(it.here())?, other.memory.settle(it.remote, &source)?)
                }
                false => {
                    let source = other.memory.should(it.there()).to_vec();
                    (other.memory.check(it.there())?, self.memory.settle(it.local, &source)?)
                }
            };
            if let Some(wrong) = &source {
                self.corrupted(it, "the source of a transfer that did not complete", wrong, round);
            }
            if let Some(wrong) = &wrong {
                self.corrupted(
                    it,
                    "neither old nor new where a transfer did not complete",
                    wrong,
                    round,
                );
            }
        }
        Ok(())
    }

    /// Looks at the slots of transfers, on both sides.
    fn check(&mut self, moves: &[Move]) -> Result<(), Gone> {
        for it in moves {
            if let Some(wrong) = self.memory.check(slot_range(slot_of(it.local)))? {
                self.corrupted(it, "our memory", &wrong, self.round);
                self.memory.accept(slot_range(slot_of(it.local)))?;
            }
            let Some(other) = &mut self.other else { continue };
            let wrong = match other.memory.check(slot_range(slot_of(it.remote))) {
                Ok(wrong) => wrong,
                Err(_) => {
                    self.here().link.count(|tally| tally.unchecked += 1);
                    return Err(Gone);
                }
            };
            if let Some(wrong) = wrong {
                other.memory.accept(slot_range(slot_of(it.remote)))?;
                self.corrupted(it, "the peer's memory", &wrong, self.round);
            }
        }
        Ok(())
    }

    /// Looks at all memory that nothing uses.
    fn look_at_all(&mut self) -> Result<(), Gone> {
        let nothing = Move { local: 0, remote: 0, length: 0 };
        for slot in self.free.clone() {
            if let Some(wrong) = self.memory.check(slot_range(slot))? {
                self.corrupted(&nothing, "our memory, not in use", &wrong, self.round);
                self.memory.accept(slot_range(slot))?;
            }
        }
        let free = self.other.as_ref().map(|other| other.free.clone());
        for slot in free.into_iter().flatten() {
            let other = self.other.as_mut().expect("it has free slots");
            if let Some(wrong) = other.memory.check(slot_range(slot))? {
                other.memory.accept(slot_range(slot))?;
                self.corrupted(&nothing, "the peer's memory, not in use", &wrong, self.round);
            }
        }
        Ok(())
    }

    fn corrupted(&self, it: &Move, what: &str, wrong: &Wrong, round: u64) {
        self.here().link.count(|tally| tally.corrupted += 1);
        self.note("corrupted", &format!(
            "{what}, of round {round}: {} bytes, the first at offset {} of the lane: {:02x?}, not \
             {:02x?}; {it:?}",
            wrong.count, wrong.at, wrong.found, wrong.expected
        ));
    }

    /// Memory that is not quiet is not used, nor looked at.
    fn put_aside(&mut self, burnt: Burnt) {
        let slots = |of: fn(&Move) -> u64| -> Vec<u32> {
            burnt.moves.iter().map(|it| slot_of(of(it))).collect()
        };
        let (here, there) = (slots(|it| it.local), slots(|it| it.remote));
        self.free.retain(|slot| !here.contains(slot));
        if let Some(other) = self.other.as_mut().filter(|_| burnt.attached) {
            other.free.retain(|slot| !there.contains(slot));
        }
        self.here().link.count(|tally| tally.unquiet += burnt.moves.len() as u64);
        self.burnt.push(burnt);
    }

    /// Takes other memory where too much of it is not given back, as a host would have to.
    fn renew(&mut self) {
        if self.free.len() >= self.spec.batch {
            return;
        }
        let former = self.memory.bytes().address();
        let first = Pattern::new(self.common.seed, self.number as u64, self.round, 5);
        let made = own_memory(&self.transport, &self.spec, first);
        match made {
            Ok(memory) => self.memory = memory,
            Err(error) => return self.note("call", &format!("memory of its own again: {error}")),
        }
        self.free = (0..self.spec.slots).collect();
        let mut moves = 0;
        for burnt in std::mem::take(&mut self.burnt) {
            moves += burnt.moves.len() as u64;
            if let Some(Err(error)) = burnt.batch.map(|batch| self.transport.free_batch(batch)) {
                self.note("call", &format!("a batch that has ended is not freed: {error}"));
            }
        }
        let length = u64::from(self.spec.slots) * SLOT;
        // Also while that waits: there are two of them then.
        self.here().link.count(|tally| tally.kept += length);
        match self.transport.unregister(former) {
            // Then nothing uses it any more, also where that could not be asked.
            Ok(()) => self.here().link.count(|tally| {
                tally.unquiet -= moves;
                tally.kept -= length;
            }),
            Err(error) if error.code == Code::Busy => {}
            Err(error) => self.note("call", &format!("unregister: {error}")),
        }
    }

    /// Takes back what has become quiet.
    fn cool(&mut self) -> Result<(), Gone> {
        let transport = self.transport.clone();
        let (quiet, hot): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.burnt).into_iter().partition(|burnt| {
                let quiet = |batch| transport.is_quiet(batch).unwrap_or(false);
                self.watched("is_quiet", Duration::ZERO, || burnt.batch.is_some_and(quiet))
            });
        self.burnt = hot;
        let mut result = Ok(());
        for burnt in quiet {
            if let Err(error) = transport.free_batch(burnt.batch.expect("only these get quiet")) {
                self.note("call", &format!("a batch that is quiet cannot be freed: {error}"));
            }
            self.here().link.count(|tally| tally.unquiet -= burnt.moves.len() as u64);
            self.free.extend(burnt.moves.iter().map(|it| slot_of(it.local)));
            if let Some(other) = self.other.as_mut().filter(|_| burnt.attached) {
                other.free.extend(burnt.moves.iter().map(|it| slot_of(it.remote)));
                result = result.and(self.settle(burnt.round, burnt.write, &burnt.moves));
            } else {
                for it in &burnt.moves {
                    self.memory.accept(slot_range(slot_of(it.local)))?;
                }
            }
        }
        result
    }
}

/// Registered memory of a lane.
fn own_memory(
    transport: &Transport,
    spec: &LaneSpec,
    first: Pattern,
) -> anyhow::Result<Known<Arc<Buffer>>> {
    let length = u64::from(spec.slots) * SLOT;
    let buffer = Buffer::new(length)?;
    transport.register(&[(Memory::from(&buffer), "*")])?;
    Ok(Known::new(buffer, length, first)?)
}

/// The status that a number stands for, where it is one of those that are told.
fn status_from(number: u8) -> Status {
    match number {
        3 => Status::Canceled,
        4 => Status::Completed,
        5 => Status::Timeout,
        6 => Status::Failed,
        _ => Status::Invalid,
    }
}
