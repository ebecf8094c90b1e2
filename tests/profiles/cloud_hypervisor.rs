//! cloud-hypervisor. Read from cloud-hypervisor/cloud-hypervisor at ae44c2971c83: virtio-devices/src/vhost_user/blk.rs,
//! vu_common_ctrl.rs and mod.rs.

use std::path::Path;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::vhost_crate::{set_mem_table, set_vring_addr, set_vring_call, set_vring_kick, set_vring_num};
use super::{Guest, Vmm};
use crate::frontend::blk::{Config, feature};

/// With VIRTIO_BLK_F_GEOMETRY, which has no name here; LOG_ALL for migration.
const FEATURES: u64 = feature::SIZE_MAX
    | feature::SEG_MAX
    | 1 << 4
    | feature::RO
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::TOPOLOGY
    | feature::CONFIG_WCE
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::MQ
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::IN_ORDER
    | feature::PROTOCOL_FEATURES
    | feature::LOG_ALL;

/// No back-end channel: a resize is not told to it.
fn protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE
}

/// Its `VirtioBlockConfig`.
const CONFIG_BYTES: u32 = 60;

pub struct CloudHypervisor {
    vu: Frontend,
    queues: usize,
    acked: u64,
    acked_protocol: VhostUserProtocolFeatures,
    config: Config,
}

fn connect(socket: &Path, queues: u16) -> (Frontend, u64) {
    let vu = Frontend::connect(socket, u64::from(queues)).expect("connect");
    vu.set_owner().expect("SET_OWNER");
    let offered = vu.get_features().expect("GET_FEATURES");
    (vu, offered)
}

fn set_protocol_features(vu: &mut Frontend, features: VhostUserProtocolFeatures) {
    vu.set_protocol_features(features).expect("SET_PROTOCOL_FEATURES");
    if features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        vu.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
}

impl CloudHypervisor {
    fn set_up(&mut self, guest: &Guest, base: impl Fn(usize) -> u16) {
        let acked = guest.accepted | self.acked & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.vu.set_features(acked).expect("SET_FEATURES");
        set_mem_table(&self.vu, guest);
        (0..self.queues).for_each(|queue| set_vring_num(&self.vu, guest, queue));
        for queue in 0..self.queues {
            set_vring_addr(&self.vu, guest, queue);
            self.vu.set_vring_base(queue, base(queue)).expect("SET_VRING_BASE");
            set_vring_call(&self.vu, guest, queue);
            set_vring_kick(&self.vu, guest, queue);
        }
        self.enable(true);
    }

    fn enable(&mut self, enable: bool) {
        for queue in 0..self.queues {
            self.vu.set_vring_enable(queue, enable).expect("SET_VRING_ENABLE");
        }
    }
}

impl Vmm for CloudHypervisor {
    const QUEUES: u16 = 4;

    fn create(socket: &Path, queues: u16) -> Self {
        let (mut vu, offered) = connect(socket, queues);
        let acked = offered & FEATURES;
        let acked_protocol = vu.get_protocol_features().expect("GET_PROTOCOL_FEATURES") & protocol();
        set_protocol_features(&mut vu, acked_protocol);
        assert!(vu.get_queue_num().expect("GET_QUEUE_NUM") >= u64::from(queues));
        let room = vec![0; CONFIG_BYTES as usize];
        let config = vu.get_config(0, CONFIG_BYTES, VhostUserConfigFlags::WRITABLE, &room).expect("GET_CONFIG").1;
        Self { vu, queues: usize::from(queues), acked, acked_protocol, config: Config(config) }
    }

    fn offers(&self) -> u64 {
        self.acked & !feature::PROTOCOL_FEATURES
    }

    fn config(&mut self) -> Config {
        self.config.clone()
    }

    fn activate(&mut self, guest: &Guest) {
        // The guest's own available index, which is 0 when its driver has just set up the ring.
        self.set_up(guest, |queue| guest.queues[queue].next_avail());
    }

    fn pause(&mut self, _guest: &Guest) {
        self.enable(false);
    }

    fn resume(&mut self, _guest: &Guest) {
        self.enable(true);
    }

    fn reset(&mut self, _guest: &Guest) -> bool {
        for queue in 0..self.queues {
            self.vu.set_vring_enable(queue, false).expect("SET_VRING_ENABLE");
            self.vu.get_vring_base(queue).expect("GET_VRING_BASE");
        }
        true
    }

    fn reconnect(self, socket: &Path, guest: &Guest) -> Option<Self> {
        let (mut vu, offered) = connect(socket, self.queues as u16);
        assert_eq!(offered & FEATURES, self.acked, "the features shrank");
        // As agreed before, without asking.
        set_protocol_features(&mut vu, self.acked_protocol);
        let mut monitor = Self { vu, ..self };
        // Without an in-flight region, from the guest's available index: what is under way then is lost.
        monitor.set_up(guest, |queue| guest.queues[queue].next_avail());
        Some(monitor)
    }
}
