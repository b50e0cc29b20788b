//! Transfers that the NIC cannot do by itself, because a GPU's memory is at one end:
//!
//! - *inside the process*: a copy by CUDA;
//! - *staged*, where the provider takes no GPU memory: by way of pinned host memory, piece by piece, so that copies
//!   and transfers go on at the same time;
//! - *asked for*, where the memory at the far end is a GPU's and that provider does not reach it: its owner is sent a
//!   request ([`super::message`]), gets the bytes from us or brings them, and copies; by CUDA alone if both are on one
//!   host and CUDA shares our memory with that process.
//!
//! Only its owner copies to and from memory that no NIC guards: so what he unregisters is quiet when he is told so, as
//! with a NIC. A request that ends in any other way than by his word takes its own registration with it first, so that
//! nothing that comes late finds our memory.
//!
//! To the engine these are operations like others. Nothing here waits: [`FabricNic::gpu_turn`] looks at what has
//! happened and takes the next steps.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{self, Body, LENGTH, Message, Outcome, Source};
use super::near::{self, Held};
use super::process::Process;
use super::{FabricNic, shm};
use crate::engine::{Nic, Operation, PeerAddress, Post};
use crate::error::{Code, Error, Result};
use crate::fabric::{self, Buffer, Memory, MemoryKind, MemoryRegion};
use crate::fault::{Class, Fault};
use crate::hmem::{self, Context, Copier, DeviceMemory, Direction, Import, PinnedBuffer};

/// Bytes of a piece that is staged: copies of it reach 48 of 55 GB/s over PCI Express on an H100, and eight take little
/// memory. (512 KiB to 4 MiB, 8 to 32 of them, moved the same over `shm`, within the spread.)
pub(super) const PIECE: u64 = 1 << 20;
/// Pieces under way, of our transfers, and as many of those that others ask for.
const PIECES: usize = 8;
/// Bytes of an operation that is one copy by CUDA: so long that what starts it does not matter (64 MiB cost 4 % of
/// an H100's rate), and short enough for deadlines over PCIe.
pub(super) const COPY: u64 = 1 << 30;
/// Messages that may come, or be on their way, at the same time.
const RECEIVES: usize = 64;
const SENDS: usize = 64;
/// Requests of others that are worked on at the same time; more wait, to this number.
const SERVED: usize = 32;
const WAITING: usize = 4096;
/// Contexts that messages and served requests need.
pub(super) const CONTEXTS: usize = RECEIVES + SENDS + SERVED;
/// Allocations of other processes that stay mapped.
const IMPORTS: usize = 1024;
/// Strangers that stay known, of all that have ever sent us something.
const STRANGERS: usize = 1024;
/// How long an owner may be silent about a request until he is asked for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// After so many seconds in which his endpoint cannot be reached an owner is taken to be at nothing any more: his
/// transport waits for its copies before it closes.
const UNHEARD: u32 = 10;
/// Longest wait for copies that use memory which is unregistered.
const QUIET: Duration = Duration::from_secs(5);
/// Why a request ends whose memory is gone.
const UNREGISTERED: &str = "the memory was unregistered";
/// What tells the copies for others from ours, in the copier's tokens.
const FOR_OTHERS: u64 = 1 << 32;

/// What a NIC has under way with GPU memory.
pub(super) struct Gpu {
    copier: Copier,
    /// Our operations, by the engine's slot.
    ours: HashMap<u32, Ours>,
    /// Of these, those that wait for room at the provider or the postbox.
    stalled: VecDeque<u32>,
    pieces: Option<Pieces>,
    mail: Option<Mail>,
    served: Box<[Option<Served>]>,
    /// Requests that wait for their turn.
    queue: VecDeque<Asked>,
    lent: Option<Pieces>,
    imports: VecDeque<([u8; 64], Arc<Context>, Arc<Import>)>,
    peers: HashMap<PeerAddress, Peer>,
    /// Who sent us something, and whom the engine does not know.
    strangers: VecDeque<PeerAddress>,
    /// Endpoints of those that are [`Peer::Far`]: they stay so when they are connected to anew.
    far: HashSet<Box<[u8]>>,
    /// Keys that turned out to be of host memory, which CUDA does not share.
    on_host: HashSet<(PeerAddress, u64)>,
    /// What ended, for the next poll to tell.
    ended: Vec<(u32, Result<(), Fault>)>,
    /// Pairs of devices that have been introduced to each other.
    introduced: Vec<(i32, i32)>,
    sequence: u32,
    /// Drawn at random: another NIC's, or another process's, requests are not ours.
    life: u64,
    ourselves: Process,
    looked: Instant,
    /// The time of the last turn.
    now: Instant,
}

/// An operation of ours.
struct Ours {
    operation: Operation,
    step: Step,
    /// Our number of the request.
    id: u64,
    piece: Option<u16>,
    /// The other end, in this process.
    far: Option<Arc<Held>>,
    /// Of a request for host memory: its own registration.
    region: Option<MemoryRegion>,
    /// The owner copies by CUDA from and to our memory, and we cannot stop him.
    direct: bool,
    /// When he was last heard of, and how often he could not be asked since.
    heard: Instant,
    unheard: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Our memory is copied to the piece.
    Fill,
    /// The piece is to be sent, or fetched.
    Post,
    /// It is.
    Flight,
    /// The owner is to be asked.
    Ask,
    /// He was.
    Wait,
    /// The piece is copied to our memory.
    Drain,
    /// A copy inside the process.
    Copy,
}

/// How an operation gets to the other end.
pub(super) enum Way {
    /// The NIC does it.
    Straight,
    /// A copy inside the process.
    Inside(Arc<Held>),
    /// The NIC does it, from or to pinned memory of ours.
    Staged,
    /// The owner does it, with the NIC.
    Asked,
    /// The owner does it, by CUDA alone.
    Direct,
}

/// What is known of the process at the other end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// It has been asked who it is.
    Asked,
    /// It cannot map memory of ours.
    Far,
    /// It is on this host, and may be able to: one operation is to find out.
    Near(Process),
    /// One is about it.
    Tried(Process),
    /// It can.
    Shares(Process),
}

/// A request of another's.
struct Asked {
    peer: PeerAddress,
    id: u64,
    life: u64,
    write: bool,
    /// Our memory.
    held: Arc<Held>,
    address: u64,
    length: u64,
    source: Source,
}

/// One that is worked on.
struct Served {
    asked: Asked,
    piece: Option<u16>,
    /// Theirs, where CUDA copies from it or to it.
    import: Option<Arc<Import>>,
    step: Step,
    /// Our memory was unregistered while only the piece was in use.
    left: bool,
}

