//! The monitors: how people and programs command the daemon while it runs, in QEMU's protocol QMP.
//!
//! This file owns the monitors and their clients: who is waited for, who is accepted, whose turn it is. What bytes mean is
//! `wire.rs`'s, what a client may do `session.rs`'s, what a command does `commands/`'s.

pub mod commands;
pub mod dispatch;
pub mod events;
mod options_schema;
pub mod schema;
pub mod session;
pub mod wire;

use std::os::fd::BorrowedFd;

use blockport_block::{OpenError, OpenResult};
use nix::poll::PollFlags;

use crate::chardev::{Chardev, Chardevs};
use crate::options::MonitorConfig;
use dispatch::Request;
use events::Event;
use session::Session;

/// How many clients a monitor has at once; further ones wait until one goes.
const CLIENTS_MAX: usize = 16;

/// A monitor: one character device and whoever is connected there.
struct Monitor {
    config: MonitorConfig,
    sessions: Vec<Session>,
    /// It takes no more clients, and goes when the last one has read its answers.
    removed: bool,
}

/// All monitors.
#[derive(Default)]
pub struct Monitors {
    list: Vec<Monitor>,
    last_session: u64,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A client of the monitor of this index.
    Client(usize),
    /// Something from the session of this number.
    Input(u64),
    /// Room for what the session of this number must read.
    Output(u64),
}

impl Monitors {
    /// Adds a monitor on a character device.
    ///
    /// # Errors
    /// There is no such device, another monitor uses it, or the name is taken.
    pub fn add(&mut self, config: MonitorConfig, chardevs: &mut Chardevs) -> OpenResult {
        if config.id.is_some() && self.list.iter().any(|monitor| monitor.config.id == config.id) {
            let id = config.id.unwrap_or_default();
            return Err(OpenError(format!("there is a monitor \"{id}\" already")));
        }
        let chardev = chardevs.get(&config.chardev)?;
        if chardev.in_use {
            return Err(OpenError(format!("Chardev '{}' is busy", config.chardev)));
        }
        chardev.in_use = true;
        let mut monitor = Monitor { config, sessions: Vec::new(), removed: false };
        if chardev.listener().is_none() {
            monitor.accept(chardev, &mut self.last_session);
        }
        self.list.push(monitor);
        Ok(())
    }

    /// Takes the monitor of a character device away; its clients get their answers first.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&mut self, chardev: &str, chardevs: &mut Chardevs) -> OpenResult {
        let found = self.list.iter_mut().find(|monitor| !monitor.removed && monitor.config.chardev == chardev);
        let monitor = found.ok_or_else(|| OpenError(format!("no monitor uses chardev \"{chardev}\"")))?;
        monitor.removed = true;
        chardevs.get(chardev)?.in_use = false;
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether somebody is connected through this character device.
    pub fn is_connected(&self, chardev: &str) -> bool {
        self.list.iter().any(|monitor| monitor.config.chardev == chardev && !monitor.sessions.is_empty())
    }

    /// Everything that is to be waited for.
    pub fn sources<'a>(&'a self, chardevs: &'a Chardevs) -> Vec<(Source, BorrowedFd<'a>, PollFlags)> {
        let mut sources = Vec::new();
        for (index, monitor) in self.list.iter().enumerate() {
            let listener = chardevs.find(&monitor.config.chardev).and_then(Chardev::listener);
            if let Some(listener) = listener.filter(|_| monitor.takes_clients()) {
                sources.push((Source::Client(index), listener, PollFlags::POLLIN));
            }
            for session in &monitor.sessions {
                sources.extend(session.input().map(|(fd, flags)| (Source::Input(session.number), fd, flags)));
                sources.extend(session.output().map(|(fd, flags)| (Source::Output(session.number), fd, flags)));
            }
        }
        sources
    }

    /// Does what a source that is ready calls for.
    pub fn ready(&mut self, source: Source, chardevs: &mut Chardevs) {
        match source {
            Source::Client(index) => {
                if let Some(monitor) = self.list.get_mut(index)
                    && let Ok(chardev) = chardevs.get(&monitor.config.chardev)
                {
                    monitor.accept(chardev, &mut self.last_session);
                }
            }
            Source::Input(number) => {
                if let Some(session) = self.session(number) {
                    session.read();
                }
            }
            Source::Output(number) => {
                if let Some(session) = self.session(number) {
                    session.flush();
                }
            }
        }
    }

    /// The session of that number, if it is still there.
    pub fn session(&mut self, number: u64) -> Option<&mut Session> {
        self.list.iter_mut().flat_map(|monitor| &mut monitor.sessions).find(|session| session.number == number)
    }

    /// One command of each client whose turn it is.
    pub fn requests(&mut self) -> Vec<(u64, Request)> {
        let sessions = self.list.iter_mut().flat_map(|monitor| &mut monitor.sessions);
        sessions.filter_map(|session| session.next_request().map(|request| (session.number, request))).collect()
    }

    /// Whether some client's commands wait that could be carried out now.
    pub fn has_work(&self) -> bool {
        self.list.iter().flat_map(|monitor| &monitor.sessions).any(Session::has_work)
    }

    /// Tells all clients.
    pub fn event(&mut self, event: &Event) {
        let event = event.to_json();
        self.list.iter_mut().flat_map(|monitor| &mut monitor.sessions).for_each(|session| session.event(&event));
    }

    /// Forgets clients that are gone, and monitors that were removed.
    pub fn sweep(&mut self) {
        for monitor in &mut self.list {
            if monitor.removed {
                monitor.sessions.iter_mut().for_each(Session::close);
            }
            monitor.sessions.retain(|session| !session.is_over());
        }
        self.list.retain(|monitor| !monitor.removed || !monitor.sessions.is_empty());
    }
}

impl Monitor {
    fn takes_clients(&self) -> bool {
        !self.removed && self.sessions.len() < CLIENTS_MAX
    }

    fn accept(&mut self, chardev: &mut Chardev, last_session: &mut u64) {
        if let Some(connection) = chardev.accept() {
            *last_session += 1;
            self.sessions.push(Session::new(*last_session, &self.config.chardev, connection, self.config.pretty));
        }
    }
}
