//! `blockport serve`: one disk image at one socket.
//!
//! This file owns the arguments, what they mean, and the text that tells the user how to plug the disk in. It never
//! runs anything.

use std::path::PathBuf;

use blockport_block::OnErrorPolicy;
use blockport_block::aio::AioEngine;
use blockport_block::options::Options;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::options::{
    CacheMode, ChardevConfig, ChardevKind, Config, ControlArgs, Cpus, Disk, ExportConfig, IothreadConfig,
    MetricsAddress, MetricsArgs, MonitorConfig, ON_ERROR_NAMES, POLL_MAX_NS_DEFAULT, QUEUES_MAX, SEG_MAX_DEFAULT,
    SEG_MAX_LIMIT, STOP_TIMEOUT_MS_MAX, SandboxArgs, SocketAddress, Step, UsageError, check_queue_size_max,
    check_serial, check_socket_path, parse_logical_block_size, parse_socket_mode,
};

/// The permissions of the socket unless stated: whoever may connect may read and write the disk.
const SOCKET_MODE_DEFAULT: &str = "0600";

/// The queue size that front-ends choose unless told otherwise.
const QUEUE_SIZE_USUAL: u16 = 128;

/// The name of the monitor's character device.
const MONITOR: &str = "monitor";

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// The image: a file
    #[arg(value_name = "DISK")]
    disk: PathBuf,

    /// The unix socket to listen on
    ///
    /// A socket file that nobody listens on any more is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// The format of the image [default: by its name: luks, qcow2, vdi, vhd (vpc), vhdx or vmdk behind the last dot, else raw; what is in it is never looked at]
    #[arg(long, value_name = "DRIVER", help_heading = "The image")]
    format: Option<String>,

    /// Refuse writes, and open the image for reading only
    #[arg(long, help_heading = "The image")]
    read_only: bool,

    /// How the host caches the image [default: none where the file system can, else writeback]
    #[arg(long, value_name = "MODE", value_enum, help_heading = "The image")]
    cache: Option<CacheMode>,

    /// How many queues a front-end may use, up to 256; one for each virtual CPU is a good choice
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)),
        help_heading = "The disk as the guest sees it"
    )]
    queues: u16,

    /// What the guest reads as the serial, at most 20 bytes [default: disk]
    #[arg(long, value_name = "TEXT", value_parser = serial, help_heading = "The disk as the guest sees it")]
    serial: Option<String>,

    /// The smallest unit of reading and writing: a power of two from 512 to 2M
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "512",
        value_parser = parse_logical_block_size,
        help_heading = "The disk as the guest sees it"
    )]
    logical_block_size: u32,

    /// How many pieces of memory a request may have, up to 1024
    ///
    /// A front-end must have queues of that size and two more, or indirect descriptors.
    #[arg(
        long,
        value_name = "N",
        default_value_t = SEG_MAX_DEFAULT,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(SEG_MAX_LIMIT)),
        help_heading = "The disk as the guest sees it"
    )]
    seg_max: u32,

    /// What is done about reads that fail on the host
    #[arg(long, value_name = "POLICY", default_value = "report", value_parser = on_error(), help_heading = "Errors")]
    rerror: OnErrorPolicy,

    /// What is done about writes that fail on the host
    ///
    /// report tells the guest, ignore tells it that all is well, stop keeps the request and all that follow until the
    /// disk goes on, enospc stops when the host is out of space and reports all else.
    #[arg(long, value_name = "POLICY", default_value = "enospc", value_parser = on_error(), help_heading = "Errors")]
    werror: OnErrorPolicy,

    /// How long requests wait for a disk that has stopped, in milliseconds, before they fail; 0 for ever
    #[arg(
        long,
        value_name = "MS",
        default_value = "0",
        value_parser = clap::value_parser!(u64).range(..=STOP_TIMEOUT_MS_MAX),
        help_heading = "Errors"
    )]
    stop_timeout: u64,

    /// The largest queue a front-end may ask for: a power of two from 2 to 32768 [default: 32768]
    #[arg(long, value_name = "N", value_parser = queue_size_max, help_heading = "The disk as the guest sees it")]
    queue_size_max: Option<u16>,

    /// How many threads the queues are spread over
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)),
        help_heading = "Threads"
    )]
    iothreads: u16,

    /// The CPUs that the threads may run on, as 0-3,8 [default: all that the daemon may]
    #[arg(long, value_name = "LIST", help_heading = "Threads")]
    cpus: Option<Cpus>,

    /// How long a thread polls for work before it sleeps, at most, in nanoseconds; 0 never polls
    #[arg(
        long,
        value_name = "NS",
        default_value_t = POLL_MAX_NS_DEFAULT,
        value_parser = clap::value_parser!(u64).range(..=i64::MAX.unsigned_abs()),
        help_heading = "Threads"
    )]
    poll_max_ns: u64,

    /// What carries the I/O out: io_uring, threads (slower), or auto, which is threads where there is no io_uring
    #[arg(
        long,
        value_name = "ENGINE",
        default_value = "auto",
        value_parser = PossibleValuesParser::new(AioEngine::NAMES.map(|(name, _)| name)).map(aio_engine),
        help_heading = "Threads"
    )]
    aio_engine: AioEngine,

    /// The permissions of the socket file, in octal
    #[arg(
        long,
        value_name = "MODE",
        default_value = SOCKET_MODE_DEFAULT,
        value_parser = socket_mode,
        help_heading = "Who may connect"
    )]
    socket_mode: u32,

    /// The group of the socket file, a name or a number [default: the daemon's own]
    #[arg(long, value_name = "GROUP", help_heading = "Who may connect")]
    socket_group: Option<String>,

    /// A unix socket where commands are taken while the disk is served
    ///
    /// `blockport ctl PATH` is the client for people; the protocol is QMP. Only the daemon's own user may connect.
    #[arg(long, value_name = "PATH", help_heading = "Commands while it runs")]
    monitor: Option<PathBuf>,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    metrics: MetricsArgs,

    #[command(flatten)]
    sandbox: SandboxArgs,
}

