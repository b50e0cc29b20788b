//! The hosts that can be emulated: which NICs and GPUs they have, and where on the PCI buses.
//!
//! The facts about AWS's instances (bus numbers, bridges, NUMA nodes, device ids, link speeds) are
//! those of the topology files in <https://github.com/aws/aws-ofi-nccl>: `topology.xml` of each
//! instance in `tests/unit/fixtures/topology`, and `topology/p5.48xl-topo.xml` for p5. That last
//! one has no bridge but the switch and no GPU where it has NUMA nodes: a p5's bridges are made as
//! the other instances', and its GPUs are on the bus after the NICs of their switch.

use std::fmt;

/// Most NICs of [`Profile::plain`].
pub const MAX_PLAIN: usize = 32;

/// A kind of host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// As [`Profile::named`] knows it, or `plain`.
    pub name: &'static str,
    /// The EFA NICs, in the order of their PCI addresses.
    pub nics: Vec<NicSpec>,
    /// The GPUs, in the order of their PCI addresses. Only `/sys` shows them.
    pub gpus: Vec<GpuSpec>,
    /// How many NUMA nodes the host has. 1: those of this machine are shown.
    pub numa_nodes: u16,
}

/// An EFA NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicSpec {
    /// The RDMA device's name: `rdmap`, the bus in decimal, `s`, the slot.
    pub name: String,
    /// Where it is.
    pub pci: Pci,
    /// Line rate in Gbit/s.
    pub speed: u32,
    /// PCI device id, which is the generation: 0xefa0, 0xefa1, ...
    pub vendor_part_id: u32,
    /// Work requests that a send queue takes.
    pub sq_depth: u32,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuSpec {
    /// Where it is.
    pub pci: Pci,
    /// PCI device id.
    pub device_id: u32,
}

/// Where a PCI device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pci {
    /// Its own address.
    pub address: PciAddress,
    /// The bridges above it, the one at the root first. Without any it is on a root bus.
    pub bridges: Vec<PciAddress>,
    /// Its NUMA node.
    pub numa: u16,
    /// The fastest that its link can be.
    pub link: Link,
}

/// The address of a PCI device in domain 0. Its text is as in `0000:4f:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Bus.
    pub bus: u8,
    /// Device on the bus, below 32.
    pub slot: u8,
    /// Function of the device, below 8.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "0000:{:02x}:{:02x}.{}", self.bus, self.slot, self.function)
    }
}

/// A PCI Express link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// GT/s of a lane: 8, 16, 32 or 64.
    pub speed: u8,
    /// Lanes.
    pub width: u8,
}

impl Pci {
    /// The root bus that it is below.
    pub fn root_bus(&self) -> u8 {
        self.bridges.first().unwrap_or(&self.address).bus
    }
}

/// An instance type, in short.
struct Model {
    name: &'static str,
    vendor_part_id: u32,
    speed: u32,
    sq_depth: u32,
    nic_link: Link,
    gpu_id: u32,
    gpu_link: Link,
    /// Whether the devices are behind a PCI switch, each on a bus of its own; else they are slots
    /// of the root bus.
    switched: bool,
    /// The first half is of NUMA node 0, the second of node 1.
    groups: &'static [Group],
}

/// The devices below one root bus.
struct Group {
    root: u8,
    /// Buses, or slots.
    nics: &'static [u8],
    gpus: &'static [u8],
}

const fn group(root: u8, nics: &'static [u8], gpus: &'static [u8]) -> Group {
    Group { root, nics, gpus }
}

const fn link(speed: u8, width: u8) -> Link {
    Link { speed, width }
}