/// Pinned host memory, in pieces that are registered each by itself: so one can be taken from whoever knows its key.
struct Pieces {
    regions: Vec<Option<MemoryRegion>>,
    free: Vec<u16>,
    memory: PinnedBuffer,
}

impl Pieces {
    fn address(&self, piece: u16) -> u64 {
        self.memory.buffer().address() + u64::from(piece) * PIECE
    }

    fn region(&self, piece: u16) -> Option<&MemoryRegion> {
        self.regions.get(usize::from(piece)).and_then(Option::as_ref)
    }
}

/// The postbox: buffers for messages.
struct Mail {
    region: MemoryRegion,
    buffer: Arc<Buffer>,
    /// Receives that are to be posted.
    idle: Vec<u16>,
    /// Send buffers that are free, and of those on their way, which of our operations they are for.
    free: Vec<u16>,
    sent: Box<[Option<u32>]>,
    waiting: VecDeque<(PeerAddress, Option<u32>, Message)>,
}

impl Default for Gpu {
    fn default() -> Self {
        use std::hash::{BuildHasher, RandomState};
        Self {
            copier: Copier::default(),
            ours: HashMap::new(),
            stalled: VecDeque::new(),
            pieces: None,
            mail: None,
            served: std::iter::repeat_with(|| None).take(SERVED).collect(),
            queue: VecDeque::new(),
            lent: None,
            imports: VecDeque::new(),
            peers: HashMap::new(),
            strangers: VecDeque::new(),
            far: HashSet::new(),
            on_host: HashSet::new(),
            ended: Vec::new(),
            introduced: Vec::new(),
            sequence: 0,
            life: RandomState::new().hash_one(0),
            ourselves: Process::ourselves().unwrap_or_else(Process::unknown),
            looked: Instant::now(),
            now: Instant::now(),
        }
    }
}

impl Gpu {
    /// Whether an operation is one of these.
    pub fn has(&self, slot: u32) -> bool {
        self.ours.contains_key(&slot)
    }

    /// Whether it has nothing to do and nothing to look for.
    pub fn is_idle(&self) -> bool {
        self.ours.is_empty()
            && self.ended.is_empty()
            && self.queue.is_empty()
            && self.served.iter().all(Option::is_none)
            && self.mail.as_ref().is_none_or(|mail| mail.waiting.is_empty())
    }

    /// Waits for all copies.
    pub fn finish(&mut self) {
        self.copier = Copier::default();
    }

    /// What ended since the last time.
    pub fn ended(&mut self) -> std::vec::Drain<'_, (u32, Result<(), Fault>)> {
        self.ended.drain(..)
    }

    /// Whether requests of this peer are worked on.
    pub fn serves(&self, peer: PeerAddress) -> bool {
        self.served.iter().flatten().any(|served| served.asked.peer == peer)
            || self.queue.iter().any(|asked| asked.peer == peer)
    }

    /// The engine knows a peer, and says when it is to be forgotten.
    pub fn adopt(&mut self, peer: PeerAddress) {
        self.strangers.retain(|stranger| *stranger != peer);
    }

    /// A peer's address means somebody else from now on.
    pub fn forget(&mut self, peer: PeerAddress) {
        self.peers.remove(&peer);
        self.adopt(peer);
        self.on_host.retain(|(known, _)| *known != peer);
        if let Some(mail) = &mut self.mail {
            mail.waiting.retain(|(to, ..)| *to != peer);
        }
    }

    fn end(&mut self, slot: u32, result: Result<(), Fault>) {
        let Some(ours) = self.ours.remove(&slot) else { return };
        if ours.direct {
            let peer = self.peers.get_mut(&ours.operation.peer);
            if let Some(state) = peer {
                if let Peer::Tried(process) = *state {
                    *state =
                        if result.is_ok() { Peer::Shares(process) } else { Peer::Near(process) };
                }
            }
        }
        if let (Some(piece), Some(pieces)) = (ours.piece, &mut self.pieces) {
            pieces.free.push(piece);
        }
        if let Some(far) = &ours.far {
            far.leave();
        }
        self.ended.push((slot, result));
    }

    /// Copies by CUDA; it has a context from one of these two.
    fn copy(
        &mut self,
        (to, to_device): (u64, Option<&DeviceMemory>),
        (from, from_device): (u64, Option<&DeviceMemory>),
        length: u64,
        token: u64,
    ) -> Result<()> {
        let direction = match (from_device, to_device) {
            (None, _) => Direction::ToDevice,
            (_, None) => Direction::ToHost,
            _ => Direction::Between,
        };
        // Memory that no context owns may be mapped for its own device alone.
        let unowned = to_device.filter(|device| device.is_unowned());
        let Some(context) = unowned.or(from_device).or(to_device).map(DeviceMemory::context) else {
            return Err(Error::new(Code::Internal, "a copy by CUDA without a GPU's memory"));
        };
        if let (Some(from), Some(to)) = (from_device, to_device) {
            let pair = (from.context().device(), to.context().device());
            if pair.0 != pair.1 && !self.introduced.contains(&pair) {
                self.introduced.push(pair);
                from.context().reach(to.context());
            }
        }
        self.copier.copy(context, direction, to, from, length, token)
    }
}

fn failed(error: Error) -> Fault {
    Fault::of(Class::Permanent, error.text)
}

impl FabricNic {
    /// Calls `f` with what there is of GPUs' memory, which is made if there was none.
    fn with_gpu<R>(&mut self, f: impl FnOnce(&mut Self, &mut Gpu) -> R) -> R {
        let mut gpu = self.gpu.take().unwrap_or_default();
        let result = f(self, &mut gpu);
        self.gpu = Some(gpu);
        result
    }

    /// How an operation gets to the other end.
    fn way(&self, region: u32, peer: PeerAddress, key: u64) -> Way {
        let Some(ours) = self.region(region) else { return Way::Straight };
        let near = self.near.iter().find(|(near, _)| *near == peer);
        if let Some(far) = near.and_then(|(_, shelf)| shelf.find(key)) {
            if !far.kind.is_host() || !ours.kind().is_host() {
                return Way::Inside(far);
            }
        }
        match (message::is_owners(key), ours.device()) {
            (true, Some(device)) if self.is_direct(peer, key, device) => Way::Direct,
            (true, _) => Way::Asked,
            (false, _) if ours.nic.is_none() => Way::Staged,
            (false, Some(device)) if self.is_direct(peer, key, device) => Way::Direct,
            _ => Way::Straight,
        }
    }

    /// The address of a remote place, as the process has it whose memory it is in.
    fn place_in(&self, far: &Held, remote: u64) -> u64 {
        if self.info.virtual_addresses() { remote } else { far.address.wrapping_add(remote) }
    }

