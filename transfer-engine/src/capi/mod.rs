//! The functions of `transfer_engine_c.h`, under Mooncake's names, with its numbers: what is 0 there is 0 here, what is
//! negative there is Mooncake's error number, and the functions that give a status code (`submitTransfer`, `getTransferStatus`,
//! `freeBatchID`) give Mooncake's positive ones. Every refusal is logged in one line.
//!
//! Each checks its pointers, converts, and makes one call into [`crate::engine`].
#![allow(unsafe_code, non_snake_case)]

mod log;
mod shutdown;
pub mod types;

use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use arc_swap::ArcSwap;
use mooncake_efa::boundary::{array, caught, check_out, optional_string, put, string};
use mooncake_efa::config::Config;
use mooncake_efa::engine::Status;
use mooncake_efa::fabric::Memory;
use mooncake_efa::lines::Lines;
use mooncake_efa::transport::close_when_left;
use mooncake_efa::{Code, Error, Result};

use crate::engine::{Engine, Installation, Installed, Transfer};
use crate::metadata::Notification;
#[allow(clippy::wildcard_imports)]
use types::*;

/// Engines by handle: few, so that looking through them is quicker than anything else.
type Engines = Vec<(usize, Arc<Engine>)>;

static ENGINES: LazyLock<ArcSwap<Engines>> = LazyLock::new(ArcSwap::default);
/// Where the transports are of all engines that ever were; an engine's handle is the address.
static INSTALLATIONS: boxcar::Vec<&Installation> = boxcar::Vec::new();

thread_local! {
    /// The one that this thread used last.
    static LAST: Cell<Option<&'static Installation>> = const { Cell::new(None) };
}

fn unknown(handle: transfer_engine_t) -> Error {
    Error::invalid(format!("{handle:p} is not a transfer engine"))
}

/// Calls `f` with an engine.
fn with<R>(handle: transfer_engine_t, f: impl FnOnce(&Arc<Engine>) -> Result<R>) -> Result<R> {
    let engines = ENGINES.load();
    match engines.iter().find(|(known, _)| *known == handle as usize) {
        Some((_, engine)) => f(engine),
        None => Err(unknown(handle)),
    }
}

/// Calls `f` with an engine's transport: the short way, for what happens often.
fn installed<R>(handle: transfer_engine_t, f: impl FnOnce(&Installed) -> Result<R>) -> Result<R> {
    let is = |installation: &&'static Installation| {
        std::ptr::eq(*installation, handle.cast_const().cast())
    };
    // The cell is gone while a thread ends.
    let last = LAST.try_with(Cell::get).ok().flatten().filter(is);
    let installation = last.or_else(|| find(handle)).ok_or_else(|| unknown(handle))?;
    match &*installation.load() {
        Some(installed) => f(installed),
        None => with(handle, |_| Err(Error::invalid("no transport is installed"))),
    }
}

#[cold]
fn find(handle: transfer_engine_t) -> Option<&'static Installation> {
    let all = INSTALLATIONS.iter().map(|(_, installation)| *installation);
    let found =
        all.filter(|installation| std::ptr::eq(*installation, handle.cast_const().cast())).last();
    let _ = LAST.try_with(|last| last.set(found));
    found
}

/// Runs `f` at the boundary; what it fails with is logged for `function`, unless there is too much of it.
fn entered<T>(function: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    static LINES: LazyLock<(Lines, Instant)> =
        LazyLock::new(|| (Lines::new(::log::Level::Error, "refusals"), Instant::now()));
    caught(f).inspect_err(|error| {
        let (lines, start) = &*LINES;
        lines.add(format_args!("{function}: {error}"), start.elapsed().as_nanos() as u64);
    })
}

/// 0, or Mooncake's error number.
fn number(result: Result<()>) -> c_int {
    result.map_or_else(|error| error.code as c_int, |()| 0)
}

/// 0, or the number of Mooncake's `Status::Code`, which is that of the error without its sign (`error.h`, `status.h`).
fn status_code(result: Result<()>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(Error { code: Code::NotImplemented, .. }) => 999,
        Err(error) => -(error.code as c_int),
    }
}

