//! Virtual threads and their time.
//!
//! A virtual thread is a coroutine that runs the engine's own code. What costs time says so
//! ([`World::spend`]), and before anything that others could see it lets those go on whose time is
//! earlier ([`World::turn`]): also inside the engine, at every call into a NIC, so that a rail's lock
//! is held for as long, in virtual time, as its driver takes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use generator::{Generator, Gn};
use parking_lot::{Mutex, MutexGuard};

use crate::network::Network;

/// Stack of a virtual thread, in words.
const STACK: usize = 0x4000;

pub(crate) struct World(Mutex<State>);

struct State {
    network: Network,
    /// The running thread's time, picoseconds.
    now: u64,
    /// The earliest time of the others.
    others: u64,
    /// When each core is free.
    cores: Vec<u64>,
    /// The running thread's.
    core: usize,
}

impl World {
    pub fn new(network: Network, cores: usize) -> Arc<Self> {
        let cores = vec![0; cores.max(1)];
        Arc::new(Self(Mutex::new(State { network, now: 0, others: 0, cores, core: 0 })))
    }

    /// The running thread's time, nanoseconds.
    pub fn now(&self) -> u64 {
        self.0.lock().now / 1000
    }

    /// The running thread works for so long, once its core is free.
    pub fn spend(&self, nanoseconds: u64) {
        let mut state = self.0.lock();
        let core = state.core;
        state.now = state.now.max(state.cores[core]) + nanoseconds * 1000;
        state.cores[core] = state.now;
    }

    /// Threads whose time is earlier go on first.
    pub fn turn(&self) {
        let later = {
            let state = self.0.lock();
            state.now > state.others
        };
        if later {
            #[expect(
                deprecated,
                reason = "its successor cannot be reached from inside the engine"
            )]
            generator::yield_with(());
        }
    }

    /// The network, and the running thread's time in picoseconds.
    pub fn network<R>(&self, f: impl FnOnce(&mut Network, u64) -> R) -> R {
        let mut state = self.0.lock();
        let now = state.now;
        f(&mut state.network, now)
    }

    /// Runs threads until all have returned. Thread `i` has core `i` modulo their number.
    pub fn run<'a>(&self, bodies: Vec<Box<dyn FnOnce() + Send + 'a>>) {
        let mut waiting: BinaryHeap<Reverse<(u64, usize)>> =
            (0..bodies.len()).map(|thread| Reverse((0, thread))).collect();
        let mut threads: Vec<Generator<'a, (), ()>> =
            bodies.into_iter().map(|body| Gn::new_opt(STACK, body)).collect();
        while let Some(Reverse((now, thread))) = waiting.pop() {
            let others = waiting.peek().map_or(u64::MAX, |Reverse((time, _))| *time);
            let mut state = self.0.lock();
            (state.now, state.others) = (now, others);
            state.core = thread % state.cores.len();
            mooncake_efa::engine::set_home(thread);
            MutexGuard::unlocked(&mut state, || threads[thread].resume());
            if !threads[thread].is_done() {
                waiting.push(Reverse((state.now, thread)));
            }
        }
    }
}
