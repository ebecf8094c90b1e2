//! Metrics: the figures of all exports, queues and iothreads, for monitoring systems, over HTTP on the main loop.
//!
//! This file owns the socket and its clients: how many there are, how long one may take, what is waited for. Which figures
//! there are is `collect.rs`'s, how they are written `exposition.rs`'s, what is asked `http.rs`'s. It changes nothing.

pub mod collect;
mod exposition;
mod http;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blockport_block::{OpenError, OpenResult};
use blockport_vhost::{Endpoint, Listener, SocketAddress, SocketFile};
use nix::poll::PollFlags;

use crate::options::MetricsAddress;
use crate::takeover::sockets::Sockets;
use http::Parsed;

/// How many clients there are at once; a further one takes the place of the one that is there longest.
const CLIENTS_MAX: usize = 8;

/// How long a client may take, from its connection to the end of its answer.
const CLIENT_TIME: Duration = Duration::from_secs(5);

/// How long it is waited for the client to close after its answer. Closed before that, what it has not read may be lost.
const LINGER_TIME: Duration = Duration::from_secs(1);

/// How long none is accepted after one could not be.
const ACCEPT_REST: Duration = Duration::from_secs(1);

/// How much is read at a time, in bytes.
const READ_BYTES: usize = 4 << 10;

/// The permission bits of a socket file.
const SOCKET_MODE: u32 = 0o600;

/// The boundaries of latency histograms where figures are served and nobody has set others, in nanoseconds: from 10 µs to
/// 10 s.
pub const BOUNDARIES: &[u64] = &[
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

enum Socket {
    Tcp(TcpListener),
    Unix(Listener),
}

/// Who reads figures.
#[derive(Default)]
pub struct Metrics {
    socket: Option<Socket>,
    clients: Vec<Client>,
    last_client: u64,
    /// None is accepted before that: the last one could not be.
    rests_until: Option<Instant>,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A client that comes.
    Socket,
    /// The client of this number.
    Client(u64),
}

impl Metrics {
    /// Opens the socket; clients that come wait.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn open(address: &MetricsAddress, sockets: &mut Sockets) -> OpenResult<Self> {
        let refuse = |error: &dyn std::fmt::Display| OpenError(format!("--metrics {address}: {error}"));
        let socket = match address {
            MetricsAddress::Tcp(address) => {
                let listener = sockets.open_tcp(*address).map_err(|e| refuse(&e))?;
                listener.set_nonblocking(true).map_err(|e| refuse(&e))?;
                let bound = listener.local_addr().map_err(|e| refuse(&e))?;
                tracing::info!("figures are at http://{bound}/metrics");
                Socket::Tcp(listener)
            }
            MetricsAddress::Unix(path) => {
                let unix = SocketAddress::Unix { path: path.clone(), mode: Some(SOCKET_MODE), group: None };
                match sockets.open(&unix).map_err(|e| refuse(&e))? {
                    Endpoint::Listening(listener) => {
                        listener.set_nonblocking().map_err(|e| refuse(&e))?;
                        Socket::Unix(listener)
                    }
                    Endpoint::Connected(_) => return Err(refuse(&"it is connected")),
                }
            }
        };
        Ok(Self { socket: Some(socket), ..Self::default() })
    }

    /// The socket for a process after us, with its address if that is one of TCP.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub fn share(&self) -> io::Result<Option<(OwnedFd, Option<SocketAddr>)>> {
        Ok(match &self.socket {
            None => None,
            Some(Socket::Tcp(listener)) => Some((listener.try_clone()?.into(), Some(listener.local_addr()?))),
            Some(Socket::Unix(listener)) => Some((listener.share()?, None)),
        })
    }

    /// Its socket file, if it made one.
    pub fn socket_file(&self) -> Option<&SocketFile> {
        match &self.socket {
            Some(Socket::Unix(listener)) => listener.file(),
            Some(Socket::Tcp(_)) | None => None,
        }
    }

    /// Everything that is to be waited for.
    pub fn sources(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let socket = self.socket.as_ref().filter(|_| self.rests_until.is_none());
        let socket = socket.map(|socket| match socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        });
        let socket = socket.map(|fd| (Source::Socket, fd, PollFlags::POLLIN));
        let clients = self.clients.iter().map(|client| {
            let flags = if client.unread.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            (Source::Client(client.number), client.stream.as_fd(), flags)
        });
        socket.into_iter().chain(clients).collect()
    }

    /// How long at most can be waited; `None`: for ever.
    pub fn timeout(&self) -> Option<Duration> {
        let next = self.clients.iter().map(|client| client.deadline).chain(self.rests_until).min();
        next.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Does what sources that are ready call for, and drops clients whose time is over. `figures`: the page as it is now.
    pub fn serve(&mut self, ready: &[Source], figures: impl Fn() -> String) {
        for source in ready {
            match source {
                Source::Socket => self.accept(),
                Source::Client(number) => {
                    if let Some(client) = self.clients.iter_mut().find(|client| client.number == *number) {
                        client.go_on(&figures);
                    }
                }
            }
        }
        let now = Instant::now();
        self.rests_until = self.rests_until.filter(|until| *until > now);
        self.clients.retain(|client| {
            let late = client.deadline <= now;
            if late && !client.lingers {
                tracing::debug!("metrics: client {}: dropped: it takes too long", client.number);
            }
            !client.over && !late
        });
    }

    fn accept(&mut self) {
        let stream = match &self.socket {
            Some(Socket::Tcp(listener)) => {
                listener.accept().and_then(|(stream, _)| stream.set_nonblocking(true).map(|()| OwnedFd::from(stream)))
            }
            Some(Socket::Unix(listener)) => {
                listener.accept().and_then(|stream| stream.set_nonblocking(true).map(|()| OwnedFd::from(stream)))
            }
            None => return,
        };
        match stream {
            Ok(stream) => {
                // Clients that say nothing must not keep out those that do.
                if self.clients.len() >= CLIENTS_MAX {
                    self.clients.remove(0);
                }
                self.last_client += 1;
                self.clients.push(Client::new(self.last_client, stream));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of descriptors, most likely: the client stays where it is, and asking again at once is no use.
                tracing::warn!("metrics: a client could not be accepted: {error}");
                self.rests_until = Some(Instant::now() + ACCEPT_REST);
            }
        }
    }
}

