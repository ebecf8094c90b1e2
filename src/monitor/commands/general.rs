//! Commands about the monitor itself and the daemon as a whole.

use serde_json::Value;

use super::super::dispatch::{Command, CommandError, CommandResult, command, query};
use super::super::events;
use super::super::schema::{Done, NoArguments, Schema, answer, arguments, choice};
use crate::daemon::Daemon;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &command(CAPABILITIES, qmp_capabilities),
    &query("query-version", query_version),
    &query("query-commands", query_commands),
    &query("query-qmp-schema", query_qmp_schema),
    &command("quit", quit),
];

/// The command that begins every session.
pub const CAPABILITIES: &str = "qmp_capabilities";

choice! {
    /// What a client and the monitor may agree on.
    Capability {
        /// Some commands may overtake others.
        "oob" => Oob,
    }
}

arguments! {
    /// What the client wants of what was offered.
    Capabilities {
        "enable" => enable: Option<Vec<Capability>>,
    }
}

/// The sessions negotiate; past that, there is nothing left to agree on.
fn qmp_capabilities(_: &mut Daemon, _: Capabilities) -> CommandResult<Done> {
    Err(CommandError::command_not_found("Capabilities negotiation is already complete, command ignored"))
}

answer! {
    /// Three numbers. The member that holds them is called "qemu", where clients look for it.
    VersionTriple {
        "major" => major: u64,
        "minor" => minor: u64,
        "micro" => micro: u64,
    }
}

answer! {
    /// What runs here.
    VersionInfo {
        "qemu" => qemu: VersionTriple,
        "package" => package: String,
    }
}

/// The version of this program.
pub fn version() -> VersionInfo {
    let number = |text: &str| text.parse().unwrap_or_default();
    VersionInfo {
        qemu: VersionTriple {
            major: number(env!("CARGO_PKG_VERSION_MAJOR")),
            minor: number(env!("CARGO_PKG_VERSION_MINOR")),
            micro: number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        package: concat!("blockport ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

fn query_version(_: &mut Daemon, _: NoArguments) -> CommandResult<VersionInfo> {
    Ok(version())
}

answer! {
    /// A command.
    CommandInfo {
        "name" => name: String,
    }
}

fn query_commands(_: &mut Daemon, _: NoArguments) -> CommandResult<Vec<CommandInfo>> {
    Ok(super::all().map(|command| CommandInfo { name: command.name().to_owned() }).collect())
}

/// All commands and events with their types.
pub fn schema() -> Vec<Value> {
    let mut schema = Schema::default();
    super::all().for_each(|command| command.describe(&mut schema));
    events::describe(&mut schema);
    schema.into_list()
}

fn query_qmp_schema(_: &mut Daemon, _: NoArguments) -> CommandResult<Vec<Value>> {
    Ok(schema())
}

fn quit(daemon: &mut Daemon, _: NoArguments) -> CommandResult<Done> {
    daemon.quit();
    Ok(Done {})
}
