//! `simulation`: the engine on machines that nobody here has, and how its cost grows.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use simulation::cell::{Cell, Costs, DEFAULT_SLICE, Outcome};
use simulation::machine::{MACHINES, Machine};
use simulation::units::{parse_size, size};
use simulation::{growth, memory, request};

/// The engine on simulated NICs: which part of a big machine's line rate it reaches, how the cost of a
/// request grows, and what it keeps in memory.
#[derive(Parser)]
#[command(name = "simulation", version, after_help = EXAMPLES)]
struct Cli {
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  simulation cell --machine p6-b200 --threads 8 --block 64K     one workload, with the default settings
  simulation cell --machine p5 --block 16M --one-nic            the same if a request took one NIC only
  simulation grid --machine p5en --peers 1,64                   block size by threads, as parts of the line
  simulation cores                                              from which block size 1, 4, 16 cores fill the line
  simulation sweep --machine p5                                 default settings against the best of a sweep
  simulation growth                                             what a request costs as things become many
  simulation request                                            what a request costs, on 1, 2, 16 NICs, and merged
  simulation memory                                             bytes a request in flight, and a peer and NIC

cell, grid, cores and sweep run in virtual time: their figures are the same on every machine. What the
threads' work costs is a setting (--request-ns and on). What is not simulated: caches, memory bandwidth,
packets' headers, and how the network chooses its ways. growth measures this machine.";

#[derive(Subcommand)]
enum Command {
    /// One workload on one machine
    Cell(CellArgs),
    /// Workloads of many block sizes and threads, with default settings
    Grid(GridArgs),
    /// The block size from which so many cores reach 0.97 of the line
    Cores(CoresArgs),
    /// Default settings against the best of all settings, for several workloads
    Sweep(SweepArgs),
    /// CPU time of a request on NICs that complete at once, as peers, NICs, threads, requests and
    /// regions become many
    Growth(growth::Args),
    /// Time of a request on NICs that complete at once; scripts/check-cost counts its instructions
    Request(request::Args),
    /// Bytes of heap a request in flight, and a peer and NIC
    Memory,
}

/// What every simulated workload has.
#[derive(Args, Clone)]
struct Common {
    /// Round trip, nanoseconds
    #[arg(long, default_value_t = 20_000)]
    round_trip_ns: u64,
    /// Time that a device takes for an operation at least, nanoseconds (none is published)
    #[arg(long, default_value_t = 0)]
    device_ns: u64,
    /// CPU time of the engine a request, nanoseconds
    #[arg(long, default_value_t = Costs::default().request)]
    request_ns: u64,
    /// CPU time of the engine a submission, nanoseconds
    #[arg(long, default_value_t = Costs::default().submission)]
    submission_ns: u64,
    /// CPU time of the engine each time a waiting thread looks, nanoseconds
    #[arg(long, default_value_t = Costs::default().progress)]
    progress_ns: u64,
    /// CPU time of libfabric to post an operation, nanoseconds
    #[arg(long, default_value_t = Costs::default().post)]
    post_ns: u64,
    /// CPU time of libfabric to look at a NIC's completion queue, nanoseconds
    #[arg(long, default_value_t = Costs::default().poll)]
    poll_ns: u64,
    /// CPU time of libfabric a completion, nanoseconds
    #[arg(long, default_value_t = Costs::default().completion)]
    completion_ns: u64,
    /// Cores that a sender's threads share evenly
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1024))]
    cores: u64,
    /// Submissions that a thread has under way before it waits
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    ahead: u64,
    /// Blocks are neighbours on both sides, so that the engine can merge them
    #[arg(long)]
    neighbours: bool,
    /// Requests to the same peer are next to each other in a submission, instead of going to the peers in
    /// turn
    #[arg(long)]
    runs: bool,
    /// A request goes over one NIC, as in Mooncake's C++ transport: for comparison
    #[arg(long)]
    one_nic: bool,
    /// Longest virtual time to simulate, nanoseconds
    #[arg(long, default_value_t = 2_000_000)]
    longest_ns: u64,
}

