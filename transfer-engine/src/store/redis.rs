//! Redis. The messages are the redis crate's; the socket is ours, so that an answer is limited in length and a call in
//! time.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use mooncake_efa::segment::MAX_TEXT;
use mooncake_efa::{Error, Result};
use parking_lot::Mutex;
use redis::{Cmd, Parser, Value, cmd};

use super::{Store, failed, said, text};
use crate::address;

/// Longest time for a call, with what it takes to connect. Looking the host's name up is not in it.
const ALL: Duration = Duration::from_secs(3);
/// Most bytes of an answer: a value, and what is around it.
const MAX_ANSWER: usize = MAX_TEXT + (64 << 10);
const PORT: u16 = 6379;

/// A server, and one connection to it, for calls one after the other.
pub(super) struct Redis {
    host: String,
    port: u16,
    login: Login,
    connection: Mutex<Option<Connection>>,
}

/// `MC_REDIS_USERNAME`, `MC_REDIS_PASSWORD` and `MC_REDIS_DB_INDEX`.
#[derive(Default)]
struct Login {
    user: String,
    /// Empty: none is asked for.
    password: String,
    database: u8,
}

impl Login {
    /// Those of the environment. A bad index costs one warning.
    fn from_env() -> Self {
        let text =
            |name: &str| std::env::var_os(name).unwrap_or_default().to_string_lossy().into_owned();
        let index = text("MC_REDIS_DB_INDEX");
        let index = index.trim();
        let database = index.parse().unwrap_or_else(|_| {
            if !index.is_empty() {
                log::warn!(
                    "MC_REDIS_DB_INDEX={index:?} must be a whole number from 0 to 255; keeping 0"
                );
            }
            0
        });
        Self { user: text("MC_REDIS_USERNAME"), password: text("MC_REDIS_PASSWORD"), database }
    }
}

/// Why a call came to nothing.
enum Failure {
    /// The server says no: its word for it, and the rest of what it says.
    Refused(String, String),
    /// The connection is of no use any more.
    Broken(io::Error),
}

impl From<io::Error> for Failure {
    fn from(why: io::Error) -> Self {
        Self::Broken(why)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(code, _) if code == "NOAUTH" => {
                write!(f, "it wants a password; set MC_REDIS_PASSWORD")
            }
            Self::Refused(code, rest) => {
                write!(f, "it answered {:?}", said(format!("{code} {rest}").as_bytes()))
            }
            Self::Broken(why) if why.kind() == io::ErrorKind::TimedOut => {
                write!(f, "no answer within {ALL:?}")
            }
            Self::Broken(why) => why.fmt(f),
        }
    }
}

impl Redis {
    /// `HOST` or `HOST:PORT`.
    pub fn new(server: &str) -> Result<Self> {
        Self::with_login(server, Login::from_env())
    }

    fn with_login(server: &str, login: Login) -> Result<Self> {
        let invalid = |why| Error::invalid(format!("metadata server redis {server}: {why}"));
        let server = server.trim_end_matches('/');
        if server.contains('/') {
            return Err(invalid("HOST:PORT expected; the database is MC_REDIS_DB_INDEX"));
        }
        let (host, mut port) = address::parse(server, 0);
        if port == 0 {
            if server != host && server != format!("[{host}]") {
                return Err(invalid("no such port"));
            }
            port = PORT;
        }
        if host.is_empty() {
            return Err(invalid("no host"));
        }
        Ok(Self { host, port, login, connection: Mutex::new(None) })
    }

    /// The answer to a command on a key.
    fn call(&self, command: &str, key: &str, value: Option<&str>) -> Result<Value> {
        let mut message = cmd(command);
        message.arg(key).arg(value);
        self.try_call(&message).map_err(|why| self.failed(command, key, why))
    }

    fn failed(&self, command: &str, key: &str, why: impl fmt::Display) -> Error {
        let server = format!("redis {}", address::join(&self.host, self.port));
        failed(&server, &format!("{command} of {key}"), why)
    }

    fn try_call(&self, message: &Cmd) -> Result<Value, Failure> {
        let deadline = Instant::now() + ALL;
        let mut kept = self.connection.lock();
        // Taken out, so that only one that works is put back.
        if let Some(mut connection) = kept.take() {
            match connection.call(message, deadline) {
                Err(Failure::Broken(why)) if why.kind() != io::ErrorKind::TimedOut => {
                    // The server went away since, and may be back. What we ask can be asked twice.
                    log::debug!("redis {}: {why}; connecting again", self.host);
                }
                Err(Failure::Broken(why)) => return Err(why.into()),
                answer => {
                    *kept = Some(connection);
                    return answer;
                }
            }
        }
        let mut connection = self.connect(deadline)?;
        let answer = connection.call(message, deadline);
        if !matches!(answer, Err(Failure::Broken(_))) {
            *kept = Some(connection);
        }
        answer
    }

    fn connect(&self, deadline: Instant) -> Result<Connection, Failure> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
        for address in (self.host.as_str(), self.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, left(deadline)?) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    let mut connection = Connection { stream };
                    connection.log_in(&self.login, deadline)?;
                    return Ok(connection);
                }
                Err(why) => last = why,
            }
        }
        Err(last.into())
    }
}

struct Connection {
    stream: TcpStream,
}

impl Connection {
    fn log_in(&mut self, login: &Login, deadline: Instant) -> Result<(), Failure> {
        if !login.password.is_empty() {
            let mut auth = cmd("AUTH");
            if !login.user.is_empty() {
                auth.arg(&login.user);
            }
            auth.arg(&login.password);
            self.call(&auth, deadline).map_err(|failure| match failure {
                // Not the rest: a server that does not know the command says all of it back.
                Failure::Refused(code, _) => {
                    Failure::Refused(code, "to MC_REDIS_USERNAME and MC_REDIS_PASSWORD".to_owned())
                }
                broken => broken,
            })?;
        }
        if login.database != 0 {
            self.call(cmd("SELECT").arg(login.database), deadline)?;
        }
        Ok(())
    }

