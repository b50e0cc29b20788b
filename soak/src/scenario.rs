//! What goes wrong, and what must come of it.

/// A scenario.
pub struct Scenario {
    /// For `--only`.
    pub name: &'static str,
    /// One line for people.
    pub what: &'static str,
    /// Part of the time of a whole run, of 100; 0: only if it is named.
    pub share: u64,
    /// Fault rules, of softefa's language.
    pub rules: &'static [&'static str],
    /// NICs go down and up, one after the other.
    pub nics_down: bool,
    /// Kill processes and start them again.
    pub kills: Option<Kills>,
    /// Deadline of a transfer, milliseconds.
    pub timeout_ms: u64,
    /// softefa's silence after which a peer is unresponsive, milliseconds.
    pub dead_ms: u64,
    /// Slots of each of the two watched lanes.
    pub slots: u32,
    /// Cancel some batches.
    pub cancels: bool,
    /// What must come of it: see [`Scenario::must`].
    must: Must,
    /// NICs are cut off, which may be before their first answer.
    cuts_off: bool,
    /// Why failures may happen: words of the cause.
    pub causes: &'static [&'static str],
    /// Resources must be as at the beginning.
    pub flat: bool,
    /// It is about [`FULL`] only.
    pub only_full: bool,
}

/// How long processes that are killed live at least and at most once they are ready, milliseconds.
#[derive(Clone, Copy)]
pub struct Kills {
    /// The initiator.
    pub initiator: (u64, u64),
    /// The target.
    pub target: (u64, u64),
}

/// What must come of the transfers between the two processes that live through a scenario. That none is lost,
/// hangs, has wrong bytes, or fails without saying why must be of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Must {
    /// Every one completes.
    Complete,
    /// Those that do not complete say why, and it is what was done to them.
    Explain,
    /// The flipped bytes are found: this looks at the soak itself.
    FindCorruption,
}

/// The fault that not every provider can be given: see [`crate::stage::Devices::refusal`].
const FULL: &str = "full";

/// The transport's words for a NIC, ours or a peer's, that is cut off, or a peer that is gone.
const CUT_OFF: &[&str] = &[
    "the peer answered before and does not any more",
    "the peer's NIC answered before and does not any more",
    "the peer's NIC never answered",
    "did not answer our greeting",
    "port is down",
];
/// Those, and what is said of a peer that was killed, and may have come back as another.
const KILLED: &[&str] = &[
    "the peer answered before and does not any more",
    "the peer's NIC answered before and does not any more",
    "the peer's NIC never answered",
    "did not answer our greeting",
    "port is down",
    "the peer's endpoint is gone",
    "the peer's NIC does not know ours",
    "the peer has no such memory under this key",
    "is not registered at",
    "does not answer: all of its",
];

const USUAL: Scenario = Scenario {
    name: "",
    what: "",
    share: 0,
    rules: &[],
    nics_down: false,
    kills: None,
    timeout_ms: 20_000,
    dead_ms: 1000,
    slots: 96,
    cancels: false,
    must: Must::Complete,
    cuts_off: false,
    causes: &[],
    flat: false,
    only_full: false,
};

