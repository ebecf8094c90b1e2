//! The command line in the style of qemu-storage-daemon: objects, nodes and exports, one option each.
//!
//! This file owns what `--object`, `--blockdev`, `--export`, `--chardev` and `--monitor` mean and their order, and it refuses by name what that
//! program has and this one lacks. It never interprets the options of a block driver.

use std::path::PathBuf;

use blockport_block::options::{Options, OptionsError, parse_keyval};
use blockport_block::throttle::ThrottleLimits;
use clap::{ArgMatches, Args};

use super::{
    ChardevConfig, Config, ExportConfig, Invocation, IothreadConfig, MonitorConfig, SecretConfig, Step,
    ThrottleGroupConfig, UsageError,
};

/// Objects that qemu-storage-daemon knows and this daemon does not yet.
const OBJECTS_UNSUPPORTED: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// Options that qemu-storage-daemon knows and this daemon does not yet: the argument's name and how it is written.
const UNSUPPORTED: &[(&str, &str)] = &[("nbd_server", "--nbd-server"), ("trace", "--trace")];

/// The options, with their help.
#[derive(Args, Debug)]
#[command(next_help_heading = "Any graph of nodes, in the style of qemu-storage-daemon")]
#[allow(rustdoc::broken_intra_doc_links, reason = "the comments are help texts, where brackets mean optional parts")]
pub struct StorageDaemonArgs {
    /// Create an object: iothread,id=ID[,OPTION=VALUE]..., throttle-group,id=ID[,limits.LIMIT=N]... or
    /// secret,id=ID,file=FILE[,format=base64]
    ///
    /// An iothread runs queues of the exports that name it. It polls for up to poll-max-ns nanoseconds (32768) before
    /// it sleeps; 0 never polls. That time adapts by the factor poll-grow (2) and the divisor poll-shrink (0: from the
    /// start). aio-engine says what carries its I/O out: io_uring, threads (slower), or auto (the default), which is
    /// threads where there is no io_uring. cpu-affinity=0-3 binds it to CPUs.
    ///
    /// A throttle-group limits what all nodes of driver `throttle` that name it do together. LIMIT is iops-total, or
    /// iops-read and iops-write, operations per second, and bps-total, or bps-read and bps-write, bytes per second; each
    /// with -max behind it for the rate of bursts, and with -max-length for how many seconds one may last (1). With
    /// iops-size=BYTES, a longer operation counts as several.
    ///
    /// A secret is the passphrase of an encrypted image, which names it: key-secret=ID of a node of driver `luks`,
    /// encrypt.key-secret=ID of one of driver `qcow2`. It is the whole content of the file, an end of line included.
    /// data=TEXT in place of file= shows it to everybody who can list processes.
    ///
    /// `--object help` lists the kinds of objects, `--object iothread,help` the properties of one.
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,

    /// Define a node: [driver=]DRIVER,node-name=NAME[,OPTION=VALUE]...
    ///
    /// Dotted keys nest: `file.driver=file` defines a child in place, `file=NAME` refers to a node defined before. A
    /// comma in a value is written twice. An argument that starts with `{` is JSON.
    ///
    /// Every driver knows node-name, read-only, auto-read-only, discard, detect-zeroes, cache.direct, cache.no-flush,
    /// force-share and active (off: opened without locks, until blockdev-set-active or an export's first ring); `file` knows filename, locking and aio, too.
    #[arg(long, value_name = "NODE")]
    blockdev: Vec<String>,

    /// Serve a node: [type=]vhost-user-blk,id=ID,node-name=NAME,addr.type=unix,addr.path=SOCKET[,OPTION=VALUE]...
    ///
    /// addr.type=fd,addr.str=N takes an inherited socket instead, listening or connected. Further options: writable=on
    /// (off), num-queues=1..256 (1), logical-block-size=SIZE (512), writethrough=on (off), iothread=ID or
    /// iothreads.0=ID,iothreads.1=ID... (queues in turn) or iothread-vq-mapping.0.iothread=ID,
    /// iothread-vq-mapping.0.vqs.0=N... (each queue exactly once), fixed-iothread, serial=TEXT of at most 20 bytes (the id), queue-size-max=N
    /// (32768), seg-max=1..1024 (126), packed=off (on), socket-mode=OCTAL and socket-group=GROUP (by the umask). What is
    /// done about requests that fail on the host: rerror (report) and werror (enospc) are report, ignore, enospc, stop or
    /// auto, as QEMU has them; a device that stops keeps its requests until it goes on, or for stop-timeout=MILLISECONDS
    /// (0: for ever). For live migration, allow-inactive=on (off) lets the node be inactive while no ring runs; the first one
    /// that starts activates it. hand-over=on (off) also has it become inactive whenever the last one has stopped, so that
    /// another process can take the image over.
    #[arg(long, value_name = "EXPORT")]
    export: Vec<String>,

    /// Say where a monitor is reached: [backend=]socket,id=ID,path=SOCKET,server=on,wait=off, or stdio,id=ID
    ///
    /// Instead of path=, abstract=on with path=NAME takes a name that is in no file system, and fd=N an inherited socket.
    /// server=off connects to a socket, or takes fd=N for connected. With wait=on, which a server has unless told
    /// otherwise, the start goes on when the first client has come. A socket file's mode is 0600: whoever may connect
    /// commands the daemon.
    #[arg(long, value_name = "CHARDEV")]
    chardev: Vec<String>,

    /// Take commands: [chardev=]ID[,mode=control][,pretty=on]
    ///
    /// A monitor speaks QMP, QEMU's protocol of JSON objects; `blockport ctl` is a client for people. Several clients may
    /// be connected at once.
    #[arg(long, value_name = "MONITOR")]
    monitor: Vec<String>,

