//! `softefa run`: a command on emulated NICs, by a preloaded library.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::builder::PossibleValuesParser;
use softefa::cluster::default_dir;
use softefa::profile::{MAX_PLAIN, Profile};

use super::ctl::{self, Faults};

const LIBRARY: &str = "libsoftefa.so";

/// As clap has it: what was asked is wrong.
const USAGE: u8 = 2;
/// As of `env` and `timeout`: the wrapper itself cannot.
const CANNOT: u8 = 125;
/// These two as of every shell.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

const HELP: &str = "\
Examples:
  softefa run -- fi_info -p efa
  softefa run --profile p5en --host 0 -- ./server
  softefa run --nics 4 --data-path direct -- fi_pingpong -p efa
  softefa run --faults script --seed 7 -- ./soak      the same faults at each run of a seed

The command becomes this process: signals and exit status are its own. What it starts has the same
NICs. Commands with one --dir reach each other; those with different --host are remote to each
other. Where the environment does not say otherwise, FI_EFA_USE_DEVICE_RDMA=1 and
FI_EFA_ENABLE_SHM_TRANSFER=0 are set, so that libfabric uses the NICs even within one host.

Faults stay until `softefa ctl clear`; `softefa ctl --help` tells of them.

Exit status: COMMAND's own, or, with nothing started,
  2    an option or the script of faults is wrong
  125  the library was not found or cannot be preloaded, or the directory cannot be used
  126  COMMAND is not executable
  127  COMMAND was not found";

/// Flags of `softefa run`.
#[derive(clap::Args)]
#[command(override_usage = "softefa run [OPTIONS] -- COMMAND [ARGS]...", after_help = HELP)]
pub struct Args {
    /// The cluster's directory (default: SOFTEFA_DIR, else /dev/shm/softefa-UID)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The kind of host, see `softefa profiles`
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Profile::names()))]
    profile: Option<String>,
    /// A host with N NICs of 100 Gbit/s instead (default: 2)
    #[arg(long, value_name = "N", conflicts_with = "profile")]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=MAX_PLAIN as i64))]
    nics: Option<u8>,
    /// The host's number (default: one for each network namespace)
    #[arg(long, value_name = "N")]
    host: Option<u16>,
    /// verbs: rdma-core's calls (default); direct: queues mapped into libfabric 2.3 and later
    #[arg(long, value_name = "PATH", value_parser = ["verbs", "direct"], hide_possible_values = true)]
    data_path: Option<String>,
    /// RDMA moves no data, so that only the cost of software is left to measure
    #[arg(long)]
    no_copy: bool,
    /// Replace the cluster's faults by this script before the command is started
    #[arg(long, value_name = "FILE")]
    faults: Option<PathBuf>,
    /// The seed, instead of the script's
    #[arg(long, value_name = "N", requires = "faults")]
    seed: Option<u64>,
    /// What to run, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Why nothing is started, and the exit status for that.
struct Obstacle {
    status: u8,
    why: String,
}

impl From<ctl::Error> for Obstacle {
    fn from(error: ctl::Error) -> Obstacle {
        let status = if error.is_usage() { USAGE } else { CANNOT };
        Obstacle { status, why: error.to_string() }
    }
}

fn cannot(why: String) -> Obstacle {
    Obstacle { status: CANNOT, why: format!("softefa: {why}") }
}

/// Becomes the command; returns only if that is impossible.
pub fn run(args: &Args) -> ExitCode {
    let mut command = match prepare(args) {
        Ok(command) => command,
        Err(Obstacle { status, why }) => {
            eprintln!("{why}");
            return ExitCode::from(status);
        }
    };
    // Not a child that we wait for: as this process becomes the command, its signals, process id,
    // terminal and exit status are the command's by construction.
    let why = command.exec();
    eprintln!("softefa: cannot run {}: {why}", args.command[0].to_string_lossy());
    let missing = why.kind() == io::ErrorKind::NotFound;
    ExitCode::from(if missing { NOT_FOUND } else { NOT_EXECUTABLE })
}

