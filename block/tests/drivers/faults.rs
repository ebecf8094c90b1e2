//! The filter `blkdebug`: faults come where rules say and nowhere else. And what it makes easy to test of the edge:
//! padded writes.

use std::time::{Duration, Instant};

use blockport_block::driver::WriteFlags;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockBackend, BlockError};

use crate::testing::oracle::read;
use crate::testing::{channel, context, join_all, open, opened, user, writer};

const IMAGE: &str = "image.driver=memory,image.size=1M";
const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, kept: false };

fn filled(byte: u8, len: usize) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(len, 4096);
    buffer.fill_from(&vec![byte; len]);
    buffer
}

#[test]
fn each_kind_of_request_fails_by_its_rule_and_no_other_does() {
    let rules = [
        ("read_aio", [true, false, false, false, false, false]),
        ("write_aio", [false, true, false, false, false, false]),
        ("pwritev_zero", [false, false, true, false, false, false]),
        ("pdiscard", [false, false, false, true, false, false]),
        ("flush_to_disk", [false, false, false, false, true, false]),
        ("block_status", [false, false, false, false, false, true]),
        ("none", [true, true, true, true, true, false]),
    ];
    for (event, expected) in rules {
        for immediately in ["off", "on"] {
            let (_graph, node) = opened(&format!(
                "blkdebug,{IMAGE},discard=unmap,inject-error.0.event={event},inject-error.0.errno=28,\
                 inject-error.0.immediately={immediately}"
            ));
            let child = user(&node, 512);
            let context = context();
            let channel = channel(&child, &context);
            let got = context.run_until(async move {
                let buffer = filled(1, 4096);
                let iov = [buffer.iov()];
                [
                    channel.preadv(0, &iov).await,
                    channel.pwritev(0, &iov, PLAIN).await,
                    channel.pwrite_zeroes(0, 4096, PLAIN).await,
                    channel.pdiscard(0, 4096).await,
                    channel.flush().await,
                    channel.block_status(0, 4096).await.map(|_| ()),
                ]
            });
            let expected = expected.map(|fails| if fails { Err(BlockError::NoSpace) } else { Ok(()) });
            assert_eq!(got, expected, "{event}, immediately={immediately}");
        }
    }
}

#[test]
fn a_fault_hits_one_request_of_a_batch_and_leaves_the_others_alone() {
    let (_graph, node) = opened(&format!("blkdebug,{IMAGE},inject-error.0.event=write_aio,inject-error.0.sector=24"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let buffer = filled(6, 4096);
        let writes = (0..8).map(|i| channel.pwritev(i * 4096, &[buffer.iov()], PLAIN)).collect();
        for (i, result) in join_all(writes).await.into_iter().enumerate() {
            let expected = if i == 3 { Err(BlockError::Host(libc::EIO)) } else { Ok(()) };
            assert_eq!(result, expected, "write {i}");
        }
        for i in 0..8 {
            assert_eq!(read(&channel, i * 4096, 4096).await, vec![if i == 3 { 0 } else { 6 }; 4096]);
        }
    });
}

#[test]
fn a_short_transfer_does_a_part_and_fails() {
    let (_graph, node) = opened(&format!(
        "blkdebug,{IMAGE},short.0.iotype=write,short.0.bytes=1536,short.0.once=on,short.1.iotype=read,\
         short.1.bytes=512,short.1.errno=28,short.1.sector=100"
    ));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let buffer = filled(7, 4096);
        assert_eq!(channel.pwritev(0, &[buffer.iov()], PLAIN).await, Err(BlockError::Host(libc::EIO)));
        assert_eq!(read(&channel, 0, 4096).await, [vec![7; 1536], vec![0; 2560]].concat());
        assert_eq!(channel.pwritev(48 << 10, &[buffer.iov()], PLAIN).await, Ok(()), "once");
        let into = filled(1, 4096);
        assert_eq!(channel.preadv(48 << 10, &[into.iov()]).await, Err(BlockError::NoSpace));
        assert_eq!(into.to_vec(), [vec![7; 512], vec![1; 3584]].concat());
    });
}

