//! The `/sys` of an emulated host: a tree of files with its NICs, its GPUs and its NUMA nodes.
//!
//! It is laid over the real `/sys`: at the [`PLACES`] where NICs, GPUs and NUMA nodes are, a path
//! that the tree has is the tree's. All others stay real, the directories on the way there among
//! them: `/sys/class` need not list `infiniband`, which can be opened.

use std::ffi::CStr;
use std::fmt::Display;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::profile::{NicSpec, Pci, PciAddress, Profile};

const VENDOR_AMAZON: u32 = 0x1d0f;
const VENDOR_NVIDIA: u32 = 0x10de;
const CLASS_BRIDGE: u32 = 0x06_0400;
const CLASS_ETHERNET: u32 = 0x02_0000;
const CLASS_3D: u32 = 0x03_0200;
const BRIDGE_ID: u32 = 0x0200;
/// Where the kernel says which processors there are.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// The GID of a host's NIC `nic`, counted from 0: a link-local address with both numbers in it.
pub fn gid(host: u16, nic: u16) -> [u8; 16] {
    let mut gid = [0; 16];
    gid[..2].copy_from_slice(&[0xfe, 0x80]);
    gid[8..10].copy_from_slice(&[0x5e, 0xfa]);
    gid[12..14].copy_from_slice(&host.to_be_bytes());
    // No NIC's is that of an interface 0. A host has far fewer than 65535 NICs.
    gid[14..].copy_from_slice(&nic.wrapping_add(1).to_be_bytes());
    gid
}

/// Makes `root`, which stands for `/sys`, show the devices of `profile` on host `host`.
///
/// Several processes may do so at once: the tree appears as a whole. One that is there already is
/// left as it is.
///
/// # Errors
/// That of the first file that cannot be written, and [`io::ErrorKind::AlreadyExists`] if `root`
/// is there and shows other NICs.
pub fn create(root: &Path, profile: &Profile, host: u16) -> io::Result<()> {
    if root.exists() {
        return check(root, profile);
    }
    let cpus = Cpus::of_this_machine(profile)?;
    let temporary = make_temporary(root)?;
    let tree = Tree { root: temporary.clone(), cpus };
    let Err(error) = tree.fill(profile, host).and_then(|()| fs::rename(&temporary, root)) else {
        return Ok(());
    };
    // Nothing more can be done about what stays.
    let _ = fs::remove_dir_all(&temporary);
    // Another process was faster?
    if root.exists() { check(root, profile) } else { Err(error) }
}

/// Shows the port of a NIC in the tree at `root` as down or up. Readers see the one or the other.
///
/// # Errors
/// That of the file.
pub fn set_port(root: &Path, nic: &str, down: bool) -> io::Result<()> {
    let port = root.join("class/infiniband").join(nic).join("ports/1");
    let new = port.join(format!("state.{}", std::process::id()));
    fs::write(&new, port_state(down))?;
    fs::rename(&new, port.join("state"))
}

fn port_state(down: bool) -> &'static str {
    if down { "1: DOWN\n" } else { "4: ACTIVE\n" }
}

