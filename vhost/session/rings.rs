//! The rings of a session: what is known of each, and how one is started, stopped and moved to another memory table on
//! its iothread, with an answer. It parses no message.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockport_block::aio::{AioContext, Answer};
use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::device_state::Transfer;
use super::{LEGACY, Session, refuse};
use crate::config_space::{F_LOG_ALL, bit};
use crate::dirty_log::DirtyLog;
use crate::guest_memory::GuestMemory;
use crate::inflight::InflightRegion;
use crate::queue::{Notifiers, Queue, QueueSetup};
use crate::virtqueue::{RingFeatures, RingLayout, VirtQueue};

/// All that was negotiated with one front-end. Plain data: what a later process would need to go on with it.
#[derive(Default)]
pub(super) struct SessionState {
    /// As acknowledged; 0 until then.
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) vrings: Vec<Vring>,
    /// What the front-end keeps for us over our death.
    pub(super) inflight: Option<Arc<InflightRegion>>,
    /// Where the front-end wants to be told what we write.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// Of the device's state, if one was begun.
    pub(super) transfer: Option<Transfer>,
}

/// What is known of one ring, started or not. Addresses are the front-end's own.
#[derive(Default)]
pub(super) struct Vring {
    pub(super) size: u16,
    pub(super) addresses: Option<Addresses>,
    /// As SET_VRING_BASE has it for the ring's layout. `None`: the front-end has not said; a split ring's own used index
    /// tells then, and a packed ring is a new one.
    pub(super) base: Option<u32>,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) error: Option<Arc<OwnedFd>>,
    pub(super) enabled: bool,
    pub(super) started: bool,
    /// The address in the log of what we write into the ring itself; `None`: that is not logged.
    pub(super) log_addr: Option<u64>,
}

#[derive(Clone, Copy)]
pub(super) struct Addresses {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

impl SessionState {
    /// Whether requests that an error policy keeps stay in the in-flight region when their ring stops: whoever starts it
    /// again, another back-end perhaps, goes on with them.
    fn leaves_kept(&self) -> bool {
        let agreed = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT.bits();
        self.protocol_features & agreed != 0 && self.inflight.is_some()
    }

    pub(super) fn ring_features(&self) -> RingFeatures {
        let has = |feature| self.features & bit(feature) != 0;
        RingFeatures {
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            packed: has(VIRTIO_F_RING_PACKED),
        }
    }
}

impl Session {
    /// Takes the features that were acknowledged. What changes while rings run is LOG_ALL at most.
    pub(super) fn change_features(&self, state: &mut SessionState, features: u64) -> Result<()> {
        let unknown = features & !self.export.features;
        if unknown != 0 {
            return Err(refuse(format_args!("feature bits {unknown:#x} were not offered")));
        }
        if features & bit(VIRTIO_F_VERSION_1) == 0 {
            return Err(refuse(LEGACY));
        }
        let changed = (features ^ state.features) & !bit(F_LOG_ALL);
        if changed != 0 && state.vrings.iter().any(|vring| vring.started) {
            return Err(refuse(format_args!("feature bits {changed:#x} change while rings run")));
        }
        if changed != 0 {
            self.export.write_cache.negotiated(features, &self.export.backend);
            self.keep_write_cache(state);
        }
        let logging = (features ^ state.features) & bit(F_LOG_ALL) != 0;
        state.features = features;
        if logging {
            self.log_anew(state);
        }
        Ok(())
    }

    /// Starts a ring on its iothread, with an active medium behind it.
    pub(super) fn start(&self, state: &mut SessionState, index: usize) -> Result<()> {
        self.claim_medium(state)?;
        self.start_active(state, index).inspect_err(|_| self.release_medium(state))
    }

