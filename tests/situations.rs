//! Situations in the life of a virtual machine (specification of the device, section 12), each as the messages that a
//! front-end sends in it. Those of migration and resize come with them.

use crate::backend::Setup;
use crate::frontend::blk::{Framing, OK, Request, feature};
use crate::frontend::device::{Device, MemoryBy, Profile};
use crate::image::{Image, pattern};

/// Stops all rings as QEMU does: disables them, then asks each for its base, which must be what is completed.
#[track_caller]
fn stop_rings(device: &Device) {
    for queue in 0..device.queues.len() {
        device.enable(queue, false);
    }
    for (index, queue) in device.queues.iter().enumerate() {
        assert!(queue.is_drained(device.session.get_vring_base(index as u32)), "queue {index}");
    }
}

/// Starts all rings with these features, as at every start of a virtual machine.
#[track_caller]
fn start_rings(device: &mut Device, features: u64) {
    device.session.features = features;
    for queue in &mut device.queues {
        queue.event_idx = features & feature::EVENT_IDX != 0;
    }
    device.announce(MemoryBy::Table);
    for queue in 0..device.queues.len() {
        device.start_queue(queue);
    }
}

/// The guest forgets its rings, as at a boot.
fn reboot(device: &mut Device) {
    device.session.reset_device().accepted();
    device.queues.iter_mut().for_each(|queue| queue.reset());
}

#[test]
fn stop_and_continue() {
    let image = Image::empty(1 << 20);
    let backend = Setup::file(image.path()).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    for round in 0..20u32 {
        for (index, sector) in [(0, 0), (1, 1024)] {
            let data = pattern(round, 4096);
            device.queues[index].write(sector, &data);
        }
        stop_rings(&device);
        let features = device.session.features;
        start_rings(&mut device, features);
        assert_eq!(device.queues[1].read(0, 4096), pattern(round, 4096));
        assert_eq!(device.queues[0].read(1024, 4096), pattern(round, 4096));
    }
}

#[test]
fn guest_reboot() {
    let backend = Setup::null(1 << 20).export("num-queues=2").start();
    let mut device = backend.device(&Profile::queues(2));
    for _ in 0..20 {
        device.queues[0].works();
        device.queues[1].works();
        stop_rings(&device);
        reboot(&mut device);
        let features = device.session.features;
        start_rings(&mut device, features);
    }
}

#[test]
fn guest_reboot_without_a_stop() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    for _ in 0..20 {
        device.queue().works();
        reboot(&mut device);
        let features = device.session.features;
        start_rings(&mut device, features);
    }
}

#[test]
fn firmware_first_then_the_kernel() {
    let image = Image::filled(1 << 20);
    let backend = Setup::file(image.path()).export("num-queues=2").start();
    let profile = Profile { starts: false, queue_size: 128, ..Profile::queues(2) };
    let mut device = backend.device(&profile);
    let kernel = device.session.features;
    // Firmware takes what it must, uses one queue, then leaves.
    device.session.features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
    device.queues[0].event_idx = false;
    device.announce(MemoryBy::Table);
    device.start_queue(0);
    assert_eq!(device.queues[0].read(0, 512), pattern(0, 512));
    device.stop_queue(0);
    reboot(&mut device);
    start_rings(&mut device, kernel);
    for queue in &mut device.queues {
        assert_eq!(queue.read(0, 4096), pattern(0, 4096));
    }
    let answer = device.queues[0].request(&Request::flush());
    assert_eq!(answer.status, OK);
}

#[test]
fn reconnect_in_the_midst_of_the_firmware() {
    let backend = Setup::null(1 << 20).start();
    let firmware = Profile { features: feature::VERSION_1 | feature::PROTOCOL_FEATURES, ..Profile::qemu() };
    for _ in 0..5 {
        let mut device = backend.device(&firmware);
        device.queue().works();
        let _ticket = device.queue().start(&Request::read(0, 512), &Framing::default());
    }
    backend.device(&Profile::qemu()).queue().works();
}

#[test]
fn suspend_and_resume() {
    // The guest resets the device and sets it up anew; the front-end keeps the connection.
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    let features = device.session.features;
    for _ in 0..10 {
        device.queue().works();
        stop_rings(&device);
        device.queue().reset();
        start_rings(&mut device, features);
    }
}

#[test]
fn a_ring_smaller_than_seg_max_asks() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile { queue_size: 8, ..Profile::qemu() });
    for _ in 0..20 {
        let answer = device.queue().perform(&Request::read(0, 2560), &Framing::writable(&[512; 5]));
        assert_eq!((answer.status, answer.used_len), (OK, 2561));
    }
}

#[test]
fn the_write_cache_off_then_a_reconnect_then_a_new_daemon() {
    let image = Image::empty(1 << 20);
    let setup = Setup::file(image.path());
    let reconnects = Profile { reads_config: false, ..Profile::qemu() };
    let backend = setup.start();
    backend.device(&Profile::qemu()).set_writeback(false).accepted();
    let mut device = backend.device(&reconnects);
    assert!(!device.writeback(), "after a reconnect");
    device.queue().write(0, &pattern(1, 512));
    drop(device);
    backend.kill();
    let backend = setup.start();
    let mut device = backend.device(&reconnects);
    assert!(!device.writeback(), "after a restart of the daemon");
    assert_eq!(device.queue().read(0, 512), pattern(1, 512));
}

#[test]
fn the_rings_move_between_two_boots() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile { queue_size: 64, ..Profile::qemu() });
    for _ in 0..10 {
        device.queue().works();
        device.stop_queue(0);
        let queue = device.queue();
        let size = if queue.ring.size == 64 { 256 } else { 64 };
        queue.ring = crate::frontend::queue::RingLayout::cut(&mut queue.arena, size, queue.ring.packed);
        queue.reset();
        device.start_queue(0);
    }
    device.queue().works();
}

crate::on_packed_rings! {
    stop_and_continue,
    guest_reboot,
    guest_reboot_without_a_stop,
    suspend_and_resume,
    a_ring_smaller_than_seg_max_asks,
}
