//! One network device: its endpoint, peers and registered memory.
#![forbid(unsafe_code)]

mod gpu;
mod message;
mod near;
mod process;
mod shm;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::engine::{Nic, Operation, PeerAddress, Post};
use crate::error::{Code, Error, Result};
use crate::fabric::{
    self, AddressVector, Completed, CompletionQueue, Domain, Endpoint, EventQueue, Fabric, Info,
    Libfabric, Memory, MemoryKind, MemoryRegion, Query,
};
use crate::fault::{Class, Fault};
use crate::hmem::{self, DeviceMemory, Kind};
use gpu::{Gpu, Way};
use near::{Held, Near, Place};

/// Completions taken at once.
const BATCH: usize = 64;
/// A slot's context is one of this many in turn, so that a completion that comes twice, or late, is
/// not taken for the slot's next operation.
const GENERATIONS: u32 = 4;

/// Receive buffers of an endpoint, whose only messages are the provider's own handshakes, one a peer and
/// direction. The `efa` provider's default is the depth of the device, 8192 or more, which takes 70 MiB and
/// 28 ms a NIC more (docs/performance.md). What finds no buffer is sent again.
const RECEIVES: usize = 1024;

/// Bytes of an EFA endpoint's address that tell it from others: GID, queue pair, padding, key (`struct
/// efa_ep_addr`).
const EFA_ADDRESS: usize = 24;

/// How long the state of our port is taken to be what it was: when it goes down, all that is in flight fails.
const PORT_CHECK: Duration = Duration::from_millis(50);

/// What to open devices with.
#[derive(Clone, Debug)]
pub struct Limits {
    /// At most this many operations in flight; `None` for the provider's depth.
    pub operations: Option<usize>,
    /// Completion queue entries to ask for.
    pub completions: usize,
    /// Peers to size the address vector for.
    pub peers: usize,
}

/// A device that could be opened.
#[derive(Clone)]
pub struct Device {
    /// Its name, as Mooncake and people write it: `rdmap0s31`, `eth0`.
    pub name: String,
    info: Info,
}

impl Device {
    /// libfabric's description of it.
    pub fn info(&self) -> &Info {
        &self.info
    }
}

/// The devices of a provider, one for each domain.
///
/// `provider` is libfabric's name, or one of its first words: where `tcp` alone has no reliable
/// datagrams (libfabric 1.17), `tcp;ofi_rxm` is taken.
pub fn devices(lib: &'static Libfabric, provider: &str, ipv6: bool) -> Result<Vec<Device>> {
    // C++ peers open the `efa` fabric; an `efa` endpoint cannot talk to an `efa-direct` one.
    let fabric = (provider == "efa").then_some("efa");
    let layered = format!("{provider};ofi_rxm");
    let names = [provider, &layered];
    for name in &names[..if provider.contains(';') { 1 } else { 2 }] {
        // `shm` says that it takes GPU memory whether or not it does (1.17 to 2.7), and those that do copy inside a poll, in
        // whatever context the thread has.
        for hmem in [provider == "efa" && hmem::gpu_in_use(), false] {
            let query = Query { provider: name, fabric, hmem };
            let infos = Info::query(lib, &query)?;
            if !infos.is_empty() {
                return Ok(distinct(infos, ipv6));
            }
            if !hmem {
                break;
            }
        }
    }
    Ok(Vec::new())
}

/// The first fitting entry of each domain.
fn distinct(infos: Vec<Info>, ipv6: bool) -> Vec<Device> {
    let mut devices: Vec<Device> = Vec::new();
    for info in infos {
        let domain = info.domain();
        let name = domain.strip_suffix("-rdm").unwrap_or(&domain).to_owned();
        let speaks = info.is_ipv6() == ipv6 || !info.speaks_ip();
        if speaks && devices.iter().all(|device| device.name != name) {
            devices.push(Device { name, info });
        }
    }
    devices
}