/// Creates an engine named `local_server_name` for peers (`host:port`), with its metadata at `metadata_conn_string`
/// (`P2PHANDSHAKE`, `etcd://...`, `http://...`, `redis://...`). With `auto_discover` its transport is installed too:
/// EFA where there is EFA, else TCP. `ip_or_host_name` and `rpc_port` are not used, as in Mooncake. NULL on failure.
///
/// # Safety
/// The strings are NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn createTransferEngine(
    metadata_conn_string: *const c_char,
    local_server_name: *const c_char,
    _ip_or_host_name: *const c_char,
    _rpc_port: u64,
    auto_discover: c_int,
) -> transfer_engine_t {
    log::start();
    let created = entered("createTransferEngine", || {
        // SAFETY: the caller's promise.
        let (connection, name) = unsafe {
            (
                string(metadata_conn_string, "metadata_conn_string")?,
                string(local_server_name, "local_server_name")?,
            )
        };
        let engine = Engine::create(Config::from_env(), connection, name, auto_discover != 0)?;
        let handle: *const Installation = engine.installation();
        INSTALLATIONS.push(engine.installation());
        ENGINES.rcu(|engines| {
            let mut engines = Engines::clone(engines);
            engines.push((handle as usize, engine.clone()));
            engines
        });
        Ok(handle.cast_mut().cast())
    });
    created.unwrap_or(null_mut())
}

/// Ends an engine: what is under way is cancelled, peers do not find it any more, its memory is free. Waits for other
/// threads to leave it. NULL, or what is no engine, is refused.
#[unsafe(no_mangle)]
pub extern "C" fn destroyTransferEngine(engine: transfer_engine_t) {
    let _ = entered("destroyTransferEngine", || {
        let last = with(engine, |_| Ok(()))
            .ok()
            .and_then(|()| {
                let former = ENGINES.rcu(|engines| {
                    engines
                        .iter()
                        .filter(|(handle, _)| *handle != engine as usize)
                        .cloned()
                        .collect::<Engines>()
                });
                // Of several threads that destroy it, one finds it.
                former
                    .iter()
                    .find(|(handle, _)| *handle == engine as usize)
                    .map(|(_, engine)| engine.clone())
            })
            .ok_or_else(|| Error::invalid(format!("{engine:p} is not a transfer engine")))?;
        last.close();
        close_when_left("engine", last, |_| Ok(()))
    });
}

/// Finds out which NICs there are and which memory they are near to. `installTransport("efa", ...)` needs it.
#[unsafe(no_mangle)]
pub extern "C" fn discoverTopology(engine: transfer_engine_t) -> c_int {
    number(entered("discoverTopology", || with(engine, |engine| engine.discover())))
}

/// Writes `address:port` of the engine's handshake port to `buf_out`, cut off at `buf_len` bytes with the NUL. With
/// `P2PHANDSHAKE` it is the name by which peers open its segment.
///
/// # Safety
/// `buf_out` is NULL or has `buf_len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getLocalIpAndPort(
    engine: transfer_engine_t,
    buf_out: *mut c_char,
    buf_len: usize,
) -> c_int {
    number(entered("getLocalIpAndPort", || {
        let text = with(engine, |engine| Ok(engine.address()))?;
        // SAFETY: the caller's promise.
        unsafe { give(&text, buf_out, buf_len, "buf_out") }
    }))
}

/// Installs a transport: `efa`, or `tcp` for hosts without EFA (libfabric's, which only peers with this library
/// speak). `args` is NULL or its first item a NIC priority matrix (JSON) or NULL. NULL on failure.
///
/// # Safety
/// `proto` is NULL or NUL-terminated; so is `args[0]`, if `args` is not NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn installTransport(
    engine: transfer_engine_t,
    proto: *const c_char,
    args: *mut *mut c_void,
) -> transport_t {
    let installed = entered("installTransport", || {
        // SAFETY: the caller's promise.
        let (protocol, matrix) = unsafe {
            let first = array(args, usize::from(!args.is_null()), "args")?.first();
            let matrix = first.map_or(std::ptr::null(), |matrix| matrix.cast_const().cast());
            (string(proto, "proto")?, optional_string(matrix, "args[0]")?)
        };
        with(engine, |engine| engine.install(protocol, matrix))
    });
    if installed.is_ok() { engine } else { null_mut() }
}

