//! Session: one client of a monitor.
//!
//! This file owns what a client has negotiated, what it has sent that waits its turn, what it has not yet read, and the
//! bounds of all that. It never carries out a command.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::PollFlags;
use serde_json::{Value, json};

use super::commands::general::{self, Capability};
use super::dispatch::{self, BadRequest, CommandError, CommandResult, Request};
use super::schema::Arguments;
use super::wire::{self, Frame, Framer};
use crate::chardev::Connection;

/// How much is read at a time, in bytes.
const READ_BYTES: usize = 16 << 10;

/// With so much unread, in bytes, nothing more is done for a client.
const UNREAD_BYTES_HIGH: usize = 64 << 10;

/// With so much unread, in bytes, a client is dropped: it reads no events.
const UNREAD_BYTES_MAX: usize = 4 << 20;

/// How many commands of a client wait their turn, once it may overtake itself.
const WAITING_MAX: usize = 8;

/// How many pieces of garbage a client may send.
const GARBAGE_MAX: u32 = 100;

/// One client.
pub struct Session {
    /// Tells it from all others.
    pub number: u64,
    /// In logs.
    name: String,
    connection: Connection,
    framer: Framer,
    waiting: VecDeque<Waiting>,
    unread: Vec<u8>,
    pretty: bool,
    negotiated: bool,
    out_of_band: bool,
    garbage: u32,
    /// Nothing more comes from it.
    input_ended: bool,
    /// It gets what is unread, and no more is done for it.
    closing: bool,
    /// It is gone, or was dropped.
    over: bool,
}

/// What waits its turn.
enum Waiting {
    Request(Request),
    Refusal(BadRequest),
}

impl Waiting {
    fn overtakes(&self) -> bool {
        matches!(self, Self::Request(request) if request.out_of_band)
    }
}

impl Session {
    /// Greets a new client.
    pub fn new(number: u64, monitor: &str, connection: Connection, pretty: bool) -> Self {
        let mut session = Self {
            number,
            name: format!("monitor \"{monitor}\", client {number}"),
            connection,
            framer: Framer::default(),
            waiting: VecDeque::new(),
            unread: Vec::new(),
            pretty,
            negotiated: false,
            out_of_band: false,
            garbage: 0,
            input_ended: false,
            closing: false,
            over: false,
        };
        tracing::debug!("{}: connected", session.name);
        session.tell(&json!({"QMP": {"version": general::version(), "capabilities": [Capability::Oob]}}));
        session
    }

    /// Where it is read from, and what for.
    pub fn input(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        (!self.input_ended && !self.closing && !self.is_held_up())
            .then(|| (self.connection.input.as_fd(), PollFlags::POLLIN))
    }

    /// Where it is written to, and what for.
    pub fn output(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        (!self.unread.is_empty()).then(|| (self.connection.output.as_fd(), PollFlags::POLLOUT))
    }

    /// Whether the session has ended and nothing is left to be done.
    pub fn is_over(&self) -> bool {
        let done = self.input_ended && self.waiting.is_empty() || self.closing;
        self.over || (done && self.unread.is_empty())
    }

    /// Whether it has commands that wait and may go on.
    pub fn has_work(&self) -> bool {
        !self.over && !self.closing && !self.waiting.is_empty() && self.unread.len() < UNREAD_BYTES_HIGH
    }

    /// Takes no more commands, and ends when the client has read everything.
    pub fn close(&mut self) {
        self.closing = true;
        self.waiting.clear();
        self.flush();
    }

    /// Whether it must read, or its commands be carried out, before more is taken from it.
    fn is_held_up(&self) -> bool {
        self.waiting.len() >= self.waiting_max() || self.unread.len() >= UNREAD_BYTES_HIGH
    }

    fn waiting_max(&self) -> usize {
        if self.out_of_band { WAITING_MAX } else { 1 }
    }

