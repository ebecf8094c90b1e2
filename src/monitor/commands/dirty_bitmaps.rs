//! Commands about the persistent bitmaps of qcow2 images.

use blockport_block::drivers::qcow2::{
    NewBitmap, bitmap_add, bitmap_clear, bitmap_enable, bitmap_merge, bitmap_remove,
};
use blockport_block::options::Options;
use serde_json::Value;

use super::super::dispatch::{Command, CommandError, CommandResult, command};
use super::super::schema::{Arguments, Done, Member, QapiType, Schema, arguments};
use super::nodes::find;
use crate::daemon::Daemon;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &command("block-dirty-bitmap-add", add),
    &command("block-dirty-bitmap-remove", remove),
    &command("block-dirty-bitmap-clear", clear),
    &command("block-dirty-bitmap-enable", enable),
    &command("block-dirty-bitmap-disable", disable),
    &command("block-dirty-bitmap-merge", merge),
];

arguments! {
    /// A bitmap to be made.
    BlockDirtyBitmapAdd {
        "node" => node: String,
        "name" => name: String,
        "granularity" => granularity: Option<u64>,
        /// Must be true: bitmaps are kept in images.
        "persistent" => persistent: Option<bool>,
        "disabled" => disabled: Option<bool>,
    }
}

fn add(daemon: &mut Daemon, arguments: BlockDirtyBitmapAdd) -> CommandResult<Done> {
    let BlockDirtyBitmapAdd { node, name, granularity, persistent, disabled } = arguments;
    if persistent != Some(true) {
        return Err(CommandError::new("Bitmaps that are not persistent are not supported: give persistent=true"));
    }
    let new = NewBitmap { name, granularity, enabled: disabled != Some(true) };
    bitmap_add(&find(daemon, &node)?, &new)?;
    Ok(Done {})
}

arguments! {
    /// A bitmap.
    BlockDirtyBitmap {
        "node" => node: String,
        "name" => name: String,
    }
}

fn remove(daemon: &mut Daemon, BlockDirtyBitmap { node, name }: BlockDirtyBitmap) -> CommandResult<Done> {
    bitmap_remove(&find(daemon, &node)?, &name)?;
    Ok(Done {})
}

fn clear(daemon: &mut Daemon, BlockDirtyBitmap { node, name }: BlockDirtyBitmap) -> CommandResult<Done> {
    bitmap_clear(&find(daemon, &node)?, &name)?;
    Ok(Done {})
}

fn enable(daemon: &mut Daemon, BlockDirtyBitmap { node, name }: BlockDirtyBitmap) -> CommandResult<Done> {
    bitmap_enable(&find(daemon, &node)?, &name, true)?;
    Ok(Done {})
}

fn disable(daemon: &mut Daemon, BlockDirtyBitmap { node, name }: BlockDirtyBitmap) -> CommandResult<Done> {
    bitmap_enable(&find(daemon, &node)?, &name, false)?;
    Ok(Done {})
}

/// Bitmaps that are merged into one.
struct BlockDirtyBitmapMerge {
    node: String,
    target: String,
    /// The node of each, if it is another one, and its name.
    sources: Vec<(Option<String>, String)>,
}

impl Arguments for BlockDirtyBitmapMerge {
    fn from_options(mut options: Options) -> blockport_block::options::Result<Self> {
        let node = options.require_str("node")?;
        let target = options.require_str("target")?;
        let list = options.take_json("bitmaps")?.ok_or_else(|| options.missing("bitmaps"))?;
        let source = |one: &Value| {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            match one {
                Value::Object(members) if members.len() == 2 => {
                    Some((Some(text(members.get("node")?)?), text(members.get("name")?)?))
                }
                one => Some((None, text(one)?)),
            }
        };
        let sources: Option<Vec<_>> = list.as_array().and_then(|list| list.iter().map(source).collect());
        let sources = sources
            .ok_or_else(|| options.invalid("bitmaps", &list, "a list of names, or of objects with node and name"))?;
        options.finish()?;
        Ok(Self { node, target, sources })
    }
}

impl QapiType for BlockDirtyBitmapMerge {
    fn describe(schema: &mut Schema) -> String {
        schema.object("BlockDirtyBitmapMerge", |schema| {
            let name = String::describe(schema);
            let source = schema.alternate("BlockDirtyBitmapOrStr", |schema| {
                vec![String::describe(schema), BlockDirtyBitmap::describe(schema)]
            });
            let sources = schema.array(&source);
            vec![
                Member::required("node", name.clone()),
                Member::required("target", name),
                Member::required("bitmaps", sources),
            ]
        })
    }
}

fn merge(daemon: &mut Daemon, arguments: BlockDirtyBitmapMerge) -> CommandResult<Done> {
    let BlockDirtyBitmapMerge { node, target, sources } = arguments;
    let into = find(daemon, &node)?;
    for (source, name) in sources {
        let from = match source {
            Some(source) => find(daemon, &source)?,
            None => into.clone(),
        };
        bitmap_merge(&into, &target, &from, &name)?;
    }
    Ok(Done {})
}
