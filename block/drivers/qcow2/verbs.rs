//! Verbs: what is done to a whole image by command rather than by a guest: check, snapshots, bitmaps, amendments. It owns
//! the door for all of them, which finds the image behind a node, drains what is above, and has everybody see what has
//! changed; the work is in the file of each noun.
//!
//! All of these are called on the control side, never on an iothread, on a node of the driver `qcow2` that is active.

use std::sync::Arc;

use super::amend::AmendOptions;
use super::bitmaps::{BitmapInfo, NewBitmap};
use super::check::{CheckReport, Repair};
use super::preallocate::Preallocation;
use super::snapshots::SnapshotInfo;
use super::{Qcow2, with_image};
use crate::backend;
use crate::drained::Drained;
use crate::error::OpenResult;
use crate::node::{Lengths, Node};

/// Runs `work` on the image behind `node`, drained, and has the nodes above and their devices see its new size.
fn on_image<T>(node: &Arc<Node>, work: impl FnOnce(&Qcow2) -> OpenResult<T>) -> OpenResult<T> {
    let drained = Drained::above(node);
    let lengths = Lengths::of(drained.backends());
    let before = node.length();
    let mut result = with_image(node, work);
    node.refresh();
    if node.length() != before {
        node.and_above().iter().skip(1).for_each(|node| node.refresh());
        let rebuilt = backend::rebuild(drained.backends());
        result = result.and_then(|value| rebuilt.map(|()| value));
    }
    drop(drained);
    lengths.tell();
    result
}

/// The same for what writes to the image.
fn change<T>(node: &Arc<Node>, work: impl FnOnce(&Qcow2) -> OpenResult<T>) -> OpenResult<T> {
    on_image(node, |image| {
        image.check_writable()?;
        work(image)
    })
}

/// Checks an image, and repairs it if asked (`true`: all that can be). One that was opened with `x-repair` can be used
/// once no error is left.
///
/// # Errors
/// The image cannot be read, or cannot be written and is to be repaired.
pub fn check(node: &Arc<Node>, repair: bool) -> OpenResult<CheckReport> {
    check_and_repair(node, if repair { Repair::All } else { Repair::Nothing })
}

/// Checks an image, and repairs as much of it as `repair` says.
///
/// # Errors
/// As for [`check`].
pub fn check_and_repair(node: &Arc<Node>, repair: Repair) -> OpenResult<CheckReport> {
    on_image(node, |image| image.check(repair))
}

/// The internal snapshots, in the order of their table.
///
/// # Errors
/// The table cannot be read.
pub fn snapshots(node: &Arc<Node>) -> OpenResult<Vec<SnapshotInfo>> {
    on_image(node, Qcow2::snapshots)
}

/// Takes an internal snapshot of the disk as it is, named `name`, with an id that no other has.
///
/// # Errors
/// The image is read-only or has an external data file, there are too many snapshots, a refcount would overflow, or I/O
/// failed; the disk and the other snapshots are what they were.
pub fn snapshot_create(node: &Arc<Node>, name: &str) -> OpenResult<SnapshotInfo> {
    change(node, |image| image.snapshot_create(name))
}

/// Makes the disk what it was when a snapshot was taken, with its size. `snapshot` is an id, or else a name.
///
/// # Errors
/// There is none, or as for [`snapshot_create`].
pub fn snapshot_apply(node: &Arc<Node>, snapshot: &str) -> OpenResult {
    change(node, |image| image.snapshot_apply(snapshot))
}

/// Deletes a snapshot. `snapshot` is an id, or else a name.
///
/// # Errors
/// There is none, or as for [`snapshot_create`].
pub fn snapshot_delete(node: &Arc<Node>, snapshot: &str) -> OpenResult {
    change(node, |image| image.snapshot_delete(snapshot))
}

/// Has a node that is open for reading only show a snapshot rather than the disk, until it is opened anew. `snapshot` is
/// an id, or else a name.
///
/// # Errors
/// There is none, the node can be written, or a table cannot be read.
pub fn snapshot_load(node: &Arc<Node>, snapshot: &str) -> OpenResult {
    on_image(node, |image| image.snapshot_load(snapshot))
}

/// The bitmaps of an image, in the order of their directory.
///
/// # Errors
/// The directory cannot be read.
pub fn bitmaps(node: &Arc<Node>) -> OpenResult<Vec<BitmapInfo>> {
    on_image(node, Qcow2::bitmaps)
}

/// Adds a bitmap, in which nothing is marked.
///
/// # Errors
/// The name is taken or too long, the granularity is no power of two from 512 to 2 GiB, there are too many, or version 2
/// cannot hold it.
pub fn bitmap_add(node: &Arc<Node>, bitmap: &NewBitmap) -> OpenResult {
    change(node, |image| image.bitmap_add(bitmap))
}

/// Removes a bitmap, whatever state it is in.
///
/// # Errors
/// There is none of that name.
pub fn bitmap_remove(node: &Arc<Node>, name: &str) -> OpenResult {
    change(node, |image| image.bitmap_remove(name))
}

/// Marks nothing in a bitmap any more.
///
/// # Errors
/// There is none of that name, or it is not up to date (it was not closed properly).
pub fn bitmap_clear(node: &Arc<Node>, name: &str) -> OpenResult {
    change(node, |image| image.bitmap_clear(name))
}

/// Has writes marked in a bitmap from now on, or no longer.
///
/// # Errors
/// As for [`bitmap_clear`].
pub fn bitmap_enable(node: &Arc<Node>, name: &str, enabled: bool) -> OpenResult {
    change(node, |image| image.bitmap_enable(name, enabled))
}

/// Marks in a bitmap what is marked in another one, of this image or of another one with a disk of the same size. Their
/// granularities may differ.
///
/// # Errors
/// As for [`bitmap_clear`], of either; or the sizes differ.
pub fn bitmap_merge(node: &Arc<Node>, name: &str, source: &Arc<Node>, source_name: &str) -> OpenResult {
    let marked = on_image(source, |image| image.bitmap_marked(source_name))?;
    change(node, |image| image.bitmap_merge(name, &marked))
}

/// The ranges, offset and length in bytes, that are marked in a bitmap, in order.
///
/// # Errors
/// As for [`bitmap_clear`].
pub fn bitmap_ranges(node: &Arc<Node>, name: &str) -> OpenResult<Vec<(u64, u64)>> {
    on_image(node, |image| image.bitmap_marked(name)).map(|marked| marked.ranges)
}

/// Changes properties of an image. `progress` is told how much of the work is done and how much there is, in bytes.
/// After a change of version or width of refcounts the node has to be opened anew; requests fail until then.
///
/// # Errors
/// The change is not possible, or I/O failed; the error says what is in the way.
pub fn amend(node: &Arc<Node>, options: &AmendOptions, progress: &(dyn Fn(u64, u64) + Sync)) -> OpenResult {
    change(node, |image| image.amend(options, progress))
}

/// Changes the size of the disk, with what is new allocated as `preallocation` says.
///
/// # Errors
/// As for [`Node::block_resize`]; or the disk does not grow and something is to be allocated.
pub fn resize(node: &Arc<Node>, bytes: u64, preallocation: Preallocation) -> OpenResult {
    let before = node.length();
    node.block_resize(bytes)?;
    if preallocation == Preallocation::Off || bytes <= before {
        return Ok(());
    }
    preallocate(node, before, bytes, preallocation)
}

/// Gives the clusters from `start` to `end` on the disk their places.
pub(super) fn preallocate(node: &Arc<Node>, start: u64, end: u64, mode: Preallocation) -> OpenResult {
    change(node, |image| image.preallocate(start, end, mode))
}
