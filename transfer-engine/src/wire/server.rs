//! The side that answers. One thread reads and writes all connections as far as they go, so who is slow costs no
//! thread; each answer is made on a thread of its own.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use mooncake_efa::boundary::caught;
use mooncake_efa::{Code, Error, Result};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Answer, Broken, Frame, Kind, Limits, Reader};

/// Most connections that are open. More wait in the listener's backlog.
const OPEN: usize = 128;
/// Most answers that are made at a time.
const ANSWERS: usize = 32;
/// One address has this many when others want some too: answers beyond half of all, and connections of which we wait
/// for the other side when all are taken.
const SHARE: usize = 4;
/// Longest wait for the other side when all connections are taken, and its address has more than its share of them.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most bytes of requests and answers that are on their way, if the longest frame allowed does not make it more.
const HELD: usize = 128 << 20;
/// After a failure to accept a connection, as for lack of file descriptors, the next try.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the end waits for answers that are being made.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Threads that answer what comes to a port. Dropping it ends them: connections are closed at once, answers that are
/// being made are waited for, a second at most, and not sent.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts them.
    ///
    /// # Errors
    /// `Code::Context` if the system has no file descriptor or thread for it.
    pub fn start(listener: TcpListener, answers: Arc<dyn Answer>, limits: Limits) -> Result<Self> {
        let failed =
            |why| Error::new(Code::Context, format!("starting to answer handshakes: {why}"));
        listener.set_nonblocking(true).map_err(failed)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|why| failed(why.into()))?;
        let shared = Arc::new(Shared {
            wake,
            stop: AtomicBool::new(false),
            made: Mutex::default(),
            makers: Mutex::default(),
            maker_ended: Condvar::new(),
        });
        let house = House {
            listener,
            answers,
            limits,
            shared: shared.clone(),
            guests: BTreeMap::new(),
            answering: BTreeMap::new(),
            next: 0,
            accept_again: None,
            complaints: Complaints::default(),
        };
        let thread = Builder::new().name("mefa-te-accept".into()).spawn(|| house.live());
        Ok(Self { shared, thread: Some(thread.map_err(failed)?) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread of handshakes ended by a bug, please report it");
        }
        // It may be dropped by an answer.
        let own = std::thread::current().id();
        let last = Instant::now() + LAST_ANSWERS;
        let mut makers = self.shared.makers.lock();
        while makers.iter().any(|&maker| maker != own) {
            if self.shared.maker_ended.wait_until(&mut makers, last).timed_out() {
                log::warn!("{} answers to handshakes still run, and go nowhere", makers.len());
                return;
            }
        }
    }
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    /// An eventfd.
    wake: OwnedFd,
    stop: AtomicBool,
    /// Answers as they go over the wire, by connection.
    made: Mutex<Vec<(u64, Result<Vec<u8>>)>>,
    /// Threads that make answers.
    makers: Mutex<Vec<ThreadId>>,
    maker_ended: Condvar,
}

impl Shared {
    fn wake(&self) {
        // It fails only if it is full, and then it wakes all the same.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// An answer, by the thread that made it and now ends.
    fn deliver(&self, id: u64, answer: Result<Vec<u8>>) {
        self.made.lock().push((id, answer));
        self.wake();
        let own = std::thread::current().id();
        self.makers.lock().retain(|&maker| maker != own);
        self.maker_ended.notify_all();
    }
}

/// A connection.
struct Guest {
    stream: TcpStream,
    from: SocketAddr,
    stage: Stage,
    /// When its time began: when it came, or when its answer was there.
    since: Instant,
}

enum Stage {
    /// The request comes.
    Asks(Reader),
    /// It waits for a thread.
    Waits(Frame),
    /// The thread has not finished.
    IsAnswered,
    /// The answer, and how much of it went.
    Hears(Vec<u8>, usize),
    /// It has the answer, and is to close the connection: if we did, what the system holds might be lost.
    Leaves,
}

impl Guest {
    fn address(&self) -> IpAddr {
        self.from.ip().to_canonical()
    }

    /// Whether it is for the other side to do something.
    fn is_waited_for(&self) -> bool {
        matches!(self.stage, Stage::Asks(_) | Stage::Hears(..) | Stage::Leaves)
    }

    fn held(&self) -> usize {
        match &self.stage {
            Stage::Asks(reader) => reader.held(),
            Stage::Waits(frame) => frame.text.len(),
            Stage::Hears(answer, _) => answer.len(),
            Stage::IsAnswered | Stage::Leaves => 0,
        }
    }

    fn events(&self) -> PollFlags {
        match self.stage {
            Stage::Asks(_) | Stage::Leaves => PollFlags::IN,
            Stage::Hears(..) => PollFlags::OUT,
            // Only that it is gone.
            Stage::Waits(_) | Stage::IsAnswered => PollFlags::empty(),
        }
    }

