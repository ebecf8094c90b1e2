//! OnError: what becomes of a request that failed on the host, per direction, and the status that shows it. It owns the
//! policies, the iostatus and the event; the device does what they say.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::accounting::RequestKind;
use crate::error::BlockError;
use crate::event::{self, BlockEvent};

/// How often one device tells of errors that do not stop it, at most.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// What is done about failed requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnErrorPolicy {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// Stop when the host is out of space, else report.
    Enospc,
    /// The device stops, and keeps the request until it goes on.
    Stop,
    /// What a backend does by itself: report for reads, enospc for writes.
    Auto,
}

impl OnErrorPolicy {
    /// The policies by their names in options and commands.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("report", Self::Report),
        ("ignore", Self::Ignore),
        ("enospc", Self::Enospc),
        ("stop", Self::Stop),
        ("auto", Self::Auto),
    ];
}

/// What is done about one failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The device stops, and keeps the request until it goes on.
    Stop,
}

impl fmt::Display for ErrorAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        })
    }
}

/// Whether a device has stopped over an error. The first one sticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoStatus {
    /// It has not.
    Ok,
    /// The host was out of space.
    NoSpace,
    /// Anything else.
    Failed,
}

impl fmt::Display for IoStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::NoSpace => "nospace",
            Self::Failed => "failed",
        })
    }
}

/// The policies and the status of one backend; all threads share it.
pub(crate) struct OnError {
    policies: Mutex<Policies>,
    status: AtomicU8,
    last_event: Mutex<Option<Instant>>,
}

struct Policies {
    read: OnErrorPolicy,
    write: OnErrorPolicy,
}

impl Default for OnError {
    fn default() -> Self {
        Self {
            policies: Mutex::new(Policies { read: OnErrorPolicy::Report, write: OnErrorPolicy::Enospc }),
            status: AtomicU8::new(IoStatus::Ok as u8),
            last_event: Mutex::default(),
        }
    }
}

impl OnError {
    pub(crate) fn set_policies(&self, read: OnErrorPolicy, write: OnErrorPolicy) {
        *self.policies.lock().unwrap_or_else(PoisonError::into_inner) = Policies { read, write };
    }

    /// The policy of a direction, never `Auto`.
    pub(crate) fn policy(&self, is_read: bool) -> OnErrorPolicy {
        let policies = self.policies.lock().unwrap_or_else(PoisonError::into_inner);
        match (is_read, if is_read { policies.read } else { policies.write }) {
            (true, OnErrorPolicy::Auto) => OnErrorPolicy::Report,
            (false, OnErrorPolicy::Auto) => OnErrorPolicy::Enospc,
            (_, policy) => policy,
        }
    }

    pub(crate) fn status(&self) -> IoStatus {
        match self.status.load(Ordering::Acquire) {
            n if n == IoStatus::NoSpace as u8 => IoStatus::NoSpace,
            n if n == IoStatus::Failed as u8 => IoStatus::Failed,
            _ => IoStatus::Ok,
        }
    }

    pub(crate) fn reset_status(&self) {
        self.status.store(IoStatus::Ok as u8, Ordering::Release);
    }

    /// What is to be done about a request that failed. Errors that are the guest's own doing, and those of an empty
    /// drive, are always reported.
    pub(crate) fn action(&self, kind: RequestKind, error: BlockError) -> ErrorAction {
        let nospace = error == BlockError::NoSpace;
        // An operator has given the request up: it is to end.
        if error == BlockError::Host(libc::ECANCELED) {
            return ErrorAction::Report;
        }
        if !nospace && !matches!(error, BlockError::Host(_)) {
            return ErrorAction::Report;
        }
        match self.policy(kind == RequestKind::Read) {
            OnErrorPolicy::Ignore => ErrorAction::Ignore,
            OnErrorPolicy::Stop => ErrorAction::Stop,
            OnErrorPolicy::Enospc if nospace => ErrorAction::Stop,
            OnErrorPolicy::Enospc | OnErrorPolicy::Report | OnErrorPolicy::Auto => ErrorAction::Report,
        }
    }

    /// Shows what is being done: the status first, then the event. The device stops after this.
    pub(crate) fn show(
        &self,
        device: &str,
        node_name: Option<String>,
        kind: RequestKind,
        error: BlockError,
        action: ErrorAction,
    ) {
        let nospace = error == BlockError::NoSpace;
        if action == ErrorAction::Stop {
            let status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
            let ok = IoStatus::Ok as u8;
            let _ = self.status.compare_exchange(ok, status as u8, Ordering::AcqRel, Ordering::Acquire);
        }
        if action != ErrorAction::Stop && !self.may_tell_now() {
            return;
        }
        let (device, reason) = (device.to_owned(), error.to_string());
        let is_read = kind == RequestKind::Read;
        event::emit(BlockEvent::IoError { device, node_name, is_read, action, nospace, reason });
    }

    fn may_tell_now(&self) -> bool {
        let mut last = self.last_event.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if last.is_some_and(|last| now.duration_since(last) < EVENT_INTERVAL) {
            return false;
        }
        *last = Some(now);
        true
    }
}
