//! Images that lie: whatever is in one, opening, reading and writing it ends in bounded time and memory, and with errors
//! that say what is wrong; and the ways in which other programs were brought to damage images.

use std::sync::{Arc, Mutex};

use blockport_block::driver::WriteFlags;
use blockport_block::drivers::qcow2::{CreateOptions, check};
use blockport_block::event::{self, BlockEvent};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockError, BlockResult, Child, ChildChannel, Permissions};

use crate::images::{check_clean, compare, create, create_raw};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, join_all, open, opened, user};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, kept: false };

fn options(path: &str) -> String {
    format!("qcow2,discard=unmap,file.driver=file,file.filename={path}")
}

/// An image of 2 MiB with some content, in small clusters.
fn image(place: &TempDir, create_options: CreateOptions) -> (String, Vec<u8>) {
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 2 << 20, ..create_options });
    let (graph, node) = opened(&options(&path));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let mut oracle = Oracle::new(channel, true, 5).await;
        for _ in 0..20 {
            oracle.batch().await;
        }
    });
    drop((child, node, graph));
    let bytes = std::fs::read(&path).expect("it was just made");
    (path, bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// Opens what there is, reads all of it and writes to it. Whatever comes of it, it ends, and without a panic.
fn poke(path: &str, seed: u64) {
    if let Ok((_graph, node)) = open(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}")) {
        let child = Child::attach(node, "the test", Permissions::device(false), 512).expect("a reader");
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            let buffer = AlignedBuffer::new(64 << 10, 4096);
            for at in (0..channel.length().min(4 << 20)).step_by(64 << 10) {
                let bytes = (channel.length() - at).min(64 << 10);
                let _ = channel.preadv(at, &[buffer.iov().part(0, bytes as usize)]).await;
                let _ = channel.block_status(at, bytes).await;
            }
        });
    }
    let Ok((_graph, node)) = open(&options(path)) else { return };
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let mut random = Random::new(seed);
        let buffer = AlignedBuffer::new(128 << 10, 4096);
        let sectors = channel.length() / 512;
        for _ in 0..12 {
            let mut futures = Vec::new();
            for _ in 0..6 {
                let count = (1 + random.below(200)).min(sectors);
                let (at, bytes) = (random.below(sectors - count + 1) * 512, count * 512);
                let iov = [buffer.iov().part(0, bytes as usize)];
                futures.push(match random.below(6) {
                    0 => channel.pdiscard(at, bytes),
                    1 => channel.pwrite_zeroes(at, bytes, WriteFlags { may_unmap: true, ..PLAIN }),
                    2 => channel.flush(),
                    3 => channel.preadv(at, &iov),
                    _ => channel.pwritev(at, &iov, PLAIN),
                });
            }
            join_all(futures).await;
        }
    });
}

