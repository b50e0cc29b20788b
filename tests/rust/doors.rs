//! The same test bodies on the Rust API and through the C ABI, between two real processes, over real
//! providers.
//!
//! The other process is this test binary again, running [`target_process`] alone; it obeys lines on
//! its standard input.

#[path = "../../capi/src/lib.rs"]
#[allow(dead_code)] // not all of it is tried here
mod capi;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mooncake_efa::Code;
use mooncake_efa::config::Config;
use mooncake_efa::engine::{BatchId, Request, TargetId};
use mooncake_efa::fabric::{Buffer, Memory};
use mooncake_efa::segment::Segment;
use mooncake_efa::transport::{Options, Transport};

const LIMIT: Duration = Duration::from_secs(60);
const PENDING: i32 = 1;
const CANCELED: i32 = 3;
const COMPLETED: i32 = 4;
const TIMEOUT: i32 = 5;
const FAILED: i32 = 6;
const INVALID: i32 = -1;
const BUSY: i32 = -4;
const FULL: i32 = -2;

/// One transfer, as both doors take it.
#[derive(Clone, Copy)]
struct Move {
    write: bool,
    local: u64,
    target: u64,
    remote: u64,
    length: u64,
}

/// What the bodies need of a door. Errors are return codes.
trait Door: Sync + Sized {
    fn install(provider: &str) -> Self;
    fn register(&self, buffer: &Arc<Buffer>, offset: u64, length: u64) -> Result<(), i32>;
    fn unregister(&self, address: u64) -> Result<(), i32>;
    fn descriptor(&self) -> String;
    fn open(&self, descriptor: &str) -> Result<u64, i32>;
    fn allocate(&self, capacity: usize) -> Result<u64, i32>;
    fn free(&self, batch: u64) -> Result<(), i32>;
    fn submit(&self, batch: u64, moves: &[Move], timeout: Duration) -> Result<(), i32>;
    fn task(&self, batch: u64, task: usize) -> Result<(i32, u64), i32>;
    fn wait(&self, batch: u64, timeout: Duration) -> Result<i32, i32>;
    fn cancel(&self, batch: u64) -> Result<(), i32>;
    fn is_quiet(&self, batch: u64) -> Result<bool, i32>;
    fn wait_quiet(&self, batch: u64, timeout: Duration) -> Result<(), i32>;
    fn error(&self, batch: u64, task: usize) -> String;

    /// One batch of moves, waited for; its status.
    fn run(&self, moves: &[Move]) -> i32 {
        let batch = self.allocate(moves.len()).expect("batch");
        self.submit(batch, moves, LIMIT).expect("started");
        let status = self.wait(batch, LIMIT).expect("ends in time");
        self.free(batch).expect("freed");
        status
    }
}

struct Rust(Transport);

fn code(error: mooncake_efa::Error) -> i32 {
    assert!(!error.text.is_empty());
    error.code as i32
}

impl Door for Rust {
    fn install(provider: &str) -> Self {
        let options = Options {
            server_name: "here:1".into(),
            topology: None,
            devices: Vec::new(),
            config: Config { provider: provider.into(), ..Config::from_env() },
            host: None,
            observer: None,
        };
        Self(Transport::install(options).expect("installed"))
    }

    fn register(&self, buffer: &Arc<Buffer>, offset: u64, length: u64) -> Result<(), i32> {
        let memory = Memory::from(buffer).part(offset, length);
        self.0.register(&[(memory, "*")]).map(drop).map_err(code)
    }

    fn unregister(&self, address: u64) -> Result<(), i32> {
        self.0.unregister(address).map_err(code)
    }

    fn descriptor(&self) -> String {
        self.0.descriptor().to_json()
    }

    fn open(&self, descriptor: &str) -> Result<u64, i32> {
        let segment = Segment::from_json(descriptor).map_err(code)?;
        self.0.open_segment(&segment).map(|id| id.0).map_err(code)
    }

    fn allocate(&self, capacity: usize) -> Result<u64, i32> {
        self.0.allocate_batch(capacity as u32).map(|id| id.0).map_err(code)
    }

    fn free(&self, batch: u64) -> Result<(), i32> {
        self.0.free_batch(BatchId(batch)).map_err(code)
    }

