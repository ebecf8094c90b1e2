//! Listening sockets that come from another process, or go to one: whose the socket file is. It listens on nothing new.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::Listener;

/// A socket file that we, or a process before us, made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFile {
    /// From the root.
    pub path: PathBuf,
    /// Where it is, as stat(2) tells it.
    pub device: u64,
    /// The same.
    pub inode: u64,
}

impl SocketFile {
    /// Removes it, unless somebody has put another file there.
    pub fn remove(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == (self.device, self.inode)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    pub(super) fn new(listener: UnixListener, file: Option<SocketFile>) -> Self {
        Self { listener, file, ours: Arc::new(AtomicBool::new(true)) }
    }

    /// A socket that another process listens on. Its file is removed with this only once `ours` is true.
    pub fn adopt(socket: OwnedFd, file: Option<SocketFile>, ours: Arc<AtomicBool>) -> Self {
        Self { listener: socket.into(), file, ours }
    }

    /// The file that it made; `None`: none.
    pub fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// The same socket for another process.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.listener.try_clone().map(OwnedFd::from)
    }
}
