//! Signals: the first one ends the daemon in order, the second one at once.
//!
//! This file owns a thread that only waits for signals, so that the second one works whatever the main thread is waiting
//! for.

use std::io::Write;

use blockport_block::{OpenError, OpenResult};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use super::notices::{Notice, Notifier};

/// The thread's stack; it does next to nothing.
const STACK_BYTES: usize = 64 << 10;

/// Blocks the signals that end the daemon, for this thread and all that it starts. Before any other thread exists.
///
/// # Errors
/// The system's.
pub fn block() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::new(&set)
}

/// Starts the thread.
///
/// # Errors
/// There is no room for one.
pub fn start(signals: SignalFd, notifier: Notifier) -> OpenResult {
    let wait = move || {
        if let Some(signal) = next(&signals) {
            notifier.send(Notice::Signal(signal));
        }
        if let Some(signal) = next(&signals) {
            let _ = writeln!(std::io::stderr(), "blockport: {signal} again: leaving at once");
            std::process::exit(1);
        }
    };
    let builder = std::thread::Builder::new().name("signals".into()).stack_size(STACK_BYTES);
    builder.spawn(wait).map(drop).map_err(|error| OpenError(format!("signals: {error}")))
}

/// Waits for a signal. `None`: the descriptor is of no use.
fn next(signals: &SignalFd) -> Option<Signal> {
    loop {
        match signals.read_signal() {
            Ok(Some(info)) => return Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok(),
            Ok(None) | Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}
