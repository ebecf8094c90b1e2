//! What every driver of the register must do, whatever it stands on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockport_block::aio::Iothread;
use blockport_block::driver::WriteFlags;
use blockport_block::drivers::DRIVERS;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockBackend, BlockError, Permissions, RequestKind};

use crate::testing::fixtures::{self, Fixture};
use crate::testing::oracle::{Oracle, read};
use crate::testing::{channel, context, open, opened, settings, user, writer};

/// No multiple of 4096, so that the last block is a part of one.
const SIZE: u64 = 300 * 512;

/// Runs a check on every fixture that can be written, and says on which it failed.
fn for_each(size: u64, check: impl Fn(&Fixture)) {
    for fixture in fixtures::all(size).iter().filter(|fixture| fixture.holds.is_none()) {
        eprintln!("on \"{}\"", fixture.name);
        check(fixture);
    }
}

#[test]
fn every_driver_of_the_register_has_a_fixture_and_is_documented() {
    let fixtures = fixtures::all(SIZE);
    for row in DRIVERS {
        // Not every machine has devices to try.
        let found = fixtures.iter().any(|fixture| fixture.driver == row.name) || row.name == "host_device";
        assert!(found, "{} has no fixture", row.name);
        assert!(!row.summary.is_empty() && !row.options.is_empty(), "{}", row.name);
    }
}

#[test]
fn an_option_that_nobody_knows_is_an_error_that_names_it() {
    for_each(SIZE, |fixture| {
        let error = open(&format!("{},x-nonsense=1", fixture.options)).err().expect("it must be refused");
        assert!(error.0.contains("x-nonsense"), "{error}");
        opened(&fixture.options);
    });
}

#[test]
fn random_requests_give_what_the_oracle_says() {
    for_each(SIZE, |fixture| {
        for discard in ["ignore", "unmap"] {
            let (_graph, node) = opened(&format!("{},discard={discard}", fixture.options));
            let child = user(&node, 1);
            let (context, keeps) = (context(), fixture.keeps);
            let channel = channel(&child, &context);
            context.run_until(async move {
                let mut oracle = Oracle::new(channel, keeps, 1).await;
                for _ in 0..60 {
                    oracle.batch().await;
                }
                oracle.verify().await;
            });
        }
    });
}

#[test]
fn content_is_there_after_reopening() {
    for_each(SIZE, |fixture| {
        let written = {
            let (_graph, node) = opened(&fixture.options);
            let child = user(&node, 1);
            let (context, keeps) = (context(), fixture.keeps);
            let channel = channel(&child, &context);
            context.run_until(async move {
                let mut oracle = Oracle::new(channel, keeps, 2).await;
                for _ in 0..20 {
                    oracle.batch().await;
                }
                oracle.content().to_vec()
            })
        };
        let (_graph, node) = opened(&fixture.options);
        let child = user(&node, 1);
        let context = context();
        let channel = channel(&child, &context);
        let got = context.run_until(async move { read(&channel, 0, channel.length()).await });
        assert!(!fixture.persists || got == written);
    });
}

#[test]
fn what_lies_outside_is_refused_and_nothing_is_allowed() {
    for_each(SIZE, |fixture| {
        let (_graph, node) = opened(&fixture.options);
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            let end = channel.length();
            let buffer = AlignedBuffer::new(1024, 4096);
            let iov = [buffer.iov()];
            let flags = WriteFlags::default();
            for offset in [end - 512, end, end + 512, u64::MAX - 511, u64::MAX] {
                assert_eq!(channel.preadv(offset, &iov).await, Err(BlockError::OutOfRange));
                assert_eq!(channel.pwritev(offset, &iov, flags).await, Err(BlockError::OutOfRange));
                assert_eq!(channel.pdiscard(offset, 1024).await, Err(BlockError::OutOfRange));
                assert_eq!(channel.pwrite_zeroes(offset, 1024, flags).await, Err(BlockError::OutOfRange));
            }
            assert_eq!(channel.block_status(end, 1).await, Err(BlockError::OutOfRange));
            for offset in [0, end] {
                assert_eq!(channel.preadv(offset, &[]).await, Ok(()));
                assert_eq!(channel.pwritev(offset, &[iov[0].part(0, 0)], flags).await, Ok(()));
                assert_eq!(channel.pdiscard(offset, 0).await, Ok(()));
                assert_eq!(channel.pwrite_zeroes(offset, 0, flags).await, Ok(()));
            }
        });
    });
}

