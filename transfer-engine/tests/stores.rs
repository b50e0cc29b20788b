//! The clients of the metadata servers against real ones: Debian's `etcd` and `redis-server`, and the HTTP server of
//! Mooncake's wheel; and against servers that mean no good.
//!
//! `scripts/setup test` brings the first two, `scripts/setup mooncake` the third, to PATH or to `.tools/`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mooncake_efa::Code;
use transfer_engine::store::{self, Store};

/// No test waits as long as this; it only keeps one that hangs from hanging for ever.
const LONG: Duration = Duration::from_secs(60);

/// The largest piece of memory that was asked for.
struct Largest;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, which keeps the promises; ours only looks at the sizes.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those of this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A program on PATH or in `.tools/bin`.
fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let here = std::env::split_paths(&path).chain([root().join(".tools/bin")]);
    let found = here.map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no {name} here: run `scripts/setup test`"))
}

/// Which server, and how it is started.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Etcd,
    Redis,
    /// With this password.
    RedisWith(&'static str),
    Http,
}

impl Kind {
    fn command(self, port: u16, dir: &Path) -> Command {
        let url = format!("http://127.0.0.1:{port}");
        let number = port.to_string();
        match self {
            Self::Etcd => {
                let mut command = Command::new(program("etcd"));
                let peers = "http://127.0.0.1:0";
                command.args(["--name", "test", "--data-dir"]).arg(dir.join("data"));
                command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
                command.args(["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]);
                command.arg(format!("--initial-cluster=test={peers}"));
                command
            }
            Self::Redis | Self::RedisWith(_) => {
                let mut command = Command::new(program("redis-server"));
                command.args(["--port", &number, "--bind", "127.0.0.1", "--dir"]).arg(dir);
                command.args(["--appendonly", "yes"]);
                if let Self::RedisWith(password) = self {
                    command.args(["--requirepass", password]);
                }
                command
            }
            Self::Http => {
                let mut command = Command::new(http_server());
                command.args(["--host", "127.0.0.1", "--port", &number]);
                command
            }
        }
    }

    fn uri(self, port: u16) -> String {
        match self {
            Self::Etcd => format!("etcd://127.0.0.1:{port}"),
            Self::Redis | Self::RedisWith(_) => format!("redis://127.0.0.1:{port}"),
            Self::Http => format!("http://127.0.0.1:{port}/metadata"),
        }
    }

    /// Whether what was stored is still there after the server was killed.
    fn keeps(self) -> bool {
        self != Self::Http
    }
}

/// Where servers write: in memory where that can be, for a disk may take longer than a client waits.
fn temporary() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

fn http_server() -> PathBuf {
    root().join(".tools/mooncake/bin/mooncake_http_metadata_server")
}

/// A port that is free now, and is none that the kernel gives to outgoing connections.
fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(10000..32768);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A server of this test's own. Dropping it ends it and removes what it wrote.
struct Server {
    kind: Kind,
    port: u16,
    dir: PathBuf,
    child: Child,
}

impl Server {
    fn start(kind: Kind) -> Self {
        // Another process may take the port first; the server ends then.
        for _ in 0..10 {
            let port = free_port();
            let dir = temporary().join(format!("mefa-store-{}-{port}", std::process::id()));
            std::fs::create_dir(&dir).unwrap();
            let child = spawn(kind, port, &dir);
            let mut server = Self { kind, port, dir, child };
            if server.answers() {
                return server;
            }
        }
        panic!("{kind:?} does not start");
    }

    fn uri(&self) -> String {
        self.kind.uri(self.port)
    }

    /// Waits until it does; false if it has ended.
    fn answers(&mut self) -> bool {
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            let connected = TcpStream::connect(("127.0.0.1", self.port)).is_ok();
            // A password is for the tests to give.
            let ready = match self.kind {
                Kind::RedisWith(_) => connected,
                _ => connected && store::open(&self.uri()).is_ok(),
            };
            if ready {
                return true;
            }
            assert!(begin.elapsed() < LONG, "{:?} does not answer\n{}", self.kind, self.log());
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{:?} ended\n{}", self.kind, self.log());
        false
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.child = spawn(self.kind, self.port, &self.dir);
        assert!(self.answers(), "{:?} does not start again", self.kind);
    }
}

fn spawn(kind: Kind, port: u16, dir: &Path) -> Child {
    let log = std::fs::File::create(dir.join("log")).unwrap();
    let mut command = kind.command(port, dir);
    command.stdin(Stdio::null()).stderr(log.try_clone().unwrap()).stdout(log);
    dies_with_us(&mut command);
    command.spawn().unwrap_or_else(|why| panic!("{kind:?}: {why}"))
}

/// So that it does not stay if this process is killed.
fn dies_with_us(command: &mut Command) {
    // SAFETY: prctl is a system call, which may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn value_of(store: &dyn Store, key: &str) -> Option<String> {
    store.get(key).unwrap_or_else(|error| panic!("{key}: {error}"))
}

/// What every store must do.
fn use_store(server: &mut Server) {
    let store = store::open(&server.uri()).unwrap();
    let store = store.as_ref();
    keys_and_values(store);
    many_threads(store);
    restart(server, store);
}

fn keys_and_values(store: &dyn Store) {
    assert_eq!(value_of(store, "mooncake/ram/nobody"), None);
    store.remove("mooncake/ram/nobody").unwrap();

    let keys = [
        "mooncake/ram/10.0.0.1:15000",
        "mooncake/rpc_meta/[fe80::1%eth0]:80",
        "mooncake/ram/with space",
        "mooncake/ram/größe-模型",
        "mooncake/ram/a?b&key=c#d+e%20f=\"'\\;,~{}|<>",
        "plain",
    ];
    for (i, key) in keys.iter().enumerate() {
        assert_eq!(value_of(store, key), None, "{key}");
        // As Json::FastWriter ends what it writes.
        let value = format!("{{\"name\":\"{i} größe\",\"text\":\"\\r\\n\\\"+&=%20\"}}\n");
        store.put(key, &value).unwrap();
        assert_eq!(value_of(store, key), Some(value));
    }
    for (i, key) in keys.iter().enumerate() {
        assert!(value_of(store, key).unwrap().contains(&format!("\"{i} ")), "{key} has another's");
        store.remove(key).unwrap();
        assert_eq!(value_of(store, key), None, "{key}");
        for other in &keys[i + 1..] {
            assert!(value_of(store, other).is_some(), "{other} went with {key}");
        }
    }

    store.put("k", "1").unwrap();
    store.put("k", "22").unwrap();
    assert_eq!(value_of(store, "k").as_deref(), Some("22"));
    store.put("k", "").unwrap();
    assert_eq!(value_of(store, "k").as_deref(), Some(""));
    store.remove("k").unwrap();
    store.remove("k").unwrap();

    // The most that Mooncake's HTTP server takes.
    let long: String =
        (0..1_u64 << 20).map(|i| char::from(b'!' + (i * i / 7 % 90) as u8)).collect();
    store.put("long", &long).unwrap();
    assert!(value_of(store, "long") == Some(long), "the long value is another");
    store.remove("long").unwrap();
}

fn many_threads(store: &dyn Store) {
    const THREADS: usize = 16;
    let begin = Barrier::new(THREADS);
    thread::scope(|scope| {
        for t in 0..THREADS {
            let begin = &begin;
            scope.spawn(move || {
                begin.wait();
                for i in 0..20 {
                    let (key, value) = (format!("t/{t}/{}", i % 3), format!("{t} {i}"));
                    store.put(&key, &value).unwrap();
                    assert_eq!(value_of(store, &key), Some(value));
                }
                for i in 0..3 {
                    store.remove(&format!("t/{t}/{i}")).unwrap();
                }
            });
        }
    });
}

fn restart(server: &mut Server, store: &dyn Store) {
    store.put("kept", "yes").unwrap();
    server.kill();
    let at = format!("127.0.0.1:{}", server.port);
    for error in [
        store.get("kept").unwrap_err(),
        store.put("kept", "no").unwrap_err(),
        store.remove("kept").unwrap_err(),
        store::open(&server.uri()).map(drop).unwrap_err(),
    ] {
        assert_eq!(error.code, Code::Metadata);
        assert!(error.text.contains(&at) && error.text.contains("refused"), "{error}");
    }
    server.start_again();
    // The same client, whose connection is gone.
    let kept = server.kind.keeps().then(|| "yes".to_owned());
    assert_eq!(value_of(store, "kept"), kept);
    // Again without a call while it was away.
    store.put("kept", "still").unwrap();
    server.kill();
    server.start_again();
    store.put("after", "2").unwrap();
    assert_eq!(value_of(store, "after").as_deref(), Some("2"));
    store.remove("after").unwrap();
}

#[test]
fn etcd() {
    use_store(&mut Server::start(Kind::Etcd));
}

#[test]
fn redis() {
    use_store(&mut Server::start(Kind::Redis));
}

/// `make test-mooncake` runs it with `MEFA_TEST_MOONCAKE` set, which does not let it be skipped.
#[test]
fn http_of_the_wheel() {
    if !http_server().is_file() {
        let why = format!("no {} here: run `scripts/setup mooncake`", http_server().display());
        assert!(std::env::var_os("MEFA_TEST_MOONCAKE").is_none(), "{why}");
        eprintln!("skipped: {why}");
        return;
    }
    let mut server = Server::start(Kind::Http);
    use_store(&mut server);
    // What a server refuses is said, with its words.
    let store = store::open(&server.uri()).unwrap();
    store.put("mooncake/rpc_meta/a", "{}").unwrap();
    let error = store.put("mooncake/rpc_meta/a", "{}").unwrap_err();
    assert_eq!(error.code, Code::Metadata);
    for part in [&server.uri(), "mooncake/rpc_meta/a", "400", "Duplicate rpc_meta key"] {
        assert!(error.text.contains(part), "{error}");
    }
    let error = store.put("k", &"x".repeat((1 << 20) + 1)).unwrap_err();
    assert!(error.text.contains("413"), "{error}");
}

/// Without a scheme it is etcd, and the next server is asked if one does not answer.
#[test]
fn etcd_has_several_servers() {
    let mut server = Server::start(Kind::Etcd);
    let (one, none) = (server.port, free_port());
    for connection in [
        format!("127.0.0.1:{none};127.0.0.1:{one}"),
        format!("etcd://127.0.0.1:{one};127.0.0.1:{none}"),
        format!("etcd://http://127.0.0.1:{none}/, localhost:{one}"),
    ] {
        let store =
            store::open(&connection).unwrap_or_else(|error| panic!("{connection}: {error}"));
        store.put("k", &connection).unwrap();
        assert_eq!(value_of(store.as_ref(), "k"), Some(connection));
    }
    // One that is there, and answers that it cannot.
    let busy = answer_always(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 17\r\n\r\n{\"error\":\"later\"}",
    );
    let store = store::open(&format!("etcd://127.0.0.1:{busy};127.0.0.1:{one}")).unwrap();
    assert!(value_of(store.as_ref(), "k").is_some());
    server.kill();
    let error = store.get("k").unwrap_err();
    for part in
        [&format!("127.0.0.1:{one}"), "refused", &format!("127.0.0.1:{busy}"), "503 \"later\""]
    {
        assert!(error.text.contains(part), "{error}");
    }
}

/// Runs a test of this program, marked `#[ignore]`, in a process with these variables. Returns what it wrote.
fn with_variables(test: &str, variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MC_") {
            command.env_remove(name);
        }
    }
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} with {variables:?}:\n{text}"
    );
    text
}

