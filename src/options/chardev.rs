//! What a character device is configured with, and which monitor uses it.
//!
//! This file owns [`ChardevConfig`] and [`MonitorConfig`], and their reading from `--chardev`, `--monitor` and the form
//! that `chardev-add` has. It never opens anything.

use blockport_block::options::{Options, Result, is_valid_id};

use super::SocketAddress;
use super::export::{take_fd, take_unix};

/// Kinds that qemu-storage-daemon knows and this daemon does not.
const KINDS_UNSUPPORTED: &[&str] = &[
    "console", "file", "memory", "mux", "null", "parallel", "pipe", "pty", "ringbuf", "serial", "udp", "vc", "wctablet",
];

/// Options of sockets that qemu-storage-daemon knows and this daemon does not.
const SOCKET_UNSUPPORTED: &[&str] = &[
    "delay",
    "host",
    "ipv4",
    "ipv6",
    "keep-alive",
    "logappend",
    "logfile",
    "mptcp",
    "mux",
    "nodelay",
    "port",
    "reconnect",
    "reconnect-ms",
    "telnet",
    "tls-authz",
    "tls-creds",
    "tn3270",
    "to",
    "websocket",
];

/// The permission bits of a monitor's socket file: whoever may connect commands the daemon.
const SOCKET_MODE: u32 = 0o600;

/// A place where bytes come from and go to.
#[derive(Clone, Debug, PartialEq)]
pub struct ChardevConfig {
    /// Its name, unique among character devices.
    pub id: String,
    /// What it is.
    pub kind: ChardevKind,
}

/// What a character device is.
#[derive(Clone, Debug, PartialEq)]
pub enum ChardevKind {
    /// A socket that clients connect to.
    Listening {
        /// Where.
        address: SocketAddress,
        /// Whether the daemon waits for the first client before it goes on with its start.
        wait: bool,
    },
    /// A connection that somebody else listens for, or that is made already.
    Connected(SocketAddress),
    /// Standard input and output.
    Stdio,
}

impl ChardevConfig {
    /// A socket for a monitor, which nobody waits for and only its owner may use.
    pub fn listening(id: &str, path: std::path::PathBuf) -> Self {
        let address = SocketAddress::Unix { path, mode: Some(SOCKET_MODE), group: None };
        Self { id: id.to_owned(), kind: ChardevKind::Listening { address, wait: false } }
    }

    /// Reads the options of `--chardev`, all of them.
    ///
    /// Fails on options that are missing, unknown, or known to qemu-storage-daemon only.
    pub fn from_options(mut options: Options) -> Result<Self> {
        let backend = options.require_str("backend")?;
        let id = options.require_str("id")?;
        let kind = match backend.as_str() {
            "socket" => {
                options.take_unsupported(SOCKET_UNSUPPORTED)?;
                let address = match (options.contains("path"), options.contains("fd")) {
                    (true, true) => return Err(options.conflict("path", "fd")),
                    (_, true) => take_fd(&mut options, "fd")?,
                    (_, false) => take_unix(&mut options)?,
                };
                // On the command line a server waits, and a socket is no server, unless stated.
                take_socket(&mut options, address, false, true)?
            }
            "stdio" => take_stdio(&mut options)?,
            kind => return Err(unknown_kind(&options, "backend", kind)),
        };
        Self::new(options, id, kind)
    }

    /// Reads the arguments of `chardev-add`, all of them.
    ///
    /// Fails as [`ChardevConfig::from_options`] does, and on a server that waits: everything else would wait with it.
    pub fn from_arguments(mut options: Options) -> Result<Self> {
        let id = options.require_str("id")?;
        let Some(mut backend) = options.take_options("backend")? else { return Err(options.missing("backend")) };
        let kind = backend.require_str("type")?;
        let mut data = backend.take_options("data")?.unwrap_or_default();
        let kind = match kind.as_str() {
            "socket" => {
                let Some(mut addr) = data.take_options("addr")? else { return Err(data.missing("addr")) };
                data.take_unsupported(SOCKET_UNSUPPORTED)?;
                let kind = addr.require_str("type")?;
                let mut place = addr.take_options("data")?.unwrap_or_default();
                let address = match kind.as_str() {
                    "unix" => take_unix(&mut place)?,
                    "fd" => take_fd(&mut place, "str")?,
                    "inet" | "vsock" => return Err(addr.unsupported_value("type", kind)),
                    _ => return Err(addr.invalid("type", kind, "unix or fd")),
                };
                place.finish()?;
                addr.finish()?;
                if data.take_bool("wait")? == Some(true) {
                    return Err(data.unsupported_value("wait", "true"));
                }
                take_socket(&mut data, address, true, false)?
            }
            "stdio" => take_stdio(&mut data)?,
            kind => return Err(unknown_kind(&backend, "type", kind)),
        };
        data.finish()?;
        backend.finish()?;
        Self::new(options, id, kind)
    }

