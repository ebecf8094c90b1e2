//! `blockport bench`: a load generator for vhost-user-blk sockets that needs no VM. This file owns its command line
//! and the order of things; the daemon's code is not used, so any daemon can be measured.

mod client;
mod cpu;
mod floor;
mod histogram;
mod memory;
mod plan;
mod report;
mod ring;
mod session;
mod stats;
mod verify;
mod worker;
mod workload;

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use client::Client;
use cpu::CpuTimes;
use plan::Plan;
use report::Report;
use worker::Wait;
use workload::Access;

/// Drive a vhost-user-blk socket and report rate, latency and gaps
///
/// Connects as a VM would, without one: any vhost-user-blk daemon can be measured. The exit status is 1 if a
/// request failed or a block did not verify.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// The daemon's socket
    #[arg(long, value_name = "PATH", required_unless_present = "floor")]
    socket: Option<PathBuf>,
    /// The access pattern
    #[arg(long, value_enum, required_unless_present = "floor")]
    rw: Option<Access>,
    /// Share of reads in randrw, in percent [default: 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: Option<u8>,
    /// Size of a request; k, M, G are powers of 1024
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size)]
    bs: u64,
    /// Requests kept in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    iodepth: u16,
    /// Queues to drive, each with a thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Seconds to measure [default: 10, or until --requests are done]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    runtime: Option<Duration>,
    /// Seconds to run before measuring [default: 1, or 0 with --requests]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, conflicts_with = "requests")]
    ramp: Option<Duration>,
    /// Stop after N requests of all queues together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// How to wait for completions
    #[arg(long, value_enum, default_value_t = Wait::Poll)]
    wait: Wait,
    /// Write a pattern that tells offset and generation, check it in every read, and read everything back at the end
    #[arg(long)]
    verify: bool,
    /// Access only the first SIZE bytes of the disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Make the accesses and the pattern repeatable [default: another one in each run]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Descriptors of a ring, three for each request [default: 256, or what --iodepth needs]
    #[arg(long, value_name = "N")]
    ring_size: Option<u16>,
    /// Use packed virtqueues, which the daemon must offer
    #[arg(long)]
    packed: bool,
    /// Use the rings of the crate virtio-driver: slower, and another program's opinion
    #[arg(long)]
    virtio_driver: bool,
    /// Report the CPU time that this process, the daemon, uses for each request
    #[arg(long, value_name = "PID")]
    daemon_pid: Option<u32>,
    /// Fail when nothing completes for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    stall: Duration,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Measure instead how fast two threads can wake each other over eventfds and hand over a cache line: no client of
    /// this machine is faster
    #[arg(long, conflicts_with_all = ["socket", "rw", "verify", "requests", "packed", "virtio_driver", "daemon_pid"])]
    floor: bool,
}

/// Runs the command.
pub fn run(args: BenchArgs) -> Result<(), Box<dyn Error>> {
    if args.floor {
        return run_floor(&args);
    }
    let Some(socket) = args.socket.as_deref() else {
        return Err("--socket: is needed".into());
    };
    let plan = Plan::new(&args)?;
    if let Some(pid) = args.daemon_pid {
        CpuTimes::sample(pid).map_err(|e| format!("--daemon-pid {pid}: {e}"))?;
    }
    let (mut client, disk) =
        Client::connect(socket, args.packed).map_err(|e| format!("--socket {}: {e}", socket.display()))?;
    plan.check(&disk)?;
    if args.virtio_driver {
        client.use_library_rings();
    }
    let outcome = session::run(&client, &disk, &plan, socket, args.daemon_pid, !args.json)?;
    let report = Report::new(socket, &disk, &plan, &outcome);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    match report.failure() {
        Some(failure) => Err(failure.into()),
        None => Ok(()),
    }
}

fn run_floor(args: &BenchArgs) -> Result<(), Box<dyn Error>> {
    let runtime = args.runtime.unwrap_or(Duration::from_secs(2)) / 2;
    let rate = floor::round_trips_per_second(runtime)?;
    let line_ns = floor::cache_line_ns(runtime);
    if args.json {
        let floors = serde_json::json!({ "eventfd_round_trips_per_s": rate, "cache_line_ns": line_ns });
        println!("{floors}");
    } else {
        let each = 1e6 / rate;
        println!("eventfd ping-pong: {rate:.0} round trips/s, {each:.1} µs each");
        println!("cache line hand-over: {line_ns:.0} ns one way");
    }
    Ok(())
}

/// A size with an optional k, M, G or T.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        other => return Err(format!("unknown unit {other}; use k, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| "not a number with a unit, as 4k".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more than 64 bits hold".to_owned())
}

/// A duration in seconds, fractions allowed.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration <= Duration::from_secs(365 * 86_400) => Ok(duration),
        _ => Err("not a duration of 0 to 31536000 seconds".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert!(size("4x").unwrap_err().contains("unknown unit x"));
        assert!(size("k").is_err());
        assert!(size("99999999T").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["-1", "NaN", "inf", "1e12", "x"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
