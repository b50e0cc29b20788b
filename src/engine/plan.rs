//! From requests to spans: look up, merge, cut, place. All of it happens before anything is started,
//! so a bad request leaves nothing half-done.

use std::sync::Arc;

use super::region::{LocalRegion, RangeMap, Users};
use super::target::{Target, TargetId};
use super::{Refusal, Request};
use crate::error::{Code, Error, Result};

/// Neighbours contiguous on both sides are merged up to this length: long enough that the cost of an
/// operation no longer matters, short enough that one failure takes few requests with it.
const MERGE_UP_TO: u64 = 1 << 20;
/// Pieces are not cut over rails below this: the cost of one more operation outweighs the second NIC
/// (NIXL and aws-ofi-nccl use the same).
const SMALLEST_STRIPE: u64 = 128 << 10;
/// Cuts fall on multiples of this.
const STRIPE_ALIGN: u64 = 4096;

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
    pub group: u32,
    pub write: bool,
    pub local: u64,
    pub remote: u64,
    pub length: u64,
    /// Index of the target in the plan.
    pub target: u32,
    /// Indexes in the local map and the target's.
    pub local_region: usize,
    pub remote_region: usize,
    /// Spans it was cut into, once it is placed.
    pub spans: u32,
}

/// A plan under construction; its buffers are used again from one submission to the next.
#[derive(Default)]
pub(super) struct Plan {
    /// Length and cookie of every request.
    pub tasks: Vec<(u64, u64)>,
    pub groups: Vec<Group>,
    pub pieces: Vec<Piece>,
    pub targets: Vec<(TargetId, Arc<Target>)>,
    pub bytes: u64,
}

impl Plan {
    /// Looks up and merges `requests`. On success every piece has entered its local region; on an
    /// error nothing has.
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
        self.targets.clear();
        self.bytes = 0;
        let (mut local_hint, mut remote_hint, mut target) = (0, 0, 0);
        for (index, request) in requests.enumerate() {
            let mut add = || -> Result<(), Refusal> {
                if self.targets.get(target).is_none_or(|(id, _)| *id != request.target) {
                    target = match self.targets.iter().position(|(id, _)| *id == request.target) {
                        Some(known) => known,
                        None => {
                            self.targets.push((request.target, find(request.target)?));
                            self.targets.len() - 1
                        }
                    };
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

    /// Takes back what [`Self::build`] entered.
    pub fn abandon(&mut self, locals: &RangeMap<LocalRegion>, users: &Users) {
        for piece in self.pieces.drain(..) {
            users.leave(locals.at(piece.local_region).number.index);
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
        let mut done = 0;
        let target = target as u32;
        self.groups.push(Group { first: task, tasks: 1, bytes: length, write, target });
        self.tasks.push((length, request.cookie));
        self.bytes += length;
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
            let whole = part == length;
            if merge
                && whole
                && extend(
                    &mut self.pieces,
                    &mut self.groups,
                    request,
                    target,
                    *local_hint,
                    *remote_hint,
                )
            {
                return Ok(());
            }
            if !users.enter(ours.number) {
                let text = format!("our memory at {at:#x} is being unregistered");
                return Err(Error::new(Code::AddressNotRegistered, text).into());
            }
            self.pieces.push(Piece {
                group: self.groups.len() as u32 - 1,
                write,
                local: at,
                remote: there,
                length: part,
                target,
                local_region: *local_hint,
                remote_region: *remote_hint,
                spans: 1,
            });
            done += part;
        }
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
    let parts = length.div_ceil(stripe).max(1);
    length.div_ceil(parts).next_multiple_of(STRIPE_ALIGN)
}

/// Makes a request, whose group is the last one and still empty, part of the group before it, if it
/// continues that group's only piece on both sides.
fn extend(
    pieces: &mut [Piece],
    groups: &mut Vec<Group>,
    request: &Request,
    target: u32,
    local_region: usize,
    remote_region: usize,
) -> bool {
    let Some(piece) = pieces.last_mut() else { return false };
    let index = piece.group as usize;
    let fits = index + 2 == groups.len()
        && piece.write == request.write
        && piece.target == target
        && piece.local_region == local_region
        && piece.remote_region == remote_region
        && piece.local + piece.length == request.local
        && piece.remote + piece.length == request.remote
        && piece.length + request.length <= MERGE_UP_TO
        // The group has no other piece: a cut request is not merged with.
        && piece.length == groups[index].bytes;
    if fits {
        piece.length += request.length;
        groups[index].bytes += request.length;
        groups[index].tasks += 1;
        groups.pop();
    }
    fits
}
