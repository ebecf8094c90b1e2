//! The session with one front-end: what each message does to the state that vhost-user negotiates. It never touches a
//! ring itself: starting, stopping and changing one is asked of the queue's iothread (`session/rings.rs`).

mod activation;
mod config_news;
mod device_state;
mod handover;
mod inflight;
mod logging;
mod messages;
mod rings;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

use crate::config_space::{self, F_PROTOCOL_FEATURES, bit};
use crate::export::ExportState;
use crate::guest_memory::{GuestMemory, MemoryRegion, REGIONS_MAX};
use crate::notifier::can_be_polled;
use crate::virtqueue::{RingError, VirtQueue};
pub use activation::{Activation, Activator};
use config_news::ConfigNews;
use messages::{map_single, notifier};
use rings::{Addresses, SessionState, Vring};

/// Why a guest driver without VIRTIO_F_VERSION_1 is refused.
const LEGACY: &str = "VIRTIO_F_VERSION_1 is not accepted, and devices older than virtio 1.0 are not offered";

/// A session: its state and the export it is with.
pub struct Session {
    export: Arc<ExportState>,
    state: Mutex<SessionState>,
    /// Apart from the state: whoever sends news must not wait for a message being served.
    news: ConfigNews,
    /// Set when a handler of ours has refused a message, so that the error that comes back from the crate can be told
    /// from every other.
    refused: AtomicBool,
    /// Whether this connection has started a ring, or read the config, yet.
    rings_started: AtomicBool,
    config_read: AtomicBool,
}

/// A refusal with its reason for the log.
fn refuse(why: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(io::Error::other(why.to_string()))
}

impl Session {
    pub(crate) fn new(export: Arc<ExportState>) -> Arc<Self> {
        let vrings = (0..export.settings.num_queues).map(|_| Vring::default()).collect();
        Arc::new(Self {
            export,
            state: Mutex::new(SessionState { vrings, ..SessionState::default() }),
            news: ConfigNews::default(),
            refused: AtomicBool::new(false),
            rings_started: AtomicBool::new(false),
            config_read: AtomicBool::new(false),
        })
    }