const MODELS: [Model; 5] = [
    Model {
        name: "p4d",
        vendor_part_id: 0xefa0,
        speed: 100,
        sq_depth: 4096,
        nic_link: link(8, 16),
        gpu_id: 0x20b0,
        gpu_link: link(16, 16),
        switched: false,
        groups: &[
            group(0x10, &[0x1b], &[0x1c, 0x1d]),
            group(0x20, &[0x1b], &[0x1c, 0x1d]),
            group(0x90, &[0x1b], &[0x1c, 0x1d]),
            group(0xa0, &[0x1b], &[0x1c, 0x1d]),
        ],
    },
    Model {
        name: "p5",
        vendor_part_id: 0xefa1,
        speed: 100,
        sq_depth: 4096,
        nic_link: link(16, 8),
        gpu_id: 0x2330,
        gpu_link: link(32, 16),
        switched: true,
        groups: &[
            group(0x44, &[0x4f, 0x50, 0x51, 0x52], &[0x53]),
            group(0x55, &[0x60, 0x61, 0x62, 0x63], &[0x64]),
            group(0x66, &[0x71, 0x72, 0x73, 0x74], &[0x75]),
            group(0x77, &[0x82, 0x83, 0x84, 0x85], &[0x86]),
            group(0x88, &[0x93, 0x94, 0x95, 0x96], &[0x97]),
            group(0x99, &[0xa4, 0xa5, 0xa6, 0xa7], &[0xa8]),
            group(0xaa, &[0xb5, 0xb6, 0xb7, 0xb8], &[0xb9]),
            group(0xbb, &[0xc6, 0xc7, 0xc8, 0xc9], &[0xca]),
        ],
    },
    Model {
        name: "p5en",
        vendor_part_id: 0xefa2,
        speed: 200,
        sq_depth: 4096,
        nic_link: link(16, 16),
        gpu_id: 0x2335,
        gpu_link: link(32, 16),
        switched: true,
        groups: &[
            group(0x44, &[0x55, 0x56, 0x57, 0x58], &[0x59, 0x5a]),
            group(0x5d, &[0x6e, 0x6f, 0x70, 0x71], &[0x72, 0x73]),
            group(0x76, &[0x87, 0x88, 0x89, 0x8a], &[0x8b, 0x8c]),
            group(0x8f, &[0xa0, 0xa1, 0xa2, 0xa3], &[0xa4, 0xa5]),
        ],
    },
    Model {
        name: "p6-b200",
        vendor_part_id: 0xefa3,
        speed: 400,
        sq_depth: 4096,
        nic_link: link(32, 16),
        gpu_id: 0x2901,
        gpu_link: link(32, 16),
        switched: true,
        groups: &[
            group(0x44, &[0x4f, 0x50], &[0x51, 0x52]),
            group(0x55, &[0x60, 0x61], &[0x62, 0x63]),
            group(0x66, &[0x71, 0x72], &[0x75, 0x76]),
            group(0x79, &[0x84, 0x85], &[0x86, 0x87]),
        ],
    },
    Model {
        name: "p6-b300",
        vendor_part_id: 0xefa3,
        speed: 400,
        sq_depth: 2048,
        nic_link: link(32, 16),
        gpu_id: 0x3182,
        gpu_link: link(64, 16),
        switched: true,
        groups: &[
            group(0x4b, &[0x56, 0x57], &[0x58]),
            group(0x5a, &[0x65, 0x66], &[0x67]),
            group(0x69, &[0x74, 0x75], &[0x76]),
            group(0x78, &[0x83, 0x84], &[0x85]),
            group(0x87, &[0x92, 0x93], &[0x94]),
            group(0x96, &[0xa1, 0xa2], &[0xa3]),
            group(0xa5, &[0xb0, 0xb1], &[0xb2]),
            group(0xb4, &[0xbf, 0xc0], &[0xc1]),
        ],
    },
];

