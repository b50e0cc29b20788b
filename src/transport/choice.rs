//! Which devices a transport opens.

use std::io::Read;

use crate::topology::MAX_TEXT;

use super::{Code, Config, Device, Error, FabricNic, Libfabric, Limits, Result, Topology};

/// The NIC priority matrix of the file that `MC_CUSTOM_TOPO_JSON` names.
///
/// # Errors
/// That it cannot be read, or is no such matrix; names the variable and the file.
pub fn read_topology(path: &std::path::Path) -> Result<Topology> {
    let context = format!("MC_CUSTOM_TOPO_JSON={}", path.display());
    // No more than can be right, whatever the file is.
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        std::fs::File::open(path)?.take(MAX_TEXT as u64 + 1).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|why| Error::invalid(format!("{context}: {why}")))?;
    Topology::from_json(&text).map_err(|error| error.context(context))
}

pub(super) fn no_devices(lib: &Libfabric, config: &Config) -> Error {
    let text = if config.provider == "efa" {
        format!(
            "No EFA devices found: libfabric {} ({}) has no reliable-datagram endpoint of provider \
             efa. Check `fi_info -p efa` and that the instance has EFA interfaces. To run over a \
             software provider instead, set MC_EFA_PROVIDER=tcp (or shm, within one host)",
            lib.version(),
            lib.path()
        )
    } else {
        format!(
            "No devices found: libfabric {} ({}) has no reliable-datagram endpoint of provider {} \
             (MC_EFA_PROVIDER). `fi_info -t FI_EP_RDM` lists what there is",
            lib.version(),
            lib.path(),
            config.provider
        )
    };
    Error::new(Code::DeviceNotFound, text)
}

/// Without the loopback interface, unless that is all.
pub(crate) fn outward(devices: Vec<Device>) -> Vec<Device> {
    let loopback = |device: &Device| device.info().speaks_ip() && device.name == "lo";
    if devices.iter().all(loopback) {
        return devices;
    }
    devices.into_iter().filter(|device| !loopback(device)).collect()
}

/// Which of the devices found to open, and in what order.
pub(super) fn choose(
    found: Vec<Device>,
    asked: &[String],
    topology: Option<&Topology>,
    config: &Config,
) -> Result<Vec<(String, Device)>> {
    let list = |devices: &[Device]| {
        devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ")
    };
    let find = |name: &str| found.iter().find(|device| device.name == name).cloned();
    let mut wanted: Vec<Device> = Vec::new();
    if !asked.is_empty() {
        for name in asked {
            wanted.push(find(name).ok_or_else(|| {
                Error::new(
                    Code::DeviceNotFound,
                    format!("no device {name}: provider {} has {}", config.provider, list(&found)),
                )
            })?);
        }
    } else if let Some(topology) = topology {
        // The host's topology lists every RDMA device of the machine; those of other kinds are not
        // ours.
        wanted = topology.devices().iter().filter_map(|name| find(name)).collect();
    }
    if let Some(topology) = topology.filter(|_| asked.is_empty() && config.provider == "efa") {
        if topology.devices().is_empty() {
            let text = "No EFA devices found in the host engine's topology: it has not been discovered \
                        (discoverTopology), the machine has no RDMA device, or the device filter \
                        leaves none";
            return Err(Error::new(Code::DeviceNotFound, text));
        }
    }
    if wanted.is_empty() && asked.is_empty() {
        wanted = outward(found.clone());
        if let Some(topology) = topology.filter(|topology| !topology.devices().is_empty()) {
            log::warn!(
                "none of the topology's devices ({}) is one of provider {}; using {}",
                topology.devices().join(", "),
                config.provider,
                list(&wanted)
            );
        }
    }
    if !config.devices.is_empty() {
        wanted.retain(|device| config.devices.contains(&device.name));
    }
    if wanted.is_empty() {
        return Err(Error::new(
            Code::DeviceNotFound,
            format!(
                "MC_TE_FILTERS={} leaves no device of {}",
                config.devices.join(","),
                list(&found)
            ),
        ));
    }
    let mut named: Vec<(String, Device)> = Vec::new();
    for device in wanted {
        let same = named.iter().filter(|(_, other)| other.name == device.name).count();
        let name = if same == 0 { device.name.clone() } else { format!("{}#{same}", device.name) };
        named.push((name, device));
    }
    Ok(named)
}

/// Opens devices; one that cannot be opened is left out, with the reason, as long as another can.
pub(super) fn open_all(
    lib: &'static Libfabric,
    devices: Vec<(String, Device)>,
    config: &Config,
) -> Result<Vec<(String, FabricNic)>> {
    let limits =
        Limits { operations: config.max_wr, completions: config.max_cqe, peers: config.av_size };
    let mut nics = Vec::new();
    let mut last = None;
    for (name, device) in devices {
        let info = device.info().clone();
        match FabricNic::open(lib, device, &limits) {
            Ok(nic) => {
                log::info!(
                    "EFA device (libfabric): {name}, domain: {}, fabric: {}, provider: {}",
                    info.domain(),
                    info.fabric(),
                    info.provider()
                );
                let (writes, reads) = nic.emulation();
                for (emulated, what) in [(writes, "writes"), (reads, "reads")] {
                    if emulated == Some(true) {
                        log::warn!(
                            "{name}: libfabric {} emulates RDMA {what} in software, which is slow: \
                             the device, its driver or libfabric is too old, or \
                             FI_EFA_USE_DEVICE_RDMA=0 is set",
                            lib.version()
                        );
                    }
                }
                nics.push((name, nic));
            }
            Err(error) => {
                log::error!("{error}; going on without it");
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if nics.is_empty() => Err(error),
        _ => Ok(nics),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topology_file_is_read_as_far_as_it_can_be_right() {
        // It has no end.
        let error = read_topology("/dev/zero".as_ref()).unwrap_err();
        assert!(error.text.contains("4194305 bytes, at most 4194304 allowed"), "{error}");
        let error = read_topology("/no/such/file".as_ref()).unwrap_err();
        assert!(error.text.contains("MC_CUSTOM_TOPO_JSON=/no/such/file: No such"), "{error}");
    }
}
