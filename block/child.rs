//! Child: the edge between a parent (a driver, or a BlockBackend) and a node; and its channel, the checked door.
//! Every request to a driver goes through [`ChildChannel`], which checks the range, brings the request into the shape
//! that the node's limits ask for, and keeps padded writes apart from others. It never touches a device.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::accounting::RequestKind;
use crate::aio::AioContext;
use crate::backend::{self, BlockBackend};
use crate::drained::Drained;
use crate::driver::{BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockError, BlockResult, OpenError, OpenResult};
use crate::iovec::{self, AlignedBuffer, IoVec};
use crate::limits::BlockLimits;
use crate::node::{DetectZeroes, Node, SECTOR};
use crate::permissions::{PermissionSet, PermissionUpdate, Permissions};
use crate::shaping;

/// The edge between a parent and a node. Which node that is may change under load; dropping the edge ends the parent's
/// use of it.
pub struct Child {
    kind: EdgeKind,
    edge: Mutex<Edge>,
}

/// What stays the same about an edge.
pub(crate) struct EdgeKind {
    /// What the node is to its parent: the key of the parent's option, as "file"; "root" of a BlockBackend.
    pub(crate) role: String,
    /// The parent, as errors name it.
    pub(crate) user: String,
    /// The unit of the parent's writes in bytes.
    pub(crate) granularity: u32,
    /// Writes past the node's end are let through and make it grow; reads there give zeroes.
    pub(crate) may_grow: bool,
    /// The parent holds no more than reading, whatever its own users do: a backing file.
    pub(crate) only_read: bool,
}

impl EdgeKind {
    /// Of a user outside the graph, in units of sectors.
    pub(crate) fn outside(user: &str) -> Self {
        Self {
            role: String::new(),
            user: user.to_owned(),
            granularity: SECTOR as u32,
            may_grow: false,
            only_read: false,
        }
    }
}

struct Edge {
    node: Arc<Node>,
    permissions: Permissions,
    parent: Parent,
}

/// Who uses a node through an edge.
#[derive(Clone, Default)]
pub(crate) enum Parent {
    /// Something outside the graph: a test, or a driver that is being opened.
    #[default]
    None,
    Node(Weak<Node>),
    Backend(Weak<BlockBackend>),
}

impl Child {
    /// Makes `user` (as errors name it) a user of `node`, outside the graph. `granularity` is the unit of its writes in
    /// bytes: 512 for a device, 1 for a format that writes single bytes.
    ///
    /// # Errors
    /// Another user, or another process, does not share what `permissions` hold; the error names both.
    pub fn attach(node: Arc<Node>, user: &str, permissions: Permissions, granularity: u32) -> OpenResult<Arc<Self>> {
        let kind = EdgeKind { granularity, ..EdgeKind::outside(user) };
        Self::new(node, kind, permissions, Parent::None)
    }

    /// The same for a format's file: writes past its end are let through and make it grow; reads there give zeroes.
    ///
    /// # Errors
    /// As for [`Child::attach`].
    pub fn attach_growing(
        node: Arc<Node>,
        user: &str,
        permissions: Permissions,
        granularity: u32,
    ) -> OpenResult<Arc<Self>> {
        let kind = EdgeKind { granularity, may_grow: true, ..EdgeKind::outside(user) };
        Self::new(node, kind, permissions, Parent::None)
    }

    pub(crate) fn new(
        node: Arc<Node>,
        kind: EdgeKind,
        permissions: Permissions,
        parent: Parent,
    ) -> OpenResult<Arc<Self>> {
        let padded = node.may_pad();
        let edge = Edge { node: node.clone(), permissions: Permissions::UNUSED, parent };
        let child = Arc::new(Self { kind, edge: Mutex::new(edge) });
        node.add_user(&child);
        let mut update = PermissionUpdate::default();
        update.set(&child, permissions);
        update.apply()?;
        if !padded && node.may_pad() {
            // The channels of those who were there before do not keep out of the way of padded writes yet.
            let drained = Drained::above(&node);
            backend::rebuild(drained.backends())?;
        }
        Ok(child)
    }

    /// The node it leads to.
    pub fn node(&self) -> Arc<Node> {
        self.edge().node.clone()
    }

    /// Who uses it, as errors name it.
    pub fn user(&self) -> &str {
        &self.kind.user
    }

    /// What the node is to its parent: the key of the parent's option, as "file"; "root" of a BlockBackend; empty
    /// outside the graph.
    pub fn role(&self) -> &str {
        &self.kind.role
    }

    /// What the parent holds and shares.
    pub fn permissions(&self) -> Permissions {
        self.edge().permissions
    }

    pub(crate) fn granularity(&self) -> u32 {
        self.kind.granularity
    }

    pub(crate) fn parent(&self) -> Parent {
        self.edge().parent.clone()
    }

