//! The handshake over real sockets: what is asked, what is answered, and what strangers may try.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use mooncake_efa::{Code, Error, Result};
use parking_lot::{Condvar, Mutex};
use socket2::{Domain, Socket, Type};
use transfer_engine::wire::{Answer, Frame, Kind, Limits, Server, ask};

/// Longer than anything takes: who waits for it does not end.
const LONG: Duration = Duration::from_secs(120);
const HERE: &str = "127.0.0.1";

fn limits(frame: Duration) -> Limits {
    Limits { connect: LONG, frame, length: 16 << 20, ipv6: false }
}

/// Says what was asked, unless told otherwise.
#[derive(Default)]
struct Echo {
    gate: Mutex<Gate>,
    changed: Condvar,
    /// One that an answer drops.
    server: Mutex<Option<Server>>,
}

#[derive(Default)]
struct Gate {
    waiting: usize,
    open: bool,
}

impl Echo {
    /// Waits until so many answers wait.
    fn wait_for(&self, waiting: usize) {
        let mut gate = self.gate.lock();
        while gate.waiting < waiting {
            assert!(!self.changed.wait_for(&mut gate, LONG).timed_out(), "{} wait", gate.waiting);
        }
    }

    fn open(&self) {
        self.gate.lock().open = true;
        self.changed.notify_all();
    }
}

impl Answer for Echo {
    fn answer(&self, kind: Kind, request: &str) -> Result<String> {
        match request {
            "fail" => return Err(Error::new(Code::RejectHandshake, "told to fail")),
            "panic" => panic!("told to panic"),
            "long" => return Ok("x".repeat(8 << 20)),
            "drop" => drop(self.server.lock().take()),
            "wait" => {
                let mut gate = self.gate.lock();
                gate.waiting += 1;
                self.changed.notify_all();
                while !gate.open {
                    self.changed.wait(&mut gate);
                }
            }
            _ => {}
        }
        Ok(format!("{kind:?} {request}"))
    }
}

fn serve(frame: Duration) -> (Server, Arc<Echo>, u16) {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = Arc::new(Echo::default());
    (Server::start(listener, echo.clone(), limits(frame)).unwrap(), echo, port)
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((HERE, port)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// From another of this host's addresses.
fn connect_from(address: [u8; 4], port: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
    socket.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.into()
}

fn frame(kind: impl Into<Option<Kind>>, text: &str) -> Vec<u8> {
    Frame { kind: kind.into(), text: text.to_owned() }.to_bytes()
}

/// All that comes until the other side closes.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(why) if why.kind() == ErrorKind::ConnectionReset => {}
        Err(why) => panic!("not closed: {why}"),
    }
    bytes
}

fn assert_alive(port: u16) {
    assert_eq!(ask(HERE, port, Kind::Probe, "{}", &limits(LONG)).unwrap(), "Probe {}");
}

#[test]
fn every_kind_is_answered() {
    let (_server, _, port) = serve(LONG);
    for kind in Kind::ALL {
        for text in ["{}", "no JSON \u{e9}\n", "", &"x".repeat(1 << 20)] {
            let answer = ask(HERE, port, kind, text, &limits(LONG)).unwrap();
            assert_eq!(answer, format!("{kind:?} {text}"));
        }
    }
}

#[test]
fn both_forms_are_answered_as_they_ask() {
    let (_server, _, port) = serve(LONG);
    for kind in Kind::ALL.map(Some).into_iter().chain([None]) {
        let mut stream = connect(port);
        stream.write_all(&frame(kind, "{\"a\":1}")).unwrap();
        // The server has closed its side, and waits for us.
        let answered = format!("{:?} {{\"a\":1}}", kind.unwrap_or(Kind::Connection));
        assert_eq!(rest(&mut stream), frame(kind, &answered));
    }
}

#[test]
fn frames_may_come_in_single_bytes() {
    let (_server, _, port) = serve(LONG);
    for kind in [Some(Kind::Metadata), None] {
        let mut stream = connect(port);
        stream.set_nodelay(true).unwrap();
        for byte in frame(kind, "[]") {
            stream.write_all(&[byte]).unwrap();
        }
        assert_eq!(
            rest(&mut stream),
            frame(kind, &format!("{:?} []", kind.unwrap_or(Kind::Connection)))
        );
    }
}

