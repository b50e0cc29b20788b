//! `mooncake-efa bench`: flags and defaults as Mooncake's `transfer_engine_bench`.

use std::io::{BufRead, BufReader, IsTerminal};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use mooncake_efa::engine::{MAX_BATCH, Request, Status, TargetId};
use mooncake_efa::hmem::DeviceBuffer;
use mooncake_efa::segment::Segment;
use mooncake_efa::transport::{self, Options, Transport};
use mooncake_efa::{Code, Error, Result};

use crate::control::{ANSWER, HELLO, Hello, Layout, Line, Place};
use crate::far::Far;
use crate::memory::{Home, Side};
use crate::pattern::Wrong;
use crate::target;
use crate::units::{Unit, size};

/// Longest time without progress before a transfer, or the target, is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a thread that waits for transfers looks whether the target is still there.
const LOOK: Duration = Duration::from_millis(100);
/// How long our threads have to return from the provider when it is not.
const LEAVE: Duration = Duration::from_secs(5);
/// How often the memory is written and read in one verification, each time with other bytes.
const ROUNDS: u64 = 2;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Initiator,
    Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Operation {
    Read,
    Write,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ends {
    Both,
    Initiator,
    Target,
}

/// Flags of `mooncake-efa bench`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// Run both sides here: a target process of its own, ended with this one
    #[arg(long = "self", conflicts_with_all = ["mode", "segment_id", "listen", "idle"])]
    alone: bool,
    /// With --self: no second process; this one transfers to itself
    #[arg(long, alias = "same-process", requires = "alone")]
    same_process: bool,
    /// Which side to be
    #[arg(long, value_enum, default_value = "initiator")]
    mode: Mode,
    /// Initiator: HOST:PORT that the target printed
    #[arg(long, alias = "segment-id", value_name = "HOST:PORT")]
    segment_id: Option<String>,
    /// Target: where to listen for initiators (all interfaces: 0.0.0.0:PORT)
    #[arg(long, default_value = "127.0.0.1:0", value_name = "HOST:PORT")]
    listen: String,
    /// libfabric's provider (default: MC_EFA_PROVIDER, or efa)
    #[arg(long)]
    provider: Option<String>,
    /// Devices to use, by comma (default: all)
    #[arg(long, alias = "device-name", value_delimiter = ',')]
    device_name: Vec<String>,
    /// Our name for peers
    #[arg(long, alias = "local-server-name", default_value = "localhost:0")]
    local_server_name: String,
    /// Read from the target, or write to it
    #[arg(long, value_enum, default_value = "read")]
    operation: Operation,
    /// Bytes of a request; K, M, G are understood
    #[arg(long, alias = "block-size", value_parser = size, default_value = "65536")]
    block_size: u64,
    /// Requests of a batch; a thread has one batch under way
    #[arg(long, alias = "batch-size", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_BATCH)))]
    batch_size: u32,
    /// Threads that submit
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=4096))]
    threads: u64,
    /// Bytes of registered memory on each side (default: 1G, with --self 256M); on each GPU, if on all
    #[arg(long, alias = "buffer-size", value_parser = size)]
    buffer_size: Option<u64>,
    /// A GPU's memory instead of the host's: on this side, or with --self on both. CUDA is loaded for this alone
    #[arg(long, alias = "use-vram", num_args = 0..=1, require_equals = true, value_name = "true|false",
        default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set,
        hide_default_value = true, hide_possible_values = true)]
    use_vram: bool,
    /// Which GPU, by CUDA's number; -1: a buffer on each, which the threads use in turn
    #[arg(long, alias = "gpu-id", requires = "use_vram", default_value_t = 0, value_name = "N|-1",
        allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-1..))]
    gpu_id: i32,
    /// With --self: the target's GPU (default: that of --gpu_id)
    #[arg(long, alias = "target-gpu-id", requires_all = ["use_vram", "alone"], value_name = "N|-1",
        allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-1..))]
    target_gpu_id: Option<i32>,
    /// With --self: whose memory is a GPU's; the other's is the host's
    #[arg(long, alias = "vram-side", requires_all = ["use_vram", "alone"], value_enum, default_value = "both")]
    vram_side: Ends,
    /// Seconds to measure
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86400))]
    duration: u64,
    /// Check every byte: before, in and after the measured time, here and in the target process
    #[arg(long)]
    verify: bool,
    /// Merge requests that are contiguous on both sides into one operation
    #[arg(long, value_enum, default_value = "on")]
    merge: Switch,
    /// Longest single operation (default: MC_SLICE_SIZE, or chosen)
    #[arg(long, alias = "slice-size", value_parser = size)]
    slice_size: Option<u64>,
    /// Only install a transport, wait so many seconds, and report the CPU time used
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    idle: Option<u64>,
    /// Unit of rates
    #[arg(long, alias = "report-unit", value_enum, default_value = "GB")]
    report_unit: Unit,
    /// Decimals of rates
    #[arg(long, alias = "report-precision", default_value_t = 2,
        value_parser = clap::value_parser!(u8).range(..=18))]
    report_precision: u8,
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Target: end when standard input does
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

