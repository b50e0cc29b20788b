//! What sysfs says.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most bytes that are read of a file, far more than any of those here has.
const MAX_FILE: u64 = 4096;

/// The files of a host: the real ones, or a tree that a test made.
pub(super) struct Host {
    root: PathBuf,
}

/// Where a device is. The default is: nobody knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub numa: Option<u32>,
    /// The names of the PCI devices above it, of the root bus first, and its own; empty if it is not one.
    pub path: Vec<OsString>,
}

/// A PCI device's domain, bus, slot and function, as in `0000:4f:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PciAddress(u32, u8, u8, u8);

impl FromStr for PciAddress {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (front, function) = text.split_once('.').ok_or(())?;
        let mut parts = front.split(':');
        let mut part = || u32::from_str_radix(parts.next().ok_or(())?, 16).map_err(|_| ());
        let (domain, bus, slot) = (part()?, part()?, part()?);
        if parts.next().is_some() {
            return Err(());
        }
        let byte = |number: u32| u8::try_from(number).map_err(|_| ());
        let function = u8::from_str_radix(function, 16).map_err(|_| ())?;
        Ok(Self(domain, byte(bus)?, byte(slot)?, function))
    }
}

impl Place {
    /// Links on the way between two devices in the PCI tree; none if one of them is not in it.
    ///
    /// Those of different root buses are counted as if one bus connected these, which is how Mooncake does it.
    pub fn distance(&self, other: &Self) -> Option<usize> {
        if self.path.is_empty() || other.path.is_empty() {
            return None;
        }
        let shared = self.path.iter().zip(&other.path).take_while(|(a, b)| a == b).count();
        Some(self.path.len() + other.path.len() - 2 * shared)
    }
}

impl Host {
    /// This one.
    pub fn real() -> Self {
        Self::at("/".into())
    }

    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// A path given from the root on, without the `/`.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The NUMA nodes, in order. A kernel without NUMA shows none: that is node 0.
    pub fn nodes(&self) -> Vec<u32> {
        let directory = self.path("sys/devices/system/node");
        let node = |name: String| {
            let number = name.strip_prefix("node")?.parse().ok()?;
            directory.join(&name).is_dir().then_some(number)
        };
        let mut nodes: Vec<u32> = names(&directory).into_iter().filter_map(node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.is_empty() { vec![0] } else { nodes }
    }

    /// Where the device is that a directory of sysfs, or a link to one, is about.
    pub fn place(&self, device: &Path) -> Place {
        let Ok(real) = device.canonicalize() else { return Place::default() };
        // An interface's device may be one of a bus of its own (virtio) below the PCI device.
        let is_pci = |path: &Path| name(path).parse::<PciAddress>().is_ok();
        let Some(real) = real.ancestors().find(|path| is_pci(path)) else {
            return Place::default();
        };
        let mut path: Vec<OsString> = real
            .ancestors()
            .take_while(|path| is_pci(path) || name(path).starts_with("pci"))
            .map(|path| name(path).into())
            .collect();
        path.reverse();
        // -1 where it is not known.
        Place { numa: text(&real.join("numa_node")).and_then(|text| text.parse().ok()), path }
    }

    pub fn place_of_nic(&self, nic: &str) -> Place {
        let class = self.class(nic);
        class.map_or_else(Place::default, |class| self.place(&class.join("device")))
    }

    /// Whether a NIC's port carries data, as far as is known: a warning if not.
    pub fn is_active(&self, nic: &str) -> bool {
        let state = self.class(nic).and_then(|class| text(&class.join("ports/1/state")));
        // "4: ACTIVE". Interfaces have no such file.
        let number = state.as_ref().and_then(|state| state.split(':').next()?.parse().ok());
        let active = number.is_none_or(|number: u32| number == 4);
        if !active {
            let state = state.unwrap_or_default();
            log::warn!("topology: {nic} is left out: its port is not active (state {state})");
        }
        active
    }

    /// A NIC's speed.
    pub fn gbps(&self, nic: &str) -> Option<u32> {
        let class = self.class(nic)?;
        let rate = text(&class.join("ports/1/rate"));
        let gbps = match rate.as_deref().and_then(|rate| rate.split_once(" Gb/sec")) {
            Some((gbps, _)) => gbps.parse().ok()?,
            // In Mbit/s; -1 where it is not known.
            None => text(&class.join("speed"))?.parse::<f64>().ok()? / 1000.0,
        };
        // What is no number, or negative, is 0.
        Some(gbps.round() as u32).filter(|gbps| *gbps > 0)
    }

    /// The directory of an RDMA device, or else of a network interface.
    fn class(&self, nic: &str) -> Option<PathBuf> {
        // One that is opened twice is called `NAME#1`.
        let nic = nic.split('#').next()?;
        // Names come from the configuration, too, and are to lead nowhere else.
        if nic.is_empty() || nic.starts_with('.') || nic.contains(['/', '\0']) {
            return None;
        }
        let directories = ["sys/class/infiniband", "sys/class/net"];
        directories.iter().map(|class| self.path(class).join(nic)).find(|path| path.is_dir())
    }
}

/// What is in a directory; nothing if it cannot be read.
pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// What a short file says; none if it cannot be read.
pub(super) fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
