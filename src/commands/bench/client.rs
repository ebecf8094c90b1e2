//! A vhost-user-blk front-end without a VM: the connection by virtio-driver, the queues and how they wait. It decides
//! nothing about what is read or written.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::VolatileSlice;

use super::memory::{Area, ring_bytes, start_rings};
use super::ring::{Kind, REQUEST_BYTES, Ring};
use super::workload::{Op, Random};

const SECTOR_BYTES: u64 = 512;
/// Areas begin where pages do.
const ALIGNMENT: usize = 4096;

/// After so long without an answer the user is told what is waited for …
const CONNECT_NOTICE: Duration = Duration::from_secs(3);
/// … and after so long the attempt fails.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// What the disk says about itself.
#[derive(Clone, Copy, Debug)]
pub struct DiskInfo {
    /// Its size in bytes.
    pub size: u64,
    /// Its logical block size in bytes.
    pub block_size: u32,
    pub read_only: bool,
    /// Whether it takes flush requests.
    pub flush: bool,
    /// Virtqueues it offers.
    pub queues: u16,
}

/// A connection. Shared with its queues, whose rings lie in memory that it owns.
#[derive(Clone)]
pub struct Client {
    transport: Arc<Mutex<Box<VirtioBlkTransport>>>,
    event_idx: bool,
    packed: bool,
    library_rings: bool,
}

