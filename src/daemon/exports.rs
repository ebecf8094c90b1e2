//! Exports: the disks that are served, by id.
//!
//! This file owns how a configuration becomes an export and how an export ends. It never sees a request.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockport_block::{BlockBackend, BlockError, Graph, OpenError, OpenResult, Permissions, RequestKind, Statistics};
use blockport_vhost::{
    Activation, ExportSettings, HandingOver, QueueFigures, SocketAddress, SocketFile, VhostUserBlkExport,
};
use nix::unistd::{Gid, Group};

use super::activation::AskMainThread;
use super::notices::{Notice, Notifier};
use super::objects::Objects;
use crate::metrics;
use crate::options::{self, ExportConfig};
use crate::takeover::sockets::{self, Sockets};

/// Larger logical blocks than this are unusual enough for a warning, in bytes.
const LOGICAL_BLOCK_SIZE_USUAL: u32 = 4096;

/// A disk that is served.
pub struct Export {
    /// Tells it from all others, of the same id too.
    number: u64,
    export: VhostUserBlkExport,
    iothreads: Vec<String>,
    /// Queue `n` is on the iothread at `n` modulo their number.
    queue_iothreads: Vec<String>,
}

/// A queue of an export.
pub struct ExportQueue<'a> {
    /// Its number, from 0.
    pub index: usize,
    /// The iothread that serves it.
    pub iothread: &'a str,
    /// What it has done.
    pub figures: QueueFigures,
}

impl Export {
    /// Its name.
    pub fn id(&self) -> &str {
        self.export.id()
    }

    /// The drive.
    pub fn backend(&self) -> &Arc<BlockBackend> {
        self.export.backend()
    }

    /// Its queues, in order, started or not.
    pub fn queues(&self) -> Vec<ExportQueue<'_>> {
        let iothreads = self.queue_iothreads.iter().cycle();
        let figures = self.export.queue_figures().into_iter().enumerate();
        figures.zip(iothreads).map(|((index, figures), iothread)| ExportQueue { index, iothread, figures }).collect()
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.export.is_connected()
    }

    /// What it offers.
    pub fn settings(&self) -> &ExportSettings {
        self.export.settings()
    }

    /// Where it is reached; see [`VhostUserBlkExport::listening`].
    pub fn listening(&self) -> Option<(&OwnedFd, Option<&SocketFile>)> {
        self.export.listening()
    }

    /// Stops serving, so that another process can go on.
    pub fn hand_over(&self, until: Instant) -> HandingOver {
        self.export.hand_over(until)
    }

    /// Whether it has stopped over an error, and keeps requests.
    pub fn is_stopped(&self) -> bool {
        self.export.is_stopped()
    }

    /// The same where nobody can be told of an error: the export is gone in any case.
    fn end_logged(self) {
        if let Err(error) = self.end() {
            tracing::error!("{error}");
        }
    }

    /// Stops serving, flushes, says what was done.
    ///
    /// # Errors
    /// The last flush failed.
    fn end(self) -> OpenResult {
        let (id, backend) = (self.id().to_owned(), self.backend().clone());
        drop(self.export);
        // An empty drive has nothing that could be lost: its medium was flushed when it was taken out.
        let flushed = match backend.flush_blocking() {
            Err(BlockError::NoMedium) => Ok(()),
            flushed => flushed,
        };
        log_statistics(&id, &backend);
        flushed.map_err(|error| OpenError(format!("export \"{id}\": the last flush failed: {error}")))
    }
}

/// All exports, in the order of their making.
#[derive(Default)]
pub struct Exports {
    list: Vec<Export>,
    /// Those that have lost their medium and their name, and serve their last front-end.
    revoked: Vec<Export>,
    last_number: u64,
    /// Whether those made from now on count how long requests take, without being told to.
    pub has_histograms: bool,
}

impl Exports {
    /// Opens one; it waits to begin.
    ///
    /// # Errors
    /// Its id is taken, what it names does not exist or cannot be used so, or its socket cannot be had.
    pub fn add(
        &mut self,
        config: ExportConfig,
        graph: &Graph,
        objects: &mut Objects,
        sockets: &mut Sockets,
        notifier: Notifier,
    ) -> OpenResult {
        let id = config.id.clone();
        let about = |error: OpenError| error.context(format_args!("export \"{id}\""));
        if self.find(&id).is_some() {
            return Err(about(OpenError("its id is taken by another export".into())));
        }
        self.last_number += 1;
        let export = start(self.last_number, config, graph, objects, sockets, notifier).map_err(about)?;
        if self.has_histograms {
            for kind in RequestKind::ALL {
                export.backend().set_latency_histogram(kind, Some(metrics::BOUNDARIES))?;
            }
        }
        self.list.push(export);
        Ok(())
    }