    /// The same where the medium is active and claimed.
    pub(super) fn start_active(&self, state: &mut SessionState, index: usize) -> Result<()> {
        // A front-end that keeps the region goes on with the daemon after us, which must find what we completed.
        self.export.backend.set_keeps_writes(state.inflight.is_some());
        if state.features & bit(VIRTIO_F_VERSION_1) == 0 {
            return Err(refuse(LEGACY));
        }
        let features = state.ring_features();
        if let Some(region) = &mut state.inflight {
            *region = region.for_layout(features.packed).map_err(refuse)?;
        }
        let no_part = || refuse("the in-flight region has no part for this queue");
        let part = state.inflight.as_ref().map(|region| region.part(index).ok_or_else(no_part)).transpose()?;
        let (memory, log) = (state.memory.clone(), state.log_of(index));
        let vring = &mut state.vrings[index];
        let Some(addresses) = vring.addresses else {
            return Err(refuse("the ring was started before its addresses were set"));
        };
        let layout = self.layout(vring.size, addresses);
        let mut ring = match part {
            // Whatever SET_VRING_BASE says: after our death, QEMU knows only what was completed.
            Some(part) => VirtQueue::with_inflight(memory, layout, features, vring.base, part).map_err(refuse)?,
            None => {
                let mut ring = VirtQueue::new(memory, layout, features, vring.base.unwrap_or(0)).map_err(refuse)?;
                if vring.base.is_none() {
                    // Dragonball sends no SET_VRING_BASE when it reconnects: what is used need not be done again.
                    ring.resume_at_used();
                }
                ring
            }
        };
        ring.set_log(log);
        if state.inflight.is_some() {
            ring.log_all();
        }
        let setup = QueueSetup {
            name: format!("{}, queue {index}", self.export.name()),
            // There are at most 256.
            index: index as u16,
            ring,
            device: self.export.device.clone(),
            device_stop: self.export.device_stop.clone(),
            kick: vring.kick.clone(),
            notifiers: Notifiers { call: vring.call.clone(), error: vring.error.clone() },
            enabled: vring.enabled,
            size: vring.size,
            figures: self.export.figures.get(index).cloned().unwrap_or_default(),
        };
        let (number, backend) = (self.export.queue_number(index), self.export.backend.clone());
        let started =
            self.export.remote(index).call(move |context, answer: Answer<std::result::Result<(), String>>| {
                let channel = match backend.channel(context) {
                    Ok(channel) => channel,
                    Err(error) => return answer.give(Err(error.to_string())),
                };
                let queue = Queue::start(setup, context, channel);
                let weak: std::rc::Weak<Queue> = Rc::downgrade(&queue);
                context.set_local(number, weak);
                answer.give(Ok(()));
            });
        started.unwrap_or_else(|| Err("its iothread has ended".into())).map_err(refuse)?;
        vring.started = true;
        self.ring_started();
        Ok(())
    }

    pub(super) fn layout(&self, size: u16, addresses: Addresses) -> RingLayout {
        let Addresses { desc, avail, used } = addresses;
        // A request has at most seg_max buffers, a header and a status.
        let indirect_max = u16::try_from(self.export.settings.seg_max + 2).unwrap_or(u16::MAX);
        RingLayout { size, desc, avail, used, indirect_max }
    }

    /// Stops a ring on its iothread, if it is started, and keeps where it stopped.
    pub(super) fn stop(&self, state: &mut SessionState, index: usize) -> Stopped {
        let leaves = state.leaves_kept();
        let vring = &mut state.vrings[index];
        if !std::mem::replace(&mut vring.started, false) {
            return Stopped { base: vring.base.unwrap_or(0), in_flight: 0 };
        }
        let _hurry = self.export.backend.hurry();
        let stopped = self.on_queue(index, move |context, queue, answer: Answer<Stopped>| {
            let in_flight = queue.in_flight();
            context.spawn(async move {
                if leaves {
                    queue.leave_kept();
                }
                let base = queue.stop().await;
                answer.give(Stopped { base, in_flight });
            });
        });
        let stopped = stopped.unwrap_or(Stopped { base: vring.base.unwrap_or(0), in_flight: 0 });
        vring.base = Some(stopped.base);
        if !state.vrings.iter().any(|vring| vring.started) {
            self.news.rings_stop();
            self.release_medium(state);
        }
        stopped
    }

    /// Runs `run` with a started queue on its iothread and waits for the answer; `None` when the queue is not there.
    pub(super) fn on_queue<T: Send + 'static>(
        &self,
        index: usize,
        run: impl FnOnce(&AioContext, Rc<Queue>, Answer<T>) + Send + 'static,
    ) -> Option<T> {
        let number = self.export.queue_number(index);
        self.export.remote(index).call(move |context, answer| {
            if let Some(queue) = context.local::<Queue>(number) {
                run(context, queue, answer);
            }
        })
    }

    /// Goes over to another memory table: rings first finish what uses a region that goes away.
    pub(super) fn change_memory(&self, state: &mut SessionState, memory: GuestMemory, loses_regions: bool) {
        let memory = Arc::new(memory);
        state.memory = memory.clone();
        let _hurry = loses_regions.then(|| self.export.backend.hurry());
        for index in 0..state.vrings.len() {
            if !state.vrings[index].started {
                continue;
            }
            let memory = memory.clone();
            self.on_queue(index, move |context, queue, answer| {
                context.spawn(async move {
                    if loses_regions {
                        queue.pause().await;
                    }
                    queue.set_memory(memory);
                    queue.resume();
                    answer.give(());
                });
            });
        }
    }
}

/// Where a ring stopped, and how many requests it had in flight then.
pub(super) struct Stopped {
    pub(super) base: u32,
    pub(super) in_flight: usize,
}
