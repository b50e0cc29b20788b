//! `libtransfer_engine.so`: Mooncake's C interface (`transfer_engine_c.h`), whole, on [`mooncake_efa`]. A program that
//! links or opens it needs nothing of Mooncake's.
//!
//! Rooms, each calling only those after it: `capi` (the functions) → [`engine`] (one engine: its memory, segments,
//! notifications) → [`metadata`] (who is where, and what they have) → [`wire`] (Mooncake's handshake over TCP) and
//! [`store`] (metadata servers). [`discovery`] finds NICs.
#![deny(unsafe_code)]

pub mod address;
pub mod capi;
pub mod engine;
pub mod metadata;
mod segments;
pub mod store;
pub mod wire;

pub use mooncake_efa::discovery;
