//! Images made by qemu-img, with every option it has: read and written here, and read by it afterwards.

use crate::images::{check_clean, compare, create_raw, qemu, qemu_img};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, open, opened, user};

const SIZE: usize = 1536 << 10;

/// Content that compresses, with gaps.
fn content(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut content = vec![0; SIZE];
    let mut at = 0;
    while at < SIZE {
        let len = (random.below(90_000) as usize).min(SIZE - at);
        match random.below(4) {
            0 => {}
            1 => content[at..at + len].copy_from_slice(&random.bytes(len)),
            _ => content[at..at + len].fill(random.next() as u8),
        }
        at += len;
    }
    content
}

/// Reads the image, writes to it at random, and has QEMU read it again.
fn read_and_write(path: &str, expected: &[u8], seed: u64) {
    let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let expected = expected.to_vec();
    let content = context.run_until(async move {
        let got = read(&channel, 0, channel.length()).await;
        assert_eq!(got.len(), expected.len());
        let differs = (0..got.len()).find(|at| got[*at] != expected[*at]);
        assert_eq!(differs, None, "the first byte that differs");
        let mut oracle = Oracle::new(channel, true, seed).await;
        for _ in 0..40 {
            oracle.batch().await;
        }
        oracle.verify().await;
        oracle.content().to_vec()
    });
    drop((child, node, graph));
    check_clean(path);
    compare(path, &content);
}

#[test]
fn images_of_every_kind_are_read_and_written() {
    for (seed, (options, compressed)) in (1..).zip([
        ("compat=1.1", false),
        ("compat=0.10", false),
        ("compat=1.1", true),
        ("compat=0.10", true),
        ("compat=1.1,compression_type=zstd", true),
        ("cluster_size=512", true),
        ("cluster_size=2M", true),
        ("cluster_size=2M,compression_type=zstd", true),
        ("extended_l2=on", false),
        ("extended_l2=on,cluster_size=128k,compression_type=zstd", true),
        ("refcount_bits=1,cluster_size=4k", false),
        ("refcount_bits=64", false),
        ("refcount_bits=2,cluster_size=1k", true),
        ("lazy_refcounts=on", false),
    ]) {
        let place = TempDir::in_memory();
        let (raw, path) = (place.path("raw"), place.path("disk"));
        let content = content(seed);
        create_raw(&raw, &content);
        let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", options];
        arguments.extend(compressed.then_some("-c"));
        if !qemu_img(&[arguments, vec![&raw, &path]].concat()) {
            return;
        }
        eprintln!("{options}");
        read_and_write(&path, &content, seed);
    }
}

#[test]
fn preallocated_images_are_read_and_written() {
    for (seed, options) in [
        (50, "preallocation=metadata"),
        (51, "preallocation=falloc,cluster_size=4k"),
        (52, "preallocation=full"),
        (53, "preallocation=metadata,extended_l2=on"),
    ] {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &path, "1536K"]) {
            return;
        }
        read_and_write(&path, &[0; SIZE], seed);
    }
}

#[test]
fn external_data_files_are_read_and_written() {
    for (seed, options) in [(60, ""), (61, ",data_file_raw=on"), (62, ",extended_l2=on")] {
        let place = TempDir::in_memory();
        let (path, data) = (place.path("disk"), place.path("data"));
        let options = format!("data_file={data}{options}");
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, "1536K"]) {
            return;
        }
        read_and_write(&path, &[0; SIZE], seed);
    }
}

#[test]
fn clusters_that_a_snapshot_shares_are_copied_before_they_are_written() {
    for (seed, options) in
        [(70, "cluster_size=4k"), (71, "compat=0.10"), (72, "extended_l2=on"), (73, "cluster_size=512")]
    {
        let place = TempDir::in_memory();
        let (raw, path) = (place.path("raw"), place.path("disk"));
        let content = content(seed);
        create_raw(&raw, &content);
        for compressed in [&[][..], &["-c"]] {
            let arguments =
                [&["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", options][..], compressed, &[&raw, &path]];
            if !qemu_img(&arguments.concat()) {
                return;
            }
            qemu_img(&["snapshot", "-c", "before", &path]);
            read_and_write(&path, &content, seed);
            // The snapshot still has what it had.
            qemu_img(&["snapshot", "-a", "before", &path]);
            check_clean(&path);
            compare(&path, &content);
        }
    }
}

#[test]
fn overlays_find_their_backing_files() {
    let place = TempDir::in_memory();
    let content = content(80);
    create_raw(&place.path("base.img"), &content);
    let (middle, top) = (place.path("middle.qcow2"), place.path("top.qcow2"));
    if !qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", &middle]) {
        return;
    }
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", &top]);
    read_and_write(&top, &content, 80);
    // A longer overlay, by an absolute name, and one as JSON.
    let longer = place.path("longer.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &longer, "2M"]);
    read_and_write(&longer, &[content.as_slice(), &[0; (2 << 20) - SIZE]].concat(), 81);
    let json = format!(r#"json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{middle}"}}}}"#);
    let described = place.path("described.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &json, "-F", "qcow2", &described]);
    read_and_write(&described, &content, 82);
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    let luks = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    if !qemu_img(&[&luks[..], &[options, &path, "1M"]].concat()) {
        return;
    }
    let error = open(&format!("qcow2,file.driver=file,file.filename={path}")).err().expect("it is encrypted");
    assert!(error.0.contains("encrypted") && error.0.contains("encrypt.key-secret"), "{error}");
    let read_only = open(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
    assert!(read_only.is_err(), "nor is ciphertext served to readers");
    let wrong = open(&format!("qcow2,encrypt.key-secret=secret,file.driver=file,file.filename={path}"));
    assert!(wrong.err().expect("that is another secret").0.contains("none of its key slots"));

    // A backing file without a format, which old programs made.
    create_raw(&place.path("base"), &[1; 65536]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", &path, "64K"]);
    let plain = std::fs::read(&path).expect("it exists");
    // The extension with the format becomes one that nobody knows.
    let mut unstated = plain;
    let at =
        unstated.windows(4).position(|bytes| bytes == 0xe279_2aca_u32.to_be_bytes()).expect("it states the format");
    unstated[at] = 0x12;
    create_raw(&path, &unstated);
    let options = format!("qcow2,file.driver=file,file.filename={path}");
    let error = open(&options).err().expect("formats are not guessed");
    assert!(error.0.contains("never guessed") && error.0.contains("base"), "{error}");
    let (_graph, node) = opened(&format!("{options},backing.driver=raw"));
    assert_eq!(node.length(), 65536);
}

#[test]
fn locks_keep_qemu_out_of_the_whole_chain() {
    let place = TempDir::on_disk();
    create_raw(&place.path("base"), &[1; 65536]);
    let top = place.path("top");
    if !qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", &top]) {
        return;
    }
    let base = place.path("base");
    let write =
        |format: &str, path: &str| qemu("qemu-io", &["-f", format, "-c", "write 0 512", path]).expect("installed");
    let (graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={top}"));
    let refused = write("qcow2", &top).expect_err("it is open here");
    assert!(refused.contains("lock"), "{refused}");
    assert!(write("raw", &base).is_err(), "a backing file must not change");
    node.inactivate().expect("nothing is in the way");
    write("qcow2", &top).expect("an inactive node locks nothing");
    node.activate().expect("nothing is in the way");
    assert!(write("qcow2", &top).is_err());
    drop((node, graph));
    write("raw", &base).expect("it is closed");
}