/// Uninstalls a transport; 0 also if it is not installed. Its batches are gone, memory and segments stay known.
///
/// # Safety
/// `proto` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uninstallTransport(
    engine: transfer_engine_t,
    proto: *const c_char,
) -> c_int {
    number(entered("uninstallTransport", || {
        // SAFETY: the caller's promise.
        let protocol = unsafe { string(proto, "proto")? };
        with(engine, |engine| engine.uninstall(protocol))
    }))
}

/// Opens a peer's segment by name; its handle, or a negative number. The same name has the same handle.
///
/// # Safety
/// `segment_name` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openSegment(
    engine: transfer_engine_t,
    segment_name: *const c_char,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { handle_of("openSegment", engine, segment_name, Engine::open) }
}

/// As [`openSegment`], with the peer's descriptor of now.
///
/// # Safety
/// As [`openSegment`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openSegmentNoCache(
    engine: transfer_engine_t,
    segment_name: *const c_char,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { handle_of("openSegmentNoCache", engine, segment_name, Engine::open_anew) }
}

/// # Safety
/// `name` is NULL or NUL-terminated.
unsafe fn handle_of(
    function: &str,
    engine: transfer_engine_t,
    name: *const c_char,
    open: impl FnOnce(&Engine, &str) -> Result<i32>,
) -> i32 {
    let opened = entered(function, || {
        // SAFETY: the caller's promise.
        let name = unsafe { string(name, "segment_name")? };
        with(engine, |engine| open(engine, name))
    });
    // Mooncake has -1 for whatever hinders it.
    opened.unwrap_or(-1)
}

/// Closes a segment as many times as it was opened. A handle that is not open is refused.
#[unsafe(no_mangle)]
pub extern "C" fn closeSegment(engine: transfer_engine_t, segment_id: i32) -> c_int {
    number(entered("closeSegment", || with(engine, |engine| engine.close_segment(segment_id))))
}

/// Connects to all NICs of a segment. 0 also where no transport is installed.
///
/// # Safety
/// `segment_name` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warmupEfaSegment(
    engine: transfer_engine_t,
    segment_name: *const c_char,
) -> c_int {
    number(entered("warmupEfaSegment", || {
        // SAFETY: the caller's promise.
        let name = unsafe { optional_string(segment_name, "segment_name")?.unwrap_or_default() };
        with(engine, |engine| engine.warm_up(name))
    }))
}

/// Forgets what is known of a segment.
///
/// # Safety
/// `segment_name` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn removeLocalSegment(
    engine: transfer_engine_t,
    segment_name: *const c_char,
) -> c_int {
    number(entered("removeLocalSegment", || {
        // SAFETY: the caller's promise.
        let name = unsafe { string(segment_name, "segment_name")? };
        with(engine, |engine| engine.forget_segment(name))
    }))
}

/// A range, refused if it is empty or impossible.
///
/// # Safety
/// As [`Memory::from_raw`].
unsafe fn memory(address: *mut c_void, length: usize, location: &str) -> Result<(Memory, String)> {
    // SAFETY: the caller's promise.
    Ok((unsafe { Memory::from_raw(address as u64, length as u64)? }, location.to_owned()))
}

/// Registers memory for transfers from here and from peers. `location` is `cpu:0`, `cuda:3`, ...; `*` or NULL finds it
/// out. All registered memory can be reached by peers, as with Mooncake's EFA, whatever `remote_accessible` is.
///
/// # Safety
/// `location` is NULL or NUL-terminated. The range stays mapped, and free for peers to read and write, until
/// [`unregisterLocalMemory`] or [`destroyTransferEngine`] returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn registerLocalMemory(
    engine: transfer_engine_t,
    addr: *mut c_void,
    length: usize,
    location: *const c_char,
    _remote_accessible: c_int,
) -> c_int {
    let mut entry = buffer_entry_t { addr, length };
    // SAFETY: passed on.
    unsafe { register("registerLocalMemory", engine, &raw mut entry, 1, location) }
}

