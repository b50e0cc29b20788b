//! The emulated `/sys` as programs read it: what a search for NICs and GPUs finds there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use softefa::profile::Profile;
use softefa::sysfs::{create, gid};

fn sys(profile: &Profile) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap().join("cluster/sys-7");
    create(&root, profile, 7).unwrap();
    (dir, root)
}

fn read(path: PathBuf) -> String {
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.strip_suffix('\n').unwrap_or_else(|| panic!("{}: no line", path.display())).to_owned()
}

fn list(path: PathBuf) -> Vec<String> {
    let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Preferred and other NICs by location.
type Matrix = BTreeMap<String, (Vec<String>, Vec<String>)>;

/// Mooncake's search (`topology.cpp`): NICs are near the processors of their NUMA node, and near a
/// GPU if, of its node's, they have the shortest way to it in the tree of PCI devices.
fn discover(root: &Path, nics: &[String], gpus: &[String]) -> Matrix {
    let nics: Vec<(String, String, i32)> = nics
        .iter()
        .map(|name| {
            let device = root.join("class/infiniband").join(name).join("../..");
            let device = device.canonicalize().unwrap();
            let address = device.file_name().unwrap().to_str().unwrap().to_owned();
            (name.clone(), address, read(device.join("numa_node")).parse().unwrap())
        })
        .collect();
    let split = |preferred: &dyn Fn(&str) -> bool| {
        nics.iter().map(|nic| nic.0.clone()).partition(|name| preferred(name))
    };

    let mut matrix = Matrix::new();
    for entry in fs::read_dir(root.join("devices/system/node")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if !(entry.file_type().unwrap().is_dir() && name.starts_with("node")) {
            continue;
        }
        let node: i32 = name["node".len()..].parse().unwrap();
        let near = |name: &str| nics.iter().any(|nic| nic.0 == name && nic.2 == node);
        matrix.insert(format!("cpu:{node}"), split(&near));
    }

    let pci = root.join("bus/pci/devices");
    let place = |address: &str| pci.join(address).canonicalize().unwrap();
    let numa = |address: &str| read(pci.join(address).join("numa_node"));
    let distance = |a: &str, b: &str| {
        let (a, b) = (place(a), place(b));
        let shared = a.iter().zip(b.iter()).take_while(|(a, b)| a == b).count();
        a.iter().count() + b.iter().count() - 2 * shared
    };
    for (i, gpu) in gpus.iter().enumerate() {
        let same_node = || nics.iter().filter(|nic| numa(&nic.1) == numa(gpu));
        let nearest = same_node().map(|nic| distance(&nic.1, gpu)).min();
        let near: Vec<_> =
            same_node().filter(|nic| Some(distance(&nic.1, gpu)) == nearest).collect();
        let preferred = |name: &str| near.iter().any(|nic| nic.0 == name);
        matrix.insert(format!("cuda:{i}"), split(&preferred));
    }
    matrix
}

#[test]
fn topology_discovery_finds_the_nics_of_each_instance() {
    // GPU 5's, by what is known of the instance, not by the profile.
    let table: [(&str, usize, &[&str]); 5] = [
        ("p4d", 4, &["rdmap144s27"]),
        ("p5", 32, &["rdmap164s0", "rdmap165s0", "rdmap166s0", "rdmap167s0"]),
        ("p5en", 16, &["rdmap135s0", "rdmap136s0", "rdmap137s0", "rdmap138s0"]),
        ("p6-b200", 8, &["rdmap113s0", "rdmap114s0"]),
        ("p6-b300", 16, &["rdmap161s0", "rdmap162s0"]),
    ];
    assert_eq!(table.map(|row| row.0).as_slice(), Profile::names());
    for (name, count, near) in table {
        let profile = Profile::named(name).unwrap();
        let (_dir, root) = sys(&profile);
        let nics = list(root.join("class/infiniband"));
        assert_eq!(nics.len(), count, "{name}");
        let gpus: Vec<_> = list(root.join("bus/pci/devices"))
            .into_iter()
            .filter(|address| {
                let device = root.join("bus/pci/devices").join(address);
                read(device.join("vendor")) == "0x10de" && read(device.join("class")) == "0x030200"
            })
            .collect();
        let matrix = discover(&root, &nics, &gpus);
        assert_eq!(matrix.len(), 2 + 8, "{name}: {matrix:?}");
        for (location, (preferred, others)) in &matrix {
            assert_eq!(preferred.len() + others.len(), count, "{name} {location}");
            let expected = if location.starts_with("cpu:") { count / 2 } else { near.len() };
            assert_eq!(preferred.len(), expected, "{name} {location}: {preferred:?}");
        }
        assert_eq!(matrix["cuda:5"].0, near, "{name}");
        let (zero, one) = (&matrix["cpu:0"].0, &matrix["cpu:1"].0);
        assert!(zero.iter().all(|nic| !one.contains(nic)), "{name}");
        assert!(near.iter().all(|nic| one.iter().any(|other| other == nic)), "{name}");
    }
}

#[test]
fn a_nic_is_shown_as_the_kernel_shows_one() {
    let (_dir, root) = sys(&Profile::named("p5en").unwrap());
    assert_eq!(read(root.join("class/infiniband_verbs/abi_version")), "6");
    let nic = root.join("class/infiniband/rdmap86s0");
    assert_eq!(read(nic.join("node_guid")), "5efa:0000:0007:0002");
    assert_eq!(read(nic.join("ports/1/state")), "4: ACTIVE");
    assert_eq!(read(nic.join("ports/1/rate")), "200 Gb/sec (4X HDR)");
    assert_eq!(read(nic.join("ports/1/link_layer")), "Unknown");
    let text = read(nic.join("ports/1/gids/0"));
    assert_eq!(text, "fe80:0000:0000:0000:5efa:0000:0007:0002");
    let address: std::net::Ipv6Addr = text.parse().unwrap();
    assert_eq!(address.octets(), gid(7, 1));

    let device = nic.join("device");
    let place = "devices/pci0000:44/0000:44:00.0/0000:45:00.0/0000:46:01.7/0000:56:00.0";
    assert_eq!(device.canonicalize().unwrap(), root.join(place));
    assert_eq!(fs::read_link(&device).unwrap().file_name().unwrap(), "0000:56:00.0");
    for (name, text) in [
        ("vendor", "0x1d0f"),
        ("device", "0xefa2"),
        ("class", "0x020000"),
        ("numa_node", "0"),
        ("max_link_speed", "16.0 GT/s PCIe"),
        ("max_link_width", "16"),
    ] {
        assert_eq!(read(device.join(name)), text, "{name}");
    }
    assert_eq!(device.join("driver").canonicalize().unwrap(), root.join("bus/pci/drivers/efa"));
    assert_eq!(read(device.join("../class")), "0x060400");

    let verbs = root.join("class/infiniband_verbs/uverbs1");
    assert_eq!(read(verbs.join("ibdev")), "rdmap86s0");
    assert_eq!(verbs.join("device").canonicalize().unwrap(), root.join(place));
    assert_eq!(list(root.join("class/infiniband_verbs")).len(), 1 + 16);
    // 8 GPUs, 16 NICs, each below a port of its own, and 4 times a root port and a switch.
    assert_eq!(list(root.join("bus/pci/devices")).len(), 2 * (8 + 16) + 4 * 2);
}

#[test]
fn no_link_names_the_root() {
    fn links(path: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap() {
                kind if kind.is_symlink() => found.push(entry.path()),
                kind if kind.is_dir() => links(&entry.path(), found),
                _ => {}
            }
        }
    }
    let (_dir, root) = sys(&Profile::named("p4d").unwrap());
    let mut found = Vec::new();
    links(&root, &mut found);
    assert!(found.len() > 4 * 7);
    for link in found {
        assert!(fs::read_link(&link).unwrap().is_relative(), "{}", link.display());
        assert!(link.canonicalize().unwrap().starts_with(&root), "{}", link.display());
    }
}

