//! `ctl resize`, `eject`, `insert`, `change`, `stats`: disks, by the names of their exports.

use std::path::PathBuf;

use blockport_block::options::parse_size;
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::client::Client;
use super::table::{bytes, table};
use super::{Failure, Output, entries, text_at};

/// Verbs about disks.
#[derive(Subcommand, Debug)]
pub enum DeviceVerb {
    /// Change the size of a disk; the guest sees it at once
    Resize {
        /// The export, or with --node a node
        id: String,
        /// The new size in bytes, or with a unit such as 10G
        #[arg(value_parser = size)]
        size: u64,
        /// A node rather than an export
        #[arg(long)]
        node: bool,
    },
    /// Take the medium out; the guest sees a disk of size 0
    Eject {
        /// The export
        id: String,
        /// Even if the guest has locked it
        #[arg(long)]
        force: bool,
    },
    /// Put a node in as the medium of an empty disk
    Insert {
        /// The export
        id: String,
        /// The node
        node: String,
    },
    /// Put a file in the place of the medium
    Change {
        /// The export
        id: String,
        /// The file
        file: PathBuf,
        /// The format of the file [default: qcow2 if its name ends in .qcow2, else raw]
        #[arg(long, value_name = "DRIVER")]
        format: Option<String>,
        /// Whether the file is opened for writing
        #[arg(long, value_enum, default_value_t = Access::Retain)]
        access: Access,
        /// Even if the guest has locked the old medium
        #[arg(long)]
        force: bool,
    },
    /// Limit what a disk does; limits that are not named are lifted, and without any it is unlimited
    Limit {
        /// The export
        id: String,
        /// The limits: iops, iops_rd, iops_wr, bps, bps_rd, bps_wr, also with _max or _max_length behind, and iops_size
        #[arg(value_name = "LIMIT=N")]
        limits: Vec<String>,
        /// The throttle group that it joins [default: its own]
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
    },
    /// Show what queues have done so far, and how deep they are
    Queues {
        /// The export; all of them if it is left out
        id: Option<String>,
        /// Those that no front-end has started as well
        #[arg(long)]
        all: bool,
    },
    /// Show the requests under way, the oldest first, and what each waits for
    Requests {
        /// The export; all of them if it is left out
        id: Option<String>,
        /// Only those that are under way for so many milliseconds
        #[arg(long, value_name = "MS", default_value_t = 0)]
        min_age: u64,
    },
    /// Have requests fail that wait for a drain, a limit or an operator; those that the host works on end when it does
    FailRequests {
        /// The export
        id: String,
    },
    /// Show what has been done so far
    Stats {
        /// The export; all of them if it is left out
        id: Option<String>,
    },
}

/// Whether a medium is opened for writing.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Access {
    /// As the old one was
    Retain,
    /// For reading only
    ReadOnly,
    /// For writing, too
    ReadWrite,
}

pub(super) fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "must be a size in bytes or with a unit, such as 512, 64K or 1.5G".to_owned())
}

impl DeviceVerb {
    /// Carries it out.
    pub fn run(self, client: &mut Client) -> Result<Output, Failure> {
        let (command, arguments) = match self {
            Self::Resize { id, size, node } => {
                let of = if node { "node-name" } else { "device" };
                ("block_resize", json!({of: id, "size": size}))
            }
            Self::Eject { id, force } => ("eject", json!({"id": id, "force": force})),
            Self::Insert { id, node } => ("blockdev-insert-medium", json!({"id": id, "node-name": node})),
            Self::Change { id, file, format, access, force } => {
                // The daemon may be in another directory.
                let file = std::path::absolute(&file)?;
                let file = file.to_str().ok_or("the path of an image must be UTF-8")?;
                let mode = match access {
                    Access::Retain => "retain",
                    Access::ReadOnly => "read-only",
                    Access::ReadWrite => "read-write",
                };
                let mut arguments = json!({"id": id, "filename": file, "force": force, "read-only-mode": mode});
                if let Some(format) = format {
                    arguments["format"] = format.into();
                }
                ("blockdev-change-medium", arguments)
            }
            Self::Limit { id, limits, group } => {
                let mut arguments = json!({"id": id});
                for name in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
                    arguments[name] = 0.into();
                }
                for limit in limits {
                    let (name, number) = limit.split_once('=').ok_or_else(|| format!("{limit}: write LIMIT=N"))?;
                    arguments[name] = size(number).map_err(|expected| format!("{limit}: {expected}"))?.into();
                }
                if let Some(group) = group {
                    arguments["group"] = group.into();
                }
                ("block_set_io_throttle", arguments)
            }
            Self::Requests { id, min_age } => return requests(client, id, min_age),
            Self::FailRequests { id } => {
                let answer = client.execute("x-blockport-fail-requests", json!({"id": id}))?;
                let (failed, left) = (text_at(&answer, "/failed"), text_at(&answer, "/left"));
                return Ok(Output { text: format!("{failed} failed, the host works on {left}"), json: answer });
            }
            Self::Queues { id, all } => return queues(client, id, all),
            Self::Stats { id } => return stats(client, id.as_deref()),
        };
        client.execute(command, arguments).map(Output::done)
    }
}