fn prepare(args: &Args) -> Result<Command, Obstacle> {
    let script = args.faults.as_deref().map(ctl::read_script).transpose()?;
    let library = find_library()?;
    let dir = args.dir.clone().unwrap_or_else(default_dir);
    // The command may be in another directory when it looks.
    let dir =
        std::path::absolute(&dir).map_err(|error| cannot(format!("{}: {error}", dir.display())))?;
    if let Some(mut script) = script {
        script.seed = args.seed.unwrap_or(script.seed);
        Faults::open(&dir)?.replace(&script)?;
    }

    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]);
    command.env("SOFTEFA_DIR", dir);
    command.env("LD_PRELOAD", preload(&library, env::var_os("LD_PRELOAD")));
    if let Some(profile) = &args.profile {
        command.env("SOFTEFA_PROFILE", profile);
    }
    if let Some(nics) = args.nics {
        // A profile of the environment would win.
        command.env_remove("SOFTEFA_PROFILE").env("SOFTEFA_DEVICES", nics.to_string());
    }
    if let Some(host) = args.host {
        command.env("SOFTEFA_HOST", host.to_string());
    }
    if let Some(path) = &args.data_path {
        command.env("SOFTEFA_DATA_PATH", path);
    }
    if args.no_copy {
        command.env("SOFTEFA_COPY", "0");
    }
    for (name, value) in [("FI_EFA_USE_DEVICE_RDMA", "1"), ("FI_EFA_ENABLE_SHM_TRANSFER", "0")] {
        if env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    Ok(command)
}

/// SOFTEFA_LIBRARY, else what is beside this executable or in ../lib.
fn find_library() -> Result<PathBuf, Obstacle> {
    let places = match env::var_os("SOFTEFA_LIBRARY").filter(|path| !path.is_empty()) {
        Some(path) => vec![PathBuf::from(path)],
        None => {
            let executable = env::current_exe().unwrap_or_default();
            let up = |levels| executable.ancestors().nth(levels).unwrap_or(Path::new("/"));
            vec![up(1).join(LIBRARY), up(2).join("lib").join(LIBRARY)]
        }
    };
    let Some(found) = places.iter().find(|place| place.is_file()) else {
        let places: Vec<_> = places.iter().map(|place| place.to_string_lossy()).collect();
        return Err(cannot(format!(
            "the library to preload is not at {}; name it by SOFTEFA_LIBRARY",
            places.join(", nor at ")
        )));
    };
    let bad = |why: String| cannot(format!("{} cannot be preloaded: {why}", found.display()));
    // The command may be in another directory when it is loaded.
    let path = std::path::absolute(found).map_err(|error| bad(error.to_string()))?;
    if path.as_os_str().as_bytes().iter().any(|byte| b" :".contains(byte)) {
        return Err(bad("LD_PRELOAD separates its entries by spaces and colons".into()));
    }
    // The dynamic loader only warns of such, and the command would run without the NICs.
    if !is_shared_object(&path).map_err(|error| bad(error.to_string()))? {
        return Err(bad("it is not a shared object".into()));
    }
    Ok(path)
}

fn is_shared_object(path: &Path) -> io::Result<bool> {
    const ET_DYN: u8 = 3;
    let mut head = Vec::new();
    File::open(path)?.take(18).read_to_end(&mut head)?;
    Ok(head.starts_with(b"\x7fELF") && head.get(16) == Some(&ET_DYN))
}

/// The library first, then what was there.
fn preload(library: &Path, before: Option<OsString>) -> OsString {
    let library: &OsStr = library.as_os_str();
    let before = before.unwrap_or_default();
    let others = before.as_bytes().split(|byte| b" :".contains(byte));
    let others = others.filter(|entry| !entry.is_empty() && *entry != library.as_bytes());
    let entries: Vec<_> = std::iter::once(library.as_bytes()).chain(others).collect();
    OsString::from_vec(entries.join(&b':'))
}
