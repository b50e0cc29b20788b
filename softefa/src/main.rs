//! `softefa`, the command.

mod cli {
    pub mod ctl;
    pub mod run;
    pub mod stat;
}

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cli::{ctl, run, stat};
use softefa::profile::{MAX_PLAIN, Profile};

/// An EFA device in user space, for tests: runs commands on emulated NICs, and makes these fail.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(override_usage = "softefa [OPTIONS] -- COMMAND [ARGS]...\n       softefa SUBCOMMAND ...")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: run::Args,
}

const EXAMPLES: &str = "\
Examples:
  softefa -- fi_info -p efa                          two NICs of 100 Gbit/s
  softefa --profile p5en -- python3 engine.py        the 16 NICs of a p5en.48xlarge
  softefa --host 0 -- ./server & softefa --host 1 -- ./client
  softefa ctl error status=unresp rate=0.5% host=0   while they run
  softefa ctl clear

Processes with one --dir (default: SOFTEFA_DIR, else /dev/shm/softefa-UID) reach each other.
`softefa run --help` tells more of starting, `softefa ctl --help` of faults.";

#[derive(Subcommand)]
enum Command {
    /// Run a command on emulated NICs; the word `run` may be left out
    Run(run::Args),
    /// List, set and remove faults, at once for all running processes
    Ctl(ctl::Args),
    /// Show what NICs and queue pairs have counted, of processes that run and of the last that ran
    Stat(stat::Args),
    /// List the kinds of host for `run --profile`
    Profiles,
}

fn profiles() {
    for profile in Profile::names().iter().filter_map(|name| Profile::named(name)) {
        let (nics, gpus) = (profile.nics.len(), profile.gpus.len());
        let speed = profile.nics.first().map_or(0, |nic| nic.speed);
        println!("{:<8} {nics:>2} NICs of {speed} Gbit/s, {gpus} GPUs", profile.name);
    }
    println!("Without --profile: --nics N NICs of 100 Gbit/s, 0 to {MAX_PLAIN}, 2 if not given.");
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => return run::run(&cli.run),
        // Its exit statuses are a shell's.
        Some(Command::Run(args)) => return run::run(&args),
        Some(Command::Ctl(args)) => ctl::run(&args),
        Some(Command::Stat(args)) => stat::run(&args).map_err(ctl::Error::from),
        Some(Command::Profiles) => {
            profiles();
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            // As clap does: 2 for what was asked wrongly, 1 for what went wrong.
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}
