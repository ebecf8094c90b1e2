//! A whole front-end: a session, guest memory and queues, brought up in the order that real front-ends use.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::arena::Arena;
use super::blk::{CONFIG_SIZE, Config, WRITEBACK, feature};
use super::memory::{GuestMemory, Placement, Region, USUAL};
use super::queue::{Queue, RingLayout};
use super::session::{Ack, Inflight, Session, VringAddresses, protocol};
use super::wire::Connection;

/// Entries of each queue in an in-flight region: QEMU's are as many as its device may have.
const INFLIGHT_QUEUE_SIZE: u16 = 32768;

/// By which messages guest memory is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryBy {
    Table,
    Slots,
}

/// What a front-end asks for and how it goes about it.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Protocol features acknowledged, of those that are offered. 0: none is negotiated, nor PROTOCOL_FEATURES itself.
    pub protocol_features: u64,
    /// Virtio features acknowledged, of those that are offered.
    pub features: u64,
    pub queues: u16,
    pub queue_size: u16,
    pub memory_by: MemoryBy,
    pub placements: Vec<Placement>,
    /// SET_FEATURES goes out before GET_PROTOCOL_FEATURES.
    pub features_first: bool,
    /// The config space is read before the rings start.
    pub reads_config: bool,
    /// Rings are started and enabled.
    pub starts: bool,
}

