//! What needs to look inside: answers of the kernel that no host gives on demand, and pages that are not written back.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::Graph;
use crate::aio::AioSettings;
use crate::aio::tests::engine;
use crate::backend::BlockBackend;
use crate::iovec::AlignedBuffer;
use crate::options::parse_keyval;
use crate::permissions::Permissions;

const EIO: i32 = libc::EIO;

fn context() -> AioContext {
    AioContext::new(AioSettings { engine: engine(), ..AioSettings::default() }).expect("the engine works here")
}

/// A file on the disk that the test itself was built on.
struct TestFile(PathBuf);

impl TestFile {
    fn new(name: &str, content: &[u8]) -> Self {
        let exe = std::env::current_exe().expect("the test has a path");
        let path = exe.with_file_name(format!("blockport-file-{name}-{}", std::process::id()));
        std::fs::write(&path, content).expect("the build directory is writable");
        Self(path)
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.0).expect("it was just made")
    }

    /// A channel that takes the file for one opened with `direct`; it need not be for what is tested.
    fn channel(&self, context: &AioContext, direct: bool) -> Rc<Inner> {
        let file = File::options().read(true).write(true).open(&self.0).expect("it was just made");
        let probe = Probe::new(&file.into(), direct).expect("it is a file");
        let file = File::options().read(true).write(true).open(&self.0).expect("it was just made");
        let shared = Arc::new(Shared::new(file.into(), &probe, 0));
        FileChannel::new(context, &shared, &probe, Cache { direct, no_flush: false }).0
    }

    fn sync(&self) {
        File::open(&self.0).and_then(|file| file.sync_all()).expect("the disk works");
    }

    fn dirty_pages(&self) -> std::io::Result<u64> {
        sys::dirty_pages(File::open(&self.0)?.as_raw_fd())
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What the channel makes of an answer that the kernel might have given.
struct Answers {
    context: AioContext,
    inner: Rc<Inner>,
}

impl Answers {
    fn after(&self, operation: Operation<'_>, result: i32) -> BlockResult {
        let next = self.inner.clone().complete(&Completion { result, operation });
        self.context.run_until(next)
    }

    fn read(&self, iov: &[IoVec], result: i32) -> BlockResult {
        self.after(Operation::Read { fd: self.inner.fd, offset: 0, iov }, result)
    }

    fn write(&self, iov: &[IoVec], fua: bool, result: i32) -> BlockResult {
        self.after(Operation::Write { fd: self.inner.fd, offset: 0, iov, fua }, result)
    }

    fn fdatasync(&self, result: i32) -> BlockResult {
        self.after(Operation::Fdatasync { fd: self.inner.fd }, result)
    }

    /// A real flush.
    fn flush(&self) -> BlockResult {
        self.context.run_until(FileChannel(self.inner.clone()).flush())
    }
}

fn answers(file: &TestFile, direct: bool) -> Answers {
    let context = context();
    let inner = file.channel(&context, direct);
    Answers { context, inner }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7) as u8 | 1).collect()
}

#[test]
fn a_short_read_goes_on_where_it_stopped_and_the_end_reads_as_zeroes() {
    let file = TestFile::new("short-read", &pattern(700));
    let answers = answers(&file, false);
    let buffer = AlignedBuffer::new(1024, 1);
    let iov = [buffer.iov().part(0, 100), buffer.iov().part(100, 924)];
    iovec::fill(&iov, 0xee);
    // The kernel claims to have read 300 bytes; the rest is asked for again, and ends at the end of the file.
    assert_eq!(answers.read(&iov, 300), Ok(()));
    assert_eq!(buffer.to_vec(), [vec![0xee; 300], pattern(700)[300..].to_vec(), vec![0; 324]].concat());
    iovec::fill(&iov, 0xee);
    assert_eq!(answers.read(&iov, 0), Ok(()), "nothing at all is the end as well");
    assert_eq!(buffer.to_vec(), [0; 1024]);
    assert_eq!(answers.read(&iov, -libc::EINTR), Ok(()), "an interrupted call is made again");
    assert_eq!(buffer.to_vec()[..700], pattern(700));
    assert_eq!(answers.read(&iov, -EIO), Err(BlockError::Host(EIO)));
}

