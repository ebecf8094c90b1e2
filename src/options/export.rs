//! What an export is configured with, and the bounds of each value.
//!
//! This file owns [`ExportConfig`], its defaults and its reading from an option tree. It never looks at the node, the
//! iothreads or the socket that it names: whether they exist is found out at start.

use std::path::PathBuf;

use blockport_block::OnErrorPolicy;
use blockport_block::options::{Options, Result, is_valid_id, parse_size};

use super::queue_mapping::QueueMapping;
use super::table::{self, OptionKind, OptionRow, optional, required};

/// The most queues an export may have.
pub const QUEUES_MAX: u16 = 256;

/// The longest serial, in bytes: what virtio-blk has room for (virtio 1.3, 5.2.6, VIRTIO_BLK_T_GET_ID).
pub const SERIAL_LENGTH_MAX: usize = 20;

/// The largest virtqueue (virtio 1.3, 2.7 and 2.8).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// Data segments of a request: the default fits rings of 128 entries, which front-ends like, with header and status.
pub const SEG_MAX_DEFAULT: u32 = 126;

/// The most data segments of a request: what one vectored system call takes.
pub const SEG_MAX_LIMIT: u32 = 1024;

/// The longest `stop-timeout`, in milliseconds: a week.
pub const STOP_TIMEOUT_MS_MAX: u64 = 7 * 24 * 3600 * 1000;

/// The longest path of a unix socket, in bytes: `sun_path` less its terminating zero.
const SOCKET_PATH_LENGTH_MAX: usize = 107;

/// Where an export waits for its front-end.
#[derive(Clone, Debug, PartialEq)]
pub enum SocketAddress {
    /// A listening unix socket, made at start.
    Unix {
        /// At most 107 bytes.
        path: PathBuf,
        /// The permission bits of the socket file, at most 0o777. None: what the umask leaves of 0777.
        mode: Option<u32>,
        /// The group of the socket file, a name or a number. None: the daemon's own.
        group: Option<String>,
    },
    /// A name that is in no file system.
    Abstract {
        /// At most 107 bytes.
        name: String,
        /// Whether the address ends with the name, rather than being filled up with zeroes.
        tight: bool,
    },
    /// An inherited descriptor: a listening socket, or a connected one that is served once.
    Fd(i32),
}

impl std::fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix { path, .. } => path.display().fmt(f),
            Self::Abstract { name, .. } => write!(f, "@{name}"),
            Self::Fd(fd) => write!(f, "descriptor {fd}"),
        }
    }
}

/// A node offered as a vhost-user-blk device.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportConfig {
    /// The name of the export, unique among exports.
    pub id: String,
    /// The node it serves.
    pub node_name: String,
    /// Where front-ends connect.
    pub socket: SocketAddress,
    /// Whether the guest may write.
    pub writable: bool,
    /// From 1 to [`QUEUES_MAX`].
    pub num_queues: u16,
    /// In bytes: a power of two from 512 to 2 MiB.
    pub logical_block_size: u32,
    /// Whether the write cache starts switched off, so that every write is stable before it is answered.
    pub writethrough: bool,
    /// Where its queues are served.
    pub queue_mapping: QueueMapping,
    /// What the guest reads as the disk's serial: at most [`SERIAL_LENGTH_MAX`] bytes. May be empty.
    pub serial: String,
    /// The largest virtqueue a front-end may set: a power of two from 2 to [`QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
    /// Data segments of a request, from 1 to [`SEG_MAX_LIMIT`].
    pub seg_max: u32,
    /// Whether packed virtqueues are offered, besides split ones.
    pub packed: bool,
    /// What is done about reads that fail on the host.
    pub on_read_error: OnErrorPolicy,
    /// What is done about all other requests that fail on the host.
    pub on_write_error: OnErrorPolicy,
    /// Whether the node may be inactive as long as no ring runs.
    pub allow_inactive: bool,
    /// Whether the node becomes inactive whenever no ring runs any more.
    pub hand_over: bool,
    /// How long requests wait for a device that has stopped over an error, in milliseconds. 0: for ever.
    pub stop_timeout_ms: u64,
}

/// The one kind of export.
const TYPE: &str = "vhost-user-blk";

