//! Random sequences of requests, against a model and against what QEMU finds in the image afterwards.

use std::sync::Arc;

use blockport_block::BlockBackend;
use blockport_block::drivers::qcow2::CreateOptions;
use blockport_block::iovec::AlignedBuffer;

use crate::images::{check_clean, compare, create, create_raw};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, opened, user, writer};

/// Sends batches of random requests to the image, closes it, and has QEMU look at it. Twice, so that the second time
/// begins with an image that is in use.
fn run(seed: u64, path: &str, options: &str) {
    for round in 0..2 {
        let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}{options}"));
        let child = user(&node, 1);
        let context = context();
        let channel = channel(&child, &context);
        let content = context.run_until(async move {
            let mut oracle = Oracle::new(channel, true, seed * 2 + round).await;
            for _ in 0..60 {
                oracle.batch().await;
            }
            oracle.verify().await;
            oracle.content().to_vec()
        });
        drop((child, node, graph));
        check_clean(path);
        compare(path, &content);
    }
}

/// Small caches, so that metadata comes and goes.
const SMALL: &str = ",l2-cache-size=2K,l2-cache-entry-size=512,refcount-cache-size=1K";

#[test]
fn every_cluster_size_keeps_what_is_written() {
    for (seed, bits) in (9..=21u32).enumerate() {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        let size = (1u64 << bits) * if bits < 14 { 300 } else { 5 } / 2 + 1536;
        create(&path, &CreateOptions { size, cluster_size: 1 << bits, ..CreateOptions::default() });
        run(seed as u64, &path, if bits % 2 == 0 { SMALL } else { "" });
    }
}

#[test]
fn every_width_of_refcounts_keeps_what_is_written() {
    for order in 0..=6 {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        let refcount_bits = 1 << order;
        create(&path, &CreateOptions { size: 700 << 10, cluster_size: 512, refcount_bits, ..Default::default() });
        run(100 + order, &path, SMALL);
    }
}

#[test]
fn version_2_keeps_what_is_written() {
    for (seed, cluster_size) in [(200, 512), (201, 4096), (202, 65536)] {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        create(&path, &CreateOptions { size: 900 << 10, cluster_size, version: 2, ..CreateOptions::default() });
        run(seed, &path, "");
    }
}

#[test]
fn subclusters_keep_what_is_written() {
    for (seed, cluster_size, size) in [(300, 16 << 10, 1 << 20), (301, 64 << 10, 3 << 20), (302, 2 << 20, 9 << 20)] {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        create(&path, &CreateOptions { size, cluster_size, extended_l2: true, ..CreateOptions::default() });
        run(seed, &path, if seed == 300 { SMALL } else { "" });
    }
}

#[test]
fn an_external_data_file_keeps_what_is_written() {
    for (seed, data_file_raw, cluster_size, extended_l2) in
        [(400, false, 4096, false), (401, true, 65536, false), (402, false, 16384, true), (403, true, 512, false)]
    {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        let data = place.file("data.raw", 0);
        // QEMU takes a relative name as relative to where it runs.
        let data_file = Some(data.clone());
        let size = 700 << 10;
        create(
            &path,
            &CreateOptions { size, cluster_size, data_file, data_file_raw, extended_l2, ..Default::default() },
        );
        run(seed, &path, "");
        if data_file_raw {
            let mut content = std::fs::read(data).expect("it exists");
            content.resize(size as usize, 0);
            compare(&path, &content);
        }
    }
}

/// Random requests, a random new size, and again: what is left stays, what is new is zero whatever lies behind.
fn run_with_resizes(seed: u64, path: &str, options: &str, largest: u64) {
    let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}{options}"));
    let child = user(&node, 1);
    let context = context();
    let mut random = Random::new(seed);
    let before = channel(&child, &context);
    let mut content = context.run_until(async move { read(&before, 0, before.length()).await });
    for round in 0..12 {
        let size = (random.below(largest / 512) + 1) * 512;
        let size = if random.one_in(3) { size.next_multiple_of(65536) } else { size };
        node.resize(size).expect("it can be resized");
        content.resize(size as usize, 0);
        let channel = channel(&child, &context);
        let expected = content;
        content = context.run_until(async move {
            assert_eq!(channel.length(), size);
            let got = read(&channel, 0, size).await;
            let differs = (0..got.len()).find(|at| got[*at] != expected[*at]);
            assert_eq!(differs, None, "the first byte that differs after round {round}");
            let mut oracle = Oracle::new(channel, true, seed * 100 + round).await;
            for _ in 0..8 {
                oracle.batch().await;
            }
            oracle.verify().await;
            oracle.content().to_vec()
        });
    }
    drop((child, node, graph));
    check_clean(path);
    compare(path, &content);
}

