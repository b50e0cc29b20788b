//! libfabric's objects. Each holds what it was made from, so it closes before it.

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use super::bindings as ffi;
use super::info::AddressForm;
use super::{Dmabuf, Info, Libfabric, Memory};
use crate::error::{Code, Error, Result};

/// Longest endpoint address we handle; libfabric's are 16 to 64 bytes.
pub(super) const MAX_NAME: usize = 256;

/// Calls a function of an object's table, or evaluates to `-FI_ENOSYS` where the provider has none.
macro_rules! call {
    ($object:expr, $table:ident . $function:ident ( $($argument:expr),* )) => {
        match (*(*$object).$table).$function {
            Some(function) => function($($argument),*),
            None => -(ffi::FI_ENOSYS as i32) as _,
        }
    };
}

/// Closes an object; a refusal is logged, since nothing else can be done about it.
///
/// # Safety
/// `fid` is open, closed only once, and nothing made from it is still open.
unsafe fn close(fid: *mut ffi::fid, what: &str) {
    // SAFETY: an open object always has its function table.
    let ret: c_int = unsafe { call!(fid, ops.close(fid)) };
    if ret != 0 {
        log::warn!("closing a libfabric {what} failed: error {ret}");
    }
}

/// A fabric: the network that domains are opened on.
pub struct Fabric {
    raw: NonNull<ffi::fid_fabric>,
    lib: &'static Libfabric,
}

// SAFETY: fabrics are thread-safe in libfabric under every threading level.
unsafe impl Send for Fabric {}
// SAFETY: as above.
unsafe impl Sync for Fabric {}

impl Fabric {
    /// Opens the fabric that `info` names.
    pub fn open(info: &Info) -> Result<Arc<Self>> {
        let mut raw = null_mut();
        // SAFETY: `info` is whole; fi_fabric reads its fabric_attr and writes one pointer.
        let ret =
            unsafe { (info.lib.fabric)(info.raw.as_ref().fabric_attr, &raw mut raw, null_mut()) };
        let raw = opened(info.lib, "fi_fabric", ret, raw)?;
        Ok(Arc::new(Self { raw, lib: info.lib }))
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        // SAFETY: every object made from the fabric holds an Arc of it, so they are gone.
        unsafe { close(&raw mut (*self.raw.as_ptr()).fid, "fabric") }
    }
}

/// A domain: one network device, opened.
pub struct Domain {
    raw: NonNull<ffi::fid_domain>,
    fabric: Arc<Fabric>,
    addresses: AddressForm,
}

// SAFETY: FI_THREAD_DOMAIN asks that one thread at a time uses the domain and its objects; the nic
// room keeps them all behind one lock (see the module's documentation).
unsafe impl Send for Domain {}
// SAFETY: as above: the Arcs that make this necessary live inside one nic.
unsafe impl Sync for Domain {}

impl Domain {
    /// Opens the domain that `info` describes.
    pub fn open(fabric: &Arc<Fabric>, info: &Info) -> Result<Arc<Self>> {
        let mut raw = null_mut();
        // SAFETY: the fabric is open; `info` is whole and outlives the call.
        let ret: c_int = unsafe {
            let fabric = fabric.raw.as_ptr();
            call!(fabric, ops.domain(fabric, info.raw.as_ptr(), &raw mut raw, null_mut()))
        };
        let raw = opened(fabric.lib, "fi_domain", ret, raw)?;
        Ok(Arc::new(Self { raw, fabric: fabric.clone(), addresses: info.address_form() }))
    }

    fn lib(&self) -> &'static Libfabric {
        self.fabric.lib
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: every object made from the domain holds an Arc of it, so they are gone.
        unsafe { close(&raw mut (*self.raw.as_ptr()).fid, "domain") }
    }
}

/// Where errors go that belong to no operation of ours. An endpoint without one lets the `efa`
/// provider abort the process (`efa_base_ep_write_eq_error`).
pub struct EventQueue {
    raw: NonNull<ffi::fid_eq>,
    fabric: Arc<Fabric>,
}

// SAFETY: as for Domain.
unsafe impl Send for EventQueue {}
// SAFETY: as for Domain.
unsafe impl Sync for EventQueue {}

impl EventQueue {
    /// Opens an event queue without a wait object.
    pub fn open(fabric: &Arc<Fabric>) -> Result<Arc<Self>> {
        let mut raw = null_mut();
        // SAFETY: zero is a valid value for every field of fi_eq_attr.
        let mut attr: ffi::fi_eq_attr = unsafe { std::mem::zeroed() };
        attr.wait_obj = ffi::FI_WAIT_NONE;
        // SAFETY: the fabric is open; the attributes outlive the call.
        let ret: c_int = unsafe {
            let fabric = fabric.raw.as_ptr();
            call!(fabric, ops.eq_open(fabric, &raw mut attr, &raw mut raw, null_mut()))
        };
        let raw = opened(fabric.lib, "fi_eq_open", ret, raw)?;
        Ok(Arc::new(Self { raw, fabric: fabric.clone() }))
    }

