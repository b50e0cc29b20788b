//! Memory that may be read and written by other hosts.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Code, Error, Result};

/// A promise about a range of memory: it stays mapped for as long as it is registered.
///
/// This is where a caller's pointer enters the library; from here on it is checked numbers.
#[derive(Clone, Debug)]
pub struct Memory {
    address: u64,
    length: u64,
    /// Keeps memory of ours alive; `None` where the caller promised.
    _owner: Option<Arc<dyn Owner>>,
}

/// Memory of ours, which is there for as long as this is.
pub trait Owner: fmt::Debug + Send + Sync {}

impl Owner for Buffer {}

impl Memory {
    /// All of a mapping that `owner` keeps.
    ///
    /// # Safety
    /// The range must stay mapped until `owner` is dropped, and be free for other hosts to read and write.
    pub(crate) unsafe fn owned(address: u64, length: u64, owner: Arc<dyn Owner>) -> Self {
        Self { address, length, _owner: Some(owner) }
    }

    /// Takes the caller's word for `length` bytes at `address` (host, or device as CUDA names it).
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] if it is empty, starts at 0, or wraps around the address space.
    ///
    /// # Safety
    /// The range must stay mapped, and must be free for other hosts to read and write, until it has
    /// been unregistered with success or the transport it was registered with is gone.
    pub unsafe fn from_raw(address: u64, length: u64) -> Result<Self> {
        if address == 0 || length == 0 || address.checked_add(length).is_none() {
            return Err(Error::invalid(format!(
                "memory at {address:#x} of {length} bytes: NULL, empty, or past the end of the \
                 address space"
            )));
        }
        Ok(Self { address, length, _owner: None })
    }

    /// Addresses of a simulated NIC, which touches no memory.
    #[cfg(test)]
    pub(crate) fn simulated(address: u64, length: u64) -> Self {
        Self { address, length, _owner: None }
    }

    /// `length` bytes of it, from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside.
    #[must_use]
    pub fn part(&self, offset: u64, length: u64) -> Self {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length) && length > 0);
        Self { address: self.address + offset, length, _owner: self._owner.clone() }
    }

    /// First byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes; never 0.
    pub fn length(&self) -> u64 {
        self.length
    }
}

impl From<&Arc<Buffer>> for Memory {
    fn from(buffer: &Arc<Buffer>) -> Self {
        Self { address: buffer.address(), length: buffer.length, _owner: Some(buffer.clone()) }
    }
}

/// Device memory as a file, by which other devices map it without knowing whose it is. Needed only while memory is
/// being registered; closed when dropped.
#[derive(Debug)]
pub struct Dmabuf {
    file: OwnedFd,
    start: u64,
}

impl Dmabuf {
    /// The file, and the address of its first byte, as CUDA names it.
    pub fn new(file: OwnedFd, start: u64) -> Self {
        Self { file, start }
    }

    /// The address of its first byte.
    pub fn start(&self) -> u64 {
        self.start
    }
}

impl AsFd for Dmabuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Page-aligned, zeroed host memory of our own. Other hosts may change it at any time, so it is
/// never lent out as a slice: bytes are copied in and out.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    length: u64,
}

// SAFETY: a plain mapping without thread affinity, read and written through raw copies only.
unsafe impl Send for Buffer {}
// SAFETY: as above. Concurrent copies of overlapping ranges can mix old and new bytes, as writes
// from other hosts can; no reference to the bytes ever exists.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Maps `length` bytes.
    pub fn new(length: u64) -> Result<Arc<Self>> {
        let failed = |why: std::io::Error| {
            Error::new(Code::Memory, format!("cannot map {length} bytes of memory: {why}"))
        };
        let size = usize::try_from(length).map_err(|_| Error::invalid("buffer too large"))?;
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| Error::invalid("mapped at 0"))?;
        Ok(Arc::new(Self { start, length }))
    }

    /// As [`Self::new`], of huge pages where the kernel has some to give.
    pub fn huge(length: u64) -> Result<Arc<Self>> {
        const HUGE: u64 = 2 << 20;
        let wide = Self::new(length + HUGE)?;
        let wide =
            Arc::try_unwrap(wide).map_err(|_| Error::new(Code::Internal, "shared already"))?;
        let (from, end) = (wide.address(), wide.address() + wide.length);
        std::mem::forget(wide);
        let start = from.next_multiple_of(HUGE);
        let after = (start + length).next_multiple_of(4096);
        // SAFETY: parts of our own mapping that nobody uses; advice changes no byte.
        unsafe {
            for (from, to) in [(from, start), (after, end)] {
                if from < to {
                    libc::munmap(from as *mut libc::c_void, (to - from) as usize);
                }
            }
            libc::madvise(start as *mut libc::c_void, length as usize, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start as *mut u8).ok_or_else(|| Error::invalid("mapped at 0"))?;
        Ok(Arc::new(Self { start, length }))
    }

    /// First byte, as transfers name it.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let at = self.check(offset, bytes.len());
        // SAFETY: inside the mapping (checked), and `bytes` cannot overlap it: no reference into the
        // mapping ever exists.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(at), bytes.len())
        }
    }

    /// Copies from `offset` into `bytes`.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let at = self.check(offset, bytes.len());
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start.as_ptr().add(at),
                bytes.as_mut_ptr(),
                bytes.len(),
            )
        }
    }

    fn check(&self, offset: u64, length: usize) -> usize {
        let end = offset.checked_add(length as u64);
        assert!(end.is_some_and(|end| end <= self.length), "range outside of the buffer");
        offset as usize
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: our own mapping, in the size it was made with; the last user is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length as usize) };
    }
}
