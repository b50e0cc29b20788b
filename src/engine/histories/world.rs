//! What the engine of a history meets: NICs that the history steers, and peers that are restarted. It knows whose
//! every cell of memory is, and fails the test when an operation touches another's.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::engine::sim::{LOCAL, OURS, PEER, PERMANENT, PRESSURE, RAIL, REMOTE};
use crate::engine::{Finished, Nic, Operation, PeerAddress, Post, RemoteBuffer, RemoteNic};
use crate::engine::{RemoteSegment, Status};
use crate::error::{Code, Error, Result};
use crate::fabric::Memory;
use crate::fault::{Class, Fault};

/// Cells of a local region, and of one of a peer's two.
pub(super) const LOCAL_REGION: usize = 256;
pub(super) const REMOTE_REGION: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    Up,
    /// Takes no posts at the moment.
    Again,
    /// Refuses posts with this errno.
    Refuses(i32),
    /// Its port is down: no connect, no post, and what is in flight fails.
    Down,
}

/// How an operation ends, if nothing is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Complete,
    Fail(i32),
    /// It fails, but its bytes have moved.
    FailAfterwards(i32),
}

/// What a history may meet with, to see that it happens.
#[derive(Clone, Copy, Debug)]
pub(super) enum Met {
    Completed,
    Failed,
    Canceled,
    Timeout,
    /// A submission was refused.
    Refused,
    /// An operation ended after its task.
    Late,
    /// An operation went to a peer that is not there any more, or over a connection that broke.
    Gone,
    /// An operation went to a peer that was restarted with the same address.
    WrongKey,
    /// Memory could not be unregistered.
    Busy,
    Retried,
    PutOff,
}

pub(super) const MET: usize = Met::ALL.len();

impl Met {
    pub const ALL: [Self; 11] = [
        Self::Completed,
        Self::Failed,
        Self::Canceled,
        Self::Timeout,
        Self::Refused,
        Self::Late,
        Self::Gone,
        Self::WrongKey,
        Self::Busy,
        Self::Retried,
        Self::PutOff,
    ];
}

/// One life of a peer.
pub(super) struct Process {
    pub peer: usize,
    pub alive: bool,
    /// Of its endpoints; a peer that is restarted may have the ones of its former life.
    identity: u32,
    pub memory: Vec<u32>,
    /// By region: on which of its NICs.
    registered: [u8; 2],
}

/// One of our NICs.
pub(super) struct NicState {
    pub mood: Mood,
    /// The peer that it takes no posts for.
    pub again_for: Option<u32>,
    pub flying: Vec<Operation>,
    ended: Vec<(u32, i32)>,
    pub regions: Vec<u32>,
    pub known: Vec<Known>,
    last_peer: u64,
}

/// A peer's NIC in the address vector.
pub(super) struct Known {
    peer: PeerAddress,
    identity: u32,
    nic: u8,
    /// A connection that broke.
    broken: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It was submitted in vain, or its memory is known to be quiet.
    Gone,
    UnderWay,
    Ended(Status),
}

pub(super) struct Task {
    pub peer: usize,
    pub write: bool,
    /// Cells.
    pub local: Range<usize>,
    pub remote: usize,
    pub state: State,
}

pub(super) struct World {
    /// Bytes of a cell: addresses and lengths are multiples of it.
    pub cell: u64,
    pub depth: usize,
    pub connects: bool,
    pub virtual_addresses: bool,
    /// NICs of a peer.
    pub far_nics: u8,
    pub local: Vec<u32>,
    pub processes: Vec<Process>,
    pub nics: Vec<NicState>,
    /// By cookie.
    pub tasks: Vec<Task>,
    /// Those whose memory is theirs.
    pub owners: Vec<usize>,
    /// By [`Met`].
    pub met: [u64; MET],
    values: u32,
}

