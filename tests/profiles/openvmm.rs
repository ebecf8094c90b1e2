//! OpenVMM. Read from microsoft/openvmm: vm/devices/virtio/vhost_user_frontend/src/lib.rs at 2395da045c22.

use std::os::fd::AsFd;
use std::path::Path;

use super::raw::{Raw, address_bytes, set_mem_table};
use super::{Guest, Vmm};
use crate::frontend::blk::{Config, feature};
use crate::frontend::session::{protocol, vring_state};
use crate::frontend::wire::code;

const PROTOCOL: u64 = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::RESET_DEVICE;

/// The whole config space that the protocol has room for, asked for at once.
const CONFIG_BYTES: u32 = 256;

pub struct OpenVmm {
    raw: Raw,
    offered: u64,
    config: Config,
    /// Kept by it, per queue: where the ring goes on.
    bases: Vec<u32>,
    memory_sent: bool,
    features_sent: bool,
}

impl OpenVmm {
    fn stop_queue(&self, queue: u32) -> u32 {
        self.raw.send_acked(code::SET_VRING_ENABLE, &vring_state(queue, 0), &[]);
        self.raw.get_vring_base(queue)
    }
}

impl Vmm for OpenVmm {
    const QUEUES: u16 = 4;

    fn create(socket: &Path, queues: u16) -> Self {
        let raw = Raw::connect(socket);
        let offered = raw.get(code::GET_FEATURES);
        // All that is offered, long before a guest is there.
        raw.send(code::SET_FEATURES, &(offered | feature::PROTOCOL_FEATURES).to_ne_bytes(), &[]);
        let protocol_features = raw.get(code::GET_PROTOCOL_FEATURES) & PROTOCOL;
        assert_eq!(protocol_features, PROTOCOL);
        raw.send(code::SET_PROTOCOL_FEATURES, &protocol_features.to_ne_bytes(), &[]);
        raw.send(code::SET_OWNER, &[], &[]);
        assert_eq!(raw.get(code::GET_QUEUE_NUM), u64::from(queues), "its guests see all queues");
        let config = Config(raw.get_config(0, CONFIG_BYTES, 0));
        let bases = vec![0; usize::from(queues)];
        Self { raw, offered, config, bases, memory_sent: false, features_sent: false }
    }

    fn offers(&self) -> u64 {
        self.offered & !feature::PROTOCOL_FEATURES
    }

    fn config(&mut self) -> Config {
        self.config.clone()
    }

    fn activate(&mut self, guest: &Guest) {
        for (index, queue) in guest.queues.iter().enumerate() {
            // Memory and features go out with the first queue.
            if !std::mem::replace(&mut self.memory_sent, true) {
                set_mem_table(&self.raw, guest, true);
            }
            if !std::mem::replace(&mut self.features_sent, true) {
                let acked = guest.accepted & self.offered | feature::PROTOCOL_FEATURES;
                self.raw.send_acked(code::SET_FEATURES, &acked.to_ne_bytes(), &[]);
            }
            let number = index as u32;
            self.raw.send_acked(code::SET_VRING_NUM, &vring_state(number, u32::from(queue.ring.size)), &[]);
            self.raw.send_acked(code::SET_VRING_ADDR, &address_bytes(guest, index), &[]);
            self.raw.send_acked(code::SET_VRING_BASE, &vring_state(number, self.bases[index]), &[]);
            self.raw.send_acked(code::SET_VRING_KICK, &(index as u64).to_ne_bytes(), &[queue.kick.as_fd()]);
            self.raw.send_acked(code::SET_VRING_CALL, &(index as u64).to_ne_bytes(), &[queue.call.as_fd()]);
            self.raw.send_acked(code::SET_VRING_ENABLE, &vring_state(number, 1), &[]);
        }
    }

    fn pause(&mut self, guest: &Guest) {
        for (index, queue) in guest.queues.iter().enumerate() {
            self.bases[index] = self.stop_queue(index as u32);
            assert_eq!(self.bases[index], u32::from(queue.used_idx()), "queue {index}");
        }
    }

    fn resume(&mut self, guest: &Guest) {
        self.activate(guest);
    }

    fn reset(&mut self, guest: &Guest) -> bool {
        for queue in 0..guest.queues.len() as u32 {
            self.stop_queue(queue);
        }
        self.features_sent = false;
        self.bases.fill(0);
        self.raw.send_acked(code::RESET_DEVICE, &[], &[]);
        true
    }

    fn reconnect(self, _socket: &Path, _guest: &Guest) -> Option<Self> {
        None
    }
}