    /// Whether the last error was a refusal of our own; asking resets it.
    pub(crate) fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::Relaxed)
    }

    /// Whether REPLY_ACK was negotiated.
    pub(crate) fn acknowledges(&self) -> bool {
        self.state().protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// Keeps the back-end channel; refused unless negotiated.
    pub(crate) fn set_backend_channel(&self, channel: Option<UnixStream>) -> bool {
        let negotiated = self.state().protocol_features & VhostUserProtocolFeatures::BACKEND_REQ.bits() != 0;
        let ok = negotiated && channel.is_some();
        if ok && let Some(channel) = channel {
            self.news.set_channel(channel);
        }
        ok
    }

    /// Tells the front-end that the config space has changed, where it has a way to be told. Does not wait.
    pub(crate) fn config_changed(&self) {
        self.warn_if_not_sent(self.news.changed(self.export.config_but_writeback()));
    }

    /// A ring runs from now on.
    fn ring_started(&self) {
        self.warn_if_not_sent(self.news.ring_starts(self.export.config_but_writeback()));
    }

    fn warn_if_not_sent(&self, sent: io::Result<()>) {
        if let Err(error) = sent {
            tracing::warn!("{}: the config change could not be sent: {error}", self.export.name());
        }
    }

    /// A refusal that is in the message's own reply.
    fn warn(&self, what: &str, why: &str) -> Error {
        tracing::warn!("{}: {what} refused: {why}", self.export.name());
        refuse(why)
    }

    /// Stops all rings: every request is finished, guest memory is not touched afterwards. Returns how many requests
    /// were in flight.
    pub fn stop_all(&self) -> usize {
        let mut state = self.state();
        let count = state.vrings.len();
        (0..count).map(|index| self.stop(&mut state, index).in_flight).sum()
    }

    fn state(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a handler and remembers whether it refused.
    fn handle<T>(&self, what: &str, handler: impl FnOnce(&mut SessionState) -> Result<T>) -> Result<T> {
        let result = handler(&mut self.state());
        if let Err(error) = &result {
            self.refused.store(true, Ordering::Relaxed);
            match error {
                Error::ReqHandlerError(why) => tracing::warn!("{}: {what} refused: {why}", self.export.name()),
                other => tracing::warn!("{}: {what} refused: {other}", self.export.name()),
            }
        }
        result
    }

    fn queue_index(&self, index: u32) -> Result<usize> {
        match usize::try_from(index) {
            Ok(index) if index < usize::from(self.export.settings.num_queues) => Ok(index),
            _ => Err(refuse(format_args!("queue {index} of {}, counted from 0", self.export.settings.num_queues))),
        }
    }
}

impl VhostUserBackendReqHandler for Session {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        // Deprecated by the specification; front-ends that send it mean nothing by it.
        Ok(())
    }

    fn reset_device(&self) -> Result<()> {
        self.handle("RESET_DEVICE", |state| {
            // Memory, protocol features, channel and descriptors stay: QEMU sends this at every guest reset.
            for index in 0..state.vrings.len() {
                self.stop(state, index);
                let vring = &mut state.vrings[index];
                vring.base = None;
                vring.enabled = state.features & bit(F_PROTOCOL_FEATURES) == 0;
            }
            if let Some(region) = &state.inflight {
                region.forget();
            }
            Ok(())
        })
    }

    fn get_features(&self) -> Result<u64> {
        Ok(self.export.features)
    }

    fn set_features(&self, features: u64) -> Result<()> {
        self.handle("SET_FEATURES", |state| self.change_features(state, features))
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.handle("SET_MEM_TABLE", |state| {
            let mapped: Result<Vec<_>> = regions
                .iter()
                .zip(files)
                .map(|(region, file)| {
                    let (guest, user) = (region.guest_phys_addr, region.user_addr);
                    MemoryRegion::map(guest, user, region.memory_size, region.mmap_offset, file)
                        .map(Arc::new)
                        .map_err(refuse)
                })
                .collect();
            let memory = GuestMemory::new(mapped?).map_err(refuse)?;
            self.change_memory(state, memory, true);
            Ok(None)
        })
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.handle("SET_VRING_NUM", |state| {
            let index = self.queue_index(index)?;
            let most = self.export.settings.queue_size_max;
            // Entries that it has no room for could not be found again.
            let most = state.inflight.as_ref().map_or(most, |region| region.queue_size().min(most));
            // §2.7: a power of two; §2.8.10.1: any size, in a packed ring.
            let packed = state.ring_features().packed;
            let fits = |size: &u16| (1..=most).contains(size) && (packed || size.is_power_of_two());
            let Some(size) = u16::try_from(num).ok().filter(fits) else {
                let what = if packed { "at least 1" } else { "a power of two" };
                return Err(refuse(format_args!("a ring of {num}: it must be {what}, at most {most}")));
            };
            let vring = &mut state.vrings[index];
            if vring.started && size != vring.size {
                return Err(refuse("the ring is running"));
            }
            vring.size = size;
            Ok(())
        })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        self.handle("SET_VRING_ADDR", |state| {
            let index = self.queue_index(index)?;
            let (memory, features) = (state.memory.clone(), state.ring_features());
            let vring = &mut state.vrings[index];
            let addresses = Addresses { desc: descriptor, avail: available, used };
            if vring.started {
                // QEMU sends it again when logging changes; the ring stays where it is.
                let same =
                    vring.addresses.is_some_and(|old| (old.desc, old.avail, old.used) == (descriptor, available, used));
                if !same {
                    return Err(refuse("the ring is running"));
                }
            }
            let layout = self.layout(vring.size, addresses);
            if vring.size > 0 {
                VirtQueue::new(memory, layout, features, 0).map_err(refuse)?;
            }
            vring.addresses = Some(addresses);
            self.keep_log_addr(state, index, flags, log, features.used_bytes(layout.size))
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.handle("SET_VRING_BASE", |state| {
            let features = state.ring_features();
            let vring = &mut state.vrings[self.queue_index(index)?];
            if vring.started {
                return Err(refuse("the ring is running"));
            }
            let size = if vring.size > 0 { vring.size } else { self.export.settings.queue_size_max };
            if !VirtQueue::is_base(features, size, base) {
                return Err(refuse(RingError::Base { base, size }));
            }
            vring.base = Some(base);
            Ok(())
        })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        self.handle("GET_VRING_BASE", |state| {
            let base = self.stop(state, self.queue_index(index)?).base;
            Ok(VhostUserVringState::new(index, base))
        })
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.handle("SET_VRING_KICK", |state| {
            let index = self.queue_index(index.into())?;
            if fd.as_ref().is_some_and(|file| !can_be_polled(file)) {
                return Err(refuse("the descriptor is no eventfd"));
            }
            let vring = &mut state.vrings[index];
            vring.kick = fd.map(|file| Arc::new(OwnedFd::from(file)));
            if vring.started {
                let kick = vring.kick.clone();
                self.on_queue(index, move |_, queue, answer| {
                    queue.set_kick(kick);
                    answer.give(());
                });
                return Ok(());
            }
            // Without PROTOCOL_FEATURES there is no SET_VRING_ENABLE: the ring starts enabled.
            if state.features & bit(F_PROTOCOL_FEATURES) == 0 {
                state.vrings[index].enabled = true;
            }
            if !self.rings_started.swap(true, Ordering::Relaxed) {
                let config_read = self.config_read.load(Ordering::Relaxed);
                let kept = state.inflight.as_ref().and_then(|region| region.write_cache());
                self.export.write_cache.first_start(config_read, kept, state.features, &self.export.backend);
                self.keep_write_cache(state);
            }
            self.start(state, index)
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.handle("SET_VRING_CALL", |state| {
            let index = self.queue_index(index.into())?;
            let vring = &mut state.vrings[index];
            vring.call = notifier(fd)?;
            if vring.started {
                let call = vring.call.clone();
                self.on_queue(index, move |_, queue, answer| {
                    queue.set_call(call);
                    answer.give(());
                });
            }
            Ok(())
        })
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.handle("SET_VRING_ERR", |state| {
            let index = self.queue_index(index.into())?;
            let vring = &mut state.vrings[index];
            vring.error = notifier(fd)?;
            if vring.started {
                let error = vring.error.clone();
                self.on_queue(index, move |_, queue, answer| {
                    queue.set_error(error);
                    answer.give(());
                });
            }
            Ok(())
        })
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::DEVICE_STATE
            | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT)
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        self.handle("SET_PROTOCOL_FEATURES", |state| {
            let unknown = features & !self.get_protocol_features()?.bits();
            if unknown != 0 {
                return Err(refuse(format_args!("protocol feature bits {unknown:#x} were not offered")));
            }
            let (kept, region) =
                (VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT, VhostUserProtocolFeatures::INFLIGHT_SHMFD);
            if features & kept.bits() != 0 && features & region.bits() == 0 {
                return Err(refuse("GET_VRING_BASE_INFLIGHT needs INFLIGHT_SHMFD"));
            }
            state.protocol_features = features;
            Ok(())
        })
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.export.settings.num_queues.into())
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.handle("SET_VRING_ENABLE", |state| {
            let index = self.queue_index(index)?;
            let vring = &mut state.vrings[index];
            vring.enabled = enable;
            if vring.started {
                self.on_queue(index, move |_, queue, answer| {
                    queue.set_enabled(enable);
                    answer.give(());
                });
            }
            Ok(())
        })
    }

    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // A refusal is answered with size 0, so this one does not close the connection.
        if !self.rings_started.load(Ordering::Relaxed) && !self.config_read.swap(true, Ordering::Relaxed) {
            self.export.write_cache.config_read(&self.export.backend);
        }
        let config = self.export.config();
        self.news.read(config);
        config_space::part(&config, offset, size).ok_or_else(|| {
            tracing::info!("{}: GET_CONFIG of {size} bytes at {offset:#x} is outside it", self.export.name());
            refuse("outside the config space")
        })
    }

    fn set_config(&self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.handle("SET_CONFIG", |state| {
            self.export.set_config(offset, buf, state.features).map_err(refuse)?;
            self.keep_write_cache(state);
            Ok(())
        })
    }

    fn set_gpu_socket(&self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shared_object(&self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }

    fn get_inflight_fd(&self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.handle("GET_INFLIGHT_FD", |_| self.make_region(asked))
    }

    fn set_inflight_fd(&self, told: &VhostUserInflight, file: File) -> Result<()> {
        self.handle("SET_INFLIGHT_FD", |state| self.keep_region(state, told, file))
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.handle("ADD_MEM_REG", |state| {
            let mut regions = state.memory.regions().to_vec();
            regions.push(Arc::new(map_single(region, fd)?));
            let memory = GuestMemory::new(regions).map_err(refuse)?;
            self.change_memory(state, memory, false);
            Ok(None)
        })
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.handle("REM_MEM_REG", |state| {
            let mut regions = state.memory.regions().to_vec();
            let wanted = (region.guest_phys_addr, region.user_addr, region.memory_size);
            let at = regions.iter().position(|r| (r.guest_addr, r.user_addr, r.size) == wanted);
            let Some(at) = at else {
                return Err(refuse(format_args!("there is no region at guest address {:#x}", wanted.0)));
            };
            regions.remove(at);
            let memory = GuestMemory::new(regions).map_err(refuse)?;
            self.change_memory(state, memory, true);
            Ok(())
        })
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        // A refusal is in the reply.
        let begun = self.begin_transfer(direction, phase, file).map(|()| None);
        begun.map_err(|why| self.warn("SET_DEVICE_STATE_FD", &why))
    }

    fn check_device_state(&self) -> Result<()> {
        self.end_transfer().map_err(|why| self.warn("CHECK_DEVICE_STATE", &why))
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }

    fn set_log_base(&self, log: &VhostUserLog, file: File) -> Result<()> {
        self.handle("SET_LOG_BASE", |state| self.keep_log(state, log, &file))
    }
}