    /// Write the process id to a file, once everything is up
    #[arg(long, value_name = "PATH", overrides_with = "pidfile")]
    pidfile: Option<PathBuf>,

    /// Go to the background; the command returns when everything is up
    #[arg(long, overrides_with = "daemonize")]
    daemonize: bool,

    #[arg(long, hide = true, value_name = "OPTIONS")]
    nbd_server: Vec<String>,

    #[arg(short = 'T', long, hide = true, value_name = "OPTIONS")]
    trace: Vec<String>,
}

impl StorageDaemonArgs {
    /// What the options ask for. `matches` are those that `self` comes from; they know the order.
    pub fn invocation(self, matches: &ArgMatches) -> Result<Invocation, UsageError> {
        if let Some((_, written)) = UNSUPPORTED.iter().find(|(id, _)| matches.contains_id(id)) {
            return Err(UsageError::new(format!("{written} is not supported yet")));
        }
        let mut config = Config { pidfile: self.pidfile, daemonize: self.daemonize, ..Config::default() };
        for (option, text) in in_order(matches) {
            match (option, object_help(text)) {
                ("object", Some(help)) => return Ok(Invocation::Print(help)),
                _ => config.steps.push(definition(option, text)?),
            }
        }
        Ok(Invocation::Start(config))
    }
}

/// Reads the argument of `--OPTION`, one that defines something.
pub fn definition(option: &str, text: &str) -> Result<Step, UsageError> {
    Ok(match option {
        "object" => object(text)?,
        "blockdev" => Step::Blockdev(blockdev(text)?),
        "chardev" => {
            let options = parse(text, "chardev", "backend", "id")?;
            Step::Chardev(ChardevConfig::from_options(options).map_err(UsageError::new)?)
        }
        "monitor" => {
            let options = parse(text, "monitor", "chardev", "chardev")?;
            Step::Monitor(MonitorConfig::from_options(options).map_err(UsageError::new)?)
        }
        _ => {
            let options = parse(text, "export", "type", "id")?;
            Step::Export(ExportConfig::from_options(options).map_err(UsageError::new)?)
        }
    })
}

/// The repeatable options and their values as they stand on the command line.
fn in_order(matches: &ArgMatches) -> Vec<(&'static str, &str)> {
    let mut found = Vec::new();
    for option in ["object", "blockdev", "export", "chardev", "monitor"] {
        let values = matches.get_many::<String>(option).unwrap_or_default();
        let indices = matches.indices_of(option).unwrap_or_default();
        found.extend(indices.zip(values).map(|(index, value)| (index, option, value.as_str())));
    }
    found.sort_by_key(|(index, ..)| *index);
    found.into_iter().map(|(_, option, value)| (option, value)).collect()
}

/// Reads one argument. Complaints begin with `option` and what stands at `name_key`, if it does.
fn parse(text: &str, option: &str, implied_key: &str, name_key: &str) -> Result<Options, UsageError> {
    let flag = format!("--{option}");
    let options = parse_keyval(text, Some(implied_key))
        .map_err(|error: OptionsError| UsageError::new(error.about(flag.as_str())))?;
    let subject = match options.peek_str(name_key) {
        Some(name) => format!("{option} {name:?}"),
        None => flag,
    };
    Ok(options.with_subject(subject))
}

/// Reads a node's options. They stay whole: the graph takes the name and the driver.
fn blockdev(text: &str) -> Result<Options, UsageError> {
    let options = parse(text, "blockdev", "driver", "node-name")?;
    match ["driver", "node-name"].iter().find(|key| !options.contains(key)) {
        Some(key) => Err(UsageError::new(options.missing(key))),
        None => Ok(options),
    }
}

/// The answer to a question about objects; `None` if it is none.
fn object_help(text: &str) -> Option<String> {
    match text {
        "help" | "?" => Some("Objects:\n  iothread\n  secret\n  throttle-group\n".to_owned()),
        "iothread,help" | "iothread,?" => {
            let properties =
                "  aio-engine=<auto|io_uring|threads>\n  cpu-affinity=<list>\n  poll-grow=<int>\n  poll-max-ns=<int>\n";
            Some(format!("iothread properties:\n{properties}  poll-shrink=<int>\n"))
        }
        "secret,help" | "secret,?" => {
            Some("secret properties:\n  data=<str>\n  file=<path>\n  format=<raw|base64>\n".to_owned())
        }
        "throttle-group,help" | "throttle-group,?" => {
            let limits = ThrottleLimits::default().values();
            let limits: String = limits.iter().map(|(name, _)| format!("  limits.{name}=<int>\n")).collect();
            Some(format!("throttle-group properties:\n{limits}"))
        }
        _ => None,
    }
}

/// Reads an object.
fn object(text: &str) -> Result<Step, UsageError> {
    let mut options = parse(text, "object", "qom-type", "id")?;
    let kind = options.require_str("qom-type").map_err(UsageError::new)?;
    match kind.as_str() {
        "iothread" => IothreadConfig::from_options(options).map(Step::Iothread).map_err(UsageError::new),
        "throttle-group" => {
            ThrottleGroupConfig::from_options(options).map(Step::ThrottleGroup).map_err(UsageError::new)
        }
        "secret" => SecretConfig::from_options(options).map(Step::Secret).map_err(UsageError::new),
        kind if OBJECTS_UNSUPPORTED.contains(&kind) => {
            Err(UsageError::new(options.unsupported_value("qom-type", kind)))
        }
        other => Err(UsageError::new(options.invalid("qom-type", other, "iothread, secret or throttle-group"))),
    }
}