/// Logs to stderr.
struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        eprintln!("{}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
}

/// Opens `URI`, writes and reads a key, and prints the error if there is one.
#[test]
#[ignore = "a part of others"]
fn open_and_print() {
    log::set_logger(&Stderr).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let opened = store::open(&std::env::var("URI").unwrap());
    let used = opened.and_then(|store| {
        store.put("k", "v")?;
        store.get("k")
    });
    match used {
        Ok(value) => println!("value: {value:?}"),
        Err(error) => println!("error {:?}: {error}", error.code),
    }
}

#[test]
fn redis_password() {
    const SECRET: &str = "pass\"wörd 7f3a";
    let server = Server::start(Kind::RedisWith(SECRET));
    let uri = server.uri();
    let with = |variables: &[(&str, &str)]| {
        let text =
            with_variables("open_and_print", &[&[("URI", uri.as_str())], variables].concat());
        for part in ["7f3a", "wrong-one"] {
            assert!(!text.contains(part), "the password is in the output:\n{text}");
        }
        text
    };
    let at = format!("127.0.0.1:{}", server.port);
    let refused = |text: &str, why: &str| {
        let line = text.lines().find(|line| line.starts_with("error Metadata")).unwrap_or_default();
        assert!(line.contains(&at) && line.contains(why), "{text}");
    };
    assert!(with(&[("MC_REDIS_PASSWORD", SECRET)]).contains("value: Some(\"v\")"));
    let user = [("MC_REDIS_PASSWORD", SECRET), ("MC_REDIS_USERNAME", "default")];
    assert!(with(&user).contains("value: Some(\"v\")"));
    refused(&with(&[]), "set MC_REDIS_PASSWORD");
    refused(&with(&[("MC_REDIS_PASSWORD", "wrong-one")]), "WRONGPASS");
    let user = [("MC_REDIS_PASSWORD", SECRET), ("MC_REDIS_USERNAME", "nobody")];
    refused(&with(&user), "WRONGPASS");

    // Nor does a server that says the command back bring it into an error.
    let echo =
        answer_always("-ERR unknown command 'AUTH', with args beginning with: 'wrong-one'\r\n");
    let uri = format!("redis://127.0.0.1:{echo}");
    let text =
        with_variables("open_and_print", &[("URI", &uri), ("MC_REDIS_PASSWORD", "wrong-one")]);
    assert!(text.contains("error Metadata") && !text.contains("wrong-one"), "{text}");
}

