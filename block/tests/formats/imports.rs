//! Images of the formats that are only read, made by qemu-img with every option it has: they hold for us what they hold
//! for it.

use blockport_block::{Child, Permissions};

use crate::images::{create_raw, qemu_img};
use crate::testing::oracle::read;
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, opened};

const SIZE: usize = (5 << 20) + 3 * 512;

/// Data, holes, and data that compresses, longer than a block of most formats.
fn content(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut content = vec![0; SIZE];
    let mut at = 0;
    while at < SIZE {
        let len = (random.below(300_000) as usize).min(SIZE - at);
        match random.below(3) {
            0 => {}
            1 => content[at..at + len].copy_from_slice(&random.bytes(len)),
            _ => content[at..at + len].fill(random.next() as u8),
        }
        at += len;
    }
    // The end of the disk is none of a unit.
    content[SIZE - 700..].fill(0x77);
    content
}

/// All that is in an image.
fn all(options: &str) -> Vec<u8> {
    let (_graph, node) = opened(options);
    let child = Child::attach(node, "the test", Permissions::device(false), 1).expect("nobody else uses the node");
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move { read(&channel, 0, channel.length()).await })
}

#[test]
fn images_hold_what_qemu_put_into_them() {
    for (seed, (format, options)) in (1..).zip([
        ("vdi", ""),
        ("vdi", "static=on"),
        ("vpc", "subformat=dynamic"),
        ("vpc", "subformat=fixed"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
        ("vhdx", ""),
        ("vhdx", "subformat=fixed"),
        ("vhdx", "block_size=1M"),
        ("vhdx", "block_size=2M,block_state_zero=off"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
        ("vmdk", "subformat=monolithicSparse,compat6=on,adapter_type=lsilogic"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vmdk", "subformat=streamOptimized"),
    ]) {
        let place = TempDir::in_memory();
        let (raw, path) = (place.path("raw"), place.path("disk.image"));
        let content = content(seed);
        create_raw(&raw, &content);
        let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([raw.as_str(), &path]);
        if !qemu_img(&arguments) {
            return;
        }
        eprintln!("{format} {options}");
        let got = all(&format!("{format},file.driver=file,file.filename={path}"));
        // Geometries have no number for all sizes.
        assert!(got.len() >= SIZE && (got.len() == SIZE || format == "vpc" || format == "vhdx"), "{}", got.len());
        let differs = (0..SIZE).find(|at| got[*at] != content[*at]);
        assert_eq!(differs, None, "the first byte that differs");
        assert!(got[SIZE..].iter().all(|byte| *byte == 0));
        // As long for QEMU as for us.
        let back = place.path("back");
        qemu_img(&["convert", "-q", "-f", format, "-O", "raw", &path, &back]);
        assert!(std::fs::read(&back).expect("it was just made") == got);
    }
}

#[test]
fn large_disks_take_tables_on_several_levels() {
    for (format, options, size) in [
        ("vmdk", "subformat=twoGbMaxExtentSparse", 5u64 << 30),
        ("vdi", "", 3 << 40),
        ("vhdx", "", 40 << 40),
        ("vpc", "force_size=on", 1 << 40),
    ] {
        let place = TempDir::in_memory();
        let path = place.path("disk.image");
        let mut arguments = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        let text = size.to_string();
        arguments.extend([path.as_str(), &text]);
        if !qemu_img(&arguments) {
            return;
        }
        let offsets = [0, (size / 2) & !511, size - 4096];
        for (number, offset) in offsets.into_iter().enumerate() {
            let write = format!("write -P {} {offset} 4096", number + 1);
            crate::images::qemu("qemu-io", &["-f", format, "-c", &write, &path]).expect("installed").expect("it works");
        }
        let (_graph, node) = opened(&format!("{format},file.driver=file,file.filename={path}"));
        let child = Child::attach(node, "the test", Permissions::device(false), 1).expect("nobody else uses the node");
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            assert_eq!(channel.length(), size);
            for (number, offset) in offsets.into_iter().enumerate() {
                assert!(read(&channel, offset, 4096).await == [number as u8 + 1; 4096], "{format} at {offset}");
            }
            assert!(read(&channel, size / 4, 65536).await == [0; 65536]);
        });
    }
}
