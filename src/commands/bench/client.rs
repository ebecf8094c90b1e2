//! A vhost-user-blk front-end without a VM: the connection, the rings, and the buffers that the daemon shares. It
//! owns the only unsafe code of the bench; it decides nothing about what is read or written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::workload::{Op, Random};

/// Descriptors one request takes in virtio-driver: header, data, status. It knows no indirect tables.
pub const DESCRIPTORS_PER_REQUEST: u16 = 3;

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
        };
        Ok((client, info))
    }

    /// Starts `count` rings of `ring_size` descriptors, each with `slots` buffers of `block_size` bytes.
    pub fn start_queues(
        &self,
        count: u16,
        ring_size: u16,
        slots: u16,
        block_size: usize,
    ) -> io::Result<Vec<ClientQueue>> {
        let per_queue = usize::from(slots).checked_mul(block_size);
        let bytes = per_queue.and_then(|n| n.checked_mul(count.into()));
        let (Some(per_queue), Some(bytes)) = (per_queue, bytes) else {
            return Err(io::Error::other("the buffers are larger than memory"));
        };
        let file = File::from(memfd_create("blockport-bench", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes as u64)?;
        let fd = file.as_raw_fd();
        let memory: MmapRegion<()> = MmapRegion::from_file(FileOffset::new(file, 0), bytes)
            .map_err(|e| io::Error::other(format!("mapping {bytes} bytes of buffers: {e}")))?;
        let memory = Arc::new(memory);

        let mut transport = self.lock();
        transport.map_mem_region(memory.as_ptr() as usize, bytes, fd, 0)?;
        let rings = VirtioBlkQueue::setup_queues(&mut **transport, count.into(), ring_size)?;
        let queues = rings.into_iter().enumerate().map(|(index, ring)| ClientQueue {
            ring,
            notifier: transport.get_submission_notifier(index),
            called: transport.get_completion_fd(index),
            call_nonblocking: false,
            event_idx: self.event_idx,
            memory: Arc::clone(&memory),
            first_byte: index * per_queue,
            slots,
            block_size,
            _connection: self.clone(),
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
    ring: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    called: Arc<EventFd>,
    call_nonblocking: bool,
    event_idx: bool,
    memory: Arc<MmapRegion<()>>,
    /// Where this queue's buffers begin in `memory`.
    first_byte: usize,
    slots: u16,
    block_size: usize,
    /// Keeps the rings' memory mapped: virtio-driver's queues do not.
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
    pub fn submit(&mut self, op: Op, offset: u64, slot: u16) -> io::Result<()> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let buffer = self.memory.as_ptr().wrapping_add(self.slot_start(slot));
        let len = self.block_size;
        // virtio-driver's safe calls would need a reference to memory that another process writes.
        #[allow(unsafe_code)]
        // SAFETY: the buffer is the slot's part of a mapping that lives as long as this queue; nothing here holds a
        // reference into it.
        unsafe {
            match op {
                Op::Read => self.ring.read_raw(offset, buffer, len, slot),
                Op::Write => self.ring.write_raw(offset, buffer, len, slot),
            }
        }
    }

    /// Puts a flush request on the ring.
    pub fn submit_flush(&mut self, slot: u16) -> io::Result<()> {
        self.ring.flush(slot)
    }

    /// Tells the daemon of new requests, if it asked to be told; whether it did.
    pub fn kick(&mut self) -> io::Result<bool> {
        if !self.event_idx {
            // Without EVENT_IDX virtio-driver reads the flags with no fence after publishing: the store must
            // not pass the load, or both sides sleep.
            fence(Ordering::SeqCst);
        }
        let needed = self.ring.avail_notif_needed();
        if needed {
            self.notifier.notify()?;
        }
        Ok(needed)
    }

    /// Whether a completion waits.
    pub fn has_completion(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    /// The next completion, if one waits.
    pub fn next_completion(&mut self) -> io::Result<Option<Completion>> {
        let mut completions = self.ring.completions();
        if !completions.has_next() {
            return Ok(None);
        }
        match completions.next() {
            Some(c) => Ok(Some(Completion { slot: c.context, errno: -c.ret })),
            None => Err(io::Error::other("the daemon completed a request that was not in flight")),
        }
    }

    /// Asks to be called at the next completion, or not to be.
    pub fn set_calls(&mut self, enabled: bool) {
        self.ring.set_used_notif_enabled(enabled);
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
        self.memory
            .get_slice(self.slot_start(slot), self.block_size)
            .unwrap_or_else(|e| panic!("slot {slot} of {}: {e}", self.slots))
    }

    fn slot_start(&self, slot: u16) -> usize {
        self.first_byte + usize::from(slot) * self.block_size
    }
}
