//! One cell of a grid: a machine, its peers and a workload, in virtual time.

use std::collections::VecDeque;
use std::sync::Arc;

use mooncake_efa::engine::{
    BatchId, Engine, Registration, RemoteBuffer, RemoteSegment, Request, Settings, Status, TargetId,
};
use mooncake_efa::fabric::{Buffer, Memory};
use parking_lot::Mutex;
use serde::Serialize;

use crate::device::{CallCosts, Line, LineNic, remote_nic};
use crate::machine::Machine;
use crate::network::{Network, Wire};
use crate::world::World;

/// Longest operation that the transport posts by default (`MC_SLICE_SIZE`), bytes.
pub const DEFAULT_SLICE: u64 = 4 << 20;
/// Memory that each side registers, bytes: addresses only. Blocks take places in it in turn.
const MEMORY: u64 = 64 << 30;
/// Longest [`Cell::block`], bytes.
pub const LONGEST_BLOCK: u64 = 512 << 20;
/// Between two blocks that are not neighbours, bytes.
const GAP: u64 = 4096;
/// No deadline.
const FOREVER: u64 = u64::MAX;

/// CPU time of the threads, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Costs {
    /// The engine, a request.
    pub request: u64,
    /// The engine, a submission, besides its requests.
    pub submission: u64,
    /// The engine, once through its NICs for someone who waits, besides what follows.
    pub progress: u64,
    /// libfabric, posting an operation.
    pub post: u64,
    /// libfabric, a look at a completion queue.
    pub poll: u64,
    /// libfabric, a completion.
    pub completion: u64,
}

impl Default for Costs {
    /// docs/performance.md: of an operation of 4 KiB the engine takes 160 ns. libfabric's post and
    /// completion take as long together. The rest is what `simulation growth` shows for the engine's
    /// fixed costs, rounded up.
    fn default() -> Self {
        Self { request: 160, submission: 500, progress: 100, post: 80, poll: 30, completion: 80 }
    }
}

/// What is simulated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// The sender, and each peer.
    pub machine: Machine,
    /// Peers that requests go to in turn.
    pub peers: usize,
    /// Hosts that send, each with as many threads, to the same peers.
    pub senders: usize,
    /// Write to the peers; otherwise read from them.
    pub write: bool,
    /// Bytes of a request.
    pub block: u64,
    /// Threads that submit and wait, of each sender.
    pub threads: usize,
    /// Requests a submission.
    pub batch: usize,
    /// Submissions that a thread has under way before it waits for the oldest.
    pub ahead: usize,
    /// Cores of each sender, which its threads share evenly.
    pub cores: usize,
    /// Blocks are neighbours on both sides, so that they can be merged.
    pub neighbours: bool,
    /// A submission's requests to the same peer are next to each other, instead of going to the peers in
    /// turn.
    pub runs: bool,
    /// A request goes over one NIC, whichever its address is given to.
    pub one_nic: bool,
    /// Longest operation, bytes.
    pub slice: u64,
    /// Rails in turn, instead of the least loaded.
    pub round_robin: bool,
    /// CPU time.
    pub costs: Costs,
    /// Nanoseconds.
    pub round_trip: u64,
    /// Time that a device takes for an operation at least, nanoseconds.
    pub message: u64,
    /// Longest time that is simulated, nanoseconds.
    pub longest: u64,
}

