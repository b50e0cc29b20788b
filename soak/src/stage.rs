//! Emulated devices of a soak's own, and the processes on them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::node::{NodeSpec, Said};

/// Below this, so that shared state is in memory.
const PLACE: &str = "/dev/shm";
const PREFIX: &str = "mefa-soak-";
/// Smaller queues and tables than a host's, where the environment does not say otherwise: a process touches
/// 0.4 GiB instead of up to 1.5 when it starts, and some start again and again. And a window for messages, which the
/// transport does not send, as libfabric has it since 2.5: before, 64 or 128 KiB for every NIC of every peer.
const SMALL: [(&str, &str); 4] = [
    ("FI_EFA_RX_SIZE", "512"),
    ("FI_EFA_TX_SIZE", "512"),
    ("FI_EFA_RECVWIN_SIZE", "16"),
    ("MC_MAX_EP_PER_CTX", "2048"),
];
/// What begins the names of shared memory of libfabric's that emulated devices have part in.
const FOREIGN: &str = "fe80::5efa:";
/// Memory that nobody has mapped for so long is left over.
const LEFT_OVER: Duration = Duration::from_secs(10);

/// How devices are to be.
#[derive(Clone, Debug)]
pub struct Devices {
    /// The command `softefa`.
    pub softefa: PathBuf,
    /// NICs a host.
    pub nics: u8,
    /// `verbs` or `direct`.
    pub data_path: String,
    /// libfabric's version, of two numbers at least.
    pub libfabric: String,
    /// Leave the directory where it is at the end.
    pub keep: bool,
}

impl Devices {
    fn version(&self) -> (u32, u32) {
        let mut numbers = self.libfabric.split('.').map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }

    /// Whether the provider makes writes of reads by the target.
    pub fn emulates_writes(&self) -> bool {
        self.version() < (1, 18)
    }

    /// Whether posts can be refused as if the queue were full; if not, why.
    pub fn refusal(&self) -> Result<(), &'static str> {
        if self.data_path == "direct" {
            Err("where the queue is mapped into the provider, it knows itself how full it is")
        } else if self.version() < (1, 18) {
            Err(
                "this libfabric counts what it posts, and takes a refusal as the end of its endpoint",
            )
        } else {
            Ok(())
        }
    }
}

