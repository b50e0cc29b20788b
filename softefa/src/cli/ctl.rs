//! `softefa ctl`: the cluster's fault rules.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;
use softefa::cluster::{self, Cluster, default_dir, now};
use softefa::rules::{ParseError, Rule, Script};

const HELP: &str = "\
WORDS are one of
  (none)               list the rules, numbered
  FAULT ATTRIBUTES...  add a rule
  seed N               what rules with a rate draw from (default 0)
  clear [N]            remove all rules and the seed, or rule N of the list
  load FILE            replace all by a script: a rule a line, # comments
  up [host=] [nic=]    end `down` for these NICs, or for all

Faults of operations
  error status=N       ends with EFA status N and is not executed: 1 to 255, flushed, lkey,
                       bad-length, bad-addr, abort, bad-qpn, rnr, remote-bad-length, unresp, unreach
  lose                 is executed, and its completion never delivered
  delay by=D           its completion comes D later (200us, 2ms, 1s)
  hold by=D            is executed D later: until then it moves no byte, and may do so any time
  reorder              is executed later than those posted after it
  full                 its post is refused as if the queue were full
  rnr                  the receiver is not ready
  corrupt              one byte of its payload is flipped where it arrives
  kill                 SIGKILL to the process that it goes to, before it
States of NICs
  down                 the port is down
  silent               neither answers nor sends
  link gbps=N latency=D  how fast it is; one of the two is enough

Where (lists, as in nic=0-3,5)
  host= nic= qp=       the initiator; for states the NIC itself, without qp
  peer=                host of the destination
  op=                  send, read, write, recv; without it all but recv
When (all that are given must hold; for states only from and until)
  rate=                0.005 or 0.5%; the same seed gives the same faults
  at= every= after=    the Nth operations of a queue pair; every Nth; only later than the Nth
  count=               at most N times a queue pair
  from= until=         D since the rule was set

What happened to operations is appended to `recorded` in the directory as rules that make exactly
that happen again: load a copy of it to replay.

Examples:
  softefa ctl error status=unresp rate=0.5% host=0
  softefa ctl delay by=200us nic=0-3 op=write
  softefa ctl down host=1 nic=2 from=2s until=5s
  softefa ctl kill peer=1 at=1000";

/// Flags of `softefa ctl`.
#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// The cluster's directory (default: SOFTEFA_DIR, else /dev/shm/softefa-UID)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// List the rules as JSON
    #[arg(long, conflicts_with = "words")]
    json: bool,
    /// What to do; see below
    #[arg(value_name = "WORDS")]
    words: Vec<String>,
}

/// Why the faults cannot be shown or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It says itself that it is of softefa.
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    /// A rule that was given.
    #[error("softefa: {0}")]
    Rule(#[from] ParseError),
    /// A script; the one stored is named too.
    #[error("softefa: {0}: {1}")]
    Script(PathBuf, #[source] ParseError),
    /// A file that cannot be read or written.
    #[error("softefa: {0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// `clear` of nothing.
    #[error("softefa: clear {0}: there is no rule of that number, see `softefa ctl`")]
    NoRule(String),
    /// Words too many or too few.
    #[error("softefa: {0}")]
    Words(&'static str),
}

impl Error {
    /// What was asked is wrong, rather than what came of it.
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Rule(_) | Error::Script(..) | Error::NoRule(_) | Error::Words(_))
    }
}

/// Does what the words say.
pub fn run(args: &Args) -> Result<(), Error> {
    let faults = || Faults::open(&args.dir.clone().unwrap_or_else(default_dir));
    let words: Vec<&str> = args.words.iter().map(String::as_str).collect();
    match words[..] {
        [] => list(&faults()?.get()?, args.json),
        ["clear"] => faults()?.replace(&Script::default())?,
        ["clear", which] => faults()?.change(|script| {
            let index = which.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
            let index = index.filter(|index| *index < script.rules.len());
            script.rules.remove(index.ok_or_else(|| Error::NoRule(which.into()))?);
            Ok(())
        })?,
        ["load", file] => {
            let script = read_script(Path::new(file))?;
            faults()?.replace(&script)?;
        }
        ["clear", ..] => return Err(Error::Words("`clear` takes at most the number of one rule")),
        ["load", ..] => return Err(Error::Words("`load` takes one file")),
        ["up", ref places @ ..] => {
            faults()?.change(|script| Ok(script.up(&places.join(" "))?))?;
        }
        // Looked at before anything is opened.
        ref words => {
            let rule = words.join(" ");
            Script::default().add(&rule, 0)?;
            faults()?.change(|script| Ok(script.add(&rule, now())?))?;
        }
    }
    Ok(())
}

/// A script as people write it.
pub fn read_script(path: &Path) -> Result<Script, Error> {
    let text = fs::read_to_string(path).map_err(|error| Error::Io(path.into(), error))?;
    Script::parse(&text).map_err(|error| Error::Script(path.into(), error))
}

fn list(script: &Script, as_json: bool) {
    let time = now();
    let age = |rule: &Rule| time.saturating_sub(rule.set().unwrap_or(time)) / 1_000_000_000;
    let rules = script.rules.iter().zip(1..);
    if as_json {
        let rules = rules.map(|(rule, number)| {
            let written = rule.clone().without_set().to_string();
            json!({ "number": number, "rule": written, "seconds": age(rule) })
        });
        println!("{}", json!({ "seed": script.seed, "rules": rules.collect::<Vec<_>>() }));
        return;
    }
    if script.seed != 0 {
        println!("   seed {}", script.seed);
    }
    for (rule, number) in rules {
        println!("{number:>2} {}  # set {} s ago", rule.clone().without_set(), age(rule));
    }
}

/// A cluster's rules.
pub struct Faults {
    dir: PathBuf,
    cluster: Cluster,
}

impl Faults {
    /// Those of the cluster in `dir`, which is made if need be.
    pub fn open(dir: &Path) -> Result<Faults, Error> {
        Ok(Faults { dir: dir.into(), cluster: Cluster::look(dir)? })
    }

    fn path(&self) -> PathBuf {
        self.dir.join("faults")
    }

    fn get(&self) -> Result<Script, Error> {
        let text = self.cluster.faults().map_err(|error| Error::Io(self.path(), error))?;
        Script::parse(&text).map_err(|error| Error::Script(self.path(), error))
    }

    fn put(&self, script: &Script) -> Result<(), Error> {
        let put = self.cluster.set_faults(&script.to_string());
        put.map_err(|error| Error::Io(self.path(), error))
    }

    /// Sets a whole script, as of now. What was there need not even be readable.
    pub fn replace(&self, script: &Script) -> Result<(), Error> {
        let _guard = self.lock()?;
        let time = now();
        let rules = script.rules.iter().map(|rule| rule.clone().with_set(time)).collect();
        self.put(&Script { seed: script.seed, rules })
    }

    fn change(&self, how: impl FnOnce(&mut Script) -> Result<(), Error>) -> Result<(), Error> {
        let _guard = self.lock()?;
        let mut script = self.get()?;
        how(&mut script)?;
        self.put(&script)
    }

    /// Until the file is closed nobody else changes the rules.
    fn lock(&self) -> Result<File, Error> {
        Ok(cluster::hold(&self.dir.join("faults.lock"))?)
    }
}
