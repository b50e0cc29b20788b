//! The cluster's fault rules as this process sees them.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use parking_lot::Mutex;
use softefa_core::rules::{Fired, NicState, Script};

use crate::world::World;

/// One state of the rules.
pub struct View {
    /// Tells this state from others.
    pub version: u32,
    pub script: Script,
    states: Mutex<HashMap<(u16, u16), (NicState, u64)>>,
}

/// The version that VIEW is of.
static SEEN: AtomicU32 = AtomicU32::new(u32::MAX);
/// Somebody reads the rules.
static LOADING: AtomicBool = AtomicBool::new(false);
/// Null if there are none.
static VIEW: AtomicPtr<View> = AtomicPtr::new(ptr::null_mut());

/// The rules, if there are any. Three loads if there are none.
pub fn current(world: &World) -> Option<&'static View> {
    let version = world.cluster.faults_version();
    while version != SEEN.load(Ordering::Acquire) {
        if LOADING.swap(true, Ordering::AcqRel) {
            // Rules hold from the operation on that begins after they were set.
            std::thread::yield_now();
            continue;
        }
        load(world);
        LOADING.store(false, Ordering::Release);
        break;
    }
    // SAFETY: a view is never freed. Rules are changed by hand: a process sees a few.
    unsafe { VIEW.load(Ordering::Acquire).as_ref() }
}

fn load(world: &World) {
    // Before the text: a change while it is read is seen the next time.
    let version = world.cluster.faults_version();
    let script = world
        .cluster
        .faults()
        .map_err(|error| error.to_string())
        .and_then(|text| Script::parse(&text).map_err(|error| error.to_string()))
        .unwrap_or_else(|error| {
            eprintln!("softefa: {}/faults: {error}; no faults then", world.cluster.dir().display());
            Script::default()
        });
    let view = if script.rules.is_empty() {
        ptr::null_mut()
    } else {
        Box::into_raw(Box::new(View { version, script, states: Mutex::default() }))
    };
    VIEW.store(view, Ordering::Release);
    SEEN.store(version, Ordering::Release);
}

/// In a child after fork: somebody may have been reading, or held a view's lock.
pub fn forget() {
    SEEN.store(u32::MAX, Ordering::SeqCst);
    LOADING.store(false, Ordering::SeqCst);
    VIEW.store(ptr::null_mut(), Ordering::SeqCst);
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
