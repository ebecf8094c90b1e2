//! Commands about nodes: what stands behind exports.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use blockport_block::options::Options;
use blockport_block::{BlockBackend, DetectZeroes, Node, PermissionSet};

use super::super::dispatch::{Command, CommandError, CommandResult, command, query};
use super::super::options_schema;
use super::super::schema::{Arguments, Done, Member, QapiType, Schema, answer, arguments, choice};
use super::requests;
use crate::daemon::Daemon;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &command("blockdev-add", blockdev_add),
    &command("blockdev-del", blockdev_del),
    &command("blockdev-reopen", blockdev_reopen),
    &command("blockdev-set-active", blockdev_set_active),
    &command("block-set-write-threshold", block_set_write_threshold),
    &query("query-named-block-nodes", query_named_block_nodes),
];

/// A node's whole definition, which the graph reads.
struct BlockdevAdd(Options);

impl Arguments for BlockdevAdd {
    fn from_options(options: Options) -> blockport_block::options::Result<Self> {
        match ["driver", "node-name"].iter().find(|key| !options.contains(key)) {
            Some(key) => Err(options.missing(key)),
            None => Ok(Self(options)),
        }
    }
}

impl QapiType for BlockdevAdd {
    fn describe(schema: &mut Schema) -> String {
        options_schema::node(schema)
    }
}

fn blockdev_add(daemon: &mut Daemon, BlockdevAdd(options): BlockdevAdd) -> CommandResult<Done> {
    daemon.graph.blockdev_add(options)?;
    Ok(Done {})
}

arguments! {
    /// A node.
    NodeName {
        "node-name" => node_name: String,
    }
}

fn blockdev_del(daemon: &mut Daemon, arguments: NodeName) -> CommandResult<Done> {
    daemon.graph.blockdev_del(&arguments.node_name)?;
    Ok(Done {})
}

/// The new definitions of nodes.
struct BlockdevReopen(Vec<Options>);

impl Arguments for BlockdevReopen {
    fn from_options(mut options: Options) -> blockport_block::options::Result<Self> {
        let list = options.take_options_list("options")?.ok_or_else(|| options.missing("options"))?;
        options.finish()?;
        Ok(Self(list))
    }
}

impl QapiType for BlockdevReopen {
    fn describe(schema: &mut Schema) -> String {
        schema.object("BlockdevReopen", |schema| {
            let node = options_schema::node(schema);
            vec![Member::required("options", schema.array(&node))]
        })
    }
}

fn blockdev_reopen(daemon: &mut Daemon, BlockdevReopen(list): BlockdevReopen) -> CommandResult<Done> {
    let names = list.iter().filter_map(|options| options.peek_str("node-name"));
    let nodes: Vec<Arc<Node>> = names.filter_map(|name| daemon.graph.find(name)).collect();
    requests::settle(&nodes)?;
    daemon.graph.reopen(list)?;
    Ok(Done {})
}

arguments! {
    /// Which node holds its locks, or all.
    SetActive {
        "node-name" => node_name: Option<String>,
        "active" => active: bool,
    }
}

fn blockdev_set_active(daemon: &mut Daemon, arguments: SetActive) -> CommandResult<Done> {
    let SetActive { node_name, active } = arguments;
    let nodes = match node_name {
        Some(name) => vec![find(daemon, &name)?],
        // Those that others stand on follow them.
        None => daemon.graph.all_nodes().into_iter().filter(|node| node.parents().is_empty()).collect(),
    };
    let writes = |backend: &Arc<BlockBackend>| backend.permissions().held.contains(PermissionSet::WRITE);
    for node in nodes.iter().filter(|node| !active && node.is_active()) {
        let stays = |backend: &&Arc<BlockBackend>| writes(backend) && !daemon.exports.lets_go(backend);
        if let Some(user) = node.backends_above().iter().find(stays) {
            let (name, user) = (node.name(), user.label());
            return Err(CommandError::new(format!("Failed to inactivate node '{name}': export '{user}' writes to it")));
        }
    }
    requests::settle(&nodes)?;
    let mut changed: Vec<Arc<Node>> = Vec::new();
    for node in nodes.iter().filter(|node| node.is_active() != active) {
        let result = if active { node.activate() } else { node.inactivate() };
        if let Err(error) = result {
            for node in changed {
                let back = if active { node.inactivate() } else { node.activate() };
                if let Err(error) = back {
                    tracing::error!("{error}");
                }
            }
            return Err(error.into());
        }
        changed.push(node.clone());
    }
    Ok(Done {})
}

arguments! {
    /// The threshold of a node: a write that ends after it raises BLOCK_WRITE_THRESHOLD, once.
    SetWriteThreshold {
        "node-name" => node_name: String,
        /// In bytes from the node's start; 0: none.
        "write-threshold" => write_threshold: u64,
    }
}

fn block_set_write_threshold(daemon: &mut Daemon, arguments: SetWriteThreshold) -> CommandResult<Done> {
    let SetWriteThreshold { node_name, write_threshold } = arguments;
    find(daemon, &node_name)?.set_write_threshold((write_threshold > 0).then_some(write_threshold));
    Ok(Done {})
}

