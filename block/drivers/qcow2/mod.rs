//! The format `qcow2`: an image that grows as it is written, over a chain of backing files. This file owns the options
//! and the control verbs.
//!
//! All channels share the metadata in memory (`state.rs`), whose lock is held for moments only. A request to a cluster
//! that is there goes straight to the file (`read.rs`, `write.rs`); a write to one that is not is planned, written and
//! linked (`allocation.rs`). What is dirty reaches the disk in an order that survives a crash (`writeback.rs`).
//! `header.rs` and `geometry.rs` know the format; `load.rs` and `directories.rs` read what is needed from the start,
//! `tables.rs` the rest; `refcounts.rs` and `growth.rs` find room.

mod allocation;
mod amend;
mod bitmap_store;
mod bitmaps;
mod cache;
mod channel;
mod check;
mod clear;
mod compress;
mod create;
mod data;
mod decompress;
mod directories;
mod empty;
mod geometry;
mod growth;
mod header;
mod header_cluster;
mod info;
mod load;
mod mapping;
mod measure;
mod open;
mod preallocate;
mod read;
mod refcounts;
mod reference;
mod repair;
mod resize;
mod snapshot_table;
mod snapshots;
mod state;
mod tables;
mod verbs;
mod write;
mod writeback;

pub use amend::AmendOptions;
pub use bitmaps::{BitmapInfo, NewBitmap};
pub use check::{CheckReport, Repair};
pub use create::{CreateOptions, create, new_image};
pub use data::PayloadCipher;
pub use empty::make_empty;
pub use info::{ImageInfo, info};
pub use measure::{Measured, measure};
pub use preallocate::Preallocation;
pub use reference::set_backing;
pub use snapshots::SnapshotInfo;
pub use verbs::{
    amend, bitmap_add, bitmap_clear, bitmap_enable, bitmap_merge, bitmap_ranges, bitmap_remove, bitmaps, check,
    check_and_repair, resize, snapshot_apply, snapshot_create, snapshot_delete, snapshot_load, snapshots,
};

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::channel::Channel;
use self::load::CacheSizes;
use self::state::Image;
use super::own_loop::on_own_loop;
use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::Child;
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::node::{Node, SECTOR};
use crate::permissions::{PermissionSet, Permissions};

pub(super) const ROW: DriverRow = DriverRow {
    name: "qcow2",
    kind: DriverKind::Format,
    summary: "an image that grows as it is written, over a chain of backing files",
    options: &[
        ("file", "the node with the image"),
        ("backing", "the node with what is not in the image; default: the file that the image names; null: none"),
        (
            "data-file",
            "the node with the guest's data, if it is in a file of its own; default: the file that the image names",
        ),
        ("encrypt.format", "luks: the image is encrypted so"),
        ("encrypt.key-secret", "the id of the object of type secret that opens an encrypted image"),
        ("l2-cache-size", "memory for the mapping, in bytes, default 32M"),
        ("l2-cache-entry-size", "the unit in which the mapping is read, 512 to a cluster, default 4K"),
        ("refcount-cache-size", "memory for refcounts, in bytes, default 2M"),
        ("cache-size", "memory for both together, in bytes"),
        ("pass-discard-request", "on, off: discard in the file what is no longer used; default as the option discard"),
        (
            "lazy-refcounts",
            "on, off: refcounts are written late, and made anew after a crash; default: as the image says",
        ),
        ("x-repair", "on: only to be repaired, also if it is marked as corrupt; off (default)"),
        ("overlap-check", "constant, cached, all: metadata is never written over; all are the same here"),
    ],
    open: open::open,
};

/// An opened image, as the control thread knows it.
struct Qcow2 {
    image: Arc<Image>,
    caches: CacheSizes,
    /// The file, then the external data file, then the backing file, as far as there are any.
    children: Vec<Arc<Child>>,
    has_data_file: bool,
    has_backing: bool,
    active: AtomicBool,
}

impl Qcow2 {
    fn file(&self) -> Option<&Arc<Child>> {
        self.children.first()
    }

    fn data_file(&self) -> Option<&Arc<Child>> {
        self.children.get(1).filter(|_| self.has_data_file)
    }

    fn backing(&self) -> Option<&Arc<Child>> {
        self.children.last().filter(|_| self.has_backing)
    }

    fn channel(&self, context: &AioContext) -> OpenResult<Rc<Channel>> {
        let make = |child: &Arc<Child>| child.channel(context);
        let file = self.file().map(make).transpose()?.ok_or_else(|| OpenError::new("the image has no file"))?;
        let data = self.data_file().map(make).transpose()?;
        Ok(Channel::new(&self.image, file, data, self.backing().map(make).transpose()?))
    }

