//! One engine: a name, a transport, its memory, the segments it knows, and notifications.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use mooncake_efa::config::Config;
use mooncake_efa::engine::{BatchId, Request, Status, TargetId};
use mooncake_efa::fabric::Memory;
use mooncake_efa::topology::Topology;
use mooncake_efa::transport::{Host, Options, Transport, close_when_left};
use mooncake_efa::{Code, Error, Result};
use parking_lot::{Mutex, RwLock};
use serde_json::json;

use crate::address;
use crate::discovery;
use crate::metadata::{self, Location, Metadata, Notification};
use crate::segments::{LOCAL, Segments, Slot};
use crate::wire::{Answer, Kind, Server};

/// The protocol that is libfabric's `tcp` provider, for hosts without EFA.
const TCP: &str = "tcp";
/// The protocol of this library.
const EFA: &str = mooncake_efa::segment::PROTOCOL;
/// Most notifications that wait to be fetched, and their bytes: a peer can send them, and the program may never look.
const INBOX: usize = 65536;
const INBOX_BYTES: usize = 64 << 20;
/// How fast a NIC's measured bandwidth follows: what is this old counts for 1/e.
const MEMORY_OF_LOAD: Duration = Duration::from_secs(1);
/// Loads are not measured over less than this.
const LEAST_LOAD: Duration = Duration::from_millis(1);

/// One transfer, as [`Request`] but by a segment's handle.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Write to the segment; otherwise read from it.
    pub write: bool,
    /// Address of our memory, registered.
    pub local: u64,
    /// Handle of the segment at the other end; 0 is our own.
    pub segment: i32,
    /// Address in its process.
    pub remote: u64,
    /// Bytes; 0 completes at once.
    pub length: u64,
}

/// What a NIC has to do.
#[derive(Clone, Debug, PartialEq)]
pub struct NicLoad {
    /// Its name.
    pub nic: String,
    /// Bytes queued or in flight.
    pub pending: u64,
    /// Bytes a second, of late.
    pub bandwidth: f64,
}

/// See the module's documentation. Every method may be called from any thread.
pub struct Engine {
    shared: Arc<Shared>,
    config: Config,
    segments: Segments,
    topology: Mutex<Topology>,
    /// Held to change the transport, shared to change what is registered with it.
    installing: RwLock<()>,
    /// In the order of registration.
    memory: Mutex<Vec<(Memory, String)>>,
    /// What is to be sent when a batch is complete, by batch.
    outbox: Mutex<HashMap<u64, (i32, Notification)>>,
    /// Its length, so that nobody locks it for nothing.
    outgoing: AtomicUsize,
    loads: Mutex<Vec<Load>>,
    /// Held to publish our descriptor.
    publishing: Mutex<()>,
    /// `MC_SLICE_TIMEOUT` is set, so the program expects transfers to time out.
    names_timeouts: bool,
    /// It is being closed: nobody is to begin anything that takes long.
    closing: AtomicBool,
    server: Mutex<Option<Server>>,
    ticker: Mutex<Option<Ticker>>,
}

/// What answers to peers need too.
struct Shared {
    /// The name that peers know us by.
    name: String,
    location: Location,
    metadata: Arc<Metadata>,
    transport: &'static Installation,
    inbox: Mutex<Inbox>,
}

/// Where an engine's transport is, if it has one. It stays when the engine goes, so that its address is the engine's
/// handle, never another's, and what happens often has to look at one thing only.
pub type Installation = ArcSwapOption<Installed>;

/// A transport that is installed.
pub struct Installed {
    protocol: &'static str,
    transport: Transport,
    engine: Arc<Engine>,
}

#[derive(Default)]
struct Inbox {
    waiting: VecDeque<Notification>,
    bytes: usize,
    /// It has been logged that there is no room.
    told: bool,
}

/// A NIC's bandwidth, measured when somebody asks.
struct Load {
    since: Instant,
    bytes: u64,
    bandwidth: f64,
}

/// The engine as the transport's host.
struct Guide(Arc<Metadata>);

impl Host for Guide {
    fn fetch_segment(&self, name: &str) -> Result<String> {
        Ok(self.0.segment(name)?.to_json())
    }

    fn handshake(&self, server: &str, request: &str) -> Result<String> {
        self.0.handshake(server, request)
    }
}

