//! The transport door, `libmooncake_efa.so`: the functions of `include/mooncake_efa.h`, which cbindgen makes from here.
//!
//! Each checks its pointers, converts, makes one call into [`mooncake_efa::transport`] and maps the error.
#![allow(unsafe_code)]

mod log;
pub mod types;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwapOption, Guard};

use mooncake_efa::boundary::{array, caught, check_out, optional_string, put, sized, string};
use mooncake_efa::config::Config;
use mooncake_efa::engine::{BatchId, Finished, Request, Table, TargetId};
use mooncake_efa::error::{Code, Error, Result};
use mooncake_efa::fabric::Memory;
use mooncake_efa::segment::{Buffer, Device, Handshake, Segment};
use mooncake_efa::topology::Topology;
use mooncake_efa::transport::{Host, Options, Transport, close_when_left, in_time};
#[allow(clippy::wildcard_imports)]
use types::*;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs `f`; its error becomes the return code and this thread's last error.
fn boundary(f: impl FnOnce() -> Result<()>) -> c_int {
    let Err(error) = caught(f) else { return 0 };
    let text = CString::new(error.text.replace('\0', " ")).unwrap_or_default();
    // Not there while a thread ends; the code says enough then.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    error.code as c_int
}

/// A pointer that is the caller's business: handed back to his callbacks.
#[derive(Clone, Copy)]
pub struct Context(*mut c_void);

// SAFETY: we only hand the pointer back; the documentation of every callback says on which threads.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Longest wait for callbacks that have begun, after that.
const RETURN: Duration = Duration::from_secs(5);

/// A transport, and the gate to its host.
struct Installed {
    transport: Transport,
    gate: Arc<Gate>,
}

/// Something while the host may be called, to be held meanwhile; nothing once it was told that the transport is
/// uninstalled, though threads may be left behind.
type Gate = ArcSwapOption<()>;

static TRANSPORTS: OnceLock<Table<ArcSwapOption<Installed>>> = OnceLock::new();

fn transports() -> &'static Table<ArcSwapOption<Installed>> {
    TRANSPORTS.get_or_init(Table::default)
}

fn slot(transport: mefa_transport) -> Result<&'static ArcSwapOption<Installed>> {
    transports()
        .get(transport as u32, (transport >> 32) as u32)
        .ok_or_else(|| Error::invalid(format!("{transport:#x} is not an installed transport")))
}

/// Calls `f` with a transport.
fn with<R>(transport: mefa_transport, f: impl FnOnce(&Transport) -> Result<R>) -> Result<R> {
    let guard: Guard<Option<Arc<Installed>>> = slot(transport)?.load();
    slot(transport)?; // it may have become another's since it was looked up
    match &*guard {
        Some(installed) => f(&installed.transport),
        None => Err(Error::invalid(format!("transport {transport:#x} is being uninstalled"))),
    }
}

/// Hands a text to the caller's function.
///
/// # Safety
/// `sink` is NULL or the caller's function for `context`.
unsafe fn give_text(sink: mefa_text_fn, context: *mut c_void, text: String) -> Result<()> {
    let sink = sink.ok_or_else(|| Error::invalid("the text function is NULL"))?;
    let text = CString::new(text).map_err(|_| Error::invalid("a text with a NUL byte in it"))?;
    // SAFETY: passed on; the text lives until the call returns.
    unsafe { sink(context, text.as_ptr(), text.as_bytes().len()) };
    Ok(())
}

/// Version of this interface. It changes only when something that exists changes or goes away; compare
/// it with MEFA_ABI_VERSION. Never fails; any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_abi_version() -> u32 {
    MEFA_ABI_VERSION
}

/// The version of the interface that this header describes.
pub const MEFA_ABI_VERSION: u32 = 1;

/// Version of the library, for instance "0.1.0". A static string; never fails; any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}

/// The text of this thread's last error: one line that says what happened, to whom, and what to do where
/// that is known. Empty if there was none. Valid until this thread's next failing call. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Sends the library's log lines to `function` (with `context`), or back to standard error if it is NULL.
/// The level is that of MC_LOG_LEVEL. Affects the process; call it before mefa_install to see all lines.
/// After it returns, the former function may still be called for lines that were on their way.
///
/// # Safety
/// `function` must be callable with `context`, from any thread, until it is replaced.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_log_to(function: mefa_log_fn, context: *mut c_void) -> c_int {
    boundary(|| {
        log::start(Config::from_env().log_level);
        log::set_sink(function, Context(context));
        Ok(())
    })
}

