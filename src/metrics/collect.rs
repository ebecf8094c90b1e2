//! Which figures there are: from what exports, queues and iothreads have counted to families of Prometheus.
//!
//! It reads counters that others write while they work, and makes nobody wait.

use blockport_block::{BlockBackend, IoStatus, KindStatistics, LatencyHistogram, RequestKind};
use blockport_vhost::QueueFigures;

use super::exposition::{Distribution, Exposition, Family, Kind};
use crate::daemon::{Daemon, Export};

/// The kinds of request, as they are labelled.
const OPERATIONS: [(&str, RequestKind); 5] = [
    ("read", RequestKind::Read),
    ("write", RequestKind::Write),
    ("flush", RequestKind::Flush),
    ("discard", RequestKind::Discard),
    ("write_zeroes", RequestKind::WriteZeroes),
];

const NANOSECONDS: f64 = 1e9;

/// The page as it is now.
pub fn page(daemon: &Daemon) -> String {
    let mut page = Exposition::default();
    page.family(Kind::Gauge, "blockport_build_info", "Which version runs; always 1.", |family| {
        family.add(&[("version", env!("CARGO_PKG_VERSION"))], 1_u64);
    });
    let exports: Vec<&Export> = daemon.exports.iter().collect();
    states(&mut page, &exports);
    operations(&mut page, &exports);
    queues(&mut page, &exports);
    iothreads(&mut page, daemon);
    page.into_text()
}

fn states(page: &mut Exposition, exports: &[&Export]) {
    let mut gauge = |name, help: &str, value: fn(&Export) -> Option<f64>| {
        page.family(Kind::Gauge, name, help, |family| {
            for export in exports {
                if let Some(value) = value(export) {
                    family.add(&[("export", export.id())], value);
                }
            }
        });
    };
    gauge("blockport_export_connected", "Whether a front-end is connected.", |export| {
        Some(f64::from(u8::from(export.is_connected())))
    });
    gauge("blockport_export_stopped", "Whether it has stopped over an error and keeps requests.", |export| {
        Some(f64::from(u8::from(export.is_stopped())))
    });
    gauge("blockport_export_size_bytes", "The size of the medium; 0 without one.", |export| {
        Some(export.backend().root().map_or(0, |node| node.length()) as f64)
    });
    gauge("blockport_export_in_flight", "Requests under way, those that wait for a limit included.", |export| {
        Some(export.backend().in_flight() as f64)
    });
    gauge("blockport_export_idle_seconds", "Since the last request was completed; left out before.", |export| {
        export.backend().idle_time_ns().map(|idle| idle as f64 / NANOSECONDS)
    });
    page.family(Kind::Gauge, "blockport_export_info", "The node of the medium, if there is one; always 1.", |family| {
        for export in exports {
            if let Some(node) = export.backend().root() {
                let labels = [("export", export.id()), ("node", node.name()), ("driver", node.driver_name())];
                family.add(&labels, 1_u64);
            }
        }
    });
    page.family(Kind::Gauge, "blockport_export_iostatus", "1 at what the last error has left behind.", |family| {
        for export in exports {
            let now = export.backend().iostatus();
            for (name, status) in [("ok", IoStatus::Ok), ("failed", IoStatus::Failed), ("nospace", IoStatus::NoSpace)] {
                family.add(&[("export", export.id()), ("status", name)], now == status);
            }
        }
    });
}

