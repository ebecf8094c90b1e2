//! The connection of `ctl` to a daemon. This file owns the negotiation and the pairing of commands and answers.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use serde_json::{Value, json};

use super::Failure;
use crate::monitor::wire::{self, Frame, Framer};

/// A connection to a monitor.
pub struct Client {
    stream: UnixStream,
    framer: Framer,
    events: VecDeque<Value>,
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody listens there, or it is no monitor.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        let name = path.to_str().and_then(|path| path.strip_prefix('@'));
        let stream = match name {
            Some(name) => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => UnixStream::connect(path)?,
        };
        let mut client = Self { stream, framer: Framer::default(), events: VecDeque::new() };
        let greeting = client.next()?.ok_or("it closed without a greeting")?;
        if greeting.get("QMP").is_none() {
            return Err("what listens there is no monitor".into());
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Carries a command out.
    ///
    /// # Errors
    /// The daemon refused it, and says why; or it closed the connection.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.send(&json!({"execute": command, "arguments": arguments}))?;
        let mut answer = self.answer()?;
        match answer.pointer("/error/desc").and_then(Value::as_str) {
            Some(description) => Err(description.into()),
            None => Ok(answer["return"].take()),
        }
    }

    /// Sends anything.
    ///
    /// # Errors
    /// The daemon closed the connection.
    pub fn send(&mut self, message: &Value) -> io::Result<()> {
        let mut bytes = Vec::new();
        wire::write(&mut bytes, message, false);
        self.stream.write_all(&bytes)
    }

    /// The next answer.
    ///
    /// # Errors
    /// The daemon closed the connection.
    pub fn answer(&mut self) -> Result<Value, Failure> {
        loop {
            let message = self.next()?.ok_or("the daemon closed the connection")?;
            if message.get("event").is_none() {
                return Ok(message);
            }
            self.events.push_back(message);
        }
    }

    /// The next event; `None` when the daemon has closed the connection.
    ///
    /// # Errors
    /// What came is no JSON.
    pub fn event(&mut self) -> Result<Option<Value>, Failure> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        while let Some(message) = self.next()? {
            if message.get("event").is_some() {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    fn next(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            match self.framer.next() {
                Some(Frame::Message(message)) => return Ok(Some(serde_json::from_slice(&message)?)),
                Some(Frame::Garbage(why)) => return Err(format!("what listens there is no monitor: {why}").into()),
                Some(Frame::TooLong) => return Err("an answer is too long".into()),
                None => {}
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(count) => self.framer.push(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