impl Answer for Shared {
    fn answer(&self, kind: Kind, request: &str) -> Result<String> {
        match kind {
            Kind::Connection => {
                self.with(|installed| installed.transport.answer_handshake(request))
            }
            Kind::Metadata => self.with(|installed| Ok(installed.transport.descriptor().to_json())),
            Kind::Notify => {
                let notification = serde_json::from_str(request).map_err(|why| {
                    Error::new(Code::MalformedJson, format!("a notification: {why}"))
                })?;
                let taken = self.inbox.lock().take(notification);
                let message = if taken { "success" } else { "" }.to_owned();
                Ok(metadata::json(&Notification { name: String::new(), message }))
            }
            Kind::Probe => Ok(json!({"status": "success"}).to_string()),
        }
    }
}

impl Inbox {
    /// False if there is no room for it.
    fn take(&mut self, notification: Notification) -> bool {
        let bytes = notification.name.len() + notification.message.len();
        let room = self.waiting.len() < INBOX && bytes <= INBOX_BYTES - self.bytes;
        if room {
            self.bytes += bytes;
            self.waiting.push_back(notification);
        } else if !std::mem::replace(&mut self.told, true) {
            log::warn!("notifications are refused: {} wait to be fetched", self.waiting.len());
        }
        room
    }
}

impl Shared {
    fn with<R>(&self, f: impl FnOnce(&Installed) -> Result<R>) -> Result<R> {
        match &*self.transport.load() {
            Some(installed) => f(installed),
            None => Err(Error::invalid("no transport is installed")),
        }
    }
}

impl Engine {
    /// An engine that answers peers at a TCP port, without a transport unless `auto_discover` asks for one: then it
    /// is EFA where there is EFA, and TCP elsewhere.
    ///
    /// `connection` says where the metadata is ([`Metadata::open`]), `name` is ours for peers, `host:port`. With
    /// `P2PHANDSHAKE` the port is a free one instead, and [`Self::address`] tells it.
    pub fn create(
        config: Config,
        connection: &str,
        name: &str,
        auto_discover: bool,
    ) -> Result<Arc<Self>> {
        raise_file_limit();
        let metadata = Arc::new(Metadata::open(connection, &config)?);
        let (host, port) = address::parse(name, config.handshake_port);
        let (listener, name, location) = if metadata.is_peer_to_peer() {
            let (listener, port) = address::listen(&config, None)?;
            (listener, address::join(&host, port), Location { host, port })
        } else if config.legacy_rpc_port_binding {
            let (listener, port) = address::listen(&config, Some(port))?;
            (listener, name.to_owned(), Location { host, port })
        } else {
            let host = address::of_this_host(&config)?;
            let (listener, port) = address::listen(&config, None)?;
            (listener, name.to_owned(), Location { host, port })
        };
        let shared = Arc::new(Shared {
            name,
            location,
            metadata,
            transport: Box::leak(Box::default()),
            inbox: Mutex::default(),
        });
        let server = Server::start(listener, shared.clone(), metadata::limits(&config))?;
        log::info!("{} answers at {}", shared.name, shared.address());
        let engine = Arc::new(Self {
            segments: Segments::new(&shared.name),
            shared,
            config,
            topology: Mutex::default(),
            installing: RwLock::default(),
            memory: Mutex::default(),
            outbox: Mutex::default(),
            outgoing: AtomicUsize::new(0),
            loads: Mutex::default(),
            publishing: Mutex::default(),
            names_timeouts: std::env::var_os("MC_SLICE_TIMEOUT").is_some(),
            closing: AtomicBool::new(false),
            server: Mutex::new(Some(server)),
            ticker: Mutex::default(),
        });
        let shared = &engine.shared;
        shared.metadata.publish_location(&shared.name, &shared.location)?;
        let started = engine.start(auto_discover);
        if started.is_err() {
            engine.close();
        }
        started.map(|()| engine)
    }

    fn start(self: &Arc<Self>, auto_discover: bool) -> Result<()> {
        let force_tcp = std::env::var_os("MC_FORCE_TCP").is_some();
        if auto_discover && !force_tcp {
            self.discover()?;
        }
        if force_tcp {
            log::info!("MC_FORCE_TCP is set: no other protocol is used");
            self.install(TCP, None)?;
        } else if auto_discover {
            let found = !self.topology.lock().devices().is_empty();
            if !found {
                log::warn!("there is no EFA device: protocol tcp is used");
            }
            self.install(if found { EFA } else { TCP }, None)?;
        }
        *self.ticker.lock() = Ticker::start(self)?;
        Ok(())
    }

