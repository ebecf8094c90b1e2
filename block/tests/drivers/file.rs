//! What the driver `file` promises beyond the common contract: locks that QEMU's programs respect, odd ends, holes,
//! descriptors, access.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::Command;
use std::sync::Arc;

use blockport_block::driver::WriteFlags;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockError, Child, OpenResult, Permissions};

use crate::testing::oracle::read;
use crate::testing::{TempDir, channel, context, open, opened, user, writer};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, kept: false };

/// Runs one of QEMU's programs. `Err` holds what it said when it refused; `None`: it is not installed.
fn qemu(program: &str, arguments: &[&str]) -> Option<Result<(), String>> {
    match Command::new(program).args(arguments).output() {
        Ok(output) if output.status.success() => Some(Ok(())),
        Ok(output) => Some(Err(String::from_utf8_lossy(&output.stderr).into_owned())),
        Err(error) => {
            let test = std::thread::current().name().unwrap_or("file").to_owned();
            eprintln!("SKIP {test}: {program}: {error}");
            None
        }
    }
}

fn qemu_write(path: &str) -> Option<Result<(), String>> {
    qemu("qemu-io", &["-f", "raw", "-c", "write -P 1 0 512", path])
}

/// Opens a node and reads from it, as long as the edge lives.
fn reader(options: &str) -> OpenResult<Arc<Child>> {
    Child::attach(opened(options).1, "the test", Permissions::device(false), 512)
}

#[test]
fn qemu_does_not_write_to_an_image_that_we_write_to() {
    let place = TempDir::on_disk();
    let path = place.file("disk", 1 << 20);
    let (_graph, node) = opened(&format!("file,filename={path}"));
    let Some(free) = qemu_write(&path) else { return };
    assert_eq!(free, Ok(()), "a node without users locks nothing");

    let child = user(&node, 512);
    let refused = qemu_write(&path).expect("installed").expect_err("we write to it");
    assert!(refused.contains("lock"), "{refused}");
    let info = qemu("qemu-img", &["info", &path]).expect("installed");
    assert_eq!(info, Ok(()), "others may read");

    node.inactivate().expect("nothing is in the way");
    assert_eq!(qemu_write(&path), Some(Ok(())), "an inactive node locks nothing");
    node.activate().expect("nothing is in the way");
    assert!(qemu_write(&path).expect("installed").is_err());

    child.set_permissions(Permissions::device(false)).expect("less is never refused");
    assert!(qemu_write(&path).expect("installed").is_err(), "nor while we only read");
    drop(child);
    assert_eq!(qemu_write(&path), Some(Ok(())));
    let _reader = reader(&format!("file,read-only=on,force-share=on,filename={path}")).expect("nobody else uses it");
    assert_eq!(qemu_write(&path), Some(Ok(())), "unless told to share");
}

#[test]
fn we_do_not_write_to_an_image_that_qemu_writes_to() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::Stdio;
    let place = TempDir::on_disk();
    let path = place.file("disk", 1 << 20);
    if qemu_write(&path).is_none() {
        return;
    }
    let mut qemu_io = Command::new("qemu-io")
        .args(["-f", "raw", &path])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it is installed");
    let mut commands = qemu_io.stdin.take().expect("piped");
    let mut answers = BufReader::new(qemu_io.stdout.take().expect("piped")).lines();
    // Once it has answered, it has the image open.
    writeln!(commands, "length").expect("it is running");
    assert!(answers.any(|line| line.is_ok_and(|line| line.contains("1 MiB"))));

    let (_graph, node) = opened(&format!("file,filename={path}"));
    let refused = Child::attach(node.clone(), "the test", writer(), 512).err().expect("it is in use");
    assert!(refused.0.contains(&path) && refused.0.contains("\"write\""), "{refused}");
    assert!(refused.0.contains("another process"), "{refused}");
    let refused = reader(&format!("file,read-only=on,filename={path}")).err().expect("it would change under us");
    assert!(refused.0.contains("another process"), "{refused}");
    reader(&format!("file,read-only=on,force-share=on,filename={path}")).expect("told to share");
    let (_graph, careless) = opened(&format!("file,locking=off,filename={path}"));
    drop(user(&careless, 512));

    drop(commands);
    assert!(qemu_io.wait().expect("it ends").success());
    drop(user(&node, 512));
}

