//! BlockBackend: the only handle that a device model holds. It is an edge to a graph of nodes plus what only a device
//! needs: the medium, the write cache, quiescing, accounting. It outlives its medium and every connection.
//!
//! The control thread owns [`BlockBackend`]; each iothread has a [`BackendChannel`], through which requests go.

mod cancel;
mod channel;
mod context;
mod device;
mod errors;
mod media;
mod notifiers;
mod plug;
mod rebuild;
mod request;
mod requests;
mod root;
mod statistics;
mod sync;
mod throttling;

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::accounting::{Accounting, Histogram, RequestKind, Statistics};
use crate::aio::{AioContext, AioRemote, Answer, reserve_locals};
use crate::child::Child;
use crate::dev_ops::BlockDevOps;
use crate::driver::WriteFlags;
use crate::error::{BlockResult, OpenResult};
use crate::node::{Node, NodeOptions, SECTOR};
use crate::on_error::OnError;
use crate::permissions::Permissions;
use crate::throttle::ThrottleMember;

pub use cancel::{Cancellable, Canceller};
pub use channel::BackendChannel;
pub use device::Attached;
pub use media::TrayOpening;
pub use notifiers::{BackendNotice, Notifier};
pub use plug::Plug;
pub(crate) use rebuild::{abort, commit, prepare, rebuild};
pub use request::{Completed, Request, Submitted};
pub use requests::{RequestInfo, WaitsFor};
pub use throttling::BackendHurry;

use notifiers::Notifiers;

/// The drive as its device model and its user see it.
///
/// The last reference must not be given up on an iothread.
pub struct BlockBackend {
    /// Itself, for the edge to its medium.
    this: Weak<Self>,
    /// Tells the channels of one backend from another's on the same iothread.
    number: u64,
    label: String,
    /// As the monitor named it; see `backends.rs`.
    name: Mutex<Option<String>>,
    root: Mutex<Option<Arc<Child>>>,
    /// What the device needs of its medium, whichever that is.
    permissions: Mutex<Permissions>,
    /// The options of the last medium.
    root_state: Mutex<Option<Arc<NodeOptions>>>,
    /// Counts media, so that what was asked of one never reaches another.
    medium: AtomicU64,
    device: Mutex<Option<Arc<dyn BlockDevOps>>>,
    notifiers: Arc<Notifiers>,
    on_error: Arc<OnError>,
    write_cache: AtomicBool,
    keeps_writes: AtomicBool,
    /// The unit of the device's requests, in bytes.
    block_size: AtomicU32,
    quiesced: Mutex<u32>,
    /// While it is above 0.
    hurry: Mutex<Option<BackendHurry>>,
    /// Whether that is above 0, for channels that are made meanwhile.
    is_quiesced: AtomicBool,
    throttle: Mutex<Option<Arc<ThrottleMember>>>,
    /// Counts how often it went above 0.
    quiesce_epoch: AtomicU64,
    channels: Mutex<Vec<ChannelHandle>>,
    /// What another process has done before, as far as it was told.
    statistics_before: Mutex<Statistics>,
    /// Where its own requests come from; see `context.rs`.
    home: Mutex<Option<AioRemote>>,
    /// The boundaries of the latency histograms, by kind.
    histograms: Mutex<[Option<Arc<[u64]>>; RequestKind::ALL.len()]>,
}

/// What the control thread knows of a channel.
struct ChannelHandle {
    remote: AioRemote,
    accounting: Arc<Accounting>,
}

