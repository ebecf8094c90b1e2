//! Kept writes: what completed is in the file, whatever becomes of this process. The file is copied as another process
//! would find it.

use std::rc::Rc;

use blockport_block::driver::WriteFlags;
use blockport_block::drivers::qcow2::CreateOptions;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockResult, ChildChannel};

use crate::images::{check_at_most_leaks, create};
use crate::testing::oracle::read;
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, join_all, opened, user};

const KEPT: WriteFlags = WriteFlags { fua: false, may_unmap: true, no_fallback: false, compressed: false, kept: true };
const BLOCK: u64 = 4096;

/// Zeroes where there is no data.
async fn write(channel: Rc<ChildChannel>, offset: u64, bytes: u64, data: Option<Vec<u8>>) -> BlockResult {
    let Some(data) = data else { return channel.pwrite_zeroes(offset, bytes, KEPT).await };
    let mut buffer = AlignedBuffer::new(data.len(), 4096);
    buffer.fill_from(&data);
    channel.pwritev(offset, &[buffer.iov()], WriteFlags { may_unmap: false, ..KEPT }).await
}

fn run(seed: u64, options: &CreateOptions, more: &str) {
    let place = TempDir::in_memory();
    let (path, copy) = (place.path("disk"), place.path("copy"));
    create(&path, options);
    let (_graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}{more}"));
    let (child, context) = (user(&node, 512), context());
    let mut content = vec![0; options.size as usize];
    let mut random = Random::new(seed);
    for round in 0..12 {
        let (mut at, mut writes) = (random.below(8), Vec::new());
        let channel = channel(&child, &context);
        while at < options.size / BLOCK {
            let blocks = (1 + random.below(24)).min(options.size / BLOCK - at);
            let range = (at * BLOCK) as usize..((at + blocks) * BLOCK) as usize;
            let data = (!random.one_in(4)).then(|| random.bytes(range.len()));
            match &data {
                Some(data) => content[range.clone()].copy_from_slice(data),
                None => content[range.clone()].fill(0),
            }
            writes.push(Box::pin(write(channel.clone(), range.start as u64, range.len() as u64, data)));
            at += blocks + random.below(40);
        }
        assert!(context.run_until(async move { join_all(writes).await }).iter().all(|result| *result == Ok(())));
        std::fs::copy(&path, &copy).expect("room");
        let (_graph, found) = opened(&format!("qcow2,file.driver=file,file.filename={copy}"));
        let (user, length) = (user(&found, 512), options.size);
        let left = crate::testing::channel(&user, &context);
        let left = context.run_until(async move { read(&left, 0, length).await });
        let differs = left.iter().zip(&content).position(|(left, right)| left != right);
        assert_eq!(differs, None, "seed {seed}, round {round}: something that completed is lost");
        drop((user, found, _graph));
        check_at_most_leaks(&copy);
    }
}

fn options() -> CreateOptions {
    CreateOptions { size: 8 << 20, ..CreateOptions::default() }
}

#[test]
fn what_completed_outlives_the_process() {
    for seed in 0..3 {
        run(seed, &options(), "");
    }
}

#[test]
fn what_completed_outlives_the_process_with_small_clusters_and_caches() {
    run(10, &CreateOptions { cluster_size: 4096, ..options() }, ",cache-size=32768");
}

#[test]
fn what_completed_outlives_the_process_with_subclusters() {
    run(20, &CreateOptions { extended_l2: true, ..options() }, "");
}

#[test]
fn what_completed_outlives_the_process_with_lazy_refcounts() {
    run(30, &options(), ",lazy-refcounts=on");
}
