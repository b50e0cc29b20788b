//! Runs one scenario: starts the processes, does to them what it says, and watches.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use fastrand::Rng;
use serde::Serialize;

use crate::lane::{BATCH, LaneSpec, MARGIN, SLOT};
use crate::node::{Beat, CLOSE, LEAVE, NodeSpec, Said};
use crate::resources::{Growth, Sample};
use crate::scenario::{Must, Scenario};
use crate::stage::{Devices, Heard, Process, Stage, clear_shared_memory};
use crate::tally::Tally;

/// Somebody wants to end: what is under way is ended, and reported.
pub static STOP: AtomicBool = AtomicBool::new(false);

/// Longest until a process serves, or transfers.
const START: Duration = Duration::from_secs(30);
/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How often there is a line to see that it goes on.
const PROGRESS: Duration = Duration::from_secs(5);
/// Part of the time before the first kill, in which the undisturbed throughput is measured.
const UNDISTURBED: f64 = 0.2;
/// The least that the pair that lives must get on in any second, of its median while nobody is killed. It
/// shares the processors with those that start; starved is another order.
const LEAST: f64 = 0.02;
/// A second in which there was less to do says nothing.
const BUSY_MS: u64 = 100;
/// Lanes of the pair that is watched.
const LANES: u64 = 2;
/// NICs of hosts whose processes are killed: each costs time when the next one starts.
const SHORT_LIVED_NICS: u8 = 1;
/// Of the lanes to or of those that are killed. They give up soon, to find the next one alive.
const SHORT_LIVED: LaneSpec = LaneSpec { remote: 0, slots: 64, batch: 40, timeout_ms: 1000 };
const SHORT_REGION: u64 = SHORT_LIVED.slots as u64 * SLOT;
/// Where an initiator that was killed had its memory at the target, the next ones do not.
const PLACES: u64 = 8;
/// Lines of a log that are shown.
const LAST_WORDS: usize = 15;

/// What came of a scenario.
#[derive(Serialize)]
pub struct Outcome {
    /// Its name.
    pub scenario: &'static str,
    /// The provider emulates writes.
    pub emulated: bool,
    /// Where its randomness came from.
    pub seed: u64,
    /// How long there were transfers.
    pub seconds: f64,
    /// Of all transfers.
    pub tally: Tally,
    /// Of those between the two processes that live through it.
    pub watched: Tally,
    /// By who transfers to whom.
    pub links: BTreeMap<String, Tally>,
    /// Operations tried once more; `None` if the transport does not count them.
    pub retried: Option<u64>,
    /// The transports' other counters, summed.
    pub counters: BTreeMap<String, u64>,
    /// Calls, and processes, that did not come back in time.
    pub hung: u64,
    /// Processes that ended without being told to.
    pub crashed: u64,
    /// Processes killed and started again.
    pub restarts: u64,
    /// Throughput of the pair that lives, in each second.
    pub living: Option<Living>,
    /// What those processes hold that live through it, by name.
    pub resources: BTreeMap<String, Growth>,
    /// The same in each second.
    pub samples: BTreeMap<String, Vec<Sample>>,
    /// What was noted.
    pub notes: Vec<String>,
    /// What is not as it must be; empty: passed.
    pub wrong: Vec<String>,
}

/// Throughput of a pair while others are killed: of the time with something under way, so that it tells of the
/// transport, and little of how busy the machine is otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Living {
    /// Median of the seconds before the first kill, MB/s.
    pub undisturbed: f64,
    /// Median of the seconds after it.
    pub median: f64,
    /// Least of the seconds after it.
    pub least: f64,
    /// All of those seconds.
    pub rates: Vec<f64>,
}

impl Living {
    /// The least, as a part of the undisturbed.
    pub fn ratio(&self) -> f64 {
        self.least / self.undisturbed
    }
}

/// One of the processes, in all its lives.
struct Node {
    spec: NodeSpec,
    host: u16,
    /// To be killed again and again, so long after it is ready, milliseconds.
    lives: Option<(u64, u64)>,
    life: u64,
    process: Option<Process>,
    since: Instant,
    heard: Instant,
    ready: bool,
    closing: bool,
    kill_at: Option<Instant>,
    beat: Beat,
    closing_ms: Option<u64>,
    /// Of former lives.
    past: Vec<Beat>,
    samples: Vec<Sample>,
}

