//! The daemon: what is created in which order, what lives on the main thread while it runs, and how it ends. Steps run
//! strictly as given; the end takes the reverse: exports, nodes, iothreads. It never touches a request.

mod activation;
mod affinity;
mod exports;
mod handover;
mod main_loop;
mod notices;
mod objects;
mod pidfile;
mod signals;

use std::io::Write;
use std::path::PathBuf;

use blockport_block::{Graph, OpenError, OpenResult};
use nix::sys::signal::Signal;

use crate::background::Background;
use crate::chardev::Chardevs;
use crate::logging;
use crate::metrics::Metrics;
use crate::monitor::Monitors;
use crate::monitor::events::{Event, Shutdown, ShutdownCause};
use crate::options::{
    ChardevConfig, ChardevKind, Config, ExportConfig, IothreadConfig, MetricsAddress, SecretConfig, Step,
    ThrottleGroupConfig,
};
use crate::sandbox::Sandbox;
use crate::takeover::give::Control;
use crate::takeover::sockets::Sockets;
use crate::takeover::take::Taking;
pub use exports::{Export, ExportQueue, Exports, export_settings, socket_address};
use notices::{Notice, Notices};
pub use objects::{IothreadObject, Objects};
use pidfile::Pidfile;

/// Runs a configuration until a signal or a command ends it: finished, flushed, cleaned up. A second signal ends it at
/// once.
///
/// # Errors
/// Something could not be created; whatever was created before has been taken down again.
pub fn run(config: Config) -> OpenResult {
    // Before any thread or ring exists.
    let background = config.daemonize.then(Background::fork).transpose().map_err(OpenError::new)?;
    // Blocked before the first thread starts, so that every thread inherits it and only the signalfd sees them.
    let blocked = signals::block().map_err(|e| OpenError(format!("signals: {e}")))?;
    raise_descriptor_limit();
    let _log = logging::start();
    let sandbox = Sandbox::prepare(&config)?;
    let notices = Notices::new().map_err(|e| OpenError(format!("eventfd: {e}")))?;
    signals::start(blocked, notices.notifier())?;
    let notifier = notices.notifier();
    blockport_block::event::set_sink(move |event| notifier.send(Notice::Event(event)));
    let mut daemon = Daemon::new(notices);
    daemon.control_path = config.control.control.clone();
    match &config.control.take_over {
        None => {
            daemon.open_metrics(config.metrics.as_ref())?;
            for step in config.steps {
                daemon.carry_out(step)?;
            }
            daemon.open_control()?;
            daemon.pidfile = config.pidfile.map(Pidfile::write).transpose()?;
            sandbox.confine()?;
            daemon.begin();
        }
        Some(path) => {
            let (taking, sockets) = Taking::begin(path, &config)?;
            daemon.sockets = sockets;
            daemon.open_metrics(config.metrics.as_ref())?;
            if let Err(error) = daemon.take_over(config.steps, config.pidfile.as_deref(), sandbox, taking) {
                // The other process goes on with all of it: nothing may be stopped, flushed or unlocked here.
                std::mem::forget(daemon);
                return Err(error.context("taking over failed, and the process that serves goes on"));
            }
        }
    }
    if let Some(text) = &config.announcement {
        // A reader that went away is no reason to stop.
        let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    }
    if let Some(background) = background {
        background.ready().map_err(|e| OpenError(format!("going to the background: {e}")))?;
    }
    match daemon.serve() {
        End::HandedOver => {
            tracing::info!("another process serves: leaving");
            daemon.leave();
            return Ok(());
        }
        End::Signal(signal) => tracing::info!("{signal}: stopping"),
        End::Quit => tracing::info!("a monitor said quit: stopping"),
        End::NothingLeft => tracing::info!("no export is left to be served: stopping"),
    }
    daemon.stop()
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

/// Why the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Signal(Signal),
    Quit,
    /// The last export has ended by itself, and nobody can make another.
    NothingLeft,
    /// Another process has taken over.
    HandedOver,
}

/// All that was created. Fields drop in the order of the end.
pub struct Daemon {
    /// The disks that are served.
    pub exports: Exports,
    /// The nodes.
    pub graph: Graph,
    /// What both refer to.
    pub objects: Objects,
    /// The monitors and their clients.
    pub monitors: Monitors,
    /// Where clients come from.
    pub chardevs: Chardevs,
    /// Who reads figures.
    metrics: Metrics,
    /// Where sockets come from.
    pub sockets: Sockets,
    /// Where another process can take over, and its path.
    control: Option<Control>,
    control_path: Option<PathBuf>,
    notices: Notices,
    end: Option<End>,
    /// Front-ends are served.
    begun: bool,
    pidfile: Option<Pidfile>,
}