    fn submit(&self, batch: u64, moves: &[Move], timeout: Duration) -> Result<(), i32> {
        let requests = moves.iter().map(|one| Request {
            write: one.write,
            local: one.local,
            target: TargetId(one.target),
            remote: one.remote,
            length: one.length,
            cookie: 0,
        });
        self.0.submit(BatchId(batch), requests, Some(timeout)).map(drop).map_err(code)
    }

    fn task(&self, batch: u64, task: usize) -> Result<(i32, u64), i32> {
        let (status, bytes) = self.0.task_status(BatchId(batch), task as u32).map_err(code)?;
        Ok((status as i32, bytes))
    }

    fn wait(&self, batch: u64, timeout: Duration) -> Result<i32, i32> {
        self.0.wait(BatchId(batch), timeout).map(|status| status as i32).map_err(code)
    }

    fn cancel(&self, batch: u64) -> Result<(), i32> {
        self.0.cancel(BatchId(batch)).map_err(code)
    }

    fn is_quiet(&self, batch: u64) -> Result<bool, i32> {
        self.0.is_quiet(BatchId(batch)).map_err(code)
    }

    fn wait_quiet(&self, batch: u64, timeout: Duration) -> Result<(), i32> {
        self.0.wait_quiet(BatchId(batch), timeout).map_err(code)
    }

    fn error(&self, batch: u64, task: usize) -> String {
        self.0.task_error(BatchId(batch), task as u32).expect("a task").unwrap_or_default()
    }
}

mod c {
    use super::*;
    use crate::capi::types::*;
    use crate::capi::*;
    use std::ffi::{CStr, CString, c_char, c_void};

    pub struct C(mefa_transport);

    fn check(ret: i32) -> Result<(), i32> {
        if ret == 0 {
            return Ok(());
        }
        // SAFETY: a NUL-terminated string until the next failing call.
        assert!(!unsafe { CStr::from_ptr(mefa_last_error()) }.is_empty());
        Err(ret)
    }

    unsafe extern "C" fn keep(context: *mut c_void, text: *const c_char, length: usize) {
        // SAFETY: our own String, and a text of `length` bytes.
        unsafe {
            let bytes = std::slice::from_raw_parts(text.cast::<u8>(), length);
            *context.cast::<String>() = String::from_utf8(bytes.to_vec()).expect("UTF-8");
        }
    }

    impl Door for C {
        fn install(provider: &str) -> Self {
            let (name, provider) = (c"here:1", CString::new(provider).expect("no NUL"));
            // SAFETY: zero is valid for a configuration; the strings outlive the call.
            unsafe {
                let mut config: mefa_config = std::mem::zeroed();
                config.size = size_of::<mefa_config>();
                config.server_name = name.as_ptr();
                config.provider = provider.as_ptr();
                let mut transport = 0;
                check(mefa_install(&raw const config, &raw mut transport)).expect("installed");
                Self(transport)
            }
        }

        fn register(&self, buffer: &Arc<Buffer>, offset: u64, length: u64) -> Result<(), i32> {
            let address = (buffer.address() + offset) as *mut c_void;
            // The C door does not own memory: kept for good rather than trusting every test to.
            static KEPT: Mutex<Vec<Arc<Buffer>>> = Mutex::new(Vec::new());
            KEPT.lock().unwrap().push(buffer.clone());
            // SAFETY: the buffer is never unmapped.
            check(unsafe {
                mefa_register(self.0, address, length, std::ptr::null(), None, std::ptr::null_mut())
            })
        }

        fn unregister(&self, address: u64) -> Result<(), i32> {
            check(mefa_unregister(self.0, address as *mut c_void))
        }

        fn descriptor(&self) -> String {
            let mut text = String::new();
            // SAFETY: `keep` takes this context.
            let ret = unsafe { mefa_descriptor_json(self.0, Some(keep), (&raw mut text).cast()) };
            check(ret).expect("described");
            text
        }

        fn open(&self, descriptor: &str) -> Result<u64, i32> {
            let json = CString::new(descriptor).expect("no NUL");
            let mut segment = 0;
            // SAFETY: a string, and a place for the result.
            check(unsafe { mefa_segment_open_json(self.0, json.as_ptr(), &raw mut segment) })?;
            Ok(segment)
        }

        fn allocate(&self, capacity: usize) -> Result<u64, i32> {
            let mut batch = 0;
            // SAFETY: a place for the result.
            check(unsafe { mefa_batch_allocate(self.0, capacity, &raw mut batch) })?;
            Ok(batch)
        }

