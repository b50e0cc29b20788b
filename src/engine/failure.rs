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
    /// Its NIC, where it is known.
    pub peer_nic: Option<Arc<str>>,
    /// Our NIC; `None` where it is not known which one it hangs on.
    pub nic: Option<Arc<str>>,
    /// Nanoseconds since it was submitted.
    pub age: u64,
    /// How often it was tried.
    pub tries: u8,
    pub cause: Cow<'static, str>,
}

impl Failure {
    fn operation(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (operation, preposition) = if self.write { ("write", "to") } else { ("read", "from") };
        let peer = self.peer.as_deref().unwrap_or("a closed segment");
        write!(f, "{operation} of {} bytes {preposition} {peer}", self.length)?;
        match (&self.nic, &self.peer_nic) {
            (Some(nic), Some(peer_nic)) => write!(f, " over {nic} and its {peer_nic}"),
            (Some(nic), None) => write!(f, " over {nic}"),
            (None, _) => Ok(()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.operation(f)?;
        write!(f, " failed after {:.3?}", Duration::from_nanos(self.age))?;
        if self.tries > 1 {
            write!(f, " and {} tries", self.tries)?;
        }
        write!(f, ": {}", self.cause)
    }
}

/// One that has not failed yet, in words.
pub(super) struct UnderWay(pub Failure);

impl fmt::Display for UnderWay {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.operation(f)?;
        write!(f, ", for {:.3?}", Duration::from_nanos(self.0.age))
    }
}
