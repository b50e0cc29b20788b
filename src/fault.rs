//! What went wrong with an operation, and what follows from it: the one table of the provider's errors.
//!
//! | class | means | what the engine does |
//! | --- | --- | --- |
//! | [`Class::Permanent`] | the request itself is wrong: key, range, length | fails it at once |
//! | [`Class::Peer`] | the peer, or its NIC, is gone, silent or was restarted | tries again, over another of its NICs |
//! | [`Class::Rail`] | our NIC or endpoint, or the way to the peer | tries again, over another of our NICs |
//! | [`Class::Pressure`] | somebody has no room just now | tries again later |
//! | [`Class::Ours`] | this library used the provider wrongly | fails it at once |
#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// The request: it fails the same way however often it is tried.
    Permanent,
    /// The peer, or its NIC.
    Peer,
    /// Our NIC or its endpoint, or the way from it to the peer.
    Rail,
    /// Nobody: there is no room at the moment.
    Pressure,
    /// This library.
    Ours,
}

impl Class {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 5] =
        [Self::Permanent, Self::Peer, Self::Rail, Self::Pressure, Self::Ours];

    /// Trying again may help.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Peer | Self::Rail | Self::Pressure)
    }
}

/// Why one operation failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Whose fault it is.
    pub class: Class,
    /// The cause, what to do about it where that is known, and the provider's own words. One line.
    pub text: String,
    /// The peer's endpoint does not exist any more, and none will at its address.
    pub gone: bool,
}

/// One kind of error: number, class, cause, remedy or "".
type Row = (i32, Class, &'static str, &'static str);

use Class::{Ours, Peer, Permanent, Pressure, Rail};

/// The EFA device's word that there is no such endpoint. (Its address has a key drawn at random: another's is
/// another address.)
const NO_ENDPOINT: i32 = 9;

/// The remedy where a peer does not answer.
const LOOK_AT_PEER: &str =
    "is its process alive, and do both security groups allow all traffic of the other?";

/// Completion statuses of the EFA device (`efa_io_comp_status`, rdma-core's `efa_io_defs.h`), and of
/// libfabric's `efa` provider from 4096 on (`prov/efa/src/efa_errno.h` of 2.6): what `prov_errno` is there.
#[rustfmt::skip]
const EFA: &[Row] = &[
    (1, Rail, "our endpoint was closed or reset under it", ""),
    (2, Rail, "our NIC's queue pair broke", "look at the kernel's log for the efa device"),
    (3, Ours, "the device does not know this operation", ""),
    (4, Rail, "our NIC lost the peer's address handle", ""),
    (5, Ours, "our memory's local key is not valid", ""),
    (6, Permanent, "longer than the device takes", ""),
    (7, Permanent, "the peer has no such memory under this key, or not with this access",
        "the peer's memory was unregistered or registered anew: open its segment again"),
    (8, Peer, "the peer reset the connection", "was it restarted?"),
    (NO_ENDPOINT, Peer, "the peer's endpoint is gone", "was it restarted?"),
    (10, Pressure, "the peer had no receive posted", "its process does not make progress: is it stopped?"),
    (11, Permanent, "longer than what the peer has ready for it", ""),
    (12, Peer, "the peer's NIC answered with a status unknown to ours", ""),
    (13, Peer, "the peer's NIC answered before and does not any more", LOOK_AT_PEER),
    (14, Peer, "the peer's NIC does not know ours", "was it restarted?"),
    (15, Peer, "the peer's NIC never answered", LOOK_AT_PEER),
    (18, Permanent, "the peer's NIC lacks a feature that this operation needs", "do both sides run the same kind of instance?"),
    (4096, Rail, "the provider does not say why", ""),
    (4097, Peer, "a packet of a kind that is not used any more", "do both sides run the same libfabric?"),
    (4098, Peer, "a packet of a kind that makes no sense here", "do both sides run the same libfabric?"),
    (4099, Peer, "a packet of an unknown kind", "do both sides run the same libfabric?"),
    (4100, Rail, "the provider could not post a packet", ""),
    (4101, Rail, "the provider could not send a packet", ""),
    (4102, Rail, "the provider could not process a message", ""),
    (4103, Rail, "the provider could not process a tagged message", ""),
    (4104, Rail, "the provider saw a packet twice", ""),
    (4105, Pressure, "the provider has no memory", "how much memory has this process left?"),
    (4106, Rail, "the provider could not end a registration of its own", ""),
    (4107, Rail, "the provider could not copy what it received", ""),
    (4108, Pressure, "the provider has no room for what it receives", ""),
    (4109, Pressure, "the provider has no room for what it sends", ""),
    (4110, Rail, "the provider could not store the peer's address", ""),
    (4111, Permanent, "the provider refused the remote address", ""),
    (4112, Rail, "the provider could not post its own receives", ""),
    (4113, Rail, "the provider could not greet the peer", ""),
    (4114, Rail, "the provider could not post to the device", ""),
    (4115, Ours, "a message has not the length that was announced", ""),
    (4116, Rail, "the provider could not post a read", ""),
    (4117, Rail, "the provider could not post a read to the device", ""),
    (4118, Ours, "a data type that is not one", ""),
    (4119, Rail, "the provider could not report what it sent", ""),
    (4120, Rail, "the provider could not report what it received", ""),
    (4121, Rail, "the provider could not read its own queue", ""),
    (4122, Rail, "the provider's shared memory path failed", ""),
    (4123, Rail, "the provider could not report what went by shared memory", ""),
    (4124, Peer, "the peer answered before and does not any more", LOOK_AT_PEER),
    (4125, Ours, "a packet that does not fit how we receive", ""),
    (4126, Peer, "the peer's NIC answers, but its process has not said hello", "is it stopped, or not making progress?"),
    (4127, Peer, "the peer closed its memory or endpoint under it", "was it restarted?"),
];

