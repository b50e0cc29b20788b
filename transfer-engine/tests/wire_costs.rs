//! What a handshake server costs its process: threads, file descriptors, wake-ups. Of the whole process, so one test
//! at a time.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use mooncake_efa::Result;
use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use transfer_engine::wire::{Answer, Frame, Kind, Limits, Server, ask};

const LONG: Duration = Duration::from_secs(120);
const HERE: &str = "127.0.0.1";
const LONG_ANSWER: usize = 64 << 20;
static ALONE: Mutex<()> = Mutex::new(());

struct Echo;

impl Answer for Echo {
    fn answer(&self, _: Kind, request: &str) -> Result<String> {
        if request == "long" {
            // More than the system takes for a socket.
            return Ok("x".repeat(LONG_ANSWER));
        }
        Ok(request.to_owned())
    }
}

fn limits() -> Limits {
    Limits { connect: LONG, frame: LONG, length: 1 << 20, ipv6: false }
}

fn serve() -> (Server, u16) {
    serve_with(limits())
}

fn serve_with(limits: Limits) -> (Server, u16) {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (Server::start(listener, Arc::new(Echo), limits).unwrap(), port)
}

fn eventually(mut what: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !what() {
        assert!(Instant::now() < end, "it did not happen");
        sleep(Duration::from_millis(20));
    }
}

/// The server's threads, by what they are called.
fn threads() -> Vec<(String, u32)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = tasks.filter_map(|task| {
        let task = task.ok()?;
        // It may be gone.
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        Some((name.trim().to_owned(), task.file_name().to_str()?.parse().ok()?))
    });
    named.filter(|(name, _)| name.starts_with("mefa-te-")).collect()
}

fn files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The counts of one thread, in files that stay open.
struct Cost {
    status: File,
    schedule: File,
}

impl Cost {
    fn of_the_server() -> Self {
        eventually(|| threads().len() == 1);
        let task = format!("/proc/self/task/{}", threads()[0].1);
        let open = |name| File::open(format!("{task}/{name}")).unwrap();
        Self { status: open("status"), schedule: open("schedstat") }
    }

    /// How often it went to sleep, and how long it ran.
    fn so_far(&mut self) -> (u64, Duration) {
        let read = |file: &mut File| {
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            text
        };
        let status = read(&mut self.status);
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let ran = read(&mut self.schedule);
        let ran = ran.split(' ').next().unwrap().parse().unwrap();
        (sleeps.unwrap().trim().parse().unwrap(), Duration::from_nanos(ran))
    }

    /// The same in so much time from now.
    fn during(&mut self, time: Duration) -> (u64, Duration) {
        let before = self.so_far();
        sleep(time);
        let after = self.so_far();
        (after.0 - before.0, after.1 - before.1)
    }
}

#[test]
fn an_idle_server_sleeps() {
    let _alone = ALONE.lock();
    let (_server, port) = serve();
    for connections in [0, 10] {
        let silent: Vec<_> =
            (0..connections).map(|_| TcpStream::connect((HERE, port)).unwrap()).collect();
        assert_eq!(ask(HERE, port, Kind::Probe, "{}", &limits()).unwrap(), "{}");
        let mut cost = Cost::of_the_server();
        eventually(|| cost.during(Duration::from_millis(300)).0 == 0);
        let (sleeps, ran) = cost.during(Duration::from_secs(3));
        println!("{connections} connections: {sleeps} sleeps, ran {ran:?} in 3 s");
        assert_eq!(sleeps, 0);
        drop(silent);
    }
}

#[test]
fn connections_leave_nothing_behind() {
    let _alone = ALONE.lock();
    let before = files();
    let (server, port) = serve();
    let round = |index: usize| {
        assert_eq!(ask(HERE, port, Kind::Notify, "{}", &limits()).unwrap(), "{}");
        // And some who do not keep to the rules.
        let mut stream = TcpStream::connect((HERE, port)).unwrap();
        let frame = Frame { kind: None, text: "{}".to_owned() }.to_bytes();
        stream.write_all(&frame[..index % (frame.len() + 1)]).unwrap();
    };
    round(0);
    eventually(|| threads().len() == 1);
    let with_one = files();
    (0..1000).for_each(round);
    eventually(|| threads().len() == 1 && files() <= with_one);
    drop(server);
    eventually(|| threads().is_empty() && files() == before);
}

#[test]
fn who_does_not_take_its_answer_is_let_go() {
    let _alone = ALONE.lock();
    let (_server, port) = serve_with(Limits { frame: Duration::from_millis(300), ..limits() });
    let without = files();
    let mut stream = TcpStream::connect((HERE, port)).unwrap();
    stream.write_all(&Frame { kind: None, text: "long".to_owned() }.to_bytes()).unwrap();
    stream.peek(&mut [0]).unwrap();
    // Its own end stays.
    eventually(|| files() == without + 1);
    let mut came = Vec::new();
    let _ = stream.read_to_end(&mut came);
    assert!(came.len() < LONG_ANSWER);
}

#[test]
fn without_file_descriptors_it_waits() {
    let _alone = ALONE.lock();
    let (_server, port) = serve();
    assert_eq!(ask(HERE, port, Kind::Probe, "{}", &limits()).unwrap(), "{}");
    let mut cost = Cost::of_the_server();
    eventually(|| cost.during(Duration::from_millis(300)).0 == 0);
    let before = getrlimit(Resource::Nofile);
    let next = File::open("/dev/null").unwrap().as_raw_fd() as u64;
    // One more, for the client.
    setrlimit(Resource::Nofile, Rlimit { current: Some(next + 1), ..before }).unwrap();
    let mut client = TcpStream::connect((HERE, port)).unwrap();
    assert!(File::open("/dev/null").is_err(), "there are more");
    client.write_all(&Frame { kind: None, text: "{}".to_owned() }.to_bytes()).unwrap();
    let (sleeps, ran) = cost.during(Duration::from_secs(3));
    println!("{sleeps} sleeps, ran {ran:?} in 3 s");
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(sleeps <= 10, "{sleeps} sleeps");
    assert!(ran < Duration::from_millis(300), "ran {ran:?}");
    let mut answer = Vec::new();
    client.set_read_timeout(Some(LONG)).unwrap();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, Frame { kind: None, text: "{}".to_owned() }.to_bytes());
}
