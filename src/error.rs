//! What can go wrong, in words a person can act on and in the numbers Mooncake uses.

use std::fmt;

/// The class of a failure. The discriminants are the C ABI's return codes: they are Mooncake's own
/// (`mooncake-transfer-engine/include/error.h`), so an adapter hands them through unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Code {
    /// An argument is NULL, out of range, malformed, or names something that does not exist.
    InvalidArgument = -1,
    /// A batch is full, or a table of this library is.
    TooManyRequests = -2,
    /// A local or remote range is not (wholly) inside registered memory.
    AddressNotRegistered = -3,
    /// Transfers are still under way on the batch or memory region.
    Busy = -4,
    /// No network device that could be used.
    DeviceNotFound = -6,
    /// The range overlaps one that is registered already.
    AddressOverlapped = -7,
    /// Text that should be JSON of a known shape is not.
    MalformedJson = -103,
    /// A handshake was refused, by us or by the peer.
    RejectHandshake = -104,
    /// The host engine's metadata could not be had.
    Metadata = -200,
    /// An endpoint could not be made, or the peer could not be reached.
    Endpoint = -201,
    /// The device, domain or completion queue could not be opened, or libfabric could not be loaded.
    Context = -202,
    /// Memory could not be registered.
    Memory = -302,
    /// Not built, or not possible with this provider.
    NotImplemented = -303,
    /// The deadline passed first.
    Timeout = -400,
    /// A bug in this library, caught at the C boundary.
    Internal = -500,
}

/// A failure: its class and one line for a person.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    /// Class, and C return code.
    pub code: Code,
    /// What happened, to whom, and what to do about it where that is known. One line.
    pub text: String,
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Makes an error from its class and text.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// An [`Code::InvalidArgument`] error.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, text)
    }

    /// The same failure, with `context: ` in front of its text.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        Self { code: self.code, text: format!("{context}: {}", self.text) }
    }
}