    /// Reads or writes what can be, after an event: whether the connection stays.
    fn go_on(&mut self) -> Result<bool, Broken> {
        let io = |why| Err(Broken::Io(why));
        match &mut self.stage {
            Stage::Asks(reader) => match reader.read(&mut self.stream) {
                Ok(None) => Ok(true),
                Ok(Some(frame)) => {
                    self.stage = Stage::Waits(frame);
                    Ok(true)
                }
                Err(Broken::Nothing) => Ok(false),
                Err(why) => Err(why),
            },
            Stage::Waits(_) | Stage::IsAnswered => Ok(false),
            Stage::Hears(answer, sent) => match self.stream.write(&answer[*sent..]) {
                Ok(bytes) => {
                    *sent += bytes;
                    if *sent == answer.len() {
                        self.stage = Stage::Leaves;
                        return self
                            .stream
                            .shutdown(Shutdown::Write)
                            .map_or_else(io, |()| Ok(true));
                    }
                    Ok(true)
                }
                Err(why) if is_passing(why.kind()) => Ok(true),
                Err(why) => io(why),
            },
            // More than it was to say is not heard.
            Stage::Leaves => match self.stream.read(&mut [0]) {
                Err(why) if is_passing(why.kind()) => Ok(true),
                _ => Ok(false),
            },
        }
    }
}

fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// All connections, and the thread that serves them.
struct House {
    listener: TcpListener,
    answers: Arc<dyn Answer>,
    limits: Limits,
    shared: Arc<Shared>,
    /// In the order they came.
    guests: BTreeMap<u64, Guest>,
    /// For whom threads make answers; the guest may have left meanwhile.
    answering: BTreeMap<u64, IpAddr>,
    next: u64,
    /// When to look for connections again, if not at once.
    accept_again: Option<Instant>,
    complaints: Complaints,
}

impl House {
    fn live(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let (called, came, moved) = self.sleep();
            if called {
                self.take_answers();
            }
            for id in moved {
                self.go_on(id);
            }
            self.see_off(Instant::now());
            if came {
                self.let_in();
            }
            self.lighten();
            self.have_answered();
        }
    }

