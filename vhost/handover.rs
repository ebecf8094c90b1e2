//! What goes from one process to another of an export: plain, and serialisable. It owns the form of the state and how
//! descriptors are named in it; what is done with a state is the session's and the server's business.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// Descriptors that go with a state, which names them by their places.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Adds one. Its place.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub fn add(&mut self, descriptor: impl std::os::fd::AsFd) -> std::io::Result<usize> {
        self.0.push(Some(descriptor.as_fd().try_clone_to_owned()?));
        Ok(self.0.len() - 1)
    }

    /// Adds another list behind this one. The place of its first.
    pub fn append(&mut self, mut others: Self) -> usize {
        let first = self.0.len();
        self.0.append(&mut others.0);
        first
    }

    /// Takes the one at a place.
    ///
    /// # Errors
    /// Prose: there is none, or it was taken before.
    pub fn take(&mut self, place: usize) -> Result<OwnedFd, String> {
        let taken = self.0.get_mut(place).and_then(Option::take);
        taken.ok_or_else(|| format!("descriptor {place} did not come, or is named twice"))
    }

    /// Cuts off those from a place on.
    pub fn split_off(&mut self, place: usize) -> Self {
        Self(self.0.split_off(place.min(self.0.len())))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those that are left.
    pub fn into_vec(self) -> Vec<OwnedFd> {
        self.0.into_iter().flatten().collect()
    }
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(list: Vec<OwnedFd>) -> Self {
        Self(list.into_iter().map(Some).collect())
    }
}

/// An export at a moment when nothing is in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportImage {
    /// The write cache as last set; `None`: no front-end has read or set it.
    pub write_cache: Option<bool>,
    /// The front-end that is connected.
    pub session: Option<SessionImage>,
}

impl ExportImage {
    /// Whether a ring runs.
    pub fn has_rings(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.rings.iter().any(|ring| ring.started))
    }
}

/// All that was negotiated with a front-end. Addresses are its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionImage {
    /// The place of the connection.
    pub connection: usize,
    /// Feature bits, as acknowledged.
    pub features: u64,
    /// The same of the protocol.
    pub protocol_features: u64,
    /// The memory table.
    pub memory: Vec<RegionImage>,
    /// The rings, in order.
    pub rings: Vec<RingImage>,
    /// The in-flight region.
    pub inflight: Option<InflightImage>,
    /// The log of what we write, for live migration.
    #[serde(default)]
    pub log: Option<LogImage>,
    /// The place of the back-end's own channel.
    pub channel: Option<usize>,
    /// The config space as the front-end knows it.
    pub known_config: Option<Vec<u8>>,
    /// Whether it listens to news of that.
    pub listens: bool,
    /// Whether a ring was started on this connection, whatever became of it.
    pub rings_started: bool,
    /// Whether the config was read before that.
    pub config_read: bool,
    /// The features that the write cache was negotiated with.
    pub write_cache_features: Option<u64>,
}

/// A memory region; sizes and offsets in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionImage {
    /// The first guest-physical address.
    pub guest_addr: u64,
    /// The first address of the front-end's own.
    pub user_addr: u64,
    /// How long it is.
    pub size: u64,
    /// Where it begins in its file.
    pub mmap_offset: u64,
    /// The place of its file.
    pub file: usize,
}

/// A ring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingImage {
    /// Entries.
    pub size: u16,
    /// Descriptors, available ring, used ring; as SET_VRING_ADDR has them.
    pub addresses: Option<[u64; 3]>,
    /// Where it stands, as SET_VRING_BASE has it.
    pub base: Option<u32>,
    /// The places of its eventfds.
    pub kick: Option<usize>,
    /// See `kick`.
    pub call: Option<usize>,
    /// See `kick`.
    pub error: Option<usize>,
    /// Whether requests are taken from it.
    pub enabled: bool,
    /// The address in the log of what we write into the ring itself.
    #[serde(default)]
    pub log_addr: Option<u64>,
    /// Whether it is started.
    pub started: bool,
    /// Whether it has lied, and serves nothing until it is started again.
    pub broken: bool,
}

/// The in-flight region; sizes and offsets in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightImage {
    /// The place of its file.
    pub file: usize,
    /// Where it begins in that.
    pub mmap_offset: u64,
    /// How long it is.
    pub mmap_size: u64,
    /// For how many queues.
    pub num_queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Whether it is laid out for packed rings.
    pub packed: bool,
}

/// The log of what we write into guest memory; in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogImage {
    /// The place of its file.
    pub file: usize,
    /// Where it begins in that.
    pub mmap_offset: u64,
    /// How long it is.
    pub mmap_size: u64,
}