#[test]
fn mutated_images_end_in_errors_at_worst() {
    let rounds = if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 3000 } else { 150 };
    let kinds = [
        CreateOptions { cluster_size: 4096, ..CreateOptions::default() },
        CreateOptions { cluster_size: 512, version: 2, ..CreateOptions::default() },
        CreateOptions { cluster_size: 16384, extended_l2: true, ..CreateOptions::default() },
    ];
    for (kind, create_options) in kinds.into_iter().enumerate() {
        let place = TempDir::in_memory();
        let cluster = create_options.cluster_size as usize;
        let (path, bytes) = image(&place, create_options);
        let mut random = Random::new(kind as u64);
        let l1 = number(&bytes, 40) as usize;
        let l2 = (number(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
        for round in 0..rounds {
            let mut mutated = bytes.clone();
            for _ in 0..1 + random.below(4) {
                // The header's numbers, tables, or anywhere.
                let at = match random.below(6) {
                    0 | 1 => random.below(120) as usize,
                    2 => l1 + random.below(64) as usize,
                    3 => l2 + random.below(cluster as u64) as usize,
                    4 => cluster + random.below(3 * cluster as u64) as usize,
                    _ => random.below(mutated.len() as u64) as usize,
                };
                let at = at.min(mutated.len() - 8);
                match random.below(4) {
                    0 => mutated[at] ^= 1 << random.below(8),
                    1 => mutated[at] = random.next() as u8,
                    2 => put(&mut mutated, at / 8 * 8, &random.next().to_be_bytes()),
                    _ => {
                        let somewhere = random.below(mutated.len() as u64) / cluster as u64 * cluster as u64;
                        put(&mut mutated, at / 8 * 8, &(somewhere | random.below(2) << 63).to_be_bytes());
                    }
                }
            }
            if random.one_in(10) {
                mutated.truncate(random.below(mutated.len() as u64) as usize);
            }
            create_raw(&path, &mutated);
            poke(&path, round);
        }
    }
}

#[test]
fn a_header_past_its_limits_is_refused_by_what_it_says() {
    let place = TempDir::in_memory();
    let (path, bytes) = image(&place, CreateOptions::default());
    let cases: [(usize, &[u8], &str); 21] = [
        (0, b"QFI\0", "magic"),
        (4, &4u32.to_be_bytes(), "version 4"),
        (20, &8u32.to_be_bytes(), "clusters of 2^8"),
        (20, &22u32.to_be_bytes(), "clusters of 2^22"),
        (24, &(1u64 << 50).to_be_bytes(), "too small for the size"),
        (24, &u64::MAX.to_be_bytes(), "too large"),
        (32, &1u32.to_be_bytes(), "legacy AES"),
        (32, &2u32.to_be_bytes(), "LUKS"),
        (32, &9u32.to_be_bytes(), "unknown method"),
        (36, &u32::MAX.to_be_bytes(), "32 MiB"),
        (40, &0x200u64.to_be_bytes(), "invalid place"),
        (40, &(1u64 << 60).to_be_bytes(), "invalid place"),
        (40, &0u64.to_be_bytes(), "lies on the header"),
        (48, &0x1_0001u64.to_be_bytes(), "invalid place"),
        (56, &u32::MAX.to_be_bytes(), "8 MiB"),
        (56, &0u32.to_be_bytes(), "no refcount table"),
        (60, &70_000u32.to_be_bytes(), "snapshots are too many"),
        (72, &(1u64 << 40 | 1 << 9).to_be_bytes(), "bit 9, bit 40"),
        (96, &7u32.to_be_bytes(), "2^7 bits"),
        (100, &100u32.to_be_bytes(), "100 bytes"),
        (104, &[1], "contradict"),
    ];
    for (at, value, expected) in cases {
        let mut changed = bytes.clone();
        put(&mut changed, at, value);
        create_raw(&path, &changed);
        for access in ["", ",read-only=on"] {
            let error = open(&format!("{}{access}", options(&path))).err().unwrap_or_else(|| panic!("{at} opens"));
            assert!(error.0.contains(expected) && error.0.contains(&path), "{at}: {error}");
        }
    }
    // A backing file name outside the header's cluster, and one that is too long.
    for (offset, len, expected) in [(1u64 << 40, 10u32, "outside"), (65530, 10, "outside"), (200, 1024, "too long")] {
        let mut changed = bytes.clone();
        put(&mut changed, 8, &offset.to_be_bytes());
        put(&mut changed, 16, &len.to_be_bytes());
        create_raw(&path, &changed);
        let error = open(&options(&path)).err().expect("refused");
        assert!(error.0.contains(expected), "{error}");
    }
    for (bits, expected) in [(2u64, "marked as corrupt"), (3, "marked as corrupt")] {
        let mut changed = bytes.clone();
        put(&mut changed, 72, &bits.to_be_bytes());
        create_raw(&path, &changed);
        let error = open(&options(&path)).err().expect("it is not to be written");
        assert!(error.0.contains(expected), "{error}");
        opened(&format!("{},read-only=on", options(&path)));
        assert_eq!(std::fs::read(&path).expect("it exists"), changed, "a reader writes nothing at all");
    }
}

fn write_at(
    channel: &std::rc::Rc<ChildChannel>,
    offset: u64,
    byte: u8,
    bytes: usize,
) -> impl Future<Output = BlockResult> + use<> {
    let mut buffer = AlignedBuffer::new(bytes, 4096);
    buffer.fill_from(&vec![byte; bytes]);
    let future = channel.pwritev(offset, &[buffer.iov()], PLAIN);
    async move {
        let result = future.await;
        drop(buffer);
        result
    }
}

/// A guest cluster that claims to lie on the header: the first 64 KiB of an image were overwritten that way elsewhere.
#[test]
fn guest_data_is_never_written_over_metadata() {
    let seen: Arc<Mutex<Vec<BlockEvent>>> = Arc::default();
    let sink = seen.clone();
    event::set_sink(move |event| sink.lock().expect("no panic").push(event));
    let tables = |bytes: &[u8]| [number(bytes, 40), number(bytes, 48), number(bytes, number(bytes, 48) as usize)];
    for target in 0..4 {
        let place = TempDir::in_memory();
        let (path, mut bytes) = image(&place, CreateOptions { cluster_size: 4096, ..CreateOptions::default() });
        let l1 = number(&bytes, 40) as usize;
        let l2 = number(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
        let host = match target {
            3 => l2,
            _ => tables(&bytes)[target],
        };
        put(&mut bytes, l2 as usize + 7 * 8, &(1 << 63 | host).to_be_bytes());
        create_raw(&path, &bytes);
        let (graph, node) = opened(&options(&path));
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            assert_eq!(write_at(&channel, 7 * 4096, 0xee, 4096).await, Err(BlockError::Host(libc::EIO)));
            assert_eq!(write_at(&channel, 1 << 20, 0xee, 4096).await, Err(BlockError::Host(libc::EIO)), "unusable");
            let buffer = AlignedBuffer::new(512, 4096);
            assert_eq!(channel.preadv(0, &[buffer.iov()]).await, Err(BlockError::Host(libc::EIO)));
            assert_eq!(channel.flush().await, Err(BlockError::Host(libc::EIO)));
        });
        drop((child, node, graph));
        put(&mut bytes, 72, &2u64.to_be_bytes());
        assert!(std::fs::read(&path).expect("it exists") == bytes, "only the corrupt bit has changed");
        let error = open(&options(&path)).err().expect("it is marked");
        assert!(error.0.contains("corrupt"), "{error}");
    }
    let told = seen
        .lock()
        .expect("no panic")
        .iter()
        .filter(|event| matches!(event, BlockEvent::ImageCorrupted { .. }))
        .count();
    assert!(told >= 4, "{told} events");
}

