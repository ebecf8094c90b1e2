//! One run: queues are started, watched, sampled and gathered. It owns the threads; what they do is the worker's.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use virtio_driver::EventFd;

use super::client::{Client, DiskInfo};
use super::cpu::{CpuTimes, CpuUsed};
use super::plan::Plan;
use super::stats::Stats;
use super::verify::{Ledger, Mismatch};
use super::worker::{Schedule, Settings, Shared, Worker, WorkerError};
use super::workload::{Random, Workload};

/// How often the overseer looks at the progress.
const TICK: Duration = Duration::from_millis(200);
/// Without a completion for so long the connection is probed.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// How long workers have to end when told to.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// What a run found.
pub struct Outcome {
    pub stats: Stats,
    /// The daemon's CPU time over the measured part.
    pub daemon_cpu: Option<CpuUsed>,
    pub verify: Option<Verified>,
}

/// What reading back found.
pub struct Verified {
    /// Blocks whose last write succeeded.
    pub blocks_written: u64,
    /// Comparisons, those during the load included.
    pub blocks_checked: u64,
    pub mismatches: u64,
    pub details: Vec<Mismatch>,
}

/// Runs `plan`; `daemon` is the process whose CPU time is taken, `show` whether progress is shown on a terminal.
pub fn run(
    client: &Client,
    disk: &DiskInfo,
    plan: &Plan,
    socket: &Path,
    daemon: Option<u32>,
    show: bool,
) -> Result<Outcome, String> {
    let block_size = usize::try_from(plan.block_size).map_err(|e| e.to_string())?;
    let queues = client.start_queues(plan.queues, plan.ring_size, plan.depth, block_size).map_err(|e| {
        let (queues, ring) = (plan.queues, plan.ring_size);
        format!("starting {queues} queues with rings of {ring} (--ring-size): {e}")
    })?;
    let mut random = Random::new(plan.seed);
    queues.iter().for_each(|queue| queue.fill(&mut random));
    let mut ledgers = Vec::new();
    for queue in 0..plan.queues {
        let (first, blocks) = plan.share(disk, queue);
        let blocks = usize::try_from(blocks).map_err(|e| e.to_string())?;
        ledgers.push(plan.verify.then(|| Ledger::new(first, blocks, block_size, plan.seed)));
    }

    let shared: Vec<Arc<Shared>> = ledgers.iter().map(|_| Arc::default()).collect();
    let schedule = schedule(plan);
    let settings = Settings { depth: plan.depth, block_size, wait: plan.wait, schedule };
    let workers = (0..).zip(queues).zip(ledgers).zip(&shared).map(|(((index, queue), ledger), shared)| {
        let (first, blocks) = plan.share(disk, index);
        let seed = random.next();
        let requests = plan.requests_of(index);
        let workload = Workload::new(plan.rw, plan.read_percent, first, blocks, requests, seed);
        let shared = Arc::clone(shared);
        Worker::new(queue, settings, workload, ledger, shared)
    });
    let workers: Vec<Worker> = workers.collect();

    let mut overseer = Overseer {
        client,
        wakers: client.wakers(plan.queues),
        shared,
        stall: plan.stall,
        socket: socket.display().to_string(),
        show: show && std::io::stderr().is_terminal(),
    };
    let mut cpu = CpuWindow::new(daemon, schedule);
    let mut workers = overseer.phase(workers, Worker::load, &mut cpu, plan.rw.name())?;
    cpu.close()?;
    if plan.verify {
        let flush = disk.flush;
        let read_back = move |worker: &mut Worker| worker.read_back(flush);
        workers = overseer.phase(workers, read_back, &mut CpuWindow::new(None, schedule), "reading back")?;
    }
    Ok(gather(workers, cpu.used(), plan.verify))
}

fn schedule(plan: &Plan) -> Schedule {
    let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let begin_ns = ns(plan.ramp);
    let end_ns = plan.runtime.map_or(u64::MAX, |runtime| begin_ns.saturating_add(ns(runtime)));
    Schedule { start: Instant::now(), begin_ns, end_ns }
}

fn gather(workers: Vec<Worker>, daemon_cpu: Option<CpuUsed>, verify: bool) -> Outcome {
    let mut total: Option<Stats> = None;
    let mut verified = Verified { blocks_written: 0, blocks_checked: 0, mismatches: 0, details: Vec::new() };
    for worker in workers {
        let (stats, ledger) = worker.finish();
        match &mut total {
            Some(total) => total.merge(&stats),
            None => total = Some(stats),
        }
        if let Some(ledger) = ledger {
            verified.blocks_written += ledger.known();
            verified.blocks_checked += ledger.checked;
            verified.mismatches += ledger.mismatches;
            verified.details.extend(ledger.details);
        }
    }
    Outcome { stats: total.unwrap_or_else(|| Stats::new(0)), daemon_cpu, verify: verify.then_some(verified) }
}

/// The daemon's CPU time at the two ends of the measured part.
struct CpuWindow {
    pid: Option<u32>,
    schedule: Schedule,
    begin: Option<CpuTimes>,
    end: Option<CpuTimes>,
}

impl CpuWindow {
    fn new(pid: Option<u32>, schedule: Schedule) -> Self {
        Self { pid, schedule, begin: None, end: None }
    }

