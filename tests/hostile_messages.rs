//! Front-ends that make mistakes or mean harm (specification of the device, section 10): a message that is refused and
//! acknowledged leaves the connection alone, any other bad one ends it, and the next front-end is served.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Setup};
use crate::frontend::blk::CONFIG_SIZE;
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::frontend::session::{Session, protocol, vring_state};
use crate::frontend::wait::{DEADLINE, Event};
use crate::frontend::wire::{HEADER_SIZE, NEED_REPLY, REPLY, VERSION, code, header};

/// How long a message in the making may stand still, and how much later that may be noticed.
const HALF_A_MESSAGE: Duration = Duration::from_secs(10);

fn null() -> Backend {
    Setup::null(1 << 20).export("num-queues=2").start()
}

/// Lets `harm` send something to a device that runs: it is refused, and everything goes on.
#[track_caller]
fn is_refused(harm: impl FnOnce(&Device) -> crate::frontend::session::Ack) {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    harm(&device).refused();
    device.queue().works();
    assert!(device.session.alive());
}

/// Lets `harm` send something to a device that runs: the connection is closed, and the next front-end is served.
#[track_caller]
fn ends_the_connection(harm: impl FnOnce(&Session)) {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    harm(&device.session);
    assert!(device.session.connection.closed_within(DEADLINE), "the connection is open");
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

/// Sends a message, whether or not the back-end is still there to take all of it.
fn send(session: &Session, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let _ = session.connection.send(code, flags, payload, fds);
}

#[test]
fn a_ring_that_does_not_exist_is_refused() {
    for queue in [2, 255] {
        let event = Event::new();
        is_refused(|device| device.session.set_vring_num(queue, 128));
        is_refused(|device| device.session.set_vring_base(queue, 0));
        is_refused(|device| device.session.set_vring_addr(queue, &device.addresses(0)));
        is_refused(|device| device.session.set_vring_enable(queue, 1));
        is_refused(|device| device.session.set_vring_kick(u64::from(queue), Some(event.as_fd())));
        is_refused(|device| device.session.set_vring_call(u64::from(queue), Some(event.as_fd())));
        is_refused(|device| device.session.set_vring_err(u64::from(queue), Some(event.as_fd())));
    }
}

#[test]
fn a_ring_number_of_32_bits_is_refused() {
    for queue in [256, 0x1_0000, u32::MAX] {
        is_refused(|device| device.session.set_vring_num(queue, 128));
        is_refused(|device| device.session.set_vring_base(queue, 0));
        is_refused(|device| device.session.set_vring_enable(queue, 1));
    }
}

#[test]
fn a_base_that_is_no_index_is_refused() {
    let backend = null();
    let device = backend.device(&Profile::unstarted());
    device.session.set_vring_base(0, 0x1_0000).refused();
    device.session.set_vring_base(0, u32::MAX).refused();
    assert!(device.session.alive());
}

#[test]
fn a_ring_without_memory_does_not_start() {
    let backend = null();
    let device = backend.device(&Profile::unstarted());
    device.session.set_vring_num(0, 128).accepted();
    // Addresses may be translated here or at the start.
    let _ = device.session.set_vring_addr(0, &device.addresses(0));
    let kick = device.queues[0].kick.as_fd();
    device.session.set_vring_kick(0, Some(kick)).not_accepted();
    device.queues[0].kick.signal();
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn a_ring_without_addresses_does_not_start() {
    let backend = null();
    let mut device = backend.device(&Profile::unstarted());
    device.announce(MemoryBy::Table);
    device.session.set_vring_num(0, 128).accepted();
    device.session.set_vring_kick(0, Some(device.queues[0].kick.as_fd())).not_accepted();
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn ring_addresses_that_are_not_aligned_are_not_accepted() {
    for skew in [[1, 0, 0], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]] {
        let backend = null();
        let device = backend.device(&Profile::qemu());
        let mut addresses = device.addresses(0);
        addresses.descriptors += skew[0];
        addresses.used += skew[1];
        addresses.avail += skew[2];
        device.session.set_vring_addr(0, &addresses).not_accepted();
        drop(device);
        backend.device(&Profile::qemu()).queue().works();
    }
}

#[test]
fn an_enable_that_is_neither_on_nor_off_is_not_accepted() {
    let backend = null();
    let device = backend.device(&Profile::qemu());
    device.session.set_vring_enable(0, 2).not_accepted();
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn the_base_of_a_ring_that_does_not_exist_ends_the_connection() {
    ends_the_connection(|session| send(session, code::GET_VRING_BASE, 0, &vring_state(2, 0), &[]));
    ends_the_connection(|session| send(session, code::GET_VRING_BASE, 0, &vring_state(u32::MAX, 0), &[]));
}

#[test]
fn an_unknown_message_ends_the_connection() {
    for code in [0, 99, 1000, u32::MAX] {
        ends_the_connection(|session| send(session, code, NEED_REPLY, &[0; 8], &[]));
    }
}

#[test]
fn a_message_of_a_feature_that_was_not_agreed_ends_the_connection() {
    ends_the_connection(|session| send(session, code::SET_LOG_BASE, 0, &[0; 16], &[Event::new().as_fd()]));
    ends_the_connection(|session| send(session, code::GET_INFLIGHT_FD, 0, &[1; 24], &[]));
}

#[test]
fn a_payload_of_the_wrong_size_ends_the_connection() {
    for (code, size) in [
        (code::GET_FEATURES, 8),
        (code::SET_FEATURES, 0),
        (code::SET_FEATURES, 7),
        (code::SET_FEATURES, 16),
        (code::SET_OWNER, 8),
        (code::SET_VRING_NUM, 4),
        (code::SET_VRING_ADDR, 8),
        (code::SET_VRING_BASE, 16),
        (code::GET_VRING_BASE, 0),
        (code::SET_VRING_KICK, 4),
        (code::SET_VRING_CALL, 16),
        (code::GET_PROTOCOL_FEATURES, 8),
        (code::GET_QUEUE_NUM, 8),
        (code::SET_VRING_ENABLE, 4),
        (code::GET_CONFIG, 4),
        (code::GET_CONFIG, 100),
        (code::RESET_DEVICE, 8),
        (code::GET_MAX_MEM_SLOTS, 4),
        (code::ADD_MEM_REG, 8),
        (code::REM_MEM_REG, 48),
    ] {
        ends_the_connection(|session| send(session, code, 0, &vec![0; size], &[]));
    }
}

#[test]
fn a_config_message_whose_sizes_disagree_ends_the_connection() {
    let payload = |offset: u32, size: u32, bytes: usize| {
        [offset.to_ne_bytes().to_vec(), size.to_ne_bytes().to_vec(), vec![0; 4 + bytes]].concat()
    };
    for (size, bytes) in [(CONFIG_SIZE, 4), (4, CONFIG_SIZE as usize), (u32::MAX, 4)] {
        ends_the_connection(|session| send(session, code::GET_CONFIG, 0, &payload(0, size, bytes), &[]));
    }
}

#[test]
fn a_memory_table_that_disagrees_with_its_size_or_descriptors_is_not_accepted() {
    let event = Event::new();
    let fd = event.as_fd();
    for (regions, bytes, fds) in [
        (1u32, 0, vec![fd]),
        (2, 32, vec![fd, fd]),
        (1, 64, vec![fd]),
        (1, 32, vec![]),
        (1, 32, vec![fd, fd]),
        (0, 0, vec![]),
        (u32::MAX, 32, vec![fd]),
        (33, 33 * 32, vec![fd; 33]),
    ] {
        let backend = null();
        let device = backend.device(&Profile::unstarted());
        let payload = [regions.to_ne_bytes().to_vec(), vec![0; 4 + bytes]].concat();
        device.session.tell(code::SET_MEM_TABLE, &payload, &fds).not_accepted();
        drop(device);
        backend.device(&Profile::qemu()).queue().works();
    }
}

#[test]
fn a_message_of_more_than_4096_bytes_ends_the_connection() {
    for size in [4097, 1 << 20, u32::MAX] {
        ends_the_connection(|session| {
            let _ = session.connection.send_bytes(&header(code::SET_MEM_TABLE, VERSION, size), &[]);
            let _ = session.connection.send_bytes(&[0; 8192], &[]);
        });
    }
}

#[test]
fn a_message_of_another_version_ends_the_connection() {
    for version in [0, 2, 3] {
        ends_the_connection(|session| {
            let _ = session.connection.send_bytes(&header(code::GET_FEATURES, version, 0), &[]);
        });
    }
}

#[test]
fn a_reply_instead_of_a_request_ends_the_connection() {
    ends_the_connection(|session| send(session, code::GET_FEATURES, REPLY, &[], &[]));
}

#[test]
fn flags_that_mean_nothing_end_the_connection() {
    ends_the_connection(|session| send(session, code::GET_FEATURES, 1 << 31, &[], &[]));
}

#[test]
fn noise_ends_the_connection() {
    ends_the_connection(|session| {
        let _ = session.connection.send_bytes(&crate::image::pattern(7, 64 << 10), &[]);
    });
}

#[test]
fn descriptors_where_none_belong_end_the_connection() {
    let event = Event::new();
    ends_the_connection(|session| send(session, code::GET_FEATURES, 0, &[], &[event.as_fd()]));
    ends_the_connection(|session| send(session, code::SET_VRING_NUM, 0, &vring_state(0, 128), &[event.as_fd()]));
}

#[test]
fn a_missing_descriptor_ends_the_connection() {
    // Bit 8 of the payload, which says that none comes, is not set.
    for code in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
        ends_the_connection(|session| send(session, code, 0, &0u64.to_ne_bytes(), &[]));
    }
    ends_the_connection(|session| send(session, code::ADD_MEM_REG, 0, &[1; 40], &[]));
}

#[test]
fn too_many_descriptors_end_the_connection_and_none_leaks() {
    let backend = null();
    let event = Event::new();
    backend.device(&Profile::qemu()).queue().works();
    let quiet = || {
        let _device = backend.device(&Profile::qemu());
        backend.open_fds()
    };
    let before = quiet();
    for count in [2, 33, 253] {
        let device = backend.device(&Profile::qemu());
        send(&device.session, code::SET_VRING_CALL, 0, &0u64.to_ne_bytes(), &vec![event.as_fd(); count]);
        assert!(device.session.connection.closed_within(DEADLINE), "{count} descriptors");
    }
    assert_eq!(quiet(), before, "descriptors are left open");
}

#[test]
fn descriptors_split_from_their_header_end_the_connection() {
    let event = Event::new();
    ends_the_connection(|session| {
        let mut message = header(code::SET_VRING_CALL, VERSION, 8).to_vec();
        message.extend(0u64.to_ne_bytes());
        // The descriptor comes with the first four bytes alone: the kernel gives no reader more than those at once.
        let _ = session.connection.send_bytes(&message[..4], &[event.as_fd()]);
        let _ = session.connection.send_bytes(&message[4..], &[]);
    });
}

#[test]
fn a_message_in_pieces_is_a_message() {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    for cut in [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1] {
        let mut message = header(code::SET_VRING_NUM, VERSION | NEED_REPLY, 8).to_vec();
        message.extend(vring_state(1, 64));
        let (first, second) = message.split_at(cut);
        device.session.connection.send_bytes(first, &[]).expect("send");
        // The queue's thread is not the connection's: this gives the back-end time to look at the first piece.
        for _ in 0..20 {
            device.queue().works();
        }
        device.session.connection.send_bytes(second, &[]).expect("send");
        assert_eq!(device.session.connection.receive().expect("an acknowledgement").u64(), 0);
    }
    for byte in header(code::GET_FEATURES, VERSION, 0) {
        device.session.connection.send_bytes(&[byte], &[]).expect("send");
    }
    assert_eq!(device.session.connection.receive().expect("features").u64(), device.offered);
}

#[test]
fn several_messages_in_one_piece_are_all_answered() {
    let backend = null();
    let device = backend.device(&Profile::qemu());
    let messages = header(code::GET_FEATURES, VERSION, 0).repeat(50);
    device.session.connection.send_bytes(&messages, &[]).expect("send");
    for _ in 0..50 {
        assert_eq!(device.session.connection.receive().expect("features").u64(), device.offered);
    }
}

#[test]
fn half_a_message_and_silence_ends_the_connection_and_costs_no_cpu() {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let mut message = header(code::SET_FEATURES, VERSION, 8).to_vec();
    message.extend([0; 3]);
    let (ticks, start) = (backend.cpu_ticks(), Instant::now());
    device.session.connection.send_bytes(&message, &[]).expect("send");
    assert!(device.session.connection.closed_within(HALF_A_MESSAGE * 3 / 2), "the connection is open");
    let (took, burnt) = (start.elapsed(), backend.cpu_ticks() - ticks);
    assert!(took > HALF_A_MESSAGE * 9 / 10, "closed after {took:?}");
    assert!(burnt <= 5, "{burnt} ticks were spent on waiting");
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn thousands_of_messages_are_answered_and_leave_nothing_behind() {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    device.queue().works();
    let before = backend.open_fds();
    for _ in 0..3000 {
        let event = Event::new();
        device.session.set_vring_err(0, Some(event.as_fd())).accepted();
        device.session.set_vring_call(1, Some(event.as_fd())).accepted();
        device.session.get_features();
    }
    assert!(backend.open_fds() <= before + 2, "{before} descriptors before, {} after", backend.open_fds());
    device.queue().works();
}

#[test]
fn memory_tables_told_thousands_of_times_leave_nothing_behind() {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    device.tell_memory(MemoryBy::Table);
    let maps = || std::fs::read_to_string(backend.proc("maps")).expect("maps of a running process").lines().count();
    let before = (backend.open_fds(), maps());
    for _ in 0..1000 {
        device.tell_memory(MemoryBy::Table);
    }
    let after = (backend.open_fds(), maps());
    assert!(after.0 <= before.0 + 2 && after.1 <= before.1 + 8, "(descriptors, mappings): {before:?}, then {after:?}");
    device.queue().works();
}

/// Sends questions and reads no answers until the back-end takes no more.
fn flood(session: &Session) {
    session.connection.set_write_timeout(Duration::from_millis(300));
    let questions = header(code::GET_FEATURES, VERSION, 0).repeat(1000);
    let start = Instant::now();
    while session.connection.send_bytes(&questions, &[]).is_ok() {
        assert!(start.elapsed() < 3 * DEADLINE, "the back-end buffers without bound");
    }
}

#[test]
fn replies_that_are_never_read_do_not_hinder_the_queues() {
    let backend = null();
    let mut device = backend.device(&Profile::qemu());
    flood(&device.session);
    for _ in 0..100 {
        device.queue().works();
    }
}

#[test]
fn replies_that_are_never_read_do_not_hinder_a_stop() {
    let backend = null();
    let device = backend.device(&Profile::qemu());
    flood(&device.session);
    backend.stop();
}

#[test]
fn a_front_end_that_read_no_replies_and_went_is_followed_by_the_next() {
    let backend = null();
    let device = backend.device(&Profile::qemu());
    flood(&device.session);
    drop(device);
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn messages_before_the_features_are_agreed_do_no_harm() {
    let backend = null();
    let mut session = Session::new(backend.connect());
    session.get_features();
    session.set_protocol_features(protocol::REPLY_ACK).accepted();
    let event = Event::new();
    // None of these can be meant; whether each is refused or ends the connection is not the point.
    let harm: [fn(&Session, &Event) -> crate::frontend::session::Ack; 4] = [
        |session, event| session.set_vring_kick(0, Some(event.as_fd())),
        |session, _| session.set_vring_enable(0, 1),
        |session, _| session.reset_device(),
        |session, _| session.set_config(32, &[1]),
    ];
    for message in harm {
        let _ = message(&session, &event);
    }
    drop(session);
    backend.device(&Profile::qemu()).queue().works();
}
