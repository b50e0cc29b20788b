//! Copies by CUDA: started here, done by the device, found to be done by looking at events.

use std::collections::VecDeque;
use std::ffi::{c_uint, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use super::cuda::{Context, NOT_READY, SUCCESS, has_ended};
use crate::error::{Error, Result};

const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;

/// Which way a copy goes. Devices have an engine for each, so each has a stream of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host to a device.
    ToDevice,
    /// From a device to the host.
    ToHost,
    /// On a device, or from one to another.
    Between,
}

impl Direction {
    /// Streams for it. A device begins a copy only when the one before it in its stream is done, which takes as long as
    /// 4 MiB take on an H100: with four streams copies of that size go 1.6 times as fast (docs/gpu.md). To and from the
    /// host PCI Express is what limits.
    fn streams(self) -> usize {
        match self {
            Self::ToDevice | Self::ToHost => 1,
            Self::Between => 4,
        }
    }
}

/// Starts copies and tells which are done. Used by one thread at a time, any.
#[derive(Default)]
pub struct Copier {
    /// Those of one context and direction follow each other.
    lanes: Vec<Lane>,
    turn: usize,
    /// What the next copy may continue: where it does, both are one. Started by then, or by the next poll.
    next: Option<Next>,
    /// What CUDA did not take.
    refused: Vec<(u64, Error)>,
    spare: Vec<Vec<(u64, u64)>>,
}

/// A copy that is not started yet.
struct Next {
    /// The first lane of its context and direction.
    first: usize,
    to: u64,
    from: u64,
    length: u64,
    /// The tokens of its parts, and their lengths.
    parts: Vec<(u64, u64)>,
}

/// The copies of one stream: they are done in order.
struct Lane {
    context: Arc<Context>,
    direction: Direction,
    stream: *mut c_void,
    /// Copies without an event after them.
    open: Vec<u64>,
    /// Events, each with the copies before it and after the one before.
    fences: VecDeque<(*mut c_void, Vec<u64>)>,
    spare: Vec<(*mut c_void, Vec<u64>)>,
}

// SAFETY: streams and events may be used by any thread; those of a Copier are by one at a time.
unsafe impl Send for Lane {}

impl Copier {
    /// Starts a copy of `length` bytes between memory of `context`'s device, and that or memory that CUDA has
    /// pinned, or another device's; at the next poll at the latest. Both ranges must stay as they are until
    /// [`Self::poll`] names `token`.
    ///
    /// # Errors
    /// CUDA's; nothing is under way then.
    pub fn copy(
        &mut self,
        context: &Arc<Context>,
        direction: Direction,
        to: u64,
        from: u64,
        length: u64,
        token: u64,
    ) -> Result<()> {
        let known = self
            .lanes
            .iter()
            .position(|lane| lane.direction == direction && Arc::ptr_eq(&lane.context, context));
        let first = match known {
            Some(known) => known,
            None => {
                let lanes = (0..direction.streams()).map(|_| Lane::new(context.clone(), direction));
                let mut lanes = lanes.collect::<Result<Vec<_>>>()?;
                self.lanes.append(&mut lanes);
                self.lanes.len() - direction.streams()
            }
        };
        match &mut self.next {
            Some(next)
                if next.first == first
                    && next.to + next.length == to
                    && next.from + next.length == from =>
            {
                next.length += length;
                next.parts.push((token, length));
            }
            _ => {
                self.start();
                let mut parts = self.spare.pop().unwrap_or_default();
                parts.push((token, length));
                self.next = Some(Next { first, to, from, length, parts });
            }
        }
        Ok(())
    }

    /// Starts what may be continued no more.
    fn start(&mut self) {
        let Some(mut next) = self.next.take() else { return };
        self.turn = self.turn.wrapping_add(1);
        let streams = self.lanes[next.first].direction.streams();
        let lane = &mut self.lanes[next.first + self.turn % streams];
        let mut done = 0;
        let whole = lane.start(next.to, next.from, next.length);
        for (token, length) in next.parts.drain(..) {
            // Each by itself, where all together is too much: they may be of several allocations.
            let started = match &whole {
                Err(_) if length < next.length => {
                    lane.start(next.to + done, next.from + done, length)
                }
                whole => whole.clone(),
            };
            done += length;
            match started {
                Ok(()) => lane.open.push(token),
                Err(error) => self.refused.push((token, error)),
            }
        }
        self.spare.push(next.parts);
    }

