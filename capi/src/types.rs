//! Types of the C door. Structures that begin with `size` may grow at the end in later versions; the
//! others are fixed.
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_void};

/// An installed transport. An opaque number, never 0; a number that is no transport (any more) is
/// refused by every function.
pub type mefa_transport = u64;

/// A peer's segment, opened. An opaque number, never 0, for the transport that gave it: every function
/// refuses it with another one (MEFA_CODE_INVALID_ARGUMENT).
pub type mefa_segment = u64;

/// A batch of transfer requests. An opaque number, never 0, for the transport that gave it: every
/// function refuses it with another one (MEFA_CODE_INVALID_ARGUMENT).
pub type mefa_batch = u64;

/// What functions return: 0, or one of these. The numbers are Mooncake's where it has one.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum mefa_code {
    /// Done.
    Ok = 0,
    /// An argument is NULL, out of range, malformed, or names something that does not exist.
    InvalidArgument = -1,
    /// The batch is full, or a table of the library is.
    TooManyRequests = -2,
    /// A local or remote range is not (wholly) inside registered memory.
    AddressNotRegistered = -3,
    /// Transfers are under way on the batch or memory.
    Busy = -4,
    /// No network device that could be used.
    DeviceNotFound = -6,
    /// The range overlaps one that is registered already.
    AddressOverlapped = -7,
    /// Text that should be JSON of a known shape is not.
    MalformedJson = -103,
    /// A handshake was refused.
    RejectHandshake = -104,
    /// The host's metadata could not be had.
    Metadata = -200,
    /// An endpoint could not be made, or the peer could not be reached.
    Endpoint = -201,
    /// libfabric could not be loaded, or a device, domain or queue could not be opened.
    Context = -202,
    /// Memory could not be registered.
    Memory = -302,
    /// Not possible with this provider or this build.
    NotImplemented = -303,
    /// The time given passed first.
    Timeout = -400,
    /// A bug in this library; please report it.
    Internal = -500,
}

/// Status of a task or a batch, in Mooncake's numbers.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum mefa_status {
    /// Not submitted.
    Waiting = 0,
    /// Under way.
    Pending = 1,
    /// Refused.
    Invalid = 2,
    /// Cancelled; its memory is quiet.
    Canceled = 3,
    /// All bytes are in place, and its memory is quiet.
    Completed = 4,
    /// Its deadline passed. Its memory may still be in use: mefa_batch_quiet tells, mefa_wait_quiet waits.
    Timeout = 5,
    /// It failed; its memory is quiet. mefa_task_error tells why.
    Failed = 6,
}

/// mefa_request.opcode: read the target's memory into ours.
pub const MEFA_READ: i32 = 0;
/// mefa_request.opcode: write our memory into the target's.
pub const MEFA_WRITE: i32 = 1;

/// One transfer request.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_request {
    /// MEFA_READ or MEFA_WRITE.
    pub opcode: i32,
    /// Must be 0.
    pub flags: u32,
    /// Address of our memory; the whole range must be registered.
    pub source: u64,
    /// Whose memory is at the other end.
    pub target: mefa_segment,
    /// Address in the target's memory, as its buffers give it (absolute).
    pub offset: u64,
    /// Bytes. 0 completes at once.
    pub length: u64,
    /// The caller's own; comes back in mefa_completion.
    pub cookie: u64,
}

/// A task that got its final status.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_completion {
    /// As in its mefa_request.
    pub cookie: u64,
    /// Bytes moved: all, or 0.
    pub bytes: u64,
    /// A mefa_status.
    pub status: i32,
    /// 0.
    pub reserved: u32,
}

/// Status of one task.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_task_state {
    /// A mefa_status.
    pub status: i32,
    /// 0.
    pub reserved: u32,
    /// Bytes moved: all, or 0.
    pub bytes: u64,
}

/// Memory to register.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_memory {
    /// First byte (host, or device as CUDA names it).
    pub address: *mut c_void,
    /// Bytes, at least 1.
    pub length: u64,
    /// Where it is: "cpu:0", "cuda:3", ...; NULL or "*": find out.
    pub location: *const c_char,
}

/// One registered region: all of a memory range, or a part of it if that was too long for one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_region {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Keys for peers, one a NIC in the order of the descriptor's devices; 0: not registered there.
    pub keys: *const u64,
    /// Count of keys.
    pub key_count: usize,
    /// Which of the ranges of the call it belongs to.
    pub memory: usize,
}

/// A NIC in a segment descriptor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_device {
    /// Name.
    pub name: *const c_char,
    /// Mooncake's gid: carries the endpoint's address where the peer is one of ours. Never empty.
    pub gid: *const c_char,
    /// 0 for EFA.
    pub lid: u16,
}

/// A registered region in a segment descriptor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_buffer {
    /// Location, for instance "cpu:0".
    pub name: *const c_char,
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Remote keys, one a device; 0: not registered there.
    pub rkeys: *const u64,
    /// Count of rkeys: the count of devices.
    pub rkey_count: usize,
}

/// A segment descriptor: what a peer must know to transfer to and from us.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_segment_desc {
    /// sizeof(mefa_segment_desc).
    pub size: usize,
    /// The peer's server name: "host:port".
    pub name: *const c_char,
    /// Its NICs.
    pub devices: *const mefa_device,
    /// Count of devices.
    pub device_count: usize,
    /// Its registered memory.
    pub buffers: *const mefa_buffer,
    /// Count of buffers.
    pub buffer_count: usize,
    /// Mooncake's NIC priority matrix as JSON, or NULL.
    pub topology_json: *const c_char,
}

