//! `mooncake-efa`, the command for people.
#![forbid(unsafe_code)]

mod bench;
mod control;
mod devices;
mod pattern;
mod target;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mooncake_efa::config::Config;

/// Moves memory between hosts over libfabric (AWS EFA first), as Mooncake's EFA transport.
#[derive(Parser)]
#[command(name = "mooncake-efa", version, after_help = EXAMPLES)]
struct Cli {
    /// What to log to standard error: off, error, warn, info, debug, trace
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    log: log::LevelFilter,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  mooncake-efa devices                              the EFA devices of this host
  mooncake-efa bench --self --provider shm --verify two processes here, every byte checked
  mooncake-efa bench --mode target                  on one host; prints HOST:PORT
  mooncake-efa bench --segment_id HOST:PORT         on the other

Without --provider the variable MC_EFA_PROVIDER names libfabric's provider; the default is efa.";

#[derive(Subcommand)]
enum Command {
    /// Measure transfers between two processes, as Mooncake's transfer_engine_bench does
    Bench(bench::Args),
    /// List the devices that could be used
    Devices(devices::Args),
}

/// Settings of the environment, with a provider given on the command line.
fn config(provider: Option<&str>) -> Config {
    let mut config = Config::from_env();
    if let Some(provider) = provider {
        provider.clone_into(&mut config.provider);
    }
    config
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::new().filter_level(cli.log).format_target(false).init();
    let result = match cli.command {
        Command::Bench(args) => bench::run(&args),
        Command::Devices(args) => devices::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mooncake-efa: {error}");
            ExitCode::FAILURE
        }
    }
}
