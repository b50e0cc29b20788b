//! NICs' lines and what is on them, as discrete events.
//!
//! A message leaves when the sender's line is free, arrives half a round trip later, is received when
//! the receiver's line is free, packet by packet: it is whole when both have carried it. A line carries
//! one message after the other, in either direction. Times are virtual picoseconds.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Which NIC of which host, among all.
pub(crate) type Port = usize;

/// What a network is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wire {
    /// Line rate of each port and direction, Gbit/s.
    pub gbits: u64,
    /// Round trip, nanoseconds.
    pub round_trip: u64,
    /// Time that a sending device takes for a message at least, nanoseconds.
    pub message: u64,
}

/// An operation: whose, and the owner's slot for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Operation {
    owner: Port,
    slot: u32,
    length: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The first byte of a message reaches a port; its last one can at the earliest be there `carried`
    /// later. A write's is acknowledged to its owner, a read's is what the owner waits for.
    Arrives { to: Port, carried: u64, write: bool, operation: Operation },
    /// A read's request reaches the port that has the bytes.
    Asked { at: Port, operation: Operation },
}

#[derive(Clone, Default)]
struct Lines {
    sends_until: u64,
    receives_until: u64,
    /// When completed, and the slot; the order of posting decides among equals.
    completions: BinaryHeap<Reverse<(u64, u64, u32)>>,
}

pub(crate) struct Network {
    wire: Wire,
    ports: Vec<Lines>,
    /// The serial number makes the order of equals that of their making.
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    serial: u64,
    /// Bytes received between these times are counted.
    window: (u64, u64),
    received: f64,
    messages: u64,
}

impl Network {
    pub fn new(wire: Wire, ports: usize, window: (u64, u64)) -> Self {
        Self {
            wire,
            ports: vec![Lines::default(); ports],
            events: BinaryHeap::new(),
            serial: 0,
            window,
            received: 0.0,
            messages: 0,
        }
    }

    /// Bytes that came in at any port in the window, a part of a message counting as a part.
    pub fn received(&self) -> f64 {
        self.received
    }

    /// Messages whose last byte came in in the window.
    pub fn messages(&self) -> u64 {
        self.messages
    }

    pub fn post(&mut self, now: u64, owner: Port, to: Port, write: bool, slot: u32, length: u64) {
        let operation = Operation { owner, slot, length };
        if write {
            self.send(now, owner, to, write, operation);
        } else {
            self.at(now + self.half(), Event::Asked { at: to, operation });
        }
    }

    /// The slots of up to `most` operations of a port that completed by now.
    pub fn poll(&mut self, now: u64, port: Port, most: usize, completed: &mut Vec<u32>) {
        self.advance(now);
        let completions = &mut self.ports[port].completions;
        for _ in 0..most {
            if completions.peek().is_none_or(|Reverse((time, ..))| *time > now) {
                break;
            }
            completed.extend(completions.pop().map(|Reverse((_, _, slot))| slot));
        }
    }

    /// Everything up to now happens.
    pub fn advance(&mut self, now: u64) {
        while self.events.peek().is_some_and(|Reverse((time, ..))| *time <= now) {
            let Some(Reverse((time, _, event))) = self.events.pop() else { break };
            match event {
                Event::Asked { at, operation } => {
                    self.send(time, at, operation.owner, false, operation);
                }
                Event::Arrives { to, carried, write, operation } => {
                    let begin = time.max(self.ports[to].receives_until);
                    let end = (begin + self.carry(operation.length)).max(time + carried);
                    self.ports[to].receives_until = end;
                    self.count(begin, end, operation.length);
                    let done = if write { end + self.half() } else { end };
                    self.serial += 1;
                    let completion = Reverse((done, self.serial, operation.slot));
                    self.ports[operation.owner].completions.push(completion);
                }
            }
        }
    }

    fn send(&mut self, now: u64, from: Port, to: Port, write: bool, operation: Operation) {
        let carried = self.carry(operation.length).max(self.wire.message * 1000);
        let start = now.max(self.ports[from].sends_until);
        self.ports[from].sends_until = start + carried;
        self.at(start + self.half(), Event::Arrives { to, carried, write, operation });
    }

    fn count(&mut self, begin: u64, end: u64, length: u64) {
        let (from, to) = self.window;
        let inside = end.min(to).saturating_sub(begin.max(from));
        self.received += length as f64 * inside as f64 / (end - begin).max(1) as f64;
        self.messages += u64::from((from..to).contains(&end));
    }

    /// Half a round trip.
    fn half(&self) -> u64 {
        self.wire.round_trip * 500
    }

    /// How long a line takes for so many bytes.
    fn carry(&self, bytes: u64) -> u64 {
        bytes * 8000 / self.wire.gbits
    }

    fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        self.events.push(Reverse((time, self.serial, event)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIRE: Wire = Wire { gbits: 100, round_trip: 20_000, message: 0 };
    const FOREVER: (u64, u64) = (0, u64::MAX);
    /// 100 Gbit/s carry 12 500 bytes in a microsecond.
    const BYTES: u64 = 12_500;
    const MICROSECOND: u64 = 1_000_000;

    fn completions(network: &mut Network, port: Port) -> Vec<u64> {
        network.advance(u64::MAX);
        let mut times: Vec<_> =
            network.ports[port].completions.iter().map(|Reverse((time, ..))| *time).collect();
        times.sort_unstable();
        times.into_iter().map(|time| time / MICROSECOND).collect()
    }

    #[test]
    fn an_operation_takes_a_round_trip_and_its_time_on_the_line() {
        for write in [true, false] {
            let mut network = Network::new(WIRE, 2, FOREVER);
            network.post(0, 0, 1, write, 0, BYTES);
            network.post(0, 0, 1, write, 1, BYTES);
            assert_eq!(completions(&mut network, 0), [21, 22], "write: {write}");
        }
    }

    #[test]
    fn a_receiver_shares_its_line() {
        let mut network = Network::new(WIRE, 3, FOREVER);
        for slot in 0..2 {
            network.post(0, 0, 2, true, slot, BYTES);
            network.post(0, 1, 2, true, slot, BYTES);
        }
        let (ours, theirs) = (completions(&mut network, 0), completions(&mut network, 1));
        assert_eq!(ours, [21, 23]);
        assert_eq!(theirs, [22, 24]);
    }

    #[test]
    fn one_who_has_the_bytes_shares_its_line_among_readers() {
        let mut network = Network::new(WIRE, 3, FOREVER);
        network.post(0, 0, 2, false, 0, BYTES);
        network.post(0, 1, 2, false, 0, BYTES);
        assert_eq!(completions(&mut network, 0), [21]);
        assert_eq!(completions(&mut network, 1), [22]);
    }

    #[test]
    fn a_message_costs_the_device_its_time() {
        let mut network = Network::new(Wire { message: 5000, ..WIRE }, 2, FOREVER);
        network.post(0, 0, 1, true, 0, BYTES);
        network.post(0, 0, 1, true, 1, BYTES);
        assert_eq!(completions(&mut network, 0), [25, 30]);
    }

    #[test]
    fn the_window_counts_parts() {
        // On the line from 10 to 20 microseconds.
        let window = (15 * MICROSECOND, 17 * MICROSECOND);
        let mut network = Network::new(WIRE, 2, window);
        network.post(0, 0, 1, true, 0, 10 * BYTES);
        network.advance(u64::MAX);
        assert_eq!(network.received(), 2.0 * BYTES as f64);
        assert_eq!(network.messages(), 0);
    }
}