#[test]
fn a_delayed_request_is_overtaken() {
    let (_graph, node) = opened(&format!("blkdebug,{IMAGE},delay.0.iotype=write,delay.0.ns=20000000,delay.0.sector=0"));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let start = Instant::now();
        let buffer = filled(8, 4096);
        let slow = channel.pwritev(0, &[buffer.iov()], PLAIN);
        assert_eq!(channel.pwritev(4096, &[buffer.iov()], PLAIN).await, Ok(()));
        assert_eq!(read(&channel, 0, 8192).await, [vec![0; 4096], vec![8; 4096]].concat());
        assert_eq!(slow.await, Ok(()));
        assert!(start.elapsed() >= Duration::from_millis(20));
        assert_eq!(read(&channel, 0, 4096).await, vec![8; 4096]);
    });
}

#[test]
fn demands_are_checked_where_no_edge_sees_to_them() {
    let (_graph, node) = opened(&format!("blkdebug,{IMAGE},align=4096,max-transfer=8K"));
    let context = context();
    let bare = node.driver().attach(&context).expect("the node is active");
    context.run_until(async move {
        let buffer = AlignedBuffer::new(12288, 4096);
        let part = |len| [buffer.iov().part(0, len)];
        assert_eq!(bare.preadv(4096, &part(8192)).await, Ok(()));
        for (offset, len) in [(512, 4096), (0, 512), (0, 12288)] {
            assert!(matches!(bare.preadv(offset, &part(len)).await, Err(BlockError::Invalid(_))));
            assert!(matches!(bare.pwritev(offset, &part(len), PLAIN).await, Err(BlockError::Invalid(_))));
        }
    });
    for wrong in ["align=3", "align=2M", "align=4096,max-transfer=512", "max-discard=8G"] {
        assert!(open(&format!("blkdebug,{IMAGE},{wrong}")).is_err(), "{wrong}");
    }
}

/// Writes of two iothreads to one 4 KiB block, each again and again to its own range; `mine` is what of it nobody else
/// writes, and must be there at once and stay.
fn race(delay: &str, rounds: u64, ranges: [(u64, usize, std::ops::Range<usize>); 2]) {
    let (_graph, node) = opened(&format!("blkdebug,{delay}{IMAGE},align=4096"));
    let backend = BlockBackend::with_root("b", node, writer()).expect("nobody else uses the node");
    let threads: Vec<_> = (0u64..)
        .zip(ranges)
        .map(|(number, (offset, len, mine))| {
            let backend = backend.clone();
            std::thread::spawn(move || {
                let context = context();
                let channel = backend.channel(&context).expect("the node is active");
                context.run_until(async move {
                    let mut ours = AlignedBuffer::new(len, 4096);
                    let got = AlignedBuffer::new(len, 4096);
                    for round in 0..rounds {
                        // Whole blocks are zeroed at times, which is another way through the edge.
                        let zero = len == 4096 && round % 2 == 1;
                        let value = if zero { 0 } else { round * 2 + number };
                        let data = value.to_le_bytes().repeat(len / 8);
                        ours.fill_from(&data);
                        let written = match zero {
                            true => channel.pwrite_zeroes(offset, len as u64, false).await,
                            false => channel.pwritev(offset, &[ours.iov()]).await,
                        };
                        assert_eq!(written, Ok(()));
                        assert_eq!(channel.preadv(offset, &[got.iov()]).await, Ok(()));
                        assert!(got.to_vec()[mine.clone()] == data[mine.clone()], "round {round} of {number} is lost");
                    }
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
}

/// With this delay a thread stands between reading a block and writing it back most of the time.
const SLOW: &str = "delay.0.iotype=write,delay.0.ns=10000,";

#[test]
fn two_iothreads_write_halves_of_one_block_and_lose_nothing() {
    for (delay, rounds) in [(SLOW, 300), ("", 20_000)] {
        race(delay, rounds, [(0, 2048, 0..2048), (2048, 2048, 0..2048)]);
    }
}

#[test]
fn a_padded_write_does_not_undo_a_whole_one() {
    for (delay, rounds) in [(SLOW, 300), ("", 20_000)] {
        race(delay, rounds, [(0, 2048, 0..0), (0, 4096, 2048..4096)]);
    }
}
