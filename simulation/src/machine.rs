//! The machines.

use serde::Serialize;

/// A host, as far as the simulation goes. Every peer is one of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// AWS's instance type, in short.
    pub name: &'static str,
    /// EFA NICs.
    pub nics: usize,
    /// Line rate of each, Gbit/s, in either direction.
    pub gbits: u64,
    /// Work requests that libfabric says a NIC's send queue holds (`tx_attr->size`).
    pub depth: u32,
}

/// The machines that are simulated. NICs and rates are those of the topology files in
/// <https://github.com/aws/aws-ofi-nccl>, depths those of softefa's profiles.
pub const MACHINES: [Machine; 4] = [
    Machine { name: "p5", nics: 32, gbits: 100, depth: 4096 },
    Machine { name: "p5en", nics: 16, gbits: 200, depth: 4096 },
    Machine { name: "p6-b200", nics: 8, gbits: 400, depth: 4096 },
    Machine { name: "p6-b300", nics: 16, gbits: 400, depth: 2048 },
];

impl Machine {
    /// The machine of this name.
    ///
    /// # Errors
    /// One line that lists the known ones.
    pub fn named(name: &str) -> Result<Self, String> {
        MACHINES.iter().find(|machine| machine.name == name).copied().ok_or_else(|| {
            let names: Vec<_> = MACHINES.iter().map(|machine| machine.name).collect();
            format!("no machine {name}: there are {}", names.join(", "))
        })
    }

    /// Bytes a second of all NICs together.
    pub fn line(&self) -> f64 {
        self.nics as f64 * self.gbits as f64 * 1e9 / 8.0
    }
}
