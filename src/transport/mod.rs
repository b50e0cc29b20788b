//! The Rust door: a transport is a set of open NICs, an engine over them, and threads that keep it
//! going while nobody waits.
//!
//! Every method may be called from any thread.
#![forbid(unsafe_code)]

mod choice;
mod pages;
mod poller;

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::config::{Config, NicSelection};
use crate::engine::{
    self, BatchId, Engine, Observer, Progress, Refusal, Registration, RemoteBuffer, RemoteNic,
    RemoteSegment, Request, Settings, Status, TargetId,
};
use crate::error::{Code, Error, Result};
use crate::fabric::{Libfabric, Memory};
use crate::hmem::{self, Kind};
use crate::lines::Lines;
use crate::nic::{self, Device, FabricNic, Limits};
use crate::segment::{self, Buffer as BufferDescriptor, Handshake, Segment};
use crate::stats::{RailStats, Stats};
use crate::sync::{AtomicBool, Ordering};
use crate::topology::{Topology, line, printable};

pub use crate::engine::Registered;
pub(crate) use choice::outward;
pub use choice::read_topology;
use choice::{choose, no_devices, open_all};
use pages::{Place, Tables};
use poller::{Patience, Sleeper};

/// Longest single operation if `MC_SLICE_SIZE` does not say: large enough that its own cost does not
/// matter, small enough to give others a turn on a slow link.
const DEFAULT_SLICE: u64 = 4 << 20;
/// Rails that register memory at the same time, unless MC_MAX_CONCURRENT_REG_MR says otherwise.
const MAX_REGISTERING: usize = 16;
/// Bytes from which it is worth asking the kernel for the size of a buffer's pages; that takes as long as to
/// register some MiB.
const WORTH_ASKING: u64 = 64 << 20;
/// Neighbouring requests on a GPU's memory are moved as one up to this length: a copy by CUDA reaches its rate with
/// 64 MiB only (docs/gpu.md), and where a NIC moves them they are cut anyway.
const MERGE_COPIES: u64 = 64 << 20;
/// Bytes of a page of CUDA device memory, as other devices see it.
const DEVICE_PAGE: u64 = 64 << 10;
/// Peers that stay known to a NIC without an open segment: those who transfer to us have none, and their
/// devices want to be known here. More than hosts in most clusters; 533 bytes each, and the provider's own.
const KEEP_PEERS: usize = 8192;
/// Longest wait for operations in flight when a transport is closed.
const DRAIN: Duration = Duration::from_secs(5);
/// Longest wait after that for the provider to return to our threads, and again for it to close its devices.
const RETURN: Duration = Duration::from_secs(10);
/// Longest wait for other threads to leave what is being closed.
const LEAVE: Duration = Duration::from_secs(10);
/// Longest wait of [`Transport::unregister`] for transfers that use the memory: far more than a healthy network
/// needs to give back what it has, and no longer than a caller who only wants to be rid of it will bear.
const UNREGISTER: Duration = Duration::from_secs(5);

/// What the host engine does for us. Called on the thread that submits or warms up, which may be any;
/// may block, must not call back into the transport.
pub trait Host: Send + Sync {
    /// The current descriptor of a segment, as JSON.
    fn fetch_segment(&self, name: &str) -> Result<String>;

    /// Sends a handshake to the server of a segment; its answer. Both are JSON.
    fn handshake(&self, server: &str, request: &str) -> Result<String>;
}

/// How to install a transport.
pub struct Options {
    /// Our name for peers: `host:port`.
    pub server_name: String,
    /// Which NICs are near to which memory; `None`: all the same.
    pub topology: Option<Topology>,
    /// Devices to use, in this order; empty: those of the topology, or else all. A device named
    /// twice is opened twice.
    pub devices: Vec<String>,
    /// Settings.
    pub config: Config,
    /// The host engine; without it peers must give their endpoints' addresses in descriptors, and
    /// out-of-date descriptors are not fetched again.
    pub host: Option<Box<dyn Host>>,
    /// Told of tasks that end.
    pub observer: Option<Observer>,
}

/// See the module's documentation. Dropping it is [`Self::close`].
pub struct Transport {
    shared: Hold,
    threads: Vec<JoinHandle<()>>,
}

/// What all threads share, until the transport is closed.
struct Hold(Option<Arc<Shared>>);

impl Deref for Hold {
    type Target = Arc<Shared>;

    fn deref(&self) -> &Arc<Shared> {
        self.0.as_ref().expect("nobody uses a transport that is closed")
    }
}

