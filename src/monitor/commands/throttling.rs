//! Commands about the limits of a disk of its own.

use blockport_block::throttle::{Limited, Rate, ThrottleLimits};

use super::super::dispatch::{Command, CommandError, CommandResult, command};
use super::super::schema::{Done, arguments};
use super::media;
use crate::daemon::Daemon;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[&command("block_set_io_throttle", block_set_io_throttle)];

arguments! {
    /// All limits of a device; 0 is none.
    BlockIoThrottle {
        "device" => device: Option<String>,
        "id" => id: Option<String>,
        "bps" => bps: u64,
        "bps_rd" => bps_rd: u64,
        "bps_wr" => bps_wr: u64,
        "iops" => iops: u64,
        "iops_rd" => iops_rd: u64,
        "iops_wr" => iops_wr: u64,
        "bps_max" => bps_max: Option<u64>,
        "bps_rd_max" => bps_rd_max: Option<u64>,
        "bps_wr_max" => bps_wr_max: Option<u64>,
        "iops_max" => iops_max: Option<u64>,
        "iops_rd_max" => iops_rd_max: Option<u64>,
        "iops_wr_max" => iops_wr_max: Option<u64>,
        "bps_max_length" => bps_max_length: Option<u64>,
        "bps_rd_max_length" => bps_rd_max_length: Option<u64>,
        "bps_wr_max_length" => bps_wr_max_length: Option<u64>,
        "iops_max_length" => iops_max_length: Option<u64>,
        "iops_rd_max_length" => iops_rd_max_length: Option<u64>,
        "iops_wr_max_length" => iops_wr_max_length: Option<u64>,
        "iops_size" => iops_size: Option<u64>,
        /// The throttle group that it joins; its own if it is in none.
        "group" => group: Option<String>,
    }
}

fn block_set_io_throttle(daemon: &mut Daemon, arguments: BlockIoThrottle) -> CommandResult<Done> {
    let a = arguments;
    let backend = media::find_one(daemon, a.device, a.id)?;
    if backend.root().is_none() {
        return Err(CommandError::new("Device has no medium"));
    }
    let mut limits = ThrottleLimits::default();
    limits.iops_size = a.iops_size.unwrap_or(0);
    for (of, average, burst, length) in [
        (Limited::BpsTotal, a.bps, a.bps_max, a.bps_max_length),
        (Limited::BpsRead, a.bps_rd, a.bps_rd_max, a.bps_rd_max_length),
        (Limited::BpsWrite, a.bps_wr, a.bps_wr_max, a.bps_wr_max_length),
        (Limited::IopsTotal, a.iops, a.iops_max, a.iops_max_length),
        (Limited::IopsRead, a.iops_rd, a.iops_rd_max, a.iops_rd_max_length),
        (Limited::IopsWrite, a.iops_wr, a.iops_wr_max, a.iops_wr_max_length),
    ] {
        limits.set_rate(of, Rate { average, burst: burst.unwrap_or(0), burst_seconds: length.unwrap_or(1) });
    }
    backend.set_io_limits(daemon.graph.throttle_groups(), a.group.as_deref(), limits)?;
    Ok(Done {})
}
