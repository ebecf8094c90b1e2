//! Line: the requests that wait for a meter, and whose turn it is. Members take turns, request by request; within a
//! member and a direction it is first come, first served. The clock is passed in, never read; it wakes nobody.

use std::collections::VecDeque;

use super::limits::ThrottleLimits;
use super::meter::{Allowance, Direction, Meter, Nanoseconds};

/// Who shares a line, by number.
pub(crate) type MemberId = u64;

/// A request that waits; `T` is how the caller knows it.
struct Waiting<T> {
    bytes: u64,
    ticket: T,
}

/// The waiting requests of one member; at least one.
struct Member<T> {
    id: MemberId,
    /// When it was served last, or came: the lowest number is served next.
    turn: u64,
    /// Which way its last request went.
    last: Direction,
    /// By [`Direction`].
    waiting: [VecDeque<Waiting<T>>; 2],
}

impl<T> Member<T> {
    fn is_waiting(&self) -> bool {
        self.waiting.iter().any(|waiting| !waiting.is_empty())
    }
}

/// The outcome of looking whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next<T> {
    /// This one goes now; it has left the line and is counted.
    Goes(T),
    /// Nobody before this moment, and then perhaps this one.
    NotBefore(Nanoseconds, T),
    /// Nobody waits.
    Nobody,
}

/// A meter and those who wait for it.
pub(crate) struct Line<T> {
    meter: Meter,
    members: Vec<Member<T>>,
    next_turn: u64,
}

impl<T: Copy + PartialEq> Line<T> {
    pub(crate) fn new() -> Self {
        Self { meter: Meter::default(), members: Vec::new(), next_turn: 0 }
    }

    pub(crate) fn limits(&self) -> &ThrottleLimits {
        self.meter.limits()
    }

    pub(crate) fn set_limits(&mut self, limits: ThrottleLimits, now: Nanoseconds) {
        self.meter.set_limits(limits, now);
    }

    /// Counts a request that need not wait. False, and not counted: it must be added, behind those that wait.
    pub(crate) fn passes(&mut self, direction: Direction, bytes: u64, now: Nanoseconds) -> bool {
        self.members.is_empty() && self.meter.admits(direction, bytes, now)
    }

    /// What may go without asking; nothing while anybody waits.
    pub(crate) fn allowance(&self) -> Allowance {
        if self.members.is_empty() { self.meter.allowance() } else { Allowance::default() }
    }

    /// Counts what was done of an allowance.
    pub(crate) fn pour_many(&mut self, direction: Direction, operations: u64, bytes: u64, now: Nanoseconds) {
        self.meter.pour_many(direction, operations, bytes, now);
    }

    /// Counts a request that goes whatever the limits are.
    pub(crate) fn pour(&mut self, direction: Direction, bytes: u64, now: Nanoseconds) {
        self.meter.pour(direction, bytes, now);
    }

    /// Puts a request into the line; [`Line::next`] says when it goes.
    pub(crate) fn add(&mut self, id: MemberId, direction: Direction, bytes: u64, ticket: T) {
        let at = self.members.iter().position(|member| member.id == id).unwrap_or_else(|| {
            let turn = self.take_turn();
            self.members.push(Member { id, turn, last: direction.other(), waiting: Default::default() });
            self.members.len() - 1
        });
        self.members[at].waiting[direction as usize].push_back(Waiting { bytes, ticket });
    }

    fn take_turn(&mut self) -> u64 {
        self.next_turn += 1;
        self.next_turn
    }

    /// Whose turn it is. To be called again until nobody goes any more.
    pub(crate) fn next(&mut self, now: Nanoseconds) -> Next<T> {
        let mut soonest: Option<(Nanoseconds, T)> = None;
        for (at, direction) in self.first_of_each_direction().into_iter().flatten() {
            let Some(Waiting { bytes, ticket }) = self.members[at].waiting[direction as usize].front() else {
                continue;
            };
            let (bytes, ticket) = (*bytes, *ticket);
            let wait = self.meter.wait(direction, bytes, now);
            if wait.longest() == 0 {
                self.meter.pour(direction, bytes, now);
                self.serve(at, direction);
                return Next::Goes(ticket);
            }
            let moment = now.saturating_add(wait.longest());
            if soonest.is_none_or(|(before, _)| moment < before) {
                soonest = Some((moment, ticket));
            }
            // It is its turn, and it waits only for what both directions share: a stream of small requests the other
            // way must not take every bit of room before there is enough for this one.
            if wait.own == 0 {
                break;
            }
        }
        soonest.map_or(Next::Nobody, |(moment, ticket)| Next::NotBefore(moment, ticket))
    }

    /// For each direction the member that is served next, those with the older turn first.
    fn first_of_each_direction(&self) -> [Option<(usize, Direction)>; 2] {
        let first = |direction: Direction| {
            let waiting = self.members.iter().enumerate().filter(|(_, m)| !m.waiting[direction as usize].is_empty());
            waiting.min_by_key(|(_, member)| member.turn).map(|(at, _)| (at, direction))
        };
        let (read, write) = (first(Direction::Read), first(Direction::Write));
        let write_first = match (read, write) {
            // One member both ways: its directions take turns as well.
            (Some((read, _)), Some((write, _))) if read == write => self.members[read].last == Direction::Read,
            (Some((read, _)), Some((write, _))) => self.members[write].turn < self.members[read].turn,
            _ => false,
        };
        if write_first { [write, read] } else { [read, write] }
    }

    fn serve(&mut self, at: usize, direction: Direction) {
        let turn = self.take_turn();
        let member = &mut self.members[at];
        member.waiting[direction as usize].pop_front();
        member.turn = turn;
        member.last = direction;
        if !member.is_waiting() {
            self.members.swap_remove(at);
        }
    }

    /// Takes all requests of a member out and counts them: they go now.
    pub(crate) fn release(&mut self, id: MemberId, now: Nanoseconds) -> Vec<T> {
        let mut released = Vec::new();
        let Some(at) = self.members.iter().position(|member| member.id == id) else { return released };
        let member = self.members.swap_remove(at);
        for (waiting, direction) in member.waiting.into_iter().zip([Direction::Read, Direction::Write]) {
            for request in waiting {
                self.meter.pour(direction, request.bytes, now);
                released.push(request.ticket);
            }
        }
        released
    }

    /// Takes one request out, not counted.
    pub(crate) fn remove(&mut self, ticket: T) {
        for waiting in self.members.iter_mut().flat_map(|member| &mut member.waiting) {
            waiting.retain(|request| request.ticket != ticket);
        }
        self.members.retain(Member::is_waiting);
    }

    /// How many requests wait.
    pub(crate) fn len(&self) -> usize {
        self.members.iter().flat_map(|member| &member.waiting).map(VecDeque::len).sum()
    }
}