/// Receives a text: `length` bytes, followed by a NUL. Called once, before the function that takes it
/// returns, on the same thread; the text is gone afterwards.
pub type mefa_text_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, text: *const c_char, length: usize)>;

/// Receives regions that were registered. Called once, before the function that takes it returns, on
/// the same thread; the array is gone afterwards.
pub type mefa_region_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, regions: *const mefa_region, count: usize)>;

/// Receives a segment descriptor. Called once, before the function that takes it returns, on the same
/// thread; the descriptor and all it points to are gone afterwards.
pub type mefa_segment_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, segment: *const mefa_segment_desc)>;

/// Told of tasks that got their final status, before mefa_task_status and mefa_batch_status show it.
/// Called on whatever thread made the progress (one of ours, or one inside mefa_submit, mefa_progress,
/// mefa_wait, mefa_wait_quiet, mefa_task_status, mefa_batch_status, mefa_cancel, mefa_batch_quiet,
/// mefa_unregister or mefa_uninstall), possibly on several at once. It may call mefa_submit; it must not block,
/// uninstall, or throw. It is not called inside itself: tasks that end by its own calls get their status, and
/// are told of, when it has returned.
pub type mefa_completion_fn = Option<
    unsafe extern "C" fn(context: *mut c_void, completions: *const mefa_completion, count: usize),
>;

/// Asks the host for the current descriptor of a segment, as JSON: call `text` with it and return 0, or
/// return an error. Called inside mefa_submit and the mefa_segment functions; may block; must not call
/// back into the transport.
pub type mefa_fetch_segment_fn = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        name: *const c_char,
        text: mefa_text_fn,
        text_context: *mut c_void,
    ) -> c_int,
>;

/// The fields of a handshake: what two NICs tell each other of where they are. NULL is "".
#[repr(C)]
pub struct mefa_handshake {
    /// sizeof(mefa_handshake).
    pub size: usize,
    /// `host:port@nic` of the sender.
    pub local_nic_path: *const c_char,
    /// `host:port@nic` of the receiver.
    pub peer_nic_path: *const c_char,
    /// The sender's endpoint address in hexadecimal digits; "" in a refusal.
    pub efa_addr: *const c_char,
    /// Why the receiver refuses; "" in a request and on success.
    pub reply_msg: *const c_char,
}

/// Receives a handshake's fields. Called once, before the function that takes it returns, on the same
/// thread; they are gone afterwards.
pub type mefa_handshake_fields_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, handshake: *const mefa_handshake)>;

/// Asks the host to send a handshake (JSON) to the server of a segment: call `text` with the answer and
/// return 0, or return an error. Called inside mefa_submit and mefa_segment_warm_up, for peers whose
/// descriptor has no endpoint addresses (C++ ones); may block; must not call back into the transport.
pub type mefa_handshake_fn = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        server: *const c_char,
        request: *const c_char,
        text: mefa_text_fn,
        text_context: *mut c_void,
    ) -> c_int,
>;

/// Receives log lines: level 1 error, 2 warning, 3 info, 4 debug, 5 trace. Called on any thread,
/// possibly on several at once. Must not call back into the library.
pub type mefa_log_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, level: c_int, text: *const c_char)>;

/// How to install a transport. Zero everything, set `size`, then what you need.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_config {
    /// sizeof(mefa_config).
    pub size: usize,
    /// Our name for peers: "host:port". Required.
    pub server_name: *const c_char,
    /// Mooncake's NIC priority matrix as JSON, or NULL: all NICs are alike.
    pub topology_json: *const c_char,
    /// libfabric provider, or NULL: MC_EFA_PROVIDER, or "efa".
    pub provider: *const c_char,
    /// Names of devices to use, in this order; or NULL: those of the topology, or all.
    pub devices: *const *const c_char,
    /// Count of devices.
    pub device_count: usize,
    /// Or NULL: descriptors are only those given by mefa_segment_open and mefa_segment_update.
    pub fetch_segment: mefa_fetch_segment_fn,
    /// Or NULL: only peers that give their endpoints' addresses can be reached.
    pub handshake: mefa_handshake_fn,
    /// Or NULL.
    pub on_completion: mefa_completion_fn,
    /// Handed to the three callbacks.
    pub context: *mut c_void,
}

/// Counters of one NIC since the transport was installed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mefa_nic_stats {
    /// sizeof(mefa_nic_stats), set by the caller; fields beyond it are not written.
    pub size: usize,
    /// Operations posted.
    pub posted: u64,
    /// Operations completed without an error.
    pub completed: u64,
    /// Operations that failed.
    pub failed: u64,
    /// Bytes of completed writes.
    pub bytes_written: u64,
    /// Bytes of completed reads.
    pub bytes_read: u64,
    /// Posts that the provider put off.
    pub put_off: u64,
    /// Turns that left work queued for lack of credits.
    pub starved: u64,
    /// Completions that belong to no operation in flight.
    pub strays: u64,
    /// Operations whose deadline passed.
    pub overdue: u64,
    /// Bytes queued or in flight now.
    pub pending_bytes: u64,
    /// Operations that failed, of this NIC or another, and were tried again over this one.
    pub retried: u64,
    /// Operations that failed because of the request itself: a wrong key, range or length.
    pub faults_permanent: u64,
    /// Because of the peer or its NIC.
    pub faults_peer: u64,
    /// Because of this NIC, or the way from it to the peer.
    pub faults_rail: u64,
    /// For lack of room somewhere.
    pub faults_pressure: u64,
    /// Because this library used the provider wrongly.
    pub faults_ours: u64,
    /// 1 if it failed too often in a row and is left out, but for a try now and then; else 0.
    pub paused: u64,
}
