//! `ctl node …`: what stands behind exports.

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::Client;
use super::table::table;
use super::{Failure, Output, bytes_at, entries, text_at};

/// Verbs about nodes.
#[derive(Subcommand, Debug)]
pub enum NodeVerb {
    /// List the nodes
    List,
    /// Define a node, as --blockdev does
    Add {
        /// DRIVER,node-name=NAME[,OPTION=VALUE]... or JSON
        definition: String,
    },
    /// Close a node that nothing uses
    Del {
        /// The node
        node: String,
    },
    /// Open a node anew with other options; what is left out goes back to its default
    Reopen {
        /// DRIVER,node-name=NAME[,OPTION=VALUE]... or JSON
        definition: String,
    },
    /// Put an image on top of a node; what its users write from now on goes there
    Snapshot {
        /// The node
        node: String,
        /// The image: a node that nothing uses, opened with "backing": null
        overlay: String,
    },
    /// Be told once, by an event, when a write ends after so many bytes of a node; 0: no longer
    Threshold {
        /// The node
        node: String,
        /// In bytes, or with a unit such as 10G
        #[arg(value_parser = super::device::size)]
        threshold: u64,
    },
    /// Take a node's locks and access
    Activate {
        /// The node
        node: String,
    },
    /// Let a node's locks and access go
    Inactivate {
        /// The node
        node: String,
    },
}

impl NodeVerb {
    /// Carries it out.
    pub fn run(self, client: &mut Client) -> Result<Output, Failure> {
        let (command, arguments) = match self {
            Self::List => return list(client),
            Self::Add { definition } => ("x-blockport-add", json!({"kind": "blockdev", "definition": definition})),
            Self::Reopen { definition } => ("x-blockport-reopen", json!({"definition": definition})),
            Self::Del { node } => ("blockdev-del", json!({"node-name": node})),
            Self::Snapshot { node, overlay } => ("blockdev-snapshot", json!({"node": node, "overlay": overlay})),
            Self::Threshold { node, threshold } => {
                ("block-set-write-threshold", json!({"node-name": node, "write-threshold": threshold}))
            }
            Self::Activate { node } => ("blockdev-set-active", json!({"node-name": node, "active": true})),
            Self::Inactivate { node } => ("blockdev-set-active", json!({"node-name": node, "active": false})),
        };
        client.execute(command, arguments).map(Output::done)
    }
}

fn list(client: &mut Client) -> Result<Output, Failure> {
    let nodes = client.execute("query-named-block-nodes", json!({}))?;
    let row = |node: &Value| {
        let children: Vec<String> = entries(&node["children"])
            .map(|child| format!("{}={}", text_at(child, "/child"), text_at(child, "/node-name")))
            .collect();
        [
            text_at(node, "/node-name"),
            text_at(node, "/drv"),
            bytes_at(node, "/image/virtual-size"),
            bytes_at(node, "/image/actual-size"),
            if node["ro"] == true { "read-only" } else { "read-write" }.to_owned(),
            text_at(node, "/active"),
            if children.is_empty() { "-".to_owned() } else { children.join(" ") },
            text_at(node, "/file"),
        ]
    };
    let rows: Vec<_> = entries(&nodes).map(row).collect();
    let headings = ["NODE", "DRIVER", "SIZE", "ON HOST", "ACCESS", "ACTIVE", "CHILDREN", "FILE"];
    Ok(Output { text: table(headings, &rows), json: nodes })
}