#[test]
fn a_node_that_was_taken_over_stays_inactive() {
    let place = TempDir::on_disk();
    let path = place.file("disk", 1 << 20);
    let (_graph, first) = opened(&format!("file,filename={path}"));
    let (_other_graph, second) = opened(&format!("file,filename={path}"));
    let _user = user(&first, 512);
    let refused = Child::attach(second.clone(), "the test", writer(), 512).err().expect("it is in use");
    assert!(refused.0.contains("another process"), "{refused}");
    first.inactivate().expect("nothing is in the way");
    let taken = user(&second, 512);
    assert!(first.activate().is_err() && !first.is_active());
    drop(taken);
    first.activate().expect("it is free again");
}

#[test]
fn an_inactive_node_has_no_write_access() {
    let place = TempDir::on_disk();
    let path = place.file("disk", 1 << 20);
    let canonical = std::fs::canonicalize(&path).expect("it exists");
    let writable = || {
        let links = std::fs::read_dir("/proc/self/fd").expect("proc is mounted").flatten();
        let mut ours = links.filter(|link| std::fs::read_link(link.path()).is_ok_and(|target| target == canonical));
        // The permissions of the link are those of the descriptor.
        ours.any(|link| link.path().symlink_metadata().is_ok_and(|meta| meta.mode() & 0o200 != 0))
    };
    let (_graph, node) = opened(&format!("file,filename={path}"));
    let _user = user(&node, 512);
    assert!(writable());
    node.inactivate().expect("nothing is in the way");
    assert!(!writable());
    node.activate().expect("nothing is in the way");
    assert!(writable());
}

#[test]
fn the_end_of_a_file_of_700_bytes() {
    let content: Vec<u8> = (0..700).map(|i| i as u8 | 1).collect();
    for (place, direct) in [(TempDir::on_disk(), "off"), (TempDir::on_disk(), "on"), (TempDir::in_memory(), "off")] {
        let path = place.path("odd");
        std::fs::write(&path, &content).expect("the directory is writable");
        let node = match open(&format!("file,cache.direct={direct},filename={path}")) {
            Err(error) if error.0.contains("does not do direct I/O") => continue,
            opened => opened.expect("it opens").1,
        };
        assert_eq!(node.length(), 1024);
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        let expected = [content.clone(), vec![0; 324]].concat();
        context.run_until(async move {
            assert_eq!(read(&channel, 0, 1024).await, expected);
            assert_eq!(read(&channel, 600, 424).await, expected[600..]);
            let status = channel.block_status(0, 1024).await.expect("it is inside");
            assert!(!status.zero);
            // Writing there makes the file longer, and nothing else.
            let mut buffer = AlignedBuffer::new(300, 1);
            buffer.fill_from(&[9; 300]);
            assert_eq!(channel.pwritev(712, &[buffer.iov()], PLAIN).await, Ok(()));
            assert_eq!(read(&channel, 0, 1024).await, [&expected[..712], &[9; 300], &[0; 12]].concat());
        });
    }
}

#[test]
fn a_growing_child_makes_the_file_longer() {
    for place in [TempDir::on_disk(), TempDir::in_memory()] {
        let path = place.file("disk", 4096);
        let (_graph, node) = opened(&format!("file,discard=unmap,filename={path}"));
        let child = Child::attach_growing(node.clone(), "a format", writer(), 1).expect("nobody else uses it");
        let context = context();
        let channel = channel(&child, &context);
        let length = || std::fs::metadata(&path).expect("it exists").len();
        let mut buffer = AlignedBuffer::new(100, 1);
        buffer.fill_from(&[3; 100]);
        let (growing, buffer) = (channel.clone(), buffer);
        context.run_until(async move {
            assert_eq!(growing.pwritev(5000, &[buffer.iov()], PLAIN).await, Ok(()));
        });
        assert_eq!((length(), node.driver().length()), (5100, 5100));
        for (end, may_unmap) in [(20_000, false), (50_000, true)] {
            let growing = channel.clone();
            let flags = WriteFlags { may_unmap, ..PLAIN };
            context.run_until(async move {
                assert_eq!(growing.pwrite_zeroes(5050, end - 5050, flags).await, Ok(()));
            });
            assert_eq!((length(), node.driver().length()), (end, end));
        }
        let content = std::fs::read(&path).expect("it exists");
        assert_eq!(content, [vec![0; 5000], vec![3; 50], vec![0; 44_950]].concat());
    }
}

