//! Names for endpoints of the provider `shm`, which are files in `/dev/shm`.
//!
//! Its own names are made of the process id and a count. A process that is killed leaves its file behind, 16 MiB
//! and more, and libfabric refuses the name to the next one with that id ("Device or resource busy"); two
//! containers that share `/dev/shm` but not their process ids take each other's. So ours are unique, and say
//! who made them, for the file to be removed once that one is gone.

use std::hash::{BuildHasher, RandomState};
use std::path::Path;

use super::process::{self, Process};

/// Where the files are.
const DIRECTORY: &str = "/dev/shm";
/// What the provider's names begin with; the file's does not.
const PREFIX: &str = "fi_shm://";
const OURS: &str = "mefa";

/// A name that no endpoint has or had. `None` where `/proc` does not tell who we are.
pub(super) fn name() -> Option<String> {
    let Process { id, namespace, started, .. } = Process::ourselves()?;
    let random = RandomState::new().hash_one(id);
    // The process id comes first, as in the provider's own names.
    Some(format!("{PREFIX}{id}:{OURS}:{namespace:x}:{started:x}:{random:016x}"))
}

/// Removes the files of our processes that are gone.
pub(super) fn clean() {
    let Some(ourselves) = Process::ourselves() else { return };
    for entry in std::fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(owner);
        // Of another namespace's processes we cannot know whether they live.
        if owner.is_some_and(|owner| owner.namespace == ourselves.namespace && !owner.is_alive()) {
            // It may be another user's, who will do it himself.
            if std::fs::remove_file(entry.path()).is_ok() {
                log::info!("removed {}: its process was killed", entry.path().display());
            }
        }
    }
}

/// Whether the endpoint with this address, the provider's text with its NUL, is known not to be there any more.
pub(super) fn is_gone(address: &[u8]) -> bool {
    let text = std::str::from_utf8(address).ok().map(|text| text.trim_end_matches('\0'));
    let Some(file) = text.and_then(|text| text.strip_prefix(PREFIX)) else { return false };
    let Some((owner, ourselves)) = owner(file).zip(Process::ourselves()) else { return false };
    owner.is_near(&ourselves) && (!owner.is_alive() || !Path::new(DIRECTORY).join(file).exists())
}

/// Whose a file is, if it is one of ours.
fn owner(file: &str) -> Option<Process> {
    let mut parts = file.split(':');
    let id = parts.next()?.parse().ok()?;
    (parts.next()? == OURS).then_some(())?;
    let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
    Some(Process { id, namespace: number()?, started: number()?, boot: process::boot() })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn file(owner: Process) -> std::path::PathBuf {
        let Process { id, namespace, started, .. } = owner;
        Path::new(DIRECTORY).join(format!("{id}:{OURS}:{namespace:x}:{started:x}:test"))
    }

    #[test]
    fn names_are_unique_and_say_whose_they_are() {
        let names = [name().expect("/proc"), name().expect("/proc")];
        assert_ne!(names[0], names[1]);
        for name in names {
            let owner = owner(name.strip_prefix(PREFIX).expect("the provider's form"));
            assert!(owner == Process::ourselves() && owner.is_some_and(|owner| owner.is_alive()));
        }
        for foreign in ["1:0:0", "17", "x:mefa:1:2:3", "1:mefa:1", "sem.mefa", "1:mefa:1:z:3"] {
            assert!(owner(foreign).is_none(), "{foreign}");
        }
    }

    #[test]
    fn only_what_dead_processes_left_is_removed() {
        let ourselves = Process::ourselves().expect("/proc");
        // A process that is dead, whether or not it was waited for.
        let mut child = Command::new("true").spawn().expect("started");
        let dead = Process { id: child.id(), ..ourselves };
        while process::started(dead.id).is_some() {
            std::thread::yield_now();
        }
        assert!(!dead.is_alive());
        child.wait().expect("it ended");
        // One with our number that was there before us; and those that are not ours to judge.
        let before = Process { started: ourselves.started - 1, ..ourselves };
        let elsewhere = Process { namespace: 1, ..dead };
        let files = [dead, before, ourselves, elsewhere].map(file);
        files.iter().for_each(|file| std::fs::write(file, "").expect("written"));
        clean();
        let left = files.each_ref().map(|file| file.exists());
        files.iter().for_each(|file| drop(std::fs::remove_file(file)));
        assert_eq!(left, [false, false, true, true]);
    }
}