    /// Whether the owner of a peer's memory copies by CUDA from and to ours.
    fn is_direct(&self, peer: PeerAddress, key: u64, device: &DeviceMemory) -> bool {
        let Some(gpu) = &self.gpu else { return false };
        matches!(gpu.peers.get(&peer), Some(Peer::Near(_) | Peer::Shares(_)))
            && !gpu.on_host.contains(&(peer, key))
            && device.shared().is_some()
    }

    /// Asks a peer who he is, if we do not know: if he is on this host, what comes next need not go by NIC or host
    /// memory. Not who cannot be, or may not know what he is asked.
    fn introduce(&mut self, gpu: &mut Gpu, peer: PeerAddress) {
        if gpu.peers.contains_key(&peer) {
            return;
        }
        let address = self.address_of(peer).unwrap_or_default();
        if gpu.far.contains(address) || (self.is_efa && !is_local(address)) {
            gpu.peers.insert(peer, Peer::Far);
        } else {
            gpu.peers.insert(peer, Peer::Asked);
            self.say(gpu, peer, None, 0, gpu.life, Body::Hello);
        }
    }

    /// Whether the NIC does operations on memory with this key by itself, whatever their other end.
    #[inline]
    pub(super) fn goes_straight(key: u64) -> bool {
        !message::is_owners(key) && !near::has_device_memory()
    }

    /// See [`Nic::longest`].
    pub(super) fn gpu_longest(&mut self, region: u32, peer: PeerAddress, key: u64) -> Option<u64> {
        let way = self.way(region, peer, key);
        let longest = match &way {
            Way::Straight => None,
            Way::Direct => Some(COPY),
            Way::Staged | Way::Asked => Some(PIECE),
            Way::Inside(far) => Some(if self.region(region)?.reaches(far) { COPY } else { PIECE }),
        };
        self.asked = Some((region, peer, key, way));
        longest
    }

    /// As [`Nic::post`], for an operation that may not go straight.
    pub(super) fn gpu_post(&mut self, operation: &Operation) -> Post {
        let Operation { region, peer, key, .. } = *operation;
        // The engine has asked for it just now, as a rule.
        let way = match self.asked.take() {
            Some((r, p, k, way)) if (r, p, k) == (region, peer, key) => way,
            _ => self.way(region, peer, key),
        };
        if let Way::Straight = way {
            let posted = self.post_straight(operation);
            if self.region(region).is_some_and(|region| region.device().is_some()) {
                self.with_gpu(|nic, gpu| nic.introduce(gpu, peer));
            }
            return posted;
        }
        self.with_gpu(|nic, gpu| match nic.begin(gpu, operation, way) {
            Ok(true) => Post::Done,
            Ok(false) => Post::Again,
            Err(fault) => {
                // What is refused here has no errno.
                gpu.ended.push((operation.slot, Err(fault)));
                Post::Done
            }
        })
    }

    /// Starts an operation; false if there is no room for it now.
    fn begin(&mut self, gpu: &mut Gpu, operation: &Operation, way: Way) -> Result<bool, Fault> {
        let Operation { write, local, length, slot, peer, .. } = *operation;
        gpu.sequence = gpu.sequence.wrapping_add(1);
        let mut ours = Ours {
            operation: *operation,
            step: Step::Copy,
            id: u64::from(gpu.sequence) << 32 | u64::from(slot),
            piece: None,
            far: None,
            region: None,
            direct: matches!(way, Way::Direct),
            heard: gpu.now,
            unheard: 0,
        };
        if let Way::Inside(far) = way {
            return self.begin_copy(gpu, ours, far);
        }
        let region = self.region(operation.region).ok_or_else(gone)?;
        let memory = region.nic.as_ref().map(MemoryRegion::memory).cloned();
        let held = region.held.clone();
        let device = held.as_ref().and_then(|held| held.device.as_ref());
        if matches!(way, Way::Asked | Way::Direct) {
            self.open_mail(gpu)?;
        }
        if let (Way::Staged | Way::Asked, Some(memory)) = (&way, device) {
            if let Way::Asked = way {
                self.introduce(gpu, peer);
            }
            let pieces = self.pieces(&mut gpu.pieces, memory.context()).map_err(failed)?;
            let Some(piece) = pieces.free.pop() else { return Ok(false) };
            ours.piece = Some(piece);
            if write {
                ours.step = Step::Fill;
                let to = pieces.address(piece);
                gpu.ours.insert(slot, ours);
                if let Err(error) = gpu.copy((to, None), (local, device), length, slot.into()) {
                    gpu.end(slot, Err(failed(error)));
                }
                return Ok(true);
            }
        } else if let (Way::Asked, Some(memory)) = (&way, memory) {
            // For this request only: when it is over, so is what the owner may do to our memory.
            let part = memory.part(local - memory.address(), length);
            ours.region = Some(self.register_once(&part, MemoryKind::Host).map_err(failed)?);
        }
        if let (Way::Direct, Some(Peer::Near(process))) = (&way, gpu.peers.get(&peer)) {
            gpu.peers.insert(peer, Peer::Tried(*process));
        }
        ours.step = if let Way::Staged = way { Step::Post } else { Step::Ask };
        gpu.ours.insert(slot, ours);
        self.go_on(gpu, slot);
        Ok(true)
    }

    /// Starts a copy inside the process.
    fn begin_copy(&mut self, gpu: &mut Gpu, mut ours: Ours, far: Arc<Held>) -> Result<bool, Fault> {
        let Operation { write, local, remote, length, region, slot, .. } = ours.operation;
        let near = self.region(region).ok_or_else(gone)?;
        let there = self.place_in(&far, remote);
        let offset = there.wrapping_sub(far.address);
        if offset > far.length || length > far.length - offset {
            return Err(Fault::of(Class::Permanent, "outside of the peer's memory"));
        }
        let device = near.device().or(far.device.as_ref()).ok_or_else(gone)?;
        if !near.reaches(&far) {
            let pieces = self.pieces(&mut gpu.pieces, &device.context().clone()).map_err(failed)?;
            let Some(piece) = pieces.free.pop() else { return Ok(false) };
            ours.piece = Some(piece);
        }
        if !far.enter() {
            gpu.pieces.iter_mut().for_each(|pieces| pieces.free.extend(ours.piece));
            return Err(Fault::of(Class::Permanent, "the peer's memory is being unregistered"));
        }
        let near = self.region(region).ok_or_else(gone)?;
        let piece = ours.piece.and_then(|piece| Some(gpu.pieces.as_ref()?.address(piece)));
        let (mut to, mut from) = ((there, far.device.as_ref()), (local, near.device()));
        if !write {
            (to, from) = (from, to);
        }
        match piece {
            // Into the piece by hand, and from there by CUDA; or the other way round, with Step::Drain; or both by
            // CUDA.
            Some(piece) if from.1.is_none() => {
                hmem::copy_on_host(piece, from.0, length);
                from.0 = piece;
            }
            Some(piece) => {
                ours.step = if to.1.is_some() { Step::Fill } else { Step::Drain };
                to = (piece, None);
            }
            None => {}
        }
        let copied = gpu.copy(to, from, length, slot.into());
        ours.far = Some(far.clone());
        gpu.ours.insert(slot, ours);
        if let Err(error) = copied {
            gpu.end(slot, Err(failed(error)));
        }
        Ok(true)
    }