impl BlockBackend {
    /// A backend without a medium, with its write cache on, in no list: see [`crate::Graph::create_backend`]. `label` is
    /// what errors, logs and events call it: the id of its device.
    pub fn new(label: &str) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            number: reserve_locals(1),
            label: label.to_owned(),
            name: Mutex::default(),
            root: Mutex::default(),
            permissions: Mutex::new(Permissions::UNUSED),
            root_state: Mutex::default(),
            medium: AtomicU64::new(0),
            device: Mutex::default(),
            notifiers: Arc::default(),
            on_error: Arc::default(),
            write_cache: AtomicBool::new(true),
            keeps_writes: AtomicBool::new(false),
            block_size: AtomicU32::new(SECTOR as u32),
            quiesced: Mutex::default(),
            hurry: Mutex::default(),
            is_quiesced: AtomicBool::new(false),
            throttle: Mutex::default(),
            quiesce_epoch: AtomicU64::new(0),
            channels: Mutex::default(),
            statistics_before: Mutex::default(),
            home: Mutex::default(),
            histograms: Mutex::default(),
        })
    }

    /// A backend with `node` as its medium.
    ///
    /// # Errors
    /// See [`BlockBackend::insert`].
    pub fn with_root(label: &str, node: Arc<Node>, permissions: Permissions) -> OpenResult<Arc<Self>> {
        let backend = Self::new(label);
        backend.insert(node, permissions)?;
        Ok(backend)
    }

    /// What errors, logs and events call it: the id of its device.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The name that the monitor gave it; `None` while it is anonymous.
    pub fn name(&self) -> Option<String> {
        lock(&self.name).clone()
    }

    pub(crate) fn set_name(&self, name: Option<String>) {
        *lock(&self.name) = name;
    }

    /// Says in which unit, in bytes, the device reads and writes: 512 until told otherwise. A medium whose own blocks are
    /// no larger needs no padding. Before a medium is inserted.
    pub fn set_block_size(&self, bytes: u32) {
        self.block_size.store(bytes, Ordering::Relaxed);
    }

    /// Whether writes may be in a volatile cache when they complete.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Relaxed)
    }

    /// Turns the write cache on or off. Off: every write that starts after this returns is stable before it completes;
    /// who turns it off flushes what was written before, with [`BlockBackend::flush_blocking`]. Not on an iothread.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Relaxed);
        self.apply_write_flags();
    }

    /// Whether writes that start after this returns outlive this process once they are complete (`WriteFlags::kept`): for
    /// a device whose driver goes on when another process takes this one's place. Off at first. Not on an iothread.
    pub fn set_keeps_writes(&self, on: bool) {
        if self.keeps_writes.swap(on, Ordering::Relaxed) != on {
            self.apply_write_flags();
        }
    }

    fn write_flags(&self) -> WriteFlags {
        let kept = self.keeps_writes.load(Ordering::Relaxed);
        WriteFlags { fua: !self.write_cache(), kept, ..WriteFlags::default() }
    }

    fn apply_write_flags(&self) {
        let flags = self.write_flags();
        self.each_channel(move |_, channel| channel.set_write_flags(flags));
    }

    /// Quiesces: returns with nothing in flight; requests that arrive later wait for [`BlockBackend::drain_end`]. Nests.
    /// Control side. See [`crate::Drained`] for several backends at once.
    pub fn drain_begin(&self) {
        self.quiesce();
        self.wait_until_idle();
    }

    /// The first half of [`BlockBackend::drain_begin`]: no request starts any more.
    pub(crate) fn quiesce(&self) {
        let mut quiesced = lock(&self.quiesced);
        *quiesced += 1;
        if *quiesced > 1 {
            return;
        }
        self.quiesce_epoch.fetch_add(1, Ordering::AcqRel);
        self.is_quiesced.store(true, Ordering::Release);
        if let Some(device) = self.device() {
            device.drained_begin();
        }
        self.each_channel(|_, channel| channel.quiesce());
        *lock(&self.hurry) = Some(self.hurry());
    }

    /// The second half: waits for what has started.
    pub(crate) fn wait_until_idle(&self) {
        let number = self.number;
        for remote in self.remotes() {
            remote.call(move |context, answer| wait_idle(context, number, answer));
        }
        while self.device().is_some_and(|device| device.drained_poll()) {
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }

    /// Ends one [`BlockBackend::drain_begin`]; the last one lets requests go on, the parked ones first, in order.
    pub fn drain_end(&self) {
        let mut quiesced = lock(&self.quiesced);
        *quiesced = quiesced.saturating_sub(1);
        if *quiesced > 0 {
            return;
        }
        lock(&self.hurry).take();
        self.is_quiesced.store(false, Ordering::Release);
        self.each_channel(|_, channel| channel.resume());
        if let Some(device) = self.device() {
            device.drained_end();
        }
    }

    /// Whether a drained section is on.
    pub fn is_quiesced(&self) -> bool {
        self.is_quiesced.load(Ordering::Acquire)
    }

    /// [`BlockBackend::flush_blocking`] inside a drained section, in which that would wait for its end.
    pub(crate) fn flush_drained(&self) -> BlockResult {
        let number = self.number;
        for remote in self.remotes() {
            let flushed = remote.call(move |context, answer: Answer<BlockResult>| {
                let Some(channel) = context.local::<BackendChannel>(number) else { return };
                if let Some(flush) = channel.flush_drained() {
                    match flush.try_ready() {
                        Ok(result) => answer.give(result),
                        Err(flush) => context.spawn(async move { answer.give(flush.await) }),
                    }
                }
            });
            // One flush covers what all iothreads wrote.
            if let Some(result) = flushed {
                return result;
            }
        }
        Ok(())
    }

    /// The backend's half on the calling iothread, made at the first call there.
    ///
    /// # Errors
    /// A driver cannot work on this thread.
    pub fn channel(self: &Arc<Self>, context: &AioContext) -> OpenResult<Rc<BackendChannel>> {
        if let Some(channel) = context.local::<BackendChannel>(self.number) {
            return Ok(channel);
        }
        // Held to the end, so that a drain that begins meanwhile finds the channel in the list, or we find it begun.
        let mut channels = lock(&self.channels);
        let root = self.reachable_root().map(|child| child.channel(context)).transpose()?;
        let remote = context.remote();
        let accounting = match channels.iter().find(|channel| channel.remote.same(&remote)) {
            Some(known) => known.accounting.clone(),
            None => {
                let accounting = Arc::<Accounting>::default();
                for (kind, boundaries) in RequestKind::ALL.into_iter().zip(lock(&self.histograms).iter()) {
                    accounting.set_histogram(kind, boundaries.as_ref().map(Histogram::new));
                }
                channels.push(ChannelHandle { remote, accounting: accounting.clone() });
                accounting
            }
        };
        let channel = BackendChannel::new(context, self, root, accounting);
        let weak: std::rc::Weak<BackendChannel> = Rc::downgrade(&channel);
        context.set_local(self.number, weak);
        Ok(channel)
    }

    fn remotes(&self) -> Vec<AioRemote> {
        lock(&self.channels).iter().map(|channel| channel.remote.clone()).collect()
    }

    /// Has something done with each channel on its own thread, and waits for it.
    fn each_channel(&self, run: impl Fn(&AioContext, &Rc<BackendChannel>) + Clone + Send + 'static) {
        let number = self.number;
        for remote in self.remotes() {
            let run = run.clone();
            remote.call(move |context, answer| {
                if let Some(channel) = context.local::<BackendChannel>(number) {
                    run(context, &channel);
                }
                answer.give(());
            });
        }
    }
}

impl Drop for BlockBackend {
    fn drop(&mut self) {
        self.drain_begin();
        self.take_root();
        self.leave_home();
        self.drain_end();
        debug_assert!(lock(&self.name).is_none(), "\"{}\" has a name, and so an owner", self.label);
        debug_assert!(lock(&self.device).is_none(), "\"{}\" has a device", self.label);
        debug_assert!(self.notifiers.is_empty(), "somebody wants to be told of \"{}\"", self.label);
        debug_assert!(*lock(&self.quiesced) == 0, "\"{}\" is drained, and may have parked requests", self.label);
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_idle(context: &AioContext, number: u64, answer: Answer<()>) {
    let Some(channel) = context.local::<BackendChannel>(number) else { return };
    if channel.in_flight() == 0 {
        return answer.give(());
    }
    context.spawn(async move {
        channel.idle().await;
        answer.give(());
    });
}
