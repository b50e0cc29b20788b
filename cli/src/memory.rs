//! The memory that a bench moves: the host's, or GPUs'.

use std::iter::once;
use std::sync::Arc;

use mooncake_efa::fabric::{self, Memory};
use mooncake_efa::hmem::{self, DeviceBuffer};
use mooncake_efa::transport::Transport;
use mooncake_efa::{Code, Error, Result};

use crate::control::{Layout, Place};
use crate::pattern::{self, Wrong};

/// Where one side's memory is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    Host,
    Gpu(u32),
    EveryGpu,
}

impl Home {
    /// By the number that `--gpu_id` has: -1 is every GPU.
    pub fn of_gpu(id: i32) -> Self {
        u32::try_from(id).map_or(Self::EveryGpu, Self::Gpu)
    }

    /// That number.
    pub fn gpu_id(self) -> Option<i32> {
        match self {
            Self::Host => None,
            Self::Gpu(id) => i32::try_from(id).ok(),
            Self::EveryGpu => Some(-1),
        }
    }

    /// The GPUs, by CUDA's number in this process, with whether there are such. For the host's memory there are none,
    /// and CUDA is not asked.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`]: no CUDA, no GPU, or not this one.
    pub fn gpus(self) -> Result<Vec<u32>> {
        if self == Self::Host {
            return Ok(Vec::new());
        }
        let count = hmem::device_count()
            .map_err(|error| Error::invalid(format!("--use_vram: {}", error.text)))?;
        match self {
            Self::Gpu(id) if id < count => Ok(vec![id]),
            Self::EveryGpu if count > 0 => Ok((0..count).collect()),
            Self::Gpu(id) if count > 0 => Err(Error::invalid(format!(
                "--use_vram: there is no GPU {id}; this process sees {count}, numbered from 0 (CUDA_VISIBLE_DEVICES \
                 chooses and numbers them)"
            ))),
            _ => Err(Error::invalid(
                "--use_vram: CUDA is here, but this process sees no GPU (CUDA_VISIBLE_DEVICES chooses them)",
            )),
        }
    }
}

/// A buffer of ours.
pub enum Buffer {
    Host(Arc<fabric::Buffer>),
    Device(u32, Arc<DeviceBuffer>),
}

impl Buffer {
    pub fn host(length: u64) -> Result<Self> {
        fabric::Buffer::new(length).map(Self::Host)
    }

    fn place(&self) -> Place {
        match self {
            Self::Host(buffer) => Place { address: buffer.address(), gpu: None },
            Self::Device(gpu, buffer) => Place { address: buffer.address(), gpu: Some(*gpu) },
        }
    }

    /// For registration, with the location it is registered for.
    fn memory(&self) -> (Memory, String) {
        match self {
            Self::Host(buffer) => (Memory::from(buffer), "*".into()),
            Self::Device(gpu, buffer) => (Memory::from(buffer), format!("cuda:{gpu}")),
        }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Host(buffer) => {
                buffer.write(offset, bytes);
                Ok(())
            }
            Self::Device(_, buffer) => buffer.write(offset, bytes),
        }
    }

    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::Host(buffer) => {
                buffer.read(offset, bytes);
                Ok(())
            }
            Self::Device(_, buffer) => buffer.read(offset, bytes),
        }
    }
}

/// One side's buffers, all of the same length: one on the host, or one on each of its GPUs. A thread uses one of them, in
/// turn.
pub struct Side {
    buffers: Vec<Buffer>,
    length: u64,
}

impl Side {
    /// `length` bytes at home, on every GPU of it, filled: memory that was never written is one page of zeros, which is
    /// read at a cache's speed.
    pub fn new(home: Home, length: u64, filled: u64) -> Result<Self> {
        let gpus = home.gpus()?;
        let device = |&gpu: &u32| {
            DeviceBuffer::new(gpu, length).map(|buffer| Buffer::Device(gpu, Arc::new(buffer)))
        };
        let buffers = if gpus.is_empty() {
            vec![Buffer::host(length)?]
        } else {
            gpus.iter().map(device).collect::<Result<_>>()?
        };
        for buffer in &buffers {
            pattern::fill(buffer, once(0..filled), 0)?;
        }
        Ok(Self { buffers, length })
    }

