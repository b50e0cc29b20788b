//! What an RDMA write to another process costs on the emulated device, beside the copy alone
//! (`process_vm_writev`), in one run.
//!
//!     cargo build --release -p softefa-preload && cargo bench -p softefa-preload --bench cost
//!     ... --bench cost -- OTHER/libsoftefa.so      another library too, turn about
//!
//! Nanoseconds an operation, medians of the rounds with least and greatest, and the ratio copy/device.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::process::{Command, Stdio};
use std::time::Instant;

use harness::*;
use softefa_core::sysfs::gid;

const SIZES: [usize; 4] = [8, 4096, 16384, 65536];
const ROUNDS: usize = 9;
const WINDOW: u64 = 16;

/// The other process: memory, and a queue pair that knows the first.
fn target() {
    let mut side = side(0, Kind::default());
    side.ah = Some(Ah::new(&side.device, gid(0, 0)));
    let qp = u64::from(side.qp.number());
    tell(&[qp, side.region.address(), u64::from(side.region.key()), std::process::id().into()]);
    hear();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One round: for each size nanoseconds an operation of the device, and of the copy.
fn measure() {
    let mut us = side(0, Kind::default());
    us.ah = Some(Ah::new(&us.device, gid(1, 0)));
    let mut other = Other::start("target", 1);
    let told = other.hear();
    let to = us.to(told[0] as u32);
    for size in SIZES {
        let operations = (40_000_000 / (size as u64 + 4000)).min(8000) / WINDOW * WINDOW;
        let write = Op::Write { key: told[2] as u32, to: told[1] };
        let sge = [us.region.sge(0, size)];
        let here = libc::iovec { iov_base: sge[0].addr as *mut _, iov_len: size };
        let there = libc::iovec { iov_base: told[1] as *mut _, iov_len: size };
        let (mut device, mut copy) = (Vec::new(), Vec::new());
        for _ in 0..11 {
            let begun = Instant::now();
            for _ in 0..operations / WINDOW {
                us.qp.start();
                (0..WINDOW).for_each(|id| us.qp.add(id, true, write, Data::Buffers(&sge), to));
                assert_eq!(us.qp.complete(), 0);
                (0..WINDOW).for_each(|_| assert_eq!(us.cq.wait().status, 0));
            }
            device.push(begun.elapsed().as_nanos() as f64 / operations as f64);
            let begun = Instant::now();
            for _ in 0..operations {
                // SAFETY: the kernel checks both ranges.
                let n = unsafe { libc::process_vm_writev(told[3] as i32, &here, 1, &there, 1, 0) };
                assert_eq!(n, size as isize);
            }
            copy.push(begun.elapsed().as_nanos() as f64 / operations as f64);
        }
        println!("{} {}", median(device), median(copy));
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.first().map(String::as_str) {
        Some("target") => return target(),
        Some("measure") => return measure(),
        _ => {}
    }
    let mut libraries = vec![None];
    libraries.extend(words.iter().map(Some));
    let mut rounds = vec![Vec::new(); libraries.len()];
    for _ in 0..ROUNDS {
        for (library, rounds) in libraries.iter().zip(&mut rounds) {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.arg("measure").stderr(Stdio::inherit());
            if let Some(library) = library {
                command.env("SOFTEFA_LIBRARY", library);
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            let numbers: Vec<f64> =
                text.split_whitespace().map(|word| word.parse().unwrap()).collect();
            rounds.push(numbers);
        }
    }
    for (library, rounds) in libraries.iter().zip(&rounds) {
        println!("{}", library.map_or("softefa", String::as_str));
        for (k, size) in SIZES.iter().enumerate() {
            let of = |at: usize| -> Vec<f64> { rounds.iter().map(|round| round[at]).collect() };
            let ratio: Vec<f64> =
                rounds.iter().map(|round| round[2 * k + 1] / round[2 * k]).collect();
            let show = |values: Vec<f64>| {
                let least = values.iter().copied().fold(f64::MAX, f64::min);
                let greatest = values.iter().copied().fold(0.0, f64::max);
                (median(values), least, greatest)
            };
            let (device, copy, ratio) = (show(of(2 * k)), show(of(2 * k + 1)), show(ratio));
            println!(
                "{size:6} B  device {:7.0} ({:.0} to {:.0})  copy {:7.0} ({:.0} to {:.0})  ratio {:.2} ({:.2} to {:.2})",
                device.0, device.1, device.2, copy.0, copy.1, copy.2, ratio.0, ratio.1, ratio.2
            );
        }
    }
}
