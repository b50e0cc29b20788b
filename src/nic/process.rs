//! Who a process is, for all times and containers.

use std::path::Path;
use std::sync::OnceLock;

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub id: u32,
    /// Its namespace of process ids, as the kernel numbers them.
    pub namespace: u64,
    /// When it was started, in the kernel's ticks since boot.
    pub started: u64,
    /// The host, and since when: part of the kernel's boot id.
    pub boot: u64,
}

impl Process {
    /// Ours. `None` where `/proc` does not tell.
    pub fn ourselves() -> Option<Self> {
        let id = std::process::id();
        let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
        // pid:[4026531836]
        let namespace = link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()?;
        Some(Self { id, namespace, started: started(id)?, boot: boot() })
    }

    /// Nobody's.
    pub fn unknown() -> Self {
        Self::of_numbers([0; 4])
    }

    /// Whether it is on our host, and we see the same process ids as it does.
    pub fn is_near(&self, ourselves: &Self) -> bool {
        self.boot != 0 && (self.boot, self.namespace) == (ourselves.boot, ourselves.namespace)
    }

    /// Whether one that is near, or in our own namespace, is there.
    pub fn is_alive(&self) -> bool {
        // Where /proc cannot be read nobody is taken for dead.
        !Path::new("/proc/self/stat").exists() || started(self.id) == Some(self.started)
    }

    /// As numbers, for a message.
    pub fn numbers(&self) -> [u64; 4] {
        [self.id.into(), self.namespace, self.started, self.boot]
    }

    /// What [`Self::numbers`] gave.
    pub fn of_numbers([id, namespace, started, boot]: [u64; 4]) -> Self {
        Self { id: id as u32, namespace, started, boot }
    }
}

/// When a process was started; `None` if it is not there, or dead and only not waited for.
pub(super) fn started(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Its name is in parentheses and may have any in itself. After that: state, and 18 fields before this one.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    fields.nth(18).filter(|_| !dead)?.parse().ok()
}

/// Half of the kernel's boot id; 0 where it does not tell.
pub(super) fn boot() -> u64 {
    static BOOT: OnceLock<u64> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
        u64::from_str_radix(&digits, 16).unwrap_or(0)
    })
}
