//! Sequences of C calls: valid ones, wrong ones, and what lies between.
//!
//! What include/mooncake_efa.h asks of a caller is kept (pointers are NULL or right, registered memory is
//! there); everything else may be anything. One transport at a time, over memory of this process, with
//! itself as the peer: nothing leaves the machine.

use std::alloc::Layout;
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::door::types::{
    mefa_buffer, mefa_code, mefa_completion, mefa_config, mefa_device, mefa_handshake, mefa_memory,
    mefa_nic_stats, mefa_region, mefa_request, mefa_segment_desc, mefa_task_state, mefa_text_fn,
};
#[allow(clippy::wildcard_imports)]
use crate::door::*;
use arbitrary::{Arbitrary, Unstructured};
use mooncake_efa::segment::{Handshake, Segment, decode_gid, encode_gid, hex_decode, hex_encode};
use rustix::process::{Resource, getrlimit, setrlimit};

/// Bytes that are there to be registered.
const MEMORY: usize = 1 << 20;
/// Most calls of one run.
const CALLS: usize = 96;
/// Room for a structure that says it is longer than we know it.
const TAIL: usize = 64;

/// Its first byte, on a page's edge.
fn memory() -> u64 {
    static MEMORY_OF_OURS: OnceLock<u64> = OnceLock::new();
    *MEMORY_OF_OURS.get_or_init(|| {
        let layout = Layout::from_size_align(MEMORY, 4096).expect("a power of two");
        // SAFETY: it has a size, and is never given back.
        unsafe { std::alloc::alloc_zeroed(layout) as u64 }
    })
}

// ---- what calls are made of -------------------------------------------------------------------

/// A handle: mostly one that was given, now or earlier.
#[derive(Arbitrary, Debug)]
struct Pick(u8, u32);