#[test]
fn what_is_no_request_is_closed_without_an_answer() {
    let (_server, _, port) = serve(LONG);
    let raw = |length: u64, body: &[u8]| [&length.to_ne_bytes(), body].concat();
    for bytes in [
        raw(1 << 63, b"\x00{}"),
        raw(u64::MAX, b"\x00{}"),
        raw((16 << 20) + 1, b"\x00{}"),
        raw(0, b""),
        raw(3, b"\x04{}"),
        raw(3, b"\xfe{}"),
        raw(3, b"\x00\xff\xff"),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        frame(Kind::Probe, "fail"),
        frame(Kind::Probe, "panic"),
    ] {
        let mut stream = connect(port);
        stream.write_all(&bytes).unwrap();
        assert_eq!(rest(&mut stream), b"", "{bytes:?}");
        assert_alive(port);
    }
    // Half of one, then the end; and nothing at all.
    for bytes in [&raw(9, b"\x00{}")[..], b"\x05\0", b""] {
        let mut stream = connect(port);
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&mut stream), b"");
        assert_alive(port);
    }
}

#[test]
fn who_falls_silent_is_let_go() {
    let (_server, _, port) = serve(Duration::from_millis(300));
    for bytes in [&frame(Kind::Probe, "{}")[..10], b"\x09\0", b""] {
        let mut stream = connect(port);
        stream.write_all(bytes).unwrap();
        assert_eq!(rest(&mut stream), b"");
    }
    // Or has its answer, and stays.
    let mut stream = connect(port);
    stream.write_all(&frame(Kind::Probe, "{}")).unwrap();
    rest(&mut stream);
    eventually(|| stream.write_all(b"x").is_err());
}

