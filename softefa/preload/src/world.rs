//! What this process is in the cluster, and how its devices are to be.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use softefa_core::cluster::{self, Cluster};
use softefa_core::profile::Profile;
use softefa_core::shared::Owner;
use softefa_core::sysfs;

/// Settings, from the environment; docs/softefa.md has the table.
pub struct Config {
    /// Queues mapped into the provider, which rings doorbells (libfabric 2.3 and later can).
    pub direct: bool,
    /// Depth of a receive queue.
    pub rx_wr: u32,
    /// Depth of a send queue, if not the profile's.
    pub tx_wr: Option<u32>,
    /// EFADV_DEVICE_ATTR_CAPS_*, if not the profile's.
    pub caps: Option<u32>,
    /// PCI device id, if not the profile's.
    pub part_id: Option<u32>,
    /// Bytes of the largest RDMA operation.
    pub max_rdma: u32,
    /// Entries of a NIC's page table.
    pub pages: u64,
    /// How long a receiver without receives is asked again, for each retry.
    pub rnr_ns: u64,
    /// Silence after which a peer is called unresponsive.
    pub dead_ns: u64,
    /// Whether RDMA moves data; otherwise it only costs what software costs.
    pub copy: bool,
    /// Empty polls after which the processor is offered to others; 0: never.
    pub yield_after: u32,
    /// Abort when a completion queue overruns.
    pub abort_on_overrun: bool,
    /// Say what is created and what fails.
    pub verbose: bool,
}

/// This process's place.
pub struct World {
    pub cluster: Cluster,
    pub config: Config,
    pub profile: Profile,
    pub host: u16,
    owner: AtomicU32,
}

static WORLD: OnceLock<Option<World>> = OnceLock::new();
/// The thread that makes the world must not see the emulated one while it does.
static MAKING: AtomicBool = AtomicBool::new(false);

/// The process's world, made at the first call. None: it cannot be, which was said.
pub fn world() -> Option<&'static World> {
    WORLD
        .get_or_init(|| {
            MAKING.store(true, Ordering::SeqCst);
            let world = make();
            MAKING.store(false, Ordering::SeqCst);
            world.map_err(|error| eprintln!("{error}")).ok()
        })
        .as_ref()
}

/// As [`world`], for the functions that the making of it calls itself.
pub fn world_if_made() -> Option<&'static World> {
    if MAKING.load(Ordering::SeqCst) && WORLD.get().is_none() { None } else { world() }
}

fn number(name: &str) -> Result<Option<u64>, String> {
    let Some(text) = std::env::var_os(name) else { return Ok(None) };
    let text = text.to_string_lossy();
    let text = text.trim();
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map(Some).map_err(|_| format!("softefa: {name}={text}: not a number"))
}

fn bounded(name: &str, default: u64, most: u64) -> Result<u64, String> {
    match number(name)? {
        Some(n) if n > most => Err(format!("softefa: {name}={n}: at most {most}")),
        n => Ok(n.unwrap_or(default)),
    }
}

fn depth(name: &str) -> Result<Option<u32>, String> {
    match number(name)? {
        Some(n) if !(1..=32768).contains(&n) => {
            Err(format!("softefa: {name}={n}: from 1 to 32768"))
        }
        n => Ok(n.map(|n| n as u32)),
    }
}

