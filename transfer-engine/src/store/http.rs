//! Mooncake's HTTP metadata protocol: `GET`, `PUT` and `DELETE` of `URI?key=KEY`.
#![forbid(unsafe_code)]

use mooncake_efa::segment::MAX_TEXT;
use mooncake_efa::{Error, Result};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::Method;

use super::client::{self, Answer, Client};
use super::{Store, failed, text};

/// What stays as it is in a key.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A server that speaks it.
pub(super) struct Http {
    uri: String,
    client: Client,
}

impl Http {
    pub fn new(uri: &str) -> Result<Self> {
        client::uri(uri).map_err(|why| Error::invalid(format!("metadata server {uri}: {why}")))?;
        Ok(Self { uri: uri.to_owned(), client: Client::new(MAX_TEXT) })
    }

    /// The answer to a call, if there is one and it says that it was done, or that there is no such key.
    fn call(&self, method: Method, key: &str, value: Option<&str>) -> Result<Option<Answer>> {
        let uri = format!("{}?key={}", self.uri, utf8_percent_encode(key, ESCAPED));
        let failed = |why| failed(&self.uri, &format!("{method} of {key}"), why);
        let answer = self.client.call(method.clone(), &uri, value).map_err(failed)?;
        match answer.status {
            200 => Ok(Some(answer)),
            404 if method != Method::PUT => Ok(None),
            _ => Err(failed(answer.refusal())),
        }
    }
}

impl Store for Http {
    fn get(&self, key: &str) -> Result<Option<String>> {
        let answer = self.call(Method::GET, key, None)?;
        let value = answer.map(|answer| text(answer.body)).transpose();
        value.map_err(|why| failed(&self.uri, &format!("GET of {key}"), why))
    }

    fn put(&self, key: &str, value: &str) -> Result<()> {
        self.call(Method::PUT, key, Some(value)).map(drop)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.call(Method::DELETE, key, None).map(drop)
    }
}
