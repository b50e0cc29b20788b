//! The language of faults: what goes wrong in the emulated cluster, where and when.
//!
//! A script has one rule a line; `#` begins a comment. The arguments of `softefa ctl` are a rule of
//! the same language.
//!
//! ```text
//! seed 7
//! error status=unresp host=0 rate=0.5%   # ends with that EFA status and is not executed
//! delay by=200us nic=0-3 op=write        # the completion comes that much later
//! down host=1 nic=2 from=2s until=5s     # the port is down
//! ```
//!
//! | fault | what happens |
//! | --- | --- |
//! | `error status=N` | the operation ends with EFA status N (1 to 255, or a name) and is not executed |
//! | `lose` | it is executed, and its completion never delivered |
//! | `delay by=D` | its completion comes late by D; of several rules the longest counts |
//! | `hold by=D` | it is executed late by D; of several rules the longest counts |
//! | `reorder` | it is executed later than those posted after it |
//! | `full` | the post is refused as if the queue were full |
//! | `rnr` | the receiver is not ready for it |
//! | `corrupt` | one byte of the payload is flipped where it arrives |
//! | `kill` | SIGKILL to the process that owns the destination, before the operation |
//! | `down` | the NIC's port is down |
//! | `silent` | the NIC neither answers nor sends |
//! | `link gbps=N latency=D` | how fast the NIC is; one of the two is enough, and the last rule counts |
//!
//! Where: `host`, `nic` and `qp` are those of the initiator (of the NIC itself for `down`, `silent`
//! and `link`), `peer` is the host of the destination; all are lists as in `nic=0-3,5`. `op` is a
//! list of `send`, `read`, `write` and `recv`; a rule without it means the first three. Receives are
//! counted apart.
//!
//! When: `rate` (0.005 or 0.5%), `at` (a list of operations of a queue pair, the first is 1),
//! `every`, `after` (only operations later than that), `count` (at most so often a queue pair),
//! `from` and `until` (durations since the rule was set). All that are given must hold; without
//! any it is every operation. `full` counts attempts to post instead of operations.
//!
//! Durations are whole numbers with `ns`, `us`, `ms` or `s`.
//!
//! Whether a rule with a rate fires depends on nothing but the seed, the rule's position in the
//! script, the queue pair and the operation's number.

use std::fmt;
use std::str::FromStr;

/// Why a text is not a rule or a script.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}`{word}`: {problem}", line.map(|line| format!("line {line}: ")).unwrap_or_default())]
pub struct ParseError {
    /// The line of the script, from 1; none for a single rule.
    pub line: Option<usize>,
    /// The word that is wrong.
    pub word: String,
    /// What is wrong with it, and what is allowed.
    pub problem: String,
}

fn wrong<T>(word: &str, problem: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError { line: None, word: word.into(), problem: problem.into() })
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Ends with this EFA status, not executed.
    Error {
        /// 1 to 255.
        status: u8,
    },
    /// Executed, completion never delivered.
    Lose,
    /// Completion late.
    Delay {
        /// By so many nanoseconds.
        ns: u64,
    },
    /// Executed late.
    Hold {
        /// By so many nanoseconds.
        ns: u64,
    },
    /// Executed later than those posted after it.
    Reorder,
    /// The post is refused as if the queue were full.
    Full,
    /// Receiver not ready.
    Rnr,
    /// One byte of the payload flipped at the receiver.
    Corrupt,
    /// SIGKILL to the process that owns the destination, before the operation.
    Kill,
    /// The port is down.
    Down,
    /// The NIC neither answers nor sends.
    Silent,
    /// How fast the NIC is.
    Link {
        /// Gbit/s.
        gbps: Option<f64>,
        /// Nanoseconds of a round trip.
        latency_ns: Option<u64>,
    },
}

const FAULTS: [&str; 12] = [
    "error", "lose", "delay", "hold", "reorder", "full", "rnr", "corrupt", "kill", "down",
    "silent", "link",
];

impl Fault {
    /// A state of a NIC, rather than something that happens to an operation.
    fn is_state(self) -> bool {
        matches!(self, Fault::Down | Fault::Silent | Fault::Link { .. })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Fault::Error { status } => write!(f, "error status={status}"),
            Fault::Lose => f.write_str("lose"),
            Fault::Delay { ns } => write!(f, "delay by={}", Duration(*ns)),
            Fault::Hold { ns } => write!(f, "hold by={}", Duration(*ns)),
            Fault::Reorder => f.write_str("reorder"),
            Fault::Full => f.write_str("full"),
            Fault::Rnr => f.write_str("rnr"),
            Fault::Corrupt => f.write_str("corrupt"),
            Fault::Kill => f.write_str("kill"),
            Fault::Down => f.write_str("down"),
            Fault::Silent => f.write_str("silent"),
            Fault::Link { gbps, latency_ns } => {
                f.write_str("link")?;
                if let Some(gbps) = gbps {
                    write!(f, " gbps={gbps}")?;
                }
                if let Some(ns) = latency_ns {
                    write!(f, " latency={}", Duration(*ns))?;
                }
                Ok(())
            }
        }
    }
}

/// EFA statuses that have a name here.
const STATUSES: [(&str, u8); 10] = [
    ("flushed", 1),
    ("lkey", 5),
    ("bad-length", 6),
    ("bad-addr", 7),
    ("abort", 8),
    ("bad-qpn", 9),
    ("rnr", 10),
    ("remote-bad-length", 11),
    ("unresp", 13),
    ("unreach", 15),
];

/// What a queue pair is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// A message.
    Send,
    /// RDMA read.
    Read,
    /// RDMA write.
    Write,
    /// A receive; counted apart from the others, and meant only by rules that name it.
    Recv,
}

const OPS: [(&str, Op); 4] =
    [("send", Op::Send), ("read", Op::Read), ("write", Op::Write), ("recv", Op::Recv)];

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(OPS[*self as usize].0)
    }
}

/// Numbers of hosts, NICs or queue pairs: ascending ranges that neither overlap nor touch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Numbers(Vec<(u16, u16)>);

impl Numbers {
    fn all() -> Numbers {
        Numbers(vec![(0, u16::MAX)])
    }

    fn new(mut ranges: Vec<(u16, u16)>) -> Numbers {
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => {
                    before.1 = before.1.max(last)
                }
                _ => merged.push((first, last)),
            }
        }
        Numbers(merged)
    }

    fn contains(&self, number: u16) -> bool {
        self.0.iter().any(|&(first, last)| (first..=last).contains(&number))
    }

    fn intersection(&self, other: &Numbers) -> Numbers {
        let pairs = self.0.iter().flat_map(|a| other.0.iter().map(move |b| (a, b)));
        let both = pairs.map(|(a, b)| (a.0.max(b.0), a.1.min(b.1)));
        Numbers::new(both.filter(|(first, last)| first <= last).collect())
    }

    fn without(&self, other: &Numbers) -> Numbers {
        let mut gaps = Vec::new();
        let mut next = Some(0);
        for &(first, last) in &other.0 {
            if let Some(start) = next.filter(|&start| start < first) {
                gaps.push((start, first - 1));
            }
            next = last.checked_add(1);
        }
        gaps.extend(next.map(|start| (start, u16::MAX)));
        self.intersection(&Numbers(gaps))
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        join(f, &self.0, |f, (first, last)| {
            if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
        })
    }
}

