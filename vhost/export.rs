//! VhostUserBlkExport: one BlockBackend offered on one socket. It is the device model that the backend knows; it
//! outlives every connection, with the write cache's value and the statistics.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blockport_block::aio::{AioRemote, reserve_locals};
use blockport_block::{Attached, BlockBackend, BlockDevOps, OnErrorPolicy, OpenError, OpenResult};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_ID_BYTES};

use crate::config_space::{self, CONFIG_BYTES, RangeLimits, WRITEBACK_OFFSET, bit};
use crate::device_stop::DeviceStop;
use crate::handover::{Descriptors, ExportImage};
use crate::queue::{Counters, QueueFigures};
use crate::server::{HandingOver, Resumed, Server};
use crate::session::{Activation, Session};
use crate::socket::{Endpoint, SocketError, SocketFile};
use crate::virtio_blk::DeviceModel;
use crate::write_cache::WriteCache;

/// What an export offers. Fixed for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSettings {
    /// Its name in logs and messages.
    pub id: String,
    /// Virtqueues, 1 to 256.
    pub num_queues: u16,
    /// Whether the guest may write.
    pub writable: bool,
    /// In bytes: a power of two from 512 to 2 MiB.
    pub logical_block_size: u32,
    /// What the guest reads as the disk's serial; at most 20 bytes count.
    pub serial: String,
    /// The most data buffers in a request, at least 1.
    pub seg_max: u32,
    /// The largest ring a front-end may make: a power of two, at most 32768.
    pub queue_size_max: u16,
    /// Starts with the write cache off.
    pub writethrough: bool,
    /// Offers packed virtqueues besides split ones.
    pub packed: bool,
    /// What is done about reads that fail on the host.
    pub on_read_error: OnErrorPolicy,
    /// What is done about requests of all other kinds that fail on the host.
    pub on_write_error: OnErrorPolicy,
    /// How long requests are kept when the device has stopped over an error, before they are answered with it; `None`: for
    /// ever.
    pub stop_timeout: Option<Duration>,
}

/// Why an export could not start.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The backend.
    #[error(transparent)]
    Open(#[from] blockport_block::OpenError),
    /// What a process before us had cannot be gone on with.
    #[error("it cannot go on with what the process before us had: {0}")]
    Resume(String),
    /// The control thread.
    #[error("the control thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// What the sessions of an export share.
pub(crate) struct ExportState {
    pub(crate) settings: ExportSettings,
    pub(crate) backend: Arc<BlockBackend>,
    pub(crate) device: Arc<DeviceModel>,
    pub(crate) device_stop: Arc<DeviceStop>,
    /// The feature bits offered.
    pub(crate) features: u64,
    pub(crate) write_cache: WriteCache,
    /// What each queue counts, over all its starts.
    pub(crate) figures: Vec<Arc<Counters>>,
    /// `None`: the medium is always active.
    pub(crate) activation: Option<Activation>,
    /// Whether a ring runs, or is about to; only where the medium may be inactive.
    pub(crate) in_use: AtomicBool,
    ending: AtomicBool,
    iothreads: Vec<AioRemote>,
    /// Where its queues are found on their iothreads: this number and those that follow.
    first_local: u64,
    session: Mutex<Option<Arc<Session>>>,
}

impl ExportState {
    /// "export \"e0\"", for logs.
    pub(crate) fn name(&self) -> String {
        format!("export \"{}\"", self.settings.id)
    }

    /// Whether the export is being ended: nobody who could be waited for will answer.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// The iothread that serves a queue. Queues are spread evenly.
    pub(crate) fn remote(&self, queue: usize) -> &AioRemote {
        &self.iothreads[queue % self.iothreads.len()]
    }

    pub(crate) fn queue_number(&self, queue: usize) -> u64 {
        self.first_local + queue as u64
    }

    /// The config space as it is now.
    pub(crate) fn config(&self) -> [u8; CONFIG_BYTES] {
        let (settings, ranges) = (&self.settings, &self.device.ranges);
        config_space::config(settings, &self.backend, self.features, ranges, self.write_cache.value())
    }

    /// The same without the writeback byte, which the front-end sets itself. Waits for nobody.
    pub(crate) fn config_but_writeback(&self) -> [u8; CONFIG_BYTES] {
        config_space::config(&self.settings, &self.backend, self.features, &self.device.ranges, false)
    }

    /// A write to the config space: the writeback byte, if CONFIG_WCE was negotiated, and nothing else. It may come with
    /// the rest of its 32-bit word as it is, for front-ends whose guests write words (OpenVMM).
    pub(crate) fn set_config(&self, offset: u32, bytes: &[u8], features: u64) -> Result<(), String> {
        let config = self.config();
        let rest = config.get(WRITEBACK_OFFSET as usize + 1..WRITEBACK_OFFSET as usize + 4);
        let bytes = match bytes {
            [value, others @ ..] if offset == WRITEBACK_OFFSET && Some(others) == rest => std::slice::from_ref(value),
            _ => bytes,
        };
        match bytes {
            [value @ (0 | 1)] if offset == WRITEBACK_OFFSET && features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 => {
                let flushed = self.write_cache.set(*value == 1, &self.backend);
                flushed.map_err(|e| format!("the write cache stays on, as flushing it failed: {e}"))
            }
            [_] if offset == WRITEBACK_OFFSET => Err("writeback takes 0 or 1, after CONFIG_WCE was accepted".into()),
            _ => Err(format!("{} bytes at {offset:#x}: only writeback can be set", bytes.len())),
        }
    }

    /// The session of the connection being served.
    pub(crate) fn set_session(&self, session: Option<Arc<Session>>) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
    }
}

