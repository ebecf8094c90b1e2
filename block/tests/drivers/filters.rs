//! What the filters do beyond passing requests on: blkverify finds differences, blklogwrites logs what replays to the
//! same disk. The replay reader here is written from the format's description, apart from the driver's code.

use std::process::Command;
use std::rc::Rc;

use blockport_block::driver::WriteFlags;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockError, ChildChannel};

use crate::testing::oracle::{Oracle, read};
use crate::testing::{TempDir, channel, context, join_all, open, opened, user};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, kept: false };
const EIO: BlockError = BlockError::Host(5);

/// Runs with a channel to the node that `options` open.
fn on(options: &str, work: impl AsyncFnOnce(Rc<ChildChannel>) + 'static) {
    let (_graph, node) = opened(options);
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move { work(channel).await });
}

fn filled(bytes: usize, with: u8) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(bytes, 4096);
    buffer.fill_from(&vec![with; bytes]);
    buffer
}

#[test]
fn blkverify_fails_reads_where_the_nodes_differ_and_only_there() {
    let place = TempDir::on_disk();
    let (test, raw) = (place.file("test", 1 << 20), place.file("raw", 1 << 20));
    let mut content = vec![7; 1 << 20];
    std::fs::write(&raw, &content).expect("room");
    content[70_000] = 8;
    std::fs::write(&test, &content).expect("room");
    on(
        &format!("blkverify,test.driver=file,test.filename={test},raw.driver=file,raw.filename={raw}"),
        async |channel| {
            let buffer = AlignedBuffer::new(65536, 4096);
            assert_eq!(channel.preadv(0, &[buffer.iov()]).await, Ok(()));
            assert_eq!(buffer.to_vec(), vec![7; 65536]);
            assert_eq!(channel.preadv(65536, &[buffer.iov()]).await, Err(EIO));
            assert_eq!(channel.preadv(70_000 / 512 * 512, &[buffer.iov().part(0, 512)]).await, Err(EIO));
            assert_eq!(channel.preadv(71_168, &[buffer.iov()]).await, Ok(()));
            // A write makes them the same.
            assert_eq!(channel.pwritev(65536, &[filled(65536, 9).iov()], PLAIN).await, Ok(()));
            assert_eq!(channel.preadv(65536, &[buffer.iov()]).await, Ok(()));
        },
    );
    assert_eq!(std::fs::read(&test).expect("there"), std::fs::read(&raw).expect("there"));
}

#[test]
fn blkverify_tells_an_error_of_both_from_one_of_either() {
    let child = |name: &str, event: &str| {
        format!(
            "{name}.driver=blkdebug,{name}.image.driver=memory,{name}.image.size=64K,{name}.inject-error.0.event={event},{name}.inject-error.0.errno=28"
        )
    };
    for (test, raw, reads, writes) in [
        ("write_aio", "write_aio", Ok(()), Err(BlockError::NoSpace)),
        ("write_aio", "block_status", Ok(()), Err(EIO)),
        ("block_status", "write_aio", Ok(()), Err(EIO)),
        ("read_aio", "read_aio", Err(BlockError::NoSpace), Ok(())),
        ("read_aio", "block_status", Err(EIO), Ok(())),
    ] {
        on(&format!("blkverify,{},{}", child("test", test), child("raw", raw)), async move |channel| {
            let buffer = filled(512, 1);
            assert_eq!(channel.preadv(0, &[buffer.iov()]).await, reads, "{test} {raw}");
            assert_eq!(channel.pwritev(0, &[buffer.iov()], PLAIN).await, writes, "{test} {raw}");
        });
    }
}

#[test]
fn blkverify_takes_no_read_that_meets_a_write_for_a_difference() {
    let slow = "test.driver=blkdebug,test.image.driver=memory,test.image.size=64K,test.delay.0.iotype=write,test.delay.0.ns=300000";
    on(&format!("blkverify,{slow},raw.driver=memory,raw.size=64K"), async |channel| {
        for round in 0..50 {
            let data = filled(8192, round);
            let buffers: Vec<_> = (0..4).map(|_| AlignedBuffer::new(8192, 4096)).collect();
            let mut requests = vec![channel.pwritev(4096, &[data.iov()], PLAIN)];
            requests.extend(buffers.iter().zip([0u64, 4096, 8192, 512]).map(|(b, at)| channel.preadv(at, &[b.iov()])));
            assert_eq!(join_all(requests).await, [Ok(()); 5]);
        }
    });
}

