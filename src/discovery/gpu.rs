//! NVIDIA's GPUs, as CUDA numbers them, without CUDA: to load it takes a second and gigabytes of address space, and a
//! process that has begun to use a GPU can no longer fork and use it.

use crate::config::Config;
use crate::topology::printable;

use super::host::{self, Host, PciAddress, Place};

/// NVIDIA.
const VENDOR: &str = "0x10de";
/// VGA controllers, and those without a display.
const CLASSES: [&str; 2] = ["0x0300", "0x0302"];

/// A GPU.
pub(super) struct Gpu {
    pub place: Place,
    /// Its name in sysfs, which is its address.
    name: String,
    /// PCI device id: which product it is.
    product: Option<String>,
    driver: Driver,
}

#[cfg(test)]
impl Gpu {
    pub fn at(place: Place) -> Self {
        Self { place, name: String::new(), product: None, driver: Driver::default() }
    }
}

/// What the driver says of a GPU.
#[derive(Default)]
struct Driver {
    uuid: Option<String>,
    /// Its device file is `/dev/nvidiaMINOR`.
    minor: Option<u32>,
}

/// The GPUs that CUDA shows this process, in CUDA's order.
pub(super) fn list(host: &Host, config: &Config) -> Vec<Gpu> {
    let all = ours(host, all(host));
    let Some(visible) = &config.cuda_visible_devices else {
        return in_order(all, config);
    };
    let count = all.len();
    let (gpus, note) = choose(all, visible, config);
    if let Some(note) = note.filter(|_| count > 0) {
        log::warn!("topology: CUDA_VISIBLE_DEVICES={}: {note}", printable(visible));
    }
    gpus
}

/// The host's GPUs, by PCI address.
fn all(host: &Host) -> Vec<Gpu> {
    let directory = host.path("sys/bus/pci/devices");
    let mut names: Vec<(PciAddress, String)> = host::names(&directory)
        .into_iter()
        .filter_map(|name| Some((name.parse().ok()?, name)))
        .filter(|(_, name)| {
            let is = |file: &str| host::text(&directory.join(name).join(file)).unwrap_or_default();
            is("vendor") == VENDOR && CLASSES.iter().any(|class| is("class").starts_with(class))
        })
        .collect();
    names.sort_unstable();
    let gpu = |(_, name): (_, String)| {
        let device = directory.join(&name);
        let product = host::text(&device.join("device"));
        Gpu { place: host.place(&device), driver: Driver::read(host, &name), product, name }
    };
    names.into_iter().map(gpu).collect()
}

impl Driver {
    fn read(host: &Host, address: &str) -> Self {
        let path = host.path(&format!("proc/driver/nvidia/gpus/{address}/information"));
        let text = host::text(&path).unwrap_or_default();
        let field = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.map(|value| value.trim().to_owned())
        };
        Self { uuid: field("GPU UUID"), minor: field("Device Minor").and_then(|v| v.parse().ok()) }
    }
}

/// Those that this process may use: sysfs shows a container all of the host's. Its runtime gives it the driver's files
/// of its own GPUs only, or the device files; where there are none of either, nothing is known.
fn ours(host: &Host, mut gpus: Vec<Gpu>) -> Vec<Gpu> {
    let known = host::names(&host.path("proc/driver/nvidia/gpus"));
    if !known.is_empty() {
        gpus.retain(|gpu| known.contains(&gpu.name));
    }
    let has_file = |gpu: &Gpu| match gpu.driver.minor {
        Some(minor) => host.path(&format!("dev/nvidia{minor}")).exists(),
        None => false,
    };
    if gpus.iter().any(has_file) {
        gpus.retain(has_file);
    }
    gpus
}

/// GPUs by PCI address, which is CUDA's order if they are alike or CUDA is told to.
fn in_order(gpus: Vec<Gpu>, config: &Config) -> Vec<Gpu> {
    if !config.cuda_pci_order && gpus.windows(2).any(|two| two[0].product != two[1].product) {
        log::warn!(
            "topology: the GPUs are not alike, and CUDA may number them otherwise than by PCI address, \
             as is done here: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        );
    }
    gpus
}

/// Those of `CUDA_VISIBLE_DEVICES=visible`, and what is wrong with it.
///
/// CUDA (13.0) reads a list of numbers, of which it takes the leading digits, or of beginnings of UUIDs, up to the
/// first entry that names no GPU; a list that names one twice it refuses.
fn choose(gpus: Vec<Gpu>, visible: &str, config: &Config) -> (Vec<Gpu>, Option<String>) {
    if visible.split(',').any(|entry| entry.trim_start().starts_with("MIG")) {
        let note = "which GPU an instance (MIG) is of is not known: no GPU has NICs of its own";
        return (Vec::new(), Some(note.to_owned()));
    }
    let by_uuid = visible.starts_with("GPU-");
    let gpus = if by_uuid { gpus } else { in_order(gpus, config) };
    let mut places: Vec<usize> = Vec::new();
    let mut note = None;
    for entry in visible.split(',') {
        let place = if by_uuid { with_uuid(&gpus, entry) } else { number(entry) };
        let Some(place) = place.filter(|place| *place < gpus.len()) else {
            // These are how one says: none, or no more.
            if !matches!(entry.trim(), "" | "-1" | "NoDevFiles") {
                let count = gpus.len();
                let entry = printable(entry);
                note = Some(format!("no GPU '{entry}' of {count} here: CUDA sees those before it"));
            }
            break;
        };
        if places.contains(&place) {
            let note = format!("names GPU {} twice, which CUDA refuses", gpus[place].name);
            return (Vec::new(), Some(note));
        }
        places.push(place);
    }
    let mut gpus: Vec<Option<Gpu>> = gpus.into_iter().map(Some).collect();
    (places.into_iter().filter_map(|place| gpus[place].take()).collect(), note)
}

/// The leading digits.
fn number(entry: &str) -> Option<usize> {
    let entry = entry.trim_start();
    let entry = entry.strip_prefix('+').unwrap_or(entry);
    let end = entry.find(|c: char| !c.is_ascii_digit()).unwrap_or(entry.len());
    entry[..end].parse().ok()
}

/// The one GPU whose UUID begins so.
fn with_uuid(gpus: &[Gpu], entry: &str) -> Option<usize> {
    let begins = |uuid: &str| {
        uuid.get(..entry.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(entry))
    };
    let is = |gpu: &Gpu| gpu.driver.uuid.as_deref().is_some_and(begins);
    let mut found = gpus.iter().enumerate().filter(|(_, gpu)| is(gpu)).map(|(place, _)| place);
    let first = found.next().filter(|_| entry.starts_with("GPU-") && entry.len() > "GPU-".len());
    first.filter(|_| found.next().is_none())
}
