//! After warm-up a transfer allocates nothing, through either door.

#[path = "../../capi/src/lib.rs"]
#[allow(dead_code)] // not all of it is tried here
mod capi;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use capi::types::{MEFA_READ, MEFA_WRITE, mefa_config, mefa_request};
use capi::*;
use mooncake_efa::config::Config;
use mooncake_efa::engine::{Request, Status};
use mooncake_efa::fabric::{Buffer, Memory};
use mooncake_efa::transport::{Options, Transport};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread during `f`.
fn allocations(mut f: impl FnMut()) -> u64 {
    let before = COUNT.get();
    f();
    COUNT.get() - before
}

/// Fails if `work` allocates however often it was done before. Buffers grow to the largest burst of
/// completions met, and when that comes is the provider's business.
fn settles_without_allocating(mut work: impl FnMut()) {
    let counts: Vec<u64> = (0..10).map(|_| allocations(&mut work)).collect();
    assert!(counts.contains(&0), "allocations in every round of work: {counts:?}");
}

const SIZE: u64 = 8 << 20;
const REQUESTS: u64 = 128;

#[test]
fn through_the_rust_door() {
    let transport = Transport::install(Options {
        server_name: "self:1".into(),
        topology: None,
        devices: Vec::new(),
        config: Config { provider: "tcp".into(), ..Config::from_env() },
        host: None,
        observer: None,
    })
    .expect("installed");
    let buffer = Buffer::new(SIZE).expect("mapped");
    transport.register(&[(Memory::from(&buffer), "*")]).expect("registered");
    let target = transport.open_segment(&transport.descriptor()).expect("opened");
    let half = SIZE / 2;
    let round = |length: u64, gap: u64, write: bool| {
        let batch = transport.allocate_batch(REQUESTS as u32).expect("batch");
        let requests = (0..REQUESTS as usize).map(|index| Request {
            write,
            local: buffer.address() + index as u64 * (length + gap),
            target,
            remote: buffer.address() + half + index as u64 * (length + gap),
            length,
            cookie: 0,
        });
        transport.submit(batch, requests, None).expect("started");
        let status = transport.wait(batch, Duration::from_secs(60)).expect("ends");
        assert_eq!(status, Status::Completed);
        transport.free_batch(batch).expect("freed");
    };
    let work = || {
        for _ in 0..50 {
            round(4096, 0, true); // merged
            round(4096, 64, false); // not merged
            round(0, 0, true);
        }
    };
    settles_without_allocating(work);
    // The count itself works.
    assert!(allocations(|| drop(transport.descriptor())) > 0);
}

#[test]
fn through_the_c_door() {
    // SAFETY: zero is valid for a configuration; every pointer outlives its call; the buffer
    // outlives the transport.
    unsafe {
        let buffer = Buffer::new(SIZE).expect("mapped");
        let mut config: mefa_config = std::mem::zeroed();
        config.size = size_of::<mefa_config>();
        config.server_name = c"self:2".as_ptr();
        config.provider = c"tcp".as_ptr();
        let (mut transport, mut target) = (0, 0);
        assert_eq!(mefa_install(&raw const config, &raw mut transport), 0);
        let (address, none) = (buffer.address(), std::ptr::null_mut());
        let location = std::ptr::null();
        assert_eq!(mefa_register(transport, address as *mut _, SIZE, location, None, none), 0);
        let mut descriptor = String::new();
        unsafe extern "C" fn keep(
            context: *mut std::ffi::c_void,
            text: *const std::ffi::c_char,
            length: usize,
        ) {
            // SAFETY: our own String, and a text of `length` bytes and a NUL.
            unsafe {
                let bytes = std::slice::from_raw_parts(text.cast::<u8>(), length + 1);
                *context.cast::<String>() = String::from_utf8(bytes.to_vec()).expect("UTF-8");
            }
        }
        let context = (&raw mut descriptor).cast();
        assert_eq!(mefa_descriptor_json(transport, Some(keep), context), 0);
        let json = descriptor.as_ptr().cast();
        assert_eq!(mefa_segment_open_json(transport, json, &raw mut target), 0);
        let requests: Vec<mefa_request> = (0..REQUESTS)
            .map(|index| mefa_request {
                opcode: if index % 2 == 0 { MEFA_READ } else { MEFA_WRITE },
                flags: 0,
                source: address + index * 5000,
                target,
                offset: address + SIZE / 2 + index * 5000,
                length: 4096,
                cookie: index,
            })
            .collect();
        let work = || {
            for _ in 0..50 {
                let (mut batch, mut status) = (0, 0);
                assert_eq!(mefa_batch_allocate(transport, requests.len(), &raw mut batch), 0);
                let (items, count) = (requests.as_ptr(), requests.len());
                assert_eq!(mefa_submit(transport, batch, items, count, 0), 0);
                assert_eq!(mefa_wait(transport, batch, 60_000_000_000, &raw mut status), 0);
                assert_eq!(status, 4);
                assert_eq!(mefa_batch_free(transport, batch), 0);
            }
        };
        settles_without_allocating(work);
        assert_eq!(mefa_uninstall(transport), 0);
    }
}