impl Pick {
    fn of(&self, known: &[u64]) -> u64 {
        match self.0 {
            0..=223 if !known.is_empty() => known[known.len() - 1 - self.1 as usize % known.len()],
            224..=239 => u64::from(self.1),
            240..=247 => u64::from(self.1) << 32 | 1,
            248..=251 => known.last().map_or(7, |last| last ^ 1 << (self.1 % 64)),
            _ => 0,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Address {
    Inside(u32),
    /// Around the start and the end.
    Edge(i8, bool),
    Any(u64),
    Zero,
}

impl Address {
    fn get(&self) -> u64 {
        match *self {
            Self::Inside(at) => memory() + u64::from(at) % MEMORY as u64,
            Self::Edge(by, end) => {
                memory().wrapping_add(u64::from(end) * MEMORY as u64).wrapping_add(by as u64)
            }
            Self::Any(address) => address,
            Self::Zero => 0,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Length {
    Short(u8),
    Page(u8),
    Inside(u32),
    Whole,
    Any(u64),
}

impl Length {
    fn get(&self) -> u64 {
        match *self {
            Self::Short(length) => length.into(),
            Self::Page(pages) => u64::from(pages) << 12,
            Self::Inside(length) => u64::from(length) % MEMORY as u64,
            Self::Whole => MEMORY as u64,
            Self::Any(length) => length,
        }
    }
}

/// A range that may be registered: inside our memory, or one that must be refused unseen.
fn registrable(address: &Address, length: &Length) -> (u64, u64) {
    let (address, length) = (address.get(), length.get());
    let end = memory() + MEMORY as u64;
    let refused = address == 0 || length == 0 || address.checked_add(length).is_none();
    match refused || (address >= memory() && address < end && length <= end - address) {
        true => (address, length),
        false => (memory() + address % MEMORY as u64 / 2, length % (MEMORY as u64 / 2)),
    }
}

#[derive(Arbitrary, Debug)]
enum Text {
    Null,
    NotUtf8,
    Known(u8),
    Any(String),
    Long(u16),
}

const KNOWN: [&str; 12] =
    ["", "*", "cpu:0", "cpu:1", "cuda:0", "here:1", "here:1@lo", "lo", "shm", "tcp", "efa", "\r\n"];

impl Text {
    fn get(&self) -> Option<CString> {
        let bytes = match self {
            Self::Null => return None,
            Self::NotUtf8 => b"\xff\xfe".to_vec(),
            Self::Known(which) => KNOWN[usize::from(*which) % KNOWN.len()].into(),
            Self::Any(text) => text.replace('\0', "").into(),
            Self::Long(length) => vec![b'x'; usize::from(*length)],
        };
        Some(CString::new(bytes).expect("no NUL"))
    }
}

fn pointer(text: Option<&CString>) -> *const c_char {
    text.map_or(null(), |text| text.as_ptr())
}

/// JSON: our own descriptor, one that was tampered with, or anything.
#[derive(Arbitrary, Debug)]
enum Json {
    Own,
    Edited(Vec<(u16, u8)>),
    Cut(u16),
    Built(Built),
    Text(Text),
}

#[derive(Arbitrary, Debug)]
struct Built {
    name: Text,
    devices: Vec<(Text, Gid)>,
    buffers: Vec<(Text, Address, Length, Vec<u64>)>,
    topology: Text,
    size: Size,
    /// NULL in place of an array.
    null: u8,
}

#[derive(Arbitrary, Debug)]
enum Gid {
    Own,
    /// A peer's of another kind: its address comes by a handshake.
    Foreign,
    Address(Vec<u8>),
    Other(Text),
}

impl Gid {
    fn get(&self, own: &Segment) -> Option<CString> {
        let mine = own.devices.first().map_or("none", |device| &device.gid);
        let text = match self {
            Self::Own => mine.to_owned(),
            Self::Foreign => "fe80::1".to_owned(),
            Self::Address(address) => {
                let provider = decode_gid(mine).map_or("tcp", |(provider, _)| provider);
                encode_gid(provider, address)
            }
            Self::Other(text) => return text.get(),
        };
        Some(CString::new(text).expect("no NUL"))
    }
}

/// How long a structure says it is.
#[derive(Arbitrary, Debug)]
struct Size(u8, u8);

impl Size {
    /// Never more than `right + TAIL`, unless it is more than any structure may be.
    fn get(&self, right: usize) -> usize {
        match self.0 {
            0..=199 => right,
            200..=219 => usize::from(self.1) % (right + TAIL + 1),
            220..=234 => right + TAIL - usize::from(self.1) % 8 * 8,
            235..=250 => right.saturating_sub(usize::from(self.1) % 8 * 8),
            _ => usize::MAX - usize::from(self.1),
        }
    }
}

#[repr(C)]
struct Longer<T> {
    known: T,
    tail: [u8; TAIL],
}

#[derive(Arbitrary, Debug)]
struct Request {
    read: bool,
    odd: u8,
    source: Address,
    target: Pick,
    offset: Address,
    length: Length,
    again: bool,
}

#[derive(Arbitrary, Debug)]
enum Call {
    Install { shm: bool, name: Text, topology: Text, odd: u8, size: Size },
    Uninstall,
    Register { address: Address, length: Length, location: Text },
    RegisterMany(Vec<(Address, Length, Text)>, u8),
    Unregister(Address),
    UnregisterMany(Vec<Address>),
    Describe { as_json: bool, function: bool },
    Open { json: Json, as_struct: bool, null: bool },
    OpenName { name: Text, null: bool },
    Update { segment: Pick, json: Json, as_struct: bool },
    Close(Pick),
    WarmUp(Pick),
    Answer { json: Shake, function: bool },
    Parse { json: Shake, function: bool },
    Format { fields: [Text; 4], size: Size },
    Allocate { capacity: u32, many: bool, null: bool },
    Free(Pick),
    Submit { batch: Pick, requests: Vec<Request>, timeout: u8, null: bool },
    Progress,
    TaskStatus { batch: Pick, task: u64, null: bool },
    BatchStatus { batch: Pick, null: u8 },
    TaskError { batch: Pick, task: u64, function: bool },
    Wait { batch: Pick, timeout: u8, null: bool },
    Cancel(Pick),
    Quiet { batch: Pick, null: bool },
    WaitQuiet { batch: Pick, timeout: u8 },
    NicCount { null: bool },
    Stats { nic: u64, size: Size, null: bool },
    StatsJson { function: bool },
    Misaligned { which: u8 },
}

/// A handshake.
#[derive(Arbitrary, Debug)]
enum Shake {
    /// For a NIC of ours, with this address.
    Ours(Vec<u8>),
    /// The one that our own endpoint would send.
    Own,
    Refusal(String),
    Text(Text),
}

/// What the host's functions do.
#[derive(Arbitrary, Debug)]
struct Host {
    fetched: Json,
    shaken: Shake,
    code: i8,
    no_fetch: bool,
    no_handshake: bool,
}

#[derive(Arbitrary, Debug)]
struct Run {
    host: Host,
    /// So many calls of a usual life come first, over this provider.
    usual: u8,
    shm: bool,
    /// Each with the transport that it is made on.
    calls: Vec<(Pick, Call)>,
}

// ---- the host ---------------------------------------------------------------------------------

/// What the callbacks answer.
static ANSWERS: Mutex<(Option<CString>, Option<CString>, c_int)> = Mutex::new((None, None, 0));
/// Requests that were accepted, those that ended, and the transport now.
static ACCEPTED: AtomicU64 = AtomicU64::new(0);
static ENDED: AtomicU64 = AtomicU64::new(0);
static NOW: AtomicU64 = AtomicU64::new(0);
/// A request of this cookie is followed by another one, from inside the callback.
const AGAIN: u64 = 0xa9a1;

unsafe extern "C" fn keep(context: *mut c_void, text: *const c_char, length: usize) {
    // SAFETY: the context is ours, and the text as long as said and ended by a NUL.
    unsafe {
        let text = CStr::from_ptr(text);
        assert_eq!(text.to_bytes().len(), length);
        text.to_str().expect("UTF-8").clone_into(&mut *context.cast::<String>());
    }
}

unsafe extern "C" fn fetch(
    _: *mut c_void,
    name: *const c_char,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    let answers = ANSWERS.lock().unwrap();
    // SAFETY: a string; and the library's function with its context.
    unsafe {
        CStr::from_ptr(name).to_str().expect("UTF-8");
        if let (Some(answer), Some(text)) = (&answers.0, text) {
            text(context, answer.as_ptr(), answer.as_bytes().len());
        }
    }
    answers.2
}

unsafe extern "C" fn shake(
    _: *mut c_void,
    _: *const c_char,
    _: *const c_char,
    text: mefa_text_fn,
    context: *mut c_void,
) -> c_int {
    let answers = ANSWERS.lock().unwrap();
    // SAFETY: the library's function with its context.
    unsafe {
        if let (Some(answer), Some(text)) = (&answers.1, text) {
            text(context, answer.as_ptr(), answer.as_bytes().len());
        }
    }
    answers.2
}

unsafe extern "C" fn ended(_: *mut c_void, completions: *const mefa_completion, count: usize) {
    // SAFETY: an array of so many.
    let completions = unsafe { std::slice::from_raw_parts(completions, count) };
    for completion in completions {
        assert!((3..=6).contains(&completion.status), "status {}", completion.status);
        if completion.cookie == AGAIN {
            let request = mefa_request {
                opcode: 1,
                flags: 0,
                source: memory(),
                target: 0,
                offset: memory(),
                length: 0,
                cookie: 0,
            };
            // SAFETY: one request. Refused, as there is no such target; but that must be found out here.
            let code = unsafe { mefa_submit(NOW.load(Ordering::SeqCst), 0, &request, 1, 1) };
            assert_eq!(code, -1);
        }
    }
    ENDED.fetch_add(count as u64, Ordering::SeqCst);
}

unsafe extern "C" fn see_regions(_: *mut c_void, regions: *const mefa_region, count: usize) {
    // SAFETY: an array of so many, each with its keys.
    unsafe {
        for region in std::slice::from_raw_parts(regions, count) {
            let keys = std::slice::from_raw_parts(region.keys, region.key_count);
            assert!(region.length > 0 && keys.iter().any(|&key| key != 0));
        }
    }
}

unsafe extern "C" fn see_segment(_: *mut c_void, segment: *const mefa_segment_desc) {
    // SAFETY: a descriptor with all that it points to.
    unsafe {
        let segment = &*segment;
        assert_eq!(segment.size, size_of::<mefa_segment_desc>());
        assert!(segment.device_count > 0 && !(*segment.devices).name.is_null());
    }
}

unsafe extern "C" fn see_handshake(_: *mut c_void, handshake: *const mefa_handshake) {
    // SAFETY: four strings.
    unsafe {
        let fields = &*handshake;
        for text in [fields.local_nic_path, fields.peer_nic_path, fields.efa_addr, fields.reply_msg]
        {
            CStr::from_ptr(text).to_str().expect("UTF-8");
        }
    }
}

unsafe extern "C" fn ignore_log(_: *mut c_void, level: c_int, text: *const c_char) {
    // SAFETY: a string.
    let text = unsafe { CStr::from_ptr(text) }.to_str().expect("UTF-8");
    assert!((1..=5).contains(&level) && !text.contains(char::is_control), "{text:?}");
}

// ---- the caller -------------------------------------------------------------------------------

#[derive(Default)]
struct Caller {
    transports: Vec<u64>,
    live: bool,
    segments: Vec<u64>,
    batches: Vec<u64>,
    own: String,
    /// Kept so that each outlives the calls.
    texts: VecDeque<CString>,
}

/// A code of the interface, and a last error that fits.
fn check(code: c_int) -> bool {
    let known = [
        mefa_code::Ok as c_int,
        mefa_code::InvalidArgument as c_int,
        mefa_code::TooManyRequests as c_int,
        mefa_code::AddressNotRegistered as c_int,
        mefa_code::Busy as c_int,
        mefa_code::DeviceNotFound as c_int,
        mefa_code::AddressOverlapped as c_int,
        mefa_code::MalformedJson as c_int,
        mefa_code::RejectHandshake as c_int,
        mefa_code::Metadata as c_int,
        mefa_code::Endpoint as c_int,
        mefa_code::Memory as c_int,
        mefa_code::Timeout as c_int,
    ];
    // SAFETY: a string until the next failing call.
    let error = unsafe { CStr::from_ptr(mefa_last_error()) }.to_str().expect("UTF-8");
    assert!(known.contains(&code), "code {code}: {error}");
    if code != 0 {
        super::one_line(error);
    }
    code == 0
}

/// Whether transfers to a peer of this descriptor stay on this machine.
fn is_local(text: &str) -> bool {
    let Ok(segment) = Segment::from_json(text) else { return true };
    segment.devices.iter().all(|device| match decode_gid(&device.gid) {
        Some((provider, address)) if provider.starts_with("tcp") => is_loopback(&address),
        _ => true,
    })
}

/// An IPv4 address of the loopback interface, or none at all.
fn is_loopback(address: &[u8]) -> bool {
    let is_ip = matches!(address, [2 | 10, 0, ..]);
    !is_ip || matches!(address, [2, 0, _, _, 127, ..])
}

impl Caller {
    fn keep(&mut self, text: Option<CString>) -> *const c_char {
        let Some(text) = text else { return null() };
        let at = text.as_ptr();
        self.texts.push_back(text);
        at
    }

    fn own(&self) -> Segment {
        Segment::from_json(&self.own).unwrap_or_default()
    }

    /// What our peers know of us now.
    fn look(&mut self) {
        if let (true, Some(&transport)) = (self.live, self.transports.last()) {
            // SAFETY: `keep` takes a String.
            let code =
                unsafe { mefa_descriptor_json(transport, Some(keep), (&raw mut self.own).cast()) };
            assert_eq!(code, 0);
            Segment::from_json(&self.own).expect("peers must be able to read it");
        }
    }

    fn json(&mut self, json: &Json) -> Option<CString> {
        let text = match json {
            Json::Own => self.own.clone().into_bytes(),
            Json::Edited(edits) => {
                let mut text = self.own.clone().into_bytes();
                for (at, byte) in edits {
                    let length = text.len().max(1);
                    if let Some(old) = text.get_mut(usize::from(*at) % length) {
                        *old = *byte;
                    }
                }
                text
            }
            Json::Cut(at) => {
                let at = usize::from(*at) % (self.own.len() + 1);
                self.own.as_bytes()[..at].to_vec()
            }
            Json::Built(built) => {
                let own = self.own();
                let text = |text: Option<CString>| {
                    text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
                };
                let devices: Vec<_> = built.devices.iter().map(|(name, gid)| {
                    serde_json::json!({"name": text(name.get()), "gid": text(gid.get(&own))})
                }).collect();
                let buffers: Vec<_> = built
                    .buffers
                    .iter()
                    .map(|(name, address, length, keys)| {
                        let keys = self.keys(&own, keys, devices.len());
                        serde_json::json!({"name": text(name.get()), "addr": address.get(),
                        "length": length.get(), "rkey": keys, "lkey": vec![0; keys.len()]})
                    })
                    .collect();
                let name = text(built.name.get());
                serde_json::json!({"name": name, "protocol": "efa", "devices": devices,
                    "buffers": buffers})
                .to_string()
                .into_bytes()
            }
            Json::Text(text) => return text.get().filter(|text| self.allowed(text)),
        };
        CString::new(text).ok().filter(|text| self.allowed(text))
    }

    fn allowed(&self, text: &CStr) -> bool {
        text.to_str().map_or(true, is_local)
    }

    /// Keys of a buffer: as many as devices mostly, and right ones where 0 was drawn.
    fn keys(&self, own: &Segment, drawn: &[u64], devices: usize) -> Vec<u64> {
        let right = own.buffers.first().and_then(|buffer| buffer.rkey.first()).copied();
        let mut keys: Vec<u64> =
            drawn.iter().map(|&key| if key == 0 { right.unwrap_or(1) } else { key }).collect();
        if keys.first() != Some(&7) {
            keys.resize(devices, right.unwrap_or(1));
        }
        keys
    }

    fn shake(&self, json: &Shake) -> Option<CString> {
        let own = self.own();
        let device = own.devices.first();
        let path = format!("{}@{}", own.name, device.map_or("lo", |device| &device.name));
        let mine = device.and_then(|device| decode_gid(&device.gid)).map(|(_, address)| address);
        let (address, refusal) = match json {
            Shake::Ours(address) if is_loopback(address) => (address.clone(), ""),
            Shake::Ours(_) => (vec![2, 0], ""),
            Shake::Own => (mine.unwrap_or_default(), ""),
            Shake::Refusal(text) => (Vec::new(), &**text),
            Shake::Text(text) => {
                let stays = |text: &CString| {
                    let message = Handshake::from_json(text.to_str().ok()?).ok()?;
                    Some(is_loopback(&hex_decode(&message.efa_addr)?))
                };
                return text.get().filter(|text| stays(text).unwrap_or(true));
            }
        };
        let address = hex_encode(&address);
        let text = serde_json::json!({"local_nic_path": path, "peer_nic_path": path,
            "efa_addr": address, "reply_msg": refusal});
        Some(CString::new(text.to_string()).expect("JSON has no NUL"))
    }

    /// Calls `f` with the structure form.
    fn with_struct(
        &mut self,
        built: &Built,
        f: impl FnOnce(*const mefa_segment_desc) -> c_int,
    ) -> c_int {
        let own = self.own();
        let gids: Vec<_> = built
            .devices
            .iter()
            .map(|(_, gid)| {
                let gid = gid.get(&own);
                let address = |gid: &CString| Some(decode_gid(gid.to_str().ok()?)?.1);
                gid.filter(|gid| address(gid).is_none_or(|address| is_loopback(&address)))
            })
            .collect();
        let devices: Vec<_> = built
            .devices
            .iter()
            .zip(&gids)
            .map(|((name, _), gid)| mefa_device {
                name: self.keep(name.get()),
                gid: pointer(gid.as_ref()),
                lid: 0,
            })
            .collect();
        let keys: Vec<_> =
            built.buffers.iter().map(|(.., keys)| self.keys(&own, keys, devices.len())).collect();
        let buffers: Vec<_> = built
            .buffers
            .iter()
            .zip(&keys)
            .map(|((name, at, length, _), keys)| mefa_buffer {
                name: self.keep(name.get()),
                address: at.get(),
                length: length.get(),
                rkeys: keys.as_ptr(),
                rkey_count: keys.len(),
            })
            .collect();
        let right = size_of::<mefa_segment_desc>();
        let longer = Longer {
            known: mefa_segment_desc {
                size: built.size.get(right),
                name: self.keep(built.name.get()),
                devices: if built.null == 1 { null() } else { devices.as_ptr() },
                device_count: devices.len(),
                buffers: if built.null == 2 { null() } else { buffers.as_ptr() },
                buffer_count: buffers.len(),
                topology_json: self.keep(built.topology.get()),
            },
            tail: [u8::from(built.null == 3); TAIL],
        };
        f(&raw const longer.known)
    }

    /// One call on `transport`.
    ///
    /// All that is handed over is valid as the header asks: made here, or in `self.texts`.
    fn call(&mut self, transport: u64, call: &Call, host: &Host) {
        let mut out = 77_u64;
        let mut word = 77_i32;
        let mut text = String::new();
        let mut state = mefa_task_state { status: 77, reserved: 77, bytes: 77 };
        let to_text = (&raw mut text).cast::<c_void>();
        let sink = |wanted: bool| -> mefa_text_fn { wanted.then_some(keep) };
        // SAFETY: in every call, strings and arrays are NULL or valid, and what is written to is ours.
        unsafe {
            match call {
                Call::Install { shm, name, topology, odd, size } => {
                    if self.live {
                        return;
                    }
                    let device = if *shm { c"shm" } else { c"lo" };
                    let devices =
                        [device.as_ptr(), if *odd == 1 { null() } else { c"none".as_ptr() }];
                    let longer = Longer {
                        known: mefa_config {
                            size: size.get(size_of::<mefa_config>()),
                            server_name: match name {
                                Text::Known(_) => c"here:1".as_ptr(),
                                other => self.keep(other.get()),
                            },
                            topology_json: match topology {
                                Text::Known(_) => null(),
                                other => self.keep(other.get()),
                            },
                            provider: if *shm { c"shm" } else { c"tcp" }.as_ptr(),
                            devices: if *odd == 2 { null() } else { devices.as_ptr() },
                            device_count: if matches!(odd, 1 | 3) { 2 } else { 1 },
                            fetch_segment: (!host.no_fetch).then_some(fetch),
                            handshake: (!host.no_handshake).then_some(shake),
                            on_completion: Some(ended),
                            context: null_mut(),
                        },
                        tail: [u8::from(*odd == 4); TAIL],
                    };
                    // One that an older header knew has no devices or functions, and the environment's
                    // provider.
                    let size = longer.known.size;
                    if (16..size_of::<mefa_config>()).contains(&size) {
                        return;
                    }
                    let pointer = if *odd == 5 { null() } else { &raw const longer.known };
                    let to = if *odd == 6 { null_mut() } else { &raw mut out };
                    if check(mefa_install(pointer, to)) {
                        assert!(out != 77 && out != 0);
                        self.transports.push(out);
                        self.live = true;
                        ACCEPTED.store(0, Ordering::SeqCst);
                        ENDED.store(0, Ordering::SeqCst);
                        NOW.store(out, Ordering::SeqCst);
                        self.look();
                        self.plan(host);
                    }
                }
                Call::Uninstall => self.uninstall(transport),
                Call::Register { address, length, location } => {
                    let (address, length) = registrable(address, length);
                    let location = self.keep(location.get());
                    let code = mefa_register(
                        transport,
                        address as *mut c_void,
                        length,
                        location,
                        Some(see_regions),
                        null_mut(),
                    );
                    if check(code) {
                        self.look();
                    }
                }
                Call::RegisterMany(wanted, null_array) => {
                    let wanted: Vec<_> = wanted
                        .iter()
                        .take(16)
                        .map(|(address, length, location)| {
                            let (address, length) = registrable(address, length);
                            let location = self.keep(location.get());
                            mefa_memory { address: address as *mut c_void, length, location }
                        })
                        .collect();
                    let array = if *null_array == 1 { null() } else { wanted.as_ptr() };
                    if check(mefa_register_many(transport, array, wanted.len(), None, null_mut())) {
                        self.look();
                    }
                }
                Call::Unregister(address) => {
                    check(mefa_unregister(transport, address.get() as *mut c_void));
                    self.look();
                }
                Call::UnregisterMany(addresses) => {
                    let all: Vec<_> =
                        addresses.iter().map(|address| address.get() as *mut c_void).collect();
                    check(mefa_unregister_many(transport, all.as_ptr(), all.len()));
                    self.look();
                }
                Call::Describe { as_json: true, function } => {
                    check(mefa_descriptor_json(transport, sink(*function), to_text));
                }
                Call::Describe { as_json: false, function } => {
                    let see = function.then_some(see_segment as _);
                    check(mefa_descriptor(transport, see, null_mut()));
                }
                Call::Open { json, as_struct, null } => {
                    let to = if *null { null_mut() } else { &raw mut out };
                    let code = match json {
                        Json::Built(built) if *as_struct => {
                            self.with_struct(built, |desc| mefa_segment_open(transport, desc, to))
                        }
                        json => {
                            let json = self.json(json);
                            mefa_segment_open_json(transport, pointer(json.as_ref()), to)
                        }
                    };
                    if check(code) {
                        self.segments.push(out);
                    }
                }
                Call::OpenName { name, null } => {
                    let name = self.keep(name.get());
                    let to = if *null { null_mut() } else { &raw mut out };
                    if check(mefa_segment_open_name(transport, name, to)) {
                        self.segments.push(out);
                    }
                }
                Call::Update { segment, json, as_struct } => {
                    let segment = segment.of(&self.segments);
                    let code = match json {
                        Json::Built(built) if *as_struct => self.with_struct(built, |desc| {
                            mefa_segment_update(transport, segment, desc)
                        }),
                        json => {
                            let json = self.json(json);
                            mefa_segment_update_json(transport, segment, pointer(json.as_ref()))
                        }
                    };
                    check(code);
                }
                Call::Close(segment) => {
                    check(mefa_segment_close(transport, segment.of(&self.segments)));
                }
                Call::WarmUp(segment) => {
                    check(mefa_segment_warm_up(transport, segment.of(&self.segments)));
                }
                Call::Answer { json, function } => {
                    let json = self.shake(json);
                    let json = pointer(json.as_ref());
                    check(mefa_handshake_answer(transport, json, sink(*function), to_text));
                }
                Call::Parse { json, function } => {
                    let json = self.shake(json);
                    let see = function.then_some(see_handshake as _);
                    check(mefa_handshake_parse(pointer(json.as_ref()), see, null_mut()));
                }
                Call::Format { fields, size } => {
                    let [a, b, c, d] = fields.each_ref().map(|field| self.keep(field.get()));
                    let longer = Longer {
                        known: mefa_handshake {
                            size: size.get(size_of::<mefa_handshake>()),
                            local_nic_path: a,
                            peer_nic_path: b,
                            efa_addr: c,
                            reply_msg: d,
                        },
                        tail: [0; TAIL],
                    };
                    check(mefa_handshake_format(&raw const longer.known, Some(keep), to_text));
                }
                Call::Allocate { capacity, many, null } => {
                    let capacity =
                        if *many { *capacity as usize * 65536 } else { *capacity as usize % 1024 };
                    let to = if *null { null_mut() } else { &raw mut out };
                    if check(mefa_batch_allocate(transport, capacity, to)) {
                        self.batches.push(out);
                    }
                }
                Call::Free(batch) => {
                    check(mefa_batch_free(transport, batch.of(&self.batches)));
                }
                Call::Submit { batch, requests, timeout, null } => {
                    let requests: Vec<_> = requests
                        .iter()
                        .take(64)
                        .map(|request| mefa_request {
                            opcode: i32::from(!request.read) + i32::from(request.odd == 1),
                            flags: u32::from(request.odd == 2),
                            source: request.source.get(),
                            target: request.target.of(&self.segments),
                            offset: request.offset.get(),
                            length: request.length.get(),
                            cookie: if request.again { AGAIN } else { 0 },
                        })
                        .collect();
                    let array = if *null { std::ptr::null() } else { requests.as_ptr() };
                    let batch = batch.of(&self.batches);
                    // Counted first: they may end before the call does.
                    ACCEPTED.fetch_add(requests.len() as u64, Ordering::SeqCst);
                    let timeout = u64::from(*timeout) * 200_000 + 1;
                    if !check(mefa_submit(transport, batch, array, requests.len(), timeout)) {
                        ACCEPTED.fetch_sub(requests.len() as u64, Ordering::SeqCst);
                    }
                }
                Call::Progress => {
                    check(mefa_progress(transport));
                }
                Call::TaskStatus { batch, task, null } => {
                    let to = if *null { null_mut() } else { &raw mut state };
                    check(mefa_task_status(transport, batch.of(&self.batches), *task as usize, to));
                }
                Call::BatchStatus { batch, null } => {
                    let mut tasks = 0;
                    let to = if *null == 1 { null_mut() } else { &raw mut word };
                    let count = if *null == 2 { null_mut() } else { &raw mut tasks };
                    check(mefa_batch_status(transport, batch.of(&self.batches), to, count));
                }
                Call::TaskError { batch, task, function } => {
                    let batch = batch.of(&self.batches);
                    let task = *task as usize;
                    check(mefa_task_error(transport, batch, task, sink(*function), to_text));
                    assert!(!text.contains(char::is_control), "{text:?}");
                }
                Call::Wait { batch, timeout, null } => {
                    let to = if *null { null_mut() } else { &raw mut word };
                    let timeout = u64::from(*timeout) * 20_000;
                    check(mefa_wait(transport, batch.of(&self.batches), timeout, to));
                }
                Call::Cancel(batch) => {
                    check(mefa_cancel(transport, batch.of(&self.batches)));
                }
                Call::Quiet { batch, null } => {
                    let to = if *null { null_mut() } else { &raw mut word };
                    check(mefa_batch_quiet(transport, batch.of(&self.batches), to));
                }
                Call::WaitQuiet { batch, timeout } => {
                    let timeout = u64::from(*timeout) * 20_000;
                    check(mefa_wait_quiet(transport, batch.of(&self.batches), timeout));
                }
                Call::NicCount { null } => {
                    let mut count = 0;
                    let to = if *null { null_mut() } else { &raw mut count };
                    check(mefa_nic_count(transport, to));
                }
                Call::Stats { nic, size, null } => {
                    let mut longer: Longer<mefa_nic_stats> = std::mem::zeroed();
                    longer.known.size = size.get(size_of::<mefa_nic_stats>());
                    let to = if *null { null_mut() } else { &raw mut longer.known };
                    check(mefa_stats(transport, *nic as usize, to));
                    assert_eq!(longer.tail, [0; TAIL]);
                }
                Call::StatsJson { function } => {
                    if check(mefa_stats_json(transport, sink(*function), to_text)) {
                        serde_json::from_str::<serde_json::Value>(&text).expect("JSON");
                    }
                }
                Call::Misaligned { which } => {
                    let mut words = [0_u64; 32];
                    let odd = words.as_mut_ptr().cast::<u8>().add(1);
                    let code = match which % 5 {
                        0 => mefa_install(odd.cast(), &raw mut out),
                        1 => mefa_segment_open(transport, odd.cast(), &raw mut out),
                        2 => mefa_batch_allocate(transport, 1, odd.cast()),
                        3 => mefa_submit(transport, 0, odd.cast(), 1, 1),
                        _ => mefa_stats(transport, 0, odd.cast()),
                    };
                    assert!(!check(code) && words == [0; 32]);
                }
            }
        }
    }

    /// What the host's functions will answer, now that it is known what we are.
    fn plan(&mut self, host: &Host) {
        let (fetched, shaken) = (self.json(&host.fetched), self.shake(&host.shaken));
        let code = if host.code > 0 { 0 } else { host.code.into() };
        *ANSWERS.lock().unwrap() = (fetched, shaken, code);
    }

    fn uninstall(&mut self, transport: u64) {
        let ours = self.live && self.transports.last() == Some(&transport);
        let code = mefa_uninstall(transport);
        // A slow machine: what is still there must be gone soon, which is looked at in the end.
        let slow = code == mefa_code::Busy as c_int;
        let done = check(code) || slow;
        // SAFETY: a string until the next failing call.
        let error = unsafe { CStr::from_ptr(mefa_last_error()) };
        assert_eq!(done, ours, "{transport:#x}: {code}, {error:?}");
        if done {
            self.live = false;
            // Each accepted request ended once, also those that were under way.
            let (accepted, ended) = (ACCEPTED.load(Ordering::SeqCst), ENDED.load(Ordering::SeqCst));
            assert!(slow || accepted == ended, "{accepted} requests accepted, {ended} ended");
            let mut count = 0;
            // SAFETY: a number of ours.
            assert_eq!(unsafe { mefa_nic_count(transport, &raw mut count) }, -1);
        }
    }
}

/// Threads of the library's.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    tasks.flatten().flat_map(name).filter(|name| name.starts_with("mefa-")).count()
}

/// Open files of the process: what each is. No pipes: neither we nor libfabric use them, and the
/// sanitizer starts a process that it talks to by two. No sockets: libfabric's `tcp` forgets that of a
/// connection that comes in while the endpoint is closed (seen with 1.17 and 2.7).
fn files() -> Vec<String> {
    let files = std::fs::read_dir("/proc/self/fd").expect("procfs").flatten();
    let links = files.flat_map(|file| std::fs::read_link(file.path()));
    let links = links.map(|link| link.display().to_string());
    links.filter(|link| !link.starts_with("pipe:") && !link.starts_with("socket:")).collect()
}

/// Small queues: a transport costs a fraction of what it would by default, so that there are more runs.
fn keep_it_small() {
    for (name, value) in [
        ("MC_MAX_WR", "64"),
        ("MC_MAX_CQE_PER_CTX", "256"),
        ("MC_MAX_EP_PER_CTX", "64"),
        ("FI_SHM_TX_SIZE", "64"),
        ("FI_SHM_RX_SIZE", "64"),
        ("FI_OFI_RXM_TX_SIZE", "64"),
        ("FI_OFI_RXM_RX_SIZE", "64"),
    ] {
        // SAFETY: nobody else is there yet who could read the environment.
        unsafe { std::env::set_var(name, value) };
    }
}

/// Makes room for the sockets that are forgotten.
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to the maximum");
}

fn run(run: &Run) {
    let mut caller = Caller::default();
    let usual = usual(run.shm);
    let usual = usual.iter().take(usize::from(run.usual) % (usual.len() + 1));
    for (transport, call) in usual.chain(run.calls.iter().take(CALLS)) {
        let transport = transport.of(&caller.transports);
        caller.call(transport, call, &run.host);
    }
    if caller.live {
        let last = *caller.transports.last().expect("it is live");
        caller.uninstall(last);
    }
}

/// A sequence of C calls, as [`Run`] reads the bytes.
pub fn capi(data: &[u8]) {
    static ONE: Mutex<Option<Vec<String>>> = Mutex::new(None);
    let Ok(input) = Run::arbitrary_take_rest(Unstructured::new(data)) else { return };
    // To understand an input that was found.
    if std::env::var_os("FUZZ_SHOW").is_some() {
        eprintln!("{input:#?}");
    }
    let mut known = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // libfabric opens some files for good with its first endpoint.
    let before = known.get_or_insert_with(|| {
        keep_it_small();
        allow_many_files();
        // SAFETY: it only looks at what it is given.
        unsafe { mefa_log_to(Some(ignore_log), null_mut()) };
        for shm in [true, false] {
            let host = Host {
                fetched: Json::Own,
                shaken: Shake::Own,
                code: 0,
                no_fetch: false,
                no_handshake: false,
            };
            run(&Run { host, usual: USUAL, shm, calls: Vec::new() });
        }
        files()
    });
    run(&input);
    // One that was joined is seen a moment longer.
    let limit = Instant::now() + Duration::from_secs(20);
    while threads() > 0 {
        assert!(Instant::now() < limit, "threads of a transport that is gone");
        std::thread::sleep(Duration::from_millis(1));
    }
    let now = files();
    assert!(now.len() <= before.len(), "open files: {now:?}, at first {before:?}");
}

/// Calls of a usual life.
const USUAL: u8 = 7;

/// A life as it should be, each call with its transport.
fn usual(shm: bool) -> [(Pick, Call); USUAL as usize] {
    let name = || Text::Known(0);
    let last = || Pick(0, 0);
    let request = |read| Request {
        read,
        odd: 0,
        source: Address::Inside(0),
        target: last(),
        offset: Address::Inside(4096),
        length: Length::Page(1),
        again: true,
    };
    let requests = vec![request(false), request(true)];
    [
        Call::Install { shm, name: name(), topology: name(), odd: 0, size: Size(0, 0) },
        Call::Register { address: Address::Inside(0), length: Length::Whole, location: Text::Null },
        Call::Open { json: Json::Own, as_struct: false, null: false },
        Call::WarmUp(last()),
        Call::Allocate { capacity: 4, many: false, null: false },
        Call::Submit { batch: last(), requests, timeout: 255, null: false },
        Call::Wait { batch: last(), timeout: 255, null: false },
    ]
    .map(|call| (last(), call))
}
