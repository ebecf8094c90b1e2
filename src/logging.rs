//! The log: to standard error, by a thread of its own, so that a full disk or a pipe that nobody reads holds up no disk.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines that may wait to be written; more are dropped, and the daemon goes on.
const LINES_MAX: usize = 4096;

/// Starts logging, from level info on; BLOCKPORT_LOG says otherwise (`debug`, `warn`, `blockport_vhost=debug`). What was
/// logged is written when the guard is dropped. Not before the daemon has gone to the background: threads do not survive
/// that.
pub fn start() -> WorkerGuard {
    let filter = EnvFilter::try_from_env("BLOCKPORT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let builder = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX).thread_name("log");
    let (writer, guard) = builder.finish(std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colours)
        .with_target(false)
        .log_internal_errors(false)
        .init();
    guard
}
