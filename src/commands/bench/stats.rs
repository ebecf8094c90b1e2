//! What one queue measured: counts, latencies, the longest gap. It owns no clock and no policy; times come in as
//! nanoseconds since the start of the run.

use super::histogram::Histogram;
use super::workload::Op;

/// The first request that failed, for the report.
#[derive(Clone, Debug)]
pub struct FirstError {
    pub op: Op,
    /// Offset in bytes.
    pub offset: u64,
    /// The cause, as the device's status byte tells it.
    pub errno: i32,
}

/// What one queue measured.
#[derive(Clone)]
pub struct Stats {
    /// Successful requests.
    pub reads: u64,
    pub writes: u64,
    pub errors: u64,
    pub first_error: Option<FirstError>,
    /// Latencies of successful requests.
    pub latency: Histogram,
    /// The longest time without a completion, in ns.
    pub gap_ns_max: u64,
    /// Times the daemon was told of new requests.
    pub kicks: u64,
    /// Times the client slept and was woken.
    pub wakeups: u64,
    /// When measuring began and when the last completion was counted, in ns since the start of the run.
    pub begin_ns: u64,
    pub end_ns: u64,
}

impl Stats {
    /// Nothing counted yet, from `begin_ns` on.
    pub fn new(begin_ns: u64) -> Self {
        Self {
            reads: 0,
            writes: 0,
            errors: 0,
            first_error: None,
            latency: Histogram::new(),
            gap_ns_max: 0,
            kicks: 0,
            wakeups: 0,
            begin_ns,
            end_ns: begin_ns,
        }
    }

    /// A batch of completions was seen at `now_ns`.
    pub fn batch(&mut self, now_ns: u64) {
        self.gap_ns_max = self.gap_ns_max.max(now_ns.saturating_sub(self.end_ns));
        self.end_ns = now_ns;
    }

    /// One request of the batch; `errno` is 0 or what went wrong.
    pub fn request(&mut self, op: Op, offset: u64, errno: i32, latency_ns: u64) {
        if errno != 0 {
            self.errors += 1;
            self.first_error.get_or_insert(FirstError { op, offset, errno });
            return;
        }
        match op {
            Op::Read => self.reads += 1,
            Op::Write => self.writes += 1,
        }
        self.latency.record(latency_ns);
    }

    /// Adds another queue's. The gap stays that of the worst queue.
    pub fn merge(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.errors += other.errors;
        if self.first_error.is_none() {
            self.first_error.clone_from(&other.first_error);
        }
        self.latency.merge(&other.latency);
        self.gap_ns_max = self.gap_ns_max.max(other.gap_ns_max);
        self.kicks += other.kicks;
        self.wakeups += other.wakeups;
        self.begin_ns = self.begin_ns.min(other.begin_ns);
        self.end_ns = self.end_ns.max(other.end_ns);
    }

    /// Requests that were completed, failed ones included.
    pub fn completed(&self) -> u64 {
        self.reads + self.writes + self.errors
    }
}
