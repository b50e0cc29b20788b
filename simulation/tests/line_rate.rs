//! Default settings reach the line rate of every machine. In virtual time: the same on any machine that
//! runs the test.

use std::sync::atomic::{AtomicUsize, Ordering};

use simulation::cell::Cell;
use simulation::machine::{MACHINES, Machine};
use simulation::units::size;

/// Wanted of the line rate.
const WANTED: f64 = 0.97;

/// Runs cells on all cores, each for at most a millisecond of its time.
fn each(cells: &[Cell], check: impl Fn(&Cell, f64) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let cell = Cell { longest: 1_000_000, ..cell.clone() };
                    check(&cell, cell.run().expect("no cell fails").line_part);
                }
            });
        }
    });
}

fn name(cell: &Cell) -> String {
    let Cell { machine, peers, write, block, threads, batch, .. } = cell;
    let operation = if *write { "write" } else { "read" };
    let block = size(*block);
    format!(
        "{}, {peers} peers, {operation} {block}, {threads} threads, batch {batch}",
        machine.name
    )
}

#[test]
fn default_settings_reach_the_line_rate_of_every_machine() {
    let mut cells = Vec::new();
    for machine in MACHINES {
        for peers in [1, 8, 64] {
            for write in [true, false] {
                for block in [64 << 10, 128 << 10, 256 << 10, 1 << 20, 16 << 20] {
                    for (threads, batch) in [(8, 128), (16, 256)] {
                        cells.push(Cell {
                            peers,
                            write,
                            block,
                            threads,
                            batch,
                            ..Cell::new(machine)
                        });
                    }
                }
            }
        }
        // Many threads, and batches of more than 256.
        cells.push(Cell { peers: 8, threads: 64, batch: 1024, ..Cell::new(machine) });
    }
    each(&cells, |cell, part| assert!(part >= WANTED, "{}: {part:.3}", name(cell)));
}

/// One thread that waits for each submission cannot fill the line: it comes near to what is possible, with
/// one request, and with some to each of several peers.
#[test]
fn one_submission_at_a_time_fills_all_nics() {
    let mut cells = Vec::new();
    for machine in MACHINES {
        let cell = Cell { threads: 1, ..Cell::new(machine) };
        cells.push(Cell { block: 64 << 20, batch: 1, ..cell.clone() });
        for runs in [true, false] {
            cells.push(Cell { block: 4 << 20, batch: 16, peers: 2, runs, ..cell.clone() });
        }
    }
    each(&cells, |cell, part| {
        let bound = cell.bound();
        assert!(part >= 0.9 * bound, "{}: {part:.3} of {bound:.3}", name(cell));
    });
}

/// That the figures can be other ones: the engine as it would be if a request took one NIC, which is
/// how Mooncake's C++ transport works.
#[test]
fn with_one_nic_a_request_it_is_far_below() {
    let workload =
        |machine: Machine| Cell { block: 16 << 20, threads: 8, batch: 1, ..Cell::new(machine) };
    let cells = MACHINES.map(workload);
    each(&cells, |cell, part| {
        assert!(part >= WANTED, "{}: {part:.3}", name(cell));
        let one_nic = Cell { one_nic: true, ..cell.clone() }.run().expect("no cell fails");
        println!("{}: {part:.3}, with one NIC a request {:.3}", name(cell), one_nic.line_part);
        assert!(one_nic.line_part < 0.7, "{}: {:.3}", name(cell), one_nic.line_part);
    });
}

#[test]
fn the_same_cell_gives_the_same_figures() {
    let cell = Cell { peers: 8, threads: 16, longest: 200_000, ..Cell::new(MACHINES[0]) };
    assert_eq!(cell.run(), cell.run());
}