#[test]
fn resizing_keeps_what_is_left_and_shows_nothing_older() {
    for (seed, cluster_size, extended_l2, version, raw) in [
        (600, 512, false, 3, false),
        (601, 4096, false, 2, false),
        (602, 65536, false, 3, false),
        (603, 16384, true, 3, false),
        (604, 4096, false, 3, true),
    ] {
        let place = TempDir::in_memory();
        let options = CreateOptions { size: 1 << 20, cluster_size, extended_l2, version, ..Default::default() };
        let path = place.path("disk");
        let data_file = raw.then(|| place.file("data", 1 << 20));
        create(&path, &CreateOptions { data_file, data_file_raw: raw, ..options.clone() });
        run_with_resizes(seed, &path, "", 3 << 20);
        if !raw {
            create_raw(&place.path("base"), &Random::new(seed).bytes(2 << 20));
            let backing = Some(("base".to_owned(), "raw".to_owned()));
            create(&path, &CreateOptions { backing, ..options });
            run_with_resizes(seed + 50, &path, if cluster_size == 512 { SMALL } else { "" }, 3 << 20);
        }
    }
}

/// A chain of three: raw, then two images; each with a size and content of its own.
fn chain(seed: u64, place: &TempDir, sizes: [u64; 3], top: CreateOptions) -> String {
    let mut random = Random::new(seed);
    create_raw(&place.path("base"), &random.bytes(sizes[0] as usize));
    let middle = CreateOptions {
        size: sizes[1],
        backing: Some(("base".to_owned(), "raw".to_owned())),
        cluster_size: 4096,
        ..CreateOptions::default()
    };
    create(&place.path("middle"), &middle);
    run(seed, &place.path("middle"), "");
    let path = place.path("top");
    create(&path, &CreateOptions { size: sizes[2], backing: Some(("middle".to_owned(), "qcow2".to_owned())), ..top });
    path
}

#[test]
fn chains_with_shorter_and_longer_parents_keep_what_is_written() {
    let sizes =
        [[300 << 10, 300 << 10, 300 << 10], [100 << 10, 200 << 10, 333 << 10], [444 << 10, 99 << 10, 250 << 10]];
    for (seed, sizes) in (500..).zip(sizes) {
        for (cluster_size, extended_l2, version) in
            [(65536, false, 3), (512, false, 3), (16384, true, 3), (4096, false, 2)]
        {
            let place = TempDir::in_memory();
            let top = CreateOptions { cluster_size, extended_l2, version, ..CreateOptions::default() };
            let path = chain(seed, &place, sizes, top);
            run(seed + cluster_size, &path, "");
        }
    }
}

/// Two iothreads write to overlapping places at once: every sector must hold what one of the last writes to it wrote,
/// as a whole, and nothing else may be hit.
fn hammer(seed: u64, options: CreateOptions, open: &str) {
    const SECTORS: u64 = 2048;
    let place = TempDir::on_disk();
    let path = place.path("disk");
    let options = CreateOptions { size: SECTORS * 512, ..options };
    if options.backing.is_some() {
        create_raw(&place.path("base"), &vec![0xbb; (SECTORS * 512) as usize]);
    }
    create(&path, &options);
    let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}{open}"));
    let backend = BlockBackend::with_root("b", node.clone(), writer()).expect("nobody else uses the node");
    let threads: Vec<_> = (0..2u64)
        .map(|number| {
            let backend = backend.clone();
            std::thread::spawn(move || hammer_from(seed * 2 + number, &backend, number))
        })
        .collect();
    let logs: Vec<Vec<Option<u8>>> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
    let context = context();
    let channel = backend.channel(&context).expect("the node is active");
    let content = context.run_until(async move {
        let buffer = AlignedBuffer::new((SECTORS * 512) as usize, 4096);
        assert_eq!(channel.preadv(0, &[buffer.iov()]).await, Ok(()));
        assert_eq!(channel.flush().await, Ok(()));
        buffer.to_vec()
    });
    for (sector, got) in content.chunks(512).enumerate() {
        let untouched = if options.backing.is_some() { 0xbb } else { 0 };
        let candidates: Vec<u8> = logs.iter().filter_map(|log| log[sector]).collect();
        let candidates = if candidates.is_empty() { vec![untouched] } else { candidates };
        let whole = candidates.iter().any(|byte| got.iter().all(|other| other == byte));
        assert!(whole, "sector {sector} is {:#x}…, and should be one of {candidates:x?}", got[0]);
    }
    drop((backend, node, graph));
    check_clean(&path);
    compare(&path, &content);
}