fn operations(page: &mut Exposition, exports: &[&Export]) {
    let mut counter = |name, help: &str, value: &dyn Fn(KindStatistics) -> super::exposition::Number| {
        page.family(Kind::Counter, name, help, |family| {
            for export in exports {
                let statistics = export.backend().statistics();
                for (operation, kind) in OPERATIONS {
                    let labels = [("export", export.id()), ("operation", operation)];
                    family.add(&labels, value(statistics.of(kind)));
                }
            }
        });
    };
    counter("blockport_operations_total", "Operations that succeeded.", &|of| of.operations.into());
    counter("blockport_bytes_total", "Bytes of the operations that succeeded.", &|of| of.bytes.into());
    counter("blockport_errors_total", "Operations that failed on the host.", &|of| of.failed.into());
    counter("blockport_invalid_total", "Requests that were refused, as they were wrong.", &|of| of.invalid.into());
    counter("blockport_operation_seconds_total", "How long the operations that succeeded took together.", &|of| {
        (of.total_time_ns as f64 / NANOSECONDS).into()
    });
    page.histograms("blockport_latency_seconds", "How long operations took, from ring to ring.", |family| {
        for export in exports {
            for (operation, kind) in OPERATIONS {
                if let Some(latency) = latency(export.backend(), kind) {
                    family.add(&[("export", export.id()), ("operation", operation)], &latency);
                }
            }
        }
    });
}

/// An interval here ends before its boundary, and a bucket of Prometheus with it: a nanosecond apart.
fn latency(backend: &BlockBackend, kind: RequestKind) -> Option<Distribution> {
    let LatencyHistogram { boundaries, bins, sum_ns } = backend.latency_histogram(kind)?;
    let buckets = boundaries.iter().zip(&bins).map(|(boundary, count)| (*boundary as f64 / NANOSECONDS, *count));
    let above = bins.last().copied().unwrap_or(0);
    Some(Distribution { buckets: buckets.collect(), above, sum: sum_ns as f64 / NANOSECONDS })
}

fn queues(page: &mut Exposition, exports: &[&Export]) {
    let mut family = |kind, name, help: &str, value: fn(&QueueFigures) -> u64| {
        page.family(kind, name, help, |family| {
            for export in exports {
                of_queues(family, export, value);
            }
        });
    };
    family(Kind::Counter, "blockport_queue_requests_total", "Requests taken out of the ring.", |of| of.requests);
    family(Kind::Counter, "blockport_queue_batches_total", "Looks at the ring that found some.", |of| of.batches);
    family(Kind::Counter, "blockport_queue_polled_batches_total", "Of these, those without a kick.", |of| {
        of.polled_batches()
    });
    family(Kind::Counter, "blockport_queue_kicks_total", "Kicks by the guest.", |of| of.kicks);
    family(Kind::Counter, "blockport_queue_calls_total", "Calls to the guest.", |of| of.calls);
    family(Kind::Gauge, "blockport_queue_depth", "Requests taken and not yet returned.", |of| of.in_flight);
    family(Kind::Gauge, "blockport_queue_size", "Entries of the ring; 0 while it is not started.", |of| of.size.into());
}

/// Those queues that are in use, or were: an export may have many that no front-end ever starts.
fn of_queues(family: &mut Family<'_>, export: &Export, value: fn(&QueueFigures) -> u64) {
    for queue in export.queues().iter().filter(|queue| queue.figures.size > 0 || queue.figures.requests > 0) {
        let index = queue.index.to_string();
        let labels = [("export", export.id()), ("queue", &index), ("iothread", queue.iothread)];
        family.add(&labels, value(&queue.figures));
    }
}

fn iothreads(page: &mut Exposition, daemon: &Daemon) {
    let figures: Vec<_> =
        daemon.objects.iothreads().map(|object| (object.config().id.as_str(), object.figures())).collect();
    page.family(Kind::Counter, "blockport_iothread_polls_total", "Spins before a sleep, by their result.", |family| {
        for (id, figures) in &figures {
            family.add(&[("iothread", id), ("result", "caught")], figures.polls_caught);
            family.add(&[("iothread", id), ("result", "in_vain")], figures.polls_in_vain);
        }
    });
    page.family(Kind::Counter, "blockport_iothread_sleeps_total", "Waits in the kernel.", |family| {
        for (id, figures) in &figures {
            family.add(&[("iothread", id)], figures.sleeps);
        }
    });
}