/// The node of that name.
pub fn find(daemon: &Daemon, name: &str) -> CommandResult<Arc<Node>> {
    let missing = || CommandError::new(format!("Failed to find node with node-name='{name}'"));
    daemon.graph.find(name).ok_or_else(missing)
}

choice! {
    /// What a node does with writes of zeroes.
    BlockdevDetectZeroesOptions {
        "off" => Off,
        "on" => On,
        "unmap" => Unmap,
    }
}

answer! {
    /// An image.
    ImageInfo {
        "filename" => filename: String,
        "format" => format: String,
        "virtual-size" => virtual_size: u64,
        /// What it takes on the host.
        "actual-size" => actual_size: Option<u64>,
        "dirty-flag" => dirty_flag: bool,
    }
}

answer! {
    /// How a node is cached.
    BlockdevCacheInfo {
        "writeback" => writeback: bool,
        "direct" => direct: bool,
        "no-flush" => no_flush: bool,
    }
}

answer! {
    /// A child of a node.
    BlockdevChild {
        "child" => child: String,
        "node-name" => node_name: String,
    }
}

answer! {
    /// A node.
    BlockDeviceInfo {
        "node-name" => node_name: String,
        "file" => file: String,
        "drv" => drv: String,
        "ro" => ro: bool,
        "active" => active: bool,
        "encrypted" => encrypted: bool,
        "detect_zeroes" => detect_zeroes: BlockdevDetectZeroesOptions,
        "backing_file_depth" => backing_file_depth: u64,
        "backing_file" => backing_file: Option<String>,
        "bps" => bps: u64,
        "bps_rd" => bps_rd: u64,
        "bps_wr" => bps_wr: u64,
        "iops" => iops: u64,
        "iops_rd" => iops_rd: u64,
        "iops_wr" => iops_wr: u64,
        /// The throttle group of the device, if it is in one.
        "group" => group: Option<String>,
        "image" => image: ImageInfo,
        "cache" => cache: BlockdevCacheInfo,
        "write_threshold" => write_threshold: u64,
        "children" => children: Option<Vec<BlockdevChild>>,
    }
}

/// What is told of a node.
pub fn info(node: &Arc<Node>) -> BlockDeviceInfo {
    let options = node.options();
    let file = filename(node);
    let actual_size = std::fs::metadata(&file).ok().map(|file| file.blocks() * 512);
    let driver = node.driver();
    let children = driver
        .children()
        .iter()
        .map(|child| BlockdevChild { child: child.role().to_owned(), node_name: child.node().name().to_owned() });
    BlockDeviceInfo {
        node_name: node.name().to_owned(),
        drv: node.driver_name().to_owned(),
        ro: node.is_read_only(),
        active: node.is_active(),
        encrypted: false,
        detect_zeroes: match options.detect_zeroes {
            DetectZeroes::Off => BlockdevDetectZeroesOptions::Off,
            DetectZeroes::On => BlockdevDetectZeroesOptions::On,
            DetectZeroes::Unmap => BlockdevDetectZeroesOptions::Unmap,
        },
        backing_file_depth: std::iter::successors(backing(node), backing).count() as u64,
        backing_file: backing(node).as_ref().map(filename),
        // Limits are the device's, or a group's of a node by itself.
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        group: None,
        image: ImageInfo {
            filename: file.clone(),
            format: node.driver_name().to_owned(),
            virtual_size: node.length(),
            actual_size,
            dirty_flag: false,
        },
        cache: BlockdevCacheInfo { writeback: true, direct: options.cache_direct, no_flush: options.cache_no_flush },
        write_threshold: node.write_threshold().unwrap_or(0),
        children: Some(children.collect()),
        file,
    }
}

/// The file that a node stands on in the end; what it is, where there is none.
fn filename(node: &Arc<Node>) -> String {
    match (&node.options().file_name, node.driver().children().first()) {
        (Some(name), _) => name.clone(),
        (None, Some(child)) => filename(&child.node()),
        (None, None) => format!("{}://", node.driver_name()),
    }
}

/// The image that shows where this one holds nothing.
fn backing(node: &Arc<Node>) -> Option<Arc<Node>> {
    node.driver().children().iter().find(|child| child.role() == "backing").map(|child| child.node())
}

arguments! {
    /// What of the nodes is told.
    QueryNamedBlockNodes {
        /// Leave out what nodes stand on.
        "flat" => flat: Option<bool>,
    }
}

fn query_named_block_nodes(
    daemon: &mut Daemon,
    arguments: QueryNamedBlockNodes,
) -> CommandResult<Vec<BlockDeviceInfo>> {
    let flat = arguments.flat == Some(true);
    let shown = |node: &Arc<Node>| {
        let info = info(node);
        if flat { BlockDeviceInfo { children: None, ..info } } else { info }
    };
    Ok(daemon.graph.all_nodes().iter().map(shown).collect())
}