impl World {
    pub fn new(nics: usize, regions: usize) -> Self {
        let nic = |_| NicState {
            mood: Mood::Up,
            again_for: None,
            flying: Vec::new(),
            ended: Vec::new(),
            regions: Vec::new(),
            known: Vec::new(),
            last_peer: 0,
        };
        Self {
            cell: 1,
            depth: 1,
            connects: false,
            virtual_addresses: true,
            far_nics: 1,
            local: vec![0; regions * LOCAL_REGION],
            processes: Vec::new(),
            nics: (0..nics).map(nic).collect(),
            tasks: Vec::new(),
            owners: Vec::new(),
            met: [0; MET],
            values: 0,
        }
    }

    // ---- peers --------------------------------------------------------------------------------

    /// A peer is started, again: its former life ends. With the endpoints of that, if `same`.
    pub fn start(&mut self, peer: usize, same: bool, registered: [u8; 2]) {
        self.kill(peer);
        let former = self.processes.iter().rev().find(|it| it.peer == peer);
        let number = self.processes.len() as u32;
        let identity = former.filter(|_| same).map_or(number, |former| former.identity);
        let memory = (0..2 * REMOTE_REGION as u32).map(|cell| number << 16 | cell).collect();
        let all = (1 << self.far_nics) - 1;
        let registered = registered.map(|nics| if nics & all == 0 { all } else { nics & all });
        self.processes.push(Process { peer, alive: true, identity, memory, registered });
    }

    pub fn kill(&mut self, peer: usize) {
        self.processes.iter_mut().filter(|it| it.peer == peer).for_each(|it| it.alive = false);
    }

    /// The number of a peer's last life.
    pub fn process(&self, peer: usize) -> usize {
        self.processes.iter().rposition(|it| it.peer == peer).expect("it was started")
    }

    /// Its endpoint's address, if it is alive.
    pub fn address(&self, peer: usize, nic: u16) -> Option<Box<[u8]>> {
        let process = &self.processes[self.process(peer)];
        process.alive.then(|| address(process.identity, nic as u8))
    }

    pub fn segment(&self, peer: usize, by_handshake: bool) -> RemoteSegment {
        let number = self.process(peer);
        let process = &self.processes[number];
        let nic = |nic: u8| RemoteNic {
            name: format!("far{nic}"),
            address: (!by_handshake).then(|| address(process.identity, nic)),
        };
        let buffer = |region: usize| RemoteBuffer {
            address: REMOTE + (region * REMOTE_REGION) as u64 * self.cell,
            length: REMOTE_REGION as u64 * self.cell,
            keys: (0..self.far_nics)
                .map(|nic| match process.registered[region] >> nic & 1 {
                    0 => 0,
                    _ => key(number, region, nic),
                })
                .collect(),
            preferred: Vec::new(),
        };
        RemoteSegment {
            name: format!("peer{peer}"),
            server: format!("peer{peer}"),
            nics: (0..self.far_nics).map(nic).collect(),
            buffers: (0..2).map(buffer).collect(),
        }
    }

    // ---- tasks --------------------------------------------------------------------------------

    /// Makes a task whose memory nobody else uses, at both ends, and fills our end with values that are nowhere
    /// else. Its cookie.
    pub fn claim(
        &mut self,
        peer: usize,
        write: bool,
        local: Range<usize>,
        remote: usize,
    ) -> Option<u64> {
        let length = local.len();
        let taken = self.owners.iter().map(|&owner| &self.tasks[owner]).any(|task| {
            let here = task.local.start < local.end && local.start < task.local.end;
            let there = task.remote < remote + length && remote < task.remote + task.local.len();
            here || there && task.peer == peer
        });
        if taken || local.end > self.local.len() || remote + length > 2 * REMOTE_REGION {
            return None;
        }
        for cell in &mut self.local[local.clone()] {
            self.values += 1;
            *cell = 1 << 31 | self.values;
        }
        let cookie = self.tasks.len();
        if length > 0 {
            self.owners.push(cookie);
        }
        self.tasks.push(Task { peer, write, local, remote, state: State::UnderWay });
        Some(cookie as u64)
    }