    /// Takes the samples that are due and says how long it is until the next.
    fn turn(&mut self) -> Result<Duration, String> {
        if self.pid.is_none() {
            return Ok(Duration::MAX);
        }
        let now = u64::try_from(self.schedule.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        for (due, slot) in [(self.schedule.begin_ns, &mut self.begin), (self.schedule.end_ns, &mut self.end)] {
            if slot.is_none() {
                if now < due {
                    return Ok(Duration::from_nanos(due - now));
                }
                *slot = Some(sample(self.pid)?);
            }
        }
        Ok(Duration::MAX)
    }

    /// The load has ended: takes the last sample if its time had not come.
    fn close(&mut self) -> Result<(), String> {
        if self.pid.is_some() && self.end.is_none() {
            self.end = Some(sample(self.pid)?);
        }
        Ok(())
    }

    fn used(&self) -> Option<CpuUsed> {
        Some(self.end.as_ref()?.since(self.begin.as_ref()?))
    }
}

fn sample(pid: Option<u32>) -> Result<CpuTimes, String> {
    let pid = pid.unwrap_or_default();
    CpuTimes::sample(pid).map_err(|e| format!("--daemon-pid {pid}: {e}"))
}

/// What reaches the overseer.
enum Event {
    Ended(Box<Worker>, Result<(), WorkerError>),
    Probed(Result<(), std::io::Error>),
}

/// Watches the workers of a run.
struct Overseer<'a> {
    client: &'a Client,
    wakers: Vec<Arc<EventFd>>,
    shared: Vec<Arc<Shared>>,
    stall: Duration,
    socket: String,
    show: bool,
}

impl Overseer<'_> {
    /// Has each worker do `job` on a thread of its own and gives them back; an error ends all.
    fn phase(
        &mut self,
        workers: Vec<Worker>,
        job: impl Fn(&mut Worker) -> Result<(), WorkerError> + Copy + Send + 'static,
        cpu: &mut CpuWindow,
        name: &str,
    ) -> Result<Vec<Worker>, String> {
        let (sender, receiver) = mpsc::channel();
        let count = workers.len();
        for (index, mut worker) in workers.into_iter().enumerate() {
            let sender: Sender<Event> = sender.clone();
            let thread = thread::Builder::new().name(format!("queue-{index}"));
            let spawned = thread.spawn(move || {
                let result = job(&mut worker);
                // Nobody listens any more when the run was given up.
                let _ = sender.send(Event::Ended(Box::new(worker), result));
            });
            if let Err(e) = spawned {
                self.abort();
                return Err(format!("starting the thread of queue {index}: {e}"));
            }
        }
        let result = self.watch(count, &sender, &receiver, cpu, name);
        if result.is_err() {
            self.abort();
            // Let the threads end before their rings go.
            let deadline = Instant::now() + ABORT_GRACE;
            while Arc::strong_count(&self.shared[0]) > 1 {
                let left = deadline.saturating_duration_since(Instant::now());
                if receiver.recv_timeout(left).is_err() {
                    break;
                }
            }
        }
        result
    }

    fn watch(
        &self,
        count: usize,
        sender: &Sender<Event>,
        receiver: &Receiver<Event>,
        cpu: &mut CpuWindow,
        name: &str,
    ) -> Result<Vec<Worker>, String> {
        let mut ended = Vec::with_capacity(count);
        let mut status = Status::new(self.completed(), self.show);
        let mut probing = false;
        while ended.len() < count {
            let pause = cpu.turn()?.min(TICK);
            match receiver.recv_timeout(pause) {
                Ok(Event::Ended(worker, Ok(()))) => ended.push(*worker),
                Ok(Event::Ended(_, Err(e))) => return Err(format!("{}: {e}", self.socket)),
                Ok(Event::Probed(Ok(()))) => {}
                Ok(Event::Probed(Err(e))) => {
                    return Err(format!("{}: the daemon closed the connection: {e}", self.socket));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            let still = status.update(self.completed(), name);
            if still >= self.stall {
                let seconds = self.stall.as_secs_f64();
                return Err(format!("{}: no completion for {seconds} s (--stall)", self.socket));
            }
            if still >= PROBE_AFTER && !probing {
                // On a thread: the answer may never come.
                probing = true;
                let (client, sender) = (self.client.clone(), sender.clone());
                thread::spawn(move || sender.send(Event::Probed(client.probe())));
            }
            probing &= still >= PROBE_AFTER;
        }
        Ok(ended)
    }

    fn completed(&self) -> u64 {
        self.shared.iter().map(|s| s.completed.load(Ordering::Relaxed)).sum()
    }

    /// Tells every worker to give up, and wakes the sleepers.
    fn abort(&self) {
        self.shared.iter().for_each(|s| s.abort.store(true, Ordering::Relaxed));
        for waker in &self.wakers {
            // Full means that it wakes anyway.
            let _ = waker.write(1);
        }
    }
}

/// How far a phase is, on a terminal and for the stall limit.
struct Status {
    completed: u64,
    changed: Instant,
    shown: (Instant, u64),
    show: bool,
}

impl Status {
    fn new(completed: u64, show: bool) -> Self {
        let now = Instant::now();
        Self { completed, changed: now, shown: (now, completed), show }
    }

    /// Notes the progress and returns how long there has been none.
    fn update(&mut self, completed: u64, name: &str) -> Duration {
        let now = Instant::now();
        if completed != self.completed {
            self.completed = completed;
            self.changed = now;
        }
        let (then, before) = self.shown;
        let seconds = (now - then).as_secs_f64();
        if self.show && seconds >= 1.0 {
            let rate = (completed - before) as f64 / seconds;
            eprint!("\r\x1b[K{name}: {completed} requests, {rate:.0}/s ");
            self.shown = (now, completed);
        }
        now - self.changed
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        if self.show {
            eprint!("\r\x1b[K");
        }
    }
}
