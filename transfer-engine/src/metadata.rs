//! Who is where, and what they have: segment descriptors and the addresses of handshake ports, from the peers
//! themselves or from a metadata server, under Mooncake's keys.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use arc_swap::ArcSwap;
use mooncake_efa::config::Config;
use mooncake_efa::segment::Segment;
use mooncake_efa::{Code, Error, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::address;
use crate::store::{self, Store};
use crate::wire::{self, Kind, Limits};

/// The connection string for metadata without a server: a segment's name is its `host:port`, and who has that port
/// is asked.
pub const PEER_TO_PEER: &str = "P2PHANDSHAKE";

/// A notification: Mooncake's JSON of one, and of the answer to it, where an empty `notify_msg` is a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Notification {
    /// Who sends it; free text.
    pub name: String,
    /// What is sent; free text.
    #[serde(rename = "notify_msg")]
    pub message: String,
}

/// Where the handshake port of an engine is: Mooncake's value of an `rpc_meta/` key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// Address or host name.
    #[serde(rename = "ip_or_host_name")]
    pub host: String,
    /// TCP port.
    #[serde(rename = "rpc_port")]
    pub port: u16,
}

/// A cluster's metadata. Every method blocks for as long as the network takes, some seconds at most, and may be
/// called from any thread.
pub struct Metadata {
    /// None: peer to peer.
    store: Option<Box<dyn Store>>,
    /// What all keys begin with.
    prefix: String,
    limits: Limits,
    default_port: u16,
    /// Handshake ports, by server name.
    locations: Mutex<HashMap<String, Location>>,
    /// Peer to peer: by what name the owner of a server name was found, where that is another.
    aliases: Mutex<HashMap<String, String>>,
    /// Our descriptor, as peers are shown it when they are asked for theirs.
    own: ArcSwap<String>,
}

impl Metadata {
    /// Opens the metadata of a connection string: [`PEER_TO_PEER`], or a metadata server's (see [`store::open`]).
    ///
    /// # Errors
    /// Those of [`store::open`].
    pub fn open(connection: &str, config: &Config) -> Result<Self> {
        let store = (connection != PEER_TO_PEER).then(|| store::open(connection)).transpose()?;
        Ok(Self { store, ..Self::peer_to_peer(config) })
    }

    fn peer_to_peer(config: &Config) -> Self {
        let cluster = config.metadata_cluster_id.as_deref().unwrap_or_default();
        let slash = if cluster.is_empty() || cluster.ends_with('/') { "" } else { "/" };
        Self {
            store: None,
            prefix: format!("mooncake/{cluster}{slash}"),
            limits: limits(config),
            default_port: config.handshake_port,
            locations: Mutex::default(),
            aliases: Mutex::default(),
            own: ArcSwap::from_pointee("{}".to_owned()),
        }
    }

    /// Whether there is no server.
    pub fn is_peer_to_peer(&self) -> bool {
        self.store.is_none()
    }

    fn segment_key(&self, name: &str) -> String {
        let room = if name.contains('/') { "" } else { "ram/" };
        format!("{}{room}{name}", self.prefix)
    }

    fn location_key(&self, server: &str) -> String {
        format!("{}rpc_meta/{server}", self.prefix)
    }