struct Shared {
    engine: Engine<FabricNic>,
    clock: Instant,
    config: Config,
    provider: String,
    server_name: String,
    topology: Topology,
    names: Vec<String>,
    /// Addresses of our endpoints, by rail.
    addresses: Vec<Box<[u8]>>,
    host: Option<Box<dyn Host>>,
    /// Handshakes that were.
    refused: Lines,
    buffers: Mutex<Buffers>,
    /// Nobody is to wait for transfers any more.
    closing: AtomicBool,
    /// Our threads are to end.
    stop: AtomicBool,
    /// The pollers' beds, and the watchdog's.
    sleepers: Vec<Sleeper>,
    watchdog: Sleeper,
}

/// What is registered.
#[derive(Default)]
struct Buffers {
    /// In the order of registration: peers of Mooncake's find their memory by its place in the
    /// descriptor.
    by_number: BTreeMap<u64, RegisteredBuffer>,
    /// Its number, by first byte.
    numbers: HashMap<u64, u64>,
    last: u64,
    /// Where the device has page tables.
    tables: Option<Tables>,
}

struct RegisteredBuffer {
    location: String,
    regions: Vec<Registered>,
    /// Bytes of a page.
    page: u64,
}

impl Buffers {
    fn add(&mut self, address: u64, buffer: RegisteredBuffer) {
        self.last += 1;
        self.numbers.insert(address, self.last);
        if let Some(tables) = &mut self.tables {
            buffer.pages(|rail, pages| tables.take(rail, pages));
        }
        self.by_number.insert(self.last, buffer);
    }

    fn remove(&mut self, address: u64) {
        let number = self.numbers.remove(&address);
        let Some(buffer) = number.and_then(|number| self.by_number.remove(&number)) else { return };
        if let Some(tables) = &mut self.tables {
            buffer.pages(|rail, pages| tables.give_back(rail, pages));
        }
    }
}

impl RegisteredBuffer {
    /// How many pages it has on each rail.
    fn pages(&self, mut each: impl FnMut(usize, u64)) {
        for region in &self.regions {
            let pages = pages::spanned(region.address, region.length, self.page);
            let rails = region.keys.iter().enumerate().filter(|(_, key)| **key != 0);
            rails.for_each(|(rail, _)| each(rail, pages));
        }
    }
}

/// The NICs that memory is registered on, the nearest first.
fn rails_for(selection: NicSelection, kind: Kind, near: &[u16], far: &[u16]) -> Vec<u16> {
    if selection == NicSelection::Local && !kind.is_host() {
        near.to_vec()
    } else {
        [near, far].concat()
    }
}

/// The provider's devices that could be used, without opening any.
///
/// # Errors
/// As [`Transport::install`], also if there are none.
pub fn devices(config: &Config) -> Result<Vec<Device>> {
    find(config).map(|(_, found)| found)
}

/// libfabric, and at least one device of the provider.
fn find(config: &Config) -> Result<(&'static Libfabric, Vec<Device>)> {
    let lib = Libfabric::get(config.libfabric.as_deref())?;
    let found = hmem::in_used_context(|| nic::devices(lib, &config.provider, config.use_ipv6))?;
    if found.is_empty() { Err(no_devices(lib, config)) } else { Ok((lib, found)) }
}

impl Transport {
    /// Opens the devices and starts the threads.
    ///
    /// # Errors
    /// [`Code::DeviceNotFound`] if the provider has no device, or not one that was asked for;
    /// [`Code::Context`] or [`Code::Endpoint`] if libfabric or none of the devices can be opened.
    /// Never falls back to another provider.
    pub fn install(options: Options) -> Result<Self> {
        let Options { server_name, topology, devices, config, host, observer } = options;
        peers_read("server name", &server_name)?;
        if server_name.is_empty() {
            return Err(Error::invalid("the server name is empty"));
        }
        let (lib, found) = find(&config)?;
        let provider = found[0].info().provider();
        let topology = match (topology, &config.custom_topology) {
            (None, Some(path)) => Some(read_topology(path)?),
            (given, _) => given,
        };
        let chosen = choose(found, &devices, topology.as_ref(), &config)?;
        let nics = hmem::in_used_context(|| open_all(lib, chosen, &config))?;
        let addresses = nics.iter().map(|(_, nic)| nic.address().into()).collect();
        let names: Vec<String> = nics.iter().map(|(name, _)| name.clone()).collect();
        let settings = Settings {
            slice: config.slice_size.unwrap_or(DEFAULT_SLICE),
            merge: config.merge,
            round_robin: config.path_round_robin,
            registering: match (config.parallel_reg, config.reg_threads) {
                (Some(false), _) => 1,
                (_, 0) => std::thread::available_parallelism()
                    .map_or(1, |cores| cores.get().min(MAX_REGISTERING)),
                (_, threads) => threads,
            },
            tries: config.retry_count.clamp(1, u8::MAX.into()) as u8,
            keep_peers: config.av_size.min(KEEP_PEERS),
        };
        let tables = (provider == "efa").then(|| Tables::new(names.len(), pages::ENTRIES));
        let threads = match config.pollers {
            0 => names.len(),
            count => count.min(names.len()),
        };
        let sleepers = (0..threads).map(|_| Sleeper::new()).collect::<Result<_>>()?;
        let shared = Arc::new(Shared {
            engine: Engine::new(nics, settings, observer),
            clock: Instant::now(),
            topology: topology
                .map(|topology| topology.only(&names))
                .filter(|topology| !topology.devices().is_empty())
                .unwrap_or_else(|| Topology::flat(&names)),
            config,
            provider,
            server_name,
            names,
            addresses,
            host,
            refused: Lines::new(log::Level::Warn, "refused handshakes"),
            buffers: Mutex::new(Buffers { tables, ..Buffers::default() }),
            closing: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers,
            watchdog: Sleeper::new()?,
        });
        let mut transport = Self { shared: Hold(Some(shared)), threads: Vec::new() };
        for index in 0..threads {
            transport.spawn(format!("mefa-poll-{index}"), move |shared| shared.poll(index))?;
        }
        transport.spawn("mefa-watch".into(), |shared| {
            let rails: Vec<usize> = (0..shared.names.len()).collect();
            let clock = || shared.now();
            poller::watch(&shared.engine, &rails, &shared.watchdog, &shared.stop, clock);
        })?;
        log::info!("Started {threads} CQ polling worker threads");
        log::info!("EFA transport installed successfully");
        Ok(transport)
    }