impl Node {
    fn new(name: &str, host: u16, lives: Option<(u64, u64)>) -> Self {
        Self {
            spec: NodeSpec {
                name: name.into(),
                peers: Default::default(),
                seed: 0,
                serve: 0,
                lanes: Vec::new(),
                timeout_ms: 0,
                cancels: false,
                causes: Vec::new(),
            },
            host,
            lives,
            life: 0,
            process: None,
            since: Instant::now(),
            heard: Instant::now(),
            ready: false,
            closing: false,
            kill_at: None,
            beat: Beat::default(),
            closing_ms: None,
            past: Vec::new(),
            samples: Vec::new(),
        }
    }

    fn lane(&mut self, peer: &str, lane: LaneSpec) {
        self.spec.lanes.push((peer.into(), lane));
    }
}

/// How far a pair had got.
#[derive(Clone, Copy)]
struct Point {
    /// When, milliseconds of the node's time.
    at_ms: u64,
    busy_ms: u64,
    bytes: u64,
}

/// A scenario under way.
struct Show {
    scenario: &'static Scenario,
    seed: u64,
    rng: Rng,
    stage: Stage,
    nics: u8,
    emulated: bool,
    nodes: Vec<Node>,
    sender: Sender<Heard>,
    heard: Receiver<Heard>,
    hung: u64,
    crashed: u64,
    restarts: u64,
    /// Of the pair that is watched, again and again.
    curve: Vec<Point>,
    notes: Vec<String>,
}

/// When to end or look before the time is over.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Restarts after which a scenario ends.
    pub restarts: u64,
    /// Seconds without a completed byte of the pair that is watched, after which the stacks of its processes
    /// are noted, once.
    pub stacks: Option<u64>,
}

/// Runs a scenario for so many seconds.
pub fn run(
    scenario: &'static Scenario,
    devices: &Devices,
    seed: u64,
    seconds: u64,
    limits: &Limits,
) -> Result<Outcome> {
    let environment = vec![("SOFTEFA_DEAD_MS", scenario.dead_ms.to_string())];
    let stage = Stage::new(devices, scenario.name, environment)?;
    let (sender, heard) = channel();
    let mut show = Show {
        scenario,
        seed,
        rng: Rng::with_seed(seed),
        stage,
        nics: devices.nics,
        emulated: devices.emulates_writes(),
        nodes: cast(scenario, seed),
        sender,
        heard,
        hung: 0,
        crashed: 0,
        restarts: 0,
        curve: Vec::new(),
        notes: Vec::new(),
    };
    for number in 0..show.nodes.len() {
        show.start(number)?;
    }
    show.until("every process serves and moves something", |show| {
        show.nodes.iter().all(|node| {
            node.ready
                && (node.spec.lanes.is_empty()
                    || node.beat.links.values().any(|it| it.completed > 0))
        })
    })?;
    let script = scenario.script(seconds, devices.nics, devices.refusal().is_ok());
    if !script.is_empty() {
        show.stage.faults(seed, &script)?;
    }
    for process in show.nodes.iter_mut().filter_map(|node| node.process.as_mut()) {
        process.tell("begin");
    }
    let begin = Instant::now();
    let part = if scenario.kills.is_some() && !scenario.nics_down { UNDISTURBED } else { 0.0 };
    let quiet = Duration::from_secs_f64(seconds as f64 * part);
    let end = begin + Duration::from_secs(seconds);
    let curve_from = show.curve.len();
    let (mut first_kill, mut noted) = (None, false);
    let (mut next_line, mut next_sample) = (begin + PROGRESS, begin);
    while Instant::now() < end && !STOP.load(Ordering::Relaxed) && show.hung + show.crashed == 0 {
        show.listen(LOOK);
        let now = Instant::now();
        if now >= begin + quiet && scenario.kills.is_some() {
            first_kill.get_or_insert(show.curve.len());
            if show.restarts >= limits.restarts {
                break;
            }
            show.kill_and_start()?;
        }
        if now >= next_sample {
            next_sample += Duration::from_secs(1);
            show.sample();
            show.stage.forget_record();
            if show.restarts > 0 {
                clear_shared_memory();
            }
        }
        if limits.stacks.is_some_and(|seconds| show.stands_still(seconds)) && !noted {
            noted = true;
            show.note_stacks();
        }
        if now >= next_line {
            next_line += PROGRESS;
            show.progress(begin.elapsed().as_secs(), seconds);
        }
    }
    let took = begin.elapsed();
    let living = first_kill.and_then(|first| living(&show.curve[curve_from..], first - curve_from));
    show.finish();
    Ok(show.outcome(took, living))
}