        fn free(&self, batch: u64) -> Result<(), i32> {
            check(mefa_batch_free(self.0, batch))
        }

        fn submit(&self, batch: u64, moves: &[Move], timeout: Duration) -> Result<(), i32> {
            let requests: Vec<mefa_request> = moves
                .iter()
                .map(|one| mefa_request {
                    opcode: if one.write { MEFA_WRITE } else { MEFA_READ },
                    flags: 0,
                    source: one.local,
                    target: one.target,
                    offset: one.remote,
                    length: one.length,
                    cookie: 0,
                })
                .collect();
            let nanoseconds = timeout.as_nanos() as u64;
            // SAFETY: as many requests as said.
            check(unsafe {
                mefa_submit(self.0, batch, requests.as_ptr(), requests.len(), nanoseconds)
            })
        }

        fn task(&self, batch: u64, task: usize) -> Result<(i32, u64), i32> {
            let mut state = mefa_task_state { status: -1, reserved: 0, bytes: 0 };
            // SAFETY: a place for the result.
            check(unsafe { mefa_task_status(self.0, batch, task, &raw mut state) })?;
            Ok((state.status, state.bytes))
        }

        fn wait(&self, batch: u64, timeout: Duration) -> Result<i32, i32> {
            let mut status = -1;
            let nanoseconds = timeout.as_nanos() as u64;
            // SAFETY: a place for the result.
            check(unsafe { mefa_wait(self.0, batch, nanoseconds, &raw mut status) })?;
            Ok(status)
        }

        fn cancel(&self, batch: u64) -> Result<(), i32> {
            check(mefa_cancel(self.0, batch))
        }

        fn is_quiet(&self, batch: u64) -> Result<bool, i32> {
            let mut quiet = -1;
            // SAFETY: a place for the result.
            check(unsafe { mefa_batch_quiet(self.0, batch, &raw mut quiet) })?;
            Ok(quiet == 1)
        }

        fn wait_quiet(&self, batch: u64, timeout: Duration) -> Result<(), i32> {
            check(mefa_wait_quiet(self.0, batch, timeout.as_nanos() as u64))
        }

        fn error(&self, batch: u64, task: usize) -> String {
            let mut text = String::new();
            let context = (&raw mut text).cast();
            // SAFETY: `keep` takes this context.
            check(unsafe { mefa_task_error(self.0, batch, task, Some(keep), context) })
                .expect("a task");
            text
        }
    }

    impl Drop for C {
        fn drop(&mut self) {
            check(mefa_uninstall(self.0)).expect("uninstalled");
        }
    }
}
use c::C;

