//! Rebuilding: every iothread makes its half of some backends' graphs anew, after the graph has changed. First all of
//! them prepare, then all go over; one that cannot leaves all as they were. Drained throughout.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{BackendChannel, BlockBackend};
use crate::aio::{AioContext, Answer};
use crate::error::OpenResult;

/// Has all channels of these backends made anew.
///
/// # Errors
/// A driver cannot work on one of the threads; all channels are what they were.
pub(crate) fn rebuild(backends: &[Arc<BlockBackend>]) -> OpenResult {
    match prepare(backends) {
        Ok(()) => {
            commit(backends);
            Ok(())
        }
        Err(error) => {
            abort(backends);
            Err(error)
        }
    }
}

/// Has all channels get ready for the graph as it is now. Then comes [`commit`], or, once the graph is what it was
/// before, [`abort`].
///
/// # Errors
/// A driver cannot work on one of the threads.
pub(crate) fn prepare(backends: &[Arc<BlockBackend>]) -> OpenResult {
    backends.iter().try_for_each(|backend| backend.prepare())
}

/// Has all channels go over to what they prepared.
pub(crate) fn commit(backends: &[Arc<BlockBackend>]) {
    for backend in backends {
        let medium = backend.medium.load(Ordering::Acquire);
        backend.each_channel(move |_, channel| channel.commit(medium));
    }
}

/// Has all channels forget what they prepared.
pub(crate) fn abort(backends: &[Arc<BlockBackend>]) {
    for backend in backends {
        let root = backend.reachable_root();
        let (epoch, label) = (backend.quiesce_epoch.load(Ordering::Acquire), backend.label.clone());
        backend.each_channel(move |context, channel| {
            channel.forget_prepared();
            // One that was made meanwhile knows only the graph that is no more.
            if channel.epoch() == epoch {
                let again = root.as_ref().map(|child| child.channel(context)).transpose();
                channel.set_root(again.unwrap_or_else(|error| {
                    tracing::error!("\"{label}\": {error}");
                    None
                }));
            }
        });
    }
}

impl BlockBackend {
    fn prepare(&self) -> OpenResult {
        let root = self.reachable_root();
        if root.as_ref().is_some_and(|child| !child.node().is_active()) {
            // Nothing can be made of it; its channels answer "no medium" until it is activated.
            return Ok(());
        }
        let number = self.number;
        for remote in self.remotes() {
            let root = root.clone();
            let prepared = remote.call(move |context: &AioContext, answer: Answer<OpenResult>| {
                let Some(channel) = context.local::<BackendChannel>(number) else { return answer.give(Ok(())) };
                let result = root.map(|child| child.channel(context)).transpose();
                answer.give(result.map(|root| channel.prepare(root)));
            });
            // A thread that has ended has no channel.
            prepared.unwrap_or(Ok(()))?;
        }
        Ok(())
    }
}

impl BackendChannel {
    fn prepare(self: &Rc<Self>, root: Option<Rc<crate::child::ChildChannel>>) {
        self.prepared.replace(Some(root));
    }

    fn commit(&self, medium: u64) {
        if let Some(root) = self.prepared.take() {
            self.set_root(root);
        }
        self.medium.set(medium);
    }

    fn forget_prepared(&self) {
        self.prepared.take();
    }
}