    /// Finds out which NICs there are and what is near them.
    pub fn discover(&self) -> Result<()> {
        *self.topology.lock() = discovery::discover(&self.config)?;
        Ok(())
    }

    /// Where peers reach us: `address:port`.
    pub fn address(&self) -> String {
        self.shared.address()
    }

    /// Where its transport is.
    pub fn installation(&self) -> &'static Installation {
        self.shared.transport
    }

    // ---- transport ----------------------------------------------------------------------------

    /// Installs the transport of a protocol, `efa` or `tcp`, and registers with it what was registered before.
    /// `matrix` is a NIC priority matrix (JSON) to be used instead of what was discovered. Does nothing if it is
    /// installed already.
    ///
    /// # Errors
    /// [`Code::NotImplemented`] for another protocol, or when one is installed that is another;
    /// [`Code::DeviceNotFound`] for `efa` without a topology; those of [`Transport::install`]. Nothing is installed
    /// then.
    pub fn install(self: &Arc<Self>, protocol: &str, matrix: Option<&str>) -> Result<()> {
        let _alone = self.installing.write();
        if let Some(installed) = &*self.shared.transport.load() {
            if installed.protocol == protocol {
                log::warn!("transport {protocol} is installed already");
                return Ok(());
            }
            let text = format!(
                "transport {} is installed, and an engine has one: uninstall it before {protocol}",
                installed.protocol
            );
            return Err(Error::new(Code::NotImplemented, text));
        }
        let given = matrix.map(Topology::from_json).transpose()?;
        let asked = given.as_ref().map(Topology::devices);
        let (protocol, provider, topology) = match protocol {
            EFA => {
                let topology = given.unwrap_or_else(|| self.topology.lock().clone());
                if topology.devices().is_empty() {
                    let text = "protocol efa needs NICs, and the topology has none: discoverTopology comes first, or \
                                a NIC priority matrix in args[0]; `mooncake-efa devices` lists what there is";
                    return Err(Error::new(Code::DeviceNotFound, text));
                }
                (EFA, self.config.provider.clone(), Some(topology))
            }
            // What was discovered is EFA's.
            TCP => (TCP, TCP.to_owned(), given),
            other => {
                let text = format!(
                    "protocol {other} is not in this library: it has efa, and tcp (libfabric's, which only peers with \
                     this library speak)"
                );
                return Err(Error::new(Code::NotImplemented, text));
            }
        };
        if protocol == TCP {
            log::warn!(
                "protocol tcp is libfabric's tcp provider here: peers need this library too, and it is slower than EFA"
            );
        }
        let transport = Transport::install(Options {
            server_name: self.shared.name.clone(),
            topology: topology.clone(),
            devices: Vec::new(),
            config: Config { provider, ..self.config.clone() },
            host: Some(Box::new(Guide(self.shared.metadata.clone()))),
            observer: None,
        })?;
        // Without one of them all that there are would be used, which is not what was asked for.
        if let Some(asked) =
            asked.filter(|asked| !asked.iter().any(|nic| transport.nic_names().contains(nic)))
        {
            let text = format!(
                "none of the NICs of the priority matrix ({}) is one of provider {}, which has {}",
                asked.join(", "),
                transport.provider(),
                transport.nic_names().join(", ")
            );
            return Err(Error::new(Code::DeviceNotFound, text));
        }
        let memory = self.memory.lock().clone();
        let known: Vec<_> =
            memory.iter().map(|(memory, place)| (memory.clone(), &**place)).collect();
        transport.register(&known)?;
        let descriptor = transport.descriptor();
        self.shared.metadata.publish_segment(&descriptor)?;
        self.shared.metadata.introduce(descriptor);
        if let Some(topology) = topology {
            *self.topology.lock() = topology;
        }
        self.shared.transport.store(Some(Arc::new(Installed {
            protocol,
            transport,
            engine: self.clone(),
        })));
        Ok(())
    }

    /// Uninstalls it: cancels what is under way and forgets its batches. Memory stays known, and segments open, for
    /// the next transport. Nothing happens if it is not installed.
    ///
    /// # Errors
    /// [`Code::Busy`] if threads stay inside, or the provider does not return: as of [`Transport::close`].
    pub fn uninstall(&self, protocol: &str) -> Result<()> {
        let _alone = self.installing.write();
        let other = |installed: &Arc<Installed>| installed.protocol != protocol;
        if self.shared.transport.load().as_ref().is_none_or(other) {
            return Ok(());
        }
        let Some(last) = self.shared.transport.swap(None) else { return Ok(()) };
        last.transport.begin_close();
        for slot in self.segments.iter() {
            let _changing = slot.users.lock();
            slot.set_target(None);
        }
        self.outbox.lock().clear();
        self.outgoing.store(0, Ordering::Relaxed);
        close_when_left("transport", last, |installed| installed.transport.close())
    }

    /// Ends it: nobody finds it any more, peers get no answers, its transport is closed. Errors are logged.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        *self.ticker.lock() = None;
        self.withdraw();
        *self.server.lock() = None;
        let protocol = self.shared.transport.load().as_ref().map(|installed| installed.protocol);
        if let Some(Err(error)) = protocol.map(|protocol| self.uninstall(protocol)) {
            log::error!("{}: {error}", self.shared.name);
        }
    }

    /// Removes what a metadata server has of it.
    pub fn withdraw(&self) {
        if let Err(error) = self.shared.metadata.withdraw(&self.shared.name) {
            log::warn!("{} stays in the metadata: {error}", self.shared.name);
        }
    }

    // ---- memory -------------------------------------------------------------------------------

    /// Registers ranges with their locations (`cpu:0`, `cuda:3`, `*` to find out), all or nothing, and lets peers
    /// know. Without a transport they are registered when one is installed.
    ///
    /// # Errors
    /// [`Code::AddressOverlapped`]; those of [`Transport::register`]; those of the metadata server, when nothing
    /// stays registered.
    pub fn register(&self, wanted: Vec<(Memory, String)>) -> Result<()> {
        let _transport_stays = self.installing.read();
        if wanted.is_empty() {
            return Ok(());
        }
        self.reserve(&wanted)?;
        let registered = match &*self.shared.transport.load() {
            None => Ok(()),
            Some(installed) => self.register_with(&installed.transport, &wanted),
        };
        if registered.is_err() {
            wanted.iter().for_each(|(memory, _)| self.forget(memory.address()));
        }
        registered
    }

    /// Puts ranges among those that are known, if they are apart.
    fn reserve(&self, wanted: &[(Memory, String)]) -> Result<()> {
        let mut known = self.memory.lock();
        let mut all: Vec<(u64, u64)> = Vec::with_capacity(known.len() + wanted.len());
        all.extend(
            known.iter().chain(wanted).map(|(memory, _)| (memory.address(), memory.length())),
        );
        all.sort_unstable();
        match all.windows(2).find(|pair| pair[1].0 - pair[0].0 < pair[0].1) {
            None => {
                known.extend_from_slice(wanted);
                Ok(())
            }
            Some(pair) => {
                let text = format!(
                    "{} bytes at {:#x} and {} at {:#x} overlap: memory can be registered once",
                    pair[0].1, pair[0].0, pair[1].1, pair[1].0
                );
                Err(Error::new(Code::AddressOverlapped, text))
            }
        }
    }

    fn register_with(&self, transport: &Transport, wanted: &[(Memory, String)]) -> Result<()> {
        let ranges: Vec<_> =
            wanted.iter().map(|(memory, place)| (memory.clone(), &**place)).collect();
        transport.register(&ranges)?;
        self.publish(transport).inspect_err(|_| {
            let addresses: Vec<u64> = ranges.iter().map(|(memory, _)| memory.address()).collect();
            if let Err(error) = transport.unregister_many(&addresses) {
                log::error!("taking back a registration: {error}");
            }
        })
    }

    /// Ends the registration of ranges by their first bytes. It goes on after an error; the first one.
    ///
    /// # Errors
    /// [`Code::AddressNotRegistered`]; those of [`Transport::unregister`] and of the metadata server.
    pub fn unregister(&self, addresses: &[u64]) -> Result<()> {
        let _transport_stays = self.installing.read();
        let mut result = Ok(());
        match &*self.shared.transport.load() {
            None => {
                for &address in addresses {
                    let known =
                        self.memory.lock().iter().any(|(memory, _)| memory.address() == address);
                    let unknown = || {
                        Error::new(
                            Code::AddressNotRegistered,
                            format!("no memory is registered at {address:#x}"),
                        )
                    };
                    result = result.and(known.then_some(()).ok_or_else(unknown));
                    self.forget(address);
                }
            }
            Some(installed) => {
                for &address in addresses {
                    let ended = installed.transport.unregister(address);
                    if !matches!(&ended, Err(error) if error.code == Code::Busy) {
                        self.forget(address);
                    }
                    result = result.and(ended);
                }
                result = result.and(self.publish(&installed.transport));
            }
        }
        result
    }

    fn forget(&self, address: u64) {
        self.memory.lock().retain(|(memory, _)| memory.address() != address);
    }

    /// Lets peers, and ourselves, know what is registered now.
    fn publish(&self, transport: &Transport) -> Result<()> {
        // One after the other, so that the newest is what stays.
        let _alone = self.publishing.lock();
        let own = self.segments.get(LOCAL).and_then(Slot::target);
        if own.is_none() && self.shared.metadata.is_peer_to_peer() {
            return Ok(()); // who wants to know asks
        }
        let descriptor = transport.descriptor();
        if let Some(own) = own {
            transport.update_segment(own, &descriptor)?;
        }
        self.shared.metadata.publish_segment(&descriptor)
    }

    // ---- segments -----------------------------------------------------------------------------

    /// Opens a segment by name; its handle, the same each time. Our own is 0.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] for an empty name; those of [`Metadata::segment`]; [`Code::Endpoint`] if the peer
    /// has another provider.
    pub fn open(&self, name: &str) -> Result<i32> {
        let name = bare(name)?;
        let handle = match self.segments.find(name) {
            Some(handle) => handle,
            None => {
                let segment = self.shared.metadata.segment(name)?;
                let installed = self.shared.transport.load();
                let target = installed
                    .as_ref()
                    .map(|installed| installed.transport.open_segment(&segment))
                    .transpose()?;
                let (handle, surplus) = self.segments.add(name, target);
                if let (Some(target), Some(installed)) = (surplus, &*installed) {
                    installed.transport.close_segment(target)?;
                }
                handle
            }
        };
        *self.slot(handle)?.users.lock() += 1;
        Ok(handle)
    }

    /// As [`Self::open`], with the descriptor of now. If that cannot be had, a segment that is open stays as it was.
    pub fn open_anew(&self, name: &str) -> Result<i32> {
        let name = bare(name)?;
        if let Some(slot) = self.segments.find(name).and_then(|handle| self.segments.get(handle)) {
            self.refresh(slot);
        }
        self.open(name)
    }

    /// Closes a segment, as many times as it was opened; then its handle is refused.
    pub fn close_segment(&self, handle: i32) -> Result<()> {
        let slot = self.slot(handle)?;
        if handle == LOCAL {
            return Ok(());
        }
        let mut users = slot.users.lock();
        *users = users.checked_sub(1).ok_or_else(|| closed(handle, &slot.name))?;
        if *users == 0 { self.drop_target(slot) } else { Ok(()) }
    }

    /// Forgets a segment, however often it was opened. Our own, and one that is not known, are not touched.
    pub fn forget_segment(&self, name: &str) -> Result<()> {
        let handle = self.segments.find(bare(name)?).filter(|&handle| handle != LOCAL);
        let Some(slot) = handle.and_then(|handle| self.segments.get(handle)) else { return Ok(()) };
        *slot.users.lock() = 0;
        self.drop_target(slot)
    }

    fn drop_target(&self, slot: &Slot) -> Result<()> {
        match (slot.set_target(None), &*self.shared.transport.load()) {
            (Some(target), Some(installed)) => installed.transport.close_segment(target),
            _ => Ok(()),
        }
    }

    /// Connects to every NIC of a segment, which is opened if it is not. Our own is.
    pub fn warm_up(&self, name: &str) -> Result<()> {
        if name.is_empty() || name == self.shared.name || self.shared.transport.load().is_none() {
            return Ok(());
        }
        let name = bare(name)?;
        let known = self
            .segments
            .find(name)
            .filter(|&handle| self.segments.get(handle).is_some_and(|slot| *slot.users.lock() > 0));
        let handle = known.map_or_else(|| self.open(name), Ok)?;
        self.shared.with(|installed| installed.transport.warm_up(self.target(installed, handle)?))
    }

    /// Fetches the descriptors of all open segments. What cannot be had stays as it was, and is logged.
    pub fn refresh_all(&self) {
        let open = self.segments.iter().skip(1).filter(|slot| *slot.users.lock() > 0);
        open.take_while(|_| !self.closing.load(Ordering::Relaxed))
            .for_each(|slot| self.refresh(slot));
    }

    fn refresh(&self, slot: &Slot) {
        let newer = self.shared.metadata.segment(&slot.name);
        let updated = newer.and_then(|segment| {
            let _changing = slot.users.lock();
            match (slot.target(), &*self.shared.transport.load()) {
                (Some(target), Some(installed)) => {
                    installed.transport.update_segment(target, &segment)
                }
                _ => Ok(()),
            }
        });
        if let Err(error) = updated {
            log::warn!("segment {} stays as it was known: {error}", slot.name);
        }
    }

    fn slot(&self, handle: i32) -> Result<&Slot> {
        self.segments
            .get(handle)
            .ok_or_else(|| Error::invalid(format!("{handle} is not a segment's handle")))
    }

    /// The target of a handle, opened if it is not.
    fn target(&self, installed: &Installed, handle: i32) -> Result<TargetId> {
        let slot = self.slot(handle)?;
        match slot.target() {
            Some(target) => Ok(target),
            None => self.open_target(installed, handle, slot),
        }
    }

    #[cold]
    fn open_target(&self, installed: &Installed, handle: i32, slot: &Slot) -> Result<TargetId> {
        let users = slot.users.lock();
        if let Some(target) = slot.target() {
            return Ok(target);
        }
        let _alone = (handle == LOCAL).then(|| self.publishing.lock());
        let segment = match handle {
            LOCAL => installed.transport.descriptor(),
            _ if *users == 0 => return Err(closed(handle, &slot.name)),
            _ => self.shared.metadata.segment(&slot.name)?,
        };
        let target = installed.transport.open_segment(&segment)?;
        slot.set_target(Some(target));
        Ok(target)
    }

    // ---- transfers ----------------------------------------------------------------------------

    /// Sends what was to be sent when a batch is complete, if it is.
    #[cold]
    fn notify_of(&self, installed: &Installed, batch: u64) {
        let complete = installed
            .transport
            .batch_status(BatchId(batch))
            .is_ok_and(|(status, _)| status == Status::Completed);
        if !complete {
            return;
        }
        let Some((handle, notification)) = self.take_outgoing(batch) else { return };
        if let Err(error) = self.notify(handle, &notification) {
            log::error!("a batch is complete, but its notification was not delivered: {error}");
        }
    }

    fn take_outgoing(&self, batch: u64) -> Option<(i32, Notification)> {
        let mut outbox = self.outbox.lock();
        let taken = outbox.remove(&batch);
        self.outgoing.store(outbox.len(), Ordering::Relaxed);
        taken
    }

    // ---- notifications ------------------------------------------------------------------------

    /// Sends a notification to the owner of a segment, and waits for its answer.
    pub fn notify(&self, handle: i32, notification: &Notification) -> Result<()> {
        self.shared.metadata.notify(&self.slot(handle)?.name, notification)
    }

    /// What peers sent since the last time.
    pub fn notifications(&self) -> Vec<Notification> {
        std::mem::take(&mut *self.shared.inbox.lock()).waiting.into()
    }

    // ---- what goes on -------------------------------------------------------------------------

    /// The load of every NIC. Bandwidth is measured from one call to the next, the older the less it counts.
    pub fn loads(&self) -> Vec<NicLoad> {
        let Ok(rails) = self.shared.with(|installed| Ok(installed.transport.rails())) else {
            return Vec::new();
        };
        let now = Instant::now();
        let mut loads = self.loads.lock();
        loads.truncate(rails.len());
        let load = |(index, rail): (usize, mooncake_efa::stats::RailStats)| {
            let bytes = rail.counters.bytes();
            if loads.len() == index {
                loads.push(Load { since: now, bytes, bandwidth: 0.0 });
            }
            let load = &mut loads[index];
            let passed = now.duration_since(load.since);
            if passed >= LEAST_LOAD {
                let fresh = bytes.saturating_sub(load.bytes) as f64 / passed.as_secs_f64();
                let kept = (-passed.as_secs_f64() / MEMORY_OF_LOAD.as_secs_f64()).exp();
                load.bandwidth = load.bandwidth * kept + fresh * (1.0 - kept);
                (load.since, load.bytes) = (now, bytes);
            }
            NicLoad {
                nic: rail.nic,
                pending: rail.counters.pending_bytes,
                bandwidth: load.bandwidth,
            }
        };
        rails.into_iter().enumerate().map(load).collect()
    }

    /// Logs what was moved since the last report (when, and bytes until then), as Mooncake does; this one.
    fn report(&self, (since, before): (Instant, u64)) -> (Instant, u64) {
        let now = Instant::now();
        let Ok(rails) = self.shared.with(|installed| Ok(installed.transport.rails())) else {
            return (now, 0);
        };
        let bytes = rails.iter().map(|rail| rail.counters.bytes()).sum::<u64>();
        let passed = now.duration_since(since).as_secs_f64();
        if bytes > before {
            let speed = (bytes - before) as f64 / passed / f64::from(1 << 20);
            log::info!(
                "[Metrics] Transfer Engine Stats (over last {passed:.0}s): Throughput: {speed:.2} MB/s"
            );
        }
        (now, bytes)
    }

    /// Our NICs and the topology, as JSON or for people.
    pub fn links(&self, json: bool) -> String {
        let topology = self.topology.lock().clone();
        let own = self.shared.with(|installed| Ok(installed.transport.descriptor().devices)).ok();
        let source = if own.is_some() { "efa_transport" } else { "topology" };
        let nics: Vec<(String, String)> = match own {
            Some(devices) => devices.into_iter().map(|device| (device.name, device.gid)).collect(),
            None => topology.devices().into_iter().map(|name| (name, String::new())).collect(),
        };
        if json {
            let nics: Vec<_> = nics
                .iter()
                .map(|(name, gid)| {
                    let link = discovery::link(name);
                    let numa = link.numa.map_or(-1, i64::from);
                    json!({"device": name, "numa": numa, "gid": gid, "gid_index": 0, "port": 1,
                           "speed_gbps": link.gbps.unwrap_or(0), "source": source})
                })
                .collect();
            return serde_json::to_string_pretty(
                &json!({"local_nics": nics, "topology": topology}),
            )
            .expect("strings and numbers have a JSON form");
        }
        let mut text = "=== Local NICs ===\n".to_owned();
        if nics.is_empty() {
            text += "  (none)\n";
        }
        for (name, gid) in &nics {
            let link = discovery::link(name);
            let numa = link.numa.map_or("?".to_owned(), |numa| numa.to_string());
            let speed = link.gbps.map_or("?".to_owned(), |gbps| gbps.to_string());
            let gid = if gid.is_empty() { "(no transport installed)" } else { gid };
            text += &format!("  {name}  NUMA={numa}  {speed}Gbps  GID={gid}\n");
        }
        if !topology.entries.is_empty() {
            text += "\n=== Topology (NIC Selection) ===\n";
        }
        for (location, entry) in &topology.entries {
            let (near, far) = (entry.preferred.join(", "), entry.available.join(", "));
            text += &format!("  {location} -> preferred: [{near}]  available: [{far}]\n");
        }
        text
    }
}

