//! A session that another process goes on with: on the one side all its rings are halted and its state is written down,
//! on the other it is made from that state. It sends and receives nothing.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::Session;
use super::rings::{Addresses, SessionState, Vring};
use crate::config_space::{F_PROTOCOL_FEATURES, bit};
use crate::dirty_log::DirtyLog;
use crate::export::ExportState;
use crate::guest_memory::{GuestMemory, MemoryRegion};
use crate::handover::{Descriptors, InflightImage, LogImage, RegionImage, RingImage, SessionImage};
use crate::inflight::InflightRegion;
use crate::queue::{Halted, Queue};

impl Session {
    /// The export that it is with.
    pub(crate) fn export(&self) -> &ExportState {
        &self.export
    }

    /// Halts all rings and writes everything down. Then comes [`Session::take_back`], or the process touches nothing of
    /// the session any more.
    ///
    /// # Errors
    /// Prose: requests did not end in time, or cannot be told to another process. Everything goes on as before.
    pub(crate) fn hand_over(
        &self,
        connection: &UnixStream,
        until: Instant,
        descriptors: &mut Descriptors,
    ) -> Result<SessionImage, String> {
        let state = self.state();
        if state.transfer.is_some() {
            return Err("the device's state is being carried to another back-end".into());
        }
        let handed = self.halt_all(&state, until).and_then(|halted| {
            let image = self.image(&state, &halted, connection, descriptors);
            image.map_err(|e| format!("its descriptors: {e}"))
        });
        if handed.is_err() {
            self.resume_all(&state);
        }
        handed
    }

    /// The other process does not want it: all rings go on.
    pub(crate) fn take_back(&self) {
        self.resume_all(&self.state());
    }

    /// Halts the rings that are started. Where each of them stands.
    fn halt_all(&self, state: &SessionState, until: Instant) -> Result<Vec<Option<Halted>>, String> {
        let mut halted: Vec<Option<Halted>> = state.vrings.iter().map(|_| None).collect();
        let _hurry = self.export.backend.hurry();
        let (sender, answers) = channel();
        let mut expected = 0;
        for (index, _) in state.vrings.iter().enumerate().filter(|(_, vring)| vring.started) {
            let (number, sender) = (self.export.queue_number(index), sender.clone());
            expected += 1;
            self.export.remote(index).post(move |context| {
                if let Some(queue) = context.local::<Queue>(number) {
                    context.spawn(async move {
                        // Nobody waits for it any more if it took too long.
                        let _ = sender.send((index, queue.halt().await));
                    });
                }
            });
        }
        drop(sender);
        for _ in 0..expected {
            match answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((index, answer)) => halted[index] = Some(answer),
                Err(RecvTimeoutError::Timeout) => return Err("requests in flight did not end in time".into()),
                Err(RecvTimeoutError::Disconnected) => return Err("an iothread has ended".into()),
            }
        }
        let kept: usize = halted.iter().flatten().map(|halted| halted.kept).sum();
        if kept > 0 && state.inflight.is_none() {
            return Err(format!(
                "it has stopped over an error and keeps {kept} requests, and there is no in-flight region to tell of them"
            ));
        }
        Ok(halted)
    }

    fn resume_all(&self, state: &SessionState) {
        for (index, _) in state.vrings.iter().enumerate().filter(|(_, vring)| vring.started) {
            self.on_queue(index, |_, queue, answer| {
                queue.resume();
                answer.give(());
            });
        }
    }

    fn image(
        &self,
        state: &SessionState,
        halted: &[Option<Halted>],
        connection: &UnixStream,
        descriptors: &mut Descriptors,
    ) -> std::io::Result<SessionImage> {
        let mut memory = Vec::new();
        for region in state.memory.regions() {
            let MemoryRegion { guest_addr, user_addr, size, mmap_offset, .. } = **region;
            let file = descriptors.add(&region.file)?;
            memory.push(RegionImage { guest_addr, user_addr, size, mmap_offset, file });
        }
        let mut rings = Vec::new();
        for (vring, halted) in state.vrings.iter().zip(halted) {
            let mut add = |descriptor: &Option<Arc<OwnedFd>>| -> std::io::Result<Option<usize>> {
                descriptor.as_ref().map(|descriptor| descriptors.add(&**descriptor)).transpose()
            };
            rings.push(RingImage {
                size: vring.size,
                addresses: vring.addresses.map(|Addresses { desc, avail, used }| [desc, avail, used]),
                base: halted.as_ref().map(|halted| halted.base).or(vring.base),
                kick: add(&vring.kick)?,
                call: add(&vring.call)?,
                error: add(&vring.error)?,
                enabled: vring.enabled,
                log_addr: vring.log_addr,
                started: vring.started,
                broken: halted.as_ref().is_some_and(|halted| halted.broken),
            });
        }
        let inflight = state.inflight.as_ref().map(|region| region.image(descriptors)).transpose()?;
        let log = state.log.as_ref().map(|log| log.image(descriptors)).transpose()?;
        let (channel, known_config, listens) = self.news.image(descriptors)?;
        Ok(SessionImage {
            connection: descriptors.add(connection)?,
            features: state.features,
            protocol_features: state.protocol_features,
            memory,
            rings,
            inflight,
            log,
            channel,
            known_config,
            listens,
            rings_started: self.rings_started.load(Ordering::Relaxed),
            config_read: self.config_read.load(Ordering::Relaxed),
            write_cache_features: self.export.write_cache.features(),
        })
    }

    /// A session that goes on where another process has halted it. Its rings are started and take nothing until
    /// [`Session::go_on`].
    ///
    /// # Errors
    /// Prose: the state is not one that this export can be in.
    pub(crate) fn resumed(
        export: Arc<ExportState>,
        image: &SessionImage,
        descriptors: &mut Descriptors,
    ) -> Result<Arc<Self>, String> {
        let unknown = image.features & !export.features;
        if unknown != 0 {
            return Err(format!("feature bits {unknown:#x} were negotiated, and are not offered here"));
        }
        if image.rings.len() != usize::from(export.settings.num_queues) {
            return Err(format!("{} queues, not {}", image.rings.len(), export.settings.num_queues));
        }
        let vrings = image.rings.iter().map(|ring| vring(ring, descriptors)).collect::<Result<_, String>>()?;
        let mut state = SessionState {
            features: image.features,
            protocol_features: image.protocol_features,
            memory: Arc::new(memory(&image.memory, descriptors)?),
            vrings,
            inflight: image.inflight.as_ref().map(|region| inflight(region, descriptors)).transpose()?,
            log: image.log.as_ref().map(|log| dirty_log(log, descriptors)).transpose()?,
            transfer: None,
        };
        let channel = image.channel.map(|place| descriptors.take(place)).transpose()?;
        let session = Arc::new(Self {
            export,
            state: Mutex::default(),
            news: super::ConfigNews::resumed(channel.map(UnixStream::from), image)?,
            refused: AtomicBool::new(false),
            rings_started: AtomicBool::new(image.rings_started),
            config_read: AtomicBool::new(image.config_read),
        });
        if image.rings.iter().any(|ring| ring.started) {
            // Whoever opened the medium has seen to it that it is active.
            session.export.in_use.store(true, Ordering::SeqCst);
        }
        for (index, ring) in image.rings.iter().enumerate().filter(|(_, ring)| ring.started) {
            // Nothing is taken yet.
            state.vrings[index].enabled = false;
            session.start_active(&mut state, index).map_err(|e| format!("queue {index}: {e}"))?;
            state.vrings[index].enabled = ring.enabled;
            if ring.broken {
                session.on_queue(index, |_, queue, answer| {
                    queue.set_broken();
                    answer.give(());
                });
            }
        }
        *session.state() = state;
        Ok(session)
    }

    /// Has the rings of a resumed session take requests.
    pub(crate) fn go_on(&self) {
        let state = self.state();
        for (index, vring) in state.vrings.iter().enumerate().filter(|(_, vring)| vring.started) {
            let (number, enabled) = (self.export.queue_number(index), vring.enabled);
            // No answer is waited for: every ring begins at once.
            self.export.remote(index).post(move |context| {
                if let Some(queue) = context.local::<Queue>(number) {
                    queue.set_enabled(enabled);
                }
            });
        }
    }

    /// What the parser of messages must know: the features, and those of the protocol if they were negotiated.
    pub(crate) fn negotiated(&self) -> (u64, Option<u64>) {
        let state = self.state();
        let protocol = (state.features & bit(F_PROTOCOL_FEATURES) != 0 || state.protocol_features != 0)
            .then_some(state.protocol_features);
        (state.features, protocol)
    }
}

