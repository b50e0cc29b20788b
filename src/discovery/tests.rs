use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

/// A host of files.
struct Tree {
    directory: tempfile::TempDir,
    host: Host,
    gpus: std::cell::Cell<u32>,
}

const NO_NAMES: [&str; 0] = [];

impl Tree {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let host = Host::at(directory.path().to_path_buf());
        Self { directory, host, gpus: 0.into() }
    }

    fn file(&self, path: &str, text: impl AsRef<[u8]>) -> &Self {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().expect("it has")).expect("made");
        fs::write(path, text).expect("written");
        self
    }

    fn link(&self, path: &str, target: &str) -> &Self {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().expect("it has")).expect("made");
        symlink(target, path).expect("linked");
        self
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.directory.path().join(path)).expect("removed");
    }

    fn nodes(&self, count: u32) -> &Self {
        for node in 0..count {
            self.file(&format!("sys/devices/system/node/node{node}/cpulist"), "0\n");
        }
        self.file("sys/devices/system/node/online", "0-7\n")
    }

    /// A PCI device at a path below `sys/devices`.
    fn pci(&self, path: &str, ids: [&str; 3], numa: i32) {
        let device = format!("sys/devices/{path}");
        for (name, id) in ["vendor", "class", "device"].iter().zip(ids) {
            self.file(&format!("{device}/{name}"), format!("{id}\n"));
        }
        self.file(&format!("{device}/numa_node"), format!("{numa}\n"));
        let address = path.rsplit('/').next().expect("a name");
        self.link(&format!("sys/bus/pci/devices/{address}"), &format!("../../../devices/{path}"));
    }

    /// An EFA NIC.
    fn nic(&self, name: &str, path: &str, numa: i32) {
        self.pci(path, ["0x1d0f", "0x020000", "0xefa1"], numa);
        let device = format!("devices/{path}/infiniband/{name}");
        self.file(&format!("sys/{device}/ports/1/state"), "4: ACTIVE\n");
        self.file(&format!("sys/{device}/ports/1/rate"), "100 Gb/sec (4X EDR)\n");
        self.link(&format!("sys/{device}/device"), "../..");
        self.link(&format!("sys/class/infiniband/{name}"), &format!("../../{device}"));
    }

    /// A GPU with its driver; the n-th that is made has UUID `GPU-000000nn-...` and minor n.
    fn gpu(&self, path: &str, numa: i32) {
        self.pci(path, ["0x10de", "0x030200", "0x2330"], numa);
        let address = path.rsplit('/').next().expect("a name");
        let minor = self.gpus.replace(self.gpus.get() + 1);
        let text = format!(
            "Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-000000a{minor}-5d63\nBus Location: \t {address}\n\
             Device Minor: \t {minor}\nGPU Excluded:\t No\n"
        );
        self.file(&format!("proc/driver/nvidia/gpus/{address}/information"), text);
        self.file(&format!("dev/nvidia{minor}"), "");
    }

    fn json(&self, names: &[String], config: &Config) -> String {
        self.host.topology(names.to_vec(), config).to_json()
    }

    /// The addresses of the GPUs that are left.
    fn visible(&self, list: &str) -> Vec<String> {
        let config = Config { cuda_visible_devices: Some(list.into()), ..Config::default() };
        addresses(&gpu::list(&self.host, &config))
    }
}