/// Who takes part: `a` transfers to `b`, which are watched; where processes are killed, `a` also to `d`, and
/// `c` to `b`, and `c` and `d` are those that are killed.
fn cast(scenario: &Scenario, seed: u64) -> Vec<Node> {
    let region = u64::from(scenario.slots) * SLOT;
    let mut a = Node::new("a", 0, None);
    let mut b = Node::new("b", 1, None);
    for lane in 0..LANES {
        let remote = lane * region;
        a.lane("b", LaneSpec { remote, slots: scenario.slots, batch: BATCH, timeout_ms: 0 });
    }
    b.spec.serve = LANES * region;
    let mut nodes = Vec::new();
    if let Some(kills) = scenario.kills {
        let mut c = Node::new("c", 2, Some(kills.initiator));
        c.lane("b", LaneSpec { remote: LANES * region, ..SHORT_LIVED });
        b.spec.serve += PLACES * SHORT_REGION;
        let mut d = Node::new("d", 3, Some(kills.target));
        for lane in 0..LANES {
            a.lane("d", LaneSpec { remote: lane * SHORT_REGION, ..SHORT_LIVED });
        }
        d.spec.serve = LANES * SHORT_REGION;
        nodes.extend([c, d]);
    }
    nodes.extend([b, a]);
    for (number, node) in nodes.iter_mut().enumerate() {
        node.spec.seed = seed.wrapping_add(number as u64);
        node.spec.timeout_ms = scenario.timeout_ms;
        node.spec.cancels = scenario.cancels;
        node.spec.causes = scenario.causes.iter().map(|&words| words.to_owned()).collect();
    }
    nodes
}

/// Rates of whole seconds, MB/s, where there was anything to do.
fn rates(curve: &[Point]) -> Vec<f64> {
    let mut rates = Vec::new();
    let Some(mut from) = curve.first().copied() else { return rates };
    for &to in curve {
        let busy_ms = to.busy_ms - from.busy_ms;
        if to.at_ms >= from.at_ms + 1000 && busy_ms >= BUSY_MS {
            rates.push((to.bytes - from.bytes) as f64 / 1000.0 / busy_ms as f64);
            from = to;
        }
    }
    rates
}

fn living(curve: &[Point], first_kill: usize) -> Option<Living> {
    let (before, after) = curve.split_at(first_kill.min(curve.len()));
    let median = |rates: &[f64]| {
        let mut sorted = rates.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    };
    let (before, after) = (rates(before), rates(after));
    Some(Living {
        undisturbed: median(&before)?,
        median: median(&after)?,
        least: after.iter().copied().min_by(f64::total_cmp)?,
        rates: after,
    })
}

impl Show {
    fn start(&mut self, number: usize) -> Result<()> {
        let node = &mut self.nodes[number];
        let mut spec = node.spec.clone();
        spec.peers = self.stage.peers();
        spec.seed = spec.seed.wrapping_add(node.life << 16);
        if node.lives.is_some() {
            // Packets of the one before may still arrive.
            for (_, lane) in &mut spec.lanes {
                lane.remote += node.life % PLACES * SHORT_REGION;
            }
        }
        // What a former life said last must not be taken for this one's.
        let tag = number + (node.life as usize) * self.stage_size();
        let node = &mut self.nodes[number];
        let nics = if node.lives.is_some() { SHORT_LIVED_NICS } else { self.nics };
        node.process = Some(self.stage.start(tag, &spec, node.host, nics, &self.sender)?);
        (node.ready, node.kill_at) = (false, None);
        (node.since, node.heard) = (Instant::now(), Instant::now());
        if let Some((least, most)) = node.lives {
            // One of eight does not even get ready.
            if self.rng.u8(0..8) == 0 {
                let age = Duration::from_millis(self.rng.u64(0..least + most));
                node.kill_at = Some(Instant::now() + age);
            }
        }
        Ok(())
    }

    fn stage_size(&self) -> usize {
        self.nodes.len()
    }

