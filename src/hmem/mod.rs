//! Which memory is whose. The CUDA driver is asked only if the process has loaded it already:
//! without it there is no device pointer to ask about.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_uint, c_void};

use parking_lot::Mutex;

use crate::error::{Code, Error, Result};
use crate::fabric::MemoryKind;

// From cuda.h: CUpointer_attribute and CUmemorytype.
const POINTER_MEMORY_TYPE: c_uint = 2;
const POINTER_IS_MANAGED: c_uint = 8;
const POINTER_DEVICE_ORDINAL: c_uint = 9;
const MEMORY_TYPE_DEVICE: c_uint = 2;

type PointerGetAttribute = unsafe extern "C" fn(*mut c_void, c_uint, u64) -> c_int;

/// Whether the CUDA driver is in this process.
pub fn cuda_loaded() -> bool {
    driver().is_some()
}

/// The kind of memory at `address`.
///
/// # Errors
/// [`Code::NotImplemented`] for CUDA managed memory, which moves between host and device under a
/// registration.
pub fn kind_of(address: u64) -> Result<MemoryKind> {
    let Some(get_attribute) = driver() else {
        return Ok(MemoryKind::Host);
    };
    let ask = |attribute: c_uint| {
        let mut value: u64 = 0;
        // SAFETY: the driver writes at most 8 bytes (an unsigned int or a bool for these
        // attributes); any address may be asked about, an unknown one is an error.
        let ret = unsafe { get_attribute((&raw mut value).cast(), attribute, address) };
        (ret == 0).then_some(value as u32)
    };
    // An error means that the driver does not know the pointer: plain host memory.
    if ask(POINTER_MEMORY_TYPE) != Some(MEMORY_TYPE_DEVICE) {
        return Ok(MemoryKind::Host);
    }
    if ask(POINTER_IS_MANAGED).is_some_and(|managed| managed & 0xff != 0) {
        return Err(Error::new(
            Code::NotImplemented,
            format!(
                "memory at {address:#x} is CUDA managed memory, which cannot be registered; \
                 allocate it with cudaMalloc or on the host"
            ),
        ));
    }
    Ok(MemoryKind::Cuda(ask(POINTER_DEVICE_ORDINAL).unwrap_or(0) as i32))
}

/// The driver's function, if the driver is in this process. Looked for again only when a library has
/// been loaded since: a search that finds nothing goes through the file system.
fn driver() -> Option<PointerGetAttribute> {
    static LAST: Mutex<(u64, Option<PointerGetAttribute>)> = Mutex::new((0, None));
    let loads = libraries_loaded();
    let mut last = LAST.lock();
    if last.0 != loads {
        *last = (loads, last.1.or_else(find_driver));
    }
    last.1
}

/// How many libraries this process has loaded so far.
fn libraries_loaded() -> u64 {
    unsafe extern "C" fn first(
        info: *mut libc::dl_phdr_info,
        _: usize,
        count: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader's own structure, and the number below.
        unsafe { *count.cast::<u64>() = (*info).dlpi_adds };
        1 // no more of them
    }
    let mut count: u64 = 0;
    // SAFETY: the function is called with our number while this call lasts.
    unsafe { libc::dl_iterate_phdr(Some(first), (&raw mut count).cast()) };
    count
}

fn find_driver() -> Option<PointerGetAttribute> {
    // SAFETY: NUL-terminated names; RTLD_NOLOAD only finds what is loaded already.
    let symbol = unsafe {
        let name: &CStr = c"libcuda.so.1";
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        if handle.is_null() {
            return None;
        }
        libc::dlsym(handle, c"cuPointerGetAttribute".as_ptr())
    };
    // SAFETY: the driver's function of this name has this C signature.
    (!symbol.is_null())
        .then(|| unsafe { std::mem::transmute::<*mut c_void, PointerGetAttribute>(symbol) })
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
        let before = libraries_loaded();
        assert!(before > 0);
        assert_eq!(libraries_loaded(), before);
        // SAFETY: a library of the C library's own, which has no constructor that could do harm.
        assert!(!unsafe { libc::dlopen(c"libanl.so.1".as_ptr(), libc::RTLD_NOW) }.is_null());
        assert!(libraries_loaded() > before);
    }
}