impl Profile {
    /// `nics` NICs of 100 Gbit/s named `rdmap0s0` and on, all of NUMA node 0, without a GPU.
    ///
    /// # Panics
    /// If `nics` is above [`MAX_PLAIN`].
    pub fn plain(nics: usize) -> Profile {
        assert!(nics <= MAX_PLAIN, "{nics} NICs, at most {MAX_PLAIN} allowed");
        let nic = |i: u8| NicSpec {
            name: format!("rdmap{i}s0"),
            pci: Pci {
                address: PciAddress { bus: 0xa0 + i, slot: 0, function: 0 },
                bridges: Vec::new(),
                numa: 0,
                link: link(16, 8),
            },
            speed: 100,
            vendor_part_id: 0xefa1,
            sq_depth: 4096,
        };
        let nics = (0..nics as u8).map(nic).collect();
        Profile { name: "plain", nics, gpus: Vec::new(), numa_nodes: 1 }
    }

    /// The profile of an AWS instance type, one of [`Profile::names`].
    pub fn named(name: &str) -> Option<Profile> {
        let model = MODELS.iter().find(|model| model.name == name)?;
        let mut profile =
            Profile { name: model.name, nics: Vec::new(), gpus: Vec::new(), numa_nodes: 2 };
        for (i, group) in model.groups.iter().enumerate() {
            let numa = u16::from(i >= model.groups.len() / 2);
            for &at in group.nics {
                let pci = model.place(group, at, numa, model.nic_link);
                profile.nics.push(NicSpec {
                    name: format!("rdmap{}s{}", pci.address.bus, pci.address.slot),
                    pci,
                    speed: model.speed,
                    vendor_part_id: model.vendor_part_id,
                    sq_depth: model.sq_depth,
                });
            }
            for &at in group.gpus {
                let pci = model.place(group, at, numa, model.gpu_link);
                profile.gpus.push(GpuSpec { pci, device_id: model.gpu_id });
            }
        }
        Some(profile)
    }

    /// The names that [`Profile::named`] knows.
    pub fn names() -> Vec<&'static str> {
        MODELS.iter().map(|model| model.name).collect()
    }
}

