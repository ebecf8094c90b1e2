//! Where the daemon's sockets come from: it makes them, inherits them, or goes on with those of the process before it.
//! It owns what is left of the last, and says whose socket files are.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockport_block::{OpenError, OpenResult};
use blockport_vhost::handover::{Descriptors, ExportImage};
use blockport_vhost::{Endpoint, Listener, SocketAddress, SocketFile};

use super::message::ExportState;

/// A socket that the process before us listens on, with its file or its address.
pub(super) struct Handed {
    pub(super) socket: OwnedFd,
    pub(super) file: Option<SocketFile>,
    pub(super) tcp: Option<SocketAddr>,
}

/// What the process before us listens on, until it is in use; nothing in a daemon that started from nothing.
#[derive(Default)]
pub struct Sockets {
    listening: Vec<Option<Handed>>,
    /// By the ids of exports: which of these is its own.
    of_exports: BTreeMap<String, Option<usize>>,
    states: BTreeMap<String, (ExportState, Descriptors)>,
    /// The files of those in use.
    kept: Vec<PathBuf>,
    ours: Arc<AtomicBool>,
}

impl Sockets {
    pub(super) fn handed(listening: Vec<Option<Handed>>, of_exports: BTreeMap<String, Option<usize>>) -> Self {
        Self { listening, of_exports, ..Self::default() }
    }

    pub(super) fn set_states(&mut self, states: BTreeMap<String, (ExportState, Descriptors)>) {
        self.states = states;
    }

    /// The socket at an address: the one that the process before us listens on there, or a new one.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn open(&mut self, address: &SocketAddress) -> OpenResult<Endpoint> {
        if let SocketAddress::Unix { path, .. } = address
            && let Ok(path) = std::path::absolute(path)
        {
            let is_there = |socket: &Handed| socket.file.as_ref().is_some_and(|file| file.path == path);
            if let Some(socket) = self.take(is_there) {
                return Ok(self.adopt(socket));
            }
        }
        Endpoint::open(address).map_err(OpenError::new)
    }

    /// The same for TCP.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn open_tcp(&mut self, address: SocketAddr) -> io::Result<TcpListener> {
        match self.take(|socket| socket.tcp == Some(address)) {
            Some(socket) => Ok(socket.socket.into()),
            None => TcpListener::bind(address),
        }
    }

    fn take(&mut self, wanted: impl Fn(&Handed) -> bool) -> Option<Handed> {
        self.listening.iter_mut().find(|socket| socket.as_ref().is_some_and(&wanted)).and_then(Option::take)
    }

    /// The socket of an export, with what is to be gone on with there.
    ///
    /// # Errors
    /// It cannot be had, or the process before us listens elsewhere.
    pub fn open_export(
        &mut self,
        id: &str,
        address: &SocketAddress,
    ) -> OpenResult<(Endpoint, Option<(ExportState, Descriptors)>)> {
        let Some(socket) = self.of_exports.remove(id) else { return Ok((self.open(address)?, None)) };
        let state = self.states.remove(id);
        let socket = match socket {
            None => None,
            Some(place) => self.listening.get_mut(place).and_then(Option::take),
        };
        let endpoint = match socket {
            Some(socket) => {
                if let (SocketAddress::Unix { path, .. }, Some(file)) = (address, &socket.file)
                    && std::path::absolute(path).map_err(OpenError::new)? != file.path
                {
                    let there = file.path.display();
                    return Err(OpenError(format!("its socket is {there} there, and {address} here")));
                }
                self.adopt(socket)
            }
            // It serves the one connection that it got, which comes with the state.
            None => Endpoint::Connected(UnixStream::pair().map_err(OpenError::new)?.0),
        };
        Ok((endpoint, state))
    }

    fn adopt(&mut self, Handed { socket, file, .. }: Handed) -> Endpoint {
        self.kept.extend(file.as_ref().map(|file| file.path.clone()));
        Endpoint::Listening(Listener::adopt(socket, file, self.ours.clone()))
    }

    /// The socket files of the process before us that are in use here.
    pub(super) fn kept(&self) -> Vec<PathBuf> {
        self.kept.clone()
    }

    /// They are ours, and all others are closed.
    pub(super) fn settle(&mut self) {
        self.ours.store(true, Ordering::Relaxed);
        *self = Self { ours: self.ours.clone(), ..Self::default() };
    }
}

/// The parts of a state that the device model wants.
pub fn split(state: Option<(ExportState, Descriptors)>) -> (Option<(ExportImage, Descriptors)>, Vec<[u64; 6]>) {
    match state {
        Some((state, descriptors)) => (Some((state.image, descriptors)), state.statistics),
        None => (None, Vec::new()),
    }
}
