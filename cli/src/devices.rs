//! `mooncake-efa devices`.

use mooncake_efa::{Result, discovery, transport};
use serde::Serialize;

/// Flags of `mooncake-efa devices`.
#[derive(clap::Args)]
pub struct Args {
    /// libfabric's provider (default: MC_EFA_PROVIDER, or efa)
    #[arg(long)]
    provider: Option<String>,
    /// One JSON array instead of a table
    #[arg(long)]
    json: bool,
    /// Which devices are near to which memory, as JSON: what MC_CUSTOM_TOPO_JSON takes
    #[arg(long, conflicts_with = "json")]
    topology: bool,
}

#[derive(Serialize)]
struct Row {
    name: String,
    provider: String,
    fabric: String,
    domain: String,
    transmit_depth: usize,
    longest_operation: u64,
    virtual_addresses: bool,
    provider_keys: bool,
    device_memory: bool,
    /// NUMA node; null where it is not known.
    numa: Option<u32>,
    /// Gbit/s; null where it is not known.
    gbps: Option<u32>,
    /// The NUMA nodes and GPUs that it is near to; none if it is not to be used.
    near: Vec<String>,
}

/// Prints the devices that could be used; an error if there are none.
pub fn run(args: &Args) -> Result<()> {
    let config = crate::config(args.provider.as_deref());
    let devices = transport::devices(&config)?;
    let topology = discovery::discover(&config)?;
    if args.topology {
        println!("{}", topology.to_json());
        return Ok(());
    }
    let near = |name: &String| {
        let entries = topology.entries.iter();
        let near = entries.filter(|(_, entry)| entry.preferred.contains(name));
        near.map(|(location, _)| location.clone()).collect()
    };
    let rows: Vec<Row> = devices
        .iter()
        .map(|device| {
            let info = device.info();
            let discovery::Link { numa, gbps } = discovery::link(&device.name);
            Row {
                name: device.name.clone(),
                provider: info.provider(),
                fabric: info.fabric(),
                domain: info.domain(),
                transmit_depth: info.tx_depth(),
                longest_operation: info.max_message(),
                virtual_addresses: info.virtual_addresses(),
                provider_keys: info.provider_keys(),
                device_memory: info.device_memory(),
                numa,
                gbps,
                near: near(&device.name),
            }
        })
        .collect();
    if args.json {
        println!("{}", serde_json::json!(rows));
        return Ok(());
    }
    println!(
        "{:<16} {:<14} {:<18} {:<20} {:>6} {:>5} {:>5}  NEAR",
        "NAME", "PROVIDER", "FABRIC", "DOMAIN", "DEPTH", "NUMA", "GBPS"
    );
    let number = |number: Option<u32>| number.map_or("-".to_owned(), |number| number.to_string());
    for row in rows {
        let near = if row.near.is_empty() { "-".to_owned() } else { row.near.join(",") };
        println!(
            "{:<16} {:<14} {:<18} {:<20} {:>6} {:>5} {:>5}  {near}",
            row.name,
            row.provider,
            row.fabric,
            row.domain,
            row.transmit_depth,
            number(row.numa),
            number(row.gbps)
        );
    }
    Ok(())
}