    /// Takes an operation's next step, if it can be taken now.
    fn go_on(&mut self, gpu: &mut Gpu, slot: u32) {
        let Some(ours) = gpu.ours.get(&slot) else { return };
        let operation = ours.operation;
        let posted = match ours.step {
            Step::Post => {
                let piece = ours.piece.and_then(|piece| {
                    let pieces = gpu.pieces.as_ref()?;
                    Some((pieces.region(piece)?, pieces.address(piece)))
                });
                let Some((region, local)) = piece else { return gpu.end(slot, Err(gone())) };
                self.post_from(region, &Operation { local, ..operation })
            }
            Step::Ask => match self.source(gpu, slot) {
                Some(source) => {
                    let Operation { write, key, remote, length, .. } = operation;
                    let body = Body::Request { write, key, remote, length, source };
                    let (id, life) = (ours.id, gpu.life);
                    self.say(gpu, operation.peer, Some(slot), id, life, body);
                    Post::Done
                }
                None => return self.give_up(gpu, slot, gone()),
            },
            _ => return,
        };
        let Some(ours) = gpu.ours.get_mut(&slot) else { return };
        match posted {
            Post::Done => {
                ours.step = if ours.step == Step::Post { Step::Flight } else { Step::Wait };
                ours.heard = gpu.now;
            }
            Post::Again => gpu.stalled.push_back(slot),
            Post::Failed(errno) => gpu.end(slot, Err(self.explain(errno))),
        }
    }

    /// Where the owner finds our end of a request.
    fn source(&self, gpu: &Gpu, slot: u32) -> Option<Source> {
        let ours = gpu.ours.get(&slot)?;
        if ours.direct {
            let device = self.region(ours.operation.region)?.device()?;
            let shared = device.shared()?;
            let offset = ours.operation.local.checked_sub(shared.start)?;
            return Some(Source::Cuda { handle: shared.handle, offset });
        }
        let region = match (&ours.region, ours.piece) {
            (Some(region), _) => region,
            (None, piece) => gpu.pieces.as_ref()?.region(piece?)?,
        };
        let address = if self.info.virtual_addresses() { region.address() } else { 0 };
        Some(Source::Nic { address, key: region.key() })
    }

    /// Ends an operation that its owner may still be at, by taking our memory from him.
    fn give_up(&mut self, gpu: &mut Gpu, slot: u32, fault: Fault) {
        let Some(ours) = gpu.ours.get_mut(&slot) else { return };
        drop(ours.region.take());
        if let (Some(piece), Some(pieces)) = (ours.piece, &mut gpu.pieces) {
            let (index, address) = (usize::from(piece), pieces.address(piece));
            drop(pieces.regions[index].take());
            match self.register_piece(&pieces.memory, address) {
                Ok(region) => pieces.regions[index] = Some(region),
                // One piece less.
                Err(error) => {
                    log::warn!("{}: {error}", self.info.domain());
                    ours.piece = None;
                }
            }
        }
        gpu.end(slot, Err(fault));
    }

    /// The transfer between a piece of ours and a peer has ended.
    pub(super) fn gpu_transferred(&mut self, slot: u32, result: Result<(), Fault>) {
        self.with_gpu(|nic, gpu| {
            let Some(ours) = gpu.ours.get(&slot) else { return };
            match result {
                Ok(()) if !ours.operation.write => nic.drain(gpu, slot),
                result => gpu.end(slot, result),
            }
        });
    }

    /// Copies a piece to where it belongs.
    fn drain(&mut self, gpu: &mut Gpu, slot: u32) {
        let Some(ours) = gpu.ours.get_mut(&slot) else { return };
        ours.step = Step::Drain;
        let Operation { region, local, length, .. } = ours.operation;
        let piece = ours.piece.and_then(|piece| Some(gpu.pieces.as_ref()?.address(piece)));
        let device = self.region(region).and_then(super::Region::device);
        let copied = match (piece, device) {
            (Some(piece), Some(_)) => {
                gpu.copy((local, device), (piece, None), length, slot.into()).map_err(failed)
            }
            _ => Err(gone()),
        };
        if let Err(fault) = copied {
            gpu.end(slot, Err(fault));
        }
    }

    /// A copy has ended.
    fn copied(&mut self, gpu: &mut Gpu, slot: u32, result: Result<()>) {
        let Some(ours) = gpu.ours.get_mut(&slot) else { return };
        match (ours.step, result) {
            (_, Err(error)) => gpu.end(slot, Err(failed(error))),
            (Step::Fill, Ok(())) if ours.far.is_some() => {
                ours.step = Step::Copy;
                let far = ours.far.clone();
                let Operation { write, local, remote, length, region, .. } = ours.operation;
                let (Some(near), Some(far)) = (self.region(region), far) else {
                    return gpu.end(slot, Err(gone()));
                };
                let there = self.place_in(&far, remote);
                let to = if write { (there, far.device.as_ref()) } else { (local, near.device()) };
                let piece = ours.piece.and_then(|piece| Some(gpu.pieces.as_ref()?.address(piece)));
                let copied = gpu.copy(to, (piece.unwrap_or(0), None), length, slot.into());
                if let Err(error) = copied {
                    gpu.end(slot, Err(failed(error)));
                }
            }
            (Step::Fill, Ok(())) => {
                ours.step =
                    if message::is_owners(ours.operation.key) { Step::Ask } else { Step::Post };
                self.go_on(gpu, slot);
            }
            (step, Ok(())) => {
                let piece = ours.piece.and_then(|piece| Some(gpu.pieces.as_ref()?.address(piece)));
                if let (Step::Drain, Some(far), Some(piece)) = (step, &ours.far, piece) {
                    // Inside the process, to memory that CUDA has not pinned.
                    let Operation { write, local, remote, length, .. } = ours.operation;
                    let there = self.place_in(far, remote);
                    hmem::copy_on_host(if write { there } else { local }, piece, length);
                }
                gpu.end(slot, Ok(()));
            }
        }
    }

