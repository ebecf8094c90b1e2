//! What every format must do that is only read. Its fixtures say what they hold.

use std::rc::Rc;

use blockport_block::iovec::{AlignedBuffer, fill};
use blockport_block::{BlockBackend, BlockError, ChildChannel, Permissions};

use crate::testing::fixtures::{self, Fixture};
use crate::testing::oracle::read;
use crate::testing::random::Random;
use crate::testing::{channel, context, join_all, open, opened};

/// No multiple of any unit, and longer than a table of the formats with two levels.
const SIZE: u64 = 300 * 512;

fn for_each(size: u64, check: impl Fn(&Fixture, &[u8])) {
    for fixture in fixtures::all(size) {
        if let Some(content) = &fixture.holds {
            eprintln!("on \"{}\"", fixture.name);
            check(&fixture, content);
        }
    }
}

/// A reader in the place of a device.
fn reader(options: &str) -> (blockport_block::Graph, std::sync::Arc<blockport_block::Child>) {
    let (graph, node) = opened(options);
    let child = blockport_block::Child::attach(node, "the test", Permissions::device(false), 1);
    (graph, child.expect("nobody else uses the node"))
}

#[test]
fn all_that_is_in_it_is_read_in_pieces_of_any_size_at_once() {
    for_each(SIZE, |fixture, content| {
        let (_graph, child) = reader(&fixture.options);
        let (context, content) = (context(), content.to_vec());
        let channel = channel(&child, &context);
        context.run_until(async move {
            assert_eq!(channel.length(), content.len() as u64);
            assert!(read(&channel, 0, channel.length()).await == content);
            let mut random = Random::new(7);
            for _ in 0..40 {
                let mut wanted = Vec::new();
                for _ in 0..8 {
                    let offset = random.below(channel.length());
                    let bytes = (1 + random.below(50_000)).min(channel.length() - offset);
                    wanted.push((offset as usize, AlignedBuffer::new(bytes as usize, 512)));
                }
                wanted.iter().for_each(|(_, buffer)| fill(&[buffer.iov()], 0xdd));
                let reads = wanted.iter().map(|(offset, buffer)| channel.preadv(*offset as u64, &[buffer.iov()]));
                assert!(join_all(reads.collect()).await.iter().all(Result::is_ok));
                for (offset, buffer) in &wanted {
                    assert!(buffer.to_vec() == content[*offset..offset + buffer.len()], "at {offset}");
                }
            }
        });
    });
}

#[test]
fn what_is_said_to_be_zero_is_zero_and_holes_are_found() {
    for_each(SIZE, |fixture, content| {
        let (_graph, child) = reader(&fixture.options);
        let (context, content, has_holes) = (context(), content.to_vec(), !fixture.options.contains("FLAT"));
        let channel = channel(&child, &context);
        let zeroes = context.run_until(async move {
            let (mut at, mut zeroes) = (0, 0);
            while at < channel.length() {
                let status = channel.block_status(at, channel.length() - at).await.expect("it is inside");
                assert!(status.bytes > 0 && at + status.bytes <= channel.length());
                let part = &content[at as usize..(at + status.bytes) as usize];
                assert!(status.allocated || status.zero);
                assert!(!status.zero || part.iter().all(|byte| *byte == 0), "at {at}");
                zeroes += if status.zero { status.bytes } else { 0 };
                at += status.bytes;
            }
            zeroes
        });
        let grows = has_holes && !["vpc, fixed", "vmdk, flat extents", "vhdx", "vpc, dynamic"].contains(&fixture.name);
        assert!(!grows || zeroes >= 8192, "{zeroes} bytes of zeroes were found");
    });
}

#[test]
fn nothing_is_written_and_nothing_outside_is_read() {
    for_each(SIZE, |fixture, content| {
        let (_graph, node) = opened(&fixture.options);
        assert!(node.is_read_only());
        let refused = BlockBackend::with_root("writer", node.clone(), Permissions::device(true)).err();
        assert!(refused.expect("nobody may write").0.contains("read-only"));
        let reader = Permissions::device(false);
        let backend = BlockBackend::with_root("reader", node.clone(), reader).expect("reading is allowed");
        assert!(backend.resize(content.len() as u64 + 512).is_err());
        let (context, end) = (context(), content.len() as u64);
        let channel = backend.channel(&context).expect("the node is active");
        context.run_until(async move {
            let buffer = AlignedBuffer::new(512, 4096);
            let iov = [buffer.iov()];
            assert_eq!(channel.pwritev(0, &iov).await, Err(BlockError::ReadOnly));
            assert_eq!(channel.pdiscard(0, 512).await, Err(BlockError::ReadOnly));
            assert_eq!(channel.pwrite_zeroes(0, 512, true).await, Err(BlockError::ReadOnly));
            assert_eq!(channel.flush().await, Ok(()));
            for offset in [end, end - 511, u64::MAX] {
                assert_eq!(channel.preadv(offset, &iov).await, Err(BlockError::OutOfRange));
            }
            assert_eq!(channel.preadv(end - 512, &iov).await, Ok(()));
        });
        let error = open(&format!("{},x-nonsense=1", fixture.options)).err().expect("it must be refused");
        assert!(error.0.contains("x-nonsense"), "{error}");
    });
}

#[test]
fn it_serves_nobody_while_it_is_inactive_and_two_threads_otherwise() {
    for_each(SIZE, |fixture, content| {
        let (_graph, child) = reader(&fixture.options);
        let node = child.node();
        node.inactivate().expect("nothing is in the way");
        assert!(child.channel(&context()).is_err());
        node.activate().expect("nothing is in the way");
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let context = context();
                    let channel: Rc<ChildChannel> = channel(&child, &context);
                    let all = context.run_until(async move { read(&channel, 0, channel.length()).await });
                    assert!(all == content);
                });
            }
        });
    });
}

#[test]
fn an_overlay_keeps_what_is_written_and_shows_the_rest() {
    use blockport_block::driver::WriteFlags;
    use blockport_block::drivers::qcow2::{CreateOptions, new_image};

    for_each(SIZE, |fixture, content| {
        let place = crate::testing::TempDir::in_memory();
        let (_, base) = fixture.options.rsplit_once('=').expect("its file comes last");
        let create = CreateOptions {
            size: content.len() as u64,
            backing: Some((base.to_owned(), fixture.driver.to_owned())),
            ..CreateOptions::default()
        };
        let path = place.path("top.qcow2");
        std::fs::write(&path, new_image(&create).expect("the options agree")).expect("the directory is writable");
        let (_graph, node) = opened(&format!("qcow2,file.driver=file,file.filename={path}"));
        let child = crate::testing::user(&node, 512);
        let (context, mut expected) = (context(), content.to_vec());
        let channel = channel(&child, &context);
        context.run_until(async move {
            let mut buffer = AlignedBuffer::new(1024, 512);
            buffer.fill_from(&[0xee; 1024]);
            assert_eq!(channel.pwritev(70_000 / 512 * 512, &[buffer.iov()], WriteFlags::default()).await, Ok(()));
            expected[70_000 / 512 * 512..][..1024].fill(0xee);
            assert!(read(&channel, 0, channel.length()).await == expected);
        });
    });
}
