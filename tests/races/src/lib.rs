//! Hand-offs between threads, each in every interleaving that the memory model allows. The protocols are the product's own
//! source, over loom's atomics; what stands around them here (a list behind a lock, an eventfd, a ring's index) is as
//! small as it can be. A model fails when a thread waits for something that has happened: loom calls that a deadlock.
//!
//! What loom does not do, and what follows: an access that is SeqCst counts as acquire and release only, so the protocols
//! use full fences, which it orders as the standard does; it knows no time, so whoever sleeps is woken or is lost.
#![cfg(test)]

mod sync {
    //! The atomics that `block/sync.rs` names, from loom.
    pub(crate) use loom::sync::atomic::Ordering;

    /// As loom's; its exchange of false may be a store, see the feature `without-exchange`.
    #[derive(Debug)]
    pub(crate) struct AtomicBool(loom::sync::atomic::AtomicBool);

    impl AtomicBool {
        pub(crate) fn new(value: bool) -> Self {
            Self(loom::sync::atomic::AtomicBool::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> bool {
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: bool, order: Ordering) {
            self.0.store(value, order);
        }

        pub(crate) fn swap(&self, value: bool, order: Ordering) -> bool {
            if cfg!(feature = "without-exchange") && !value {
                self.0.store(value, Ordering::Release);
                return true;
            }
            self.0.swap(value, order)
        }
    }

    /// The full fence of the hand-offs; see the feature `without-fence`.
    pub(crate) fn fence(order: Ordering) {
        if !cfg!(feature = "without-fence") {
            loom::sync::atomic::fence(order);
        }
    }
}

#[path = "../../../block/handoff.rs"]
mod handoff;

mod drain;
mod eventfd;
mod kicks;
mod mailbox;
mod task;
