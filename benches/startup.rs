//! What a process pays once: opening its NICs, registering memory, warm-up, the first submission to a
//! peer. One line a figure.
//!
//! `cargo bench --bench startup -- [BUFFERS [BYTES]]`, 1000 of 1 MiB by default; devices and provider as
//! `MC_*` variables say. The peer is this program again, as a host of its own on an emulated EFA device.

#[path = "../capi/src/lib.rs"]
#[allow(dead_code)] // not all of it is tried here
mod capi;

use std::ffi::{CStr, c_void};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use capi::types::{mefa_config, mefa_memory};
use capi::{mefa_install, mefa_last_error, mefa_register_many, mefa_uninstall};
use mooncake_efa::Result;
use mooncake_efa::config::Config;
use mooncake_efa::engine::{Request, Status, TargetId};
use mooncake_efa::fabric::{Buffer, Memory};
use mooncake_efa::segment::Segment;
use mooncake_efa::transport::{Options, Transport};

const PEER: &str = "MEFA_STARTUP_PEER";
/// A transfer: so many requests of so many bytes.
const REQUESTS: u64 = 128;
const LENGTH: u64 = 4096;
const IDLE: Duration = Duration::from_secs(2);
/// Warm submissions, of which the median counts.
const WARM: usize = 101;

fn install(name: &str) -> Result<Transport> {
    Transport::install(Options {
        server_name: name.to_owned(),
        topology: None,
        devices: Vec::new(),
        config: Config::from_env(),
        host: None,
        observer: None,
    })
}

/// Written to, so that every page is there.
fn touched(length: u64) -> Result<Arc<Buffer>> {
    let buffer = Buffer::new(length)?;
    (0..length).step_by(4096).for_each(|at| buffer.write(at, &[1]));
    Ok(buffer)
}

/// Serves until standard input ends.
fn peer() -> Result<()> {
    let transport = install("far:1")?;
    let buffer = touched(REQUESTS * LENGTH)?;
    transport.register(&[(Memory::from(&buffer), "*")])?;
    println!("{}", transport.descriptor().to_json());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    Ok(())
}

/// A process that serves memory.
struct Peer {
    process: Child,
    descriptor: Segment,
}

impl Peer {
    fn start(host: u32) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe().expect("a path"))
            .env(PEER, "1")
            .env("SOFTEFA_HOST", host.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        let mut line = String::new();
        let output = process.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("a line");
        Ok(Self { process, descriptor: Segment::from_json(&line)? })
    }

    fn stop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().expect("the peer ends");
    }
}

fn timed<T>(f: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = f();
    (start.elapsed(), value)
}