#[test]
fn numa_nodes_share_this_machine() {
    let (_dir, root) = sys(&Profile::named("p5").unwrap());
    let node = root.join("devices/system/node");
    assert_eq!(read(node.join("online")), "0-1");
    assert_eq!(read(node.join("possible")), "0-1");
    assert_eq!(read(node.join("node0/distance")), "10 21");
    assert_eq!(read(node.join("node1/distance")), "21 10");

    let count = |list: &str| -> usize {
        let parts = list.split(',').filter(|part| !part.is_empty());
        let count = parts.map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            last.parse::<usize>().unwrap() - first.parse::<usize>().unwrap() + 1
        });
        count.sum()
    };
    let online = count(fs::read_to_string("/sys/devices/system/cpu/online").unwrap().trim());
    let lists = ["node0", "node1"].map(|name| read(node.join(name).join("cpulist")));
    assert_eq!(lists.each_ref().map(|list| count(list)), [online / 2, online - online / 2]);

    for (i, list) in lists.iter().enumerate() {
        let dir = node.join(format!("node{i}"));
        assert!(read(dir.join("numastat")).lines().any(|line| line == "numa_hit 0"));
        let bits = read(dir.join("cpumap")).replace(',', "");
        let bits = bits.chars().map(|c| c.to_digit(16).unwrap().count_ones() as usize);
        assert_eq!(bits.sum::<usize>(), count(list));
        let text = read(dir.join("meminfo"));
        let total = text.lines().next().unwrap();
        let (label, kib) = total.split_once(':').unwrap();
        assert_eq!(label, format!("Node {i} MemTotal"));
        assert!(kib.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() > 0);
    }
    let near = root.join("class/infiniband/rdmap147s0/device/local_cpulist");
    assert_eq!(read(near), lists[1]);
}

#[test]
fn with_one_numa_node_the_real_ones_stay() {
    let (_dir, root) = sys(&Profile::plain(2));
    assert!(!root.join("devices/system").exists());
    let device = root.join("class/infiniband/rdmap1s0/device");
    assert_eq!(device.canonicalize().unwrap(), root.join("devices/pci0000:a1/0000:a1:00.0"));
    assert_eq!(read(device.join("numa_node")), "0");
    assert_eq!(read(root.join("class/infiniband/rdmap1s0/ports/1/rate")), "100 Gb/sec (4X EDR)");
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    assert_eq!(read(device.join("local_cpulist")), online.trim());
}

#[test]
fn several_may_create_it_at_once() {
    let profile = Profile::named("p6-b200").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("cluster/sys-0");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                create(&root, &profile, 0).unwrap();
                // Whole for whoever comes back from it.
                assert_eq!(list(root.join("class/infiniband")).len(), 8);
                assert_eq!(read(root.join("devices/system/node/online")), "0-1");
            });
        }
    });
    assert_eq!(list(dir.path().join("cluster")), ["sys-0"], "nothing else stays");
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&root);
    create(&root, &profile, 0).unwrap();
    assert_eq!(inode(&root), before, "it was made again");
}

#[test]
fn another_profiles_tree_is_refused() {
    let (_dir, root) = sys(&Profile::plain(2));
    for profile in [Profile::plain(1), Profile::plain(3), Profile::named("p5").unwrap()] {
        let error = create(&root, &profile, 7).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
        assert!(error.to_string().contains("SOFTEFA_DIR"), "{error}");
    }
    create(&root, &Profile::plain(2), 7).unwrap();
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(create(&file.join("sys"), &Profile::plain(1), 0).is_err());
}