#[test]
fn redis_database() {
    let server = Server::start(Kind::Redis);
    let uri = server.uri();
    let store = store::open(&uri).unwrap();
    let with =
        |index| with_variables("open_and_print", &[("URI", &uri), ("MC_REDIS_DB_INDEX", index)]);
    let warning = "WARN: MC_REDIS_DB_INDEX";
    assert!(!with("7").contains(warning));
    assert_eq!(value_of(store.as_ref(), "k"), None, "written to database 0");
    assert!(!with("0").contains(warning));
    assert_eq!(value_of(store.as_ref(), "k").as_deref(), Some("v"));
    for bad in ["256", "-1", "x"] {
        store.remove("k").unwrap();
        let text = with(bad);
        assert_eq!(text.matches(warning).count(), 1, "{text}");
        assert_eq!(value_of(store.as_ref(), "k").as_deref(), Some("v"), "{bad}: not in database 0");
    }
    // This server has 16.
    let text = with("200");
    assert!(text.contains("error Metadata") && text.contains("out of range"), "{text}");
}

/// TLS, with the certificates that the system, or `SSL_CERT_FILE`, has.
#[test]
#[cfg(feature = "https")]
fn https() {
    const SERVER: &str = r#"
import http.server, ssl, urllib.parse
values = {}
class Handler(http.server.BaseHTTPRequestHandler):
    def key(self):
        return urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["key"][0]
    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        value = values.get(self.key())
        self.answer(404 if value is None else 200, value or b"")
    def do_PUT(self):
        values[self.key()] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("cert.pem", "key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
"#;
    // Not an authority's: the server's own.
    const CERTIFICATE: &str = "[req]
distinguished_name = name
x509_extensions = server
prompt = no
[name]
CN = localhost
[server]
basicConstraints = critical, CA:FALSE
subjectAltName = DNS:localhost, IP:127.0.0.1
";
    let dir = temporary().join(format!("mefa-https-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("config"), CERTIFICATE).unwrap();
    let arguments =
        "req -x509 -newkey rsa:2048 -nodes -config config -keyout key.pem -out cert.pem";
    let mut openssl = Command::new(program("openssl"));
    let made = openssl.args(arguments.split(' ')).current_dir(&dir).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let mut python = Command::new(program("python3"));
    python.args(["-c", SERVER]).current_dir(&dir).stdout(Stdio::piped()).stderr(Stdio::null());
    dies_with_us(&mut python);
    let mut server = Server { kind: Kind::Http, port: 0, dir, child: python.spawn().unwrap() };
    let mut port = String::new();
    BufReader::new(server.child.stdout.take().unwrap()).read_line(&mut port).unwrap();
    let port = port.trim();

    let certificate = server.dir.join("cert.pem");
    for host in ["localhost", "127.0.0.1"] {
        let uri = format!("https://{host}:{port}/metadata");
        let known = [("URI", uri.as_str()), ("SSL_CERT_FILE", certificate.to_str().unwrap())];
        let text = with_variables("open_and_print", &known);
        assert!(text.contains("value: Some(\"v\")"), "{text}");
        let text = with_variables("open_and_print", &[("URI", &uri)]);
        let error =
            text.lines().find(|line| line.starts_with("error Metadata")).unwrap_or_default();
        assert!(error.contains(&uri) && error.contains("certificate"), "{text}");
    }
}

/// A server that answers every request with the same, on a connection each.
fn answer_always(answer: &'static str) -> u16 {
    serve(move |mut stream| {
        let mut request = [0; 4096];
        // One read will do for the small requests that come here.
        let _ = stream.read(&mut request);
        let _ = stream.write_all(answer.as_bytes());
    })
}

/// A server; `with` is called for every connection, on a thread of its own. It stays until the process ends.
fn serve(with: impl Fn(TcpStream) + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let with = with.clone();
            thread::spawn(move || with(stream));
        }
    });
    port
}

