//! What the processes of an emulated EFA cluster share: the NICs' state in shared memory, the
//! fault rules, the hardware profiles and the `/sys` that shows them.
//!
//! The library that is preloaded (`softefa/preload`) is the device; the command `softefa` starts
//! processes on it, sets faults and shows counters. A test instrument: nothing of it is linked
//! into the transport.

// Under loom only the ring is built: loom's atomics are not those of the shared memory.
#[cfg(not(loom))]
pub mod cluster;
#[cfg(not(loom))]
pub mod profile;
pub mod ring;
#[cfg(not(loom))]
pub mod rules;
#[cfg(not(loom))]
pub mod shared;
#[cfg(not(loom))]
pub mod stat;
#[cfg(not(loom))]
pub mod sysfs;