    fn spawn(&mut self, name: String, life: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name).spawn(move || life(&shared));
        self.threads.push(
            thread.map_err(|why| Error::new(Code::Context, format!("starting a thread: {why}")))?,
        );
        Ok(())
    }

    /// Begins to close it, for an owner who has to wait for others to be done with it: what is under way is
    /// cancelled, and whoever waits in here for transfers returns.
    pub fn begin_close(&self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.shared.engine.cancel_all(self.shared.now());
    }

    /// Cancels what is under way, waits for the provider to give it back, 5 seconds at most, and closes
    /// everything.
    ///
    /// # Errors
    /// [`Code::Busy`] if the provider does not return from a call within 10 seconds more, or from closing its
    /// devices in another 10: then what is registered, and the observer, stay in use until it does.
    pub fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(shared) = self.shared.0.take() else { return Ok(()) };
        shared.engine.cancel_all(shared.now());
        // The pollers make the progress: a thread that calls the provider may not come back.
        if !in_time(DRAIN, || shared.engine.is_idle()) {
            log::warn!("operations in flight did not come back in {DRAIN:?}; closing anyway");
        }
        shared.stop.store(true, Ordering::Release);
        shared.sleepers.iter().chain([&shared.watchdog]).for_each(Sleeper::rouse);
        let provider = shared.provider.clone();
        let left = |what: &str| {
            // It has the devices, so they stay open: better than a shutdown that never ends.
            let text = format!(
                "provider {provider} does not return; a thread that {what} and its devices are left behind"
            );
            log::error!("{text}");
            Err(Error::new(Code::Busy, text))
        };
        if !join_in_time(&mut self.threads) {
            return left("polls");
        }
        // Providers may wait for what is still in flight when they close a device.
        let closing = std::thread::Builder::new().name("mefa-close".into());
        let closing = closing.spawn(move || drop(shared));
        if join_in_time(&mut closing.into_iter().collect()) { Ok(()) } else { left("closes") }
    }

    /// Names of the NICs in use: what the keys of a region are in the order of.
    pub fn nic_names(&self) -> &[String] {
        &self.shared.names
    }

    /// libfabric's name of the provider in use.
    pub fn provider(&self) -> &str {
        &self.shared.provider
    }

    // ---- memory -------------------------------------------------------------------------------

    /// Registers ranges, each with its location (`cpu:0`, `cuda:3`, or `*` to find out), all or
    /// nothing. The regions that each became: one, or more if it is longer than one may be.
    pub fn register(&self, wanted: &[(Memory, &str)]) -> Result<Vec<Vec<Registered>>> {
        let shared = &self.shared;
        // Held while registrations change.
        let mut buffers = shared.buffers.lock();
        let mut tables = buffers.tables.clone();
        let worth_asking =
            tables.is_some() && wanted.iter().any(|(memory, _)| memory.length() >= WORTH_ASKING);
        let mapped = worth_asking.then(hmem::Pages::read);
        let mut made_of = Vec::with_capacity(wanted.len());
        let mut registrations = Vec::with_capacity(wanted.len());
        for (memory, location) in wanted {
            peers_read("location", location)?;
            let kind = hmem::kind_of(memory)?;
            let location = match (*location, kind) {
                ("*" | "", Kind::Device(device) | Kind::Managed(device)) => {
                    format!("cuda:{device}")
                }
                ("*" | "", Kind::Host | Kind::Pinned) => {
                    format!("cpu:{}", hmem::numa_node(memory.address()).unwrap_or(0))
                }
                (given, _) => given.to_owned(),
            };
            let (near, far) = shared.topology.nics_for(&location, &shared.names);
            let narrow = |nics: &[usize]| nics.iter().map(|&nic| nic as u16).collect::<Vec<_>>();
            let (near, far) = (narrow(&near), narrow(&far));
            let rails = rails_for(shared.config.nic_selection, kind, &near, &far);
            let page = match (&mapped, kind) {
                (_, Kind::Device(_) | Kind::Managed(_)) => DEVICE_PAGE,
                (Some(mapped), _) if memory.length() >= WORTH_ASKING => {
                    mapped.size(memory.address(), memory.length())
                }
                _ => hmem::SMALL_PAGE,
            };
            let place = match &mut tables {
                None => Place { rails, shares: 1 },
                Some(tables) => shared.place(tables, memory, page, &rails)?,
            };
            registrations.push(Registration {
                memory: memory.clone(),
                rails: place.rails,
                preferred: near,
                largest: shared.config.max_mr_size,
                merge: if kind.is_host() { engine::MERGE } else { MERGE_COPIES },
                shares: place.shares,
            });
            made_of.push((location, page));
        }
        let made = shared.engine.register(&registrations)?;
        for ((regions, (location, page)), (memory, _)) in made.iter().zip(made_of).zip(wanted) {
            let regions = regions.clone();
            buffers.add(memory.address(), RegisteredBuffer { location, regions, page });
        }
        Ok(made)
    }

    /// Ends the registration of the range that starts at `address`. Afterwards nothing of ours
    /// touches that memory. While our transfers use it, waits for them, 5 seconds at most, and makes progress;
    /// it stays registered meanwhile, also for new ones.
    ///
    /// # Errors
    /// [`Code::AddressNotRegistered`]; [`Code::Busy`] if it is still in use then (nothing has changed);
    /// [`Code::Memory`] if the provider refuses (it is not registered any more).
    pub fn unregister(&self, address: u64) -> Result<()> {
        self.unregister_many(&[address])
    }

    /// As [`Self::unregister`] for several ranges, with one such wait for all together. It goes on after an
    /// error; the first one.
    pub fn unregister_many(&self, addresses: &[u64]) -> Result<()> {
        let limit = self.shared.after(UNREGISTER);
        let results = addresses.iter().map(|&address| self.shared.unregister(address, limit));
        results.fold(Ok(()), Result::and)
    }

    /// Our segment, for peers: NICs with their endpoints' addresses, and all registered memory.
    pub fn descriptor(&self) -> Segment {
        let shared = &self.shared;
        let devices = shared.names.iter().enumerate().map(|(rail, name)| segment::Device {
            name: name.clone(),
            lid: 0,
            gid: segment::encode_gid(&shared.provider, &shared.addresses[rail]),
        });
        let buffers = shared.buffers.lock();
        let describe = |location: &String, region: &Registered| BufferDescriptor {
            name: location.clone(),
            addr: region.address,
            length: region.length,
            rkey: region.keys.clone(),
            lkey: vec![0; region.keys.len()],
        };
        Segment {
            name: shared.server_name.clone(),
            protocol: segment::PROTOCOL.to_owned(),
            devices: devices.collect(),
            buffers: buffers
                .by_number
                .values()
                .flat_map(|buffer| {
                    buffer.regions.iter().map(|region| describe(&buffer.location, region))
                })
                .collect(),
            topology: shared.topology.clone(),
            ..Segment::default()
        }
    }

    // ---- segments -----------------------------------------------------------------------------

    /// Makes a peer's segment known by its descriptor.
    ///
    /// # Errors
    /// [`Code::Endpoint`] if the peer runs another provider.
    pub fn open_segment(&self, segment: &Segment) -> Result<TargetId> {
        self.shared.engine.add_target(self.shared.remote(segment)?)
    }

    /// Makes a peer's segment known by its name, which the host engine resolves.
    pub fn open_segment_by_name(&self, name: &str) -> Result<TargetId> {
        self.open_segment(&self.shared.fetch(name)?)
    }

    /// Replaces a segment's descriptor. Transfers under way are not touched.
    pub fn update_segment(&self, id: TargetId, segment: &Segment) -> Result<()> {
        self.shared.engine.update_target(id, self.shared.remote(segment)?)
    }

    /// Forgets a segment. Transfers under way are not touched.
    pub fn close_segment(&self, id: TargetId) -> Result<()> {
        self.shared.engine.remove_target(id)
    }

    /// Connects every NIC to every NIC of a segment, so that the first transfer does not have to.
    pub fn warm_up(&self, id: TargetId) -> Result<()> {
        self.shared.resolve(self.shared.now(), None, || self.shared.engine.warm_up(id))
    }

    /// Answers a peer's handshake (both JSON, see [`Handshake`]).
    ///
    /// # Errors
    /// Those of a request that cannot be read. One that is refused is answered, with the reason in
    /// `reply_msg`.
    pub fn answer_handshake(&self, request: &str) -> Result<String> {
        let shared = &self.shared;
        let request = Handshake::from_json(request)?;
        let mut answer = Handshake {
            local_nic_path: request.peer_nic_path.clone(),
            peer_nic_path: request.local_nic_path.clone(),
            ..Handshake::default()
        };
        let rail = shared
            .names
            .iter()
            .position(|name| segment::nic_path(&shared.server_name, name) == request.peer_nic_path);
        let address = segment::hex_decode(&request.efa_addr);
        match (rail, address) {
            (None, _) => {
                answer.reply_msg =
                    format!("{} is not a NIC of {}", request.peer_nic_path, shared.server_name);
            }
            (_, None) => answer.reply_msg = "efa_addr is not a hexadecimal address".to_owned(),
            (Some(rail), Some(address)) => {
                let connected = shared.engine.admit(rail, &address);
                answer.efa_addr = segment::hex_encode(&shared.addresses[rail]);
                if let Err(error) = connected {
                    answer.efa_addr.clear();
                    answer.reply_msg = error.text;
                }
            }
        }
        if !answer.reply_msg.is_empty() {
            let (from, why) = (printable(&request.local_nic_path), printable(&answer.reply_msg));
            let line = format_args!("handshake from {from} refused: {why}");
            shared.refused.add(line, shared.now());
        }
        Ok(answer.to_json())
    }

    // ---- transfers ----------------------------------------------------------------------------

    /// A new batch for up to `capacity` requests.
    pub fn allocate_batch(&self, capacity: u32) -> Result<BatchId> {
        self.shared.engine.allocate_batch(capacity)
    }

    /// Frees a batch; [`Code::Busy`] while a request of it is under way.
    pub fn free_batch(&self, batch: BatchId) -> Result<()> {
        self.shared.engine.free_batch(batch)
    }

    /// Adds requests to a batch and starts them, all or none. The number of the first one's task.
    /// `timeout`: `None` for the configured one.
    pub fn submit(
        &self,
        batch: BatchId,
        requests: impl ExactSizeIterator<Item = Request> + Clone,
        timeout: Option<Duration>,
    ) -> Result<u32> {
        self.start(timeout, |now, deadline| {
            self.shared.engine.submit(batch, requests.clone(), now, deadline)
        })
    }

    /// Starts requests, all or none, whose end only the observer is told of.
    pub fn submit_detached(
        &self,
        requests: impl ExactSizeIterator<Item = Request> + Clone,
        timeout: Option<Duration>,
    ) -> Result<()> {
        self.start(timeout, |now, deadline| {
            self.shared.engine.submit_detached(requests.clone(), now, deadline)
        })
    }

    fn start<T>(
        &self,
        timeout: Option<Duration>,
        submit: impl Fn(u64, u64) -> Result<T, Refusal>,
    ) -> Result<T> {
        let shared = &self.shared;
        let now = shared.now();
        let timeout = timeout.unwrap_or(shared.config.slice_timeout);
        let deadline = now.saturating_add(nanoseconds(timeout));
        let submit = || submit(now, deadline);
        let started = match submit() {
            Ok(started) => started,
            Err(refusal) => shared.resolve(now, Some(refusal), submit)?,
        };
        shared.sleepers.iter().chain([&shared.watchdog]).for_each(Sleeper::wake);
        Ok(started)
    }

    /// Makes progress for someone who waits for what the observer is told.
    pub fn progress(&self) {
        let progress = self.shared.engine.progress(self.shared.now());
        if progress.events == 0 {
            make_way(progress);
        }
    }

    /// Status of a task and its bytes moved. Makes progress if it is not final.
    pub fn task_status(&self, batch: BatchId, task: u32) -> Result<(Status, u64)> {
        let engine = &self.shared.engine;
        let seen = engine.task_status(batch, task)?;
        if seen.0.is_final() {
            return Ok(seen);
        }
        self.shared.advance(batch)?;
        engine.task_status(batch, task)
    }

    /// Status of a batch and its count of tasks. Makes progress if it is not final.
    pub fn batch_status(&self, batch: BatchId) -> Result<(Status, u32)> {
        let engine = &self.shared.engine;
        let seen = engine.batch_status(batch)?;
        if seen.0.is_final() {
            return Ok(seen);
        }
        self.shared.advance(batch)?;
        engine.batch_status(batch)
    }

    /// Why a task failed or timed out, in one line: operation, peer, NIC, age, and the cause as the
    /// provider says it; `None` if it did not.
    pub fn task_error(&self, batch: BatchId, task: u32) -> Result<Option<String>> {
        self.shared.engine.task_error(batch, task)
    }

    /// Waits until every task of a batch has a final status, making progress; the batch's status.
    ///
    /// # Errors
    /// [`Code::Timeout`] if `timeout` passes first; the batch goes on. [`Code::InvalidArgument`] if the
    /// transport is being closed.
    pub fn wait(&self, batch: BatchId, timeout: Duration) -> Result<Status> {
        let shared = &self.shared;
        let watched = shared.engine.watch(batch)?;
        let ended = shared.until(shared.after(timeout), |now| {
            watched.expire(now);
            Some(watched.status()).filter(|status| status.is_final())
        });
        ended.ok_or_else(|| {
            shared.gave_up(format!("the batch is still under way after {timeout:?}"))
        })
    }

    /// Cancels what a batch has under way; its tasks end as [`Status::Canceled`] once their memory
    /// is quiet.
    pub fn cancel(&self, batch: BatchId) -> Result<()> {
        self.shared.engine.cancel(batch, self.shared.now())
    }

    /// Whether the provider has given back all memory of a batch's requests. It may not have after
    /// [`Status::Timeout`].
    pub fn is_quiet(&self, batch: BatchId) -> Result<bool> {
        let engine = &self.shared.engine;
        engine.progress(self.shared.now());
        engine.is_quiet(batch)
    }

    /// Waits until the provider has given back all memory of a batch's requests, making progress. Every
    /// task has a final status then.
    ///
    /// # Errors
    /// [`Code::Timeout`] if `timeout` passes first; nothing has changed then. [`Code::InvalidArgument`] if the
    /// transport is being closed.
    pub fn wait_quiet(&self, batch: BatchId, timeout: Duration) -> Result<()> {
        let shared = &self.shared;
        let watched = shared.engine.watch(batch)?;
        let quiet = shared.until(shared.after(timeout), |now| {
            watched.expire(now);
            (watched.in_use() == 0).then_some(())
        });
        quiet.ok_or_else(|| {
            shared.gave_up(format!(
                "after {timeout:?} the provider still has memory of {} of the batch's requests \
                 (neighbours that were merged count once)",
                watched.in_use()
            ))
        })
    }

    /// Counters of every NIC.
    pub fn rails(&self) -> Vec<RailStats> {
        let shared = &self.shared;
        let rail = |(index, name): (usize, &String)| RailStats {
            nic: name.clone(),
            counters: shared.engine.counters(index),
        };
        shared.names.iter().enumerate().map(rail).collect()
    }

    /// Counters of every NIC and peer.
    pub fn stats(&self) -> Stats {
        let shared = &self.shared;
        Stats {
            provider: shared.provider.clone(),
            rails: self.rails(),
            peers: shared.engine.peer_states(),
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        // It has been logged.
        let _ = self.end();
    }
}

