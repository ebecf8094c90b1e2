//! Commands about devices, by the ids of their exports: size and medium.

use std::sync::Arc;

use blockport_block::BlockBackend;
use blockport_block::options::Options;
use blockport_block::throttle::Limited;

use super::super::dispatch::{Command, CommandError, CommandResult, command, query};
use super::super::schema::{Done, NoArguments, answer, arguments, choice};
use super::nodes::{self, BlockDeviceInfo};
use super::requests;
use crate::daemon::{Daemon, Export};
use crate::options::Disk;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &query("query-block", query_block),
    &command("block_resize", block_resize),
    &command("blockdev-open-tray", blockdev_open_tray),
    &command("blockdev-close-tray", blockdev_close_tray),
    &command("blockdev-remove-medium", blockdev_remove_medium),
    &command("blockdev-insert-medium", blockdev_insert_medium),
    &command("blockdev-change-medium", blockdev_change_medium),
    &command("eject", eject),
];

/// The drive of an export.
pub fn find(daemon: &Daemon, id: &str) -> CommandResult<Arc<BlockBackend>> {
    let missing = || CommandError::device_not_found(format!("Device '{id}' not found"));
    daemon.exports.find(id).map(|export| export.backend().clone()).ok_or_else(missing)
}

/// The drive of an export, which QEMU has two names for.
pub fn find_one(daemon: &Daemon, device: Option<String>, id: Option<String>) -> CommandResult<Arc<BlockBackend>> {
    match (device, id) {
        (Some(id), None) | (None, Some(id)) => find(daemon, &id),
        _ => Err(CommandError::new("Need exactly one of 'device' and 'id'")),
    }
}

choice! {
    /// Whether a device has stopped over an error.
    BlockDeviceIoStatus {
        "ok" => Ok,
        "failed" => Failed,
        "nospace" => Nospace,
    }
}

answer! {
    /// A device.
    BlockInfo {
        "device" => device: String,
        "qdev" => qdev: String,
        "type" => kind: String,
        "removable" => removable: bool,
        "locked" => locked: bool,
        "tray_open" => tray_open: Option<bool>,
        "io-status" => io_status: BlockDeviceIoStatus,
        "inserted" => inserted: Option<BlockDeviceInfo>,
    }
}

fn query_block(daemon: &mut Daemon, _: NoArguments) -> CommandResult<Vec<BlockInfo>> {
    let info = |export: &Export| {
        let backend = export.backend();
        BlockInfo {
            device: export.id().to_owned(),
            qdev: export.id().to_owned(),
            kind: "unknown".to_owned(),
            removable: backend.is_removable(),
            locked: backend.is_medium_locked(),
            tray_open: backend.has_tray().then(|| backend.is_tray_open()),
            io_status: match backend.iostatus() {
                blockport_block::IoStatus::Ok => BlockDeviceIoStatus::Ok,
                blockport_block::IoStatus::Failed => BlockDeviceIoStatus::Failed,
                blockport_block::IoStatus::NoSpace => BlockDeviceIoStatus::Nospace,
            },
            inserted: backend.root().as_ref().map(|node| {
                let mut info = nodes::info(node);
                info.cache.writeback = backend.write_cache();
                if let Some(group) = backend.throttle_group() {
                    let limits = group.limits();
                    let average = |of| limits.rate(of).average;
                    info.bps = average(Limited::BpsTotal);
                    info.bps_rd = average(Limited::BpsRead);
                    info.bps_wr = average(Limited::BpsWrite);
                    info.iops = average(Limited::IopsTotal);
                    info.iops_rd = average(Limited::IopsRead);
                    info.iops_wr = average(Limited::IopsWrite);
                    info.group = Some(group.name().to_owned());
                }
                info
            }),
        }
    };
    Ok(daemon.exports.iter().map(info).collect())
}

arguments! {
    /// The new size of a device's medium or of a node, in bytes.
    BlockResize {
        "device" => device: Option<String>,
        "node-name" => node_name: Option<String>,
        "size" => size: u64,
    }
}

fn block_resize(daemon: &mut Daemon, arguments: BlockResize) -> CommandResult<Done> {
    let BlockResize { device, node_name, size } = arguments;
    let (backend, node) = match (&device, &node_name) {
        (Some(id), None) => (daemon.exports.find(id).map(|export| export.backend().clone()), None),
        (None, Some(name)) => (None, daemon.graph.find(name)),
        _ => return Err(CommandError::new("Need exactly one of 'device' and 'node-name'")),
    };
    match (backend, node) {
        (Some(backend), _) => {
            requests::settle_one(&backend)?;
            backend.resize(size)?;
        }
        (None, Some(node)) => {
            requests::settle(std::slice::from_ref(&node))?;
            node.block_resize(size)?;
        }
        (None, None) => {
            let (device, node_name) = (device.unwrap_or_default(), node_name.unwrap_or_default());
            return Err(CommandError::new(format!("Cannot find device='{device}' nor node-name='{node_name}'")));
        }
    }
    Ok(Done {})
}