fn addresses(gpus: &[Gpu]) -> Vec<String> {
    let last = |gpu: &Gpu| gpu.place.path.last().map(|name| name.to_string_lossy().into_owned());
    gpus.iter().map(|gpu| last(gpu).unwrap_or_default()).collect()
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

/// An instance of AWS's: eight GPUs, each with `each` NICs behind one PCI switch, four of them at each NUMA node.
fn instance(each: u32) -> (Tree, Vec<String>) {
    let tree = Tree::new();
    tree.nodes(2);
    let mut names = Vec::new();
    for group in 0..8_u32 {
        let (root, numa) = (0x44 + group * 0x11, group as i32 / 4);
        let switch = format!("pci0000:{root:02x}/0000:{root:02x}:00.0/0000:{:02x}:00.0", root + 1);
        let port = |number: u32| {
            let (bridge, bus) = (root + 2, root + 3 + number);
            format!("{switch}/0000:{bridge:02x}:{number:02x}.0/0000:{bus:02x}:00.0")
        };
        for number in 0..each {
            let name = format!("rdmap{}s0", root + 3 + number);
            tree.nic(&name, &port(number), numa);
            names.push(name);
        }
        tree.gpu(&port(each), numa);
    }
    (tree, names)
}

#[test]
fn a_gpu_prefers_the_nics_behind_its_switch() {
    for each in [4, 2] {
        let (tree, names) = instance(each);
        let topology = tree.host.topology(names.clone(), &Config::default());
        assert_eq!(topology.entries.len(), 10);
        let each = each as usize;
        for (gpu, own) in names.chunks(each).enumerate() {
            let entry = &topology.entries[&format!("cuda:{gpu}")];
            assert_eq!(entry.preferred, own, "cuda:{gpu}");
            assert_eq!(entry.available.len(), 7 * each);
        }
        for (node, own) in names.chunks(4 * each).enumerate() {
            let entry = &topology.entries[&format!("cpu:{node}")];
            assert_eq!(entry.preferred, own, "cpu:{node}");
            assert_eq!(entry.available.len(), 4 * each);
        }
        let link = tree.host.link(&names[7 * each]);
        assert_eq!(link, Link { numa: Some(1), gbps: Some(100) });
        let read = Topology::from_json(&topology.to_json()).expect("it can be read back");
        assert_eq!(read, topology);
    }
}

#[test]
fn the_numa_node_goes_before_the_way_through_the_pci_tree() {
    let tree = Tree::new();
    tree.nodes(2);
    // One link and six links away.
    tree.nic("near", "pci0000:00/0000:00:02.0", 1);
    tree.nic("far", "pci0000:40/0000:40:00.0/0000:41:00.0", 0);
    tree.gpu("pci0000:00/0000:00:01.0", 0);
    let names = names(&["near", "far"]);
    let json = tree.json(&names, &Config::default());
    assert_eq!(
        json,
        r#"{"cpu:0":[["far"],["near"]],"cpu:1":[["near"],["far"]],"cuda:0":[["far"],["near"]]}"#
    );
    // Nor is there one at its node.
    tree.gpu("pci0000:00/0000:00:00.0", 7);
    let topology = tree.host.topology(names, &Config::default());
    assert_eq!(topology.entries["cuda:0"].preferred, ["near"]);
    assert_eq!(topology.entries["cuda:1"].preferred, ["far"], "the GPUs are by address");
}

#[test]
fn a_host_without_numa_nodes_or_gpus_prefers_all() {
    let tree = Tree::new();
    tree.nic("a", "pci0000:00/0000:00:06.0", -1);
    tree.nic("b", "pci0000:00/0000:00:05.0", -1);
    let names = names(&["a", "b"]);
    let config = Config { cuda_visible_devices: Some("0,1".into()), ..Config::default() };
    assert_eq!(tree.json(&names, &config), r#"{"cpu:0":[["a","b"],[]]}"#);
    tree.nodes(2);
    let all = r#"{"cpu:0":[["a","b"],[]],"cpu:1":[["a","b"],[]]}"#;
    assert_eq!(tree.json(&names, &config), all);
}

#[test]
fn a_nic_of_an_unknown_node_is_near_to_nodes_that_have_one() {
    let tree = Tree::new();
    tree.nodes(2).nic("a", "pci0000:00/0000:00:06.0", 0);
    tree.nic("b", "pci0000:00/0000:00:07.0", -1);
    tree.nic("c", "pci0000:00/0000:00:08.0", 9);
    let json = tree.json(&names(&["c", "b", "a"]), &Config::default());
    assert_eq!(json, r#"{"cpu:0":[["b","a"],["c"]],"cpu:1":[[],["c","b","a"]]}"#);
}

#[test]
fn interfaces_have_a_place_and_a_speed() {
    let tree = Tree::new();
    tree.nodes(1).pci("pci0000:00/0000:00:03.0", ["0x1af4", "0x020000", "0x1000"], 0);
    // As virtio's are.
    let device = "sys/devices/pci0000:00/0000:00:03.0/virtio2";
    tree.file(&format!("{device}/net/eth0/speed"), "25000\n");
    tree.link(&format!("{device}/net/eth0/device"), "../..");
    tree.link("sys/class/net/eth0", "../../devices/pci0000:00/0000:00:03.0/virtio2/net/eth0");
    tree.file("sys/devices/virtual/net/bond0/speed", "-1\n");
    tree.link("sys/class/net/bond0", "../../devices/virtual/net/bond0");
    tree.gpu("pci0000:00/0000:00:06.0", 0);
    assert_eq!(tree.host.link("eth0"), Link { numa: Some(0), gbps: Some(25) });
    assert_eq!(tree.host.link("bond0"), Link::default());
    assert_eq!(tree.host.link("shm"), Link::default());
    let json = |list: &[&str]| tree.json(&names(list), &Config::default());
    assert_eq!(
        json(&["bond0", "eth0"]),
        r#"{"cpu:0":[["bond0","eth0"],[]],"cuda:0":[["eth0"],["bond0"]]}"#
    );
    let all = r#"{"cpu:0":[["shm","bond0"],[]],"cuda:0":[["shm","bond0"],[]]}"#;
    assert_eq!(json(&["shm", "bond0"]), all);
}

#[test]
fn rates_are_read() {
    let tree = Tree::new();
    tree.nic("a", "pci0000:00/0000:00:06.0", 0);
    let rate = "sys/class/infiniband/a/ports/1/rate";
    let table = [
        ("200 Gb/sec (4X HDR)\n", Some(200)),
        ("2.5 Gb/sec (1X SDR)", Some(3)),
        ("0 Gb/sec", None),
        ("-7 Gb/sec", None),
        ("NaN Gb/sec", None),
        ("fast", None),
        ("", None),
    ];
    for (text, expected) in table {
        tree.file(rate, text);
        assert_eq!(tree.host.gbps("a"), expected, "{text}");
    }
    assert_eq!(tree.host.gbps("a#1"), None);
    tree.file(rate, "400 Gb/sec (4X NDR)");
    assert_eq!(tree.host.gbps("a#1"), Some(400), "what is opened twice");
    tree.file(rate, vec![b'9'; 1 << 20]);
    assert_eq!(tree.host.gbps("a"), None);
}

#[test]
fn a_nic_whose_port_is_not_active_is_left_out() {
    let (tree, names) = instance(4);
    let state = format!("sys/class/infiniband/{}/ports/1/state", names[1]);
    for (text, there) in [
        ("1: DOWN\n", false),
        ("2: INIT", false),
        ("4: ACTIVE", true),
        ("", true),
        ("nonsense", true),
    ] {
        tree.file(&state, text);
        let topology = tree.host.topology(names.clone(), &Config::default());
        assert_eq!(topology.devices().contains(&names[1]), there, "{text}");
        assert_eq!(topology.devices().len(), 31 + usize::from(there));
        assert_eq!(topology.entries["cuda:0"].preferred.len(), 3 + usize::from(there));
    }
    for name in &names {
        tree.file(&format!("sys/class/infiniband/{name}/ports/1/state"), "1: DOWN\n");
    }
    assert_eq!(tree.host.topology(names, &Config::default()), Topology::default());
    assert_eq!(tree.host.topology(Vec::new(), &Config::default()), Topology::default());
}

#[test]
fn what_cannot_be_read_is_not_known() {
    let tree = Tree::new();
    tree.nic("good", "pci0000:00/0000:00:06.0", 0);
    // Links to nowhere and in circles, files for directories, and the other way round.
    tree.link("sys/class/infiniband/dangling", "../../devices/gone");
    tree.link("sys/class/infiniband/circle", "circle");
    tree.file("sys/class/infiniband/file", "");
    tree.file("sys/class/infiniband/halves/ports/1/state/x", "")
        .file("sys/class/infiniband/halves/ports/1/rate", [0xff, 0xfe]);
    tree.link("sys/class/infiniband/halves/device", "../halves/device");
    tree.link("sys/class/infiniband/elsewhere/device", "../../../..");
    for (address, target) in [("0000:00:01.0", "0000:00:01.0"), ("0000:00:02.0", "../gone")] {
        tree.link(&format!("sys/bus/pci/devices/{address}"), target);
    }
    tree.file("sys/bus/pci/devices/nonsense/vendor", "0x10de");
    tree.file("sys/bus/pci/devices/0000:00:09.0", "");
    tree.file("sys/devices/system/node/node", "").file("sys/devices/system/node/nodes/x", "");
    tree.file("sys/devices/system/node/node1", "").file("sys/devices/system/node/node-1/x", "");
    tree.link("sys/devices/system/node/node2", "node2");
    // A GPU that says nothing more than what it is.
    tree.file("sys/bus/pci/devices/0000:00:0a.0/vendor", "0x10de\n");
    tree.file("sys/bus/pci/devices/0000:00:0a.0/class", "0x030000\n");
    let names =
        names(&["dangling", "circle", "file", "halves", "elsewhere", "..", "", "/", "a/b", "\0"]);
    for name in &names {
        assert_eq!(tree.host.link(name), Link::default(), "{name:?}");
    }
    let topology = tree.host.topology(names.clone(), &Config::default());
    assert_eq!(topology.entries.keys().collect::<Vec<_>>(), ["cpu:0", "cuda:0"]);
    assert!(topology.entries.values().all(|entry| entry.preferred == names));
    let empty = Tree::new();
    assert_eq!(empty.json(&names[..1], &Config::default()), r#"{"cpu:0":[["dangling"],[]]}"#);
}

#[test]
fn cuda_visible_devices_is_read_as_cuda_does() {
    let tree = Tree::new();
    tree.gpu("pci0000:00/0000:00:06.0", -1);
    tree.gpu("pci0000:00/0000:00:07.0", -1);
    let (a, b) = ("0000:00:06.0", "0000:00:07.0");
    assert_eq!(addresses(&gpu::list(&tree.host, &Config::default())), [a, b]);
    // As CUDA 13.0 (driver 580.159) with two H100 at these addresses answered.
    let table: &[(&str, &[&str])] = &[
        ("", &[]),
        ("0", &[a]),
        ("1", &[b]),
        ("1,0", &[b, a]),
        ("0,0", &[]),
        ("0,1,0", &[]),
        ("0,-1,1", &[a]),
        ("-1", &[]),
        ("5,0", &[]),
        ("0,5,1", &[a]),
        (" 1", &[b]),
        ("1 ,0", &[b, a]),
        ("1, 0", &[b, a]),
        ("0x1", &[a]),
        ("01", &[b]),
        ("+1", &[b]),
        ("1x", &[b]),
        ("1x,0", &[b, a]),
        ("x", &[]),
        ("NoDevFiles", &[]),
        (",", &[]),
        (",1", &[]),
        ("1,,0", &[b]),
        ("GPU-000000a0-5d63", &[a]),
        ("GPU-000000a1-5d63,GPU-000000a0-5d63", &[b, a]),
        ("GPU-000000a1", &[b]),
        ("GPU-000000A1", &[b]),
        ("GPU-", &[]),
        ("gpu-000000a1", &[]),
        ("0,GPU-000000a1", &[a]),
        ("GPU-000000a1,0", &[b]),
        ("GPU-000000a0,GPU-000000a0", &[]),
        (" GPU-000000a1, GPU-000000a0", &[]),
        ("GPU-000000a1,GPU-12345678,GPU-000000a0", &[b]),
        ("99999999999,1", &[]),
        ("1;0", &[b]),
        ("1 0", &[b]),
        // Not asked.
        ("GPU-0", &[]),
        ("MIG-GPU-000000a1-5d63/0/0", &[]),
        ("0,MIG-000000a1", &[]),
    ];
    for (list, expected) in table {
        assert_eq!(tree.visible(list), *expected, "CUDA_VISIBLE_DEVICES={list}");
    }
}

#[test]
fn a_container_has_the_gpus_whose_files_it_has() {
    let (tree, names) = instance(4);
    let first = |tree: &Tree| {
        let topology = tree.host.topology(names.clone(), &Config::default());
        let gpus = topology.entries.keys().filter(|name| name.starts_with("cuda:")).count();
        (gpus, topology.entries.get("cuda:0").map(|entry| entry.preferred[0].clone()))
    };
    assert_eq!(first(&tree), (8, Some(names[0].clone())));
    // It has been given the last four.
    for minor in 0..4 {
        tree.remove(&format!("dev/nvidia{minor}"));
    }
    assert_eq!(first(&tree), (4, Some(names[16].clone())));
    // Or there are no device files yet.
    for minor in 4..8 {
        tree.remove(&format!("dev/nvidia{minor}"));
    }
    assert_eq!(first(&tree), (8, Some(names[0].clone())));
    let known = tree.directory.path().join("proc/driver/nvidia/gpus");
    for (address, left) in [("0000:4b:00.0", 7), ("0000:5c:00.0", 6)] {
        fs::remove_dir_all(known.join(address)).expect("it is there");
        assert_eq!(first(&tree), (left, Some(names[4 * (8 - left)].clone())));
    }
    // No driver: what sysfs says.
    fs::remove_dir_all(known).expect("it is there");
    assert_eq!(first(&tree).0, 8);
}

#[test]
fn only_gpus_are_gpus_and_they_are_sorted_by_address() {
    let tree = Tree::new();
    let others = [
        ("0000:01:00.1", ["0x10de", "0x040300", "0x1"], "its sound"),
        ("0000:02:00.0", ["0x10de", "0x068000", "0x1"], "an NVSwitch"),
        ("0000:03:00.0", ["0x1a03", "0x030000", "0x1"], "another's"),
    ];
    for (address, ids, _) in others {
        tree.pci(&format!("pci0000:00/{address}"), ids, 0);
    }
    assert_eq!(addresses(&gpu::list(&tree.host, &Config::default())), NO_NAMES);
    for address in ["10000:01:00.0", "0001:00:00.0", "0000:b0:00.0", "0000:0b:00.0"] {
        tree.pci(&format!("pci0000:00/{address}"), ["0x10de", "0x030000", "0x1"], 0);
    }
    assert_eq!(
        addresses(&gpu::list(&tree.host, &Config::default())),
        ["0000:0b:00.0", "0000:b0:00.0", "0001:00:00.0", "10000:01:00.0"]
    );
}

#[test]
fn a_file_is_read_instead_if_it_can_be() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("matrix.json");
    let config = Config { custom_topology: Some(path.clone()), ..Config::default() };
    let error = discover(&config).expect_err("there is no file");
    assert!(error.text.contains(path.to_str().expect("UTF-8")), "{error}");
    fs::write(&path, r#"{"cpu:0":[["a"]]}"#).expect("written");
    let error = discover(&config).expect_err("it is no matrix");
    assert!(error.text.contains("matrix.json: topology: line 1"), "{error}");
    let text = r#"{"cpu:0":[["a"],["b"]],"cuda:0":[["b"],["a"]]}"#;
    fs::write(&path, text).expect("written");
    assert_eq!(discover(&config).expect("it is").to_json(), text);
    let config = Config { devices: vec!["b".into(), "c".into()], ..config };
    let json = discover(&config).expect("it is").to_json();
    assert_eq!(json, r#"{"cpu:0":[[],["b"]],"cuda:0":[["b"],[]]}"#);
}

proptest! {
    #[test]
    fn every_nic_is_once_in_every_list(
        nics in prop::collection::vec((prop::option::of(0_u32..3), "(pci0(/0){0,2}|pci1/[01](/[01])?)?"), 1..8),
        gpus in prop::collection::vec((prop::option::of(0_u32..3), "(pci1/[01]/[0-2])?"), 0..4),
    ) {
        let place = |numa: Option<u32>, path: String| {
            Place { numa, path: path.split('/').filter(|s| !s.is_empty()).map(Into::into).collect() }
        };
        let nics: Vec<Nic> = nics.into_iter().enumerate()
            .map(|(i, (numa, path))| Nic { name: i.to_string(), place: place(numa, path) }).collect();
        let gpus: Vec<Gpu> =
            gpus.into_iter().map(|(numa, path)| Gpu::at(place(numa, path))).collect();
        let topology = matrix(&nics, &[0, 1], &gpus);
        prop_assert_eq!(topology.entries.len(), 2 + gpus.len());
        for (location, entry) in &topology.entries {
            let mut all = [&*entry.preferred, &*entry.available].concat();
            all.sort();
            prop_assert!(all.iter().eq(nics.iter().map(|nic| &nic.name)), "{}", location);
            // A GPU without a near NIC would be one whose NICs are all equally far.
            prop_assert!(location.starts_with("cpu") || !entry.preferred.is_empty());
        }
    }

    #[test]
    fn any_list_of_visible_gpus_is_a_choice(
        list in "(-?[0-9]{0,3}|GPU-0*a?[0-3]?|[^,]{0,4})(,(-?[0-3]?|GPU-0*a?[0-3]?|\\PC{0,4})){0,5}",
    ) {
        thread_local!(static TREE: Tree = {
            let tree = Tree::new();
            for bus in 0..4 {
                tree.gpu(&format!("pci0000:00/0000:{bus:02x}:00.0"), 0);
            }
            tree
        });
        let mut visible = TREE.with(|tree| tree.visible(&list));
        visible.sort();
        let count = visible.len();
        visible.dedup();
        prop_assert_eq!(visible.len(), count);
    }
}