/// A byte that is different for every address, round and process.
fn pattern(seed: u64, offset: u64) -> u8 {
    let mixed = (offset ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

fn fill(buffer: &Buffer, offset: u64, length: u64, seed: u64) {
    let bytes: Vec<u8> = (offset..offset + length).map(|at| pattern(seed, at)).collect();
    buffer.write(offset, &bytes);
}

fn check(buffer: &Buffer, offset: u64, length: u64, expected: impl Fn(u64) -> u8) {
    let mut bytes = vec![0; length as usize];
    buffer.read(offset, &mut bytes);
    for (index, &byte) in bytes.iter().enumerate() {
        let at = offset + index as u64;
        assert_eq!(byte, expected(at), "byte at {at}");
    }
}

/// The other process.
struct Target {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    descriptor: String,
    base: u64,
}

impl Target {
    /// A target with `length` bytes registered, in `parts` registrations.
    fn start(provider: &str, length: u64, parts: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "target_process", "--nocapture", "--include-ignored", "-q"])
            .env("MEFA_TEST_TARGET", format!("{provider} {length} {parts}"))
            // On an emulated EFA device: another host.
            .env("SOFTEFA_HOST", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("target process");
        let input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let descriptor = answer(&mut output);
        let base = answer(&mut output).parse().expect("an address");
        Self { child, input, output, descriptor, base }
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").expect("target is alive");
        answer(&mut self.output)
    }

    /// The target fills a range of its buffer with a pattern.
    fn fill(&mut self, offset: u64, length: u64, seed: u64) {
        assert_eq!(self.ask(&format!("fill {offset} {length} {seed}")), "ok");
    }

    /// The target checks a range for a pattern, or for zeros with seed 0.
    fn check(&mut self, offset: u64, length: u64, seed: u64) {
        assert_eq!(self.ask(&format!("check {offset} {length} {seed}")), "ok");
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The next line that the target meant for us; the test harness prints others.
fn answer(output: &mut BufReader<ChildStdout>) -> String {
    loop {
        let mut line = String::new();
        let read = output.read_line(&mut line).expect("target answers");
        assert!(read > 0, "the target process ended");
        if let Some(at) = line.find("mefa> ") {
            return line[at + 6..].trim_end().to_owned();
        }
    }
}

#[test]
#[ignore = "the other process of the other tests"]
fn target_process() {
    let Ok(order) = std::env::var("MEFA_TEST_TARGET") else { return };
    let words: Vec<&str> = order.split(' ').collect();
    let (length, parts): (u64, u64) =
        (words[1].parse().expect("length"), words[2].parse().expect("parts"));
    let door = Rust::install(words[0]);
    let buffer = Buffer::new(length).expect("mapped");
    for part in 0..parts {
        let size = length / parts;
        let size = if part == parts - 1 { length - part * size } else { size };
        door.register(&buffer, part * (length / parts), size).expect("registered");
    }
    println!("mefa> {}", door.descriptor());
    println!("mefa> {}", buffer.address());
    for line in std::io::stdin().lines() {
        let line = line.expect("readable");
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().expect("a number");
        match words[0] {
            "fill" => fill(&buffer, number(1), number(2), number(3)),
            "check" => check(&buffer, number(1), number(2), |at| match number(3) {
                0 => 0,
                seed => pattern(seed, at),
            }),
            _ => panic!("{line}"),
        }
        println!("mefa> ok");
    }
}

const MIB: u64 = 1 << 20;

/// A target and a door, each with `length` bytes registered in one piece, and the target's segment.
fn pair<D: Door>(provider: &str, length: u64) -> (Target, D, Arc<Buffer>, u64) {
    let target = Target::start(provider, length, 1);
    let door = D::install(provider);
    let buffer = Buffer::new(length).expect("mapped");
    door.register(&buffer, 0, length).expect("registered");
    let segment = door.open(&target.descriptor).expect("opened");
    (target, door, buffer, segment)
}

fn lengths<D: Door>(provider: &str) {
    let (mut target, door, buffer, segment) = pair::<D>(provider, 80 * MIB);
    let lengths = [0, 1, 3, 4095, 4096, 65537, MIB + 13, 64 * MIB];
    for (round, &length) in lengths.iter().enumerate() {
        let (seed, here, there) = (round as u64 * 2 + 1, 4097, 8191);
        let one = Move {
            write: true,
            local: buffer.address() + here,
            target: segment,
            remote: target.base + there,
            length,
        };
        // The pattern is that of the place it goes to.
        let bytes: Vec<u8> = (there..there + length).map(|at| pattern(seed, at)).collect();
        buffer.write(here, &bytes);
        assert_eq!(door.run(&[one]), COMPLETED);
        target.check(there, length, seed);
        target.fill(there, length, seed + 1);
        assert_eq!(door.run(&[Move { write: false, ..one }]), COMPLETED);
        check(&buffer, here, length, |at| pattern(seed + 1, at - here + there));
    }
    target.check(0, 8191, 0);
    target.check(8191 + 64 * MIB, 8 * MIB, 0);
}

fn many_regions<D: Door>(provider: &str) {
    let mut target = Target::start(provider, 64 * MIB, 7);
    let door = D::install(provider);
    let buffer = Buffer::new(64 * MIB).expect("mapped");
    let regions = [(3 * MIB + 4096, 61 * MIB - 4096), (0, 3 * MIB), (3 * MIB, 4096)];
    for (offset, length) in regions {
        door.register(&buffer, offset, length).expect("registered");
    }
    // Peers find them in the order of their registration.
    let told = Segment::from_json(&door.descriptor()).expect("a descriptor").buffers;
    let told = told.iter().map(|one| (one.addr - buffer.address(), one.length));
    assert!(told.eq(regions));
    let segment = door.open(&target.descriptor).expect("opened");
    fill(&buffer, 0, 64 * MIB, 5);
    let (local, remote) = (buffer.address(), target.base);
    let whole = Move { write: true, local, target: segment, remote, length: 64 * MIB };
    assert_eq!(door.run(&[whole]), COMPLETED);
    target.check(0, 64 * MIB, 5);
    target.fill(0, 64 * MIB, 6);
    assert_eq!(door.run(&[Move { write: false, ..whole }]), COMPLETED);
    check(&buffer, 0, 64 * MIB, |at| pattern(6, at));
}

fn past_four_gib<D: Door>(provider: &str) {
    let size = (4 << 30) + 16 * MIB;
    let (mut target, door, buffer, segment) = pair::<D>(provider, size);
    let offset = (4 << 30) - 3 * MIB - 5;
    fill(&buffer, offset, 9 * MIB, 7);
    let one = Move {
        write: true,
        local: buffer.address() + offset,
        target: segment,
        remote: target.base + offset,
        length: 9 * MIB,
    };
    assert_eq!(door.run(&[one]), COMPLETED);
    target.check(offset, 9 * MIB, 7);
    target.check(0, MIB, 0);
}

/// A NIC's page table has no room for so many small pages, so that each NIC gets a part. Untouched memory
/// costs nothing on the emulated device only.
fn past_a_page_table<D: Door>(provider: &str) {
    if std::env::var_os("SOFTEFA_DIR").is_none() {
        eprintln!("skipped: not an emulated device");
        return;
    }
    // Two at once would not fit: the table is the NIC's, whoever uses it.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let size: u64 = 96 << 30;
    let mut target = Target::start(provider, 8 * MIB, 1);
    let door = D::install(provider);
    let buffer = Buffer::new(size).expect("mapped");
    for _ in 0..2 {
        door.register(&buffer, 0, size).expect("registered, and again: the room was given back");
        let told = Segment::from_json(&door.descriptor()).expect("a descriptor").buffers;
        assert!(told.iter().all(|part| part.rkey.contains(&0)), "on some of the NICs only");
        assert_eq!(told.iter().map(|part| part.length).sum::<u64>(), size);
        let segment = door.open(&target.descriptor).expect("opened");
        let offset = told[0].length - 3 * MIB - 5;
        let bytes: Vec<u8> = (0..8 * MIB).map(|at| pattern(19, at)).collect();
        buffer.write(offset, &bytes);
        let one = Move {
            write: true,
            local: buffer.address() + offset,
            target: segment,
            remote: target.base,
            length: 8 * MIB,
        };
        assert_eq!(door.run(&[one]), COMPLETED);
        target.check(0, 8 * MIB, 19);
        assert!(door.register(&buffer, 0, size).is_err(), "it is registered already");
        door.unregister(buffer.address()).expect("unregistered");
    }
}

fn many_threads<D: Door>(provider: &str) {
    const THREADS: u64 = 16;
    let (mut target, door, buffer, segment) = pair::<D>(provider, THREADS * MIB);
    fill(&buffer, 0, THREADS * MIB, 9);
    let (door, local, remote) = (&door, buffer.address(), target.base);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                // Pieces of 1 to 16 KiB, in an order that merges little.
                for round in 0..4 {
                    let moves: Vec<Move> = (0..64)
                        .map(|index| {
                            let offset = thread * MIB + (index * 4 + round) * 4096;
                            Move {
                                write: true,
                                local: local + offset,
                                target: segment,
                                remote: remote + offset,
                                length: 4096,
                            }
                        })
                        .collect();
                    assert_eq!(door.run(&moves), COMPLETED);
                }
            });
        }
    });
    target.check(0, THREADS * MIB, 9);
}