arguments! {
    /// A device whose tray or medium is to move.
    MediumMove {
        "device" => device: Option<String>,
        "id" => id: Option<String>,
        /// Even if the guest has locked it.
        "force" => force: Option<bool>,
    }
}

fn blockdev_open_tray(daemon: &mut Daemon, arguments: MediumMove) -> CommandResult<Done> {
    let MediumMove { device, id, force } = arguments;
    find_one(daemon, device, id)?.open_tray(force.unwrap_or(false))?;
    Ok(Done {})
}

fn eject(daemon: &mut Daemon, arguments: MediumMove) -> CommandResult<Done> {
    let MediumMove { device, id, force } = arguments;
    let backend = find_one(daemon, device, id)?;
    requests::settle_one(&backend)?;
    backend.eject(force.unwrap_or(false))?;
    Ok(Done {})
}

arguments! {
    /// A device whose tray is to close.
    CloseTray {
        "device" => device: Option<String>,
        "id" => id: Option<String>,
    }
}

fn blockdev_close_tray(daemon: &mut Daemon, arguments: CloseTray) -> CommandResult<Done> {
    let CloseTray { device, id } = arguments;
    find_one(daemon, device, id)?.close_tray()?;
    Ok(Done {})
}

arguments! {
    /// A device.
    DeviceId {
        "id" => id: String,
    }
}

fn blockdev_remove_medium(daemon: &mut Daemon, arguments: DeviceId) -> CommandResult<Done> {
    let backend = find(daemon, &arguments.id)?;
    requests::settle_one(&backend)?;
    backend.remove_medium()?;
    Ok(Done {})
}

arguments! {
    /// The node that becomes a device's medium.
    InsertMedium {
        "id" => id: String,
        "node-name" => node_name: String,
    }
}

fn blockdev_insert_medium(daemon: &mut Daemon, arguments: InsertMedium) -> CommandResult<Done> {
    let backend = find(daemon, &arguments.id)?;
    requests::settle_one(&backend)?;
    backend.insert_medium(nodes::find(daemon, &arguments.node_name)?)?;
    Ok(Done {})
}

choice! {
    /// Whether the new medium is opened for writing.
    BlockdevChangeReadOnlyMode {
        /// As the old one was.
        "retain" => Retain,
        "read-only" => ReadOnly,
        "read-write" => ReadWrite,
    }
}

arguments! {
    /// The file that becomes a device's medium.
    ChangeMedium {
        "device" => device: Option<String>,
        "id" => id: Option<String>,
        "filename" => filename: String,
        /// Left out, qcow2 if the name ends in .qcow2, else raw: what a guest wrote is never asked what it is.
        "format" => format: Option<String>,
        "force" => force: Option<bool>,
        "read-only-mode" => read_only_mode: Option<BlockdevChangeReadOnlyMode>,
    }
}

fn blockdev_change_medium(daemon: &mut Daemon, arguments: ChangeMedium) -> CommandResult<Done> {
    let ChangeMedium { device, id, filename, format, force, read_only_mode } = arguments;
    let backend = find_one(daemon, device, id)?;
    // The present medium's options, or those of the last one.
    let old = backend.root().map(|node| node.options()).or_else(|| backend.root_state());
    let read_only = match read_only_mode {
        Some(BlockdevChangeReadOnlyMode::ReadOnly) => true,
        Some(BlockdevChangeReadOnlyMode::ReadWrite) => false,
        Some(BlockdevChangeReadOnlyMode::Retain) | None => old.as_ref().is_some_and(|old| old.read_only),
    };
    let mut file = Options::new();
    file.set_str("driver", "file").set_str("filename", filename.as_str());
    let mut node = Options::new().with_subject(format!("medium {filename:?}"));
    node.set_str("driver", format.unwrap_or_else(|| Disk::format_by_name(filename.as_ref()).to_owned()))
        .set_bool("read-only", read_only);
    if let Some(old) = old {
        node.set_str("discard", if old.discard { "unmap" } else { "ignore" })
            .set_bool("cache.direct", old.cache_direct)
            .set_bool("cache.no-flush", old.cache_no_flush);
    }
    node.set_options("file", file);
    let node = daemon.graph.open_unowned(node)?;
    requests::settle_one(&backend)?;
    backend.change_medium(node, force.unwrap_or(false))?;
    Ok(Done {})
}