/// A directory with devices, names and logs. Removed when it is dropped.
pub struct Stage {
    devices: Devices,
    dir: PathBuf,
    environment: Vec<(&'static str, String)>,
}

/// What comes from a process: its number, and what it says; nothing more when its output ends.
pub type Heard = (usize, Option<Said>);

impl Stage {
    /// A fresh one; what a soak that was killed has left is removed.
    pub fn new(
        devices: &Devices,
        name: &str,
        environment: Vec<(&'static str, String)>,
    ) -> Result<Self> {
        clear_old()?;
        let dir = PathBuf::from(format!("{PLACE}/{PREFIX}{}-{name}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let stage = Self { devices: devices.clone(), dir, environment };
        for part in ["peers", "logs"] {
            fs::create_dir(stage.dir.join(part))?;
        }
        Ok(stage)
    }

    /// Where names are.
    pub fn peers(&self) -> PathBuf {
        self.dir.join("peers")
    }

    /// Where the devices are.
    pub fn efa(&self) -> PathBuf {
        self.dir.join("efa")
    }

    /// Replaces the fault rules; their times count from now.
    pub fn faults(&self, seed: u64, rules: &[String]) -> Result<()> {
        let script = self.dir.join("script");
        fs::write(&script, format!("seed {seed}\n{}\n", rules.join("\n")))?;
        let mut command = Command::new(&self.devices.softefa);
        command.arg("ctl").arg("--dir").arg(self.efa()).arg("load").arg(&script);
        let status = command.status().context("softefa cannot be run")?;
        anyhow::ensure!(status.success(), "softefa ctl load: {status}");
        Ok(())
    }

    /// Removes the record of faults that have happened, which is for replaying them and grows without end.
    pub fn forget_record(&self) {
        // Nothing may have happened yet.
        let _ = fs::remove_file(self.efa().join("recorded"));
    }

    /// Starts a node, on the host of that number, with so many NICs. What it says goes `to`, under `number`.
    pub fn start(
        &self,
        number: usize,
        spec: &NodeSpec,
        host: u16,
        nics: u8,
        to: &Sender<Heard>,
    ) -> Result<Process> {
        let log = self.dir.join("logs").join(&spec.name);
        let log_file = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&self.devices.softefa);
        command.arg("run").arg("--dir").arg(self.efa());
        command.args(["--nics", &nics.to_string(), "--host", &host.to_string()]);
        command.args(["--data-path", &self.devices.data_path, "--"]);
        command.arg(std::env::current_exe()?).args(["node", &serde_json::to_string(spec)?]);
        for (name, value) in SMALL.into_iter().filter(|(name, _)| std::env::var_os(name).is_none())
        {
            command.env(name, value);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_file);
        let mut child = command.spawn().context("softefa cannot be run")?;
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let to = to.clone();
        std::thread::spawn(move || {
            for line in output.lines().map_while(std::result::Result::ok) {
                // A process that is killed may leave half a line.
                if let Ok(said) = serde_json::from_str(&line) {
                    let _ = to.send((number, Some(said)));
                }
            }
            let _ = to.send((number, None));
        });
        Ok(Process { child, log })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.devices.keep {
            eprintln!("soak: left {}", self.dir.display());
        } else if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("soak: cannot remove {}: {error}", self.dir.display());
        }
        clear_shared_memory();
    }
}

/// Removes directories of soaks that are gone.
fn clear_old() -> Result<()> {
    for entry in fs::read_dir(PLACE)?.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(pid).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Removes shared memory that libfabric made for emulated devices and that no process has any more: those that
/// are killed leave 16 MiB a NIC.
pub fn clear_shared_memory() {
    let is_old = |entry: &fs::DirEntry| {
        let age = entry.metadata().and_then(|it| it.modified()).map(|time| time.elapsed());
        matches!(age, Ok(Ok(age)) if age > LEFT_OVER)
    };
    let entries = fs::read_dir(PLACE).into_iter().flatten().flatten().filter(is_old);
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(FOREIGN)).collect();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if names.is_empty() {
            return;
        }
        if let Ok(maps) = fs::read_to_string(process.path().join("maps")) {
            names.retain(|name| !maps.contains(name.as_str()));
        }
    }
    remove_shared(|name| names.iter().any(|it| it == name));
}

fn remove_shared(is_it: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(PLACE).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(&is_it) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A process of ours. Killed when it is dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its number in the system.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it something: `begin` or `end`.
    pub fn tell(&mut self, what: &str) {
        if let Some(stdin) = &mut self.child.stdin {
            // It may have ended already.
            let _ = writeln!(stdin, "{what}");
        }
    }

    /// SIGKILL; returns when it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Shared memory of its libfabric, which nobody else knows.
        let own = format!("{}:", self.pid());
        remove_shared(|name| name.starts_with(&own));
    }

    /// Its exit status, once its output has ended.
    pub fn status(&mut self) -> Result<ExitStatus> {
        let limit = Instant::now() + Duration::from_secs(5);
        while Instant::now() < limit {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("it has closed its output and goes on")
    }

    /// The last lines of its log.
    pub fn last_words(&self, lines: usize) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Where its threads are: their stacks where there is a gdb, else as far as the system says.
    pub fn threads(&self) -> String {
        let mut gdb = Command::new("gdb");
        gdb.args(["-p", &self.pid().to_string(), "-batch", "-ex", "thread apply all backtrace 24"]);
        if let Ok(output) = gdb.stdin(Stdio::null()).output() {
            let text = String::from_utf8_lossy(&output.stdout);
            let is_stack = |line: &&str| line.starts_with("Thread") || line.starts_with('#');
            // Rust's own frames around a thread say nothing.
            let is_own = |line: &&str| !line.contains("/library/");
            let lines = text.lines().filter(is_stack).filter(is_own);
            return lines.map(|line| format!("\n    {line}")).collect();
        }
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()));
        let tasks = tasks.into_iter().flatten().flatten().map(|task| {
            let read = |what| fs::read_to_string(task.path().join(what)).unwrap_or_default();
            let (name, wait, call) = (read("comm"), read("wchan"), read("syscall"));
            format!("{} in {} ({})", name.trim(), wait.trim(), call.split(' ').next().unwrap_or(""))
        });
        tasks.collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
