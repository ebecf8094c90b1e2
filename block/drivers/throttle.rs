//! The filter `throttle`: holds requests back as the limits of its throttle group say. Flushes always go. What has no
//! limit to wait for is passed on as it is; the group (`throttle.rs` of the block layer) knows who must wait.

use std::rc::Rc;
use std::sync::Arc;

use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::{Child, ChildChannel};
use crate::driver::{BlockDriver, BlockFuture, BlockStatus, BoxFuture, IoChannel, WriteFlags};
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::{self, IoVec};
use crate::limits::BlockLimits;
use crate::options::Options;
use crate::permissions::Permissions;
use crate::throttle::{Direction, ThrottleChannel, ThrottleMember};

pub(super) const ROW: DriverRow = DriverRow {
    name: "throttle",
    kind: DriverKind::Filter,
    summary: "a filter that limits operations and bytes per second",
    options: &[
        ("file", "the node that requests are passed on to"),
        (
            "throttle-group",
            "the object with the limits, which all nodes that name it share; see --object throttle-group",
        ),
    ],
    open,
};

struct Throttle {
    file: [Arc<Child>; 1],
    member: Arc<ThrottleMember>,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let name = options.require_str("throttle-group").map_err(OpenError::new)?;
    let Some(group) = context.throttle_groups().find(&name) else {
        let expected = "the id of an object throttle-group that was created before";
        return Err(OpenError::new(options.invalid("throttle-group", name, expected)));
    };
    let file = context.filtered_child(options, "file")?;
    Ok(Box::new(Throttle { file: [file], member: ThrottleMember::new(group) }))
}

impl BlockDriver for Throttle {
    fn limits(&self) -> BlockLimits {
        BlockLimits::of_filter(&self.file[0].node())
    }

    fn length(&self) -> u64 {
        self.file[0].node().length()
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.file
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        self.file[0].node().resize(bytes)
    }

    fn activate(&self) -> OpenResult {
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {
        self.member.exempt_begin();
    }

    fn drained_end(&self) {
        self.member.exempt_end();
    }

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let file = self.file[0].channel(context)?;
        Ok(Rc::new(Channel { file, throttle: ThrottleChannel::new(&self.member, context) }))
    }
}

struct Channel {
    file: Rc<ChildChannel>,
    throttle: ThrottleChannel,
}

impl Channel {
    /// Passes a request without data on when it may go.
    fn pass(&self, bytes: u64, go: impl FnOnce(&Rc<ChildChannel>) -> BlockFuture + 'static) -> BlockFuture {
        match self.throttle.admit(Direction::Write, bytes) {
            None => go(&self.file),
            Some(turn) => {
                let file = self.file.clone();
                BlockFuture::boxed(async move {
                    turn.await;
                    go(&file).await
                })
            }
        }
    }
}

impl IoChannel for Channel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        match self.throttle.admit(Direction::Read, iovec::total_len(iov)) {
            None => self.file.preadv(offset, iov),
            Some(turn) => {
                let (file, iov) = (self.file.clone(), iov.to_vec());
                BlockFuture::boxed(async move {
                    turn.await;
                    file.preadv(offset, &iov).await
                })
            }
        }
    }

    fn pwritev(&self, offset: u64, iov: &[IoVec], flags: WriteFlags) -> BlockFuture {
        match self.throttle.admit(Direction::Write, iovec::total_len(iov)) {
            None => self.file.pwritev(offset, iov, flags),
            Some(turn) => {
                let (file, iov) = (self.file.clone(), iov.to_vec());
                BlockFuture::boxed(async move {
                    turn.await;
                    file.pwritev(offset, &iov, flags).await
                })
            }
        }
    }

    fn flush(&self) -> BlockFuture {
        self.file.flush()
    }

    fn pdiscard(&self, offset: u64, bytes: u64) -> BlockFuture {
        self.pass(bytes, move |file| file.pdiscard(offset, bytes))
    }

    fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> BlockFuture {
        self.pass(bytes, move |file| file.pwrite_zeroes(offset, bytes, flags))
    }

    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        self.file.block_status(offset, bytes)
    }
}