    fn call(&mut self, message: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        let mut stream = Until { stream: &self.stream, deadline };
        stream.write_all(&message.get_packed_command())?;
        parse(stream)
    }
}

/// Reads one answer.
fn parse(from: impl Read) -> Result<Value, Failure> {
    match Parser::new().parse_value(Answer { from, left: MAX_ANSWER, begun: false }) {
        Ok(Value::ServerError(why)) => Err(Failure::Refused(
            why.code().to_owned(),
            why.details().unwrap_or_default().to_owned(),
        )),
        Ok(value) => Ok(value),
        Err(why) if why.is_timeout() => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        Err(why) if why.is_connection_dropped() => {
            Err(io::Error::other("it closed the connection").into())
        }
        Err(why) => Err(io::Error::other(said(why.to_string().as_bytes())).into()),
    }
}

/// The value in the answer to a GET.
fn value(answer: Value) -> Result<Option<String>, String> {
    match answer {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => text(bytes).map(Some),
        _ => Err("it answered something else than a value".to_owned()),
    }
}

/// The bytes of an answer: no more than may be, and none of a kind that we never ask for, which could be many small
/// things that take far more memory than bytes.
struct Answer<R> {
    from: R,
    left: usize,
    begun: bool,
}

impl<R: Read> Read for Answer<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let why = format!("the answer is too long, at most {MAX_ANSWER} bytes allowed");
            return Err(io::Error::other(why));
        }
        let most = to.len().min(self.left);
        let n = self.from.read(&mut to[..most])?;
        if n > 0 && !self.begun && !b"+-:$".contains(&to[0]) {
            return Err(io::Error::other("it does not answer as Redis does"));
        }
        self.begun = true;
        self.left -= n;
        Ok(n)
    }
}

/// A socket until a deadline.
struct Until<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        self.stream.read(to)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(left(self.deadline)?))?;
        self.stream.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is left of the time. Never zero, which would mean no limit.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

impl Store for Redis {
    fn get(&self, key: &str) -> Result<Option<String>> {
        let answer = self.call("GET", key, None)?;
        value(answer).map_err(|why| self.failed("GET", key, why))
    }

    fn put(&self, key: &str, value: &str) -> Result<()> {
        self.call("SET", key, Some(value)).map(drop)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.call("DEL", key, None).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn servers() {
        let of = |text| Redis::with_login(text, Login::default()).map(|it| (it.host, it.port));
        assert_eq!(of("a").unwrap(), ("a".into(), PORT));
        assert_eq!(of("a:7/").unwrap(), ("a".into(), 7));
        assert_eq!(of("[::1]").unwrap(), ("::1".into(), PORT));
        assert_eq!(of("::1").unwrap(), ("::1".into(), PORT));
        assert_eq!(of("[::1]:7").unwrap(), ("::1".into(), 7));
        for text in ["", "/", ":7", "a:", "a:x", "a:0", "a:70000", "a:7/3"] {
            let error = of(text).unwrap_err();
            assert_eq!(error.code, mooncake_efa::Code::InvalidArgument);
            assert!(error.text.contains(&format!("redis {text}")), "{error}");
        }
    }

    #[test]
    fn answers() {
        let of = |answer: &str| parse(answer.as_bytes()).map_err(|why| why.to_string());
        assert_eq!(value(of("$-1\r\n").unwrap()), Ok(None));
        assert_eq!(value(of("$0\r\n\r\n").unwrap()), Ok(Some(String::new())));
        assert_eq!(value(of("$4\r\na\r\nb\r\n").unwrap()), Ok(Some("a\r\nb".into())));
        assert!(value(of("+OK\r\n").unwrap()).is_err());
        for (answer, why) in [
            ("-ERR no\r\n", "\"ERR no\""),
            ("-NOAUTH Authentication required.\r\n", "MC_REDIS_PASSWORD"),
            ("", "closed"),
            ("$5\r\nabc", "closed"),
            ("$99999999999\r\nabc", "closed"),
            ("*1\r\n:1\r\n", "as Redis does"),
            ("HTTP/1.1 400 Bad Request\r\n", "as Redis does"),
            ("$x\r\n", "Expected integer"),
        ] {
            let said = of(answer).unwrap_err();
            assert!(said.contains(why) && !said.contains('\n'), "{answer:?}: {said}");
        }
    }

    #[test]
    fn answers_are_limited() {
        let most = MAX_TEXT as u64;
        let of = |length: u64| {
            let bytes = io::repeat(b'x').take(length).chain(&b"\r\n"[..]);
            parse(format!("${length}\r\n").as_bytes().chain(bytes)).map_err(|why| why.to_string())
        };
        assert_eq!(value(of(most).unwrap()).unwrap().unwrap().len() as u64, most);
        assert!(value(of(most + 1).unwrap()).unwrap_err().contains("at most 67108864"));
        assert!(of(10 << 30).unwrap_err().contains("too long, at most"));
    }

    proptest! {
        #[test]
        fn any_answer_is_read(answer in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&answer[..]).map(value);
        }

        #[test]
        fn any_answer_that_looks_like_one_is_read(
            kind in "[-+:$]", number in "-?[0-9]{0,20}", rest in "[-+:$0-9a\r\n\u{ff}]{0,30}",
        ) {
            let _ = parse(format!("{kind}{number}\r\n{rest}").as_bytes()).map(value);
        }
    }
}
