//! Commands about requests that hang: which there are, failing those that can, and not waiting for them for ever.
//!
//! What the kernel or a block driver works on owns its memory until it ends; such a request can be told of, and nothing
//! more.

use std::sync::Arc;
use std::time::Duration;

use blockport_block::{BlockBackend, Drained, Node, RequestInfo, RequestKind, WaitsFor};

use super::super::dispatch::{Command, CommandResult, command};
use super::super::schema::{answer, arguments, choice};
use super::media;
use crate::daemon::{Daemon, Export};

/// This theme's table.
pub const COMMANDS: &[&dyn Command] =
    &[&command("x-blockport-query-requests", query_requests), &command("x-blockport-fail-requests", fail_requests)];

/// How long a command waits for the requests under way before it gives up and changes nothing.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Drains the backends above nodes once, to find out whether that can be done: what a command does next waits for the same,
/// without an end to it.
///
/// # Errors
/// Requests hang; the error says which.
pub fn settle(nodes: &[Arc<Node>]) -> CommandResult<()> {
    let mut backends: Vec<Arc<BlockBackend>> = Vec::new();
    for backend in nodes.iter().flat_map(|node| node.backends_above()) {
        if !backends.iter().any(|known| Arc::ptr_eq(known, &backend)) {
            backends.push(backend);
        }
    }
    Drained::within(DRAIN_TIME, backends)?;
    Ok(())
}

/// The same of all backends, which stay drained until what this returns is dropped.
///
/// # Errors
/// As for [`settle`].
pub fn drain_all(daemon: &Daemon) -> CommandResult<Drained> {
    Ok(Drained::within(DRAIN_TIME, daemon.graph.all_backends())?)
}

/// The same as [`settle`] of one backend.
///
/// # Errors
/// As for [`settle`].
pub fn settle_one(backend: &Arc<BlockBackend>) -> CommandResult<()> {
    Drained::within(DRAIN_TIME, vec![backend.clone()])?;
    Ok(())
}

choice! {
    /// What a request does.
    RequestOperation {
        "read" => Read,
        "write" => Write,
        "flush" => Flush,
        "discard" => Discard,
        "write-zeroes" => WriteZeroes,
    }
}

choice! {
    /// What a request waits for.
    RequestWaitsFor {
        /// The end of a drained section.
        "drain" => Drain,
        /// Its turn in a throttle group.
        "limit" => Limit,
        /// A block driver, and so the host.
        "host" => Host,
    }
}

answer! {
    /// A request under way.
    RequestUnderWay {
        "device" => device: String,
        "operation" => operation: RequestOperation,
        /// In bytes.
        "offset" => offset: u64,
        "bytes" => bytes: u64,
        "age-ms" => age_ms: u64,
        "waits-for" => waits_for: RequestWaitsFor,
    }
}

/// A request in the words of the wire.
pub fn told(device: &str, request: &RequestInfo) -> RequestUnderWay {
    RequestUnderWay {
        device: device.to_owned(),
        operation: match request.kind {
            RequestKind::Read => RequestOperation::Read,
            RequestKind::Write => RequestOperation::Write,
            RequestKind::Flush => RequestOperation::Flush,
            RequestKind::Discard => RequestOperation::Discard,
            RequestKind::WriteZeroes => RequestOperation::WriteZeroes,
        },
        offset: request.offset,
        bytes: request.bytes,
        age_ms: request.age_ns / 1_000_000,
        waits_for: match request.waits_for {
            WaitsFor::Drain => RequestWaitsFor::Drain,
            WaitsFor::Limit => RequestWaitsFor::Limit,
            WaitsFor::Host => RequestWaitsFor::Host,
        },
    }
}

arguments! {
    /// Whose requests are told.
    QueryRequests {
        /// Left out, those of all exports.
        "id" => id: Option<String>,
        /// Only those that are under way for so long, in milliseconds.
        "min-age-ms" => min_age_ms: Option<u64>,
    }
}

fn query_requests(daemon: &mut Daemon, arguments: QueryRequests) -> CommandResult<Vec<RequestUnderWay>> {
    let QueryRequests { id, min_age_ms } = arguments;
    let backends = match id {
        Some(id) => vec![media::find(daemon, &id)?],
        None => daemon.exports.iter().map(|export: &Export| export.backend().clone()).collect(),
    };
    let mut all = Vec::new();
    for backend in backends {
        all.extend(backend.requests()?.iter().map(|request| told(backend.label(), request)));
    }
    all.retain(|request| request.age_ms >= min_age_ms.unwrap_or(0));
    Ok(all)
}

arguments! {
    /// Whose requests are to fail.
    FailRequests {
        "id" => id: String,
    }
}

answer! {
    /// What became of the requests under way.
    FailedRequests {
        /// How many that waited fail now: for a drained section to end, or their turn in a throttle group. Those that a
        /// device keeps which has stopped over an error do as well, and are not counted.
        "failed" => failed: u64,
        /// How many the host works on. They end when it does.
        "left" => left: u64,
    }
}

fn fail_requests(daemon: &mut Daemon, arguments: FailRequests) -> CommandResult<FailedRequests> {
    let backend = media::find(daemon, &arguments.id)?;
    let (failed, left) = backend.give_requests_up()?;
    daemon.exports.give_kept_up(&arguments.id)?;
    Ok(FailedRequests { failed, left })
}
