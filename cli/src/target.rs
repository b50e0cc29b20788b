//! The target of a bench: memory that others read and write.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mooncake_efa::transport::Transport;
use mooncake_efa::{Code, Error, Result};

use crate::bench::cpu_seconds;
use crate::control::{Answer, Hello, Line, Order, WORD};
use crate::memory::Side;
use crate::pattern::Wrong;

/// Longest wait for conversations to end before the process does.
const LEAVE: Duration = Duration::from_secs(2);
/// Most initiators served at a time.
pub const MOST: usize = 64;
/// Longest silence before the first order: an initiator fills its own buffer then.
const FIRST: Duration = Duration::from_secs(600);
/// Longest silence between two orders: the longest measurement, and some.
const IDLE: Duration = Duration::from_secs(90_000);
/// Pause after a connection that could not be taken, mostly for lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves initiators, one connection a thread, until the process is ended. With `until_stdin_ends`
/// it ends when whoever started it does.
pub fn serve(
    transport: Transport,
    memory: Side,
    listen: &str,
    until_stdin_ends: bool,
) -> Result<()> {
    let cannot = |why| Error::new(Code::Endpoint, format!("cannot listen on {listen}: {why}"));
    memory.register(&transport)?;
    let memory = Arc::new(memory);
    let listener = TcpListener::bind(listen).map_err(cannot)?;
    println!("target ready: {}", listener.local_addr().map_err(cannot)?);
    std::io::stdout().flush().map_err(cannot)?;
    let transport = Arc::new(transport);
    // Conversations hold the transport while they last; it is closed when the last one is over.
    let shared = Arc::downgrade(&transport);
    let accept = move || {
        for stream in listener.incoming() {
            let Some(transport) = shared.upgrade() else { return };
            let stream = match stream {
                Ok(stream) => stream,
                Err(why) => {
                    log::warn!("an initiator could not be taken: {why}");
                    std::thread::sleep(PAUSE);
                    continue;
                }
            };
            // Beside ours here and serve's, one a conversation.
            if Arc::strong_count(&transport) >= MOST + 2 {
                log::warn!("an initiator was turned away: {MOST} are served already");
                continue;
            }
            let memory = memory.clone();
            std::thread::spawn(move || {
                let spoken = Line::new(stream).and_then(|line| converse(line, &transport, &memory));
                if let Err(error) = spoken {
                    log::warn!("an initiator left: {error}");
                }
            });
        }
    };
    if until_stdin_ends {
        std::thread::spawn(accept);
        // Reads nothing; returns when the other end of the pipe is closed, however that came.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let limit = Instant::now() + LEAVE;
        while Arc::strong_count(&transport) > 1 && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
    } else {
        accept();
    }
    Ok(())
}

fn converse(mut line: Line, transport: &Transport, memory: &Side) -> Result<()> {
    line.send(&Hello {
        descriptor: transport.descriptor().to_json(),
        buffers: memory.places(),
        length: memory.length(),
    })?;
    let mut patience = FIRST;
    while let Some(order) = line.receive(WORD, patience)? {
        patience = IDLE;
        let answer = match order {
            Order::Fill { layout, seed } => {
                memory.fill(&layout, seed)?;
                Answer::Done
            }
            Order::Check { layout, seed } => match memory.check(&layout, seed)? {
                None => Answer::Done,
                Some(Wrong { buffer, offset, expected, found }) => {
                    Answer::Wrong { buffer, offset, expected, found }
                }
            },
            Order::CpuTime => Answer::CpuTime(cpu_seconds()),
        };
        line.send(&answer)?;
    }
    Ok(())
}
