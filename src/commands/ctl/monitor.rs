//! `ctl events`, `qmp`, `version`, `quit`: the monitor itself.

use std::io::Write;

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::Client;
use super::{Failure, Output, text_at};

/// Verbs about the monitor and the daemon as a whole.
#[derive(Subcommand, Debug)]
pub enum MonitorVerb {
    /// Print events as they come
    Events {
        /// Stop after N events
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Send a command as it is, and print the answer
    Qmp {
        /// A command's name, or a JSON object such as {"execute": "query-block"}
        command: String,
        /// The arguments of a command that is given by its name, a JSON object
        arguments: Option<String>,
    },
    /// Show the daemon's version
    Version,
    /// End the daemon: requests are finished, images flushed; returns when that is done
    Quit,
}

impl MonitorVerb {
    /// Carries it out. `None`: all has been printed.
    pub fn run(self, client: &mut Client, as_json: bool) -> Result<Option<Output>, Failure> {
        match self {
            Self::Events { count } => events(client, count, as_json).map(|()| None),
            Self::Qmp { command, arguments } => qmp(client, &command, arguments.as_deref()).map(Some),
            Self::Version => {
                let version = client.execute("query-version", json!({}))?;
                Ok(Some(Output { text: text_at(&version, "/package"), json: version }))
            }
            Self::Quit => {
                let answer = client.execute("quit", json!({}))?;
                while client.event()?.is_some() {}
                Ok(Some(Output::done(answer)))
            }
        }
    }
}

fn events(client: &mut Client, count: Option<u64>, as_json: bool) -> Result<(), Failure> {
    let mut left = count;
    while left != Some(0) {
        let Some(event) = client.event()? else { break };
        let line = if as_json { event.to_string() } else { shown(&event) };
        writeln!(std::io::stdout(), "{line}")?;
        left = left.map(|left| left - 1);
    }
    Ok(())
}

/// An event on a line: `1795212312.905153 BLOCK_EXPORT_DELETED id=e0`.
fn shown(event: &Value) -> String {
    let (seconds, micros) = (&event["timestamp"]["seconds"], event["timestamp"]["microseconds"].as_u64().unwrap_or(0));
    let data = event["data"].as_object().into_iter().flatten();
    let data: String = data.map(|(key, _)| format!(" {key}={}", text_at(&event["data"], &format!("/{key}")))).collect();
    format!("{seconds}.{micros:06} {}{data}", text_at(event, "/event"))
}

fn qmp(client: &mut Client, command: &str, arguments: Option<&str>) -> Result<Output, Failure> {
    let message = if command.trim_start().starts_with('{') {
        serde_json::from_str(command)?
    } else {
        let arguments: Value = arguments.map_or(Ok(json!({})), serde_json::from_str)?;
        json!({"execute": command, "arguments": arguments})
    };
    client.send(&message)?;
    let answer = client.answer()?;
    match answer.pointer("/error/desc").and_then(Value::as_str) {
        Some(description) => Err(description.into()),
        None => Ok(Output { text: serde_json::to_string_pretty(&answer["return"])?, json: answer["return"].clone() }),
    }
}
