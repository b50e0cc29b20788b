//! What one request costs the engine, from submit to completion, on NICs that cost nothing: so only our
//! own code is counted. `scripts/check-cost` counts its instructions and compares them with a budget.
//!
//! `request [BATCHES [CASE]]` prints nanoseconds a request; a case is one of those below, else all.

use std::time::Instant;

use mooncake_efa::engine::{
    Engine, Nic, Operation, PeerAddress, Post, Registration, RemoteBuffer, RemoteNic,
    RemoteSegment, Request, Settings, Status,
};
use mooncake_efa::fabric::{Buffer, Memory};
use mooncake_efa::{Error, Result};

/// Requests of a batch.
const BATCH: u32 = 128;
/// Bytes of a request.
const BLOCK: u64 = 4096;
/// Where the peer's memory is.
const REMOTE: u64 = 0x7000_0000_0000;

/// A NIC whose operations are complete as soon as they are posted.
struct AtOnce {
    done: Vec<u32>,
}

impl Nic for AtOnce {
    fn depth(&self) -> u32 {
        1024
    }

    fn max_length(&self) -> u64 {
        1 << 30
    }

    fn virtual_addresses(&self) -> bool {
        true
    }

    fn register(&mut self, region: u32, _: &Memory) -> Result<u64> {
        Ok(u64::from(region) + 1)
    }

    fn unregister(&mut self, _: u32) -> Result<()> {
        Ok(())
    }

    fn connect(&mut self, _: &[u8]) -> Result<PeerAddress> {
        Ok(PeerAddress(0))
    }

    fn post(&mut self, operation: &Operation) -> Post {
        self.done.push(operation.slot);
        Post::Done
    }

    fn poll(&mut self, completed: &mut Vec<u32>, _: &mut Vec<(u32, String)>) {
        completed.append(&mut self.done);
    }

    fn explain(&self, errno: i32) -> String {
        format!("error {errno}")
    }
}

/// How the requests of a batch lie to each other, and over how many NICs they go.
struct Case {
    name: &'static str,
    rails: u16,
    merge: bool,
}

const CASES: [Case; 4] = [
    Case { name: "write-1-nic", rails: 1, merge: false },
    Case { name: "write-2-nics", rails: 2, merge: false },
    Case { name: "write-16-nics", rails: 16, merge: false },
    Case { name: "merged-2-nics", rails: 2, merge: true },
];

/// Runs `batches` batches one after another; nanoseconds a request.
fn run(case: &Case, batches: u64) -> Result<f64> {
    let nics = (0..case.rails).map(|rail| (format!("nic{rail}"), AtOnce { done: Vec::new() }));
    let settings =
        Settings { slice: 4 << 20, merge: case.merge, round_robin: false, registering: 1 };
    let engine = Engine::new(nics.collect(), settings, None);
    let bytes = u64::from(BATCH) * BLOCK;
    let buffer = Buffer::new(bytes)?;
    engine.register(&[Registration {
        memory: Memory::from(&buffer),
        rails: (0..case.rails).collect(),
        preferred: Vec::new(),
        largest: u64::MAX,
        shares: 1,
    }])?;
    let target = engine.add_target(RemoteSegment {
        name: "peer".to_owned(),
        server: "peer".to_owned(),
        nics: vec![RemoteNic { name: "nic".to_owned(), address: Some([1].into()) }],
        buffers: vec![RemoteBuffer {
            address: REMOTE,
            length: bytes,
            keys: vec![1],
            preferred: Vec::new(),
        }],
    })?;
    let request = |index: u32| {
        let offset = u64::from(index) * BLOCK;
        let (local, remote) = (buffer.address() + offset, REMOTE + offset);
        Request { write: true, local, target, remote, length: BLOCK, cookie: 0 }
    };
    let start = Instant::now();
    for now in 0..batches {
        let batch = engine.allocate_batch(BATCH)?;
        match engine.submit(batch, (0..BATCH).map(request), now, u64::MAX) {
            Err(refusal) => panic!("{refusal:?}"),
            Ok(first) => assert_eq!(first, 0),
        }
        loop {
            match engine.batch_status(batch)? {
                (Status::Pending, _) => engine.progress(now),
                (status, _) => {
                    assert_eq!(status, Status::Completed);
                    break;
                }
            };
        }
        engine.free_batch(batch)?;
    }
    Ok(start.elapsed().as_nanos() as f64 / (batches * u64::from(BATCH)) as f64)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let batches = arguments.next().map_or(Ok(10_000), |count| count.parse());
    let batches = batches.map_err(|why| Error::invalid(format!("BATCHES: {why}")))?;
    let wanted = arguments.next();
    for case in CASES.iter().filter(|case| wanted.as_ref().is_none_or(|name| name == case.name)) {
        println!("{:14} {:7.1} ns a request", case.name, run(case, batches)?);
    }
    Ok(())
}
