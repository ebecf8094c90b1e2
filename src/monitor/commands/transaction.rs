//! Commands that are carried out together, all or none: `transaction`, and those it can group by themselves.
//!
//! This file owns the order: all disks rest, each action is done in turn, and if one fails those before it are taken back,
//! the last first. What an action does is its own.

use blockport_block::options::{Options, Result};

use super::super::dispatch::{Command, CommandError, CommandResult, command};
use super::super::schema::{Arguments, Done, Member, QapiType, Schema, arguments};
use super::nodes;
use super::requests;
use crate::daemon::Daemon;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] =
    &[&command("blockdev-snapshot", blockdev_snapshot), &command("transaction", transaction)];

/// How many actions a transaction has, at most.
const ACTIONS_MAX: usize = 256;

/// Describes the arguments of an action; gives the name of their type.
type Describe = fn(&mut Schema) -> String;

/// Takes back what an action did.
type Undo = Box<dyn FnOnce(&mut Daemon)>;

arguments! {
    /// A node, and the image that gets on top of it.
    BlockdevSnapshot {
        "node" => node: String,
        /// An image without users, opened with "backing": null.
        "overlay" => overlay: String,
    }
}

fn take_snapshot(daemon: &mut Daemon, arguments: &BlockdevSnapshot) -> CommandResult<Undo> {
    let node = nodes::find(daemon, &arguments.node)?;
    let overlay = nodes::find(daemon, &arguments.overlay)?;
    requests::settle(std::slice::from_ref(&node))?;
    let snapshot = daemon.graph.snapshot(&node, &overlay)?;
    Ok(Box::new(move |daemon| daemon.graph.undo_snapshot(&snapshot)))
}

fn blockdev_snapshot(daemon: &mut Daemon, arguments: BlockdevSnapshot) -> CommandResult<Done> {
    drop(take_snapshot(daemon, &arguments)?);
    Ok(Done {})
}

arguments! {
    /// Nothing but the end of a transaction.
    Abort {}
}

/// What can be grouped.
#[derive(Debug)]
enum Action {
    Abort,
    Snapshot(BlockdevSnapshot),
}

impl Action {
    /// As they are called, each with the type of its arguments.
    const KINDS: [(&'static str, Describe); 2] =
        [("abort", Abort::describe), ("blockdev-snapshot", BlockdevSnapshot::describe)];

    fn read(mut options: Options) -> Result<Self> {
        let kind = options.require_str("type")?;
        let data = options.take_options("data")?.ok_or_else(|| options.missing("data"))?;
        let action = match kind.as_str() {
            "abort" => Abort::from_options(data).map(|Abort {}| Self::Abort)?,
            "blockdev-snapshot" => BlockdevSnapshot::from_options(data).map(Self::Snapshot)?,
            other => {
                let known: Vec<&str> = Self::KINDS.iter().map(|(name, _)| *name).collect();
                return Err(options.invalid("type", other, format!("one of {}", known.join(", "))));
            }
        };
        options.finish()?;
        Ok(action)
    }

    fn carry_out(&self, daemon: &mut Daemon) -> CommandResult<Undo> {
        match self {
            Self::Abort => Err(CommandError::new("Transaction aborted using Abort action")),
            Self::Snapshot(arguments) => take_snapshot(daemon, arguments),
        }
    }
}

/// The actions, in order.
struct Transaction(Vec<Action>);

impl Arguments for Transaction {
    fn from_options(mut options: Options) -> Result<Self> {
        let list = options.take_options_list("actions")?.ok_or_else(|| options.missing("actions"))?;
        if list.len() > ACTIONS_MAX {
            let count = format!("{} actions", list.len());
            return Err(options.invalid("actions", count, format!("at most {ACTIONS_MAX}")));
        }
        let actions = list.into_iter().map(Action::read).collect::<Result<_>>()?;
        options.finish()?;
        Ok(Self(actions))
    }
}

impl QapiType for Transaction {
    fn describe(schema: &mut Schema) -> String {
        schema.object("Transaction", |schema| {
            let action = schema.union("TransactionAction", "type", |schema| {
                let tag = schema.choice("TransactionActionKind", &Action::KINDS.map(|(name, _)| name));
                let wrapped = |(name, describe): (&str, Describe)| {
                    let kind = schema
                        .object(&format!("{name}-wrapper"), |schema| vec![Member::required("data", describe(schema))]);
                    (name.to_owned(), kind)
                };
                let cases = Action::KINDS.map(wrapped).to_vec();
                (vec![Member::required("type", tag)], cases)
            });
            vec![Member::required("actions", schema.array(&action))]
        })
    }
}

fn transaction(daemon: &mut Daemon, Transaction(actions): Transaction) -> CommandResult<Done> {
    // So that what all of them do is done at one moment of every disk.
    let drained = requests::drain_all(daemon)?;
    let mut done: Vec<Undo> = Vec::new();
    let mut result = Ok(Done {});
    for action in &actions {
        match action.carry_out(daemon) {
            Ok(undo) => done.push(undo),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    if result.is_err() {
        done.into_iter().rev().for_each(|undo| undo(daemon));
    }
    drop(drained);
    result
}