fn say(what: &str, took: Duration) {
    println!("{what:<52} {:>12.1} us", took.as_secs_f64() * 1e6);
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn transfer(transport: &Transport, buffer: &Buffer, target: TargetId, remote: u64) -> Result<()> {
    let batch = transport.allocate_batch(REQUESTS as u32)?;
    let requests = (0..REQUESTS as usize).map(|index| {
        let offset = index as u64 * LENGTH;
        let (local, remote) = (buffer.address() + offset, remote + offset);
        Request { write: true, local, target, remote, length: LENGTH, cookie: 0 }
    });
    transport.submit(batch, requests, None)?;
    assert_eq!(transport.wait(batch, Duration::from_secs(60))?, Status::Completed);
    transport.free_batch(batch)
}

/// The same registration through the C interface, on a transport of its own.
fn register_by_c(parts: &[Memory]) -> Duration {
    let check = |ret| {
        // SAFETY: a NUL-terminated string until the next failing call.
        assert_eq!(ret, 0, "{:?}", unsafe { CStr::from_ptr(mefa_last_error()) });
    };
    let location = c"cpu:0".as_ptr();
    let memories: Vec<mefa_memory> = parts
        .iter()
        .map(|part| mefa_memory {
            address: part.address() as *mut c_void,
            length: part.length(),
            location,
        })
        .collect();
    let mut transport = 0;
    // SAFETY: zero is valid for a configuration; every pointer outlives its call; the memory outlives
    // the transport.
    unsafe {
        let mut config: mefa_config = std::mem::zeroed();
        config.size = size_of::<mefa_config>();
        config.server_name = c"near:2".as_ptr();
        check(mefa_install(&raw const config, &raw mut transport));
        let (took, ret) = timed(|| {
            mefa_register_many(
                transport,
                memories.as_ptr(),
                memories.len(),
                None,
                std::ptr::null_mut(),
            )
        });
        check(ret);
        check(mefa_uninstall(transport));
        took
    }
}

fn main() -> Result<()> {
    if std::env::var_os(PEER).is_some() {
        return peer();
    }
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let count = numbers.first().copied().unwrap_or(1000).max(10);
    let length = numbers.get(1).copied().unwrap_or(1 << 20);

    // One to transfer to at once, one to warm up first.
    let mut peers = [Peer::start(1)?, Peer::start(2)?];

    let before = resident();
    let (took, transport) = timed(|| install("near:1"));
    let transport = transport?;
    let nics = transport.nic_names().len();
    println!("{nics} NICs of provider {}", transport.provider());
    say("install", took);
    println!("{:<52} {:>12.1} MiB", "memory", (resident() - before) as f64 / 1048576.0);

    let buffer = touched(REQUESTS * LENGTH)?;
    transport.register(&[(Memory::from(&buffer), "*")])?;
    // A gap between two buffers, so that they are what they are: many.
    let memory = touched(count * (length + 4096))?;
    let parts: Vec<Memory> =
        (0..count).map(|at| Memory::from(&memory).part(at * (length + 4096), length)).collect();
    let wanted: Vec<(Memory, &str)> = parts.iter().map(|part| (part.clone(), "cpu:0")).collect();
    let unregister = |transport: &Transport| {
        parts.iter().try_for_each(|part| transport.unregister(part.address()))
    };
    for (at, peer) in peers.iter().enumerate() {
        let target = transport.open_segment(&peer.descriptor)?;
        let remote = peer.descriptor.buffers[0].addr;
        let send = || transfer(&transport, &buffer, target, remote);
        if at == 1 {
            let (took, result) = timed(|| transport.warm_up(target));
            result?;
            say(&format!("warm-up of {nics} x {nics} pairs of NICs"), took);
        }
        let (took, result) = timed(send);
        result?;
        let how = ["cold", "after warm-up"][at];
        say(&format!("first transfer to a peer, {how}"), took);
        let mut warm = Vec::new();
        let again = |warm: &mut Vec<Duration>, enough: &dyn Fn(usize) -> bool| -> Result<()> {
            warm.clear();
            while !enough(warm.len()) {
                let (took, result) = timed(send);
                result?;
                warm.push(took);
            }
            warm.sort();
            Ok(())
        };
        again(&mut warm, &|count| count == WARM)?;
        say("the same warm, median", warm[WARM / 2]);
        if at == 1 {
            std::thread::scope(|scope| {
                let registering = scope.spawn(|| transport.register(&wanted));
                again(&mut warm, &|_| registering.is_finished())?;
                registering.join().expect("a thread of ours").map(drop)
            })?;
            println!("{} transfers while {count} buffers are registered in one call", warm.len());
            say("the longest", warm.last().copied().unwrap_or_default());
            unregister(&transport)?;
        }
    }
    let before = cpu_seconds();
    std::thread::sleep(IDLE);
    let cores = (cpu_seconds() - before) / IDLE.as_secs_f64();
    println!("{:<52} {cores:>12.4} core", "idle after that");
    peers.iter_mut().for_each(Peer::stop);

    let (took, result) = timed(|| transport.register(&wanted));
    result?;
    say(&format!("{count} buffers of {length} B in one call"), took);
    let (took, _) = timed(|| transport.descriptor().to_json());
    say("their descriptor", took);
    let (took, result) = timed(|| unregister(&transport));
    result?;
    say("unregistered, one by one: each", took / count as u32);
    say("in one call through the C interface", register_by_c(&parts));
    let tenth = wanted.len() / 10;
    for (at, some) in wanted.chunks_exact(tenth).enumerate() {
        let one = |one| transport.register(std::slice::from_ref(one)).map(drop);
        let (took, result) = timed(|| some.iter().try_for_each(one));
        result?;
        if at == 0 || at == 9 {
            say(
                &format!(
                    "one by one, of the {} tenth: each",
                    if at == 0 { "first" } else { "last" }
                ),
                took / tenth as u32,
            );
        }
    }
    unregister(&transport)
}