/// CPU seconds of this process so far.
pub fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Set when the user asks to end (Ctrl-C): what was measured so far is reported.
static STOP: AtomicBool = AtomicBool::new(false);

impl Args {
    fn buffer(&self) -> u64 {
        self.buffer_size.unwrap_or(if self.alone { 256 << 20 } else { 1 << 30 })
    }

    /// Bytes that a round of batches touches, from the start of the buffer.
    fn touched(&self) -> Result<u64> {
        let wanted = (|| {
            self.block_size.checked_mul(u64::from(self.batch_size))?.checked_mul(self.threads)
        })();
        match wanted {
            Some(bytes) if bytes <= self.buffer() => Ok(bytes),
            _ => Err(Error::invalid(format!(
                "--block_size {} x --batch_size {} x --threads {} needs more than --buffer_size {}; \
                 the largest block that fits is {}, or give a larger --buffer_size",
                self.block_size,
                self.batch_size,
                self.threads,
                self.buffer(),
                self.buffer() / (u64::from(self.batch_size) * self.threads)
            ))),
        }
    }

    fn install(&self) -> Result<Transport> {
        let mut config = crate::config(self.provider.as_deref());
        config.merge &= self.merge == Switch::On;
        config.slice_size = self.slice_size.or(config.slice_size);
        Transport::install(Options {
            server_name: self.local_server_name.clone(),
            topology: None,
            devices: self.device_name.clone(),
            config,
            host: None,
            observer: None,
        })
    }

    /// Where the initiator's memory is, and where the target's. Without `--self` both are what this side was told.
    fn homes(&self) -> (Home, Home) {
        let home = |wanted: bool, id| {
            if self.use_vram && wanted { Home::of_gpu(id) } else { Home::Host }
        };
        (
            home(self.vram_side != Ends::Target, self.gpu_id),
            home(self.vram_side != Ends::Initiator, self.target_gpu_id.unwrap_or(self.gpu_id)),
        )
    }

    /// What the threads use of each buffer.
    fn layout(&self, touched: u64) -> Layout {
        Layout { length: touched, block: self.block_size, threads: self.threads }
    }

    fn seconds(&self) -> Duration {
        Duration::from_secs(self.duration)
    }
}

