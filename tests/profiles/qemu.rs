//! QEMU, with `reconnect-ms`. Read from qemu/qemu: hw/virtio/vhost-user.c at 019fbfa4bcd2, hw/block/vhost-user-blk.c at
//! 06bb74985f42; the order of the messages at start and stop is that of hw/virtio/vhost.c, as QEMU 10.0 sends them.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::raw::{Raw, address_bytes};
use super::{Guest, Vmm};
use crate::frontend::blk::{Config, feature};
use crate::frontend::session::{protocol, single_region_bytes, vring_state};
use crate::frontend::wait::Event;
use crate::frontend::wire::code;

/// What the device passes on to its guests.
const FEATURES: u64 = feature::SIZE_MAX
    | feature::SEG_MAX
    | feature::BLK_SIZE
    | feature::TOPOLOGY
    | feature::MQ
    | feature::RO
    | feature::FLUSH
    | feature::CONFIG_WCE
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::VERSION_1
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::NOTIFY_ON_EMPTY
    | feature::ACCESS_PLATFORM;

/// Bits 0 to 19.
const PROTOCOL_MASK: u64 = (1 << 20) - 1;

/// Without the fields that QEMU does not know of: up to and with write_zeroes_may_unmap and its padding.
const CONFIG_BYTES: u32 = 60;

pub struct Qemu {
    raw: Raw,
    features: u64,
    queues: u16,
    config: Config,
    /// Whether the back-end has this connection's memory: only differences are sent.
    memory_sent: bool,
    /// Called while the guest's interrupts are masked.
    masked: Vec<Event>,
    errors: Vec<Event>,
    _backend_channel: OwnedFd,
}

impl Qemu {
    /// vhost_dev_init, at realize and at each reconnect.
    fn connect(socket: &Path, queues: u16, config: Option<Config>) -> Self {
        let raw = Raw::connect(socket);
        let offered = raw.get(code::GET_FEATURES);
        let protocol_features = raw.get(code::GET_PROTOCOL_FEATURES) & PROTOCOL_MASK;
        for needed in [protocol::CONFIG, protocol::MQ, protocol::REPLY_ACK, protocol::BACKEND_REQ] {
            assert_ne!(protocol_features & needed, 0, "{protocol_features:#x}");
        }
        raw.send(code::SET_PROTOCOL_FEATURES, &protocol_features.to_ne_bytes(), &[]);
        assert!(raw.get(code::GET_QUEUE_NUM) >= u64::from(queues));
        assert!(raw.get(code::GET_MAX_MEM_SLOTS) >= 8);
        let (theirs, ours) = UnixStream::pair().expect("a socket pair");
        raw.send_acked(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        raw.send(code::SET_OWNER, &[], &[]);
        assert_eq!(raw.get(code::GET_FEATURES), offered);
        let events = || (0..queues).map(|_| Event::new()).collect::<Vec<_>>();
        let (masked, errors) = (events(), events());
        for queue in 0..usize::from(queues) {
            let number = (queue as u64).to_ne_bytes();
            raw.send(code::SET_VRING_CALL, &number, &[masked[queue].as_fd()]);
            raw.send(code::SET_VRING_ERR, &number, &[errors[queue].as_fd()]);
        }
        // Read once, at realize; never again at a reconnect.
        let config = config.unwrap_or_else(|| Config(raw.get_config(0, CONFIG_BYTES, 0)));
        let features = offered & FEATURES;
        Self { raw, features, queues, config, memory_sent: false, masked, errors, _backend_channel: ours.into() }
    }

    /// vhost_user_blk_start, with each ring from where the guest has seen completions.
    fn start(&mut self, guest: &Guest) {
        let acked = (guest.accepted | feature::PROTOCOL_FEATURES).to_ne_bytes();
        self.raw.send(code::SET_FEATURES, &acked, &[]);
        self.raw.send(code::SET_FEATURES, &acked, &[]);
        if !std::mem::replace(&mut self.memory_sent, true) {
            for region in guest.memory.regions() {
                let payload = single_region_bytes(&region.placement);
                self.raw.send_acked(code::ADD_MEM_REG, &payload, &[region.as_fd()]);
            }
        }
        for (index, queue) in guest.queues.iter().enumerate() {
            let number = index as u32;
            self.raw.send(code::SET_VRING_NUM, &vring_state(number, u32::from(queue.ring.size)), &[]);
            self.raw.send(code::SET_VRING_BASE, &vring_state(number, u32::from(queue.used_idx())), &[]);
            self.raw.send(code::SET_VRING_ADDR, &address_bytes(guest, index), &[]);
            self.raw.send(code::SET_VRING_KICK, &(index as u64).to_ne_bytes(), &[queue.kick.as_fd()]);
            // Unmasked only when all is up.
            self.raw.send(code::SET_VRING_CALL, &(index as u64).to_ne_bytes(), &[self.masked[index].as_fd()]);
        }
        for queue in 0..u32::from(self.queues) {
            self.raw.send_acked(code::SET_VRING_ENABLE, &vring_state(queue, 1), &[]);
        }
        for (index, queue) in guest.queues.iter().enumerate() {
            self.raw.send(code::SET_VRING_CALL, &(index as u64).to_ne_bytes(), &[queue.call.as_fd()]);
            assert_eq!(self.errors[index].take(), 0, "queue {index} is broken");
        }
    }
}

impl Vmm for Qemu {
    const QUEUES: u16 = 4;

    fn create(socket: &Path, queues: u16) -> Self {
        Self::connect(socket, queues, None)
    }

    fn offers(&self) -> u64 {
        self.features
    }

    fn config(&mut self) -> Config {
        self.config.clone()
    }

    fn activate(&mut self, guest: &Guest) {
        self.start(guest);
    }

    fn pause(&mut self, guest: &Guest) {
        for queue in 0..u32::from(self.queues) {
            self.raw.send_acked(code::SET_VRING_ENABLE, &vring_state(queue, 0), &[]);
        }
        for (index, queue) in guest.queues.iter().enumerate() {
            assert_eq!(self.raw.get_vring_base(index as u32), u32::from(queue.used_idx()), "queue {index}");
        }
    }

    fn resume(&mut self, guest: &Guest) {
        self.start(guest);
    }

    fn reset(&mut self, guest: &Guest) -> bool {
        self.pause(guest);
        self.raw.send(code::RESET_DEVICE, &[], &[]);
        true
    }

    fn reconnect(self, socket: &Path, guest: &Guest) -> Option<Self> {
        let mut qemu = Self::connect(socket, self.queues, Some(self.config));
        assert_eq!(qemu.features, self.features, "the features shrank");
        qemu.start(guest);
        Some(qemu)
    }
}