    /// What has happened, and what follows. To be called at every poll.
    pub(super) fn gpu_turn(&mut self) {
        self.with_gpu(|nic, gpu| {
            let mut copies = Vec::new();
            gpu.copier.poll(|token, result| copies.push((token, result)));
            for (token, result) in copies {
                match u32::try_from(token) {
                    Ok(slot) => nic.copied(gpu, slot, result),
                    Err(_) => nic.served_copied(gpu, (token - FOR_OTHERS) as usize, result),
                }
            }
            for _ in 0..gpu.stalled.len() {
                let Some(slot) = gpu.stalled.pop_front() else { break };
                nic.go_on(gpu, slot);
            }
            nic.serve_next(gpu);
            for index in 0..gpu.served.len() {
                if gpu.served[index].as_ref().is_some_and(|served| served.step == Step::Post) {
                    nic.served_post(gpu, index);
                }
            }
            nic.post_mail(gpu);
            nic.look_after(gpu);
        });
    }

    /// Asks owners who have been silent for long, and gives up those that are gone.
    fn look_after(&mut self, gpu: &mut Gpu) {
        gpu.now = Instant::now();
        if gpu.ours.is_empty() || gpu.now - gpu.looked < PATIENCE / 2 {
            return;
        }
        gpu.looked = gpu.now;
        let silent: Vec<(u32, u64, PeerAddress)> = gpu
            .ours
            .iter()
            .filter(|(_, ours)| ours.step == Step::Wait && gpu.now - ours.heard >= PATIENCE)
            .map(|(slot, ours)| (*slot, ours.id, ours.operation.peer))
            .collect();
        for (slot, id, peer) in silent {
            let dead = match gpu.peers.get(&peer) {
                Some(Peer::Tried(process) | Peer::Shares(process)) => !process.is_alive(),
                _ => false,
            };
            if dead || (self.is_shm() && self.address_of(peer).is_some_and(shm::is_gone)) {
                let fault = Fault::of(Class::Peer, "the process that has the memory is gone");
                self.give_up(gpu, slot, fault);
            } else {
                if let Some(ours) = gpu.ours.get_mut(&slot) {
                    ours.heard = gpu.now;
                }
                self.say(gpu, peer, Some(slot), id, gpu.life, Body::Probe);
            }
        }
    }

    // ---- requests of others ---------------------------------------------------------------------

    /// Takes a request, or answers why not.
    fn take_request(&mut self, gpu: &mut Gpu, from: PeerAddress, message: &Message) {
        let Body::Request { write, key, remote, length, source } = message.body else { return };
        let answer = |nic: &mut Self, gpu: &mut Gpu, outcome, text: &str| {
            let body = Body::Ended { outcome, text: text.into() };
            nic.say(gpu, from, None, message.id, message.life, body);
        };
        let Some(held) = self.place.0.find(key) else {
            let text =
                "no such memory; it was unregistered or registered anew: open its segment again";
            return answer(self, gpu, Outcome::Refused, text);
        };
        let address = self.place_in(&held, remote);
        if held.device.is_none() {
            return answer(self, gpu, Outcome::OnHost, "the memory is the host's");
        }
        let offset = address.wrapping_sub(held.address);
        let longest = if matches!(source, Source::Nic { .. }) { PIECE } else { COPY };
        if offset > held.length || length > held.length - offset || length > longest {
            return answer(self, gpu, Outcome::Refused, "outside of the memory, or too long");
        }
        if gpu.queue.len() >= WAITING {
            return answer(self, gpu, Outcome::Full, "too many requests wait already");
        }
        if !held.enter() {
            return answer(self, gpu, Outcome::Refused, "the memory is being unregistered");
        }
        let (peer, id, life) = (from, message.id, message.life);
        gpu.queue.push_back(Asked { peer, id, life, write, held, address, length, source });
        self.serve_next(gpu);
    }

    /// Begins with requests that wait, while there is room.
    fn serve_next(&mut self, gpu: &mut Gpu) {
        while let Some(asked) = gpu.queue.front() {
            let Some(index) = gpu.served.iter().position(Option::is_none) else { return };
            let Some(context) = asked.held.device.as_ref().map(|device| device.context().clone())
            else {
                return;
            };
            let staged = matches!(asked.source, Source::Nic { .. });
            let mut piece = None;
            if staged {
                match self.pieces(&mut gpu.lent, &context) {
                    Ok(pieces) => match pieces.free.pop() {
                        Some(free) => piece = Some(free),
                        None => return,
                    },
                    Err(error) => {
                        let Some(asked) = gpu.queue.pop_front() else { return };
                        self.end_request(gpu, &asked, false, Err((Outcome::Failed, error.text)));
                        continue;
                    }
                }
            }
            let Some(asked) = gpu.queue.pop_front() else { return };
            gpu.served[index] =
                Some(Served { asked, piece, import: None, step: Step::Post, left: false });
            self.served_begin(gpu, index);
        }
    }

    fn served_begin(&mut self, gpu: &mut Gpu, index: usize) {
        let Some(served) = &mut gpu.served[index] else { return };
        let Asked { write, address, length, source, .. } = served.asked;
        let held = served.asked.held.clone();
        match source {
            Source::Nic { .. } if write => self.served_post(gpu, index),
            Source::Nic { .. } => {
                served.step = Step::Fill;
                let piece = served.piece.and_then(|piece| Some(gpu.lent.as_ref()?.address(piece)));
                let token = FOR_OTHERS + index as u64;
                let from = (address, held.device.as_ref());
                let copied = gpu.copy((piece.unwrap_or(0), None), from, length, token);
                self.served_begun(gpu, index, copied);
            }
            Source::Cuda { handle, offset } => {
                let Some(device) = held.device.as_ref() else { return };
                let import = match import(&mut gpu.imports, device.context(), &handle) {
                    Ok(import)
                        if offset.checked_add(length).is_some_and(|end| end <= import.length()) =>
                    {
                        import
                    }
                    Ok(_) => {
                        let outcome = (Outcome::Refused, "outside of the allocation".to_owned());
                        return self.served_ended(gpu, index, Err(outcome));
                    }
                    Err(error) => {
                        return self.served_ended(
                            gpu,
                            index,
                            Err((Outcome::NotShared, error.text)),
                        );
                    }
                };
                let theirs = import.address() + offset;
                if let Some(served) = &mut gpu.served[index] {
                    (served.step, served.import) = (Step::Copy, Some(import));
                }
                let (to, from) = if write { (address, theirs) } else { (theirs, address) };
                let token = FOR_OTHERS + index as u64;
                let copied =
                    gpu.copier.copy(device.context(), Direction::Between, to, from, length, token);
                self.served_begun(gpu, index, copied);
            }
        }
    }

