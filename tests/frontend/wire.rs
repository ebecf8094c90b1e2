//! The vhost-user socket: messages as bytes and descriptors, with nothing checked, so that a test can send anything.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};

use super::wait::{self, DEADLINE};

/// Front-end message codes (vhost-user, "Front-end message types").
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Protocol version 1, in the low bits of the flags.
pub const VERSION: u32 = 1;
/// The message is a reply.
pub const REPLY: u32 = 1 << 2;
/// The sender asks for an acknowledgement.
pub const NEED_REPLY: u32 = 1 << 3;

/// Size of a message header: code, flags, payload size.
pub const HEADER_SIZE: usize = 12;

/// A message header as it goes over the socket.
pub fn header(code: u32, flags: u32, size: u32) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[0..4].copy_from_slice(&code.to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&size.to_ne_bytes());
    bytes
}

/// What the back-end sent back.
#[derive(Debug)]
pub struct Reply {
    pub code: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as one number.
    #[track_caller]
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.payload.as_slice().try_into().expect("a reply of 8 bytes"))
    }
}

/// Why no reply came.
#[derive(Debug, PartialEq, Eq)]
pub enum NoReply {
    /// The back-end closed the connection.
    Closed,
    /// The connection is open and silent.
    Silent,
}

/// One connection to a back-end.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
}

impl Connection {
    /// Connects; where the queue of those who wait is full, for at most `timeout`.
    pub fn open(path: &Path, timeout: Duration) -> io::Result<Self> {
        let family = AddressFamily::UNIX;
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        set_socket_timeout(&socket, Timeout::Send, Some(DEADLINE))?;
        Ok(Self { socket: UnixStream::from(socket) })
    }

    /// Sends one message with the given flags on top of the version.
    pub fn send(&self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let size = u32::try_from(payload.len()).expect("a payload below 4 GiB");
        let mut bytes = header(code, VERSION | flags, size).to_vec();
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends bytes as they are; the descriptors go with the first of them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "room for descriptors");
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let part = [IoSlice::new(&bytes[sent..])];
            sent += sendmsg(&self.socket, &part, &mut control, SendFlags::NOSIGNAL)?;
            control.clear();
        }
        Ok(())
    }

    /// Receives one reply within the usual deadline.
    pub fn receive(&self) -> Result<Reply, NoReply> {
        self.receive_within(DEADLINE)
    }

    /// Receives one reply.
    pub fn receive_within(&self, timeout: Duration) -> Result<Reply, NoReply> {
        let end = Instant::now() + timeout;
        let mut header = [0; HEADER_SIZE];
        let fds = self.receive_with_fds(&mut header, end)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let (code, flags, size) = (word(0), word(4), word(8));
        assert_eq!(flags & (VERSION | REPLY), VERSION | REPLY, "flags of the reply to message {code}");
        assert!(size <= 4096, "a reply of {size} bytes to message {code}");
        let mut payload = vec![0; size as usize];
        self.receive_exactly(&mut payload, end)?;
        assert!(fds.is_empty() || code == code::GET_INFLIGHT_FD, "descriptors with the reply to message {code}");
        Ok(Reply { code, payload, fds })
    }

    fn receive_exactly(&self, buffer: &mut [u8], end: Instant) -> Result<(), NoReply> {
        let fds = self.receive_with_fds(buffer, end)?;
        assert!(fds.is_empty(), "descriptors that do not come with a header");
        Ok(())
    }

    fn receive_with_fds(&self, buffer: &mut [u8], end: Instant) -> Result<Vec<OwnedFd>, NoReply> {
        let mut got = 0;
        let mut fds = Vec::new();
        while got < buffer.len() {
            if !wait::readable(&self.socket, end.saturating_duration_since(Instant::now())) {
                return Err(NoReply::Silent);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut part = [IoSliceMut::new(&mut buffer[got..])];
            match recvmsg(&self.socket, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes > 0 => got += received.bytes,
                Ok(_) | Err(rustix::io::Errno::CONNRESET) => return Err(NoReply::Closed),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("recvmsg: {error}"),
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    fds.extend(more);
                }
            }
        }
        Ok(fds)
    }

    /// Sends a message and receives its reply.
    #[track_caller]
    pub fn ask(&self, code: u32, payload: &[u8]) -> Result<Reply, NoReply> {
        if self.send(code, 0, payload, &[]).is_err() {
            return Err(NoReply::Closed);
        }
        let reply = self.receive()?;
        assert_eq!(reply.code, code, "the reply answers another message");
        Ok(reply)
    }

    /// Waits until the back-end closes the connection, throwing away what it still sends; false when `timeout` passes.
    pub fn closed_within(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut byte = [0];
        loop {
            match self.receive_exactly(&mut byte, end) {
                Ok(()) => {}
                Err(NoReply::Closed) => return true,
                Err(NoReply::Silent) => return false,
            }
        }
    }

    /// How long a blocked send may take before it fails.
    pub fn set_write_timeout(&self, timeout: Duration) {
        self.socket.set_write_timeout(Some(timeout)).expect("a timeout on a socket");
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