impl Client {
    /// Connects and negotiates, with packed virtqueues if `packed`, else with split ones. A daemon that is busy with
    /// another front-end answers late: the user is told.
    pub fn connect(path: &Path, packed: bool) -> Result<(Self, DiskInfo), String> {
        let text = path.to_str().ok_or("the path is not UTF-8, and virtio-driver needs it so")?;
        if !path.exists() {
            return Err("no such socket; is the daemon running?".to_owned());
        }
        // virtio-driver connects with blocking calls that have no time limit.
        let (sender, receiver) = mpsc::channel();
        let for_thread = text.to_owned();
        thread::spawn(move || {
            // Nobody listens any more when the time was up; the process then ends.
            let _ = sender.send(Self::negotiate(&for_thread, packed));
        });
        let result = match receiver.recv_timeout(CONNECT_NOTICE) {
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("waiting for {text} to answer (is another front-end connected?)");
                receiver.recv_timeout(CONNECT_TIMEOUT - CONNECT_NOTICE)
            }
            other => other,
        };
        match result {
            Ok(result) => result.map_err(|e| e.to_string()),
            Err(_) => Err(format!("no answer in {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }

    fn negotiate(path: &str, packed: bool) -> io::Result<(Self, DiskInfo)> {
        let mut ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        ring.set(VirtioFeatureFlags::RING_PACKED, packed);
        let disk = VirtioBlkFeatureFlags::RO
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::MQ;
        let transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, ring.bits() | disk.bits())?);
        let ring = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
        let disk = VirtioBlkFeatureFlags::from_bits_truncate(transport.get_features());
        if !ring.contains(VirtioFeatureFlags::VERSION_1) {
            return Err(io::Error::other("the daemon does not offer VERSION_1"));
        }
        if packed && !ring.contains(VirtioFeatureFlags::RING_PACKED) {
            return Err(io::Error::other("the daemon does not offer packed virtqueues (--packed)"));
        }
        let config = transport.get_config()?;
        let info = DiskInfo {
            size: u64::from(config.capacity).saturating_mul(512),
            block_size: match disk.contains(VirtioBlkFeatureFlags::BLK_SIZE) {
                true => u32::from(config.blk_size),
                false => 512,
            },
            read_only: disk.contains(VirtioBlkFeatureFlags::RO),
            flush: disk.contains(VirtioBlkFeatureFlags::FLUSH),
            queues: match disk.contains(VirtioBlkFeatureFlags::MQ) {
                true => u16::from(config.num_queues),
                false => 1,
            },
        };
        let client = Self {
            transport: Arc::new(Mutex::new(transport)),
            event_idx: ring.contains(VirtioFeatureFlags::RING_EVENT_IDX),
            packed,
            library_rings: false,
        };
        Ok((client, info))
    }

    /// Has virtio-driver's own rings used from now on.
    pub fn use_library_rings(&mut self) {
        self.library_rings = true;
    }

    /// Starts `count` rings of `ring_size` descriptors, each with `slots` buffers of `block_size` bytes.
    pub fn start_queues(
        &self,
        count: u16,
        ring_size: u16,
        slots: u16,
        block_size: usize,
    ) -> io::Result<Vec<ClientQueue>> {
        let mut transport = self.lock();
        let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
        let ring = ring_bytes(ring_size, features)?.next_multiple_of(ALIGNMENT);
        let headers = (usize::from(slots) * REQUEST_BYTES).next_multiple_of(ALIGNMENT);
        let per_queue = usize::from(slots).checked_mul(block_size).and_then(|n| n.checked_next_multiple_of(ALIGNMENT));
        let per_queue = per_queue.and_then(|n| n.checked_add(ring + headers));
        let bytes = per_queue.and_then(|n| n.checked_mul(count.into()));
        let (Some(per_queue), Some(bytes), Ok(buffer_bytes)) = (per_queue, bytes, u32::try_from(block_size)) else {
            return Err(io::Error::other("the buffers are larger than memory"));
        };
        let memory = Area::new(&mut **transport, bytes)?;
        let parts = (0..usize::from(count)).map(|index| memory.part(index * per_queue, per_queue));
        let parts: Vec<Area> = parts.collect();
        let buffers_of = |part: &Area| part.part(ring + headers, per_queue - ring - headers);
        let requests_of = |part: &Area| (part.part(ring, headers), buffers_of(part));
        let rings: Vec<Ring> = if self.library_rings {
            let rings = VirtioBlkQueue::setup_queues(&mut **transport, count.into(), ring_size)?.into_iter();
            let rings = rings.zip(&parts);
            rings.map(|(it, part)| Ring::of_library(it, self.event_idx, requests_of(part), buffer_bytes)).collect()
        } else {
            let areas: Vec<Area> = parts.iter().map(|part| part.part(0, ring)).collect();
            start_rings(&mut **transport, &areas, ring_size)?;
            let (features, shape) = ((self.packed, self.event_idx), (slots, buffer_bytes));
            let rings = areas.into_iter().zip(&parts);
            rings.map(|(area, part)| Ring::new(area, ring_size, features, requests_of(part), shape)).collect()
        };
        let queues = parts.iter().zip(rings).enumerate().map(|(index, (part, ring))| {
            let buffers = buffers_of(part);
            ClientQueue {
                ring,
                notifier: transport.get_submission_notifier(index),
                called: transport.get_completion_fd(index),
                call_nonblocking: false,
                buffers,
                slots,
                block_size,
                _connection: self.clone(),
            }
        });
        Ok(queues.collect())
    }

    /// Asks the daemon for something that it always answers: an error means that the connection is gone.
    pub fn probe(&self) -> io::Result<()> {
        self.lock().get_config().map(drop)
    }

    /// The events by which the daemon tells of completions, one a queue; writing to one wakes its sleeper.
    pub fn wakers(&self, queues: u16) -> Vec<Arc<EventFd>> {
        let transport = self.lock();
        (0..queues.into()).map(|index| transport.get_completion_fd(index)).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Box<VirtioBlkTransport>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One ring and its buffers. `slot` numbers a buffer and the request that uses it.
pub struct ClientQueue {
    ring: Ring,
    notifier: Box<dyn QueueNotifier>,
    called: Arc<EventFd>,
    call_nonblocking: bool,
    buffers: Area,
    slots: u16,
    block_size: usize,
    /// Keeps the connection, without which the daemon would stop the ring.
    _connection: Client,
}

/// A request that came back.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    pub slot: u16,
    /// 0, or what went wrong.
    pub errno: i32,
}

impl ClientQueue {
    /// Puts a request on the ring. The daemon is told by `kick`.
    #[inline]
    pub fn submit(&mut self, op: Op, offset: u64, slot: u16) -> io::Result<()> {
        let kind = match op {
            Op::Read => Kind::Read,
            Op::Write => Kind::Write,
        };
        self.ring.submit(slot, kind, offset / SECTOR_BYTES)
    }

    /// Puts a flush request on the ring.
    pub fn submit_flush(&mut self, slot: u16) -> io::Result<()> {
        self.ring.submit(slot, Kind::Flush, 0)
    }

    /// Tells the daemon of new requests, if it asked to be told; whether it did.
    #[inline]
    pub fn kick(&mut self) -> io::Result<bool> {
        let needed = self.ring.needs_kick();
        if needed {
            self.notifier.notify()?;
        }
        Ok(needed)
    }

    /// Whether a completion waits.
    #[inline]
    pub fn has_completion(&mut self) -> bool {
        self.ring.has_answer()
    }

    /// Adds what has completed to `batch`, up to its capacity.
    ///
    /// # Errors
    /// What the daemon names was not in flight.
    #[inline]
    pub fn take_completions(&mut self, batch: &mut Vec<Completion>) -> io::Result<()> {
        while batch.len() < batch.capacity() {
            let Some(answer) = self.ring.next_answer().map_err(io::Error::other)? else { break };
            batch.push(Completion { slot: answer.slot, errno: errno_of(answer.status) });
        }
        if !batch.is_empty() {
            self.ring.took_answers();
        }
        Ok(())
    }

    /// Asks to be called at the next completion, or not to be.
    pub fn set_calls(&mut self, enabled: bool) {
        self.ring.set_calls(enabled);
    }

    /// Sleeps until the daemon calls (or has called since the last sleep).
    pub fn sleep(&mut self) -> io::Result<()> {
        // Some daemons make the event non-blocking, and so for both sides, since they share its open file.
        if self.call_nonblocking {
            let mut called = [PollFd::new(&self.called, PollFlags::IN)];
            match poll(&mut called, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        match self.called.read() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.call_nonblocking = true,
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
        Ok(())
    }

    /// Fills the buffers, so that writes carry something that no layer can shortcut.
    pub fn fill(&self, random: &mut Random) {
        let mut block = vec![0; self.block_size];
        for slot in 0..self.slots {
            for word in block.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
            self.buffer(slot).copy_from(&block);
        }
    }

    /// A slot's buffer.
    pub fn buffer(&self, slot: u16) -> VolatileSlice<'_, ()> {
        self.buffers.bytes(usize::from(slot) * self.block_size, self.block_size)
    }
}

/// What a status (virtio 1.3 §5.2.6) is called elsewhere.
#[inline]
fn errno_of(status: u8) -> i32 {
    match status {
        0 => 0,
        2 => Errno::OPNOTSUPP.raw_os_error(),
        _ => Errno::IO.raw_os_error(),
    }
}