/// One client: one request, one answer.
struct Client {
    number: u64,
    /// Of whichever family: reading, writing and closing half are the same for all stream sockets.
    stream: UnixStream,
    request: Vec<u8>,
    unread: Vec<u8>,
    written: usize,
    deadline: Instant,
    /// It has its answer, and may close.
    lingers: bool,
    over: bool,
}

impl Client {
    fn new(number: u64, stream: OwnedFd) -> Self {
        let deadline = Instant::now() + CLIENT_TIME;
        let (request, unread) = (Vec::new(), Vec::new());
        Self { number, stream: stream.into(), request, unread, written: 0, deadline, lingers: false, over: false }
    }

    fn go_on(&mut self, figures: impl Fn() -> String) {
        if self.unread.is_empty() {
            self.read(figures);
        }
        if !self.unread.is_empty() {
            self.write();
        }
    }

    fn read(&mut self, figures: impl Fn() -> String) {
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.over = true,
            // What follows the request is nothing to us.
            Ok(_) if self.lingers => {}
            Ok(count) => {
                self.request.extend_from_slice(&bytes[..count]);
                self.unread = match http::parse(&self.request) {
                    Parsed::Partial => return,
                    Parsed::Figures { body } => http::answer(&figures(), body),
                    Parsed::Refused(status) => http::refusal(status),
                };
                self.request = Vec::new();
            }
            Err(error) => self.failed(&error),
        }
    }

    fn write(&mut self) {
        while self.written < self.unread.len() {
            match self.stream.write(&self.unread[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) => return self.failed(&error),
            }
        }
        (self.unread, self.lingers) = (Vec::new(), true);
        self.deadline = Instant::now() + LINGER_TIME;
        self.over |= self.stream.shutdown(Shutdown::Write).is_err();
    }

    fn failed(&mut self, error: &io::Error) {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
            _ => self.over = true,
        }
    }
}
