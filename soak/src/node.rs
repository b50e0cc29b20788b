//! One process with a transport: it serves memory, or transfers to others, or both.
//!
//! It is told what to do by its argument, and by lines on its standard input: `begin`, when the faults do,
//! and `end`. It says how it is on standard output, a line of JSON each time.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mooncake_efa::config::Config;
use mooncake_efa::engine::Finished;
use mooncake_efa::fabric::{Buffer, Memory};
use mooncake_efa::transport::{Options, Transport};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::lane::{BATCH, Common, Lane, LaneSpec, Ledger, Shared};
use crate::peers::{Peer, Peers};
use crate::tally::{Link, Tally};

/// No page is smaller.
const PAGE: usize = 4096;
/// How often a node says how it is.
const BEAT: Duration = Duration::from_millis(250);
/// Notes of one kind that are passed on.
const NOTES: u32 = 5;
/// Longest that a node may take to end when it is told to, or nobody is there to tell it.
pub const LEAVE: Duration = Duration::from_secs(60);
/// Longest that closing a transport may take, as it says.
pub const CLOSE: Duration = Duration::from_secs(10);

/// What a node is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Its name, for peers.
    pub name: String,
    /// Where names are.
    pub peers: PathBuf,
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// Bytes to serve; 0: none.
    pub serve: u64,
    /// Transfers to others.
    pub lanes: Vec<(String, LaneSpec)>,
    /// Deadline of a transfer, milliseconds.
    pub timeout_ms: u64,
    /// Cancel some batches.
    pub cancels: bool,
    /// Words, one of which a failure's cause must have.
    pub causes: Vec<String>,
}

/// What a node says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Said {
    /// It serves, and begins with its lanes.
    Ready,
    /// How it is.
    Beat(Beat),
    /// Something is wrong, or worth a look.
    Note {
        /// Which kind of thing.
        kind: String,
        /// One line.
        text: String,
    },
    /// Its lanes have ended, and it closes its transport.
    Closing,
    /// It has closed its transport, and ends.
    Done {
        /// How long that took, milliseconds.
        closing_ms: u64,
    },
}

/// How a node is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Beat {
    /// Milliseconds since it began.
    pub at_ms: u64,
    /// By peer.
    pub links: HashMap<String, Tally>,
    /// Calls that take longer than they may.
    pub hung: Vec<String>,
    /// The transport's counters, one object a NIC.
    pub rails: Vec<serde_json::Value>,
}

fn say(said: &Said) {
    let mut line = serde_json::to_vec(said).expect("it has a JSON form");
    line.push(b'\n');
    // Nobody listens any more: then standard input has ended too.
    let _ = std::io::stdout().lock().write_all(&line);
}

/// Runs until it is told to end.
pub fn run(spec: NodeSpec) -> Result<()> {
    let begin = Instant::now();
    let peers = Peers::new(&spec.peers);
    let links: HashMap<String, Arc<Link>> =
        spec.lanes.iter().map(|(peer, _)| (peer.clone(), Arc::default())).collect();
    let shared: Arc<[Shared]> = spec
        .lanes
        .iter()
        .map(|(peer, _)| Shared {
            peer: peer.clone(),
            link: links[peer].clone(),
            ledger: Ledger::default(),
            call: Mutex::default(),
        })
        .collect();
    let running = Arc::new(AtomicBool::new(true));
    listen(running.clone(), links.values().cloned().collect());
    anyhow::ensure!(
        spec.lanes.iter().all(|(_, lane)| lane.batch <= BATCH),
        "at most {BATCH} a batch"
    );

    let observed = shared.clone();
    let observer = move |ends: &[Finished]| {
        for end in ends {
            let lane = &observed[Ledger::lane_of(end.cookie)];
            lane.ledger.tell(end);
            lane.link.end(1, end.status == mooncake_efa::engine::Status::Completed);
        }
    };
    let timeout = Duration::from_millis(spec.timeout_ms);
    let transport = Arc::new(Transport::install(Options {
        server_name: spec.name.clone(),
        topology: None,
        devices: Vec::new(),
        config: Config { slice_timeout: timeout, ..Config::from_env() },
        host: Some(Box::new(peers.clone())),
        observer: Some(Box::new(observer)),
    })?);
    let served = (spec.serve > 0).then(|| Buffer::new(spec.serve)).transpose()?;
    if let Some(buffer) = &served {
        // Resident from the beginning, not when the first transfer comes to each place.
        (0..spec.serve).step_by(PAGE).for_each(|at| buffer.write(at, &[0]));
        transport.register(&[(Memory::from(buffer), "*")])?;
        let descriptor = transport.descriptor().to_json();
        let peer = Peer { pid: std::process::id(), address: buffer.address(), descriptor };
        peers.publish(&spec.name, &peer)?;
    }

    let noted: Mutex<HashMap<&'static str, u32>> = Mutex::default();
    let note = move |kind: &'static str, text: String| {
        let mut noted = noted.lock();
        let count = noted.entry(kind).or_default();
        *count += 1;
        if *count <= NOTES {
            say(&Said::Note { kind: kind.into(), text });
        }
    };
    let NodeSpec { seed, cancels, causes, .. } = spec;
    let common = Arc::new(Common { seed, timeout, cancels, causes, note: Box::new(note) });
    let lanes: Vec<Lane> = spec
        .lanes
        .into_iter()
        .enumerate()
        .map(|(number, (_, lane))| {
            let (shared, common) = (shared.clone(), common.clone());
            Lane::new(number, lane, shared, common, transport.clone(), peers.clone())
        })
        .collect::<Result<_>>()?;
    say(&Said::Ready);

    let beat = || {
        let hung = shared.iter().filter_map(|lane| {
            let call = (*lane.call.lock())?;
            let taken = call.since.elapsed();
            (taken > call.limit).then(|| {
                let (what, limit) = (call.what, call.limit);
                format!("{what} has not returned for {taken:.1?}, its limit is {limit:?}")
            })
        });
        let rails = transport.stats().rails.iter().map(|rail| serde_json::json!(rail)).collect();
        say(&Said::Beat(Beat {
            at_ms: begin.elapsed().as_millis() as u64,
            links: links.iter().map(|(peer, link)| (peer.clone(), link.tally())).collect(),
            hung: hung.collect(),
            rails,
        }));
    };
    let is_running = || running.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let lanes: Vec<_> =
            lanes.into_iter().map(|lane| scope.spawn(move || lane.run(is_running))).collect();
        while is_running() || lanes.iter().any(|lane| !lane.is_finished()) {
            beat();
            std::thread::park_timeout(BEAT);
        }
    });
    beat();
    say(&Said::Closing);
    let closing = Instant::now();
    let transport = Arc::into_inner(transport).context("a lane still has the transport")?;
    drop(transport);
    say(&Said::Done { closing_ms: closing.elapsed().as_millis() as u64 });
    Ok(())
}

/// Does what is told; sees to it that the process ends when it is told to, or when whoever started it has
/// ended.
fn listen(running: Arc<AtomicBool>, links: Vec<Arc<Link>>) {
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
            match line.as_str() {
                "begin" => links.iter().for_each(|link| link.forget_stalls()),
                _ => break,
            }
        }
        running.store(false, Ordering::Relaxed);
        std::thread::sleep(LEAVE);
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    });
}
