//! What is discovered on this machine, over `tcp` and, on an emulated EFA host, over `efa`.

use std::env;

use transfer_engine::discovery::{discover, link};

use mooncake_efa::config::Config;
use mooncake_efa::topology::Topology;

fn config(provider: &str) -> Config {
    // What the emulated host has must be the whole truth.
    Config { provider: provider.into(), cuda_visible_devices: None, ..Config::from_env() }
}

#[test]
fn tcp_finds_interfaces() {
    let topology = discover(&config("tcp")).expect("libfabric is there");
    let nics = topology.devices();
    assert!(!nics.is_empty(), "{topology:?}");
    assert!(nics.len() == 1 || !nics.contains(&"lo".to_owned()), "{nics:?}");
    assert!(topology.entries.contains_key("cpu:0"), "{topology:?}");
    let filtered = discover(&Config { devices: vec!["lo".into()], ..config("tcp") });
    assert_eq!(filtered.expect("libfabric is there").devices(), ["lo"], "if it is asked for");
    let none = discover(&Config { devices: vec!["none".into()], ..config("tcp") });
    assert_eq!(none.expect("it is no error").devices(), Vec::<String>::new());
}

#[test]
fn no_device_is_no_error() {
    assert_eq!(discover(&config("nonsense")).expect("it is none"), Topology::default());
}

/// An emulated instance: the NICs behind each PCI switch, how many GPUs are there too, and Gbit/s of a NIC. The first
/// half of the switches is of NUMA node 0.
fn instance(name: &str) -> Option<(Vec<Vec<String>>, usize, u32)> {
    let behind = |first: &[u32], each: u32| {
        let nics =
            |first: &u32| (*first..first + each).map(|bus| format!("rdmap{bus}s0")).collect();
        first.iter().map(nics).collect()
    };
    let eight = [0x4f, 0x60, 0x71, 0x82, 0x93, 0xa4, 0xb5, 0xc6];
    Some(match name {
        "p5" => (behind(&eight, 4), 1, 100),
        "p5en" => (behind(&[0x55, 0x6e, 0x87, 0xa0], 4), 2, 200),
        "p6-b200" => (behind(&[0x4f, 0x60, 0x71, 0x84], 2), 2, 400),
        "p6-b300" => (behind(&[0x56, 0x65, 0x74, 0x83, 0x92, 0xa1, 0xb0, 0xbf], 2), 1, 400),
        "p4d" => {
            let nics = [0x10, 0x20, 0x90, 0xa0].map(|bus| vec![format!("rdmap{bus}s27")]);
            (nics.into(), 2, 100)
        }
        _ => return None,
    })
}

#[test]
fn efa_finds_the_nics_of_the_emulated_host() {
    if env::var_os("SOFTEFA_DIR").is_none() {
        eprintln!("skipped: not on an emulated EFA device (softefa run)");
        return;
    }
    let config = config("efa");
    let topology = discover(&config).expect("libfabric is there");
    let Ok(profile) = env::var("SOFTEFA_PROFILE") else {
        let count = env::var("SOFTEFA_DEVICES").map_or(2, |count| count.parse().expect("a number"));
        let nics: Vec<_> = (0..count).map(|number| format!("rdmap{number}s0")).collect();
        assert_eq!(topology.devices(), nics);
        assert_eq!(topology.entries["cpu:0"].preferred, nics);
        assert!(nics.iter().all(|nic| (link(nic).numa, link(nic).gbps) == (Some(0), Some(100))));
        let config = Config { devices: vec![nics[1].clone()], ..config };
        assert_eq!(discover(&config).expect("as before").devices(), [nics[1].clone()]);
        return;
    };
    let (switches, gpus, gbps) = instance(&profile).expect("a profile that is known here");
    let all = switches.concat();
    assert_eq!(topology.entries.len(), 2 + switches.len() * gpus, "{topology:?}");
    for (node, own) in switches.chunks(switches.len() / 2).map(|half| half.concat()).enumerate() {
        let entry = &topology.entries[&format!("cpu:{node}")];
        assert_eq!(entry.preferred, own, "cpu:{node}");
        assert_eq!(entry.available.len(), all.len() - own.len());
        assert!(
            own.iter()
                .all(|nic| (link(nic).numa, link(nic).gbps) == (Some(node as u32), Some(gbps)))
        );
    }
    for gpu in 0..switches.len() * gpus {
        let entry = &topology.entries[&format!("cuda:{gpu}")];
        assert_eq!(entry.preferred, switches[gpu / gpus], "cuda:{gpu}");
        assert_eq!(entry.preferred.len() + entry.available.len(), all.len());
    }
}