    /// Its memory is not a task's any more.
    pub fn let_go(&mut self, cookie: u64) {
        self.tasks[cookie as usize].state = State::Gone;
        self.owners.retain(|&owner| owner as u64 != cookie);
    }

    /// The engine says that a task has ended.
    pub fn finish(&mut self, finished: &Finished) {
        let Finished { cookie, bytes, status } = *finished;
        let task = &self.tasks[cookie as usize];
        assert_eq!(task.state, State::UnderWay, "task {cookie} ends once, and is {status:?} now");
        let whole = task.local.len() as u64 * self.cell;
        assert_eq!(bytes, if status == Status::Completed { whole } else { 0 });
        if status != Status::Timeout && whole > 0 {
            assert!(!self.is_flying(task), "task {cookie} is {status:?} and in flight");
            self.owners.retain(|&owner| owner as u64 != cookie);
        }
        if status == Status::Completed {
            let ours = &self.local[task.local.clone()];
            let theirs = task.remote..task.remote + task.local.len();
            let mut lives = self.processes.iter().filter(|it| it.peer == task.peer);
            assert!(
                lives.any(|life| life.memory[theirs.clone()] == *ours),
                "task {cookie} completed, but its bytes are not in place in any life of peer {}",
                task.peer
            );
        }
        self.tasks[cookie as usize].state = State::Ended(status);
        let met = match status {
            Status::Completed => Met::Completed,
            Status::Failed => Met::Failed,
            Status::Canceled => Met::Canceled,
            Status::Timeout => Met::Timeout,
            other => panic!("task {cookie} is {other:?}"),
        };
        self.met[met as usize] += 1;
    }

    /// Whether a NIC may touch the memory of a task.
    pub fn is_flying(&self, task: &Task) -> bool {
        let mut all = self.nics.iter().flat_map(|nic| &nic.flying);
        all.any(|op| {
            let cells = self.cells(op);
            cells.start < task.local.end && task.local.start < cells.end
        })
    }

    fn cells(&self, operation: &Operation) -> Range<usize> {
        let (start, length) = (operation.local - LOCAL, operation.length);
        assert!(start % self.cell == 0 && length % self.cell == 0 && length > 0, "{operation:?}");
        (start / self.cell) as usize..((start + length) / self.cell) as usize
    }

    /// Checks that an operation does what tasks under way (or, when it `lands`, ones that timed out) want, of this
    /// peer, and nothing else. `remote`: its first cell there, if that is known.
    fn check(&self, operation: &Operation, peer: usize, remote: Option<usize>, lands: bool) {
        let cells = self.cells(operation);
        let mut covered = 0;
        for &owner in &self.owners {
            let task = &self.tasks[owner];
            let (start, end) = (cells.start.max(task.local.start), cells.end.min(task.local.end));
            if start >= end {
                continue;
            }
            covered += end - start;
            assert!(
                task.state == State::UnderWay
                    || lands && task.state == State::Ended(Status::Timeout),
                "{operation:?} for task {owner}, which is {:?}",
                task.state
            );
            assert_eq!((task.peer, task.write), (peer, operation.write), "of task {owner}");
            if let Some(remote) = remote {
                let there = task.remote + (start - task.local.start);
                assert_eq!(there, remote + (start - cells.start), "of task {owner}");
            }
        }
        assert_eq!(covered, cells.len(), "{operation:?} is nobody's in part");
    }

    // ---- operations ---------------------------------------------------------------------------

    pub fn in_flight(&self) -> usize {
        self.nics.iter().map(|nic| nic.flying.len()).sum()
    }

