//! Where an export or a monitor is reached: a Unix socket that we make, or a descriptor passed in. It owns the listening
//! socket and its file; what is said on it is the session's business.

mod handed;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::extra_messages::is_unix_stream;
pub use handed::SocketFile;
use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Where an export or a monitor is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// A socket file that we make.
    Unix {
        /// Its path; at most 107 bytes.
        path: PathBuf,
        /// Its permission bits; `None`: what the umask leaves.
        mode: Option<u32>,
        /// Its group, a number; `None`: our own.
        group: Option<u32>,
    },
    /// A name that is in no file system.
    Abstract {
        /// At most 107 bytes, any but zero.
        name: String,
        /// Whether the address is the name; else it is the name and zeroes, to the longest that an address can be.
        tight: bool,
    },
    /// A listening or connected socket that we inherited.
    Fd(RawFd),
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path, .. } => write!(f, "{}", path.display()),
            Self::Abstract { name, .. } => write!(f, "@{name}"),
            Self::Fd(fd) => write!(f, "file descriptor {fd}"),
        }
    }
}

/// The mode of a socket file that got a group but no mode.
const MODE_DEFAULT: u32 = 0o660;

/// The longest name that is in no file system: `sun_path` without the zero that such a name begins with.
const ABSTRACT_NAME_BYTES: usize = 107;

/// How many front-ends may wait for the one being served.
const BACKLOG: i32 = 128;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("socket {address}: {why}")]
pub struct SocketError {
    address: String,
    why: String,
}

/// A socket to be served.
pub enum Endpoint {
    /// Peers connect.
    Listening(Listener),
    /// One peer, served once.
    Connected(UnixStream),
}

/// A listening socket; the file it made goes away with it.
pub struct Listener {
    listener: UnixListener,
    file: Option<SocketFile>,
    /// Whether the file is ours to remove. A process that the socket comes from, or goes to, may have it.
    ours: Arc<AtomicBool>,
}

impl Listener {
    /// Has [`Listener::accept`] fail with `WouldBlock` rather than wait.
    ///
    /// # Errors
    /// The system's.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.listener.set_nonblocking(true)
    }

    /// Takes the next peer.
    ///
    /// # Errors
    /// The system's: there is none, it is gone already, or there are too few descriptors.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Only our own file: somebody may have put another one there.
        if self.ours.load(Ordering::Relaxed)
            && let Some(file) = &self.file
        {
            file.remove();
        }
    }
}

impl Endpoint {
    /// Makes the socket, or takes the inherited one over.
    ///
    /// # Errors
    /// It cannot be made, is served by somebody else, or is no Unix stream socket.
    pub fn open(address: &SocketAddress) -> Result<Self, SocketError> {
        let refuse = |why: String| SocketError { address: address.to_string(), why };
        match address {
            SocketAddress::Unix { path, mode, group } => {
                listen(path, *mode, *group).map(Self::Listening).map_err(refuse)
            }
            SocketAddress::Abstract { name, tight } => {
                listen_abstract(name, *tight).map(Self::Listening).map_err(|e| refuse(e.to_string()))
            }
            SocketAddress::Fd(fd) => inherited(*fd).map_err(refuse),
        }
    }

    /// Connects to a socket that somebody else listens on.
    ///
    /// # Errors
    /// Nobody does, or it may not be used. An inherited descriptor must be connected already.
    pub fn connect(address: &SocketAddress) -> Result<UnixStream, SocketError> {
        let refuse = |why: String| SocketError { address: address.to_string(), why };
        match address {
            SocketAddress::Unix { path, .. } => UnixStream::connect(path).map_err(|e| refuse(e.to_string())),
            SocketAddress::Abstract { name, tight } => abstract_address(name, *tight)
                .and_then(|address| UnixStream::connect_addr(&address))
                .map_err(|e| refuse(e.to_string())),
            SocketAddress::Fd(fd) => match inherited(*fd).map_err(refuse)? {
                Self::Connected(stream) => Ok(stream),
                Self::Listening(_) => Err(refuse("it listens, and is not connected".into())),
            },
        }
    }
}