fn make() -> Result<World, String> {
    let profile = match std::env::var("SOFTEFA_PROFILE") {
        Ok(name) if !name.is_empty() => Profile::named(&name).ok_or_else(|| {
            format!(
                "softefa: SOFTEFA_PROFILE={name}: unknown; there are {}",
                Profile::names().join(", ")
            )
        })?,
        _ => Profile::plain(bounded("SOFTEFA_DEVICES", 2, 32)? as usize),
    };
    let direct = match std::env::var("SOFTEFA_DATA_PATH").as_deref() {
        Ok("direct") => true,
        Err(_) | Ok("" | "verbs") => false,
        Ok(other) => return Err(format!("softefa: SOFTEFA_DATA_PATH={other}: verbs or direct")),
    };
    let config = Config {
        direct,
        rx_wr: depth("SOFTEFA_RX_WR")?.unwrap_or(32768),
        tx_wr: depth("SOFTEFA_TX_WR")?,
        caps: number("SOFTEFA_CAPS")?.map(|n| n as u32),
        part_id: number("SOFTEFA_PART_ID")?.map(|n| n as u32),
        max_rdma: bounded("SOFTEFA_MAX_RDMA", 1 << 30, 1 << 30)? as u32,
        // A NIC takes about 88 GB in pages of 4 KiB, 44 TB in pages of 2 MiB.
        pages: bounded("SOFTEFA_PAGES", 22_000_000, u64::MAX)?,
        rnr_ns: bounded("SOFTEFA_RNR_US", 2000, 1 << 40)? * 1000,
        dead_ns: bounded("SOFTEFA_DEAD_MS", 3000, 1 << 40)? * 1_000_000,
        copy: bounded("SOFTEFA_COPY", 1, 1)? == 1,
        yield_after: bounded("SOFTEFA_YIELD", 64, u64::from(u32::MAX))? as u32,
        abort_on_overrun: bounded("SOFTEFA_ABORT_ON_OVERRUN", 0, 1)? == 1,
        verbose: bounded("SOFTEFA_VERBOSE", 0, u64::MAX)? != 0,
    };
    let host = match number("SOFTEFA_HOST")? {
        Some(n) if n > u64::from(u16::MAX) => {
            return Err(format!("softefa: SOFTEFA_HOST={n}: at most {}", u16::MAX));
        }
        n => n.map(|n| n as u16),
    };
    let cluster = Cluster::open(&cluster::default_dir()).map_err(|error| error.to_string())?;
    let host = host.unwrap_or_else(|| cluster.host_of_namespace());
    let root = sysfs_root(&cluster, host);
    sysfs::create(&root, &profile, host)
        .map_err(|error| format!("softefa: {}: {error}", root.display()))?;
    let owner = cluster.join().map_err(|error| error.to_string())?;
    crate::redirect::set_root(&root);
    // SAFETY: lets the other processes of this user move data in and out of this one, where the
    // kernel asks for leave (Yama). The handler touches atomics only.
    unsafe {
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0);
        libc::pthread_atfork(None, None, Some(in_child));
    }
    Ok(World { cluster, config, profile, host, owner: AtomicU32::new(owner) })
}

/// Where the `/sys` of a host is.
fn sysfs_root(cluster: &Cluster, host: u16) -> PathBuf {
    cluster.dir().join(format!("sys-{host}"))
}

extern "C" fn in_child() {
    if let Some(Some(world)) = WORLD.get() {
        world.owner.store(0, Ordering::SeqCst);
        crate::agent::forget();
        crate::faults::forget();
    }
}

impl World {
    /// Shows in `/sys` whether a NIC's port is down.
    pub fn show_port(&self, nic: u16, down: bool) {
        let name = &self.profile.nics[usize::from(nic)].name;
        if let Err(error) = sysfs::set_port(&sysfs_root(&self.cluster, self.host), name, down) {
            eprintln!("softefa: the port of {name}: {error}");
        }
    }

    /// This process in the cluster's table.
    pub fn me(&self) -> Owner {
        let owner = self.owner.load(Ordering::Relaxed);
        if owner != 0 {
            return owner;
        }
        // A child after fork. What its parent created stays the parent's.
        let owner = self.cluster.join().unwrap_or(0);
        match self.owner.compare_exchange(0, owner, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => owner,
            Err(other) => other,
        }
    }

    /// One line to standard error, if SOFTEFA_VERBOSE is set.
    pub fn say(&self, line: impl FnOnce() -> String) {
        if self.config.verbose {
            eprintln!("softefa[{}]: {}", std::process::id(), line());
        }
    }
}