/// Opens the devices, starts the pollers, and gives the transport's number in `*out`. Environment
/// variables (MC_...) are read now. Takes some milliseconds a device. Any thread; several transports may
/// exist at once. The strings of `config` may go away afterwards; its callbacks and context must stay
/// until mefa_uninstall has returned 0.
///
/// Errors: MEFA_CODE_INVALID_ARGUMENT, MEFA_CODE_MALFORMED_JSON (topology), MEFA_CODE_DEVICE_NOT_FOUND
/// (no such device, or none at all: the text says what was looked for; there is never a silent fallback),
/// MEFA_CODE_CONTEXT, MEFA_CODE_ENDPOINT.
///
/// # Safety
/// `config` and what it points to must be valid; `out` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_install(
    config: *const mefa_config,
    out: *mut mefa_transport,
) -> c_int {
    boundary(|| {
        check_out(out, "out")?;
        // SAFETY: the caller's promise; zero is valid for every field (numbers, pointers, options of
        // functions).
        let config = unsafe { sized(config, size_of::<usize>() * 2, "config")? };
        let gate = Arc::new(Gate::from_pointee(()));
        // SAFETY: as above.
        let (options, level) = unsafe { options(&config, &gate)? };
        log::start(level);
        let installed = Arc::new(Installed { transport: Transport::install(options)?, gate });
        let full = || Error::new(Code::TooManyRequests, "too many transports");
        let (index, generation) = transports().take(ArcSwapOption::empty).ok_or_else(full)?;
        transports().at(index).ok_or_else(full)?.store(Some(installed));
        // SAFETY: the caller's promise.
        unsafe { put(out, u64::from(generation) << 32 | u64::from(index), "out") }
    })
}

unsafe fn options(c: &mefa_config, gate: &Arc<Gate>) -> Result<(Options, ::log::LevelFilter)> {
    let mut config = Config::from_env();
    let context = Context(c.context);
    // SAFETY: the pointers of the caller's config are valid, as mefa_install asks.
    unsafe {
        let server_name = string(c.server_name, "config.server_name")?.to_owned();
        if let Some(provider) = optional_string(c.provider, "config.provider")? {
            config.provider = provider.to_owned();
        }
        let topology = optional_string(c.topology_json, "config.topology_json")?
            .map(Topology::from_json)
            .transpose()?;
        let devices = array(c.devices, c.device_count, "config.devices")?
            .iter()
            .map(|&name| Ok(string(name, "config.devices[]")?.to_owned()))
            .collect::<Result<_>>()?;
        let host: Option<Box<dyn Host>> = match (c.fetch_segment, c.handshake) {
            (None, None) => None,
            (fetch, handshake) => {
                Some(Box::new(CHost { fetch, handshake, context, gate: gate.clone() }))
            }
        };
        let observer = c.on_completion.map(|function| observer(function, context, gate.clone()));
        let level = config.log_level;
        Ok((Options { server_name, topology, devices, config, host, observer }, level))
    }
}

/// Completions handed over in one call.
const COMPLETIONS: usize = 64;

fn observer(
    function: unsafe extern "C" fn(*mut c_void, *const mefa_completion, usize),
    context: Context,
    gate: Arc<Gate>,
) -> mooncake_efa::engine::Observer {
    Box::new(move |finished: &[Finished]| {
        let context = context;
        let pass = gate.load();
        if pass.is_none() {
            return;
        }
        for chunk in finished.chunks(COMPLETIONS) {
            let mut items =
                [mefa_completion { cookie: 0, bytes: 0, status: 0, reserved: 0 }; COMPLETIONS];
            for (item, finished) in items.iter_mut().zip(chunk) {
                item.cookie = finished.cookie;
                item.bytes = finished.bytes;
                item.status = finished.status as i32;
            }
            // SAFETY: the host gave the function for this, with this context; the array has as many
            // items as said.
            unsafe { function(context.0, items.as_ptr(), chunk.len()) };
        }
    })
}

/// The host's callbacks as the engine's host.
struct CHost {
    fetch: mefa_fetch_segment_fn,
    handshake: mefa_handshake_fn,
    context: Context,
    gate: Arc<Gate>,
}

impl CHost {
    /// To be held while the host is called.
    fn pass(&self) -> Result<Guard<Option<Arc<()>>>> {
        let pass = self.gate.load();
        let closed = || Error::invalid("the transport has been uninstalled");
        if pass.is_some() { Ok(pass) } else { Err(closed()) }
    }
}

/// Copies the text that a host's callback gives into an `Option<String>`.
unsafe extern "C" fn keep_text(context: *mut c_void, text: *const c_char, length: usize) {
    if context.is_null() || text.is_null() {
        return;
    }
    // SAFETY: `context` is the Option<String> that we passed; the text has `length` bytes.
    unsafe {
        let bytes = std::slice::from_raw_parts(text.cast::<u8>(), length);
        *context.cast::<Option<String>>() = Some(String::from_utf8_lossy(bytes).into_owned());
    }
}