/// libfabric's numbers of its own begin here (`FI_ERRNO_OFFSET`, `rdma/fi_errno.h`).
const FI: i32 = 256;

/// Errors of libfabric, for other providers, and where a post is refused.
#[rustfmt::skip]
const ERRNOS: &[Row] = &[
    (libc::EPERM, Permanent, "not permitted", ""),
    (libc::ENOENT, Peer, "the peer is not there", "was it restarted?"),
    (libc::EIO, Rail, "input or output failed", ""),
    (libc::ENXIO, Rail, "our device is gone", ""),
    (libc::E2BIG, Permanent, "longer than the provider takes", ""),
    (libc::EAGAIN, Pressure, "no room just now", ""),
    (libc::ENOMEM, Pressure, "no memory", "how much memory has this process left?"),
    (libc::EACCES, Permanent, "the peer's memory may not be used like this", ""),
    (libc::EFAULT, Permanent, "the memory is not there", ""),
    (libc::EBUSY, Pressure, "busy", ""),
    (libc::ENODEV, Rail, "our device is gone", ""),
    (libc::EINVAL, Ours, "the provider finds the operation invalid", ""),
    (libc::EMFILE, Pressure, "too many open files", "raise `ulimit -n`"),
    (libc::ENOSPC, Pressure, "no room", ""),
    (libc::EPIPE, Peer, "the peer closed the connection", "was it restarted?"),
    (libc::ERANGE, Permanent, "outside of the peer's memory", ""),
    (libc::ENOSYS, Ours, "the provider cannot do this", ""),
    (libc::EREMOTEIO, Peer, "the peer's side of it failed", ""),
    (libc::EMSGSIZE, Permanent, "longer than the provider takes", ""),
    (libc::EOPNOTSUPP, Ours, "the provider cannot do this", ""),
    (libc::EADDRNOTAVAIL, Rail, "our address is gone", ""),
    (libc::ENETDOWN, Rail, "our network is down", ""),
    (libc::ENETUNREACH, Rail, "no way to the peer's network", "is there a route?"),
    (libc::ECONNABORTED, Peer, "the connection to the peer broke", LOOK_AT_PEER),
    (libc::ECONNRESET, Peer, "the peer reset the connection", "was it restarted?"),
    (libc::ENOBUFS, Pressure, "no buffers", ""),
    (libc::ENOTCONN, Peer, "not connected to the peer", "was it restarted?"),
    (libc::ESHUTDOWN, Peer, "the connection to the peer is shut down", "was it restarted?"),
    (libc::ETIMEDOUT, Peer, "the peer does not answer", LOOK_AT_PEER),
    (libc::ECONNREFUSED, Peer, "the peer refuses connections", "is its process alive?"),
    (libc::EHOSTDOWN, Peer, "the peer's host is down", ""),
    (libc::EHOSTUNREACH, Peer, "the peer's host cannot be reached", "is there a route, and do security groups allow it?"),
    (libc::ECANCELED, Rail, "our endpoint was closed or reset under it", ""),
    (libc::EKEYREJECTED, Permanent, "the peer has no memory under this key", "open its segment again"),
    (FI, Rail, "the provider does not say why", ""),                   // FI_EOTHER
    (FI + 1, Permanent, "what is there is too short for it", ""),      // FI_ETOOSMALL
    (FI + 2, Ours, "the endpoint is not in the state for it", ""),     // FI_EOPBADSTATE
    (FI + 7, Ours, "the provider has nowhere to report it", ""),       // FI_ENOCQ
    (FI + 8, Rail, "the data was damaged on the way", ""),             // FI_ECRC
    (FI + 9, Permanent, "what is there is too short for it", ""),      // FI_ETRUNC
    (FI + 10, Permanent, "the peer has no memory under this key",      // FI_ENOKEY
        "the peer's memory was unregistered or registered anew: open its segment again"),
    (FI + 11, Ours, "the endpoint has no address vector", ""),         // FI_ENOAV
    (FI + 12, Rail, "a queue of the provider's overran", ""),          // FI_EOVERRUN
    (FI + 13, Pressure, "the peer had no receive posted", "its process does not make progress: is it stopped?"), // FI_ENORX
    (FI + 14, Pressure, "no room for more memory regions", ""),        // FI_ENOMR
];

