//! `ctl list` and `ctl export …`: the disks that are served.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::Client;
use super::table::table;
use super::{Failure, Output, bytes_at, entries, text_at};

/// Verbs about exports.
#[derive(Subcommand, Debug)]
pub enum ExportVerb {
    /// List the disks that are served
    List,
    /// Serve a node at a socket
    Add {
        /// The name of the export
        id: String,
        /// The node
        node: String,
        /// Where front-ends connect
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Let the guest write
        #[arg(long)]
        writable: bool,
        /// How many queues a front-end may use
        #[arg(long, value_name = "N")]
        queues: Option<u16>,
        /// The iothreads that carry its requests out
        #[arg(long, value_name = "ID")]
        iothread: Vec<String>,
        /// Any further option of --export
        #[arg(long, value_name = "KEY=VALUE")]
        option: Vec<String>,
    },
    /// Stop serving a disk
    Del {
        /// The export
        id: String,
        /// Even while a front-end is connected; what it has asked for is finished
        #[arg(long)]
        hard: bool,
    },
    /// Take a disk's medium away for good, and free the export's name; a front-end that is connected keeps an empty drive
    Revoke {
        /// The export
        id: String,
    },
    /// Go on after an error that stopped the disk
    Continue {
        /// The export
        id: String,
    },
}

impl ExportVerb {
    /// Carries it out.
    pub fn run(self, client: &mut Client) -> Result<Output, Failure> {
        let (command, arguments) = match self {
            Self::List => return list(client),
            Self::Add { id, node, socket, writable, queues, iothread, option } => {
                let path = socket.to_str().ok_or("the path of a socket must be UTF-8")?.replace(',', ",,");
                let mut definition = format!("vhost-user-blk,id={id},node-name={node},addr.type=unix,addr.path={path}");
                definition += if writable { ",writable=on" } else { "" };
                definition += &queues.map(|queues| format!(",num-queues={queues}")).unwrap_or_default();
                let iothreads = iothread.iter().enumerate();
                definition += &iothreads.map(|(at, id)| format!(",iothreads.{at}={id}")).collect::<String>();
                definition += &option.iter().map(|option| format!(",{option}")).collect::<String>();
                ("x-blockport-add", json!({"kind": "export", "definition": definition}))
            }
            Self::Del { id, hard } => {
                ("block-export-del", json!({"id": id, "mode": if hard { "hard" } else { "safe" }}))
            }
            Self::Revoke { id } => ("x-blockport-drive-del", json!({"id": id})),
            Self::Continue { id } => ("block-export-continue", json!({"id": id})),
        };
        client.execute(command, arguments).map(Output::done)
    }
}

/// Exports with their media.
pub fn list(client: &mut Client) -> Result<Output, Failure> {
    let exports = client.execute("query-block-exports", json!({}))?;
    let devices = client.execute("query-block", json!({}))?;
    let row = |export: &Value| {
        let found = entries(&devices).find(|device| device["device"] == export["id"]);
        let device = found.cloned().unwrap_or_default();
        let access = match device.pointer("/inserted/ro").and_then(Value::as_bool) {
            Some(true) => "read-only",
            Some(false) => "read-write",
            None => "no medium",
        };
        [
            text_at(export, "/id"),
            text_at(export, "/node-name"),
            text_at(&device, "/inserted/drv"),
            bytes_at(&device, "/inserted/image/virtual-size"),
            access.to_owned(),
            text_at(export, "/x-blockport-connected"),
            text_at(&device, "/io-status"),
            text_at(&device, "/inserted/file"),
        ]
    };
    let rows: Vec<_> = entries(&exports).map(row).collect();
    let headings = ["EXPORT", "NODE", "DRIVER", "SIZE", "NODE IS", "CONNECTED", "STATUS", "FILE"];
    Ok(Output { text: table(headings, &rows), json: json!({"exports": exports, "devices": devices}) })
}
