//! From requests to spans: look up, merge, cut, place. All of it happens before anything is started,
//! so a bad request leaves nothing half-done.

use std::collections::HashMap;
use std::sync::Arc;

use super::peers::PeerIndex;
use super::region::{LocalRegion, RangeMap, Users};
use super::target::{Target, TargetId};
use super::{Refusal, Request};
use crate::error::{Code, Error, Result};

/// Neighbours contiguous on both sides are merged up to this length, where a NIC moves them: long enough that the cost
/// of an operation no longer matters, short enough that one failure takes few requests with it.
pub const MERGE: u64 = 1 << 20;
/// Pieces are not cut over rails below this, nor does less of short ones go to another rail: the cost of one
/// more operation, doorbell and look at a completion queue outweighs the second NIC (NIXL and aws-ofi-nccl use
/// the same).
const SMALLEST_STRIPE: u64 = 128 << 10;
/// So many targets of one submission are looked through; for more that would cost more than hashing.
const FEW: usize = 16;
/// Cuts fall on multiples of this.
const STRIPE_ALIGN: u64 = 4096;

/// A rail's load counts for one part in so many against what is to be placed: it is what nobody has seen
/// complete, and much of it may be done. (By `simulation sweep`: in full, the default is 0.80 of the best
/// setting at worst; with 2, 0.86; with 4, 0.91.)
pub(super) const LOAD_COUNTS: u64 = 4;

/// Tasks that are moved as one range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub first: u32,
    pub tasks: u32,
    pub bytes: u64,
    pub write: bool,
    /// Index of the target in the plan.
    pub target: u32,
}

/// A part of a group inside one local and one remote region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub local: u64,
    pub remote: u64,
    pub length: u64,
    /// The first of its group's tasks.
    pub first: u32,
    pub way: Way,
}

/// The rail of a run of pieces.
pub(super) struct Lane {
    pub way: Way,
    /// How long a piece may be on one rail.
    pub stripe: u64,
    /// See [`level`].
    pub level: u64,
    pub rail: usize,
    pub peer: PeerIndex,
    pub key: u64,
    /// What remote addresses are relative to.
    pub base: u64,
    /// Bytes until another rail is chosen.
    pub left: u64,
}

/// What pieces that may take the same path have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Indexes in the local map and the target's.
    pub local_region: u32,
    pub remote_region: u32,
    /// Index of the target in the plan.
    pub target: u32,
    pub write: bool,
}

/// A local region that neighbouring pieces use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub local_region: u32,
    /// Spans that the pieces became, once they are placed.
    pub spans: u32,
}

/// A plan under construction; its buffers are used again from one submission to the next.
#[derive(Default)]
pub(super) struct Plan {
    /// Length and cookie of every request.
    pub tasks: Vec<(u64, u64)>,
    pub groups: Vec<Group>,
    pub pieces: Vec<Piece>,
    /// Regions of the pieces, one entry for neighbours of the same; each has been entered once.
    pub uses: Vec<Use>,
    pub targets: Vec<(TargetId, Arc<Target>)>,
    /// Indexes of the targets after the first [`FEW`].
    further: HashMap<TargetId, usize>,
    pub bytes: u64,
}

impl Plan {
    /// Looks up and merges `requests`. On success the pieces' local regions have been entered; on an error
    /// none has.
    pub fn build(
        &mut self,
        requests: impl Iterator<Item = Request>,
        locals: &RangeMap<LocalRegion>,
        users: &Users,
        find: impl Fn(TargetId) -> Result<Arc<Target>>,
        merge: bool,
    ) -> Result<(), Refusal> {
        self.tasks.clear();
        self.groups.clear();
        self.pieces.clear();
        self.uses.clear();
        self.targets.clear();
        if !self.further.is_empty() {
            self.further.clear(); // goes over all its room
        }
        self.bytes = 0;
        let (mut local_hint, mut remote_hint, mut target) = (0, 0, 0);
        for (index, request) in requests.enumerate() {
            let mut add = || -> Result<(), Refusal> {
                if self.targets.get(target).is_none_or(|(id, _)| *id != request.target) {
                    target = self.target(request.target, &find)?;
                }
                self.add(
                    index as u32,
                    &request,
                    target,
                    locals,
                    users,
                    merge,
                    (&mut local_hint, &mut remote_hint),
                )
            };
            if let Err(refusal) = add() {
                self.abandon(locals, users);
                return Err(refusal.context(|| format!("request {index}")));
            }
        }
        Ok(())
    }

    /// The index of a target, which is found with `find` the first time.
    fn target(
        &mut self,
        id: TargetId,
        find: impl Fn(TargetId) -> Result<Arc<Target>>,
    ) -> Result<usize> {
        let few = &self.targets[..self.targets.len().min(FEW)];
        let known = few.iter().position(|(known, _)| *known == id);
        if let Some(known) = known.or_else(|| self.further.get(&id).copied()) {
            return Ok(known);
        }
        let new = self.targets.len();
        self.targets.push((id, find(id)?));
        if new >= FEW {
            self.further.insert(id, new);
        }
        Ok(new)
    }