/// Runs one side, or both.
pub fn run(args: &Args) -> Result<()> {
    let initiates = args.idle.is_none() && args.mode == Mode::Initiator;
    let touched = if initiates { args.touched()? } else { 0 };
    if initiates && !args.alone && args.segment_id.is_none() {
        return Err(Error::invalid(
            "--segment_id HOST:PORT of a target is needed (start one with --mode target), or --self \
             for both sides in one go",
        ));
    }
    // A target process would say it too, but later.
    let (initiators, targets) = (args.homes().0.gpus()?, args.homes().1.gpus()?);
    let ours = match args.mode {
        Mode::Target => targets,
        Mode::Initiator if args.same_process => [initiators, targets].concat(),
        Mode::Initiator => initiators,
    };
    // libfabric gets CUDA only where a GPU is in use when it is first asked for devices.
    let _in_use = ours.first().map(|&gpu| DeviceBuffer::new(gpu, 1)).transpose()?;
    // Finds out early what is missing. And libraries that libfabric loads (PSM) take the signals for
    // themselves, so our handler must come later.
    transport::devices(&crate::config(args.provider.as_deref()))?;
    handle_signals(args.mode == Mode::Target && !args.until_stdin_ends)?;
    if let Some(seconds) = args.idle {
        return idle(args, seconds);
    }
    if args.mode == Mode::Target {
        let memory = Side::new(args.homes().1, args.buffer(), args.buffer())?;
        return target::serve(args.install()?, memory, &args.listen, args.until_stdin_ends);
    }
    let two = args.alone && !args.same_process;
    let child = if two { Some(OwnTarget::start(args)?) } else { None };
    let address = child.as_ref().map(|child| &child.address).or(args.segment_id.as_ref());
    let pair = match address {
        Some(address) => Pair::connect(args, address, touched)?,
        None => Pair::alone(args, touched)?,
    };
    let report = initiate(args, pair, touched)?;
    report.print(args);
    match report.failure {
        None => Ok(()),
        Some(why) => Err(Error::new(Code::Endpoint, format!("transfers failed: {why}"))),
    }
}

/// Ctrl-C and SIGTERM: the first ends the measurement, the second the process. A target has nothing
/// to report, so `at_once` is for it.
fn handle_signals(at_once: bool) -> Result<()> {
    ctrlc::set_handler(move || {
        if STOP.swap(true, Ordering::Relaxed) || at_once {
            std::process::exit(130);
        }
    })
    .map_err(|why| Error::new(Code::Context, format!("signal handler: {why}")))
}

fn idle(args: &Args, seconds: u64) -> Result<()> {
    let transport = args.install()?;
    let memory = Side::new(args.homes().0, args.buffer(), 0)?;
    memory.register(&transport)?;
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let end = Duration::from_secs(seconds);
    while let Some(left) =
        end.checked_sub(start.elapsed()).filter(|_| !STOP.load(Ordering::Relaxed))
    {
        std::thread::sleep(left.min(Duration::from_secs(1)));
    }
    let (used, passed) = (cpu_seconds() - cpu, start.elapsed().as_secs_f64());
    if args.json {
        let provider = transport.provider();
        println!(
            "{}",
            serde_json::json!({
                "provider": provider, "idle_s": passed, "idle_cpu_s": used,
                "idle_cores": used / passed,
            })
        );
    } else {
        println!("idle for {passed:.1} s: {used:.4} s of CPU time, {:.4} core", used / passed);
    }
    Ok(())
}

/// A target process of ours. Ended when this is dropped, or when this process ends in any way: its
/// standard input ends then.
struct OwnTarget {
    child: Child,
    address: String,
}

impl OwnTarget {
    fn start(args: &Args) -> Result<Self> {
        let failed = |why: String| Error::new(Code::Context, format!("the target process: {why}"));
        let program = std::env::current_exe().map_err(|why| failed(why.to_string()))?;
        let mut command = Command::new(program);
        command.args(["--log", &log::max_level().to_string().to_lowercase(), "bench"]);
        command.args(["--mode", "target", "--until_stdin_ends", "--local_server_name", "target:0"]);
        command.args(["--buffer_size", &args.buffer().to_string()]);
        if let Some(provider) = &args.provider {
            command.args(["--provider", provider]);
        }
        if let Some(gpu) = args.homes().1.gpu_id() {
            command.args(["--use_vram", &format!("--gpu_id={gpu}")]);
        }
        if !args.device_name.is_empty() {
            command.args(["--device_name", &args.device_name.join(",")]);
        }
        // On an emulated EFA device the other side is another host.
        command.env("SOFTEFA_HOST", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().map_err(|why| failed(why.to_string()))?;
        let mut own = Self { child, address: String::new() };
        let output = own.child.stdout.take().expect("it is piped");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).map_err(|why| failed(why.to_string()))?;
        match line.trim_end().strip_prefix("target ready: ") {
            Some(address) => address.clone_into(&mut own.address),
            None => return Err(failed("it ended before it was ready; its reason is above".into())),
        }
        Ok(own)
    }
}

