//! The daemon's part of a take-over: what it tells a process that wants to go on with its disks, how it stops and, if that
//! process does not want them after all, how it goes on; and the order of a start that takes over.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockport_block::{OpenError, OpenResult};
use blockport_vhost::handover::Descriptors;
use blockport_vhost::{HandingOver, SocketFile};

use super::pidfile::Pidfile;
use super::{Daemon, End};
use crate::monitor::events::{Shutdown, ShutdownCause};
use crate::options::Step;
use crate::sandbox::Sandbox;
use crate::takeover::give::{Asked, Control};
use crate::takeover::message::{
    ExportOffer, ExportState, FileState, FromOld, GuestSettings, Offer, PidfileOffer, SocketOffer, State, VERSION,
};
use crate::takeover::take::{Taking, is_active, medium};

/// How long requests in flight may take to end.
const QUIET_WITHIN: Duration = Duration::from_secs(5);
/// How long the new process may take from then on.
const COMMIT_WITHIN: Duration = Duration::from_secs(10);

/// How long it may take, once it serves, to make everything its own.
const SETTLED_WITHIN: Duration = Duration::from_secs(5);

impl Daemon {
    /// Answers what is asked on the control socket. Waits only once everything has stopped.
    pub(super) fn serve_control(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        while let Some(asked) = control.asked() {
            match asked {
                Asked::Offer => match self.offer(&control) {
                    Ok((offer, descriptors)) => {
                        control.answer(&FromOld::Offer(offer), &descriptors);
                    }
                    Err(error) => control.refuse(&error.to_string()),
                },
                Asked::State => {
                    if let Some((sockets, pidfile)) = self.hand_over(&mut control) {
                        self.control = Some(control);
                        self.give_away(&sockets, pidfile);
                        self.end = Some(End::HandedOver);
                        return;
                    }
                }
            }
        }
        self.control = Some(control);
    }

    /// What can be taken over, with the descriptors of sockets and pidfile.
    fn offer(&self, control: &Control) -> OpenResult<(Offer, Vec<OwnedFd>)> {
        if self.exports.has_revoked() {
            return Err(OpenError::new("a front-end still uses an export that was deleted"));
        }
        let mut descriptors = Vec::new();
        let mut sockets = Vec::new();
        let mut add = |socket: OwnedFd, file: Option<&SocketFile>, tcp: Option<SocketAddr>| {
            descriptors.push(socket);
            sockets.push(SocketOffer { file: file.cloned(), tcp, descriptor: descriptors.len() - 1 });
            sockets.len() - 1
        };
        let mut exports = Vec::new();
        for export in self.exports.iter() {
            let about = |e: OpenError| e.context(format_args!("export \"{}\"", export.id()));
            let (length, disk) = medium(export).map_err(about)?;
            let socket = match export.listening() {
                Some((socket, file)) => Some(add(socket.try_clone().map_err(OpenError::new)?, file, None)),
                None => None,
            };
            let (id, settings) = (export.id().to_owned(), GuestSettings::from(export.settings()));
            let active = is_active(export);
            exports.push(ExportOffer { id, settings, length, disk, active, socket });
        }
        let chardevs = self.chardevs.iter().filter_map(|(_, chardev)| chardev.listening());
        for listener in chardevs.chain([control.listener()]) {
            add(listener.share().map_err(OpenError::new)?, listener.file(), None);
        }
        if let Some((socket, tcp)) = self.metrics.share().map_err(OpenError::new)? {
            add(socket, self.metrics.socket_file(), tcp);
        }
        let mut pidfile = None;
        if let Some(ours) = &self.pidfile {
            let (path, descriptor) = ours.share().map_err(OpenError::new)?;
            descriptors.push(descriptor);
            pidfile = Some(PidfileOffer { path, descriptor: descriptors.len() - 1 });
        }
        let program = env!("CARGO_PKG_VERSION").to_owned();
        Ok((Offer { version: VERSION, program, exports, sockets, pidfile }, descriptors))
    }

    /// Stops serving, tells everything, and waits for the other process to serve. Which socket files it keeps, and whether
    /// the pidfile; `None`: it does not, and everything goes on here.
    fn hand_over(&mut self, control: &mut Control) -> Option<(Vec<PathBuf>, bool)> {
        // What is flushed now need not be while nobody is served.
        for export in self.exports.iter() {
            let _ = export.backend().flush_blocking();
        }
        let until = Instant::now() + QUIET_WITHIN;
        let stopping: Vec<HandingOver> = self.exports.iter().map(|export| export.hand_over(until)).collect();
        let told = self.state(&stopping);
        let quiescent = told.and_then(|told| Ok((told, self.graph.quiesce_for_handover()?)));
        let (state, descriptors, quiescent) = match quiescent {
            Ok(((state, descriptors), quiescent)) => (state, descriptors, quiescent),
            Err(error) => {
                control.refuse(&error.to_string());
                return None;
            }
        };
        let told = control.answer(&FromOld::State(state), &descriptors);
        let committed = told.then(|| control.committed(Instant::now() + COMMIT_WITHIN)).flatten();
        match &committed {
            // Nothing of it is to be touched any more, by its end either.
            Some(_) => std::mem::forget((quiescent, stopping)),
            None => {
                tracing::warn!("the other process does not take over: going on");
                quiescent.take_back(&self.graph);
            }
        }
        committed
    }