    /// Takes back what [`Self::build`] entered.
    pub fn abandon(&mut self, locals: &RangeMap<LocalRegion>, users: &Users) {
        for used in self.uses.drain(..) {
            users.leave(locals.at(used.local_region as usize).number.index, 1);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn add(
        &mut self,
        task: u32,
        request: &Request,
        target: usize,
        locals: &RangeMap<LocalRegion>,
        users: &Users,
        merge: bool,
        (local_hint, remote_hint): (&mut usize, &mut usize),
    ) -> Result<(), Refusal> {
        let Request { write, local, remote, length, .. } = *request;
        if local.checked_add(length).is_none() || remote.checked_add(length).is_none() {
            return Err(Error::invalid(format!(
                "{length} bytes at {local:#x} (ours) and {remote:#x} (the target's) go past the end \
                 of the address space"
            ))
            .into());
        }
        let peer = &self.targets[target].1;
        let target = target as u32;
        let mut done = 0;
        self.tasks.push((length, request.cookie));
        if length == 0 {
            self.groups.push(Group { first: task, tasks: 1, bytes: 0, write, target });
        }
        while done < length {
            let (at, there) = (local + done, remote + done);
            let ours = locals.find(at, local_hint).ok_or_else(|| {
                Error::new(
                    Code::AddressNotRegistered,
                    format!(
                        "our memory at {at:#x} ({length} bytes from {local:#x}) is not registered"
                    ),
                )
            })?;
            let theirs = peer.regions.find(there, remote_hint).ok_or_else(|| {
                let text = format!(
                    "{there:#x} ({length} bytes from {remote:#x}) is not registered at {}",
                    peer.name
                );
                Refusal::NotThere {
                    target: request.target,
                    error: Error::new(Code::AddressNotRegistered, text),
                }
            })?;
            let part = (length - done).min(ours.end - at).min(theirs.end - there);
            let way = Way {
                local_region: *local_hint as u32,
                remote_region: *remote_hint as u32,
                target,
                write,
            };
            if merge
                && part == length
                && extend(&mut self.pieces, &mut self.groups, request, way, ours.merge)
            {
                break;
            }
            if self.uses.last().is_none_or(|used| used.local_region != way.local_region) {
                if !users.enter(ours.number) {
                    let text = format!("our memory at {at:#x} is being unregistered");
                    return Err(Error::new(Code::AddressNotRegistered, text).into());
                }
                self.uses.push(Use { local_region: way.local_region, spans: 0 });
            }
            if done == 0 {
                self.groups.push(Group { first: task, tasks: 1, bytes: length, write, target });
            }
            self.pieces.push(Piece { local: at, remote: there, length: part, first: task, way });
            done += part;
        }
        self.bytes = self.bytes.saturating_add(length);
        Ok(())
    }

    /// How long a piece may be on one rail: with less work than rails, long pieces are cut so that
    /// every rail gets a share.
    pub fn stripe(&self, rails: usize) -> u64 {
        let share = self.bytes.div_ceil(rails.max(1) as u64);
        share.next_multiple_of(STRIPE_ALIGN).max(SMALLEST_STRIPE)
    }
}

/// The lengths that a piece of `length` is cut into by a stripe: equal, but for alignment and the
/// last.
pub(super) fn cut(length: u64, stripe: u64) -> u64 {
    if length <= stripe {
        return length;
    }
    let parts = length.div_ceil(stripe);
    length.div_ceil(parts).next_multiple_of(STRIPE_ALIGN)
}

/// How much at least goes to a rail before another is chosen, if the first piece has `length`: a long one may
/// be alone.
pub(super) fn run(length: u64) -> u64 {
    if length < SMALLEST_STRIPE / 2 { SMALLEST_STRIPE } else { length }
}

/// What each of these rails will have to do when `bytes` more are spread evenly.
pub(super) fn level(rails: &[u16], loads: &[u64], bytes: u64) -> u64 {
    let now: u64 = rails.iter().map(|&rail| loads[usize::from(rail)]).sum();
    (now + bytes).div_ceil(rails.len() as u64)
}

/// The rail with the least to do; of equals, the first from `home` on.
pub(super) fn least_loaded(rails: &[u16], home: usize, loads: &[u64]) -> usize {
    let (before, from) = rails.split_at(home % rails.len());
    let rails = from.iter().chain(before).map(|&rail| usize::from(rail));
    rails.min_by_key(|&rail| loads[rail]).expect("a region has rails")
}

/// Makes a request part of the last group, if it continues that group's only piece on both sides, up to a length.
fn extend(
    pieces: &mut [Piece],
    groups: &mut [Group],
    request: &Request,
    way: Way,
    longest: u64,
) -> bool {
    let (Some(piece), Some(group)) = (pieces.last_mut(), groups.last_mut()) else { return false };
    let fits = piece.way == way
        && piece.local + piece.length == request.local
        && piece.remote + piece.length == request.remote
        && piece.length + request.length <= longest
        // The group has no other piece: a cut request is not merged with. Nor is the piece another's.
        && piece.length == group.bytes
        && piece.first == group.first;
    if fits {
        piece.length += request.length;
        group.bytes += request.length;
        group.tasks += 1;
    }
    fits
}