/// The device model, as the backend sees it. virtio-blk has no tray and no lock.
struct Device(std::sync::Weak<ExportState>);

impl Device {
    fn config_changed(&self) {
        let Some(export) = self.0.upgrade() else { return };
        let session = export.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(session) = session {
            session.config_changed();
        }
    }
}

impl BlockDevOps for Device {
    fn is_removable(&self) -> bool {
        true
    }

    fn change_media(&self, load: bool) -> OpenResult {
        // What was kept was meant for the medium that has gone.
        if !load && let Some(export) = self.0.upgrade() {
            export.device_stop.give_up();
        }
        self.config_changed();
        Ok(())
    }

    fn eject_request(&self, _force: bool) {}

    fn is_tray_open(&self) -> Option<bool> {
        None
    }

    fn is_medium_locked(&self) -> bool {
        false
    }

    fn may_move(&self) -> OpenResult {
        Err(OpenError::new("its queues run on the iothreads that it was started with"))
    }

    fn resize(&self) {
        self.config_changed();
    }

    // The backend's channels park what the queues submit meanwhile, so there is nothing to hold back here.
    fn drained_begin(&self) {}

    fn drained_poll(&self) -> bool {
        false
    }

    fn drained_end(&self) {}
}

/// Goes on with what a process before us had. The connection, if there was one.
fn resume(
    state: &Arc<ExportState>,
    (image, mut descriptors): (ExportImage, Descriptors),
) -> Result<Option<Resumed>, String> {
    let features = image.session.as_ref().and_then(|session| session.write_cache_features);
    state.write_cache.resume(image.write_cache, features, &state.backend);
    let Some(session) = &image.session else { return Ok(None) };
    let connection = UnixStream::from(descriptors.take(session.connection)?);
    let session = Session::resumed(state.clone(), session, &mut descriptors)?;
    Resumed::new(session, connection).map(Some)
}

/// A BlockBackend offered as a virtio-blk device on a vhost-user socket. Dropping it stops serving: requests under way
/// are finished, the socket file is removed.
pub struct VhostUserBlkExport {
    /// First to go, so that nothing is served when the device is detached.
    server: Server,
    /// Where it is reached, for a process after us; `None`: on a connection that it got.
    listening: Option<(OwnedFd, Option<SocketFile>)>,
    /// The session of a process before us, until it goes on.
    resumed: Mutex<Option<Arc<Session>>>,
    _attached: Attached,
    state: Arc<ExportState>,
}

