//! An engine whose NICs need no network: for what its own code costs.

use mooncake_efa::engine::{
    BatchId, Engine, Registration, RemoteBuffer, RemoteSegment, Request, Settings, Status, TargetId,
};
use mooncake_efa::fabric::{Buffer, Memory};

use crate::device::{InstantNic, remote_nic};

/// Bytes of a request.
pub(crate) const BLOCK: u64 = 4096;
/// From one request to the next: they are not merged.
pub(crate) const STRIDE: u64 = 2 * BLOCK;
/// Where peers' memory is.
const REMOTE: u64 = 0x7000_0000_0000;
/// Bytes of memory, ours and each peer's.
const MEMORY: u64 = 16 << 30;
/// No deadline.
const FOREVER: u64 = u64::MAX;

pub(crate) struct Instant {
    pub engine: Engine<InstantNic>,
    pub targets: Vec<TargetId>,
    pub local: u64,
    memory: Memory,
    nics: usize,
    /// Bytes of a region, ours and the peers'.
    ours: u64,
    /// From one request's place to the next.
    stride: u64,
}

/// What the code under measurement needs: no error can happen.
const SOUND: &str = "the simulated NICs refuse nothing";

impl Instant {
    /// An engine with memory registered as one region, and no peer.
    pub fn new(nics: usize, depth: u32, keeps: bool) -> Self {
        let nic = |index: usize| (format!("nic{index}"), InstantNic::new(depth, keeps));
        let settings = Settings {
            slice: 4 << 20,
            merge: true,
            round_robin: false,
            registering: 1,
            tries: 9,
            keep_peers: 8192,
        };
        let engine = Engine::new((0..nics).map(nic).collect(), settings, None);
        let buffer = Buffer::new(MEMORY).expect("address space for the registered memory");
        let memory = Memory::from(&buffer);
        Self {
            engine,
            targets: Vec::new(),
            local: memory.address(),
            memory,
            nics,
            ours: MEMORY,
            stride: STRIDE,
        }
    }

    /// Places are next to each other: requests to neighbouring ones are merged.
    pub fn with_neighbours(self) -> Self {
        Self { stride: BLOCK, ..self }
    }

    /// Registers the memory as so many regions.
    pub fn with_regions(mut self, regions: u64) -> Self {
        self.ours = MEMORY / regions / STRIDE * STRIDE;
        let wanted: Vec<_> = (0..regions).map(|region| self.registration(region)).collect();
        self.engine.register(&wanted).expect(SOUND);
        self
    }

    /// Adds peers, each with so many regions and as many NICs as we, and connects all NICs.
    pub fn with_peers(mut self, peers: usize, regions: u64) -> Self {
        for _ in 0..peers {
            let target = self.engine.add_target(self.segment(regions)).expect(SOUND);
            self.engine.warm_up(target).expect(SOUND);
            self.targets.push(target);
        }
        self
    }

    /// The region `region` of ours.
    pub fn registration(&self, region: u64) -> Registration {
        Registration {
            memory: self.memory.part(region * self.ours, self.ours),
            rails: (0..self.nics as u16).collect(),
            preferred: Vec::new(),
            largest: u64::MAX,
            merge: mooncake_efa::engine::MERGE,
            shares: 1,
        }
    }

    /// Another peer's descriptor.
    pub fn segment(&self, regions: u64) -> RemoteSegment {
        let first = self.targets.len() * self.nics;
        let length = MEMORY / regions / STRIDE * STRIDE;
        RemoteSegment {
            name: format!("peer{first}:12345"),
            server: format!("peer{first}:12345"),
            nics: (first..first + self.nics).map(remote_nic).collect(),
            buffers: (0..regions)
                .map(|region| RemoteBuffer {
                    address: REMOTE + region * length,
                    length,
                    keys: vec![1; self.nics],
                    preferred: Vec::new(),
                })
                .collect(),
        }
    }

    /// Submits `count` requests, request `i` to the peer `peer(i)` at the place `place(i)`.
    pub fn submit(
        &self,
        count: usize,
        peer: impl Fn(usize) -> usize,
        place: impl Fn(usize) -> u64,
    ) -> BatchId {
        let batch = self.engine.allocate_batch(count as u32).expect(SOUND);
        let requests = (0..count).map(|index| {
            let offset = place(index) % (MEMORY / STRIDE / 2) * self.stride;
            Request {
                write: true,
                local: self.local + offset,
                target: self.targets[peer(index)],
                remote: REMOTE + offset,
                length: BLOCK,
                cookie: 0,
            }
        });
        self.engine.submit(batch, requests, 0, FOREVER).expect(SOUND);
        batch
    }

    /// Waits for a batch and frees it.
    pub fn finish(&self, batch: BatchId) {
        let watched = self.engine.watch(batch).expect(SOUND);
        while !watched.status().is_final() {
            if self.engine.progress(0).events == 0 {
                // Somebody else has it in hand: the transport makes way too.
                std::thread::yield_now();
            }
        }
        assert_eq!(watched.status(), Status::Completed);
        drop(watched);
        self.engine.free_batch(batch).expect(SOUND);
    }
}
