//! The other end of a bench: a target process, or this one.

use mooncake_efa::{Code, Error, Result};

use crate::control::{Answer, Layout, Line, Order};
use crate::memory::Side;
use crate::pattern::Wrong;

/// Whoever has the other end's memory.
pub enum Far {
    /// A target process, or another host.
    Process(Line),
    /// This process.
    Here(Side),
}

impl Far {
    /// Fills what the threads use.
    pub fn fill(&mut self, layout: &Layout, seed: u64) -> Result<()> {
        match self {
            Self::Process(line) => line.ask(&Order::Fill { layout: *layout, seed }).map(drop),
            Self::Here(side) => side.fill(layout, seed),
        }
    }

    /// Checks it: the first wrong byte.
    pub fn check(&mut self, layout: &Layout, seed: u64) -> Result<Option<Wrong>> {
        match self {
            Self::Process(line) => match line.ask(&Order::Check { layout: *layout, seed })? {
                Answer::Wrong { buffer, offset, expected, found } => {
                    Ok(Some(Wrong { buffer, offset, expected, found }))
                }
                _ => Ok(None),
            },
            Self::Here(side) => side.check(layout, seed),
        }
    }

    /// CPU seconds of its process so far; `None` if that is ours.
    pub fn cpu(&mut self) -> Result<Option<f64>> {
        match self {
            Self::Process(line) => match line.ask(&Order::CpuTime)? {
                Answer::CpuTime(seconds) => Ok(Some(seconds)),
                _ => Err(Error::new(Code::Endpoint, "the target does not answer as expected")),
            },
            Self::Here(_) => Ok(None),
        }
    }

    /// Whether it is gone. Not for while an answer is awaited.
    pub fn hung_up(&self) -> bool {
        match self {
            Self::Process(line) => line.hung_up(),
            Self::Here(_) => false,
        }
    }
}