    /// Calls `ended` with the tokens of copies that are done, or failed and why. Their memory is quiet.
    pub fn poll(&mut self, mut ended: impl FnMut(u64, Result<()>)) {
        self.start();
        self.refused.drain(..).for_each(|(token, error)| ended(token, Err(error)));
        for lane in &mut self.lanes {
            if lane.open.is_empty() && lane.fences.is_empty() {
                continue;
            }
            if let Err(error) = lane.poll(&mut ended) {
                // A context that is lost runs nothing any more. If it is not, what is under way goes on: it is waited for,
                // rarely as this is, since memory that is called quiet must be.
                let result = lane.wait().map_err(|_| error);
                lane.take_all().for_each(|token| ended(token, result.clone()));
            }
        }
    }
}

impl Lane {
    fn new(context: Arc<Context>, direction: Direction) -> Result<Self> {
        let mut stream = null_mut();
        {
            let _entered = context.enter()?;
            // SAFETY: one pointer is written; a context is current.
            let ret = unsafe { (context.driver().stream)(&raw mut stream, STREAM_NON_BLOCKING) };
            context.driver().check("cuStreamCreate", ret)?;
        }
        let (fences, spare) = Default::default();
        Ok(Self { context, direction, stream, open: Vec::new(), fences, spare })
    }

    fn start(&self, to: u64, from: u64, length: u64) -> Result<()> {
        let driver = self.context.driver();
        let _entered = self.context.enter()?;
        // SAFETY: both ranges are registered memory or pieces of ours (the caller's promise), and their contexts live.
        let ret = unsafe { (driver.copy)(to, from, length as usize, self.stream) };
        driver.check("cuMemcpyAsync", ret)
    }

    fn poll(&mut self, ended: &mut impl FnMut(u64, Result<()>)) -> Result<()> {
        let driver = self.context.driver();
        let _entered = self.context.enter()?;
        if !self.open.is_empty() {
            let (event, mut tokens) = match self.spare.pop() {
                Some(spare) => spare,
                None => {
                    let mut event = null_mut();
                    // SAFETY: one pointer is written; a context is current.
                    let ret = unsafe { (driver.event)(&raw mut event, EVENT_DISABLE_TIMING) };
                    driver.check("cuEventCreate", ret)?;
                    (event, Vec::new())
                }
            };
            // SAFETY: our own event and stream, of the current context.
            let ret = unsafe { (driver.event_record)(event, self.stream) };
            std::mem::swap(&mut tokens, &mut self.open);
            self.fences.push_back((event, tokens));
            driver.check("cuEventRecord", ret)?;
        }
        while let Some((event, _)) = self.fences.front() {
            // SAFETY: our own event.
            match unsafe { (driver.event_query)(*event) } {
                NOT_READY => break,
                ret => driver.check("a copy by CUDA", ret)?,
            }
            let Some((event, mut tokens)) = self.fences.pop_front() else { break };
            tokens.drain(..).for_each(|token| ended(token, Ok(())));
            self.spare.push((event, tokens));
        }
        Ok(())
    }

    /// Waits until nothing is under way.
    fn wait(&self) -> Result<()> {
        let driver = self.context.driver();
        let _entered = self.context.enter()?;
        // SAFETY: our own stream.
        driver.check("cuStreamSynchronize", unsafe { (driver.stream_wait)(self.stream) })
    }

    fn take_all(&mut self) -> impl Iterator<Item = u64> {
        let fenced = self.fences.drain(..).collect::<Vec<_>>();
        let mut all: Vec<u64> = Vec::new();
        for (event, tokens) in fenced {
            all.extend(tokens);
            self.spare.push((event, Vec::new()));
        }
        all.append(&mut self.open);
        all.into_iter()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let driver = self.context.driver();
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: our own stream and events, used no more; what is under way ends first.
        unsafe {
            let ret = (driver.stream_wait)(self.stream);
            if has_ended(ret) {
                return;
            }
            if ret != SUCCESS {
                log::debug!("a CUDA stream ended with error {ret}");
            }
            let fences = self.fences.iter().chain(&self.spare);
            fences.for_each(|(event, _)| {
                (driver.event_destroy)(*event);
            });
            (driver.stream_destroy)(self.stream);
        }
    }
}
