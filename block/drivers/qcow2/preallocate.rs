//! Preallocate: clusters that are there before anything is written to them. It owns the modes and what each costs.

use std::rc::Rc;

use super::Qcow2;
use super::allocation::{Plan, WritePlan};
use super::channel::Channel;
use crate::aio::AioContext;
use crate::driver::WriteFlags;
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::iovec::AlignedBuffer;

/// What is allocated of a new disk, or of one that grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Clusters have their place in the image, which the host does not back yet.
    Metadata,
    /// The host reserves the space, too.
    Falloc,
    /// Zeroes are written.
    Full,
}

/// How many bytes of zeroes are written at a time.
const ZEROES_BYTES: u64 = 1 << 20;

impl Qcow2 {
    /// Gives every cluster from `start` to `end` on the disk, where there is none so far, its place.
    pub(super) fn preallocate(&self, start: u64, end: u64, mode: Preallocation) -> OpenResult {
        if self.has_backing {
            return Err(OpenError::new("clusters that are there before they are written would hide the backing file"));
        }
        let end = end.next_multiple_of(self.image.geometry.cluster_size());
        self.blocking(async move |channel| {
            let done = match channel.preallocate(start, end, mode).await {
                Ok(()) => channel.flush().await,
                error => error,
            };
            done.map_err(|e| OpenError(format!("the clusters cannot be allocated: {e}")))
        })
    }
}

impl Channel {
    async fn preallocate(self: &Rc<Self>, start: u64, end: u64, mode: Preallocation) -> BlockResult {
        let mut at = start;
        while mode != Preallocation::Off && at < end {
            let plan = match self.attempt(|state| state.plan_write(at, end - at, &self.pins)).await? {
                WritePlan::InPlace { bytes, .. } => {
                    at += bytes;
                    continue;
                }
                WritePlan::Allocate(plan) => plan,
            };
            let written = match self.fill(&plan, mode).await {
                Ok(()) => self.attempt(|state| state.link(&plan)).await,
                error => error,
            };
            if written.is_err()
                && let Some(span) = plan.taken
            {
                self.give_back(span).await;
            }
            self.end_allocation(plan.id);
            written?;
            at = plan.data_end;
            AioContext::breathe().await;
        }
        Ok(())
    }

    /// Has an allocation's clusters read as zeroes, at the price that `mode` names.
    async fn fill(&self, plan: &Plan, mode: Preallocation) -> BlockResult {
        let bytes = plan.end - plan.start;
        if plan.taken.is_some() {
            self.extend_file(plan.host + bytes).await;
        }
        match mode {
            Preallocation::Off => Ok(()),
            // Zeroes of the file would be noise, decrypted: they are written.
            _ if self.image.cipher.is_some() => self.write_out_zeroes(plan.host, bytes).await,
            // In a file of its own, the guest's data is where it has been.
            Preallocation::Metadata if plan.zeroed || plan.taken.is_none() => Ok(()),
            Preallocation::Metadata | Preallocation::Falloc => {
                self.data.pwrite_zeroes(plan.host, bytes, WriteFlags::default()).await
            }
            Preallocation::Full => self.write_out_zeroes(plan.host, bytes).await,
        }
    }

    async fn write_out_zeroes(&self, host: u64, bytes: u64) -> BlockResult {
        let zeroes = AlignedBuffer::new(bytes.min(ZEROES_BYTES) as usize, 4096);
        for at in (0..bytes).step_by(ZEROES_BYTES as usize) {
            let part = zeroes.iov().part(0, (bytes - at).min(ZEROES_BYTES) as usize);
            self.write_data(host + at, &[part], WriteFlags::default(), None).await?;
        }
        Ok(())
    }
}
