//! Inflight: the region that remembers, across a crash, which requests are in flight. A virtqueue owns an
//! `Option<Inflight>` and tells it of every pop, push and publish. The protocol feature is not offered yet, so no value
//! of this type exists, and the calls compile to nothing.

/// The tracker of one virtqueue.
pub(crate) enum Inflight {}

impl Inflight {
    /// A descriptor chain was taken.
    pub(crate) fn popped(&mut self, _head: u16) {
        match *self {}
    }

    /// Its used element was written.
    pub(crate) fn pushed(&mut self, _head: u16) {
        match *self {}
    }

    /// The used index was published.
    pub(crate) fn published(&mut self, _used_idx: u16) {
        match *self {}
    }
}
