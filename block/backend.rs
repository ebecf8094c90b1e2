//! BlockBackend: the only handle that a device model holds. It is an edge to a graph of nodes plus what only a device
//! needs: the medium, the write cache, quiescing, accounting. It outlives its medium and every connection.
//!
//! The control thread owns [`BlockBackend`]; each iothread has a [`BackendChannel`], through which requests go.

mod channel;

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::accounting::{Accounting, Statistics};
use crate::aio::{AioContext, AioRemote, Answer, reserve_locals};
use crate::child::Child;
use crate::dev_ops::BlockDevOps;
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::limits::BlockLimits;
use crate::node::{Hurry, Node, SECTOR};
use crate::permissions::Permissions;

pub use channel::{BackendChannel, Completed, Request, Submitted};

/// The drive as its device model and its user see it.
pub struct BlockBackend {
    /// Tells the channels of one backend from another's on the same iothread.
    number: u64,
    name: String,
    root: Mutex<Option<Arc<Child>>>,
    device: Mutex<Option<Arc<dyn BlockDevOps>>>,
    write_cache: AtomicBool,
    /// The unit of the device's requests, in bytes.
    block_size: AtomicU32,
    quiesced: Mutex<u32>,
    /// While it is above 0.
    hurry: Mutex<Option<Hurry>>,
    /// Whether that is above 0, for channels that are made meanwhile.
    is_quiesced: AtomicBool,
    channels: Mutex<Vec<ChannelHandle>>,
}

/// What the control thread knows of a channel.
struct ChannelHandle {
    remote: AioRemote,
    accounting: Arc<Accounting>,
}

