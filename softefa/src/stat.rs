//! What NICs and queue pairs have counted, for people and programs to look at.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::sync::atomic::Ordering;

use serde::Serialize;

use crate::cluster::Cluster;
use crate::shared::{COUNTERS, Counters, QpState};

/// One NIC.
#[derive(Serialize)]
pub struct Nic {
    /// Number of its host.
    pub host: u16,
    /// Number of it in the host.
    pub nic: u16,
    /// Memory regions registered.
    pub regions: usize,
    /// Page table entries that these take.
    pub pages: u64,
    /// Sums over the queue pairs that there are and that there were.
    pub counters: BTreeMap<&'static str, u64>,
    /// Those that there are.
    pub queue_pairs: Vec<QueuePair>,
}

/// One queue pair.
#[derive(Serialize)]
pub struct QueuePair {
    /// Its number.
    pub number: usize,
    /// The process whose it is.
    pub pid: u32,
    /// Whether that process lives.
    pub alive: bool,
    /// Whether it receives.
    pub ready: bool,
    /// Receives posted that no sender has taken.
    pub receives: u64,
    /// What it counted.
    pub counters: BTreeMap<&'static str, u64>,
}

fn values(counters: &Counters) -> BTreeMap<&'static str, u64> {
    COUNTERS.iter().map(|&counter| (counter.name(), counters.get(counter))).collect()
}

/// All NICs of the cluster as they are now.
///
/// # Errors
/// The cluster's files cannot be read.
pub fn read(cluster: &Cluster) -> io::Result<Vec<Nic>> {
    cluster.nics()?.into_iter().map(|(host, nic)| one(cluster, host, nic)).collect()
}

fn one(cluster: &Cluster, host: u16, nic: u16) -> io::Result<Nic> {
    let shared = cluster.nic(host, nic, false)?;
    let mut counters = values(&shared.retired);
    let mut queue_pairs = Vec::new();
    for (number, qp) in shared.qps.iter().enumerate() {
        let owner = qp.owner.load(Ordering::Acquire);
        if owner == 0 {
            continue;
        }
        let own = values(&qp.counters);
        for (name, value) in &own {
            *counters.entry(name).or_default() += value;
        }
        queue_pairs.push(QueuePair {
            number,
            pid: cluster.pid(owner).unwrap_or(0),
            alive: cluster.is_alive(owner),
            ready: qp.state.load(Ordering::Relaxed) == QpState::Ready as u32,
            receives: qp.ring().ready(),
            counters: own,
        });
    }
    let regions = shared.mrs.iter().filter(|mr| mr.key.load(Ordering::Relaxed) != 0).count();
    Ok(Nic {
        host,
        nic,
        regions,
        pages: shared.pages.load(Ordering::Relaxed),
        counters,
        queue_pairs,
    })
}

/// A line a NIC and a line a queue pair, with the counters that are not 0.
pub fn text(nics: &[Nic]) -> String {
    let mut out = String::new();
    let shown = |counters: &BTreeMap<&str, u64>| {
        let mut line = String::new();
        for counter in COUNTERS {
            match counters.get(counter.name()) {
                None | Some(0) => {}
                Some(value) => {
                    let _ = write!(line, " {}={value}", counter.name());
                }
            }
        }
        line
    };
    for nic in nics {
        let _ = writeln!(
            out,
            "host {} nic {}: {} queue pairs, {} regions, {} pages{}",
            nic.host,
            nic.nic,
            nic.queue_pairs.len(),
            nic.regions,
            nic.pages,
            shown(&nic.counters)
        );
        for qp in &nic.queue_pairs {
            let state = match (qp.alive, qp.ready) {
                (false, _) => " (dead)",
                (true, false) => " (not ready)",
                (true, true) => "",
            };
            let _ = writeln!(
                out,
                "  qp {} of process {}{state}: receives posted {}{}",
                qp.number,
                qp.pid,
                qp.receives,
                shown(&qp.counters)
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::Counter;

    #[test]
    fn what_a_queue_pair_counted_outlives_it_in_its_nic() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::open(dir.path()).unwrap();
        let me = cluster.join().unwrap();
        let nic = cluster.nic(3, 1, true).unwrap();
        let number = nic.take_qp(me).unwrap();
        nic.qps[usize::from(number)].counters.add(Counter::writes, 5);
        nic.take_mr(me, 0, 1, 0, 0, 1, 10).unwrap();
        let before = read(&cluster).unwrap();
        assert_eq!((before[0].host, before[0].nic, before[0].regions), (3, 1, 1));
        assert_eq!(before[0].queue_pairs[0].counters["writes"], 5);
        assert!(text(&before).contains("writes=5"), "{}", text(&before));
        nic.free_qp(number);
        let after = read(&cluster).unwrap();
        assert!(after[0].queue_pairs.is_empty());
        assert_eq!(after[0].counters["writes"], 5);
        assert_eq!(serde_json::to_value(&after).unwrap()[0]["counters"]["writes"], 5);
    }
}