    /// Takes one event: its error in words, or `None` when the queue is empty. Events that are not
    /// errors mean nothing to a connectionless endpoint and are dropped.
    pub fn next_error(&self) -> Option<String> {
        let mut event = 0_u32;
        let mut buffer = [0_u8; 256];
        loop {
            // SAFETY: the queue is open; the buffer and its length belong together.
            let ret: isize = unsafe {
                let eq = self.raw.as_ptr();
                call!(eq, ops.read(eq, &raw mut event, buffer.as_mut_ptr().cast(), buffer.len(), 0))
            };
            if ret > 0 {
                continue;
            }
            if ret != -(ffi::FI_EAVAIL as isize) {
                return None;
            }
            // SAFETY: zero is valid for every field; err_data of NULL and size 0 means "none wanted".
            let mut entry: ffi::fi_eq_err_entry = unsafe { std::mem::zeroed() };
            // SAFETY: the queue is open and `entry` is whole.
            let ret: isize = unsafe {
                let eq = self.raw.as_ptr();
                call!(eq, ops.readerr(eq, &raw mut entry, 0))
            };
            if ret <= 0 {
                return None;
            }
            return Some(format!(
                "{} (error {}, provider's {})",
                self.fabric.lib.strerror(entry.err),
                entry.err,
                entry.prov_errno
            ));
        }
    }
}

impl Drop for EventQueue {
    fn drop(&mut self) {
        // SAFETY: endpoints bound to it hold an Arc of it, so they are gone.
        unsafe { close(&raw mut (*self.raw.as_ptr()).fid, "event queue") }
    }
}

/// One completion as the provider gave it: the context of an operation.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Completed(*mut c_void);

impl Default for Completed {
    fn default() -> Self {
        Self(null_mut())
    }
}

// SAFETY: a number to compare with; it is never dereferenced.
unsafe impl Send for Completed {}

/// An operation that ended with an error.
#[derive(Clone, Debug)]
pub struct CompletionError {
    context: usize,
    /// libfabric's errno.
    pub errno: i32,
    /// The provider's; for `efa` the device's completion status.
    pub provider_errno: i32,
    /// Both in words.
    pub text: String,
}

/// Where finished operations are reported.
pub struct CompletionQueue {
    raw: NonNull<ffi::fid_cq>,
    domain: Arc<Domain>,
    size: usize,
    fd: Option<RawFd>,
}

