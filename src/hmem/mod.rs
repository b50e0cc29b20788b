//! Which memory is whose, and copies to and from a GPU's.
//!
//! The CUDA driver is asked only if the process has loaded it already: without it there is no device pointer to ask
//! about. What it says is kept with a registered range ([`DeviceMemory`]), so that a transfer asks nothing.
#![allow(unsafe_code)]

mod copier;
mod cuda;
mod dmabuf;
mod in_use;

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use crate::error::{Code, Error, Result};
use crate::fabric::{Buffer, Memory, Owner};
pub use copier::{Copier, Direction};
pub use cuda::Context;
use cuda::{Attribute, DEVICE_MEMORY, Driver, HOST_MEMORY, RawIpcHandle, driver};
pub use in_use::{gpu_in_use, in_used_context};

/// Where memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// On the host.
    Host,
    /// On the host, and locked there by CUDA: a GPU copies to and from it by itself.
    Pinned,
    /// On this CUDA device, by its number in this process.
    Device(i32),
    /// Managed by CUDA, which moves it between the host and its devices, of which this is the one it was made on.
    Managed(i32),
}

impl Kind {
    /// Neither: the host's memory as far as others care.
    pub fn is_host(self) -> bool {
        matches!(self, Self::Host | Self::Pinned)
    }
}

/// Whether the CUDA driver is in this process.
pub fn cuda_loaded() -> bool {
    driver().is_some()
}

/// The kind of a range of memory, all of which must be of one kind. It may be made of several allocations.
///
/// # Errors
/// [`Code::InvalidArgument`] if part of it is on another device than the rest, or not on one.
pub fn kind_of(memory: &Memory) -> Result<Kind> {
    let Some(driver) = driver() else { return Ok(Kind::Host) };
    let (start, end) = (memory.address(), memory.address() + memory.length());
    let first = kind_at(driver, start);
    if first == Kind::Host {
        // Most memory by far: it is asked about as little as may be.
        let last = kind_at(driver, end - 1);
        return if last.is_host() {
            Ok(Kind::Host)
        } else {
            Err(mixed(memory, first, end - 1, last))
        };
    }
    let mut at = start;
    loop {
        // Virtual memory management's range is what was reserved, whatever is mapped there, piece by piece.
        let pieces = driver.ask(Attribute::Context, at).unwrap_or(0) == 0;
        let allocation =
            driver.ask(Attribute::RangeStart, at).zip(driver.ask(Attribute::RangeSize, at));
        let after = match allocation {
            _ if pieces && !first.is_host() => (at + 1).next_multiple_of(SMALLEST_MAPPING),
            Some((start, size)) => start.saturating_add(size),
            None => end,
        };
        if after >= end {
            return Ok(first);
        }
        // One that does not end after where we are would have us ask for ever.
        at = after.max(at + 1);
        let here = kind_at(driver, at);
        if here != first {
            let pageable = first.is_host() && here.is_host();
            return if pageable { Ok(Kind::Host) } else { Err(mixed(memory, first, at, here)) };
        }
    }
}

/// What CUDA maps memory by: `CU_MEM_ALLOC_GRANULARITY_MINIMUM` is a multiple of it on every device so far.
const SMALLEST_MAPPING: u64 = 2 << 20;

fn kind_at(driver: &Driver, address: u64) -> Kind {
    let device = || driver.ask(Attribute::Device, address).unwrap_or(0) as i32;
    let managed =
        || driver.ask(Attribute::IsManaged, address).is_some_and(|managed| managed & 0xff != 0);
    // What the driver does not know is plain host memory.
    match driver.ask(Attribute::MemoryType, address).map(|kind| kind & 0xffff_ffff) {
        Some(DEVICE_MEMORY | HOST_MEMORY) if managed() => Kind::Managed(device()),
        Some(DEVICE_MEMORY) => Kind::Device(device()),
        Some(HOST_MEMORY) => Kind::Pinned,
        _ => Kind::Host,
    }
}

fn mixed(memory: &Memory, first: Kind, at: u64, other: Kind) -> Error {
    let name = |kind| match kind {
        Kind::Host | Kind::Pinned => "on the host".to_owned(),
        Kind::Device(device) => format!("on CUDA device {device}"),
        Kind::Managed(device) => format!("managed by CUDA (device {device})"),
    };
    Error::invalid(format!(
        "{} bytes at {:#x} are {}, but at {at:#x} {}: register each part by itself",
        memory.length(),
        memory.address(),
        name(first),
        name(other)
    ))
}

