//! Requests that wait for their end, for the control side, tools and tests. An iothread has no use for them: it would wait
//! for itself.

use std::rc::Rc;
use std::sync::Arc;

use super::{BackendChannel, BlockBackend};
use crate::aio::{AioRemote, Answer, is_iothread};
use crate::driver::BoxFuture;
use crate::error::{BlockError, BlockResult};
use crate::iovec::AlignedBuffer;

/// Buffers are aligned so that nothing need be copied once more.
const ALIGNMENT: usize = 4096;

impl BlockBackend {
    /// Reads `into`'s length in bytes from `offset`, on the backend's AioContext, or on any that has used it.
    ///
    /// # Errors
    /// The read failed, or no iothread has ever used the backend.
    ///
    /// # Panics
    /// On an iothread.
    pub fn read_blocking(self: &Arc<Self>, offset: u64, into: &mut [u8]) -> BlockResult {
        let bytes = into.len();
        let read = self.on_channel(move |channel| {
            Box::pin(async move {
                let buffer = AlignedBuffer::new(bytes, ALIGNMENT);
                channel.preadv(offset, &[buffer.iov()]).await.map(|()| buffer)
            })
        });
        let buffer = read.ok_or(BlockError::Invalid("no iothread uses the backend"))??;
        into.copy_from_slice(&buffer.to_vec());
        Ok(())
    }

    /// Writes `data` at `offset`, in the same way.
    ///
    /// # Errors
    /// The write failed, or no iothread has ever used the backend.
    ///
    /// # Panics
    /// On an iothread.
    pub fn write_blocking(self: &Arc<Self>, offset: u64, data: &[u8]) -> BlockResult {
        let mut buffer = AlignedBuffer::new(data.len(), ALIGNMENT);
        buffer.fill_from(data);
        let written =
            self.on_channel(move |channel| Box::pin(async move { channel.pwritev(offset, &[buffer.iov()]).await }));
        written.ok_or(BlockError::Invalid("no iothread uses the backend"))?
    }

    /// Makes everything written so far stable, whether or not a queue is started.
    ///
    /// # Errors
    /// The flush failed. Without an iothread that ever used the backend, nothing was written and there is nothing to do.
    ///
    /// # Panics
    /// On an iothread.
    pub fn flush_blocking(self: &Arc<Self>) -> BlockResult {
        // An inactive medium was flushed when it became that.
        if self.root().is_some_and(|node| !node.is_active()) {
            return Ok(());
        }
        let flushed = self.on_channel(|channel| Box::pin(async move { channel.flush().await }));
        // The iothread may have ended, and with it everything that could have been written.
        flushed.unwrap_or(Ok(()))
    }

    /// Does something with a channel on its own thread; `None` where there is no such thread.
    fn on_channel<T: Send + 'static>(
        self: &Arc<Self>,
        run: impl FnOnce(Rc<BackendChannel>) -> BoxFuture<BlockResult<T>> + Send + 'static,
    ) -> Option<BlockResult<T>> {
        assert!(!is_iothread(), "an iothread would wait for itself");
        let remote: AioRemote = self.aio_context().or_else(|| self.remotes().into_iter().next())?;
        let backend = self.clone();
        remote.call(move |context, answer: Answer<BlockResult<T>>| match backend.channel(context) {
            Ok(channel) => {
                let future = run(channel);
                context.spawn(async move { answer.give(future.await) });
            }
            Err(error) => {
                tracing::error!("\"{}\": {error}", backend.label());
                answer.give(Err(BlockError::Host(libc::EIO)));
            }
        })
    }
}