fn answer(code: Code, what: &str, ret: c_int, text: Option<String>) -> Result<String> {
    match text {
        Some(text) if ret == 0 => Ok(text),
        _ => Err(Error::new(code, format!("{what} failed: the host returned {ret}"))),
    }
}

impl Host for CHost {
    fn fetch_segment(&self, name: &str) -> Result<String> {
        let fetch = self.fetch.ok_or_else(|| {
            Error::new(Code::Metadata, format!("cannot ask for segment {name}: no fetch_segment"))
        })?;
        let c_name = CString::new(name).map_err(|_| Error::invalid("a name with a NUL byte"))?;
        let mut text: Option<String> = None;
        let _pass = self.pass()?;
        // SAFETY: the host's function with its context; `text` outlives the call.
        let ret = unsafe {
            fetch(self.context.0, c_name.as_ptr(), Some(keep_text), (&raw mut text).cast())
        };
        answer(Code::Metadata, &format!("asking for segment {name}"), ret, text)
    }

    fn handshake(&self, server: &str, request: &str) -> Result<String> {
        let handshake = self.handshake.ok_or_else(|| {
            Error::new(
                Code::RejectHandshake,
                format!("cannot reach {server}: no handshake function"),
            )
        })?;
        let bad = |_| Error::invalid("a handshake with a NUL byte");
        let (c_server, c_request) =
            (CString::new(server).map_err(bad)?, CString::new(request).map_err(bad)?);
        let mut text: Option<String> = None;
        let _pass = self.pass()?;
        // SAFETY: as in fetch_segment.
        let ret = unsafe {
            handshake(
                self.context.0,
                c_server.as_ptr(),
                c_request.as_ptr(),
                Some(keep_text),
                (&raw mut text).cast(),
            )
        };
        answer(Code::RejectHandshake, &format!("handshake with {server}"), ret, text)
    }
}

/// Cancels what is under way, waits up to 5 seconds for the provider to give it back, and closes
/// everything. The number and all batches and segments of the transport are unknown afterwards, and no callback
/// begins any more, whatever it returned. Waits for calls of other threads to leave; do not call it from a
/// callback.
///
/// Errors: MEFA_CODE_INVALID_ARGUMENT for an unknown transport; MEFA_CODE_BUSY if other threads do not leave
/// within 10 seconds, or the provider does not return to ours, or from closing its devices, within 10 each, or a
/// callback that has begun within 5.
/// What they are in is closed when they leave; until then they use registered memory, and the context of a
/// callback that has begun, so neither may go away.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_uninstall(transport: mefa_transport) -> c_int {
    boundary(|| {
        let slot = slot(transport)?;
        let (index, generation) = (transport as u32, (transport >> 32) as u32);
        let unknown = || Error::invalid(format!("{transport:#x} is not an installed transport"));
        if !transports().retire(index, generation) {
            return Err(unknown());
        }
        let last = slot.swap(None).ok_or_else(unknown)?;
        transports().give_back(index);
        last.transport.begin_close();
        let gate = last.gate.clone();
        let closed = close_when_left("transport", last, |installed| installed.transport.close());
        let begun = gate.swap(None);
        let returned = |begun| in_time(RETURN, || Arc::strong_count(&begun) == 1);
        if begun.is_none_or(returned) {
            closed
        } else {
            closed.and(Err(Error::new(Code::Busy, "a callback has begun and not returned")))
        }
    })
}

// ---- memory -----------------------------------------------------------------------------------

/// Registers one range; see mefa_register_many. `regions` may be NULL.
///
/// # Safety
/// As mefa_register_many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_register(
    transport: mefa_transport,
    address: *mut c_void,
    length: u64,
    location: *const c_char,
    regions: mefa_region_fn,
    context: *mut c_void,
) -> c_int {
    let memory = mefa_memory { address, length, location };
    // SAFETY: passed on.
    unsafe { mefa_register_many(transport, &raw const memory, 1, regions, context) }
}

/// Registers ranges for transfers from here and from peers, all or nothing. `regions`, which may be
/// NULL, is called once with the regions made and their keys. Any thread.
///
/// Errors: MEFA_CODE_INVALID_ARGUMENT (NULL, empty, or wrapping range), MEFA_CODE_ADDRESS_OVERLAPPED,
/// MEFA_CODE_MEMORY (the provider refuses; the text says why), MEFA_CODE_TOO_MANY_REQUESTS.
///
/// # Safety
/// The ranges must stay mapped, and free for peers to read and write, until mefa_unregister or mefa_uninstall
/// returned 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_register_many(
    transport: mefa_transport,
    memories: *const mefa_memory,
    count: usize,
    regions: mefa_region_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let memories = unsafe { array(memories, count, "memories")? };
        let mut wanted = Vec::with_capacity(count);
        for memory in memories {
            // SAFETY: the caller's promise.
            unsafe {
                let location = optional_string(memory.location, "location")?.unwrap_or("*");
                wanted.push((Memory::from_raw(memory.address as u64, memory.length)?, location));
            }
        }
        let made = with(transport, |transport| transport.register(&wanted))?;
        let flat: Vec<mefa_region> = made
            .iter()
            .enumerate()
            .flat_map(|(memory, regions)| {
                regions.iter().map(move |region| mefa_region {
                    address: region.address,
                    length: region.length,
                    keys: region.keys.as_ptr(),
                    key_count: region.keys.len(),
                    memory,
                })
            })
            .collect();
        if let Some(regions) = regions {
            // SAFETY: the caller's function with its context; the arrays outlive the call.
            unsafe { regions(context, flat.as_ptr(), flat.len()) };
        }
        Ok(())
    })
}

