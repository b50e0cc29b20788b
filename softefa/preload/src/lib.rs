//! `libsoftefa.so`: an EFA device in user space. Preloaded, it answers the rdma-core calls of libfabric's
//! own `efa` provider, and everything above that runs unmodified.
//!
//! A work request is executed by the thread that posts it: an RDMA operation copies between the
//! processes' memories, a send puts a packet into the receiver's ring in shared memory, from where the
//! thread that polls the receiver's completion queue takes it. What has to wait (no receive posted, a
//! link that is busy, a peer that is silent) waits in the queue pair. See docs/softefa.md.

mod abi;
mod agent;
mod cq;
mod device;
mod faults;
mod pages;
mod qp;
mod redirect;
#[allow(non_camel_case_types, non_snake_case, missing_docs, dead_code, clippy::all)]
mod verbs;
mod wire;
mod world;