/// A range of a GPU's memory, or of managed memory: what copies to and from it need.
pub struct DeviceMemory {
    address: u64,
    length: u64,
    context: Arc<Context>,
    managed: bool,
    unowned: bool,
    shared: OnceLock<Option<Shared>>,
}

/// How another process on this host gets at device memory: CUDA's handle of the allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// `CUipcMemHandle`.
    pub handle: [u8; 64],
    /// First byte of the allocation, as its owner has it.
    pub start: u64,
    /// Bytes of the allocation.
    pub length: u64,
}

impl DeviceMemory {
    /// What is needed of a range of this kind; `None` for the host's.
    ///
    /// # Errors
    /// CUDA's, if its context cannot be had.
    pub fn of(memory: &Memory, kind: Kind) -> Result<Option<Self>> {
        let (device, managed) = match kind {
            Kind::Host | Kind::Pinned => return Ok(None),
            Kind::Device(device) => (device, false),
            Kind::Managed(device) => (device, true),
        };
        let Some(driver) = driver() else { return Ok(None) };
        let context = Context::of(driver, memory.address(), device).map_err(|error| {
            error.context(format!("memory at {:#x} on CUDA device {device}", memory.address()))
        })?;
        let (address, length) = (memory.address(), memory.length());
        let unowned = driver.ask(Attribute::Context, address).unwrap_or(0) == 0;
        Ok(Some(Self { address, length, context, managed, unowned, shared: OnceLock::new() }))
    }

    /// The context that its copies run in.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// No context owns it: it is mapped by CUDA's virtual memory management, or from a pool.
    pub fn is_unowned(&self) -> bool {
        self.unowned
    }

    /// As [`Self::shared`], if that was asked for before.
    pub fn shared_already(&self) -> Option<&Shared> {
        self.shared.get().and_then(Option::as_ref)
    }

    /// What another process needs to get at it; `None` where CUDA shares only by other ways, or where it is more than
    /// one allocation.
    pub fn shared(&self) -> Option<&Shared> {
        let share = || {
            let driver = self.context.driver();
            let start = driver.ask(Attribute::RangeStart, self.address)?;
            let length = driver.ask(Attribute::RangeSize, self.address)?;
            let whole =
                start <= self.address && self.address + self.length <= start.checked_add(length)?;
            let mut handle = RawIpcHandle([0; 64]);
            let _entered = self.context.enter().ok()?;
            // SAFETY: the handle is written; the address is one of an allocation's that is registered.
            let ret = unsafe { (driver.ipc_export)(&raw mut handle, start) };
            (whole && !self.managed && ret == cuda::SUCCESS).then_some(Shared {
                handle: handle.0,
                start,
                length,
            })
        };
        self.shared.get_or_init(share).as_ref()
    }
}

/// Another process's device memory, mapped into a context of ours. Its owner's, and must not be used once he has
/// taken it back.
pub struct Import {
    context: Arc<Context>,
    start: u64,
    length: u64,
}

impl Import {
    /// Maps what `handle` is for, so that memory of `context`'s device can be copied to and from it.
    ///
    /// # Errors
    /// CUDA's: where the handle is not of this host, where the devices cannot reach each other, ...
    pub fn open(context: &Arc<Context>, handle: &[u8; 64]) -> Result<Self> {
        const LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
        let mut start = 0;
        let _entered = context.enter()?;
        // SAFETY: a context is current; the driver checks the handle; one address is written.
        let ret = unsafe {
            (context.driver().ipc_open)(
                &raw mut start,
                RawIpcHandle(*handle),
                LAZY_ENABLE_PEER_ACCESS,
            )
        };
        context.driver().check("cuIpcOpenMemHandle", ret)?;
        let length = context.driver().ask(Attribute::RangeSize, start).unwrap_or(0);
        Ok(Self { context: context.clone(), start, length })
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// First byte, as we have it.
    pub fn address(&self) -> u64 {
        self.start
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: it was opened once, and no copy uses it any more.
            unsafe { (self.context.driver().ipc_close)(self.start) };
        }
    }
}

/// Host memory that a GPU copies to and from by itself.
pub struct PinnedBuffer {
    context: Arc<Context>,
    buffer: Arc<Buffer>,
}