impl Common {
    fn cell(&self, machine: Machine) -> Cell {
        Cell {
            ahead: self.ahead as usize,
            cores: self.cores as usize,
            neighbours: self.neighbours,
            runs: self.runs,
            one_nic: self.one_nic,
            costs: Costs {
                request: self.request_ns,
                submission: self.submission_ns,
                progress: self.progress_ns,
                post: self.post_ns,
                poll: self.poll_ns,
                completion: self.completion_ns,
            },
            round_trip: self.round_trip_ns,
            message: self.device_ns,
            longest: self.longest_ns,
            ..Cell::new(machine)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Operation {
    Write,
    Read,
}

#[derive(Args)]
struct CellArgs {
    /// p5, p5en, p6-b200 or p6-b300
    #[arg(long, value_parser = Machine::named)]
    machine: Machine,
    /// Peers, machines of the same kind
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=4096))]
    peers: u64,
    /// Hosts that send
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    senders: u64,
    /// Write or read
    #[arg(long, value_enum, default_value = "write")]
    operation: Operation,
    /// Bytes of a request
    #[arg(long, default_value = "64K", value_parser = parse_size)]
    block: u64,
    /// Threads that submit and wait
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1024))]
    threads: u64,
    /// Requests a submission
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    batch: u64,
    /// Longest operation (MC_SLICE_SIZE)
    #[arg(long, default_value = "4M", value_parser = parse_size)]
    slice: u64,
    /// NICs in turn instead of the least loaded (MC_PATH_ROUNDROBIN)
    #[arg(long)]
    round_robin: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct GridArgs {
    /// Machines
    #[arg(long, value_delimiter = ',', value_parser = Machine::named, default_values = MACHINES.map(|m| m.name))]
    machine: Vec<Machine>,
    /// Peers
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64])]
    peers: Vec<usize>,
    /// Write, read
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["write", "read"])]
    operation: Vec<Operation>,
    /// Bytes of a request
    #[arg(long, value_delimiter = ',', value_parser = parse_size,
          default_values = ["4K", "16K", "64K", "128K", "256K", "1M", "4M", "16M"])]
    block: Vec<u64>,
    /// Threads
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 8, 16, 64])]
    threads: Vec<usize>,
    /// Requests a submission
    #[arg(long, value_delimiter = ',', default_values_t = [1, 128, 256, 1024])]
    batch: Vec<usize>,
    /// Longest operation
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_values = ["4M"])]
    slice: Vec<u64>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct CoresArgs {
    /// Machines
    #[arg(long, value_delimiter = ',', value_parser = Machine::named, default_values = MACHINES.map(|m| m.name))]
    machine: Vec<Machine>,
    /// Cores, each with one thread
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16])]
    count: Vec<usize>,
    /// Requests a submission
    #[arg(long, default_value_t = 128)]
    batch: usize,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct SweepArgs {
    /// Machines
    #[arg(long, value_delimiter = ',', value_parser = Machine::named, default_values = MACHINES.map(|m| m.name))]
    machine: Vec<Machine>,
    #[command(flatten)]
    common: Common,
}

/// A cell that was simulated.
#[derive(Serialize)]
struct Row {
    cell: Cell,
    outcome: Result<Outcome, String>,
}

/// Wanted of the line rate.
const WANTED: f64 = 0.97;
/// A cell can be wanted to reach the line where the bound is this much above it: at a bound of 1 a
/// thread would have to be back with its next submission the moment that the line runs dry.
const REACH: f64 = 1.25;