impl Drop for OwnTarget {
    fn drop(&mut self) {
        // Ask first, by closing its standard input: a provider may have shared memory to remove.
        drop(self.child.stdin.take());
        let limit = Instant::now() + Duration::from_secs(10);
        while Instant::now() < limit {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a thread did.
struct Tally {
    requests: u64,
    latency: Histogram<u64>,
    failure: Option<String>,
}

/// The run as a whole.
struct Report {
    provider: String,
    /// The longest batch before the measured time, one a thread: the first to this target, unless
    /// there was a verification before.
    first: Duration,
    seconds: f64,
    requests: u64,
    failed: u64,
    failure: Option<String>,
    latency: Histogram<u64>,
    initiator_cpu: f64,
    target_cpu: Option<f64>,
    verified: u64,
    nics: serde_json::Value,
    /// Where the memory was.
    initiator_memory: Vec<Place>,
    target_memory: Vec<Place>,
}

/// One side's view of the other.
struct Pair {
    transport: Transport,
    memory: Side,
    target: TargetId,
    /// Our buffers and the target's.
    places: (Vec<Place>, Vec<Place>),
    far: Far,
    /// The target hung up while transfers were under way.
    gone: AtomicBool,
}

impl Pair {
    fn connect(args: &Args, address: &str, touched: u64) -> Result<Self> {
        let mut line = Line::connect(address)?;
        let hello: Hello = line.receive(HELLO, ANSWER)?.ok_or_else(|| {
            let most = target::MOST;
            let text =
                format!("the target at {address} hung up; it serves {most} initiators at most");
            Error::new(Code::Endpoint, text)
        })?;
        if hello.buffers.is_empty() {
            return Err(Error::new(Code::Endpoint, "the target tells of no buffer"));
        }
        for Place { address, .. } in &hello.buffers {
            if address.checked_add(hello.length).is_none() {
                return Err(Error::new(
                    Code::Endpoint,
                    format!(
                        "the target tells of {} bytes at {address:#x}, which go past the end of the address space",
                        hello.length
                    ),
                ));
            }
        }
        if hello.length < touched {
            return Err(Error::invalid(format!(
                "the target's buffer has {} bytes, {touched} are needed: give both sides the same \
                 --buffer_size",
                hello.length
            )));
        }
        let (transport, memory) = Self::ours(args, touched)?;
        let target = transport.open_segment(&Segment::from_json(&hello.descriptor)?)?;
        let places = (memory.places(), hello.buffers);
        let far = Far::Process(line);
        Ok(Self { transport, memory, target, places, far, gone: AtomicBool::new(false) })
    }

    /// Both sides in this process: the transport is its own target.
    fn alone(args: &Args, touched: u64) -> Result<Self> {
        let (transport, memory) = Self::ours(args, touched)?;
        let theirs = Side::new(args.homes().1, args.buffer(), touched)?;
        theirs.register(&transport)?;
        let target = transport.open_segment(&transport.descriptor())?;
        let places = (memory.places(), theirs.places());
        let far = Far::Here(theirs);
        Ok(Self { transport, memory, target, places, far, gone: AtomicBool::new(false) })
    }

    fn ours(args: &Args, touched: u64) -> Result<(Transport, Side)> {
        let transport = args.install()?;
        let memory = Side::new(args.homes().0, args.buffer(), touched)?;
        memory.register(&transport)?;
        Ok((transport, memory))
    }

    /// The requests of one of a thread's batches: blocks of all threads alternate, as in
    /// transfer_engine_bench.
    fn requests(
        &self,
        args: &Args,
        thread: u64,
        write: bool,
    ) -> impl ExactSizeIterator<Item = Request> + Clone {
        let (block, threads) = (args.block_size, args.threads);
        // Mooncake's threads have the buffers in turn, too.
        let of = |places: &[Place]| places[(thread % places.len() as u64) as usize].address;
        let (local, remote, target) = (of(&self.places.0), of(&self.places.1), self.target);
        (0..args.batch_size).map(move |index| {
            let offset = (u64::from(index) * threads + thread) * block;
            let (local, remote) = (local + offset, remote + offset);
            Request { write, local, target, remote, length: block, cookie: 0 }
        })
    }

    /// One batch of a thread, from allocation to release. The reason if it fails.
    fn batch(&self, args: &Args, thread: u64, write: bool) -> Result<(), String> {
        let transport = &self.transport;
        let text = |error: Error| error.text;
        let batch = transport.allocate_batch(args.batch_size).map_err(text)?;
        let requests = self.requests(args, thread, write);
        transport.submit(batch, requests, Some(PATIENCE)).map_err(text)?;
        // The requests have their own deadline; this one only keeps us from waiting for ever.
        let limit = Instant::now() + 2 * PATIENCE;
        let status = loop {
            match transport.wait(batch, LOOK) {
                Err(error) if error.code == Code::Timeout && Instant::now() < limit => {
                    if self.gone.load(Ordering::Relaxed) {
                        return Err("the target is gone: it ended, or was killed".into());
                    }
                }
                result => break result.map_err(text)?,
            }
        };
        if status != Status::Completed {
            let why = (0..args.batch_size).find_map(|task| {
                let (status, _) = transport.task_status(batch, task).ok()?;
                let error = transport.task_error(batch, task).ok().flatten();
                (status != Status::Completed)
                    .then(|| error.unwrap_or_else(|| format!("request {task}: {status:?}")))
            });
            return Err(why.unwrap_or_else(|| format!("{status:?}")));
        }
        transport.free_batch(batch).map_err(text)
    }

    /// One batch of every thread, all at a time.
    fn all(&self, args: &Args, write: bool) -> Result<()> {
        let failed = |why: String| Error::new(Code::Endpoint, format!("transfers failed: {why}"));
        std::thread::scope(|scope| {
            let start = |thread| scope.spawn(move || self.batch(args, thread, write));
            let threads: Vec<_> = (0..args.threads).map(start).collect();
            let done = threads.into_iter().map(|thread| thread.join().expect("a thread of ours"));
            done.collect::<Result<(), String>>().map_err(failed)
        })
    }

    /// Writes to the target and reads from it, every byte checked; the bytes of each round are
    /// others, so that one that did not move is seen. The count of bytes checked.
    fn verify(&mut self, args: &Args, layout: &Layout, seed: u64) -> Result<u64> {
        for seed in (seed..).step_by(2).take(ROUNDS as usize) {
            self.memory.fill(layout, seed)?;
            self.all(args, true)?;
            self.check_there(layout, seed)?;
            self.far.fill(layout, seed + 1)?;
            self.all(args, false)?;
            self.check_here(layout, seed + 1)?;
        }
        Ok(2 * ROUNDS * layout.length)
    }

    fn check_there(&mut self, layout: &Layout, seed: u64) -> Result<()> {
        self.far
            .check(layout, seed)?
            .map_or(Ok(()), |byte| Err(wrong("written", &self.places.1, &byte)))
    }

    fn check_here(&self, layout: &Layout, seed: u64) -> Result<()> {
        self.memory
            .check(layout, seed)?
            .map_or(Ok(()), |byte| Err(wrong("read", &self.places.0, &byte)))
    }
}

fn wrong(what: &str, places: &[Place], byte: &Wrong) -> Error {
    let Wrong { buffer, offset, expected, found } = *byte;
    // The number may be another process's word.
    let base = places.get(buffer).map_or(0, |place| place.address);
    Error::new(
        Code::Internal,
        format!(
            "WRONG BYTE {what} at {:#x} (offset {offset}): expected {expected:#04x}, found {found:#04x}",
            base.wrapping_add(offset)
        ),
    )
}

fn initiate(args: &Args, mut pair: Pair, touched: u64) -> Result<Report> {
    let layout = args.layout(touched);
    let write = args.operation == Operation::Write;
    let mut verified = 0;
    if args.verify {
        verified += pair.verify(args, &layout, 100)?;
        // For the measured transfers, which all move the same bytes to the same places.
        pair.memory.fill(&layout, 7)?;
        pair.far.fill(&layout, 8)?;
    }
    // Connections and the first use of everything are not the rate that is measured.
    let mut tallies = measure(args, &pair, Instant::now(), write, Some(1));
    let first_ns = tallies.iter().map(|tally| tally.latency.max()).max().unwrap_or(0);
    let target_cpu = pair.far.cpu()?;
    let cpu = cpu_seconds();
    let start = Instant::now();
    if tallies.iter().all(|tally| tally.failure.is_none()) {
        tallies = measure(args, &pair, start, write, None);
    }
    let seconds = start.elapsed().as_secs_f64();
    let initiator_cpu = cpu_seconds() - cpu;
    let failure = tallies.iter().find_map(|tally| tally.failure.clone());
    // A dead target must not keep us from reporting.
    let target_cpu = match pair.far.cpu() {
        Ok(now) => now.zip(target_cpu).map(|(now, before)| now - before),
        Err(error) if failure.is_some() => {
            log::warn!("{error}");
            None
        }
        Err(error) => return Err(error),
    };
    if args.verify && failure.is_none() {
        if write {
            pair.check_there(&layout, 7)?;
        } else {
            pair.check_here(&layout, 8)?;
        }
        verified += touched + pair.verify(args, &layout, 200)?;
    }
    let mut latency = new_histogram();
    for tally in &tallies {
        latency.add(&tally.latency).expect("all histograms are alike");
    }
    let failed = tallies.iter().filter(|tally| tally.failure.is_some()).count() as u64;
    Ok(Report {
        provider: pair.transport.provider().to_owned(),
        first: Duration::from_nanos(first_ns),
        seconds,
        requests: tallies.iter().map(|tally| tally.requests).sum(),
        failed,
        failure,
        latency,
        initiator_cpu,
        target_cpu,
        verified,
        nics: serde_json::json!(pair.transport.stats().rails),
        initiator_memory: pair.places.0,
        target_memory: pair.places.1,
    })
}

/// Nanoseconds, 1 us to 2 minutes, two significant digits.
fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1000, 120_000_000_000, 2).expect("bounds are in order")
}

/// Batch after batch from every thread, for the time that was asked for, or `most` batches a thread.
fn measure(args: &Args, pair: &Pair, start: Instant, write: bool, most: Option<u64>) -> Vec<Tally> {
    let requests = AtomicU64::new(0);
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.threads)
            .map(|thread| {
                let (requests, running) = (&requests, &running);
                scope.spawn(move || {
                    let mut tally = Tally { requests: 0, latency: new_histogram(), failure: None };
                    let most = most.map_or(u64::MAX, |most| most * u64::from(args.batch_size));
                    while running.load(Ordering::Relaxed) && tally.requests < most {
                        let begin = Instant::now();
                        if let Err(why) = pair.batch(args, thread, write) {
                            tally.failure = Some(why);
                            running.store(false, Ordering::Relaxed);
                            break;
                        }
                        tally.latency.saturating_record(begin.elapsed().as_nanos() as u64);
                        tally.requests += u64::from(args.batch_size);
                        requests.fetch_add(u64::from(args.batch_size), Ordering::Relaxed);
                    }
                    tally
                })
            })
            .collect();
        let bar = progress_bar(args);
        let look = Duration::from_millis(if most.is_some() { 1 } else { 200 });
        while let Some(left) = args.seconds().checked_sub(start.elapsed()) {
            let over = || threads.iter().all(ScopedJoinHandle::is_finished);
            if STOP.load(Ordering::Relaxed) || !running.load(Ordering::Relaxed) || over() {
                break;
            }
            if pair.far.hung_up() {
                pair.gone.store(true, Ordering::Relaxed);
                break;
            }
            std::thread::sleep(left.min(look));
            let passed = start.elapsed();
            let bytes = requests.load(Ordering::Relaxed) * args.block_size;
            bar.set_position(passed.as_millis() as u64);
            bar.set_message(
                args.report_unit
                    .rate(bytes as f64 / passed.as_secs_f64(), args.report_precision.into()),
            );
        }
        running.store(false, Ordering::Relaxed);
        bar.finish_and_clear();
        if pair.gone.load(Ordering::Relaxed) {
            let limit = Instant::now() + LEAVE;
            while !threads.iter().all(ScopedJoinHandle::is_finished) {
                if Instant::now() > limit {
                    // For instance shm, when the target was killed while it held a lock of ours.
                    eprintln!("mooncake-efa: the target is gone, and the provider does not return");
                    std::process::exit(1);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        threads.into_iter().map(|thread| thread.join().expect("a thread of ours")).collect()
    })
}

fn progress_bar(args: &Args) -> ProgressBar {
    if args.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(args.seconds().as_millis() as u64);
    let style = ProgressStyle::with_template("{bar:40} {elapsed} {msg}");
    bar.set_style(style.expect("the template is right"));
    bar
}

/// Where buffers are, for people and for JSON.
fn names(places: &[Place]) -> Vec<String> {
    places.iter().map(Place::to_string).collect()
}

impl Report {
    fn latency_us(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1000.0
    }

