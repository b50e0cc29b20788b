//! `mooncake-efa`, the command for people.
#![forbid(unsafe_code)]

mod bench;
mod control;
mod devices;
mod far;
mod memory;
mod pattern;
mod run;
mod target;
mod units;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use mooncake_efa::Code;
use mooncake_efa::config::Config;
use mooncake_efa::fabric::Libfabric;

/// Moves memory between hosts over libfabric (AWS EFA first), as Mooncake's EFA transport.
#[derive(Parser)]
#[command(name = "mooncake-efa", version, after_help = EXAMPLES)]
struct Cli {
    /// What to log to standard error: off, error, warn, info, debug, trace (default: MC_LOG_LEVEL,
    /// or warn)
    #[arg(long, global = true, value_name = "LEVEL")]
    log: Option<log::LevelFilter>,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  mooncake-efa devices                              the EFA devices of this host
  mooncake-efa bench --self --provider shm --verify two processes here, every byte checked
  mooncake-efa bench --self --provider shm --use_vram  the same with memory of GPU 0
  mooncake-efa bench --mode target                  on one host; prints HOST:PORT
  mooncake-efa bench --segment_id HOST:PORT         on the other
  mooncake-efa run -- vllm serve MODEL ...          a published Mooncake on this transport

Without --provider the variable MC_EFA_PROVIDER names libfabric's provider; the default is efa.";

#[derive(Subcommand)]
enum Command {
    /// Measure transfers between two processes, as Mooncake's transfer_engine_bench does
    Bench(bench::Args),
    /// List the devices that could be used
    Devices(devices::Args),
    /// Run a command whose Mooncake uses this transport instead of its own EfaTransport
    Run(run::Args),
}

/// Settings of the environment, with a provider given on the command line.
fn config(provider: Option<&str>) -> Config {
    let mut config = Config::from_env();
    if let Some(provider) = provider {
        provider.clone_into(&mut config.provider);
    }
    config
}

/// The level that MC_LOG_LEVEL asks for; without it, less than the library's default.
fn log_level() -> log::LevelFilter {
    match std::env::var("MC_LOG_LEVEL") {
        // The warning about a bad value comes when the whole environment is read.
        Ok(level) => {
            Config::from_lookup(|name| (name == "MC_LOG_LEVEL").then(|| level.clone())).0.log_level
        }
        Err(_) => log::LevelFilter::Warn,
    }
}

/// Our version, and that of the libfabric that would be used.
fn print_version() {
    println!("mooncake-efa {}", env!("CARGO_PKG_VERSION"));
    match Libfabric::get(Config::from_env().libfabric.as_deref()) {
        Ok(lib) => println!("libfabric {} ({})", lib.version(), lib.path()),
        Err(error) => println!("no libfabric: {error}"),
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.kind() == ErrorKind::DisplayVersion => {
            print_version();
            return ExitCode::SUCCESS;
        }
        Err(error) => error.exit(),
    };
    let level = cli.log.unwrap_or_else(log_level);
    env_logger::Builder::new().filter_level(level).format_target(false).init();
    let result = match cli.command {
        Command::Bench(args) => bench::run(&args),
        Command::Devices(args) => devices::run(&args),
        // Its exit statuses are a shell's.
        Command::Run(args) => return run::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mooncake-efa: {error}");
            // As clap does: 2 for what was asked wrongly, 1 for what went wrong.
            ExitCode::from(if error.code == Code::InvalidArgument { 2 } else { 1 })
        }
    }
}
