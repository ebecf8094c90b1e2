//! What is offered and what may be acknowledged (specification of the device, sections 1 and 2).

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{Request, feature};
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::session::{Session, protocol};
use crate::image::{Image, pattern};

fn session(backend: &Backend) -> Session {
    Session::new(backend.connect())
}

/// Reads and writes through a device that a front-end of this kind brought up.
#[track_caller]
fn serves(profile: &Profile) {
    let image = Image::filled(1 << 20);
    let backend = Setup::file(image.path()).start();
    let mut device = backend.device(profile);
    let data = pattern(1, 4096);
    device.queue().write(8, &data);
    assert_eq!(device.queue().read(8, 4096), data);
    assert_eq!(device.queue().read(0, 4096), pattern(0, 4096));
    assert_eq!(image.read(4096, 4096), data, "on the host");
}

const ALWAYS: u64 = feature::SEG_MAX
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::TOPOLOGY
    | feature::CONFIG_WCE
    | feature::MQ
    | feature::LOG_ALL
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VERSION_1
    | feature::RING_PACKED;

#[test]
fn a_writable_export_offers_exactly_what_it_serves() {
    let image = Image::empty(1 << 20);
    let backend = Setup::file(image.path()).start();
    let expected = ALWAYS | feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(session(&backend).get_features(), expected, "{expected:#x} expected");
}

#[test]
fn a_read_only_export_says_so_and_offers_nothing_that_writes() {
    let image = Image::empty(1 << 20);
    let backend = Setup::file(image.path()).read_only().start();
    let expected = ALWAYS | feature::RO;
    assert_eq!(session(&backend).get_features(), expected, "{expected:#x} expected");
}

#[test]
fn a_reset_of_single_rings_is_not_offered() {
    // The front-end would pass it to the guest and tell the back-end nothing: it would use a freed ring.
    let offered = session(&Setup::null(1 << 20).start()).get_features();
    assert_eq!(offered & feature::RING_RESET, 0);
}

#[test]
fn what_the_device_cannot_keep_is_not_offered() {
    let offered = session(&Setup::null(1 << 20).start()).get_features();
    let never = feature::SIZE_MAX | feature::ACCESS_PLATFORM | feature::IN_ORDER;
    assert_eq!(offered & never, 0);
}

#[test]
fn packed_rings_are_offered_unless_the_export_is_told_not_to() {
    let backend = Setup::null(1 << 20).export("packed=off").start();
    assert_eq!(session(&backend).get_features() & feature::RING_PACKED, 0);
    let mut device = backend.device(&Profile { features: !0, ..Profile::qemu() });
    assert!(!device.queue().ring.packed);
    device.queue().works();
}

#[test]
fn logging_for_migration_is_offered() {
    let offered = session(&Setup::null(1 << 20).start()).get_features();
    assert_ne!(offered & feature::LOG_ALL, 0);
}

#[test]
fn the_protocol_features_that_are_served_are_offered() {
    let offered = session(&Setup::null(1 << 20).start()).get_protocol_features();
    let served = protocol::MQ
        | protocol::LOG_SHMFD
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::CONFIG
        | protocol::INFLIGHT_SHMFD
        | protocol::RESET_DEVICE
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::DEVICE_STATE
        | protocol::GET_VRING_BASE_INFLIGHT;
    assert_eq!(offered & !protocol::BACKEND_SEND_FD, served, "{offered:#x} offered, {served:#x} expected");
}

#[test]
fn protocol_features_that_would_break_front_ends_are_never_offered() {
    // QEMU acknowledges every offered bit of 0 to 19, whether it knows it or not.
    let offered = session(&Setup::null(1 << 20).start()).get_protocol_features();
    let never = protocol::INBAND_NOTIFICATIONS | protocol::XEN_MMAP | protocol::STATUS;
    assert_eq!(offered & never, 0, "{offered:#x} offered");
}

#[test]
fn a_reconnect_is_offered_what_the_first_connection_was() {
    let backend = Setup::null(1 << 20).export("num-queues=3").start();
    let offers = || {
        let mut session = session(&backend);
        let offered = (session.get_features(), session.get_protocol_features());
        session.set_protocol_features(offered.1).accepted();
        (offered, session.get_queue_num(), session.get_max_mem_slots())
    };
    let first = offers();
    assert_eq!(offers(), first);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::unstarted());
    for extra in [feature::ACCESS_PLATFORM, feature::RING_RESET, feature::SIZE_MAX, 1 << 60] {
        device.session.set_features(device.offered | extra).refused();
    }
    assert!(device.session.alive());
}

#[test]
fn a_front_end_without_version_1_is_refused_and_the_log_says_why() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::unstarted());
    device.session.set_features(device.offered & !feature::VERSION_1).refused();
    drop(device);
    let said = backend.stop();
    assert!(said.contains("VERSION_1"), "the log says nothing of it:\n{said}");
}

#[test]
fn protocol_features_that_were_not_offered_are_refused() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::unstarted());
    let agreed = device.session.protocol_features;
    device.session.set_protocol_features(agreed | protocol::INBAND_NOTIFICATIONS).refused();
    assert!(device.session.alive());
}

#[test]
fn the_number_of_queues_is_told() {
    let backend = Setup::null(1 << 20).export("num-queues=5").start();
    let device = backend.device(&Profile::unstarted());
    assert_eq!(device.session.get_queue_num(), 5);
}

#[test]
fn at_least_509_memory_slots_are_offered() {
    let backend = Setup::null(1 << 20).start();
    let slots = backend.device(&Profile::unstarted()).session.get_max_mem_slots();
    assert!(slots >= 509, "{slots} slots");
}

#[test]
fn a_front_end_like_qemu_is_served() {
    serves(&Profile::qemu());
}

#[test]
fn a_front_end_like_libblkio_is_served() {
    serves(&Profile::libblkio());
}

#[test]
fn a_front_end_like_cloud_hypervisor_is_served() {
    serves(&Profile::cloud_hypervisor());
}

#[test]
fn a_front_end_like_firecracker_is_served() {
    serves(&Profile::firecracker());
}

#[test]
fn a_front_end_without_protocol_features_is_served() {
    serves(&Profile::bare());
}

#[test]
fn memory_told_slot_by_slot_at_addresses_of_its_own_is_served() {
    serves(&Profile { memory_by: MemoryBy::Slots, ..Profile::qemu() });
}

#[test]
fn a_guest_that_takes_no_optional_feature_is_served() {
    let needed = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
    serves(&Profile { features: needed, ..Profile::qemu() });
}

#[test]
fn a_back_end_channel_may_be_replaced() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    let (theirs, _ours) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    device.session.set_backend_req_fd(std::os::fd::AsFd::as_fd(&theirs)).accepted();
    device.queue().works();
}

#[test]
fn a_front_end_may_ask_for_everything_before_it_owns_the_device() {
    let backend = Setup::null(1 << 20).start();
    let mut session = session(&backend);
    let protocol_features = session.get_protocol_features();
    let features = session.get_features();
    session.set_protocol_features(protocol_features).accepted();
    session.set_features(features).accepted();
    session.set_owner().accepted();
    // QEMU owns the device again after a reset.
    session.set_owner().accepted();
    assert_eq!(session.get_features(), features);
}

#[test]
fn unused_queues_need_not_be_started() {
    let backend = Setup::null(1 << 20).export("num-queues=8").start();
    let mut device: Device = backend.device(&Profile::queues(2));
    let answer = device.queues[1].request(&Request::read(0, 512));
    assert_eq!(answer.status, 0);
    device.queues[0].works();
}
