//! `blockport ctl`: commands for a running daemon, from the shell.
//!
//! This file owns the verbs and what is printed. Each group of verbs is a file; `client.rs` speaks with the daemon. It
//! knows nothing that the monitor does not tell.

mod client;
mod device;
mod export;
mod monitor;
mod node;
mod object;
mod table;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use client::Client;

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct CtlArgs {
    /// The socket of a monitor; @NAME for one without a file
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,

    /// Print what the daemon answers, as JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

/// What can be done.
#[derive(Subcommand, Debug)]
enum Verb {
    /// List the disks that are served
    List,
    /// Exports: the disks that are served
    #[command(subcommand)]
    Export(export::ExportVerb),
    /// Nodes: what stands behind exports
    #[command(subcommand)]
    Node(node::NodeVerb),
    #[command(flatten)]
    Device(device::DeviceVerb),
    /// Iothreads: the threads that carry requests out
    #[command(subcommand)]
    Iothread(object::IothreadVerb),
    /// Throttle groups: limits that disks share
    #[command(subcommand)]
    Throttle(object::ThrottleVerb),
    #[command(flatten)]
    Monitor(monitor::MonitorVerb),
}

/// What a verb gives.
pub struct Output {
    /// What the daemon answered.
    json: Value,
    /// The same for people; empty if there is nothing to say.
    text: String,
}

impl Output {
    /// It was done, and there is nothing to say.
    fn done(json: Value) -> Self {
        Self { json, text: String::new() }
    }
}

/// Why a verb was not carried out: a sentence for a person.
pub type Failure = Box<dyn std::error::Error>;

/// Carries a verb out.
///
/// # Errors
/// There is no daemon at the socket, or it refused; the error says why.
pub fn run(args: CtlArgs) -> Result<(), Failure> {
    let CtlArgs { socket, json, verb } = args;
    let mut client = Client::connect(&socket).map_err(|error| format!("{}: {error}", socket.display()))?;
    let output = match verb {
        Verb::List => export::list(&mut client)?,
        Verb::Export(verb) => verb.run(&mut client)?,
        Verb::Node(verb) => verb.run(&mut client)?,
        Verb::Device(verb) => verb.run(&mut client)?,
        Verb::Iothread(verb) => verb.run(&mut client)?,
        Verb::Throttle(verb) => verb.run(&mut client)?,
        Verb::Monitor(verb) => match verb.run(&mut client, json)? {
            Some(output) => output,
            None => return Ok(()),
        },
    };
    let mut text = if json { serde_json::to_string_pretty(&output.json)? + "\n" } else { output.text };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// The text at a pointer such as `/inserted/file`; a dash if there is none.
fn text_at(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) if text.is_empty() => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(flag)) => if *flag { "yes" } else { "no" }.to_owned(),
        Some(other) => other.to_string(),
    }
}

/// A number of bytes at a pointer, for people.
fn bytes_at(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_u64).map_or("-".to_owned(), table::bytes)
}

/// The entries of a list.
fn entries(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}