#[test]
fn a_read_only_node_is_read_and_never_written() {
    for_each(SIZE, |fixture| {
        let (_graph, node) = opened(&format!("{},read-only=on", fixture.options));
        assert!(node.is_read_only());
        let refused = BlockBackend::with_root("writer", node.clone(), writer()).err().expect("nobody may write");
        assert!(refused.0.contains("read-only"), "{refused}");
        let reader = Permissions::device(false);
        let backend = BlockBackend::with_root("reader", node, reader).expect("reading is allowed");
        let context = context();
        let channel = backend.channel(&context).expect("the node is active");
        context.run_until(async move {
            let buffer = AlignedBuffer::new(512, 4096);
            let iov = [buffer.iov()];
            assert_eq!(channel.preadv(0, &iov).await, Ok(()));
            assert_eq!(channel.flush().await, Ok(()));
            assert_eq!(channel.pwritev(0, &iov).await, Err(BlockError::ReadOnly));
            assert_eq!(channel.pdiscard(0, 512).await, Err(BlockError::ReadOnly));
            assert_eq!(channel.pwrite_zeroes(0, 512, true).await, Err(BlockError::ReadOnly));
        });
    });
}

#[test]
fn an_odd_size_is_rounded_up_and_the_rest_reads_as_zeroes() {
    for_each(2 * 4096 + 188, |fixture| {
        let (_graph, node) = opened(&fixture.options);
        assert_eq!(node.length() % 512, 0);
        let expected = match fixture.options.as_str() {
            options if options.contains("size=8192") || options.contains("log-sector-size=4096") => 8192,
            // A device has whole sectors only.
            _ if fixture.driver == "host_device" || fixture.name == "blkdebug, demanding" => 8192,
            _ => 8704,
        };
        assert_eq!(node.length(), expected);
        let child = user(&node, 512);
        let context = context();
        let (channel, keeps) = (channel(&child, &context), fixture.keeps);
        context.run_until(async move {
            let end = channel.length();
            assert_eq!(read(&channel, end - 512, 512).await, [0; 512]);
            let mut buffer = AlignedBuffer::new(512, 4096);
            buffer.fill_from(&[5; 512]);
            assert_eq!(channel.pwritev(end - 512, &[buffer.iov()], WriteFlags::default()).await, Ok(()));
            assert_eq!(read(&channel, end - 512, 512).await, if keeps { [5; 512] } else { [0; 512] });
        });
    });
}

#[test]
fn resizing_keeps_what_is_left_and_adds_zeroes() {
    for_each(SIZE, |fixture| {
        let (_graph, node) = opened(&fixture.options);
        let backend = BlockBackend::with_root("b", node.clone(), writer()).expect("nobody else uses the node");
        let iothread = Iothread::start("io", settings()).expect("the engine works here");
        let fill = |size: u64| {
            let backend = backend.clone();
            let filled = iothread.remote().call(move |context, answer| {
                let channel = backend.channel(context).expect("the node is active");
                context.spawn(async move {
                    let mut buffer = AlignedBuffer::new(size as usize, 4096);
                    buffer.fill_from(&vec![9; size as usize]);
                    answer.give(channel.pwritev(0, &[buffer.iov()]).await);
                });
            });
            assert_eq!(filled, Some(Ok(())));
        };
        let contents = |size: u64| {
            let backend = backend.clone();
            let got = iothread.remote().call(move |context, answer| {
                let channel = backend.channel(context).expect("the node is active");
                context.spawn(async move {
                    let mut buffer = AlignedBuffer::new(size as usize, 4096);
                    buffer.fill_from(&vec![0xdd; size as usize]);
                    let result = channel.preadv(0, &[buffer.iov()]).await;
                    answer.give(result.map(|()| buffer.to_vec()));
                });
            });
            got.expect("the iothread answers")
        };
        let old = node.length();
        fill(old);
        if !fixture.resizes {
            assert!(backend.resize(old + 8192).is_err());
            assert_eq!(node.length(), old);
            return;
        }
        let byte = if fixture.keeps { 9 } else { 0 };
        backend.resize(8192).expect("it can shrink");
        assert_eq!(node.length(), 8192);
        assert_eq!(contents(8704), Err(BlockError::OutOfRange));
        backend.resize(16384).expect("it can grow");
        assert_eq!(contents(16384), Ok([vec![byte; 8192], vec![0; 8192]].concat()));
        fill(16384);
        assert_eq!(contents(16384), Ok(vec![byte; 16384]));
        assert!(backend.resize(u64::MAX - 511).is_err());
        assert_eq!(contents(16384), Ok(vec![byte; 16384]));
    });
}

