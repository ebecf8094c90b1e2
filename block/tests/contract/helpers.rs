//! What the tests of the contract share: iothreads under load, a device with a tray and a lock that writes down what it
//! is told, and a collector of events.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blockport_block::aio::{Iothread, PollSettings};
use blockport_block::driver::BoxFuture;
use blockport_block::event::{self, BlockEvent};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::{Options, parse_keyval};
use blockport_block::{BackendChannel, BlockBackend, BlockDevOps, BlockResult, Graph, Node, OpenError, OpenResult};

/// How long something may take that takes no time when it works.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The options as key=value; the first is the driver.
pub fn options(text: &str) -> Options {
    parse_keyval(text, Some("driver")).expect("syntax")
}

/// A node of the graph.
pub fn add(graph: &Graph, text: &str) -> Arc<Node> {
    graph.blockdev_add(options(text)).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// An iothread that does not spin.
pub fn iothread() -> Iothread {
    let settings = PollSettings { poll_max_ns: 0, ..PollSettings::default() };
    Iothread::start("io", settings).expect("io_uring works here")
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < end, "not within {} s: {what}", DEADLINE.as_secs());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Has all events go there, and none of other tests', which wait for their turn.
pub fn set_sink(sink: impl Fn(BlockEvent) + Send + Sync + 'static) -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    event::set_sink(sink);
    alone
}

/// Does something with the backend's channel on an iothread and waits for the answer.
pub fn on_channel<T: Send + 'static>(
    iothread: &Iothread,
    backend: &Arc<BlockBackend>,
    run: impl FnOnce(Rc<BackendChannel>) -> BoxFuture<T> + Send + 'static,
) -> T {
    let backend = backend.clone();
    let answer = iothread.remote().call(move |context, answer| {
        let future = run(backend.channel(context).expect("the node is active"));
        context.spawn(async move { answer.give(future.await) });
    });
    answer.expect("the iothread answers")
}

/// Keeps the backend's channel on an iothread for as long as that runs, as a started queue does.
pub fn keep_channel(iothread: &Iothread, backend: &Arc<BlockBackend>) {
    let backend = backend.clone();
    let kept = iothread.remote().call(move |context, answer| {
        let channel = backend.channel(context).expect("the node is active");
        context.spawn(async move {
            std::future::pending::<()>().await;
            drop(channel);
        });
        answer.give(());
    });
    kept.expect("the iothread answers");
}

/// Writes `bytes` times the same byte.
pub fn write(iothread: &Iothread, backend: &Arc<BlockBackend>, offset: u64, bytes: usize, byte: u8) -> BlockResult {
    on_channel(iothread, backend, move |channel| {
        Box::pin(async move {
            let mut buffer = AlignedBuffer::new(bytes, 4096);
            buffer.fill_from(&vec![byte; bytes]);
            channel.pwritev(offset, &[buffer.iov()]).await
        })
    })
}

/// Reads.
pub fn read(iothread: &Iothread, backend: &Arc<BlockBackend>, offset: u64, bytes: usize) -> BlockResult<Vec<u8>> {
    on_channel(iothread, backend, move |channel| {
        Box::pin(async move {
            let buffer = AlignedBuffer::new(bytes, 4096);
            channel.preadv(offset, &[buffer.iov()]).await.map(|()| buffer.to_vec())
        })
    })
}

/// Tasks on an iothread that write and read back without a pause, each its own block.
pub struct Load {
    state: Arc<LoadState>,
}

#[derive(Default)]
struct LoadState {
    stop: AtomicBool,
    running: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    /// Reads that gave something else than was written before.
    wrong: AtomicU64,
}