/// Is the tree at `root` one of `profile`?
fn check(root: &Path, profile: &Profile) -> io::Result<()> {
    let mut there: Vec<String> = fs::read_dir(root.join("class/infiniband"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    let mut wanted: Vec<String> = profile.nics.iter().map(|nic| nic.name.clone()).collect();
    there.sort_unstable();
    wanted.sort_unstable();
    if there == wanted {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::AlreadyExists,
        "shows other NICs than this process is to have: remove it, or use another SOFTEFA_DIR",
    ))
}

/// A new directory beside `root`.
fn make_temporary(root: &Path) -> io::Result<PathBuf> {
    if let Some(parent) = root.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut number = 0_u32;
    loop {
        let mut name = root.as_os_str().to_owned();
        name.push(format!(".tmp{number}"));
        match fs::create_dir(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            made => return made.map(|()| name.into()),
        }
    }
}

/// The processors of this machine, of each NUMA node that is shown.
struct Cpus {
    nodes: Vec<Vec<u32>>,
}

impl Cpus {
    fn of_this_machine(profile: &Profile) -> io::Result<Cpus> {
        let text = fs::read_to_string(ONLINE)
            .map_err(|error| io::Error::new(error.kind(), format!("{ONLINE}: {error}")))?;
        let online = parse_list(&text);
        let count = usize::from(profile.numa_nodes.max(1));
        // With fewer processors than nodes, some nodes have none, as real ones may.
        let share =
            |i: usize| online[online.len() * i / count..online.len() * (i + 1) / count].to_vec();
        Ok(Cpus { nodes: (0..count).map(share).collect() })
    }

    fn of_node(&self, node: u16) -> &[u32] {
        self.nodes.get(usize::from(node)).map_or(&[], |cpus| cpus)
    }
}

/// Reads a list as in `0-3,8`. What is not a number is left out.
fn parse_list(text: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// Writes an ascending list as [`parse_list`] reads it.
fn format_list(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        run => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    runs.collect::<Vec<_>>().join(",")
}

/// Writes a list as a bit mask: words of 32 bits in hexadecimal, the highest first.
fn format_mask(numbers: &[u32]) -> String {
    let words = numbers.iter().max().map_or(1, |max| max / 32 + 1);
    let word = |i: u32| {
        let bits = numbers.iter().filter(|n| *n / 32 == i).map(|n| 1_u32 << (n % 32));
        format!("{:08x}", bits.sum::<u32>())
    };
    (0..words).rev().map(word).collect::<Vec<_>>().join(",")
}

/// A tree in the making. Paths are relative to its root.
struct Tree {
    root: PathBuf,
    cpus: Cpus,
}

impl Tree {
    fn fill(&self, profile: &Profile, host: u16) -> io::Result<()> {
        self.directory("class/infiniband")?;
        self.directory("bus/pci/devices")?;
        self.directory("bus/pci/drivers/efa")?;
        self.file("class/infiniband_verbs/abi_version", 6)?;
        for (index, nic) in (0..).zip(&profile.nics) {
            self.nic(nic, index, host)?;
        }
        for gpu in &profile.gpus {
            self.device(&gpu.pci, VENDOR_NVIDIA, gpu.device_id, CLASS_3D)?;
        }
        if profile.numa_nodes > 1 { self.numa_nodes() } else { Ok(()) }
    }

    fn nic(&self, nic: &NicSpec, index: u16, host: u16) -> io::Result<()> {
        let pci = self.device(&nic.pci, VENDOR_AMAZON, nic.vendor_part_id, CLASS_ETHERNET)?;
        let driver = "bus/pci/drivers/efa";
        self.link(&format!("{pci}/driver"), driver)?;
        self.link(&format!("{driver}/{}", nic.pci.address), &pci)?;

        let device = format!("{pci}/infiniband/{}", nic.name);
        let gid = gid(host, index);
        let groups: Vec<_> =
            gid.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
        self.file(&format!("{device}/node_guid"), groups[4..].join(":"))?;
        let port = format!("{device}/ports/1");
        self.file(&format!("{port}/state"), port_state(false).trim_end())?;
        // Of each lane; there are four.
        let lanes = match nic.speed / 4 {
            25 => " EDR",
            50 => " HDR",
            100 => " NDR",
            _ => "",
        };
        self.file(&format!("{port}/rate"), format!("{} Gb/sec (4X{lanes})", nic.speed))?;
        self.file(&format!("{port}/link_layer"), "Unknown")?;
        self.file(&format!("{port}/gids/0"), groups.join(":"))?;
        self.link(&format!("{device}/device"), &pci)?;
        self.link(&format!("class/infiniband/{}", nic.name), &device)?;

        let verbs = format!("{pci}/infiniband_verbs/uverbs{index}");
        self.file(&format!("{verbs}/ibdev"), &nic.name)?;
        self.link(&format!("{verbs}/device"), &pci)?;
        self.link(&format!("class/infiniband_verbs/uverbs{index}"), &verbs)
    }

    /// A PCI device and the bridges above it. Its directory.
    fn device(&self, pci: &Pci, vendor: u32, id: u32, class: u32) -> io::Result<String> {
        let mut path = format!("devices/pci0000:{:02x}", pci.root_bus());
        for &bridge in &pci.bridges {
            path = format!("{path}/{bridge}");
            // Devices of one switch share bridges.
            if !self.root.join(&path).exists() {
                self.function(&path, bridge, pci, [VENDOR_AMAZON, BRIDGE_ID, CLASS_BRIDGE])?;
            }
        }
        path = format!("{path}/{}", pci.address);
        self.function(&path, pci.address, pci, [vendor, id, class])?;
        Ok(path)
    }

    fn function(
        &self,
        path: &str,
        address: PciAddress,
        pci: &Pci,
        [vendor, id, class]: [u32; 3],
    ) -> io::Result<()> {
        let file = |name: &str, text: &dyn Display| self.file(&format!("{path}/{name}"), text);
        file("vendor", &format_args!("{vendor:#06x}"))?;
        file("device", &format_args!("{id:#06x}"))?;
        file("class", &format_args!("{class:#08x}"))?;
        file("numa_node", &pci.numa)?;
        let cpus = self.cpus.of_node(pci.numa);
        file("local_cpulist", &format_list(cpus))?;
        file("local_cpus", &format_mask(cpus))?;
        for end in ["max", "current"] {
            file(&format!("{end}_link_speed"), &format_args!("{}.0 GT/s PCIe", pci.link.speed))?;
            file(&format!("{end}_link_width"), &pci.link.width)?;
        }
        self.link(&format!("bus/pci/devices/{address}"), path)
    }

    /// The NUMA nodes, with this machine's processors and memory in equal parts.
    fn numa_nodes(&self) -> io::Result<()> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let nodes: Vec<u32> = (0..).take(self.cpus.nodes.len()).collect();
        let all = format_list(&nodes);
        for name in ["online", "possible", "has_cpu", "has_memory", "has_normal_memory"] {
            self.file(&format!("devices/system/node/{name}"), &all)?;
        }
        for (node, cpus) in nodes.iter().zip(&self.cpus.nodes) {
            let file = |name: &str, text: &dyn Display| {
                self.file(&format!("devices/system/node/node{node}/{name}"), text)
            };
            file("cpulist", &format_list(cpus))?;
            file("cpumap", &format_mask(cpus))?;
            let distances = nodes.iter().map(|other| if other == node { "10" } else { "21" });
            file("distance", &distances.collect::<Vec<_>>().join(" "))?;
            let memory = ["MemTotal", "MemFree"].map(|key| {
                let kib = read_kib(&meminfo, key) / nodes.len() as u64;
                format!("Node {node} {key}: {kib:>14} kB")
            });
            file("meminfo", &memory.join("\n"))?;
            let counters = [
                "numa_hit",
                "numa_miss",
                "numa_foreign",
                "interleave_hit",
                "local_node",
                "other_node",
            ];
            file("numastat", &counters.map(|name| format!("{name} 0")).join("\n"))?;
        }
        Ok(())
    }

    fn directory(&self, path: &str) -> io::Result<()> {
        fs::create_dir_all(self.root.join(path))
    }

    fn file(&self, path: &str, text: impl Display) -> io::Result<()> {
        let path = self.root.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, format!("{text}\n"))
    }

    /// A symbolic link at `path` to `target`. A relative one, as the kernel's are: what it points
    /// to does not name the root.
    fn link(&self, path: &str, target: &str) -> io::Result<()> {
        symlink("../".repeat(path.matches('/').count()) + target, self.root.join(path))
    }
}

