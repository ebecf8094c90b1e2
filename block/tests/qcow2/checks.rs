//! Check and repair: ours and QEMU's find the same in healthy and in damaged images, and a repaired image is whole.

use blockport_block::drivers::qcow2::{CheckReport, CreateOptions, check};

use crate::images::{check_clean, compare, create, create_raw, qemu};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, open, opened, user};

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A used image of 2 MiB in clusters of 4 KiB with refcounts of 16 bits: its file, and what a guest sees.
fn image(path: &str, seed: u64) -> (Vec<u8>, Vec<u8>) {
    create(path, &CreateOptions { size: 2 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let content = context.run_until(async move {
        let mut oracle = Oracle::new(channel, true, seed).await;
        for _ in 0..30 {
            oracle.batch().await;
        }
        oracle.content().to_vec()
    });
    drop((child, node, graph));
    (std::fs::read(path).expect("it exists"), content)
}

fn our_check(path: &str) -> CheckReport {
    let (_graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
    check(&node, false).expect("it can be read")
}

/// What QEMU counts under these names; 0 where it says nothing. `None` where there is no QEMU.
fn their_check<const N: usize>(path: &str, names: [&str; N]) -> Option<[u64; N]> {
    let output = match qemu("qemu-img", &["check", "--output=json", "-f", "qcow2", path])? {
        Ok(output) | Err(output) => output,
    };
    let count = |name: &str| {
        let at = output.find(&format!("\"{name}\":"));
        let number: Option<String> = at.map(|at| {
            output[at..].chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect()
        });
        number.map_or(0, |number| number.parse().expect("digits"))
    };
    Some(names.map(count))
}

fn repair(path: &str) -> CheckReport {
    let (_graph, node) = opened(&format!("qcow2,x-repair=on,file.driver=file,file.filename={path}"));
    check(&node, true).expect("it can be repaired")
}

#[test]
fn a_healthy_image_has_nothing_to_be_repaired() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    let (bytes, _) = image(&path, 1);
    let report = our_check(&path);
    assert_eq!((report.errors, report.leaks), (0, 0));
    let names = ["total-clusters", "allocated-clusters", "fragmented-clusters", "image-end-offset"];
    if let Some(theirs) = their_check(&path, names) {
        let CheckReport { total_clusters, allocated_clusters, fragmented_clusters, image_end, .. } = report;
        assert_eq!([total_clusters, allocated_clusters, fragmented_clusters, image_end], theirs);
    }
    let repaired = repair(&path);
    assert_eq!((repaired.errors_fixed, repaired.leaks_fixed), (0, 0));
    assert!(std::fs::read(&path).expect("it exists") == bytes, "it is left as it was");
}

/// Damages refcounts and marks at random, where both count alike.
fn damage(bytes: &mut [u8], random: &mut Random) {
    let l1 = number(bytes, 40) as usize;
    let l2 = (number(bytes, l1) & OFFSET) as usize;
    let block = number(bytes, number(bytes, 48) as usize) as usize;
    let clusters = bytes.len() as u64 / 4096;
    for _ in 0..1 + random.below(6) {
        match random.below(3) {
            0 => {
                // Of clusters that are no metadata, which both would refuse to look at.
                let cluster = (8 + random.below(clusters - 8)) as usize;
                let value = [0u16, 1, 2, 5][random.below(4) as usize];
                bytes[block + cluster * 2..block + cluster * 2 + 2].copy_from_slice(&value.to_be_bytes());
            }
            1 => {
                let entry = l2 + random.below(512) as usize * 8;
                if number(bytes, entry) & OFFSET != 0 {
                    bytes[entry] ^= 0x80;
                }
            }
            _ => {
                // Two guest clusters in one place.
                let (from, to) = (random.below(512) as usize, random.below(512) as usize);
                let entry = number(bytes, l2 + from * 8);
                if entry & OFFSET != 0 && entry & 1 == 0 {
                    bytes[l2 + to * 8..l2 + to * 8 + 8].copy_from_slice(&entry.to_be_bytes());
                }
            }
        }
    }
}

#[test]
fn damage_is_found_as_qemu_finds_it_and_put_right() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    for seed in 0..18 {
        let (mut bytes, _) = image(&path, seed % 3);
        let mut random = Random::new(seed);
        damage(&mut bytes, &mut random);
        create_raw(&path, &bytes);
        let ours = our_check(&path);
        if let Some([errors, leaks]) = their_check(&path, ["corruptions", "leaks"]) {
            assert_eq!((ours.errors > 0, ours.leaks), (errors > 0, leaks), "{ours:?}, QEMU: {errors} and {leaks}");
        }
        let (graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
        let reader = blockport_block::Permissions::device(false);
        let child = blockport_block::Child::attach(node.clone(), "the test", reader, 512).expect("a reader");
        let context = context();
        let before = channel(&child, &context);
        let content = context.run_until(async move { read(&before, 0, before.length()).await });
        drop((child, node, graph));
        let repaired = repair(&path);
        assert_eq!((repaired.errors, repaired.leaks), (0, 0), "{repaired:?}");
        check_clean(&path);
        compare(&path, &content);
    }
}

#[test]
fn an_image_that_was_not_closed_properly_is_repaired_when_it_is_opened_for_writing() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    let (mut bytes, content) = image(&path, 5);
    let block = number(&bytes, number(&bytes, 48) as usize) as usize;
    bytes[block + 8..block + 4096].fill(0);
    bytes[79] |= 1;
    create_raw(&path, &bytes);
    let (graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
    drop((node, graph));
    assert!(std::fs::read(&path).expect("it exists") == bytes, "a reader changes nothing");
    let (graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
    drop((node, graph));
    assert_eq!(std::fs::read(&path).expect("it exists")[79], 0);
    check_clean(&path);
    compare(&path, &content);
}

#[test]
fn an_image_that_is_marked_as_corrupt_is_used_again_once_it_is_repaired() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    let (mut bytes, content) = image(&path, 6);
    let block = number(&bytes, number(&bytes, 48) as usize) as usize;
    bytes[block + 40..block + 60].fill(0);
    bytes[79] |= 2;
    create_raw(&path, &bytes);
    let options = format!("qcow2,file.driver=file,file.filename={path}");
    assert!(open(&options).is_err());
    let (graph, node) = opened(&format!("{options},x-repair=on"));
    let child = user(&node, 512);
    let context = context();
    let unusable = channel(&child, &context);
    context.run_until(async move {
        let buffer = blockport_block::iovec::AlignedBuffer::new(512, 4096);
        assert!(unusable.preadv(0, &[buffer.iov()]).await.is_err(), "only to be repaired");
    });
    let report = check(&node, true).expect("it can be repaired");
    assert!(report.errors_fixed > 0 && report.errors == 0, "{report:?}");
    let usable = channel(&child, &context);
    let expected = content.clone();
    context.run_until(async move { assert!(read(&usable, 0, usable.length()).await == expected) });
    drop((child, node, graph));
    check_clean(&path);
    compare(&path, &content);
    opened(&options);
}