fn join<T>(
    f: &mut fmt::Formatter,
    items: &[T],
    each: impl Fn(&mut fmt::Formatter, &T) -> fmt::Result,
) -> fmt::Result {
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            f.write_str(",")?;
        }
        each(f, item)?;
    }
    Ok(())
}

/// Nanoseconds, shown in the largest unit that needs no fraction.
struct Duration(u64);

const UNITS: [(&str, u64); 4] = [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let fits = |unit: &&(&str, u64)| self.0 % unit.1 == 0;
        let (name, ns) = UNITS.iter().rev().find(fits).expect("1 divides everything");
        write!(f, "{}{name}", self.0 / ns)
    }
}

// ------------------------------------------------------------------- values of attributes

fn number(text: &str, least: u64) -> Result<u64, String> {
    let allowed = || format!("must be a whole number from {least} to {}", u64::MAX);
    text.parse().ok().filter(|n| *n >= least).ok_or_else(allowed)
}

fn from_zero(text: &str) -> Result<u64, String> {
    number(text, 0)
}

fn from_one(text: &str) -> Result<u64, String> {
    number(text, 1)
}

fn decimal(text: &str, least: f64, most: f64) -> Option<f64> {
    text.parse().ok().filter(|n| (least..=most).contains(n))
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = match text.strip_suffix('%') {
        Some(percent) => decimal(percent, 0.0, 100.0).map(|percent| percent / 100.0),
        None => decimal(text, 0.0, 1.0),
    };
    rate.ok_or("must be from 0 to 1, or from 0% to 100%".into())
}

fn gbps(text: &str) -> Result<f64, String> {
    decimal(text, 0.001, 100_000.0).ok_or("must be a number from 0.001 to 100000".into())
}

fn duration(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = UNITS.iter().find(|unit| unit.0 == &text[digits.len()..]);
    let ns = digits.parse().ok().zip(unit).and_then(|(n, unit): (u64, _)| n.checked_mul(unit.1));
    ns.ok_or("must be a whole number with ns, us, ms or s, as in 200us".into())
}

fn status(text: &str) -> Result<u8, String> {
    let named = STATUSES.iter().find(|(name, _)| *name == text).map(|(_, status)| *status);
    named.or_else(|| text.parse().ok().filter(|status| *status > 0)).ok_or_else(|| {
        let names: Vec<_> = STATUSES.iter().map(|(name, n)| format!("{name} ({n})")).collect();
        format!("must be from 1 to 255, or one of {}", names.join(", "))
    })
}

fn numbers(text: &str) -> Result<Numbers, String> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = (first.parse().ok()?, last.parse().ok()?);
        (range.0 <= range.1).then_some(range)
    };
    let ranges: Option<_> = text.split(',').map(range).collect();
    ranges.map(Numbers::new).ok_or("must be numbers from 0 to 65535, as in 0-3,5".into())
}

fn ops(text: &str) -> Result<Vec<Op>, String> {
    let op = |part| OPS.iter().find(|(name, _)| *name == part).map(|(_, op)| *op);
    let ops: Option<Vec<_>> = text.split(',').map(op).collect();
    ops.map(ascending).ok_or("must be a list of send, read, write, recv".into())
}

fn positions(text: &str) -> Result<Vec<u64>, String> {
    text.split(',').map(from_one).collect::<Result<_, _>>().map(ascending)
}

fn ascending<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort_unstable();
    items.dedup();
    items
}

// ------------------------------------------------------------------- rules

const STATE_ATTRIBUTES: [&str; 4] = ["host", "nic", "from", "until"];
const OPERATION_ATTRIBUTES: [&str; 12] =
    ["host", "nic", "qp", "peer", "op", "rate", "at", "every", "after", "count", "from", "until"];

/// The words `attribute=value` after a rule's first.
struct Attributes<'t> {
    of: &'t str,
    words: Vec<(&'t str, &'t str, &'t str)>,
}

impl<'t> Attributes<'t> {
    fn new(
        of: &'t str,
        words: impl Iterator<Item = &'t str>,
        allowed: &[&str],
    ) -> Result<Attributes<'t>, ParseError> {
        let mut attributes = Attributes { of, words: Vec::new() };
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            // `set` is for stored rules, nothing to advise people to write.
            if value.is_empty() || !(allowed.contains(&name) || name == "set") {
                return wrong(
                    word,
                    format!("`{of}` takes {}, each as NAME=VALUE", allowed.join(", ")),
                );
            }
            if attributes.words.iter().any(|(before, ..)| *before == name) {
                return wrong(word, format!("`{name}` is given twice"));
            }
            attributes.words.push((name, value, word));
        }
        Ok(attributes)
    }

    fn get<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ParseError> {
        match self.words.iter().find(|(this, ..)| *this == name) {
            Some((_, value, word)) => {
                parse(value).map(Some).or_else(|problem| wrong(word, problem))
            }
            None => Ok(None),
        }
    }

    fn need<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, ParseError> {
        let missing = || {
            wrong(
                self.of,
                format!("needs `{name}=`, which {}", parse("").err().unwrap_or_default()),
            )
        };
        self.get(name, &parse)?.map_or_else(missing, Ok)
    }
}

/// A fault, where and when.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    fault: Fault,
    hosts: Option<Numbers>,
    nics: Option<Numbers>,
    qps: Option<Numbers>,
    peers: Option<Numbers>,
    ops: Option<Vec<Op>>,
    rate: Option<f64>,
    at: Option<Vec<u64>>,
    every: Option<u64>,
    after: Option<u64>,
    count: Option<u64>,
    from_ns: Option<u64>,
    until_ns: Option<u64>,
    set_ns: Option<u64>,
}

impl Rule {
    /// What it does.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// When it was set, in nanoseconds of CLOCK_MONOTONIC.
    pub fn set(&self) -> Option<u64> {
        self.set_ns
    }

    /// The rule as set at that time, in nanoseconds of CLOCK_MONOTONIC: `from` and `until` count
    /// from then. They count from 0 in a rule that was never set.
    pub fn with_set(self, ns: u64) -> Rule {
        Rule { set_ns: Some(ns), ..self }
    }

    /// The rule as it was written.
    pub fn without_set(self) -> Rule {
        Rule { set_ns: None, ..self }
    }

    fn is_about_nic(&self, host: u16, nic: u16) -> bool {
        allows(&self.hosts, host) && allows(&self.nics, nic)
    }

