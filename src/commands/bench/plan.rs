//! What a run does, checked: from the command line alone, then against the disk. It opens nothing. Every refusal
//! names the option and what would do instead.

use std::time::Duration;

use thiserror::Error;

use super::BenchArgs;
use super::client::DiskInfo;
use super::ring::DESCRIPTORS_PER_REQUEST;
use super::worker::Wait;
use super::workload::{Access, Random};

/// The ring is at least this large, as QEMU's and Linux' are.
const RING_SIZE_MIN: u16 = 256;
/// The largest split ring that virtio allows.
const RING_SIZE_MAX: u16 = 32768;
/// A descriptor's length has 32 bits, and no disk here is measured with more.
const BLOCK_SIZE_MAX: u64 = 1 << 30;
/// Blocks that --verify remembers, at four bytes each.
const VERIFY_BLOCKS_MAX: u64 = 64 << 20;
const RUNTIME_DEFAULT: Duration = Duration::from_secs(10);
const RAMP_DEFAULT: Duration = Duration::from_secs(1);

/// An option that cannot be served.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{option}: {reason}")]
pub struct OptionError {
    pub option: &'static str,
    pub reason: String,
}

fn refuse<T>(option: &'static str, reason: impl Into<String>) -> Result<T, OptionError> {
    Err(OptionError { option, reason: reason.into() })
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rw: Access,
    pub read_percent: u8,
    /// Bytes of a request.
    pub block_size: u64,
    pub depth: u16,
    pub queues: u16,
    pub ring_size: u16,
    /// Whether the rings are packed.
    pub packed: bool,
    /// Measured time; `None` to run until the requests are done.
    pub runtime: Option<Duration>,
    /// Time before it that is not measured.
    pub ramp: Duration,
    /// Requests of all queues together.
    pub requests: Option<u64>,
    pub wait: Wait,
    pub verify: bool,
    pub seed: u64,
    /// Bytes accessed, from the start of the disk; `None` for all.
    pub area: Option<u64>,
    /// How long no request may complete before the run fails.
    pub stall: Duration,
}

impl Plan {
    /// Checks what needs no disk.
    pub fn new(args: &BenchArgs) -> Result<Self, OptionError> {
        let Some(rw) = args.rw else {
            return refuse("--rw", "is needed: read, write, randread, randwrite or randrw");
        };
        if args.bs == 0 || !args.bs.is_multiple_of(512) || args.bs > BLOCK_SIZE_MAX {
            return refuse("--bs", format!("{} is not a multiple of 512 from 512 to 1G", args.bs));
        }
        let read_percent = match args.rwmixread {
            None => 50,
            Some(percent) if rw == Access::RandRw => percent,
            Some(_) => return refuse("--rwmixread", "only --rw randrw mixes"),
        };
        if args.verify && !rw.writes() {
            let name = rw.name();
            return refuse("--verify", format!("--rw {name} writes nothing to verify; use randrw"));
        }
        let requests = args.requests;
        let limited = requests.is_some();
        Ok(Self {
            rw,
            read_percent,
            block_size: args.bs,
            depth: args.iodepth,
            queues: args.queues,
            ring_size: ring_size(args.iodepth, args.ring_size)?,
            packed: args.packed,
            runtime: args.runtime.or((!limited).then_some(RUNTIME_DEFAULT)),
            ramp: args.ramp.unwrap_or(if limited { Duration::ZERO } else { RAMP_DEFAULT }),
            requests,
            wait: args.wait,
            verify: args.verify,
            seed: args.seed.unwrap_or_else(arbitrary_seed),
            area: args.size,
            stall: args.stall,
        })
    }

    /// Checks the rest against the disk.
    pub fn check(&self, disk: &DiskInfo) -> Result<(), OptionError> {
        if self.queues > disk.queues {
            let (asked, offered) = (self.queues, disk.queues);
            return refuse("--queues", format!("{asked}, and the disk offers {offered}"));
        }
        if !self.block_size.is_multiple_of(disk.block_size.into()) {
            let (bs, logical) = (self.block_size, disk.block_size);
            return refuse("--bs", format!("{bs} is not a multiple of the disk's block size, {logical}"));
        }
        if self.rw.writes() && disk.read_only {
            return refuse("--rw", format!("{} writes, and the disk is read-only", self.rw.name()));
        }
        if let Some(area) = self.area.filter(|&area| area > disk.size) {
            let size = disk.size;
            return refuse("--size", format!("{area} bytes, and the disk has {size}"));
        }
        let (_, blocks) = self.share(disk, 0);
        if blocks == 0 {
            let (bs, size, queues) = (self.block_size, disk.size, self.queues);
            return refuse(
                "--bs",
                format!("{bs}: the area (of {size} bytes of disk) has no such block for each of {queues} queues"),
            );
        }
        if self.verify && blocks <= self.depth.into() {
            let depth = self.depth;
            return refuse(
                "--verify",
                format!(
                    "a queue's share of {blocks} blocks must be more than its depth of {depth}: \
                     use a smaller --bs or --iodepth"
                ),
            );
        }
        if self.verify && blocks * u64::from(self.queues) > VERIFY_BLOCKS_MAX {
            let bytes = VERIFY_BLOCKS_MAX * self.block_size;
            return refuse("--verify", format!("remembers at most {bytes} bytes: use --size"));
        }
        Ok(())
    }

