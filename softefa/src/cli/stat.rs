//! `softefa stat`: what the NICs have counted.

use std::io;
use std::path::PathBuf;

use softefa::cluster::{self, Cluster, default_dir};
use softefa::stat;

const HELP: &str = "\
Counters of a NIC are the sums over its queue pairs, those that are gone included; only counters other
than 0 are shown. They stay until the next process begins with nobody else there.

  sends reads writes receives   posted
  sent_bytes read_bytes written_bytes
  packets received_bytes        that arrived for receives
  errors                        completions with a status other than 0
  rnr                           work requests that met a receiver without a receive
  refused                       posts refused because the queue was full
  deferred                      work requests that had to wait
  faults                        injected
  overruns                      completions lost because their queue was full";

/// Flags of `softefa stat`.
#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// The cluster's directory (default: SOFTEFA_DIR, else /dev/shm/softefa-UID)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// As JSON: an array of NICs
    #[arg(long)]
    json: bool,
}

/// Prints them.
pub fn run(args: &Args) -> Result<(), cluster::Error> {
    let dir = args.dir.clone().unwrap_or_else(default_dir);
    let io = |error: io::Error| cluster::Error::Io(dir.clone(), error);
    if !dir.is_dir() {
        return Err(io(io::ErrorKind::NotFound.into()));
    }
    let nics = stat::read(&Cluster::look(&dir)?).map_err(io)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&nics).expect("numbers and texts"));
    } else if nics.is_empty() {
        println!("{}: no NIC was opened", dir.display());
    } else {
        print!("{}", stat::text(&nics));
    }
    Ok(())
}
