//! Commands about exports: the disks that are served.

use blockport_block::options::Options;

use super::super::dispatch::{Command, CommandResult, command, query};
use super::super::events::ExportDeleted;
use super::super::schema::{Arguments, Done, NoArguments, QapiType, Schema, answer, arguments, choice};
use super::requests;
use crate::daemon::{Daemon, Export};
use crate::options::ExportConfig;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &command("block-export-add", block_export_add),
    &command("block-export-del", block_export_del),
    &command("x-blockport-drive-del", drive_del),
    &command("block-export-continue", block_export_continue),
    &query("query-block-exports", query_block_exports),
];

/// The arguments of `block-export-add`, which `ExportConfig` reads and describes.
struct ExportAdd(ExportConfig);

impl Arguments for ExportAdd {
    fn from_options(options: Options) -> blockport_block::options::Result<Self> {
        ExportConfig::from_options(options).map(Self)
    }
}

impl QapiType for ExportAdd {
    fn describe(schema: &mut Schema) -> String {
        super::super::options_schema::export(schema)
    }
}

fn block_export_add(daemon: &mut Daemon, ExportAdd(config): ExportAdd) -> CommandResult<Done> {
    daemon.add_export(config)?;
    Ok(Done {})
}

choice! {
    /// How an export is removed.
    BlockExportRemoveMode {
        /// Only if no front-end is connected.
        "safe" => Safe,
        /// A front-end that is connected is dropped; what it asked for is finished.
        "hard" => Hard,
    }
}

arguments! {
    /// The export to be removed.
    ExportDel {
        "id" => id: String,
        "mode" => mode: Option<BlockExportRemoveMode>,
    }
}

fn block_export_del(daemon: &mut Daemon, arguments: ExportDel) -> CommandResult<Done> {
    let ExportDel { id, mode } = arguments;
    // Its rings stop when nothing is in flight any more. What is refused for another reason is refused first.
    if mode == Some(BlockExportRemoveMode::Hard)
        && let Some(export) = daemon.exports.find(&id)
    {
        requests::settle_one(export.backend())?;
    }
    daemon.exports.remove(&id, mode == Some(BlockExportRemoveMode::Hard))?;
    daemon.raise(ExportDeleted { id });
    Ok(Done {})
}

arguments! {
    /// The export whose access is revoked.
    DriveDel {
        "id" => id: String,
    }
}

fn drive_del(daemon: &mut Daemon, arguments: DriveDel) -> CommandResult<Done> {
    let DriveDel { id } = arguments;
    if let Some(export) = daemon.exports.find(&id) {
        requests::settle_one(export.backend())?;
    }
    daemon.exports.revoke(&id, &daemon.graph)?;
    daemon.raise(ExportDeleted { id });
    Ok(Done {})
}

arguments! {
    /// The export that goes on.
    ExportContinue {
        "id" => id: String,
    }
}

fn block_export_continue(daemon: &mut Daemon, arguments: ExportContinue) -> CommandResult<Done> {
    daemon.exports.resume(&arguments.id)?;
    Ok(Done {})
}

choice! {
    /// What exports there are.
    BlockExportType {
        "vhost-user-blk" => VhostUserBlk,
    }
}

answer! {
    /// An export.
    BlockExportInfo {
        "id" => id: String,
        "type" => kind: BlockExportType,
        /// The node of its medium; empty without one.
        "node-name" => node_name: String,
        /// Always false: a command that removes an export answers when it is gone.
        "shutting-down" => shutting_down: bool,
        /// Whether a front-end is connected.
        "x-blockport-connected" => connected: bool,
        /// Whether it has stopped over an error, and keeps requests until it is told to go on.
        "x-blockport-stopped" => stopped: bool,
    }
}

fn query_block_exports(daemon: &mut Daemon, _: NoArguments) -> CommandResult<Vec<BlockExportInfo>> {
    let info = |export: &Export| BlockExportInfo {
        id: export.id().to_owned(),
        kind: BlockExportType::VhostUserBlk,
        node_name: export.backend().root().map(|node| node.name().to_owned()).unwrap_or_default(),
        shutting_down: false,
        connected: export.is_connected(),
        stopped: export.is_stopped(),
    };
    Ok(daemon.exports.iter().map(info).collect())
}