impl Installed {
    /// Adds transfers to a batch and starts them, all or none. `notification` is sent to the first one's segment when
    /// all of the batch are complete and [`Self::status`] was asked.
    pub fn submit(
        &self,
        batch: u64,
        transfers: impl ExactSizeIterator<Item = Transfer> + Clone,
        notification: Option<Notification>,
    ) -> Result<()> {
        let engine = &*self.engine;
        let mut last = None;
        for transfer in transfers.clone() {
            if last != Some(transfer.segment) {
                last = Some(transfer.segment);
                if engine.config.disable_metacache && transfer.segment != LOCAL {
                    engine.refresh(engine.slot(transfer.segment)?);
                }
                engine.target(self, transfer.segment)?;
            }
        }
        let Some(first) = transfers.clone().next() else {
            return match notification {
                None => Ok(()),
                Some(_) => Err(Error::invalid("a notification without a transfer")),
            };
        };
        // No target is 0: one that was closed since is refused below.
        let target =
            |handle| engine.segments.get(handle).and_then(Slot::target).unwrap_or(TargetId(0));
        let mut aim = (first.segment, target(first.segment));
        let requests = transfers.map(move |transfer| {
            if transfer.segment != aim.0 {
                aim = (transfer.segment, target(transfer.segment));
            }
            let Transfer { write, local, remote, length, .. } = transfer;
            Request { write, local, target: aim.1, remote, length, cookie: 0 }
        });
        self.transport.submit(BatchId(batch), requests, None)?;
        if let Some(notification) = notification {
            let mut outbox = engine.outbox.lock();
            outbox.insert(batch, (first.segment, notification));
            engine.outgoing.store(outbox.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Status of a transfer, by its place in the batch, and its bytes moved. Makes progress.
    ///
    /// One that timed out is [`Status::Failed`] unless `MC_SLICE_TIMEOUT` is set: without it Mooncake's transport never
    /// times out, and programs made for it (NIXL's plugin does) take what is not failed and not under way for complete.
    pub fn status(&self, batch: u64, task: u32) -> Result<(Status, u64)> {
        let mut seen = self.transport.task_status(BatchId(batch), task)?;
        if seen.0 == Status::Timeout && !self.engine.names_timeouts {
            seen.0 = Status::Failed;
        }
        if seen.0 == Status::Completed && self.engine.outgoing.load(Ordering::Relaxed) > 0 {
            self.engine.notify_of(self, batch);
        }
        Ok(seen)
    }

    /// A new batch for up to `capacity` transfers: its number.
    pub fn allocate(&self, capacity: u32) -> Result<u64> {
        Ok(self.transport.allocate_batch(capacity)?.0)
    }

    /// Frees a batch; [`Code::Busy`] while a transfer of it is under way.
    pub fn free(&self, batch: u64) -> Result<()> {
        self.transport.free_batch(BatchId(batch))?;
        if self.engine.outgoing.load(Ordering::Relaxed) > 0 {
            self.engine.take_outgoing(batch);
        }
        Ok(())
    }
}

impl Shared {
    fn address(&self) -> String {
        address::join(&self.location.host, self.location.port)
    }
}

/// A segment's name without the slashes before it, which Mooncake takes away too.
fn bare(name: &str) -> Result<&str> {
    let bare = name.trim_start_matches('/');
    if bare.is_empty() { Err(Error::invalid("a segment without a name")) } else { Ok(bare) }
}

fn closed(handle: i32, name: &str) -> Error {
    Error::invalid(format!("segment {name} (handle {handle}) is not open"))
}

/// As many files as the process may open: a peer over tcp takes one each, as does a NIC.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(why) = setrlimit(Resource::Nofile, limit) {
        log::warn!("the limit of open files stays as it is: {why}");
    }
}

/// A thread for what happens now and then, if anything is to.
struct Ticker {
    /// Dropped to end it.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start(engine: &Arc<Engine>) -> Result<Option<Self>> {
        let config = &engine.config;
        let refresh = config.metadata_refresh_interval.filter(|_| !config.disable_metacache);
        let report = config.te_metric.then_some(config.te_metric_interval);
        let Some(every) = refresh.into_iter().chain(report).min() else { return Ok(None) };
        let (end, ended) = channel();
        let engine = Arc::downgrade(engine);
        let life = move || {
            let now = Instant::now();
            let mut next = [refresh.map(|after| now + after), report.map(|after| now + after)];
            let mut reported = (now, 0);
            loop {
                let due = next
                    .iter()
                    .flatten()
                    .min()
                    .map_or(every, |at| at.saturating_duration_since(Instant::now()));
                if ended.recv_timeout(due) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let Some(engine) = engine.upgrade() else { return };
                let now = Instant::now();
                if next[0].is_some_and(|at| at <= now) {
                    engine.refresh_all();
                    next[0] = refresh.map(|after| Instant::now() + after);
                }
                if next[1].is_some_and(|at| at <= now) {
                    reported = engine.report(reported);
                    next[1] = report.map(|after| Instant::now() + after);
                }
            }
        };
        let thread = std::thread::Builder::new().name("mefa-te-tick".into()).spawn(life);
        let thread =
            thread.map_err(|why| Error::new(Code::Context, format!("starting a thread: {why}")))?;
        Ok(Some(Self { end: Some(end), thread: Some(thread) }))
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.end = None;
        // It may be itself, if the last engine is dropped there.
        if let Some(thread) =
            self.thread.take().filter(|thread| thread.thread().id() != std::thread::current().id())
        {
            let _ = thread.join();
        }
    }
}