#[test]
fn tables_that_lie_on_each_other_are_not_written() {
    let place = TempDir::in_memory();
    let (path, bytes) = image(&place, CreateOptions { cluster_size: 4096, ..CreateOptions::default() });
    let (l1, table) = (number(&bytes, 40) as usize, number(&bytes, 48));
    let block = number(&bytes, table as usize);
    for (at, value) in
        [(l1, 1 << 63 | block), (l1, 1 << 63 | table), (table as usize, l1 as u64), (l1, 1 << 63 | l1 as u64)]
    {
        let mut changed = bytes.clone();
        put(&mut changed, at, &value.to_be_bytes());
        create_raw(&path, &changed);
        let error = open(&options(&path)).err().expect("refused");
        assert!(error.0.contains("corrupt"), "{error}");
        assert!(std::fs::read(&path).expect("it exists") == changed, "left as it is");
    }
}

#[test]
fn chains_that_lead_back_are_refused() {
    let place = TempDir::in_memory();
    let overlay = |name: &str, backing: &str| {
        let backing = Some((backing.to_owned(), "qcow2".to_owned()));
        create(&place.path(name), &CreateOptions { size: 1 << 20, backing, ..CreateOptions::default() });
    };
    overlay("a", "b");
    overlay("b", "./c");
    overlay("c", "a");
    overlay("self", "self");
    for name in ["a", "self"] {
        let error = open(&options(&place.path(name))).err().expect("a loop");
        assert!(error.0.contains("leads back"), "{error}");
    }
    std::fs::hard_link(place.path("self"), place.path("other")).expect("on one file system");
    overlay("over", "other");
    assert!(open(&options(&place.path("over"))).is_err());
}

