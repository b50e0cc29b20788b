//! What came of all scenarios, for people and for programs.

use crate::resources::{Growth, Sample};
use crate::run::Outcome;
use crate::tally::Tally;

const HEAD: [&str; 16] = [
    "scenario",
    "s",
    "tried",
    "completed",
    "failed",
    "unexplained",
    "timed out",
    "retried",
    "lost",
    "hung",
    "corrupted",
    "crashed",
    "restarts",
    "stall ms",
    "GB",
    "result",
];

fn row(outcome: &Outcome) -> [String; 16] {
    let Tally {
        tried,
        completed,
        failed,
        unexplained,
        timed_out,
        lost,
        corrupted,
        bytes,
        stall_ms,
        ..
    } = outcome.tally;
    [
        outcome.scenario.into(),
        format!("{:.0}", outcome.seconds),
        tried.to_string(),
        completed.to_string(),
        failed.to_string(),
        unexplained.to_string(),
        timed_out.to_string(),
        outcome.retried.map_or("-".into(), |count| count.to_string()),
        lost.to_string(),
        outcome.hung.to_string(),
        corrupted.to_string(),
        outcome.crashed.to_string(),
        outcome.restarts.to_string(),
        stall_ms.to_string(),
        format!("{:.1}", bytes as f64 / 1e9),
        if outcome.wrong.is_empty() { "passed" } else { "FAILED" }.into(),
    ]
}

/// A table; then, by scenario, what is to be said beside it.
pub fn print(outcomes: &[Outcome]) {
    let rows: Vec<_> =
        [HEAD.map(str::to_owned)].into_iter().chain(outcomes.iter().map(row)).collect();
    let widths: Vec<usize> =
        (0..HEAD.len()).map(|at| rows.iter().map(|row| row[at].len()).max().unwrap_or(0)).collect();
    println!();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(at, (cell, &width))| match at {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        println!("{}", cells.collect::<Vec<_>>().join("  "));
    }
    for outcome in outcomes {
        details(outcome);
    }
}

fn details(outcome: &Outcome) {
    println!("\n{} (seed {})", outcome.scenario, outcome.seed);
    let Tally { canceled, unchecked, unquiet, kept, .. } = outcome.tally;
    for (count, what) in [
        (canceled, "cancelled"),
        (unchecked, "completed, and their target was killed before it could be looked at"),
        (unquiet, "whose memory was not quiet at the end"),
        (kept >> 20, "MiB given up for it, and counted apart"),
    ] {
        if count > 0 {
            println!("  {count} {what}");
        }
    }
    for (link, tally) in outcome.links.iter().filter(|_| outcome.links.len() > 1) {
        let Tally { tried, completed, failed, timed_out, stall_ms, .. } = tally;
        println!(
            "  {link}: {tried} tried, {completed} completed, {failed} failed, {timed_out} timed out, longest stall \
             {stall_ms} ms"
        );
    }
    let counters = outcome.counters.iter().filter(|(_, count)| **count > 0);
    let counters: Vec<_> = counters.map(|(name, count)| format!("{name} {count}")).collect();
    println!("  transports: {}", counters.join(", "));
    println!("  longest stall of the pair that lives: {} ms", outcome.watched.stall_ms);
    if let Some(living) = &outcome.living {
        println!(
            "  the pair that lives: {:.0} MB/s of busy time undisturbed; while others are killed {:.0}, in its worst second \
             {:.0} ({:.2} of the undisturbed)",
            living.undisturbed,
            living.median,
            living.least,
            living.ratio()
        );
    }
    for (name, growth) in &outcome.resources {
        let Growth { first, second, last, .. } = growth;
        let mib = |sample: &Sample| sample.own_kib as f64 / 1024.0;
        let all = last.rss_kib as f64 / 1024.0;
        println!(
            "  {name}: in the first, second and last quarter {:.1}, {:.1} and {:.1} MiB of its own \
             ({all:.1} resident), {}, {} and {} descriptors, {}, {} and {} threads",
            mib(first),
            mib(second),
            mib(last),
            first.fds,
            second.fds,
            last.fds,
            first.threads,
            second.threads,
            last.threads
        );
    }
    for note in &outcome.notes {
        println!("  - {note}");
    }
    for what in &outcome.wrong {
        println!("  FAILED: {what}");
    }
}