fn uris(port: u16) -> [String; 3] {
    [Kind::Http, Kind::Etcd, Kind::Redis].map(|kind| kind.uri(port))
}

/// All of them fail to open, with the host and a cause in the error.
fn all_refuse(port: u16, why: &str) {
    thread::scope(|scope| {
        for uri in uris(port) {
            scope.spawn(move || {
                let error = store::open(&uri).map(drop).unwrap_err();
                assert_eq!(error.code, Code::Metadata, "{error}");
                let at = format!("127.0.0.1:{port}");
                assert!(error.text.contains(&at) && error.text.contains(why), "{uri}: {error}");
                assert!(!error.text.contains('\n'), "{error:?}");
            });
        }
    });
}

#[test]
fn nobody_listens() {
    all_refuse(free_port(), "refused");
}

#[test]
fn a_server_says_nothing() {
    let port = serve(|stream| {
        // Held, or it would be closed.
        thread::sleep(LONG);
        drop(stream);
    });
    all_refuse(port, "no answer within 3s");
}

/// Each byte comes soon after the last one: no single read takes long.
#[test]
fn a_server_is_slow() {
    let port = serve(|mut stream| {
        let mut first = [0];
        let http = stream.peek(&mut first).is_ok() && first[0] != b'*';
        let begin =
            if http { "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" } else { "$100000\r\n" };
        let _ = stream.write_all(begin.as_bytes());
        // 10 seconds of it.
        for _ in 0..200 {
            let _ = stream.write_all(b" ");
            thread::sleep(Duration::from_millis(50));
        }
    });
    all_refuse(port, "no answer within 3s");
}