impl Cell {
    /// Eight threads that write blocks of 64 KiB in batches of 128 to one peer, default settings.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            peers: 1,
            senders: 1,
            write: true,
            block: 64 << 10,
            threads: 8,
            batch: 128,
            ahead: 1,
            cores: 64,
            neighbours: false,
            runs: false,
            one_nic: false,
            slice: DEFAULT_SLICE,
            round_robin: false,
            costs: Costs::default(),
            round_trip: 20_000,
            message: 0,
            longest: 4_000_000,
        }
    }

    /// What no choice of the engine's can exceed with these costs, as a part of the line rate: a thread's
    /// round is at least the planning of a submission, a round trip, and the time of its bytes on the
    /// line; the cores have the CPU time they have; and one thread at a time drives a NIC.
    pub fn bound(&self) -> f64 {
        let Costs { request, submission, post, completion, .. } = self.costs;
        let plan = (submission + request * self.batch as u64) as f64;
        let calls = (post + completion) as f64 * self.operations();
        let rounds = (self.threads * self.ahead) as f64;
        let pipe = rounds * self.wire() / (plan + self.round_trip as f64 + self.wire());
        let cores = self.cores.min(self.threads) as f64 * self.wire() / (plan + calls);
        let nics = self.machine.nics as f64 * self.wire() / calls;
        pipe.min(cores).min(nics) * (self.senders as f64 / self.peers as f64).max(1.0)
    }

    /// Operations of a submission, at least.
    fn operations(&self) -> f64 {
        self.batch as f64 * self.block.div_ceil(self.slice) as f64
    }

    /// Time of a submission's bytes on all lines together, nanoseconds.
    fn wire(&self) -> f64 {
        (self.batch as u64 * self.block) as f64 * 1e9 / self.machine.line()
    }

    /// What is measured, from and to: the last two thirds of twelve rounds of every thread, if that is
    /// not too long.
    fn window(&self) -> (u64, u64) {
        let Costs { request, post, completion, .. } = self.costs;
        let work =
            request as f64 * self.batch as f64 + (post + completion) as f64 * self.operations();
        let busy = work / self.cores.min(self.threads) as f64;
        let rounds = (self.senders * self.threads * self.ahead) as f64;
        let round =
            (self.wire() * rounds).max(work).max(busy * rounds) + 2.0 * self.round_trip as f64;
        let end = (12.0 * round).min(self.longest as f64) as u64;
        (end / 3, end.max(1))
    }

    /// Simulates it.
    ///
    /// # Errors
    /// The first request's or batch's that is refused or fails.
    pub fn run(&self) -> Result<Outcome, String> {
        let (from, to) = self.window();
        let nics = self.machine.nics;
        let wire =
            Wire { gbits: self.machine.gbits, round_trip: self.round_trip, message: self.message };
        let hosts = self.senders + self.peers;
        let network = Network::new(wire, hosts * nics, (from * 1000, to * 1000));
        let world = World::new(network, self.senders * self.cores);
        let memory = Buffer::new(MEMORY).map_err(|error| error.to_string())?;
        let senders: Vec<Sender> = (0..self.senders)
            .map(|host| Sender::new(self, host, &world, &Memory::from(&memory)))
            .collect::<Result<_, _>>()?;
        let failure = Mutex::new(None);
        let mut bodies: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
        // A sender's threads next to each other on its own cores.
        for thread in 0..self.threads.next_multiple_of(self.cores) {
            for sender in &senders {
                let (world, failure) = (&world, &failure);
                bodies.push(Box::new(move || {
                    if thread >= self.threads {
                        return;
                    }
                    if let Err(text) = sender.work(self, thread, world, to) {
                        failure.lock().get_or_insert(text);
                    }
                }));
            }
        }
        world.run(bodies);
        if let Some(text) = failure.into_inner() {
            return Err(text);
        }
        let seconds = (to - from) as f64 / 1e9;
        let (received, messages) = world.network(|network, _| {
            network.advance(to * 1000);
            (network.received(), network.messages())
        });
        let line = self.machine.line() * self.senders.min(self.peers) as f64;
        Ok(Outcome {
            line_part: received / seconds / line,
            bound: self.bound(),
            gigabytes: received / seconds / 1e9,
            operations: messages as f64 / seconds,
            simulated: to,
        })
    }
}

/// What came of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Bandwidth as a part of the line rate of all NICs (of the side that has fewer hosts).
    pub line_part: f64,
    /// [`Cell::bound`].
    pub bound: f64,
    /// Bandwidth, 10^9 bytes a second.
    pub gigabytes: f64,
    /// Operations a second.
    pub operations: f64,
    /// Virtual nanoseconds that were simulated.
    pub simulated: u64,
}

/// A host that sends.
struct Sender {
    engine: Engine<LineNic>,
    targets: Vec<TargetId>,
    local: u64,
}