    /// What is known of all exports once they have stopped.
    fn state(&self, stopping: &[HandingOver]) -> OpenResult<(State, Vec<OwnedFd>)> {
        let mut descriptors = Descriptors::default();
        let mut exports = Vec::new();
        for (export, stopping) in self.exports.iter().zip(stopping) {
            let id = export.id().to_owned();
            let stopped = stopping.image().map_err(|why| OpenError(format!("export \"{id}\": {why}")));
            let (image, its_descriptors) = stopped?;
            let count = its_descriptors.len();
            descriptors.append(its_descriptors);
            let statistics = export.backend().statistics().to_numbers();
            exports.push(ExportState { id, image, descriptors: count, statistics });
        }
        let files = self.graph.open_files()?;
        let states = files.iter().map(|file| FileState { flush_errno: file.flush_errno }).collect();
        let opened = files.into_iter().map(|file| file.descriptor);
        Ok((State { files: states, exports }, opened.chain(descriptors.into_vec()).collect()))
    }

    /// Another process serves: what it keeps is not ours to remove, and what it does not is.
    fn give_away(&mut self, sockets: &[PathBuf], pidfile: bool) {
        let exports = self.exports.iter().filter_map(|export| export.listening()?.1);
        let chardevs = self.chardevs.iter().filter_map(|(_, chardev)| chardev.listening()?.file());
        let control = self.control.iter().filter_map(|control| control.listener().file());
        for file in exports.chain(chardevs).chain(control).chain(self.metrics.socket_file()) {
            if !sockets.contains(&file.path) {
                file.remove();
            }
        }
        if pidfile && let Some(pidfile) = &mut self.pidfile {
            pidfile.give_away();
        }
    }

    /// Creates everything, takes over from the process at the other end, and serves. If that fails, nothing was touched
    /// that the other process needs.
    ///
    /// # Errors
    /// Something could not be created, or is not what the other process serves; that one goes on.
    pub(super) fn take_over(
        &mut self,
        steps: Vec<Step>,
        pidfile: Option<&Path>,
        sandbox: Sandbox,
        mut taking: Taking,
    ) -> OpenResult {
        let is_disk = |step: &Step| matches!(step, Step::Blockdev(_) | Step::Export(_));
        let (disks, others): (Vec<Step>, Vec<Step>) = steps.into_iter().partition(is_disk);
        others.into_iter().try_for_each(|step| self.carry_out(step))?;
        self.open_control()?;
        let keeps_pidfile = match pidfile {
            Some(path) => self.take_pidfile(path, &mut taking)?,
            None => false,
        };
        // From here on nobody is served until this is done, one way or the other.
        let files = taking.state(&mut self.sockets)?;
        self.graph.adopt_files(files);
        disks.into_iter().try_for_each(|step| self.carry_out(step))?;
        taking.check(&self.exports)?;
        sandbox.confine()?;
        taking.commit(&mut self.sockets, keeps_pidfile)?;
        self.begin();
        self.settle();
        // The other process waits for this, so that whoever watches it finds us in its place.
        drop(taking);
        Ok(())
    }

    /// The pidfile, which may be that of the process before us. Whether it is.
    fn take_pidfile(&mut self, path: &Path, taking: &mut Taking) -> OpenResult<bool> {
        let handed = taking.pidfile(path);
        let is_handed = handed.is_some();
        self.pidfile = Some(match handed {
            Some((path, file)) => Pidfile::adopt(path, file),
            None => Pidfile::write(path.to_owned())?,
        });
        Ok(is_handed)
    }

    /// We serve, and it is all ours.
    fn settle(&mut self) {
        self.graph.settle_locks();
        if let Some(pidfile) = &mut self.pidfile
            && let Err(error) = pidfile.settle()
        {
            tracing::warn!("{error}");
        }
        tracing::info!("taken over from the process before");
    }

    /// Another process serves what this one did: says so to the clients of monitors, and touches nothing of the disks.
    pub(super) fn leave(mut self) {
        self.raise(Shutdown { guest: false, reason: ShutdownCause::Quit });
        drop(self.pidfile.take());
        // Until the pidfile names the other one, whoever watches this process would take its end for ours.
        if let Some(control) = &mut self.control {
            control.wait_until_gone(Instant::now() + SETTLED_WITHIN);
        }
        // To close exports and nodes would end connections, write to images and drop locks.
        std::mem::forget(self);
    }
}