#[test]
fn a_server_closes_the_connection() {
    let port = serve(drop);
    for uri in uris(port) {
        let error = store::open(&uri).map(drop).unwrap_err();
        assert!(error.text.contains(&format!("127.0.0.1:{port}")), "{error}");
    }
}

#[test]
fn a_server_answers_what_makes_no_sense() {
    for answer in
        ["\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n"]
    {
        let port = answer_always(answer);
        for uri in uris(port) {
            let error = store::open(&uri).map(drop).unwrap_err();
            assert!(error.text.contains(&format!("127.0.0.1:{port}")), "{error}");
        }
    }
    // JSON, but none of etcd's; a text that is none; a redirection, which is not followed.
    let json = answer_always("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"kvs\":");
    assert!(store::open(&Kind::Etcd.uri(json)).is_err());
    let bytes = answer_always("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\u{e9}");
    assert!(store::open(&Kind::Http.uri(bytes)).is_ok());
    let moved = answer_always(
        "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    );
    let error = store::open(&Kind::Http.uri(moved)).map(drop).unwrap_err();
    assert!(error.text.contains("302"), "{error}");
}

/// 10 GiB announced, and as much as one likes sent: an error, and never a piece of memory for all of it.
#[test]
fn a_server_sends_too_much() {
    let endless = |begin: &'static str, part: &'static [u8]| {
        serve(move |mut stream| {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(begin.as_bytes());
            let many = part.repeat((1 << 20) / part.len());
            while stream.write_all(&many).is_ok() {}
        })
    };
    let announced = "HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let until_end = "HTTP/1.1 200 OK\r\n\r\n";
    for (kind, begin, part, why) in [
        (Kind::Http, announced, &b"x"[..], "announces 10737418240 bytes"),
        (Kind::Http, chunked, b"8\r\nxxxxxxxx\r\n", ""),
        (Kind::Http, chunked, b"280000000\r\nxxxxx", ""),
        (Kind::Http, until_end, b"x", ""),
        (Kind::Http, "HTTP/1.1 200 OK\r\n", b"x: yyyyyyyyyyyy\r\n", "headers"),
        (Kind::Etcd, announced, b"x", "announces 10737418240 bytes"),
        (Kind::Etcd, "HTTP/1.1 200 OK\r\n\r\n{\"kvs\":[{\"value\":\"", b"AAAA", ""),
        (Kind::Redis, "$10737418240\r\n", b"x", ""),
        (Kind::Redis, "$9223372036854775807\r\n", b"x", ""),
        (Kind::Redis, "+", b"x", ""),
        (Kind::Redis, "*1000000000\r\n", b":1\r\n", "does not answer as Redis does"),
    ] {
        let port = endless(begin, part);
        let error = store::open(&kind.uri(port)).map(drop).unwrap_err();
        assert_eq!(error.code, Code::Metadata);
        let at = format!("127.0.0.1:{port}");
        // That it is too long, or, on a slow machine, that the time is over.
        assert!(error.text.contains(&at) && error.text.contains(why), "{error}");
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest <= 256 << 20, "a piece of {largest} bytes was asked for");
}

/// What goes over the wire, byte by byte where it matters.
#[test]
fn http_requests() {
    let (to, requests) = std::sync::mpsc::channel();
    let port = serve(move |stream| {
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        let mut stream = stream;
        loop {
            let (mut head, mut length) = (Vec::new(), 0);
            loop {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let line = line.trim_end().to_owned();
                if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                    length = n.parse().unwrap();
                }
                if line.is_empty() {
                    break;
                }
                head.push(line);
            }
            let mut body = vec![0; length];
            lines.read_exact(&mut body).unwrap();
            to.send((head, String::from_utf8(body).unwrap())).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nv").unwrap();
        }
    });
    let store = store::open(&Kind::Http.uri(port)).unwrap();
    let next = || requests.recv_timeout(LONG).unwrap();
    next();
    assert_eq!(value_of(store.as_ref(), "mooncake/ram/a:1 é+~").as_deref(), Some("v"));
    store.put("k", "{\"a\":1}").unwrap();
    store.remove("k").unwrap();
    assert_eq!(next().0[0], "GET /metadata?key=mooncake%2Fram%2Fa%3A1%20%C3%A9%2B~ HTTP/1.1");
    let (head, body) = next();
    assert_eq!((head[0].as_str(), body.as_str()), ("PUT /metadata?key=k HTTP/1.1", "{\"a\":1}"));
    assert!(
        head.iter().any(|line| line.eq_ignore_ascii_case("content-type: application/json")),
        "{head:?}"
    );
    assert_eq!(next().0[0], "DELETE /metadata?key=k HTTP/1.1");
}

#[test]
fn connection_strings() {
    for (connection, why) in [
        ("ftp://a:1", "unknown scheme"),
        ("rediss://a:1", "unknown scheme"),
        ("http://", "http://"),
        ("http:///metadata", "http:///metadata"),
        ("http://a b/metadata", "a b"),
        ("http://a:70000/metadata", "no such port"),
        ("", "no host"),
        ("etcd://;", "no host"),
        ("etcd://a:1/b", "HOST:PORT"),
        ("redis://", "no host"),
        ("redis://a:1/2", "MC_REDIS_DB_INDEX"),
        ("redis://:secret@a:1", "MC_REDIS_PASSWORD"),
        ("http://user:secret@a/metadata", "password"),
        ("user:secret@a:1", "password"),
    ] {
        let error = store::open(connection).map(drop).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument, "{connection}: {error}");
        assert!(error.text.contains(why), "{connection}: {error}");
        assert!(!error.text.contains("secret"), "{error}");
    }
    let error = store::open("http://no-such-host.invalid:1/metadata").map(drop).unwrap_err();
    assert_eq!(error.code, Code::Metadata);
    assert!(error.text.contains("no-such-host.invalid:1"), "{error}");
}