    fn since_set(&self, ns: u64) -> u64 {
        self.set_ns.unwrap_or(0).saturating_add(ns)
    }

    fn holds_at(&self, now_ns: u64) -> bool {
        self.from_ns.is_none_or(|from| now_ns >= self.since_set(from))
            && self.until_ns.is_none_or(|until| now_ns < self.since_set(until))
    }

    fn is_about(&self, operation: &Operation) -> bool {
        let number = operation.number;
        let op = match &self.ops {
            Some(ops) => ops.contains(&operation.op),
            None => operation.op != Op::Recv,
        };
        op && allows(&self.peers, operation.peer)
            && self.every.is_none_or(|every| number % every == 0)
            && self.after.is_none_or(|after| number > after)
    }
}

fn allows(numbers: &Option<Numbers>, number: u16) -> bool {
    numbers.as_ref().is_none_or(|numbers| numbers.contains(number))
}

fn code(line: &str) -> &str {
    line.split('#').next().unwrap_or_default()
}

impl FromStr for Rule {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Rule, ParseError> {
        let mut words = code(text).split_whitespace();
        let name = words.next().unwrap_or_default();
        let (own, common): (&[&str], &[&str]) = match name {
            "down" | "silent" => (&[], &STATE_ATTRIBUTES),
            "link" => (&["gbps", "latency"], &STATE_ATTRIBUTES),
            "error" => (&["status"], &OPERATION_ATTRIBUTES),
            "delay" | "hold" => (&["by"], &OPERATION_ATTRIBUTES),
            _ => (&[], &OPERATION_ATTRIBUTES),
        };
        if !FAULTS.contains(&name) {
            return wrong(name, format!("not a fault; these are {}", FAULTS.join(", ")));
        }
        // A full queue refuses before anyone looks where the operation goes.
        let common = common.iter().filter(|attribute| (name, **attribute) != ("full", "peer"));
        let allowed: Vec<_> = own.iter().chain(common).copied().collect();
        let attributes = Attributes::new(name, words, &allowed)?;
        let fault = match name {
            "error" => Fault::Error { status: attributes.need("status", status)? },
            "delay" => Fault::Delay { ns: attributes.need("by", duration)? },
            "hold" => Fault::Hold { ns: attributes.need("by", duration)? },
            "link" => {
                let gbps = attributes.get("gbps", gbps)?;
                let latency_ns = attributes.get("latency", duration)?;
                if gbps.is_none() && latency_ns.is_none() {
                    return wrong(name, "needs `gbps=` or `latency=`, as in gbps=100 latency=20us");
                }
                Fault::Link { gbps, latency_ns }
            }
            "lose" => Fault::Lose,
            "reorder" => Fault::Reorder,
            "full" => Fault::Full,
            "rnr" => Fault::Rnr,
            "corrupt" => Fault::Corrupt,
            "kill" => Fault::Kill,
            "down" => Fault::Down,
            "silent" => Fault::Silent,
            _ => unreachable!("one of FAULTS"),
        };
        let rule = Rule {
            fault,
            hosts: attributes.get("host", numbers)?,
            nics: attributes.get("nic", numbers)?,
            qps: attributes.get("qp", numbers)?,
            peers: attributes.get("peer", numbers)?,
            ops: attributes.get("op", ops)?,
            rate: attributes.get("rate", rate)?,
            at: attributes.get("at", positions)?,
            every: attributes.get("every", from_one)?,
            after: attributes.get("after", from_zero)?,
            count: attributes.get("count", from_one)?,
            from_ns: attributes.get("from", duration)?,
            until_ns: attributes.get("until", duration)?,
            set_ns: attributes.get("set", from_zero)?,
        };
        if let Some(until) = rule.until_ns.filter(|until| *until <= rule.from_ns.unwrap_or(0)) {
            let word = format!("until={}", Duration(until));
            return wrong(&word, "must be later than `from`, which is 0s if not given");
        }
        Ok(rule)
    }
}

/// The canonical form; parsing it gives the same rule.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fn word<T: fmt::Display>(
            f: &mut fmt::Formatter,
            name: &str,
            value: Option<T>,
        ) -> fmt::Result {
            value.map_or(Ok(()), |value| write!(f, " {name}={value}"))
        }
        write!(f, "{}", self.fault)?;
        word(f, "host", self.hosts.as_ref())?;
        word(f, "nic", self.nics.as_ref())?;
        word(f, "qp", self.qps.as_ref())?;
        word(f, "peer", self.peers.as_ref())?;
        if let Some(ops) = &self.ops {
            f.write_str(" op=")?;
            join(f, ops, |f, op| write!(f, "{op}"))?;
        }
        word(f, "rate", self.rate)?;
        if let Some(at) = &self.at {
            f.write_str(" at=")?;
            join(f, at, |f, number| write!(f, "{number}"))?;
        }
        word(f, "every", self.every)?;
        word(f, "after", self.after)?;
        word(f, "count", self.count)?;
        word(f, "from", self.from_ns.map(Duration))?;
        word(f, "until", self.until_ns.map(Duration))?;
        word(f, "set", self.set_ns)
    }
}

// ------------------------------------------------------------------- scripts

/// Rules, in order. The text of one is canonical: parsing it gives the same script.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Script {
    /// What rules with a rate draw from.
    pub seed: u64,
    /// The rules.
    pub rules: Vec<Rule>,
}

impl Script {
    /// Reads a script.
    ///
    /// # Errors
    /// The first line that is wrong, with the word and what is allowed.
    pub fn parse(text: &str) -> Result<Script, ParseError> {
        let mut script = Script::default();
        let mut seeded = false;
        for (i, line) in text.lines().enumerate() {
            let at_line = |error| ParseError { line: Some(i + 1), ..error };
            let mut words = code(line).split_whitespace();
            match words.next() {
                None => {}
                Some("seed") if seeded => {
                    return wrong("seed", "is given twice").map_err(at_line);
                }
                Some("seed") => {
                    script.seed = seed(words).map_err(at_line)?;
                    seeded = true;
                }
                Some(_) => script.rules.push(line.parse().map_err(at_line)?),
            }
        }
        Ok(script)
    }

    /// Does what the arguments of `softefa ctl` say: appends a rule, set at `now_ns`, or changes
    /// the seed.
    ///
    /// # Errors
    /// It is neither.
    pub fn add(&mut self, text: &str, now_ns: u64) -> Result<(), ParseError> {
        let mut words = code(text).split_whitespace();
        if words.next() == Some("seed") {
            self.seed = seed(words)?;
        } else {
            self.rules.push(text.parse::<Rule>()?.with_set(now_ns));
        }
        Ok(())
    }