impl Shared {
    /// The life of poller `index`: every `sleepers.len()`-th rail is its own.
    fn poll(&self, index: usize) {
        let rails: Vec<usize> = (index..self.names.len()).step_by(self.sleepers.len()).collect();
        let clock = || self.now();
        poller::run(&self.engine, &rails, &self.sleepers, index, &self.stop, clock);
    }

    /// Makes progress for someone who waits for a batch.
    fn advance(&self, batch: BatchId) -> Result<()> {
        let now = self.now();
        let progress = self.engine.progress(now);
        if progress.events == 0 {
            self.engine.watch(batch)?.expire(now);
            make_way(progress);
        }
        Ok(())
    }

    fn unregister(&self, address: u64, limit: u64) -> Result<()> {
        let registered = |buffers: &Buffers| buffers.numbers.get(&address).copied();
        let gone = || engine::not_registered(address);
        let number = registered(&self.buffers.lock()).ok_or_else(gone)?;
        let mut busy = None;
        // No lock is held while it waits. So another thread may end this registration meanwhile, and the same
        // memory may be registered anew.
        let ended = self.until(limit, |_| {
            let mut buffers = self.buffers.lock();
            if registered(&buffers) != Some(number) {
                return Some(Err(gone()));
            }
            let result = self.engine.unregister(address);
            if matches!(&result, Err(error) if error.code == Code::Busy) {
                busy = result.err();
                return None;
            }
            buffers.remove(address);
            Some(result)
        });
        ended.unwrap_or_else(|| {
            let mut error = busy.expect("it is why there was no result");
            if let Some(oldest) = self.engine.oldest_use(address, self.now()) {
                error.text += &format!("; the oldest: {oldest}");
            }
            Err(error)
        })
    }