impl Sender {
    fn new(cell: &Cell, host: usize, world: &Arc<World>, memory: &Memory) -> Result<Self, String> {
        let nics = cell.machine.nics;
        let Costs { post, poll, completion, .. } = cell.costs;
        let nic = |index: usize| {
            let nic = LineNic {
                // What the transport leaves of the queues' depth.
                depth: cell.machine.depth - 1,
                device: Line {
                    world: world.clone(),
                    port: host * nics + index,
                    costs: CallCosts { post, poll, completion },
                },
            };
            (format!("nic{index}"), nic)
        };
        let settings = Settings {
            slice: cell.slice,
            merge: true,
            round_robin: cell.round_robin,
            registering: 1,
            tries: 9,
            keep_peers: 8192,
        };
        let engine = Engine::new((0..nics).map(nic).collect(), settings, None);
        let rails: Vec<u16> = (0..nics as u16).collect();
        let parts = if cell.one_nic { ONE_NIC_PARTS } else { 1 };
        let registrations: Vec<Registration> = (0..parts)
            .map(|part| Registration {
                memory: memory.part(part * (MEMORY / parts), MEMORY / parts),
                preferred: if cell.one_nic { vec![(part % nics as u64) as u16] } else { vec![] },
                rails: rails.clone(),
                largest: u64::MAX,
                merge: mooncake_efa::engine::MERGE,
                shares: 1,
            })
            .collect();
        engine.register(&registrations).map_err(|error| error.to_string())?;
        let segment = |peer: usize| RemoteSegment {
            name: format!("peer{peer}"),
            server: format!("peer{peer}"),
            nics: (0..nics).map(|nic| remote_nic((cell.senders + peer) * nics + nic)).collect(),
            buffers: vec![RemoteBuffer {
                address: REMOTE,
                length: MEMORY,
                keys: vec![1; nics],
                preferred: Vec::new(),
            }],
        };
        let targets = (0..cell.peers).map(|peer| engine.add_target(segment(peer)));
        let targets: Vec<TargetId> =
            targets.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        for &target in &targets {
            engine.warm_up(target).map_err(|refusal| format!("{refusal:?}"))?;
        }
        Ok(Self { engine, targets, local: memory.address() })
    }

    /// A thread's life: submit, wait, free, until `end`.
    fn work(&self, cell: &Cell, thread: usize, world: &World, end: u64) -> Result<(), String> {
        let engine = &self.engine;
        let stride = if cell.neighbours { cell.block } else { cell.block + GAP };
        let places = if cell.one_nic {
            // A block that crossed from one part to another would be cut there.
            MEMORY / ONE_NIC_PARTS / stride * ONE_NIC_PARTS
        } else {
            MEMORY / stride
        };
        let mut next = thread as u64 * (places / cell.threads as u64);
        let mut under_way: VecDeque<BatchId> = VecDeque::new();
        while world.now() < end {
            while under_way.len() < cell.ahead {
                world.spend(cell.costs.submission + cell.costs.request * cell.batch as u64);
                world.turn();
                let requests = (0..cell.batch).map(|index| {
                    let place = (next + index as u64) % places;
                    let offset = if cell.one_nic {
                        // Successive blocks in parts at random.
                        let part = scatter(place) % ONE_NIC_PARTS;
                        part * (MEMORY / ONE_NIC_PARTS) + place / ONE_NIC_PARTS * stride
                    } else {
                        place * stride
                    };
                    // Neighbours go to one peer, or there would be none.
                    let peer = if cell.neighbours {
                        next as usize / cell.batch
                    } else if cell.runs {
                        index * cell.peers / cell.batch
                    } else {
                        index
                    };
                    Request {
                        write: cell.write,
                        local: self.local + offset,
                        target: self.targets[(thread + peer) % cell.peers],
                        remote: REMOTE + offset,
                        length: cell.block,
                        cookie: 0,
                    }
                });
                let batch =
                    engine.allocate_batch(cell.batch as u32).map_err(|error| error.to_string())?;
                engine
                    .submit(batch, requests, world.now(), FOREVER)
                    .map_err(|refusal| format!("{refusal:?}"))?;
                next += cell.batch as u64;
                under_way.push_back(batch);
            }
            let oldest = under_way[0];
            let watched = engine.watch(oldest).map_err(|error| error.to_string())?;
            while !watched.status().is_final() {
                if world.now() >= end {
                    return Ok(());
                }
                world.spend(cell.costs.progress);
                world.turn();
                engine.progress(world.now());
            }
            if watched.status() != Status::Completed {
                return Err(format!("a batch ended as {:?}", watched.status()));
            }
            drop(watched);
            engine.free_batch(oldest).map_err(|error| error.to_string())?;
            under_way.pop_front();
        }
        Ok(())
    }
}

/// Where peers' memory is.
const REMOTE: u64 = 0x7000_0000_0000;
/// Parts of the memory that are given to a NIC each, where a request goes over one NIC: as many a NIC.
const ONE_NIC_PARTS: u64 = 64;

/// A number that looks drawn (the finalizer of SplitMix64).
fn scatter(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
