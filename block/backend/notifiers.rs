//! Notifiers: who wants to know what happens to a backend's medium and its AioContexts. They stay with the backend,
//! whichever medium comes and goes.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{BlockBackend, lock};
use crate::aio::AioRemote;

/// What has happened, or is about to. Told on the control thread.
pub enum BackendNotice {
    /// A medium was put in.
    InsertRoot,
    /// The medium is about to be taken out; it is still there.
    RemoveRoot,
    /// The device's requests may come from this context from now on.
    ContextAttached(AioRemote),
    /// The device's requests are about to come no more from this context. Drained.
    ContextDetaching(AioRemote),
}

type Callback = Arc<dyn Fn(&BackendNotice) + Send + Sync>;

#[derive(Default)]
pub(super) struct Notifiers(Mutex<Vec<(u64, Callback)>>);

impl Notifiers {
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// Tells everyone, in the order in which they came. They may leave meanwhile, but not call back.
    pub(super) fn notify(&self, notice: &BackendNotice) {
        let callbacks: Vec<Callback> = lock(&self.0).iter().map(|(_, callback)| callback.clone()).collect();
        callbacks.iter().for_each(|callback| callback(notice));
    }
}

/// Wants to be told until it is dropped.
pub struct Notifier {
    notifiers: Weak<Notifiers>,
    number: u64,
}

impl Drop for Notifier {
    fn drop(&mut self) {
        if let Some(notifiers) = self.notifiers.upgrade() {
            notifiers.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(number, _)| *number != self.number);
        }
    }
}

impl BlockBackend {
    /// Has `callback` called at every notice until the answer is dropped.
    pub fn notify(&self, callback: impl Fn(&BackendNotice) + Send + Sync + 'static) -> Notifier {
        let mut list = lock(&self.notifiers.0);
        let number = list.last().map_or(0, |(number, _)| number + 1);
        list.push((number, Arc::new(callback)));
        Notifier { notifiers: Arc::downgrade(&self.notifiers), number }
    }
}
