//! What the processes of an emulated EFA cluster share: the NICs' state in shared memory, the
//! fault rules, the hardware profiles and the `/sys` that shows them.
//!
//! The library that is preloaded (`softefa/preload`) is the device; the command `softefa` starts
//! processes on it, sets faults and shows counters. A test instrument: nothing of it is linked
//! into the transport.

pub mod profile;
pub mod rules;
pub mod sysfs;