/// An open device.
pub struct FabricNic {
    info: Info,
    endpoint: Endpoint,
    addresses: Arc<AddressVector>,
    events: Option<Arc<EventQueue>>,
    address: Box<[u8]>,
    depth: u32,
    /// log2 of the contexts of one generation.
    context_bits: u32,
    delivery: bool,
    is_efa: bool,
    /// Why it takes host memory only, if so.
    host_only: Option<String>,
    port: Port,
    generations: Box<[u8]>,
    /// The first context that is not for the engine's operations.
    first_extra: u32,
    regions: Vec<Option<Region>>,
    next_key: u64,
    /// What other NICs of this process see of our regions, and we of theirs.
    place: Place,
    near: Vec<Near>,
    /// Once there is GPU memory here or at a peer.
    gpu: Option<Box<Gpu>>,
    /// What [`Nic::longest`] found last.
    asked: Option<(u32, PeerAddress, u64, Way)>,
    peers: HashMap<Box<[u8]>, PeerAddress>,
    completed: Box<[Completed; BATCH]>,
    /// Reads of the completion queue that failed.
    unreadable: u64,
    lib: &'static Libfabric,
}

/// Registered memory.
struct Region {
    /// `None` where the provider takes no such memory.
    nic: Option<MemoryRegion>,
    key: u64,
    /// `None` where it was registered without CUDA in the process.
    held: Option<Arc<Held>>,
}

impl Region {
    fn kind(&self) -> Kind {
        self.held.as_ref().map_or(Kind::Host, |held| held.kind)
    }

    /// Whether CUDA copies from here to there at once: else it goes by way of pinned host memory.
    fn reaches(&self, far: &Held) -> bool {
        match (self.device(), &far.device) {
            // Each is mapped for its own device.
            (Some(ours), Some(theirs)) if ours.is_unowned() && theirs.is_unowned() => {
                ours.context().device() == theirs.context().device()
            }
            _ => self.kind() != Kind::Host && far.kind != Kind::Host,
        }
    }

    fn device(&self) -> Option<&DeviceMemory> {
        self.held.as_ref()?.device.as_ref()
    }
}

impl FabricNic {
    /// Opens a device.
    pub fn open(lib: &'static Libfabric, device: Device, limits: &Limits) -> Result<Self> {
        let mut info = device.info;
        if info.device_rma() {
            info.limit_receives(RECEIVES);
        }
        let open = || -> Result<Self> {
            let fabric = Fabric::open(&info)?;
            let domain = Domain::open(&fabric, &info)?;
            let addresses = AddressVector::open(&domain, limits.peers)?;
            let queue = CompletionQueue::open(&domain, limits.completions + gpu::CONTEXTS)?;
            let events = EventQueue::open(&fabric).ok();
            // Strictly below what either queue holds: nothing protects against overrun.
            let most = info.tx_depth().min(queue.size()).saturating_sub(1).max(1);
            // With room for what is not the engine's, where that is small against it.
            let most = if most >= 8 * gpu::CONTEXTS { most - gpu::CONTEXTS } else { most };
            let depth = limits.operations.unwrap_or(most).clamp(1, most).min(1 << 16) as u32;
            if let Some(asked) = limits.operations.filter(|&asked| asked > most) {
                log::warn!("MC_MAX_WR={asked} is more than {} takes; using {most}", device.name);
            }
            let context_bits = depth.next_power_of_two().ilog2();
            let first_extra = GENERATIONS << context_bits;
            let contexts = first_extra as usize + gpu::CONTEXTS;
            let is_shm = info.provider() == "shm";
            if is_shm {
                shm::clean();
            }
            let mut host_only = info.no_device_memory();
            let configure = |endpoint: &Endpoint| {
                // Keep transfers on the device; providers without these options refuse them.
                endpoint.set_shared_memory(false);
                if !endpoint.set_cuda_api(false) && host_only.is_none() {
                    // It would copy by the CPU. And where it may call CUDA, it asks of memory what CUDA refuses for
                    // that of its virtual memory management, and then fails transfers.
                    host_only = Some(
                        "the NIC cannot reach the GPUs' memory (no peer to peer): load efa_nv_peermem or \
                         NVIDIA's open kernel modules, and unset FI_HMEM_DISABLE_P2P"
                            .to_owned(),
                    );
                }
                if is_shm {
                    shm::name().map(|name| endpoint.set_address(&name));
                }
            };
            let endpoint =
                Endpoint::open(&info, &queue, &addresses, events.as_ref(), contexts, configure)?;
            let address: Box<[u8]> = endpoint.address()?.into();
            // EFA's device acknowledges a write when it is in the target's memory. Software must be
            // asked to, and so must the `efa` provider where it emulates writes, or might (1.17
            // does not tell).
            let (emulated_writes, emulated_reads) = endpoint.emulation();
            if emulated_reads == Some(true) && host_only.is_none() {
                // It has no way then to get what comes in packets into GPU memory, and what goes there hangs.
                host_only = Some(
                    "the NIC has no RDMA reads, or FI_EFA_USE_DEVICE_RDMA=0 is set".to_owned(),
                );
            }
            let is_efa = info.provider() == "efa";
            let delivery = !is_efa || emulated_writes != Some(false);
            let mut nic = Self {
                info,
                endpoint,
                addresses,
                events,
                place: Place::new(&address),
                address,
                depth,
                context_bits,
                delivery,
                is_efa,
                host_only,
                port: Port::new(&device.name),
                generations: vec![0; depth as usize].into(),
                first_extra,
                regions: Vec::new(),
                next_key: first_key(),
                near: Vec::new(),
                gpu: None,
                asked: None,
                peers: HashMap::new(),
                completed: Box::new([Completed::default(); BATCH]),
                unreadable: 0,
                lib,
            };
            // The first poll and the first peer fill the provider's pools, tens of megabytes: do it now,
            // not in the first transfer.
            nic.poll(&mut Vec::new(), &mut Vec::new());
            if nic.info.device_rma() {
                nic.connect(&nic.address.clone())?;
            }
            Ok(nic)
        };
        open().map_err(|error| error.context(format!("opening {}", device.name)))
    }