/// Ends the registration of the range that starts at `address`. Once it returned 0, nothing here uses
/// the memory any more. While transfers of ours use it, it waits for them, 5 seconds at most, and makes
/// progress; other memory may be registered meanwhile. Any thread.
///
/// Errors: MEFA_CODE_ADDRESS_NOT_REGISTERED if no range starts there; MEFA_CODE_BUSY if transfers of ours
/// still use it then (it stays registered; the text says how many, and which is the oldest); MEFA_CODE_MEMORY
/// if the provider refuses (it is not registered any more).
#[unsafe(no_mangle)]
pub extern "C" fn mefa_unregister(transport: mefa_transport, address: *mut c_void) -> c_int {
    boundary(|| with(transport, |transport| transport.unregister(address as u64)))
}

/// Unregisters several ranges, and waits 5 seconds at most for all together. It goes on after an error, and
/// returns the first one. Any thread.
///
/// # Safety
/// `addresses` must point to `count` pointers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_unregister_many(
    transport: mefa_transport,
    addresses: *const *mut c_void,
    count: usize,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let addresses = unsafe { array(addresses, count, "addresses")? };
        let addresses: Vec<u64> = addresses.iter().map(|&address| address as u64).collect();
        with(transport, |transport| transport.unregister_many(&addresses))
    })
}

/// Gives our segment descriptor as Mooncake's JSON, for the host's metadata or for a peer. Any thread.
///
/// # Safety
/// `text` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_descriptor_json(
    transport: mefa_transport,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        let json = with(transport, |transport| Ok(transport.descriptor().to_json()))?;
        // SAFETY: the caller's promise.
        unsafe { give_text(text, context, json) }
    })
}

/// Gives our segment descriptor as a structure. Any thread.
///
/// # Safety
/// `segment` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_descriptor(
    transport: mefa_transport,
    segment: mefa_segment_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        let segment = segment.ok_or_else(|| Error::invalid("the segment function is NULL"))?;
        let desc = with(transport, |transport| Ok(transport.descriptor()))?;
        let text = |text: &str| {
            CString::new(text).map_err(|_| Error::invalid("a name with a NUL byte in it"))
        };
        let name = text(&desc.name)?;
        let topology = text(&desc.topology.to_json())?;
        let names = desc
            .devices
            .iter()
            .map(|device| Ok((text(&device.name)?, text(&device.gid)?)))
            .collect::<Result<Vec<_>>>()?;
        let locations =
            desc.buffers.iter().map(|buffer| text(&buffer.name)).collect::<Result<Vec<_>>>()?;
        let devices: Vec<mefa_device> = names
            .iter()
            .zip(&desc.devices)
            .map(|((name, gid), device)| mefa_device {
                name: name.as_ptr(),
                gid: gid.as_ptr(),
                lid: device.lid,
            })
            .collect();
        let buffers: Vec<mefa_buffer> = locations
            .iter()
            .zip(&desc.buffers)
            .map(|(name, buffer)| mefa_buffer {
                name: name.as_ptr(),
                address: buffer.addr,
                length: buffer.length,
                rkeys: buffer.rkey.as_ptr(),
                rkey_count: buffer.rkey.len(),
            })
            .collect();
        let flat = mefa_segment_desc {
            size: size_of::<mefa_segment_desc>(),
            name: name.as_ptr(),
            devices: devices.as_ptr(),
            device_count: devices.len(),
            buffers: buffers.as_ptr(),
            buffer_count: buffers.len(),
            topology_json: topology.as_ptr(),
        };
        // SAFETY: the caller's function with its context; all that is pointed to outlives the call.
        unsafe { segment(context, &raw const flat) };
        Ok(())
    })
}

// ---- segments ---------------------------------------------------------------------------------

