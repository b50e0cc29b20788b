//! Names for endpoints of the provider `shm`, which are files in `/dev/shm`.
//!
//! Its own names are made of the process id and a count. A process that is killed leaves its file behind, 16 MiB
//! and more, and libfabric refuses the name to the next one with that id ("Device or resource busy"); two
//! containers that share `/dev/shm` but not their process ids take each other's. So ours are unique, and say
//! who made them, for the file to be removed once that one is gone.

use std::hash::{BuildHasher, RandomState};
use std::path::Path;

/// Where the files are.
const DIRECTORY: &str = "/dev/shm";
/// What the provider's names begin with; the file's does not.
const PREFIX: &str = "fi_shm://";
const OURS: &str = "mefa";

/// A process, for all times and containers.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Owner {
    process: u32,
    /// Its namespace of process ids, as the kernel numbers them.
    namespace: u64,
    /// When it was started, in the kernel's ticks since boot.
    started: u64,
}

/// A name that no endpoint has or had. `None` where `/proc` does not tell who we are.
pub(super) fn name() -> Option<String> {
    let Owner { process, namespace, started } = Owner::ourselves()?;
    let random = RandomState::new().hash_one(process);
    // The process id comes first, as in the provider's own names.
    Some(format!("{PREFIX}{process}:{OURS}:{namespace:x}:{started:x}:{random:016x}"))
}

/// Removes the files of our processes that are gone.
pub(super) fn clean() {
    let Some(ourselves) = Owner::ourselves() else { return };
    for entry in std::fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(Owner::of);
        // Of another namespace's processes we cannot know whether they live.
        if owner.is_some_and(|owner| owner.namespace == ourselves.namespace && !owner.is_alive()) {
            // It may be another user's, who will do it himself.
            if std::fs::remove_file(entry.path()).is_ok() {
                log::info!("removed {}: its process was killed", entry.path().display());
            }
        }
    }
}

impl Owner {
    fn ourselves() -> Option<Self> {
        let process = std::process::id();
        let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
        // pid:[4026531836]
        let namespace = link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()?;
        Some(Self { process, namespace, started: started(process)? })
    }

    /// Whose a file is, if it is one of ours.
    fn of(file: &str) -> Option<Self> {
        let mut parts = file.split(':');
        let process = parts.next()?.parse().ok()?;
        (parts.next()? == OURS).then_some(())?;
        let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
        Some(Self { process, namespace: number()?, started: number()? })
    }

    /// In our own namespace.
    fn is_alive(self) -> bool {
        // Where /proc cannot be read nothing is removed.
        !Path::new("/proc/self/stat").exists() || started(self.process) == Some(self.started)
    }
}

/// When a process was started; `None` if it is not there, or dead and only not waited for.
fn started(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Its name is in parentheses and may have any in itself. After that: state, and 18 fields before this one.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    fields.nth(18).filter(|_| !dead)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn file(owner: Owner) -> std::path::PathBuf {
        let Owner { process, namespace, started } = owner;
        Path::new(DIRECTORY).join(format!("{process}:{OURS}:{namespace:x}:{started:x}:test"))
    }

    #[test]
    fn names_are_unique_and_say_whose_they_are() {
        let names = [name().expect("/proc"), name().expect("/proc")];
        assert_ne!(names[0], names[1]);
        for name in names {
            let owner = Owner::of(name.strip_prefix(PREFIX).expect("the provider's form"));
            assert!(owner == Owner::ourselves() && owner.is_some_and(Owner::is_alive));
        }
        for foreign in ["1:0:0", "17", "x:mefa:1:2:3", "1:mefa:1", "sem.mefa", "1:mefa:1:z:3"] {
            assert!(Owner::of(foreign).is_none(), "{foreign}");
        }
    }

    #[test]
    fn only_what_dead_processes_left_is_removed() {
        let ourselves = Owner::ourselves().expect("/proc");
        // A process that is dead, whether or not it was waited for.
        let mut child = Command::new("true").spawn().expect("started");
        let process = child.id();
        let dead = Owner { process, ..ourselves };
        while started(process).is_some() {
            std::thread::yield_now();
        }
        assert!(!dead.is_alive());
        child.wait().expect("it ended");
        // One with our number that was there before us; and those that are not ours to judge.
        let before = Owner { started: ourselves.started - 1, ..ourselves };
        let elsewhere = Owner { namespace: 1, ..dead };
        let files = [dead, before, ourselves, elsewhere].map(file);
        files.iter().for_each(|file| std::fs::write(file, "").expect("written"));
        clean();
        let left = files.each_ref().map(|file| file.exists());
        files.iter().for_each(|file| drop(std::fs::remove_file(file)));
        assert_eq!(left, [false, false, true, true]);
    }
}
