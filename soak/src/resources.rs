//! What processes hold: memory, file descriptors, threads.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// What a process holds at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Resident memory, KiB.
    pub rss_kib: u64,
    /// Without the emulated devices' files, and without what the soak itself keeps on purpose, KiB: this may not
    /// grow.
    pub own_kib: u64,
    /// Open file descriptors.
    pub fds: u64,
    /// Threads.
    pub threads: u64,
}

impl Sample {
    /// That of a process, of which files in `devices` and `kept` bytes count apart; `None` if it is gone.
    pub fn of(pid: u32, devices: &Path, kept: u64) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let rss_kib = field("VmRSS:")?;
        let apart = resident_files(pid, devices)? + kept / 1024;
        Some(Self {
            rss_kib,
            own_kib: rss_kib.saturating_sub(apart),
            threads: field("Threads:")?,
            fds: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64,
        })
    }
}

/// How much of the files in a directory a process has mapped and resident, KiB.
fn resident_files(pid: u32, dir: &Path) -> Option<u64> {
    let dir = format!("{}/", dir.to_str()?);
    let (mut sum, mut inside) = (0, false);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?.lines() {
        let mut words = line.split_whitespace();
        let first = words.next()?;
        if !first.ends_with(':') {
            // The first line of a mapping: addresses, permissions, offset, device, inode, file.
            inside = words.nth(4).is_some_and(|file| file.starts_with(&dir));
        } else if inside && first == "Rss:" {
            sum += words.next()?.parse::<u64>().ok()?;
        }
    }
    Some(sum)
}

/// Medians of quarters of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Growth {
    /// How many there were.
    pub samples: usize,
    /// Of the first.
    pub first: Sample,
    /// Of the second: pools and caches have got their size.
    pub second: Sample,
    /// Of the last.
    pub last: Sample,
}

/// Fewer seconds than this say nothing: pools and caches get their size.
const LEAST: usize = 100;
/// Its own memory may grow by so much: caches, the allocator, stacks used for the first time.
const OWN_KIB: u64 = 16 << 10;
/// Descriptors and threads that come and go.
const SOME: u64 = 2;

impl Growth {
    /// `None` for too few samples to tell.
    pub fn of(samples: &[Sample]) -> Option<Self> {
        let quarter = samples.len() / 4;
        let median = |samples: &[Sample]| {
            let middle = |of: fn(&Sample) -> u64| {
                let mut values: Vec<u64> = samples.iter().map(of).collect();
                values.sort_unstable();
                values[values.len() / 2]
            };
            Sample {
                rss_kib: middle(|it| it.rss_kib),
                own_kib: middle(|it| it.own_kib),
                fds: middle(|it| it.fds),
                threads: middle(|it| it.threads),
            }
        };
        (quarter > 0).then(|| Self {
            samples: samples.len(),
            first: median(&samples[..quarter]),
            second: median(&samples[quarter..2 * quarter]),
            last: median(&samples[samples.len() - quarter..]),
        })
    }

    /// Whether it is no more than chance, since the second quarter, or too short to tell.
    pub fn is_flat(&self) -> bool {
        self.samples < LEAST
            || self.last.own_kib <= self.second.own_kib + OWN_KIB
                && self.last.fds <= self.second.fds + SOME
                && self.last.threads <= self.second.threads + SOME
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_seen() {
        let at = |own_kib, fds| Sample { rss_kib: own_kib, own_kib, fds, threads: 4 };
        assert_eq!(Growth::of(&[at(1, 1); 3]), None);
        let flat: Vec<_> = (0..400).map(|second| at(100_000 + second % 7, 20)).collect();
        assert!(Growth::of(&flat).expect("enough").is_flat());
        let pool: Vec<_> = (0..400).map(|second| at(100_000 + second.min(90) * 900, 20)).collect();
        assert!(Growth::of(&pool).expect("enough").is_flat());
        let rss: Vec<_> = (0..400).map(|second| at(100_000 + second * 100, 20)).collect();
        assert!(!Growth::of(&rss).expect("enough").is_flat());
        let fds: Vec<_> = (0..400).map(|second| at(100_000, 20 + second / 50)).collect();
        assert!(!Growth::of(&fds).expect("enough").is_flat());
        let apart: Vec<_> =
            (0..400).map(|second| Sample { rss_kib: second * 1000, ..at(100_000, 20) }).collect();
        assert!(Growth::of(&apart).expect("enough").is_flat());
    }

    #[test]
    fn this_process_is_seen() {
        let here = Sample::of(std::process::id(), Path::new("/nowhere"), 0).expect("it runs");
        assert!(here.rss_kib > 0 && here.fds >= 3 && here.threads >= 1);
        assert_eq!(here.own_kib, here.rss_kib);
    }

    #[test]
    fn files_of_devices_and_what_is_kept_count_apart() {
        let exe = std::env::current_exe().expect("it has a file");
        let pid = std::process::id();
        // Our own program stands for a device: it is mapped, and in part resident.
        let files = resident_files(pid, exe.parent().expect("it is in one")).expect("it runs");
        assert!(files > 0);
        assert_eq!(resident_files(pid, Path::new("/nowhere")), Some(0));
        let here = Sample::of(pid, Path::new("/nowhere"), 1 << 20).expect("it runs");
        assert_eq!(here.own_kib, here.rss_kib.saturating_sub(1024));
    }
}
