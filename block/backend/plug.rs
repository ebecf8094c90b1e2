//! Plug: requests of one iothread that are held for a moment, so that those which lie next to each other go to the medium
//! as one, and all of them to the kernel at once. It owns those that are held; which go together is `merging.rs`'s to say.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::channel::BackendChannel;
use super::request::Parked;
use crate::accounting::RequestKind;
use crate::aio::TurnEnd;
use crate::child::ChildChannel;
use crate::driver::{BlockFuture, WriteFlags};
use crate::error::{BlockError, BlockResult};
use crate::iovec::IoVec;
use crate::merging::{Piece, Run, RunLimits, runs};

/// More are not held: putting runs together takes time that grows with their square.
const HELD_MAX: usize = 256;

/// Holds the requests that start at a channel, until it is dropped, or the loop's turn ends. Nests: the last one lets them
/// go.
#[must_use]
pub struct Plug {
    channel: Rc<BackendChannel>,
    /// Of plugs that have not ended by themselves.
    generation: u64,
}

impl Drop for Plug {
    fn drop(&mut self) {
        self.channel.unplug(self.generation);
    }
}

/// What a channel holds.
#[derive(Default)]
pub(super) struct Plugged {
    depth: Cell<u32>,
    generation: Cell<u64>,
    /// Whether the end of this turn is waited for.
    ends: Cell<bool>,
    held: RefCell<Vec<Held>>,
}

impl Plugged {
    pub(super) fn is_on(&self) -> bool {
        self.depth.get() > 0
    }
}

/// A request that is held.
struct Held {
    piece: Piece,
    iov: Vec<IoVec>,
    start: Parked,
    place: Rc<Place>,
}

/// Where a held request finds what becomes of it.
#[derive(Default)]
pub(super) struct Place(RefCell<PlaceState>);

#[derive(Default)]
enum PlaceState {
    /// Held, or part of a run that goes on.
    #[default]
    Empty,
    Waiting(Waker),
    /// It goes on by itself.
    Started(BlockFuture),
    Done(BlockResult),
}

impl Place {
    fn put(&self, state: PlaceState) {
        if let PlaceState::Waiting(waker) = self.0.replace(state) {
            waker.wake();
        }
    }

    /// What became of it: a request that goes on, which may be ready.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<BlockFuture> {
        match self.0.take() {
            PlaceState::Started(future) => Poll::Ready(future),
            PlaceState::Done(result) => Poll::Ready(BlockFuture::ready(result)),
            PlaceState::Empty | PlaceState::Waiting(_) => {
                self.0.replace(PlaceState::Waiting(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl BackendChannel {
    /// Holds the requests that start here from now on; see [`Plug`].
    pub fn plug(self: &Rc<Self>) -> Plug {
        let plugged = &self.plugged;
        plugged.depth.set(plugged.depth.get() + 1);
        self.set_gated();
        if !plugged.ends.replace(true) {
            self.context().at_turn_end(self.clone());
        }
        Plug { channel: self.clone(), generation: plugged.generation.get() }
    }

    fn unplug(&self, generation: u64) {
        let plugged = &self.plugged;
        if plugged.generation.get() != generation {
            return;
        }
        plugged.depth.set(plugged.depth.get() - 1);
        if plugged.depth.get() == 0 {
            self.set_gated();
            self.let_go();
        }
    }

    /// Adds a request to those that are held.
    pub(super) fn add_held(&self, piece: Piece, iov: &[IoVec], start: Parked) -> Rc<Place> {
        let place = Rc::<Place>::default();
        self.plugged.held.borrow_mut().push(Held { piece, iov: iov.to_vec(), start, place: place.clone() });
        if self.plugged.held.borrow().len() == HELD_MAX {
            self.let_go();
        }
        place
    }

    /// Starts what is held.
    pub(super) fn let_go(&self) {
        let held = self.plugged.held.take();
        if held.is_empty() {
            return;
        }
        let Some(root) = self.root() else {
            held.iter().for_each(|held| held.place.put(PlaceState::Done(Err(BlockError::NoMedium))));
            return;
        };
        let pieces: Vec<Piece> = held.iter().map(|held| held.piece).collect();
        let limits = RunLimits { bytes_max: root.limits().transfer_max(), buffers_max: root.limits().iov_max() };
        let mut held: Vec<Option<Held>> = held.into_iter().map(Some).collect();
        for Run { members, whole } in runs(&pieces, limits) {
            let members: Vec<Held> = members.into_iter().filter_map(|place| held[place].take()).collect();
            self.start_run(&root, whole, members);
        }
    }

    fn start_run(&self, root: &Rc<ChildChannel>, whole: Piece, members: Vec<Held>) {
        let flags = self.write_flags();
        let members = match <[Held; 1]>::try_from(members) {
            Ok([one]) => return one.place.put(PlaceState::Started((one.start)(root, flags))),
            Err(members) => members,
        };
        self.accounting.merged(whole.kind, members.len() - 1);
        let iov: Vec<IoVec> = members.iter().flat_map(|held| held.iov.iter().copied()).collect();
        let future = match whole.kind {
            RequestKind::Read => root.preadv(whole.offset, &iov),
            _ => root.pwritev(whole.offset, &iov, flags),
        };
        match future.try_ready() {
            Ok(Ok(())) => members.iter().for_each(|held| held.place.put(PlaceState::Done(Ok(())))),
            Ok(Err(_)) => {
                let root = root.clone();
                self.context().spawn(async move { one_by_one(&root, flags, members).await });
            }
            Err(future) => {
                let root = root.clone();
                self.context().spawn(async move {
                    match future.await {
                        Ok(()) => members.iter().for_each(|held| held.place.put(PlaceState::Done(Ok(())))),
                        Err(_) => one_by_one(&root, flags, members).await,
                    }
                });
            }
        }
    }
}

/// Does the members of a run that failed again, so that each has an outcome of its own.
async fn one_by_one(root: &Rc<ChildChannel>, flags: WriteFlags, members: Vec<Held>) {
    for held in members {
        let result = (held.start)(root, flags).await;
        held.place.put(PlaceState::Done(result));
    }
}

impl TurnEnd for BackendChannel {
    fn turn_end(&self) {
        let plugged = &self.plugged;
        plugged.ends.set(false);
        plugged.generation.set(plugged.generation.get() + 1);
        plugged.depth.set(0);
        self.set_gated();
        self.let_go();
    }
}
