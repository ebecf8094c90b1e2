//! Tests of the loop, on both engines.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::driver::{BlockFuture, RingOwner};
use crate::error::BlockError;
use crate::iovec::AlignedBuffer;

/// The engine that `BLOCKPORT_TEST_AIO_ENGINE` selects, for tests that need only one.
pub(crate) fn engine() -> AioEngine {
    let name = std::env::var("BLOCKPORT_TEST_AIO_ENGINE").unwrap_or("io_uring".into());
    let known = AioEngine::NAMES.into_iter().find(|(known, _)| *known == name);
    known.unwrap_or_else(|| panic!("BLOCKPORT_TEST_AIO_ENGINE={name}")).1
}

fn context_on(engine: AioEngine) -> AioContext {
    AioContext::new(AioSettings { engine, ..AioSettings::default() }).expect("both engines work here")
}

/// Runs a test on each engine.
fn on_both(test: impl Fn(AioContext)) {
    for engine in [AioEngine::IoUring, AioEngine::Threads] {
        eprintln!("on {engine:?}");
        test(context_on(engine));
    }
}

#[test]
fn tasks_timers_and_messages_run() {
    on_both(tasks_timers_and_messages);
}

fn tasks_timers_and_messages(context: AioContext) {
    let remote = context.remote();
    let (sender, receiver) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        let answer = remote.call(|context, answer| {
            let sleep = context.sleep(Duration::from_millis(5));
            context.spawn(async move {
                sleep.await;
                answer.give(42);
            });
        });
        sender.send(answer).expect("the test waits");
        remote.post(AioContext::stop);
    });
    context.run();
    other.join().expect("no panic");
    assert_eq!(receiver.recv(), Ok(Some(42)));
}

#[test]
fn a_waker_called_on_another_thread_wakes_a_sleeping_loop() {
    on_both(waker_called_on_another_thread);
}

fn waker_called_on_another_thread(context: AioContext) {
    let woken = Rc::new(Cell::new(false));
    let seen = woken.clone();
    context.run_until(std::future::poll_fn(move |cx| {
        if seen.replace(true) {
            return std::task::Poll::Ready(());
        }
        let waker = cx.waker().clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        std::task::Poll::Pending
    }));
    assert!(woken.get());
}

#[test]
fn a_call_to_a_loop_that_has_gone_answers_none() {
    let remote = context_on(AioEngine::Auto).remote();
    assert_eq!(remote.call::<()>(|_, answer| answer.give(())), None);
}

#[test]
fn a_call_to_an_iothread_that_has_ended_answers_none() {
    let iothread = Iothread::start("ended", PollSettings::default()).expect("an engine works here");
    // A task that never ends, and holds on to the context.
    iothread.remote().post(|context| {
        let held = context.clone();
        context.spawn(async move {
            std::future::pending::<()>().await;
            drop(held);
        });
    });
    assert_eq!(iothread.remote().call(|_, answer| answer.give(1)), Some(1));
    let remote = iothread.remote().clone();
    drop(iothread);
    assert_eq!(remote.call(|_, answer| answer.give(2)), None);
}

/// Runs the loop for as long as everything that is on its way needs to arrive.
fn let_arrive(context: &AioContext) {
    context.run_until(context.sleep(Duration::from_millis(20)));
}

type Handler = Rc<dyn Fn()>;

/// An eventfd, and a handler that counts.
fn counted() -> (EventFd, Arc<OwnedFd>, Rc<Cell<u32>>, Handler) {
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let fd = Arc::new(crate::sys::dup(event.as_raw_fd()).expect("a descriptor"));
    let count = Rc::new(Cell::new(0));
    let counter = count.clone();
    (event, fd, count, Rc::new(move || counter.set(counter.get() + 1)))
}

#[test]
fn a_watch_tells_of_each_write_and_reads_nothing() {
    on_both(|context| {
        let (event, fd, count, handler) = counted();
        event.write(1).expect("room in the counter");
        let watch = context.watch(fd, handler);
        let_arrive(&context);
        assert_eq!(count.get(), 1, "what was there before the watch");
        for told in 2..5 {
            event.write(1).expect("room in the counter");
            let_arrive(&context);
            assert_eq!(count.get(), told);
        }
        drop(watch);
        event.write(1).expect("room in the counter");
        let_arrive(&context);
        assert_eq!(count.get(), 4, "after the watch's end");
        assert_eq!(event.read().expect("nobody has read it"), 5);
    });
}

