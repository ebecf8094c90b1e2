//! Commands that take definitions as the command line does, for people: `blockport ctl` sends them.

use blockport_block::options::Options;

use super::super::dispatch::{Command, CommandError, CommandResult, command};
use super::super::schema::{Done, arguments, choice};
use crate::daemon::Daemon;
use crate::options::definition;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[&command("x-blockport-add", add), &command("x-blockport-reopen", reopen)];

choice! {
    /// The option of the command line whose argument the definition is.
    DefinitionKind {
        "blockdev" => Blockdev,
        "export" => Export,
        "object" => Object,
    }
}

arguments! {
    /// Something to be added.
    Add {
        "kind" => kind: DefinitionKind,
        /// Key=value pairs, or JSON.
        "definition" => definition: String,
    }
}

fn add(daemon: &mut Daemon, arguments: Add) -> CommandResult<Done> {
    let option = match arguments.kind {
        DefinitionKind::Blockdev => "blockdev",
        DefinitionKind::Export => "export",
        DefinitionKind::Object => "object",
    };
    let step = definition(option, &arguments.definition).map_err(|error| CommandError::new(error.to_string()))?;
    daemon.carry_out(step)?;
    Ok(Done {})
}

arguments! {
    /// The new definition of a node.
    Reopen {
        /// Key=value pairs, or JSON.
        "definition" => definition: String,
    }
}

fn reopen(daemon: &mut Daemon, arguments: Reopen) -> CommandResult<Done> {
    let options: Options = blockport_block::options::parse_keyval(&arguments.definition, Some("driver"))?;
    daemon.graph.reopen(vec![options])?;
    Ok(Done {})
}
