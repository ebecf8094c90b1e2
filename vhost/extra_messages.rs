//! What is read from the socket before the vhost crate reads it: the header of the next message, peeked at, and the few
//! messages that the crate lacks or hides, served here whole.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketType, recvmsg,
    send, sockopt,
};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The bytes of a message's header: request, flags, size of the payload, each a little-endian u32.
pub(crate) const HEADER_BYTES: usize = 12;
/// The largest payload; no message of the protocol has more.
pub(crate) const PAYLOAD_MAX: u32 = 4096;

/// The most descriptors that the crate takes with a message.
const DESCRIPTORS_MAX: usize = 32;

/// Requests that are served here.
pub(crate) const SET_LOG_FD: u32 = 7;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
/// Sent by us on the back-end channel.
const BACKEND_CONFIG_CHANGE_MSG: u32 = 2;

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The header of a message that has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) request: u32,
    flags: u32,
    pub(crate) size: u32,
}

impl Header {
    /// Whether the front-end asked for an acknowledgement.
    pub(crate) fn needs_reply(self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }

    /// Whether a refusal of this message reaches the front-end as a negative acknowledgement.
    pub(crate) fn is_acknowledged(self) -> bool {
        self.needs_reply() && !OWN_REPLY.contains(&self.request)
    }
}

/// Requests that have a reply of their own, so that the crate cannot acknowledge them: GET_FEATURES, GET_VRING_BASE,
/// GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG, GET_INFLIGHT_FD, GET_MAX_MEM_SLOTS, SET_LOG_BASE,
/// GET_SHARED_OBJECT, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE, GET_SHMEM_CONFIG.
const OWN_REPLY: [u32; 12] = [1, 11, 15, 17, 24, 31, 36, 6, 41, 42, 43, 44];

/// What has arrived.
pub(crate) enum Arrived {
    /// The peer has closed its end.
    Closed,
    /// Nothing, or (`true`) a part of a message.
    Incomplete(bool),
    /// A whole message.
    Whole(Header),
    /// Bytes that no message begins with; the connection must be closed.
    Garbage(&'static str),
}

/// Looks at what has arrived without taking it, descriptors included.
pub(crate) fn peek(socket: &UnixStream) -> io::Result<Arrived> {
    let mut raw = [0u8; HEADER_BYTES];
    let peeked = {
        let mut no_descriptors = RecvAncillaryBuffer::default();
        recvmsg(socket, &mut [IoSliceMut::new(&mut raw)], &mut no_descriptors, RecvFlags::PEEK | RecvFlags::DONTWAIT)
    };
    let peeked = match peeked {
        Ok(peeked) => peeked,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Arrived::Incomplete(false)),
        Err(Errno::CONNRESET) => return Ok(Arrived::Closed),
        Err(error) => return Err(error.into()),
    };
    if peeked.bytes == 0 {
        return Ok(Arrived::Closed);
    }
    let available = usize::try_from(ioctl_fionread(socket)?).unwrap_or(0);
    if peeked.bytes < HEADER_BYTES {
        return Ok(match available >= HEADER_BYTES {
            true => Arrived::Garbage("descriptors in the middle of a message's header"),
            false => Arrived::Incomplete(true),
        });
    }
    // Without room for descriptors, the kernel says that some were left out.
    if peeked.flags.contains(ReturnFlags::CTRUNC) && has_too_many_descriptors(socket)? {
        return Ok(Arrived::Garbage("a message with more than 32 descriptors"));
    }
    let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let header = Header { request: word(0), flags: word(4), size: word(8) };
    if header.size > PAYLOAD_MAX {
        return Ok(Arrived::Garbage("a message of more than 4096 bytes"));
    }
    match available >= HEADER_BYTES + header.size as usize {
        true => Ok(Arrived::Whole(header)),
        false => Ok(Arrived::Incomplete(true)),
    }
}

/// Whether the next message carries more descriptors than the crate takes: it would lose its header over them and wait
/// for the next one.
fn has_too_many_descriptors(socket: &UnixStream) -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX + 2))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let peeked = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut received, flags)?;
    // Peeking makes copies of the descriptors, which are closed here.
    let count: usize = received
        .drain()
        .map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.count(),
            _ => 0,
        })
        .sum();
    Ok(count > DESCRIPTORS_MAX || peeked.flags.contains(ReturnFlags::CTRUNC))
}

/// Whether a descriptor is a Unix stream socket.
pub(crate) fn is_unix_stream(socket: &OwnedFd) -> bool {
    sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX) && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
}

/// Takes a SET_BACKEND_REQ_FD, whose header was peeked at: the crate wraps the socket in an object that cannot send a
/// config change. `Ok(None)`: it carried no socket.
pub(crate) fn take_backend_channel(socket: &UnixStream, header: Header) -> io::Result<Option<UnixStream>> {
    let channel = take(socket, header)?.filter(is_unix_stream);
    Ok(channel.map(UnixStream::from))
}

/// Takes a message whose header was peeked at, and its descriptor.
pub(crate) fn take(socket: &UnixStream, header: Header) -> io::Result<Option<OwnedFd>> {
    let mut raw = vec![0u8; HEADER_BYTES + header.size as usize];
    let (got, file) = socket.recv_with_fd(&mut raw)?;
    if got != raw.len() {
        return Err(io::Error::other(format!("message {} came in pieces", header.request)));
    }
    Ok(file.map(OwnedFd::from))
}

/// Acknowledges a message that was taken here.
pub(crate) fn acknowledge(socket: &UnixStream, header: Header, ok: bool) -> io::Result<()> {
    let mut reply = Vec::with_capacity(HEADER_BYTES + 8);
    for word in [header.request, VERSION | FLAG_REPLY, 8] {
        reply.extend_from_slice(&word.to_le_bytes());
    }
    reply.extend_from_slice(&u64::from(!ok).to_le_bytes());
    (&mut &*socket).write_all(&reply)
}

/// Tells the front-end, on the back-end channel, that the config space has changed. Never with NEED_REPLY: QEMU would
/// answer only after a GET_CONFIG that the control thread must serve.
pub(crate) fn send_config_change(channel: &UnixStream) -> io::Result<()> {
    let mut message = [0u8; HEADER_BYTES];
    message[..4].copy_from_slice(&BACKEND_CONFIG_CHANGE_MSG.to_le_bytes());
    message[4..8].copy_from_slice(&VERSION.to_le_bytes());
    // A front-end that never reads must not hold us.
    match send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)? {
        HEADER_BYTES => Ok(()),
        sent => Err(io::Error::other(format!("only {sent} bytes of the message were taken"))),
    }
}
