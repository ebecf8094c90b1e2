//! The main loop: waits for notices of other threads and for clients of monitors, and carries out commands one at a time.
//!
//! This file owns the order of a turn. With nothing to do it costs nothing.

use blockport_block::{OpenError, OpenResult};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use std::time::Duration;

use super::notices::Notice;
use super::{Daemon, End};
use crate::metrics;
use crate::monitor::events::ExportDeleted;
use crate::monitor::{Source, dispatch};
use crate::takeover::give::Control;

impl Daemon {
    /// Serves until something ends it; says what.
    pub(super) fn serve(&mut self) -> End {
        loop {
            let (ready, readers) = self.wait();
            self.heed_notices();
            for source in ready {
                self.monitors.ready(source, &mut self.chardevs);
            }
            for (session, mut request) in self.monitors.requests() {
                let negotiated = self.monitors.session(session).and_then(|session| session.negotiate(&mut request));
                let result = negotiated.unwrap_or_else(|| dispatch::run(self, &mut request));
                if let Some(session) = self.monitors.session(session) {
                    session.answer(request.id, result);
                }
            }
            self.monitors.sweep();
            self.serve_figures(&readers);
            if self.end.is_none() {
                self.serve_control();
            }
            if let Some(end) = self.end {
                return end;
            }
        }
    }

    /// Waits until there is something to do. Returns the sources that are ready: of monitors and of those who read figures.
    fn wait(&self) -> (Vec<Source>, Vec<metrics::Source>) {
        let sources = self.monitors.sources(&self.chardevs);
        let readers = self.metrics.sources();
        let mut fds = vec![PollFd::new(self.notices.as_fd(), PollFlags::POLLIN)];
        fds.extend(sources.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)));
        fds.extend(readers.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)));
        // Looked at in every turn, whatever woke it.
        let control = self.control.iter().flat_map(Control::descriptors);
        fds.extend(control.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = match self.metrics.timeout() {
            _ if self.monitors.has_work() => PollTimeout::ZERO,
            // Rounded up, as what is due in less than the unit is not due yet.
            Some(time) => PollTimeout::try_from(time + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        // An interrupted wait is a turn in which nothing was ready.
        let _ = poll(&mut fds, timeout);
        let mut ready = fds.iter().skip(1).map(|fd| fd.any().unwrap_or(true));
        let of_monitors = sources.iter().zip(&mut ready).filter(|(_, ready)| *ready).map(|((source, ..), _)| *source);
        let of_monitors = of_monitors.collect();
        let of_readers = readers.iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, ..), _)| *source);
        (of_monitors, of_readers.collect())
    }

    fn serve_figures(&mut self, ready: &[metrics::Source]) {
        let mut metrics = std::mem::take(&mut self.metrics);
        metrics.serve(ready, || metrics::collect::page(self));
        self.metrics = metrics;
    }

    /// Waits until the first client of a character device has come, or the daemon is told to end.
    pub(super) fn await_client(&self, chardev: &str) -> OpenResult {
        let Some(listener) = self.chardevs.find(chardev).and_then(|chardev| chardev.listener()) else { return Ok(()) };
        let mut fds = [PollFd::new(listener, PollFlags::POLLIN), PollFd::new(self.notices.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[0].any() == Some(true) => return Ok(()),
                Ok(_) => return Err(OpenError(format!("chardev \"{chardev}\": told to end before a client came"))),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(OpenError(format!("chardev \"{chardev}\": {error}"))),
            }
        }
    }

    fn heed_notices(&mut self) {
        for notice in self.notices.take() {
            match notice {
                Notice::Event(event) => self.raise(event),
                Notice::Signal(signal) => self.end = Some(End::Signal(signal)),
                Notice::SetActive { number, active, answer } => {
                    // Whoever asked may have given up.
                    let _ = answer.send(self.exports.set_active(number, active));
                }
                Notice::ExportEnded(number) => {
                    // A command may have removed it meanwhile.
                    if let Some(id) = self.exports.ended(number) {
                        self.raise(ExportDeleted { id });
                    }
                    if self.exports.is_empty() && self.monitors.is_empty() {
                        self.end = Some(End::NothingLeft);
                    }
                }
            }
        }
    }
}