/// Registers ranges, all or none; see [`registerLocalMemory`].
///
/// # Safety
/// As [`registerLocalMemory`]; `buffer_list` has `buffer_len` items.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn registerLocalMemoryBatch(
    engine: transfer_engine_t,
    buffer_list: *mut buffer_entry_t,
    buffer_len: usize,
    location: *const c_char,
) -> c_int {
    // SAFETY: passed on.
    unsafe { register("registerLocalMemoryBatch", engine, buffer_list, buffer_len, location) }
}

/// # Safety
/// As [`registerLocalMemoryBatch`].
unsafe fn register(
    function: &str,
    engine: transfer_engine_t,
    list: *mut buffer_entry_t,
    count: usize,
    location: *const c_char,
) -> c_int {
    number(entered(function, || {
        // SAFETY: the caller's promise.
        let wanted = unsafe {
            let location = optional_string(location, "location")?.unwrap_or("*");
            let entries = array(list, count, "buffer_list")?.iter();
            entries
                .map(|entry| memory(entry.addr, entry.length, location))
                .collect::<Result<Vec<_>>>()?
        };
        with(engine, |engine| engine.register(wanted))
    }))
}

/// Ends the registration of the range that starts at `addr`, waiting up to 5 seconds for transfers that use it.
#[unsafe(no_mangle)]
pub extern "C" fn unregisterLocalMemory(engine: transfer_engine_t, addr: *mut c_void) -> c_int {
    number(entered("unregisterLocalMemory", || {
        with(engine, |engine| engine.unregister(&[addr as u64]))
    }))
}

/// As [`unregisterLocalMemory`] for several. It goes on after an error; the first one.
///
/// # Safety
/// `addr_list` has `addr_len` items.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unregisterLocalMemoryBatch(
    engine: transfer_engine_t,
    addr_list: *mut *mut c_void,
    addr_len: usize,
) -> c_int {
    number(entered("unregisterLocalMemoryBatch", || {
        // SAFETY: the caller's promise.
        let addresses = unsafe { array(addr_list, addr_len, "addr_list")? };
        let addresses: Vec<u64> = addresses.iter().map(|&address| address as u64).collect();
        with(engine, |engine| engine.unregister(&addresses))
    }))
}

/// A batch for up to `batch_size` transfers, or `INVALID_BATCH`.
#[unsafe(no_mangle)]
pub extern "C" fn allocateBatchID(engine: transfer_engine_t, batch_size: usize) -> u64 {
    let allocated = entered("allocateBatchID", || {
        let size = u32::try_from(batch_size).map_err(|_| {
            Error::invalid(format!("a batch of {batch_size} transfers is too large"))
        })?;
        installed(engine, |transport| transport.allocate(size))
    });
    allocated.unwrap_or(INVALID_BATCH)
}

/// Adds transfers to a batch and starts them, all or none.
///
/// # Safety
/// `entries` has `count` items.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn submitTransfer(
    engine: transfer_engine_t,
    batch_id: u64,
    entries: *mut transfer_request,
    count: usize,
) -> c_int {
    // SAFETY: passed on.
    status_code(entered("submitTransfer", || unsafe {
        submit(engine, batch_id, entries, count, None)
    }))
}

/// As [`submitTransfer`]. When all transfers of the batch are complete and their status was asked for, `notify_msg` is
/// sent to the first one's segment.
///
/// # Safety
/// As [`submitTransfer`]; the strings of `notify_msg` are NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn submitTransferWithNotify(
    engine: transfer_engine_t,
    batch_id: u64,
    entries: *mut transfer_request,
    count: usize,
    notify_msg: notify_msg_t,
) -> c_int {
    status_code(entered("submitTransferWithNotify", || {
        // SAFETY: passed on.
        unsafe { submit(engine, batch_id, entries, count, Some(notification(&notify_msg)?)) }
    }))
}