    /// Does work that takes I/O, for the control thread, which has no loop.
    fn blocking<T, F>(&self, work: impl FnOnce(Rc<Channel>) -> F + Send) -> OpenResult<T>
    where
        T: Send + 'static,
        F: Future<Output = OpenResult<T>> + 'static,
    {
        on_own_loop("qcow2-control", |context| {
            let channel = self.channel(context)?;
            context.run_until(work(channel))
        })
    }

    /// What is needed of the children while the node is active, whoever uses it: metadata is read at any time and, if
    /// the image may be written, written; nobody else changes it.
    fn needed(&self) -> Permissions {
        if !self.active.load(Ordering::Relaxed) {
            return Permissions::UNUSED;
        }
        let write = match self.image.writable {
            true => PermissionSet::WRITE | PermissionSet::RESIZE,
            false => PermissionSet::NONE,
        };
        Permissions {
            held: PermissionSet::CONSISTENT_READ | write,
            shared: PermissionSet::ALL.without(PermissionSet::WRITE | PermissionSet::RESIZE),
        }
    }

    fn set_child_permissions(&self) -> OpenResult {
        self.children.iter().try_for_each(|child| child.set_permissions(self.needed()))
    }

    fn give_up_children(&self) {
        self.active.store(false, Ordering::Relaxed);
        if let Err(error) = self.set_child_permissions() {
            tracing::warn!("node \"{}\": permissions could not be given up: {error}", self.image.name);
        }
    }

    /// Writes back what is dirty, and what that sets free.
    fn write_back(&self) -> OpenResult {
        let dirty = self.image.writable && !self.image.is_broken() && {
            let state = self.image.lock();
            state.is_dirty() || state.lazy || !state.retired.is_empty()
        };
        if dirty {
            self.blocking(async |channel| {
                // The second one writes what the first one set free.
                for _ in 0..2 {
                    let done = channel.flush().await;
                    done.map_err(|e| OpenError(format!("the metadata cannot be written: {e}")))?;
                }
                channel.end_lazy().await.map_err(|e| OpenError(format!("the refcounts cannot be written: {e}")))
            })?;
        }
        Ok(())
    }

    /// Does work on the image as it is on disk, and has everything read anew afterwards.
    fn offline<T, F>(&self, work: impl FnOnce(Rc<Channel>) -> F + Send) -> OpenResult<T>
    where
        T: Send + 'static,
        F: Future<Output = OpenResult<T>> + 'static,
    {
        self.write_back()?;
        let caches = self.caches;
        // Everything is stable when it is read anew.
        let lazy = self.image.lazy.swap(false, Ordering::Relaxed);
        let result = self.blocking(move |channel| {
            let working = work(channel.clone());
            async move {
                let result = working.await;
                if channel.image.is_broken() {
                    return result.and_then(|_| Err(OpenError::new("the image cannot be used any more")));
                }
                let written =
                    channel.flush().await.map_err(|e| OpenError(format!("the metadata cannot be written: {e}")));
                let extended = {
                    let state = channel.image.lock();
                    state.extended.then_some(state.zero_from)
                };
                let value = result.and_then(|value| written.map(|()| value));
                channel.load(caches).await?;
                if let Some(zero_from) = extended {
                    let mut state = channel.image.lock();
                    (state.zero_from, state.extended) = (zero_from, true);
                }
                value
            }
        });
        self.image.lazy.store(lazy, Ordering::Relaxed);
        result
    }

    fn check_writable(&self) -> OpenResult {
        match self.image.writable {
            true => Ok(()),
            false => Err(OpenError::new("it is open for reading only")),
        }
    }

    fn check(&self, repair: Repair) -> OpenResult<CheckReport> {
        self.write_back()?;
        if repair == Repair::Nothing {
            return self.blocking(async |channel| channel.check().await);
        }
        self.check_writable()?;
        if repair == Repair::Leaks {
            let report = self.blocking(async |channel| channel.check().await)?;
            if report.errors > 0 {
                return Ok(report);
            }
        }
        let report = self.blocking(async |channel| channel.repair().await)?;
        if report.errors == 0 {
            self.image.for_repair.store(false, Ordering::Relaxed);
        }
        let caches = self.caches;
        self.blocking(async move |channel| channel.load(caches).await)?;
        Ok(report)
    }

    /// Cuts off what the file was made longer by ahead of its use.
    fn trim(&self) -> OpenResult {
        let end = {
            let state = self.image.lock();
            let used = state.zero_from.checked_shl(self.image.geometry.cluster_bits);
            used.filter(|used| state.extended && *used < state.file_end)
        };
        match (end, self.file()) {
            (Some(end), Some(file)) => file.node().resize(end),
            _ => Ok(()),
        }
    }