    /// Says whose edge it is, once that exists.
    pub(crate) fn set_parent(&self, parent: Parent) {
        self.edge().parent = parent;
    }

    /// Changes what the parent holds and shares, all the way down.
    ///
    /// # Errors
    /// As for [`Child::attach`]; nothing has changed then.
    pub fn set_permissions(self: &Arc<Self>, permissions: Permissions) -> OpenResult {
        let mut update = PermissionUpdate::default();
        update.set(self, self.narrowed(permissions));
        update.apply()
    }

    /// What of these permissions the parent may have through this edge.
    pub(crate) fn narrowed(&self, permissions: Permissions) -> Permissions {
        match self.kind.only_read {
            true => Permissions { held: permissions.held & PermissionSet::CONSISTENT_READ, ..permissions },
            false => permissions,
        }
    }

    /// Writes down what the parent holds and shares, and tells nobody. Returns what it was.
    pub(crate) fn replace_permissions(&self, permissions: Permissions) -> Permissions {
        std::mem::replace(&mut self.edge().permissions, permissions)
    }

    /// Leads to another node from now on, and tells nobody. Drained. Returns the node before.
    pub(crate) fn replace_node(self: &Arc<Self>, node: Arc<Node>) -> Arc<Node> {
        node.add_user(self);
        let old = std::mem::replace(&mut self.edge().node, node);
        old.remove_user(self);
        old
    }

    fn edge(&self) -> MutexGuard<'_, Edge> {
        self.edge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the edge's half on one AioContext, whose thread calls this.
    ///
    /// # Errors
    /// The node is inactive, or the context lacks what its driver needs.
    pub fn channel(&self, context: &AioContext) -> OpenResult<Rc<ChildChannel>> {
        let node = self.node();
        if !node.is_active() {
            return Err(OpenError(format!("node \"{}\" is inactive", node.name())));
        }
        let (limits, options) = (node.limits(), node.options());
        Ok(Rc::new(ChildChannel {
            channel: node.driver().attach(context)?,
            transfer_max: limits.transfer_max(),
            iov_max: limits.iov_max(),
            bounce: shaping::BounceBudget::default(),
            zeroes: OnceCell::new(),
            limits,
            tracked: node.may_pad(),
            may_grow: self.kind.may_grow,
            read_only: node.is_read_only(),
            discards: options.discard,
            detect_zeroes: options.detect_zeroes,
            node,
        }))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let node = self.node();
        node.forget_dead_users();
        let mut update = PermissionUpdate::default();
        update.touch(&node);
        if let Err(error) = update.apply() {
            tracing::warn!("node \"{}\": permissions could not be given up: {error}", node.name());
        }
    }
}

/// An edge's half on one AioContext: the only way to a driver's channel. Rebuilt when limits or graph change.
pub struct ChildChannel {
    pub(crate) channel: Rc<dyn IoChannel>,
    pub(crate) node: Arc<Node>,
    pub(crate) limits: BlockLimits,
    /// As the limits say, worked out once.
    transfer_max: u64,
    iov_max: usize,
    pub(crate) bounce: shaping::BounceBudget,
    /// Zeroes to be written as data, made when first needed. Nobody writes to it.
    pub(crate) zeroes: OnceCell<AlignedBuffer>,
    /// Whether writes to the node may be padded, and so must keep out of each other's way.
    pub(crate) tracked: bool,
    may_grow: bool,
    read_only: bool,
    /// Copies of the node's options.
    discards: bool,
    detect_zeroes: DetectZeroes,
}

impl ChildChannel {
    /// The node's size in bytes, a multiple of 512.
    pub fn length(&self) -> u64 {
        self.node.length()
    }

    /// What the node can do.
    pub fn limits(&self) -> &BlockLimits {
        &self.limits
    }

    /// The node behind.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Reads `iov`'s length in bytes from `offset`.
    #[inline]
    pub fn preadv(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let bytes = iovec::total_len(iov);
        if let Err(error) = self.check_range(offset, bytes, self.may_grow) {
            return BlockFuture::ready(Err(error));
        }
        if bytes == 0 {
            return BlockFuture::ready(Ok(()));
        }
        if self.fits(offset, bytes, iov) {
            return self.channel.preadv(offset, iov);
        }
        self.read_shaped(offset, iov)
    }

    fn read_shaped(self: &Rc<Self>, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let (this, iov) = (self.clone(), iov.to_vec());
        BlockFuture::boxed(async move { shaping::read(&this, offset, &iov).await })
    }

