//! Mooncake's C interface from Rust, linked like any C library:
//! rustc --edition 2021 -L /usr/local/lib transfer_engine.rs && ./transfer_engine [PROTOCOL]

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::ptr::null_mut;

#[repr(C)]
struct Request {
    opcode: c_int,
    source: *mut c_void,
    target_id: i32,
    target_offset: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct Status {
    status: c_int,
    transferred_bytes: u64,
}

const WRITE: c_int = 1;
const WAITING: c_int = 0;
const COMPLETED: c_int = 4;

#[link(name = "transfer_engine")]
extern "C" {
    fn createTransferEngine(
        metadata: *const c_char,
        name: *const c_char,
        host: *const c_char,
        port: u64,
        auto_discover: c_int,
    ) -> *mut c_void;
    fn destroyTransferEngine(engine: *mut c_void);
    fn discoverTopology(engine: *mut c_void) -> c_int;
    fn installTransport(engine: *mut c_void, protocol: *const c_char, args: *mut *mut c_void) -> *mut c_void;
    fn registerLocalMemory(
        engine: *mut c_void,
        address: *mut c_void,
        length: usize,
        location: *const c_char,
        remote_accessible: c_int,
    ) -> c_int;
    fn getLocalIpAndPort(engine: *mut c_void, to: *mut c_char, room: usize) -> c_int;
    fn openSegment(engine: *mut c_void, name: *const c_char) -> i32;
    fn allocateBatchID(engine: *mut c_void, size: usize) -> u64;
    fn submitTransfer(engine: *mut c_void, batch: u64, requests: *mut Request, count: usize) -> c_int;
    fn getTransferStatus(engine: *mut c_void, batch: u64, task: usize, status: *mut Status) -> c_int;
    fn freeBatchID(engine: *mut c_void, batch: u64) -> c_int;
}

struct Engine(*mut c_void);

impl Engine {
    fn new(protocol: &str, memory: &mut [u8]) -> Self {
        let protocol_c = CString::new(protocol).unwrap();
        // SAFETY: the strings live longer than the calls; the memory longer than the engine.
        unsafe {
            let host = c"127.0.0.1".as_ptr();
            let engine = createTransferEngine(c"P2PHANDSHAKE".as_ptr(), host, host, 0, 0);
            assert!(!engine.is_null(), "the log says why");
            assert!(protocol != "efa" || discoverTopology(engine) == 0);
            assert!(!installTransport(engine, protocol_c.as_ptr(), null_mut()).is_null());
            let base = memory.as_mut_ptr().cast();
            assert_eq!(registerLocalMemory(engine, base, memory.len(), c"*".as_ptr(), 1), 0);
            Self(engine)
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: it is one.
        unsafe { destroyTransferEngine(self.0) }
    }
}

fn main() {
    let protocol = std::env::args().nth(1).unwrap_or("efa".into());
    let (mut ours, mut theirs) = (vec![b'x'; 1 << 20], vec![0u8; 1 << 20]);
    let (near, far) = (Engine::new(&protocol, &mut ours), Engine::new(&protocol, &mut theirs));
    let mut name = [0; 256];
    let mut request = Request {
        opcode: WRITE,
        source: ours.as_mut_ptr().cast(),
        target_id: 0,
        target_offset: theirs.as_mut_ptr() as u64,
        length: ours.len() as u64,
    };
    let mut status = Status::default();
    // SAFETY: both engines and all memory live until the transfer has ended.
    unsafe {
        assert_eq!(getLocalIpAndPort(far.0, name.as_mut_ptr(), name.len()), 0);
        request.target_id = openSegment(near.0, CStr::from_ptr(name.as_ptr()).as_ptr());
        assert!(request.target_id >= 0, "the log says why");
        let batch = allocateBatchID(near.0, 1);
        assert_eq!(submitTransfer(near.0, batch, &mut request, 1), 0);
        while status.status == WAITING {
            assert_eq!(getTransferStatus(near.0, batch, 0, &mut status), 0);
        }
        assert_eq!(freeBatchID(near.0, batch), 0);
    }
    drop(far); // nobody writes to `theirs` any more
    assert!(status.status == COMPLETED && ours == theirs);
    println!("{} bytes moved and verified", status.transferred_bytes);
}