    /// The endpoint's address, for peers.
    pub fn address(&self) -> &[u8] {
        &self.address
    }

    /// Writes, reads that the provider emulates in software; `None` where it does not say.
    pub fn emulation(&self) -> (Option<bool>, Option<bool>) {
        self.endpoint.emulation()
    }

    /// Whether peers' transfers get on only while we poll. Where the device itself does RMA they need a poll
    /// for the provider's handshake alone.
    pub fn peers_need_polls(&self) -> bool {
        self.emulation() != (Some(false), Some(false))
    }

    /// What to wait on for the device's events, if it has something.
    pub fn fd(&self) -> Option<std::os::fd::RawFd> {
        self.endpoint.queue().fd()
    }

    /// Whether sleeping is safe now: on [`Self::fd`], or a little where there is none.
    pub fn may_sleep(&self) -> bool {
        if self.gpu.as_ref().is_some_and(|gpu| !gpu.is_idle()) {
            return false;
        }
        if self.fd().is_none() {
            return true;
        }
        if self.info.device_rma() {
            self.endpoint.queue().forget_event();
        }
        self.endpoint.queue().may_sleep()
    }

    /// A key of ours that is not 0, which means "not registered" in descriptors.
    fn new_key(&mut self) -> u64 {
        let mask = match self.info.key_bytes() {
            bytes @ 1..8 => (1 << (8 * bytes)) - 1,
            _ => u64::MAX,
        };
        self.next_key = (self.next_key.wrapping_add(1) & mask).max(1);
        self.next_key
    }

    fn register_once(&mut self, memory: &Memory, kind: MemoryKind) -> Result<MemoryRegion> {
        let key = if self.info.provider_keys() { 0 } else { self.new_key() };
        MemoryRegion::register(&self.endpoint, &self.info, memory, kind, key)
    }

    /// With a key that is not 0.
    fn register_with_key(&mut self, memory: &Memory, kind: MemoryKind) -> Result<MemoryRegion> {
        let mut made = self.register_once(memory, kind)?;
        if made.key() == 0 {
            // The provider's first key may be 0. Keep it taken while asking for another.
            made = self.register_once(memory, kind)?;
        }
        if made.key() == 0 {
            return Err(Error::new(Code::Memory, "the provider gives no other key than 0"));
        }
        Ok(made)
    }