// SAFETY: as for Domain.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for Domain.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// Opens a queue of at least `size` entries, with a file descriptor to wait on if the provider
    /// has one.
    pub fn open(domain: &Arc<Domain>, size: usize) -> Result<Arc<Self>> {
        Self::open_with(domain, size, ffi::FI_WAIT_FD)
            .or_else(|_| Self::open_with(domain, size, ffi::FI_WAIT_NONE))
            .map(Arc::new)
    }

    fn open_with(domain: &Arc<Domain>, size: usize, wait: ffi::fi_wait_obj) -> Result<Self> {
        let lib = domain.lib();
        // SAFETY: zero is a valid value for every field of fi_cq_attr.
        let mut attr: ffi::fi_cq_attr = unsafe { std::mem::zeroed() };
        attr.size = size;
        attr.format = ffi::FI_CQ_FORMAT_CONTEXT;
        attr.wait_obj = wait;
        let mut raw = null_mut();
        // SAFETY: the domain is open; the attributes outlive the call.
        let ret: c_int = unsafe {
            let domain = domain.raw.as_ptr();
            call!(domain, ops.cq_open(domain, &raw mut attr, &raw mut raw, null_mut()))
        };
        let raw: NonNull<ffi::fid_cq> = opened(lib, "fi_cq_open", ret, raw)?;
        // Providers write the real depth back; one that does not leaves what was asked for.
        let mut queue = Self { raw, domain: domain.clone(), size: attr.size.max(1), fd: None };
        if wait == ffi::FI_WAIT_FD {
            let mut fd: c_int = -1;
            // SAFETY: FI_GETWAIT on a queue with FI_WAIT_FD writes one int.
            let ret: c_int = unsafe {
                let fid = &raw mut (*queue.raw.as_ptr()).fid;
                call!(fid, ops.control(fid, ffi::FI_GETWAIT as c_int, (&raw mut fd).cast()))
            };
            if ret != 0 || fd < 0 {
                return Err(lib.error(Code::Context, "fi_control(FI_GETWAIT)", ret.into()));
            }
            queue.fd = Some(fd);
        }
        Ok(queue)
    }

    /// Entries it holds.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What to wait on, if the provider has it. Valid while the queue is.
    pub fn fd(&self) -> Option<RawFd> {
        self.fd
    }

    /// Whether sleeping on [`Self::fd`] is safe now: no completion is ready already.
    pub fn may_sleep(&self) -> bool {
        let mut fids = [self.raw.as_ptr().cast::<ffi::fid>()];
        // SAFETY: a queue's first field is its fid; the array has one element, as said.
        let ret: c_int = unsafe {
            let fabric = self.domain.fabric.raw.as_ptr();
            call!(fabric, ops.trywait(fabric, fids.as_mut_ptr(), 1))
        };
        ret == 0
    }

    /// Forgets the event that made [`Self::fd`] readable, where only a read that waits does so: the `efa`
    /// provider (seen with 2.6) leaves it where it is in `fi_trywait`, so that the descriptor stays
    /// readable for ever. Call it with no completion left to be read, and before [`Self::may_sleep`]: one
    /// may come meanwhile.
    pub fn forget_event(&self) {
        let readable = self.fd.is_some_and(|fd| {
            let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one live structure; a time of 0 does not wait.
            unsafe { libc::poll(&raw mut polled, 1, 0) > 0 }
        });
        if readable {
            // With a timeout of 0 the provider does not look for events. It does not wait for this one
            // millisecond either, since there is one.
            // SAFETY: the queue is open; no entries are asked for, so none are written.
            let _: isize = unsafe {
                let cq = self.raw.as_ptr();
                call!(cq, ops.sread(cq, null_mut(), 0, std::ptr::null(), 1))
            };
        }
    }

    /// Takes finished operations into `out` and makes the provider progress. The count taken, 0 if
    /// there are none; an error ready to be taken is `Err(None)` (then call [`Self::read_error`]);
    /// `Err(Some(errno))` is a failure of the queue itself.
    pub fn read(&self, out: &mut [Completed]) -> std::result::Result<usize, Option<i32>> {
        // SAFETY: Completed is one pointer, as struct fi_cq_entry; the length is the buffer's.
        let ret: isize = unsafe {
            let cq = self.raw.as_ptr();
            call!(cq, ops.read(cq, out.as_mut_ptr().cast(), out.len()))
        };
        match ret {
            count if count >= 0 => Ok(count as usize),
            again if again == -(ffi::FI_EAGAIN as isize) => Ok(0),
            error if error == -(ffi::FI_EAVAIL as isize) => Err(None),
            other => Err(Some(i32::try_from(-other).unwrap_or(i32::MAX))),
        }
    }

    /// Takes one failed operation.
    pub fn read_error(&self) -> Option<CompletionError> {
        // SAFETY: zero is valid for every field; err_data of NULL and size 0 means "none wanted".
        let mut entry: ffi::fi_cq_err_entry = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is open and `entry` is whole.
        let ret: isize = unsafe {
            let cq = self.raw.as_ptr();
            call!(cq, ops.readerr(cq, &raw mut entry, 0))
        };
        if ret <= 0 {
            return None;
        }
        let mut words = [0; 256];
        let size = words.len();
        // SAFETY: fi_cq_strerror reads err_data as readerr left it and writes within the buffer.
        let detail: *const std::ffi::c_char = unsafe {
            match (*(*self.raw.as_ptr()).ops).strerror {
                Some(function) => function(
                    self.raw.as_ptr(),
                    entry.prov_errno,
                    entry.err_data,
                    words.as_mut_ptr(),
                    size,
                ),
                None => std::ptr::null(),
            }
        };
        let detail = if detail.is_null() {
            String::new()
        } else {
            // SAFETY: a NUL-terminated string: static, or in our buffer.
            unsafe { CStr::from_ptr(detail) }.to_string_lossy().into_owned()
        };
        Some(CompletionError {
            context: entry.op_context as usize,
            errno: entry.err,
            provider_errno: entry.prov_errno,
            text: format!(
                "{} (error {}, provider's {}: {detail})",
                self.domain.lib().strerror(entry.err),
                entry.err,
                entry.prov_errno
            ),
        })
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: endpoints bound to it hold an Arc of it, so they are gone.
        unsafe { close(&raw mut (*self.raw.as_ptr()).fid, "completion queue") }
    }
}

/// A peer in an address vector (`fi_addr_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddress(pub u64);

/// The peers that an endpoint can reach.
pub struct AddressVector {
    raw: NonNull<ffi::fid_av>,
    domain: Arc<Domain>,
}

// SAFETY: as for Domain.
unsafe impl Send for AddressVector {}
// SAFETY: as for Domain.
unsafe impl Sync for AddressVector {}

impl AddressVector {
    /// Opens an address vector sized for `count` peers, or in the provider's default size where
    /// that is too many for it.
    pub fn open(domain: &Arc<Domain>, count: usize) -> Result<Arc<Self>> {
        Self::open_with(domain, count).or_else(|_| Self::open_with(domain, 0))
    }

    fn open_with(domain: &Arc<Domain>, count: usize) -> Result<Arc<Self>> {
        // SAFETY: zero is a valid value for every field of fi_av_attr.
        let mut attr: ffi::fi_av_attr = unsafe { std::mem::zeroed() };
        attr.type_ = ffi::FI_AV_TABLE;
        attr.count = count;
        let mut raw = null_mut();
        // SAFETY: the domain is open; the attributes outlive the call.
        let ret: c_int = unsafe {
            let domain = domain.raw.as_ptr();
            call!(domain, ops.av_open(domain, &raw mut attr, &raw mut raw, null_mut()))
        };
        let raw = opened(domain.lib(), "fi_av_open", ret, raw)?;
        Ok(Arc::new(Self { raw, domain: domain.clone() }))
    }