#[test]
fn a_short_direct_read_inside_a_unit_is_the_end() {
    let file = TestFile::new("short-direct", &pattern(700));
    let answers = answers(&file, true);
    let buffer = AlignedBuffer::new(4096, 4096);
    iovec::fill(&[buffer.iov()], 0xee);
    assert_eq!(answers.read(&[buffer.iov()], 700), Ok(()));
    assert_eq!(buffer.to_vec(), [vec![0xee; 700], vec![0; 3396]].concat());
}

#[test]
fn a_short_write_goes_on_where_it_stopped_and_its_error_counts() {
    let file = TestFile::new("short-write", &[0; 1024]);
    let answers = answers(&file, false);
    let mut buffer = AlignedBuffer::new(1024, 1);
    buffer.fill_from(&pattern(1024));
    let iov = [buffer.iov()];
    assert_eq!(answers.write(&iov, false, 400), Ok(()));
    assert_eq!(file.content(), [vec![0; 400], pattern(1024)[400..].to_vec()].concat());
    assert_eq!(answers.write(&iov, false, 0), Ok(()), "it takes something the second time");
    assert_eq!(file.content(), pattern(1024));
    assert_eq!(answers.write(&iov, false, -libc::ENOSPC), Err(BlockError::NoSpace));

    let operation = Operation::Write { fd: answers.inner.fd, offset: 0, iov: &iov, fua: false };
    for (result, expected) in [(0, Err(BlockError::NoSpace)), (10, Ok(())), (-EIO, Err(BlockError::Host(EIO)))] {
        let second = Rc::new(NothingWritten(answers.inner.clone()));
        let next = second.complete(&Completion { result, operation });
        assert_eq!(answers.context.run_until(next), expected, "{result} the second time");
    }
}

#[test]
fn after_a_failed_flush_of_a_buffered_file_no_flush_is_believed() {
    for (direct, sticks) in [(false, true), (true, false)] {
        let file = TestFile::new("flush", &[0; 4096]);
        let answers = answers(&file, direct);
        assert_eq!(answers.flush(), Ok(()));
        assert_eq!(answers.fdatasync(-libc::EINTR), Ok(()));
        assert_eq!(answers.fdatasync(-EIO), Err(BlockError::Host(EIO)));
        let later = if sticks { Err(BlockError::Host(EIO)) } else { Ok(()) };
        assert_eq!(answers.flush(), later);
        assert_eq!(answers.fdatasync(0), later, "one that was under way");
        let zero = answers.inner.clone();
        let flags = WriteFlags { fua: true, ..WriteFlags::default() };
        assert_eq!(answers.context.run_until(async move { zero.zero(0, 4096, flags).await }), later);
        assert_eq!(answers.inner.shared.flushes_can_be_believed(), later, "seen by every channel");
        let buffer = AlignedBuffer::new(4096, 4096);
        assert_eq!(answers.write(&[buffer.iov()], false, 4096), Ok(()), "reads and writes go on");
    }
}

#[test]
fn a_failed_stable_write_of_a_buffered_file_counts_as_a_failed_flush() {
    let file = TestFile::new("fua", &[0; 4096]);
    let answers = answers(&file, false);
    let buffer = AlignedBuffer::new(512, 512);
    let iov = [buffer.iov()];
    assert_eq!(answers.write(&iov, false, -EIO), Err(BlockError::Host(EIO)));
    assert_eq!(answers.write(&iov, true, -libc::ENOSPC), Err(BlockError::NoSpace));
    assert_eq!(answers.flush(), Ok(()));
    assert_eq!(answers.write(&iov, true, -EIO), Err(BlockError::Host(EIO)));
    assert_eq!(answers.flush(), Err(BlockError::Host(EIO)));
}

#[test]
fn what_the_file_system_cannot_do_is_not_asked_again() {
    let file = TestFile::new("unsupported", &pattern(8192));
    let Answers { context, inner } = answers(&file, false);
    let channel = FileChannel(inner.clone());
    inner.shared.no_punch.store(true, Ordering::Relaxed);
    assert_eq!(context.run_until(channel.pdiscard(0, 4096)), Err(BlockError::NotSupported));
    assert_eq!(file.content(), pattern(8192));
    let flags = WriteFlags { may_unmap: true, ..WriteFlags::default() };
    assert_eq!(context.run_until(channel.pwrite_zeroes(0, 4096, flags)), Ok(()), "by the other means");
    inner.shared.no_zero_range.store(true, Ordering::Relaxed);
    assert_eq!(context.run_until(channel.pwrite_zeroes(4096, 4096, flags)), Err(BlockError::NotSupported));
    assert_eq!(file.content(), [vec![0; 4096], pattern(8192)[4096..].to_vec()].concat());
}

