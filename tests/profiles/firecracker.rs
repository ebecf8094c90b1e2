//! Firecracker. Read from firecracker-microvm/firecracker at 81b38b9dad60: src/vmm/src/devices/virtio/vhost_user.rs and
//! block/vhost_user/device.rs. CONFIG is all it negotiates, so nothing is acknowledged.

use std::path::Path;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::vhost_crate::{set_mem_table, set_vring_addr, set_vring_call, set_vring_kick, set_vring_num};
use super::{Guest, Vmm};
use crate::frontend::blk::{Config, feature};

/// With `cache_type: Writeback`.
const FEATURES: u64 =
    feature::VERSION_1 | feature::EVENT_IDX | feature::PROTOCOL_FEATURES | feature::RO | feature::FLUSH;

const CONFIG_BYTES: u32 = 60;

pub struct Firecracker {
    vu: Frontend,
    features: u64,
}

impl Vmm for Firecracker {
    const QUEUES: u16 = 1;

    fn create(socket: &Path, queues: u16) -> Self {
        let mut vu = Frontend::connect(socket, u64::from(queues)).expect("connect");
        vu.set_owner().expect("SET_OWNER");
        let features = vu.get_features().expect("GET_FEATURES") & FEATURES;
        let protocol = vu.get_protocol_features().expect("GET_PROTOCOL_FEATURES") & VhostUserProtocolFeatures::CONFIG;
        vu.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
        Self { vu, features }
    }

    fn offers(&self) -> u64 {
        self.features & !feature::PROTOCOL_FEATURES
    }

    /// At creation, and again when its API says that the drive has changed.
    fn config(&mut self) -> Config {
        let room = [0; CONFIG_BYTES as usize];
        let config = self.vu.get_config(0, CONFIG_BYTES, VhostUserConfigFlags::WRITABLE, &room);
        Config(config.expect("GET_CONFIG").1)
    }

    fn activate(&mut self, guest: &Guest) {
        let acked = guest.accepted | self.features & feature::PROTOCOL_FEATURES;
        self.vu.set_features(acked).expect("SET_FEATURES");
        set_mem_table(&self.vu, guest);
        set_vring_num(&self.vu, guest, 0);
        set_vring_addr(&self.vu, guest, 0);
        self.vu.set_vring_base(0, guest.queues[0].next_avail()).expect("SET_VRING_BASE");
        set_vring_call(&self.vu, guest, 0);
        set_vring_kick(&self.vu, guest, 0);
        self.vu.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
    }

    // Only the virtual CPUs stop; the back-end is not told.
    fn pause(&mut self, _guest: &Guest) {}
    fn resume(&mut self, _guest: &Guest) {}

    fn reset(&mut self, _guest: &Guest) -> bool {
        false
    }

    fn reconnect(self, _socket: &Path, _guest: &Guest) -> Option<Self> {
        None
    }
}
