//! Device memory made ready for a NIC: exported as a file that other devices map, of whatever CUDA made it (VMM ranges
//! of several pieces too), and its copies put in order with what the NIC does.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::os::fd::{FromRawFd, OwnedFd};

use super::{DeviceMemory, cuda};
use crate::error::{Code, Error, Result};
use crate::fabric::Dmabuf;

impl DeviceMemory {
    /// The pages that it is on, as a file.
    ///
    /// # Errors
    /// The driver's, where it has none: for managed memory, on a kernel or with a driver that cannot, ...
    pub fn dmabuf(&self) -> Result<Dmabuf> {
        type Export = unsafe extern "C" fn(*mut c_void, u64, usize, c_uint, u64) -> c_int;
        const NAME: &CStr = c"cuMemGetHandleForAddressRange";
        const DMA_BUF_FD: c_uint = 1;
        const MAPPING_TYPE_PCIE: u64 = 1;
        let driver = self.context.driver();
        let Some(found) = cuda::find(NAME) else {
            return Err(Error::new(Code::Memory, "a CUDA driver before 11.7 has no dmabufs"));
        };
        // SAFETY: the driver's function of this name has this C signature.
        let export = unsafe { std::mem::transmute::<*mut c_void, Export>(found) };
        let page = page_size();
        let start = self.address / page * page;
        let end = (self.address + self.length).next_multiple_of(page);
        let _entered = self.context.enter()?;
        let mut fd: c_int = -1;
        let mut try_with = |flags| {
            let size = (end - start) as usize;
            // SAFETY: a context is current; the driver checks the range, and writes one descriptor.
            let ret = unsafe { export((&raw mut fd).cast(), start, size, DMA_BUF_FD, flags) };
            driver.check("cuMemGetHandleForAddressRange", ret)
        };
        // Where a GPU has another way to the CPU than PCIe (GB200), a NIC still needs that one; elsewhere the flag is
        // not known, or not taken.
        try_with(MAPPING_TYPE_PCIE).or_else(|_| try_with(0))?;
        // SAFETY: a descriptor made for us.
        Ok(Dmabuf::new(unsafe { OwnedFd::from_raw_fd(fd) }, start))
    }

    /// Has CUDA wait for the copies of this allocation that it says to be synchronous before it returns, which it does
    /// not for all: a NIC, or a copy in a stream of ours, would take what was there before. CUDA has no such thing for VMM
    /// memory, whose users wait for their streams.
    pub fn order_copies(&self) {
        const SYNC_MEMOPS: c_uint = 6;
        let on: c_uint = 1;
        // SAFETY: the driver checks the address; the attribute is one unsigned int.
        let ret = unsafe {
            let value = (&raw const on).cast();
            (self.context.driver().set_pointer)(value, SYNC_MEMOPS, self.address)
        };
        log::debug!("CUDA's copies of the memory at {:#x} are put in order: {ret}", self.address);
    }
}

fn page_size() -> u64 {
    // SAFETY: a question to the C library.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}
