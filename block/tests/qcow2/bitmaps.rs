//! Persistent bitmaps: what is marked in them, from one opening to the next, for us and for QEMU.

use std::collections::BTreeMap;

use blockport_block::drivers::qcow2::{
    CreateOptions, NewBitmap, bitmap_add, bitmap_clear, bitmap_enable, bitmap_merge, bitmap_ranges, bitmap_remove,
    bitmaps, snapshot_apply, snapshot_create,
};
use blockport_block::iovec::AlignedBuffer;

use crate::images::{check_clean, create, create_raw, qemu, qemu_img};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, opened, user};

fn options(path: &str) -> String {
    format!("qcow2,discard=unmap,file.driver=file,file.filename={path}")
}

fn new(name: &str, granularity: Option<u64>, enabled: bool) -> NewBitmap {
    NewBitmap { name: name.to_owned(), granularity, enabled }
}

/// The pieces of a granularity that some ranges touch.
fn pieces(ranges: &[(u64, u64)], granularity: u64) -> Vec<u64> {
    let touched = ranges.iter().flat_map(|(offset, bytes)| offset / granularity..=(offset + bytes - 1) / granularity);
    let mut pieces: Vec<u64> = touched.collect();
    pieces.sort_unstable();
    pieces.dedup();
    pieces
}

/// By name: granularity, whether it is enabled, what was written.
type Model = BTreeMap<String, (u64, bool, Vec<(u64, u64)>)>;

/// Opens, does something to the bitmaps, writes, closes; and that again. A model knows what is to be marked.
fn run(seed: u64, create_options: &CreateOptions) {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, create_options);
    let mut random = Random::new(seed);
    let mut size = create_options.size;
    let mut model = Model::new();
    for round in 0..8 {
        let (graph, node) = opened(&options(&path));
        for step in 0..3 {
            let any = model.keys().nth(random.below(model.len().max(1) as u64) as usize).cloned();
            match (random.below(7), any) {
                (0..3, _) => {
                    let granularity = 512 << random.below(8);
                    let (name, enabled) = (format!("bitmap {round}.{step}"), !random.one_in(4));
                    bitmap_add(&node, &new(&name, Some(granularity), enabled)).expect("it is new");
                    assert!(bitmap_add(&node, &new(&name, None, true)).is_err(), "no longer");
                    model.insert(name, (granularity, enabled, Vec::new()));
                }
                (3, Some(name)) => {
                    bitmap_remove(&node, &name).expect("it is there");
                    model.remove(&name);
                }
                (4, Some(name)) => {
                    bitmap_clear(&node, &name).expect("it is there");
                    model.get_mut(&name).expect("it is there").2.clear();
                }
                (5, Some(name)) => {
                    let bitmap = model.get_mut(&name).expect("it is there");
                    bitmap.1 = !bitmap.1;
                    bitmap_enable(&node, &name, bitmap.1).expect("it is there");
                }
                (6, Some(name)) => {
                    let (other, (granularity, _, written)) = model.iter().next().expect("there is one");
                    let marked: Vec<(u64, u64)> =
                        pieces(written, *granularity).iter().map(|at| (at * granularity, *granularity)).collect();
                    bitmap_merge(&node, &name, &node, other).expect("they are there");
                    let marked = marked.into_iter().map(|(at, bytes)| (at, bytes.min(size - at)));
                    let marked: Vec<_> = marked.collect();
                    model.get_mut(&name).expect("it is there").2.extend(marked);
                }
                _ => {}
            }
        }
        if random.one_in(3) {
            size += random.below(100) * 512;
            node.block_resize(size).expect("it can grow");
        }
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        for _ in 0..4 {
            let bytes = (1 + random.below(40)) * 512;
            let offset = random.below((size - bytes) / 512 + 1) * 512;
            for (_, _, written) in model.values_mut().filter(|bitmap| bitmap.1) {
                written.push((offset, bytes));
            }
            let (kind, channel) = (random.below(4), channel.clone());
            context.run_until(async move {
                let buffer = AlignedBuffer::new(bytes as usize, 4096);
                let result = match kind {
                    0 => channel.pdiscard(offset, bytes).await,
                    1 => channel.pwrite_zeroes(offset, bytes, Default::default()).await,
                    _ => channel.pwritev(offset, &[buffer.iov()], Default::default()).await,
                };
                assert_eq!(result, Ok(()));
            });
        }
        if random.one_in(2) {
            compare(&node, &model);
        }
        drop((channel, child, node, graph));
        check_clean(&path);
        let (_graph, node) = opened(&format!("{},read-only=on", options(&path)));
        compare(&node, &model);
    }
}

fn compare(node: &std::sync::Arc<blockport_block::Node>, model: &Model) {
    let list = bitmaps(node).expect("they can be read");
    assert_eq!(list.len(), model.len());
    for info in list {
        let (granularity, enabled, written) = &model[&info.name];
        assert_eq!((info.granularity, info.enabled), (*granularity, *enabled), "{}", info.name);
        assert!(!info.inconsistent && !info.unknown);
        let ranges = bitmap_ranges(node, &info.name).expect("it can be used");
        assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), info.marked_bytes);
        assert_eq!(pieces(&ranges, *granularity), pieces(written, *granularity), "{}", info.name);
    }
}

