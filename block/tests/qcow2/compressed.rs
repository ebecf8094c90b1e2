//! Compressed writes: what QEMU reads of them, how they are packed, and what becomes of them under other requests.

use std::rc::Rc;

use blockport_block::driver::WriteFlags;
use blockport_block::drivers::qcow2::{CreateOptions, snapshot_apply, snapshot_create};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockError, BlockResult, ChildChannel};

use crate::images::{check_clean, compare, create};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, join_all, opened, user};

const COMPRESSED: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: true, kept: false };

async fn write(channel: &Rc<ChildChannel>, offset: u64, data: &[u8]) -> BlockResult {
    let mut buffer = AlignedBuffer::new(data.len(), 4096);
    buffer.fill_from(data);
    channel.pwritev(offset, &[buffer.iov()], COMPRESSED).await
}

/// Bytes that get about this many times smaller, or not at all.
fn data(random: &mut Random, bytes: usize) -> Vec<u8> {
    let mut data = random.bytes(bytes);
    if !random.one_in(5) {
        let plain = 1 + random.below(30) as usize;
        data.chunks_mut(32).for_each(|chunk| chunk.iter_mut().skip(32 - plain).for_each(|byte| *byte = 7));
    }
    data
}

/// Several compressed writes at once, and other requests in between.
fn run(seed: u64, options: &CreateOptions, more: &str) {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, options);
    let (graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}{more}"));
    let child = user(&node, 512);
    let context = context();
    let cluster = options.cluster_size;
    let mut content = vec![0; options.size as usize];
    let mut before = None;
    for round in 0..6u64 {
        let channel = channel(&child, &context);
        let expected = content;
        content = context.run_until(async move {
            let mut content = expected;
            let mut random = Random::new(seed * 10 + round);
            let clusters = (content.len() as u64).div_ceil(cluster);
            let (mut at, mut writes) = (random.below(3), Vec::new());
            while at < clusters {
                let count = (1 + random.below(20)).min(clusters - at);
                let range = (at * cluster) as usize..(((at + count) * cluster) as usize).min(content.len());
                let data = data(&mut random, range.len());
                content[range.clone()].copy_from_slice(&data);
                let channel = channel.clone();
                writes.push(Box::pin(async move { write(&channel, range.start as u64, &data).await }));
                at += count + random.below(clusters / 3 + 1);
            }
            assert!(join_all(writes).await.iter().all(|result| *result == Ok(())));
            assert!(read(&channel, 0, channel.length()).await == content, "round {round}");
            let mut oracle = Oracle::new(channel, true, seed * 100 + round).await;
            for _ in 0..4 {
                oracle.batch().await;
            }
            oracle.verify().await;
            oracle.content().to_vec()
        });
        // Clusters that are shared already leave counts of 2 bits no room.
        if round == 2 && options.refcount_bits > 2 {
            snapshot_create(&node, "s").expect("it can be taken");
            before = Some(content.clone());
        }
        if let Some(taken) = before.take_if(|_| round == 4) {
            snapshot_apply(&node, "s").expect("it can be applied");
            content = taken;
        }
    }
    drop((child, node, graph));
    check_clean(&path);
    compare(&path, &content);
}

#[test]
fn what_is_written_compressed_is_what_everybody_reads() {
    let small = ",l2-cache-size=2K,l2-cache-entry-size=512,refcount-cache-size=1K";
    for (seed, options, more) in [
        (1, CreateOptions { size: 2 << 20, ..Default::default() }, ""),
        (2, CreateOptions { size: 300 << 10, zstd: true, ..Default::default() }, ""),
        (3, CreateOptions { size: 200 << 10, cluster_size: 512, ..Default::default() }, small),
        (4, CreateOptions { size: (1 << 20) + 1536, cluster_size: 4096, version: 2, ..Default::default() }, ""),
        (5, CreateOptions { size: 1 << 20, cluster_size: 16384, extended_l2: true, ..Default::default() }, ""),
        (6, CreateOptions { size: 1 << 20, cluster_size: 4096, refcount_bits: 2, ..Default::default() }, small),
        (7, CreateOptions { size: 5 << 20, cluster_size: 2 << 20, zstd: true, ..Default::default() }, ""),
    ] {
        run(seed, &options, more);
    }
}

#[test]
fn compressed_clusters_share_the_clusters_of_the_host() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 8 << 20, ..Default::default() });
    let (graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel_ = channel(&child, &context);
    context.run_until(async move {
        for at in 0..128u64 {
            assert_eq!(write(&channel_, at * 65536, &vec![at as u8; 65536]).await, Ok(()));
        }
        assert_eq!(write(&channel_, 0, &[1; 512]).await, Err(BlockError::NotSupported), "no whole cluster");
        assert_eq!(write(&channel_, 512, &[1; 65536]).await, Err(BlockError::NotSupported));
    });
    drop((child, node, graph));
    // Header, refcount table and block, L1 and L2 table; some hundred bytes each.
    assert!(std::fs::metadata(&path).expect("it exists").len() <= 6 * 65536);
    check_clean(&path);
    compare(&path, &(0..128).flat_map(|at| vec![at as u8; 65536]).collect::<Vec<u8>>());
}

#[test]
fn a_node_that_cannot_compress_says_so() {
    let place = TempDir::in_memory();
    let path = place.file("raw", 1 << 20);
    let (_graph, node) = opened(&format!("raw,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    assert!(!channel.limits().can_compress);
    context.run_until(async move {
        assert_eq!(write(&channel, 0, &[1; 65536]).await, Err(BlockError::NotSupported));
    });
}

/// A guest reads cluster by cluster in small pieces: each is decompressed once, not once a piece. What is kept must not
/// outlive what it is a copy of.
#[test]
fn what_was_decompressed_is_kept_until_it_changes() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 1 << 20, cluster_size: 4096, ..Default::default() });
    let (_graph, node) = opened(&format!("qcow2,discard=unmap,file.driver=file,file.filename={path}"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        // The same place in the file, again and again.
        for round in 1..40u8 {
            assert_eq!(write(&channel, 0, &[round; 4096]).await, Ok(()));
            assert_eq!(write(&channel, 4096, &[round ^ 0x55; 4096]).await, Ok(()));
            for piece in 0..16 {
                let at = piece * 512;
                let expected = if at < 4096 { round } else { round ^ 0x55 };
                assert_eq!(read(&channel, at, 512).await, [expected; 512], "round {round}");
            }
            assert_eq!(channel.pdiscard(0, 8192).await, Ok(()));
            for _ in 0..3 {
                assert_eq!(channel.flush().await, Ok(()));
            }
        }
    });
}