#[test]
fn compressed_garbage_fails_what_reads_it_and_nothing_else() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    let zstd = CreateOptions { size: 1 << 20, zstd: true, ..CreateOptions::default() };
    for create_options in [CreateOptions { size: 1 << 20, ..CreateOptions::default() }, zstd] {
        create(&path, &create_options);
        let (graph, node) = opened(&options(&path));
        let child = user(&node, 512);
        let context = context();
        let channel_ = channel(&child, &context);
        context.run_until(async move {
            assert_eq!(write_at(&channel_, 65536, 7, 65536).await, Ok(()));
            assert_eq!(write_at(&channel_, 0, 8, 65536).await, Ok(()));
        });
        drop((child, node, graph));
        let mut bytes = std::fs::read(&path).expect("it exists");
        let l2 = (number(&bytes, number(&bytes, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
        let data = number(&bytes, l2 + 8) & 0x00ff_ffff_ffff_fe00;
        put(&mut bytes, l2 + 8, &(1 << 62 | 20 << 54 | data).to_be_bytes());
        create_raw(&path, &bytes);
        let (_graph, node) = opened(&options(&path));
        let child = user(&node, 512);
        let channel_ = channel(&child, &context);
        context.run_until(async move {
            let buffer = AlignedBuffer::new(512, 4096);
            assert_eq!(channel_.preadv(65536, &[buffer.iov()]).await, Err(BlockError::Host(libc::EIO)));
            assert_eq!(read(&channel_, 0, 65536).await, vec![8; 65536]);
            assert_eq!(
                write_at(&channel_, 65536, 9, 512).await,
                Err(BlockError::Host(libc::EIO)),
                "nothing to copy up"
            );
            assert_eq!(write_at(&channel_, 65536, 9, 65536).await, Ok(()), "nothing is left of it");
            assert_eq!(read(&channel_, 65536, 65536).await, vec![9; 65536]);
        });
    }
}

/// Space is given back while other requests allocate: a hole punched late must never hit what was written since.
#[test]
fn a_discard_never_hits_what_is_written_afterwards() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 4 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let slow = "file.driver=blkdebug,file.delay.0.iotype=discard,file.delay.0.ns=2000000,file.delay.1.iotype=write,\
                file.delay.1.ns=200000,file.image.driver=file";
    let (graph, node) = opened(&format!("qcow2,discard=unmap,{slow},file.image.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let content = context.run_until(async move {
        let mut content = vec![0u8; 4 << 20];
        for round in 0..60u64 {
            let discarded = round % 8 * (64 << 10);
            let written = (1 << 20) + round * (16 << 10);
            let byte = round as u8 + 1;
            assert_eq!(write_at(&channel, discarded, byte, 64 << 10).await, Ok(()));
            // All at once: the space of the first goes while the second looks for some.
            let all: Vec<std::pin::Pin<Box<dyn Future<Output = BlockResult>>>> = vec![
                Box::pin(channel.pdiscard(discarded, 64 << 10)),
                Box::pin(channel.flush()),
                Box::pin(write_at(&channel, written, byte, 16 << 10)),
                Box::pin(channel.flush()),
            ];
            assert_eq!(join_all(all).await, [Ok(()); 4]);
            assert_eq!(write_at(&channel, written, byte, 8 << 10).await, Ok(()));
            content[written as usize..written as usize + (16 << 10)].fill(byte);
            assert!(read(&channel, 1 << 20, 1 << 20).await == content[1 << 20..2 << 20], "round {round}");
        }
        let discarded = read(&channel, 0, 512 << 10).await;
        content[..512 << 10].copy_from_slice(&discarded);
        content
    });
    drop((child, node, graph));
    check_clean(&path);
    compare(&path, &content);
}

/// A write in place that is under way when its cluster is discarded goes to a cluster that nobody else has got yet.
#[test]
fn a_cluster_is_not_used_anew_while_a_write_to_it_is_under_way() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 4 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let context = context();
    let (graph, node) = opened(&options(&path));
    let child = user(&node, 512);
    let plain = channel(&child, &context);
    context.run_until(async move { assert_eq!(write_at(&plain, 0, 1, 4096).await, Ok(())) });
    drop((child, node, graph));
    let bytes = std::fs::read(&path).expect("it exists");
    let l2 = (number(&bytes, number(&bytes, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let sector = (number(&bytes, l2) & 0x00ff_ffff_ffff_fe00) / 512;

    // The write is overtaken by everything that follows.
    let slow = format!(
        "file.driver=blkdebug,file.delay.0.iotype=write,file.delay.0.ns=150000000,file.delay.0.once=on,\
         file.delay.0.sector={sector},file.image.driver=file,file.image.filename={path}"
    );
    let (graph, node) = opened(&format!("qcow2,discard=unmap,{slow}"));
    let child = user(&node, 512);
    let channel = channel(&child, &context);
    context.run_until(async move {
        // With the mapping in memory, the write goes straight to its cluster.
        read(&channel, 0, 512).await;
        let late = write_at(&channel, 0, 0xff, 4096);
        assert_eq!(channel.pdiscard(0, 4096).await, Ok(()));
        for _ in 0..3 {
            assert_eq!(channel.flush().await, Ok(()));
        }
        let others: Vec<_> = (1..40).map(|n| Box::pin(write_at(&channel, n * 4096, n as u8, 4096))).collect();
        for result in join_all(others).await {
            assert_eq!(result, Ok(()));
        }
        assert_eq!(late.await, Ok(()));
        for n in 1..40 {
            assert_eq!(read(&channel, n * 4096, 4096).await, vec![n as u8; 4096], "cluster {n}");
        }
    });
    drop((child, node, graph));
    check_clean(&path);
}

/// Frees wait until the tables on disk no longer name what is freed, but not for the guest.
#[test]
fn a_guest_that_never_flushes_does_not_make_the_file_grow_for_ever() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    for compressed in [false, true] {
        create(&path, &CreateOptions { size: 4 << 20, cluster_size: 4096, ..CreateOptions::default() });
        let (graph, node) = opened(&options(&path));
        let child = user(&node, 512);
        let context = context();
        let channel_ = channel(&child, &context);
        context.run_until(async move {
            for round in 0..40u8 {
                let mut buffer = AlignedBuffer::new(2 << 20, 4096);
                buffer.fill_from(&vec![round; 2 << 20]);
                let flags = WriteFlags { compressed: compressed && round % 2 == 0, ..PLAIN };
                assert_eq!(channel_.pwritev(0, &[buffer.iov()], flags).await, Ok(()));
                if !compressed {
                    assert_eq!(
                        channel_.pwrite_zeroes(0, 2 << 20, WriteFlags { may_unmap: true, ..PLAIN }).await,
                        Ok(())
                    );
                }
            }
        });
        let length = std::fs::metadata(&path).expect("it exists").len();
        assert!(length <= 16 << 20, "{length} bytes after 80 MiB of writes to 2 MiB");
        drop((child, node, graph));
        check_clean(&path);
    }
}

/// What the header might name is not given up, and what it does not name for sure is not used.
#[test]
fn a_header_that_cannot_be_written_leaves_the_image_whole() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    for (rule, usable) in [
        ("inject-error.0.iotype=write,file.inject-error.0.sector=0,file.inject-error.0.once=on", true),
        ("inject-error.0.iotype=write,file.inject-error.0.sector=0", false),
    ] {
        create(&path, &CreateOptions { size: 256 << 10, cluster_size: 512, ..CreateOptions::default() });
        let options =
            format!("qcow2,file.driver=blkdebug,file.{rule},file.image.driver=file,file.image.filename={path}");
        let (graph, node) = opened(&options);
        let child = user(&node, 512);
        let context = context();
        let plain = channel(&child, &context);
        context.run_until(async move { assert_eq!(write_at(&plain, 0, 5, 64 << 10).await, Ok(())) });
        assert!(node.block_resize(8 << 20).is_err(), "the L1 table has to move");
        let plain = channel(&child, &context);
        context.run_until(async move {
            let written = write_at(&plain, 64 << 10, 6, 64 << 10).await;
            assert_eq!(written.is_ok(), usable);
            assert_eq!(plain.flush().await.is_ok(), usable);
        });
        drop((child, node, graph));
        {
            let (_graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
            let report = check(&node, false).expect("it can be read");
            assert_eq!(report.errors, 0, "{report:?}");
            assert!(!usable || report.leaks == 0, "{report:?}");
        }
        let content: Vec<u8> = [vec![5; 64 << 10], vec![6; 64 << 10], vec![0; 128 << 10]].concat();
        if usable {
            compare(&path, &content);
        }
    }
}
