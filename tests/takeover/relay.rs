//! What stands between two processes of which one takes over: it passes their messages on one by one, so that a test can
//! change one, or end a process between any two. It can also be one of the two. It shares no code with the daemon.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde_json::Value;

use crate::frontend::wait::{self, DEADLINE};

/// A message and its descriptors.
pub type Message = (Value, Vec<OwnedFd>);

/// One end of a conversation.
pub struct Peer(UnixStream);

impl Peer {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE * 3)).expect("a timeout");
        Self(stream)
    }

    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).expect("a process that listens"))
    }

    /// The next message; `None` when the other side has closed.
    #[track_caller]
    pub fn receive(&self) -> Option<Message> {
        let mut header = [0; 8];
        (&mut &self.0).read_exact(&mut header).ok()?;
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes")) as usize;
        let (mut json, count) = (vec![0; number(0)], number(4));
        (&mut &self.0).read_exact(&mut json).ok()?;
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    descriptors.extend(received);
                }
            }
        }
        Some((serde_json::from_slice(&json).expect("JSON"), descriptors))
    }

    pub fn send(&self, (json, descriptors): &Message) {
        let json = json.to_string();
        let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
        bytes.extend((descriptors.len() as u32).to_le_bytes());
        bytes.extend(json.as_bytes());
        // One that is dead hears nothing.
        let _ = self.send_bytes(&bytes);
        for piece in descriptors.chunks(100) {
            let piece: Vec<_> = piece.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&piece)));
            let _ = sendmsg(&self.0, &[IoSlice::new(b"d")], &mut control, SendFlags::NOSIGNAL);
        }
    }

    pub fn send_bytes(&self, bytes: &[u8]) -> std::io::Result<()> {
        (&mut &self.0).write_all(bytes)
    }

    /// Says something that has no descriptors.
    pub fn say(&self, json: Value) {
        self.send(&(json, Vec::new()));
    }

    /// What the other side refuses with.
    #[track_caller]
    pub fn refusal(&self) -> String {
        let (answer, _) = self.receive().expect("an answer");
        assert_eq!(answer["message"], "refused", "{answer}");
        answer["why"].as_str().expect("text").to_owned()
    }
}

/// Between two processes.
pub struct Relay {
    old: Peer,
    new: Peer,
    passed: usize,
}

/// How many messages a take-over has.
pub const MESSAGES: usize = 5;
/// The numbers of some of them.
pub const HELLO: usize = 0;
pub const OFFER: usize = 1;
pub const STATE: usize = 3;
pub const COMMIT: usize = 4;

impl Relay {
    /// Waits for the process that is to take over.
    #[track_caller]
    pub fn accept(listener: &UnixListener, control: &Path) -> Self {
        assert!(wait::readable(listener, DEADLINE * 3), "nobody wants to take over");
        let (new, _) = listener.accept().expect("a connection");
        Self { old: Peer::connect(control), new: Peer::new(new), passed: 0 }
    }

    /// The next message. The two take turns, and the new process begins.
    #[track_caller]
    pub fn take(&mut self) -> Message {
        let from = if self.passed.is_multiple_of(2) { &self.new } else { &self.old };
        from.receive().unwrap_or_else(|| panic!("message {} does not come", self.passed))
    }

    /// Passes it on.
    pub fn give(&mut self, message: &Message) {
        let to = if self.passed.is_multiple_of(2) { &self.old } else { &self.new };
        to.send(message);
        self.passed += 1;
    }

    #[track_caller]
    pub fn pass(&mut self, count: usize) {
        for _ in 0..count {
            let message = self.take();
            self.give(&message);
        }
    }

    /// Passes an answer on that is the last.
    pub fn pass_refusal(&self) {
        if let Some(message) = self.old.receive() {
            self.new.send(&message);
        }
    }
}
