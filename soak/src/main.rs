//! `soak`: the transport under faults, on emulated devices (softefa), every byte checked.
#![forbid(unsafe_code)]

mod lane;
mod memory;
mod node;
mod pattern;
mod peers;
mod report;
mod resources;
mod run;
mod scenario;
mod stage;
mod tally;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mooncake_efa::config::Config;
use mooncake_efa::fabric::Libfabric;

use run::{Limits, Outcome, STOP};
use scenario::{SCENARIOS, Scenario};
use stage::Devices;

/// The transport under faults, on emulated devices, every byte checked.
///
/// Exit status: 0 if every scenario was as it must be, 1 if not, 2 for wrong arguments.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    args: Args,
}

#[derive(clap::Args)]
struct Args {
    /// How long all scenarios together may take, less what it takes to start them
    #[arg(long, value_name = "MINUTES", default_value_t = 10.0)]
    minutes: f64,
    /// These scenarios instead of all; they share the time
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// What everything random is drawn from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Restarts after which a scenario ends before its time
    #[arg(long, value_name = "N", default_value_t = 1000)]
    restarts: u64,
    /// Once a scenario, note the stacks of the watched processes (by gdb) when they have moved nothing for so long
    #[arg(long, value_name = "SECONDS")]
    stacks: Option<u64>,
    /// NICs of each host
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=16))]
    nics: u8,
    /// verbs, or direct: queues mapped into libfabric 2.3 and later
    #[arg(long, value_name = "PATH", default_value = "verbs", value_parser = ["verbs", "direct"])]
    data_path: String,
    /// The command softefa (default: beside this one)
    #[arg(long, value_name = "PATH")]
    softefa: Option<PathBuf>,
    /// Write what came of it as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave the devices' directories, with logs, where they are
    #[arg(long)]
    keep: bool,
    /// Only list the scenarios
    #[arg(long)]
    list: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Print a scenario as a script for `softefa run --faults`, a comment with softefa's settings first
    Script {
        /// Its name
        scenario: String,
        /// How long NICs go down and up
        #[arg(long, value_name = "N", default_value_t = 60)]
        seconds: u64,
        /// NICs of each host
        #[arg(long, value_name = "N", default_value_t = 4)]
        nics: u8,
    },
    /// One process of a scenario; what it is to do is JSON
    #[command(hide = true)]
    Node {
        /// JSON
        spec: String,
    },
}

/// Least that a scenario takes, seconds: for less, nothing can be said.
const LEAST: u64 = 3;

fn chosen(args: &Args) -> Result<Vec<(&'static Scenario, u64)>, String> {
    let all = || SCENARIOS.iter().filter(|scenario| scenario.share > 0).collect();
    let chosen: Vec<&Scenario> = match args.only[..] {
        [] => all(),
        ref names => names.iter().map(|name| by_name(name)).collect::<Result<_, _>>()?,
    };
    let whole: u64 = chosen.iter().map(|scenario| scenario.share.max(1)).sum();
    let seconds = |scenario: &Scenario| {
        let part = scenario.share.max(1) as f64 / whole as f64;
        ((args.minutes * 60.0 * part) as u64).max(LEAST)
    };
    Ok(chosen.into_iter().map(|scenario| (scenario, seconds(scenario))).collect())
}

fn by_name(name: &str) -> Result<&'static Scenario, String> {
    SCENARIOS.iter().find(|scenario| scenario.name == name).ok_or_else(|| {
        let names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        format!("no scenario {name}; there are {}", names.join(", "))
    })
}

fn list() {
    for scenario in SCENARIOS {
        let alone = if scenario.share == 0 { " (only if it is named)" } else { "" };
        println!("{:<9} {}{alone}", scenario.name, scenario.what);
    }
}

fn soak(args: &Args, scenarios: &[(&'static Scenario, u64)]) -> Result<bool> {
    let beside = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("softefa"));
    let softefa = args.softefa.clone().map_or_else(beside, Ok)?;
    anyhow::ensure!(
        softefa.is_file(),
        "{} is missing: build it, or name it by --softefa",
        softefa.display()
    );
    let lib = Libfabric::get(Config::from_env().libfabric.as_deref())?;
    eprintln!(
        "soak: libfabric {} ({}), data path {}, {} NICs a host, seed {}",
        lib.version(),
        lib.path(),
        args.data_path,
        args.nics,
        args.seed
    );
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })?;
    let devices = Devices {
        softefa,
        nics: args.nics,
        data_path: args.data_path.clone(),
        libfabric: lib.version(),
        keep: args.keep,
    };
    let limits = Limits { restarts: args.restarts, stacks: args.stacks };
    let mut outcomes = Vec::<Outcome>::new();
    let mut good = true;
    for &(scenario, seconds) in scenarios {
        if let (true, Err(why)) = (scenario.only_full, devices.refusal()) {
            println!("{:<9} skipped: {why}", scenario.name);
            continue;
        }
        match run::run(scenario, &devices, args.seed, seconds, &limits) {
            Ok(outcome) => {
                good &= outcome.wrong.is_empty();
                outcomes.push(outcome);
            }
            Err(error) => {
                good = false;
                eprintln!("{:<9} FAILED: {error:#}", scenario.name);
            }
        }
        if STOP.load(Ordering::Relaxed) {
            good = false;
            eprintln!("soak: stopped");
            break;
        }
    }
    report::print(&outcomes);
    if let Some(path) = &args.json {
        let report = serde_json::json!({
            "libfabric": lib.version(),
            "data_path": args.data_path,
            "nics": args.nics,
            "seed": args.seed,
            "passed": good,
            "scenarios": outcomes,
        });
        std::fs::write(path, format!("{report:#}\n"))
            .with_context(|| path.display().to_string())?;
    }
    Ok(good)
}

fn wrong(what: &str) -> ExitCode {
    eprintln!("soak: {what}");
    ExitCode::from(2)
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_target(false)
        .init();
    let result = match cli.command {
        Some(Command::Node { spec }) => serde_json::from_str(&spec)
            .context("the node's argument")
            .and_then(node::run)
            .map(|()| true),
        Some(Command::Script { scenario, seconds, nics }) => match by_name(&scenario) {
            Ok(scenario) => {
                println!("# SOFTEFA_DEAD_MS={}", scenario.dead_ms);
                scenario.script(seconds, nics, true).iter().for_each(|rule| println!("{rule}"));
                Ok(true)
            }
            Err(what) => return wrong(&what),
        },
        None if cli.args.list => {
            list();
            Ok(true)
        }
        None => match chosen(&cli.args) {
            Ok(scenarios) => soak(&cli.args, &scenarios),
            Err(what) => return wrong(&what),
        },
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
