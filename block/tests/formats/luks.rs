//! Encrypted volumes: made by QEMU's programs and by us, read and written by the other; wrong secrets, damage, and headers
//! that ask for too much.

use std::time::{Duration, Instant};

use blockport_block::driver::WriteFlags;
use blockport_block::drivers::luks::LuksOptions;
use blockport_block::iovec::AlignedBuffer;

use crate::images::{create_raw, qemu, qemu_img};
use crate::testing::fixtures::create_luks;
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{PASSPHRASE, TempDir, channel, context, open, opened, user};

const SIZE: usize = (192 << 10) + 3 * 512;

fn secret() -> String {
    format!("secret,id=s,data={}", String::from_utf8_lossy(PASSPHRASE))
}

fn options_of(format: &str, path: &str) -> String {
    match format {
        "luks" => format!("luks,key-secret=secret,file.driver=file,file.filename={path}"),
        _ => format!(
            "qcow2,encrypt.format=luks,encrypt.key-secret=secret,discard=unmap,file.driver=file,file.filename={path}"
        ),
    }
}

/// How QEMU's programs are told of an image.
fn image_opts(format: &str, path: &str) -> String {
    match format {
        "luks" => format!("driver=luks,key-secret=s,file.filename={path}"),
        _ => format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={path}"),
    }
}

/// Reads what QEMU put there, writes at random, and has QEMU read it again.
fn read_and_write(format: &str, path: &str, expected: Vec<u8>, seed: u64) {
    let (graph, node) = opened(&options_of(format, path));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let content = context.run_until(async move {
        let got = read(&channel, 0, channel.length()).await;
        assert_eq!(got.len(), expected.len());
        let differs = (0..got.len()).find(|at| got[*at] != expected[*at]);
        assert_eq!(differs, None, "the first byte that differs");
        let mut oracle = Oracle::new(channel, true, seed).await;
        for _ in 0..6 {
            oracle.batch().await;
        }
        oracle.verify().await;
        oracle.content().to_vec()
    });
    drop((child, node, graph));
    let back = format!("{path}.back");
    let (secret, source) = (secret(), image_opts(format, path));
    qemu_img(&["convert", "-q", "--object", &secret, "--image-opts", &source, "-O", "raw", &back]);
    assert!(std::fs::read(&back).expect("it was just made") == content, "QEMU reads something else");
}

fn content(seed: u64) -> Vec<u8> {
    Random::new(seed).bytes(SIZE)
}

/// One made by qemu-img with these options, with random content.
fn made_by_qemu(format: &str, path: &str, options: &str, seed: u64) -> Option<Vec<u8>> {
    let (raw, content, secret) = (format!("{path}.raw"), content(seed), secret());
    create_raw(&raw, &content);
    let prefix = if format == "luks" { "" } else { "encrypt." };
    let mut all = format!("{prefix}key-secret=s,{prefix}iter-time=1");
    if format != "luks" {
        all += ",encrypt.format=luks";
    }
    for option in options.split(',').filter(|option| !option.is_empty()) {
        let prefix = if option.starts_with("cluster_size") || option.starts_with("extended") { "" } else { prefix };
        all += &format!(",{prefix}{option}");
    }
    let made = qemu_img(&["convert", "-q", "--object", &secret, "-f", "raw", "-O", format, "-o", &all, &raw, path]);
    made.then_some(content)
}

#[test]
fn volumes_of_qemu_are_read_and_written_whatever_the_cipher() {
    for (seed, options) in (1..).zip([
        "",
        "cipher-alg=aes-128",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64",
        "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-mode=cbc,ivgen-alg=plain",
        "ivgen-alg=plain",
        "hash-alg=sha1",
        "hash-alg=sha224",
        "hash-alg=sha384",
        "hash-alg=sha512",
    ]) {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        eprintln!("{options}");
        let Some(content) = made_by_qemu("luks", &path, options, seed) else { return };
        read_and_write("luks", &path, content, seed);
    }
}

#[test]
fn encrypted_qcow2_images_are_read_and_written() {
    for (seed, options) in
        (20..).zip(["", "cluster_size=4k,cipher-mode=cbc,ivgen-alg=essiv", "extended_l2=on,hash-alg=sha512"])
    {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        eprintln!("{options}");
        let Some(content) = made_by_qemu("qcow2", &path, options, seed) else { return };
        read_and_write("qcow2", &path, content, seed);
        // The keys are part of the image, and stay so.
        let (_graph, node) = opened(&options_of("qcow2", &path));
        let report = blockport_block::drivers::qcow2::check(&node, true).expect("it can be read");
        assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
        drop((node, _graph));
        let (secret, source) = (secret(), image_opts("qcow2", &path));
        qemu_img(&["check", "-q", "--object", &secret, "--image-opts", &source]);
    }
}

#[test]
fn encrypted_qcow2_images_of_ours_are_read_and_written_by_qemu() {
    use blockport_block::drivers::luks::new_volume;
    use blockport_block::drivers::qcow2::{CreateOptions, new_image};

    for cluster_size in [65536, 4096] {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        let luks = new_volume(&LuksOptions { iter_time_ms: 1, ..LuksOptions::default() }, PASSPHRASE);
        let luks = Some(luks.expect("the options agree"));
        let create = CreateOptions { size: SIZE as u64, cluster_size, luks, ..CreateOptions::default() };
        create_raw(&path, &new_image(&create).expect("the options agree"));
        let (secret, target) = (secret(), image_opts("qcow2", &path));
        let write = ["--object", &secret, "--image-opts", &target, "-c", "write -P 0x5a 4096 70000"];
        match qemu("qemu-io", &write) {
            Some(result) => drop(result.unwrap_or_else(|error| panic!("{error}"))),
            None => return,
        }
        let mut expected = vec![0; SIZE];
        expected[4096..74096].fill(0x5a);
        read_and_write("qcow2", &path, expected, 4);
        qemu_img(&["check", "-q", "--object", &secret, "--image-opts", &target]);
    }
}