/// The caller's descriptor structure as a Segment, checked as one from the network is.
///
/// # Safety
/// `desc` is NULL or valid with all that it points to.
unsafe fn segment_of(desc: *const mefa_segment_desc) -> Result<Segment> {
    // SAFETY: the caller's promise; zero is valid for every field.
    unsafe {
        let desc = sized(desc, size_of::<mefa_segment_desc>(), "segment")?;
        let devices = array(desc.devices, desc.device_count, "segment.devices")?
            .iter()
            .map(|device| {
                Ok(Device {
                    name: string(device.name, "device.name")?.to_owned(),
                    gid: string(device.gid, "device.gid")?.to_owned(),
                    lid: device.lid,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let buffers = array(desc.buffers, desc.buffer_count, "segment.buffers")?
            .iter()
            .map(|buffer| {
                let rkey = array(buffer.rkeys, buffer.rkey_count, "buffer.rkeys")?.to_vec();
                Ok(Buffer {
                    name: string(buffer.name, "buffer.name")?.to_owned(),
                    addr: buffer.address,
                    length: buffer.length,
                    lkey: vec![0; rkey.len()],
                    rkey,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let topology = match optional_string(desc.topology_json, "segment.topology_json")? {
            Some(json) => Topology::from_json(json)?,
            None => Topology::flat(
                &devices.iter().map(|device| device.name.clone()).collect::<Vec<_>>(),
            ),
        };
        let segment = Segment {
            name: string(desc.name, "segment.name")?.to_owned(),
            protocol: mooncake_efa::segment::PROTOCOL.to_owned(),
            devices,
            buffers,
            topology,
            ..Segment::default()
        };
        segment.check()?;
        Ok(segment)
    }
}

fn open(transport: mefa_transport, out: *mut mefa_segment, segment: &Segment) -> Result<()> {
    check_out(out, "out")?;
    let id = with(transport, |transport| transport.open_segment(segment))?;
    // SAFETY: the caller of the exported function promised that it is writable.
    unsafe { put(out, id.0, "out") }
}

/// Opens a peer's segment from its descriptor as JSON (Mooncake's format, `length` not needed: it ends
/// with a NUL). Several may be open, also of the same peer. Any thread.
///
/// Errors: MEFA_CODE_MALFORMED_JSON (the text says what and where), MEFA_CODE_ENDPOINT if the peer runs
/// another libfabric provider.
///
/// # Safety
/// `json` must be a string; `out` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_segment_open_json(
    transport: mefa_transport,
    json: *const c_char,
    out: *mut mefa_segment,
) -> c_int {
    // SAFETY: the caller's promise.
    boundary(|| open(transport, out, &Segment::from_json(unsafe { string(json, "json")? })?))
}

/// As mefa_segment_open_json, from a structure.
///
/// # Safety
/// `desc` and all it points to must be valid; `out` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_segment_open(
    transport: mefa_transport,
    desc: *const mefa_segment_desc,
    out: *mut mefa_segment,
) -> c_int {
    // SAFETY: the caller's promise.
    boundary(|| open(transport, out, &unsafe { segment_of(desc)? }))
}

/// Opens a segment by name: the host's fetch_segment gives the descriptor. Any thread; blocks as that
/// does.
///
/// # Safety
/// `name` must be a string; `out` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_segment_open_name(
    transport: mefa_transport,
    name: *const c_char,
    out: *mut mefa_segment,
) -> c_int {
    boundary(|| {
        check_out(out, "out")?;
        // SAFETY: the caller's promise.
        let name = unsafe { string(name, "name")? };
        let id = with(transport, |transport| transport.open_segment_by_name(name))?;
        // SAFETY: the caller's promise.
        unsafe { put(out, id.0, "out") }
    })
}

/// Replaces what is known of a segment. Transfers under way go on. Any thread.
///
/// # Safety
/// `json` must be a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_segment_update_json(
    transport: mefa_transport,
    segment: mefa_segment,
    json: *const c_char,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let new = Segment::from_json(unsafe { string(json, "json")? })?;
        with(transport, |transport| transport.update_segment(TargetId(segment), &new))
    })
}

/// As mefa_segment_update_json, from a structure.
///
/// # Safety
/// `desc` and all it points to must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_segment_update(
    transport: mefa_transport,
    segment: mefa_segment,
    desc: *const mefa_segment_desc,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let new = unsafe { segment_of(desc)? };
        with(transport, |transport| transport.update_segment(TargetId(segment), &new))
    })
}

/// Closes a segment. Transfers under way go on. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_segment_close(transport: mefa_transport, segment: mefa_segment) -> c_int {
    boundary(|| with(transport, |transport| transport.close_segment(TargetId(segment))))
}

