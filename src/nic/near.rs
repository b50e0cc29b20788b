//! What NICs of this process have registered, for each other: a transfer inside the process is a copy where a GPU's
//! memory is at one end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::error::Result;
use crate::fabric::{Memory, PeerAddress};
use crate::hmem::{self, DeviceMemory, Kind};

/// A registered range, as copies need it.
pub(super) struct Held {
    pub address: u64,
    pub length: u64,
    pub kind: Kind,
    /// Of a GPU's or managed memory.
    pub device: Option<DeviceMemory>,
    /// Copies at which it is the far end; [`CLOSED`] and below: it is being unregistered.
    users: AtomicI64,
}

const CLOSED: i64 = i64::MIN / 2;

/// Regions of device memory that this process has registered.
static DEVICE_REGIONS: AtomicUsize = AtomicUsize::new(0);

/// Whether this process has registered any device memory.
pub(super) fn has_device_memory() -> bool {
    DEVICE_REGIONS.load(Ordering::Relaxed) > 0
}

impl Held {
    /// # Errors
    /// As [`DeviceMemory::of`].
    pub fn new(memory: &Memory, kind: Kind) -> Result<Arc<Self>> {
        let device = DeviceMemory::of(memory, kind)?;
        if device.is_some() {
            DEVICE_REGIONS.fetch_add(1, Ordering::Relaxed);
        }
        let (address, length) = (memory.address(), memory.length());
        Ok(Arc::new(Self { address, length, kind, device, users: AtomicI64::new(0) }))
    }

    /// A copy is about to use it as its far end; false if it is being unregistered.
    pub fn enter(&self) -> bool {
        if self.users.fetch_add(1, Ordering::AcqRel) >= 0 {
            return true;
        }
        self.leave();
        false
    }

    /// That copy has ended.
    pub fn leave(&self) {
        self.users.fetch_sub(1, Ordering::AcqRel);
    }

    /// Lets no more copies in.
    pub fn close(&self) {
        self.users.fetch_add(CLOSED, Ordering::AcqRel);
    }

    /// Whether no copy uses it, of one that is closed.
    pub fn is_quiet(&self) -> bool {
        self.users.load(Ordering::Acquire) <= CLOSED
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.device.is_some() {
            DEVICE_REGIONS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What one NIC has registered, by key. Only what was registered while CUDA was in the process.
#[derive(Default)]
pub(super) struct Shelf(RwLock<HashMap<u64, Arc<Held>>>);

impl Shelf {
    pub fn put(&self, key: u64, held: Arc<Held>) {
        self.0.write().insert(key, held);
    }

    pub fn take(&self, key: u64) {
        self.0.write().remove(&key);
    }

    pub fn find(&self, key: u64) -> Option<Arc<Held>> {
        self.0.read().get(&key).cloned()
    }
}

/// One at the other end of the wire.
pub(super) type Near = (PeerAddress, Arc<Shelf>);

type Shelves = Vec<(Box<[u8]>, Arc<Shelf>)>;

/// By the address of the NIC's endpoint.
static SHELVES: RwLock<Shelves> = RwLock::new(Vec::new());

/// A NIC's place among those of this process, until it is dropped.
pub(super) struct Place(pub Arc<Shelf>);

impl Place {
    /// For an endpoint with this address.
    pub fn new(address: &[u8]) -> Self {
        let shelf = Arc::new(Shelf::default());
        SHELVES.write().push((address.into(), shelf.clone()));
        Self(shelf)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Others may still look.
        self.0.0.write().clear();
        SHELVES.write().retain(|(_, shelf)| !Arc::ptr_eq(shelf, &self.0));
    }
}

/// The shelf of a NIC of this process, by its endpoint's address, of which the first bytes do.
pub(super) fn find(address: &[u8]) -> Option<Arc<Shelf>> {
    let shelves = SHELVES.read();
    let known = shelves.iter().find(|(known, _)| known.starts_with(address));
    known.map(|(_, shelf)| shelf.clone())
}

/// What is to be known of memory that is registered; `None` where the process has no CUDA and so no device memory.
pub(super) fn hold(memory: &Memory) -> Result<Option<Arc<Held>>> {
    if !hmem::cuda_loaded() {
        return Ok(None);
    }
    Held::new(memory, hmem::kind_of(memory)?).map(Some)
}