#[test]
fn bitmaps_mark_what_was_written_from_one_opening_to_the_next() {
    for (seed, options) in [
        (1, CreateOptions { size: 4 << 20, ..Default::default() }),
        (2, CreateOptions { size: (1 << 20) + 512, cluster_size: 512, ..Default::default() }),
        (3, CreateOptions { size: 2 << 20, cluster_size: 16384, extended_l2: true, ..Default::default() }),
        (4, CreateOptions { size: 3 << 20, cluster_size: 4096, lazy_refcounts: true, ..Default::default() }),
    ] {
        run(seed, &options);
    }
}

#[test]
fn bitmaps_of_qemu_are_used_and_ours_by_qemu() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    if !qemu_img(&["create", "-q", "-f", "qcow2", &path, "8M"]) {
        return;
    }
    qemu_img(&["bitmap", "--add", "-g", "32K", &path, "theirs"]);
    let write =
        |command: &str| qemu("qemu-io", &["-f", "qcow2", "-c", command, &path]).expect("installed").expect("ok");
    write("write 1M 64K");
    let (graph, node) = opened(&options(&path));
    assert_eq!(bitmap_ranges(&node, "theirs").expect("it can be used"), [(1 << 20, 64 << 10)]);
    bitmap_add(&node, &new("ours", Some(65536), true)).expect("it is new");
    let child = user(&node, 512);
    let context = context();
    let channel_ = channel(&child, &context);
    context.run_until(async move {
        let buffer = AlignedBuffer::new(4096, 4096);
        assert_eq!(channel_.pwritev(3 << 20, &[buffer.iov()], Default::default()).await, Ok(()));
    });
    drop((child, node, graph));
    check_clean(&path);
    write("write 5M 4K");
    qemu_img(&["bitmap", "--merge", "theirs", &path, "ours"]);
    let (graph, node) = opened(&options(&path));
    let ours = bitmap_ranges(&node, "ours").expect("it can be used");
    assert_eq!(ours, [(1 << 20, 65536), (3 << 20, 65536), (5 << 20, 65536)]);
    let theirs = bitmap_ranges(&node, "theirs").expect("it can be used");
    assert_eq!(theirs, [(1 << 20, 65536), (3 << 20, 32768), (5 << 20, 32768)]);
    // What may have changed anywhere is marked everywhere.
    snapshot_create(&node, "s").expect("it can be taken");
    snapshot_apply(&node, "s").expect("it can be applied");
    assert_eq!(bitmap_ranges(&node, "ours").expect("it can be used"), [(0, 8 << 20)]);
    drop((node, graph));
    qemu_img(&["bitmap", "--remove", &path, "ours"]);
    qemu_img(&["bitmap", "--clear", &path, "theirs"]);
    check_clean(&path);
}

#[test]
fn a_bitmap_that_missed_a_write_is_not_used() {
    let place = TempDir::in_memory();
    let (path, copy) = (place.path("disk"), place.path("copy"));
    create(&path, &CreateOptions { size: 1 << 20, ..Default::default() });
    let (graph, node) = opened(&options(&path));
    bitmap_add(&node, &new("b", None, true)).expect("it is new");
    drop((node, graph));
    // As the image is found after a crash: its writer has it open.
    let (graph, node) = opened(&options(&path));
    std::fs::copy(&path, &copy).expect("there is room");
    drop((node, graph));
    let (graph, node) = opened(&options(&copy));
    let info = &bitmaps(&node).expect("they can be read")[0];
    assert!(info.inconsistent && info.in_use && info.granularity == 65536, "{info:?}");
    assert!(bitmap_ranges(&node, "b").is_err() && bitmap_clear(&node, "b").is_err());
    assert!(bitmap_merge(&node, "b", &node, "b").is_err() && bitmap_enable(&node, "b", false).is_err());
    drop((node, graph));
    let (graph, node) = opened(&options(&copy));
    assert!(bitmaps(&node).expect("they can be read")[0].inconsistent, "it stays so");
    bitmap_remove(&node, "b").expect("that is possible");
    drop((node, graph));
    check_clean(&copy);

    // Somebody wrote who knew of no bitmaps: the autoclear bit is gone.
    let mut bytes = std::fs::read(&path).expect("it exists");
    assert_eq!(bytes[95] & 1, 1);
    bytes[95] &= !1;
    create_raw(&path, &bytes);
    let (_graph, node) = opened(&options(&path));
    assert!(bitmaps(&node).expect("they can be read").is_empty());
    bitmap_add(&node, &new("b", None, true)).expect("the name is free");
}

#[test]
fn a_reader_changes_nothing_of_bitmaps() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 1 << 20, ..Default::default() });
    let (graph, node) = opened(&options(&path));
    bitmap_add(&node, &new("b", None, true)).expect("it is new");
    drop((node, graph));
    let bytes = std::fs::read(&path).expect("it exists");
    let (graph, node) = opened(&format!("{},read-only=on", options(&path)));
    assert!(bitmap_clear(&node, "b").is_err());
    drop((node, graph));
    assert!(std::fs::read(&path).expect("it exists") == bytes);
}