    /// Takes in what nodes say, for so long at most if they say nothing.
    fn listen(&mut self, patience: Duration) {
        let mut next = self.heard.recv_timeout(patience).ok();
        while let Some((tag, said)) = next {
            let (number, life) = (tag % self.stage_size(), (tag / self.stage_size()) as u64);
            if self.nodes[number].life == life {
                self.hear(number, said);
            }
            next = self.heard.try_recv().ok();
        }
        for number in 0..self.nodes.len() {
            let node = &self.nodes[number];
            let (patience, what) = match (node.ready, node.closing) {
                (_, true) => (CLOSE + MARGIN, "has not closed its transport"),
                (true, _) => (MARGIN, "has said nothing"),
                (false, _) => (START, "is not ready"),
            };
            if node.process.is_some() && node.heard.elapsed() > patience {
                self.give_up(number, &format!("{what} for {patience:?}"));
            }
        }
    }

    fn hear(&mut self, number: usize, said: Option<Said>) {
        let node = &mut self.nodes[number];
        node.heard = Instant::now();
        match said {
            Some(Said::Ready) => {
                node.ready = true;
                if let Some((least, most)) = node.lives {
                    let age = Duration::from_millis(self.rng.u64(least..=most));
                    node.kill_at.get_or_insert(Instant::now() + age);
                }
            }
            Some(Said::Beat(beat)) => {
                if node.spec.name == "a" {
                    let Tally { busy_ms, bytes, .. } =
                        beat.links.get("b").copied().unwrap_or_default();
                    self.curve.push(Point { at_ms: beat.at_ms, busy_ms, bytes });
                }
                let hung = beat.hung.first().cloned();
                node.beat = beat;
                if let Some(what) = hung {
                    self.give_up(number, &what);
                }
            }
            Some(Said::Note { kind, text }) => {
                let name = &node.spec.name;
                self.notes.push(format!("{kind}: {name}, {text}"));
            }
            Some(Said::Closing) => node.closing = true,
            Some(Said::Done { closing_ms }) => node.closing_ms = Some(closing_ms),
            None => {
                let Some(mut process) = node.process.take() else { return };
                let status = process.status();
                if node.closing_ms.is_none() || !matches!(&status, Ok(status) if status.success()) {
                    self.crashed += 1;
                    let status = status.map_or_else(|error| error.to_string(), |it| it.to_string());
                    let (name, words) = (&node.spec.name, process.last_words(LAST_WORDS));
                    self.notes.push(format!("crashed: {name}, {status}; its log ends\n{words}"));
                }
            }
        }
    }

    /// A process that does not get on: says where it is, and ends it.
    fn give_up(&mut self, number: usize, what: &str) {
        let node = &mut self.nodes[number];
        let Some(mut process) = node.process.take() else { return };
        self.hung += 1;
        let (name, pid) = (&node.spec.name, process.pid());
        let (threads, words) = (process.threads(), process.last_words(LAST_WORDS));
        self.notes.push(format!(
            "hung: {name} (process {pid}): {what}; its threads: {threads}; its log ends\n{words}"
        ));
        process.kill();
    }

    /// Whether the pair that is watched has moved nothing for so long.
    fn stands_still(&self, seconds: u64) -> bool {
        let Some(last) = self.curve.last() else { return false };
        let moved = self.curve.iter().rev().find(|before| before.bytes != last.bytes);
        moved.is_some_and(|moved| last.busy_ms > moved.busy_ms + seconds * 1000)
    }

    fn note_stacks(&mut self) {
        for node in self.nodes.iter().filter(|node| node.lives.is_none()) {
            if let Some(process) = &node.process {
                let (name, threads) = (&node.spec.name, process.threads());
                self.notes.push(format!("stands still: {name}, its threads: {threads}"));
            }
        }
    }

    fn until(&mut self, what: &str, reached: impl Fn(&Self) -> bool) -> Result<()> {
        let limit = Instant::now() + START;
        while !reached(self) {
            if STOP.load(Ordering::Relaxed) {
                bail!("stopped");
            }
            if Instant::now() >= limit || self.hung + self.crashed > 0 {
                bail!("not reached: {what}\n{}", self.notes.join("\n"));
            }
            self.listen(LOOK);
        }
        Ok(())
    }