    /// Begins to serve front-ends of all that wait for it.
    pub fn begin(&self) {
        self.list.iter().for_each(|export| export.export.begin());
    }

    /// Ends one: requests under way are finished, a front-end that is connected is dropped. With `force` off, only if none
    /// is.
    ///
    /// # Errors
    /// There is none of that id, or a front-end is connected.
    pub fn remove(&mut self, id: &str, force: bool) -> OpenResult {
        let index = self.index_of(id)?;
        if !force && self.list[index].is_connected() {
            return Err(OpenError(format!("export '{id}' is in use: a front-end is connected")));
        }
        self.list.remove(index).end_logged();
        Ok(())
    }

    fn index_of(&self, id: &str) -> OpenResult<usize> {
        let index = self.list.iter().position(|export| export.id() == id);
        index.ok_or_else(|| OpenError(format!("Export '{id}' is not found")))
    }

    /// Takes an export's medium for good, and frees its id. A front-end that is connected keeps an empty drive until it
    /// leaves.
    ///
    /// # Errors
    /// There is none of that id, or an operation blocker stands against it; nothing has changed.
    pub fn revoke(&mut self, id: &str, graph: &Graph) -> OpenResult {
        let index = self.index_of(id)?;
        graph.drive_del(self.list[index].backend())?;
        let export = self.list.remove(index);
        match export.export.retire() {
            true => self.revoked.push(export),
            false => export.end_logged(),
        }
        Ok(())
    }

    /// Activates or inactivates the medium of the export of that number, as it asks for itself.
    ///
    /// # Errors
    /// It cannot be done, or somebody else uses the medium.
    pub fn set_active(&self, number: u64, active: bool) -> OpenResult {
        let all = || self.list.iter().chain(&self.revoked);
        let export = all().find(|export| export.number == number);
        let export = export.ok_or_else(|| OpenError::new("the export has ended"))?;
        // An empty drive has nothing that could be in the way.
        let Some(node) = export.backend().root() else { return Ok(()) };
        if active {
            return node.activate();
        }
        let other = |backend: &&Arc<BlockBackend>| !Arc::ptr_eq(backend, export.backend()) && !self.lets_go(backend);
        match node.backends_above().iter().find(other) {
            Some(user) => Err(OpenError(format!("node \"{}\" is used by \"{}\", too", node.name(), user.label()))),
            None => node.inactivate(),
        }
    }

    /// Whether this drive's export lets its medium become inactive now.
    pub fn lets_go(&self, backend: &Arc<BlockBackend>) -> bool {
        let mut all = self.list.iter().chain(&self.revoked);
        all.any(|export| Arc::ptr_eq(export.backend(), backend) && export.export.lets_inactivate())
    }

