//! The structures and numbers of `transfer_engine_c.h`, in Mooncake's layouts.
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_void};

/// An engine. The address is a name only: nothing is there, and one that is no engine (any more) is refused.
pub type transfer_engine_t = *mut c_void;
/// A transport that was installed; no function takes it.
pub type transport_t = *mut c_void;

/// `INVALID_BATCH`.
pub const INVALID_BATCH: u64 = u64::MAX;
/// `OPCODE_READ`.
pub const OPCODE_READ: c_int = 0;
/// `OPCODE_WRITE`.
pub const OPCODE_WRITE: c_int = 1;

/// One transfer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct transfer_request {
    /// [`OPCODE_READ`] or [`OPCODE_WRITE`].
    pub opcode: c_int,
    /// Our memory, registered.
    pub source: *mut c_void,
    /// Handle of the segment at the other end.
    pub target_id: i32,
    /// Address in its process.
    pub target_offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A notification.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct notify_msg_t {
    /// Who sends it.
    pub name: *mut c_char,
    /// What.
    pub msg: *mut c_char,
}

/// Status of a transfer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct transfer_status {
    /// `STATUS_...`.
    pub status: c_int,
    /// Bytes moved.
    pub transferred_bytes: u64,
}

/// Memory to register.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct buffer_entry_t {
    /// First byte.
    pub addr: *mut c_void,
    /// Bytes.
    pub length: usize,
}

/// Load of a NIC.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct nic_load_stat_t {
    /// Its name, NUL-terminated, cut off if it is longer.
    pub device_name: [c_char; 64],
    /// Bytes queued or in flight.
    pub inflight_bytes: u64,
    /// Bytes a second, of late.
    pub ewma_bandwidth_bps: f64,
}