    /// Why [`Self::until`] found nothing, for who waited until a time.
    fn gave_up(&self, timeout: String) -> Error {
        if self.closing.load(Ordering::Relaxed) {
            Error::invalid("the transport is being closed")
        } else {
            Error::new(Code::Timeout, timeout)
        }
    }

    fn now(&self) -> u64 {
        nanoseconds(self.clock.elapsed())
    }

    /// The time in `duration` from now.
    fn after(&self, duration: Duration) -> u64 {
        self.now().saturating_add(nanoseconds(duration))
    }

    /// Makes progress until `look`, which is told the time, finds what is waited for; `None` if it has not by
    /// `limit`, or if the transport is being closed. It looks once at least.
    fn until<T>(&self, limit: u64, mut look: impl FnMut(u64) -> Option<T>) -> Option<T> {
        let mut patience = Patience::default();
        loop {
            let now = self.now();
            let found = look(now);
            if found.is_some() || now >= limit || self.closing.load(Ordering::Relaxed) {
                return found;
            }
            match self.engine.progress(now).events {
                0 => patience.pause(),
                _ => patience = Patience::default(),
            }
        }
    }

    /// Where memory is to be registered, among these rails; taken from the tables.
    fn place(
        &self,
        tables: &mut Tables,
        memory: &Memory,
        page: u64,
        rails: &[u16],
    ) -> Result<Place> {
        let (address, length) = (memory.address(), memory.length());
        let pages = pages::spanned(address, length, page);
        let place = tables
            .place(pages, rails)
            .map_err(|error| error.context(format!("{length} bytes at {address:#x}")))?;
        if place.shares > 1 || place.rails.len() < rails.len() {
            let names = place.rails.iter().map(|&rail| self.names[usize::from(rail)].as_str());
            log::warn!(
                "{length} bytes at {address:#x} have {pages} pages of {page} bytes: registered {} on {} of \
                 {} NICs ({}), as far as their page tables have room; huge pages need less",
                match place.shares {
                    1 => "whole".to_owned(),
                    shares => format!("in {shares} parts"),
                },
                place.rails.len(),
                rails.len(),
                names.collect::<Vec<_>>().join(", ")
            );
        }
        let part = pages::part(pages, place.shares);
        place.rails.iter().for_each(|&rail| tables.take(usize::from(rail), part));
        Ok(place)
    }