impl Model {
    /// Where the device `at` of a group is.
    fn place(&self, group: &Group, at: u8, numa: u16, link: Link) -> Pci {
        let root = group.root;
        if !self.switched {
            let address = PciAddress { bus: root, slot: at, function: 0 };
            return Pci { address, bridges: Vec::new(), numa, link };
        }
        // A root port, a switch, and of its ports, whose buses follow each other, the device's own.
        let port = at - (root + 3);
        let bridges = vec![
            PciAddress { bus: root, slot: 0, function: 0 },
            PciAddress { bus: root + 1, slot: 0, function: 0 },
            PciAddress { bus: root + 2, slot: port / 8, function: port % 8 },
        ];
        Pci { address: PciAddress { bus: at, slot: 0, function: 0 }, bridges, numa, link }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_named_profiles_are_those_instances() {
        // Name, NICs, Gbit/s, part id, send queue, NICs of a switch, GPUs of a switch.
        let table = [
            ("p4d", 4, 100, 0xefa0, 4096, 1, 2),
            ("p5", 32, 100, 0xefa1, 4096, 4, 1),
            ("p5en", 16, 200, 0xefa2, 4096, 4, 2),
            ("p6-b200", 8, 400, 0xefa3, 4096, 2, 2),
            ("p6-b300", 16, 400, 0xefa3, 2048, 2, 1),
        ];
        assert_eq!(Profile::names(), table.map(|row| row.0));
        for (name, nics, speed, part, depth, nics_each, gpus_each) in table {
            let profile = Profile::named(name).unwrap();
            assert_eq!((profile.name, profile.numa_nodes), (name, 2));
            assert_eq!((profile.nics.len(), profile.gpus.len()), (nics, 8), "{name}");
            for nic in &profile.nics {
                assert_eq!((nic.speed, nic.vendor_part_id, nic.sq_depth), (speed, part, depth));
            }
            for gpu in &profile.gpus {
                let root = gpu.pci.root_bus();
                let near: Vec<_> =
                    profile.nics.iter().filter(|nic| nic.pci.root_bus() == root).collect();
                assert_eq!(near.len(), nics_each, "{name}: NICs near {}", gpu.pci.address);
                assert!(near.iter().all(|nic| nic.pci.numa == gpu.pci.numa));
                // The same switch, another of its ports.
                let depth = gpu.pci.bridges.len();
                assert!(depth == 3 || name == "p4d");
                for nic in near {
                    assert_eq!(nic.pci.bridges.len(), depth);
                    let shared = depth.saturating_sub(1);
                    assert_eq!(nic.pci.bridges[..shared], gpu.pci.bridges[..shared]);
                    assert!(depth == 0 || nic.pci.bridges[shared] != gpu.pci.bridges[shared]);
                }
                let gpus = profile.gpus.iter().filter(|other| other.pci.root_bus() == root);
                assert_eq!(gpus.count(), gpus_each, "{name}: GPUs beside {}", gpu.pci.address);
            }
        }
    }

    #[test]
    fn devices_are_in_order_and_half_of_them_at_each_numa_node() {
        for name in Profile::names() {
            let profile = Profile::named(name).unwrap();
            let nics: Vec<_> = profile.nics.iter().map(|nic| &nic.pci).collect();
            let gpus: Vec<_> = profile.gpus.iter().map(|gpu| &gpu.pci).collect();
            for list in [&nics, &gpus] {
                assert!(list.is_sorted_by(|a, b| a.address < b.address), "{name}");
                assert_eq!(list.iter().filter(|pci| pci.numa == 0).count() * 2, list.len());
                assert_eq!(list.iter().filter(|pci| pci.numa == 1).count() * 2, list.len());
            }
            let addresses: HashSet<_> = nics.iter().chain(&gpus).map(|pci| pci.address).collect();
            assert_eq!(addresses.len(), nics.len() + gpus.len(), "{name}");
            let bridges = nics.iter().chain(&gpus).flat_map(|pci| &pci.bridges);
            assert!(bridges.clone().all(|b| b.slot < 32 && b.function < 8), "{name}");
            assert!(bridges.clone().all(|bridge| !addresses.contains(bridge)), "{name}");
        }
    }

    #[test]
    fn names_and_addresses_are_the_real_ones() {
        let check = |profile: &str, i: usize, name: &str, address: &str, port: Option<&str>| {
            let nic = Profile::named(profile).unwrap().nics.swap_remove(i);
            assert_eq!((nic.name.as_str(), nic.pci.address.to_string().as_str()), (name, address));
            assert_eq!(nic.pci.bridges.last().map(|b| b.to_string()).as_deref(), port);
        };
        check("p4d", 3, "rdmap160s27", "0000:a0:1b.0", None);
        check("p5", 0, "rdmap79s0", "0000:4f:00.0", Some("0000:46:01.0"));
        check("p5en", 0, "rdmap85s0", "0000:55:00.0", Some("0000:46:01.6"));
        check("p5en", 15, "rdmap163s0", "0000:a3:00.0", Some("0000:91:02.1"));
        check("p6-b200", 4, "rdmap113s0", "0000:71:00.0", Some("0000:68:01.0"));
        check("p6-b300", 15, "rdmap192s0", "0000:c0:00.0", Some("0000:b6:01.1"));
    }

    #[test]
    fn plain_has_as_many_nics_as_asked_for() {
        for count in [0, 1, 2, MAX_PLAIN] {
            let profile = Profile::plain(count);
            assert_eq!((profile.nics.len(), profile.gpus.len()), (count, 0));
            assert_eq!((profile.name, profile.numa_nodes), ("plain", 1));
        }
        let last = Profile::plain(MAX_PLAIN).nics.pop().unwrap();
        assert_eq!((last.name.as_str(), last.speed), ("rdmap31s0", 100));
        assert_eq!(last.pci.address.to_string(), "0000:bf:00.0");
        assert_eq!(Profile::named("p3"), None);
    }
}
