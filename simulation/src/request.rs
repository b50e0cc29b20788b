//! What one request costs the engine, from submit to completion, on NICs that cost nothing.

use std::time;

use crate::instant::Instant;

/// Requests of a batch.
const BATCH: usize = 128;
/// Transmit depth of the NICs.
const DEPTH: u32 = 1024;

/// How often, and what.
#[derive(clap::Args)]
pub struct Args {
    /// Batches of 128 requests of each case
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    batches: u64,
    /// Only the case of this name
    #[arg(long)]
    case: Option<String>,
}

/// Name, NICs, and whether the requests of a batch are neighbours, which are merged.
const CASES: [(&str, usize, bool); 4] = [
    ("write-1-nic", 1, false),
    ("write-2-nics", 2, false),
    ("write-16-nics", 16, false),
    ("merged-2-nics", 2, true),
];

/// Measures and prints.
///
/// # Errors
/// If no case has the name that was asked for.
pub fn run(args: &Args, json: bool) -> Result<(), String> {
    let wanted = |name| args.case.as_ref().is_none_or(|case| case == name);
    let cases: Vec<_> = CASES.into_iter().filter(|(name, ..)| wanted(*name)).collect();
    if cases.is_empty() {
        let names = CASES.map(|(name, ..)| name).join(", ");
        return Err(format!("no such case; there are {names}"));
    }
    let mut figures = serde_json::Map::new();
    for (name, nics, neighbours) in cases {
        let mut engine = Instant::new(nics, DEPTH, false).with_regions(1).with_peers(1, 1);
        if neighbours {
            engine = engine.with_neighbours();
        }
        // Not CPU time: rustix reads the processor's clock in a way that valgrind does not survive.
        let start = time::Instant::now();
        for _ in 0..args.batches {
            engine.finish(engine.submit(BATCH, |_| 0, |index| index as u64));
        }
        let requests = args.batches * BATCH as u64;
        let each = start.elapsed().as_nanos() as f64 / requests as f64;
        if json {
            figures.insert(name.to_owned(), each.into());
        } else {
            println!("{name:14} {each:7.1} ns a request");
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&figures).expect("numbers"));
    }
    Ok(())
}