    /// Reads once.
    pub fn read(&mut self) {
        let mut bytes = [0; READ_BYTES];
        match self.connection.input.read(&mut bytes) {
            Ok(0) => self.input_ended = true,
            Ok(count) => self.framer.push(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => self.lost(&error),
        }
        self.look();
    }

    /// Writes what the client takes at this moment.
    pub fn flush(&mut self) {
        let mut written = 0;
        while written < self.unread.len() {
            match self.connection.output.write(&self.unread[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.lost(&error);
                    break;
                }
            }
        }
        self.unread.drain(..written);
    }

    fn lost(&mut self, error: &std::io::Error) {
        tracing::debug!("{}: {error}", self.name);
        self.over = true;
    }

    /// Looks at what arrived until enough waits.
    fn look(&mut self) {
        while !self.closing && !self.is_held_up() {
            let Some(frame) = self.framer.next() else { return };
            let waiting = match frame {
                Frame::Message(message) => match Request::read(&message, self.out_of_band) {
                    Ok(request) => Waiting::Request(request),
                    Err(refusal) => self.bad(refusal.id, refusal.error),
                },
                Frame::Garbage(why) => self.bad(None, CommandError::new(format!("JSON: {why}"))),
                Frame::TooLong => {
                    let bytes = wire::MESSAGE_BYTES_MAX;
                    self.drop_for(&format!("a message has more than {bytes} bytes"));
                    return;
                }
            };
            // What overtakes does not overtake its like.
            let at = if waiting.overtakes() {
                self.waiting.iter().take_while(|earlier| earlier.overtakes()).count()
            } else {
                self.waiting.len()
            };
            self.waiting.insert(at, waiting);
        }
    }

    fn bad(&mut self, id: Option<Value>, error: CommandError) -> Waiting {
        self.garbage += 1;
        Waiting::Refusal(BadRequest { id, error })
    }

    /// Says why, and closes.
    fn drop_for(&mut self, why: &str) {
        tracing::warn!("{}: dropped: {why}", self.name);
        self.tell(&dispatch::answer(None, Err(CommandError::new(why))));
        self.close();
    }

    /// The next command that is to be carried out; what is wrong is answered on the way.
    pub fn next_request(&mut self) -> Option<Request> {
        loop {
            self.look();
            if !self.has_work() {
                return None;
            }
            match self.waiting.pop_front()? {
                Waiting::Request(request) => {
                    self.garbage = 0;
                    return Some(request);
                }
                Waiting::Refusal(BadRequest { id, error }) => {
                    self.answer(id, Err(error));
                    if self.garbage > GARBAGE_MAX {
                        self.drop_for("it sends nothing but garbage");
                    }
                }
            }
        }
    }

    /// Answers what concerns the session itself: the negotiation. `None`: the request is for the daemon.
    pub fn negotiate(&mut self, request: &mut Request) -> Option<CommandResult<Value>> {
        if self.negotiated {
            return None;
        }
        if request.name != general::CAPABILITIES {
            let description = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Some(Err(CommandError::command_not_found(description)));
        }
        let arguments = general::Capabilities::from_options(std::mem::take(&mut request.arguments));
        Some(match arguments {
            Ok(arguments) => {
                self.negotiated = true;
                self.out_of_band = arguments.enable.is_some_and(|enabled| enabled.contains(&Capability::Oob));
                Ok(json!({}))
            }
            Err(error) => Err(error.into()),
        })
    }

    /// Gives an answer.
    pub fn answer(&mut self, id: Option<Value>, result: CommandResult<Value>) {
        self.tell(&dispatch::answer(id, result));
        // Not before: the answer may have been to the negotiation.
        self.look();
    }

    /// Tells an event, if the client is past the negotiation.
    pub fn event(&mut self, event: &Value) {
        if self.negotiated && !self.closing {
            self.tell(event);
        }
    }

    fn tell(&mut self, value: &Value) {
        if self.over {
            return;
        }
        if self.unread.len() > UNREAD_BYTES_MAX {
            tracing::warn!("{}: dropped: it does not read what it is told", self.name);
            self.over = true;
            return;
        }
        wire::write(&mut self.unread, value, self.pretty);
        self.flush();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        tracing::debug!("{}: disconnected", self.name);
    }
}