    /// A copy has begun, or was refused.
    fn served_begun(&mut self, gpu: &mut Gpu, index: usize, copied: Result<()>) {
        if let Err(error) = copied {
            self.served_ended(gpu, index, Err((Outcome::Failed, error.text)));
        }
    }

    /// Fetches the bytes into our piece, or brings them from it.
    fn served_post(&mut self, gpu: &mut Gpu, index: usize) {
        let Some(served) = &mut gpu.served[index] else { return };
        let Source::Nic { address, key } = served.asked.source else { return };
        let piece = served.piece.and_then(|piece| {
            let pieces = gpu.lent.as_ref()?;
            Some((pieces.region(piece)?, pieces.address(piece)))
        });
        let Some((region, local)) = piece else { return };
        let operation = fabric::Operation {
            // What the requester writes is read here.
            write: !served.asked.write,
            delivery: true,
            local,
            length: served.asked.length as usize,
            peer: served.asked.peer,
            remote: address,
            key,
            context: self.first_extra + (RECEIVES + SENDS + index) as u32,
        };
        match self.endpoint.post(region, &operation) {
            Post::Done => served.step = Step::Flight,
            Post::Again => served.step = Step::Post,
            Post::Failed(errno) => {
                let text = self.explain(errno).text;
                self.served_ended(gpu, index, Err((Outcome::Failed, text)));
            }
        }
    }

    fn served_transferred(&mut self, gpu: &mut Gpu, index: usize, result: Result<(), Fault>) {
        let Some(Some(served)) = gpu.served.get_mut(index) else { return };
        if served.step != Step::Flight {
            return;
        }
        match result {
            Ok(()) if served.asked.write && served.left => {
                self.served_ended(gpu, index, Err((Outcome::Refused, UNREGISTERED.into())));
            }
            Ok(()) if served.asked.write => {
                served.step = Step::Drain;
                let (address, length) = (served.asked.address, served.asked.length);
                let held = served.asked.held.clone();
                let piece = served.piece.and_then(|piece| Some(gpu.lent.as_ref()?.address(piece)));
                let token = FOR_OTHERS + index as u64;
                let to = (address, held.device.as_ref());
                let copied = gpu.copy(to, (piece.unwrap_or(0), None), length, token);
                self.served_begun(gpu, index, copied);
            }
            Ok(()) => self.served_ended(gpu, index, Ok(())),
            Err(fault) => self.served_ended(gpu, index, Err((Outcome::Failed, fault.text))),
        }
    }

    fn served_copied(&mut self, gpu: &mut Gpu, index: usize, result: Result<()>) {
        let Some(Some(served)) = gpu.served.get_mut(index) else { return };
        match (served.step, result) {
            (Step::Fill, Ok(())) => {
                served.step = Step::Post;
                self.served_post(gpu, index);
            }
            (_, Ok(())) => self.served_ended(gpu, index, Ok(())),
            (_, Err(error)) => self.served_ended(gpu, index, Err((Outcome::Failed, error.text))),
        }
    }

    /// Answers a request, and takes back what it had.
    fn served_ended(&mut self, gpu: &mut Gpu, index: usize, result: Result<(), (Outcome, String)>) {
        let Some(Served { asked, piece, left, .. }) = gpu.served[index].take() else { return };
        if let (Some(piece), Some(pieces)) = (piece, &mut gpu.lent) {
            pieces.free.push(piece);
        }
        self.end_request(gpu, &asked, left, result);
    }

    /// Lets go of a request's memory, unless that was done (`left`), and says how it ended.
    fn end_request(
        &mut self,
        gpu: &mut Gpu,
        asked: &Asked,
        left: bool,
        result: Result<(), (Outcome, String)>,
    ) {
        if !left {
            asked.held.leave();
        }
        let (outcome, text) = result.err().unwrap_or((Outcome::Done, String::new()));
        self.say(gpu, asked.peer, None, asked.id, asked.life, Body::Ended { outcome, text });
    }

    /// Nobody is to use a region any more: waits for copies at which it is the far end, so that it is quiet.
    ///
    /// # Errors
    /// [`Code::Busy`] if they do not end within 5 seconds.
    pub(super) fn gpu_unregister(&mut self, key: u64, held: &Arc<Held>) -> Result<()> {
        self.place.0.take(key);
        held.close();
        if self.gpu.is_some() {
            self.with_gpu(|nic, gpu| {
                nic.recall(gpu, held);
                nic.leave(gpu, held);
            });
        }
        let began = Instant::now();
        let (mut completed, mut failed) = (Vec::new(), Vec::new());
        while !held.is_quiet() {
            // Copies of ours end only if somebody looks; those of other NICs are looked at by their threads.
            self.poll(&mut completed, &mut failed);
            if began.elapsed() > QUIET {
                let text = format!("copies that use the memory at {:#x} do not end", held.address);
                return Err(Error::new(Code::Busy, text));
            }
            std::thread::yield_now();
        }
        if !completed.is_empty() || !failed.is_empty() {
            self.with_gpu(|_, gpu| {
                gpu.ended.extend(completed.into_iter().map(|slot| (slot, Ok(()))));
                gpu.ended.extend(failed.into_iter().map(|(slot, fault)| (slot, Err(fault))));
            });
        }
        Ok(())
    }

    /// Tells who has this memory mapped to use it no more: it would not be freed when its owner frees it.
    fn recall(&mut self, gpu: &mut Gpu, held: &Held) {
        let Some(shared) = held.device.as_ref().and_then(DeviceMemory::shared_already) else {
            return;
        };
        let shares = |(peer, state): (&PeerAddress, &Peer)| {
            matches!(state, Peer::Shares(_)).then_some(*peer)
        };
        let peers: Vec<PeerAddress> = gpu.peers.iter().filter_map(shares).collect();
        for peer in peers {
            self.say(gpu, peer, None, 0, gpu.life, Body::Forget { handle: shared.handle });
        }
    }

