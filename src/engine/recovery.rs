//! What happens to an operation that failed: it is tried again, over other NICs where there are some, or its
//! request fails.
//!
//! A part of a group that failed is quiet: the provider gave it back. It keeps its use of its region and its
//! place in the load of its rail until it is given to another, so nothing is called finished, or its memory
//! unused, meanwhile. To try again is idempotent: the same bytes go to the same place.

use std::sync::Arc;

use super::batch::Status;
use super::failure::Failure;
use super::health::{MEMORY, Use};
use super::nic::Nic;
use super::plan::Plan;
use super::rail::{Broken, Ends, Outcome, Span};
use super::target::Target;
use super::{Engine, Refusal, TargetId};
use crate::error::{Code, Error, Result};
use crate::fault::{Class, Faults};
use crate::sync::{AtomicU64, Mutex, Ordering};

/// The delay before the second try, nanoseconds, give or take a half; each one after that is twice as long.
const DELAY: u64 = 1_000_000;
/// log2 of how much longer than the first the longest delay is: 0.26 seconds.
const DOUBLINGS: u32 = 8;

/// Parts of groups that are to be tried again, and when.
pub(super) struct Later {
    next: AtomicU64,
    parts: Mutex<Vec<(u64, Broken)>>,
}

impl Default for Later {
    fn default() -> Self {
        Self { next: AtomicU64::new(u64::MAX), parts: Mutex::default() }
    }
}

impl Later {
    fn add(&self, due: u64, part: Broken) {
        let mut parts = self.parts.lock();
        parts.push((due, part));
        self.next.fetch_min(due, Ordering::Relaxed);
    }

    /// Takes those that are due, or all. One load if there are none.
    fn take(&self, now: u64, all: bool) -> Vec<(u64, Broken)> {
        let next = self.next.load(Ordering::Relaxed);
        if next == u64::MAX || (now < next && !all) {
            return Vec::new();
        }
        let mut parts = self.parts.lock();
        let wanted = |part: &(u64, Broken)| all || part.0 <= now;
        let (taken, left) = std::mem::take(&mut *parts).into_iter().partition(wanted);
        *parts = left;
        let next = parts.iter().map(|&(due, _)| due).min();
        self.next.store(next.unwrap_or(u64::MAX), Ordering::Relaxed);
        taken
    }
}

/// Where a part may go.
enum Way {
    /// To this rail.
    Now(usize, Span),
    /// Nowhere before this time.
    Later(u64),
    /// Nowhere at all.
    None,
}

/// What went wrong with one open segment, for the statistics.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PeerState {
    /// Its name.
    pub name: String,
    /// Operations with it that failed, by whose fault it was.
    pub faults: Faults,
    /// How many of them were tried again.
    pub retried: u64,
    /// Its NICs that failed too often in a row, and have not been seen to work since.
    pub paused: Vec<String>,
}

impl<N: Nic> Engine<N> {
    /// Sees to operations that failed.
    pub(super) fn settle(&self, outcome: &mut Outcome, now: u64) {
        while let Some(part) = outcome.broken.pop() {
            self.settle_one(part, outcome, now);
        }
    }

    #[cold]
    fn settle_one(&self, part: Broken, outcome: &mut Outcome, now: u64) {
        self.shared.ailing_until.fetch_max(now.saturating_add(MEMORY), Ordering::Relaxed);
        let target = self.shared.target(part.group);
        let class = part.fault.class;
        if let Some(target) = &target {
            target.faults.add(class);
        }
        if matches!(class, Class::Peer | Class::Rail) {
            self.blame(&part, target.as_deref(), now);
        }
        let group = self.shared.batches.group(part.group);
        let again = class.may_pass()
            && part.tries < self.settings.tries
            && !group.is_condemned()
            && target.as_ref().is_some_and(|target| self.may_go(&part, target));
        if again {
            let delay = DELAY << u32::from(part.tries.max(1) - 1).min(DOUBLINGS);
            let due = now.saturating_add(jitter(delay, now ^ part.local));
            self.later.add(due.min(group.deadline()), part);
        } else {
            self.give_up(&part, target, outcome, now);
        }
    }

    /// Whether a part may go to what is known of its peer now: in another life of it the other parts, which may have
    /// gone to the former, would be missing.
    fn may_go(&self, part: &Broken, target: &Target) -> bool {
        let batches = &self.shared.batches;
        target.life == batches.group(part.group).aim().life
            || batches.length(part.group) == part.length
    }

