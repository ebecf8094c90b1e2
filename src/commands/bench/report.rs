//! What a run reports: the JSON fields, which are stable, and the text for people. It measures nothing.

use std::fmt::{self, Display};
use std::path::Path;

use serde::Serialize;

use super::client::DiskInfo;
use super::plan::Plan;
use super::session::Outcome;

/// The report; with `--json` one object with these fields. Names end in the unit; fields are added, never renamed.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The socket measured.
    pub socket: String,
    /// The disk's size.
    pub disk_size_bytes: u64,
    /// The disk's logical block size.
    pub disk_block_size_bytes: u32,
    /// Access pattern: read, write, randread, randwrite, randrw.
    pub rw: &'static str,
    /// Share of reads in randrw.
    pub rwmixread_percent: u8,
    /// Size of a request.
    pub block_size_bytes: u64,
    /// Requests kept in flight on each queue.
    pub iodepth: u16,
    /// Queues driven, each by a thread.
    pub queues: u16,
    /// Descriptors of a ring.
    pub ring_size: u16,
    /// Layout of a ring: split, packed.
    pub ring: &'static str,
    /// How the client waits: poll, sleep, once.
    pub wait: &'static str,
    /// The seed; the same one gives the same accesses.
    pub seed: u64,
    /// Measured time, from the end of the ramp to the last completion counted.
    pub elapsed_ns: u64,
    /// Completed requests in that time, failed ones included.
    pub requests: u64,
    /// Of these, successful reads.
    pub requests_read: u64,
    /// Of these, successful writes.
    pub requests_write: u64,
    /// Of these, failed ones; and failed ones of the read-back.
    pub errors: u64,
    /// Successful requests a second.
    pub iops: f64,
    /// Bytes moved a second.
    pub bandwidth_bytes_per_s: f64,
    /// Latency of successful requests: from the batch that submitted one to the batch that took its completion.
    pub latency_ns_min: u64,
    pub latency_ns_mean: u64,
    /// Percentiles are at most 1.6 % too high; minimum and maximum are exact.
    pub latency_ns_p50: u64,
    pub latency_ns_p90: u64,
    pub latency_ns_p99: u64,
    pub latency_ns_p99_9: u64,
    pub latency_ns_max: u64,
    /// The longest time that a queue saw no completion.
    pub gap_ns_max: u64,
    /// Times the client told the daemon of new requests (eventfd writes).
    pub kicks: u64,
    /// Times the client slept.
    pub wakeups: u64,
    /// The daemon's CPU time over the measured time, its io_uring workers included; null without --daemon-pid.
    pub daemon_cpu_ns: Option<u64>,
    /// The same for each completed request.
    pub daemon_cpu_ns_per_request: Option<f64>,
    /// Of that, the part in user space and the part in the kernel, divided as the kernel's clock ticks found them.
    pub daemon_cpu_user_ns_per_request: Option<f64>,
    pub daemon_cpu_system_ns_per_request: Option<f64>,
    /// Blocks that --verify wrote; null without it, as the next two.
    pub verify_blocks_written: Option<u64>,
    /// Comparisons made, during the load and reading back.
    pub verify_blocks_checked: Option<u64>,
    /// Blocks that did not contain what was written.
    pub verify_mismatches: Option<u64>,
    /// The first of them (at most ten a queue), as text.
    pub verify_details: Vec<String>,
    /// The first request that failed, as text.
    pub first_error: Option<String>,
}

impl Report {
    /// Gathers what there is to say.
    pub fn new(socket: &Path, disk: &DiskInfo, plan: &Plan, outcome: &Outcome) -> Self {
        let stats = &outcome.stats;
        let latency = &stats.latency;
        let elapsed_ns = stats.end_ns.saturating_sub(stats.begin_ns);
        let completed = stats.completed();
        let succeeded = (stats.reads + stats.writes) as f64;
        let iops = if elapsed_ns == 0 { 0.0 } else { succeeded * 1e9 / elapsed_ns as f64 };
        let verify = outcome.verify.as_ref();
        let cpu_each =
            outcome.daemon_cpu.filter(|_| completed > 0).map(|cpu| (cpu.ns as f64 / completed as f64, cpu.user_share));
        Self {
            socket: socket.display().to_string(),
            disk_size_bytes: disk.size,
            disk_block_size_bytes: disk.block_size,
            rw: plan.rw.name(),
            rwmixread_percent: plan.read_percent,
            block_size_bytes: plan.block_size,
            iodepth: plan.depth,
            queues: plan.queues,
            ring_size: plan.ring_size,
            ring: if plan.packed { "packed" } else { "split" },
            wait: plan.wait.name(),
            seed: plan.seed,
            elapsed_ns,
            requests: completed,
            requests_read: stats.reads,
            requests_write: stats.writes,
            errors: stats.errors,
            iops,
            bandwidth_bytes_per_s: iops * plan.block_size as f64,
            latency_ns_min: latency.min(),
            latency_ns_mean: latency.mean(),
            latency_ns_p50: latency.percentile(0.5),
            latency_ns_p90: latency.percentile(0.9),
            latency_ns_p99: latency.percentile(0.99),
            latency_ns_p99_9: latency.percentile(0.999),
            latency_ns_max: latency.max(),
            gap_ns_max: stats.gap_ns_max,
            kicks: stats.kicks,
            wakeups: stats.wakeups,
            daemon_cpu_ns: outcome.daemon_cpu.map(|cpu| cpu.ns),
            daemon_cpu_ns_per_request: cpu_each.map(|(ns, _)| ns),
            daemon_cpu_user_ns_per_request: cpu_each.map(|(ns, user)| ns * user),
            daemon_cpu_system_ns_per_request: cpu_each.map(|(ns, user)| ns * (1.0 - user)),
            verify_blocks_written: verify.map(|v| v.blocks_written),
            verify_blocks_checked: verify.map(|v| v.blocks_checked),
            verify_mismatches: verify.map(|v| v.mismatches),
            verify_details: verify.map(|v| v.details.iter().map(ToString::to_string).collect()).unwrap_or_default(),
            first_error: stats.first_error.as_ref().map(|e| {
                let cause = match e.errno {
                    libc::EIO => "VIRTIO_BLK_S_IOERR",
                    libc::ENOTSUP => "VIRTIO_BLK_S_UNSUPP",
                    _ => "an unknown status",
                };
                format!("{:?} at offset {}: {cause}", e.op, e.offset).to_lowercase()
            }),
        }
    }