/// Connects every NIC of ours to every NIC of the segment, so that the first transfer finds it done. Any
/// thread; blocks for as many handshakes as are needed (none if the peer is one of ours).
///
/// Errors: MEFA_CODE_REJECT_HANDSHAKE, MEFA_CODE_ENDPOINT, MEFA_CODE_MALFORMED_JSON (what the host
/// answered).
#[unsafe(no_mangle)]
pub extern "C" fn mefa_segment_warm_up(transport: mefa_transport, segment: mefa_segment) -> c_int {
    boundary(|| with(transport, |transport| transport.warm_up(TargetId(segment))))
}

/// Answers a handshake that a peer sent to the host (JSON, Mooncake's format): the answer goes to
/// `text`, to be sent back. A peer that is refused gets an answer that says why. Any thread.
///
/// Errors: MEFA_CODE_MALFORMED_JSON if the request cannot be read (there is no answer then).
///
/// # Safety
/// `json` must be a string; `text` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_handshake_answer(
    transport: mefa_transport,
    json: *const c_char,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let request = unsafe { string(json, "json")? };
        let answer = with(transport, |transport| transport.answer_handshake(request))?;
        // SAFETY: the caller's promise.
        unsafe { give_text(text, context, answer) }
    })
}

/// Reads a handshake (JSON, Mooncake's format), for a host whose metadata has the fields apart. Any
/// thread.
///
/// Errors: MEFA_CODE_MALFORMED_JSON.
///
/// # Safety
/// `json` must be a string; `handshake` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_handshake_parse(
    json: *const c_char,
    handshake: mefa_handshake_fields_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        let sink = handshake.ok_or_else(|| Error::invalid("the handshake function is NULL"))?;
        // SAFETY: the caller's promise.
        let message = Handshake::from_json(unsafe { string(json, "json")? })?;
        let text = |field: String| {
            CString::new(field).map_err(|_| Error::invalid("a handshake with a NUL byte"))
        };
        let local_nic_path = text(message.local_nic_path)?;
        let peer_nic_path = text(message.peer_nic_path)?;
        let efa_addr = text(message.efa_addr)?;
        let reply_msg = text(message.reply_msg)?;
        let fields = mefa_handshake {
            size: size_of::<mefa_handshake>(),
            local_nic_path: local_nic_path.as_ptr(),
            peer_nic_path: peer_nic_path.as_ptr(),
            efa_addr: efa_addr.as_ptr(),
            reply_msg: reply_msg.as_ptr(),
        };
        // SAFETY: the caller's function; all texts live until it returns.
        unsafe { sink(context, &raw const fields) };
        Ok(())
    })
}

/// The other way round: a handshake as JSON. Any thread.
///
/// # Safety
/// `handshake` and its strings must be valid; `text` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_handshake_format(
    handshake: *const mefa_handshake,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let fields = unsafe { sized(handshake, size_of::<mefa_handshake>(), "handshake")? };
        let field = |text, name| {
            // SAFETY: the caller's promise.
            Ok(unsafe { optional_string(text, name)? }.unwrap_or_default().to_owned())
        };
        let message = Handshake {
            local_nic_path: field(fields.local_nic_path, "local_nic_path")?,
            peer_nic_path: field(fields.peer_nic_path, "peer_nic_path")?,
            efa_addr: field(fields.efa_addr, "efa_addr")?,
            reply_msg: field(fields.reply_msg, "reply_msg")?,
        };
        // SAFETY: the caller's promise.
        unsafe { give_text(text, context, message.to_json()) }
    })
}

// ---- transfers --------------------------------------------------------------------------------

/// A new batch for up to `capacity` requests, 1 to 1048576. Free it with mefa_batch_free. Any thread.
///
/// # Safety
/// `out` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_batch_allocate(
    transport: mefa_transport,
    capacity: usize,
    out: *mut mefa_batch,
) -> c_int {
    boundary(|| {
        check_out(out, "out")?;
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        let id = with(transport, |transport| transport.allocate_batch(capacity))?;
        // SAFETY: the caller's promise.
        unsafe { put(out, id.0, "out") }
    })
}

/// Frees a batch. Any thread.
///
/// Errors: MEFA_CODE_BUSY while a request of it is pending (it is not freed).
#[unsafe(no_mangle)]
pub extern "C" fn mefa_batch_free(transport: mefa_transport, batch: mefa_batch) -> c_int {
    boundary(|| with(transport, |transport| transport.free_batch(BatchId(batch))))
}