    /// Writes `iov`'s length in bytes at `offset`.
    #[inline]
    pub fn pwritev(self: &Rc<Self>, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let bytes = iovec::total_len(iov);
        if let Err(error) = self.check_write(offset, bytes) {
            return BlockFuture::ready(Err(error));
        }
        if bytes == 0 {
            return BlockFuture::ready(Ok(()));
        }
        self.node.check_write_threshold(offset.saturating_add(bytes));
        if flags.compressed && !self.limits.can_compress {
            return BlockFuture::ready(Err(BlockError::NotSupported));
        }
        match self.detect_zeroes {
            DetectZeroes::Off => {}
            mode if iovec::is_zero(iov) => {
                let may_unmap = mode == DetectZeroes::Unmap && self.discards;
                return self.pwrite_zeroes(offset, bytes, WriteFlags { may_unmap, ..flags });
            }
            _ => {}
        }
        if !self.tracked && self.fits(offset, bytes, iov) {
            return self.channel.pwritev(offset, iov, flags);
        }
        self.write_shaped(offset, iov, flags)
    }

    fn write_shaped(self: &Rc<Self>, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        let (this, iov) = (self.clone(), iov.to_vec());
        BlockFuture::boxed(async move { shaping::write(&this, offset, &iov, flags).await })
    }

    /// Everything that completed before this is stable when it completes.
    pub fn flush(&self) -> BlockFuture {
        self.channel.flush()
    }

    /// Tells that the content of a range no longer matters. Succeeds without effect where the node does not discard.
    pub fn pdiscard(self: &Rc<Self>, offset: u64, bytes: u64) -> BlockFuture {
        if let Err(error) = self.check_write(offset, bytes) {
            return BlockFuture::ready(Err(error));
        }
        if bytes == 0 || !self.limits.can_discard || !self.discards {
            return BlockFuture::ready(Ok(()));
        }
        let this = self.clone();
        BlockFuture::boxed(async move { shaping::discard(&this, offset, bytes).await })
    }

    /// Makes a range read as zeroes, by writing them if nothing better is possible.
    pub fn pwrite_zeroes(self: &Rc<Self>, offset: u64, bytes: u64, mut flags: WriteFlags) -> BlockFuture {
        if let Err(error) = self.check_write(offset, bytes) {
            return BlockFuture::ready(Err(error));
        }
        if bytes == 0 {
            return BlockFuture::ready(Ok(()));
        }
        self.node.check_write_threshold(offset.saturating_add(bytes));
        // A node told to ignore discards keeps its space.
        flags.may_unmap &= self.discards;
        let this = self.clone();
        BlockFuture::boxed(async move { shaping::write_zeroes(&this, offset, bytes, flags).await })
    }

    /// What the `bytes` from `offset` on hold; cut at the end of the node.
    pub fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let bytes = bytes.min(self.length().saturating_sub(offset));
        if bytes == 0 {
            return Box::pin(std::future::ready(Err(BlockError::OutOfRange)));
        }
        self.channel.block_status(offset, bytes)
    }

    /// The same for as far as it holds: what the node tells piece by piece, put together.
    ///
    /// # Errors
    /// The range begins behind the end, or the node does not know.
    pub async fn extent(&self, offset: u64, bytes: u64) -> BlockResult<BlockStatus> {
        let mut whole = self.block_status(offset, bytes).await?;
        while whole.bytes < bytes && offset.saturating_add(whole.bytes) < self.length() {
            let next = self.block_status(offset + whole.bytes, bytes - whole.bytes).await?;
            if (next.zero, next.allocated) != (whole.zero, whole.allocated) {
                break;
            }
            whole.bytes += next.bytes;
        }
        Ok(whole)
    }

    /// Whether the node has the range, and takes a request of that kind.
    ///
    /// # Errors
    /// As the request would have.
    pub(crate) fn check(&self, kind: RequestKind, offset: u64, bytes: u64) -> BlockResult {
        match kind {
            RequestKind::Read => self.check_range(offset, bytes, self.may_grow),
            RequestKind::Write | RequestKind::Discard | RequestKind::WriteZeroes => self.check_write(offset, bytes),
            RequestKind::Flush => Ok(()),
        }
    }

    #[inline]
    fn check_write(&self, offset: u64, bytes: u64) -> BlockResult {
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        self.check_range(offset, bytes, self.may_grow)
    }

    #[inline]
    fn check_range(&self, offset: u64, bytes: u64, may_grow: bool) -> BlockResult {
        // A channel may outlive the activation it was made under.
        if !self.node.is_active() {
            return Err(BlockError::NoMedium);
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= self.length() || (may_grow && end <= i64::MAX as u64) => Ok(()),
            _ => Err(BlockError::OutOfRange),
        }
    }

    /// Whether the driver can take the request as it is.
    #[inline]
    fn fits(&self, offset: u64, bytes: u64, iov: &[IoVec]) -> bool {
        let limits = &self.limits;
        let align = u64::from(limits.request_alignment) - 1;
        let memory = limits.memory_alignment as usize;
        (offset | bytes) & align == 0
            && bytes <= self.transfer_max
            && iov.len() <= self.iov_max
            && (memory == 1 || iov.iter().all(|v| v.is_aligned(memory)))
    }
}