    fn kill_and_start(&mut self) -> Result<()> {
        for number in 0..self.nodes.len() {
            let node = &mut self.nodes[number];
            if node.lives.is_some() && node.kill_at.is_some_and(|at| at <= Instant::now()) {
                if let Some(mut process) = node.process.take() {
                    process.kill();
                }
                node.past.push(std::mem::take(&mut node.beat));
                node.life += 1;
                self.restarts += 1;
                self.start(number)?;
            }
        }
        Ok(())
    }

    fn sample(&mut self) {
        let devices = self.stage.efa();
        for node in self.nodes.iter_mut().filter(|node| node.lives.is_none()) {
            let kept = node.beat.links.values().map(|tally| tally.kept).sum();
            let pid = node.process.as_ref().map(Process::pid);
            node.samples.extend(pid.and_then(|pid| Sample::of(pid, &devices, kept)));
        }
    }

    fn watched(&self) -> Tally {
        let a = self.nodes.iter().find(|node| node.spec.name == "a");
        a.and_then(|a| a.beat.links.get("b")).copied().unwrap_or_default()
    }

    fn links(&self) -> BTreeMap<String, Tally> {
        let mut links = BTreeMap::<String, Tally>::new();
        for node in &self.nodes {
            for (peer, tally) in node.past.iter().chain([&node.beat]).flat_map(|beat| &beat.links) {
                links.entry(format!("{} to {peer}", node.spec.name)).or_default().add(tally);
            }
        }
        links
    }

    fn tally(&self) -> Tally {
        let mut all = Tally::default();
        self.links().values().for_each(|tally| all.add(tally));
        all
    }

    fn progress(&self, second: u64, of: u64) {
        let Tally {
            tried, completed, failed, unexplained, timed_out, lost, corrupted, bytes, ..
        } = self.tally();
        let name = self.scenario.name;
        let restarts = match self.restarts {
            0 => String::new(),
            count => format!(", {count} restarts"),
        };
        eprintln!(
            "{name:<9} {second:>4} of {of} s: {tried} tried, {completed} completed, {} failed, {timed_out} timed \
             out, {lost} lost, {corrupted} corrupted, {:.1} GB{restarts}",
            failed + unexplained,
            bytes as f64 / 1e9
        );
    }

    /// Initiators end first, as what they have under way needs the others.
    fn finish(&mut self) {
        for initiators in [true, false] {
            let these: Vec<usize> = (0..self.nodes.len())
                .filter(|&number| self.nodes[number].spec.lanes.is_empty() != initiators)
                .collect();
            for &number in &these {
                if let Some(process) = &mut self.nodes[number].process {
                    process.tell("end");
                }
            }
            let limit = Instant::now() + LEAVE;
            while these.iter().any(|&number| self.nodes[number].process.is_some()) {
                self.listen(LOOK);
                if Instant::now() >= limit {
                    for &number in &these {
                        self.give_up(number, &format!("does not end in {LEAVE:?}"));
                    }
                }
            }
        }
    }

    fn outcome(mut self, took: Duration, living: Option<Living>) -> Outcome {
        let beats = self.nodes.iter().flat_map(|node| node.past.iter().chain([&node.beat]));
        let mut counters = BTreeMap::<String, u64>::new();
        for rail in beats.flat_map(|beat| &beat.rails) {
            let fields = rail.as_object().into_iter().flatten();
            for (name, value) in fields.filter_map(|(name, value)| Some((name, value.as_u64()?))) {
                *counters.entry(name.clone()).or_default() += value;
            }
        }
        let resources = self
            .nodes
            .iter()
            .filter_map(|node| Some((node.spec.name.clone(), Growth::of(&node.samples)?)));
        let mut outcome = Outcome {
            scenario: self.scenario.name,
            emulated: self.emulated,
            seed: self.seed,
            seconds: took.as_secs_f64(),
            tally: self.tally(),
            watched: self.watched(),
            links: self.links(),
            retried: counters.get("retried").copied(),
            hung: self.hung,
            crashed: self.crashed,
            restarts: self.restarts,
            living,
            resources: resources.collect(),
            samples: self
                .nodes
                .iter()
                .map(|node| (node.spec.name.clone(), node.samples.clone()))
                .collect(),
            notes: std::mem::take(&mut self.notes),
            counters,
            wrong: Vec::new(),
        };
        outcome.wrong = judge(self.scenario, &outcome);
        outcome
    }
}

