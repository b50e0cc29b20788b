//! What NICs are told of a GPU's memory, on the fake CUDA driver (tests/gpu/fake_cuda.c) with two GPUs.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use mooncake_efa::config::Config;
use mooncake_efa::fabric::Memory;
use mooncake_efa::hmem::{self, DeviceBuffer, DeviceMemory, Kind};
use mooncake_efa::transport;

/// The fake driver's functions that are asked here.
struct Driver(*mut c_void);

impl Driver {
    /// Builds it, and loads it in the place of CUDA's own.
    fn load() -> Driver {
        let dir = tempfile::tempdir().expect("a directory");
        let library = dir.path().join("libcuda.so.1");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/fake_cuda.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", "-o"])
            .args([&library, &source])
            .status();
        assert!(built.expect("cc").success(), "the fake driver is not built");
        let path = CString::new(library.to_str().expect("text")).expect("no NUL");
        // SAFETY: its initialisers do nothing that a test minds; no other thread reads the environment.
        let handle = unsafe {
            std::env::set_var("FAKE_CUDA_DEVICES", "2");
            libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL)
        };
        assert!(!handle.is_null());
        Driver(handle)
    }

    fn function(&self, name: &CStr) -> *mut c_void {
        // SAFETY: an open library and a NUL-terminated name.
        let found = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?}");
        found
    }

    /// The device whose context is current on this thread.
    fn current(&self) -> Option<c_int> {
        let mut device = -1;
        // SAFETY: cuda.h's signature.
        let ret = unsafe {
            let ask: unsafe extern "C" fn(*mut c_int) -> c_int =
                std::mem::transmute(self.function(c"cuCtxGetDevice"));
            ask(&raw mut device)
        };
        (ret == 0).then_some(device)
    }

    /// Whether a device has a primary context.
    fn is_active(&self, device: c_int) -> bool {
        let (mut flags, mut active) = (0_u32, 0);
        // SAFETY: cuda.h's signature.
        unsafe {
            let ask: unsafe extern "C" fn(c_int, *mut u32, *mut c_int) -> c_int =
                std::mem::transmute(self.function(c"cuDevicePrimaryCtxGetState"));
            assert_eq!(ask(device, &raw mut flags, &raw mut active), 0);
        }
        active != 0
    }

    /// Whether copies that are said to be synchronous are, of memory at this address.
    fn is_ordered(&self, address: u64) -> bool {
        const SYNC_MEMOPS: c_int = 6;
        let mut ordered = 0_u8;
        // SAFETY: cuda.h's signature.
        unsafe {
            let ask: unsafe extern "C" fn(*mut u8, c_int, u64) -> c_int =
                std::mem::transmute(self.function(c"cuPointerGetAttribute"));
            assert_eq!(ask(&raw mut ordered, SYNC_MEMOPS, address), 0);
        }
        ordered != 0
    }

    fn fail(&self, rules: &CStr) {
        // SAFETY: fake_cuda.h's signature.
        unsafe {
            let fail: unsafe extern "C" fn(*const c_char) =
                std::mem::transmute(self.function(c"fake_cuda_fail"));
            fail(rules.as_ptr());
        }
    }
}

/// One test, because a process has one driver.
#[test]
fn gpu_memory_is_exported_and_no_other_gpu_is_touched() {
    // What keeps libfabric from the GPUs is not left to the programs that this process starts.
    let config = Config { provider: "tcp".into(), ..Config::default() };
    assert!(!transport::devices(&config).expect("tcp").is_empty());
    assert_eq!(std::env::var_os("FI_HMEM"), None);
    assert!(!hmem::gpu_in_use(), "no driver");
    let driver = Driver::load();
    assert!(hmem::cuda_loaded() && !hmem::gpu_in_use(), "loaded, and not used");
    hmem::in_used_context(|| assert_eq!(driver.current(), None, "nothing to choose from"));

    let buffer = DeviceBuffer::new(1, 4 << 20).expect("device memory");
    assert!(hmem::gpu_in_use());
    hmem::in_used_context(|| assert_eq!(driver.current(), Some(1), "the one in use"));
    assert_eq!(driver.current(), None, "as it was");

    // What is written by the file is in the device's memory.
    let length = 70_001;
    // SAFETY: it stays until the end of the test.
    let memory = unsafe { Memory::from_raw(buffer.address() + 100, length) }.expect("memory");
    assert_eq!(hmem::kind_of(&memory).expect("of one kind"), Kind::Device(1));
    let device = DeviceMemory::of(&memory, Kind::Device(1)).expect("a context").expect("a GPU's");
    let dmabuf = device.dmabuf().expect("exported");
    assert_eq!(dmabuf.start(), buffer.address(), "from a page on");
    assert_eq!(driver.current(), None);
    let file: File = dmabuf.as_fd().try_clone_to_owned().expect("a descriptor").into();
    let bytes: Vec<u8> = (0..length).map(|k| (k % 251) as u8).collect();
    file.write_all_at(&bytes, memory.address() - dmabuf.start()).expect("written");
    let mut there = vec![0; length as usize];
    buffer.read(100, &mut there).expect("copied");
    assert!(there == bytes, "other bytes");

    // A small allocation begins and ends inside a page.
    let small = DeviceBuffer::new(1, 700).expect("device memory");
    // SAFETY: as above.
    let memory = unsafe { Memory::from_raw(small.address(), 700) }.expect("memory");
    let of_page = DeviceMemory::of(&memory, Kind::Device(1)).expect("a context").expect("a GPU's");
    let start = of_page.dmabuf().expect("exported").start();
    assert!(start < small.address() && small.address() - start < 4096, "the page around it");

    assert!(!driver.is_ordered(buffer.address()));
    device.order_copies();
    assert!(driver.is_ordered(buffer.address()));

    driver.fail(c"cuMemGetHandleForAddressRange=801");
    let error = device.dmabuf().expect_err("refused");
    assert!(error.text.starts_with("cuMemGetHandleForAddressRange: "), "{error}");
    assert!(error.text.contains("(801)"), "{error}");
    assert!(!driver.is_active(0), "nobody asked for the first one");
}