/// Makes the socket file and listens. The file begins with no permission at all and gets its owner and mode afterwards, so
/// that nobody gets in who should not. A socket file that nobody listens on is replaced; anything else that is there is
/// left alone.
fn listen(path: &Path, mode: Option<u32>, group: Option<u32>) -> Result<Listener, String> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| e.to_string())?;
    let address = SocketAddrUnix::new(path).map_err(|e| e.to_string())?;
    // On Linux, the mode of the socket is that of the file that bind makes, less the umask.
    if mode.is_some() || group.is_some() {
        rustix::fs::fchmod(&socket, Mode::empty()).map_err(|e| e.to_string())?;
    }
    match rustix::net::bind(&socket, &address) {
        Ok(()) => {}
        Err(Errno::ADDRINUSE) => {
            remove_stale(path)?;
            rustix::net::bind(&socket, &address).map_err(|e| e.to_string())?;
        }
        Err(error) => return Err(error.to_string()),
    }
    // At once: another process takes a socket file for stale when nobody listens on it.
    rustix::net::listen(&socket, BACKLOG).map_err(|e| e.to_string())?;
    let metadata = std::fs::symlink_metadata(path).map_err(|e| e.to_string())?;
    // The daemon may go to another directory.
    let path = std::path::absolute(path).map_err(|e| e.to_string())?;
    // From here on the file goes away with this.
    let file = Some(SocketFile { path: path.clone(), device: metadata.dev(), inode: metadata.ino() });
    let listener = Listener::new(UnixListener::from(socket), file);
    if group.is_some() {
        std::os::unix::fs::chown(&path, None, group).map_err(|e| format!("setting its group: {e}"))?;
    }
    if mode.is_some() || group.is_some() {
        let permissions = std::fs::Permissions::from_mode(mode.unwrap_or(MODE_DEFAULT));
        std::fs::set_permissions(&path, permissions).map_err(|e| format!("setting its mode: {e}"))?;
    }
    Ok(listener)
}

fn listen_abstract(name: &str, tight: bool) -> io::Result<Listener> {
    let listener = UnixListener::bind_addr(&abstract_address(name, tight)?)?;
    Ok(Listener::new(listener, None))
}

fn abstract_address(name: &str, tight: bool) -> io::Result<std::os::unix::net::SocketAddr> {
    let mut name = name.as_bytes().to_vec();
    if !tight {
        name.resize(name.len().max(ABSTRACT_NAME_BYTES), 0);
    }
    std::os::unix::net::SocketAddr::from_abstract_name(name)
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), String> {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type()));
    if !is_socket {
        return Err("there is a file of that name, and it is not a socket".into());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another process is serving it".into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!("socket {}: replacing a stale socket file", path.display());
            std::fs::remove_file(path).map_err(|e| format!("removing the stale socket file: {e}"))
        }
        Err(error) => Err(format!("it is in use ({error})")),
    }
}

/// Takes over an inherited socket. SO_ACCEPTCONN tells a listening one from a connected one.
fn inherited(fd: RawFd) -> Result<Endpoint, String> {
    if fd <= 2 {
        return Err("standard input, output and error cannot be the socket".into());
    }
    let owned = take_fd(fd).ok_or("it is not open, or was not inherited")?;
    if !is_unix_stream(&owned) {
        return Err("it is not a Unix stream socket".into());
    }
    match sockopt::socket_acceptconn(&owned).map_err(|e| e.to_string())? {
        true => Ok(Endpoint::Listening(Listener::new(owned.into(), None))),
        false => Ok(Endpoint::Connected(owned.into())),
    }
}

#[allow(unsafe_code)] // Taking over an inherited descriptor; two calls.
fn take_fd(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: the borrow ends before anything can close the descriptor; if it is not open, the calls say so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // Everything that this process opens, and everything taken over before, is closed on exec; what was inherited is not.
    let flags = rustix::io::fcntl_getfd(borrowed).ok().filter(|flags| !flags.contains(FdFlags::CLOEXEC))?;
    rustix::io::fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).ok()?;
    // SAFETY: the descriptor is open, was inherited by this process, and is taken over only once, as it is marked now.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes the number of a socket that somebody else owns stand for another one; what it stood for is closed.
#[allow(unsafe_code)] // dup3; one call.
pub(crate) fn put_in_place(number: RawFd, with: &UnixStream) -> io::Result<()> {
    // SAFETY: no memory is passed. The number stays open, so whoever owns it notices nothing but another peer.
    match unsafe { libc::dup3(with.as_raw_fd(), number, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