    /// Counts a failure against the NICs at both ends. Which of them it was is seen by which works with others.
    fn blame(&self, part: &Broken, target: Option<&Target>, now: u64) {
        let rail = &self.rails[part.rail];
        let paused = |what: std::fmt::Arguments, pause: u64| {
            let pause = std::time::Duration::from_nanos(pause);
            log::warn!(
                "{what} failed too often and is left out for {pause:?}: {}",
                part.fault.text
            );
        };
        if let Some(pause) = rail.health.fail(now) {
            paused(format_args!("our NIC {}", rail.name), pause);
        }
        let Some(target) = target else { return };
        target.faults.last.lock().clone_from(&part.fault.text);
        let Some(nic) = target.nic_of(part.rail, part.peer) else { return };
        let own = &target.nics[usize::from(nic)];
        if let (Class::Peer, Some(pause)) = (part.fault.class, own.health.fail(now)) {
            paused(format_args!("{} of {}", own.name, target.name), pause);
        }
    }

    /// Has the target in a slot connect its peers anew.
    pub(super) fn replace(&self, slot: u32, old: &Target) {
        let Some(slot) = self.shared.targets.at(slot) else { return };
        let current = slot.load();
        // Unless that, or more, has happened meanwhile.
        if let Some(current) = current.as_ref().filter(|it| std::ptr::eq(Arc::as_ptr(it), old)) {
            slot.compare_and_swap(current, Some(Arc::new(old.anew())));
        }
    }

    /// Gives parts that are due to other rails; `all`: looks at the others too, whether they are wanted still.
    pub(super) fn try_later(&self, outcome: &mut Outcome, now: u64, all: bool) {
        for (due, part) in self.later.take(now, all) {
            let group = self.shared.batches.group(part.group);
            let target = self.shared.target(part.group);
            if group.is_condemned() {
                self.give_up(&part, target, outcome, now);
                continue;
            }
            if now >= group.deadline() {
                let failure = self.failure(&part, target.as_deref(), now);
                if self.shared.batches.fail(part.group, Status::Timeout, &failure) {
                    outcome.failures.push(failure);
                }
                self.give_up(&part, target, outcome, now);
                continue;
            }
            if due > now {
                self.later.add(due, part);
                continue;
            }
            let way = |target| self.way(&part, target, now);
            let may_go = |target: &&Target| self.may_go(&part, target);
            match target.as_deref().filter(may_go).map_or(Way::None, way) {
                Way::Now(rail, span) => {
                    if let Some(target) = &target {
                        group.set_life(target.life);
                        target.faults.retried.fetch_add(1, Ordering::Relaxed);
                    }
                    let to = &self.rails[rail];
                    to.retried.fetch_add(1, Ordering::Relaxed);
                    to.push(&[span], span.length);
                    // In this order, so that the engine is never seen idle.
                    self.moves.fetch_add(1, Ordering::Release);
                    self.rails[part.rail].hand_over(part.length);
                }
                Way::Later(when) => {
                    let due = when.max(now + 1).saturating_add(jitter(DELAY, now ^ part.local));
                    self.later.add(due.min(group.deadline()), part);
                }
                Way::None => self.give_up(&part, target, outcome, now),
            }
        }
    }

    /// The best way for a part that failed: not over the same rail again if there is another, and over the
    /// peer's NICs in turn.
    fn way(&self, part: &Broken, target: &Target, now: u64) -> Way {
        let locals = self.locals.load();
        let local = locals.find(part.local, &mut 0);
        let remote = target.regions.find(part.remote, &mut 0);
        let (Some(local), Some(remote)) = (local, remote) else { return Way::None };
        if part.length > remote.end - part.remote {
            return Way::None;
        }
        let mut rails: Vec<usize> = local.rails.iter().map(|&rail| usize::from(rail)).collect();
        rails.sort_by_key(|&rail| {
            let own = &self.rails[rail];
            (own.health.is_paused(), rail == part.rail, own.load())
        });
        let mut soonest = u64::MAX;
        for (nic, key) in remote.keys_from(part.rail + usize::from(part.tries)) {
            let Some(own) = target.nics.get(usize::from(nic)) else { continue };
            if own.address.load().is_none() {
                continue; // there is nobody to shake hands here
            }
            match own.health.ask(now) {
                Use::Yes => {}
                Use::NotBefore(when) => {
                    soonest = soonest.min(when);
                    continue;
                }
                Use::Broken(_) => continue,
            }
            for &rail in &rails {
                let peer = match self.peer(TargetId(0), target, rail, nic) {
                    Ok(peer) => peer,
                    Err(Refusal::Error(error)) => {
                        log::debug!("not tried again there: {error}");
                        continue;
                    }
                    Err(_) => continue,
                };
                let span = Span {
                    group: part.group,
                    local: part.local,
                    remote: part.remote,
                    base: if self.virtual_addresses { 0 } else { remote.start },
                    length: part.length,
                    key,
                    peer,
                    region: part.region,
                    tries: part.tries,
                    write: part.write,
                };
                return Way::Now(rail, span);
            }
        }
        if soonest == u64::MAX { Way::None } else { Way::Later(soonest) }
    }