    /// Of requests for this memory, ends what has not begun, and lets go of it where it is not in use: a requester who
    /// is gone may leave us waiting for his bytes.
    fn leave(&mut self, gpu: &mut Gpu, held: &Arc<Held>) {
        let unregistered = || Err((Outcome::Refused, UNREGISTERED.to_owned()));
        for asked in std::mem::take(&mut gpu.queue) {
            if Arc::ptr_eq(&asked.held, held) {
                self.end_request(gpu, &asked, false, unregistered());
            } else {
                gpu.queue.push_back(asked);
            }
        }
        for index in 0..gpu.served.len() {
            let Some(served) = &mut gpu.served[index] else { continue };
            if !Arc::ptr_eq(&served.asked.held, held) || served.left {
                continue;
            }
            match (served.step, served.asked.write) {
                (Step::Post, true) => self.served_ended(gpu, index, unregistered()),
                // The piece is on its way, from us with what was read already, or to us.
                (Step::Post | Step::Flight, _) => {
                    served.left = true;
                    held.leave();
                }
                _ => {}
            }
        }
    }

    // ---- messages -------------------------------------------------------------------------------

    /// Opens the postbox, if it is not.
    pub(super) fn listen(&mut self) -> Result<()> {
        self.with_gpu(|nic, gpu| nic.open_mail(gpu))
            .map_err(|fault| Error::new(Code::Endpoint, fault.text))
    }

    fn open_mail(&mut self, gpu: &mut Gpu) -> Result<(), Fault> {
        if gpu.mail.is_some() {
            return Ok(());
        }
        let mut open = || -> Result<Mail> {
            let buffer = Buffer::new(((RECEIVES + SENDS) * LENGTH) as u64)?;
            let region = self.register_once(&Memory::from(&buffer), MemoryKind::Host)?;
            Ok(Mail {
                region,
                buffer,
                idle: (0..RECEIVES as u16).collect(),
                free: (0..SENDS as u16).collect(),
                sent: vec![None; SENDS].into(),
                waiting: VecDeque::new(),
            })
        };
        gpu.mail = Some(open().map_err(failed)?);
        self.post_mail(gpu);
        Ok(())
    }

    /// Says something to a peer, now or as soon as there is room.
    fn say(
        &mut self,
        gpu: &mut Gpu,
        to: PeerAddress,
        slot: Option<u32>,
        id: u64,
        life: u64,
        body: Body,
    ) {
        let message =
            Message { id, life, sender: gpu.ourselves, address: self.address.clone(), body };
        // Who does not take our answers asks again.
        if let Some(mail) =
            gpu.mail.as_mut().filter(|mail| slot.is_some() || mail.waiting.len() < WAITING)
        {
            mail.waiting.push_back((to, slot, message));
        }
        self.post_mail(gpu);
    }

    /// Posts receives and messages, as many as there is room for.
    fn post_mail(&mut self, gpu: &mut Gpu) {
        let Some(mail) = &mut gpu.mail else { return };
        while let Some(&index) = mail.idle.last() {
            let at = mail.buffer.address() + (usize::from(index) * LENGTH) as u64;
            let context = self.first_extra + u32::from(index);
            match self.endpoint.receive(&mail.region, at, LENGTH, context) {
                Post::Done => drop(mail.idle.pop()),
                Post::Again => break,
                Post::Failed(errno) => {
                    log::warn!(
                        "{}: posting a receive: {}",
                        self.info.domain(),
                        self.explain(errno).text
                    );
                    break;
                }
            }
        }
        let mut unsent = Vec::new();
        let Some(mail) = &mut gpu.mail else { return };
        while let (Some(&index), Some((peer, slot, message))) =
            (mail.free.last(), mail.waiting.front())
        {
            let offset = ((RECEIVES + usize::from(index)) * LENGTH) as u64;
            mail.buffer.write(offset, &message.encode());
            let at = mail.buffer.address() + offset;
            let context = self.first_extra + (RECEIVES + usize::from(index)) as u32;
            match self.endpoint.send(&mail.region, at, LENGTH, *peer, context) {
                Post::Done => {
                    mail.free.pop();
                    mail.sent[usize::from(index)] = *slot;
                    mail.waiting.pop_front();
                }
                // Others may be heard while this one is not.
                Post::Again => {
                    mail.waiting.rotate_left(1);
                    break;
                }
                Post::Failed(errno) => {
                    unsent.push((*slot, errno));
                    mail.waiting.pop_front();
                }
            }
        }
        for (slot, errno) in unsent {
            let fault = self.explain(errno);
            self.unheard(gpu, slot, fault);
        }
    }

    /// A message for an operation of ours did not get there.
    fn unheard(&mut self, gpu: &mut Gpu, slot: Option<u32>, fault: Fault) {
        let Some(slot) = slot else { return };
        let Some(ours) = gpu.ours.get_mut(&slot) else { return };
        ours.unheard += 1;
        // Where he copies by CUDA we cannot stop him.
        let waits = matches!(ours.step, Step::Ask | Step::Wait);
        if waits && (!ours.direct || ours.unheard >= UNHEARD) {
            self.give_up(gpu, slot, fault);
        }
    }

    /// What one of the [`CONTEXTS`] was for has ended.
    pub(super) fn gpu_event(&mut self, context: u32, result: Result<(), Fault>) {
        let context = context as usize;
        self.with_gpu(|nic, gpu| match (context, &mut gpu.mail) {
            (0..RECEIVES, Some(mail)) => {
                let mut bytes = [0; LENGTH];
                mail.buffer.read((context * LENGTH) as u64, &mut bytes);
                mail.buffer.write((context * LENGTH) as u64, &[0; LENGTH]);
                mail.idle.push(context as u16);
                if let Some(message) = result.ok().and_then(|()| Message::decode(&bytes)) {
                    nic.hear(gpu, message);
                }
            }
            (RECEIVES.., Some(mail)) if context < RECEIVES + SENDS => {
                let index = context - RECEIVES;
                mail.free.push(index as u16);
                let slot = mail.sent[index].take();
                if let Err(fault) = result {
                    nic.unheard(gpu, slot, fault);
                }
            }
            _ => nic.served_transferred(gpu, context.wrapping_sub(RECEIVES + SENDS), result),
        });
    }