    pub fn register(&self, transport: &Transport) -> Result<()> {
        let memory: Vec<_> = self.buffers.iter().map(Buffer::memory).collect();
        let wanted: Vec<_> =
            memory.iter().map(|(memory, location)| (memory.clone(), location.as_str())).collect();
        transport.register(&wanted).map(drop)
    }

    pub fn places(&self) -> Vec<Place> {
        self.buffers.iter().map(Buffer::place).collect()
    }

    /// Bytes of each buffer.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Fills what the threads use.
    pub fn fill(&self, layout: &Layout, seed: u64) -> Result<()> {
        self.fits(layout)?;
        self.parts(layout).try_for_each(|(_, buffer, ranges)| pattern::fill(buffer, ranges, seed))
    }

    /// Checks it: the first wrong byte.
    pub fn check(&self, layout: &Layout, seed: u64) -> Result<Option<Wrong>> {
        self.fits(layout)?;
        for (index, buffer, ranges) in self.parts(layout) {
            if let Some(wrong) = pattern::check(buffer, ranges, seed)? {
                return Ok(Some(Wrong { buffer: index, ..wrong }));
            }
        }
        Ok(None)
    }

    fn fits(&self, layout: &Layout) -> Result<()> {
        if layout.length > self.length {
            return Err(Error::invalid("asked for more than the buffer has"));
        }
        if layout.block == 0 || layout.threads == 0 {
            return Err(Error::new(
                Code::InvalidArgument,
                "asked for blocks of no bytes or no thread",
            ));
        }
        Ok(())
    }

    fn parts<'a>(
        &'a self,
        layout: &'a Layout,
    ) -> impl Iterator<Item = (usize, &'a Buffer, impl Iterator<Item = std::ops::Range<u64>> + 'a)>
    {
        let of = self.buffers.len();
        self.buffers
            .iter()
            .enumerate()
            .map(move |(index, buffer)| (index, buffer, layout.ranges(index as u64, of as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_a_number_of_transfer_engine_bench() {
        assert_eq!(Home::of_gpu(-1), Home::EveryGpu);
        assert_eq!(Home::of_gpu(3), Home::Gpu(3));
        for id in [-1, 0, 7] {
            assert_eq!(Home::of_gpu(id).gpu_id(), Some(id));
        }
        assert_eq!(Home::Host.gpu_id(), None);
        assert!(Home::Host.gpus().expect("none is asked").is_empty());
    }

    #[test]
    fn several_buffers_share_the_blocks_of_threads() {
        let layout = Layout { length: 12 * 4096, block: 4096, threads: 3 };
        let buffers = (0..2).map(|_| Buffer::host(1 << 16).expect("mapped")).collect();
        let side = Side { buffers, length: 1 << 16 };
        side.fill(&layout, 5).expect("host memory");
        assert_eq!(side.check(&layout, 5).expect("host memory"), None);
        // Threads 0 and 2 use the first buffer, thread 1 the second.
        side.buffers[0].write(4096 + 7, &[1]).expect("inside");
        side.buffers[1].write(4096 * 2 + 7, &[1]).expect("inside");
        assert_eq!(side.check(&layout, 5).expect("host memory"), None, "of nobody");
        let mut right = [0];
        side.buffers[1].read(4 * 4096 + 9, &mut right).expect("inside");
        side.buffers[1].write(4 * 4096 + 9, &[!right[0]]).expect("inside");
        let wrong = side.check(&layout, 5).expect("host memory").expect("one byte is wrong");
        assert_eq!((wrong.buffer, wrong.offset, wrong.found), (1, 4 * 4096 + 9, !right[0]));
    }

    #[test]
    fn orders_that_make_no_sense_are_refused() {
        let side = Side { buffers: vec![Buffer::host(4096).expect("mapped")], length: 4096 };
        for (length, block, threads) in [(4097, 1, 1), (1, 0, 1), (1, 1, 0)] {
            assert!(side.fill(&Layout { length, block, threads }, 1).is_err());
        }
    }
}
