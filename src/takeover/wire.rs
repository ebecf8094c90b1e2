//! How two processes talk: each message is two numbers, how many bytes of JSON follow and how many descriptors after
//! them. It owns the bytes, and bounds what a peer can have us take; what is said it does not know.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of the two numbers.
const HEADER_BYTES: usize = 8;
/// The longest message, in bytes.
const MESSAGE_MAX: u32 = 16 << 20;
/// The longest that comes without descriptors, from a process that wants to take over.
const ASKING_MAX: u32 = 1 << 16;
/// The most descriptors of a message: 256 exports could have more, and a process has not.
const DESCRIPTORS_MAX: u32 = 1 << 16;
/// How many go in one piece; the kernel takes 253.
const PIECE: usize = 200;

/// Sends a message. Without descriptors it goes in one piece, so that it has been sent whole or not at all.
///
/// # Errors
/// The peer is gone, or does not read.
pub fn send(socket: &UnixStream, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let number = |n: usize| u32::try_from(n).map_err(|_| io::Error::other("a message that is too long"));
    let mut bytes = Vec::with_capacity(HEADER_BYTES + json.len());
    bytes.extend_from_slice(&number(json.len())?.to_le_bytes());
    bytes.extend_from_slice(&number(descriptors.len())?.to_le_bytes());
    bytes.extend_from_slice(&json);
    // Rust's run-time ignores SIGPIPE: a peer that is gone is an error.
    (&mut &*socket).write_all(&bytes)?;
    for piece in descriptors.chunks(PIECE) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PIECE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(piece)) {
            return Err(io::Error::other("too many descriptors in a piece"));
        }
        sendmsg(socket, &[IoSlice::new(b"d")], &mut control, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// Receives a message with its descriptors, within the socket's time.
///
/// # Errors
/// `UnexpectedEof`: the peer is gone; else it does not answer, or talks nonsense.
pub fn receive<M: DeserializeOwned>(socket: &UnixStream) -> io::Result<(M, Vec<OwnedFd>)> {
    let mut header = [0; HEADER_BYTES];
    (&mut &*socket).read_exact(&mut header)?;
    let (bytes, count) = numbers(&header);
    if bytes > MESSAGE_MAX || count > DESCRIPTORS_MAX {
        return Err(nonsense());
    }
    let mut json = vec![0; bytes as usize];
    (&mut &*socket).read_exact(&mut json)?;
    let mut descriptors = Vec::new();
    while descriptors.len() < count as usize {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PIECE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let got = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC);
        if matches!(got, Err(Errno::INTR)) {
            continue;
        }
        let before = descriptors.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        match got?.bytes {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if descriptors.len() == before => return Err(nonsense()),
            _ => {}
        }
    }
    Ok((serde_json::from_slice(&json)?, descriptors))
}

fn numbers(header: &[u8; HEADER_BYTES]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = *header;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "this is no message")
}

/// What has come so far from a process that wants to take over, which is never waited for.
pub struct Inbox {
    socket: UnixStream,
    received: Vec<u8>,
}

/// What there is.
pub enum Arrived<M> {
    /// A message.
    Message(M),
    /// Nothing, or a part of one.
    Nothing,
    /// The peer has gone.
    Gone,
}

impl Inbox {
    /// Of a connection.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, received: Vec::new() }
    }

    /// The connection.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Takes the next message, if it has come whole.
    ///
    /// # Errors
    /// The peer talks nonsense.
    pub fn next<M: DeserializeOwned>(&mut self) -> io::Result<Arrived<M>> {
        loop {
            if let Some(header) = self.received.first_chunk::<HEADER_BYTES>() {
                let (bytes, descriptors) = numbers(header);
                if bytes > ASKING_MAX || descriptors != 0 {
                    return Err(nonsense());
                }
                let end = HEADER_BYTES + bytes as usize;
                if let Some(json) = self.received.get(HEADER_BYTES..end) {
                    let message = serde_json::from_slice(json)?;
                    self.received.drain(..end);
                    return Ok(Arrived::Message(message));
                }
            }
            let mut piece = [0; 4096];
            // Without room for descriptors, those that come are closed by the kernel.
            let got = rustix::net::recv(&self.socket, &mut piece, RecvFlags::DONTWAIT);
            match got {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(Arrived::Gone),
                Ok((count, _)) => self.received.extend_from_slice(piece.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN) => return Ok(Arrived::Nothing),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