    fn fetch(&self, name: &str) -> Result<Segment> {
        let host = self.host.as_ref().ok_or_else(|| {
            Error::new(
                Code::Metadata,
                format!("segment {name} is not known, and no host engine was given to ask for it"),
            )
        })?;
        Segment::from_json(&host.fetch_segment(name)?)
    }

    /// What the engine needs of a descriptor.
    fn remote(&self, segment: &Segment) -> Result<RemoteSegment> {
        let names: Vec<String> = segment.devices.iter().map(|device| device.name.clone()).collect();
        let mut nics = Vec::with_capacity(names.len());
        for device in &segment.devices {
            let address = match segment::decode_gid(&device.gid) {
                Some((provider, _)) if provider != self.provider => {
                    return Err(Error::new(
                        Code::Endpoint,
                        format!(
                            "{} uses libfabric provider {provider}, we use {}: set MC_EFA_PROVIDER \
                             to the same on both sides",
                            segment.name, self.provider
                        ),
                    ));
                }
                found => found.map(|(_, address)| address.into()),
            };
            nics.push(RemoteNic { name: device.name.clone(), address });
        }
        // A million buffers have few locations; and one without keys, of which a descriptor has room for
        // very many, has no use for them.
        let mut near: HashMap<&str, Vec<u16>> = HashMap::new();
        let mut preferred = |location| {
            let nics = || segment.topology.nics_for(location, &names).0.into_iter();
            near.entry(location).or_insert_with(|| nics().map(|nic| nic as u16).collect()).clone()
        };
        let buffers = segment.buffers.iter().map(|buffer| RemoteBuffer {
            address: buffer.addr,
            length: buffer.length,
            keys: buffer.rkey.clone(),
            preferred: if buffer.rkey.is_empty() { Vec::new() } else { preferred(&buffer.name) },
        });
        Ok(RemoteSegment {
            name: segment.name.clone(),
            server: segment.server_name().to_owned(),
            nics,
            buffers: buffers.collect(),
        })
    }

