//! libfabric, safely: one type an object, each keeping alive what it was made from, so that objects
//! close in the right order whatever the order of drops.
//!
//! Calls go through the objects' own function tables, as libfabric's inline C functions do; the
//! library itself is found at run time ([`Libfabric`]).
//!
//! # Threads
//! Domains are opened with `FI_THREAD_DOMAIN`: all objects of one domain, and the domain, are used
//! by one thread at a time. The types are `Send` so that a [`crate::nic`] can hold them behind one
//! lock, which is what makes that true; they are not `Sync`.
#![allow(unsafe_code)]

#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    dead_code,
    unsafe_op_in_unsafe_fn,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
mod bindings;
mod info;
mod load;
mod memory;
mod objects;
mod wait;

pub use info::{Info, Query};
pub use load::Libfabric;
pub(crate) use memory::Owner;
pub use memory::{Buffer, Dmabuf, Memory};
pub use objects::{
    AddressVector, Completed, CompletionError, CompletionQueue, Domain, Endpoint, EventQueue,
    Fabric, MemoryKind, MemoryRegion, Operation, PeerAddress, Post,
};
pub use wait::{Waiter, thread_cpu_time};

/// libfabric's errno for "try again after reading completions".
pub const EAGAIN: i32 = bindings::FI_EAGAIN as i32;