#[test]
fn discard_gives_space_back_and_zeroes_keep_it_unless_they_may_not() {
    for place in [TempDir::on_disk(), TempDir::in_memory()] {
        let path = place.path("disk");
        std::fs::write(&path, vec![1; 1 << 20]).expect("the directory is writable");
        let (_graph, node) = opened(&format!("file,discard=unmap,filename={path}"));
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        let space = || std::fs::metadata(&path).expect("it exists").blocks() * 512;
        let full = space();
        assert!(full >= 1 << 20);
        let zeroing = channel.clone();
        context.run_until(async move {
            assert_eq!(zeroing.pwrite_zeroes(0, 256 << 10, PLAIN).await, Ok(()));
        });
        assert!(space() >= full, "zeroes that may not give space back");
        let zeroing = channel.clone();
        context.run_until(async move {
            let flags = WriteFlags { may_unmap: true, ..PLAIN };
            assert_eq!(zeroing.pwrite_zeroes(256 << 10, 256 << 10, flags).await, Ok(()));
        });
        assert!(space() <= full - (256 << 10), "zeroes that may");
        let discarding = channel.clone();
        context.run_until(async move {
            assert_eq!(discarding.pdiscard(512 << 10, 256 << 10).await, Ok(()));
        });
        assert!(space() <= full - (512 << 10), "a discard");
        let asked = channel.clone();
        context.run_until(async move {
            let hole = asked.block_status(256 << 10, 768 << 10).await.expect("it is inside");
            assert!(hole.zero && hole.bytes == 512 << 10, "{hole:?}");
            let data = asked.block_status(768 << 10, 1 << 20).await.expect("it is inside");
            assert!(!data.zero && data.bytes == 256 << 10, "{data:?}");
            assert!(read(&asked, 0, 768 << 10).await.iter().all(|byte| *byte == 0));
            assert!(read(&asked, 768 << 10, 256 << 10).await.iter().all(|byte| *byte == 1));
        });
        assert_eq!(std::fs::metadata(&path).expect("it exists").len(), 1 << 20);
    }
}

#[test]
fn a_file_comes_by_descriptor_too() {
    let place = TempDir::on_disk();
    let path = place.file("disk", 1 << 20);
    let open_with = |write: bool, flags: i32| {
        let file = File::options().read(true).write(write).custom_flags(flags).open(&path);
        OwnedFd::from(file.expect("it was just made"))
    };
    let write_and_read = |options: &str| {
        let (_graph, node) = opened(options);
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            let mut buffer = AlignedBuffer::new(4096, 4096);
            buffer.fill_from(&[4; 4096]);
            assert_eq!(channel.pwritev(0, &[buffer.iov()], PLAIN).await, Ok(()));
            assert_eq!(read(&channel, 0, 8192).await, [vec![4; 4096], vec![0; 4096]].concat());
        });
        node.inactivate().expect("nothing is in the way");
        node.activate().expect("nothing is in the way");
    };
    for flags in [0, libc::O_NONBLOCK, libc::O_DIRECT] {
        let fd = open_with(true, flags);
        write_and_read(&format!("file,fd={}", fd.as_raw_fd()));
        write_and_read(&format!("file,cache.direct=on,fd={}", fd.as_raw_fd()));
    }
    let reading = open_with(false, 0);
    let number = reading.as_raw_fd();
    let refused = open(&format!("file,fd={number}")).err().expect("it cannot be written");
    assert!(refused.0.contains("read-only=on"), "{refused}");
    opened(&format!("file,read-only=on,fd={number}"));
    let (_graph, node) = opened(&format!("file,auto-read-only=on,fd={number}"));
    assert!(node.is_read_only());
    let (_graph, node) = opened(&format!("raw,auto-read-only=on,file.driver=file,file.fd={number}"));
    assert!(node.is_read_only(), "what stands on it is as well");
    assert!(Child::attach(node, "the test", writer(), 512).is_err());

    let both = open(&format!("file,fd={number},filename={path}")).err().expect("one of them");
    assert!(both.0.contains("exclude each other"), "{both}");
    drop(reading);
    for options in ["file,fd=999999", "file"] {
        assert!(open(options).is_err(), "{options}");
    }
}

