//! The processes that share emulated NICs: a directory (in memory, below /dev/shm by default) with a
//! table of processes, a file a NIC, the fault rules, and a `/sys` a host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::ring::Owner;
use crate::shared::{NicShared, VERSION};

/// Processes that a cluster can have at a time.
const PROCESSES: usize = 4096;
/// Hosts that are numbered by themselves, by network namespace.
const HOSTS: usize = 1024;

/// Why a cluster cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system said so.
    #[error("softefa: {0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// Two users, one directory.
    #[error(
        "softefa: {0} belongs to user {1}, this is user {2}: set SOFTEFA_DIR to a directory of your own"
    )]
    Foreign(PathBuf, u32, u32),
    /// Running processes of another build.
    #[error(
        "softefa: {0} is in use by processes of another version of libsoftefa.so: end them, or set SOFTEFA_DIR"
    )]
    Version(PathBuf),
    /// More than the table holds.
    #[error("softefa: {0}: more than {PROCESSES} processes")]
    Crowded(PathBuf),
}

/// `SOFTEFA_DIR`, else a directory of this user's below /dev/shm.
pub fn default_dir() -> PathBuf {
    match std::env::var_os("SOFTEFA_DIR") {
        Some(dir) if !dir.is_empty() => dir.into(),
        // SAFETY: getuid has no way to fail.
        _ => format!("/dev/shm/softefa-{}", unsafe { libc::getuid() }).into(),
    }
}

#[repr(C)]
struct Process {
    pid: AtomicU32,
    /// Tells this user of the slot from the one before.
    generation: AtomicU32,
    /// When the process began, in clock ticks since boot: a process id may come again.
    start: AtomicU64,
    /// Counts wake-ups; what the process's helper thread sleeps on.
    wakes: AtomicU32,
    _pad: AtomicU32,
}

#[repr(C)]
struct Table {
    version: AtomicU64,
    /// Grows whenever the fault rules change.
    faults: AtomicU32,
    _pad: AtomicU32,
    /// Network namespaces, by host number.
    hosts: [AtomicU64; HOSTS],
    processes: [Process; PROCESSES],
}

/// A directory and the table in it.
pub struct Cluster {
    dir: PathBuf,
    table: &'static Table,
    /// Holds a shared lock as long as this process lives: somebody uses the directory.
    _users: File,
}

fn lock(file: &File, how: i32) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn open_rw(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Holds the file at `path` until what is returned is dropped: one process at a time does, and the
/// kernel lets go of it if that one is killed.
///
/// # Errors
/// The file cannot be made or locked.
pub fn hold(path: &Path) -> Result<File, Error> {
    open_rw(path)
        .and_then(|file| lock(&file, libc::LOCK_EX).map(|()| file))
        .map_err(|error| Error::Io(path.to_owned(), error))
}

/// Maps a file of at least `size_of::<T>()` bytes for good.
///
/// # Safety
/// `T` consists of atomics and of cells that the callers guard, and zeroes are a value of it.
unsafe fn map<T>(file: &File) -> io::Result<&'static T> {
    let length = size_of::<T>();
    if file.metadata()?.len() < length as u64 {
        file.set_len(length as u64)?;
    }
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: mapped for as long as the process lives, of the right size, aligned to a page.
    Ok(unsafe { &*at.cast::<T>() })
}

impl Cluster {
    /// Opens the directory to take part, making it if need be. What processes left there that are
    /// gone is removed if nobody uses it now; the fault rules stay.
    ///
    /// # Errors
    /// See [`Error`]; nothing is changed then.
    pub fn open(dir: &Path) -> Result<Cluster, Error> {
        Cluster::enter(dir, true)
    }

    /// Opens the directory to look at it: what the last processes left is left.
    ///
    /// # Errors
    /// See [`Error`]; nothing is changed then.
    pub fn look(dir: &Path) -> Result<Cluster, Error> {
        Cluster::enter(dir, false)
    }

