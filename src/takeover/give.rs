//! The side that serves: the control socket, who may ask there and what was asked. What is told is the daemon's business.

use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockport_block::{OpenError, OpenResult};
use blockport_vhost::{Endpoint, Listener, SocketAddress};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::message::{FromNew, FromOld, VERSION};
use super::sockets::Sockets;
use super::wire::{self, Arrived, Inbox};

/// Only the daemon's own user may take over.
const SOCKET_MODE: u32 = 0o600;
/// How long a message may take to be read by the other side.
const SEND_PATIENCE: Duration = Duration::from_secs(2);
/// How long one that asks may keep others from asking.
const TURN_MAX: Duration = Duration::from_secs(30);

/// Where other processes ask for what we serve.
pub struct Control {
    listener: Listener,
    client: Option<Client>,
}

struct Client {
    inbox: Inbox,
    since: Instant,
    offered: bool,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// What there is.
    Offer,
    /// To stop serving, and tell everything.
    State,
}

impl Control {
    /// Listens, with nobody there yet.
    ///
    /// # Errors
    /// The socket cannot be had.
    pub fn open(path: &Path, sockets: &mut Sockets) -> OpenResult<Self> {
        let address = SocketAddress::Unix { path: path.to_owned(), mode: Some(SOCKET_MODE), group: None };
        let opened = sockets.open(&address).map_err(|e| e.context("--control"))?;
        let Endpoint::Listening(listener) = opened else {
            return Err(OpenError::new("--control: the socket is connected"));
        };
        listener.set_nonblocking().map_err(|e| OpenError(format!("--control: {e}")))?;
        Ok(Self { listener, client: None })
    }

    /// The socket itself.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// What is to be waited for.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.listener.as_fd()].into_iter().chain(self.client.iter().map(|client| client.inbox.as_fd()))
    }

    /// The next thing that is asked. Waits for nobody.
    pub fn asked(&mut self) -> Option<Asked> {
        self.accept();
        let client = self.client.as_mut()?;
        let message = match client.inbox.next::<FromNew>() {
            Ok(Arrived::Message(message)) => message,
            Ok(Arrived::Nothing) => return None,
            Ok(Arrived::Gone) => {
                self.client = None;
                return None;
            }
            Err(error) => {
                self.refuse(&error.to_string());
                return None;
            }
        };
        match message {
            FromNew::Hello { version: VERSION, program } if !client.offered => {
                tracing::info!("blockport {program} wants to take over");
                client.offered = true;
                Some(Asked::Offer)
            }
            FromNew::Hello { version, program } if version != VERSION => {
                let ours = env!("CARGO_PKG_VERSION");
                self.refuse(&format!(
                    "blockport {program} speaks version {version} of the hand-over, and blockport {ours}, which serves, \
                     version {VERSION}"
                ));
                None
            }
            FromNew::Ready if client.offered => Some(Asked::State),
            FromNew::Hello { .. } | FromNew::Ready | FromNew::Commit { .. } => {
                self.refuse("this is not its turn");
                None
            }
        }
    }

    /// Takes whoever comes; one at a time.
    fn accept(&mut self) {
        while let Ok(stream) = self.listener.accept() {
            let refused = match check_user(&stream) {
                Err(why) => Some(why),
                Ok(()) if self.client.as_ref().is_some_and(|client| client.since.elapsed() < TURN_MAX) => {
                    Some("another process is taking over".to_owned())
                }
                Ok(()) => None,
            };
            let _ = stream.set_write_timeout(Some(SEND_PATIENCE));
            let client = Client { inbox: Inbox::new(stream), since: Instant::now(), offered: false };
            match refused {
                Some(why) => refuse(client.inbox.socket(), &why),
                None => self.client = Some(client),
            }
        }
    }

    /// Sends an answer. Whoever does not take it has gone.
    pub fn answer(&mut self, answer: &FromOld, descriptors: &[OwnedFd]) -> bool {
        let Some(client) = &self.client else { return false };
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(OwnedFd::as_fd).collect();
        match wire::send(client.inbox.socket(), answer, &descriptors) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("taking over: the answer could not be sent: {error}");
                self.client = None;
                false
            }
        }
    }

    /// Says no, and that we go on.
    pub fn refuse(&mut self, why: &str) {
        if let Some(client) = self.client.take() {
            refuse(client.inbox.socket(), why);
        }
    }

    /// Waits for the one moment at which the other process serves. The socket files and the pidfile that it keeps; `None`:
    /// it does not, and cannot any more.
    pub fn committed(&mut self, until: Instant) -> Option<(Vec<PathBuf>, bool)> {
        let mut client = self.client.take()?;
        let why = loop {
            match client.inbox.next::<FromNew>() {
                Ok(Arrived::Message(FromNew::Commit { sockets, pidfile })) => {
                    self.client = Some(client);
                    return Some((sockets, pidfile));
                }
                Ok(Arrived::Nothing) if Instant::now() < until => client.wait(until),
                Ok(Arrived::Nothing) => break "it took too long",
                Ok(Arrived::Gone) => return None,
                Ok(Arrived::Message(_)) | Err(_) => break "this is not its turn",
            }
        };
        refuse(client.inbox.socket(), why);
        // It cannot send any more; but what it sent before this counts.
        match client.inbox.next::<FromNew>() {
            Ok(Arrived::Message(FromNew::Commit { sockets, pidfile })) => Some((sockets, pidfile)),
            _ => None,
        }
    }

    /// Waits until the other process, which serves, has nothing more to do here.
    pub fn wait_until_gone(&mut self, until: Instant) {
        let Some(client) = &mut self.client else { return };
        while matches!(client.inbox.next::<FromNew>(), Ok(Arrived::Nothing)) && Instant::now() < until {
            client.wait(until);
        }
    }
}

impl Client {
    /// Waits until something has come.
    fn wait(&self, until: Instant) {
        let timeout = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
        // An interrupted wait is a turn in which nothing came.
        let _ = poll(&mut [PollFd::new(self.inbox.socket(), PollFlags::IN)], timeout.as_ref());
    }
}

/// Says no. Afterwards nothing can be sent to us.
fn refuse(socket: &UnixStream, why: &str) {
    tracing::warn!("taking over is refused: {why}");
    // To one that is gone, it need not be said.
    let _ = wire::send(socket, &FromOld::Refused { why: why.to_owned() }, &[]);
    let _ = socket.shutdown(std::net::Shutdown::Both);
}

/// Whoever takes over gets all of the guests' memory: only our own user, and root, who could take it anyway.
fn check_user(peer: &UnixStream) -> Result<(), String> {
    let peer = rustix::net::sockopt::socket_peercred(peer).map_err(|e| format!("its user is not known: {e}"))?.uid;
    let ours = nix::unistd::geteuid().as_raw();
    match peer.is_root() || peer.as_raw() == ours {
        true => Ok(()),
        false => Err(format!("user {} asks, and only user {ours} may", peer.as_raw())),
    }
}
