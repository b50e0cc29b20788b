//! Which NICs there are, and which are near to which memory: from libfabric and sysfs, without verbs and without
//! touching a GPU.
//!
//! A NIC is near to a NUMA node that it is at, and to a GPU if it is at the GPU's NUMA node (or none is) and no other
//! of those has a shorter way to it through the PCI tree. Where nothing is known, nothing is preferred to anything:
//!
//! - A NIC whose NUMA node is unknown is near to every node that has a NIC of its own, since it may be there, and to
//!   every node if no NIC's is known. At a node without a NIC all are equally far, as in Mooncake.
//! - A NIC without a PCI device (`shm`, bonds, VLANs) is far from every GPU, unless there is no other.
//!
//! A [`Topology`] treats a list of available NICs without a preferred one as if all were preferred.
#![forbid(unsafe_code)]

mod gpu;
mod host;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::config::Config;
use crate::error::{Code, Result};
use crate::topology::{Entry, Topology};
use crate::transport;

use gpu::Gpu;
use host::{Host, Place};

/// The topology of this host: for every NUMA node (`cpu:0`) and every GPU (`cuda:0`) the NICs, near ones first.
/// `MC_CUSTOM_TOPO_JSON` is taken instead, if it is set; `MC_TE_FILTERS` limits the NICs of either. Without a NIC it is
/// empty, and a warning says what was looked for. NICs whose port is not active are left out, as is the loopback
/// interface where there is another.
///
/// GPUs have the numbers that CUDA gives them in this process, as far as that can be known without asking it:
/// `CUDA_VISIBLE_DEVICES` counts, and which GPUs a container has. With unlike GPUs that takes
/// `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
///
/// # Errors
/// That libfabric cannot be opened; that the file of `MC_CUSTOM_TOPO_JSON` cannot be read.
pub fn discover(config: &Config) -> Result<Topology> {
    if let Some(path) = &config.custom_topology {
        let topology = transport::read_topology(path)?;
        log::info!("topology: MC_CUSTOM_TOPO_JSON={}", path.display());
        if config.devices.is_empty() {
            return Ok(topology);
        }
        let topology = topology.only(&config.devices);
        if topology.devices().is_empty() {
            let filters = config.devices.join(",");
            log::warn!("topology: MC_TE_FILTERS={filters} leaves no NIC of {}", path.display());
        }
        return Ok(topology);
    }
    let mut found = match transport::devices(config) {
        Err(none) if none.code == Code::DeviceNotFound => {
            log::warn!("topology: {none}");
            return Ok(Topology::default());
        }
        found => found?,
    };
    if !config.devices.is_empty() {
        let missing: Vec<_> =
            config.devices.iter().filter(|name| found.iter().all(|d| d.name != **name)).collect();
        if !missing.is_empty() {
            let has: Vec<_> = found.iter().map(|device| &*device.name).collect();
            let has = has.join(", ");
            log::warn!(
                "topology: MC_TE_FILTERS: no NIC {missing:?}: {} has {has}",
                config.provider
            );
        }
        found.retain(|device| config.devices.contains(&device.name));
    }
    let names = transport::outward(found).into_iter().map(|device| device.name);
    Ok(Host::real().topology(names.collect(), config))
}

/// What sysfs says of a NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// NUMA node it is at.
    pub numa: Option<u32>,
    /// Its speed, Gbit/s.
    pub gbps: Option<u32>,
}

/// What is known of a NIC's link.
pub fn link(nic: &str) -> Link {
    Host::real().link(nic)
}

impl Host {
    /// [`discover`] with NICs that are there, in the order of the lists to be.
    fn topology(&self, names: Vec<String>, config: &Config) -> Topology {
        let nic = |name: String| Nic { place: self.place_of_nic(&name), name };
        let nics: Vec<Nic> =
            names.into_iter().filter(|name| self.is_active(name)).map(nic).collect();
        if nics.is_empty() {
            log::warn!("topology: no NIC of provider {} that can be used", config.provider);
            return Topology::default();
        }
        let nodes = self.nodes();
        let gpus = gpu::list(self, config);
        log::info!(
            "topology: {} NICs, {} NUMA nodes, {} GPUs",
            nics.len(),
            nodes.len(),
            gpus.len()
        );
        matrix(&nics, &nodes, &gpus)
    }

    /// [`link`].
    fn link(&self, nic: &str) -> Link {
        Link { numa: self.place_of_nic(nic).numa, gbps: self.gbps(nic) }
    }
}

struct Nic {
    name: String,
    place: Place,
}

/// The matrix of what is known.
fn matrix(nics: &[Nic], nodes: &[u32], gpus: &[Gpu]) -> Topology {
    let mut entries = BTreeMap::new();
    for &node in nodes {
        entries.insert(format!("cpu:{node}"), split(nics, near_node(nics, node)));
    }
    for (number, gpu) in gpus.iter().enumerate() {
        entries.insert(format!("cuda:{number}"), split(nics, near_gpu(nics, &gpu.place)));
    }
    Topology { entries }
}

fn split(nics: &[Nic], near: impl Fn(&Place) -> bool) -> Entry {
    let (preferred, available): (Vec<_>, _) = nics.iter().partition(|nic| near(&nic.place));
    let names = |nics: Vec<&Nic>| nics.into_iter().map(|nic| nic.name.clone()).collect();
    Entry { preferred: names(preferred), available: names(available) }
}

/// Which places of `nics` are near to a NUMA node.
fn near_node(nics: &[Nic], node: u32) -> impl Fn(&Place) -> bool + use<> {
    let has_own = nics.iter().any(|nic| nic.place.numa == Some(node));
    let none_known = nics.iter().all(|nic| nic.place.numa.is_none());
    move |place| match place.numa {
        Some(numa) => numa == node,
        None => has_own || none_known,
    }
}

/// Which places of `nics` are near to a GPU.
fn near_gpu(nics: &[Nic], gpu: &Place) -> impl Fn(&Place) -> bool {
    let same_node = |place: &Place| place.numa.is_some() && place.numa == gpu.numa;
    let any_same = nics.iter().any(|nic| same_node(&nic.place));
    let distance =
        move |place: &Place| place.distance(gpu).filter(|_| !any_same || same_node(place));
    let least = nics.iter().filter_map(|nic| distance(&nic.place)).min();
    move |place| distance(place) == least
}