    /// Adds a peer by its endpoint's address, as [`Endpoint::address`] gives it. It came from the peer:
    /// one that is not of the provider's form is refused.
    pub fn insert(&self, address: &[u8]) -> Result<PeerAddress> {
        if let Err(why) = self.domain.addresses.check(address) {
            return Err(Error::invalid(format!(
                "a peer's endpoint address cannot be right: {why}"
            )));
        }
        // Providers read as many bytes as their own addresses have.
        let mut padded = [0_u8; MAX_NAME];
        padded[..address.len()].copy_from_slice(address);
        let mut peer: ffi::fi_addr_t = u64::MAX;
        // SAFETY: one address in, one fi_addr_t out, both outlive the call (no FI_EVENT: it is
        // synchronous).
        let ret: c_int = unsafe {
            let av = self.raw.as_ptr();
            call!(av, ops.insert(av, padded.as_ptr().cast(), 1, &raw mut peer, 0, null_mut()))
        };
        if ret != 1 || peer == u64::MAX {
            // A count of 0 carries no errno of its own.
            let ret = if ret < 0 { ret } else { -(ffi::FI_EADDRNOTAVAIL as i32) };
            return Err(self.domain.lib().error(Code::Endpoint, "fi_av_insert", ret.into()));
        }
        Ok(PeerAddress(peer))
    }

    /// Removes a peer. No operation to it may be in flight, and the endpoint must still be open.
    pub fn remove(&self, peer: PeerAddress) -> Result<()> {
        let mut raw: ffi::fi_addr_t = peer.0;
        // SAFETY: one fi_addr_t that `insert` returned.
        let ret: c_int = unsafe {
            let av = self.raw.as_ptr();
            call!(av, ops.remove(av, &raw mut raw, 1, 0))
        };
        done(self.domain.lib(), Code::Endpoint, "fi_av_remove", ret)
    }
}

impl Drop for AddressVector {
    fn drop(&mut self) {
        // SAFETY: endpoints bound to it hold an Arc of it, so they are gone.
        unsafe { close(&raw mut (*self.raw.as_ptr()).fid, "address vector") }
    }
}

/// What kind of memory a region is.
#[derive(Clone, Copy, Debug)]
pub enum MemoryKind<'a> {
    /// Host memory.
    Host,
    /// Memory of this CUDA device, with the file that it also is, if it is one.
    Cuda(i32, Option<&'a Dmabuf>),
}

/// Registers memory with the provider: by its dmabuf if there is one, and by its address if there is none, or if that is
/// refused.
///
/// # Safety
/// The domain is open, and the memory stays mapped while it is registered.
unsafe fn register(
    lib: &Libfabric,
    domain: NonNull<ffi::fid_domain>,
    memory: &Memory,
    kind: MemoryKind,
    key: u64,
) -> Result<NonNull<ffi::fid_mr>> {
    // SAFETY: zero is a valid value for every field of fi_mr_attr.
    let mut attr: ffi::fi_mr_attr = unsafe { std::mem::zeroed() };
    attr.iov_count = 1;
    attr.access =
        u64::from(ffi::FI_READ | ffi::FI_WRITE | ffi::FI_REMOTE_READ | ffi::FI_REMOTE_WRITE);
    attr.requested_key = key;
    if let MemoryKind::Cuda(device, _) = kind {
        attr.iface = ffi::FI_HMEM_CUDA;
        attr.device.cuda = device;
    }
    let call = |attr: &ffi::fi_mr_attr, flags: u64, what: &str| {
        let mut raw = null_mut();
        // SAFETY: the domain is open; the attributes, and what they point to, outlive the call.
        let ret: c_int = unsafe {
            let fid = &raw mut (*domain.as_ptr()).fid;
            match (*(*domain.as_ptr()).mr).regattr {
                Some(function) => function(fid, attr, flags, &raw mut raw),
                None => -(ffi::FI_ENOSYS as c_int),
            }
        };
        opened(lib, what, ret, raw).map_err(|error: Error| Error { code: Code::Memory, ..error })
    };
    let mut first = None;
    if let MemoryKind::Cuda(_, Some(dmabuf)) = kind {
        let file = ffi::fi_mr_dmabuf {
            fd: dmabuf.as_fd().as_raw_fd(),
            offset: memory.address() - dmabuf.start(),
            len: memory.length() as usize,
            base_addr: dmabuf.start() as *mut c_void,
        };
        attr.__bindgen_anon_1.dmabuf = &raw const file;
        match call(&attr, ffi::FI_MR_DMABUF, "fi_mr_regattr of its dmabuf") {
            Ok(raw) => return Ok(raw),
            Err(error) => first = Some(error),
        }
    }
    let iov =
        ffi::iovec { iov_base: memory.address() as *mut c_void, iov_len: memory.length() as usize };
    attr.__bindgen_anon_1.mr_iov = &raw const iov;
    call(&attr, 0, "fi_mr_regattr").map_err(|error| match first {
        Some(first) => Error { text: format!("{first}; without it: {error}"), ..error },
        None => error,
    })
}

/// Registered memory: what operations read and write, here and on peers that know its key.
pub struct MemoryRegion {
    /// `None` once closed.
    raw: Option<NonNull<ffi::fid_mr>>,
    key: u64,
    address: u64,
    length: u64,
    descriptor: *mut c_void,
    memory: Memory,
    endpoint: Option<Arc<Bound>>,
    domain: Arc<Domain>,
}

// SAFETY: as for Domain; `descriptor` is a number to hand back to the provider.
unsafe impl Send for MemoryRegion {}

