//! libsoftefa.so as rdma-core's users see it: loaded at run time, its functions found by name.
//!
//! Each test binary is one process of the cluster, on host 0, with two NICs. Queue pairs on the two
//! talk to each other through the same code as those of two processes. The tests take turns.

// No test binary uses all of it.
#![allow(dead_code)]

#[allow(non_camel_case_types, non_snake_case, missing_docs, clippy::all)]
#[path = "../../src/verbs.rs"]
pub mod verbs;

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::ptr;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libloading::Library;
use parking_lot::{Mutex, MutexGuard};
use softefa_core::cluster::Cluster;
use softefa_core::rules::Script;
use softefa_core::stat::{self, Nic};
use verbs::*;

/// What a peer that does not answer is given, as the tests set it.
pub const DEAD: Duration = Duration::from_millis(200);
/// No test waits longer for what must come, on whatever machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The qkey of all queue pairs here.
pub const QKEY: u32 = 0x1234_5678;
/// Bytes of a packet.
pub const MTU: usize = softefa_core::shared::MTU;
/// Depth of [`side`]'s queues.
pub const DEPTH: u32 = 16;
/// Everything allowed.
pub const ALL: u32 = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;

/// Set in the processes that tests start.
const IS_CHILD: &str = "SOFTEFA_TEST_CHILD";

// --------------------------------------------------------------------------- the library

/// `efadv_cq`.
#[repr(C)]
pub struct DvCq {
    pub comp_mask: u64,
    pub wc_read_sgid: unsafe extern "C" fn(*mut DvCq, *mut ibv_gid) -> c_int,
    pub wc_is_unsolicited: unsafe extern "C" fn(*mut DvCq) -> bool,
}

/// `efadv_qp_init_attr`.
#[repr(C)]
#[derive(Default)]
pub struct DvQpAttr {
    pub comp_mask: u64,
    pub driver_qp_type: u32,
    pub flags: u16,
    pub sl: u8,
    pub reserved: u8,
}

/// `efadv_cq_attr`.
#[repr(C)]
pub struct CqAttr {
    pub comp_mask: u64,
    pub buffer: *mut u8,
    pub entry_size: u32,
    pub num_entries: u32,
    pub doorbell: *mut u32,
}

/// `efadv_wq_attr`.
#[repr(C)]
pub struct WqAttr {
    pub comp_mask: u64,
    pub buffer: *mut u8,
    pub entry_size: u32,
    pub num_entries: u32,
    pub doorbell: *mut u32,
    pub max_batch: u32,
    pub caps: u16,
    pub reserved: [u8; 2],
}