    fn hear(&mut self, gpu: &mut Gpu, message: Message) {
        let slot = message.id as u32;
        let life = gpu.life;
        let ours = gpu.ours.get_mut(&slot);
        let ours = ours.filter(|ours| (ours.id, life) == (message.id, message.life)).map(|ours| {
            (ours.heard, ours.unheard) = (gpu.now, 0);
            (ours.step, ours.operation)
        });
        match (&message.body, ours) {
            (Body::Ended { outcome, text }, Some((Step::Ask | Step::Wait, operation))) => {
                let fault = |class| Err(Fault::of(class, format!("the memory's owner: {text}")));
                match outcome {
                    Outcome::Done => self.answered(gpu, slot),
                    Outcome::Refused => gpu.end(slot, fault(Class::Permanent)),
                    Outcome::Full => gpu.end(slot, fault(Class::Pressure)),
                    Outcome::Failed => gpu.end(slot, fault(Class::Peer)),
                    Outcome::NotShared => self.not_shared(gpu, slot, text),
                    Outcome::OnHost => {
                        gpu.on_host.insert((operation.peer, operation.key));
                        gpu.end(slot, fault(Class::Pressure));
                    }
                }
            }
            (Body::Unknown, Some((Step::Wait, _))) => {
                let fault = Fault::of(
                    Class::Peer,
                    "the memory's owner does not know our request: was it restarted?",
                );
                gpu.end(slot, Err(fault));
            }
            (Body::Welcome, _) => {
                let known = self.peers.get(self.known(&message.address)).copied();
                if let Some(state) = known.and_then(|peer| gpu.peers.get_mut(&peer)) {
                    if let Peer::Asked = *state {
                        let near = message.sender.is_near(&gpu.ourselves);
                        *state = if near { Peer::Near(message.sender) } else { Peer::Far };
                    }
                }
            }
            (Body::Forget { handle }, _) => gpu.imports.retain(|(known, ..)| known != handle),
            (Body::Request { .. } | Body::Probe | Body::Hello, _) => {
                let Some(peer) = self.answerable(gpu, &message.address) else { return };
                let (id, life) = (message.id, message.life);
                let is = |asked: &Asked| (asked.id, asked.life) == (id, life);
                match message.body {
                    Body::Hello => self.say(gpu, peer, None, id, life, Body::Welcome),
                    Body::Probe => {
                        let busy = gpu.queue.iter().any(is)
                            || gpu.served.iter().flatten().any(|served| is(&served.asked));
                        let body = if busy { Body::Busy } else { Body::Unknown };
                        self.say(gpu, peer, None, id, life, body);
                    }
                    _ => self.take_request(gpu, peer, &message),
                }
            }
            _ => {}
        }
    }

    /// The peer that a message came from, who may be anyone and need not be there.
    fn answerable(&mut self, gpu: &mut Gpu, address: &[u8]) -> Option<PeerAddress> {
        let known = self.peers.contains_key(self.known(address));
        let peer = self.find_or_insert(address).ok()?;
        if !known {
            gpu.strangers.push_back(peer);
            let idle = |stranger: &PeerAddress| *stranger != peer && !gpu.serves(*stranger);
            let oldest = gpu.strangers.iter().position(idle);
            if let (true, Some(oldest)) = (gpu.strangers.len() > STRANGERS, oldest) {
                let stranger = gpu.strangers.remove(oldest)?;
                gpu.forget(stranger);
                if let Err(error) = self.disconnect(stranger) {
                    log::debug!("{}: forgetting a stranger: {error}", self.info.domain());
                }
            }
        }
        Some(peer)
    }

    /// A request was done.
    fn answered(&mut self, gpu: &mut Gpu, slot: u32) {
        let Some(ours) = gpu.ours.get_mut(&slot) else { return };
        drop(ours.region.take());
        if ours.piece.is_some() && !ours.operation.write {
            self.drain(gpu, slot);
        } else {
            gpu.end(slot, Ok(()));
        }
    }

    /// The owner cannot map our memory: from now on it is staged. What is longer than a piece is tried again by the
    /// engine, in pieces.
    fn not_shared(&mut self, gpu: &mut Gpu, slot: u32, text: &str) {
        let Some(ours) = gpu.ours.get(&slot) else { return };
        let peer = ours.operation.peer;
        gpu.peers.insert(peer, Peer::Far);
        if gpu.far.len() >= STRANGERS {
            gpu.far.clear();
        }
        gpu.far.extend(self.address_of(peer).map(Box::from));
        log::warn!(
            "GPU memory of another process on this host is reached by way of host memory, which is slower: {text}"
        );
        gpu.end(slot, Err(Fault::of(Class::Pressure, text)));
    }

    // ---- memory ---------------------------------------------------------------------------------

    /// Pieces of pinned memory, made when they are first needed.
    fn pieces<'a>(
        &mut self,
        pieces: &'a mut Option<Pieces>,
        context: &Arc<Context>,
    ) -> Result<&'a mut Pieces> {
        if pieces.is_none() {
            let memory = PinnedBuffer::new(context, PIECES as u64 * PIECE)?;
            let at = |piece: usize| memory.buffer().address() + piece as u64 * PIECE;
            let regions =
                (0..PIECES).map(|piece| self.register_piece(&memory, at(piece)).map(Some));
            let regions = regions.collect::<Result<_>>()?;
            *pieces = Some(Pieces { regions, free: (0..PIECES as u16).collect(), memory });
        }
        pieces.as_mut().ok_or_else(|| Error::new(Code::Internal, "no pieces"))
    }

    fn register_piece(&mut self, memory: &PinnedBuffer, address: u64) -> Result<MemoryRegion> {
        let offset = address - memory.buffer().address();
        let part = Memory::from(memory.buffer()).part(offset, PIECE);
        self.register_once(&part, MemoryKind::Host)
    }

    fn address_of(&self, peer: PeerAddress) -> Option<&[u8]> {
        self.peers.iter().find(|(_, known)| **known == peer).map(|(address, _)| &address[..])
    }

    /// Finds a NIC of this process at a peer's address.
    pub(super) fn meet(&mut self, address: &[u8], peer: PeerAddress) {
        if let Some(shelf) = near::find(address) {
            self.near.retain(|(near, _)| *near != peer);
            self.near.push((peer, shelf));
        }
    }
}

/// Whether an `efa` endpoint's address begins with the GID of a NIC of this host.
fn is_local(address: &[u8]) -> bool {
    let Some(gid) = address.get(..16) else { return false };
    let text: Vec<String> =
        gid.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
    let nics = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    nics.filter_map(|nic| std::fs::read_to_string(nic.path().join("ports/1/gids/0")).ok())
        .any(|gid| gid.trim() == text.join(":"))
}

/// Another's allocation, mapped for memory of this context.
fn import(
    imports: &mut VecDeque<([u8; 64], Arc<Context>, Arc<Import>)>,
    context: &Arc<Context>,
    handle: &[u8; 64],
) -> Result<Arc<Import>> {
    let known = imports.iter().find(|(known, of, _)| known == handle && Arc::ptr_eq(of, context));
    if let Some((.., import)) = known {
        return Ok(import.clone());
    }
    let import = Arc::new(Import::open(context, handle)?);
    if imports.len() >= IMPORTS {
        imports.pop_front();
    }
    imports.push_back((*handle, context.clone(), import.clone()));
    Ok(import)
}

/// What cannot be, since the engine keeps regions while they are used.
fn gone() -> Fault {
    Fault::of(Class::Ours, "the memory is not registered any more")
}
