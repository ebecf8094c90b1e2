//! Character devices: where the bytes of a monitor come from and go to.
//!
//! This file owns listening sockets, connections and standard input and output, until a monitor takes them. It never
//! reads or writes anything.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use blockport_block::{OpenError, OpenResult};
use blockport_vhost::{Endpoint, Listener};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::daemon::socket_address;
use crate::options::{ChardevConfig, ChardevKind, SocketAddress};
use crate::takeover::sockets::Sockets;

/// Both directions of a client; never blocking.
pub struct Connection {
    /// What comes from it.
    pub input: File,
    /// What goes to it.
    pub output: File,
}

impl Connection {
    fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let output = File::from(OwnedFd::from(stream.try_clone()?));
        Ok(Self { input: File::from(OwnedFd::from(stream)), output })
    }

    fn stdio() -> io::Result<Self> {
        Ok(Self {
            input: reopened(io::stdin().as_fd(), 0, File::options().read(true))?,
            output: reopened(io::stdout().as_fd(), 1, File::options().write(true))?,
        })
    }
}

/// The same file, opened anew where that is possible: what has no wait for us then has none for others who share it.
fn reopened(fd: BorrowedFd<'_>, number: u32, options: &mut std::fs::OpenOptions) -> io::Result<File> {
    if let Ok(file) = options.custom_flags(libc::O_NONBLOCK).open(format!("/proc/self/fd/{number}")) {
        return Ok(file);
    }
    let own = fd.try_clone_to_owned()?;
    let flags = OFlag::from_bits_truncate(fcntl(&own, FcntlArg::F_GETFL)?);
    fcntl(&own, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(own.into())
}

/// A character device.
pub struct Chardev {
    /// As `query-chardev` shows it.
    description: String,
    source: Source,
    /// Whether a monitor uses it.
    pub in_use: bool,
}

enum Source {
    Listening(Listener),
    /// Until a monitor takes it.
    Connected(Option<Connection>),
}

impl Chardev {
    fn open(kind: &ChardevKind, sockets: &mut Sockets) -> OpenResult<Self> {
        let fail = |error: io::Error| OpenError::new(error);
        let (description, source) = match kind {
            ChardevKind::Listening { address, .. } => match sockets.open(&socket_address(address)?)? {
                Endpoint::Listening(listener) => {
                    listener.set_nonblocking().map_err(fail)?;
                    (format!("{},server=on", shown(address)), Source::Listening(listener))
                }
                Endpoint::Connected(_) => {
                    return Err(OpenError(format!(
                        "socket {address}: it is connected, and server=on needs one that listens"
                    )));
                }
            },
            ChardevKind::Connected(address) => {
                let stream = Endpoint::connect(&socket_address(address)?).map_err(OpenError::new)?;
                (shown(address), Source::Connected(Some(Connection::over(stream).map_err(fail)?)))
            }
            ChardevKind::Stdio => ("stdio".to_owned(), Source::Connected(Some(Connection::stdio().map_err(fail)?))),
        };
        Ok(Self { description, source, in_use: false })
    }

    /// As `query-chardev` shows it.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The socket that clients connect to, if there is one.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Listening(listener) => Some(listener.as_fd()),
            Source::Connected(_) => None,
        }
    }

    /// The same with its file, for a process after us.
    pub fn listening(&self) -> Option<&Listener> {
        match &self.source {
            Source::Listening(listener) => Some(listener),
            Source::Connected(_) => None,
        }
    }

    /// The next client, if there is one.
    pub fn accept(&mut self) -> Option<Connection> {
        match &mut self.source {
            Source::Listening(listener) => match listener.accept().and_then(Connection::over) {
                Ok(connection) => Some(connection),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                Err(error) => {
                    tracing::warn!("{}: a client could not be accepted: {error}", self.description);
                    None
                }
            },
            Source::Connected(connection) => connection.take(),
        }
    }
}

/// An address in QEMU's words.
fn shown(address: &SocketAddress) -> String {
    match address {
        SocketAddress::Unix { path, .. } => format!("unix:{}", path.display()),
        SocketAddress::Abstract { name, tight } => {
            format!("unix:{name},abstract=on,tight={}", if *tight { "on" } else { "off" })
        }
        SocketAddress::Fd(fd) => format!("fd:{fd}"),
    }
}

/// All character devices, by name.
#[derive(Default)]
pub struct Chardevs(BTreeMap<String, Chardev>);

impl Chardevs {
    /// Opens one.
    ///
    /// # Errors
    /// The name is taken, or it cannot be opened.
    pub fn add(&mut self, config: &ChardevConfig, sockets: &mut Sockets) -> OpenResult<&Chardev> {
        let ChardevConfig { id, kind } = config;
        if self.0.contains_key(id) {
            return Err(OpenError(format!("Chardev with id '{id}' already exists")));
        }
        let chardev = Chardev::open(kind, sockets).map_err(|error| error.context(format_args!("chardev \"{id}\"")))?;
        Ok(self.0.entry(id.clone()).or_insert(chardev))
    }

    /// Closes one.
    ///
    /// # Errors
    /// There is none of that name, or a monitor uses it.
    pub fn remove(&mut self, id: &str) -> OpenResult {
        if self.get(id)?.in_use {
            return Err(OpenError(format!("Chardev '{id}' is busy")));
        }
        self.0.remove(id);
        Ok(())
    }

    /// The one of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&mut self, id: &str) -> OpenResult<&mut Chardev> {
        self.0.get_mut(id).ok_or_else(|| OpenError(format!("Chardev '{id}' not found")))
    }

    /// The one of that name, to look at.
    pub fn find(&self, id: &str) -> Option<&Chardev> {
        self.0.get(id)
    }

    /// All of them, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Chardev)> {
        self.0.iter().map(|(id, chardev)| (id.as_str(), chardev))
    }
}
