//! The daemon: what is created in which order, and how it ends. Steps run strictly as given; the end takes the reverse:
//! exports, nodes, iothreads. It never touches a request.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockport_block::aio::{AioRemote, AioSettings, Iothread, PollSettings};
use blockport_block::{BlockBackend, Graph, OpenError, OpenResult, Permissions, RequestKind};
use blockport_vhost::{ExportSettings, SocketAddress, VhostUserBlkExport};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{Gid, Group};

use crate::background::Background;
use crate::logging;
use crate::options::{self, Config, ExportConfig, IothreadConfig, Step, ThrottleGroupConfig};
use crate::sandbox::Sandbox;

/// The iothread of exports that name none.
const DEFAULT_IOTHREAD: &str = "main-io";

/// Larger logical blocks than this are unusual enough for a warning, in bytes.
const LOGICAL_BLOCK_SIZE_USUAL: u32 = 4096;

/// Runs a configuration until a signal ends it: finished, flushed, cleaned up. A second signal ends it at once.
///
/// # Errors
/// Something could not be created; whatever was created before has been taken down again.
pub fn run(config: Config) -> OpenResult {
    // Before any thread or ring exists.
    let background = config.daemonize.then(Background::fork).transpose().map_err(OpenError::new)?;
    // Blocked before the first thread starts, so that every thread inherits it and only the signalfd sees them.
    let signals = stop_signals().map_err(|e| OpenError(format!("signals: {e}")))?;
    raise_descriptor_limit();
    let _log = logging::start();
    let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|e| OpenError(format!("eventfd: {e}")))?;
    let ended = Arc::new(ended);
    let sandbox = Sandbox::prepare(&config)?;
    let mut daemon = Daemon::new(ended.clone());
    for step in config.steps {
        daemon.step(step)?;
    }
    let _pidfile = config.pidfile.map(Pidfile::write).transpose()?;
    sandbox.confine(false)?;
    daemon.exports.iter().for_each(VhostUserBlkExport::begin);
    if let Some(text) = &config.announcement {
        // A reader that went away is no reason to stop.
        let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    }
    if let Some(background) = background {
        background.ready().map_err(|e| OpenError(format!("going to the background: {e}")))?;
    }
    match wait(&signals, &ended) {
        Some(signal) => tracing::info!("{signal}: stopping"),
        None => tracing::info!("no export is left to be served: stopping"),
    }
    std::thread::spawn(move || {
        if let Some(signal) = wait_for_signal(&signals) {
            let _ = writeln!(std::io::stderr(), "blockport: {signal} again: leaving at once");
        }
        std::process::exit(1);
    });
    daemon.stop()
}

fn stop_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::new(&set)
}

/// Waits for a signal, or (`None`) for the last export to end by itself.
fn wait(signals: &SignalFd, ended: &EventFd) -> Option<Signal> {
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::NONE).is_err() {}
    match fds[0].any() {
        Some(true) => wait_for_signal(signals),
        _ => None,
    }
}