#[test]
fn an_inactive_node_serves_nobody_until_it_is_activated_again() {
    for_each(SIZE, |fixture| {
        let (_graph, node) = opened(&fixture.options);
        let child = user(&node, 512);
        let context = context();
        let before = channel(&child, &context);
        let (written, keeps) = context.run_until({
            let keeps = fixture.keeps;
            async move {
                let mut oracle = Oracle::new(before, keeps, 3).await;
                for _ in 0..5 {
                    oracle.batch().await;
                }
                (oracle.content().to_vec(), keeps)
            }
        });
        for _ in 0..2 {
            node.inactivate().expect("nothing is in the way");
            node.inactivate().expect("once more does nothing");
            assert!(!node.is_active() && child.channel(&context).is_err());
            node.activate().expect("nothing is in the way");
            node.activate().expect("once more does nothing");
        }
        let after = channel(&child, &context);
        let expected = written.clone();
        context.run_until(async move {
            assert!(read(&after, 0, after.length()).await == expected);
            let mut oracle = Oracle::new(after, keeps, 4).await;
            for _ in 0..5 {
                oracle.batch().await;
            }
            oracle.verify().await;
        });
    });
}

/// Two threads write every other sector each, so that neighbours share every larger block.
#[test]
fn two_iothreads_at_once_lose_nothing() {
    for_each(SIZE, |fixture| {
        let (_graph, node) = opened(&fixture.options);
        let backend = BlockBackend::with_root("b", node.clone(), writer()).expect("nobody else uses the node");
        let sectors = node.length() / 512;
        let threads: Vec<_> = (0..2u64)
            .map(|mine| {
                let backend = backend.clone();
                std::thread::spawn(move || {
                    let context = context();
                    let channel = backend.channel(&context).expect("the node is active");
                    context.run_until(async move {
                        for round in 0..3u8 {
                            for sector in (mine..sectors).step_by(2) {
                                let mut buffer = AlignedBuffer::new(512, 512);
                                buffer.fill_from(&[(sector as u8).wrapping_mul(7).wrapping_add(round); 512]);
                                assert_eq!(channel.pwritev(sector * 512, &[buffer.iov()]).await, Ok(()));
                            }
                        }
                    });
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert_eq!(backend.statistics().of(RequestKind::Write).operations, 3 * sectors);
        let context = context();
        let channel = backend.channel(&context).expect("the node is active");
        let keeps = fixture.keeps;
        context.run_until(async move {
            let buffer = AlignedBuffer::new(sectors as usize * 512, 4096);
            assert_eq!(channel.preadv(0, &[buffer.iov()]).await, Ok(()));
            for (sector, got) in buffer.to_vec().chunks(512).enumerate() {
                let expected = if keeps { (sector as u8).wrapping_mul(7).wrapping_add(2) } else { 0 };
                assert_eq!(got, [expected; 512], "sector {sector}");
            }
        });
    });
}

#[test]
fn a_drain_waits_for_what_is_in_flight_and_parks_the_rest() {
    for_each(SIZE, |fixture| {
        let (_graph, node) = opened(&fixture.options);
        let backend = BlockBackend::with_root("b", node.clone(), writer()).expect("nobody else uses the node");
        let iothread = Iothread::start("io", settings()).expect("the engine works here");
        let done = Arc::new(AtomicU64::new(0));
        let start = |count: u64| {
            let (backend, done) = (backend.clone(), done.clone());
            let started = iothread.remote().call(move |context, answer| {
                let channel = backend.channel(context).expect("the node is active");
                for i in 0..count {
                    let (channel, done) = (channel.clone(), done.clone());
                    context.spawn(async move {
                        let buffer = AlignedBuffer::new(4096, 4096);
                        let written = channel.pwritev(i * 4096, &[buffer.iov()]).await;
                        assert_eq!(written, Ok(()));
                        done.fetch_add(1, Ordering::SeqCst);
                    });
                }
                // Once the tasks have run, and the requests are on their way.
                context.spawn(async move { answer.give(()) });
            });
            started.expect("the iothread answers");
        };
        start(16);
        backend.drain_begin();
        let in_kernel = iothread.remote().call(|context, answer| answer.give(context.operations_in_flight()));
        assert_eq!((in_kernel, done.load(Ordering::SeqCst)), (Some(0), 16));
        start(16);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(done.load(Ordering::SeqCst), 16, "requests under a drain are parked");
        backend.drain_end();
        let deadline = Instant::now() + Duration::from_secs(10);
        while done.load(Ordering::SeqCst) < 32 {
            assert!(Instant::now() < deadline, "parked requests go on after the drain");
            std::thread::yield_now();
        }
        assert_eq!(backend.flush_blocking(), Ok(()));
    });
}