impl VhostUserBlkExport {
    /// Serves an open socket; front-ends that connect wait until [`VhostUserBlkExport::begin`]. With `activation`, the
    /// medium may be inactive while no ring runs. Queue `n` runs on
    /// `iothreads[n % iothreads.len()]`. `resumed`: what a process before us had, with its descriptors. `on_end` is
    /// called, on the control thread, when no front-end can come any more: after the one on a connected socket has left.
    ///
    /// # Errors
    /// The backend has a device already, the control thread could not be started, or the export cannot go on with what is
    /// to be resumed.
    ///
    /// # Panics
    /// If `iothreads` is empty.
    pub fn start(
        backend: Arc<BlockBackend>,
        settings: ExportSettings,
        iothreads: Vec<AioRemote>,
        endpoint: Endpoint,
        activation: Option<Activation>,
        resumed: Option<(ExportImage, Descriptors)>,
        on_end: Box<dyn FnOnce() + Send>,
    ) -> Result<Self, ExportError> {
        assert!(!iothreads.is_empty(), "an export needs an iothread");
        let features = config_space::features(&settings, backend.can_discard());
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let len = settings.serial.len().min(serial.len());
        serial[..len].copy_from_slice(&settings.serial.as_bytes()[..len]);
        let device = Arc::new(DeviceModel {
            serial,
            writable: settings.writable,
            can_discard: features & bit(VIRTIO_BLK_F_DISCARD) != 0 || !settings.writable,
            block_size: settings.logical_block_size,
            ranges: RangeLimits::new(&backend.limits(), settings.logical_block_size),
        });
        let first_local = reserve_locals(settings.num_queues.into());
        let numbers = first_local..first_local + u64::from(settings.num_queues);
        let device_stop =
            DeviceStop::new(iothreads.iter().cloned().cycle().zip(numbers).collect(), settings.stop_timeout);
        backend.set_on_error(settings.on_read_error, settings.on_write_error);
        let state = Arc::new(ExportState {
            write_cache: WriteCache::new(!settings.writethrough),
            device_stop,
            figures: (0..settings.num_queues).map(|_| Arc::default()).collect(),
            activation,
            in_use: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            first_local,
            session: Mutex::default(),
            device,
            features,
            iothreads,
            backend,
            settings,
        });
        let listening = match &endpoint {
            Endpoint::Listening(listener) => {
                Some((listener.share().map_err(ExportError::Thread)?, listener.file().cloned()))
            }
            Endpoint::Connected(_) => None,
        };
        let attached = state.backend.attach(Arc::new(Device(Arc::downgrade(&state))))?;
        let resumed =
            resumed.map(|resumed| resume(&state, resumed)).transpose().map_err(ExportError::Resume)?.flatten();
        let session = resumed.as_ref().map(|resumed| resumed.session().clone());
        let server = Server::start(state.clone(), endpoint, resumed, on_end).map_err(ExportError::Thread)?;
        Ok(Self { server, listening, resumed: Mutex::new(session), _attached: attached, state })
    }

    /// Whether its medium may become inactive now: it was agreed that it may, and no ring runs.
    pub fn lets_inactivate(&self) -> bool {
        self.state.activation.is_some() && !self.state.in_use.load(Ordering::SeqCst)
    }

    /// A session without a connection, for what calls its handlers one by one.
    #[doc(hidden)]
    pub fn new_session(&self) -> Arc<Session> {
        Session::new(self.state.clone())
    }

    /// Begins to serve front-ends.
    pub fn begin(&self) {
        if let Some(session) = self.resumed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            session.go_on();
        }
        self.server.begin();
    }

    /// Stops serving, with nothing in flight, so that another process can go on with it.
    pub fn hand_over(&self, until: Instant) -> HandingOver {
        self.server.hand_over(until)
    }

    /// Where it is reached: the listening socket with its file. `None`: on a connection that it got.
    pub fn listening(&self) -> Option<(&OwnedFd, Option<&SocketFile>)> {
        self.listening.as_ref().map(|(socket, file)| (socket, file.as_ref()))
    }

    /// What it offers.
    pub fn settings(&self) -> &ExportSettings {
        &self.state.settings
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.state.settings.id
    }

    /// Whether a front-end is connected at this moment.
    pub fn is_connected(&self) -> bool {
        self.state.session.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Takes no further front-end. When the one that is connected has left, `on_end` is called; without one, which is
    /// what false says, the export is to be dropped.
    pub fn retire(&self) -> bool {
        self.server.retire();
        self.is_connected()
    }

    /// Goes on after an error has stopped the device: what was kept is done again, in order, before anything new. Nothing
    /// happens if it has not stopped.
    pub fn resume(&self) {
        self.state.backend.reset_iostatus();
        self.state.device_stop.resume();
    }

    /// Answers with the error what is kept while the device has stopped.
    pub fn give_kept_up(&self) {
        self.state.device_stop.give_up();
    }

    /// Whether the device has stopped over an error, and keeps requests.
    pub fn is_stopped(&self) -> bool {
        self.state.device_stop.is_stopped()
    }

    /// What each queue has done, in their order. Waits for nobody.
    pub fn queue_figures(&self) -> Vec<QueueFigures> {
        self.state.figures.iter().map(|figures| figures.read()).collect()
    }

    /// The drive it offers.
    pub fn backend(&self) -> &Arc<BlockBackend> {
        &self.state.backend
    }
}

impl Drop for VhostUserBlkExport {
    fn drop(&mut self) {
        self.state.ending.store(true, Ordering::SeqCst);
    }
}