/// What one thread wrote last to each sector. Values of the two differ.
fn hammer_from(seed: u64, backend: &Arc<BlockBackend>, number: u64) -> Vec<Option<u8>> {
    let context = context();
    let channel = backend.channel(&context).expect("the node is active");
    context.run_until(async move {
        let mut random = Random::new(seed);
        let mut log = vec![None; 2048];
        for _ in 0..40 {
            // A thread's own requests of one round do not overlap; those of the other thread do.
            let (mut requests, mut at) = (Vec::new(), random.below(200));
            while at < 2000 {
                let sectors = 1 + random.below(40);
                let sectors = sectors.min(2048 - at);
                let zero = random.one_in(6);
                let byte = if zero { 0 } else { (random.below(126) * 2 + 1 + number) as u8 };
                let mut buffer = AlignedBuffer::new((sectors * 512) as usize, 4096);
                buffer.fill_from(&vec![byte; (sectors * 512) as usize]);
                let iov = [buffer.iov()];
                let started = match zero {
                    true => channel.pwrite_zeroes(at * 512, sectors * 512, random.one_in(2)),
                    false => channel.pwritev(at * 512, &iov),
                };
                log[at as usize..(at + sectors) as usize].fill(Some(byte));
                requests.push((buffer, started.into_future()));
                at += sectors + random.below(60);
            }
            if random.one_in(4) {
                requests.push((AlignedBuffer::new(0, 1), channel.flush().into_future()));
            }
            let (buffers, futures): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
            for result in crate::testing::join_all(futures).await {
                assert_eq!(result, Ok(()));
            }
            drop(buffers);
        }
        log
    })
}

#[test]
fn two_iothreads_that_write_to_the_same_places_damage_nothing() {
    let backing = Some(("base".to_owned(), "raw".to_owned()));
    for (seed, options, open) in [
        (1, CreateOptions::default(), ""),
        (2, CreateOptions { backing: backing.clone(), ..Default::default() }, ""),
        (3, CreateOptions { cluster_size: 512, backing: backing.clone(), ..Default::default() }, SMALL),
        (4, CreateOptions { cluster_size: 16384, extended_l2: true, backing, ..Default::default() }, ""),
        (5, CreateOptions { cluster_size: 4096, ..Default::default() }, ",cache.direct=on"),
    ] {
        hammer(seed, options, open);
    }
}

#[test]
fn what_is_flushed_is_in_the_file_while_the_image_is_open() {
    let place = TempDir::in_memory();
    let (path, copy) = (place.path("disk"), place.path("copy"));
    create(&path, &CreateOptions { size: 4 << 20, ..CreateOptions::default() });
    let (_graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let content = context.run_until(async move {
        let mut oracle = Oracle::new(channel.clone(), true, 77).await;
        for _ in 0..20 {
            oracle.batch().await;
        }
        assert_eq!(channel.flush().await, Ok(()));
        read(&channel, 0, channel.length()).await
    });
    std::fs::copy(&path, &copy).expect("there is room");
    compare(&copy, &content);
}

/// Writes that move a file's end are done one by one by file systems, so the file runs ahead of its use.
#[test]
fn the_file_grows_in_large_steps_and_ends_with_its_last_cluster() {
    let place = TempDir::on_disk();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 64 << 20, ..CreateOptions::default() });
    let length = || std::fs::metadata(&path).expect("it exists").len();
    let (graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let lengths: std::collections::BTreeSet<u64> = (0..200u64)
        .map(|cluster| {
            let channel = channel.clone();
            context.run_until(async move {
                let buffer = AlignedBuffer::new(4096, 4096);
                assert_eq!(channel.pwritev(cluster * 65536, &[buffer.iov()], Default::default()).await, Ok(()));
            });
            length()
        })
        .collect();
    assert!(lengths.len() < 12 && lengths.iter().all(|length| length % (1 << 20) == 0), "{lengths:?}");
    drop((channel, child, node, graph));
    // Header, refcount table and block, L1 and L2 table.
    assert_eq!(length(), (200 + 5) * 65536);
    check_clean(&path);
}