/// Adds requests to a batch and starts them, all or none. Their tasks are numbered on from those
/// already in the batch; with `batch` 0 they belong to none, and only on_completion is told of their
/// end. They end by `timeout_ns` nanoseconds from now (0: MC_SLICE_TIMEOUT). Any thread,
/// also several on one batch. Does not wait for transfers; may wait for a handshake with a new peer.
///
/// Errors, with nothing started: MEFA_CODE_INVALID_ARGUMENT (unknown batch or segment, bad opcode or
/// flags, a range past the end of the address space), MEFA_CODE_TOO_MANY_REQUESTS (the batch is full),
/// MEFA_CODE_ADDRESS_NOT_REGISTERED (ours or the target's), MEFA_CODE_REJECT_HANDSHAKE,
/// MEFA_CODE_METADATA, MEFA_CODE_ENDPOINT, MEFA_CODE_MALFORMED_JSON (what the host answered).
///
/// # Safety
/// `requests` must point to `count` requests.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_submit(
    transport: mefa_transport,
    batch: mefa_batch,
    requests: *const mefa_request,
    count: usize,
    timeout_ns: u64,
) -> c_int {
    boundary(|| {
        // SAFETY: the caller's promise.
        let requests = unsafe { array(requests, count, "requests")? };
        for (index, request) in requests.iter().enumerate() {
            if !matches!(request.opcode, MEFA_READ | MEFA_WRITE) || request.flags != 0 {
                return Err(Error::invalid(format!(
                    "request {index}: opcode {} and flags {:#x}: MEFA_READ or MEFA_WRITE, and 0",
                    request.opcode, request.flags
                )));
            }
        }
        let requests = requests.iter().map(|request| Request {
            write: request.opcode == MEFA_WRITE,
            local: request.source,
            target: TargetId(request.target),
            remote: request.offset,
            length: request.length,
            cookie: request.cookie,
        });
        let timeout = (timeout_ns > 0).then(|| Duration::from_nanos(timeout_ns));
        with(transport, |transport| match batch {
            0 => transport.submit_detached(requests, timeout),
            _ => transport.submit(BatchId(batch), requests, timeout).map(drop),
        })
    })
}

/// Makes progress, for a caller who waits for on_completion: completions that are there now are told of
/// before it returns. Without it they come from the pollers, a little later. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_progress(transport: mefa_transport) -> c_int {
    boundary(|| {
        with(transport, |transport| {
            transport.progress();
            Ok(())
        })
    })
}

/// Status of task number `task` of a batch. Makes progress if it is pending, so polling it is enough.
/// Any thread.
///
/// # Safety
/// `out` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_task_status(
    transport: mefa_transport,
    batch: mefa_batch,
    task: usize,
    out: *mut mefa_task_state,
) -> c_int {
    boundary(|| {
        check_out(out, "out")?;
        let task = u32::try_from(task).unwrap_or(u32::MAX);
        let (status, bytes) =
            with(transport, |transport| transport.task_status(BatchId(batch), task))?;
        let state = mefa_task_state { status: status as i32, reserved: 0, bytes };
        // SAFETY: the caller's promise.
        unsafe { put(out, state, "out") }
    })
}

/// Status of a batch as a whole: MEFA_STATUS_PENDING while a task is, then MEFA_STATUS_COMPLETED if all
/// tasks did (or there are none), otherwise MEFA_STATUS_FAILED. `tasks`, which may be NULL, gets the
/// count of tasks. Makes progress if it is pending. Any thread.
///
/// # Safety
/// `status` must be writable; `tasks` too, unless it is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_batch_status(
    transport: mefa_transport,
    batch: mefa_batch,
    status: *mut i32,
    tasks: *mut usize,
) -> c_int {
    boundary(|| {
        check_out(status, "status")?;
        let (state, used) = with(transport, |transport| transport.batch_status(BatchId(batch)))?;
        // SAFETY: the caller's promise.
        unsafe {
            if !tasks.is_null() {
                put(tasks, used as usize, "tasks")?;
            }
            put(status, state as i32, "status")
        }
    })
}

/// Gives the reason of a task that failed or timed out to `text`, in one line: operation, bytes, peer, NIC
/// of ours, time since mefa_submit, and the cause, in the provider's words if it has any. An empty one for
/// every other task. Any thread.
///
/// # Safety
/// `text` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_task_error(
    transport: mefa_transport,
    batch: mefa_batch,
    task: usize,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        let task = u32::try_from(task).unwrap_or(u32::MAX);
        let why = with(transport, |transport| transport.task_error(BatchId(batch), task))?;
        // SAFETY: the caller's promise.
        unsafe { give_text(text, context, why.unwrap_or_default()) }
    })
}

/// Waits until no task of a batch is pending, making progress, and gives the batch's status as
/// mefa_batch_status does. Any thread.
///
/// Errors: MEFA_CODE_TIMEOUT if `timeout_ns` nanoseconds pass first (the batch goes on; nothing is
/// written).
///
/// # Safety
/// `status` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_wait(
    transport: mefa_transport,
    batch: mefa_batch,
    timeout_ns: u64,
    status: *mut i32,
) -> c_int {
    boundary(|| {
        check_out(status, "status")?;
        let timeout = Duration::from_nanos(timeout_ns);
        let state = with(transport, |transport| transport.wait(BatchId(batch), timeout))?;
        // SAFETY: the caller's promise.
        unsafe { put(status, state as i32, "status") }
    })
}

