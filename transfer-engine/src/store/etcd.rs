//! etcd, API version 3, through the JSON gateway that every etcd has on its client port.
//!
//! The gateway rather than gRPC: a client of that brings tokio and tonic, their size and their threads into every
//! process that links this library, for three calls. What is stored is the same: values are the texts themselves at
//! the plain keys, as Mooncake's own client writes and reads them.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use mooncake_efa::segment::MAX_TEXT;
use mooncake_efa::{Error, Result};
use serde::Deserialize;
use serde_json::json;
use ureq::http::Method;

use super::client::{self, Answer, Client};
use super::{Store, failed, said, text};

/// Most bytes of an answer: a value in base64, and what is around it.
const MAX_ANSWER: usize = MAX_TEXT.div_ceil(3) * 4 + (64 << 10);
const PORT: u16 = 2379;

/// The servers of a cluster, any of which will do.
pub(super) struct Etcd {
    /// Their URIs, without a `/` at the end; one at least.
    servers: Vec<String>,
    /// Which one answered last.
    last: AtomicUsize,
    client: Client,
}

impl Etcd {
    /// `HOST:PORT`, several with `;` or `,` between.
    pub fn new(servers: &str) -> Result<Self> {
        let names = servers.split([';', ',']).map(str::trim).filter(|name| !name.is_empty());
        let servers: Vec<_> = names.map(server).collect::<Result<_>>()?;
        if servers.is_empty() {
            return Err(Error::invalid("metadata server etcd: no host"));
        }
        Ok(Self { servers, last: AtomicUsize::new(0), client: Client::new(MAX_ANSWER) })
    }

    /// The answer to a call, of the first server that gives one.
    fn call(&self, name: &str, key: &str, request: &serde_json::Value) -> Result<Vec<u8>> {
        let json = request.to_string();
        let first = self.last.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for i in 0..self.servers.len() {
            let i = (first + i) % self.servers.len();
            let server = &self.servers[i];
            let uri = format!("{server}/v3/kv/{name}");
            match self.client.call(Method::POST, &uri, Some(&json)) {
                Ok(answer) if answer.status == 200 => {
                    self.last.store(i, Ordering::Relaxed);
                    return Ok(answer.body);
                }
                // It is there, and another would refuse as well.
                Ok(answer) if answer.status < 500 => {
                    return Err(self.failed(server, name, key, refusal(&answer)));
                }
                Ok(answer) => failures.push((server, refusal(&answer))),
                Err(why) => failures.push((server, why)),
            }
        }
        // All of them, for the one that should have answered may be any.
        let (server, why) = failures.remove(0);
        let rest = failures.iter().map(|(server, why)| format!("; {server}: {why}"));
        Err(self.failed(server, name, key, why + &rest.collect::<String>()))
    }

    fn failed(&self, server: &str, name: &str, key: &str, why: String) -> Error {
        failed(&format!("etcd {server}"), &format!("{name} of {key}"), why)
    }
}

/// The URI of `HOST`, `HOST:PORT` or a URI.
fn server(name: &str) -> Result<String> {
    let known =
        name.starts_with("http://") || cfg!(feature = "https") && name.starts_with("https://");
    let text = if known { name.to_owned() } else { format!("http://{name}") };
    let invalid = |why| Error::invalid(format!("metadata server etcd {name}: {why}"));
    let uri = client::uri(&text).map_err(invalid)?;
    if !matches!(uri.path(), "/" | "") || uri.query().is_some() {
        return Err(invalid("HOST:PORT expected".to_owned()));
    }
    let text = text.trim_end_matches('/');
    Ok(if uri.port().is_some() { text.to_owned() } else { format!("{text}:{PORT}") })
}

fn refusal(answer: &Answer) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
    }
    match serde_json::from_slice::<Refusal>(&answer.body) {
        Ok(refusal) => {
            format!("it answered {} {:?}", answer.status, said(refusal.error.as_bytes()))
        }
        Err(_) => answer.refusal(),
    }
}

/// The value in the answer to a range request.
fn value(answer: &[u8]) -> Result<Option<String>, String> {
    // What is empty is left out.
    #[derive(Deserialize)]
    struct Range {
        #[serde(default)]
        kvs: Vec<Pair>,
    }
    #[derive(Deserialize)]
    struct Pair {
        #[serde(default)]
        value: String,
    }
    let range: Range =
        serde_json::from_slice(answer).map_err(|why| format!("its answer: {why}"))?;
    let Some(pair) = range.kvs.first() else { return Ok(None) };
    let value = BASE64_STANDARD.decode(&pair.value).map_err(|why| format!("its answer: {why}"))?;
    text(value).map(Some)
}

impl Store for Etcd {
    fn get(&self, key: &str) -> Result<Option<String>> {
        let answer = self.call("range", key, &json!({ "key": BASE64_STANDARD.encode(key) }))?;
        let server = &self.servers[self.last.load(Ordering::Relaxed)];
        value(&answer).map_err(|why| self.failed(server, "range", key, why))
    }

    fn put(&self, key: &str, value: &str) -> Result<()> {
        let (key_64, value_64) = (BASE64_STANDARD.encode(key), BASE64_STANDARD.encode(value));
        self.call("put", key, &json!({ "key": key_64, "value": value_64 })).map(drop)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.call("deleterange", key, &json!({ "key": BASE64_STANDARD.encode(key) })).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn servers() {
        let of = |text| Etcd::new(text).map(|etcd| etcd.servers);
        assert_eq!(of("a:1").unwrap(), ["http://a:1"]);
        assert_eq!(
            of("a:1; [::1]:2,c;;http://d/").unwrap(),
            ["http://a:1", "http://[::1]:2", "http://c:2379", "http://d:2379"]
        );
        for (text, why) in [
            ("", "no host"),
            (";", "no host"),
            ("a:1/path", "HOST:PORT"),
            ("a:1;ftp://b", "ftp://b"),
            ("a b", "a b"),
            ("a:70000", "a:70000"),
        ] {
            let error = of(text).unwrap_err();
            assert_eq!(error.code, mooncake_efa::Code::InvalidArgument);
            assert!(error.text.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn values() {
        assert_eq!(value(b"{}"), Ok(None));
        assert_eq!(value(br#"{"header":{"revision":"1"},"kvs":[]}"#), Ok(None));
        assert_eq!(value(br#"{"kvs":[{"key":"YQ=="}],"count":"1"}"#), Ok(Some(String::new())));
        assert_eq!(value(br#"{"kvs":[{"key":"YQ==","value":"YgA="}]}"#), Ok(Some("b\0".into())));
        for bad in ["", "7", r#"{"kvs":7}"#, r#"{"kvs":[{"value":"*"}]}"#] {
            assert!(value(bad.as_bytes()).is_err(), "{bad}");
        }
        // Not UTF-8.
        assert!(value(br#"{"kvs":[{"value":"/w=="}]}"#).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_read(answer in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = value(&answer);
            let _ = refusal(&Answer { status: 500, body: answer });
        }

        #[test]
        fn any_answer_that_looks_like_one_is_read(value_64 in "[A-Za-z0-9+/=]{0,40}", end in ".{0,8}") {
            let _ = value(format!("{{\"kvs\":[{{\"value\":\"{value_64}\"}}]}}{end}").as_bytes());
            let body = format!("{{\"error\":\"{value_64}\"}}{end}").into_bytes();
            let _ = refusal(&Answer { status: 400, body });
        }
    }
}