fn wait_for_signal(signals: &SignalFd) -> Option<Signal> {
    loop {
        match signals.read_signal() {
            Ok(Some(info)) => return Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok(),
            Ok(None) | Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// A queue takes three descriptors and a memory region one: raise the soft limit to the hard one.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("the limit on open files stays at {soft}: {error}");
    }
}

/// All that was created. Fields drop in the order of the end.
struct Daemon {
    exports: Vec<VhostUserBlkExport>,
    graph: Graph,
    iothreads: BTreeMap<String, Iothread>,
    /// Exports that front-ends can still use, and what is told when there is none.
    live_exports: Arc<AtomicUsize>,
    ended: Arc<EventFd>,
}

impl Daemon {
    fn new(ended: Arc<EventFd>) -> Self {
        Self {
            exports: Vec::new(),
            graph: Graph::default(),
            iothreads: BTreeMap::new(),
            live_exports: Arc::default(),
            ended,
        }
    }

    fn step(&mut self, step: Step) -> OpenResult {
        match step {
            Step::Iothread(config) => self.add_iothread(&config),
            Step::ThrottleGroup(config) => self.add_throttle_group(&config),
            Step::Blockdev(options) => self.graph.blockdev_add(options).map(drop),
            Step::Export(config) => {
                let id = config.id.clone();
                self.add_export(config).map_err(|e| e.context(format_args!("export \"{id}\"")))
            }
        }
    }

    fn add_throttle_group(&mut self, ThrottleGroupConfig { id, limits }: &ThrottleGroupConfig) -> OpenResult {
        self.check_object_id(id)?;
        self.graph.throttle_groups().create(id, *limits).map(drop)
    }

    /// Objects of all kinds share their names.
    fn check_object_id(&self, id: &str) -> OpenResult {
        match self.iothreads.contains_key(id) || self.graph.throttle_groups().find(id).is_some() {
            true => Err(OpenError(format!("object \"{id}\" exists already"))),
            false => Ok(()),
        }
    }

    fn add_iothread(&mut self, config: &IothreadConfig) -> OpenResult {
        let IothreadConfig { id, poll_max_ns, poll_grow, poll_shrink, aio_engine } = config;
        self.check_object_id(id)?;
        let polling = PollSettings { poll_max_ns: *poll_max_ns, poll_grow: *poll_grow, poll_shrink: *poll_shrink };
        let settings = AioSettings { engine: *aio_engine, polling };
        let iothread = Iothread::start(id, settings).map_err(|e| OpenError(format!("iothread \"{id}\": {e}")))?;
        self.iothreads.insert(id.clone(), iothread);
        Ok(())
    }

    fn add_export(&mut self, config: ExportConfig) -> OpenResult {
        if self.exports.iter().any(|export| export.id() == config.id) {
            return Err(OpenError("its id is taken by another export".into()));
        }
        let node = self
            .graph
            .find(&config.node_name)
            .ok_or_else(|| OpenError(format!("there is no node \"{}\"", config.node_name)))?;
        if config.writable && node.is_read_only() {
            return Err(OpenError(format!("it is writable, but node \"{}\" is read-only", node.name())));
        }
        let iothreads = self.remotes(&config.iothreads)?;
        let address = socket_address(&config.socket)?;
        let backend = self.graph.create_backend(&config.id);
        backend.set_block_size(config.logical_block_size);
        backend.insert(node, Permissions::device(config.writable))?;
        let settings = ExportSettings {
            id: config.id,
            num_queues: config.num_queues,
            writable: config.writable,
            logical_block_size: config.logical_block_size,
            serial: config.serial,
            seg_max: config.seg_max,
            queue_size_max: config.queue_size_max,
            writethrough: config.writethrough,
        };
        if settings.logical_block_size > LOGICAL_BLOCK_SIZE_USUAL {
            let size = settings.logical_block_size;
            tracing::warn!("export \"{}\": Linux and firmware may refuse blocks of {size} bytes", settings.id);
        }
        let on_end = self.on_end();
        let export =
            VhostUserBlkExport::start(backend, settings, iothreads, &address, on_end).map_err(OpenError::new)?;
        self.exports.push(export);
        Ok(())
    }

    /// What an export that serves one connected socket calls at its end: the last export ends the daemon.
    fn on_end(&self) -> Box<dyn FnOnce() + Send> {
        let (live, ended) = (self.live_exports.clone(), self.ended.clone());
        live.fetch_add(1, Ordering::Relaxed);
        Box::new(move || {
            if live.fetch_sub(1, Ordering::Relaxed) == 1 {
                let _ = ended.write(1);
            }
        })
    }

    /// The iothreads of these names; the shared default one if there are none.
    fn remotes(&mut self, names: &[String]) -> OpenResult<Vec<AioRemote>> {
        if names.is_empty() {
            if !self.iothreads.contains_key(DEFAULT_IOTHREAD) {
                self.add_iothread(&IothreadConfig::new(DEFAULT_IOTHREAD))?;
            }
            return self.remotes(&[DEFAULT_IOTHREAD.to_owned()]);
        }
        let find = |name: &String| {
            let iothread = self.iothreads.get(name);
            iothread.map(|t| t.remote().clone()).ok_or_else(|| OpenError(format!("there is no iothread \"{name}\"")))
        };
        names.iter().map(find).collect()
    }

    /// Stops serving, flushes, says what was done, and takes everything down.
    fn stop(mut self) -> OpenResult {
        let mut result = Ok(());
        for export in self.exports.drain(..) {
            let (id, backend) = (export.id().to_owned(), export.backend().clone());
            drop(export);
            if let Err(error) = backend.flush_blocking() {
                tracing::error!("export \"{id}\": the last flush failed: {error}");
                result = Err(OpenError(format!("export \"{id}\": the last flush failed: {error}")));
            }
            log_statistics(&id, &backend);
        }
        self.graph.clear();
        result
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

fn socket_address(address: &options::SocketAddress) -> OpenResult<SocketAddress> {
    Ok(match address {
        options::SocketAddress::Fd(fd) => SocketAddress::Fd(*fd),
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

/// The file with our process id, locked while we live and removed at the end.
struct Pidfile {
    path: PathBuf,
    file: File,
}

impl Pidfile {
    fn write(path: PathBuf) -> OpenResult<Self> {
        let refuse = |why: String| OpenError(format!("pidfile {}: {why}", path.display()));
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(|e| refuse(e.to_string()))?;
        file.try_lock().map_err(|_| refuse("another process holds it".into()))?;
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(|e| refuse(e.to_string()))?;
        // Its directory may be relative to where we were started, and we may leave there.
        Ok(Self { path: std::path::absolute(&path).unwrap_or(path), file })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Only our own: somebody may have put another one there.
        let ours = self.file.metadata().ok().zip(std::fs::metadata(&self.path).ok());
        if ours.is_some_and(|(ours, there)| (ours.dev(), ours.ino()) == (there.dev(), there.ino())) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
