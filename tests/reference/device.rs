//! The framework's backend trait: negotiation and the loop over one vring. It owns no disk and parses no request.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::config;
use crate::disk::Disk;
use crate::request::{Context, Request};

/// The largest ring a front-end may ask for, in descriptors.
const QUEUE_SIZE_MAX: usize = 1024;

/// The device of one connection.
pub struct Device {
    disk: Arc<Disk>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    queues: u16,
    serial: [u8; 20],
    event_idx: AtomicBool,
    /// Without FLUSH the front-end has no way to ask for durability, so every write must have it.
    write_through: AtomicBool,
}

impl Device {
    /// A device for one connection, whose memory table the framework fills in.
    pub fn new(disk: Arc<Disk>, memory: GuestMemoryAtomic<GuestMemoryMmap>, queues: u16, serial: &str) -> Self {
        let mut padded = [0; 20];
        padded.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Self {
            disk,
            memory,
            queues,
            serial: padded,
            event_idx: AtomicBool::new(false),
            write_through: AtomicBool::new(true),
        }
    }

    /// Serves all that the ring offers now, and calls the front-end at most once.
    fn process(&self, vring: &VringRwLock) -> io::Result<()> {
        let context = Context {
            disk: &self.disk,
            serial: &self.serial,
            write_through: self.write_through.load(Ordering::Relaxed),
        };
        let memory = self.memory.memory();
        // Held over the batch: a stop of the ring (GET_VRING_BASE) waits for it, so it drains.
        let mut state = vring.get_mut();
        let chains: Vec<_> = state.get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.collect();
        if chains.is_empty() {
            return Ok(());
        }
        for chain in chains {
            let head = chain.head_index();
            let used_len = Request::parse(&memory, chain).map_or(0, |r| r.execute(&context));
            state.add_used(head, used_len).map_err(io::Error::other)?;
        }
        if state.needs_notification().map_err(io::Error::other)? {
            state.signal_used_queue()?;
        }
        Ok(())
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        config::features(&self.disk)
    }

    fn acked_features(&self, features: u64) {
        let flush = features & config::bit(VIRTIO_BLK_F_FLUSH) != 0;
        self.write_through.store(!flush, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = config::space(&self.disk, self.queues);
        let (offset, size) = (offset as usize, size as usize);
        // Out of range: an empty answer, which the framework turns into the refusal of size 0.
        space.get(offset..offset.saturating_add(size)).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // The table passed here is the one that `new` was given a handle of.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without it the framework never ends a queue's thread, and waits for it on drop.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&self, index: u16, _events: EventSet, vrings: &[VringRwLock], _thread: usize) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(index)) else {
            return Err(io::Error::other(format!("no vring {index}")));
        };
        if !self.event_idx.load(Ordering::Relaxed) {
            return self.process(vring);
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.process(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}