    /// Ends one of all operations in flight.
    pub fn end(&mut self, which: usize, end: End) {
        let mut index = which;
        let mut nics = self.nics.iter().enumerate();
        let nic = nics.find_map(|(number, nic)| match index.checked_sub(nic.flying.len()) {
            Some(rest) => {
                index = rest;
                None
            }
            None => Some(number),
        });
        let nic = nic.expect("so many are in flight");
        let op = self.nics[nic].flying.swap_remove(index);
        let known = self.nics[nic].known.iter().find(|it| it.peer == op.peer);
        let &Known { identity, nic: far_nic, broken, .. } = known.expect("nobody forgets it");
        let alive = self.processes.iter().position(|it| it.alive && it.identity == identity);
        let fate = match (self.nics[nic].mood, alive) {
            (Mood::Down, _) => Err(RAIL),
            (_, Some(process)) if !broken => {
                self.resolve(&op, process, far_nic).map(|cell| (process, cell)).ok_or(PERMANENT)
            }
            _ => Err(PEER),
        };
        let errno = match end {
            End::Complete => 0,
            End::Fail(errno) | End::FailAfterwards(errno) => errno,
        };
        match fate {
            Err(PEER) => self.met[Met::Gone as usize] += 1,
            Err(PERMANENT) => self.met[Met::WrongKey as usize] += 1,
            _ => {}
        }
        let cells = self.cells(&op);
        let late = |&owner: &usize| {
            let task = &self.tasks[owner];
            let overlaps = task.local.start < cells.end && cells.start < task.local.end;
            overlaps && task.state == State::Ended(Status::Timeout)
        };
        self.met[Met::Late as usize] += u64::from(self.owners.iter().any(late));
        let errno = match fate {
            Ok((process, remote)) => {
                self.check(&op, self.processes[process].peer, Some(remote), true);
                if !matches!(end, End::Fail(_)) {
                    let there = remote..remote + cells.len();
                    let memory = &mut self.processes[process].memory[there];
                    let local = &mut self.local[cells];
                    if op.write {
                        memory.copy_from_slice(local)
                    } else {
                        local.copy_from_slice(memory)
                    }
                }
                errno
            }
            Err(fate) if errno == 0 => fate,
            Err(_) => errno,
        };
        let state = &mut self.nics[nic];
        if errno != 0 && self.connects {
            state.known.iter_mut().filter(|it| it.peer == op.peer).for_each(|it| it.broken = true);
        }
        state.ended.push((op.slot, errno));
    }

    /// Where an operation goes in the memory of a process; `None` if it is not allowed to.
    fn resolve(&self, operation: &Operation, process: usize, nic: u8) -> Option<usize> {
        let region = (0..2).find(|&region| operation.key == key(process, region, nic))?;
        if self.processes[process].registered[region] >> nic & 1 == 0 {
            return None;
        }
        let first = region * REMOTE_REGION;
        let start = REMOTE + first as u64 * self.cell;
        let offset = match self.virtual_addresses {
            true => operation.remote.checked_sub(start)?,
            false => operation.remote,
        };
        let fits = offset + operation.length <= REMOTE_REGION as u64 * self.cell;
        (fits && offset % self.cell == 0).then(|| first + (offset / self.cell) as usize)
    }
}

fn address(identity: u32, nic: u8) -> Box<[u8]> {
    [&identity.to_ne_bytes()[..], &[nic]].concat().into()
}

fn key(process: usize, region: usize, nic: u8) -> u64 {
    (process as u64 + 1) << 16 | (region as u64) << 8 | u64::from(nic)
}

/// A NIC of a [`World`].
pub(super) struct WorldNic {
    pub index: usize,
    pub world: Arc<Mutex<World>>,
}

impl Nic for WorldNic {
    fn depth(&self) -> u32 {
        self.world.lock().depth as u32
    }

    fn max_length(&self) -> u64 {
        1 << 30
    }

    fn virtual_addresses(&self) -> bool {
        self.world.lock().virtual_addresses
    }

    fn register(&mut self, region: u32, _: &Memory) -> Result<u64> {
        let nic = &mut self.world.lock().nics[self.index];
        if nic.mood == Mood::Down {
            return Err(Error::new(Code::Memory, "the NIC is down"));
        }
        assert!(!nic.regions.contains(&region), "registered once");
        nic.regions.push(region);
        Ok(u64::from(region) + 1)
    }

