//! Dragonball, Kata's own monitor. Read from kata-containers/kata-containers:
//! src/dragonball/dbs_virtio_devices/src/vhost/vhost_user/connection.rs at 1265d543795c and block.rs at 0eaf23e0db14.
//! It was built against SPDK: it reads the config space at 0x100, and at a reconnect it does not say where the rings
//! stand.

use std::path::Path;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VHOST_USER_CONFIG_OFFSET, VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::vhost_crate::{set_mem_table, set_vring_addr, set_vring_call, set_vring_kick, set_vring_num};
use super::{Guest, Vmm};
use crate::frontend::blk::{Config, feature};

const CONFIG_BYTES: u32 = 60;

fn protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::REPLY_ACK
}

pub struct Dragonball {
    vu: Frontend,
    offered: u64,
    config: Config,
    queues: usize,
}

impl Dragonball {
    /// `Endpoint::negotiate`.
    fn negotiate(&mut self, guest: &Guest, reconnect: bool) {
        let vu = &mut self.vu;
        vu.set_owner().expect("SET_OWNER");
        vu.get_features().expect("GET_FEATURES");
        let acked = guest.accepted | self.offered & feature::PROTOCOL_FEATURES;
        vu.set_features(acked).expect("SET_FEATURES");
        let offered = vu.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        assert!(offered.contains(VhostUserProtocolFeatures::MQ));
        // A second time on the first connection, and then less than before.
        vu.set_protocol_features(offered & protocol()).expect("SET_PROTOCOL_FEATURES");
        assert!(vu.get_queue_num().expect("GET_QUEUE_NUM") >= self.queues as u64);
        (0..self.queues).for_each(|queue| set_vring_call(&self.vu, guest, queue));
        set_mem_table(&self.vu, guest);
        (0..self.queues).for_each(|queue| set_vring_num(&self.vu, guest, queue));
        if !reconnect {
            (0..self.queues).for_each(|queue| self.vu.set_vring_base(queue, 0).expect("SET_VRING_BASE"));
        }
        (0..self.queues).for_each(|queue| set_vring_addr(&self.vu, guest, queue));
        (0..self.queues).for_each(|queue| set_vring_kick(&self.vu, guest, queue));
        (0..self.queues).for_each(|queue| set_vring_call(&self.vu, guest, queue));
        (0..self.queues).for_each(|queue| self.vu.set_vring_enable(queue, true).expect("SET_VRING_ENABLE"));
    }
}

impl Vmm for Dragonball {
    const QUEUES: u16 = 4;

    fn create(socket: &Path, queues: u16) -> Self {
        let mut vu = Frontend::connect(socket, 1).expect("connect");
        let offered = vu.get_features().expect("GET_FEATURES");
        vu.set_features(offered).expect("SET_FEATURES");
        let protocol = vu.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        vu.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
        let room = [0; CONFIG_BYTES as usize];
        let config = vu.get_config(VHOST_USER_CONFIG_OFFSET, CONFIG_BYTES, VhostUserConfigFlags::WRITABLE, &room);
        Self { vu, offered, config: Config(config.expect("GET_CONFIG").1), queues: usize::from(queues) }
    }

    fn offers(&self) -> u64 {
        (self.offered | feature::MQ | feature::SEG_MAX) & !feature::PROTOCOL_FEATURES
    }

    fn config(&mut self) -> Config {
        self.config.clone()
    }

    fn activate(&mut self, guest: &Guest) {
        self.negotiate(guest, false);
    }

    // Only the virtual CPUs stop; the back-end is not told.
    fn pause(&mut self, _guest: &Guest) {}
    fn resume(&mut self, _guest: &Guest) {}

    fn reset(&mut self, _guest: &Guest) -> bool {
        false
    }

    fn reconnect(self, socket: &Path, guest: &Guest) -> Option<Self> {
        let vu = Frontend::connect(socket, 1).expect("connect");
        let mut monitor = Self { vu, ..self };
        monitor.negotiate(guest, true);
        Some(monitor)
    }
}