/// A value of `/proc/meminfo` in KiB, 0 if it is not there.
fn read_kib(meminfo: &str, key: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// How the paths begin that [`overlay`] may replace. Programs look at much else below `/sys`, some
/// from within `malloc`.
pub const PLACES: [&[u8]; 5] = [
    b"/sys/class/infiniband",
    b"/sys/bus/pci/",
    b"/sys/devices/pci",
    b"/sys/devices/system/node",
    b"/dev/infiniband/",
];

/// Room for a path and the NUL after it.
pub type PathBuffer = [u8; libc::PATH_MAX as usize];

/// The path to use instead of `path`, if there is one: below `root` for what the tree there has of
/// `/sys`, and a character device for the NICs' device files.
///
/// Allocates nothing and takes no lock, for it is called wherever a program opens a file.
pub fn overlay<'a>(root: &[u8], path: &[u8], buffer: &'a mut PathBuffer) -> Option<&'a CStr> {
    if let Some(name) = path.strip_prefix(b"/dev/infiniband/") {
        let is_nic = name.starts_with(b"uverbs") && !name.contains(&b'/');
        let parts = [root, b"/class/infiniband_verbs/", name];
        return (is_nic && exists(join(parts, buffer)?)).then_some(c"/dev/null");
    }
    let rest = path.strip_prefix(b"/sys")?;
    if !PLACES.iter().any(|place| path.starts_with(place)) || leaves(rest) {
        return None;
    }
    let candidate = join([root, rest, b""], buffer)?;
    exists(candidate).then_some(candidate)
}