    /// Has an export go on that has stopped over an error; one that has not, does.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn resume(&self, id: &str) -> OpenResult {
        self.list[self.index_of(id)?].export.resume();
        Ok(())
    }

    /// Answers what an export keeps over an error; one that keeps nothing stays as it is.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn give_kept_up(&self, id: &str) -> OpenResult {
        self.list[self.index_of(id)?].export.give_kept_up();
        Ok(())
    }

    /// Forgets an export that has ended by itself. Its id, unless that was free already.
    pub fn ended(&mut self, number: u64) -> Option<String> {
        if let Some(index) = self.revoked.iter().position(|export| export.number == number) {
            self.revoked.remove(index).end_logged();
            return None;
        }
        let index = self.list.iter().position(|export| export.number == number)?;
        let export = self.list.remove(index);
        let id = export.id().to_owned();
        export.end_logged();
        Some(id)
    }

    /// Ends all of them.
    ///
    /// # Errors
    /// A last flush failed; all have ended nevertheless.
    pub fn end(&mut self) -> OpenResult {
        let mut result = Ok(());
        for export in self.list.drain(..).chain(self.revoked.drain(..)) {
            if let Err(error) = export.end() {
                tracing::error!("{error}");
                result = Err(error);
            }
        }
        result
    }

    /// The one of that id.
    pub fn find(&self, id: &str) -> Option<&Export> {
        self.list.iter().find(|export| export.id() == id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Export> {
        self.list.iter()
    }

    /// Whether a front-end still uses one that was revoked.
    pub fn has_revoked(&self) -> bool {
        !self.revoked.is_empty()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty() && self.revoked.is_empty()
    }

    /// The ids of those whose queues are on this iothread.
    pub fn users_of(&self, iothread: &str) -> Vec<&str> {
        let all = self.list.iter().chain(&self.revoked);
        all.filter(|export| export.iothreads.iter().any(|id| id == iothread)).map(Export::id).collect()
    }
}

fn start(
    number: u64,
    config: ExportConfig,
    graph: &Graph,
    objects: &mut Objects,
    sockets: &mut Sockets,
    notifier: Notifier,
) -> OpenResult<Export> {
    let node =
        graph.find(&config.node_name).ok_or_else(|| OpenError(format!("there is no node \"{}\"", config.node_name)))?;
    if config.writable && node.is_read_only() {
        return Err(OpenError(format!("it is writable, but node \"{}\" is read-only", node.name())));
    }
    if !config.allow_inactive {
        node.activate()?;
    }
    let (iothreads, remotes) = objects.remotes(&config.queue_mapping.iothreads)?;
    let remotes = config.queue_mapping.spread(remotes);
    let queue_iothreads = config.queue_mapping.spread(iothreads.clone());
    let address = socket_address(&config.socket)?;
    let backend = graph.create_backend(&config.id);
    backend.set_block_size(config.logical_block_size);
    backend.insert(node, Permissions::device(config.writable))?;
    let settings = export_settings(&config);
    if settings.logical_block_size > LOGICAL_BLOCK_SIZE_USUAL {
        let size = settings.logical_block_size;
        tracing::warn!("export \"{}\": Linux and firmware may refuse blocks of {size} bytes", settings.id);
    }
    let activation = config.allow_inactive.then(|| Activation {
        activator: Box::new(AskMainThread { number, notifier: notifier.clone() }),
        hand_over: config.hand_over,
    });
    let on_end = Box::new(move || notifier.send(Notice::ExportEnded(number)));
    let (endpoint, resumed) = sockets.open_export(&config.id, &address)?;
    let (resumed, statistics) = sockets::split(resumed);
    backend.count_on(Statistics::from_numbers(&statistics));
    if resumed.as_ref().is_some_and(|(image, _)| image.has_rings())
        && let Some(root) = backend.root()
    {
        // Requests will come without a ring that starts.
        root.activate()?;
    }
    let export = VhostUserBlkExport::start(backend, settings, remotes, endpoint, activation, resumed, on_end);
    let export = export.map_err(OpenError::new)?;
    Ok(Export { number, export, iothreads, queue_iothreads })
}

/// What an export offers by its configuration.
pub fn export_settings(config: &ExportConfig) -> ExportSettings {
    ExportSettings {
        id: config.id.clone(),
        num_queues: config.num_queues,
        writable: config.writable,
        logical_block_size: config.logical_block_size,
        serial: config.serial.clone(),
        seg_max: config.seg_max,
        packed: config.packed,
        queue_size_max: config.queue_size_max,
        writethrough: config.writethrough,
        on_read_error: config.on_read_error,
        on_write_error: config.on_write_error,
        stop_timeout: (config.stop_timeout_ms > 0).then(|| Duration::from_millis(config.stop_timeout_ms)),
    }
}

fn log_statistics(id: &str, backend: &Arc<BlockBackend>) {
    let statistics = backend.statistics();
    let of = |kind| statistics.of(kind).operations;
    tracing::info!(
        "export {id}: {} reads, {} writes, {} flushes, {} discards, {} write-zeroes, {} failed",
        of(RequestKind::Read),
        of(RequestKind::Write),
        of(RequestKind::Flush),
        of(RequestKind::Discard),
        of(RequestKind::WriteZeroes),
        statistics.failed()
    );
}

/// The address with the number of its group.
///
/// # Errors
/// There is no such group.
pub fn socket_address(address: &options::SocketAddress) -> OpenResult<SocketAddress> {
    Ok(match address {
        options::SocketAddress::Fd(fd) => SocketAddress::Fd(*fd),
        options::SocketAddress::Abstract { name, tight } => {
            SocketAddress::Abstract { name: name.clone(), tight: *tight }
        }
        options::SocketAddress::Unix { path, mode, group } => {
            let group = group.as_deref().map(group_id).transpose()?;
            SocketAddress::Unix { path: path.clone(), mode: *mode, group }
        }
    })
}

/// A group by name or number.
fn group_id(name: &str) -> OpenResult<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(Gid::as_raw(group.gid)),
        Ok(None) => Err(OpenError(format!("there is no group \"{name}\""))),
        Err(error) => Err(OpenError(format!("group \"{name}\": {error}"))),
    }
}