/// What may be done about errors, by name.
pub const ON_ERROR_NAMES: [&str; 5] = {
    let [a, b, c, d, e] = OnErrorPolicy::NAMES;
    [a.0, b.0, c.0, d.0, e.0]
};

/// All options of an export.
pub const EXPORT_OPTIONS: &[OptionRow] = &[
    required("type", OptionKind::Choice("BlockExportType", &[TYPE])),
    required("id", OptionKind::Text),
    required("node-name", OptionKind::Text),
    required("addr", OptionKind::Address),
    optional("writable", OptionKind::Flag),
    optional("writethrough", OptionKind::Flag),
    optional("num-queues", OptionKind::Number),
    optional("logical-block-size", OptionKind::Number),
    optional("iothread", OptionKind::TextOrList),
    optional("iothreads", OptionKind::TextOrList),
    optional("iothread-vq-mapping", OptionKind::QueueMapping),
    optional("fixed-iothread", OptionKind::Flag),
    optional("allow-inactive", OptionKind::Flag),
    optional("hand-over", OptionKind::Flag),
    optional("serial", OptionKind::Text),
    optional("queue-size-max", OptionKind::Number),
    optional("seg-max", OptionKind::Number),
    optional("packed", OptionKind::Flag),
    optional("rerror", OptionKind::Choice("BlockdevOnError", &ON_ERROR_NAMES)),
    optional("werror", OptionKind::Choice("BlockdevOnError", &ON_ERROR_NAMES)),
    optional("stop-timeout", OptionKind::Number),
    optional("socket-mode", OptionKind::Text),
    optional("socket-group", OptionKind::Text),
];

impl ExportConfig {
    /// A read-only export of one queue, with the defaults of everything else.
    ///
    /// The serial is the id, cut to what a serial has room for.
    pub fn new(id: impl Into<String>, node_name: impl Into<String>, socket: SocketAddress) -> Self {
        let id = id.into();
        Self {
            serial: cut(&id, SERIAL_LENGTH_MAX).to_owned(),
            id,
            node_name: node_name.into(),
            socket,
            writable: false,
            num_queues: 1,
            logical_block_size: 512,
            writethrough: false,
            queue_mapping: QueueMapping::default(),
            queue_size_max: QUEUE_SIZE_MAX,
            seg_max: SEG_MAX_DEFAULT,
            packed: true,
            on_read_error: OnErrorPolicy::Report,
            on_write_error: OnErrorPolicy::Enospc,
            allow_inactive: false,
            hand_over: false,
            stop_timeout_ms: 0,
        }
    }

    /// Reads an export from the options of `--export`, all of them.
    ///
    /// Fails on options that are missing, unknown, out of bounds, or known to qemu-storage-daemon only.
    pub fn from_options(mut options: Options) -> Result<Self> {
        match options.require_str("type")?.as_str() {
            TYPE => {}
            kind @ ("nbd" | "fuse" | "vduse-blk") => {
                return Err(options.unsupported_value("type", kind));
            }
            other => return Err(options.invalid("type", other, TYPE)),
        }
        table::check(&options, EXPORT_OPTIONS)?;
        let id = options.require_str("id")?;
        if !is_valid_id(&id) {
            return Err(options.invalid("id", id, "a letter, then letters, digits, '-', '.' and '_'"));
        }
        let node_name = options.require_str("node-name")?;
        let socket = take_socket(&mut options)?;
        let mut export = Self::new(id, node_name, socket);
        if let Some(writable) = options.take_bool("writable")? {
            export.writable = writable;
        }
        if let Some(writethrough) = options.take_bool("writethrough")? {
            export.writethrough = writethrough;
        }
        if let Some(queues) = options.take_u64_in("num-queues", 1..=u64::from(QUEUES_MAX))? {
            export.num_queues = u16::try_from(queues).unwrap_or(QUEUES_MAX);
        }
        if let Some(bytes) = options.take_size("logical-block-size")? {
            export.logical_block_size = check_logical_block_size(bytes)
                .map_err(|expected| options.invalid("logical-block-size", bytes, expected))?;
        }
        export.queue_mapping = QueueMapping::take(&mut options, export.num_queues)?;
        // Channels are never moved to another iothread while an export is up, so this holds however it is set.
        options.take_bool("fixed-iothread")?;
        export.hand_over = options.take_bool("hand-over")?.unwrap_or(false);
        export.allow_inactive = match options.take_bool("allow-inactive")? {
            Some(false) if export.hand_over => return Err(options.conflict("hand-over", "allow-inactive")),
            allowed => allowed.unwrap_or(export.hand_over),
        };
        if let Some(serial) = options.take_str("serial")? {
            export.serial = check_serial(&serial).map_err(|expected| options.invalid("serial", &serial, expected))?;
        }
        if let Some(size) = options.take_u64("queue-size-max")? {
            export.queue_size_max =
                check_queue_size_max(size).map_err(|expected| options.invalid("queue-size-max", size, expected))?;
        }
        if let Some(segments) = options.take_u64_in("seg-max", 1..=u64::from(SEG_MAX_LIMIT))? {
            export.seg_max = u32::try_from(segments).unwrap_or(SEG_MAX_LIMIT);
        }
        if let Some(packed) = options.take_bool("packed")? {
            export.packed = packed;
        }
        if let Some(policy) = options.take_enum("rerror", &OnErrorPolicy::NAMES)? {
            export.on_read_error = policy;
        }
        if let Some(policy) = options.take_enum("werror", &OnErrorPolicy::NAMES)? {
            export.on_write_error = policy;
        }
        if let Some(timeout) = options.take_u64_in("stop-timeout", 0..=STOP_TIMEOUT_MS_MAX)? {
            export.stop_timeout_ms = timeout;
        }
        options.finish()?;
        Ok(export)
    }
}

