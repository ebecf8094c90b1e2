//! Commands about what has been done so far.

use std::sync::Arc;

use blockport_block::{BlockBackend, LatencyHistogram, Node, RequestKind, Statistics};

use super::super::dispatch::{Command, CommandResult, command, query};
use super::super::schema::{Done, answer, arguments};
use super::media;
use crate::daemon::{Daemon, Export, ExportQueue};

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &query("query-blockstats", query_blockstats),
    &query("x-blockport-query-queues", query_queues),
    &command("block-latency-histogram-set", block_latency_histogram_set),
];

answer! {
    /// Counts since the start. Write-zeroes count as writes, discards as unmap.
    BlockDeviceStats {
        "rd_bytes" => rd_bytes: u64,
        "wr_bytes" => wr_bytes: u64,
        "unmap_bytes" => unmap_bytes: u64,
        "zone_append_bytes" => zone_append_bytes: u64,
        "rd_operations" => rd_operations: u64,
        "wr_operations" => wr_operations: u64,
        "unmap_operations" => unmap_operations: u64,
        "flush_operations" => flush_operations: u64,
        "zone_append_operations" => zone_append_operations: u64,
        "rd_total_time_ns" => rd_total_time_ns: u64,
        "wr_total_time_ns" => wr_total_time_ns: u64,
        "unmap_total_time_ns" => unmap_total_time_ns: u64,
        "flush_total_time_ns" => flush_total_time_ns: u64,
        "zone_append_total_time_ns" => zone_append_total_time_ns: u64,
        "wr_highest_offset" => wr_highest_offset: u64,
        "rd_merged" => rd_merged: u64,
        "wr_merged" => wr_merged: u64,
        "unmap_merged" => unmap_merged: u64,
        "zone_append_merged" => zone_append_merged: u64,
        "failed_rd_operations" => failed_rd_operations: u64,
        "failed_wr_operations" => failed_wr_operations: u64,
        "failed_unmap_operations" => failed_unmap_operations: u64,
        "failed_flush_operations" => failed_flush_operations: u64,
        "failed_zone_append_operations" => failed_zone_append_operations: u64,
        "invalid_rd_operations" => invalid_rd_operations: u64,
        "invalid_wr_operations" => invalid_wr_operations: u64,
        "invalid_unmap_operations" => invalid_unmap_operations: u64,
        "invalid_flush_operations" => invalid_flush_operations: u64,
        "invalid_zone_append_operations" => invalid_zone_append_operations: u64,
        "account_invalid" => account_invalid: bool,
        "account_failed" => account_failed: bool,
        "timed_stats" => timed_stats: Vec<BlockDeviceTimedStats>,
        /// Since the last request was completed.
        "idle_time_ns" => idle_time_ns: Option<u64>,
        "rd_latency_histogram" => rd_latency_histogram: Option<BlockLatencyHistogramInfo>,
        "wr_latency_histogram" => wr_latency_histogram: Option<BlockLatencyHistogramInfo>,
        "unmap_latency_histogram" => unmap_latency_histogram: Option<BlockLatencyHistogramInfo>,
        "flush_latency_histogram" => flush_latency_histogram: Option<BlockLatencyHistogramInfo>,
        /// Under way at this moment.
        "x-blockport-in-flight" => in_flight: u64,
    }
}

answer! {
    /// How many requests took how long.
    BlockLatencyHistogramInfo {
        /// In nanoseconds, rising.
        "boundaries" => boundaries: Vec<u64>,
        /// One more than boundaries.
        "bins" => bins: Vec<u64>,
    }
}

answer! {
    /// Averages over an interval, in seconds; there are none.
    BlockDeviceTimedStats {
        "interval_length" => interval_length: u64,
    }
}

answer! {
    /// The counts of a device or a node.
    BlockStats {
        "device" => device: Option<String>,
        "qdev" => qdev: Option<String>,
        "node-name" => node_name: Option<String>,
        "stats" => stats: BlockDeviceStats,
    }
}

arguments! {
    /// Whose counts are told.
    QueryBlockStats {
        /// Those of nodes rather than devices. Requests are counted where devices make them: those of nodes are 0.
        "query-nodes" => query_nodes: Option<bool>,
    }
}

fn query_blockstats(daemon: &mut Daemon, arguments: QueryBlockStats) -> CommandResult<Vec<BlockStats>> {
    if arguments.query_nodes == Some(true) {
        let of = |node: &Arc<Node>| BlockStats {
            device: None,
            qdev: None,
            node_name: Some(node.name().to_owned()),
            stats: stats(&Statistics::default(), None),
        };
        return Ok(daemon.graph.all_nodes().iter().map(of).collect());
    }
    let of = |export: &Export| {
        let backend: &Arc<BlockBackend> = export.backend();
        BlockStats {
            device: Some(export.id().to_owned()),
            qdev: Some(export.id().to_owned()),
            node_name: backend.root().map(|node| node.name().to_owned()),
            stats: stats(&backend.statistics(), Some(backend)),
        }
    };
    Ok(daemon.exports.iter().map(of).collect())
}