/// All of them, in the order in which they run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "checker",
        what: "1 % of RDMA operations flip a byte: the soak must see it",
        share: 2,
        rules: &["corrupt rate=1% op=read,write"],
        must: Must::FindCorruption,
        ..USUAL
    },
    Scenario {
        name: "errors",
        what: "0.5 % of the initiator's work requests end with status 13",
        share: 9,
        rules: &["error status=unresp rate=0.5% host=0"],
        // A first answer may be among them.
        cuts_off: true,
        causes: CUT_OFF,
        ..USUAL
    },
    Scenario {
        name: "lost",
        what: "2 % of completions are lost, 0.5 % of operations executed after the deadline, 1 s",
        share: 9,
        rules: &["lose rate=2% host=0", "hold by=1500ms rate=0.5% host=0"],
        timeout_ms: 1000,
        slots: 384,
        must: Must::Explain,
        ..USUAL
    },
    Scenario {
        name: "eagain",
        what: "20 % of posts find the queue full",
        share: 7,
        rules: &["full rate=20%"],
        only_full: true,
        ..USUAL
    },
    Scenario {
        name: "reorder",
        what: "30 % of work requests are executed later than those after them",
        share: 7,
        rules: &["reorder rate=30%"],
        ..USUAL
    },
    Scenario {
        name: "nic-down",
        what: "every second one NIC after the other goes down for 0.7 s, on either side",
        share: 12,
        nics_down: true,
        cuts_off: true,
        dead_ms: 600,
        causes: CUT_OFF,
        ..USUAL
    },
    Scenario {
        name: "nic-gone",
        what: "one NIC of the initiator goes down, and stays so",
        share: 5,
        rules: &["down host=0 nic=1"],
        cuts_off: true,
        dead_ms: 600,
        causes: CUT_OFF,
        ..USUAL
    },
    Scenario {
        name: "latency",
        what: "50 us; 1 % of completions late by 30 ms, 1 % of operations by 20 ms, 0.05 % by 300 ms",
        share: 5,
        rules: &[
            "link latency=50us",
            "delay by=30ms rate=1%",
            "hold by=20ms rate=1%",
            "hold by=300ms rate=0.05%",
        ],
        ..USUAL
    },
    Scenario {
        name: "restarts",
        what: "kill -9 of an initiator and of a target again and again, beside a pair that lives",
        share: 30,
        kills: Some(Kills { initiator: (20, 150), target: (100, 500) }),
        causes: KILLED,
        flat: true,
        ..USUAL
    },
    Scenario {
        name: "mixed",
        what: "all of these at once, at lower rates, and some batches cancelled",
        share: 14,
        rules: &[
            "error status=unresp rate=0.2% host=0",
            "lose rate=0.05% host=0",
            "reorder rate=15%",
            "delay by=30ms rate=0.5%",
            "hold by=20ms rate=0.5%",
            "full rate=10%",
        ],
        nics_down: true,
        kills: Some(Kills { initiator: (300, 1500), target: (300, 1500) }),
        timeout_ms: 3000,
        dead_ms: 600,
        slots: 192,
        cancels: true,
        causes: KILLED,
        must: Must::Explain,
        ..USUAL
    },
    Scenario {
        name: "flat",
        what: "faults at low rates for long: memory, descriptors and threads stay as they are",
        rules: &[
            "error status=unresp rate=0.1% host=0",
            "reorder rate=5%",
            "hold by=5ms rate=0.5%",
            "full rate=5%",
        ],
        kills: Some(Kills { initiator: (1500, 3000), target: (1500, 3000) }),
        cancels: true,
        causes: KILLED,
        flat: true,
        ..USUAL
    },
];

/// Every second another NIC is down for 0.7 s, of the initiator and of the target by turns.
fn one_nic_after_the_other(seconds: u64, nics: u64) -> impl Iterator<Item = String> {
    (0..seconds).map(move |second| {
        let (host, nic) = (second / nics % 2, second % nics);
        let (from, until) = (second * 1000, second * 1000 + 700);
        format!("down host={host} nic={nic} from={from}ms until={until}ms")
    })
}

impl Scenario {
    /// What must come of it. A provider that emulates a write by a read of the target tells only the target when
    /// that fails, and never gives back what was posted to a NIC whose first answer is lost: such transfers can
    /// only time out.
    pub fn must(&self, emulated: bool) -> Must {
        if emulated && self.cuts_off { Must::Explain } else { self.must }
    }

    /// Its fault rules, for so many seconds; `full`: posts may be refused.
    pub fn script(&self, seconds: u64, nics: u8, full: bool) -> Vec<String> {
        let possible = |rule: &&str| full || !rule.starts_with(FULL);
        let rules = self.rules.iter().copied().filter(possible).map(str::to_owned);
        let downs = self.nics_down.then(|| one_nic_after_the_other(seconds, u64::from(nics)));
        rules.chain(downs.into_iter().flatten()).collect()
    }
}