fn serial(text: &str) -> Result<String, String> {
    check_serial(text).map_err(|expected| format!("must be {expected}"))
}

fn queue_size_max(text: &str) -> Result<u16, String> {
    check_queue_size_max(text.parse().unwrap_or(0)).map_err(|expected| format!("must be {expected}"))
}

fn socket_mode(text: &str) -> Result<u32, String> {
    parse_socket_mode(text).map_err(|expected| format!("must be {expected}"))
}

fn aio_engine(name: String) -> AioEngine {
    AioEngine::NAMES.into_iter().find_map(|(known, engine)| (known == name).then_some(engine)).unwrap_or_default()
}

fn on_error() -> impl TypedValueParser<Value = OnErrorPolicy> {
    PossibleValuesParser::new(ON_ERROR_NAMES).map(|name| {
        let policy = OnErrorPolicy::NAMES.into_iter().find_map(|(known, policy)| (known == name).then_some(policy));
        policy.unwrap_or(OnErrorPolicy::Report)
    })
}

impl ServeArgs {
    /// The configuration that serves this disk, its announcement included.
    ///
    /// Fails on a path that is no UTF-8 or too long for a socket.
    pub fn config(self) -> Result<Config, UsageError> {
        let path = check_socket_path(self.socket)
            .map_err(|expected| UsageError::new(format!("--socket must be {expected}")))?;
        let socket = SocketAddress::Unix { path, mode: Some(self.socket_mode), group: self.socket_group };
        let mut export = ExportConfig {
            writable: !self.read_only,
            num_queues: self.queues,
            logical_block_size: self.logical_block_size,
            seg_max: self.seg_max,
            on_read_error: self.rerror,
            on_write_error: self.werror,
            stop_timeout_ms: self.stop_timeout,
            ..ExportConfig::new(Disk::NODE_NAME, Disk::NODE_NAME, socket)
        };
        if let Some(serial) = self.serial {
            export.serial = serial;
        }
        if let Some(size) = self.queue_size_max {
            export.queue_size_max = size;
        }
        let format = self.format.unwrap_or_else(|| Disk::format_by_name(&self.disk).to_owned());
        let disk = Disk { path: self.disk, format, read_only: self.read_only, cache: self.cache };
        let mut config = Config {
            control: self.control.config()?,
            sandbox: self.sandbox.config(),
            metrics: self.metrics.address(),
            ..Config::default()
        };
        let iothread = IothreadConfig {
            poll_max_ns: self.poll_max_ns,
            aio_engine: self.aio_engine,
            cpu_affinity: self.cpus,
            ..IothreadConfig::new(Disk::IOTHREAD_NAME)
        };
        disk.configure(&mut config, export, self.iothreads, &iothread)?;
        if let Some(path) = self.monitor {
            let path =
                check_socket_path(path).map_err(|expected| UsageError::new(format!("--monitor must be {expected}")))?;
            config.steps.push(Step::Chardev(ChardevConfig::listening(MONITOR, path)));
            config.steps.push(Step::Monitor(MonitorConfig::new(MONITOR)));
        }
        config.announcement = Some(announcement(&config));
        Ok(config)
    }
}

