//! The command line → one typed [`Config`].
//!
//! This file owns the three styles of command line (`serve DISK`, the options of qemu-storage-daemon, the conventions
//! of vhost-user programs), keeps them apart, and owns the types that the daemon is started from. It never opens,
//! creates or starts anything.

mod chardev;
mod control;
mod cpus;
mod disk;
mod export;
mod iothread;
mod metrics;
mod queue_mapping;
mod sandbox;
mod secret;
mod storage_daemon;
pub mod table;
mod throttle_group;
mod vhost_user_program;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use blockport_block::options::Options;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser};

use crate::commands::{self, Command};
pub use chardev::{ChardevConfig, ChardevKind, MonitorConfig};
pub use control::{ControlArgs, ControlConfig};
pub use cpus::Cpus;
pub use disk::{CacheMode, Disk};
pub use export::{
    EXPORT_OPTIONS, ExportConfig, ON_ERROR_NAMES, QUEUES_MAX, SEG_MAX_DEFAULT, SEG_MAX_LIMIT, STOP_TIMEOUT_MS_MAX,
    SocketAddress, check_queue_size_max, check_serial, check_socket_path, parse_logical_block_size, parse_socket_mode,
};
pub use iothread::{IOTHREAD_OPTIONS, IothreadConfig, POLL_MAX_NS_DEFAULT};
pub use metrics::{MetricsAddress, MetricsArgs};
pub use queue_mapping::QueueMapping;
pub use sandbox::{SandboxArgs, SandboxConfig, SandboxMode};
pub use secret::{SECRET_OPTIONS, SecretConfig};
use storage_daemon::StorageDaemonArgs;
pub use storage_daemon::definition;
pub use throttle_group::ThrottleGroupConfig;
use vhost_user_program::VhostUserProgramArgs;

/// The exit status of a command line that cannot be understood.
const USAGE_STATUS: u8 = 2;

/// Examples, which end `--help` and stand in the manual page.
pub const EXAMPLES: &str = "\
Serve a disk image; the command prints how to plug it into QEMU and cloud-hypervisor:
  blockport serve disk.raw --socket /run/vm1.sock

The same for a guest with four virtual CPUs, on two threads:
  blockport serve disk.raw --socket /run/vm1.sock --queues 4 --iothreads 2

The same as qemu-storage-daemon would be told, in the background:
  blockport --object iothread,id=t0 \\
    --blockdev file,node-name=image,filename=disk.raw,cache.direct=on \\
    --blockdev raw,node-name=disk,file=image \\
    --export vhost-user-blk,id=vm1,node-name=disk,addr.type=unix,addr.path=vm1.sock,writable=on \\
    --pidfile /run/blockport.pid --daemonize

A disk that can be commanded while it is served, and two commands:
  blockport serve disk.raw --socket /run/vm1.sock --monitor /run/vm1.ctl
  blockport ctl /run/vm1.ctl list
  blockport ctl /run/vm1.ctl resize disk 20G

As management software starts a vhost-user program:
  blockport --socket-path=/run/vm1.sock --blk-file=disk.raw
";

/// Serves disk images to virtual machines as virtio-blk devices over vhost-user sockets.
///
/// A front-end (QEMU, cloud-hypervisor, crosvm, Firecracker, a libblkio program) connects to the socket, shares the
/// memory of its guest, and the guest sees a virtio-blk disk. The device outlives connections: a front-end that goes
/// is followed by the next.
///
/// There are three ways to say what to serve, one at a time: the command `serve` for one disk image; `--object`,
/// `--blockdev` and `--export` for any graph of nodes, created in the order given; `--socket-path` or `--fd` with `--blk-file` for management
/// software.
///
/// SIGTERM, SIGINT and SIGHUP finish what is under way, flush, and end the program; a second one ends it at once. The exit
/// status is 0 after that, 1 if the start failed, and 2 if the command line could not be understood.
#[derive(Parser, Debug)]
#[command(
    name = "blockport",
    version,
    override_usage = "blockport serve DISK --socket PATH [OPTIONS]\n       \
                      blockport [--object OBJECT] [--blockdev NODE] [--export EXPORT] [--chardev CHARDEV] [--monitor MONITOR]\n                 \
                      [--pidfile PATH] [--daemonize]\n       \
                      blockport --socket-path=PATH|--fd=FDNUM --blk-file=PATH [--read-only]",
    after_long_help = format!("Examples:\n{}", indented(EXAMPLES)),
    arg_required_else_help = true,
    infer_long_args = true,
    disable_help_subcommand = true,
)]
pub struct Cli {
    #[command(flatten)]
    storage_daemon: StorageDaemonArgs,