/// Takes `addr.*`, `socket-mode` and `socket-group`.
fn take_socket(options: &mut Options) -> Result<SocketAddress> {
    let Some(mut addr) = options.take_options("addr")? else {
        return Err(options.missing("addr.type"));
    };
    let kind = addr.require_str("type")?;
    let socket = match kind.as_str() {
        "unix" => match take_unix(&mut addr)? {
            SocketAddress::Unix { path, .. } => {
                let mode = match options.take_str("socket-mode")? {
                    None => None,
                    Some(text) => Some(
                        parse_socket_mode(&text).map_err(|expected| options.invalid("socket-mode", &text, expected))?,
                    ),
                };
                SocketAddress::Unix { path, mode, group: options.take_str("socket-group")? }
            }
            other => other,
        },
        "fd" => take_fd(&mut addr, "str")?,
        "inet" | "vsock" => return Err(addr.unsupported_value("type", kind)),
        _ => return Err(addr.invalid("type", kind, "unix or fd")),
    };
    addr.finish()?;
    Ok(socket)
}

/// Takes `path`, `abstract` and `tight`. The socket file's mode and group are left open.
pub(super) fn take_unix(options: &mut Options) -> Result<SocketAddress> {
    let path = options.require_str("path")?;
    let checked = check_socket_path(path.clone()).map_err(|expected| options.invalid("path", &path, expected))?;
    let is_abstract = options.take_bool("abstract")?.unwrap_or(false);
    // Says how an abstract address is padded; means nothing for a path.
    let tight = options.take_bool("tight")?.unwrap_or(true);
    Ok(match is_abstract {
        true => SocketAddress::Abstract { name: path, tight },
        false => SocketAddress::Unix { path: checked, mode: None, group: None },
    })
}

/// Takes the number of an inherited descriptor.
pub(super) fn take_fd(options: &mut Options, key: &str) -> Result<SocketAddress> {
    let text = options.require_str(key)?;
    match text.parse() {
        Ok(fd @ 0..) => Ok(SocketAddress::Fd(fd)),
        _ => Err(options.invalid(key, text, "the number of an inherited socket")),
    }
}

