//! What a request costs in CPU time as peers, NICs, threads, requests and regions become many.

use std::hint::black_box;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::instant::Instant;

/// Transmit depth of the NICs.
const DEPTH: u32 = 4095;
/// Requests a submission, where that is not what grows.
const BATCH: usize = 128;
/// NICs, where that is not what grows.
const NICS: usize = 4;

/// How to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Rounds of each figure: the median is printed, and the least and greatest
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Requests, or other things measured, in a round at least
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,
    /// Only curves whose name contains this
    #[arg(long, default_value = "")]
    only: String,
}

/// One figure: nanoseconds of CPU time, of one of what the curve counts.
#[derive(Serialize)]
struct Point {
    many: u64,
    median: f64,
    least: f64,
    greatest: f64,
}

#[derive(Serialize)]
struct Curve {
    name: &'static str,
    points: Vec<Point>,
}

/// CPU time of this thread, nanoseconds.
fn cpu_time() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Args {
    /// Calls `work`, which does `each` of what is counted and says how long that took, as often as
    /// asked for, and once before.
    fn measure(&self, many: u64, each: u64, mut work: impl FnMut() -> u64) -> Point {
        work();
        let calls = self.requests.div_ceil(each);
        let mut rounds: Vec<f64> = (0..self.rounds)
            .map(|_| (0..calls).map(|_| work()).sum::<u64>() as f64 / (calls * each) as f64)
            .collect();
        rounds.sort_by(f64::total_cmp);
        let middle = rounds.len() / 2;
        let point = Point {
            many,
            median: rounds[middle],
            least: rounds[0],
            greatest: rounds[rounds.len() - 1],
        };
        eprint!(".");
        point
    }

    /// CPU time of requests from submit to the end, `batch` at a time.
    fn requests(
        &self,
        many: u64,
        engine: &Instant,
        batch: usize,
        peer: impl Fn(usize, usize) -> usize,
        place: impl Fn(usize, usize) -> u64,
    ) -> Point {
        // Enough of them that looking at the clock, a system call, does not count.
        let batches = 4096_usize.div_ceil(batch);
        let mut round = 0;
        self.measure(many, (batches * batch) as u64, || {
            timed(|| {
                for _ in 0..batches {
                    round += 1;
                    engine.finish(engine.submit(batch, |i| peer(round, i), |i| place(round, i)));
                }
            })
        })
    }
}

fn timed(work: impl FnOnce()) -> u64 {
    let before = cpu_time();
    work();
    cpu_time() - before
}

/// The engine that curves start from.
fn plain(nics: usize) -> Instant {
    Instant::new(nics, DEPTH, false).with_regions(1).with_peers(1, 1)
}

/// Places one after the other.
fn next(_: usize, index: usize) -> u64 {
    index as u64
}