    /// Device memory, which the NIC itself is to reach.
    fn register_device(
        &mut self,
        memory: &Memory,
        device: i32,
        held: Option<&Held>,
    ) -> Result<MemoryRegion> {
        let Some(held) = held.and_then(|held| held.device.as_ref()) else {
            return self.register_with_key(memory, MemoryKind::Cuda(device, None));
        };
        if !self.info.takes_dmabuf() {
            return self.register_with_key(memory, MemoryKind::Cuda(device, None));
        }
        match held.dmabuf() {
            Ok(dmabuf) => self.register_with_key(memory, MemoryKind::Cuda(device, Some(&dmabuf))),
            Err(first) => self
                .register_with_key(memory, MemoryKind::Cuda(device, None))
                .map_err(|error| Error { text: format!("{first}; without it: {error}"), ..error }),
        }
    }

    /// Once for each reason.
    fn say_staged(&self) {
        static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let (why, mut said) = (self.host_only.clone().unwrap_or_default(), SAID.lock());
        if !said.contains(&why) {
            log::warn!(
                "{why}; so GPU memory is staged through pinned host memory, which is slower, and only peers that run \
                 mooncake-efa reach it"
            );
            said.push(why);
        }
    }

    fn is_shm(&self) -> bool {
        self.info.provider() == "shm"
    }

    /// What of an endpoint's address tells it from others.
    fn known<'a>(&self, address: &'a [u8]) -> &'a [u8] {
        // What follows means something to its owner only, who may write it differently each time.
        if self.is_efa { &address[..address.len().min(EFA_ADDRESS)] } else { address }
    }

    /// The peer with this address, which is put into the address vector if it is not there.
    fn find_or_insert(&mut self, address: &[u8]) -> Result<PeerAddress> {
        let known = self.known(address);
        if let Some(&peer) = self.peers.get(known) {
            return Ok(peer);
        }
        // 1.17 takes such an address, and crashes at the first operation.
        if self.is_shm() && shm::is_gone(address) {
            return Err(Error::new(Code::Endpoint, "the peer's process is gone"));
        }
        let peer = self.addresses.insert(address)?;
        let known: Box<[u8]> = known.into();
        self.meet(&known, peer);
        self.peers.insert(known, peer);
        Ok(peer)
    }

    fn region(&self, region: u32) -> Option<&Region> {
        self.regions.get(region as usize).and_then(Option::as_ref)
    }

    /// Posts an operation of the engine's to the provider.
    #[inline]
    fn post_straight(&self, operation: &Operation) -> Post {
        match self.region(operation.region).and_then(|region| region.nic.as_ref()) {
            Some(region) => self.post_from(region, operation),
            None => Post::Failed(libc::EINVAL),
        }
    }

    /// Posts one with its local memory inside `region`.
    #[inline]
    fn post_from(&self, region: &MemoryRegion, operation: &Operation) -> Post {
        let Some(&generation) = self.generations.get(operation.slot as usize) else {
            return Post::Failed(libc::EINVAL);
        };
        self.endpoint.post(
            region,
            &fabric::Operation {
                write: operation.write,
                delivery: self.delivery,
                local: operation.local,
                length: operation.length as usize,
                peer: operation.peer,
                remote: operation.remote,
                key: operation.key,
                context: operation.slot | u32::from(generation) << self.context_bits,
            },
        )
    }

    /// Appends what the completion queue has: slots, and from [`Self::EXTRA`] on contexts of [`gpu`]'s.
    fn read_queue(&mut self, completed: &mut Vec<u32>, failed: &mut Vec<(u32, Fault)>) {
        let first_extra = self.first_extra;
        let mut slot_of = |context: Option<u32>| {
            if let Some(extra) = context.and_then(|context| context.checked_sub(first_extra)) {
                return Self::EXTRA + extra;
            }
            let slot = context.and_then(|context| {
                let slot = context & ((1 << self.context_bits) - 1);
                let generation = self.generations.get_mut(slot as usize)?;
                (context >> self.context_bits == u32::from(*generation)).then(|| {
                    *generation = (*generation + 1) % GENERATIONS as u8;
                    slot
                })
            });
            // One that belongs to no operation in flight goes up as such, to be counted.
            slot.unwrap_or(u32::MAX)
        };
        match self.endpoint.queue().read(&mut self.completed[..]) {
            Ok(count) => {
                let contexts =
                    self.completed[..count].iter().map(|&done| self.endpoint.context_of(done));
                completed.extend(contexts.map(slot_of));
            }
            Err(None) => {
                while let Some(error) = self.endpoint.queue().read_error() {
                    let context = self.endpoint.context_of_error(&error);
                    if context.is_none() {
                        log::warn!("an error that belongs to no transfer: {}", error.text);
                    }
                    let device = self.is_efa.then_some(error.provider_errno);
                    let mut fault = Fault::new(error.errno, device, error.text);
                    if self.is_efa && fault.class == Class::Peer && self.port.is_down() {
                        fault = fault.over_down_port();
                    }
                    failed.push((slot_of(context), fault));
                }
            }
            Err(Some(errno)) => {
                // It may be so at every poll: said less and less often.
                self.unreadable += 1;
                if self.unreadable.is_power_of_two() {
                    let (count, why) = (self.unreadable, self.lib.strerror(errno));
                    let name = self.info.domain();
                    log::error!("{name}: reading completions failed, {count} times so far: {why}");
                }
            }
        }
    }

    /// Above every slot, below the mark of a stray.
    const EXTRA: u32 = 1 << 30;

    /// Of what a read of the queue appended, takes out what is a step on the way of an operation with GPU memory, and
    /// adds those that have ended.
    fn sort_out(
        &mut self,
        completed: &mut Vec<u32>,
        done: usize,
        failed: &mut Vec<(u32, Fault)>,
        wrong: usize,
    ) {
        let mut steps: Vec<(u32, Option<Fault>)> = Vec::new();
        let is_step = |slot: u32| {
            (Self::EXTRA..u32::MAX).contains(&slot)
                || self.gpu.as_ref().is_some_and(|gpu| gpu.has(slot))
        };
        for at in (done..completed.len()).rev() {
            if is_step(completed[at]) {
                steps.push((completed.swap_remove(at), None));
            }
        }
        for at in (wrong..failed.len()).rev() {
            if is_step(failed[at].0) {
                let (slot, fault) = failed.swap_remove(at);
                steps.push((slot, Some(fault)));
            }
        }
        for (slot, fault) in steps {
            let result = fault.map_or(Ok(()), Err);
            match slot.checked_sub(Self::EXTRA) {
                Some(extra) => self.gpu_event(extra, result),
                None => self.gpu_transferred(slot, result),
            }
        }
        self.gpu_turn();
        if let Some(gpu) = &mut self.gpu {
            for (slot, result) in gpu.ended() {
                match result {
                    Ok(()) => completed.push(slot),
                    Err(fault) => failed.push((slot, fault)),
                }
            }
        }
    }
}