fn batch_limit<D: Door>(provider: &str) {
    let (mut target, door, buffer, segment) = pair::<D>(provider, MIB);
    fill(&buffer, 0, MIB, 11);
    let moves: Vec<Move> = (0..257)
        .map(|index| Move {
            write: true,
            local: buffer.address() + index * 1000,
            target: segment,
            remote: target.base + index * 1000,
            length: 1000,
        })
        .collect();
    let batch = door.allocate(256).expect("batch");
    assert_eq!(door.submit(batch, &moves, LIMIT), Err(FULL));
    target.check(0, MIB, 0);
    door.submit(batch, &moves[..100], LIMIT).expect("started");
    door.submit(batch, &moves[100..256], LIMIT).expect("started");
    assert_eq!(door.submit(batch, &moves[256..], LIMIT), Err(FULL));
    assert_eq!(door.wait(batch, LIMIT), Ok(COMPLETED));
    assert_eq!(door.task(batch, 255), Ok((COMPLETED, 1000)));
    assert!(door.task(batch, 256).is_err());
    door.free(batch).expect("freed");
    assert!(door.free(batch).is_err());
    target.check(0, 256_000, 11);
    target.check(256_000, 1000, 0);
    assert!(door.allocate(0).is_err());
    assert!(door.allocate((1 << 20) + 1).is_err());
}