/// # Safety
/// `entries` has `count` items.
unsafe fn submit(
    engine: transfer_engine_t,
    batch: u64,
    entries: *mut transfer_request,
    count: usize,
    notification: Option<Notification>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let entries = unsafe { array(entries, count, "entries")? };
    if let Some(entry) =
        entries.iter().find(|entry| entry.opcode != OPCODE_READ && entry.opcode != OPCODE_WRITE)
    {
        return Err(Error::invalid(format!("opcode {}: 0 reads and 1 writes", entry.opcode)));
    }
    let transfers = entries.iter().map(|entry| Transfer {
        write: entry.opcode == OPCODE_WRITE,
        local: entry.source as u64,
        segment: entry.target_id,
        remote: entry.target_offset,
        length: entry.length,
    });
    installed(engine, |transport| transport.submit(batch, transfers, notification))
}

/// Status of a transfer by its place in the batch. Makes progress.
///
/// # Safety
/// `status` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getTransferStatus(
    engine: transfer_engine_t,
    batch_id: u64,
    task_id: usize,
    status: *mut transfer_status,
) -> c_int {
    status_code(entered("getTransferStatus", || {
        check_out(status, "status")?;
        let task = u32::try_from(task_id)
            .map_err(|_| Error::invalid(format!("task {task_id} is not in the batch")))?;
        let (seen, bytes) = installed(engine, |transport| transport.status(batch_id, task))?;
        // Mooncake knows no other word for what is under way.
        let seen = if seen == Status::Pending { Status::Waiting } else { seen };
        // SAFETY: the caller's promise.
        unsafe {
            put(
                status,
                transfer_status { status: seen as c_int, transferred_bytes: bytes },
                "status",
            )
        }
    }))
}

/// Frees a batch. Refused while a transfer of it is under way.
#[unsafe(no_mangle)]
pub extern "C" fn freeBatchID(engine: transfer_engine_t, batch_id: u64) -> c_int {
    status_code(entered("freeBatchID", || installed(engine, |transport| transport.free(batch_id))))
}

/// Notifications from peers since the last call, and their count in `*size`; NULL if there are none. Free them by
/// [`freeNotifsMsgBuf`].
///
/// # Safety
/// `size` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getNotifsFromEngine(
    engine: transfer_engine_t,
    size: *mut c_int,
) -> *mut notify_msg_t {
    let given = entered("getNotifsFromEngine", || {
        check_out(size, "size")?;
        // SAFETY: the caller's promise.
        unsafe { put(size, 0, "size")? };
        let received = with(engine, |engine| Ok(engine.notifications()))?;
        if received.is_empty() {
            return Ok(null_mut());
        }
        let texts = received.into_iter().map(|notification| notify_msg_t {
            name: c_text(notification.name),
            msg: c_text(notification.message),
        });
        let texts: Box<[notify_msg_t]> = texts.collect();
        let count = texts.len();
        // SAFETY: the caller's promise.
        unsafe { put(size, count as c_int, "size")? };
        Ok(Box::into_raw(texts).cast())
    });
    given.unwrap_or(null_mut())
}

/// A text for C, up to its first NUL.
fn c_text(text: String) -> *mut c_char {
    let mut bytes = text.into_bytes();
    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    CString::new(bytes).unwrap_or_default().into_raw()
}

/// Frees what [`getNotifsFromEngine`] gave, with the count that it gave.
///
/// # Safety
/// `msg` is NULL or what it returned, with `size` as it set it, not freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn freeNotifsMsgBuf(msg: *mut notify_msg_t, size: c_int) -> c_int {
    number(entered("freeNotifsMsgBuf", || {
        let count =
            usize::try_from(size).map_err(|_| Error::invalid(format!("{size} messages")))?;
        if msg.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's promise: they were made by `getNotifsFromEngine`, so many at once.
        unsafe {
            let texts = Box::from_raw(std::ptr::slice_from_raw_parts_mut(msg, count));
            for text in
                texts.iter().flat_map(|text| [text.name, text.msg]).filter(|text| !text.is_null())
            {
                drop(CString::from_raw(text));
            }
        }
        Ok(())
    }))
}

