//! What two processes say to each other. Version 1: Hello → Offer, Ready → State, Commit; instead of an answer, Refused.
//!
//! A field that is added to a message must be optional, or the version goes up. Descriptors are named by their places
//! among those that come with the message.

use std::net::SocketAddr;
use std::path::PathBuf;

use blockport_vhost::ExportSettings;
use blockport_vhost::SocketFile;
use blockport_vhost::handover::ExportImage;
use serde::{Deserialize, Serialize};

/// The version of what is said here.
pub const VERSION: u32 = 1;

/// What the process says that wants to take over.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromNew {
    /// Who it is.
    Hello {
        /// See [`VERSION`].
        version: u32,
        /// The version of the program, for people.
        program: String,
    },
    /// It could serve what was offered: now it needs the rest, and quiet.
    Ready,
    /// It serves from here on.
    Commit {
        /// The socket files that it keeps.
        sockets: Vec<PathBuf>,
        /// Whether it keeps the pidfile.
        pidfile: bool,
    },
}

/// What the process says that serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromOld {
    /// No, and why. It goes on.
    Refused {
        /// Prose.
        why: String,
    },
    /// What can be taken over. It goes on meanwhile.
    Offer(Offer),
    /// All there is to know. Nothing moves until it hears [`FromNew::Commit`], or that there is nobody any more.
    State(State),
}

/// See [`FromOld::Offer`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Offer {
    /// See [`VERSION`].
    pub version: u32,
    /// The version of the program, for people.
    pub program: String,
    /// The disks.
    pub exports: Vec<ExportOffer>,
    /// The sockets that it listens on.
    pub sockets: Vec<SocketOffer>,
    /// Its pidfile.
    pub pidfile: Option<PidfileOffer>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportOffer {
    /// Its name.
    pub id: String,
    /// What guests see of it.
    pub settings: GuestSettings,
    /// How long it is, in bytes; None: without a medium.
    pub length: Option<u64>,
    /// What makes it this disk; see `blockport_block::handover::disk_identity`.
    pub disk: Vec<String>,
    /// Whether it may be used: another host may have it meanwhile.
    pub active: bool,
    /// Which of the sockets it listens on. None: it serves a connection that it got.
    pub socket: Option<usize>,
}

/// The options of an export that a guest, or its front-end, sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSettings {
    num_queues: u16,
    writable: bool,
    logical_block_size: u32,
    serial: String,
    seg_max: u32,
    queue_size_max: u16,
    packed: bool,
}

impl From<&ExportSettings> for GuestSettings {
    fn from(settings: &ExportSettings) -> Self {
        Self {
            num_queues: settings.num_queues,
            writable: settings.writable,
            logical_block_size: settings.logical_block_size,
            serial: settings.serial.clone(),
            seg_max: settings.seg_max,
            queue_size_max: settings.queue_size_max,
            packed: settings.packed,
        }
    }
}

impl GuestSettings {
    /// What differs, in words. `self` is what the process has that serves.
    pub fn difference(&self, ours: &Self) -> Option<String> {
        let (theirs, ours) = (serde_json::to_value(self).ok()?, serde_json::to_value(ours).ok()?);
        theirs.as_object()?.iter().find_map(|(option, value)| {
            let our_value = ours.get(option)?;
            let option = option.replace('_', "-");
            (our_value != value).then(|| format!("{option} is {value} there, and {our_value} here"))
        })
    }
}

/// A socket that is listened on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOffer {
    /// Its file, if it made one.
    pub file: Option<SocketFile>,
    /// Its address, if it is one of TCP.
    #[serde(default)]
    pub tcp: Option<SocketAddr>,
    /// The place of its descriptor.
    pub descriptor: usize,
}

/// A pidfile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidfileOffer {
    /// Where it is, from the root.
    pub path: PathBuf,
    /// The place of its descriptor, which is locked.
    pub descriptor: usize,
}

/// See [`FromOld::State`].
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// The image files; their descriptors come first, in this order.
    pub files: Vec<FileState>,
    /// The disks that were offered, in that order; the descriptors of each come in its own order.
    pub exports: Vec<ExportState>,
}

/// An image file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// The errno of the first flush that failed; 0: none has.
    pub flush_errno: i32,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportState {
    /// Its name.
    pub id: String,
    /// What was negotiated for it.
    pub image: ExportImage,
    /// How many descriptors belong to it.
    pub descriptors: usize,
    /// What was done so far, as `blockport_block::Statistics` counts it.
    #[serde(default)]
    pub statistics: Vec<[u64; 6]>,
}