#[test]
fn a_descriptor_may_be_watched_twice() {
    on_both(|context| {
        let (event, fd, count, handler) = counted();
        let first = context.watch(fd.clone(), handler.clone());
        let second = context.watch(fd, handler);
        event.write(1).expect("room in the counter");
        let_arrive(&context);
        assert_eq!(count.get(), 2);
        drop(first);
        event.write(1).expect("room in the counter");
        let_arrive(&context);
        assert_eq!(count.get(), 3);
        drop(second);
    });
}

#[test]
fn a_watch_that_ends_as_it_fires_lets_go_of_the_descriptor() {
    on_both(|context| {
        let (event, fd, count, handler) = counted();
        let watch = context.watch(fd.clone(), handler);
        let_arrive(&context);
        event.write(1).expect("room in the counter");
        drop(watch);
        for _ in 0..3 {
            let_arrive(&context);
            event.write(1).expect("room in the counter");
        }
        assert_eq!(count.get(), 0, "told after its end");
        assert_eq!(Arc::strong_count(&fd), 1, "it is still watched");
    });
}

#[test]
fn a_handler_may_end_its_own_watch_and_others() {
    on_both(|context| {
        let watches: Rc<RefCell<Vec<Watch>>> = Rc::default();
        let count = Rc::new(Cell::new(0));
        let events = [0; 3].map(|_| counted());
        for (_, fd, ..) in &events {
            let (watches_too, counter) = (watches.clone(), count.clone());
            let end_all = move || {
                counter.set(counter.get() + 1);
                watches_too.take();
            };
            let watch = context.watch(fd.clone(), Rc::new(end_all));
            watches.borrow_mut().push(watch);
        }
        for (event, ..) in &events {
            event.write(1).expect("room in the counter");
        }
        let_arrive(&context);
        assert_eq!(count.get(), 1, "the first ends them all");
    });
}

/// Reads until `count` signals have come: a worker thread writes them when it gets to it.
fn read_signals(context: &AioContext, event: &EventFd, count: u64) -> u64 {
    let mut sum = 0;
    while sum < count {
        let_arrive(context);
        sum += event.read().expect("more signals follow");
    }
    sum
}

#[test]
fn signals_add_up_and_one_that_blocks_blocks_nobody() {
    on_both(|context| {
        let full = EventFd::new(0).expect("an eventfd");
        full.write(u64::MAX - 1).expect("it was empty");
        let stuck = Signal::new(Arc::new(crate::sys::dup(full.as_raw_fd()).expect("a descriptor")));
        context.signal(&stuck);
        context.signal(&stuck);
        let (event, fd, ..) = counted();
        let signal = Signal::new(fd);
        for _ in 0..3 {
            context.signal(&signal);
            let_arrive(&context);
        }
        assert_eq!(read_signals(&context, &event, 3), 3);
        assert_eq!(full.read().expect("it is full"), u64::MAX - 1);
        assert_eq!(read_signals(&context, &full, 2), 2);
    });
}

/// Keeps the kernel's answer.
struct Answer(Cell<Option<i32>>);

impl RingOwner for Answer {
    fn complete(self: Rc<Self>, completion: &Completion<'_>) -> BlockFuture {
        self.0.set(Some(completion.result));
        BlockFuture::ready(if completion.result < 0 { Err(BlockError::from_errno(-completion.result)) } else { Ok(()) })
    }
}

/// The kernel's answer to one operation.
fn answer(context: &AioContext, operation: Operation<'_>) -> i32 {
    let owner = Rc::new(Answer(Cell::new(None)));
    let _ = context.run_until(BlockFuture::ring(context.submit(operation, owner.clone())));
    owner.0.get().expect("it has completed")
}