/// The counts, and of a device what else there is to tell.
fn stats(counts: &Statistics, device: Option<&Arc<BlockBackend>>) -> BlockDeviceStats {
    let histogram = |kind| {
        let LatencyHistogram { boundaries, bins, .. } = device?.latency_histogram(kind)?;
        Some(BlockLatencyHistogramInfo { boundaries, bins })
    };
    let writes = histogram(RequestKind::Write).map(|mut writes| {
        let zeroes = histogram(RequestKind::WriteZeroes).into_iter().flat_map(|zeroes| zeroes.bins);
        writes.bins.iter_mut().zip(zeroes).for_each(|(bin, more)| *bin += more);
        writes
    });
    let [read, write, flush, unmap, zeroes] =
        [RequestKind::Read, RequestKind::Write, RequestKind::Flush, RequestKind::Discard, RequestKind::WriteZeroes]
            .map(|kind| counts.of(kind));
    BlockDeviceStats {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes + zeroes.bytes,
        unmap_bytes: unmap.bytes,
        zone_append_bytes: 0,
        rd_operations: read.operations,
        wr_operations: write.operations + zeroes.operations,
        unmap_operations: unmap.operations,
        flush_operations: flush.operations,
        zone_append_operations: 0,
        rd_total_time_ns: read.total_time_ns,
        wr_total_time_ns: write.total_time_ns + zeroes.total_time_ns,
        unmap_total_time_ns: unmap.total_time_ns,
        flush_total_time_ns: flush.total_time_ns,
        zone_append_total_time_ns: 0,
        wr_highest_offset: 0,
        rd_merged: read.merged,
        wr_merged: write.merged,
        unmap_merged: 0,
        zone_append_merged: 0,
        failed_rd_operations: read.failed,
        failed_wr_operations: write.failed + zeroes.failed,
        failed_unmap_operations: unmap.failed,
        failed_flush_operations: flush.failed,
        failed_zone_append_operations: 0,
        invalid_rd_operations: read.invalid,
        invalid_wr_operations: write.invalid + zeroes.invalid,
        invalid_unmap_operations: unmap.invalid,
        invalid_flush_operations: flush.invalid,
        invalid_zone_append_operations: 0,
        account_invalid: device.is_some(),
        account_failed: device.is_some(),
        timed_stats: Vec::new(),
        idle_time_ns: device.and_then(|device| device.idle_time_ns()),
        rd_latency_histogram: histogram(RequestKind::Read),
        wr_latency_histogram: writes,
        unmap_latency_histogram: histogram(RequestKind::Discard),
        flush_latency_histogram: histogram(RequestKind::Flush),
        in_flight: device.map_or(0, |device| device.in_flight()),
    }
}

arguments! {
    /// Whose queues are told.
    QueryQueues {
        /// Left out, those of all exports.
        "id" => id: Option<String>,
    }
}

answer! {
    /// A queue of an export. Counts are over all its starts.
    QueueInfo {
        "device" => device: String,
        "queue" => queue: u64,
        "iothread" => iothread: String,
        /// The entries of its ring; 0 while it is not started.
        "size" => size: u64,
        /// Requests taken and not yet returned.
        "in-flight" => in_flight: u64,
        "requests" => requests: u64,
        /// Looks at the ring that found requests.
        "batches" => batches: u64,
        /// Of these, those without a kick.
        "polled-batches" => polled_batches: u64,
        "kicks" => kicks: u64,
        "calls" => calls: u64,
    }
}

fn query_queues(daemon: &mut Daemon, arguments: QueryQueues) -> CommandResult<Vec<QueueInfo>> {
    if let Some(id) = &arguments.id {
        media::find(daemon, id)?;
    }
    let asked = |export: &&Export| arguments.id.as_ref().is_none_or(|id| export.id() == id);
    let of = |export: &Export| {
        let info = |ExportQueue { index, iothread, figures }: ExportQueue<'_>| QueueInfo {
            device: export.id().to_owned(),
            queue: index as u64,
            iothread: iothread.to_owned(),
            size: figures.size.into(),
            in_flight: figures.in_flight,
            requests: figures.requests,
            batches: figures.batches,
            polled_batches: figures.polled_batches(),
            kicks: figures.kicks,
            calls: figures.calls,
        };
        export.queues().into_iter().map(info).collect::<Vec<_>>()
    };
    Ok(daemon.exports.iter().filter(asked).flat_map(of).collect())
}

arguments! {
    /// The boundaries, in nanoseconds, between which requests are counted by how long they took. Without any, no longer.
    LatencyHistogramSet {
        "id" => id: String,
        /// Of all kinds that have none of their own.
        "boundaries" => boundaries: Option<Vec<u64>>,
        "boundaries-read" => read: Option<Vec<u64>>,
        "boundaries-write" => write: Option<Vec<u64>>,
        "boundaries-unmap" => unmap: Option<Vec<u64>>,
        "boundaries-flush" => flush: Option<Vec<u64>>,
    }
}

fn block_latency_histogram_set(daemon: &mut Daemon, arguments: LatencyHistogramSet) -> CommandResult<Done> {
    let LatencyHistogramSet { id, boundaries, read, write, unmap, flush } = arguments;
    let backend = media::find(daemon, &id)?;
    let lifts = [&boundaries, &read, &write, &unmap, &flush].iter().all(|given| given.is_none());
    let wanted = [
        (RequestKind::Read, &read),
        (RequestKind::Write, &write),
        (RequestKind::WriteZeroes, &write),
        (RequestKind::Discard, &unmap),
        (RequestKind::Flush, &flush),
    ];
    let wanted = wanted.map(|(kind, own)| (kind, own.as_deref().or(boundaries.as_deref())));
    let set = |backend: &BlockBackend| {
        let mut changed = wanted.iter().filter(|(_, boundaries)| lifts || boundaries.is_some());
        changed.try_for_each(|(kind, boundaries)| backend.set_latency_histogram(*kind, *boundaries))
    };
    // All are tried on a drive of nobody's first, so that one that is wrong changes nothing.
    set(&BlockBackend::new(&id))?;
    set(&backend)?;
    Ok(Done {})
}