    fn new(options: Options, id: String, kind: ChardevKind) -> Result<Self> {
        if !is_valid_id(&id) {
            return Err(options.invalid("id", id, "a letter, then letters, digits, '-', '.' and '_'"));
        }
        options.finish()?;
        Ok(Self { id, kind })
    }
}

/// Takes `server` and `wait`.
fn take_socket(options: &mut Options, address: SocketAddress, server: bool, wait: bool) -> Result<ChardevKind> {
    let server = options.take_bool("server")?.unwrap_or(server);
    let given = options.take_bool("wait")?;
    let address = match address {
        SocketAddress::Unix { path, group, .. } => SocketAddress::Unix { path, mode: Some(SOCKET_MODE), group },
        other => other,
    };
    match (server, given) {
        (true, _) => Ok(ChardevKind::Listening { address, wait: given.unwrap_or(wait) }),
        (false, Some(true)) => Err(options.invalid("wait", "on", "off unless server=on is given as well")),
        (false, _) => Ok(ChardevKind::Connected(address)),
    }
}

/// Takes what standard input and output can be told.
fn take_stdio(options: &mut Options) -> Result<ChardevKind> {
    // Signals of the terminal end the daemon, as they do without a monitor there.
    if options.take_bool("signal")? == Some(false) {
        return Err(options.unsupported_value("signal", "off"));
    }
    options.take_unsupported(&["logfile", "logappend", "mux"])?;
    Ok(ChardevKind::Stdio)
}

fn unknown_kind(options: &Options, key: &str, kind: &str) -> blockport_block::options::OptionsError {
    match KINDS_UNSUPPORTED.contains(&kind) {
        true => options.unsupported_value(key, kind),
        false => options.invalid(key, kind, "socket or stdio"),
    }
}

/// A monitor: who connects to its character device commands the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorConfig {
    /// Its name, if it has one.
    pub id: Option<String>,
    /// The name of its character device.
    pub chardev: String,
    /// Whether answers are laid out for people.
    pub pretty: bool,
}

impl MonitorConfig {
    /// A monitor on this character device.
    pub fn new(chardev: &str) -> Self {
        Self { id: None, chardev: chardev.to_owned(), pretty: false }
    }