impl Nic for FabricNic {
    fn depth(&self) -> u32 {
        self.depth
    }

    fn max_length(&self) -> u64 {
        self.info.max_message().max(1)
    }

    fn virtual_addresses(&self) -> bool {
        self.info.virtual_addresses()
    }

    fn register(&mut self, region: u32, memory: &Memory) -> Result<u64> {
        let held = near::hold(memory)?;
        let kind = held.as_ref().map_or(Kind::Host, |held| held.kind);
        if let Some(device) = held.as_ref().and_then(|held| held.device.as_ref()) {
            device.order_copies();
            // Other processes of this host may ask for it, though the NIC reaches it.
            self.listen()?;
        }
        let nic = match (kind, self.host_only.is_none()) {
            (Kind::Host | Kind::Pinned, _) => {
                Some(self.register_with_key(memory, MemoryKind::Host)?)
            }
            (Kind::Device(device), true) => {
                let made = self.register_device(memory, device, held.as_deref());
                Some(made.map_err(|error| {
                    let (length, at) = (memory.length(), memory.address());
                    error.context(format!("{length} bytes at {at:#x} on CUDA device {device}"))
                })?)
            }
            (Kind::Managed(_), true) => {
                return Err(Error::new(
                    Code::NotImplemented,
                    format!(
                        "memory at {:#x} is CUDA managed memory, which moves between the host and the GPU, so no \
                         NIC can reach it; allocate it with cudaMalloc or on the host",
                        memory.address()
                    ),
                ));
            }
            (_, false) => {
                self.say_staged();
                None
            }
        };
        let key = match &nic {
            Some(nic) => nic.key(),
            None => message::OWNERS_KEY | self.new_key() & 0xffff_ffff,
        };
        if let Some(held) = &held {
            self.place.0.put(key, held.clone());
        }
        let index = region as usize;
        if self.regions.len() <= index {
            self.regions.resize_with(index + 1, || None);
        }
        self.regions[index] = Some(Region { nic, key, held });
        Ok(key)
    }