/// The host's own count of pages that are not written back tells whether a write was stable when it completed.
#[test]
fn stable_means_that_no_page_is_left_to_be_written_back() {
    for (options, obeys) in [("file", true), ("file,cache.no-flush=on", false)] {
        let file = TestFile::new("stable", &[0; 1 << 16]);
        if let Err(error) = file.dirty_pages() {
            eprintln!("SKIP stable_means_that_no_page_is_left_to_be_written_back: {error}");
            return;
        }
        let graph = Graph::default();
        let mut options = parse_keyval(&format!("{options},node-name=f"), Some("driver")).expect("syntax");
        options.set_str("filename", file.0.to_str().expect("test paths are UTF-8"));
        let node = graph.blockdev_add(options).expect("it opens");
        let backend = BlockBackend::with_root("b", node, Permissions::device(true)).expect("nobody else uses it");
        let context = context();
        let channel = backend.channel(&context).expect("the node is active");
        file.sync();
        let buffer = Rc::new(AlignedBuffer::new(4096, 4096));
        let dirty = || file.dirty_pages().expect("it worked before");
        let write = |at| {
            let (channel, buffer) = (channel.clone(), buffer.clone());
            assert_eq!(context.run_until(async move { channel.pwritev(at, &[buffer.iov()]).await }), Ok(()));
        };
        write(0);
        assert!(dirty() > 0, "a write with the cache on stays in it");
        let flushing = channel.clone();
        assert_eq!(context.run_until(async move { flushing.flush().await }), Ok(()));
        assert_eq!(dirty() == 0, obeys, "a flush");
        // It asks this thread's loop, so it is called on another one.
        let (turned_off, sleeper) = (backend.clone(), context.clone());
        let turned_off = std::thread::spawn(move || turned_off.set_write_cache(false));
        context.run_until(async move {
            while !turned_off.is_finished() {
                sleeper.sleep(Duration::from_millis(1)).await;
            }
        });
        file.sync();
        write(4096);
        assert_eq!(dirty() == 0, obeys, "a write with the cache off");
        let zeroing = channel.clone();
        file.sync();
        assert_eq!(context.run_until(async move { zeroing.pwrite_zeroes(100, 5000, false).await }), Ok(()));
        assert_eq!(dirty() == 0, obeys, "write-zeroes with the cache off");
    }
}

#[test]
fn a_buffered_read_is_ready_at_once_if_and_only_if_the_page_cache_has_all_of_it() {
    let content: Vec<u8> = (0..64u8).flat_map(|n| [n; 4096]).collect();
    let file = TestFile::new("cached", &content);
    let context = context();
    let inner = file.channel(&context, false);
    let channel = FileChannel(inner.clone());
    let buffer = Rc::new(AlignedBuffer::new(8192, 4096));
    if let Err(error) = sys::preadv_cached(inner.fd, &[buffer.iov()], 0)
        && error.raw_os_error() == Some(libc::EOPNOTSUPP)
    {
        eprintln!("SKIP cached-reads: the file system cannot tell");
        return;
    }
    assert_eq!(channel.preadv(4096, &[buffer.iov()]).try_ready().ok(), Some(Ok(())), "it was just written");
    assert_eq!(buffer.to_vec(), content[4096..12288]);
    // The end of the file is in the middle of this one.
    let end = channel.preadv(63 * 4096, &[buffer.iov()]).try_ready().expect_err("not all of it is there");
    assert_eq!(context.run_until(end), Ok(()));
    assert_eq!(buffer.to_vec(), [[63; 4096], [0; 4096]].concat());
    file.sync();
    sys::drop_cache(inner.fd);
    let cold = channel.preadv(20 * 4096, &[buffer.iov()]).try_ready().expect_err("nothing is there");
    assert_eq!(context.run_until(cold), Ok(()));
    assert_eq!(buffer.to_vec(), content[20 * 4096..22 * 4096]);
}