    fn enter(dir: &Path, clean: bool) -> Result<Cluster, Error> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| Error::Io(path, error)
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
        // SAFETY: getuid has no way to fail.
        let me = unsafe { libc::getuid() };
        let owner = fs::metadata(dir).map_err(at(dir))?.uid();
        if owner != me && me != 0 {
            return Err(Error::Foreign(dir.to_owned(), owner, me));
        }
        let _guard = hold(&dir.join("guard"))?;
        let users = dir.join("users");
        let users_file = open_rw(&users).map_err(at(&users))?;
        let alone = lock(&users_file, libc::LOCK_EX | libc::LOCK_NB).is_ok();
        let path = dir.join("cluster");
        if alone && clean {
            for entry in fs::read_dir(dir).map_err(at(dir))?.flatten() {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if name == "cluster" || name.starts_with("nic-") {
                    fs::remove_file(entry.path()).map_err(at(&entry.path()))?;
                } else if name.starts_with("sys-") {
                    fs::remove_dir_all(entry.path()).map_err(at(&entry.path()))?;
                }
            }
        }
        lock(&users_file, libc::LOCK_SH).map_err(at(&users))?;
        let file = open_rw(&path).map_err(at(&path))?;
        // SAFETY: atomics only.
        let table: &Table = unsafe { map(&file) }.map_err(at(&path))?;
        // A fresh table has zeroes.
        let _ = table.version.compare_exchange(0, VERSION, Ordering::Relaxed, Ordering::Relaxed);
        if table.version.load(Ordering::Relaxed) != VERSION {
            return Err(Error::Version(dir.to_owned()));
        }
        Ok(Cluster { dir: dir.to_owned(), table, _users: users_file })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Enters the calling process in the table. To be repeated by a child after fork.
    ///
    /// # Errors
    /// The table is full of living processes.
    pub fn join(&self) -> Result<Owner, Error> {
        // A place that is half taken looks like a dead one's: one at a time.
        let _guard = hold(&self.dir.join("guard"))?;
        let pid = std::process::id();
        for (index, process) in self.table.processes.iter().enumerate().skip(1) {
            let before = process.pid.load(Ordering::Acquire);
            if before != 0
                && self.is_alive(owner(index, process.generation.load(Ordering::Relaxed)))
            {
                continue;
            }
            if process
                .pid
                .compare_exchange(before, pid, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                let generation = process.generation.fetch_add(1, Ordering::AcqRel) + 1;
                process.start.store(start_of(pid).unwrap_or(0), Ordering::Release);
                return Ok(owner(index, generation));
            }
        }
        Err(Error::Crowded(self.dir.clone()))
    }

    fn process(&self, owner: Owner) -> Option<&'static Process> {
        let process = &self.table.processes[owner as usize % PROCESSES];
        (owner != 0
            && process.generation.load(Ordering::Acquire) & GENERATIONS == owner / PROCESSES as u32)
            .then_some(process)
    }

    /// The process id, if that process has its place still; it may be dead.
    pub fn pid(&self, owner: Owner) -> Option<u32> {
        Some(self.process(owner)?.pid.load(Ordering::Relaxed))
    }

    /// Does this process live? Two system calls.
    pub fn is_alive(&self, owner: Owner) -> bool {
        let Some(process) = self.process(owner) else { return false };
        let start = process.start.load(Ordering::Acquire);
        match start_of(process.pid.load(Ordering::Relaxed)) {
            // 0: it has not said yet.
            Some(now) => start == 0 || start == now,
            None => false,
        }
    }

    /// Wakes that process's helper thread.
    pub fn wake(&self, owner: Owner) {
        let Some(process) = self.process(owner) else { return };
        process.wakes.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the word is mapped for good.
        unsafe {
            libc::syscall(libc::SYS_futex, process.wakes.as_ptr(), libc::FUTEX_WAKE, i32::MAX)
        };
    }

    /// How often it was woken so far; for [`Cluster::sleep`].
    pub fn wakes(&self, owner: Owner) -> u32 {
        self.process(owner).map_or(0, |process| process.wakes.load(Ordering::SeqCst))
    }

    /// Sleeps until this process is woken more often than `seen`, or `ns` nanoseconds have passed.
    pub fn sleep(&self, owner: Owner, seen: u32, ns: u64) {
        let Some(process) = self.process(owner) else { return };
        let timeout = libc::timespec {
            tv_sec: (ns / 1_000_000_000) as _,
            tv_nsec: (ns % 1_000_000_000) as _,
        };
        // SAFETY: word and timeout live through the call.
        unsafe {
            libc::syscall(libc::SYS_futex, process.wakes.as_ptr(), libc::FUTEX_WAIT, seen, &timeout)
        };
    }

    /// The number of this host, if it was not given one: each network namespace is a host, in the
    /// order in which they come.
    pub fn host_of_namespace(&self) -> u16 {
        let here = fs::metadata("/proc/self/ns/net").map_or(1, |namespace| namespace.ino());
        for (number, host) in self.table.hosts.iter().enumerate() {
            match host.compare_exchange(0, here, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return number as u16,
                Err(there) if there == here => return number as u16,
                Err(_) => {}
            }
        }
        0
    }

    /// A NIC's state, mapped for good. `create`: makes it if nobody has yet; otherwise that is an
    /// error of kind NotFound.
    pub fn nic(&self, host: u16, nic: u16, create: bool) -> io::Result<&'static NicShared> {
        let path = self.dir.join(format!("nic-{host}-{nic}"));
        let file =
            OpenOptions::new().read(true).write(true).create(create).mode(0o600).open(path)?;
        // SAFETY: atomics, and payload that the rings guard.
        unsafe { map(&file) }
    }

    /// The NICs that there are, as (host, nic), sorted.
    pub fn nics(&self) -> io::Result<Vec<(u16, u16)>> {
        let mut nics: Vec<_> = fs::read_dir(&self.dir)?
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (host, nic) = name.strip_prefix("nic-")?.split_once('-')?;
                Some((host.parse().ok()?, nic.parse().ok()?))
            })
            .collect();
        nics.sort_unstable();
        Ok(nics)
    }

    /// The fault rules as they were set; empty if none.
    pub fn faults(&self) -> io::Result<String> {
        match fs::read_to_string(self.dir.join("faults")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            other => other,
        }
    }

    /// Replaces the fault rules; every process sees it at its next operation.
    pub fn set_faults(&self, text: &str) -> io::Result<()> {
        let new = self.dir.join(format!("faults.{}", std::process::id()));
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&new, self.dir.join("faults"))?;
        self.table.faults.fetch_add(1, Ordering::SeqCst);
        for (index, process) in self.table.processes.iter().enumerate().skip(1) {
            if process.pid.load(Ordering::Relaxed) != 0 {
                self.wake(owner(index, process.generation.load(Ordering::Relaxed)));
            }
        }
        Ok(())
    }

    /// Grows with every [`Cluster::set_faults`].
    pub fn faults_version(&self) -> u32 {
        self.table.faults.load(Ordering::Relaxed)
    }
}