/// A place that looks drawn.
fn anywhere(round: usize, index: usize) -> u64 {
    (round as u64 * 7919 + index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

const HUNDREDS: [u64; 5] = [1, 10, 100, 1000, 10_000];

type Figures = fn(&Args) -> Vec<Point>;

const CURVES: [(&str, Figures); 15] = [
    ("peers known, a batch of 128 to one of them: a request", |args| {
        let points = HUNDREDS.map(|peers| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(1);
            let engine = engine.with_peers(peers as usize, 1);
            args.requests(peers, &engine, BATCH, |round, _| round * 7919 % peers as usize, next)
        });
        points.into()
    }),
    ("peers known, a batch of 128 to as many of them as there are: a request", |args| {
        let points = HUNDREDS.map(|peers| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(1);
            let engine = engine.with_peers(peers as usize, 1);
            let peer = |round, index| (round * BATCH + index) % peers as usize;
            args.requests(peers, &engine, BATCH, peer, next)
        });
        points.into()
    }),
    ("peers in one batch, 10000 requests to them in turn: a request", |args| {
        let points = HUNDREDS.map(|peers| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(1);
            let engine = engine.with_peers(peers as usize, 1);
            args.requests(peers, &engine, 10_000, |_, index| index % peers as usize, next)
        });
        points.into()
    }),
    ("peers known: to open and connect one more", |args| {
        let points = HUNDREDS.map(|peers| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(1);
            let engine = engine.with_peers(peers as usize, 1);
            args.measure(peers, 100, || {
                let segments = vec![engine.segment(1); 100];
                let mut opened = Vec::with_capacity(100);
                let time = timed(|| {
                    for segment in segments {
                        let target = engine.engine.add_target(segment).expect("room");
                        engine.engine.warm_up(target).expect("connects");
                        opened.push(target);
                    }
                });
                for target in opened {
                    engine.engine.remove_target(target).expect("open");
                }
                time
            })
        });
        points.into()
    }),
    ("NICs, a batch of 128: a request", |args| {
        let points = [1, 2, 4, 8, 16, 32]
            .map(|nics| args.requests(nics, &plain(nics as usize), BATCH, |_, _| 0, next));
        points.into()
    }),
    ("NICs, a batch of 128 to 16 peers in turn: a request", |args| {
        let points = [1, 2, 4, 8, 16, 32].map(|nics| {
            let engine = Instant::new(nics as usize, DEPTH, false).with_regions(1);
            let engine = engine.with_peers(16, 1);
            args.requests(nics, &engine, BATCH, |_, index| index % 16, next)
        });
        points.into()
    }),
    ("NICs, a batch of 1: a request", |args| {
        let points = [1, 2, 4, 8, 16, 32]
            .map(|nics| args.requests(nics, &plain(nics as usize), 1, |_, _| 0, next));
        points.into()
    }),
    ("threads, each with batches of 128: a request", |args| {
        let points = [1, 2, 4, 8, 16, 32, 64].map(|threads| {
            let engine = plain(NICS);
            let batches = args.requests.div_ceil(threads * BATCH as u64).max(10);
            args.measure(threads, args.requests.max(threads * BATCH as u64 * batches), || {
                std::thread::scope(|scope| {
                    let workers: Vec<_> = (0..threads)
                        .map(|_| {
                            scope.spawn(|| {
                                timed(|| {
                                    for _ in 0..batches {
                                        engine.finish(engine.submit(BATCH, |_| 0, |i| i as u64));
                                    }
                                })
                            })
                        })
                        .collect();
                    workers.into_iter().map(|it| it.join().expect("no panic")).sum::<u64>()
                })
            })
        });
        points.into()
    }),
    ("requests before, in batches of 128: a request of the next 1000 batches", |args| {
        let engine = plain(NICS);
        let mut done = 0;
        let points = [0, 1000, 10_000, 100_000, 1_000_000].map(|many: u64| {
            while done < many {
                engine.finish(engine.submit(BATCH, |_| 0, |i| i as u64));
                done += BATCH as u64;
            }
            args.requests(many, &engine, BATCH, |_, _| 0, next)
        });
        points.into()
    }),
    ("requests in one batch: a request", |args| {
        let engine = plain(NICS);
        let points = [1, 16, 128, 1024, 1 << 13, 1 << 16, 1 << 20]
            .map(|batch| args.requests(batch, &engine, batch as usize, |_, _| 0, next));
        points.into()
    }),
    ("our regions, requests anywhere in them: a request", |args| {
        let points = HUNDREDS.map(|regions| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(regions).with_peers(1, 1);
            args.requests(regions, &engine, BATCH, |_, _| 0, anywhere)
        });
        points.into()
    }),
    ("our regions: to register one more", |args| register(args, false)),
    ("our regions: to unregister one", |args| register(args, true)),
    ("a peer's regions, requests anywhere in them: a request", |args| {
        let points = HUNDREDS.map(|regions| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(1).with_peers(1, regions);
            args.requests(regions, &engine, BATCH, |_, _| 0, anywhere)
        });
        points.into()
    }),
    ("a peer's regions: to take its new descriptor, a region", |args| {
        let points = HUNDREDS.map(|regions| {
            let engine = Instant::new(NICS, DEPTH, false).with_regions(1).with_peers(1, regions);
            args.measure(regions, regions, || {
                let segment = engine.segment(regions);
                timed(|| engine.engine.update_target(engine.targets[0], segment).expect("open"))
            })
        });
        points.into()
    }),
];

/// Registers and unregisters the last of so many regions.
fn register(args: &Args, unregister: bool) -> Vec<Point> {
    let points = HUNDREDS.map(|regions| {
        let engine = Instant::new(NICS, DEPTH, false).with_regions(regions + 1);
        let last = [engine.registration(regions)];
        let address = last[0].memory.address();
        let few = Args { requests: args.requests.min(1000), only: String::new(), ..*args };
        few.measure(regions, 1, || {
            let gone = timed(|| engine.engine.unregister(address).expect("idle"));
            let back = timed(|| {
                black_box(engine.engine.register(&last).expect("free"));
            });
            if unregister { gone } else { back }
        })
    });
    points.into()
}

/// Measures and prints.
///
/// # Errors
/// If no curve has a name that contains what was asked for.
pub fn run(args: &Args, json: bool) -> Result<(), String> {
    let wanted = CURVES.iter().filter(|(name, _)| name.contains(&args.only));
    let curves: Vec<Curve> =
        wanted.map(|&(name, figures)| Curve { name, points: figures(args) }).collect();
    eprintln!();
    if curves.is_empty() {
        return Err(format!("no curve's name contains {:?}", args.only));
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&curves).expect("numbers and strings"));
        return Ok(());
    }
    println!("Nanoseconds of CPU time: median (least-greatest) of {} rounds", args.rounds);
    for curve in curves {
        println!("\n{}", curve.name);
        for point in &curve.points {
            let Point { many, median, least, greatest } = point;
            let first = curve.points[0].median;
            println!(
                "{many:>9} {median:>9.1} ({least:.1}-{greatest:.1})   {:.2} of the first",
                median / first
            );
        }
    }
    Ok(())
}
