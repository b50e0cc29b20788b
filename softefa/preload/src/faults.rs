//! The cluster's fault rules as this process sees them.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::{Mutex, RwLock};
use softefa_core::rules::{Fired, NicState, Script};

use crate::world::World;

/// One state of the rules.
pub struct View {
    /// Tells this state from others.
    pub version: u32,
    pub script: Script,
    states: Mutex<HashMap<(u16, u16), (NicState, u64)>>,
}

static SEEN: AtomicU32 = AtomicU32::new(u32::MAX);
static ANY: AtomicBool = AtomicBool::new(false);
static VIEW: RwLock<Option<Arc<View>>> = RwLock::new(None);

/// The rules, if there are any. Two loads if there are none.
pub fn current(world: &World) -> Option<Arc<View>> {
    let version = world.cluster.faults_version();
    if version != SEEN.load(Ordering::Acquire) {
        load(world, version);
    }
    if !ANY.load(Ordering::Relaxed) {
        return None;
    }
    VIEW.read().clone()
}

fn load(world: &World, version: u32) {
    let mut view = VIEW.write();
    if SEEN.load(Ordering::Relaxed) == version {
        return;
    }
    let script = world
        .cluster
        .faults()
        .map_err(|error| error.to_string())
        .and_then(|text| Script::parse(&text).map_err(|error| error.to_string()))
        .unwrap_or_else(|error| {
            eprintln!("softefa: {}/faults: {error}; no faults then", world.cluster.dir().display());
            Script::default()
        });
    ANY.store(!script.rules.is_empty(), Ordering::Relaxed);
    *view = Some(Arc::new(View { version, script, states: Mutex::default() }));
    SEEN.store(version, Ordering::Release);
}

impl View {
    /// How that NIC is now.
    pub fn nic(&self, host: u16, nic: u16, now: u64) -> NicState {
        let mut states = self.states.lock();
        let entry = states.entry((host, nic)).or_insert((NicState::default(), 0));
        if now >= entry.1 {
            let until = self.script.next_change(now).unwrap_or(u64::MAX);
            *entry = (self.script.link_state(host, nic, now), until);
        }
        entry.0
    }
}

/// Writes down what happened, as a rule that makes it happen again.
pub fn record(world: &World, fired: &Fired) {
    let path = world.cluster.dir().join("recorded");
    let line = format!("{fired}\n");
    // One write to a file opened for appending is one line, whoever else writes.
    let written = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        eprintln!("softefa: {}: {error}: {}", path.display(), line.trim_end());
    }
}
