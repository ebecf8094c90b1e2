//! Internal snapshots: taken, applied and deleted between random requests, and what QEMU says of the image afterwards.

use blockport_block::drivers::qcow2::{
    CreateOptions, snapshot_apply, snapshot_create, snapshot_delete, snapshot_load, snapshots,
};

use crate::images::{check_clean, compare, create, create_raw, qemu, qemu_img};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, open, opened, user};

/// Batches of random requests with something done to the snapshots in between. Returns what the snapshots show.
fn run(seed: u64, path: &str, resizes: bool, options: &str) {
    let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}{options}"));
    let child = user(&node, 512);
    let context = context();
    let mut random = Random::new(seed);
    let mut content = {
        let channel = channel(&child, &context);
        context.run_until(async move { read(&channel, 0, channel.length()).await })
    };
    let mut taken: Vec<(String, Vec<u8>)> = Vec::new();
    for round in 0..14 {
        match random.below(7) {
            0..3 => {
                let name = format!("snapshot {round}");
                let info = snapshot_create(&node, &name).expect("it can be taken");
                assert_eq!((info.name, info.disk_bytes), (name.clone(), content.len() as u64));
                taken.push((if random.one_in(2) { info.id } else { name }, content.clone()));
            }
            3 if !taken.is_empty() => {
                let at = random.below(taken.len() as u64) as usize;
                snapshot_delete(&node, &taken.remove(at).0).expect("it can be deleted");
            }
            4 | 5 if !taken.is_empty() => {
                let at = random.below(taken.len() as u64) as usize;
                snapshot_apply(&node, &taken[at].0).expect("it can be applied");
                content = taken[at].1.clone();
            }
            6 if resizes => {
                let size = (1 + random.below(2 << 20)) / 512 * 512 + 512;
                node.block_resize(size).expect("it can be resized");
                content.resize(size as usize, 0);
            }
            _ => {}
        }
        assert_eq!(snapshots(&node).expect("they can be read").len(), taken.len());
        let channel = channel(&child, &context);
        let expected = content;
        content = context.run_until(async move {
            let got = read(&channel, 0, channel.length()).await;
            assert!(got == expected, "round {round}");
            let mut oracle = Oracle::new(channel, true, seed * 100 + round).await;
            for _ in 0..6 {
                oracle.batch().await;
            }
            oracle.content().to_vec()
        });
    }
    drop((child, node, graph));
    check_clean(path);
    compare(path, &content);
    for (name, content) in &taken {
        shows(path, name, content, options);
    }
    for (name, content) in &taken {
        if !qemu_img(&["snapshot", "-q", "-a", name, path]) {
            return;
        }
        check_clean(path);
        compare(path, content);
    }
}

/// A reader that asks for a snapshot sees it.
fn shows(path: &str, name: &str, content: &[u8], options: &str) {
    let (_graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}{options}"));
    snapshot_load(&node, name).expect("it is there");
    let reader = blockport_block::Permissions::device(false);
    let child = blockport_block::Child::attach(node.clone(), "the test", reader, 512).expect("a reader");
    let context = context();
    let channel = channel(&child, &context);
    let expected = content.to_vec();
    context.run_until(async move {
        assert_eq!(channel.length(), expected.len() as u64);
        assert!(read(&channel, 0, channel.length()).await == expected);
    });
}

#[test]
fn snapshots_show_what_was_there_when_they_were_taken() {
    let small = ",l2-cache-size=2K,l2-cache-entry-size=512,refcount-cache-size=1K";
    for (seed, options, more) in [
        (1, CreateOptions::default(), ""),
        (2, CreateOptions { cluster_size: 512, ..Default::default() }, small),
        (3, CreateOptions { cluster_size: 4096, version: 2, ..Default::default() }, ""),
        (4, CreateOptions { cluster_size: 16384, extended_l2: true, ..Default::default() }, ""),
        (5, CreateOptions { cluster_size: 4096, refcount_bits: 4, ..Default::default() }, ""),
        (6, CreateOptions { cluster_size: 1024, refcount_bits: 64, ..Default::default() }, small),
    ] {
        for backing in [false, true] {
            let place = TempDir::in_memory();
            let path = place.path("disk");
            create_raw(&place.path("base"), &Random::new(seed).bytes(1 << 20));
            let backing = backing.then(|| ("base".to_owned(), "raw".to_owned()));
            let version = options.version;
            create(&path, &CreateOptions { size: 1 << 20, backing, ..options.clone() });
            // An image of version 2 with snapshots keeps its size.
            run(seed, &path, version == 3, more);
        }
    }
}

#[test]
fn a_snapshot_that_refcounts_have_no_room_for_is_not_taken() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 1 << 20, cluster_size: 4096, refcount_bits: 2, ..Default::default() });
    let (graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel_ = channel(&child, &context);
    let content = context.run_until(async move {
        let mut oracle = Oracle::new(channel_, true, 9).await;
        for _ in 0..9 {
            oracle.batch().await;
        }
        oracle.content().to_vec()
    });
    assert!(snapshot_create(&node, "").is_err(), "it must have a name");
    snapshot_create(&node, "a").expect("counts of 2 fit");
    snapshot_create(&node, "b").expect("counts of 3 fit");
    let error = snapshot_create(&node, "c").expect_err("counts of 4 do not");
    assert!(error.0.contains("narrow"), "{error}");
    assert!(snapshot_delete(&node, "c").is_err() && snapshot_apply(&node, "").is_err());
    drop((child, node, graph));
    check_clean(&path);
    compare(&path, &content);
}

#[test]
fn snapshots_of_qemu_are_known_and_ours_to_qemu() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    if !qemu_img(&["create", "-q", "-f", "qcow2", &path, "1M"]) {
        return;
    }
    qemu_img(&["snapshot", "-q", "-c", "theirs", &path]);
    let (graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
    let info = snapshot_create(&node, "ours").expect("it can be taken");
    let list = snapshots(&node).expect("they can be read");
    assert_eq!(list.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["theirs", "ours"]);
    assert_eq!((list[0].id.as_str(), info.id.as_str()), ("1", "2"));
    assert_eq!((list[0].disk_bytes, list[0].vm_state_bytes, list[1].icount), (1 << 20, 0, None));
    assert!(list[0].date_sec > 1_600_000_000 && list[0].date_sec.abs_diff(list[1].date_sec) < 600);
    drop((node, graph));
    let listed = qemu("qemu-img", &["snapshot", "-l", &path]).expect("it is there").expect("it can be listed");
    assert!(listed.contains("theirs") && listed.contains("ours"), "{listed}");
    check_clean(&path);
}

#[test]
fn a_snapshot_table_that_names_too_much_is_refused() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 1 << 20, cluster_size: 512, ..Default::default() });
    let mut bytes = std::fs::read(&path).expect("it was just made");
    // Many snapshots with the largest L1 tables, far apart: noting each of their clusters would take gigabytes.
    let table = bytes.len().next_multiple_of(512);
    bytes.resize(table, 0);
    let count = 4000u32;
    for index in 0..u64::from(count) {
        bytes.extend(((index + 1) << 25).to_be_bytes());
        bytes.extend((1u32 << 22).to_be_bytes());
        bytes.extend([0; 28]);
    }
    bytes[60..64].copy_from_slice(&count.to_be_bytes());
    bytes[64..72].copy_from_slice(&(table as u64).to_be_bytes());
    create_raw(&path, &bytes);
    let error = open(&format!("qcow2,file.driver=file,file.filename={path}")).err().expect("refused");
    assert!(error.0.contains("1 GiB"), "{error}");
}