impl MemoryRegion {
    /// Registers `memory`. `key` is used where the provider does not choose keys itself. Device memory is registered by
    /// its file, if it has one and the provider takes it, or else by its address.
    ///
    /// # Errors
    /// [`Code::Memory`], with the provider's reason; if both ways were tried, with both.
    pub fn register(
        endpoint: &Endpoint,
        info: &Info,
        memory: &Memory,
        kind: MemoryKind,
        key: u64,
    ) -> Result<Self> {
        let domain = &endpoint.bound.domain;
        let lib = domain.lib();
        let kind = match kind {
            MemoryKind::Cuda(device, Some(_)) if !info.takes_dmabuf() => {
                MemoryKind::Cuda(device, None)
            }
            kind => kind,
        };
        // SAFETY: the domain is open; that the range stays mapped is the promise a Memory stands for.
        let raw = unsafe { register(lib, domain.raw, memory, kind, key) }?;
        let mut region = Self {
            raw: Some(raw),
            key: 0,
            address: memory.address(),
            length: memory.length(),
            descriptor: null_mut(),
            memory: memory.clone(),
            endpoint: None,
            domain: domain.clone(),
        };
        if info.endpoint_regions() {
            region.endpoint = Some(endpoint.bound.clone());
            // SAFETY: both objects are open.
            let ret: c_int = unsafe {
                let fid = &raw mut (*raw.as_ptr()).fid;
                let ep = &raw mut (*endpoint.bound.raw.as_ptr()).fid;
                call!(fid, ops.bind(fid, ep, 0))
            };
            done(lib, Code::Memory, "fi_mr_bind", ret)?;
            // SAFETY: the region is open; FI_ENABLE takes no argument.
            let ret: c_int = unsafe {
                let fid = &raw mut (*raw.as_ptr()).fid;
                call!(fid, ops.control(fid, ffi::FI_ENABLE as c_int, null_mut()))
            };
            done(lib, Code::Memory, "fi_mr_enable", ret)?;
        }
        // SAFETY: the region is open (and enabled, where that is needed).
        region.key = unsafe { (*raw.as_ptr()).key };
        if info.local_descriptors() || !matches!(kind, MemoryKind::Host) {
            // SAFETY: as above.
            region.descriptor = unsafe { (*raw.as_ptr()).mem_desc };
        }
        Ok(region)
    }

    /// The key that peers use.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// First byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The range.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether a range is inside.
    #[inline]
    fn holds(&self, address: u64, length: usize) -> bool {
        let offset = address.wrapping_sub(self.address);
        offset <= self.length && length as u64 <= self.length - offset
    }

    /// Ends the registration; the provider's refusal is the error.
    pub fn close(mut self) -> Result<()> {
        let lib = self.domain.lib();
        done(lib, Code::Memory, "fi_close of a memory region", self.close_once())
    }

    fn close_once(&mut self) -> c_int {
        match self.raw.take() {
            // SAFETY: open; taken, so it is closed only once.
            Some(raw) => unsafe {
                let fid = &raw mut (*raw.as_ptr()).fid;
                call!(fid, ops.close(fid))
            },
            None => 0,
        }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        let ret = self.close_once();
        if ret != 0 {
            log::warn!("closing a memory region failed: {}", self.domain.lib().strerror(ret));
        }
    }
}

/// One RMA operation.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Write to the peer; otherwise read from it.
    pub write: bool,
    /// For a write: completes only when the data is in the target's memory, where the provider does
    /// not promise that anyway (`FI_DELIVERY_COMPLETE`).
    pub delivery: bool,
    /// Local address.
    pub local: u64,
    /// Bytes.
    pub length: usize,
    /// The peer.
    pub peer: PeerAddress,
    /// Remote virtual address or offset, as the provider wants it.
    pub remote: u64,
    /// The remote region's key.
    pub key: u64,
    /// Which of the endpoint's contexts it uses; not in use by another operation in flight.
    pub context: u32,
}

/// How a post went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Post {
    /// The provider has it; a completion will follow.
    Done,
    /// Not now: read completions, then post again.
    Again,
    /// Refused with this errno; no completion will follow.
    Failed(i32),
}

/// Memory that the provider may use as its own while an operation is in flight.
type Contexts = Box<[UnsafeCell<ffi::fi_context2>]>;

struct Bound {
    raw: NonNull<ffi::fid_ep>,
    contexts: Contexts,
    queue: Arc<CompletionQueue>,
    _addresses: Arc<AddressVector>,
    _events: Option<Arc<EventQueue>>,
    domain: Arc<Domain>,
}

// SAFETY: as for Domain.
unsafe impl Send for Bound {}
// SAFETY: as for Domain.
unsafe impl Sync for Bound {}

impl Drop for Bound {
    fn drop(&mut self) {
        // SAFETY: regions bound to it hold an Arc of it; the queues and vectors it is bound to are
        // closed after it, when the fields drop.
        unsafe { close(&raw mut (*self.raw.as_ptr()).fid, "endpoint") }
    }
}

/// A reliable-datagram endpoint, enabled, with contexts for its operations.
pub struct Endpoint {
    bound: Arc<Bound>,
}