    /// Why the run must not pass, if so.
    pub fn failure(&self) -> Option<String> {
        let mismatches = self.verify_mismatches.unwrap_or(0);
        if mismatches > 0 {
            return Some(format!("{mismatches} blocks did not contain what was written to them"));
        }
        (self.errors > 0).then(|| format!("{} requests failed", self.errors))
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queues = if self.queues == 1 { "queue" } else { "queues" };
        writeln!(
            f,
            "{} {}, depth {}, {} {} {queues}, wait {} · disk of {} · {:.2} s",
            self.rw,
            Bytes(self.block_size_bytes as f64),
            self.iodepth,
            self.queues,
            self.ring,
            self.wait,
            Bytes(self.disk_size_bytes as f64),
            self.elapsed_ns as f64 / 1e9,
        )?;
        writeln!(
            f,
            "  rate      {} IOPS   {}/s   ({} reads, {} writes, {} errors)",
            Thousands(self.iops as u64),
            Bytes(self.bandwidth_bytes_per_s),
            Thousands(self.requests_read),
            Thousands(self.requests_write),
            Thousands(self.errors),
        )?;
        writeln!(
            f,
            "  latency   p50 {}   p90 {}   p99 {}   p99.9 {}   max {}",
            Ns(self.latency_ns_p50),
            Ns(self.latency_ns_p90),
            Ns(self.latency_ns_p99),
            Ns(self.latency_ns_p99_9),
            Ns(self.latency_ns_max),
        )?;
        writeln!(f, "  gap       {} at most between completions of a queue", Ns(self.gap_ns_max))?;
        if let (Some(ns), Some(each), Some(user)) =
            (self.daemon_cpu_ns, self.daemon_cpu_ns_per_request, self.daemon_cpu_user_ns_per_request)
        {
            let cpus = ns as f64 / self.elapsed_ns.max(1) as f64;
            writeln!(f, "  daemon    {each:.0} ns of CPU a request, {user:.0} of it in user space ({cpus:.2} CPUs)")?;
        }
        if let (Some(written), Some(checked), Some(bad)) =
            (self.verify_blocks_written, self.verify_blocks_checked, self.verify_mismatches)
        {
            let (written, checked) = (Thousands(written), Thousands(checked));
            let bad = Thousands(bad);
            writeln!(f, "  verify    {written} blocks written, {checked} checked, {bad} mismatches")?;
        }
        for line in self
            .first_error
            .iter()
            .map(|e| format!("first error: {e}"))
            .chain(self.verify_details.iter().map(|m| format!("mismatch at {m}")))
        {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

/// A duration in the unit that suits it.
struct Ns(u64);

impl Display for Ns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..1_000 => write!(f, "{} ns", self.0),
            ns @ 1_000..1_000_000 => write!(f, "{:.1} µs", ns as f64 / 1e3),
            ns @ 1_000_000..1_000_000_000 => write!(f, "{:.1} ms", ns as f64 / 1e6),
            ns => write!(f, "{:.2} s", ns as f64 / 1e9),
        }
    }
}

/// A number of bytes in the binary unit that suits it.
struct Bytes(f64);

impl Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0;
        for unit in ["B", "KiB", "MiB", "GiB"] {
            if value < 1024.0 {
                return if value.fract() == 0.0 { write!(f, "{value} {unit}") } else { write!(f, "{value:.1} {unit}") };
            }
            value /= 1024.0;
        }
        write!(f, "{value:.1} TiB")
    }
}

/// A count with its thousands apart.
struct Thousands(u64);

impl Display for Thousands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                write!(f, ",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(Thousands(0).to_string(), "0");
        assert_eq!(Thousands(1_234_567).to_string(), "1,234,567");
        assert_eq!(Ns(999).to_string(), "999 ns");
        assert_eq!(Ns(2_450).to_string(), "2.5 µs");
        assert_eq!(Bytes(4096.0).to_string(), "4 KiB");
        assert_eq!(Bytes(1.5 * 1024.0 * 1024.0).to_string(), "1.5 MiB");
    }
}