/// Sends a notification to the owner of a segment, and waits for its answer.
///
/// # Safety
/// The strings of `notify_msg` are NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn genNotifyInEngine(
    engine: transfer_engine_t,
    target_id: u64,
    notify_msg: notify_msg_t,
) -> c_int {
    number(entered("genNotifyInEngine", || {
        // SAFETY: the caller's promise.
        let notification = unsafe { notification(&notify_msg)? };
        let handle = i32::try_from(target_id)
            .map_err(|_| Error::invalid(format!("{target_id} is not a segment's handle")))?;
        with(engine, |engine| engine.notify(handle, &notification))
    }))
}

/// # Safety
/// The strings are NULL or NUL-terminated.
unsafe fn notification(message: &notify_msg_t) -> Result<Notification> {
    // SAFETY: the caller's promise.
    let (name, text) = unsafe {
        (string(message.name, "notify_msg.name")?, string(message.msg, "notify_msg.msg")?)
    };
    Ok(Notification { name: name.to_owned(), message: text.to_owned() })
}

/// Fetches the descriptors of all open segments.
#[unsafe(no_mangle)]
pub extern "C" fn syncSegmentCache(engine: transfer_engine_t) -> c_int {
    number(entered("syncSegmentCache", || {
        with(engine, |engine| {
            engine.refresh_all();
            Ok(())
        })
    }))
}

/// Fills `stats` with the loads of up to `*count` NICs, and sets `*count` to how many there are.
///
/// # Safety
/// `count` is NULL or can be read and written; `stats` has `*count` items.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getNicLoadStats(
    engine: transfer_engine_t,
    stats: *mut nic_load_stat_t,
    count: *mut usize,
) -> c_int {
    number(entered("getNicLoadStats", || {
        check_out(stats, "stats")?;
        check_out(count, "count")?;
        let loads = with(engine, |engine| Ok(engine.loads()))?;
        // SAFETY: the caller's promise.
        unsafe {
            let room = count.read();
            for (index, load) in loads.iter().take(room).enumerate() {
                let mut device_name = [0; 64];
                let bytes = load.nic.bytes().take(device_name.len() - 1);
                device_name.iter_mut().zip(bytes).for_each(|(to, from)| *to = from as c_char);
                let stat = nic_load_stat_t {
                    device_name,
                    inflight_bytes: load.pending,
                    ewma_bandwidth_bps: load.bandwidth,
                };
                stats.add(index).write(stat);
            }
            put(count, loads.len(), "count")
        }
    }))
}

/// From now on SIGTERM and SIGINT, and the end of the process, remove its engines from the metadata before it goes
/// (with status 128 and the signal's number).
#[unsafe(no_mangle)]
pub extern "C" fn enableGracefulShutdown(engine: transfer_engine_t) {
    let _ = entered("enableGracefulShutdown", || {
        with(engine, |_| Ok(()))?;
        shutdown::enable()
    });
}

/// Writes what is known of our NICs and what is near them to `buf_out`, for people or as JSON, cut off at `buf_len`
/// bytes with the NUL.
///
/// # Safety
/// `buf_out` is NULL or has `buf_len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn showLinks(
    engine: transfer_engine_t,
    buf_out: *mut c_char,
    buf_len: usize,
    json: c_int,
) -> c_int {
    number(entered("showLinks", || {
        let text = with(engine, |engine| Ok(engine.links(json != 0)))?;
        // SAFETY: the caller's promise.
        unsafe { give(&text, buf_out, buf_len, "buf_out") }
    }))
}

/// Writes a text with a NUL, cut off if there is not room for all.
///
/// # Safety
/// `to` is NULL or has `room` bytes.
unsafe fn give(text: &str, to: *mut c_char, room: usize, name: &str) -> Result<()> {
    check_out(to, name)?;
    let length = text
        .len()
        .min(room.checked_sub(1).ok_or_else(|| Error::invalid(format!("{name} has no room")))?);
    // SAFETY: there is room for the text and its NUL.
    unsafe {
        to.copy_from_nonoverlapping(text.as_ptr().cast(), length);
        to.add(length).write(0);
    }
    Ok(())
}

/// Every engine that there is.
fn all() -> Vec<Arc<Engine>> {
    ENGINES.load().iter().map(|(_, engine)| engine.clone()).collect()
}