thread_local! {
    static PACKED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test once more, with packed rings where it asks for none in particular.
pub fn on_packed_rings(test: fn()) {
    PACKED.set(true);
    test();
}

impl Profile {
    /// QEMU: everything offered in protocol bits 0 to 19, memory as a table; packed rings in [`on_packed_rings`] only.
    pub fn qemu() -> Self {
        let unwanted = if PACKED.get() { 0 } else { feature::RING_PACKED };
        Self {
            protocol_features: (1 << 20) - 1,
            features: !(feature::NOTIFY_ON_EMPTY | feature::LOG_ALL | unwanted),
            queues: 1,
            queue_size: 128,
            memory_by: MemoryBy::Table,
            placements: USUAL.to_vec(),
            features_first: false,
            reads_config: true,
            starts: true,
        }
    }

    /// QEMU with several queues.
    pub fn queues(queues: u16) -> Self {
        Self { queues, ..Self::qemu() }
    }

    /// Connected and negotiated as QEMU does, with no ring started.
    pub fn unstarted() -> Self {
        Self { starts: false, ..Self::qemu() }
    }

    /// Everything but some features.
    pub fn without(features: u64) -> Self {
        let qemu = Self::qemu();
        Self { features: qemu.features & !features, ..qemu }
    }

    /// libblkio: memory by slots, guest addresses equal to the front-end's, no indirect tables.
    pub fn libblkio() -> Self {
        let placements = USUAL.map(|placement| Placement { user: placement.guest, ..placement });
        Self {
            protocol_features: protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::CONFIGURE_MEM_SLOTS,
            memory_by: MemoryBy::Slots,
            placements: placements.to_vec(),
            features_first: true,
            ..Self::without(feature::INDIRECT_DESC)
        }
    }

    /// cloud-hypervisor: no back-end channel.
    pub fn cloud_hypervisor() -> Self {
        let wanted = protocol::CONFIG
            | protocol::MQ
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::REPLY_ACK
            | protocol::INFLIGHT_SHMFD
            | protocol::LOG_SHMFD
            | protocol::DEVICE_STATE;
        Self { protocol_features: wanted, ..Self::qemu() }
    }

    /// Firecracker: CONFIG alone, one queue.
    pub fn firecracker() -> Self {
        Self { protocol_features: protocol::CONFIG, ..Self::without(feature::MQ | feature::INDIRECT_DESC) }
    }

    /// A front-end that negotiates no protocol feature at all.
    pub fn bare() -> Self {
        Self { protocol_features: 0, reads_config: false, ..Self::without(feature::PROTOCOL_FEATURES) }
    }
}

/// A device as the front-end sees it.
#[derive(Debug)]
pub struct Device {
    pub session: Session,
    pub memory: Arc<GuestMemory>,
    pub queues: Vec<Queue>,
    pub offered: u64,
    pub config: Option<Config>,
    /// Kept for the back-end, where that was agreed.
    pub inflight: Option<Inflight>,
    /// Our end of the back-end's own channel; closing it is up to the device's owner.
    _backend_channel: Option<OwnedFd>,
}

impl Device {
    /// Brings a device up on a fresh connection.
    #[track_caller]
    pub fn negotiate(connection: Connection, profile: &Profile) -> Self {
        let mut session = Session::new(connection);
        let offered = session.get_features();
        assert_ne!(offered & feature::PROTOCOL_FEATURES, 0, "no protocol features");
        let features = offered & profile.features;
        if profile.features_first {
            session.set_features(features).accepted();
        }
        let mut backend_channel = None;
        if profile.protocol_features != 0 {
            let wanted = session.get_protocol_features() & profile.protocol_features;
            session.set_protocol_features(wanted).accepted();
            if wanted & protocol::MQ != 0 {
                let most = session.get_queue_num();
                assert!(u64::from(profile.queues) <= most, "{most} queues at most");
            }
            if wanted & protocol::CONFIGURE_MEM_SLOTS != 0 {
                session.get_max_mem_slots();
            }
            if wanted & protocol::BACKEND_REQ != 0 {
                let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
                session.set_backend_req_fd(theirs.as_fd()).accepted();
                backend_channel = Some(ours.into());
            }
        }
        session.set_owner().accepted();
        let memory = Arc::new(GuestMemory::new(&profile.placements));
        let queues = lay_out(&memory, profile.queues, profile.queue_size, features);
        let config = profile.reads_config.then(|| Config(session.get_config(0, CONFIG_SIZE)));
        let inflight = None;
        let mut device = Self { session, memory, queues, offered, config, inflight, _backend_channel: backend_channel };
        device.session.features = features;
        if profile.starts {
            device.announce(profile.memory_by);
            for queue in 0..device.queues.len() {
                device.start_queue(queue);
            }
        }
        device
    }

    /// SET_FEATURES, a new in-flight region and the memory, as at the start of a virtual machine.
    #[track_caller]
    pub fn announce(&mut self, memory_by: MemoryBy) {
        let features = self.session.features;
        self.session.set_features(features).accepted();
        if self.session.protocol_features & protocol::INFLIGHT_SHMFD != 0 {
            let region = self.session.get_inflight_fd(self.queues.len() as u16, INFLIGHT_QUEUE_SIZE);
            self.session.set_inflight_fd(&region).accepted();
            self.inflight = Some(region);
        }
        self.tell_memory(memory_by);
    }

    /// The memory as it is now.
    #[track_caller]
    pub fn tell_memory(&self, memory_by: MemoryBy) {
        let regions = self.memory.regions();
        match memory_by {
            MemoryBy::Table => {
                let regions: Vec<&Region> = regions.iter().map(AsRef::as_ref).collect();
                self.session.set_mem_table(&regions).accepted();
            }
            MemoryBy::Slots => regions.iter().for_each(|region| self.session.add_mem_reg(region).accepted()),
        }
    }

    /// Comes back to a back-end that died, with the memory, the rings and the in-flight region as they are, and goes on.
    /// As QEMU does, without a look at the config space, and with bases from before.
    #[track_caller]
    pub fn reconnect(&mut self, connection: Connection) {
        let (features, protocol_features) = (self.session.features, self.session.protocol_features);
        self.session = Session::new(connection);
        self.session.get_features();
        self.session.get_protocol_features();
        self.session.set_protocol_features(protocol_features).accepted();
        self.session.set_owner().accepted();
        self.session.set_features(features).accepted();
        if let Some(region) = &self.inflight {
            self.session.set_inflight_fd(region).accepted();
        }
        self.tell_memory(MemoryBy::Table);
        for queue in 0..self.queues.len() {
            self.set_up_queue(queue);
            let stale = if self.queues[queue].ring.packed { 0x8000_8000 } else { 0 };
            self.session.set_vring_base(queue as u32, stale).accepted();
            self.set_kick(queue);
            self.enable(queue, true);
        }
    }

    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    /// Front-end addresses of a queue's ring.
    pub fn addresses(&self, queue: usize) -> VringAddresses {
        let ring = self.queues[queue].ring;
        VringAddresses {
            flags: 0,
            descriptors: self.memory.user_address(ring.descriptors),
            used: self.memory.user_address(ring.used),
            avail: self.memory.user_address(ring.avail),
            log: 0,
        }
    }

    /// Tells everything about a ring but its kick and whether it is enabled.
    #[track_caller]
    pub fn set_up_queue(&self, queue: usize) {
        let ring = &self.queues[queue];
        let index = queue as u32;
        self.session.set_vring_num(index, u32::from(ring.ring.size)).accepted();
        self.session.set_vring_base(index, ring.base()).accepted();
        self.session.set_vring_addr(index, &self.addresses(queue)).accepted();
        self.session.set_vring_call(u64::from(index), (!ring.polling).then(|| ring.call.as_fd())).accepted();
        self.session.set_vring_err(u64::from(index), Some(ring.err.as_fd())).accepted();
    }

    #[track_caller]
    pub fn set_kick(&self, queue: usize) {
        self.session.set_vring_kick(queue as u64, Some(self.queues[queue].kick.as_fd())).accepted();
    }

    #[track_caller]
    pub fn enable(&self, queue: usize, enable: bool) {
        if self.session.features & feature::PROTOCOL_FEATURES != 0 {
            self.session.set_vring_enable(queue as u32, u32::from(enable)).accepted();
        }
    }

    /// Starts a ring where the front-end's own count of completions stands.
    #[track_caller]
    pub fn start_queue(&self, queue: usize) {
        self.set_up_queue(queue);
        self.set_kick(queue);
        self.enable(queue, true);
    }

    /// Stops a ring as QEMU does; returns where it stands.
    #[track_caller]
    pub fn stop_queue(&self, queue: usize) -> u32 {
        self.enable(queue, false);
        self.session.get_vring_base(queue as u32)
    }

    /// The config space as it is now.
    #[track_caller]
    pub fn read_config(&self) -> Config {
        Config(self.session.get_config(0, CONFIG_SIZE))
    }

    /// The write cache as the config space tells it.
    #[track_caller]
    pub fn writeback(&self) -> bool {
        self.read_config().writeback() == 1
    }

    pub fn set_writeback(&self, on: bool) -> Ack {
        self.session.set_config(WRITEBACK, &[u8::from(on)])
    }

    /// Many round trips on the control connection: whatever the back-end had at hand before is done after them, on any
    /// thread that is not waiting for storage.
    #[track_caller]
    pub fn settle(&self) {
        for _ in 0..200 {
            self.session.get_features();
            std::thread::yield_now();
        }
    }

    /// True when the back-end gives the device up in time: the first queue's error event, or the connection's end.
    pub fn fails_within(&self, timeout: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec::try_from(timeout).expect("a timeout of seconds");
        let mut fds =
            [PollFd::new(&self.queues[0].err, PollFlags::IN), PollFd::new(&self.session.connection, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("poll") > 0
    }
}

/// Rings in the first region, turn and turn about with the others; the rest of the others is shared out for buffers.
pub fn lay_out(memory: &Arc<GuestMemory>, queues: u16, queue_size: u16, features: u64) -> Vec<Queue> {
    let has = |feature| features & feature != 0;
    let spaces: Vec<Placement> = memory.regions().iter().map(|region| region.placement).collect();
    let eighth = |space: &Placement| space.size / 8;
    let mut rings = Arena::new(spaces.iter().map(|space| (space.guest, eighth(space))).collect());
    (0..queues)
        .map(|index| {
            let ring = RingLayout::cut(&mut rings, queue_size, has(feature::RING_PACKED));
            let share = |space: &Placement| (space.size - eighth(space)) / u64::from(queues);
            let ranges = spaces
                .iter()
                .map(|space| (space.guest + eighth(space) + share(space) * u64::from(index), share(space)))
                .collect();
            Queue::new(index, ring, Arc::clone(memory), Arena::new(ranges), has(feature::EVENT_IDX))
        })
        .collect()
}
