//! `mooncake-efa` moves memory between hosts over libfabric (AWS EFA first) and takes the place of
//! the C++ `EfaTransport` in Mooncake's TransferEngine.
//!
//! Rooms, each calling only the next: [`transport`] (the Rust door; `capi` is the C one) →
//! [`engine`] (batches, requests, slices) → `nic` (one network device) → `fabric` (libfabric). [`discovery`] says which
//! devices are near to which memory.
#![deny(unsafe_code)]

pub mod boundary;
pub mod config;
pub mod discovery;
pub mod engine;
pub mod error;
pub mod fabric;
pub mod fault;
pub mod hmem;
pub mod lines;
pub mod nic;
pub mod segment;
pub mod stats;
mod sync;
pub mod topology;
pub mod transport;

pub use error::{Code, Error, Result};