    /// Sleeps until there is something to do: an answer or the end, a new connection, something for these.
    fn sleep(&mut self) -> (bool, bool, Vec<u64>) {
        let now = Instant::now();
        self.accept_again = self.accept_again.filter(|&at| at > now);
        let open = self.guests.len() < OPEN && self.accept_again.is_none();
        let full = (self.guests.len() >= OPEN).then(|| now + PATIENCE);
        let ends = self.guests.values().filter_map(|guest| self.end_of(guest));
        let until = ends.chain(self.accept_again).chain(full).min();
        let timeout = until.and_then(|at| {
            // Not too early: it would find nothing to do.
            let left = at.saturating_duration_since(now) + Duration::from_micros(1);
            Timespec::try_from(left).ok()
        });

        let listened = if open { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(&self.shared.wake, PollFlags::IN),
            PollFd::new(&self.listener, listened),
        ];
        fds.extend(self.guests.values().map(|guest| PollFd::new(&guest.stream, guest.events())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return (false, false, Vec::new()),
            Err(why) => {
                // No memory, or fewer files allowed than are open. Nothing that looking again at once would mend.
                self.complaints.say(format_args!("handshakes: poll: {why}"));
                std::thread::sleep(PAUSE);
                return (true, false, Vec::new());
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let moved = self.guests.keys().zip(&ready[2..]).filter(|(_, ready)| **ready);
        let moved = moved.map(|(&id, _)| id).collect();
        (ready[0], ready[1] && open, moved)
    }

    /// Until when its guest must have done its part.
    fn end_of(&self, guest: &Guest) -> Option<Instant> {
        guest.is_waited_for().then(|| guest.since + self.limits.frame)
    }

    fn take_answers(&mut self) {
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        let made = std::mem::take(&mut *self.shared.made.lock());
        for (id, answer) in made {
            self.answering.remove(&id);
            let Some(guest) = self.guests.get_mut(&id) else { continue };
            match answer {
                Ok(bytes) => {
                    guest.stage = Stage::Hears(bytes, 0);
                    guest.since = Instant::now();
                    self.go_on(id);
                }
                Err(why) => self.turn_out(id, &why),
            }
        }
    }

    /// Reads or writes, and ends a connection that is over.
    fn go_on(&mut self, id: u64) {
        match self.guests.get_mut(&id).map(Guest::go_on) {
            Some(Ok(false)) => self.part(id),
            Some(Err(why)) => self.turn_out(id, &why),
            Some(Ok(true)) | None => {}
        }
    }

    /// Ends a connection, for a reason.
    fn turn_out(&mut self, id: u64, why: &dyn std::fmt::Display) {
        if let Some(guest) = self.guests.get(&id) {
            self.complaints.say(format_args!("handshake from {}: {why}", guest.from));
            self.part(id);
        }
    }

    fn part(&mut self, id: u64) {
        self.guests.remove(&id);
        // There is a file descriptor now.
        self.accept_again = None;
    }

    /// Ends the connections whose time is up, and if the house is full, some that can be spared.
    fn see_off(&mut self, now: Instant) {
        for id in self.those(|guest| self.end_of(guest).is_some_and(|end| end <= now)) {
            self.time_is_up(id, now);
        }
        if self.guests.len() >= OPEN {
            // The system has their answers, and sends them.
            self.guests.retain(|_, guest| !matches!(guest.stage, Stage::Leaves));
        }
        if self.guests.len() >= OPEN {
            let mut waited_for = BTreeMap::<IpAddr, usize>::new();
            for guest in self.guests.values().filter(|guest| guest.is_waited_for()) {
                *waited_for.entry(guest.address()).or_default() += 1;
            }
            let spared = |guest: &Guest| {
                guest.is_waited_for()
                    && guest.since + PATIENCE <= now
                    && waited_for[&guest.address()] > SHARE
            };
            for id in self.those(spared) {
                self.time_is_up(id, now);
            }
        }
    }

    fn those(&self, which: impl Fn(&Guest) -> bool) -> Vec<u64> {
        self.guests.iter().filter(|(_, guest)| which(guest)).map(|(&id, _)| id).collect()
    }

    fn time_is_up(&mut self, id: u64, now: Instant) {
        let Some(guest) = self.guests.get(&id) else { return };
        let time = now.saturating_duration_since(guest.since);
        match guest.stage {
            Stage::Leaves => self.part(id),
            Stage::Hears(..) => {
                self.turn_out(id, &format_args!("the answer was not taken in {time:.1?}"));
            }
            _ => self.turn_out(id, &format_args!("no whole request in {time:.1?}")),
        }
    }

    fn let_in(&mut self) {
        while self.guests.len() < OPEN {
            let came = self.listener.accept();
            match came
                .and_then(|(stream, from)| stream.set_nonblocking(true).map(|()| (stream, from)))
            {
                Ok((stream, from)) => {
                    let stage = Stage::Asks(Reader::new(self.limits.length));
                    let guest = Guest { stream, from, stage, since: Instant::now() };
                    self.guests.insert(self.next, guest);
                    // Most have asked already.
                    self.go_on(self.next);
                    self.next += 1;
                }
                Err(why) if why.kind() == ErrorKind::WouldBlock => return,
                Err(why)
                    if matches!(
                        why.kind(),
                        ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                    ) => {}
                Err(why) => {
                    self.complaints.say(format_args!("handshakes: accepting a connection: {why}"));
                    self.accept_again = Some(Instant::now() + PAUSE);
                    return;
                }
            }
        }
    }

    /// Ends the connections that hold most memory, if all together hold too much.
    fn lighten(&mut self) {
        let most = HELD.max(self.limits.length.saturating_mul(4));
        let mut held: usize = self.guests.values().map(Guest::held).sum();
        while held > most {
            let waited_for = self.guests.iter().filter(|(_, guest)| guest.is_waited_for());
            let Some((&id, bytes)) =
                waited_for.map(|(id, guest)| (id, guest.held())).max_by_key(|&(_, held)| held)
            else {
                return;
            };
            self.turn_out(id, &format_args!("all requests together have more than {most} bytes"));
            held -= bytes;
        }
    }

    /// Has those answered who wait for it, first come first served, but in fair shares.
    fn have_answered(&mut self) {
        let waiting = self.those(|guest| matches!(guest.stage, Stage::Waits(_)));
        for id in waiting {
            if self.answering.len() >= ANSWERS {
                return;
            }
            let address = self.guests[&id].address();
            let share = self.answering.values().filter(|&&other| other == address).count();
            if self.answering.len() < ANSWERS / 2 || share < SHARE {
                self.have_one_answered(id, address);
            }
        }
    }

    fn have_one_answered(&mut self, id: u64, address: IpAddr) {
        let Some(guest) = self.guests.get_mut(&id) else { return };
        let Stage::Waits(frame) = std::mem::replace(&mut guest.stage, Stage::IsAnswered) else {
            return;
        };
        let (shared, answers) = (self.shared.clone(), self.answers.clone());
        let make = move || {
            let kind = frame.kind.unwrap_or(Kind::Connection);
            let answer = caught(|| answers.answer(kind, &frame.text));
            // Whoever ends the server may count on it that nobody has this any more.
            drop(answers);
            let answer = answer.map(|text| Frame { kind: frame.kind, text }.to_bytes());
            shared.deliver(id, answer);
        };
        // Held, so that the thread is not gone before it is there.
        let mut makers = self.shared.makers.lock();
        match Builder::new().name("mefa-te-answer".into()).spawn(make) {
            Ok(thread) => {
                makers.push(thread.thread().id());
                self.answering.insert(id, address);
            }
            Err(why) => {
                drop(makers);
                self.turn_out(id, &format_args!("starting a thread: {why}"));
            }
        }
    }
}

/// Lines about what strangers do: one a second at most.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    fn say(&mut self, what: std::fmt::Arguments<'_>) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now < last + Duration::from_secs(1)) {
            self.unsaid += 1;
            return;
        }
        match std::mem::take(&mut self.unsaid) {
            0 => log::warn!("{what}"),
            unsaid => log::warn!("{what} (and {unsaid} more lines about handshakes, not written)"),
        }
        self.last = Some(now);
    }
}