impl Endpoint {
    /// Opens and enables an endpoint with `contexts` operation contexts. `configure` is called
    /// before it is enabled, for options.
    pub fn open(
        info: &Info,
        queue: &Arc<CompletionQueue>,
        addresses: &Arc<AddressVector>,
        events: Option<&Arc<EventQueue>>,
        contexts: usize,
        configure: impl FnOnce(&Self),
    ) -> Result<Self> {
        let domain = &queue.domain;
        let lib = domain.lib();
        let mut raw = null_mut();
        // SAFETY: the domain is open; `info` is whole and outlives the call.
        let ret: c_int = unsafe {
            let domain = domain.raw.as_ptr();
            call!(domain, ops.endpoint(domain, info.raw.as_ptr(), &raw mut raw, null_mut()))
        };
        let raw = opened(lib, "fi_endpoint", ret, raw)?;
        // SAFETY: fi_context2 is plain memory; zero is a valid value.
        let zero = || UnsafeCell::new(unsafe { std::mem::zeroed::<ffi::fi_context2>() });
        let mut bound = Bound {
            raw,
            contexts: std::iter::repeat_with(zero).take(contexts).collect(),
            queue: queue.clone(),
            _addresses: addresses.clone(),
            _events: None,
            domain: domain.clone(),
        };
        let transmit = u64::from(ffi::FI_TRANSMIT | ffi::FI_RECV);
        let bind = |fid: *mut ffi::fid, flags: u64| -> c_int {
            // SAFETY: both objects are open.
            unsafe {
                let ep = &raw mut (*raw.as_ptr()).fid;
                call!(ep, ops.bind(ep, fid, flags))
            }
        };
        done(
            lib,
            Code::Endpoint,
            "fi_ep_bind of the completion queue",
            bind(queue.raw.as_ptr().cast(), transmit),
        )?;
        done(
            lib,
            Code::Endpoint,
            "fi_ep_bind of the address vector",
            bind(addresses.raw.as_ptr().cast(), 0),
        )?;
        if let Some(events) = events {
            // Software providers that never use one may refuse it; `efa` takes it.
            match bind(events.raw.as_ptr().cast(), 0) {
                0 => bound._events = Some(events.clone()),
                ret => log::debug!("{}: no event queue on endpoints ({ret})", info.provider()),
            }
        }
        let endpoint = Self { bound: Arc::new(bound) };
        configure(&endpoint);
        // SAFETY: the endpoint is open; FI_ENABLE takes no argument.
        let ret: c_int = unsafe {
            let fid = &raw mut (*raw.as_ptr()).fid;
            call!(fid, ops.control(fid, ffi::FI_ENABLE as c_int, null_mut()))
        };
        done(lib, Code::Endpoint, "fi_enable", ret)?;
        Ok(endpoint)
    }

    /// Gives it an address of our choice, for a provider whose addresses are texts; false if it does not take it.
    pub fn set_address(&self, address: &str) -> bool {
        let Ok(address) = CString::new(address) else { return false };
        // SAFETY: the endpoint is open; the text and its length, with the NUL, belong together.
        let ret: c_int = unsafe {
            let ep = self.bound.raw.as_ptr();
            let length = address.as_bytes_with_nul().len();
            // It is only read, though not declared so.
            call!(ep, cm.setname(&raw mut (*ep).fid, address.as_ptr().cast_mut().cast(), length))
        };
        ret == 0
    }

    /// Sets `FI_OPT_SHARED_MEMORY_PERMITTED`; false if the provider does not know the option.
    pub fn set_shared_memory(&self, permitted: bool) -> bool {
        self.set_option(ffi::FI_OPT_SHARED_MEMORY_PERMITTED as c_int, permitted)
    }

    /// Sets `FI_OPT_CUDA_API_PERMITTED`; false if the provider does not know the option.
    pub fn set_cuda_api(&self, permitted: bool) -> bool {
        self.set_option(ffi::FI_OPT_CUDA_API_PERMITTED as c_int, permitted)
    }

    /// Whether the `efa` provider emulates (writes, reads) in software; `None` if it does not say.
    pub fn emulation(&self) -> (Option<bool>, Option<bool>) {
        (
            self.option(ffi::FI_OPT_EFA_EMULATED_WRITE as c_int),
            self.option(ffi::FI_OPT_EFA_EMULATED_READ as c_int),
        )
    }

    fn set_option(&self, name: c_int, value: bool) -> bool {
        // SAFETY: the endpoint is open; the option's value is one bool.
        let ret: c_int = unsafe {
            let ep = self.bound.raw.as_ptr();
            let value = (&raw const value).cast();
            call!(ep, ops.setopt(&raw mut (*ep).fid, ffi::FI_OPT_ENDPOINT as c_int, name, value, 1))
        };
        ret == 0
    }

    fn option(&self, name: c_int) -> Option<bool> {
        let mut value = 0_u8;
        let mut size = 1_usize;
        // SAFETY: the endpoint is open; at most `size` bytes are written.
        let ret: c_int = unsafe {
            let ep = self.bound.raw.as_ptr();
            call!(
                ep,
                ops.getopt(
                    &raw mut (*ep).fid,
                    ffi::FI_OPT_ENDPOINT as c_int,
                    name,
                    (&raw mut value).cast(),
                    &raw mut size
                )
            )
        };
        (ret == 0).then_some(value != 0)
    }

    /// The endpoint's address, for peers' [`AddressVector::insert`].
    pub fn address(&self) -> Result<Vec<u8>> {
        let mut name = vec![0_u8; MAX_NAME];
        let mut length = name.len();
        // SAFETY: the endpoint is enabled; at most `length` bytes are written.
        let ret: c_int = unsafe {
            let ep = self.bound.raw.as_ptr();
            call!(ep, cm.getname(&raw mut (*ep).fid, name.as_mut_ptr().cast(), &raw mut length))
        };
        done(self.bound.domain.lib(), Code::Endpoint, "fi_getname", ret)?;
        name.truncate(length);
        Ok(name)
    }