    /// Ends `down` for the NICs that `host=` and `nic=` name (all, without them). A rule that is
    /// about others too goes on for those.
    ///
    /// # Errors
    /// The text has another word.
    pub fn up(&mut self, text: &str) -> Result<(), ParseError> {
        let attributes = Attributes::new("up", code(text).split_whitespace(), &["host", "nic"])?;
        let hosts = attributes.get("host", numbers)?.unwrap_or_else(Numbers::all);
        let nics = attributes.get("nic", numbers)?.unwrap_or_else(Numbers::all);
        let before = std::mem::take(&mut self.rules);
        for rule in before {
            let here = (
                rule.hosts.clone().unwrap_or_else(Numbers::all),
                rule.nics.clone().unwrap_or_else(Numbers::all),
            );
            let both = (here.0.intersection(&hosts), here.1.intersection(&nics));
            if rule.fault != Fault::Down || both.0.0.is_empty() || both.1.0.is_empty() {
                self.rules.push(rule);
                continue;
            }
            let other_hosts = here.0.without(&hosts);
            if !other_hosts.0.is_empty() {
                self.rules.push(Rule { hosts: Some(other_hosts), ..rule.clone() });
            }
            let other_nics = here.1.without(&nics);
            if !other_nics.0.is_empty() {
                let hosts = rule.hosts.is_some() || hosts != Numbers::all();
                self.rules.push(Rule {
                    hosts: hosts.then_some(both.0),
                    nics: Some(other_nics),
                    ..rule
                });
            }
        }
        Ok(())
    }

    /// The rules about the operations of one queue pair, made ready for [`ForQueue::judge`].
    pub fn for_queue(&self, place: Place) -> ForQueue {
        let mut queue = ForQueue { place, ..ForQueue::default() };
        for (index, rule) in self.rules.iter().enumerate() {
            let is_here = rule.is_about_nic(place.host, place.nic) && allows(&rule.qps, place.qp);
            if rule.fault.is_state() || !is_here {
                continue;
            }
            let watch = match rule.fault {
                Fault::Full => &mut queue.attempts,
                _ => &mut queue.operations,
            };
            let compiled = watch.rules.len();
            match &rule.at {
                Some(at) => watch.exact.extend(at.iter().map(|number| (*number, compiled))),
                None => watch.usual.push(compiled),
            }
            let lot = [self.seed, index as u64, place.packed()].into_iter().fold(0, mix);
            watch.rules.push(Compiled { rule: rule.clone(), index, lot, fired: 0 });
        }
        queue.operations.exact.sort_unstable();
        queue.attempts.exact.sort_unstable();
        queue
    }

    /// How a NIC is at that time (nanoseconds of CLOCK_MONOTONIC).
    pub fn link_state(&self, host: u16, nic: u16, now_ns: u64) -> NicState {
        let mut state = NicState::default();
        let here = |rule: &&Rule| {
            rule.fault.is_state() && rule.is_about_nic(host, nic) && rule.holds_at(now_ns)
        };
        for rule in self.rules.iter().filter(here) {
            match rule.fault {
                Fault::Down => state.down = true,
                Fault::Silent => state.silent = true,
                Fault::Link { gbps, latency_ns } => {
                    let bytes = gbps.map(|gbps| (gbps * 125_000_000.0) as u64);
                    state.bytes_per_second = bytes.or(state.bytes_per_second);
                    state.latency_ns = latency_ns.unwrap_or(state.latency_ns);
                }
                _ => {}
            }
        }
        state
    }

    /// When, after `now_ns`, [`Script::link_state`] may next say something else.
    pub fn next_change(&self, now_ns: u64) -> Option<u64> {
        let states = self.rules.iter().filter(|rule| rule.fault.is_state());
        states
            .flat_map(|rule| [rule.from_ns, rule.until_ns].map(|at| Some(rule.since_set(at?))))
            .flatten()
            .filter(|at| *at > now_ns)
            .min()
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.seed != 0 {
            writeln!(f, "seed {}", self.seed)?;
        }
        self.rules.iter().try_for_each(|rule| writeln!(f, "{rule}"))
    }
}

/// What is after the word `seed`.
fn seed<'t>(mut words: impl Iterator<Item = &'t str>) -> Result<u64, ParseError> {
    let word = words.next().unwrap_or_default();
    match (number(word, 0), words.next()) {
        (Ok(seed), None) => Ok(seed),
        (Ok(_), Some(more)) => wrong(more, "`seed` takes one number"),
        (Err(problem), _) => wrong(&format!("seed {word}"), format!("the seed {problem}")),
    }
}

/// How a NIC is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NicState {
    /// Its port is down.
    pub down: bool,
    /// It neither answers nor sends.
    pub silent: bool,
    /// How fast its wire is; none: as fast as it can be emulated.
    pub bytes_per_second: Option<u64>,
    /// Nanoseconds of a round trip.
    pub latency_ns: u64,
}

// ------------------------------------------------------------------- what happens to operations

/// A queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its host.
    pub host: u16,
    /// The NIC, as numbered on that host.
    pub nic: u16,
    /// Its number on that NIC.
    pub qp: u16,
}

impl Place {
    fn packed(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.nic) << 16 | u64::from(self.qp)
    }
}

/// What a queue pair does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The queue pair's first operation is 1. Receives are counted apart.
    pub number: u64,
    /// What it is.
    pub op: Op,
    /// The host that it goes to.
    pub peer: u16,
}

/// What is to happen to an operation; the default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// To end with this EFA status, not executed.
    pub fail: Option<u8>,
    /// To be executed and never reported.
    pub lose: bool,
    /// Nanoseconds by which its completion is late.
    pub delay_ns: u64,
    /// Nanoseconds by which it is executed late.
    pub hold_ns: u64,
    /// To be executed later than those posted after it.
    pub reorder: bool,
    /// The receiver is not ready.
    pub rnr: bool,
    /// A byte of the payload is to be flipped where it arrives.
    pub corrupt: bool,
    /// The process that owns the destination is to be killed first.
    pub kill: bool,
}

/// A rule that fired. Its text is a rule that makes it happen again, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fired {
    /// What happened.
    pub fault: Fault,
    /// Where.
    pub place: Place,
    /// The number of the operation; of the attempt to post it, for [`Fault::Full`].
    pub number: u64,
    /// What it was.
    pub op: Op,
    /// The host that it went to; not known of a refused post.
    pub peer: Option<u16>,
    /// The rule's position in the script, from 1.
    pub rule: usize,
}

impl fmt::Display for Fired {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Place { host, nic, qp } = self.place;
        write!(f, "{} host={host} nic={nic} qp={qp}", self.fault)?;
        if self.op == Op::Recv {
            f.write_str(" op=recv")?;
        }
        write!(f, " at={} # op={}", self.number, self.op)?;
        if let Some(peer) = self.peer {
            write!(f, " peer={peer}")?;
        }
        write!(f, " rule {}", self.rule)
    }
}

/// The rules of one queue pair.
#[derive(Clone, Debug, Default)]
pub struct ForQueue {
    place: Place,
    operations: Watch,
    attempts: Watch,
}