#[test]
fn operations_answer_as_the_system_calls_do() {
    on_both(|context| {
        let path = std::env::temp_dir().join(format!("blockport-aio-{}-{}", std::process::id(), context.engine()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let mut file = file.expect("the temporary directory is writable");
        std::fs::remove_file(&path).expect("it was just made");
        let fd = file.as_raw_fd();
        let mut buffer = AlignedBuffer::new(8192, 4096);
        buffer.fill_from(&[7; 8192]);
        let whole = [buffer.iov()];
        let halves = [buffer.iov().part(0, 4096), buffer.iov().part(4096, 4096)];
        for iov in [&whole[..], &halves[..]] {
            assert_eq!(answer(&context, Operation::Write { fd, offset: 4096, iov, fua: true }), 8192);
            assert_eq!(answer(&context, Operation::Read { fd, offset: 8192, iov }), 4096, "up to the end");
            assert_eq!(answer(&context, Operation::Read { fd, offset: 1 << 40, iov }), 0, "behind the end");
            assert_eq!(answer(&context, Operation::Read { fd: -1, offset: 0, iov }), -libc::EBADF);
        }
        assert_eq!(answer(&context, Operation::Fdatasync { fd }), 0);
        assert_eq!(answer(&context, Operation::Fdatasync { fd: -1 }), -libc::EBADF);
        let (mode, bytes) = (0, 1 << 16);
        assert_eq!(answer(&context, Operation::Fallocate { fd, mode, offset: 0, bytes }), 0);
        assert_eq!(answer(&context, Operation::Fallocate { fd, mode: !0, offset: 0, bytes }), -libc::EOPNOTSUPP);
        let mut content = Vec::new();
        file.read_to_end(&mut content).expect("it can be read");
        assert_eq!(content.len(), 1 << 16);
        assert!(content[..4096].iter().chain(&content[12288..]).all(|byte| *byte == 0));
        assert!(content[4096..12288].iter().all(|byte| *byte == 7));
    });
}

#[test]
fn more_operations_than_threads_all_complete() {
    const COUNT: u64 = 500;
    on_both(|context| {
        let path = std::env::temp_dir().join(format!("blockport-many-{}-{}", std::process::id(), context.engine()));
        std::fs::write(&path, (0..COUNT).flat_map(|n| [n as u8; 512]).collect::<Vec<_>>()).expect("it is writable");
        let file = Rc::new(File::open(&path).expect("it was just made"));
        std::fs::remove_file(&path).expect("it was just made");
        let right = Rc::new(Cell::new(0));
        for n in 0..COUNT {
            let (inner, file, right) = (context.clone(), file.clone(), right.clone());
            context.spawn(async move {
                let buffer = AlignedBuffer::new(512, 512);
                let read = Operation::Read { fd: file.as_raw_fd(), offset: n * 512, iov: &[buffer.iov()] };
                let result = BlockFuture::ring(inner.submit(read, Rc::new(Answer(Cell::new(None))))).await;
                assert_eq!(result, Ok(()));
                assert_eq!(buffer.to_vec(), [n as u8; 512]);
                right.set(right.get() + 1);
                if right.get() == COUNT {
                    inner.stop();
                }
            });
        }
        context.run();
        assert_eq!((right.get(), context.operations_in_flight()), (COUNT, 0));
    });
}

/// Runs on a thread to which a system call answers with an errno.
fn without(call: libc::c_long, errno: i32, run: impl FnOnce() + Send) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
    let arch = TargetArch::try_from(std::env::consts::ARCH).expect("seccomp knows it");
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(BTreeMap::from([(call, vec![])]), SeccompAction::Allow, refuse, arch);
    let filter = BpfProgram::try_from(filter.expect("two actions")).expect("one rule");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            apply_filter(&filter).expect("a thread may always have less");
            run();
        });
    });
}

#[test]
fn without_io_uring_auto_takes_threads_and_io_uring_is_an_error_that_says_why() {
    for (errno, why) in [
        (libc::ENOSYS, "no io_uring"),
        (libc::EPERM, "forbidden"),
        (libc::EINVAL, "too old"),
        (libc::ENOMEM, "locked memory"),
    ] {
        without(libc::SYS_io_uring_setup, errno, || {
            let context = context_on(AioEngine::Auto);
            assert_eq!(context.engine(), "threads");
            context.run_until(context.sleep(Duration::from_micros(100)));
            let settings = AioSettings { engine: AioEngine::IoUring, ..AioSettings::default() };
            let error = AioContext::new(settings).err().expect("there is none").to_string();
            assert!(error.contains(why) && error.contains("aio-engine=threads"), "{error}");
        });
    }
    assert_eq!(context_on(AioEngine::Auto).engine(), "io_uring");
}

#[test]
fn a_lack_of_descriptors_is_no_reason_to_go_without_io_uring() {
    without(libc::SYS_io_uring_setup, libc::EMFILE, || {
        let error = AioContext::new(AioSettings::default()).err().expect("there is no descriptor").to_string();
        assert!(error.contains("ulimit -n"), "{error}");
    });
}