    /// Posts an operation on memory inside `region`. The region must stay open until the
    /// completion.
    #[inline]
    pub fn post(&self, region: &MemoryRegion, op: &Operation) -> Post {
        let inside = region.holds(op.local, op.length);
        let Some(context) = self.bound.contexts.get(op.context as usize).filter(|_| inside) else {
            return Post::Failed(ffi::FI_EINVAL as i32);
        };
        let ep = self.bound.raw.as_ptr();
        let context = context.get().cast::<c_void>();
        let (peer, buffer) = (op.peer.0, op.local as *mut c_void);
        // SAFETY: the endpoint is enabled and used by one thread; the local range is inside a live
        // registration (checked above; kept by the caller until the completion); the context lives
        // as long as the endpoint.
        let ret: isize = unsafe {
            if op.write && op.delivery {
                let local = ffi::iovec { iov_base: buffer, iov_len: op.length };
                let remote = ffi::fi_rma_iov { addr: op.remote, len: op.length, key: op.key };
                let mut descriptor = region.descriptor;
                let message = ffi::fi_msg_rma {
                    msg_iov: &raw const local,
                    desc: &raw mut descriptor,
                    iov_count: 1,
                    addr: peer,
                    rma_iov: &raw const remote,
                    rma_iov_count: 1,
                    context,
                    data: 0,
                };
                let flags = u64::from(ffi::FI_COMPLETION | ffi::FI_DELIVERY_COMPLETE);
                call!(ep, rma.writemsg(ep, &raw const message, flags))
            } else if op.write {
                call!(
                    ep,
                    rma.write(
                        ep,
                        buffer,
                        op.length,
                        region.descriptor,
                        peer,
                        op.remote,
                        op.key,
                        context
                    )
                )
            } else {
                call!(
                    ep,
                    rma.read(
                        ep,
                        buffer,
                        op.length,
                        region.descriptor,
                        peer,
                        op.remote,
                        op.key,
                        context
                    )
                )
            }
        };
        posted(ret)
    }

    /// Sends a message of `length` bytes at `local`, inside `region`, to a peer that has a receive posted. Completes
    /// when the buffer may be used again.
    pub fn send(
        &self,
        region: &MemoryRegion,
        local: u64,
        length: usize,
        peer: PeerAddress,
        context: u32,
    ) -> Post {
        self.message(region, local, length, context, |ep, buffer, descriptor, context| {
            // SAFETY: see `message`.
            unsafe {
                call!(ep, msg.send(ep, buffer.cast_const(), length, descriptor, peer.0, context))
            }
        })
    }

    /// Posts a buffer of `length` bytes at `local`, inside `region`, for a message from any peer.
    pub fn receive(&self, region: &MemoryRegion, local: u64, length: usize, context: u32) -> Post {
        self.message(region, local, length, context, |ep, buffer, descriptor, context| {
            // SAFETY: see `message`. FI_ADDR_UNSPEC: from anyone.
            unsafe { call!(ep, msg.recv(ep, buffer, length, descriptor, u64::MAX, context)) }
        })
    }

    /// Calls `post` for a buffer that is inside a live registration (checked here; kept by the caller until the
    /// completion), with a context that lives as long as the endpoint, which is enabled and used by one thread.
    fn message(
        &self,
        region: &MemoryRegion,
        local: u64,
        length: usize,
        context: u32,
        post: impl FnOnce(*mut ffi::fid_ep, *mut c_void, *mut c_void, *mut c_void) -> isize,
    ) -> Post {
        let context = self.bound.contexts.get(context as usize);
        let Some(context) = context.filter(|_| region.holds(local, length)) else {
            return Post::Failed(ffi::FI_EINVAL as i32);
        };
        let ep = self.bound.raw.as_ptr();
        posted(post(ep, local as *mut c_void, region.descriptor, context.get().cast()))
    }

    /// Greets a peer by a write of no bytes: [`Post::Again`] until it has answered, after which the write is
    /// sent. The `efa` provider asks a peer what it can do before the first operation, and keeps operations
    /// until it answers, 16 of an endpoint's at most; where no answer comes they are never given back, nor is
    /// their place (seen with 2.7). It does not keep what is injected (`efa_rdm_ep_enforce_handshake_for_txe`).
    pub fn greet(&self, peer: PeerAddress, remote: u64, key: u64) -> Post {
        let nothing = [0_u8; 1];
        let ep = self.bound.raw.as_ptr();
        // SAFETY: the endpoint is enabled and used by one thread; no byte of the buffer is read, and what is
        // injected is not looked at after the call.
        let ret: isize =
            unsafe { call!(ep, rma.inject(ep, nothing.as_ptr().cast(), 0, peer.0, remote, key)) };
        posted(ret)
    }

    /// Which context a completion belongs to; `None` for one that is not an operation of ours.
    #[inline]
    pub fn context_of(&self, completed: Completed) -> Option<u32> {
        self.index_of(completed.0 as usize)
    }

    /// As [`Self::context_of`], for an error.
    pub fn context_of_error(&self, error: &CompletionError) -> Option<u32> {
        self.index_of(error.context)
    }

