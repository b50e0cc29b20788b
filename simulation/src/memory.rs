//! Bytes of heap that the engine keeps, counted by the allocator.

use allocation_counter::measure;
use serde::Serialize;

use crate::instant::Instant;

/// Wanted, bytes a request in flight.
const WANTED_REQUEST: f64 = 64.0;
/// Wanted, bytes a peer and NIC.
const WANTED_PEER: f64 = 1024.0;

/// Bytes, beyond what the provider takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Usage {
    /// A request's place in its batch.
    pub task: f64,
    /// A NIC's slot for an operation in flight. There from the beginning, for the whole depth.
    pub slot: f64,
    /// A request that waits for a slot.
    pub queued: f64,
    /// What a thread keeps for its next submission, a request of its largest one.
    pub scratch: f64,
    /// A peer and NIC of it, known to our NICs, which are as many, and connected from one.
    pub peer_nic: f64,
    /// NICs of that peer, and ours.
    pub nics: usize,
}

impl Usage {
    /// A request in flight, of one operation.
    pub fn in_flight(&self) -> f64 {
        self.task + self.slot
    }

    /// A request that waits for a slot.
    pub fn waiting(&self) -> f64 {
        self.task + self.queued
    }
}

/// Bytes that `work` leaves allocated.
fn kept<R>(work: impl FnOnce() -> R) -> (f64, R) {
    let mut result = None;
    let info = measure(|| result = Some(work()));
    (info.bytes_current as f64, result.expect("it ran"))
}

/// Counts, with as many NICs here as at the peers.
pub fn usage(nics: usize) -> Usage {
    // On a thread of its own, which has no buffers from a submission before.
    std::thread::scope(|scope| scope.spawn(|| count(nics)).join().expect("no panic"))
}

fn count(nics: usize) -> Usage {
    const PEERS: usize = 1 << 10;
    // A power of two, so that neither a batch nor a queue has more room than is used.
    const REQUESTS: usize = 1 << 15;
    let (few, many) = (1 << 10, 1 << 11);
    let slots = |depth| kept(|| Instant::new(1, depth, true)).0;
    let slot = (slots(many) - slots(few)) / f64::from(many - few);

    // What is submitted here waits, but for the first few.
    let engine = Instant::new(1, few, true).with_regions(1).with_peers(1, 1);
    let (task, _) = kept(|| engine.engine.allocate_batch(REQUESTS as u32));
    let submit = || engine.submit(REQUESTS, |_| 0, |index| index as u64);
    let (first, _) = kept(submit);
    // The thread has its buffers now, and the queue grows by as many places as are full.
    let (second, _) = kept(submit);

    let engine = Instant::new(nics, few, true).with_regions(1);
    let (peers, _) = kept(|| engine.with_peers(PEERS, 1));
    let requests = REQUESTS as f64;
    Usage {
        task: task / requests,
        slot,
        queued: (second - task) / requests,
        scratch: (first - second) / requests,
        peer_nic: peers / (PEERS * nics) as f64,
        nics,
    }
}

/// Counts and prints.
pub fn run(json: bool) {
    let usage = usage(16);
    if json {
        println!("{}", serde_json::to_string_pretty(&usage).expect("numbers"));
        return;
    }
    let verdict = |bytes: f64, wanted: f64| if bytes <= wanted { "met" } else { "missed" };
    println!("Bytes of heap beyond the provider's own");
    println!("{:8.1}  a request's task, in its batch", usage.task);
    println!("{:8.1}  a NIC's slot for an operation in flight", usage.slot);
    println!(
        "{:8.1}  a request in flight (wanted: {WANTED_REQUEST}, {})",
        usage.in_flight(),
        verdict(usage.in_flight(), WANTED_REQUEST)
    );
    println!("{:8.1}  a place in a NIC's queue", usage.queued);
    println!("{:8.1}  a request that waits for a slot", usage.waiting());
    println!("{:8.1}  kept by a thread, a request of its largest submission", usage.scratch);
    println!(
        "{:8.1}  a peer and NIC, {} NICs on either side (wanted: {WANTED_PEER}, {})",
        usage.peer_nic,
        usage.nics,
        verdict(usage.peer_nic, WANTED_PEER)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request takes more than is wanted, but nothing takes more than it did: see docs/simulation.md.
    #[test]
    fn no_more_is_kept_than_before() {
        let usage = usage(16);
        assert!(usage.in_flight() <= 109.0, "{usage:?}");
        assert!(usage.waiting() <= 127.0, "{usage:?}");
        assert!(usage.peer_nic <= 540.0, "{usage:?}");
    }
}
