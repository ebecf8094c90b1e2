//! The loop of one queue: keep the depth full, take completions, take time. It owns the requests in flight; it
//! neither connects nor reports.
//!
//! The clock is read once for a batch of completions, and that time also stamps the requests submitted in their
//! place: at 10 million requests/s a read for each (22 ns) would be a quarter of what is measured.

use std::hint::spin_loop;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::ValueEnum;
use thiserror::Error;

use super::client::{ClientQueue, Completion};
use super::stats::Stats;
use super::verify::Ledger;
use super::workload::{Op, ReadBack, Source, Workload};

/// How a queue waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wait {
    /// Spin on the ring: needs a CPU for itself, measures the daemon and not the wake-ups.
    Poll,
    /// Sleep on the eventfd with calls always on, as a simple client does.
    Sleep,
    /// Look at the ring with calls off; when it is empty, turn them on and sleep. As Linux guests do.
    Once,
}

impl Wait {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Sleep => "sleep",
            Self::Once => "once",
        }
    }
}

/// Looks at the ring between two looks at the abort flag.
const SPINS: u32 = 4096;

/// What a worker and its overseer share. On a cache line of its own: the worker writes it for each batch.
#[derive(Default)]
#[repr(align(128))]
pub struct Shared {
    /// Completions so far, for progress and to notice a daemon that stopped.
    pub completed: AtomicU64,
    /// Set by the overseer: give up.
    pub abort: AtomicBool,
}

/// What all queues of a run have in common.
#[derive(Clone, Copy)]
pub struct Settings {
    /// Requests kept in flight.
    pub depth: u16,
    /// Bytes of a request.
    pub block_size: usize,
    pub wait: Wait,
    pub schedule: Schedule,
}

/// When a queue runs, in ns since `start`.
#[derive(Clone, Copy)]
pub struct Schedule {
    pub start: Instant,
    /// From here on completions are measured.
    pub begin_ns: u64,
    /// From here on no request is issued and none is measured.
    pub end_ns: u64,
}

/// Why a queue ended early.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The overseer said so, and knows why.
    #[error("aborted")]
    Aborted,
    /// The ring or its eventfds failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Request {
    op: Op,
    block: u64,
    submitted_ns: u64,
}

/// One queue at work.
pub struct Worker {
    queue: ClientQueue,
    settings: Settings,
    /// By slot.
    requests: Vec<Request>,
    in_flight: usize,
    /// The completions of the current batch.
    batch: Vec<Completion>,
    workload: Option<Workload>,
    ledger: Option<Ledger>,
    /// A block's bytes outside the shared memory, where the ledger fills and compares them.
    scratch: Vec<u8>,
    stats: Stats,
    shared: Arc<Shared>,
}

impl Worker {
    /// A worker that drives `queue` with `workload`, and with a ledger remembers what it writes.
    pub fn new(
        queue: ClientQueue,
        settings: Settings,
        workload: Workload,
        ledger: Option<Ledger>,
        shared: Arc<Shared>,
    ) -> Self {
        let idle = Request { op: Op::Read, block: 0, submitted_ns: 0 };
        Self {
            queue,
            settings,
            requests: vec![idle; settings.depth.into()],
            in_flight: 0,
            batch: Vec::with_capacity(settings.depth.into()),
            workload: Some(workload),
            ledger,
            scratch: vec![0; settings.block_size],
            stats: Stats::new(settings.schedule.begin_ns),
            shared,
        }
    }

    /// Runs the measured load.
    pub fn load(&mut self) -> Result<(), WorkerError> {
        self.queue.set_calls(self.settings.wait == Wait::Sleep);
        match self.workload.take() {
            Some(mut workload) => self.drive(&mut workload, true),
            None => Ok(()),
        }
    }

    /// Flushes, then reads back and compares everything that was written. Not measured.
    pub fn read_back(&mut self, flush: bool) -> Result<(), WorkerError> {
        if flush {
            self.queue.submit_flush(0)?;
            self.queue.kick()?;
            while self.take_batch()? == 0 {
                self.wait()?;
            }
            let errno = self.batch.first().map_or(0, |completion| completion.errno);
            if errno != 0 {
                let cause = io::Error::from_raw_os_error(errno);
                return Err(io::Error::new(cause.kind(), format!("flush: {cause}")).into());
            }
        }
        let Some(ledger) = &self.ledger else {
            return Ok(());
        };
        self.drive(&mut ReadBack::new(ledger.first_block()), false)
    }