    /// Does what a refusal asks for and tries again: a handshake for every pair that needs one, and
    /// once a newer descriptor than that of `since`.
    fn resolve<T>(
        &self,
        since: u64,
        mut refusal: Option<Refusal>,
        attempt: impl Fn() -> Result<T, Refusal>,
    ) -> Result<T> {
        let mut fetched = false;
        loop {
            match refusal.take() {
                None => {}
                Some(Refusal::Error(error)) => return Err(error),
                Some(Refusal::NotThere { target, error }) => {
                    let fetch = |name: &str| self.remote(&self.fetch(name)?);
                    let again = !fetched
                        && self.host.is_some()
                        && self.engine.refresh_target(target, since, || self.now(), fetch)?;
                    if !again {
                        return Err(error);
                    }
                    fetched = true;
                }
                Some(Refusal::OutOfDate { target, error }) => {
                    let newer = match &self.host {
                        Some(_) if !fetched => self.fetch(&self.engine.target_name(target)?),
                        _ => Err(Error::new(Code::Metadata, "")),
                    };
                    fetched = true;
                    match (newer, error) {
                        (Ok(newer), _) => {
                            self.engine.update_target(target, self.remote(&newer)?)?;
                        }
                        (Err(_), Some(error)) => return Err(error),
                        // Nothing newer is to be had, and what we have may do.
                        (Err(_), None) => {}
                    }
                }
                Some(Refusal::NeedsHandshake { rail, nic, target }) => {
                    self.shake_hands(rail, nic, target)?;
                }
            }
            match attempt() {
                Ok(done) => return Ok(done),
                Err(next) => refusal = Some(next),
            }
        }
    }