impl PinnedBuffer {
    /// `length` bytes, for all contexts of this process.
    ///
    /// # Errors
    /// [`Code::Memory`] if there are none to be had, or none to be locked.
    pub fn new(context: &Arc<Context>, length: u64) -> Result<Self> {
        const PORTABLE: c_uint = 1;
        let buffer = Buffer::huge(length)?;
        let _entered = context.enter()?;
        // SAFETY: our own mapping, which lives longer than this.
        let ret = unsafe {
            (context.driver().pin)(buffer.address() as *mut c_void, length as usize, PORTABLE)
        };
        context.driver().check("cuMemHostRegister", ret)?;
        Ok(Self { context: context.clone(), buffer })
    }

    /// The memory.
    pub fn buffer(&self) -> &Arc<Buffer> {
        &self.buffer
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: pinned once by us; no copy uses it any more.
            unsafe { (self.context.driver().unpin)(self.buffer.address() as *mut c_void) };
        }
    }
}

/// Copies host memory, both ranges inside registered memory or buffers of ours, which do not overlap.
pub fn copy_on_host(to: u64, from: u64, length: u64) {
    // SAFETY: mapped memory by what registration promises; others may change it at the same time, as a NIC may, so no
    // reference to it exists.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, length as usize) }
}

/// Device memory of our own, for those who measure and test.
pub struct DeviceBuffer {
    context: Context,
    address: u64,
    length: u64,
    stream: *mut c_void,
}

// SAFETY: an allocation and a stream without thread affinity.
unsafe impl Send for DeviceBuffer {}
// SAFETY: as above; the driver's functions may be called by several threads at once.
unsafe impl Sync for DeviceBuffer {}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "{} bytes at {:#x} on CUDA device {}",
            self.length,
            self.address,
            self.context.device()
        )
    }
}

impl Owner for DeviceBuffer {}

impl From<&Arc<DeviceBuffer>> for Memory {
    fn from(buffer: &Arc<DeviceBuffer>) -> Self {
        // SAFETY: it is freed when the buffer is dropped.
        unsafe { Self::owned(buffer.address, buffer.length, buffer.clone()) }
    }
}

/// How many CUDA devices this process sees. Loads the driver.
///
/// # Errors
/// [`Code::DeviceNotFound`] if there is no driver.
pub fn device_count() -> Result<u32> {
    let driver = cuda::load()?;
    let mut count = 0;
    // SAFETY: one number is written.
    let ret = unsafe { (driver.device_count)(&raw mut count) };
    driver.check("cuDeviceGetCount", ret)?;
    Ok(count.try_into().unwrap_or(0))
}

impl DeviceBuffer {
    /// `length` bytes on a device (by CUDA's number), in its primary context. Loads the driver.
    ///
    /// # Errors
    /// [`Code::DeviceNotFound`] if there is no driver or not this device; [`Code::Memory`] if it has no room.
    pub fn new(device: u32, length: u64) -> Result<Self> {
        let count = device_count()?;
        if device >= count {
            let text = format!("there is no CUDA device {device}; this process sees {count}");
            return Err(Error::new(Code::DeviceNotFound, text));
        }
        let driver = cuda::load()?;
        let mut raw: c_int = 0;
        // SAFETY: one number is written.
        let ret = unsafe { (driver.device)(&raw mut raw, device as c_int) };
        driver.check("cuDeviceGet", ret)?;
        let context = Context::primary(driver, raw)?;
        let mut made = Self { context, address: 0, length, stream: null_mut() };
        {
            let _entered = made.context.enter()?;
            // SAFETY: one address is written; a context is current.
            let ret = unsafe { (driver.alloc)(&raw mut made.address, length as usize) };
            driver.check("cuMemAlloc", ret).map_err(|error| {
                error.context(format!("{length} bytes on CUDA device {device}"))
            })?;
            // SAFETY: one pointer is written.
            let ret = unsafe { (driver.stream)(&raw mut made.stream, 1) };
            driver.check("cuStreamCreate", ret)?;
        }
        Ok(made)
    }