/// What the daemon prints when it is up: for each export what it serves and how to plug it in, then the ready line.
///
/// Exports of inherited sockets have no argument lines: whoever passed the socket holds the other end.
pub fn announcement(config: &Config) -> String {
    let mut text = String::new();
    for step in &config.steps {
        let Step::Export(export) = step else { continue };
        text += &description(config, export);
        if let SocketAddress::Unix { path, .. } = &export.socket {
            let socket = path.display().to_string();
            text += &format!("\nQEMU (before 9.2 write reconnect=1):\n  {}\n", qemu_arguments(export, &socket));
            text += &format!("\ncloud-hypervisor:\n  {}\n\n", cloud_hypervisor_arguments(export, &socket));
        }
    }
    for step in &config.steps {
        if let Step::Chardev(ChardevConfig { kind: ChardevKind::Listening { address, .. }, .. }) = step {
            text += &format!("commands:\n  blockport ctl {} --help\n\n", quoted(&address.to_string()));
        }
    }
    match &config.metrics {
        // Which port the kernel chooses is in the log.
        Some(MetricsAddress::Tcp(address)) if address.port() > 0 => {
            text += &format!("figures:\n  http://{address}/metrics\n\n");
        }
        Some(MetricsAddress::Unix(path)) => {
            let path = quoted(&path.display().to_string());
            text += &format!("figures:\n  curl --unix-socket {path} http://localhost/metrics\n\n");
        }
        _ => {}
    }
    let sockets: Vec<String> = config
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Export(export) => Some(export.socket.to_string()),
            _ => None,
        })
        .collect();
    text += &format!("ready: {}\n", sockets.join(", "));
    text
}

/// What an export serves, in a sentence of two lines.
fn description(config: &Config, export: &ExportConfig) -> String {
    let node = config.steps.iter().find_map(|step| match step {
        Step::Blockdev(node) if node.peek_str("node-name") == Some(&export.node_name) => Some(node),
        _ => None,
    });
    let image = |node: &Options| {
        let filename = node.peek_str("file.filename").or(node.peek_str("filename"))?;
        Some(format!("{filename} ({}", node.peek_str("driver")?))
    };
    let image = node.and_then(image).unwrap_or_else(|| format!("node {} (", export.node_name));
    let direct = node.is_some_and(|node| node.to_json().pointer("/file/cache/direct") == Some(&true.into()));
    format!(
        "serving {image}, {}, {}, {})\n  {} on {}, blocks of {} bytes, serial {:?}\n",
        if export.writable { "read-write" } else { "read-only" },
        if direct { "direct I/O" } else { "host page cache" },
        if export.writethrough { "write-through" } else { "write-back" },
        counted(usize::from(export.num_queues), "queue"),
        counted(export.queue_mapping.iothreads.len().max(1), "iothread"),
        export.logical_block_size,
        export.serial,
    )
}

/// The arguments that give the disk to a QEMU guest, which needs shared memory for it.
fn qemu_arguments(export: &ExportConfig, socket: &str) -> String {
    let queue_size = match export.queue_size_max {
        QUEUE_SIZE_USUAL.. => String::new(),
        smaller => format!(",queue-size={smaller}"),
    };
    // A comma in a value is written twice there.
    let chardev = format!("socket,id=c0,path={},reconnect-ms=1000", socket.replace(',', ",,"));
    format!(
        "-m 2G -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\\n  -chardev {} \\\n  \
         -device vhost-user-blk-pci,chardev=c0,num-queues={}{queue_size}",
        quoted(&chardev),
        export.num_queues,
    )
}

/// The arguments that give the disk to a cloud-hypervisor guest, which needs shared memory for it.
fn cloud_hypervisor_arguments(export: &ExportConfig, socket: &str) -> String {
    // A value with a comma stands in double quotes there.
    let socket = if socket.contains(',') { format!("\"{socket}\"") } else { socket.to_owned() };
    let disk = format!(
        "vhost_user=true,socket={socket},num_queues={},queue_size={}",
        export.num_queues,
        export.queue_size_max.min(QUEUE_SIZE_USUAL),
    );
    format!("--memory size=2G,shared=on --disk {}", quoted(&disk))
}