/// Whether a path goes above where it began, by its names alone: where the links lead is not asked.
fn leaves(path: &[u8]) -> bool {
    let mut depth = 0_i32;
    path.split(|byte| *byte == b'/').any(|name| {
        match name {
            b"" | b"." => {}
            b".." => depth -= 1,
            _ => depth += 1,
        }
        depth < 0
    })
}

fn join<'a>(parts: [&[u8]; 3], buffer: &'a mut PathBuffer) -> Option<&'a CStr> {
    let mut length = 0;
    for part in parts {
        buffer.get_mut(length..length + part.len())?.copy_from_slice(part);
        length += part.len();
    }
    *buffer.get_mut(length)? = 0;
    CStr::from_bytes_until_nul(buffer).ok()
}

fn exists(path: &CStr) -> bool {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the path ends in NUL and the result has room. It is not read.
    let result = unsafe {
        libc::fstatat(libc::AT_FDCWD, path.as_ptr(), status.as_mut_ptr(), libc::AT_SYMLINK_NOFOLLOW)
    };
    result == 0
}

/// The reverse of [`overlay`]: what follows `/sys` in the path that a program is to see instead of
/// `path`. None if that is not below `root`.
pub fn underlay<'a>(root: &[u8], path: &'a [u8]) -> Option<&'a [u8]> {
    path.strip_prefix(root).filter(|rest| rest.is_empty() || rest[0] == b'/')
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    #[test]
    fn a_gid_has_host_and_nic() {
        let gid = gid(0x0102, 0x0a09);
        assert_eq!(gid, [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x5e, 0xfa, 0, 0, 1, 2, 0xa, 0xa]);
    }

    #[test]
    fn lists_and_masks_are_the_kernels() {
        for (list, numbers, mask) in [
            ("", vec![], "00000000"),
            ("0", vec![0], "00000001"),
            ("0-1", vec![0, 1], "00000003"),
            ("0-2,5,31-33", vec![0, 1, 2, 5, 31, 32, 33], "00000003,80000027"),
            ("64", vec![64], "00000001,00000000,00000000"),
        ] {
            assert_eq!(parse_list(list), numbers);
            assert_eq!(format_list(&numbers), list);
            assert_eq!(format_mask(&numbers), mask);
        }
        assert_eq!(parse_list("0-1\n"), [0, 1]);
    }

    #[test]
    fn memory_is_found() {
        let text = "MemTotal:       13854496 kB\nMemFree:  7 kB\n";
        assert_eq!((read_kib(text, "MemTotal"), read_kib(text, "MemFree")), (13_854_496, 7));
        assert_eq!(read_kib(text, "Mem"), 0);
    }

    fn tree() -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("sys");
        create(&root, &Profile::plain(2), 0).unwrap();
        (dir, root.as_os_str().as_bytes().to_vec())
    }

    fn laid_over(root: &[u8], path: &str) -> Option<String> {
        let mut buffer = [1; libc::PATH_MAX as usize];
        let text = overlay(root, path.as_bytes(), &mut buffer)?.to_str().unwrap();
        Some(text.strip_prefix(std::str::from_utf8(root).unwrap()).unwrap_or(text).to_owned())
    }

    #[test]
    fn what_the_tree_has_is_laid_over_and_nothing_else() {
        let (_dir, root) = tree();
        for path in [
            "/class/infiniband",
            "/class/infiniband/rdmap1s0",
            "/class/infiniband/rdmap1s0/../..",
            "/class/infiniband/rdmap1s0/device/numa_node",
            "/class/infiniband_verbs/abi_version",
            "/class/infiniband/../infiniband_verbs",
            "/bus/pci/devices//0000:a0:00.0/",
            "/bus/pci/drivers/efa",
            "/devices/pci0000:a1",
        ] {
            assert_eq!(laid_over(&root, &format!("/sys{path}")).as_deref(), Some(path));
        }
        for path in [
            "",
            "/",
            "sys",
            "sys/class/infiniband",
            "/sy",
            "/sys",
            "/sys/",
            "/sys/class",
            "/sys/bus/pci",
            "/sys/devices/system",
            "/system",
            "/sys2/class",
            "/proc/sys/class/infiniband",
            "/sys/class/net",
            "/sys/class/infiniband/rdmap2s0",
            "/sys/class/infiniband/rdmap1",
            "/sys/devices/system/node",
            "/sys/class/infiniband/../../..",
            "/sys/class/infiniband/../../../sys/class/infiniband",
            "/dev",
            "/dev/infiniband",
            "/dev/infiniband/",
            "/dev/infiniband/uverbs2",
            "/dev/infiniband/uverbs0/x",
            "/dev/infiniband/uverbs0/../uverbs0",
            "/dev/infiniband/rdma_cm",
            "/dev/infiniband/abi_version",
            "/dev/infiniband/../null",
        ] {
            assert_eq!(laid_over(&root, path), None, "{path}");
        }
        assert_eq!(laid_over(&root, "/dev/infiniband/uverbs1").as_deref(), Some("/dev/null"));
        assert_eq!(laid_over(&root, "/dev/infiniband/uverbs0").as_deref(), Some("/dev/null"));
    }

    #[test]
    fn a_path_that_has_no_room_stays() {
        let (_dir, root) = tree();
        let room = libc::PATH_MAX as usize - root.len() - "/bus/pci".len() - 1;
        for (length, fits) in [(room - 1, true), (room, true), (room + 1, false), (9000, false)] {
            let path = format!("/sys/bus/pci{}", "/".repeat(length));
            assert_eq!(laid_over(&root, &path).is_some(), fits, "{length}");
        }
    }

    #[test]
    fn a_path_below_the_root_is_sys_again() {
        for (path, expected) in [
            ("/a/sys", Some("")),
            ("/a/sys/", Some("/")),
            ("/a/sys/class", Some("/class")),
            ("/a/sys2", None),
            ("/a", None),
            ("/", None),
            ("", None),
        ] {
            assert_eq!(underlay(b"/a/sys", path.as_bytes()), expected.map(str::as_bytes), "{path}");
        }
    }

    #[test]
    fn what_is_laid_over_comes_back_and_is_of_the_tree() {
        let (_dir, root) = tree();
        let names = "/class/infiniband(/(class|infiniband|rdmap0s0|\\.|\\.\\.|x|)){0,6}";
        let check = |names: String| {
            let path = format!("/sys{names}");
            let mut buffer = [0; libc::PATH_MAX as usize];
            if let Some(laid) = overlay(&root, path.as_bytes(), &mut buffer) {
                prop_assert_eq!(underlay(&root, laid.to_bytes()), Some(names.as_bytes()));
                let real = fs::canonicalize(laid.to_str().unwrap()).unwrap();
                prop_assert!(underlay(&root, real.as_os_str().as_bytes()).is_some());
            }
            Ok(())
        };
        TestRunner::default().run(&names, check).unwrap();
    }

    proptest! {
        #[test]
        fn any_path_is_laid_over_or_not(path in proptest::collection::vec(1_u8.., 0..40), sys: bool) {
            let path = if sys { [PLACES[0], &path[..]].concat() } else { path };
            let mut buffer = [0; libc::PATH_MAX as usize];
            let laid = overlay(b"/nowhere", &path, &mut buffer).map(CString::from);
            prop_assert_eq!(laid, None);
        }
    }
}