    /// The first block and the number of blocks that a queue accesses. Random accesses that are not verified go
    /// everywhere; else each queue has its own part.
    pub fn share(&self, disk: &DiskInfo, queue: u16) -> (u64, u64) {
        let blocks = self.area.unwrap_or(disk.size) / self.block_size;
        if !self.verify && !matches!(self.rw, Access::Read | Access::Write) {
            return (0, blocks);
        }
        let part = blocks / u64::from(self.queues);
        (part * u64::from(queue), part)
    }

    /// The number of requests that a queue issues; without a limit, more than it ever can.
    pub fn requests_of(&self, queue: u16) -> u64 {
        let Some(total) = self.requests else {
            return u64::MAX;
        };
        let queues = u64::from(self.queues);
        total / queues + u64::from(u64::from(queue) < total % queues)
    }
}

/// A ring that holds `depth` requests.
fn ring_size(depth: u16, asked: Option<u16>) -> Result<u16, OptionError> {
    let holds = |ring: u16| ring / DESCRIPTORS_PER_REQUEST;
    if let Some(ring) = asked {
        if !ring.is_power_of_two() || ring > RING_SIZE_MAX {
            return refuse("--ring-size", format!("{ring} is not a power of two up to 32768"));
        }
        if depth > holds(ring) {
            let (fits, max) = (fitting_ring(depth), holds(ring));
            return refuse(
                "--iodepth",
                format!(
                    "{depth}, and a ring of {ring} holds {max} requests of three descriptors each; \
                     use --iodepth {max} or --ring-size {fits}"
                ),
            );
        }
        return Ok(ring);
    }
    if depth > holds(RING_SIZE_MAX) {
        let max = holds(RING_SIZE_MAX);
        return refuse("--iodepth", format!("{depth}, and the largest ring holds {max} requests"));
    }
    Ok(fitting_ring(depth).max(RING_SIZE_MIN))
}

/// The smallest ring for `depth` requests, or the largest there is.
fn fitting_ring(depth: u16) -> u16 {
    depth.checked_mul(DESCRIPTORS_PER_REQUEST).and_then(u16::checked_next_power_of_two).unwrap_or(RING_SIZE_MAX)
}

/// A seed that differs from run to run, so that old content on the disk cannot pass for new.
fn arbitrary_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let ns = now.map_or(0, |d| d.as_nanos() as u64);
    Random::new(ns ^ u64::from(std::process::id()).rotate_left(40)).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    const DISK: DiskInfo = DiskInfo { size: 1 << 20, block_size: 4096, read_only: false, flush: true, queues: 2 };

    /// Both checks, for options behind `--socket s`.
    fn plan(options: &str) -> Result<Plan, String> {
        let words = ["bench", "--socket", "s"].into_iter().chain(options.split_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
        let plan = Plan::new(&cli.args).map_err(|e| e.to_string())?;
        plan.check(&DISK).map_err(|e| e.to_string())?;
        Ok(plan)
    }

    #[test]
    fn refusals_name_the_option() {
        for (options, start) in [
            ("--rw randread --bs 100", "--bs: 100 is not a multiple of 512"),
            ("--rw randread --bs 512", "--bs: 512 is not a multiple of the disk's block size, 4096"),
            ("--rw randread --bs 2M", "--bs: 2097152: the area"),
            ("--rw randread --iodepth 86 --ring-size 256", "--iodepth: 86, and a ring of 256 holds 85"),
            ("--rw randread --ring-size 100", "--ring-size: 100 is not"),
            ("--rw randread --iodepth 20000", "--iodepth: 20000, and the largest ring"),
            ("--rw randread --queues 3", "--queues: 3, and the disk offers 2"),
            ("--rw randread --rwmixread 10", "--rwmixread: only"),
            ("--rw randread --verify", "--verify: --rw randread writes nothing"),
            ("--rw randwrite --verify --iodepth 256", "--verify: a queue's share of 256 blocks"),
            ("--rw read --size 2M", "--size: 2097152 bytes, and the disk has 1048576"),
        ] {
            let error = plan(options).expect_err(options);
            assert!(error.starts_with(start), "{options}: {error}");
        }
    }

    #[test]
    fn the_ring_grows_with_the_depth() {
        assert_eq!(plan("--rw randread --iodepth 85").unwrap().ring_size, 256);
        assert_eq!(plan("--rw randread --iodepth 86").unwrap().ring_size, 512);
        assert_eq!(plan("--rw randread --iodepth 1 --ring-size 4").unwrap().ring_size, 4);
    }

    #[test]
    fn requests_and_time_have_sensible_defaults() {
        let timed = plan("--rw read").unwrap();
        assert_eq!((timed.runtime, timed.ramp), (Some(RUNTIME_DEFAULT), RAMP_DEFAULT));
        let counted = plan("--rw read --requests 7 --queues 2").unwrap();
        assert_eq!((counted.runtime, counted.ramp), (None, Duration::ZERO));
        assert_eq!((counted.requests_of(0), counted.requests_of(1)), (4, 3));
    }

    #[test]
    fn queues_share_the_disk_when_they_must() {
        let random = plan("--rw randwrite --queues 2").unwrap();
        assert_eq!(random.share(&DISK, 1), (0, 256));
        for options in ["--rw write --queues 2", "--rw randrw --verify --queues 2 --iodepth 8"] {
            assert_eq!(plan(options).unwrap().share(&DISK, 1), (128, 128));
        }
    }
}
