//! What a transport has done so far.
#![forbid(unsafe_code)]

use serde::Serialize;

use crate::engine::{PeerState, RailCounters};

/// Counters of a transport since it was installed.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// libfabric's provider.
    pub provider: String,
    /// One entry a NIC.
    pub rails: Vec<RailStats>,
    /// One entry an open segment.
    pub peers: Vec<PeerState>,
}

/// Counters of one NIC.
#[derive(Clone, Debug, Serialize)]
pub struct RailStats {
    /// Its name.
    pub nic: String,
    /// What it did.
    #[serde(flatten)]
    pub counters: RailCounters,
}
