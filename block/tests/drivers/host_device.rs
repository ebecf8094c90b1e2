//! The driver `host_device` on loop devices, where there are any: sizes, alignment, what is given back, and a size that
//! changes under it.

use std::os::unix::fs::MetadataExt;

use blockport_block::driver::WriteFlags;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockBackend, Permissions};

use crate::testing::loop_device::LoopDevice;
use crate::testing::oracle::read;
use crate::testing::{TempDir, channel, context, open, opened, user, writer};

/// A device over a file of `size` bytes; `None`, and said so, where there are none.
fn device(size: u64, more: &[&str]) -> Option<(TempDir, String, LoopDevice)> {
    let place = TempDir::on_disk();
    let file = place.file("disk", size);
    match LoopDevice::new(&file, more) {
        Ok(device) => Some((place, file, device)),
        Err(error) => {
            let test = std::thread::current().name().unwrap_or("host-device").to_owned();
            eprintln!("SKIP {test}: no loop device: {error}");
            None
        }
    }
}

#[test]
fn a_device_tells_its_size_and_the_units_that_it_works_in() {
    for (unit, more) in [(512, &[][..]), (4096, &["--sector-size", "4096"])] {
        let Some((_place, _, device)) = device(8 << 20, more) else { return };
        for cache in ["on", "off"] {
            let (_graph, node) = opened(&format!("host_device,filename={},cache.direct={cache}", device.path()));
            let limits = node.limits();
            assert_eq!(node.length(), 8 << 20);
            assert_eq!((limits.request_alignment, limits.physical_block_size), (unit, unit), "direct I/O {cache}");
            assert!(limits.can_discard && limits.can_write_zeroes && limits.can_unmap_zeroes);
        }
    }
}

#[test]
fn discards_and_zeroes_give_space_back_to_what_is_below() {
    let Some((_place, file, device)) = device(8 << 20, &[]) else { return };
    let blocks = || std::fs::metadata(&file).expect("it is there").blocks() * 512;
    let (_graph, node) = opened(&format!("host_device,filename={},cache.direct=on,discard=unmap", device.path()));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until({
        let channel = channel.clone();
        async move {
            let mut data = AlignedBuffer::new(4 << 20, 4096);
            data.fill_from(&vec![7; 4 << 20]);
            assert_eq!(channel.pwritev(0, &[data.iov()], WriteFlags::default()).await, Ok(()));
            assert_eq!(channel.flush().await, Ok(()));
        }
    });
    let full = blocks();
    assert!(full >= 4 << 20);
    context.run_until({
        let channel = channel.clone();
        async move {
            assert_eq!(channel.pdiscard(0, 1 << 20).await, Ok(()));
            let unmap = WriteFlags { may_unmap: true, ..WriteFlags::default() };
            assert_eq!(channel.pwrite_zeroes(1 << 20, 1 << 20, unmap).await, Ok(()));
            assert_eq!(channel.pwrite_zeroes((2 << 20) + 512, 1024, WriteFlags::default()).await, Ok(()));
            assert_eq!(read(&channel, 1 << 20, 1 << 20).await, vec![0; 1 << 20]);
            let around = read(&channel, 2 << 20, 2048).await;
            assert_eq!(around, [vec![7; 512], vec![0; 1024], vec![7; 512]].concat());
        }
    });
    assert!(blocks() + (2 << 20) <= full, "{} of {full} bytes are left", blocks());
}

#[test]
fn a_device_that_grew_is_seen_to_have_grown() {
    let Some((_place, file, device)) = device(4 << 20, &[]) else { return };
    let (_graph, node) = opened(&format!("host_device,filename={}", device.path()));
    let backend = BlockBackend::with_root("b", node.clone(), writer()).expect("nobody else uses the node");
    let refused = backend.resize(8 << 20).expect_err("it is not ours to resize").0;
    assert!(refused.contains("4194304"), "{refused}");
    let grown = std::fs::OpenOptions::new().write(true).open(&file).and_then(|file| file.set_len(8 << 20));
    grown.expect("it can grow");
    device.refresh();
    assert_eq!(backend.length(), Ok(4 << 20), "nobody has told us yet");
    backend.resize(8 << 20).expect("that is its size now");
    assert_eq!(backend.length(), Ok(8 << 20));
}

#[test]
fn a_read_only_device_is_opened_for_reading_only() {
    let Some((_place, _, device)) = device(1 << 20, &["--read-only"]) else { return };
    let refused = open(&format!("host_device,filename={}", device.path())).err().expect("it cannot be written").0;
    assert!(refused.contains("read-only=on"), "{refused}");
    let (_graph, node) = opened(&format!("host_device,filename={},auto-read-only=on", device.path()));
    assert!(node.is_read_only());
    BlockBackend::with_root("b", node, Permissions::device(false)).expect("reading is allowed");
}

#[test]
fn each_of_the_two_drivers_names_the_other() {
    let place = TempDir::on_disk();
    let file = place.file("disk", 1 << 20);
    let refused = open(&format!("host_device,filename={file}")).err().expect("it is a file").0;
    assert!(refused.contains(&file) && refused.contains("\"file\""), "{refused}");
    let Some((_place, _, device)) = device(1 << 20, &[]) else { return };
    let (_graph, node) = opened(&format!("file,filename={}", device.path()));
    assert_eq!(node.length(), 1 << 20, "as before there was host_device, with a notice");
}