/// Rules that count the same thing.
#[derive(Clone, Debug, Default)]
struct Watch {
    rules: Vec<Compiled>,
    /// Those without `at`, ascending.
    usual: Vec<usize>,
    /// Those with: (number, rule), ascending.
    exact: Vec<(u64, usize)>,
}

#[derive(Clone, Debug)]
struct Compiled {
    rule: Rule,
    /// In the script.
    index: usize,
    /// What the numbers are mixed with.
    lot: u64,
    fired: u64,
}

/// One step of splitmix64.
fn mix(state: u64, value: u64) -> u64 {
    let mut x = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl Compiled {
    fn fires(&mut self, operation: &Operation, now_ns: u64) -> bool {
        let Rule { rate, count, .. } = self.rule;
        // 53 bits, which is what an f64 holds.
        let draw = || (mix(self.lot, operation.number) >> 11) as f64 / (1_u64 << 53) as f64;
        let fires = self.rule.is_about(operation)
            && count.is_none_or(|count| self.fired < count)
            && self.rule.holds_at(now_ns)
            && rate.is_none_or(|rate| draw() < rate);
        self.fired += u64::from(fires);
        fires
    }
}

impl Watch {
    /// Those that fire, in the order of the script.
    fn each(&mut self, operation: &Operation, now_ns: u64, mut fired: impl FnMut(&Compiled)) {
        let start = self.exact.partition_point(|(number, _)| *number < operation.number);
        let mut exact = self.exact[start..]
            .iter()
            .take_while(|(number, _)| *number == operation.number)
            .map(|(_, rule)| *rule)
            .peekable();
        let mut usual = self.usual.iter().copied().peekable();
        loop {
            let next = match (usual.peek(), exact.peek()) {
                (Some(a), Some(b)) if a > b => exact.next(),
                (None, _) => exact.next(),
                _ => usual.next(),
            };
            let Some(rule) = next.map(|next| &mut self.rules[next]) else { return };
            if rule.fires(operation, now_ns) {
                fired(rule);
            }
        }
    }

    fn keep_counts(&mut self, before: &Watch) {
        for compiled in self.rules.iter_mut().filter(|compiled| compiled.rule.count.is_some()) {
            if let Some(same) = before.rules.iter().find(|other| other.rule == compiled.rule) {
                compiled.fired = same.fired;
            }
        }
    }
}

impl ForQueue {
    /// There are no rules here, now or later.
    pub fn is_empty(&self) -> bool {
        self.operations.rules.is_empty() && self.attempts.rules.is_empty()
    }

    /// Goes on counting, for `count`, where the rules stood before others were added or removed.
    pub fn keep_counts(&mut self, before: &ForQueue) {
        self.operations.keep_counts(&before.operations);
        self.attempts.keep_counts(&before.attempts);
    }

    /// What is to happen to an operation at that time (nanoseconds of CLOCK_MONOTONIC), by all
    /// rules but `full` and those about NICs. To be asked once for each operation; `record` is
    /// called for each rule that fires.
    pub fn judge(
        &mut self,
        operation: &Operation,
        now_ns: u64,
        record: &mut dyn FnMut(Fired),
    ) -> Verdict {
        let place = self.place;
        let mut verdict = Verdict::default();
        self.operations.each(operation, now_ns, |compiled| {
            let fault = compiled.rule.fault;
            match fault {
                Fault::Error { status } => verdict.fail = verdict.fail.or(Some(status)),
                Fault::Lose => verdict.lose = true,
                Fault::Delay { ns } => verdict.delay_ns = verdict.delay_ns.max(ns),
                Fault::Hold { ns } => verdict.hold_ns = verdict.hold_ns.max(ns),
                Fault::Reorder => verdict.reorder = true,
                Fault::Rnr => verdict.rnr = true,
                Fault::Corrupt => verdict.corrupt = true,
                Fault::Kill => verdict.kill = true,
                Fault::Full | Fault::Down | Fault::Silent | Fault::Link { .. } => {}
            }
            let (&Operation { number, op, peer }, rule) = (operation, compiled.index + 1);
            record(Fired { fault, place, number, op, peer: Some(peer), rule });
        });
        verdict
    }

    /// Is this attempt to post (the queue pair's first is 1) to be refused?
    pub fn refuses(
        &mut self,
        attempt_number: u64,
        op: Op,
        now_ns: u64,
        record: &mut dyn FnMut(Fired),
    ) -> bool {
        let (place, number) = (self.place, attempt_number);
        let mut refuses = false;
        // Rules `full` have no `peer`.
        let attempt = Operation { number, op, peer: 0 };
        self.attempts.each(&attempt, now_ns, |compiled| {
            refuses = true;
            let rule = compiled.index + 1;
            record(Fired { fault: compiled.rule.fault, place, number, op, peer: None, rule });
        });
        refuses
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use proptest::sample::{select, subsequence};

    use super::*;

    const HERE: Place = Place { host: 0, nic: 1, qp: 3 };
    const NEVER: [u64; 0] = [];

    fn script(text: &str) -> Script {
        Script::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn write_to(peer: u16, number: u64) -> Operation {
        Operation { number, op: Op::Write, peer }
    }

    /// The verdicts on writes 1 to `n` to host 1, and the record.
    fn run(queue: &mut ForQueue, n: u64) -> (Vec<Verdict>, String) {
        let mut log = String::new();
        let verdicts = (1..=n).map(|number| {
            queue.judge(&write_to(1, number), 0, &mut |fired| log += &format!("{fired}\n"))
        });
        (verdicts.collect(), log)
    }

    /// The writes of 1 to `n` that a script does something to.
    fn hits(text: &str, n: u64) -> Vec<u64> {
        let (verdicts, _) = run(&mut script(text).for_queue(HERE), n);
        (1..=n).zip(verdicts).filter(|(_, v)| *v != Verdict::default()).map(|(i, _)| i).collect()
    }

    #[test]
    fn the_canonical_form() {
        for (written, canonical) in [
            ("error status=unresp host=0 rate=0.5%", "error status=13 host=0 rate=0.005"),
            ("  error   rate=1  status=0255 # why", "error status=255 rate=1"),
            ("delay by=2000us nic=5,0-3,4 op=write,send", "delay by=2ms nic=0-5 op=send,write"),
            ("kill at=7,3,3 peer=1 count=1", "kill peer=1 at=3,7 count=1"),
            ("full op=recv every=10 after=0", "full op=recv every=10 after=0"),
            ("down from=1500ms until=5000ms set=9", "down from=1500ms until=5s set=9"),
            ("link latency=0s gbps=0.5", "link gbps=0.5 latency=0s"),
            ("silent nic=65535,65534", "silent nic=65534-65535"),
            ("lose qp=0-65535", "lose qp=0-65535"),
        ] {
            assert_eq!(written.parse::<Rule>().unwrap().to_string(), canonical);
        }
        for (name, status) in STATUSES {
            let rule: Rule = format!("error status={name}").parse().unwrap();
            assert_eq!(rule.fault(), Fault::Error { status });
        }
        let text = "# a comment\n\nseed 7\r\nlose # another\n\tdown\n";
        assert_eq!(script(text).to_string(), "seed 7\nlose\ndown\n");
    }

    #[test]
    fn errors_name_line_word_and_what_is_allowed() {
        for (text, said) in [
            ("lose\neror status=1", "line 2: `eror`: not a fault; these are error, lose, delay,"),
            (
                "error",
                "line 1: `error`: needs `status=`, which must be from 1 to 255, or one of fl",
            ),
            ("error status=0", "line 1: `status=0`: must be from 1 to 255, or one of flushed (1),"),
            ("error status=256", "line 1: `status=256`: must be from 1 to 255"),
            ("delay", "line 1: `delay`: needs `by=`, which must be a whole number with ns, us, ms"),
            ("delay by=5", "line 1: `by=5`: must be a whole number with ns, us, ms or s, as in"),
            ("delay by=20000000000s", "line 1: `by=20000000000s`: must be"),
            ("link nic=1", "line 1: `link`: needs `gbps=` or `latency=`"),
            ("link gbps=0", "line 1: `gbps=0`: must be a number from 0.001 to 100000"),
            ("lose rat=1", "line 1: `rat=1`: `lose` takes host, nic, qp, peer, op, rate, at,"),
            ("lose rate", "line 1: `rate`: `lose` takes"),
            ("lose status=1", "line 1: `status=1`: `lose` takes"),
            ("lose nic=1 nic=2", "line 1: `nic=2`: `nic` is given twice"),
            ("lose rate=1.01", "line 1: `rate=1.01`: must be from 0 to 1, or from 0% to 100%"),
            ("lose rate=nan", "line 1: `rate=nan`: must be"),
            ("lose rate=101%", "line 1: `rate=101%`: must be"),
            ("lose at=0", "line 1: `at=0`: must be a whole number from 1"),
            ("lose every=0", "line 1: `every=0`: must be a whole number from 1"),
            ("lose count=0", "line 1: `count=0`: must be"),
            ("lose op=recieve", "line 1: `op=recieve`: must be a list of send, read, write, recv"),
            ("lose nic=3-1", "line 1: `nic=3-1`: must be numbers from 0 to 65535, as in 0-3,5"),
            ("lose host=65536", "line 1: `host=65536`: must be"),
            ("lose from=2s until=2s", "line 1: `until=2s`: must be later than `from`"),
            ("full peer=1", "line 1: `peer=1`: `full` takes host, nic, qp, op,"),
            (
                "down qp=1",
                "line 1: `qp=1`: `down` takes host, nic, from, until, each as NAME=VALUE",
            ),
            ("silent rate=1", "line 1: `rate=1`: `silent` takes host, nic, from, until,"),
            ("link gbps=1 at=1", "line 1: `at=1`: `link` takes gbps, latency, host, nic, from,"),
            ("seed", "line 1: `seed `: the seed must be a whole number from 0"),
            ("seed 1 2", "line 1: `2`: `seed` takes one number"),
            ("seed 1\nseed 1", "line 2: `seed`: is given twice"),
        ] {
            let error = Script::parse(text).expect_err(text).to_string();
            assert!(error.starts_with(said), "{text}: {error}");
        }
        let error = "lose x=1".parse::<Rule>().unwrap_err();
        assert!(error.to_string().starts_with("`x=1`: "), "{error}");
    }

    #[test]
    fn each_kind_has_its_verdict() {
        let none = Verdict::default();
        for (text, verdict) in [
            ("error status=10\nerror status=13", Verdict { fail: Some(10), ..none }),
            ("error status=10\nerror status=13 at=1", Verdict { fail: Some(10), ..none }),
            ("error status=10 at=1\nerror status=13", Verdict { fail: Some(10), ..none }),
            ("lose", Verdict { lose: true, ..none }),
            ("delay by=3us\ndelay by=5us\ndelay by=4us", Verdict { delay_ns: 5000, ..none }),
            (
                "hold by=3us\ndelay by=5us\nhold by=1us",
                Verdict { delay_ns: 5000, hold_ns: 3000, ..none },
            ),
            ("reorder", Verdict { reorder: true, ..none }),
            ("rnr", Verdict { rnr: true, ..none }),
            ("corrupt", Verdict { corrupt: true, ..none }),
            ("kill", Verdict { kill: true, ..none }),
            ("lose\nkill", Verdict { lose: true, kill: true, ..none }),
            ("full\ndown\nsilent\nlink gbps=1", none),
        ] {
            assert_eq!(run(&mut script(text).for_queue(HERE), 1).0, [verdict], "{text}");
        }
    }

    #[test]
    fn where_it_happens() {
        for here in ["host=0", "nic=0-1", "qp=2,3", "peer=1", "op=write", "host=0 nic=1 qp=3"] {
            assert_eq!(hits(&format!("lose {here}"), 2), [1, 2], "{here}");
        }
        for elsewhere in ["host=1", "nic=0,2", "qp=4-9", "peer=0", "op=send,read,recv"] {
            assert_eq!(hits(&format!("lose {elsewhere}"), 2), NEVER, "{elsewhere}");
        }
        assert!(script("lose qp=4\ndown nic=1").for_queue(HERE).is_empty());
        assert!(!script("lose qp=3").for_queue(HERE).is_empty());
        assert!(!script("full").for_queue(HERE).is_empty());
    }

    #[test]
    fn when_it_happens() {
        assert_eq!(hits("lose at=3,5", 9), [3, 5]);
        assert_eq!(hits("lose every=3", 9), [3, 6, 9]);
        assert_eq!(hits("lose after=7", 9), [8, 9]);
        assert_eq!(hits("lose after=4 count=2", 9), [5, 6]);
        assert_eq!(hits("lose at=3,5,7 after=3 count=1", 9), [5]);
        assert_eq!(hits("lose rate=0", 9), NEVER);
        assert_eq!(hits("lose rate=100%", 2), [1, 2]);
        let rules = script("lose from=2s until=5s set=1000").rules;
        let mut queue = Script { seed: 0, rules }.for_queue(HERE);
        for (now, lost) in [(0, false), (2_000_000_999, false), (2_000_001_000, true)]
            .into_iter()
            .chain([(5_000_000_999, true), (5_000_001_000, false), (u64::MAX, false)])
        {
            assert_eq!(queue.judge(&write_to(1, 1), now, &mut |_| ()).lose, lost, "{now}");
        }
    }

    #[test]
    fn receives_are_meant_only_where_they_are_named() {
        let receive = Operation { number: 1, op: Op::Recv, peer: 0 };
        let lost = |text| script(text).for_queue(HERE).judge(&receive, 0, &mut |_| ()).lose;
        assert!(!lost("lose"));
        assert!(lost("lose op=recv"));
        let mut log = String::new();
        let mut queue = script("full op=recv").for_queue(HERE);
        assert!(queue.refuses(4, Op::Recv, 0, &mut |fired| log = fired.to_string()));
        assert!(!queue.refuses(4, Op::Send, 0, &mut |_| ()));
        assert_eq!(log, "full host=0 nic=1 qp=3 op=recv at=4 # op=recv rule 1");
    }

    #[test]
    fn a_full_queue_counts_attempts() {
        let mut queue = script("lose\nfull every=2 count=2").for_queue(HERE);
        let mut log = Vec::new();
        let mut refused = Vec::new();
        for attempt in 1..=8 {
            let mut record = |fired: Fired| log.push(fired.to_string());
            refused.push(queue.refuses(attempt, Op::Send, 0, &mut record));
        }
        assert_eq!(refused, [false, true, false, true, false, false, false, false]);
        let line = |at| format!("full host=0 nic=1 qp=3 at={at} # op=send rule 2");
        assert_eq!(log, [line(2), line(4)]);
    }

    #[test]
    fn what_fired_is_written_as_a_rule() {
        let (_, log) =
            run(&mut script("lose at=1\nerror status=unresp at=117").for_queue(HERE), 200);
        let lines = [
            "lose host=0 nic=1 qp=3 at=1 # op=write peer=1 rule 1",
            "error status=13 host=0 nic=1 qp=3 at=117 # op=write peer=1 rule 2",
        ];
        assert_eq!(log.lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn counts_go_on_when_other_rules_change() {
        let mut before = script("lose count=3\nfull count=1").for_queue(HERE);
        assert_eq!(run(&mut before, 2).0.iter().filter(|v| v.lose).count(), 2);
        assert!(before.refuses(1, Op::Send, 0, &mut |_| ()));
        let mut after = script("kill at=9\nlose count=3\nfull count=1").for_queue(HERE);
        after.keep_counts(&before);
        assert_eq!(run(&mut after, 5).0.iter().filter(|v| v.lose).count(), 1);
        assert!(!after.refuses(2, Op::Send, 0, &mut |_| ()));
    }

    #[test]
    fn frequency_is_near_the_rate_and_each_queue_pair_draws_its_own() {
        for (text, low, high) in [
            ("seed 1\nlose rate=1%", 800, 1200),
            ("seed 2\nlose rate=0.5", 49_000, 51_000),
            ("seed 18446744073709551615\nlose rate=0.001", 50, 160),
        ] {
            let n = hits(text, 100_000).len();
            assert!((low..=high).contains(&n), "{text}: {n}");
        }
        let at = |host, nic, qp| {
            let (verdicts, _) =
                run(&mut script("lose rate=0.5").for_queue(Place { host, nic, qp }), 64);
            verdicts.iter().map(|verdict| verdict.lose).collect::<Vec<_>>()
        };
        let places = [at(0, 0, 0), at(1, 0, 0), at(0, 1, 0), at(0, 0, 1), at(1, 1, 0)];
        assert_eq!(places.iter().collect::<HashSet<_>>().len(), places.len());
        // Two rules alike are two chances.
        assert!(hits("lose rate=0.5\nlose rate=0.5", 1000).len() > 650);
    }

    #[test]
    fn a_long_record_costs_nothing_where_nothing_is_to_fire() {
        let lines = (1..=100_000).map(|at| format!("lose host=0 nic=1 qp=3 at={}\n", 2 * at));
        let mut queue = script(&lines.collect::<String>()).for_queue(HERE);
        // Linear search would look at 10^10 rules.
        let (verdicts, log) = run(&mut queue, 100_000);
        assert_eq!(verdicts.iter().filter(|verdict| verdict.lose).count(), 50_000);
        assert_eq!(log.lines().count(), 50_000);
    }

    #[test]
    fn states_of_a_nic() {
        let text = "down host=0 nic=0-1 from=2s until=5s set=1000000000\nsilent nic=2\n\
                    link gbps=100 latency=20us\nlink gbps=0.5 nic=1\nlink latency=7us host=1\nlose";
        let script = script(text);
        let usual = NicState {
            bytes_per_second: Some(12_500_000_000),
            latency_ns: 20_000,
            ..NicState::default()
        };
        let s = 1_000_000_000;
        assert_eq!(script.link_state(0, 0, 3 * s - 1), usual);
        assert_eq!(script.link_state(0, 0, 3 * s), NicState { down: true, ..usual });
        assert_eq!(script.link_state(0, 0, 6 * s), usual);
        assert_eq!(script.link_state(0, 2, 0), NicState { silent: true, ..usual });
        assert_eq!(script.link_state(0, 1, 0).bytes_per_second, Some(62_500_000));
        assert_eq!(script.link_state(1, 0, 3 * s), NicState { latency_ns: 7000, ..usual });
        let changes = [0, 3 * s - 1, 3 * s, 6 * s].map(|now| script.next_change(now));
        assert_eq!(changes, [Some(3 * s), Some(3 * s), Some(6 * s), None]);
        assert_eq!(Script::default().link_state(0, 0, 0), NicState::default());
    }

    #[test]
    fn up_is_exact() {
        for (before, up, after) in [
            ("down", "", ""),
            ("down host=1", "host=0", "down host=1\n"),
            ("lose nic=1\nsilent nic=1\ndown nic=1", "nic=1", "lose nic=1\nsilent nic=1\n"),
            ("down nic=0-3 until=5s set=7", "nic=1", "down nic=0,2-3 until=5s set=7\n"),
            ("down", "nic=1", "down nic=0,2-65535\n"),
            ("down", "nic=0,65535", "down nic=1-65534\n"),
            ("down host=0-1 nic=0-1", "host=1", "down host=0 nic=0-1\n"),
            ("down host=0-1 nic=0-1", "host=1 nic=0", "down host=0 nic=0-1\ndown host=1 nic=1\n"),
            ("down nic=3", "host=2", "down host=0-1,3-65535 nic=3\n"),
        ] {
            let mut script = script(before);
            script.up(up).unwrap();
            assert_eq!(script.to_string(), after, "{before}; up {up}");
        }
        let error = script("down").up("qp=1").unwrap_err();
        assert_eq!(error.to_string(), "`qp=1`: `up` takes host, nic, each as NAME=VALUE");
    }

    /// An attribute of any rule, as text.
    fn attribute(name: &'static str) -> BoxedStrategy<String> {
        let range = || (any::<u16>(), 0..3_u16).prop_map(|(a, n)| (a, a.saturating_add(n)));
        let numbers = prop::collection::vec(range(), 1..4).prop_map(Numbers::new);
        let durations = (0..10_000_000_000_u64, select(&UNITS[..3]))
            .prop_map(|(n, (unit, _))| format!("{n}{unit}"));
        let value = match name {
            "host" | "nic" | "qp" | "peer" => numbers.prop_map(|n| n.to_string()).boxed(),
            "op" => subsequence(&OPS[..], 1..4)
                .prop_map(|ops| ops.iter().map(|op| op.0).collect::<Vec<_>>().join(","))
                .boxed(),
            "rate" => prop_oneof![
                (0.0..=1.0).prop_map(|n: f64| n.to_string()),
                (0.0..=100.0).prop_map(|n: f64| format!("{n}%")),
            ]
            .boxed(),
            "at" => prop::collection::vec(1..=u64::MAX, 1..4)
                .prop_map(|at| at.iter().map(u64::to_string).collect::<Vec<_>>().join(","))
                .boxed(),
            "every" | "count" => (1..=u64::MAX).prop_map(|n| n.to_string()).boxed(),
            "after" | "set" => any::<u64>().prop_map(|n| n.to_string()).boxed(),
            // Later than any other duration here.
            "until" => (10_000_000_001..u64::MAX).prop_map(|n| format!("{n}ns")).boxed(),
            "from" => (0..=10_000_000_000_u64).prop_map(|n| format!("{n}ns")).boxed(),
            "by" | "latency" => durations.boxed(),
            "gbps" => (0.001..=100_000.0).prop_map(|n: f64| n.to_string()).boxed(),
            "status" => (1..=255_u8).prop_map(|n| n.to_string()).boxed(),
            other => panic!("{other}"),
        };
        value.prop_map(move |value| format!(" {name}={value}")).boxed()
    }

    /// The text of a rule of any kind.
    fn rule() -> impl Strategy<Value = String> {
        select(&FAULTS[..]).prop_flat_map(|fault| {
            let (needed, optional): (&[&str], Vec<&str>) = match fault {
                "error" => (&["status"], OPERATION_ATTRIBUTES.into()),
                "delay" | "hold" => (&["by"], OPERATION_ATTRIBUTES.into()),
                "link" => (&["gbps"], [&STATE_ATTRIBUTES[..], &["latency"]].concat()),
                "down" | "silent" => (&[], STATE_ATTRIBUTES.into()),
                _ => (&[], OPERATION_ATTRIBUTES.into()),
            };
            let optional = [optional, vec!["set"]].concat();
            let optional =
                optional.into_iter().filter(move |name| (fault, *name) != ("full", "peer"));
            subsequence(optional.collect::<Vec<_>>(), 0..4)
                .prop_flat_map(move |names| {
                    needed.iter().copied().chain(names).map(attribute).collect::<Vec<_>>()
                })
                .prop_shuffle()
                .prop_map(move |words| format!("{fault}{}", words.concat()))
        })
    }

    /// A script of rules that can fire at [`HERE`] and near it.
    fn busy_script() -> impl Strategy<Value = String> {
        let what = ["error status=13", "error status=rnr", "lose", "delay by=9us", "delay by=1ms"];
        let more = ["hold by=9us", "reorder", "rnr", "corrupt", "kill"];
        let place =
            ["", " qp=3", " qp=4", " nic=1", " host=0 nic=0-2", " peer=1", " op=write,read"];
        let when = [" rate=0.1", " rate=30%", " at=3,14,15", " every=7", " after=40 count=5"];
        let line = (
            select([&what[..], &more].concat()),
            select(place.to_vec()),
            select(when.to_vec()),
            select(&["", " count=2", " until=1s"][..]),
        );
        let lines = prop::collection::vec(line, 1..8).prop_map(|lines| {
            let line = |(what, place, when, more): (&str, &str, &str, &str)| {
                let more = if when.contains("count") { "" } else { more };
                format!("{what}{place}{when}{more}\n")
            };
            lines.into_iter().map(line).collect::<String>()
        });
        (any::<u64>(), lines).prop_map(|(seed, lines)| format!("seed {seed}\n{lines}"))
    }

    proptest! {
        #[test]
        fn text_and_rule_go_round(text in rule()) {
            let rule: Rule = text.parse().map_err(|e: ParseError| TestCaseError::fail(e.to_string()))?;
            let shown = rule.to_string();
            prop_assert_eq!(shown.parse::<Rule>().unwrap(), rule);
            // Nothing is left out.
            prop_assert_eq!(shown.split(' ').count(), text.split(' ').count());
        }

        #[test]
        fn text_and_script_go_round(seed: u64, rules in prop::collection::vec(rule(), 0..5)) {
            let script = script(&format!("seed {seed}\n{}", rules.join("\n")));
            prop_assert_eq!(script.rules.len(), rules.len());
            prop_assert_eq!(Script::parse(&script.to_string()).unwrap(), script);
        }

        #[test]
        fn any_text_is_a_script_or_an_error(text in any::<String>()) {
            let _ = Script::parse(&text).map_err(|error| error.to_string());
        }

        #[test]
        fn a_damaged_script_is_a_script_or_an_error(
            text in prop::collection::vec(rule(), 1..4).prop_map(|rules| rules.join("\n")),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<char>(), 0..3), 1..4),
        ) {
            let mut chars: Vec<char> = text.chars().collect();
            for (at, with, how) in damage {
                let i = at.index(chars.len());
                match how {
                    0 => chars[i] = with,
                    1 => chars.insert(i, "0-=,.%#e \n".chars().nth(with as usize % 10).unwrap()),
                    _ if chars.len() > 1 => drop(chars.remove(i)),
                    _ => {}
                }
            }
            let text: String = chars.into_iter().collect();
            if let Ok(script) = Script::parse(&text) {
                prop_assert_eq!(Script::parse(&script.to_string()).unwrap(), script.clone());
                run(&mut script.for_queue(HERE), 20);
                script.link_state(0, 0, u64::MAX);
            }
        }

        #[test]
        fn the_same_seed_gives_the_same_faults_and_another_others(seed: u64) {
            let faults = |seed| hits(&format!("seed {seed}\nlose rate=0.5"), 128);
            prop_assert_eq!(faults(seed), faults(seed));
            prop_assert_ne!(faults(seed), faults(seed.wrapping_add(1)));
        }

        #[test]
        fn a_record_replays_what_happened(text in busy_script()) {
            let places = [HERE, Place { qp: 4, ..HERE }, Place { nic: 0, ..HERE }];
            let original = script(&text);
            let happened = places.map(|place| run(&mut original.for_queue(place), 60));
            let record: String = happened.iter().map(|(_, log)| log.as_str()).collect();
            let record = script(&record);
            for (place, (verdicts, log)) in places.into_iter().zip(happened) {
                let (again, log_again) = run(&mut record.for_queue(place), 60);
                prop_assert_eq!(again, verdicts);
                // But for the numbers of the rules.
                let strip = |log: &str| log.lines().map(|line| code(line).to_owned()).collect::<Vec<_>>();
                prop_assert_eq!(strip(&log_again), strip(&log));
            }
        }
    }
}