    /// What was measured and verified.
    pub fn finish(self) -> (Stats, Option<Ledger>) {
        (self.stats, self.ledger)
    }

    /// Keeps the depth full from `source` until it or, if `measured`, the time ends, and drains.
    fn drive(&mut self, source: &mut impl Source, measured: bool) -> Result<(), WorkerError> {
        let mut now = self.now();
        for slot in 0..self.requests.len() as u16 {
            if !self.issue(source, slot, now)? {
                break;
            }
        }
        self.kick(measured)?;
        let mut warm = measured && now < self.settings.schedule.begin_ns;
        let mut issuing = true;
        while self.in_flight > 0 {
            if self.take_batch()? == 0 {
                self.wait()?;
                continue;
            }
            now = self.now();
            if warm && now >= self.settings.schedule.begin_ns {
                warm = false;
                self.stats = Stats::new(now);
            }
            if measured && issuing {
                self.stats.batch(now);
            }
            let counted = measured && issuing;
            issuing = issuing && !(measured && now >= self.settings.schedule.end_ns);
            for index in 0..self.batch.len() {
                let completion = self.batch[index];
                self.complete(completion, now, counted);
                if issuing {
                    self.issue(source, completion.slot, now)?;
                }
            }
            self.kick(counted)?;
        }
        Ok(())
    }

    /// Submits the source's next request in a free slot; whether there was one.
    fn issue(&mut self, source: &mut impl Source, slot: u16, now: u64) -> Result<bool, WorkerError> {
        let Some((op, block)) = source.next(self.ledger.as_ref()) else {
            return Ok(false);
        };
        if let Some(ledger) = &mut self.ledger {
            match op {
                Op::Read => ledger.begin_read(block),
                Op::Write => {
                    ledger.begin_write(block, &mut self.scratch);
                    self.queue.buffer(slot).copy_from(&self.scratch);
                }
            }
        }
        self.queue.submit(op, block * self.settings.block_size as u64, slot)?;
        self.requests[usize::from(slot)] = Request { op, block, submitted_ns: now };
        self.in_flight += 1;
        Ok(true)
    }

    /// Accounts for a request that came back.
    fn complete(&mut self, completion: Completion, now: u64, counted: bool) {
        let Request { op, block, submitted_ns } = self.requests[usize::from(completion.slot)];
        self.in_flight -= 1;
        // A failed read-back counts as an error, though nothing else of that phase does.
        if counted || completion.errno != 0 {
            let offset = block * self.settings.block_size as u64;
            self.stats.request(op, offset, completion.errno, now - submitted_ns);
        }
        if let Some(ledger) = &mut self.ledger {
            let succeeded = completion.errno == 0;
            match op {
                Op::Write => ledger.end_write(block, succeeded),
                Op::Read => {
                    if succeeded {
                        self.queue.buffer(completion.slot).copy_to(&mut self.scratch);
                    }
                    ledger.end_read(block, succeeded.then_some(&self.scratch));
                }
            }
        }
    }

    /// Takes every completion that waits, at most one depth of them; how many.
    fn take_batch(&mut self) -> Result<usize, WorkerError> {
        self.batch.clear();
        self.queue.take_completions(&mut self.batch)?;
        let total = self.shared.completed.load(Ordering::Relaxed) + self.batch.len() as u64;
        self.shared.completed.store(total, Ordering::Relaxed);
        Ok(self.batch.len())
    }

    fn kick(&mut self, counted: bool) -> Result<(), WorkerError> {
        let kicked = self.queue.kick()?;
        self.stats.kicks += u64::from(kicked && counted);
        Ok(())
    }

    /// Waits, in the way asked for, until there may be a completion.
    fn wait(&mut self) -> Result<(), WorkerError> {
        match self.settings.wait {
            Wait::Poll => {
                for _ in 0..SPINS {
                    if self.queue.has_completion() {
                        return Ok(());
                    }
                    spin_loop();
                }
            }
            Wait::Sleep => self.sleep()?,
            Wait::Once => {
                self.queue.set_calls(true);
                if !self.queue.has_completion() {
                    self.sleep()?;
                }
                self.queue.set_calls(false);
            }
        }
        if self.shared.abort.load(Ordering::Relaxed) {
            return Err(WorkerError::Aborted);
        }
        Ok(())
    }

    fn sleep(&mut self) -> io::Result<()> {
        self.stats.wakeups += 1;
        self.queue.sleep()
    }

    fn now(&self) -> u64 {
        // 584 years fit.
        self.settings.schedule.start.elapsed().as_nanos() as u64
    }
}
