//! Statistics of a BlockBackend: what its iothreads have counted, summed, and the histograms that the user has set.

use std::sync::Arc;

use super::{BlockBackend, lock};
use crate::accounting::{Histogram, LatencyHistogram, RequestKind, Statistics, check_boundaries};
use crate::aio;
use crate::error::OpenResult;

impl BlockBackend {
    /// What has been done so far, summed over all iothreads.
    pub fn statistics(&self) -> Statistics {
        let before = *lock(&self.statistics_before);
        lock(&self.channels).iter().fold(before, |sum, channel| sum + channel.accounting.read())
    }

    /// Counts on from what another process has done for this device.
    pub fn count_on(&self, before: Statistics) {
        *lock(&self.statistics_before) = before;
    }

    /// Requests under way, those that wait for a limit or the end of a drained section included.
    pub fn in_flight(&self) -> u64 {
        lock(&self.channels).iter().map(|channel| channel.accounting.under_way()).sum()
    }

    /// Nanoseconds since the last request was completed; `None` before the first.
    pub fn idle_time_ns(&self) -> Option<u64> {
        let last =
            lock(&self.channels).iter().map(|channel| channel.accounting.last_ns()).max().filter(|last| *last > 0);
        last.map(|last| aio::nanoseconds().saturating_sub(last))
    }

    /// Counts how long requests of a kind take from now on, in intervals with these boundaries in nanoseconds; begins
    /// anew if that was done already. `None`: no longer. Control side.
    ///
    /// # Errors
    /// The boundaries do not rise, or there are none or too many; nothing has changed.
    pub fn set_latency_histogram(&self, kind: RequestKind, boundaries: Option<&[u64]>) -> OpenResult {
        boundaries.map(check_boundaries).transpose()?;
        let boundaries: Option<Arc<[u64]>> = boundaries.map(Arc::from);
        let channels = lock(&self.channels);
        lock(&self.histograms)[kind as usize] = boundaries.clone();
        for channel in channels.iter() {
            channel.accounting.set_histogram(kind, boundaries.as_ref().map(Histogram::new));
        }
        drop(channels);
        self.each_channel(|_, channel| channel.take_histograms());
        Ok(())
    }

    /// How long requests of a kind took; `None` where that is not counted.
    pub fn latency_histogram(&self, kind: RequestKind) -> Option<LatencyHistogram> {
        let boundaries = lock(&self.histograms)[kind as usize].clone()?;
        let sum = Histogram::new(&boundaries).read();
        let channels = lock(&self.channels);
        let parts = channels.iter().filter_map(|channel| channel.accounting.histogram(kind));
        Some(parts.fold(sum, |sum, part| sum.and(&part.read())))
    }
}