fn vring(ring: &RingImage, descriptors: &mut Descriptors) -> Result<Vring, String> {
    let mut take = |place: Option<usize>| -> Result<Option<Arc<OwnedFd>>, String> {
        place.map(|place| descriptors.take(place).map(Arc::new)).transpose()
    };
    Ok(Vring {
        size: ring.size,
        addresses: ring.addresses.map(|[desc, avail, used]| Addresses { desc, avail, used }),
        base: ring.base,
        kick: take(ring.kick)?,
        call: take(ring.call)?,
        error: take(ring.error)?,
        enabled: ring.enabled,
        started: false,
        log_addr: ring.log_addr,
    })
}

fn memory(regions: &[RegionImage], descriptors: &mut Descriptors) -> Result<GuestMemory, String> {
    let mut mapped = Vec::new();
    for region in regions {
        let RegionImage { guest_addr, user_addr, size, mmap_offset, file } = *region;
        let file = File::from(descriptors.take(file)?);
        let region = MemoryRegion::map(guest_addr, user_addr, size, mmap_offset, file).map_err(|e| e.to_string())?;
        mapped.push(Arc::new(region));
    }
    GuestMemory::new(mapped).map_err(|e| e.to_string())
}

fn dirty_log(log: &LogImage, descriptors: &mut Descriptors) -> Result<Arc<DirtyLog>, String> {
    let file = File::from(descriptors.take(log.file)?);
    DirtyLog::map(&file, log.mmap_offset, log.mmap_size).map(Arc::new)
}

fn inflight(region: &InflightImage, descriptors: &mut Descriptors) -> Result<Arc<InflightRegion>, String> {
    let InflightImage { file, mmap_offset, mmap_size, num_queues, queue_size, packed } = *region;
    let file = File::from(descriptors.take(file)?);
    InflightRegion::map(file, (mmap_offset, mmap_size), num_queues, queue_size, packed).map(Arc::new)
}
