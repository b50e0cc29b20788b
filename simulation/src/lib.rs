//! Machines that nobody here has: the engine of `mooncake-efa`, unchanged, on simulated NICs.
//!
//! - [`cell`]: one point of a grid (a machine, its peers, a workload) in virtual time: which part of
//!   the line rate it reaches. Nothing depends on the speed of the machine that simulates.
//! - [`growth`]: what a request costs in real CPU time on NICs that complete at once, as the number of
//!   peers, NICs, threads, regions and requests grows.
//! - [`request`]: what one costs, for `scripts/check-cost`.
//! - [`memory`]: bytes of heap a request in flight, and a peer and NIC.
#![forbid(unsafe_code)]

pub mod cell;
pub mod device;
pub mod growth;
mod instant;
pub mod machine;
pub mod memory;
mod network;
pub mod request;
pub mod units;
mod world;