impl Load {
    /// `depth` tasks on blocks of 4 KiB from `first` on.
    pub fn start(iothread: &Iothread, backend: &Arc<BlockBackend>, first: u64, depth: u64) -> Self {
        let state = Arc::new(LoadState::default());
        state.running.store(depth, Ordering::SeqCst);
        let (backend, shared) = (backend.clone(), state.clone());
        iothread.remote().post(move |context| {
            let channel = backend.channel(context).expect("the node is active");
            for task in first..first + depth {
                let (channel, state) = (channel.clone(), shared.clone());
                context.spawn(async move {
                    work(&channel, &state, task).await;
                    state.running.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { state }
    }

    /// Waits until so many requests more are done.
    #[track_caller]
    pub fn goes_on(&self, count: u64) {
        let before = self.state.done.load(Ordering::SeqCst);
        eventually("requests are done", || self.state.done.load(Ordering::SeqCst) >= before + count);
    }

    /// Ends it. Returns how many requests failed.
    #[track_caller]
    pub fn stop(self) -> u64 {
        self.state.stop.store(true, Ordering::SeqCst);
        eventually("the load ends", || self.state.running.load(Ordering::SeqCst) == 0);
        assert_eq!(self.state.wrong.load(Ordering::SeqCst), 0, "reads that gave something else than was written");
        self.state.failed.load(Ordering::SeqCst)
    }
}

async fn work(channel: &Rc<BackendChannel>, state: &LoadState, task: u64) {
    let mut buffer = AlignedBuffer::new(4096, 4096);
    let into = AlignedBuffer::new(4096, 4096);
    let mut round = 0u64;
    while !state.stop.load(Ordering::SeqCst) {
        round += 1;
        let data = (round << 16 | task).to_le_bytes().repeat(512);
        buffer.fill_from(&data);
        let written = channel.pwritev(task * 4096, &[buffer.iov()]).await;
        let got = channel.preadv(task * 4096, &[into.iov()]).await;
        let failed = [written, got].iter().filter(|result| result.is_err()).count() as u64;
        state.failed.fetch_add(failed, Ordering::SeqCst);
        if failed == 0 && into.to_vec() != data {
            state.wrong.fetch_add(1, Ordering::SeqCst);
        }
        state.done.fetch_add(2, Ordering::SeqCst);
        // Without I/O that waits, others must get a turn.
        blockport_block::aio::AioContext::breathe().await;
    }
}

/// A device with a tray and a lock, or without; it writes down what it is told.
pub struct TestDevice {
    pub log: Mutex<Vec<String>>,
    pub has_tray: bool,
    pub removable: bool,
    pub tray_open: AtomicBool,
    pub locked: AtomicBool,
    /// Refuses to load.
    pub refuses: AtomicBool,
    /// Has its requests come from where they do.
    pub stays: AtomicBool,
    /// What it answers to `drained_poll`, as often.
    pub busy: AtomicU64,
}

impl TestDevice {
    pub fn new() -> Self {
        Self {
            log: Mutex::default(),
            has_tray: false,
            removable: true,
            tray_open: AtomicBool::new(false),
            locked: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
            stays: AtomicBool::new(false),
            busy: AtomicU64::new(0),
        }
    }

    pub fn with_tray() -> Self {
        Self { has_tray: true, ..Self::new() }
    }

    /// What it was told since the last time.
    pub fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().expect("no panic"))
    }

    fn note(&self, what: impl Into<String>) {
        self.log.lock().expect("no panic").push(what.into());
    }
}

impl BlockDevOps for TestDevice {
    fn is_removable(&self) -> bool {
        self.removable
    }

    fn change_media(&self, load: bool) -> OpenResult {
        self.note(if load { "load" } else { "eject" });
        if load && self.refuses.load(Ordering::SeqCst) {
            return Err(OpenError("the device does not like it".into()));
        }
        self.tray_open.store(!load, Ordering::SeqCst);
        Ok(())
    }

    fn eject_request(&self, force: bool) {
        self.note(if force { "eject request, forced" } else { "eject request" });
        if force {
            self.locked.store(false, Ordering::SeqCst);
        }
    }

    fn is_tray_open(&self) -> Option<bool> {
        self.has_tray.then(|| self.tray_open.load(Ordering::SeqCst))
    }

    fn is_medium_locked(&self) -> bool {
        self.locked.load(Ordering::SeqCst)
    }

    fn may_move(&self) -> OpenResult {
        match self.stays.load(Ordering::SeqCst) {
            true => Err(OpenError("the device does not move".into())),
            false => Ok(()),
        }
    }

    fn resize(&self) {
        self.note("resize");
    }

    fn drained_begin(&self) {
        self.note("drained begin");
    }

    fn drained_poll(&self) -> bool {
        let busy = self.busy.load(Ordering::SeqCst) > 0;
        if busy {
            self.busy.fetch_sub(1, Ordering::SeqCst);
            self.note("drained poll");
        }
        busy
    }

    fn drained_end(&self) {
        self.note("drained end");
    }
}
