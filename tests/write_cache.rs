//! The write cache: who sets it, what the config space says of it, who remembers it (specification of the device,
//! section 4). Whether acknowledged data is stable is tested where the host can be crashed.

use crate::backend::Setup;
use crate::frontend::blk::{IOERR, OK, Request, feature};
use crate::frontend::device::Profile;
use crate::image::{Image, pattern};

#[test]
fn a_write_back_export_says_so() {
    let backend = Setup::null(1 << 20).start();
    assert!(backend.device(&Profile::qemu()).writeback());
}

#[test]
fn a_write_through_export_says_so() {
    let backend = Setup::null(1 << 20).export("writethrough=on").start();
    assert!(!backend.device(&Profile::qemu()).writeback());
}

#[test]
fn a_guest_switches_it_off_and_on() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::qemu());
    device.set_writeback(false).accepted();
    assert!(!device.writeback());
    device.queue().write(0, &pattern(1, 512));
    device.set_writeback(true).accepted();
    assert!(device.writeback());
    device.queue().write(0, &pattern(2, 512));
}

#[test]
fn a_guest_that_did_not_negotiate_config_wce_cannot_set_it() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::without(feature::CONFIG_WCE));
    device.set_writeback(false).refused();
    assert!(device.writeback());
}

#[test]
fn it_is_off_for_a_guest_that_can_neither_flush_nor_set_it() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::without(feature::FLUSH | feature::CONFIG_WCE));
    assert!(!device.writeback());
}

#[test]
fn it_starts_off_for_a_guest_that_can_set_it_but_not_flush() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::without(feature::FLUSH));
    assert!(!device.writeback());
    device.set_writeback(true).accepted();
    assert!(device.writeback());
}

#[test]
fn the_firmware_s_lack_of_features_does_not_stick_to_the_kernel_after_it() {
    let backend = Setup::null(1 << 20).start();
    let mut device = backend.device(&Profile::without(feature::FLUSH | feature::CONFIG_WCE));
    assert!(!device.writeback());
    device.queue().works();
    device.stop_queue(0);
    device.session.reset_device().accepted();
    device.session.features |= feature::FLUSH | feature::CONFIG_WCE;
    device.queue().reset();
    device.announce(crate::frontend::device::MemoryBy::Table);
    device.start_queue(0);
    assert!(device.writeback());
    device.queue().works();
}

#[test]
fn a_reset_of_the_device_does_not_change_it() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::qemu());
    device.set_writeback(false).accepted();
    device.stop_queue(0);
    device.session.reset_device().accepted();
    assert!(!device.writeback());
}

#[test]
fn it_survives_a_reconnect_that_does_not_ask_for_it() {
    let backend = Setup::null(1 << 20).start();
    backend.device(&Profile::qemu()).set_writeback(false).accepted();
    let device = backend.device(&Profile { reads_config: false, ..Profile::qemu() });
    assert!(!device.writeback());
}

#[test]
fn a_new_virtual_machine_finds_it_as_the_export_has_it() {
    let backend = Setup::null(1 << 20).start();
    backend.device(&Profile::qemu()).set_writeback(false).accepted();
    let device = backend.device(&Profile::qemu());
    assert_eq!(device.config.as_ref().map(|config| config.writeback()), Some(1));
    assert!(device.writeback());
}

#[test]
fn a_front_end_that_starts_without_asking_runs_write_through_on_a_new_daemon() {
    // It may have switched the cache off at a daemon that is gone.
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile { reads_config: false, ..Profile::qemu() });
    assert!(!device.writeback());
}

#[test]
fn a_flush_that_the_host_fails_is_an_error() {
    let image = Image::empty(1 << 20);
    // Once, as a daemon whose last flush fails ends with an error.
    let rules = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=5,inject-error.0.once=on";
    let backend = Setup::faulty(image.path(), rules).start();
    let mut device = backend.device(&Profile::qemu());
    assert_eq!(device.queue().request(&Request::write(0, &pattern(1, 512))).status, OK);
    assert_eq!(device.queue().request(&Request::flush()).status, IOERR);
}

#[test]
fn the_cache_is_flushed_before_it_is_switched_off() {
    let image = Image::empty(1 << 20);
    let rules = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=5,inject-error.0.once=on";
    let backend = Setup::faulty(image.path(), rules).start();
    let mut device = backend.device(&Profile::qemu());
    device.queue().write(0, &pattern(1, 512));
    // What was acknowledged is not stable, so the device may not say that it is.
    device.set_writeback(false).refused();
    assert!(device.writeback());
}