impl BlockBackend {
    /// A backend without a medium, with its write cache on. `name` is what errors, logs and events call it.
    pub fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            number: reserve_locals(1),
            name: name.to_owned(),
            root: Mutex::default(),
            device: Mutex::default(),
            write_cache: AtomicBool::new(true),
            block_size: AtomicU32::new(SECTOR as u32),
            quiesced: Mutex::default(),
            hurry: Mutex::default(),
            is_quiesced: AtomicBool::new(false),
            channels: Mutex::default(),
        })
    }

    /// A backend with `node` as its medium.
    ///
    /// # Errors
    /// See [`BlockBackend::insert`].
    pub fn with_root(name: &str, node: Arc<Node>, permissions: Permissions) -> OpenResult<Arc<Self>> {
        let backend = Self::new(name);
        backend.insert(node, permissions)?;
        Ok(backend)
    }

    /// What errors, logs and events call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says in which unit, in bytes, the device reads and writes: 512 until told otherwise. A medium whose own blocks are
    /// no larger needs no padding. Before a medium is inserted.
    pub fn set_block_size(&self, bytes: u32) {
        self.block_size.store(bytes, Ordering::Relaxed);
    }

    /// Puts a medium in. Control thread.
    ///
    /// # Errors
    /// There is one already, or another user of the node does not share what `permissions` hold; nothing has changed.
    pub fn insert(&self, node: Arc<Node>, permissions: Permissions) -> OpenResult {
        if lock(&self.root).is_some() {
            return Err(OpenError(format!("\"{}\" has a medium already", self.name)));
        }
        let child =
            Child::attach(node, &format!("\"{}\"", self.name), permissions, self.block_size.load(Ordering::Relaxed))?;
        self.drain_begin();
        *lock(&self.root) = Some(child.clone());
        let result = self.rebuild_channels();
        if result.is_err() {
            *lock(&self.root) = None;
            let _ = self.rebuild_channels();
        }
        self.drain_end();
        result
    }

    /// Takes the medium out; afterwards every request answers "no medium". Control thread.
    pub fn remove(&self) {
        self.drain_begin();
        let old = lock(&self.root).take();
        if let Err(error) = self.rebuild_channels() {
            tracing::error!("\"{}\": {error}", self.name);
        }
        drop(old);
        self.drain_end();
    }

    /// The node of the medium, if there is one.
    pub fn root(&self) -> Option<Arc<Node>> {
        lock(&self.root).as_ref().map(|child| child.node().clone())
    }

    /// The size in bytes, a multiple of 512.
    ///
    /// # Errors
    /// There is no medium.
    pub fn length(&self) -> BlockResult<u64> {
        self.root().map(|node| node.length()).ok_or(BlockError::NoMedium)
    }

    /// What the medium can do; the default limits without one.
    pub fn limits(&self) -> BlockLimits {
        self.root().map(|node| node.limits()).unwrap_or_default()
    }

    /// Whether a discard would do something on this medium.
    pub fn can_discard(&self) -> bool {
        self.root().is_some_and(|node| node.limits().can_discard && node.options().discard)
    }

    /// Whether the medium cannot be written. False without one.
    pub fn is_read_only(&self) -> bool {
        self.root().is_some_and(|node| node.is_read_only())
    }

    /// Attaches a device model.
    ///
    /// # Errors
    /// Another one is attached.
    pub fn attach_device(&self, device: Arc<dyn BlockDevOps>) -> OpenResult {
        {
            let mut slot = lock(&self.device);
            if slot.is_some() {
                return Err(OpenError(format!("\"{}\" is busy: a device is attached to it", self.name)));
            }
            *slot = Some(device.clone());
        }
        if *lock(&self.quiesced) > 0 {
            device.drained_begin();
        }
        Ok(())
    }

    /// Detaches the device model, if one is attached.
    pub fn detach_device(&self) {
        lock(&self.device).take();
    }

    fn device(&self) -> Option<Arc<dyn BlockDevOps>> {
        lock(&self.device).clone()
    }

    /// Whether writes may be in a volatile cache when they complete.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Relaxed)
    }

    /// Turns the write cache on or off. Off: every write that starts after this returns is stable before it completes;
    /// who turns it off flushes what was written before, with [`BlockBackend::flush_blocking`]. Not on an iothread.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Relaxed);
        let number = self.number;
        for remote in self.remotes() {
            remote.call(move |context, answer| {
                if let Some(channel) = context.local::<BackendChannel>(number) {
                    channel.set_write_cache(on);
                }
                answer.give(());
            });
        }
    }

    /// Changes the size of the medium and tells the device. Control thread.
    ///
    /// # Errors
    /// There is no medium, or it cannot change.
    pub fn resize(&self, bytes: u64) -> OpenResult {
        let Some(node) = self.root() else {
            return Err(OpenError(format!("\"{}\" has no medium", self.name)));
        };
        self.drain_begin();
        // The channels hold limits that may have changed with the size.
        let result = node.resize(bytes).and_then(|()| self.rebuild_channels());
        self.drain_end();
        if let (Ok(()), Some(device)) = (&result, self.device()) {
            device.resize();
        }
        result
    }

    /// Quiesces: returns with nothing in flight; requests that arrive later wait for [`BlockBackend::drain_end`]. Nests.
    /// Control thread.
    pub fn drain_begin(&self) {
        let mut quiesced = lock(&self.quiesced);
        *quiesced += 1;
        if *quiesced > 1 {
            return;
        }
        self.is_quiesced.store(true, Ordering::Release);
        let device = self.device();
        if let Some(device) = &device {
            device.drained_begin();
        }
        let number = self.number;
        for remote in self.remotes() {
            remote.post(move |context| {
                if let Some(channel) = context.local::<BackendChannel>(number) {
                    channel.quiesce();
                }
            });
        }
        *lock(&self.hurry) = self.hurry();
        for remote in self.remotes() {
            remote.call(move |context, answer| wait_idle(context, number, answer));
        }
        while device.as_ref().is_some_and(|device| device.drained_poll()) {
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
        let number = self.number;
        for remote in self.remotes() {
            remote.post(move |context| {
                if let Some(channel) = context.local::<BackendChannel>(number) {
                    channel.resume();
                }
            });
        }
        if let Some(device) = self.device() {
            device.drained_end();
        }
    }

    /// Until what this returns is dropped, no limit holds requests of the medium back, those that wait included: for
    /// whoever waits for requests to end, such as a ring's stop. Not on an iothread.
    pub fn hurry(&self) -> Option<Hurry> {
        self.root().map(Node::hurry)
    }

    /// Makes everything written so far stable, whether or not a queue is started. Not on an iothread.
    ///
    /// # Errors
    /// The flush failed. Without an iothread that ever used the backend, nothing was written and there is nothing to do.
    pub fn flush_blocking(self: &Arc<Self>) -> BlockResult {
        let Some(remote) = self.remotes().into_iter().next() else { return Ok(()) };
        let backend = self.clone();
        let flushed = remote.call(move |context, answer: Answer<BlockResult>| match backend.channel(context) {
            Ok(channel) => context.spawn(async move { answer.give(channel.flush().await) }),
            Err(error) => {
                tracing::error!("\"{}\": {error}", backend.name());
                answer.give(Err(BlockError::Host(libc::EIO)));
            }
        });
        // The iothread has ended, and with it everything that could have been written.
        flushed.unwrap_or(Ok(()))
    }

    /// What has been done so far, summed over all iothreads.
    pub fn statistics(&self) -> Statistics {
        lock(&self.channels).iter().fold(Statistics::default(), |sum, channel| sum + channel.accounting.read())
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
        let root = lock(&self.root).clone().map(|child| child.channel(context)).transpose()?;
        let remote = context.remote();
        let accounting = match channels.iter().find(|channel| channel.remote.same(&remote)) {
            Some(known) => known.accounting.clone(),
            None => {
                let accounting = Arc::<Accounting>::default();
                channels.push(ChannelHandle { remote, accounting: accounting.clone() });
                accounting
            }
        };
        let quiesced = self.is_quiesced.load(Ordering::Acquire);
        let channel = BackendChannel::new(context, root, accounting, quiesced, self.write_cache());
        let weak: std::rc::Weak<BackendChannel> = Rc::downgrade(&channel);
        context.set_local(self.number, weak);
        Ok(channel)
    }

    fn remotes(&self) -> Vec<AioRemote> {
        lock(&self.channels).iter().map(|channel| channel.remote.clone()).collect()
    }

    /// Has every iothread make its half of the root edge anew. Drained.
    fn rebuild_channels(&self) -> OpenResult {
        let root = lock(&self.root).clone();
        let number = self.number;
        for remote in self.remotes() {
            let root = root.clone();
            let rebuilt = remote.call(move |context, answer: Answer<OpenResult>| {
                let Some(channel) = context.local::<BackendChannel>(number) else { return answer.give(Ok(())) };
                answer.give(root.map(|child| child.channel(context)).transpose().map(|root| {
                    channel.set_root(root);
                }));
            });
            rebuilt.unwrap_or(Ok(()))?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_idle(context: &AioContext, number: u64, answer: Answer<()>) {
    let Some(channel) = context.local::<BackendChannel>(number) else { return };
    context.spawn(async move {
        channel.idle().await;
        answer.give(());
    });
}
