//! crosvm. Read from google/crosvm: devices/src/virtio/vhost_user_frontend/mod.rs at 10297b9acde0. It negotiates
//! REPLY_ACK and never asks for an acknowledgement.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::raw::{CONFIG_WRITABLE, Raw, address_bytes, set_mem_table};
use super::{Guest, Vmm};
use crate::frontend::blk::{Config, feature};
use crate::frontend::session::{protocol, vring_state};
use crate::frontend::wire::code;

/// Device types' own features, and what any crosvm machine has.
const FEATURES: u64 = ((1 << 24) - 1)
    | feature::VERSION_1
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::ACCESS_PLATFORM
    | feature::PROTOCOL_FEATURES;

const PROTOCOL: u64 =
    protocol::CONFIG | protocol::MQ | protocol::BACKEND_REQ | protocol::DEVICE_STATE | protocol::REPLY_ACK;

pub struct Crosvm {
    raw: Raw,
    features: u64,
    /// The rings' bases, as they were taken back when it went to sleep.
    bases: Vec<u32>,
    sent_features: bool,
    _backend_channel: Option<OwnedFd>,
}

impl Crosvm {
    fn deactivate(&mut self, guest: &Guest) -> Vec<u32> {
        let queues = 0..guest.queues.len() as u32;
        queues
            .map(|queue| {
                self.raw.send(code::SET_VRING_ENABLE, &vring_state(queue, 0), &[]);
                self.raw.get_vring_base(queue)
            })
            .collect()
    }
}

impl Vmm for Crosvm {
    const QUEUES: u16 = 4;

    fn create(socket: &Path, queues: u16) -> Self {
        let raw = Raw::connect(socket);
        raw.send(code::SET_OWNER, &[], &[]);
        let features = raw.get(code::GET_FEATURES) & FEATURES;
        let protocol_features = raw.get(code::GET_PROTOCOL_FEATURES) & PROTOCOL;
        raw.send(code::SET_PROTOCOL_FEATURES, &protocol_features.to_ne_bytes(), &[]);
        let backend_channel = (protocol_features & protocol::BACKEND_REQ != 0).then(|| {
            let (theirs, ours) = UnixStream::pair().expect("a socket pair");
            raw.send(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
            ours.into()
        });
        assert_eq!(raw.get(code::GET_QUEUE_NUM), u64::from(queues), "its guests see all queues");
        let bases = vec![0; usize::from(queues)];
        Self { raw, features, bases, sent_features: false, _backend_channel: backend_channel }
    }

    fn offers(&self) -> u64 {
        self.features & !feature::PROTOCOL_FEATURES
    }

    /// Each access of the guest's driver is a message of its own.
    fn config(&mut self) -> Config {
        let mut config = Vec::new();
        for (offset, size) in [(0, 8), (8, 4), (12, 4), (16, 4), (20, 4), (24, 4), (28, 4), (32, 1), (33, 1), (34, 2)] {
            config.extend(self.raw.get_config(offset, size, CONFIG_WRITABLE));
        }
        Config(config)
    }

    fn activate(&mut self, guest: &Guest) {
        if !std::mem::replace(&mut self.sent_features, true) {
            let acked = guest.accepted & self.features | feature::PROTOCOL_FEATURES;
            self.raw.send(code::SET_FEATURES, &acked.to_ne_bytes(), &[]);
        }
        set_mem_table(&self.raw, guest, false);
        for (index, queue) in guest.queues.iter().enumerate() {
            let number = index as u32;
            self.raw.send(code::SET_VRING_NUM, &vring_state(number, u32::from(queue.ring.size)), &[]);
            self.raw.send(code::SET_VRING_ADDR, &address_bytes(guest, index), &[]);
            self.raw.send(code::SET_VRING_BASE, &vring_state(number, self.bases[index]), &[]);
            self.raw.send(code::SET_VRING_CALL, &(index as u64).to_ne_bytes(), &[queue.call.as_fd()]);
            self.raw.send(code::SET_VRING_KICK, &(index as u64).to_ne_bytes(), &[queue.kick.as_fd()]);
            self.raw.send(code::SET_VRING_ENABLE, &vring_state(number, 1), &[]);
        }
    }

    fn pause(&mut self, guest: &Guest) {
        self.bases = self.deactivate(guest);
    }

    fn resume(&mut self, guest: &Guest) {
        self.activate(guest);
    }

    fn reset(&mut self, guest: &Guest) -> bool {
        self.deactivate(guest);
        self.bases.fill(0);
        self.sent_features = false;
        true
    }

    fn reconnect(self, _socket: &Path, _guest: &Guest) -> Option<Self> {
        None
    }
}
