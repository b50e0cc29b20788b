//! Segments by handle. A handle is an index that is never given to another name, so looking one up is two loads
//! however many there are.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use mooncake_efa::engine::TargetId;
use parking_lot::Mutex;

/// No target: the segment is not open in the transport now.
const NONE: u64 = 0;

/// Our own segment's handle.
pub const LOCAL: i32 = 0;

/// One name.
pub struct Slot {
    /// The segment's name.
    pub name: String,
    target: AtomicU64,
    /// Who changes the target holds it, network and all; and how many times it was opened and not closed.
    pub users: Mutex<u32>,
}

impl Slot {
    fn new(name: &str, target: Option<TargetId>) -> Self {
        let target = AtomicU64::new(target.map_or(NONE, |target| target.0));
        Self { name: name.to_owned(), target, users: Mutex::new(0) }
    }

    /// The transport's name for it, if it is open there.
    pub fn target(&self) -> Option<TargetId> {
        Some(self.target.load(Ordering::Acquire)).filter(|&target| target != NONE).map(TargetId)
    }

    /// Sets that; what it was.
    pub fn set_target(&self, target: Option<TargetId>) -> Option<TargetId> {
        let former = self.target.swap(target.map_or(NONE, |target| target.0), Ordering::AcqRel);
        Some(former).filter(|&target| target != NONE).map(TargetId)
    }
}

/// All names that were ever opened, and our own.
pub struct Segments {
    slots: boxcar::Vec<Slot>,
    handles: Mutex<HashMap<String, i32>>,
}

impl Segments {
    /// With our own segment under handle [`LOCAL`].
    pub fn new(own: &str) -> Self {
        let slots = boxcar::Vec::new();
        slots.push(Slot::new(own, None));
        Self { slots, handles: Mutex::new(HashMap::from([(own.to_owned(), LOCAL)])) }
    }

    /// The slot of a handle.
    pub fn get(&self, handle: i32) -> Option<&Slot> {
        self.slots.get(usize::try_from(handle).ok()?)
    }

    /// The handle of a name.
    pub fn find(&self, name: &str) -> Option<i32> {
        self.handles.lock().get(name).copied()
    }

    /// Gives a name a handle, unless it has got one meanwhile: then `target` is given back.
    pub fn add(&self, name: &str, target: Option<TargetId>) -> (i32, Option<TargetId>) {
        let mut handles = self.handles.lock();
        if let Some(&handle) = handles.get(name) {
            return (handle, target);
        }
        let handle = i32::try_from(self.slots.push(Slot::new(name, target))).unwrap_or(i32::MAX);
        handles.insert(name.to_owned(), handle);
        (handle, None)
    }

    /// All slots, our own first.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().map(|(_, slot)| slot)
    }
}