/// The start of `text` of at most `length_max` bytes, cut between characters.
fn cut(text: &str, length_max: usize) -> &str {
    let end = (0..=length_max.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// Checks a serial. The error says what it must be.
pub fn check_serial(serial: &str) -> std::result::Result<String, String> {
    if serial.len() > SERIAL_LENGTH_MAX {
        return Err(format!("at most {SERIAL_LENGTH_MAX} bytes"));
    }
    Ok(serial.to_owned())
}

/// Checks a logical block size in bytes. The error says what it must be.
pub fn check_logical_block_size(bytes: u64) -> std::result::Result<u32, String> {
    match u32::try_from(bytes) {
        Ok(size @ 512..=0x20_0000) if size.is_power_of_two() => Ok(size),
        _ => Err("a power of two from 512 to 2097152".to_owned()),
    }
}

/// Reads a logical block size, with or without a unit. The error says what it must be.
pub fn parse_logical_block_size(text: &str) -> std::result::Result<u32, String> {
    check_logical_block_size(parse_size(text).unwrap_or(0)).map_err(|expected| format!("must be {expected}"))
}

/// Checks a queue size. The error says what it must be.
pub fn check_queue_size_max(size: u64) -> std::result::Result<u16, String> {
    match u16::try_from(size) {
        Ok(size @ 2..=QUEUE_SIZE_MAX) if size.is_power_of_two() => Ok(size),
        _ => Err(format!("a power of two from 2 to {QUEUE_SIZE_MAX}")),
    }
}

/// Reads the permission bits of a socket file, in octal. The error says what they must be.
pub fn parse_socket_mode(text: &str) -> std::result::Result<u32, String> {
    let octal = !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    match u32::from_str_radix(text, 8) {
        Ok(mode @ 0..=0o777) if octal => Ok(mode),
        _ => Err("permission bits in octal, such as 0660".to_owned()),
    }
}

/// Checks the path of a unix socket. The error says what it must be.
pub fn check_socket_path(path: impl Into<PathBuf>) -> std::result::Result<PathBuf, String> {
    let path = path.into();
    match path.as_os_str().len() {
        1..=SOCKET_PATH_LENGTH_MAX => Ok(path),
        _ => Err(format!("a path of 1 to {SOCKET_PATH_LENGTH_MAX} bytes, as the kernel takes for a socket")),
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;

    use super::*;

    const MINIMAL: &str = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/s";

    fn read(text: &str) -> Result<ExportConfig> {
        ExportConfig::from_options(parse_keyval(text, Some("type")).expect(text))
    }

    fn refusal(more: &str) -> String {
        read(&format!("{MINIMAL},{more}")).expect_err(more).to_string()
    }

    fn unix(path: &str) -> SocketAddress {
        SocketAddress::Unix { path: path.into(), mode: None, group: None }
    }

    #[test]
    fn defaults() {
        let export = read(MINIMAL).expect("minimal");
        assert_eq!(export, ExportConfig::new("e", "n", unix("/s")));
        assert_eq!((export.writable, export.num_queues, export.logical_block_size), (false, 1, 512));
        assert_eq!((export.serial.as_str(), export.queue_size_max, export.seg_max), ("e", 32768, 126));
        assert!(export.packed);
    }

    #[test]
    fn everything_set() {
        let text = "id=e,type=vhost-user-blk,node-name=n,addr.type=unix,addr.path=/s,addr.abstract=off,writable=on,\
                    num-queues=256,logical-block-size=4k,writethrough=on,iothreads.0=a,iothreads.1=b,\
                    fixed-iothread=on,serial=SN-1,queue-size-max=1024,seg-max=254,packed=off,rerror=stop,werror=auto,stop-timeout=500,\
                    socket-mode=0660,socket-group=kvm,\
                    hand-over=on";
        let export = ExportConfig {
            writable: true,
            num_queues: 256,
            logical_block_size: 4096,
            writethrough: true,
            queue_mapping: QueueMapping { iothreads: vec!["a".into(), "b".into()], queues: Vec::new() },
            serial: "SN-1".into(),
            queue_size_max: 1024,
            seg_max: 254,
            packed: false,
            allow_inactive: true,
            hand_over: true,
            on_read_error: OnErrorPolicy::Stop,
            on_write_error: OnErrorPolicy::Auto,
            stop_timeout_ms: 500,
            ..ExportConfig::new(
                "e",
                "n",
                SocketAddress::Unix { path: "/s".into(), mode: Some(0o660), group: Some("kvm".into()) },
            )
        };
        assert_eq!(read(text).expect("all"), export);
    }

    #[test]
    fn names_that_are_in_no_file_system() {
        for (more, tight) in [("addr.abstract=on", true), ("addr.abstract=on,addr.tight=off", false)] {
            let export = read(&format!("{MINIMAL},{more}")).expect(more);
            assert_eq!(export.socket, SocketAddress::Abstract { name: "/s".into(), tight });
        }
    }

    #[test]
    fn json_and_descriptor() {
        let text = r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "writable": true, "iothread": "t",
                       "addr": {"type": "fd", "str": "3"}}"#;
        let export = ExportConfig {
            writable: true,
            queue_mapping: QueueMapping { iothreads: vec!["t".into()], queues: Vec::new() },
            ..ExportConfig::new("e", "n", SocketAddress::Fd(3))
        };
        assert_eq!(read(text).expect("json"), export);
    }

    #[test]
    fn a_long_id_is_cut_for_the_serial_only() {
        let id = "vol-6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let export = ExportConfig::new(id, "n", unix("/s"));
        assert_eq!((export.id.as_str(), export.serial.as_str()), (id, "vol-6ba7b810-9dad-11"));
        assert_eq!(cut("aé", 2), "a");
    }

    #[test]
    fn refusals() {
        for (more, complaint) in [
            ("id=9", r#"option "id" must be a letter, then letters, digits, '-', '.' and '_', not "9""#),
            ("num-queues=0", r#"option "num-queues" must be from 1 to 256, not "0""#),
            ("num-queues=257", r#"option "num-queues" must be from 1 to 256, not "257""#),
            (
                "logical-block-size=513",
                r#"option "logical-block-size" must be a power of two from 512 to 2097152, not "513""#,
            ),
            (
                "serial=123456789012345678901",
                r#"option "serial" must be at most 20 bytes, not "123456789012345678901""#,
            ),
            ("queue-size-max=100", r#"option "queue-size-max" must be a power of two from 2 to 32768, not "100""#),
            ("queue-size-max=65536", r#"option "queue-size-max" must be a power of two from 2 to 32768, not "65536""#),
            ("seg-max=0", r#"option "seg-max" must be from 1 to 1024, not "0""#),
            ("werror=maybe", r#"option "werror" must be one of report, ignore, enospc, stop, auto, not "maybe""#),
            ("stop-timeout=604800001", r#"option "stop-timeout" must be from 0 to 604800000, not "604800001""#),
            ("type=nbd", r#"option "type": "nbd" is not supported yet"#),
            ("type=foo", r#"option "type" must be vhost-user-blk, not "foo""#),
            ("addr.type=inet", r#"option "addr.type": "inet" is not supported yet"#),
            ("addr.type=foo", r#"option "addr.type" must be unix or fd, not "foo""#),
            ("addr.abstract=on,socket-mode=0600", r#"option "socket-mode" is unknown"#),
            ("addr.port=1", r#"option "addr.port" is unknown"#),
            ("addr.type=fd,addr.str=x", r#"option "addr.str" must be the number of an inherited socket, not "x""#),
            ("addr.type=fd,addr.str=3", r#"option "addr.path" is unknown"#),
            ("iothread=a,iothreads.0=b", r#"options "iothread" and "iothreads" exclude each other"#),
            ("hand-over=on,allow-inactive=off", r#"options "hand-over" and "allow-inactive" exclude each other"#),
            ("socket-mode=999", r#"option "socket-mode" must be permission bits in octal, such as 0660, not "999""#),
            ("name=x", r#"option "name" is unknown"#),
        ] {
            assert_eq!(refusal(more), complaint, "{more}");
        }
        assert!(refusal(&format!("addr.path=/{}", "x".repeat(107))).contains("1 to 107 bytes"));
        assert_eq!(read("vhost-user-blk").expect_err("no id").to_string(), r#"option "id" is missing"#);
        let no_socket = read("vhost-user-blk,id=e,node-name=n").expect_err("no socket");
        assert_eq!(no_socket.to_string(), r#"option "addr.type" is missing"#);
    }

    #[test]
    fn the_table_is_what_is_read() {
        let valid = serde_json::json!({
            "type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": "/s"},
        });
        table::tests::every_row_is_read(EXPORT_OPTIONS, &valid, ExportConfig::from_options);
    }

    #[test]
    fn socket_modes() {
        for (text, mode) in [("0600", Some(0o600)), ("777", Some(0o777)), ("1777", None), ("", None), ("+7", None)] {
            assert_eq!(parse_socket_mode(text).ok(), mode, "{text}");
        }
    }
}
