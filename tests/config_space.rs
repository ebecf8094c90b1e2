//! The config space (specification of the device, section 3).

use crate::backend::Setup;
use crate::frontend::blk::{CONFIG_SIZE, Config, WRITEBACK};
use crate::frontend::device::Profile;
use crate::image::Image;

fn config_of(setup: &Setup) -> Config {
    let backend = setup.start();
    backend.device(&Profile::unstarted()).read_config()
}

#[test]
fn capacity_is_in_sectors_of_512_bytes() {
    assert_eq!(config_of(&Setup::null(1 << 30)).capacity(), 1 << 21);
}

#[test]
fn capacity_does_not_depend_on_the_logical_block_size() {
    let setup = Setup::null(1 << 30).export("logical-block-size=4096");
    assert_eq!(config_of(&setup).capacity(), 1 << 21);
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_up() {
    let image = Image::empty(1000);
    assert_eq!(config_of(&Setup::file(image.path())).capacity(), 2);
}

#[test]
fn an_empty_image_has_capacity_0() {
    let image = Image::empty(0);
    assert_eq!(config_of(&Setup::file(image.path())).capacity(), 0);
}

#[test]
fn the_logical_block_size_is_512_unless_told() {
    assert_eq!(config_of(&Setup::null(1 << 20)).blk_size(), 512);
}

#[test]
fn the_logical_block_size_is_the_export_s() {
    let setup = Setup::null(1 << 20).export("logical-block-size=4096");
    assert_eq!(config_of(&setup).blk_size(), 4096);
}

#[test]
fn a_physical_block_is_no_smaller_than_a_logical_one() {
    let image = Image::empty(1 << 20);
    let config = config_of(&Setup::file(image.path()));
    assert!(config.physical_block_exp() <= 8, "2^{} logical blocks", config.physical_block_exp());
}

#[test]
fn seg_max_fits_a_ring_of_128() {
    assert_eq!(config_of(&Setup::null(1 << 20)).seg_max(), 126);
}

#[test]
fn size_max_is_left_alone() {
    assert_eq!(config_of(&Setup::null(1 << 20)).size_max(), 0);
}

#[test]
fn the_number_of_queues_is_the_export_s() {
    assert_eq!(config_of(&Setup::null(1 << 20).export("num-queues=7")).num_queues(), 7);
}

#[test]
fn one_queue_is_the_default() {
    assert_eq!(config_of(&Setup::null(1 << 20)).num_queues(), 1);
}

#[test]
fn limits_of_discard_and_write_zeroes_allow_several_segments() {
    let image = Image::empty(1 << 20);
    let config = config_of(&Setup::file(image.path()));
    assert!(config.max_discard_sectors() > 0, "{config:?}");
    assert!(config.max_discard_seg() > 1, "{config:?}");
    assert!(config.discard_sector_alignment() > 0, "{config:?}");
    assert!(config.max_write_zeroes_sectors() > 0, "{config:?}");
    assert!(config.max_write_zeroes_seg() > 1, "{config:?}");
    assert_eq!(config.write_zeroes_may_unmap(), 1, "{config:?}");
}

#[test]
fn fields_of_features_that_are_not_offered_are_zero() {
    let config = config_of(&Setup::null(1 << 20));
    assert!(config.secure_erase_and_zoned().iter().all(|&byte| byte == 0), "{config:?}");
}

#[test]
fn any_part_of_the_config_space_can_be_read() {
    let backend = Setup::null(1 << 30).export("num-queues=3").start();
    let device = backend.device(&Profile::unstarted());
    let whole = device.read_config().0;
    for offset in 0..CONFIG_SIZE {
        for size in [1, 4, CONFIG_SIZE - offset] {
            let end = offset + size;
            if end > CONFIG_SIZE {
                continue;
            }
            let part = device.session.get_config(offset, size);
            assert_eq!(part, whole[offset as usize..end as usize], "{size} bytes at {offset}");
        }
    }
}

#[test]
fn the_old_short_structure_can_be_read() {
    let backend = Setup::null(1 << 30).start();
    let device = backend.device(&Profile::unstarted());
    let whole = device.read_config().0;
    assert_eq!(device.session.get_config(0, 60), whole[..60]);
}

#[test]
fn what_lies_behind_the_structure_reads_as_zero() {
    let backend = Setup::null(1 << 30).start();
    let device = backend.device(&Profile::unstarted());
    let mut whole = device.read_config().0;
    whole.resize(256, 0);
    assert_eq!(device.session.get_config(0, 256), whole);
    assert_eq!(device.session.get_config(CONFIG_SIZE - 1, 2), whole[CONFIG_SIZE as usize - 1..][..2]);
}

#[test]
fn offsets_counted_from_the_registers_of_virtio_mmio_are_understood() {
    let backend = Setup::null(1 << 30).start();
    let device = backend.device(&Profile::unstarted());
    let whole = device.read_config().0;
    assert_eq!(device.session.get_config(0x100, 60), whole[..60]);
    assert_eq!(device.session.get_config(0x100 + WRITEBACK, 1), whole[WRITEBACK as usize..][..1]);
}

#[test]
fn the_write_cache_can_be_set_with_the_rest_of_its_word() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::qemu());
    let word = |writeback: u8| {
        let config = device.read_config().0;
        [&[writeback], &config[WRITEBACK as usize + 1..WRITEBACK as usize + 4]].concat()
    };
    device.session.set_config(WRITEBACK, &word(0)).accepted();
    assert!(!device.writeback());
    device.session.set_config(WRITEBACK, &word(1)).accepted();
    assert!(device.writeback());
    let mut other_queues = word(0);
    other_queues[3] ^= 1;
    device.session.set_config(WRITEBACK, &other_queues).refused();
    assert!(device.writeback());
}

#[test]
fn a_range_outside_the_config_space_is_refused_with_an_empty_reply() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::unstarted());
    for (offset, size) in [(0, 257), (255, 2), (1, 256), (0x1ff, 2), (0x200, 1), (0xf00, 0x100)] {
        assert!(device.session.get_config(offset, size).is_empty(), "{size} bytes at {offset}");
    }
    assert!(device.session.alive());
}

#[test]
fn nothing_but_the_writeback_byte_can_be_set() {
    let backend = Setup::null(1 << 20).start();
    let device = backend.device(&Profile::qemu());
    let before = device.read_config();
    for (offset, data) in [
        (0, vec![0; 8]),
        (WRITEBACK - 1, vec![0]),
        (WRITEBACK - 1, vec![0, 0]),
        (WRITEBACK + 1, vec![0]),
        (WRITEBACK, vec![0, 0]),
        (0, vec![0; CONFIG_SIZE as usize]),
        (CONFIG_SIZE, vec![0]),
        (0x100, vec![0]),
    ] {
        device.session.set_config(offset, &data).refused();
    }
    assert_eq!(device.read_config(), before);
}