    /// Lets others find the handshake port of a server.
    ///
    /// # Errors
    /// Those of the metadata server. Mooncake's own over HTTP does not take a server's name twice: then it must be one
    /// whose engine does not answer any more.
    pub fn publish_location(&self, server: &str, location: &Location) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        let (key, value) = (self.location_key(server), json(location));
        let Err(error) = store.put(&key, &value) else { return Ok(()) };
        let Ok(former) = self.locate(server) else { return Err(error) };
        if self.send(server, &former, Kind::Probe, "{}").is_ok() {
            let at = address::join(&former.host, former.port);
            let text = format!(
                "an engine named {server} answers at {at} already: every engine needs a name of its own"
            );
            return Err(Error::new(Code::Metadata, text));
        }
        store.remove(&key)?;
        store.put(&key, &value)
    }

    /// Takes that back, and the server's segment.
    pub fn withdraw(&self, server: &str) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        store.remove(&self.segment_key(server)).and(store.remove(&self.location_key(server)))
    }

    /// Lets others find a segment. Without a server they ask for it.
    pub fn publish_segment(&self, segment: &Segment) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        store.put(&self.segment_key(&segment.name), &segment.to_json())
    }

    /// Sets what peers are told of us when they are asked for their descriptors: our NICs.
    pub fn introduce(&self, own: Segment) {
        // Not the memory: peers do not look at it here, and limit what they read.
        self.own.store(Segment { buffers: Vec::new(), ..own }.to_json().into());
    }

    /// The current descriptor of a segment, under the name that was asked for.
    pub fn segment(&self, name: &str) -> Result<Segment> {
        let text = match &self.store {
            Some(store) => store.get(&self.segment_key(name))?.ok_or_else(|| {
                let why = "is not in the metadata: has its engine installed its transport?";
                Error::new(Code::Metadata, format!("segment {name} {why}"))
            })?,
            None => self.ask(name, Kind::Metadata, &self.own.load())?,
        };
        let mut segment = Segment::from_json(&text)?;
        // What it calls itself is in the paths of its NICs. It is known here, and asked for again, by the name that
        // it was found by.
        if segment.name != name {
            if segment.rdma_server_name.is_empty() {
                segment.rdma_server_name = std::mem::take(&mut segment.name);
            }
            segment.name = name.to_owned();
        }
        if self.is_peer_to_peer() && segment.server_name() != name {
            let mut aliases = self.aliases.lock();
            // A peer may say that it is another: the first one to say so stays.
            aliases.entry(segment.server_name().to_owned()).or_insert_with(|| name.to_owned());
        }
        Ok(segment)
    }

    /// Sends a handshake (JSON) to a server, as NIC paths name it; its answer.
    pub fn handshake(&self, server: &str, request: &str) -> Result<String> {
        // Nobody can pass for one who was found by his own name.
        let found = self.locations.lock().contains_key(server);
        let alias = if found { None } else { self.aliases.lock().get(server).cloned() };
        self.ask(alias.as_deref().unwrap_or(server), Kind::Connection, request)
    }

    /// Sends a notification to the owner of a segment.
    ///
    /// # Errors
    /// [`Code::RejectHandshake`] if it refuses.
    pub fn notify(&self, segment: &str, notification: &Notification) -> Result<()> {
        let answer = self.ask(segment, Kind::Notify, &json(notification))?;
        let accepted =
            serde_json::from_str(&answer).is_ok_and(|a: Notification| !a.message.is_empty());
        let refused =
            || Error::new(Code::RejectHandshake, format!("{segment} refuses the notification"));
        accepted.then_some(()).ok_or_else(refused)
    }

    fn ask(&self, server: &str, kind: Kind, request: &str) -> Result<String> {
        let known = self.locations.lock().get(server).cloned();
        if let Some(location) = known {
            match self.send(server, &location, kind, request) {
                Ok(answer) => return Ok(answer),
                // It may have been started anew at another port.
                Err(error) => {
                    self.locations.lock().remove(server);
                    match self.locate(server) {
                        Ok(newer) if newer != location => {}
                        _ => return Err(error),
                    }
                }
            }
        }
        let location = self.locate(server)?;
        let answer = self.send(server, &location, kind, request)?;
        self.locations.lock().insert(server.to_owned(), location);
        Ok(answer)
    }

    fn send(&self, server: &str, at: &Location, kind: Kind, request: &str) -> Result<String> {
        let about =
            |error: Error| if server.contains(&at.host) { error } else { error.context(server) };
        wire::ask(&at.host, at.port, kind, request, &self.limits).map_err(about)
    }

    fn locate(&self, server: &str) -> Result<Location> {
        let Some(store) = &self.store else {
            let (host, port) = address::parse(server, self.default_port);
            return Ok(Location { host, port });
        };
        let key = self.location_key(server);
        let text = store.get(&key)?.ok_or_else(|| {
            let why = "has no handshake port in the metadata: is its process alive?";
            Error::new(Code::Metadata, format!("{server} {why}"))
        })?;
        serde_json::from_str(&text)
            .map_err(|why| Error::new(Code::MalformedJson, format!("metadata key {key}: {why}")))
    }
}

/// How long and how much for handshakes, by the environment.
pub fn limits(config: &Config) -> Limits {
    Limits {
        connect: config.handshake_connect_timeout,
        frame: config.handshake_connect_timeout.max(wire::FRAME),
        length: config.handshake_max_length,
        ipv6: config.use_ipv6,
    }
}

/// A message's JSON.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and numbers have a JSON form")
}
