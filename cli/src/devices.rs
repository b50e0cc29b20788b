//! `mooncake-efa devices`.

use mooncake_efa::{Result, transport};
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
}

/// Prints the devices that could be used; an error if there are none.
pub fn run(args: &Args) -> Result<()> {
    let devices = transport::devices(&crate::config(args.provider.as_deref()))?;
    let rows: Vec<Row> = devices
        .iter()
        .map(|device| {
            let info = device.info();
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
            }
        })
        .collect();
    if args.json {
        println!("{}", serde_json::json!(rows));
        return Ok(());
    }
    println!("{:<16} {:<14} {:<18} {:<20} {:>6}", "NAME", "PROVIDER", "FABRIC", "DOMAIN", "DEPTH");
    for row in rows {
        println!(
            "{:<16} {:<14} {:<18} {:<20} {:>6}",
            row.name, row.provider, row.fabric, row.domain, row.transmit_depth
        );
    }
    Ok(())
}
