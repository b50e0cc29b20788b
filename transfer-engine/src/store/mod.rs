//! Metadata servers: a key-value store that all engines of a cluster know.
#![forbid(unsafe_code)]

use mooncake_efa::{Error, Result};

/// A client of one, for any thread. Every call blocks for some seconds at most.
pub trait Store: Send + Sync {
    /// The value of a key; `None` if it has none.
    fn get(&self, key: &str) -> Result<Option<String>>;
    /// Sets it.
    fn put(&self, key: &str, value: &str) -> Result<()>;
    /// Removes it, if it is there.
    fn remove(&self, key: &str) -> Result<()>;
}

/// The store of a connection string, as Mooncake has them: `http://HOST:PORT/metadata`, `etcd://HOST:PORT` (several
/// with `;` between), `redis://HOST:PORT`; without a scheme it is etcd.
///
/// # Errors
/// `Code::InvalidArgument` for another scheme or one that this build is without; `Code::Metadata` if the server
/// cannot be reached.
pub fn open(connection: &str) -> Result<Box<dyn Store>> {
    Err(Error::invalid(connection))
}