    /// Reads the options of `--monitor`, all of them.
    ///
    /// Fails on options that are missing, unknown, or known to QEMU only.
    pub fn from_options(mut options: Options) -> Result<Self> {
        let chardev = options.require_str("chardev")?;
        match options.take_str("mode")?.as_deref() {
            None | Some("control") => {}
            Some("readline") => return Err(options.unsupported_value("mode", "readline")),
            Some(mode) => return Err(options.invalid("mode", mode, "control")),
        }
        let pretty = options.take_bool("pretty")?.unwrap_or(false);
        let id = options.take_str("id")?;
        options.finish()?;
        Ok(Self { id, chardev, pretty })
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Result<ChardevConfig> {
        ChardevConfig::from_options(parse_keyval(text, Some("backend")).expect(text))
    }

    fn unix(path: &str) -> SocketAddress {
        SocketAddress::Unix { path: path.into(), mode: Some(0o600), group: None }
    }

    #[test]
    fn chardevs_as_qemu_storage_daemon_takes_them() {
        for (text, kind) in [
            ("socket,id=c,path=/s,server=on,wait=off", ChardevKind::Listening { address: unix("/s"), wait: false }),
            ("socket,id=c,path=/s,server=on", ChardevKind::Listening { address: unix("/s"), wait: true }),
            ("socket,id=c,path=/s", ChardevKind::Connected(unix("/s"))),
            ("backend=socket,id=c,fd=4,server=off", ChardevKind::Connected(SocketAddress::Fd(4))),
            (
                "socket,id=c,path=n,abstract=on,tight=off,server=on,wait=off",
                ChardevKind::Listening {
                    address: SocketAddress::Abstract { name: "n".into(), tight: false },
                    wait: false,
                },
            ),
            ("stdio,id=c", ChardevKind::Stdio),
        ] {
            assert_eq!(read(text).expect(text), ChardevConfig { id: "c".into(), kind }, "{text}");
        }
    }

    #[test]
    fn chardevs_as_the_monitor_takes_them() {
        let read = |backend| {
            ChardevConfig::from_arguments(
                Options::from_json(json!({"id": "c", "backend": backend})).expect("an object"),
            )
        };
        let addr = json!({"type": "unix", "data": {"path": "/s"}});
        for (backend, kind) in [
            (
                json!({"type": "socket", "data": {"addr": addr}}),
                ChardevKind::Listening { address: unix("/s"), wait: false },
            ),
            (json!({"type": "socket", "data": {"addr": addr, "server": false}}), ChardevKind::Connected(unix("/s"))),
            (json!({"type": "stdio", "data": {}}), ChardevKind::Stdio),
        ] {
            assert_eq!(read(backend.clone()).expect("a chardev").kind, kind, "{backend}");
        }
        for (backend, complaint) in [
            (json!({"data": {}}), r#"option "backend.type" is missing"#),
            (json!({"type": "pty", "data": {}}), r#"option "backend.type": "pty" is not supported yet"#),
            (json!({"type": "x"}), r#"option "backend.type" must be socket or stdio, not "x""#),
            (json!({"type": "socket", "data": {}}), r#"option "backend.data.addr" is missing"#),
            (
                json!({"type": "socket", "data": {"addr": addr, "wait": true}}),
                r#"option "backend.data.wait": "true" is not supported yet"#,
            ),
            (json!({"type": "socket", "data": {"addr": addr, "foo": 1}}), r#"option "backend.data.foo" is unknown"#),
            (
                json!({"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/s", "x": 1}}}}),
                r#"option "backend.data.addr.data.x" is unknown"#,
            ),
        ] {
            assert_eq!(read(backend).expect_err("refused").to_string(), complaint);
        }
    }

    #[test]
    fn refusals() {
        for (text, complaint) in [
            ("socket,id=c,path=/s,fd=3", r#"options "path" and "fd" exclude each other"#),
            ("socket,id=c", r#"option "path" is missing"#),
            ("socket,path=/s", r#"option "id" is missing"#),
            ("socket,id=9,path=/s", r#"option "id" must be a letter, then letters, digits, '-', '.' and '_', not "9""#),
            ("socket,id=c,path=/s,foo=1", r#"option "foo" is unknown"#),
            ("socket,id=c,port=1", r#"option "port" is not supported yet"#),
            ("socket,id=c,path=/s,wait=on", r#"option "wait" must be off unless server=on is given as well, not "on""#),
            ("udp,id=c", r#"option "backend": "udp" is not supported yet"#),
            ("x,id=c", r#"option "backend" must be socket or stdio, not "x""#),
            ("stdio,id=c,signal=off", r#"option "signal": "off" is not supported yet"#),
        ] {
            assert_eq!(read(text).expect_err(text).to_string(), complaint, "{text}");
        }
    }

    #[test]
    fn monitors() {
        let read = |text| MonitorConfig::from_options(parse_keyval(text, Some("chardev")).expect(text));
        let expected = MonitorConfig { pretty: true, ..MonitorConfig::new("c") };
        assert_eq!(read("c,mode=control,pretty=on").expect("a monitor"), expected);
        for (text, complaint) in [
            ("c,mode=readline", r#"option "mode": "readline" is not supported yet"#),
            ("c,mode=x", r#"option "mode" must be control, not "x""#),
            ("mode=control", r#"option "chardev" is missing"#),
            ("c,x=1", r#"option "x" is unknown"#),
        ] {
            assert_eq!(read(text).expect_err(text).to_string(), complaint, "{text}");
        }
    }
}
