//! How processes of a soak find each other: a file a name, as a metadata service would have it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mooncake_efa::segment::Segment;
use mooncake_efa::transport::Host;
use mooncake_efa::{Code, Error};
use serde::{Deserialize, Serialize};

/// What is known of a process that serves memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Its process.
    pub pid: u32,
    /// First byte of its memory, there.
    pub address: u64,
    /// Its descriptor, JSON.
    pub descriptor: String,
}

impl Peer {
    /// The descriptor.
    pub fn segment(&self) -> mooncake_efa::Result<Segment> {
        Segment::from_json(&self.descriptor)
    }
}

/// The directory of names.
#[derive(Clone, Debug)]
pub struct Peers {
    dir: PathBuf,
}

impl Peers {
    /// In this directory, which exists.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// Who has the name now.
    pub fn find(&self, name: &str) -> Result<Peer> {
        let path = self.dir.join(name);
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Takes the name, whoever had it.
    pub fn publish(&self, name: &str, peer: &Peer) -> Result<()> {
        let draft = self.dir.join(format!("{name}.{}", peer.pid));
        fs::write(&draft, serde_json::to_vec(peer)?)?;
        // As a whole: nobody reads half of it.
        fs::rename(&draft, self.dir.join(name))?;
        Ok(())
    }
}

impl Host for Peers {
    fn fetch_segment(&self, name: &str) -> mooncake_efa::Result<String> {
        let found = self.find(name);
        found
            .map(|peer| peer.descriptor)
            .map_err(|error| Error::new(Code::Metadata, error.to_string()))
    }

    fn handshake(&self, server: &str, _: &str) -> mooncake_efa::Result<String> {
        Err(Error::new(Code::RejectHandshake, format!("{server} is of our kind and needs none")))
    }
}