    fn index_of(&self, context: usize) -> Option<u32> {
        let offset = context.wrapping_sub(self.bound.contexts.as_ptr() as usize);
        let index = offset / size_of::<ffi::fi_context2>();
        (offset % size_of::<ffi::fi_context2>() == 0 && index < self.bound.contexts.len())
            .then_some(index as u32)
    }

    /// The queue that its completions go to.
    pub fn queue(&self) -> &CompletionQueue {
        &self.bound.queue
    }
}

fn posted(ret: isize) -> Post {
    match ret {
        0 => Post::Done,
        again if again == -(ffi::FI_EAGAIN as isize) => Post::Again,
        error => Post::Failed(i32::try_from(-error).unwrap_or(i32::MAX)),
    }
}

fn opened<T>(lib: &Libfabric, what: &str, ret: c_int, raw: *mut T) -> Result<NonNull<T>> {
    match NonNull::new(raw) {
        Some(raw) if ret == 0 => Ok(raw),
        _ => Err(lib.error(Code::Context, what, ret.into())),
    }
}

fn done(lib: &Libfabric, code: Code, what: &str, ret: c_int) -> Result<()> {
    if ret == 0 { Ok(()) } else { Err(lib.error(code, what, ret.into())) }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use super::*;

    /// What a provider was asked for: the flags, and (descriptor, address, offset, length), -1 where it was by address.
    type Asked = (u64, c_int, u64, u64, usize);

    thread_local! {
        /// What the provider answers, for each call; and what it was asked.
        static PROVIDER: RefCell<(Vec<c_int>, Vec<Asked>)> = RefCell::default();
    }

    unsafe extern "C" fn regattr(
        _: *mut ffi::fid,
        attr: *const ffi::fi_mr_attr,
        flags: u64,
        mr: *mut *mut ffi::fid_mr,
    ) -> c_int {
        // SAFETY: whole attributes, whose union is what the flags say.
        let asked = unsafe {
            let attr = &*attr;
            assert_eq!((attr.iface, attr.device.cuda, attr.iov_count), (ffi::FI_HMEM_CUDA, 3, 1));
            if flags & ffi::FI_MR_DMABUF != 0 {
                let file = &*attr.__bindgen_anon_1.dmabuf;
                (flags, file.fd, file.base_addr as u64, file.offset, file.len)
            } else {
                let iov = &*attr.__bindgen_anon_1.mr_iov;
                (flags, -1, iov.iov_base as u64, 0, iov.iov_len)
            }
        };
        PROVIDER.with_borrow_mut(|(answers, all)| {
            all.push(asked);
            let answer = answers.remove(0);
            if answer == 0 {
                // SAFETY: the caller's pointer. It is looked at no further.
                unsafe { *mr = NonNull::dangling().as_ptr() };
            }
            answer
        })
    }

    /// Registers 5000 bytes, 100 bytes after the start of a file, with a provider that answers so.
    fn ask(answers: &[c_int], by_file: bool) -> (Result<()>, Vec<Asked>, c_int) {
        let lib = Libfabric::get(None).expect("libfabric");
        let file: OwnedFd = File::open("/dev/null").expect("a file").into();
        let fd = file.as_raw_fd();
        let dmabuf = Dmabuf::new(file, 0x7000_0000);
        // SAFETY: zero is a valid value for structures of numbers, pointers and optional functions.
        let (mut ops, mut domain): (ffi::fi_ops_mr, ffi::fid_domain) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        ops.regattr = Some(regattr);
        domain.mr = &raw mut ops;
        PROVIDER.set((answers.to_vec(), Vec::new()));
        let memory = Memory::simulated(0x7000_0064, 5000);
        // SAFETY: the domain has what is called, and the provider touches no memory.
        let made = unsafe {
            let kind = MemoryKind::Cuda(3, by_file.then_some(&dmabuf));
            register(lib, NonNull::from(&mut domain), &memory, kind, 1)
        };
        let (left, asked) = PROVIDER.take();
        assert!(left.is_empty(), "asked too seldom");
        (made.map(drop), asked, fd)
    }

    #[test]
    fn device_memory_goes_by_its_dmabuf_or_else_by_its_address() {
        let flag = ffi::FI_MR_DMABUF;
        let (made, asked, fd) = ask(&[0], true);
        made.expect("registered");
        let by_file = (flag, fd, 0x7000_0000, 100, 5000);
        assert_eq!(asked, [by_file]);
        let by_address = (0, -1, 0x7000_0064, 0, 5000);
        let (made, asked, _) = ask(&[0], false);
        made.expect("registered");
        assert_eq!(asked, [by_address]);
        let (made, asked, fd) = ask(&[-libc::EOPNOTSUPP, 0], true);
        made.expect("registered the other way");
        assert_eq!(asked, [(flag, fd, 0x7000_0000, 100, 5000), by_address]);
        let (made, ..) = ask(&[-libc::EOPNOTSUPP, -libc::EFAULT], true);
        let error = made.expect_err("refused both ways");
        assert_eq!(error.code, Code::Memory);
        assert_eq!(
            error.text,
            "fi_mr_regattr of its dmabuf failed: Operation not supported (95); without it: \
             fi_mr_regattr failed: Bad address (14)"
        );
    }
}