    #[command(flatten)]
    vhost_user_program: VhostUserProgramArgs,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    metrics: MetricsArgs,

    #[command(flatten)]
    sandbox: SandboxArgs,

    #[command(subcommand)]
    command: Option<Command>,
}

/// What the user asked for.
#[derive(Debug)]
pub enum Invocation {
    /// Run the daemon.
    Start(Config),
    /// Run the load generator.
    #[cfg(feature = "bench")]
    Bench(commands::bench::BenchArgs),
    /// Command a running daemon.
    Ctl(commands::ctl::CtlArgs),
    /// Work on images.
    Img(commands::img::ImgArgs),
    /// Send requests to an image.
    Io(commands::io::IoArgs),
    /// Print a text to standard output and exit with 0.
    Print(String),
}

/// All that the daemon is started from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// What to create, strictly in this order.
    pub steps: Vec<Step>,
    /// Where to write the process id when all steps are done. None: nowhere.
    pub pidfile: Option<PathBuf>,
    /// Whether to go to the background: fork before any thread or ring exists, parent leaves when all steps are done.
    pub daemonize: bool,
    /// What the user should know before the daemon starts, a line each, for standard error.
    pub notices: Vec<String>,
    /// What to print to standard output when all steps are done. None: nothing, as scripts and management software
    /// expect.
    pub announcement: Option<String>,
    /// Where figures are served. None: nowhere.
    pub metrics: Option<MetricsAddress>,
    /// By which sockets disks go from one process to the next.
    pub control: ControlConfig,
    /// What to give up when all steps are done.
    pub sandbox: SandboxConfig,
}

/// One thing to create.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A thread that runs queues.
    Iothread(IothreadConfig),
    /// Limits that nodes share.
    ThrottleGroup(ThrottleGroupConfig),
    /// A passphrase.
    Secret(SecretConfig),
    /// A node. Its options hold `driver` and `node-name`, whose values are not checked, and its driver's own.
    Blockdev(Options),
    /// An export of a node.
    Export(ExportConfig),
    /// Where a monitor is reached.
    Chardev(ChardevConfig),
    /// A monitor.
    Monitor(MonitorConfig),
}

/// A command line that cannot be understood, or that asks for help.
#[derive(Debug)]
pub struct UsageError(Complaint);

#[derive(Debug)]
enum Complaint {
    /// From the parser, which also answers `--help` and `--version` this way.
    Parser(Box<clap::Error>),
    /// Ours, with the command whose `--help` explains.
    Text { text: String, command: &'static str },
}

impl UsageError {
    /// A complaint, as prose that names the option.
    pub fn new(text: impl fmt::Display) -> Self {
        Self(Complaint::Text { text: text.to_string(), command: "blockport" })
    }

    /// Says whose `--help` explains.
    #[must_use]
    pub fn see(self, command: &'static str) -> Self {
        match self.0 {
            Complaint::Text { text, .. } => Self(Complaint::Text { text, command }),
            parser => Self(parser),
        }
    }

    /// Prints the complaint to standard error, or the help asked for to standard output. Returns the exit status.
    pub fn report(&self) -> u8 {
        match &self.0 {
            Complaint::Parser(error) => {
                // A reader that went away is no reason for another status.
                let _ = error.print();
                if error.use_stderr() { USAGE_STATUS } else { 0 }
            }
            Complaint::Text { text, command } => {
                eprintln!("error: {text}\n\nFor more information, try '{command} --help'.");
                USAGE_STATUS
            }
        }
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Complaint::Parser(error) => error.fmt(f),
            Complaint::Text { text, .. } => f.write_str(text),
        }
    }
}

/// Reads a command line, the program's name included.
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Invocation, UsageError> {
    let matches = Cli::command().try_get_matches_from(args).map_err(foreign_style)?;
    let styles = Style::of(&matches);
    if let [(first, style), others @ ..] = styles.as_slice()
        && let Some((other, other_style)) = others.iter().find(|(_, other)| other != style)
    {
        return Err(mixed(first, *style, other, *other_style));
    }
    let cli = Cli::from_arg_matches(&matches).map_err(|error| UsageError(Complaint::Parser(Box::new(error))))?;
    let invocation = match (cli.command, styles.first()) {
        (Some(command), _) => {
            let given = ControlArgs::given(&matches).or(SandboxArgs::given(&matches)).or(MetricsArgs::given(&matches));
            return match given {
                Some(option) => Err(UsageError::new(format!("{option} belongs behind the command"))),
                None => commands::invocation(command),
            };
        }
        (None, Some((_, Style::VhostUserProgram))) => cli.vhost_user_program.invocation()?,
        (None, _) => cli.storage_daemon.invocation(&matches)?,
    };
    Ok(match invocation {
        Invocation::Start(config) => {
            let (control, metrics) = (cli.control.config()?, cli.metrics.address());
            Invocation::Start(Config { control, sandbox: cli.sandbox.config(), metrics, ..config })
        }
        other => other,
    })
}