#[test]
fn blkverify_wants_nodes_of_one_size() {
    let error = open("blkverify,test.driver=memory,test.size=1M,raw.driver=memory,raw.size=2M").err().expect("refused");
    assert!(error.0.contains("\"test\" has 1048576 bytes, \"raw\" has 2097152"), "{error}");
}

/// An entry of a log, as a replay tool sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    data: Vec<u8>,
}

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// Reads a log as the description of dm-log-writes has it.
fn read_log(bytes: &[u8]) -> (usize, Vec<Entry>) {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!((number(0), number(8)), (0x6a736677736872, 1), "magic and version");
    let size = u32::from_le_bytes(bytes[24..28].try_into().expect("four bytes")) as usize;
    let mut at = size;
    let entries = (0..number(16)).map(|_| {
        let (sector, sectors, flags) = (number(at), number(at + 8), number(at + 16));
        let data = if flags & DISCARD != 0 { 0 } else { sectors as usize * size };
        let entry = Entry { sector, sectors, flags, data: bytes[at + size..at + size + data].to_vec() };
        at += size + data;
        entry
    });
    (size, entries.collect())
}

/// Carries the entries out, up to the last flush.
fn replay(size: usize, entries: &[Entry], disk: &mut [u8]) {
    let last = entries.iter().rposition(|entry| entry.flags & FLUSH != 0).expect("a flush");
    for entry in &entries[..last] {
        let at = entry.sector as usize * size;
        match entry.flags & DISCARD {
            0 => disk[at..at + entry.data.len()].copy_from_slice(&entry.data),
            // As `memory` and a punched file do it.
            _ => disk[at..at + entry.sectors as usize * size].fill(0),
        }
    }
}

#[test]
fn a_log_replays_to_the_same_disk() {
    for (size, interval) in [(512, 4096), (4096, 1), (512, 5)] {
        let place = TempDir::in_memory();
        let (disk, log) = (place.file("disk", 256 << 10), place.file("log", 0));
        let options = format!(
            "blklogwrites,discard=unmap,log-sector-size={size},log-super-update-interval={interval},\
             file.driver=file,file.filename={disk},log.driver=file,log.filename={log}"
        );
        on(&options, async |channel| {
            let mut oracle = Oracle::new(channel.clone(), true, 7).await;
            for _ in 0..40 {
                oracle.batch().await;
            }
            assert_eq!(channel.flush().await, Ok(()));
        });
        let (found, entries) = read_log(&std::fs::read(&log).expect("the log"));
        assert_eq!(found, size);
        let mut replayed = vec![0; 256 << 10];
        replay(size, &entries, &mut replayed);
        assert!(replayed == std::fs::read(&disk).expect("the disk"), "sectors of {size}");
        let any = |flag| entries.iter().any(|entry| entry.flags & flag != 0);
        assert!(any(FUA) && any(DISCARD) && any(FLUSH), "all kinds of entries");
    }
}

#[test]
fn entries_stand_in_the_order_of_completion_and_a_flush_where_it_began() {
    let place = TempDir::in_memory();
    let log = place.file("log", 0);
    let options = format!(
        "blklogwrites,log.driver=file,log.filename={log},file.driver=blkdebug,file.image.driver=memory,file.image.size=1M,\
         file.delay.0.iotype=flush,file.delay.0.ns=50000000,file.delay.1.iotype=write,file.delay.1.sector=3,file.delay.1.ns=5000000"
    );
    on(&options, async |channel| {
        let (data, write) = (filled(512, 1), |n: u64| (n * 512, PLAIN));
        let start = |(at, flags)| channel.pwritev(at, &[data.iov()], flags);
        // The third one takes longer than the others.
        assert_eq!(join_all(vec![start(write(3)), start(write(1)), start(write(2))]).await, [Ok(()); 3]);
        // One that completes during a flush is not part of what that promises.
        assert_eq!(join_all(vec![channel.flush(), start(write(4))]).await, [Ok(()); 2]);
        assert_eq!(start((5 * 512, WriteFlags { fua: true, ..PLAIN })).await, Ok(()));
        assert_eq!(channel.pwrite_zeroes(6 * 512, 1024, PLAIN).await, Ok(()));
    });
    let (_, entries) = read_log(&std::fs::read(&log).expect("the log"));
    let found: Vec<_> = entries.iter().map(|entry| (entry.sector, entry.flags)).collect();
    assert_eq!(found, [(1, 0), (2, 0), (3, 0), (0, FLUSH), (4, 0), (5, FUA)], "the rest is counted by the next flush");
}