macro_rules! functions {
    ($($name:ident($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions.
        pub struct Api {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }
        impl Api {
            fn load(path: &Path) -> Api {
                // SAFETY: its initialisers do nothing that a test minds.
                let library = unsafe { Library::new(path) }.unwrap_or_else(|error| {
                    panic!("{error}: `cargo build --release -p softefa-preload` first, and test with --release")
                });
                // It is never unloaded: it has a thread.
                let library = Box::leak(Box::new(library));
                // SAFETY: the types are those of rdma-core's headers.
                unsafe { Api { $($name: *library.get(stringify!($name).as_bytes()).unwrap(),)* } }
            }
        }
    };
}

functions! {
    ibv_get_device_list(*mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list(*mut *mut ibv_device) -> ();
    ibv_open_device(*mut ibv_device) -> *mut ibv_context;
    ibv_close_device(*mut ibv_context) -> c_int;
    ibv_get_async_event(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ibv_query_gid(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
    ibv_query_port(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    ibv_alloc_pd(*mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd(*mut ibv_pd) -> c_int;
    ibv_reg_mr(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    ibv_reg_dmabuf_mr(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
    ibv_dereg_mr(*mut ibv_mr) -> c_int;
    ibv_create_ah(*mut ibv_pd, *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_destroy_ah(*mut ibv_ah) -> c_int;
    efadv_query_ah(*mut ibv_ah, *mut efadv_ah_attr, u32) -> c_int;
    ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
    ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ibv_ack_cq_events(*mut ibv_cq, u32) -> ();
    ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    efadv_cq_from_ibv_cq_ex(*mut ibv_cq_ex) -> *mut DvCq;
    efadv_query_cq(*mut ibv_cq, *mut CqAttr, u32) -> c_int;
    ibv_destroy_cq(*mut ibv_cq) -> c_int;
    ibv_create_qp(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    efadv_create_qp_ex(*mut ibv_context, *mut ibv_qp_init_attr_ex, *mut DvQpAttr, u32) -> *mut ibv_qp;
    ibv_modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    efadv_query_qp_wqs(*mut ibv_qp, *mut WqAttr, *mut WqAttr, u32) -> c_int;
    ibv_destroy_qp(*mut ibv_qp) -> c_int;
}

/// The library, in an environment that is the tests' own.
pub fn api() -> &'static Api {
    static API: OnceLock<Api> = OnceLock::new();
    API.get_or_init(|| {
        if std::env::var_os(IS_CHILD).is_none() {
            // SAFETY: Rust's own readers of the environment are locked out, and C's are the
            // library's, which is not yet loaded.
            unsafe { settings(&own_dir(), |name, value| std::env::set_var(name, value)) };
        }
        let program = std::env::current_exe().unwrap();
        let ours = program.parent().unwrap().parent().unwrap().join("libsoftefa.so");
        Api::load(&std::env::var_os("SOFTEFA_LIBRARY").map_or(ours, PathBuf::from))
    })
}

fn settings(dir: &Path, mut set: impl FnMut(&str, &str)) {
    set("SOFTEFA_DIR", dir.to_str().unwrap());
    for (name, value) in [
        ("SOFTEFA_HOST", "0"),
        ("SOFTEFA_DEVICES", "2"),
        ("SOFTEFA_PROFILE", ""),
        ("SOFTEFA_DATA_PATH", "verbs"),
        ("SOFTEFA_DEAD_MS", "200"),
        ("SOFTEFA_RX_WR", "256"),
        ("SOFTEFA_TX_WR", "64"),
        ("SOFTEFA_MAX_RDMA", "0x200000"),
    ] {
        set(name, value);
    }
}

/// This process's directory, removed when it ends.
fn own_dir() -> PathBuf {
    static DIR: OnceLock<(PathBuf, u32)> = OnceLock::new();
    extern "C" fn remove() {
        // A child after fork leaves its parent's directory alone.
        if let Some((dir, _)) = DIR.get().filter(|(_, pid)| *pid == std::process::id()) {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
    let make = || {
        // SAFETY: a function that stays.
        unsafe { libc::atexit(remove) };
        (tempfile::tempdir_in("/dev/shm").unwrap().keep(), std::process::id())
    };
    DIR.get_or_init(make).0.clone()
}

/// The directory of the cluster that this process is in.
pub fn dir() -> PathBuf {
    api();
    std::env::var_os("SOFTEFA_DIR").unwrap().into()
}

pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::look(&dir()).unwrap())
}

/// Replaces the fault rules.
pub fn set_faults(text: &str) {
    Script::parse(text).unwrap();
    cluster().set_faults(text).unwrap();
}

/// What the NIC has counted.
pub fn nic_stat(host: u16, nic: u16) -> Nic {
    let all = stat::read(cluster()).unwrap();
    all.into_iter().find(|one| (one.host, one.nic) == (host, nic)).expect("no such NIC")
}

/// The right to use the devices: one test at a time has it, and begins without faults.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let guard = TURN.lock();
    set_faults("");
    guard
}

// --------------------------------------------------------------------------- objects

fn checked(result: c_int) {
    // A second panic would hide the first.
    if !std::thread::panicking() {
        assert_eq!(result, 0);
    }
}

/// An opened NIC, with a protection domain.
pub struct Device {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
}

impl Device {
    pub fn open(nic: usize) -> Rc<Device> {
        let api = api();
        // SAFETY: as rdma-core's manual pages want it; so in all that follows here.
        unsafe {
            let mut count = 0;
            let list = (api.ibv_get_device_list)(&mut count);
            assert!(nic < count as usize, "{count} devices");
            let context = (api.ibv_open_device)(*list.add(nic));
            assert!(!context.is_null());
            (api.ibv_free_device_list)(list);
            Rc::new(Device { context, pd: (api.ibv_alloc_pd)(context) })
        }
    }
    pub fn gid(&self) -> [u8; 16] {
        let mut gid = ibv_gid { raw: [0; 16] };
        // SAFETY: see open.
        unsafe {
            assert_eq!((api().ibv_query_gid)(self.context, 1, 0, &mut gid), 0);
            gid.raw
        }
    }
    pub fn ops(&self) -> &ibv_context_ops {
        // SAFETY: see open.
        unsafe { &(*self.context).ops }
    }
    pub fn port_state(&self) -> ibv_port_state {
        // SAFETY: see open; zeroes are a value of this struct of numbers.
        unsafe {
            let mut attr: ibv_port_attr = mem::zeroed();
            assert_eq!((api().ibv_query_port)(self.context, 1, &mut attr), 0);
            attr.state
        }
    }
    /// The next asynchronous event, which must come.
    pub fn event(&self) -> ibv_event_type {
        // SAFETY: see open; zeroes are a value.
        unsafe {
            assert!(readable((*self.context).async_fd, PATIENCE), "no asynchronous event");
            let mut event: ibv_async_event = mem::zeroed();
            assert_eq!((api().ibv_get_async_event)(self.context, &mut event), 0);
            event.event_type
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: see open; what was made of it is gone, as that holds an Rc.
        unsafe {
            checked((api().ibv_dealloc_pd)(self.pd));
            checked((api().ibv_close_device)(self.context));
        }
    }
}

/// Is there something to read, within that time?
pub fn readable(fd: c_int, within: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one struct of ours.
    unsafe { libc::poll(&mut poll, 1, within.as_millis() as c_int) == 1 }
}

/// A completion, as all the read functions together tell it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    pub id: u64,
    /// The device's, from read_vendor_err.
    pub status: u32,
    /// The verbs', from the queue's field.
    pub wc_status: ibv_wc_status,
    pub opcode: ibv_wc_opcode,
    pub length: usize,
    pub imm: Option<u32>,
    pub qp: u32,
    pub source_qp: u32,
    pub slid: u32,
    pub sgid: Option<[u8; 16]>,
    pub is_unsolicited: bool,
}

pub struct Cq {
    pub cq: *mut ibv_cq_ex,
    pub device: Rc<Device>,
}

impl Cq {
    pub fn new(device: &Rc<Device>, entries: u32) -> Rc<Cq> {
        Cq::with_channel(device, entries, ptr::null_mut(), ptr::null_mut())
    }
    pub fn with_channel(
        device: &Rc<Device>,
        entries: u32,
        channel: *mut ibv_comp_channel,
        cq_context: *mut c_void,
    ) -> Rc<Cq> {
        // SAFETY: see Device::open.
        let cq = unsafe {
            (api().ibv_create_cq)(device.context, entries as c_int, cq_context, channel, 0)
        };
        assert!(!cq.is_null());
        Rc::new(Cq { cq: cq.cast(), device: device.clone() })
    }
    /// One completion, or what start_poll said: ENOENT, EINVAL.
    pub fn poll(&self) -> Result<Completion, c_int> {
        // SAFETY: see Device::open.
        unsafe {
            let cq = self.cq;
            let mut attr: ibv_poll_cq_attr = mem::zeroed();
            match (*cq).start_poll.unwrap()(cq, &mut attr) {
                0 => {}
                error => return Err(error),
            }
            let dv = (api().efadv_cq_from_ibv_cq_ex)(cq);
            let has_imm = (*cq).read_wc_flags.unwrap()(cq) & IBV_WC_WITH_IMM != 0;
            let opcode = (*cq).read_opcode.unwrap()(cq);
            let mut completion = Completion {
                id: (*cq).wr_id,
                status: (*cq).read_vendor_err.unwrap()(cq),
                wc_status: (*cq).status,
                opcode,
                qp: (*cq).read_qp_num.unwrap()(cq),
                ..Completion::default()
            };
            if opcode & IBV_WC_RECV != 0 {
                let mut gid = ibv_gid { raw: [0; 16] };
                completion.length = (*cq).read_byte_len.unwrap()(cq) as usize;
                completion.imm = has_imm.then(|| (*cq).read_imm_data.unwrap()(cq));
                completion.source_qp = (*cq).read_src_qp.unwrap()(cq);
                completion.slid = (*cq).read_slid.unwrap()(cq);
                completion.sgid = ((*dv).wc_read_sgid)(dv, &mut gid).eq(&0).then_some(gid.raw);
                completion.is_unsolicited = ((*dv).wc_is_unsolicited)(dv);
            }
            (*cq).end_poll.unwrap()(cq);
            Ok(completion)
        }
    }
    /// The next completion, which must come.
    pub fn wait(&self) -> Completion {
        let begun = Instant::now();
        loop {
            match self.poll() {
                Ok(completion) => return completion,
                Err(libc::ENOENT) => assert!(begun.elapsed() < PATIENCE, "no completion came"),
                Err(error) => panic!("start_poll: {error}"),
            }
        }
    }
    /// Nothing there now.
    pub fn is_empty(&self) -> bool {
        self.poll() == Err(libc::ENOENT)
    }
    /// Asks for an event.
    pub fn arm(&self) {
        // SAFETY: see Device::open.
        unsafe { assert_eq!(self.device.ops().req_notify_cq.unwrap()(self.cq.cast(), 0), 0) };
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: see Device::open; its queue pairs are gone, as they hold an Rc.
        unsafe { checked((api().ibv_destroy_cq)(self.cq.cast())) };
    }
}

/// Registered memory.
pub struct Region {
    pub bytes: Box<[u8]>,
    mr: *mut ibv_mr,
    _device: Rc<Device>,
}

impl Region {
    /// None: the device refused with ENOMEM.
    pub fn try_new(device: &Rc<Device>, size: usize, access: u32) -> Option<Region> {
        let mut bytes = vec![0; size].into_boxed_slice();
        let at = bytes.as_mut_ptr().cast();
        // SAFETY: see Device::open.
        let mr = unsafe { (api().ibv_reg_mr)(device.pd, at, size, access as c_int) };
        if mr.is_null() {
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOMEM));
            return None;
        }
        Some(Region { bytes, mr, _device: device.clone() })
    }
    pub fn new(device: &Rc<Device>, size: usize, access: u32) -> Region {
        Region::try_new(device, size, access).unwrap()
    }
    pub fn key(&self) -> u32 {
        // SAFETY: registered.
        unsafe { (*self.mr).rkey }
    }
    pub fn address(&self) -> u64 {
        self.bytes.as_ptr() as u64
    }
    pub fn sge(&self, from: usize, length: usize) -> ibv_sge {
        ibv_sge { addr: self.address() + from as u64, length: length as u32, lkey: self.key() }
    }
    /// What is there now, whoever wrote it: never through a reference that says nobody does.
    pub fn read(&self, from: usize, length: usize) -> Vec<u8> {
        assert!(from + length <= self.bytes.len());
        // SAFETY: within the memory.
        (from..from + length)
            .map(|at| unsafe { self.bytes.as_ptr().add(at).read_volatile() })
            .collect()
    }
    pub fn fill(&mut self, from: usize, bytes: &[u8]) {
        self.bytes[from..from + bytes.len()].copy_from_slice(bytes);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: see Device::open.
        unsafe { checked((api().ibv_dereg_mr)(self.mr)) };
    }
}

/// Memory that is registered by its file alone.
pub struct FileRegion {
    mr: *mut ibv_mr,
    _device: Rc<Device>,
}

impl FileRegion {
    /// `length` bytes from `offset` on, which peers call `iova`; the error if it is refused.
    pub fn new(
        device: &Rc<Device>,
        file: &File,
        offset: u64,
        length: usize,
        iova: u64,
    ) -> Result<FileRegion, c_int> {
        // SAFETY: see Device::open.
        let mr = unsafe {
            let fd = file.as_raw_fd();
            (api().ibv_reg_dmabuf_mr)(device.pd, offset, length, iova, fd, ALL as c_int)
        };
        if mr.is_null() {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
        }
        Ok(FileRegion { mr, _device: device.clone() })
    }
    pub fn key(&self) -> u32 {
        // SAFETY: registered.
        unsafe { (*self.mr).rkey }
    }
}

impl Drop for FileRegion {
    fn drop(&mut self) {
        // SAFETY: see Device::open.
        unsafe { checked((api().ibv_dereg_mr)(self.mr)) };
    }
}

/// An address handle.
pub struct Ah {
    pub ah: *mut ibv_ah,
    _device: Rc<Device>,
}

impl Ah {
    pub fn new(device: &Rc<Device>, gid: [u8; 16]) -> Ah {
        // SAFETY: see Device::open; zeroes are a value of this struct of numbers.
        unsafe {
            let mut attr: ibv_ah_attr = mem::zeroed();
            attr.is_global = 1;
            attr.port_num = 1;
            attr.grh.dgid.raw = gid;
            let ah = (api().ibv_create_ah)(device.pd, &mut attr);
            assert!(!ah.is_null());
            Ah { ah, _device: device.clone() }
        }
    }
    pub fn number(&self) -> u32 {
        // SAFETY: as above.
        unsafe {
            let mut attr: efadv_ah_attr = mem::zeroed();
            let size = size_of::<efadv_ah_attr>() as u32;
            assert_eq!((api().efadv_query_ah)(self.ah, &mut attr, size), 0);
            attr.ahn.into()
        }
    }
}

impl Drop for Ah {
    fn drop(&mut self) {
        // SAFETY: see Device::open.
        unsafe { checked((api().ibv_destroy_ah)(self.ah)) };
    }
}

/// What a work request does. Immediate data as in memory, and so big-endian by the book.
#[derive(Clone, Copy)]
pub enum Op {
    Send,
    SendImm(u32),
    Read { key: u32, from: u64 },
    Write { key: u32, to: u64 },
    WriteImm { key: u32, to: u64, imm: u32 },
}

/// Where a work request's data is.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    Inline(&'a [u8]),
    Buffers(&'a [ibv_sge]),
}

/// To whom it goes.
#[derive(Clone, Copy)]
pub struct To {
    pub ah: *mut ibv_ah,
    pub qp: u32,
    pub qkey: u32,
}

/// A kind of queue pair.
#[derive(Clone, Copy, Default)]
pub struct Kind {
    pub is_ud: bool,
    pub unsolicited: bool,
    /// 0: [`DEPTH`].
    pub send_wr: u32,
    pub recv_wr: u32,
}

pub struct QueuePair {
    pub qp: *mut ibv_qp_ex,
    pub cq: Rc<Cq>,
}

impl QueuePair {
    pub fn new(cq: &Rc<Cq>, kind: Kind) -> QueuePair {
        let device = &cq.device;
        let depth = |wanted| if wanted == 0 { DEPTH } else { wanted };
        // SAFETY: see Device::open; zeroes are a value of structs of numbers and pointers.
        let qp = unsafe {
            let cap = ibv_qp_cap {
                max_send_wr: depth(kind.send_wr),
                max_recv_wr: depth(kind.recv_wr),
                max_send_sge: 2,
                max_recv_sge: 2,
                max_inline_data: 32,
            };
            if kind.is_ud {
                let mut attr: ibv_qp_init_attr = mem::zeroed();
                (attr.send_cq, attr.recv_cq) = (cq.cq.cast(), cq.cq.cast());
                (attr.cap, attr.qp_type) = (cap, IBV_QPT_UD);
                (api().ibv_create_qp)(device.pd, &mut attr)
            } else {
                let mut attr: ibv_qp_init_attr_ex = mem::zeroed();
                (attr.send_cq, attr.recv_cq) = (cq.cq.cast(), cq.cq.cast());
                (attr.cap, attr.qp_type, attr.pd) = (cap, IBV_QPT_DRIVER, device.pd);
                let mut dv = DvQpAttr { flags: kind.unsolicited.into(), ..DvQpAttr::default() };
                let size = size_of::<DvQpAttr>() as u32;
                (api().efadv_create_qp_ex)(device.context, &mut attr, &mut dv, size)
            }
        };
        assert!(!qp.is_null());
        QueuePair { qp: qp.cast(), cq: cq.clone() }
    }
    /// One that receives.
    pub fn ready(cq: &Rc<Cq>, kind: Kind) -> QueuePair {
        let qp = QueuePair::new(cq, kind);
        qp.set_state(IBV_QPS_RTS);
        qp
    }
    fn modify(&self, mask: u32, change: impl FnOnce(&mut ibv_qp_attr)) {
        // SAFETY: see Device::open; zeroes are a value.
        unsafe {
            let mut attr: ibv_qp_attr = mem::zeroed();
            change(&mut attr);
            assert_eq!((api().ibv_modify_qp)(self.qp.cast(), &mut attr, mask as c_int), 0);
        }
    }
    pub fn set_state(&self, state: ibv_qp_state) {
        self.modify(IBV_QP_STATE | IBV_QP_QKEY, |attr| {
            (attr.qp_state, attr.qkey) = (state, QKEY);
        });
    }
    pub fn set_rnr_retry(&self, retries: u8) {
        self.modify(IBV_QP_RNR_RETRY, |attr| attr.rnr_retry = retries);
    }
    pub fn number(&self) -> u32 {
        // SAFETY: not destroyed.
        unsafe { (*self.qp).qp_base.qp_num }
    }

    /// Begins a batch of work requests.
    pub fn start(&self) {
        // SAFETY: see Device::open.
        unsafe { (*self.qp).wr_start.unwrap()(self.qp) }
    }
    /// One of a batch.
    pub fn add(&self, id: u64, is_signalled: bool, op: Op, data: Data, to: To) {
        // SAFETY: see Device::open.
        unsafe {
            let qp = self.qp;
            (*qp).wr_id = id;
            (*qp).wr_flags = if is_signalled { IBV_SEND_SIGNALED } else { 0 };
            match op {
                Op::Send => (*qp).wr_send.unwrap()(qp),
                Op::SendImm(imm) => (*qp).wr_send_imm.unwrap()(qp, imm),
                Op::Read { key, from } => (*qp).wr_rdma_read.unwrap()(qp, key, from),
                Op::Write { key, to } => (*qp).wr_rdma_write.unwrap()(qp, key, to),
                Op::WriteImm { key, to, imm } => (*qp).wr_rdma_write_imm.unwrap()(qp, key, to, imm),
            }
            match data {
                Data::Inline(bytes) => {
                    let at = bytes.as_ptr().cast_mut().cast();
                    (*qp).wr_set_inline_data.unwrap()(qp, at, bytes.len());
                }
                Data::Buffers([one]) => {
                    (*qp).wr_set_sge.unwrap()(qp, one.lkey, one.addr, one.length);
                }
                Data::Buffers(list) => {
                    (*qp).wr_set_sge_list.unwrap()(qp, list.len(), list.as_ptr());
                }
            }
            (*qp).wr_set_ud_addr.unwrap()(qp, to.ah, to.qp, to.qkey);
        }
    }
    pub fn complete(&self) -> c_int {
        // SAFETY: see Device::open.
        unsafe { (*self.qp).wr_complete.unwrap()(self.qp) }
    }
    pub fn abort(&self) {
        // SAFETY: see Device::open.
        unsafe { (*self.qp).wr_abort.unwrap()(self.qp) }
    }
    /// One signalled work request; the errno of wr_complete.
    pub fn post(&self, id: u64, op: Op, data: Data, to: To) -> c_int {
        self.start();
        self.add(id, true, op, data, to);
        self.complete()
    }
    /// Receives, in one list, with ids that count from `id`. If not all: the error, and the id of
    /// the one that was refused.
    pub fn receive(&self, id: u64, lists: &[&[ibv_sge]]) -> Result<(), (c_int, u64)> {
        let mut requests: Vec<ibv_recv_wr> = (id..)
            .zip(lists)
            .map(|(wr_id, list)| ibv_recv_wr {
                wr_id,
                next: ptr::null_mut(),
                sg_list: list.as_ptr().cast_mut(),
                num_sge: list.len() as c_int,
            })
            .collect();
        let first = requests.as_mut_ptr();
        for k in 1..requests.len() {
            // SAFETY: within the vector.
            requests[k - 1].next = unsafe { first.add(k) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: see Device::open.
        unsafe {
            match self.cq.device.ops().post_recv.unwrap()(self.qp.cast(), first, &mut bad) {
                0 => Ok(()),
                error => Err((error, (*bad).wr_id)),
            }
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: see Device::open.
        unsafe { checked((api().ibv_destroy_qp)(self.qp.cast())) };
    }
}

// --------------------------------------------------------------------------- two ends

/// One end: a NIC with a queue pair, its completion queue, and memory.
pub struct Side {
    pub qp: QueuePair,
    pub cq: Rc<Cq>,
    pub region: Region,
    /// Of the other side.
    pub ah: Option<Ah>,
    pub device: Rc<Device>,
}

/// One end on this NIC, with 64 KiB of memory: the k-th byte is k % 251 + `nic`.
pub fn side(nic: usize, kind: Kind) -> Side {
    let device = Device::open(nic);
    let cq = Cq::new(&device, 256);
    let qp = QueuePair::ready(&cq, kind);
    let mut region = Region::new(&device, 64 << 10, ALL);
    region.bytes.iter_mut().enumerate().for_each(|(k, byte)| *byte = (k % 251 + nic) as u8);
    Side { qp, cq, region, ah: None, device }
}

/// Both ends, which know each other, and the turn.
pub fn pair() -> (MutexGuard<'static, ()>, Side, Side) {
    pair_of(Kind::default())
}

pub fn pair_of(kind: Kind) -> (MutexGuard<'static, ()>, Side, Side) {
    let turn = turn();
    let (mut a, mut b) = (side(0, kind), side(1, kind));
    a.ah = Some(Ah::new(&a.device, b.device.gid()));
    b.ah = Some(Ah::new(&b.device, a.device.gid()));
    (turn, a, b)
}

impl Side {
    /// The address of a queue pair where our handle points.
    pub fn to(&self, qp: u32) -> To {
        To { ah: self.ah.as_ref().expect("no address handle").ah, qp, qkey: QKEY }
    }
    /// Posts one signalled work request to the other side.
    pub fn post(&self, other: &Side, id: u64, op: Op, data: Data) -> c_int {
        self.qp.post(id, op, data, self.to(other.qp.number()))
    }
    /// Posts it with `length` bytes of our memory, and waits for the completion.
    pub fn run(&self, other: &Side, op: Op, from: usize, length: usize) -> Completion {
        let sge = self.region.sge(from, length);
        assert_eq!(self.post(other, 77, op, Data::Buffers(&[sge])), 0);
        let completion = self.cq.wait();
        assert_eq!((completion.id, completion.qp), (77, self.qp.number()));
        completion
    }
    /// Its status only.
    pub fn status(&self, other: &Side, op: Op, from: usize, length: usize) -> u32 {
        self.run(other, op, from, length).status
    }
    /// Posts one receive of `length` bytes at `from` of our memory.
    pub fn receive(&self, id: u64, from: usize, length: usize) {
        self.qp.receive(id, &[&[self.region.sge(from, length)]]).unwrap();
    }
    /// A write to `at` of our memory, for the other side.
    pub fn write_at(&self, at: usize) -> Op {
        Op::Write { key: self.region.key(), to: self.region.address() + at as u64 }
    }
    pub fn write_imm_at(&self, at: usize, imm: u32) -> Op {
        Op::WriteImm { key: self.region.key(), to: self.region.address() + at as u64, imm }
    }
    pub fn read_at(&self, at: usize) -> Op {
        Op::Read { key: self.region.key(), from: self.region.address() + at as u64 }
    }
}

// --------------------------------------------------------------------------- other processes

/// The test of that name in this binary, as a process of its own that ends with its parent.
fn command(test: &str, dir: &Path, env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"]);
    settings(dir, |name, value| {
        command.env(name, value);
    });
    command.env(IS_CHILD, test).envs(env.iter().copied());
    // SAFETY: one system call.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command
}

/// Runs a test in a fresh cluster of its own, in this environment.
pub fn run_alone(test: &str, env: &[(&str, &str)], faults: &str) -> (Output, tempfile::TempDir) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    Cluster::look(dir.path()).unwrap().set_faults(faults).unwrap();
    let output = command(test, dir.path(), env).output().unwrap();
    (output, dir)
}

/// For a test that needs other settings: true in a process that has them, where it is to go on.
/// Elsewhere that process has been run, and its success checked.
pub fn alone(test: &str, env: &[(&str, &str)]) -> bool {
    if is_child(test) {
        return true;
    }
    let (output, _dir) = run_alone(test, env, "");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{test} alone: {}\n{out}\n{err}", output.status);
    assert!(out.contains("1 passed"), "{test} did not run\n{out}\n{err}");
    false
}

/// Is this the process that was started to run that test?
pub fn is_child(test: &str) -> bool {
    std::env::var(IS_CHILD).is_ok_and(|name| name == test)
}

/// Begins the lines of a child that are meant for its parent.
const MARK: &str = "@@";

/// Says something to the parent.
pub fn tell(words: &[u64]) {
    let words: Vec<String> = words.iter().map(u64::to_string).collect();
    println!("{MARK} {}", words.join(" "));
}

/// Numbers of a line from the parent.
pub fn hear() -> Vec<u64> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    numbers(&line)
}

fn numbers(line: &str) -> Vec<u64> {
    line.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// What a child told, in the order in which it did.
pub fn told(output: &Output) -> Vec<Vec<u64>> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| Some(numbers(line.split_once(MARK)?.1))).collect()
}

/// A process of the same cluster, killed at the end.
pub struct Other {
    pub child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Other {
    /// Starts the test of that name on that host.
    pub fn start(test: &str, host: u16) -> Other {
        let mut command = command(test, &dir(), &[("SOFTEFA_HOST", &host.to_string())]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Other { child, input, output }
    }
    /// The next that it tells.
    pub fn hear(&mut self) -> Vec<u64> {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the other process has ended");
            if let Some((_, text)) = line.split_once(MARK) {
                return numbers(text);
            }
        }
    }
    pub fn tell(&mut self, words: &[u64]) {
        let words: Vec<String> = words.iter().map(u64::to_string).collect();
        writeln!(self.input, "{}", words.join(" ")).unwrap();
    }
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
