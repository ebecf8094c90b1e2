//! Limits of a BlockBackend: which throttle group it is in, and what lets its requests go while somebody waits for their
//! end. The limits themselves are the group's (`throttle.rs`).

use std::sync::Arc;

use super::channel::BackendChannel;
use super::{BlockBackend, lock};
use crate::accounting::RequestKind;
use crate::error::OpenResult;
use crate::node::{Hurry, Node};
use crate::throttle::{
    Direction, ThrottleChannel, ThrottleGroup, ThrottleGroups, ThrottleLimits, ThrottleMember, Throttled,
};

/// See [`BlockBackend::hurry`].
#[must_use]
pub struct BackendHurry {
    _medium: Option<Hurry>,
    member: Option<Arc<ThrottleMember>>,
}

impl Drop for BackendHurry {
    fn drop(&mut self) {
        if let Some(member) = &self.member {
            member.exempt_end();
        }
    }
}

impl BlockBackend {
    /// Until what this returns is dropped, no limit holds requests back, neither the backend's own nor those of nodes,
    /// those that wait included: for whoever waits for requests to end, such as a ring's stop. Not on an iothread.
    pub fn hurry(&self) -> BackendHurry {
        let member = lock(&self.throttle).clone();
        if let Some(member) = &member {
            member.exempt_begin();
        }
        BackendHurry { _medium: self.root().map(Node::hurry), member }
    }

    /// The throttle group that it is in, if it is in one.
    pub fn throttle_group(&self) -> Option<Arc<ThrottleGroup>> {
        lock(&self.throttle).as_ref().map(|member| member.group().clone())
    }

    /// Sets limits while requests run, with the meaning of QEMU's command `block_set_io_throttle`. They are those of a
    /// group, and so of all its members: `group`, else the one that it is in, else one with its label for a name. A
    /// group that is not there is made, and goes with its last member. Without any limit it leaves its group, which
    /// keeps its own. Control side, never an iothread.
    ///
    /// # Errors
    /// The limits contradict each other; nothing has changed.
    pub fn set_io_limits(&self, groups: &ThrottleGroups, group: Option<&str>, limits: ThrottleLimits) -> OpenResult {
        let old = self.throttle_group();
        if limits.is_unlimited() {
            limits.check().map_err(crate::error::OpenError)?;
            self.join(None);
        } else {
            let name = group.map(str::to_owned).or(old.as_ref().map(|old| old.name().to_owned()));
            let group = groups.find_or_create(&name.unwrap_or_else(|| self.label.clone()), limits)?;
            if !old.is_some_and(|old| Arc::ptr_eq(&old, &group)) {
                self.join(Some(group));
            }
        }
        groups.forget_unused();
        Ok(())
    }

    fn join(&self, group: Option<Arc<ThrottleGroup>>) {
        let member = group.map(ThrottleMember::new);
        let old = std::mem::replace(&mut *lock(&self.throttle), member.clone());
        self.each_channel(move |context, channel| {
            channel.set_throttle(member.as_ref().map(|member| ThrottleChannel::new(member, context)));
        });
        // What waits in the old group goes now; nothing joins it there any more.
        if let Some(old) = old {
            old.exempt_begin();
        }
    }
}

/// What stands in the way of a request that starts.
pub(super) enum Gate {
    Open,
    /// A drained section is on.
    Quiesced,
    /// A limit.
    Limited(Throttled),
}

impl BackendChannel {
    /// Goes by the limits of another group from now on, or by none.
    fn set_throttle(&self, throttle: Option<ThrottleChannel>) {
        self.throttle.replace(throttle);
        self.set_gated();
    }

    /// Asked where the channel says that there may be something in the way.
    #[cold]
    pub(super) fn gate(&self, kind: RequestKind, offset: u64, bytes: u64) -> Gate {
        if self.quiesced.get() {
            return Gate::Quiesced;
        }
        if self.throttle.borrow().is_none() || self.refuses(kind, offset, bytes) {
            return Gate::Open;
        }
        let direction = match kind {
            RequestKind::Read => Direction::Read,
            RequestKind::Write | RequestKind::Discard | RequestKind::WriteZeroes => Direction::Write,
            RequestKind::Flush => return Gate::Open,
        };
        let throttle = self.throttle.borrow();
        throttle.as_ref().and_then(|throttle| throttle.admit(direction, bytes)).map_or(Gate::Open, Gate::Limited)
    }
}