/// Numbers of one transport are no numbers of another in the same process.
fn foreign_numbers<D: Door>(provider: &str) {
    let (mut target, ours, _buffer, segment) = pair::<D>(provider, MIB);
    let theirs = D::install(provider);
    let other = Buffer::new(MIB).expect("mapped");
    theirs.register(&other, 0, MIB).expect("registered");
    let their_segment = theirs.open(&target.descriptor).expect("opened");
    let (batch, their_batch) =
        (ours.allocate(1).expect("batch"), theirs.allocate(1).expect("batch"));
    fill(&other, 0, MIB, 19);
    let one = Move {
        write: true,
        local: other.address(),
        target: their_segment,
        remote: target.base,
        length: 4096,
    };
    assert_eq!(theirs.submit(batch, &[one], LIMIT), Err(INVALID));
    let foreign = Move { target: segment, ..one };
    assert_eq!(theirs.submit(their_batch, &[foreign], LIMIT), Err(INVALID));
    assert_eq!(theirs.wait(batch, LIMIT), Err(INVALID));
    assert_eq!(theirs.task(batch, 0), Err(INVALID));
    assert_eq!(theirs.is_quiet(batch), Err(INVALID));
    assert_eq!(theirs.wait_quiet(batch, LIMIT), Err(INVALID));
    assert_eq!(theirs.cancel(batch), Err(INVALID));
    assert_eq!(theirs.free(batch), Err(INVALID));
    target.check(0, MIB, 0);
    theirs.submit(their_batch, &[one], LIMIT).expect("started");
    assert_eq!(theirs.wait(their_batch, LIMIT), Ok(COMPLETED));
    target.check(0, 4096, 19);
    theirs.free(their_batch).expect("freed");
    ours.free(batch).expect("freed");
}

/// A target that does not answer: what is under way keeps its batch and memory.
fn stopped_target<D: Door>(provider: &str) {
    let (mut target, door, buffer, segment) = pair::<D>(provider, 64 * MIB);
    let one = Move {
        write: true,
        local: buffer.address(),
        target: segment,
        remote: target.base,
        length: 64 * MIB,
    };
    assert_eq!(door.run(&[Move { length: 1, ..one }]), COMPLETED);
    target.signal("-STOP");
    let batch = door.allocate(1).expect("batch");
    fill(&buffer, 0, 64 * MIB, 13);
    door.submit(batch, &[one], LIMIT).expect("started");
    assert_eq!(door.wait(batch, Duration::from_millis(50)), Err(-400));
    assert_eq!(door.task(batch, 0), Ok((PENDING, 0)));
    assert_eq!(door.free(batch), Err(BUSY));
    assert_eq!(door.unregister(buffer.address()), Err(BUSY));
    // A deadline that passes ends the task; its memory stays in use until the target goes on.
    let late = door.allocate(1).expect("batch");
    door.submit(late, &[one], Duration::from_millis(1)).expect("started");
    assert_eq!(door.wait(late, LIMIT), Ok(FAILED));
    assert_eq!(door.task(late, 0), Ok((TIMEOUT, 0)));
    let why = door.error(late, 0);
    assert!(why.starts_with("write of ") && why.contains(" to here:1 over "), "{why}");
    assert!(why.contains("its deadline passed"), "{why}");
    assert_eq!(door.is_quiet(late), Ok(false));
    assert_eq!(door.wait_quiet(late, Duration::from_millis(50)), Err(-400));
    let cancelled = door.allocate(1).expect("batch");
    door.submit(cancelled, &[one], LIMIT).expect("started");
    door.cancel(cancelled).expect("a batch");
    target.signal("-CONT");
    assert_eq!(door.wait(batch, LIMIT), Ok(COMPLETED));
    door.wait(cancelled, LIMIT).expect("ends");
    let (status, _) = door.task(cancelled, 0).expect("a task");
    assert_eq!(status, CANCELED);
    door.wait_quiet(late, LIMIT).expect("what was late comes back");
    assert_eq!(door.is_quiet(late), Ok(true));
    target.check(0, 64 * MIB, 13);
    for batch in [batch, late, cancelled] {
        door.free(batch).expect("freed");
    }
    door.unregister(buffer.address()).expect("nothing uses it");
}

