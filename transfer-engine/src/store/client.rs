//! HTTP, for the servers that speak it.
#![forbid(unsafe_code)]

use std::time::Duration;

use ureq::http::{Method, Request, Uri};
use ureq::{Agent, Timeout};

use super::said;

/// Longest wait for a connection, and for all of a call. They are Mooncake's.
const CONNECT: Duration = Duration::from_millis(1500);
const ALL: Duration = Duration::from_secs(3);
/// Connections are kept for the next call for this long: shorter than any server keeps one that idles, so that none
/// is used while the server closes it.
const IDLE: Duration = Duration::from_secs(1);

/// Makes calls, on any thread.
pub(super) struct Client {
    agent: Agent,
    /// Most bytes of an answer.
    most: u64,
}

/// What a server answered.
pub(super) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    /// For an error.
    pub fn refusal(&self) -> String {
        format!("it answered {} {:?}", self.status, said(&self.body))
    }
}

impl Client {
    pub fn new(most: usize) -> Self {
        let config = Agent::config_builder()
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(ALL))
            .max_idle_age(IDLE)
            .http_status_as_error(false)
            // As Mooncake: a redirection is an answer like any other.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("mooncake-efa/", env!("CARGO_PKG_VERSION")));
        #[cfg(feature = "https")]
        let config = config.tls_config(
            ureq::tls::TlsConfig::builder()
                .root_certs(ureq::tls::RootCerts::PlatformVerifier)
                .build(),
        );
        Self { agent: config.build().into(), most: most as u64 }
    }

    /// One call. An error says why there was no answer, and does not name the server.
    pub fn call(&self, method: Method, uri: &str, json: Option<&str>) -> Result<Answer, String> {
        let request = Request::builder().method(method).uri(uri);
        let answer = match json {
            Some(json) => request
                .header("Content-Type", "application/json")
                .body(json)
                .map_err(ureq::Error::from)
                .and_then(|request| self.agent.run(request)),
            None => request
                .body(())
                .map_err(ureq::Error::from)
                .and_then(|request| self.agent.run(request)),
        };
        let mut answer = answer.map_err(|error| self.why(&error))?;
        let announced = answer.body().content_length().unwrap_or(0);
        if announced > self.most {
            let most = self.most;
            return Err(format!("it announces {announced} bytes, at most {most} allowed"));
        }
        let body = answer.body_mut().with_config().limit(self.most).read_to_vec();
        let body = body.map_err(|error| self.why(&error))?;
        Ok(Answer { status: answer.status().as_u16(), body })
    }

    fn why(&self, error: &ureq::Error) -> String {
        match error {
            ureq::Error::Io(error) => error.to_string(),
            ureq::Error::Timeout(Timeout::Connect) => format!("no connection within {CONNECT:?}"),
            ureq::Error::Timeout(_) => format!("no answer within {ALL:?}"),
            ureq::Error::BodyExceedsLimit(_) => {
                format!("the answer is too long, at most {} bytes allowed", self.most)
            }
            error => said(error.to_string().as_bytes()),
        }
    }
}

/// A URI as given, if it is one with a host and, perhaps, a port.
pub(super) fn uri(text: &str) -> Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|why| format!("{why}"))?;
    match uri.authority() {
        Some(authority) if authority.host().is_empty() => Err("no host".to_owned()),
        // The parser lets them through.
        Some(authority) if uri.port().is_none() && authority.as_str() != authority.host() => {
            Err("no such port".to_owned())
        }
        Some(_) => Ok(uri),
        None => Err("no host".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// What a client that takes 1000 bytes makes of an answer.
    fn answered(answer: String) -> Result<Answer, String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}/", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer.as_bytes());
        });
        let answer = Client::new(1000).call(Method::GET, &uri, None);
        server.join().unwrap();
        answer
    }

    #[test]
    fn answers_are_limited() {
        let announced = |announced: usize, sent: usize| {
            let body = "x".repeat(sent);
            answered(format!("HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\n{body}"))
        };
        assert_eq!(announced(1000, 1000).unwrap().body.len(), 1000);
        assert!(announced(1001, 0).err().unwrap().contains("announces 1001 bytes, at most 1000"));
        assert!(announced(1000, 999).is_err(), "cut off");
        let until_the_end = |sent| answered(format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(sent)));
        assert_eq!(until_the_end(1000).unwrap().body.len(), 1000);
        assert!(until_the_end(1001).err().unwrap().contains("too long, at most 1000 bytes"));
    }
}
