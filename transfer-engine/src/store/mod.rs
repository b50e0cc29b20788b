//! Metadata servers: a key-value store that all engines of a cluster know.
//!
//! None of the clients has a thread of its own, and none takes more than a value may be long, whatever a server
//! announces or sends. Proxies of the environment are not used: a metadata server is one of the cluster's own hosts.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(any(feature = "http", feature = "etcd", feature = "redis")),
    allow(dead_code, unreachable_code, unused_variables)
)]

#[cfg(any(feature = "http", feature = "etcd"))]
mod client;
#[cfg(feature = "etcd")]
mod etcd;
#[cfg(feature = "http")]
mod http;
#[cfg(feature = "redis")]
mod redis;

use mooncake_efa::segment::MAX_TEXT;
use mooncake_efa::{Code, Error, Result};

/// A client of one, for any thread. Every call blocks for some seconds at most.
pub trait Store: Send + Sync {
    /// The value of a key; `None` if it has none.
    fn get(&self, key: &str) -> Result<Option<String>>;
    /// Sets it.
    fn put(&self, key: &str, value: &str) -> Result<()>;
    /// Removes it, if it is there.
    fn remove(&self, key: &str) -> Result<()>;
}

/// A key that nobody has, to see whether a server answers.
const NO_KEY: &str = "mooncake/";

/// The store of a connection string, as Mooncake has them: `http://HOST:PORT/metadata`, `etcd://HOST:PORT` (several
/// with `;` between), `redis://HOST:PORT`; without a scheme it is etcd.
///
/// # Errors
/// `Code::InvalidArgument` for another scheme or one that this build is without; `Code::Metadata` if the server
/// cannot be reached.
pub fn open(connection: &str) -> Result<Box<dyn Store>> {
    let (scheme, rest) = connection.split_once("://").unwrap_or(("etcd", connection));
    if rest.split(['/', '?']).next().is_some_and(|servers| servers.contains('@')) {
        // Not shown: there is a password in it.
        let why = "a user or password in the connection string is not supported; Redis has MC_REDIS_USERNAME \
                   and MC_REDIS_PASSWORD";
        return Err(Error::invalid(format!("metadata server of scheme {scheme}: {why}")));
    }
    let store: Box<dyn Store> = match scheme {
        #[cfg(feature = "http")]
        "http" => Box::new(http::Http::new(connection)?),
        #[cfg(feature = "https")]
        "https" => Box::new(http::Http::new(connection)?),
        #[cfg(feature = "etcd")]
        "etcd" => Box::new(etcd::Etcd::new(rest)?),
        #[cfg(feature = "redis")]
        "redis" => Box::new(redis::Redis::new(rest)?),
        _ => {
            let why = match scheme {
                "http" | "https" | "etcd" | "redis" => "this build is without this scheme",
                _ => "unknown scheme; http, https, etcd and redis are known",
            };
            return Err(Error::invalid(format!("metadata server {connection}: {why}")));
        }
    };
    store.get(NO_KEY)?;
    Ok(store)
}

/// What went wrong with a server, in one line.
fn failed(server: &str, doing: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Code::Metadata, format!("metadata server {server}: {doing}: {why}"))
}

/// The start of what a server says, fit for one line of an error.
fn said(text: &[u8]) -> String {
    const MOST: usize = 200;
    let text = String::from_utf8_lossy(&text[..text.len().min(MOST)]);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().map(plain).collect()
}

/// A value, which is text.
fn text(value: Vec<u8>) -> Result<String, String> {
    if value.len() > MAX_TEXT {
        return Err(format!("the value has {} bytes, at most {MAX_TEXT} allowed", value.len()));
    }
    String::from_utf8(value).map_err(|_| "the value is not UTF-8".to_owned())
}