    /// First byte, as transfers name it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Copies `bytes` to `offset`, and waits for it.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] if the range is not inside; CUDA's.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = self.check(offset, bytes.len())?;
        self.copy(at, bytes.as_ptr() as u64, bytes.len())
    }

    /// Copies from `offset` into `bytes`, and waits for it.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let at = self.check(offset, bytes.len())?;
        self.copy(bytes.as_mut_ptr() as u64, at, bytes.len())
    }

    fn check(&self, offset: u64, length: usize) -> Result<u64> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.length) {
            return Err(Error::invalid("range outside of the device buffer"));
        }
        Ok(self.address + offset)
    }

    fn copy(&self, to: u64, from: u64, length: usize) -> Result<()> {
        let driver = self.context.driver();
        let _entered = self.context.enter()?;
        // SAFETY: one range is inside our allocation, the other is a slice that outlives the wait below.
        let (copied, waited) = unsafe {
            let copied = (driver.copy)(to, from, length, self.stream);
            (copied, (driver.stream_wait)(self.stream))
        };
        driver.check("cuMemcpyAsync", copied)?;
        driver.check("cuStreamSynchronize", waited)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let driver = self.context.driver();
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: our own; nobody uses them any more. One that was not made is 0, which is not touched.
            unsafe {
                if !self.stream.is_null() {
                    (driver.stream_destroy)(self.stream);
                }
                if self.address != 0 {
                    (driver.free)(self.address);
                }
            }
        }
    }
}

/// The NUMA node of the page at `address`, if the kernel tells. A page not there yet is put where a
/// read by this thread would put it.
pub fn numa_node(address: u64) -> Option<u32> {
    const NODE_OF_ADDRESS: libc::c_ulong = 0x1 | 0x2; // MPOL_F_NODE | MPOL_F_ADDR
    let mut node: c_int = -1;
    // SAFETY: the kernel writes one int; it checks the address itself.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut node,
            std::ptr::null_mut::<c_void>(),
            0_usize,
            address as *mut c_void,
            NODE_OF_ADDRESS,
        )
    };
    (ret == 0).then(|| u32::try_from(node).ok()).flatten()
}

/// The size of the pages of this process's memory, as the kernel maps it.
pub struct Pages(String);

/// Pages where nothing else is known: the kernel's smallest on x86-64, and on Arm as a rule.
pub const SMALL_PAGE: u64 = 4096;

impl Pages {
    /// As it is now. Reads `/proc/self/smaps`, which takes milliseconds in a large process.
    pub fn read() -> Self {
        Self(std::fs::read_to_string("/proc/self/smaps").unwrap_or_default())
    }

    /// The smallest pages that a range has.
    pub fn size(&self, address: u64, length: u64) -> u64 {
        let mut touched = false;
        let mut smallest = None;
        for line in self.0.lines() {
            let mut words = line.split_ascii_whitespace();
            let first = words.next().unwrap_or_default();
            if first == "KernelPageSize:" && touched {
                let size =
                    words.next().and_then(|word| word.parse().ok()).map(|kib: u64| kib << 10);
                smallest = [smallest, size].into_iter().flatten().min();
            } else if let Some((from, to)) = first.split_once('-') {
                let end = |text| u64::from_str_radix(text, 16);
                if let (Ok(from), Ok(to)) = (end(from), end(to)) {
                    touched = from < address + length && address < to;
                }
            }
        }
        smallest.unwrap_or(SMALL_PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_pages_count() {
        let maps = "7f0000000000-7f0040000000 rw-s 00000000 00:0f 1 /dev/hugepages/a\n\
                    Size: 1048576 kB\nKernelPageSize:     2048 kB\n\
                    7f0040000000-7f0040001000 rw-p 00000000 00:00 0\nKernelPageSize:        4 kB\n";
        let pages = Pages(maps.to_owned());
        assert_eq!(pages.size(0x7f00_0000_0000, 1 << 30), 2 << 20);
        assert_eq!(pages.size(0x7f00_0000_0000, (1 << 30) + 1), 4096);
        assert_eq!(pages.size(0x1000, 10), SMALL_PAGE, "not mapped");
        assert_eq!(Pages::read().size(&raw const maps as u64, 8), SMALL_PAGE);
    }

    #[test]
    fn a_library_loaded_is_noticed() {
        let before = cuda::libraries_loaded();
        assert!(before > 0);
        assert_eq!(cuda::libraries_loaded(), before);
        // SAFETY: a library of the C library's own, which has no constructor that could do harm.
        assert!(!unsafe { libc::dlopen(c"libanl.so.1".as_ptr(), libc::RTLD_NOW) }.is_null());
        assert!(cuda::libraries_loaded() > before);
    }
}