const GENERATIONS: u32 = u32::MAX / PROCESSES as u32;

fn owner(index: usize, generation: u32) -> Owner {
    (generation & GENERATIONS) * PROCESSES as u32 + index as u32
}

fn clock(which: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists and the result is ours.
    unsafe { libc::clock_gettime(which, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// CLOCK_MONOTONIC in nanoseconds, which all processes of a cluster read alike.
pub fn now() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// The same, a few milliseconds behind, in a few nanoseconds.
pub fn coarse_now() -> u64 {
    clock(libc::CLOCK_MONOTONIC_COARSE)
}

/// When that process began, in clock ticks since boot. None: there is none, or only a zombie.
fn start_of(pid: u32) -> Option<u64> {
    if pid == 0 {
        return None;
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; state is the first word after it, start the 20th.
    let mut words = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(words.next()?, "Z" | "X") {
        return None;
    }
    words.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn child() -> std::process::Child {
        std::process::Command::new("sleep").arg("100").spawn().unwrap()
    }

    #[test]
    fn a_dead_process_is_told_from_a_living_one_and_from_its_successor() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::open(dir.path()).unwrap();
        let me = cluster.join().unwrap();
        assert!(cluster.is_alive(me));
        assert_eq!(cluster.pid(me), Some(std::process::id()));
        let mut other = child();
        let process = &cluster.table.processes[5];
        process.pid.store(other.id(), Ordering::Relaxed);
        process.start.store(start_of(other.id()).unwrap(), Ordering::Relaxed);
        let it = owner(5, 0);
        assert!(cluster.is_alive(it));
        process.start.fetch_add(1, Ordering::Relaxed);
        assert!(!cluster.is_alive(it), "another process with this id");
        process.start.fetch_sub(1, Ordering::Relaxed);
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!cluster.is_alive(it));
        let next: Vec<_> = (0..6).map(|_| cluster.join().unwrap()).collect();
        assert!(
            next.iter().any(|owner| *owner as usize % PROCESSES == 5),
            "its place is free again"
        );
        assert!(
            !cluster.is_alive(it) && cluster.pid(it).is_none(),
            "and it is not the one who has it now"
        );
        assert!(!cluster.is_alive(0));
    }

    #[test]
    fn what_was_left_goes_when_nobody_is_there_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let first = Cluster::open(dir.path()).unwrap();
        first.nic(0, 0, true).unwrap().take_qp(1).unwrap();
        first.set_faults("down nic=0\n").unwrap();
        let second = Cluster::open(dir.path()).unwrap();
        assert_eq!(second.nics().unwrap(), [(0, 0)]);
        assert_eq!(first.nic(0, 1, false).err().map(|e| e.kind()), Some(io::ErrorKind::NotFound));
        drop((first, second));
        assert_eq!(Cluster::look(dir.path()).unwrap().nics().unwrap(), [(0, 0)]);
        // A child that another test starts just now has our files open until it runs its program.
        let limit = Instant::now() + Duration::from_secs(10);
        let third = loop {
            let third = Cluster::open(dir.path()).unwrap();
            if third.nics().unwrap().is_empty() || Instant::now() > limit {
                break third;
            }
        };
        assert_eq!(third.nics().unwrap(), []);
        assert_eq!(third.faults().unwrap(), "down nic=0\n");
    }

    #[test]
    fn a_change_of_rules_is_seen_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (Cluster::open(dir.path()).unwrap(), Cluster::open(dir.path()).unwrap());
        let before = two.faults_version();
        one.set_faults("lose\n").unwrap();
        assert_ne!(two.faults_version(), before);
        assert_eq!(two.faults().unwrap(), "lose\n");
    }
}