/// What is not as it must be.
fn judge(scenario: &Scenario, outcome: &Outcome) -> Vec<String> {
    let Tally { completed, unexplained, lost, corrupted, .. } = outcome.tally;
    let mut wrong = Vec::new();
    let mut must = |is: bool, what: String| {
        if !is {
            wrong.push(what);
        }
    };
    must(completed > 0, "nothing was completed".into());
    must(lost == 0, format!("{lost} transfers were lost"));
    must(outcome.hung == 0, format!("{} calls or processes hung", outcome.hung));
    must(outcome.crashed == 0, format!("{} processes crashed", outcome.crashed));
    must(unexplained == 0, format!("{unexplained} failures are not explained by what was done"));
    let expected = scenario.must(outcome.emulated);
    match expected {
        Must::FindCorruption => must(corrupted > 0, "flipped bytes were not found".into()),
        _ => must(corrupted == 0, format!("{corrupted} ranges were corrupted")),
    }
    if expected != Must::Explain {
        let not = outcome.watched.failed + outcome.watched.timed_out;
        must(not == 0, format!("{not} transfers did not complete, and should have"));
    }
    let strays = outcome.counters.get("strays").copied().unwrap_or(0);
    // Of an operation that the target makes for an emulated write, or for a peer that is gone.
    let may_be = outcome.emulated || scenario.kills.is_some();
    must(may_be || strays == 0, format!("{strays} completions belong to no operation"));
    if let Some(living) = &outcome.living {
        let ratio = living.ratio();
        must(
            ratio >= LEAST,
            format!("the pair that lives was starved: {ratio:.3} of its throughput"),
        );
    }
    if scenario.flat {
        for (name, growth) in outcome.resources.iter().filter(|(_, growth)| !growth.is_flat()) {
            must(false, format!("{name} has grown: {:?} to {:?}", growth.second, growth.last));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::SCENARIOS;

    fn named(name: &str) -> &'static Scenario {
        SCENARIOS.iter().find(|scenario| scenario.name == name).expect("there is one")
    }

    fn outcome(scenario: &Scenario) -> Outcome {
        let tally = Tally { tried: 10, completed: 10, ..Tally::default() };
        Outcome {
            scenario: scenario.name,
            emulated: false,
            seed: 0,
            seconds: 1.0,
            tally,
            watched: tally,
            links: BTreeMap::new(),
            retried: None,
            counters: BTreeMap::new(),
            hung: 0,
            crashed: 0,
            restarts: 0,
            living: None,
            resources: BTreeMap::new(),
            samples: BTreeMap::new(),
            notes: Vec::new(),
            wrong: Vec::new(),
        }
    }

    #[test]
    fn what_must_be_none_must_be_none() {
        let errors = named("errors");
        assert_eq!(judge(errors, &outcome(errors)), Vec::<String>::new());
        let bad: [fn(&mut Outcome); 9] = [
            |it| it.tally.completed = 0,
            |it| it.tally.lost = 1,
            |it| it.tally.corrupted = 1,
            |it| it.tally.unexplained = 1,
            |it| it.hung = 1,
            |it| it.crashed = 1,
            |it| it.watched.failed = 1,
            |it| {
                it.counters.insert("strays".into(), 1);
            },
            |it| it.watched.timed_out = 1,
        ];
        for (at, make_bad) in bad.into_iter().enumerate() {
            let mut outcome = outcome(errors);
            make_bad(&mut outcome);
            assert_eq!(judge(errors, &outcome).len(), 1, "{at}");
        }
    }

    #[test]
    fn the_checker_must_find_something() {
        let checker = named("checker");
        let mut outcome = outcome(checker);
        assert_eq!(judge(checker, &outcome).len(), 1);
        outcome.tally.corrupted = 1;
        assert_eq!(judge(checker, &outcome), Vec::<String>::new());
    }

    #[test]
    fn one_second_without_a_byte_is_starvation() {
        let curve: Vec<Point> = (0..20)
            .map(|second| Point {
                at_ms: second * 1000,
                busy_ms: second * 1000,
                bytes: 100_000_000 * if second < 12 { second } else { second - 1 },
            })
            .collect();
        let living = living(&curve, 5).expect("both parts have seconds");
        assert_eq!((living.undisturbed, living.median, living.least), (100.0, 100.0, 0.0));
        let restarts = named("restarts");
        let mut outcome = outcome(restarts);
        outcome.living = Some(living);
        assert_eq!(judge(restarts, &outcome).len(), 1);
    }
}