    fn print(&self, args: &Args) {
        let per_second = |count: u64| count as f64 / self.seconds;
        let bytes = per_second(self.requests * args.block_size);
        let operation = match args.operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        if args.json {
            println!(
                "{}",
                serde_json::json!({
                    "provider": self.provider,
                    "operation": operation,
                    "block_size": args.block_size,
                    "batch_size": args.batch_size,
                    "threads": args.threads,
                    "merge": args.merge == Switch::On,
                    "first_s": self.first.as_secs_f64(),
                    "seconds": self.seconds,
                    "ops": self.requests,
                    "ops_per_s": per_second(self.requests),
                    "bytes_per_s": bytes,
                    "latency_us": {
                        "p50": self.latency_us(0.5),
                        "p90": self.latency_us(0.9),
                        "p99": self.latency_us(0.99),
                        "p999": self.latency_us(0.999),
                        "max": self.latency.max() as f64 / 1000.0,
                    },
                    "initiator_cpu_s": self.initiator_cpu,
                    "target_cpu_s": self.target_cpu,
                    "same_process": args.same_process,
                    "initiator_memory": names(&self.initiator_memory),
                    "target_memory": names(&self.target_memory),
                    "verified_bytes": self.verified,
                    "failed_threads": self.failed,
                    "failure": self.failure,
                    "nics": self.nics,
                })
            );
            return;
        }
        let row = |name: &str, value: String| println!("  {name:<22} {value}");
        println!(
            "{operation} over {}: {} B x {} a batch, {} threads, {:.1} s",
            self.provider, args.block_size, args.batch_size, args.threads, self.seconds
        );
        row("bandwidth", args.report_unit.rate(bytes, args.report_precision.into()));
        row("requests", format!("{:.0} /s ({} in all)", per_second(self.requests), self.requests));
        row(
            "latency of a batch",
            format!(
                "p50 {:.0}, p90 {:.0}, p99 {:.0}, p99.9 {:.0}, max {:.0} us",
                self.latency_us(0.5),
                self.latency_us(0.9),
                self.latency_us(0.99),
                self.latency_us(0.999),
                self.latency.max() as f64 / 1000.0
            ),
        );
        if args.same_process {
            row("CPU", format!("both sides {:.2} s", self.initiator_cpu));
        } else {
            let target_cpu = self.target_cpu.map_or("unknown".into(), |cpu| format!("{cpu:.2} s"));
            row("CPU", format!("initiator {:.2} s, target {target_cpu}", self.initiator_cpu));
        }
        let both =
            [&self.initiator_memory, &self.target_memory].map(|places| names(places).join(", "));
        row("memory", format!("initiator {}, target {}", both[0], both[1]));
        if args.verify {
            let wrong = if self.failure.is_some() { "not all checked" } else { "0 wrong" };
            row("verified", format!("{} bytes, {wrong}", self.verified));
        }
        row("failed", self.failure.clone().unwrap_or_else(|| "none".into()));
    }
}