fn requests(client: &mut Client, id: Option<String>, min_age_ms: u64) -> Result<Output, Failure> {
    let mut arguments = json!({"min-age-ms": min_age_ms});
    if let Some(id) = id {
        arguments["id"] = id.into();
    }
    let list = client.execute("x-blockport-query-requests", arguments)?;
    let row = |request: &Value| {
        ["device", "operation", "offset", "bytes", "age-ms", "waits-for"]
            .map(|key| text_at(request, &format!("/{key}")))
    };
    let rows: Vec<_> = entries(&list).map(row).collect();
    let headings = ["EXPORT", "OPERATION", "OFFSET", "BYTES", "AGE MS", "WAITS FOR"];
    Ok(Output { text: table(headings, &rows), json: list })
}

fn queues(client: &mut Client, id: Option<String>, all: bool) -> Result<Output, Failure> {
    let arguments = id.map_or(json!({}), |id| json!({"id": id}));
    let list = client.execute("x-blockport-query-queues", arguments)?;
    let is_used = |queue: &&Value| all || queue["size"] != 0 || queue["requests"] != 0;
    let chosen: Vec<Value> = entries(&list).filter(is_used).cloned().collect();
    let row = |queue: &Value| {
        ["device", "queue", "iothread", "size", "in-flight", "requests", "batches", "polled-batches", "kicks", "calls"]
            .map(|key| text_at(queue, &format!("/{key}")))
    };
    let rows: Vec<_> = chosen.iter().map(row).collect();
    let headings = ["EXPORT", "QUEUE", "IOTHREAD", "SIZE", "DEPTH", "REQUESTS", "BATCHES", "POLLED", "KICKS", "CALLS"];
    Ok(Output { text: table(headings, &rows), json: chosen.into() })
}

fn stats(client: &mut Client, id: Option<&str>) -> Result<Output, Failure> {
    let all = client.execute("query-blockstats", json!({}))?;
    let chosen: Vec<Value> =
        entries(&all).filter(|device| id.is_none_or(|id| device["device"] == id)).cloned().collect();
    if let (Some(id), true) = (id, chosen.is_empty()) {
        return Err(format!("Device '{id}' not found").into());
    }
    let row = |device: &Value| {
        let count = |key: &str| device["stats"][key].as_u64().unwrap_or(0);
        let all = |what: &str| {
            ["rd", "wr", "flush", "unmap"].map(|of| count(&format!("{what}_{of}_operations"))).iter().sum::<u64>()
        };
        [
            text_at(device, "/device"),
            count("rd_operations").to_string(),
            bytes(count("rd_bytes")),
            count("wr_operations").to_string(),
            bytes(count("wr_bytes")),
            count("flush_operations").to_string(),
            count("unmap_operations").to_string(),
            all("failed").to_string(),
            all("invalid").to_string(),
        ]
    };
    let rows: Vec<_> = chosen.iter().map(row).collect();
    let headings = ["EXPORT", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES", "DISCARDS", "FAILED", "INVALID"];
    Ok(Output { text: table(headings, &rows), json: chosen.into() })
}