fn dead_target<D: Door>(provider: &str) {
    let (mut target, door, buffer, segment) = pair::<D>(provider, 64 * MIB);
    let moves: Vec<Move> = (0..64)
        .map(|index| Move {
            write: true,
            local: buffer.address() + index * MIB,
            target: segment,
            remote: target.base + index * MIB,
            length: MIB,
        })
        .collect();
    assert_eq!(door.run(&moves[..1]), COMPLETED);
    target.signal("-STOP");
    let batch = door.allocate(64).expect("batch");
    door.submit(batch, &moves, Duration::from_secs(2)).expect("started");
    target.child.kill().expect("killed");
    target.child.wait().expect("dead");
    assert_eq!(door.wait(batch, LIMIT), Ok(FAILED));
    for task in 0..64 {
        let (status, _) = door.task(batch, task).expect("a task");
        assert!(matches!(status, FAILED | TIMEOUT | COMPLETED), "{status}");
    }
    door.free(batch).expect("freed");
    // The living are still served.
    let mut other = Target::start(provider, MIB, 1);
    let segment = door.open(&other.descriptor).expect("opened");
    fill(&buffer, 0, MIB, 15);
    let one = Move { target: segment, remote: other.base, ..moves[0] };
    assert_eq!(door.run(&[one]), COMPLETED);
    other.check(0, MIB, 15);
}

fn wrong_key<D: Door>(provider: &str) {
    let mut target = Target::start(provider, MIB, 1);
    let door = D::install(provider);
    let buffer = Buffer::new(MIB).expect("mapped");
    door.register(&buffer, 0, MIB).expect("registered");
    fill(&buffer, 0, MIB, 17);
    let mut wrong = Segment::from_json(&target.descriptor).expect("a descriptor");
    wrong.buffers[0].rkey[0] ^= 0x5a5a;
    let segment = door.open(&wrong.to_json()).expect("opened");
    let one = Move {
        write: true,
        local: buffer.address(),
        target: segment,
        remote: target.base,
        length: 4096,
    };
    let batch = door.allocate(1).expect("batch");
    door.submit(batch, &[one], Duration::from_secs(5)).expect("started");
    assert_eq!(door.wait(batch, LIMIT), Ok(FAILED));
    let why = door.error(batch, 0);
    assert!(why.starts_with("write of 4096 bytes to here:1 over "), "{why}");
    assert!(why.contains(" (error ") && why.contains(", provider's "), "{why}");
    target.check(0, MIB, 0);
}

/// Whether libfabric has such a device here: `sockets` left libfabric with 2.0, and `efa` needs the
/// hardware or an emulation of it.
fn available(provider: &str) -> bool {
    let config = Config { provider: provider.into(), ..Config::from_env() };
    match mooncake_efa::transport::devices(&config) {
        Ok(_) => true,
        Err(error) if error.code == Code::DeviceNotFound => {
            eprintln!("skipped: {error}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// One test for every body, door and provider.
macro_rules! doors {
    ($($body:ident: $($provider:ident)*;)*) => {
        $(mod $body {
            $(mod $provider {
                use super::super::*;

                #[test]
                fn rust() {
                    if available(stringify!($provider)) {
                        $body::<Rust>(stringify!($provider));
                    }
                }

                #[test]
                fn c() {
                    if available(stringify!($provider)) {
                        $body::<C>(stringify!($provider));
                    }
                }
            })*
        })*
    };
}

// A stopped `shm` target's memory can be written without its help, and newer `shm` does not check
// keys. `efa` that emulates writes crashes inside libfabric at a wrong key, in the target.
doors! {
    lengths: tcp shm sockets efa;
    many_regions: tcp shm efa;
    past_four_gib: tcp shm efa;
    past_a_page_table: efa;
    many_threads: tcp shm efa; // `sockets`: see docs/architecture.md, known limits
    batch_limit: tcp shm efa;
    foreign_numbers: tcp shm efa;
    stopped_target: tcp;
    dead_target: tcp efa;
    wrong_key: tcp;
}