/// The styles of command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Command,
    StorageDaemon,
    VhostUserProgram,
}

impl fmt::Display for Style {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Command => "a command",
            Self::StorageDaemon => "an option in the style of qemu-storage-daemon",
            Self::VhostUserProgram => "an option by the conventions of vhost-user programs",
        })
    }
}

impl Style {
    /// What stands on the command line, as it is written, and its style.
    fn of(matches: &ArgMatches) -> Vec<(String, Self)> {
        let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        let command = matches.subcommand_name().map(|name| (name.to_owned(), Self::Command));
        let options = Self::options().filter(|(arg, _)| given(arg.get_id().as_str()));
        command
            .into_iter()
            .chain(options.filter_map(|(arg, style)| Some((format!("--{}", arg.get_long()?), style))))
            .collect()
    }

    /// The style of an option, written without dashes.
    fn of_option(long: &str) -> Option<Self> {
        Self::options().find(|(arg, _)| arg.get_long() == Some(long)).map(|(_, style)| style)
    }

    fn options() -> impl Iterator<Item = (clap::Arg, Self)> {
        let storage_daemon =
            StorageDaemonArgs::augment_args(clap::Command::new("")).get_arguments().cloned().collect::<Vec<_>>();
        let program =
            VhostUserProgramArgs::augment_args(clap::Command::new("")).get_arguments().cloned().collect::<Vec<_>>();
        let storage_daemon = storage_daemon.into_iter().map(|arg| (arg, Self::StorageDaemon));
        storage_daemon.chain(program.into_iter().map(|arg| (arg, Self::VhostUserProgram)))
    }
}

fn mixed(first: &str, style: Style, other: &str, other_style: Style) -> UsageError {
    UsageError::new(format!("the styles of command line do not mix: {first} is {style}, {other} is {other_style}"))
}

/// Explains an option after a command that exists in another style; any other error stays as it is.
fn foreign_style(error: clap::Error) -> UsageError {
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
        && let Some(style) = Style::of_option(argument.trim_start_matches('-'))
    {
        return UsageError::new(format!(
            "the styles of command line do not mix: {argument} is {style} and follows a command"
        ));
    }
    UsageError(Complaint::Parser(Box::new(error)))
}