    /// A part is not tried again: its group fails, unless that is settled, and this much of it has ended.
    fn give_up(&self, part: &Broken, target: Option<Arc<Target>>, outcome: &mut Outcome, now: u64) {
        let failure = self.failure(part, target.as_deref(), now);
        let condemned = self.shared.batches.group(part.group).is_condemned();
        if !condemned && self.shared.batches.fail(part.group, Status::Failed, &failure) {
            outcome.failures.push(failure);
        }
        if let Some(target) = &target {
            let forgot = target.nic_of(part.rail, part.peer).is_some_and(|nic| target.forget(nic));
            if forgot {
                self.replace(self.shared.batches.group(part.group).aim().target, target);
            }
            if part.fault.class != Class::Ours {
                target.set_stale(part.fault.class == Class::Permanent);
            }
        }
        let mut ends = Ends::new(&self.rails[part.rail], &self.shared, &mut outcome.ended);
        ends.end(part.group, part.length, part.region);
    }

    fn failure(&self, part: &Broken, target: Option<&Target>, now: u64) -> Failure {
        let nic = Some(&self.rails[part.rail].name);
        let cause = part.fault.text.clone().into();
        let nic_of = |target: &Target| target.nic_of(part.rail, part.peer);
        let peer_nic = target.and_then(|target| Some(&target.nics[usize::from(nic_of(target)?)]));
        Failure {
            peer_nic: peer_nic.map(|nic| nic.name.clone()),
            tries: part.tries,
            ..self.shared.failure(part.group, part.length, nic, now, cause)
        }
    }

    /// How often work was given to another rail than it came from: who drives that one may be asleep.
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    // ---- where to begin -----------------------------------------------------------------------

    /// Those of a region's rails that are not paused; all of them if they are all paused: the fault may be a
    /// peer's.
    pub(super) fn choose_healthy(&self, rails: &[u16], now: u64, healthy: &mut Vec<u16>) {
        healthy.clear();
        let usable = |rail: &u16| self.rails[usize::from(*rail)].health.ask(now) == Use::Yes;
        healthy.extend(rails.iter().copied().filter(usable));
        if healthy.is_empty() {
            healthy.extend(rails);
        }
    }

    /// Refuses what goes to a target all of whose NICs are broken, or that should be asked for a newer
    /// descriptor first.
    pub(super) fn look_at_targets(&self, plan: &Plan, now: u64) -> Result<(), Refusal> {
        for (id, target) in &plan.targets {
            if target.take_stale(now) {
                return Err(Refusal::OutOfDate { target: *id, error: None });
            }
            if !self.shared.is_ailing(now) {
                continue;
            }
            let mut until = u64::MAX;
            let broken = |nic: &super::target::Nic| match nic.health.peek(now) {
                Use::Broken(when) => {
                    until = until.min(when);
                    true
                }
                _ => false,
            };
            if target.nics.is_empty() || !target.nics.iter().all(broken) {
                continue;
            }
            let error = Error::new(
                Code::Endpoint,
                format!(
                    "{} cannot be reached over any of its {} NICs; the next try is possible in {:.1?}; \
                     the last one failed because: {}",
                    target.name,
                    target.nics.len(),
                    std::time::Duration::from_nanos(until - now),
                    target.faults.last.lock()
                ),
            );
            if !target.faults.may_ask(now) {
                return Err(error.into());
            }
            return Err(Refusal::OutOfDate { target: *id, error: Some(error) });
        }
        Ok(())
    }

    /// What went wrong with each open segment.
    pub fn peer_states(&self) -> Vec<PeerState> {
        let targets = self.shared.targets.iter().filter_map(|slot| slot.load_full());
        let state = |target: Arc<Target>| PeerState {
            name: target.name.to_string(),
            faults: target.faults.get(),
            retried: target.faults.retried.load(Ordering::Relaxed),
            paused: target
                .nics
                .iter()
                .filter(|nic| nic.health.is_paused())
                .map(|nic| nic.name.to_string())
                .collect(),
        };
        targets.map(state).collect()
    }
}

/// A half to one and a half times `delay`, by chance: so that those who failed together do not come back
/// together. (The chance is splitmix64 of `seed`.)
fn jitter(delay: u64, seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    delay / 2 + (mixed ^ (mixed >> 31)) % delay.max(1)
}