#[test]
fn volumes_of_ours_are_read_and_written_by_qemu() {
    for (cipher, mode, iv, hash) in [
        ("aes-256", "xts", "plain64", "sha256"),
        ("aes-128", "xts", "plain", "sha1"),
        ("aes-256", "cbc", "essiv", "sha512"),
        ("aes-128", "cbc", "plain64", "sha384"),
    ] {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        let options = LuksOptions {
            cipher: cipher.to_owned(),
            mode: mode.to_owned(),
            iv: iv.to_owned(),
            hash: hash.to_owned(),
            iter_time_ms: 1,
            ..LuksOptions::default()
        };
        create_luks(&path, SIZE as u64, &options);
        let (secret, target) = (secret(), image_opts("luks", &path));
        let write = ["--object", &secret, "--image-opts", &target, "-c", "write -P 0x5a 4096 70000"];
        match qemu("qemu-io", &write) {
            Some(result) => drop(result.unwrap_or_else(|error| panic!("{error}"))),
            None => return,
        }
        let mut expected = vec![0; SIZE];
        expected[4096..74096].fill(0x5a);
        read_and_write("luks", &path, expected, 3);
    }
}

#[test]
fn a_wrong_secret_and_a_damaged_header_are_told_apart_and_nothing_is_written() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create_luks(&path, SIZE as u64, &LuksOptions { iter_time_ms: 1, ..LuksOptions::default() });
    let whole = std::fs::read(&path).expect("it exists");
    let error_with = |at: usize, bytes: &[u8]| {
        let mut volume = whole.clone();
        volume[at..at + bytes.len()].copy_from_slice(bytes);
        create_raw(&path, &volume);
        let start = Instant::now();
        let error = open(&options_of("luks", &path)).err().expect("it must be refused").0;
        assert!(start.elapsed() < Duration::from_secs(60), "bounded in time");
        assert!(std::fs::read(&path).expect("it exists") == volume, "nothing is written");
        assert!(error.contains(&path), "{error}");
        error
    };
    // The first slot: iterations, then salt; then its key material.
    assert!(error_with(216, &[1]).contains("none of its key slots"));
    assert!(error_with(4096 + 7, &[1, 2, 3]).contains("none of its key slots"));
    assert!(error_with(112, &[0; 20]).contains("none of its key slots"));
    assert!(error_with(212, &400_000_000u32.to_be_bytes()).contains("limit"));
    assert!(error_with(164, &u32::MAX.to_be_bytes()).contains("limit"));
    assert!(error_with(208, &0xdeadu32.to_be_bytes()).contains("empty"));
    assert!(error_with(208, &[9; 4]).contains("damaged"));
    assert!(error_with(8, b"serpent\0").contains("serpent"));
    assert!(error_with(72, b"md5\0").contains("md5"));
    assert!(error_with(0, b"KSUL").contains("no LUKS header"));
    assert!(error_with(6, &[0, 2]).contains("version 2"));
    assert!(error_with(104, &u32::MAX.to_be_bytes()).contains("behind the end"));
    for bytes in [0, 100, 592, 4096, 100_000] {
        create_raw(&path, &whole[..bytes]);
        assert!(open(&options_of("luks", &path)).is_err(), "cut to {bytes}");
    }
    create_raw(&path, &whole);
    let missing = open(&options_of("luks", &path).replace("key-secret=secret", "key-secret=nobody"));
    assert!(missing.err().expect("there is no such secret").0.contains("nobody"));
    let unnamed = open(&options_of("luks", &path).replace("key-secret=secret,", ""));
    assert!(unnamed.err().expect("it needs one").0.contains("key-secret"));
}

#[test]
fn what_is_on_the_disk_is_not_what_was_written() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create_luks(&path, SIZE as u64, &LuksOptions { iter_time_ms: 1, ..LuksOptions::default() });
    {
        let (_graph, node) = opened(&options_of("luks", &path));
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            let mut buffer = AlignedBuffer::new(65536, 512);
            buffer.fill_from(&[0xab; 65536]);
            let flags = WriteFlags { fua: true, ..WriteFlags::default() };
            assert_eq!(channel.pwritev(512, &[buffer.iov()], flags).await, Ok(()));
            assert_eq!(channel.pwrite_zeroes(100_000 / 512 * 512, 8192, WriteFlags::default()).await, Ok(()));
            // The buffer of who wrote is as it was.
            assert!(buffer.to_vec() == [0xab; 65536]);
        });
    }
    let raw = std::fs::read(&path).expect("it exists");
    let payload = raw.len() - SIZE;
    for sector in raw[payload..].chunks(512) {
        assert!(sector.iter().any(|byte| *byte != 0) && sector.iter().any(|byte| *byte != 0xab));
        assert!(sector.windows(8).all(|bytes| bytes != [0xab; 8] && bytes != [0; 8]));
    }
}