#[test]
fn a_log_is_gone_on_with_and_what_is_none_is_refused() {
    let place = TempDir::in_memory();
    let log = place.file("log", 0);
    let options =
        |more: &str| format!("blklogwrites,file.driver=memory,file.size=1M,log.driver=file,log.filename={log}{more}");
    let write = |more: &str, with: u8| {
        on(&options(more), async move |channel| {
            assert_eq!(channel.pwritev(u64::from(with) * 512, &[filled(1024, with).iov()], PLAIN).await, Ok(()));
            assert_eq!(channel.flush().await, Ok(()));
        });
        let (_, entries) = read_log(&std::fs::read(&log).expect("the log"));
        entries.iter().filter(|entry| entry.flags == 0).map(|entry| entry.sector).collect::<Vec<_>>()
    };
    assert_eq!(write(",log-append=on", 1), [1], "an empty file is an empty log");
    assert_eq!(write(",log-append=on", 2), [1, 2]);
    assert_eq!(write(",log-append=on", 3), [1, 2, 3]);
    let refused = |more: &str| open(&options(more)).err().expect("refused").0;
    assert!(refused(",log-append=on,log-sector-size=1024").contains("log-sector-size"));
    assert!(refused(",log-sector-size=1000").contains("log-sector-size"));
    assert!(refused(",log-super-update-interval=0").contains("log-super-update-interval"));
    assert_eq!(write("", 4), [4], "begun anew");
    let mut bytes = std::fs::read(&log).expect("the log");
    // An entry of 2^63 sectors, and one more.
    bytes[512 + 8..512 + 16].copy_from_slice(&(1u64 << 63).to_le_bytes());
    std::fs::write(&log, &bytes).expect("room");
    assert!(refused(",log-append=on").contains("\"log\""));
    bytes[512 + 8..512 + 16].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&log, &bytes).expect("room");
    assert!(refused(",log-append=on").contains("\"log\""));
    std::fs::write(&log, [1; 4096]).expect("room");
    assert!(refused(",log-append=on").contains("holds no log"));
}

#[test]
fn a_write_that_cannot_be_logged_fails() {
    let place = "file.driver=memory,file.size=64K,log.driver=memory,log.size=4K";
    on(&format!("blklogwrites,{place}"), async |channel| {
        assert_eq!(channel.pwritev(0, &[filled(1024, 1).iov()], PLAIN).await, Ok(()));
        assert!(channel.pwritev(0, &[filled(8192, 1).iov()], PLAIN).await.is_err(), "the log is full");
        assert_eq!(read(&channel, 0, 8192).await, vec![1; 8192], "the disk has it, as after any failed write");
        assert_eq!(channel.pwritev(0, &[filled(512, 2).iov()], PLAIN).await, Ok(()), "there is room for this");
    });
}

/// Runs qemu-io with blklogwrites over a file and a log; `None` where it is not installed.
fn qemu_io(test: &str, options: &str, commands: &[&str]) -> Option<()> {
    let mut qemu = Command::new("qemu-io");
    qemu.args(["--image-opts", options]);
    for command in commands {
        qemu.args(["-c", command]);
    }
    match qemu.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            Some(())
        }
        Err(error) => {
            eprintln!("SKIP {test}: qemu-io: {error}");
            None
        }
    }
}

#[test]
fn qemu_goes_on_with_our_log_and_we_with_its() {
    let place = TempDir::in_memory();
    let (disk, log) = (place.file("disk", 1 << 20), place.file("log", 0));
    let ours =
        format!("blklogwrites,log-append=on,file.driver=file,file.filename={disk},log.driver=file,log.filename={log}");
    let qemus = format!(
        "driver=blklogwrites,log-append=on,file.driver=file,file.filename={disk},log.driver=file,log.filename={log}"
    );
    let write = |with: u8| {
        on(&ours, async move |channel| {
            assert_eq!(channel.pwritev(u64::from(with) * 4096, &[filled(4096, with).iov()], PLAIN).await, Ok(()));
            assert_eq!(channel.flush().await, Ok(()));
        });
    };
    write(1);
    let name = "qemu-goes-on-with-our-log-and-we-with-its";
    let commands = ["write -P 2 8192 4096", "discard 16384 4096", "write -P 3 12288 4096", "flush"];
    let Some(()) = qemu_io(name, &qemus, &commands) else { return };
    write(5);
    let (size, entries) = read_log(&std::fs::read(&log).expect("the log"));
    let sectors: Vec<u64> = entries.iter().filter(|entry| entry.sectors > 0).map(|entry| entry.sector).collect();
    assert_eq!(sectors, [8, 16, 32, 24, 40]);
    let mut replayed = vec![0; 1 << 20];
    replay(size, &entries, &mut replayed);
    assert!(replayed == std::fs::read(&disk).expect("the disk"));
}
