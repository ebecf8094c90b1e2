//! Commands about character devices and the monitors on them.

use blockport_block::options::Options;

use super::super::dispatch::{Command, CommandResult, command, query};
use super::super::schema::{Arguments, Done, Member, NoArguments, QapiType, Schema, answer, arguments, choice};
use crate::daemon::Daemon;
use crate::options::{ChardevConfig, MonitorConfig};

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &command("chardev-add", chardev_add),
    &command("chardev-remove", chardev_remove),
    &query("query-chardev", query_chardev),
    &command("x-blockport-monitor-add", monitor_add),
    &command("x-blockport-monitor-remove", monitor_remove),
];

/// The arguments of `chardev-add`, which `ChardevConfig` reads.
struct ChardevAdd(ChardevConfig);

impl Arguments for ChardevAdd {
    fn from_options(options: Options) -> blockport_block::options::Result<Self> {
        ChardevConfig::from_arguments(options).map(Self)
    }
}

choice! {
    /// Character devices that can be added.
    ChardevBackendKind {
        "socket" => Socket,
        "stdio" => Stdio,
    }
}

choice! {
    /// Addresses that a socket can have.
    SocketAddressKind {
        "unix" => Unix,
        "fd" => Fd,
    }
}

/// An object that holds `members` in its member "data".
fn wrapped(schema: &mut Schema, name: &str, members: impl FnOnce(&mut Schema) -> Vec<Member>) -> String {
    schema.object(&format!("{name}Wrapper"), |schema| vec![Member::required("data", schema.object(name, members))])
}

fn address(schema: &mut Schema) -> String {
    schema.union("SocketAddressLegacy", "type", |schema| {
        let unix = wrapped(schema, "UnixSocketAddress", |schema| {
            let (text, flag) = (String::describe(schema), bool::describe(schema));
            vec![
                Member::required("path", text),
                Member::optional("abstract", flag.clone()),
                Member::optional("tight", flag),
            ]
        });
        let fd = wrapped(schema, "FdSocketAddress", |schema| vec![Member::required("str", String::describe(schema))]);
        let tag = SocketAddressKind::describe(schema);
        (vec![Member::required("type", tag)], vec![("unix".into(), unix), ("fd".into(), fd)])
    })
}

impl QapiType for ChardevAdd {
    fn describe(schema: &mut Schema) -> String {
        schema.object("ChardevAdd", |schema| {
            let backend = schema.union("ChardevBackend", "type", |schema| {
                let socket = wrapped(schema, "ChardevSocket", |schema| {
                    let flag = bool::describe(schema);
                    vec![
                        Member::required("addr", address(schema)),
                        Member::optional("server", flag.clone()),
                        Member::optional("wait", flag),
                    ]
                });
                let stdio =
                    wrapped(schema, "ChardevStdio", |schema| vec![Member::optional("signal", bool::describe(schema))]);
                let tag = ChardevBackendKind::describe(schema);
                (vec![Member::required("type", tag)], vec![("socket".into(), socket), ("stdio".into(), stdio)])
            });
            vec![Member::required("id", String::describe(schema)), Member::required("backend", backend)]
        })
    }
}

fn chardev_add(daemon: &mut Daemon, ChardevAdd(config): ChardevAdd) -> CommandResult<Done> {
    daemon.chardevs.add(&config, &mut daemon.sockets)?;
    Ok(Done {})
}

arguments! {
    /// A character device.
    ChardevId {
        "id" => id: String,
    }
}

fn chardev_remove(daemon: &mut Daemon, arguments: ChardevId) -> CommandResult<Done> {
    daemon.chardevs.remove(&arguments.id)?;
    Ok(Done {})
}

answer! {
    /// A character device.
    ChardevInfo {
        "label" => label: String,
        /// What it is, in QEMU's words.
        "filename" => filename: String,
        /// Whether a monitor uses it.
        "frontend-open" => frontend_open: bool,
    }
}

fn query_chardev(daemon: &mut Daemon, _: NoArguments) -> CommandResult<Vec<ChardevInfo>> {
    let monitors = &daemon.monitors;
    let info = |(label, chardev): (&str, &crate::chardev::Chardev)| ChardevInfo {
        label: label.to_owned(),
        filename: match chardev.listener().is_none() || monitors.is_connected(label) {
            true => chardev.description().to_owned(),
            false => format!("disconnected:{}", chardev.description()),
        },
        frontend_open: chardev.in_use,
    };
    Ok(daemon.chardevs.iter().map(info).collect())
}

arguments! {
    /// A monitor on a character device.
    MonitorAdd {
        "chardev" => chardev: String,
        "id" => id: Option<String>,
        /// Answers are laid out for people.
        "pretty" => pretty: Option<bool>,
    }
}

fn monitor_add(daemon: &mut Daemon, arguments: MonitorAdd) -> CommandResult<Done> {
    let MonitorAdd { chardev, id, pretty } = arguments;
    daemon.monitors.add(MonitorConfig { chardev, id, pretty: pretty.unwrap_or(false) }, &mut daemon.chardevs)?;
    Ok(Done {})
}

arguments! {
    /// The monitor on this character device.
    MonitorRemove {
        "chardev" => chardev: String,
    }
}

fn monitor_remove(daemon: &mut Daemon, arguments: MonitorRemove) -> CommandResult<Done> {
    daemon.monitors.remove(&arguments.chardev, &mut daemon.chardevs)?;
    Ok(Done {})
}
