//! Why a transfer failed, in one line.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A failed operation, or one whose deadline passed. Put into words only when someone reads it.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub write: bool,
    pub length: u64,
    /// The peer's segment; `None` if it is closed.
    pub peer: Option<Arc<str>>,
    /// Our NIC; `None` where it is not known which one it hangs on.
    pub nic: Option<Arc<str>>,
    /// Nanoseconds since it was submitted.
    pub age: u64,
    pub cause: Cow<'static, str>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (operation, preposition) = if self.write { ("write", "to") } else { ("read", "from") };
        let peer = self.peer.as_deref().unwrap_or("a closed segment");
        write!(f, "{operation} of {} bytes {preposition} {peer}", self.length)?;
        if let Some(nic) = &self.nic {
            write!(f, " over {nic}")?;
        }
        write!(f, " failed after {:.3?}: {}", Duration::from_nanos(self.age), self.cause)
    }
}
