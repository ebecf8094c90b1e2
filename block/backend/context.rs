//! The AioContext of a backend: where its own requests come from, those that no device makes: flushes of the control side,
//! reads and writes of tools. A device's queues have theirs, on as many contexts as they like; a move of the graph asks the
//! device, which may forbid it.

use std::sync::Arc;

use super::{BackendNotice, BlockBackend, lock};
use crate::aio::{AioRemote, Answer};
use crate::drained::Drained;
use crate::error::{OpenError, OpenResult};
use crate::node::connected_backends;

impl BlockBackend {
    /// Where its own requests come from, once that was set.
    pub fn aio_context(&self) -> Option<AioRemote> {
        lock(&self.home).clone()
    }

    /// Has the requests of this backend, and of every other one on the same graph, come from another context: all of
    /// them or none. Drains meanwhile. Control side.
    ///
    /// # Errors
    /// A device forbids it, or a driver cannot work there; nothing has changed.
    pub fn set_aio_context(self: &Arc<Self>, to: &AioRemote) -> OpenResult {
        let mut backends = self.root().map(|node| connected_backends(&node)).unwrap_or_default();
        if !backends.iter().any(|backend| Arc::ptr_eq(backend, self)) {
            backends.push(self.clone());
        }
        backends.retain(|backend| !backend.aio_context().is_some_and(|home| home.same(to)));
        for backend in &backends {
            if let Some(device) = backend.device() {
                device.may_move().map_err(|e| e.context(format_args!("\"{}\" stays where it is", backend.label)))?;
            }
        }
        let drained = Drained::new(backends);
        for (done, backend) in drained.backends().iter().enumerate() {
            if let Err(error) = backend.settle(to) {
                drained.backends()[..done].iter().for_each(|backend| backend.unsettle(to));
                return Err(error);
            }
        }
        for backend in drained.backends() {
            backend.leave_home();
            *lock(&backend.home) = Some(to.clone());
            backend.notifiers.notify(&BackendNotice::ContextAttached(to.clone()));
        }
        Ok(())
    }

    /// Has the context keep a channel.
    fn settle(self: &Arc<Self>, to: &AioRemote) -> OpenResult {
        let backend = self.clone();
        let settled = to.call(move |context, answer: Answer<OpenResult>| {
            let channel = backend.channel(context);
            let number = backend.number;
            // Before the answer: the last reference must not be given up here.
            drop(backend);
            answer.give(channel.map(|channel| context.keep_local(number, channel)));
        });
        settled.unwrap_or_else(|| Err(OpenError(format!("\"{}\": the iothread has ended", self.label))))
    }

    fn unsettle(&self, from: &AioRemote) {
        let number = self.number;
        from.call(move |context, answer| {
            context.release_local(number);
            answer.give(());
        });
    }

    /// Gives the present context up.
    pub(super) fn leave_home(&self) {
        if let Some(home) = lock(&self.home).take() {
            self.notifiers.notify(&BackendNotice::ContextDetaching(home.clone()));
            self.unsettle(&home);
        }
    }
}