    fn unregister(&mut self, region: u32) -> Result<()> {
        let region = self.regions.get_mut(region as usize).and_then(Option::take);
        let Some(Region { nic, key, held }) = region else { return Ok(()) };
        let quiet = held.map_or(Ok(()), |held| self.gpu_unregister(key, &held));
        quiet.and(nic.map_or(Ok(()), MemoryRegion::close))
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerAddress> {
        let peer = self.find_or_insert(address)?;
        if let Some(gpu) = &mut self.gpu {
            gpu.adopt(peer);
        }
        Ok(peer)
    }

    fn disconnect(&mut self, peer: PeerAddress) -> Result<()> {
        self.peers.retain(|_, known| *known != peer);
        self.near.retain(|(near, _)| *near != peer);
        let busy = self.gpu.as_mut().is_some_and(|gpu| {
            gpu.forget(peer);
            gpu.serves(peer)
        });
        // An address with operations in flight must stay; the provider's table has one entry more.
        if busy { Ok(()) } else { self.addresses.remove(peer) }
    }

    fn longest(&mut self, region: u32, peer: PeerAddress, key: u64) -> Option<u64> {
        if Self::goes_straight(key) { None } else { self.gpu_longest(region, peer, key) }
    }

    fn connects(&self) -> bool {
        !self.is_efa
    }

    fn greet(&mut self, peer: PeerAddress, remote: u64, key: u64) -> Post {
        // Older libfabric waits for the answer itself. An owner's key is none of the peer's NIC, which would refuse the
        // write (or the peer crash, where writes are emulated); messages need no greeting.
        if self.info.device_rma() && !message::is_owners(key) {
            self.endpoint.greet(peer, remote, key)
        } else {
            Post::Done
        }
    }

    fn unanswered(&mut self, waited: Duration) -> Fault {
        let fault = Fault::unanswered(waited);
        if self.port.is_down() { fault.over_down_port() } else { fault }
    }

    fn post(&mut self, operation: &Operation) -> Post {
        if Self::goes_straight(operation.key) {
            self.post_straight(operation)
        } else {
            self.gpu_post(operation)
        }
    }

    fn poll(&mut self, completed: &mut Vec<u32>, failed: &mut Vec<(u32, Fault)>) {
        let (done, wrong) = (completed.len(), failed.len());
        self.read_queue(completed, failed);
        if self.gpu.is_some() {
            self.sort_out(completed, done, failed, wrong);
        }
    }

    fn tend(&mut self) {
        while let Some(event) = self.events.as_ref().and_then(|events| events.next_error()) {
            log::error!("the provider reports: {event}");
        }
    }

    fn explain(&self, errno: i32) -> Fault {
        Fault::new(errno, None, format_args!("{} (error {errno})", self.lib.strerror(errno)))
    }
}

impl Drop for FabricNic {
    fn drop(&mut self) {
        // Before the endpoint is gone: peers take that to mean that nothing of theirs is used any more.
        if let Some(gpu) = &mut self.gpu {
            gpu.finish();
        }
    }
}

/// A NIC's port, as the kernel sees it.
struct Port {
    state: PathBuf,
    /// When it was looked at last, and whether it was down.
    seen: Option<(Instant, bool)>,
}

impl Port {
    fn new(device: &str) -> Self {
        let state = format!("/sys/class/infiniband/{device}/ports/1/state").into();
        Self { state, seen: None }
    }

    /// Whether it is known to be down.
    fn is_down(&mut self) -> bool {
        if let Some((_, down)) = self.seen.filter(|(when, _)| when.elapsed() < PORT_CHECK) {
            return down;
        }
        // "4: ACTIVE", "1: DOWN", ...
        let state = std::fs::read_to_string(&self.state);
        let down = state.is_ok_and(|state| state.contains("DOWN"));
        self.seen = Some((Instant::now(), down));
        down
    }
}

/// Where keys that we choose start. Not the same in every process, so that a key kept from a peer's
/// former life is not by chance valid in the next.
fn first_key() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(std::process::id()) & 0xffff_ffff) | 1
}