/// Cancels a batch's pending tasks. What is not posted yet ends at once, the rest when the provider
/// gives it back; then the status is MEFA_STATUS_CANCELED. Does not wait. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mefa_cancel(transport: mefa_transport, batch: mefa_batch) -> c_int {
    boundary(|| with(transport, |transport| transport.cancel(BatchId(batch))))
}

/// Whether the provider has given back all memory of a batch's requests: 1 or 0 in `*quiet`. It may be
/// 0 after MEFA_STATUS_TIMEOUT; do not reuse the memory then (mefa_wait_quiet waits for it). Any thread.
///
/// # Safety
/// `quiet` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_batch_quiet(
    transport: mefa_transport,
    batch: mefa_batch,
    quiet: *mut i32,
) -> c_int {
    boundary(|| {
        check_out(quiet, "quiet")?;
        let state = with(transport, |transport| transport.is_quiet(BatchId(batch)))?;
        // SAFETY: the caller's promise.
        unsafe { put(quiet, i32::from(state), "quiet") }
    })
}

/// Waits until the provider has given back all memory of a batch's requests, making progress: what a caller
/// does before he uses memory again of which a task ended with MEFA_STATUS_TIMEOUT. Every task has a final
/// status then. Any thread.
///
/// Errors: MEFA_CODE_TIMEOUT if `timeout_ns` nanoseconds pass first (nothing has changed; the text says how
/// many requests it is about).
#[unsafe(no_mangle)]
pub extern "C" fn mefa_wait_quiet(
    transport: mefa_transport,
    batch: mefa_batch,
    timeout_ns: u64,
) -> c_int {
    let timeout = Duration::from_nanos(timeout_ns);
    boundary(|| with(transport, |transport| transport.wait_quiet(BatchId(batch), timeout)))
}

// ---- statistics -------------------------------------------------------------------------------

/// Count of NICs in use in `*count`. Any thread.
///
/// # Safety
/// `count` must be writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_nic_count(transport: mefa_transport, count: *mut usize) -> c_int {
    boundary(|| {
        check_out(count, "count")?;
        let nics = with(transport, |transport| Ok(transport.nic_names().len()))?;
        // SAFETY: the caller's promise.
        unsafe { put(count, nics, "count") }
    })
}

/// Counters of NIC number `nic`. Set `out->size` before the call. Any thread; the counters are each
/// right, but not all of one moment.
///
/// # Safety
/// `out` must be writable in the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_stats(
    transport: mefa_transport,
    nic: usize,
    out: *mut mefa_nic_stats,
) -> c_int {
    boundary(|| {
        check_out(out, "out")?;
        // SAFETY: the structure begins with its size, as the caller promised.
        let size = unsafe { out.cast::<usize>().read() };
        let known = size_of::<mefa_nic_stats>();
        if size < 2 * size_of::<u64>() || size % size_of::<u64>() != 0 {
            return Err(Error::invalid("out->size: set it to sizeof(mefa_nic_stats)"));
        }
        let stats = with(transport, |transport| Ok(transport.stats()))?;
        let rail = stats.rails.get(nic).ok_or_else(|| {
            Error::invalid(format!("there are {} NICs, none number {nic}", stats.rails.len()))
        })?;
        let counters = &rail.counters;
        let flat = mefa_nic_stats {
            size: size.min(known),
            posted: counters.posted,
            completed: counters.completed,
            failed: counters.failed,
            bytes_written: counters.bytes_written,
            bytes_read: counters.bytes_read,
            put_off: counters.put_off,
            starved: counters.starved,
            strays: counters.strays,
            overdue: counters.overdue,
            pending_bytes: counters.pending_bytes,
            retried: counters.retried,
            faults_permanent: counters.faults.permanent,
            faults_peer: counters.faults.peer,
            faults_rail: counters.faults.rail,
            faults_pressure: counters.faults.pressure,
            faults_ours: counters.faults.ours,
            paused: counters.paused.into(),
        };
        // SAFETY: the lower of both sizes fits in both.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (&raw const flat).cast::<u8>(),
                out.cast::<u8>(),
                size.min(known),
            );
        }
        Ok(())
    })
}

/// Gives all counters as JSON, with the provider and NIC names. Any thread.
///
/// # Safety
/// `text` must be callable with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mefa_stats_json(
    transport: mefa_transport,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    boundary(|| {
        let stats = with(transport, |transport| Ok(transport.stats()))?;
        let json = serde_json::to_string(&stats)
            .map_err(|error| Error::new(Code::Internal, error.to_string()))?;
        // SAFETY: the caller's promise.
        unsafe { give_text(text, context, json) }
    })
}