/// Simulates cells, several at a time; in their order.
fn simulate(cells: Vec<Cell>) -> Vec<Row> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(vec![None; cells.len()]);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((index, cell)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    cells.get(index).map(|cell| (index, cell))
                } {
                    let outcome = cell.run();
                    outcomes.lock().expect("no panic")[index] = Some(outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().expect("no panic");
    let row = |(cell, outcome): (Cell, Option<_>)| Row { cell, outcome: outcome.expect("done") };
    cells.into_iter().zip(outcomes).map(row).collect()
}

/// Each cell with each of the values, which `set` puts into it: the next value after all cells' last.
fn vary<T: Copy>(cells: Vec<Cell>, values: &[T], set: impl Fn(&mut Cell, T)) -> Vec<Cell> {
    let with = |cell: Cell, value: T| {
        let mut cell = cell;
        set(&mut cell, value);
        cell
    };
    let each = |cell: Cell| values.iter().map(move |&value| (cell.clone(), value));
    cells.into_iter().flat_map(each).map(|(cell, value)| with(cell, value)).collect()
}

fn part(row: &Row) -> f64 {
    row.outcome.as_ref().map_or(0.0, |outcome| outcome.line_part)
}

fn name(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}

fn print_json(value: &impl Serialize) {
    println!("{}", serde_json::to_string_pretty(value).expect("numbers and strings"));
}

fn cell(args: &CellArgs, json: bool) -> Result<(), String> {
    let cell = Cell {
        peers: args.peers as usize,
        senders: args.senders as usize,
        write: args.operation == Operation::Write,
        block: args.block,
        threads: args.threads as usize,
        batch: args.batch as usize,
        slice: args.slice,
        round_robin: args.round_robin,
        ..args.common.cell(args.machine)
    };
    let outcome = cell.run()?;
    if json {
        print_json(&Row { cell, outcome: Ok(outcome) });
    } else {
        println!(
            "{:.3} of the line: {:.1} GB/s of {:.0}, {:.0} operations/s (nothing could exceed {:.2}; {} µs simulated)",
            outcome.line_part,
            outcome.gigabytes,
            cell.machine.line() / 1e9,
            outcome.operations,
            outcome.bound.min(1.0),
            outcome.simulated / 1000
        );
    }
    Ok(())
}

fn grid(args: &GridArgs, json: bool) -> Result<(), String> {
    let cells: Vec<Cell> = args.machine.iter().map(|&machine| args.common.cell(machine)).collect();
    let cells = vary(cells, &args.peers, |cell, peers| cell.peers = peers);
    let cells = vary(cells, &args.operation, |cell, operation| {
        cell.write = operation == Operation::Write;
    });
    let cells = vary(cells, &args.slice, |cell, slice| cell.slice = slice);
    let cells = vary(cells, &args.batch, |cell, batch| cell.batch = batch);
    let cells = vary(cells, &args.block, |cell, block| cell.block = block);
    let cells = vary(cells, &args.threads, |cell, threads| cell.threads = threads);
    let rows = simulate(cells);
    if json {
        print_json(&rows);
        return Ok(());
    }
    let table = args.block.len() * args.threads.len();
    for rows in rows.chunks(table) {
        let Cell { machine, peers, write, batch, slice, .. } = &rows[0].cell;
        println!(
            "\n{} ({} x {} Gbit/s), {peers} peers, {}, batch {batch}, slice {}: part of the line by block and threads",
            machine.name,
            machine.nics,
            machine.gbits,
            name(*write),
            size(*slice)
        );
        print!("{:>8}", "");
        args.threads.iter().for_each(|threads| print!("{threads:>12}"));
        println!();
        for rows in rows.chunks(args.threads.len()) {
            print!("{:>8}", size(rows[0].cell.block));
            for row in rows {
                let text = match &row.outcome {
                    Ok(outcome) if outcome.bound < 1.0 => {
                        format!("{:.2} of {:.2}", outcome.line_part, outcome.bound)
                    }
                    Ok(outcome) => format!("{:.2}", outcome.line_part),
                    Err(_) => "failed".to_owned(),
                };
                print!("{text:>13}",);
            }
            println!();
        }
    }
    let failed: Vec<_> = rows.iter().filter(|row| row.outcome.is_err()).collect();
    println!("\n{} cells, {} failed", rows.len(), failed.len());
    for row in &failed {
        println!("  {:?}: {:?}", row.cell, row.outcome.as_ref().err());
    }
    for (what, least) in [("from 64K up", 64 << 10), ("of any size", 0)] {
        let reach = |row: &&Row| row.cell.block >= least && row.cell.bound() >= REACH;
        let wanted: Vec<_> = rows.iter().filter(reach).collect();
        let below: Vec<_> = wanted.iter().filter(|row| part(row) < WANTED).collect();
        if let Some(worst) = wanted.iter().min_by(|a, b| part(a).total_cmp(&part(b))) {
            println!(
                "blocks {what}, bound at least {REACH}: {} cells, {} below {WANTED}; the least {:.3}",
                wanted.len(),
                below.len(),
                part(worst)
            );
        }
        for row in below {
            let Cell { machine, peers, write, block, threads, batch, .. } = &row.cell;
            println!(
                "  {:.3}: {}, {peers} peers, {}, block {}, {threads} threads, batch {batch} (bound {:.2})",
                part(row),
                machine.name,
                name(*write),
                size(*block),
                row.cell.bound()
            );
        }
    }
    Ok(())
}

fn cores(args: &CoresArgs, json: bool) -> Result<(), String> {
    let blocks: Vec<u64> = (12..=26).map(|shift| 1 << shift).collect();
    let under_way = [(args.common.ahead as usize, args.common.neighbours), (4, false), (4, true)];
    let cell = |&machine| Cell { batch: args.batch, ..args.common.cell(machine) };
    let cells: Vec<Cell> = args.machine.iter().map(cell).collect();
    let cells = vary(cells, &args.count, |cell, count| (cell.threads, cell.cores) = (count, count));
    let cells = vary(cells, &under_way, |cell, under_way| {
        (cell.ahead, cell.neighbours) = under_way;
    });
    let cells = vary(cells, &blocks, |cell, block| cell.block = block);
    let rows = simulate(cells);
    if json {
        print_json(&rows);
        return Ok(());
    }
    println!(
        "Smallest block (power of two) from which on {WANTED} of the line is reached; one thread a core, batch {}",
        args.batch
    );
    for rows in rows.chunks(blocks.len()) {
        let cell = &rows[0].cell;
        let from = rows.iter().rposition(|row| part(row) < WANTED).map_or(0, |last| last + 1);
        let at = |block: u64| rows.iter().find(|row| row.cell.block == block).map_or(0.0, part);
        println!(
            "{:>8}  {:>2} cores  {} under way a thread{}: {:>5}   (4K {:.2}, 64K {:.2}, 256K {:.2}, 1M {:.2})",
            cell.machine.name,
            cell.cores,
            cell.ahead,
            if cell.neighbours { ", neighbours" } else { "            " },
            rows.get(from).map_or("-".to_owned(), |row| size(row.cell.block)),
            at(4 << 10),
            at(64 << 10),
            at(256 << 10),
            at(1 << 20),
        );
    }
    Ok(())
}

fn sweep(args: &SweepArgs, json: bool) -> Result<(), String> {
    let slices = [64 << 10, 128 << 10, 256 << 10, 1 << 20, DEFAULT_SLICE];
    let blocks = [64 << 10, 128 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];
    let cells: Vec<Cell> = args.machine.iter().map(|&machine| args.common.cell(machine)).collect();
    let cells = vary(cells, &[1, 2, 4, 8, 16], |cell, threads| cell.threads = threads);
    let cells = vary(cells, &[8, 128], |cell, batch| cell.batch = batch);
    let cells = vary(cells, &blocks, |cell, block| cell.block = block);
    let cells = vary(cells, &[false, true], |cell, in_turn| cell.round_robin = in_turn);
    let cells = vary(cells, &slices, |cell, slice| cell.slice = slice);
    let rows = simulate(cells);
    if json {
        print_json(&rows);
        return Ok(());
    }
    let settings = 2 * slices.len();
    println!(
        "Default settings (slice 4M, least loaded NIC) against the best of {settings}, workload by workload"
    );
    for rows in rows.chunks(rows.len() / args.machine.len()) {
        let mut shares: Vec<(f64, &Row, &Row)> = rows
            .chunks(settings)
            .map(|workload| {
                let default = |row: &&Row| row.cell.slice == DEFAULT_SLICE && !row.cell.round_robin;
                let default = workload.iter().find(default).expect("one of them");
                let best = workload.iter().max_by(|a, b| part(a).total_cmp(&part(b)));
                let best = best.expect("several");
                (part(default) / part(best), default, best)
            })
            .collect();
        shares.sort_by(|a, b| a.0.total_cmp(&b.0));
        let below = shares.iter().filter(|(share, ..)| *share < WANTED).count();
        let (least, default, best) = &shares[0];
        let Cell { machine, block, threads, batch, .. } = &default.cell;
        println!(
            "{:>8}: {} workloads, {below} below {WANTED} of the best; the least {least:.3}: block {}, {threads} threads, \
             batch {batch}, {:.3} of the line; best {:.3} with slice {}{}",
            machine.name,
            shares.len(),
            size(*block),
            part(default),
            part(best),
            size(best.cell.slice),
            if best.cell.round_robin { ", NICs in turn" } else { "" }
        );
        for (share, default, best) in shares[1..].iter().take_while(|(share, ..)| *share < WANTED) {
            let Cell { block, threads, batch, .. } = &default.cell;
            println!(
                "          {share:.3}: block {}, {threads} threads, batch {batch}, {:.3} of the line; best {:.3} with slice {}{}",
                size(*block),
                part(default),
                part(best),
                size(best.cell.slice),
                if best.cell.round_robin { ", NICs in turn" } else { "" }
            );
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Cell(args) => cell(args, cli.json),
        Command::Grid(args) => grid(args, cli.json),
        Command::Cores(args) => cores(args, cli.json),
        Command::Sweep(args) => sweep(args, cli.json),
        Command::Growth(args) => growth::run(args, cli.json),
        Command::Request(args) => request::run(args, cli.json),
        Command::Memory => {
            memory::run(cli.json);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("simulation: {error}");
            ExitCode::FAILURE
        }
    }
}