fn row(table: &[Row], number: i32) -> Option<&Row> {
    table.iter().find(|row| row.0 == number)
}

impl Fault {
    /// The fault of an operation that ended with libfabric's `errno`. `device` is what the `efa` provider
    /// says beyond that (its `prov_errno`), `None` of other providers; `words` are the provider's own.
    ///
    /// An error that is in no table is held to be the rail's: to try again is safe, since what failed is
    /// quiet and what is tried again moves the same bytes to the same place.
    pub fn new(errno: i32, device: Option<i32>, words: impl fmt::Display) -> Self {
        // Some are handed through with the sign that calls return them with (seen with 1.17).
        let errno = errno.saturating_abs();
        let found = device.and_then(|status| row(EFA, status)).or_else(|| row(ERRNOS, errno));
        let &(_, class, cause, remedy) =
            found.unwrap_or(&(0, Rail, "an error that is not in our table", ""));
        let remedy = if remedy.is_empty() { String::new() } else { format!("; {remedy}") };
        let text = format!("{cause}{remedy} [{words}]");
        Self { gone: device == Some(NO_ENDPOINT), ..Self::of(class, text) }
    }

    /// A fault of which no more is known.
    pub fn of(class: Class, text: impl Into<String>) -> Self {
        Self { class, text: text.into(), gone: false }
    }
}

impl Fault {
    /// The fault of a peer that does not answer when it is greeted.
    pub fn unanswered(waited: Duration) -> Self {
        let words = "the peer's NIC did not answer our greeting for";
        Self::of(Peer, format!("{words} {waited:?}; {LOOK_AT_PEER}"))
    }

    /// The same, seen over a NIC of ours whose port is down: the peer only seems to be silent.
    #[must_use]
    pub fn over_down_port(self) -> Self {
        Self::of(Rail, format!("the port of our own NIC is down: {}", self.text))
    }
}

/// How often each class was met, by [`Class::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// [`Class::Permanent`].
    pub permanent: u64,
    /// [`Class::Peer`].
    pub peer: u64,
    /// [`Class::Rail`].
    pub rail: u64,
    /// [`Class::Pressure`].
    pub pressure: u64,
    /// [`Class::Ours`].
    pub ours: u64,
}

impl From<[u64; Class::ALL.len()]> for Faults {
    fn from([permanent, peer, rail, pressure, ours]: [u64; Class::ALL.len()]) -> Self {
        Self { permanent, peer, rail, pressure, ours }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every status that the device and the provider have, by number: a new one has to be thought about.
    #[test]
    fn every_efa_status_has_its_class() {
        let known: Vec<i32> = EFA.iter().map(|row| row.0).collect();
        let device = (1..=15).chain([18]);
        let all: Vec<i32> = device.chain(4096..=4127).collect();
        assert_eq!(known, all);
        for (status, class) in [
            (1, Rail),
            (2, Rail),
            (3, Ours),
            (4, Rail),
            (5, Ours),
            (6, Permanent),
            (7, Permanent),
            (8, Peer),
            (9, Peer),
            (10, Pressure),
            (11, Permanent),
            (12, Peer),
            (13, Peer),
            (14, Peer),
            (15, Peer),
            (18, Permanent),
            (4105, Pressure),
            (4111, Permanent),
            (4124, Peer),
            (4126, Peer),
            (4127, Peer),
        ] {
            assert_eq!(Fault::new(libc::EINVAL, Some(status), "").class, class, "status {status}");
        }
    }

    #[test]
    fn only_an_endpoint_that_does_not_exist_is_gone() {
        let gone = |status| Fault::new(libc::EIO, Some(status), "").gone;
        let all: Vec<i32> = EFA.iter().map(|row| row.0).filter(|&status| gone(status)).collect();
        assert_eq!(all, [9]);
        assert!(!Fault::new(9, None, "").gone, "another provider's");
        assert!(!Fault::new(libc::EIO, Some(9), "").over_down_port().gone);
    }

    #[test]
    fn numbers_are_in_their_table_once_and_words_are_one_line() {
        for table in [EFA, ERRNOS] {
            for (at, (number, _, cause, remedy)) in table.iter().enumerate() {
                assert!(table[..at].iter().all(|row| row.0 != *number), "{number} twice");
                assert!(!cause.is_empty() && !format!("{cause}{remedy}").contains('\n'));
            }
        }
    }

    #[test]
    fn the_device_knows_better_than_libfabric() {
        let fault = Fault::new(libc::EINVAL, Some(7), "words");
        assert_eq!(fault.class, Permanent);
        assert!(fault.text.contains("under this key") && fault.text.ends_with("[words]"));
        assert_eq!(Fault::new(libc::ECONNRESET, None, "").class, Peer);
        assert_eq!(Fault::new(-libc::ENOMEM, None, "").class, Pressure);
        assert_eq!(Fault::new(FI + 10, None, "").class, Permanent);
        // A provider's number that is not a status, and one that nobody knows.
        assert_eq!(Fault::new(libc::ECONNRESET, Some(-104), "").class, Peer);
        assert_eq!(Fault::new(12345, Some(77), "").class, Rail);
    }
}