fn eventually(mut what: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !what() {
        assert!(Instant::now() < end, "it did not happen");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_time_is_for_the_whole_frame() {
    let (_server, _, port) = serve(Duration::from_millis(500));
    let mut stream = connect(port);
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    stream.write_all(&(1_u64 << 20).to_ne_bytes()).unwrap();
    let end = Instant::now() + LONG;
    // A byte now and then, each well in time.
    while stream.write_all(b" ").is_ok() {
        match stream.read(&mut [0]) {
            Err(why) if why.kind() == ErrorKind::WouldBlock => {}
            closed => return assert!(!matches!(closed, Ok(1)), "an answer"),
        }
        assert!(Instant::now() < end, "it goes on for ever");
    }
}

#[test]
fn all_of_two_hundred_at_once_are_answered() {
    let (_server, _, port) = serve(LONG);
    let start = Arc::new(Barrier::new(200));
    let clients = (0..200).map(|index| {
        let start = start.clone();
        let ask = move || {
            let request = index.to_string();
            start.wait();
            assert_eq!(
                ask(HERE, port, Kind::Notify, &request, &limits(LONG)).unwrap(),
                format!("Notify {request}")
            );
        };
        thread::Builder::new().stack_size(256 << 10).spawn(ask).unwrap()
    });
    clients.collect::<Vec<_>>().into_iter().for_each(|client| client.join().unwrap());
}

#[test]
fn the_slow_do_not_keep_others_waiting() {
    let (_server, echo, port) = serve(LONG);
    let silent: Vec<_> = (0..100).map(|_| connect(port)).collect();
    let mut slow: Vec<_> = (0..8).map(|_| connect(port)).collect();
    slow.iter_mut().for_each(|stream| stream.write_all(&frame(Kind::Probe, "wait")).unwrap());
    echo.wait_for(8);
    assert_alive(port);
    echo.open();
    for stream in &mut slow {
        assert_eq!(rest(stream), frame(Kind::Probe, "Probe wait"));
    }
    drop(silent);
}

#[test]
fn connections_of_one_address_do_not_keep_others_out() {
    let (_server, _, port) = serve(LONG);
    // More than the server holds. Those in the backlog come in when the first are let go.
    let mut silent: Vec<_> = (0..180).map(|_| connect(port)).collect();
    let mut other = connect_from([127, 0, 0, 2], port);
    other.write_all(&frame(Kind::Probe, "{}")).unwrap();
    assert_eq!(rest(&mut other), frame(Kind::Probe, "Probe {}"));
    assert_eq!(rest(&mut silent[0]), b"");
}

#[test]
fn answers_to_one_address_do_not_keep_others_waiting() {
    let (_server, echo, port) = serve(LONG);
    let ask = |mut stream: TcpStream| {
        stream.write_all(&frame(Kind::Probe, "wait")).unwrap();
        stream
    };
    let mut many: Vec<_> = (0..60).map(|_| ask(connect(port))).collect();
    echo.wait_for(16);
    // Two others have their share, and no more; a third has what is left.
    many.extend((0..20).map(|index| ask(connect_from([127, 0, 0, 2 + index % 2], port))));
    echo.wait_for(16 + 8);
    let mut third = connect_from([127, 0, 0, 4], port);
    third.write_all(&frame(Kind::Probe, "{}")).unwrap();
    assert_eq!(rest(&mut third), frame(Kind::Probe, "Probe {}"));
    assert_eq!(echo.gate.lock().waiting, 24);
    // And nobody was forgotten.
    echo.open();
    for stream in &mut many {
        assert_eq!(rest(stream), frame(Kind::Probe, "Probe wait"));
    }
}

#[test]
fn a_long_answer_comes_whole() {
    let (_server, _, port) = serve(LONG);
    let answer = ask(HERE, port, Kind::Metadata, "long", &limits(LONG)).unwrap();
    assert!(answer.len() == 8 << 20 && answer.bytes().all(|byte| byte == b'x'));
}

#[test]
fn the_end_waits_for_nobody() {
    let (server, echo, port) = serve(LONG);
    let mut open: Vec<_> = (0..20).map(|_| connect(port)).collect();
    open[1].write_all(b"\x09\0").unwrap();
    open[2].write_all(&frame(Kind::Probe, "wait")).unwrap();
    open[3].write_all(&frame(Kind::Probe, "long")).unwrap();
    open[3].peek(&mut [0]).unwrap();
    let mut answered = connect(port);
    answered.write_all(&frame(Kind::Probe, "{}")).unwrap();
    rest(&mut answered);
    echo.wait_for(1);
    drop(server);
    // Though its answer is still being made.
    assert!(!echo.gate.lock().open);
    open.iter_mut().for_each(|stream| drop(rest(stream)));
    let error = ask(HERE, port, Kind::Probe, "{}", &limits(LONG)).unwrap_err();
    assert!(error.text.contains("nobody listens there"), "{error}");
    echo.open();
    // The thread goes, and what it had with it.
    eventually(|| Arc::strong_count(&echo) == 1);
}

#[test]
fn answers_end_before_the_server_does() {
    let (server, echo, port) = serve(LONG);
    let mut stream = connect(port);
    stream.write_all(&frame(Kind::Probe, "wait")).unwrap();
    echo.wait_for(1);
    echo.open();
    drop(server);
    assert_eq!(Arc::strong_count(&echo), 1);
}

#[test]
fn an_answer_may_end_the_server() {
    let (server, echo, port) = serve(LONG);
    *echo.server.lock() = Some(server);
    let mut stream = connect(port);
    stream.write_all(&frame(Kind::Probe, "drop")).unwrap();
    assert_eq!(rest(&mut stream), b"");
    eventually(|| Arc::strong_count(&echo) == 1);
}

/// The port of somebody who takes one connection, and hands it over when the request is there.
fn peer(answer: impl FnOnce(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = vec![0; frame(Kind::Notify, "{}").len()];
        stream.read_exact(&mut request).unwrap();
        assert_eq!(request, frame(Kind::Notify, "{}"));
        answer(stream);
    });
    port
}

/// What asking there ends with.
fn failure(host: &str, port: u16, limits: &Limits) -> String {
    let error = ask(host, port, Kind::Notify, "{}", limits).unwrap_err();
    assert_eq!(error.code, Code::Metadata);
    let where_to = format!("{port}: ");
    assert!(error.text.starts_with(host) || host.contains([':', '\n']), "{error}");
    assert!(error.text.contains(&where_to) && !error.text.contains(char::is_control), "{error}");
    error.text
}

#[test]
fn failures_say_what_and_why() {
    let expect = |text: String, part: &str| assert!(text.contains(part), "{text}, not: {part}");
    let soon = limits(Duration::from_millis(300));
    let said = |bytes: Vec<u8>| peer(move |mut stream| stream.write_all(&bytes).unwrap());
    let told = |bytes: Vec<u8>| failure(HERE, said(bytes), &limits(LONG));

    expect(told(Vec::new()), "closed the connection without an answer");
    expect(told(frame(Kind::Probe, "{}")), "a request Notify is answered with Probe");
    expect(told(frame(None, "{}")), "a request Notify is answered with none");
    expect(
        told(b"HTTP/1.1 400 Bad Request\r\n".to_vec()),
        "is it the handshake port of a Mooncake engine?",
    );
    expect(
        told(frame(Kind::Notify, "{}")[..10].to_vec()),
        "amid its answer (2 of a frame's 3 bytes, then the end)",
    );
    expect(told((17_u64 << 20).to_ne_bytes().to_vec()), "at most 16777216 are taken");

    let (hold, held) = std::sync::mpsc::channel::<()>();
    let silent = peer(move |_stream| assert!(held.recv().is_err()));
    expect(failure(HERE, silent, &soon), "no whole answer within 300ms");
    drop(hold);
    // A byte now and then does not make it longer.
    let drips = peer(|mut stream| {
        stream.write_all(&frame(Kind::Notify, &"x".repeat(1 << 20))[..9]).unwrap();
        while stream.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
    });
    expect(failure(HERE, drips, &soon), "no whole answer within 300ms");
    let resets = peer(|stream| {
        Socket::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    });
    expect(failure(HERE, resets, &limits(LONG)), "breaks the connection off");

    let unused = TcpListener::bind((HERE, 0)).unwrap().local_addr().unwrap().port();
    expect(failure(HERE, unused, &limits(LONG)), "nobody listens there");
    expect(failure("no-such-host.invalid", 1, &limits(LONG)), "the host is not found");
    expect(failure("", 1, &limits(LONG)), "the host is not found");
    expect(failure("a\nb", 1, &limits(LONG)), "the host is not found");
    expect(
        failure(HERE, 1, &Limits { ipv6: true, ..limits(LONG) }),
        "the host has no IPv6 address",
    );
    expect(failure("::1", 1, &limits(LONG)), "the host has no IPv4 address");
}

#[test]
fn a_request_that_nobody_takes_is_given_up() {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let request = "x".repeat(64 << 20);
    let soon = limits(Duration::from_millis(300));
    let error = ask(HERE, port, Kind::Metadata, &request, &soon).unwrap_err();
    assert!(error.text.contains("the request was not taken within 300ms"), "{error}");
    drop(listener);
    let (_server, _, port) = serve(LONG);
    let error = ask(HERE, port, Kind::Metadata, &request, &limits(LONG)).unwrap_err();
    assert!(error.text.contains("more than its MC_HANDSHAKE_MAX_LENGTH"), "{error}");
}

#[test]
fn ipv6_with_and_without_a_scope() {
    let listener = match TcpListener::bind("[::1]:0") {
        Ok(listener) => listener,
        Err(why) => return println!("skipped: no IPv6 here: {why}"),
    };
    let port = listener.local_addr().unwrap().port();
    let limits = Limits { ipv6: true, ..limits(LONG) };
    let _server = Server::start(listener, Arc::new(Echo::default()), limits.clone()).unwrap();
    for host in ["::1", "localhost"] {
        match ask(host, port, Kind::Probe, "{}", &limits) {
            Ok(answer) => assert_eq!(answer, "Probe {}"),
            // Where the hosts file has no such line.
            Err(error) => assert!(host == "localhost" && error.text.contains("no IPv6"), "{error}"),
        }
    }
    let interfaces = if_addrs::get_if_addrs().unwrap();
    let local = interfaces.iter().find_map(|interface| match interface.ip() {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some(format!("{ip}%{}", interface.name)),
        _ => None,
    });
    let Some(host) = local else { return println!("skipped: no link-local address here") };
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = Server::start(listener, Arc::new(Echo::default()), limits.clone()).unwrap();
    assert_eq!(ask(&host, port, Kind::Probe, "{}", &limits).unwrap(), "Probe {}");
}