    /// Writes back what is dirty and forgets what is cached.
    fn close(&self) -> OpenResult {
        self.close_bitmaps()?;
        self.write_back()?;
        if let Err(error) = self.trim() {
            tracing::warn!("node \"{}\": its file stays longer than it need be: {error}", self.image.name);
        }
        let mut state = self.image.lock();
        let empty =
            state::State::unloaded(state.geometry, state.header.clone(), state.header_sector.clone(), self.caches);
        let channels = std::mem::take(&mut state.channels);
        *state = state::State { channels, ..empty };
        Ok(())
    }
}

/// Does work on an active qcow2 node.
fn with_image<T>(node: &Node, work: impl FnOnce(&Qcow2) -> OpenResult<T>) -> OpenResult<T> {
    let driver = node.driver();
    let driver: &dyn Any = &*driver;
    let Some(image) = driver.downcast_ref::<Qcow2>() else {
        return Err(OpenError(format!("node \"{}\" is no qcow2 image", node.name())));
    };
    let done = if node.is_active() { work(image) } else { Err(OpenError::new("it is inactive")) };
    done.map_err(|e| e.context(format_args!("node \"{}\"", node.name())))
}

impl BlockDriver for Qcow2 {
    fn limits(&self) -> BlockLimits {
        let file = self.data_file().or(self.file()).map(|child| child.node().limits()).unwrap_or_default();
        let geometry = &self.image.geometry;
        BlockLimits {
            read_only: !self.image.writable,
            // What the file asks for beyond a sector is its own edge's business.
            request_alignment: SECTOR as u32,
            can_discard: self.image.writable,
            discard_alignment: geometry.subcluster_size() as u32,
            can_write_zeroes: self.image.writable && !geometry.raw_data,
            can_unmap_zeroes: self.image.writable && !geometry.raw_data,
            optimal_transfer: file.optimal_transfer,
            physical_block_size: file.physical_block_size,
            can_compress: self.image.writable && !geometry.data_file && self.image.cipher.is_none(),
            cluster_size: geometry.cluster_size() as u32,
            ..BlockLimits::default()
        }
    }

    fn length(&self) -> u64 {
        self.image.size.load(Ordering::Relaxed)
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn child_permissions(&self, _: Permissions) -> Permissions {
        self.needed()
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        // An external data file that is a raw image by itself has the size of the disk.
        let raw = self.data_file().filter(|_| self.image.geometry.raw_data);
        let grows = bytes > self.length();
        if let Some(raw) = raw.filter(|_| grows) {
            raw.node().resize(bytes)?;
        }
        self.blocking(async move |channel| channel.resize(bytes).await)?;
        self.resize_bitmaps();
        match raw.filter(|_| !grows) {
            Some(raw) => raw.node().resize(bytes),
            None => Ok(()),
        }
    }

    fn activate(&self) -> OpenResult {
        if self.active.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        // The locks first: what is read afterwards stays true.
        let caches = self.caches;
        let loaded =
            self.set_child_permissions().and_then(|()| self.blocking(async move |channel| channel.load(caches).await));
        let loaded = loaded.and_then(|()| self.open_bitmaps());
        if loaded.is_err() {
            self.give_up_children();
        }
        loaded
    }

    fn inactivate(&self) -> OpenResult {
        if self.active.load(Ordering::Relaxed) {
            self.close()?;
            self.give_up_children();
        }
        Ok(())
    }

    // Nothing here holds a request back.
    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        Ok(Rc::new(ImageChannel(self.channel(context)?)))
    }
}

/// The door of a channel.
struct ImageChannel(Rc<Channel>);

impl IoChannel for ImageChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        self.0.start_read(offset, iov)
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        self.0.image.mark_written(offset, iovec::total_len(iov));
        self.0.start_write(offset, iov, flags)
    }

    fn flush(&self) -> BlockFuture {
        let this = self.0.clone();
        if !this.image.writable {
            return BlockFuture::ready(Ok(()));
        }
        if this.is_clean() && !this.image.is_broken() {
            return this.flush_clean();
        }
        BlockFuture::boxed(async move { this.flush().await })
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        let this = self.0.clone();
        this.image.mark_written(offset, bytes);
        BlockFuture::boxed(async move { this.discard(offset, bytes).await })
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        let this = self.0.clone();
        if this.image.geometry.raw_data {
            return BlockFuture::ready(Err(BlockError::NotSupported));
        }
        this.image.mark_written(offset, bytes);
        BlockFuture::boxed(async move { this.write_zeroes(offset, bytes, flags).await })
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let this = self.0.clone();
        Box::pin(async move { this.status(offset, bytes).await })
    }
}