/// Every line of `text`, two spaces further in.
fn indented(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "null-co,node-name=n";
    const EXPORT: &str = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/s";

    fn parsed(args: &[&str]) -> Result<Invocation, UsageError> {
        parse(["blockport"].iter().chain(args))
    }

    fn config(args: &[&str]) -> Config {
        match parsed(args) {
            Ok(Invocation::Start(config)) => config,
            other => panic!("{args:?}: {other:?}"),
        }
    }

    fn refusal(args: &[&str]) -> String {
        let error = parsed(args).expect_err("refused");
        let first = error.to_string();
        first.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn steps_keep_the_order_of_the_command_line() {
        let second = EXPORT.replace("id=e", "id=f");
        let config = config(&[
            "--blockdev",
            NODE,
            "--export",
            EXPORT,
            "--object",
            "iothread,id=t",
            "--export",
            &second,
            "--blockdev",
            "null-co,node-name=m",
            "--chardev",
            "stdio,id=c",
            "--monitor",
            "c",
            "--pidfile",
            "/p",
            "--daemonize",
        ]);
        let steps: Vec<String> = config
            .steps
            .iter()
            .map(|step| match step {
                Step::Iothread(iothread) => iothread.id.clone(),
                Step::ThrottleGroup(group) => group.id.clone(),
                Step::Secret(secret) => secret.id.clone(),
                Step::Blockdev(node) => node.peek_str("node-name").unwrap_or_default().to_owned(),
                Step::Export(export) => export.id.clone(),
                Step::Chardev(chardev) => chardev.id.clone(),
                Step::Monitor(monitor) => format!("monitor of {}", monitor.chardev),
            })
            .collect();
        assert_eq!(steps, ["n", "e", "t", "f", "m", "c", "monitor of c"]);
        assert_eq!((config.pidfile, config.daemonize, config.announcement), (Some("/p".into()), true, None));
    }

    #[test]
    fn options_may_be_shortened_and_single_ones_repeated() {
        let config =
            config(&["--blockd", NODE, "--exp", EXPORT, "--pidfile=/a", "--pidfile=/b", "--daemonize", "--daemonize"]);
        assert_eq!((config.steps.len(), config.pidfile), (2, Some("/b".into())));
    }

    #[test]
    fn complaints_about_options_name_what_they_belong_to() {
        for (args, complaint) in [
            (["--blockdev", "null-co"], r#"--blockdev: option "node-name" is missing"#),
            (["--blockdev", "node-name=n"], r#"blockdev "n": option "driver" is missing"#),
            (["--blockdev", "null-co,n"], r#"--blockdev: option "n" has no value: write it as key=value"#),
            (["--export", "nbd,id=e"], r#"export "e": option "type": "nbd" is not supported yet"#),
            (["--object", "iothread,id=t,x=1"], r#"object "t": option "x" is unknown"#),
            (
                ["--object", "secret_keyring,id=s"],
                r#"object "s": option "qom-type": "secret_keyring" is not supported yet"#,
            ),
            (["--object", "secret,id=s"], r#"object "s": option "data" is missing"#),
            (
                ["--object", "foo,id=s"],
                r#"object "s": option "qom-type" must be iothread, secret or throttle-group, not "foo""#,
            ),
            (["--object", "{}"], r#"--object: option "qom-type" is missing"#),
        ] {
            assert_eq!(refusal(&args), complaint);
        }
    }

    #[test]
    fn what_only_qemu_storage_daemon_has_is_refused_by_name() {
        for (args, complaint) in [
            (["--nbd-server", "addr.type=unix"], "--nbd-server is not supported yet"),
            (["--trace", "x"], "--trace is not supported yet"),
            (["-T", "x"], "--trace is not supported yet"),
        ] {
            assert_eq!(refusal(&args), complaint);
        }
    }

    #[test]
    fn styles_do_not_mix() {
        for args in [
            &["--blockdev", NODE, "serve", "d", "--socket", "s"][..],
            &["serve", "d", "--socket", "s", "--blockdev", NODE],
            &["serve", "d", "--socket", "s", "--fd=3"],
            &["--read-only", "serve", "d", "--socket", "s"],
            &["--blockdev", NODE, "--read-only"],
            &["--socket-path=s", "--blk-file=d", "--pidfile", "p"],
        ] {
            assert!(refusal(args).starts_with("the styles of command line do not mix: "), "{args:?}");
        }
    }

    #[test]
    fn vhost_user_programs() {
        let config = config(&["--fd=3", "--blk-file=/nowhere/d", "--read-only"]);
        let [Step::Iothread(thread), Step::Blockdev(node), Step::Export(export)] = config.steps.as_slice() else {
            panic!("{:?}", config.steps);
        };
        assert_eq!(node.peek_str("file.filename"), Some("/nowhere/d"));
        assert_eq!((&export.socket, export.writable), (&SocketAddress::Fd(3), false));
        assert_eq!(export.queue_mapping.iothreads, [thread.id.as_str()]);
        assert_eq!(config.announcement, None);

        for (args, complaint) in [
            (&["--fd=3"][..], "--blk-file=PATH is missing"),
            (&["--blk-file=d"], "--socket-path=PATH or --fd=FDNUM is missing"),
            (&["--blk-file=d", "--fd=3", "--socket-path=s"], "--socket-path and --fd exclude each other"),
        ] {
            assert_eq!(refusal(args), complaint);
        }
    }

    #[test]
    fn questions_are_answered() {
        for (args, answer) in [
            (&["--print-capabilities"][..], r#""type": "block""#),
            (&["--object", "help"], "iothread"),
            (&["--object", "iothread,help"], "poll-max-ns=<int>"),
            (&["manual"], ".SH SYNOPSIS"),
        ] {
            let Ok(Invocation::Print(text)) = parsed(args) else { panic!("{args:?}") };
            assert!(text.contains(answer), "{args:?}: {text}");
        }
        for args in [["--help"], ["-h"], ["--version"], ["-V"]] {
            let UsageError(Complaint::Parser(answer)) = parsed(&args).expect_err("an answer") else {
                panic!("{args:?}")
            };
            assert!(!answer.use_stderr(), "{args:?}");
        }
    }
}