    /// Asks a peer for the endpoint address of one of its NICs, as C++ peers do.
    fn shake_hands(&self, rail: usize, nic: u16, target: TargetId) -> Result<()> {
        let (server, peer_nic) = self.engine.target_nic(target, nic)?;
        let refused = |why: String| {
            Error::new(
                Code::RejectHandshake,
                format!("handshake with {peer_nic} of {server}: {why}"),
            )
        };
        let host = self.host.as_ref().ok_or_else(|| {
            refused("its descriptor has no endpoint address, and no host engine was given".into())
        })?;
        let request = Handshake {
            local_nic_path: segment::nic_path(&self.server_name, &self.names[rail]),
            peer_nic_path: segment::nic_path(&server, &peer_nic),
            efa_addr: segment::hex_encode(&self.addresses[rail]),
            ..Handshake::default()
        };
        let answer = Handshake::from_json(&host.handshake(&server, &request.to_json())?)?;
        if !answer.reply_msg.is_empty() {
            return Err(refused(format!("refused: {}", printable(&answer.reply_msg))));
        }
        let address = segment::hex_decode(&answer.efa_addr)
            .filter(|address| !address.is_empty())
            .ok_or_else(|| {
            refused("the answer's efa_addr is not a hexadecimal address".into())
        })?;
        self.engine.set_address(target, nic, &address)
    }
}

/// Refuses a name of ours, a `what`, that peers would refuse in our descriptor.
fn peers_read(what: &str, name: &str) -> Result<()> {
    line(what, name).map_err(|error| Error::invalid(format!("{}: peers refuse that", error.text)))
}

/// Waits for threads to end; false if they take longer than [`RETURN`].
fn join_in_time(threads: &mut Vec<JoinHandle<()>>) -> bool {
    let ended = in_time(RETURN, || threads.iter().all(JoinHandle::is_finished));
    if ended {
        threads.drain(..).for_each(|thread| drop(thread.join()));
    }
    ended
}

/// Closes what threads share (a `what`) that are about to leave it: when they have, 10 seconds at most. `begin_close` makes those
/// return who wait in a transport.
///
/// # Errors
/// [`Code::Busy`] if they have not: then it is dropped when they do. Those of `close`.
pub fn close_when_left<T>(
    what: &str,
    last: Arc<T>,
    close: impl FnOnce(T) -> Result<()>,
) -> Result<()> {
    if !in_time(LEAVE, || Arc::strong_count(&last) == 1) {
        let text =
            format!("other threads are still inside the {what}; it is closed when they leave");
        return Err(Error::new(Code::Busy, text));
    }
    Arc::into_inner(last).map_or(Ok(()), close)
}

/// Waits until `done`; false if that takes longer than `most`.
pub fn in_time(most: Duration, done: impl Fn() -> bool) -> bool {
    let limit = Instant::now() + most;
    loop {
        // Long waits are rare, and must not cost a core.
        match done() {
            true => return true,
            false if Instant::now() >= limit => return false,
            false => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// For someone who will ask again at once: if others do the work, they may need this core for it.
fn make_way(progress: Progress) {
    if progress.contended {
        std::thread::yield_now();
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_memory_is_registered_on_near_nics_unless_all_are_asked_for() {
        let rails = |selection, kind| rails_for(selection, kind, &[3, 1], &[0, 2]);
        let (local, all) = (NicSelection::Local, NicSelection::All);
        for kind in [Kind::Device(0), Kind::Managed(0)] {
            assert_eq!(rails(local, kind), [3, 1]);
            assert_eq!(rails(all, kind), [3, 1, 0, 2]);
        }
        for kind in [Kind::Host, Kind::Pinned] {
            assert_eq!(rails(local, kind), [3, 1, 0, 2]);
            assert_eq!(rails(all, kind), [3, 1, 0, 2]);
        }
        assert_eq!(Config::default().nic_selection, local);
    }
}