    fn unregister(&mut self, region: u32) -> Result<()> {
        let nic = &mut self.world.lock().nics[self.index];
        assert!(nic.flying.iter().all(|op| op.region != region), "nothing in flight uses it");
        let before = nic.regions.len();
        nic.regions.retain(|&known| known != region);
        assert_eq!(nic.regions.len() + 1, before, "unregistered once");
        Ok(())
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerAddress> {
        let nic = &mut self.world.lock().nics[self.index];
        let (identity, far_nic) = address.split_at(4);
        let identity = u32::from_ne_bytes(identity.try_into().expect("4 bytes"));
        if let Some(known) =
            nic.known.iter().find(|it| (it.identity, it.nic) == (identity, far_nic[0]))
        {
            return Ok(known.peer);
        }
        if nic.mood == Mood::Down {
            return Err(Error::new(Code::Endpoint, "the NIC is down"));
        }
        nic.last_peer += 1;
        let peer = PeerAddress(nic.last_peer);
        nic.known.push(Known { peer, identity, nic: far_nic[0], broken: false });
        Ok(peer)
    }

    fn disconnect(&mut self, peer: PeerAddress) -> Result<()> {
        let nic = &mut self.world.lock().nics[self.index];
        assert!(nic.flying.iter().all(|op| op.peer != peer), "nothing in flight goes to it");
        let before = nic.known.len();
        nic.known.retain(|known| known.peer != peer);
        assert_eq!(nic.known.len() + 1, before, "forgotten once");
        Ok(())
    }

    fn connects(&self) -> bool {
        self.world.lock().connects
    }

    fn greet(&mut self, peer: PeerAddress, _: u64, _: u64) -> Post {
        let world = self.world.lock();
        let nic = &world.nics[self.index];
        let known = nic.known.iter().find(|known| known.peer == peer).expect("it is connected");
        let answers = |process: &Process| process.alive && process.identity == known.identity;
        match nic.mood {
            Mood::Up if world.processes.iter().any(answers) => Post::Done,
            Mood::Up | Mood::Again => Post::Again,
            Mood::Refuses(errno) => Post::Failed(errno),
            Mood::Down => Post::Failed(RAIL),
        }
    }

    fn post(&mut self, operation: &Operation) -> Post {
        let mut world = self.world.lock();
        let nic = &world.nics[self.index];
        let known =
            nic.known.iter().find(|it| it.peer == operation.peer).expect("the peer is connected");
        assert!(nic.regions.contains(&operation.region), "the region is open");
        assert!(nic.flying.len() < world.depth, "credits are kept");
        assert!(nic.flying.iter().all(|it| it.slot != operation.slot), "one slot, one operation");
        let of = |process: &&Process| process.identity == known.identity;
        let peer = world.processes.iter().find(of).expect("addresses come from peers").peer;
        world.check(operation, peer, None, false);
        match nic.mood {
            Mood::Up if nic.again_for == Some(known.identity) => return Post::Again,
            Mood::Up => {}
            Mood::Again => return Post::Again,
            Mood::Refuses(errno) => return Post::Failed(errno),
            Mood::Down => return Post::Failed(RAIL),
        }
        world.nics[self.index].flying.push(*operation);
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, failed: &mut Vec<(u32, Fault)>) {
        let ended = std::mem::take(&mut self.world.lock().nics[self.index].ended);
        for (slot, errno) in ended {
            match errno {
                0 => completed.push(slot),
                errno => failed.push((slot, self.explain(errno))),
            }
        }
    }

    fn explain(&self, errno: i32) -> Fault {
        let class = match errno {
            PERMANENT => Class::Permanent,
            PEER => Class::Peer,
            RAIL => Class::Rail,
            PRESSURE => Class::Pressure,
            OURS => Class::Ours,
            other => panic!("errno {other}"),
        };
        Fault::of(class, format!("error {errno}"))
    }
}