impl Daemon {
    fn new(notices: Notices) -> Self {
        Self {
            exports: Exports::default(),
            graph: Graph::default(),
            objects: Objects::default(),
            monitors: Monitors::default(),
            chardevs: Chardevs::default(),
            metrics: Metrics::default(),
            sockets: Sockets::default(),
            control: None,
            control_path: None,
            notices,
            end: None,
            begun: false,
            pidfile: None,
        }
    }

    /// Creates something.
    ///
    /// # Errors
    /// It cannot be created; nothing has changed.
    pub fn carry_out(&mut self, step: Step) -> OpenResult {
        match step {
            Step::Iothread(config) => self.add_iothread(config),
            Step::ThrottleGroup(config) => self.add_throttle_group(&config),
            Step::Secret(config) => self.add_secret(&config),
            Step::Blockdev(options) => self.graph.blockdev_add(options).map(drop),
            Step::Export(config) => self.add_export(config),
            Step::Chardev(config) => self.add_chardev(&config),
            Step::Monitor(config) => self.monitors.add(config, &mut self.chardevs),
        }
    }

    /// Starts serving a disk.
    ///
    /// # Errors
    /// See [`Exports::add`].
    pub fn add_export(&mut self, config: ExportConfig) -> OpenResult {
        self.exports.add(config, &self.graph, &mut self.objects, &mut self.sockets, self.notices.notifier())?;
        if self.begun {
            self.exports.begin();
        }
        Ok(())
    }

    /// Begins to serve front-ends: those of the exports that there are, and from now on of new ones at once.
    fn begin(&mut self) {
        self.begun = true;
        self.exports.begin();
    }

    /// Opens the socket of those who read figures, if there is to be one. Before the exports.
    fn open_metrics(&mut self, address: Option<&MetricsAddress>) -> OpenResult {
        if let Some(address) = address {
            self.metrics = Metrics::open(address, &mut self.sockets)?;
            self.exports.has_histograms = true;
        }
        Ok(())
    }

    /// Opens the control socket, if there is to be one.
    fn open_control(&mut self) -> OpenResult {
        let path = self.control_path.take();
        self.control = path.map(|path| Control::open(&path, &mut self.sockets)).transpose()?;
        Ok(())
    }

    /// Opens a character device, and waits for its first client if it is told to.
    fn add_chardev(&mut self, config: &ChardevConfig) -> OpenResult {
        self.chardevs.add(config, &mut self.sockets)?;
        match &config.kind {
            ChardevKind::Listening { address, wait: true } => {
                tracing::info!("chardev \"{}\": waiting for a client at {address}", config.id);
                self.await_client(&config.id)
            }
            _ => Ok(()),
        }
    }

    /// Starts an iothread.
    ///
    /// # Errors
    /// Its id is taken, or the thread or its ring cannot be made.
    pub fn add_iothread(&mut self, config: IothreadConfig) -> OpenResult {
        self.check_object_id(&config.id)?;
        self.objects.add_iothread(config)
    }

    /// Makes a throttle group.
    ///
    /// # Errors
    /// Its id is taken, or its limits contradict each other.
    pub fn add_throttle_group(&mut self, ThrottleGroupConfig { id, limits }: &ThrottleGroupConfig) -> OpenResult {
        self.check_object_id(id)?;
        self.graph.throttle_groups().create(id, *limits).map(drop)
    }

    /// Makes a secret.
    ///
    /// # Errors
    /// Its id is taken, or its file cannot be read.
    pub fn add_secret(&mut self, config: &SecretConfig) -> OpenResult {
        self.check_object_id(&config.id)?;
        self.graph.secrets().add(&config.id, config.load()?)
    }

    /// Objects of all kinds share their names.
    fn check_object_id(&self, id: &str) -> OpenResult {
        let graph = &self.graph;
        let taken = graph.throttle_groups().find(id).is_some() || graph.secrets().find(id).is_some();
        match taken || self.objects.iothread(id).is_some() {
            true => Err(OpenError(format!("object \"{id}\" exists already"))),
            false => Ok(()),
        }
    }

    /// Ends the daemon as soon as this command is answered.
    pub fn quit(&mut self) {
        self.end = Some(End::Quit);
    }

    /// Tells every client of a monitor.
    pub fn raise(&mut self, event: impl Into<Event>) {
        self.monitors.event(&event.into());
    }

    /// Stops serving, flushes, says what was done, and takes everything down. Clients of monitors see their connections
    /// close when all is done.
    fn stop(mut self) -> OpenResult {
        let reason = if self.end == Some(End::Quit) { ShutdownCause::Quit } else { ShutdownCause::Signal };
        self.raise(Shutdown { guest: false, reason });
        let result = self.exports.end();
        self.graph.clear();
        result
    }
}