/// `text` as a shell takes it for one word.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./,=:@%+".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// "1 queue", "2 queues".
fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{self, Invocation, QueueMapping};

    fn config(args: &[&str]) -> Result<Config, UsageError> {
        match options::parse(["blockport", "serve"].iter().chain(args))? {
            Invocation::Start(config) => Ok(config),
            other => panic!("{other:?}"),
        }
    }

    fn export(args: &[&str]) -> ExportConfig {
        match config(args).expect("a config").steps.pop() {
            Some(Step::Export(export)) => export,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults() {
        let socket = SocketAddress::Unix { path: "/s".into(), mode: Some(0o600), group: None };
        let expected = ExportConfig {
            writable: true,
            queue_mapping: QueueMapping { iothreads: vec!["iothread0".into()], queues: Vec::new() },
            ..ExportConfig::new("disk", "disk", socket)
        };
        assert_eq!(export(&["/nowhere/d", "--socket", "/s"]), expected);
    }

    #[test]
    fn everything_set() {
        let args = [
            "/nowhere/d",
            "--socket=/s",
            "--format=qcow2",
            "--read-only",
            "--queues=4",
            "--iothreads=2",
            "--serial=SN",
            "--logical-block-size=4k",
            "--cache=directsync",
            "--poll-max-ns=0",
            "--aio-engine=threads",
            "--cpus=0,2",
            "--socket-mode=0660",
            "--socket-group=kvm",
            "--seg-max=254",
            "--rerror=ignore",
            "--werror=stop",
            "--stop-timeout=1000",
            "--queue-size-max=1024",
        ];
        let socket = SocketAddress::Unix { path: "/s".into(), mode: Some(0o660), group: Some("kvm".into()) };
        let expected = ExportConfig {
            num_queues: 4,
            queue_mapping: QueueMapping { iothreads: vec!["iothread0".into(), "iothread1".into()], queues: Vec::new() },
            serial: "SN".into(),
            logical_block_size: 4096,
            writethrough: true,
            seg_max: 254,
            on_read_error: OnErrorPolicy::Ignore,
            on_write_error: OnErrorPolicy::Stop,
            stop_timeout_ms: 1000,
            queue_size_max: 1024,
            ..ExportConfig::new("disk", "disk", socket)
        };
        assert_eq!(export(&args), expected);
        let config = config(&args).expect("a config");
        let [Step::Iothread(first), Step::Iothread(_), Step::Blockdev(node), _] = config.steps.as_slice() else {
            panic!("{:?}", config.steps);
        };
        assert_eq!((first.poll_max_ns, first.aio_engine), (0, AioEngine::Threads));
        assert_eq!(first.cpu_affinity, "0,2".parse().ok());
        assert_eq!(node.peek_str("driver"), Some("qcow2"));
        assert_eq!(node.to_json()["read-only"], true);
    }

    #[test]
    fn refusals() {
        for (more, named) in [
            ("--queues=0", "--queues"),
            ("--queues=257", "--queues"),
            ("--iothreads=0", "--iothreads"),
            ("--serial=123456789012345678901", "at most 20 bytes"),
            ("--logical-block-size=520", "power of two"),
            ("--cache=maybe", "writethrough"),
            ("--socket-mode=0999", "octal"),
            ("--poll-max-ns=-1", "--poll-max-ns"),
            ("--aio-engine=aio", "io_uring"),
            ("--cpus=x", "numbers of CPUs"),
            ("--queue-size-max=3", "power of two"),
            ("--seg-max=2000", "--seg-max"),
            ("--werror=maybe", "report, ignore, enospc, stop, auto"),
            ("--stop-timeout=-1", "--stop-timeout"),
        ] {
            let error = config(&["d", "--socket=/s", more]).expect_err(more).to_string();
            assert!(error.contains(named), "{more}: {error}");
        }
        let long = format!("--socket=/{}", "x".repeat(200));
        assert!(
            config(&["d", &long]).expect_err("too long").to_string().starts_with("--socket must be a path of 1 to")
        );
    }

    #[test]
    fn the_announcement_teaches() {
        let config = config(&["/nowhere/d.raw", "--socket=/run/vm1.sock", "--queues=4", "--iothreads=2"]);
        let expected = "\
serving /nowhere/d.raw (raw, read-write, direct I/O, write-back)
  4 queues on 2 iothreads, blocks of 512 bytes, serial \"disk\"

QEMU (before 9.2 write reconnect=1):
  -m 2G -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
  -chardev socket,id=c0,path=/run/vm1.sock,reconnect-ms=1000 \\
  -device vhost-user-blk-pci,chardev=c0,num-queues=4

cloud-hypervisor:
  --memory size=2G,shared=on --disk vhost_user=true,socket=/run/vm1.sock,num_queues=4,queue_size=128

ready: /run/vm1.sock
";
        assert_eq!(config.expect("a config").announcement.as_deref(), Some(expected));
    }

    #[test]
    fn argument_lines_survive_the_shell_and_commas() {
        let socket = SocketAddress::Unix { path: "/s".into(), mode: None, group: None };
        let export = ExportConfig { queue_size_max: 64, ..ExportConfig::new("e", "n", socket) };
        let qemu = qemu_arguments(&export, "/a b,c's");
        assert!(qemu.contains(r"-chardev 'socket,id=c0,path=/a b,,c'\''s,reconnect-ms=1000'"), "{qemu}");
        assert!(qemu.ends_with("num-queues=1,queue-size=64"), "{qemu}");
        let cloud_hypervisor = cloud_hypervisor_arguments(&export, "/a,b");
        assert!(cloud_hypervisor.contains(r#"'vhost_user=true,socket="/a,b",num_queues=1,queue_size=64'"#));
    }
}