#[test]
fn what_cannot_be_opened_is_named_with_the_reason() {
    let place = TempDir::on_disk();
    let path = place.file("disk", 4096);
    let missing = place.path("missing");
    let directory = place.path("");
    for (options, words) in [
        (format!("file,filename={missing}"), vec![missing.as_str(), "No such file"]),
        (format!("file,filename={directory}"), vec!["directory"]),
        ("file,filename=/dev/null".to_owned(), vec!["/dev/null", "neither a file nor a block device"]),
        ("file,read-only=on,cache.direct=on,filename=/proc/version".to_owned(), vec!["direct I/O", "cache.direct"]),
        (format!("file,filename={path},drop-cache=on"), vec!["drop-cache", "not supported yet"]),
        (format!("file,filename={path},aio=fast"), vec!["aio", "io_uring"]),
        ("file,filename=/dev/fdset/1".to_owned(), vec!["/dev/fdset/1", "not supported yet"]),
        (format!("raw,offset=100,file.driver=file,file.filename={path}"), vec!["offset", "512"]),
        (format!("raw,offset=8192,file.driver=file,file.filename={path}"), vec!["8192", "4096"]),
        (format!("raw,offset=512,size=4096,file.driver=file,file.filename={path}"), vec!["size 4096", "offset 512"]),
    ] {
        let error = open(&options).err().unwrap_or_else(|| panic!("{options} opens"));
        for word in words {
            assert!(error.0.contains(word), "{options}: {error}");
        }
    }
}

#[test]
fn a_window_keeps_what_lies_around_it() {
    let place = TempDir::on_disk();
    let path = place.path("disk");
    std::fs::write(&path, vec![0xaa; 64 << 10]).expect("the directory is writable");
    let (_graph, node) = opened(&format!(
        "raw,offset=1536,size=9728,discard=unmap,file.driver=blkdebug,file.align=4096,file.image.driver=file,\
         file.image.filename={path}"
    ));
    assert_eq!(node.length(), 9728);
    let child = user(&node, 1);
    let context = context();
    let channel = channel(&child, &context);
    context.run_until(async move {
        let mut buffer = AlignedBuffer::new(9728, 1);
        buffer.fill_from(&[5; 9728]);
        assert_eq!(channel.pwritev(0, &[buffer.iov()], PLAIN).await, Ok(()));
        assert_eq!(channel.pwritev(1, &[buffer.iov()], PLAIN).await, Err(BlockError::OutOfRange));
        assert_eq!(channel.pwrite_zeroes(9000, 728, WriteFlags { may_unmap: true, ..PLAIN }).await, Ok(()));
        assert_eq!(channel.pdiscard(0, 9728).await, Ok(()));
        assert_eq!(channel.pwritev(0, &[buffer.iov().part(0, 700)], PLAIN).await, Ok(()));
    });
    let content = std::fs::read(&path).expect("it exists");
    assert!(content[..1536].iter().all(|byte| *byte == 0xaa), "before the window");
    assert!(content[1536 + 9728..].iter().all(|byte| *byte == 0xaa), "behind the window");
    assert_eq!(content[1536..1536 + 700], [5; 700]);

    // The driver itself lets nothing out, even where no edge looks first.
    let bare = node.driver().attach(&context).expect("the node is active");
    context.run_until(async move {
        let buffer = AlignedBuffer::new(1024, 512);
        assert_eq!(bare.pwritev(9216, &[buffer.iov()], PLAIN).await, Err(BlockError::OutOfRange));
        assert_eq!(bare.preadv(u64::MAX - 511, &[buffer.iov()]).await, Err(BlockError::OutOfRange));
        assert_eq!(bare.pdiscard(9728, 512).await, Err(BlockError::OutOfRange));
        assert_eq!(bare.pwrite_zeroes(9216, 1024, PLAIN).await, Err(BlockError::OutOfRange));
    });
}
