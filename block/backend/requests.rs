//! Requests under way at a BlockBackend: what each is, since when, and what it waits for; and giving up those that nothing
//! has been done for yet. It owns the list of each channel. What the kernel or a driver works on owns its memory until it
//! ends, so that cannot be given up: it can only be told of.

use std::task::Waker;
use std::time::{Duration, Instant};

use super::BlockBackend;
use super::channel::BackendChannel;
use crate::accounting::RequestKind;
use crate::aio::{self, Supervised};
use crate::error::{BlockError, OpenError, OpenResult};
use crate::event::{self, BlockEvent};

/// A request that takes longer is told of, in nanoseconds.
const STUCK_NS: u64 = 10_000_000_000;

/// How long an iothread may take to say what it does.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// What a request ends with that was given up.
pub(super) const GIVEN_UP: BlockError = BlockError::Host(libc::ECANCELED);

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// The end of a drained section.
    Drain,
    /// Its turn in a throttle group.
    Limit,
    /// A block driver, and so the host.
    Host,
}

impl WaitsFor {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Drain => "the end of a drained section",
            Self::Limit => "its turn in a throttle group",
            Self::Host => "the host",
        }
    }
}

/// A request under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestInfo {
    /// What is done.
    pub kind: RequestKind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub bytes: u64,
    /// Since when, in nanoseconds.
    pub age_ns: u64,
    /// What it waits for.
    pub waits_for: WaitsFor,
}

impl std::fmt::Display for RequestInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, offset, bytes, age_ns, waits_for } = self;
        let (seconds, waits_for) = (age_ns / 1_000_000_000, waits_for.name());
        write!(f, "a {} of {bytes} bytes at {offset}, for {seconds} s, waits for {waits_for}", kind.name())
    }
}

/// An entry of a channel's list.
pub(super) struct Entry {
    pub(super) kind: RequestKind,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// As [`aio::nanoseconds`] has it.
    pub(super) started: u64,
    pub(super) waits_for: WaitsFor,
    told: bool,
    given_up: bool,
    /// Of whoever polls it, as long as it can be given up.
    waker: Option<Waker>,
}

impl Entry {
    pub(super) fn new(kind: RequestKind, offset: u64, bytes: u64, started: u64, waits_for: WaitsFor) -> Self {
        Self { kind, offset, bytes, started, waits_for, told: false, given_up: false, waker: None }
    }

    fn info(&self, now: u64) -> RequestInfo {
        let Self { kind, offset, bytes, started, waits_for, .. } = *self;
        RequestInfo { kind, offset, bytes, age_ns: now.saturating_sub(started), waits_for }
    }
}

/// The requests of a channel, in places that are used again.
#[derive(Default)]
pub(super) struct Requests {
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
}

impl Requests {
    pub(super) fn add(&mut self, entry: Entry) -> usize {
        match self.free.pop() {
            Some(place) => {
                self.entries[place] = Some(entry);
                place
            }
            None => {
                self.entries.push(Some(entry));
                self.entries.len() - 1
            }
        }
    }

    pub(super) fn remove(&mut self, place: usize) {
        self.entries[place] = None;
        self.free.push(place);
    }

    pub(super) fn set_waits_for(&mut self, place: usize, waits_for: WaitsFor) {
        if let Some(entry) = &mut self.entries[place] {
            entry.waits_for = waits_for;
            entry.waker = None;
        }
    }

    /// Whether it was given up. If not, `waker` is woken when it is.
    pub(super) fn is_given_up(&mut self, place: usize, waker: &Waker) -> bool {
        let Some(entry) = &mut self.entries[place] else { return false };
        if !entry.given_up {
            entry.waker = Some(waker.clone());
        }
        entry.given_up
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut().flatten()
    }
}

impl BackendChannel {
    fn requests(&self) -> Vec<RequestInfo> {
        let now = aio::nanoseconds();
        self.requests.borrow_mut().all().map(|entry| entry.info(now)).collect()
    }

    /// Gives up what nothing was done for yet. How many, and how many are left.
    fn give_up(&self) -> (u64, u64) {
        let (mut given_up, mut left) = (0, 0);
        let mut wakers = Vec::new();
        for entry in self.requests.borrow_mut().all() {
            if entry.waits_for == WaitsFor::Host {
                left += 1;
                continue;
            }
            entry.given_up = true;
            given_up += 1;
            wakers.extend(entry.waker.take());
        }
        wakers.into_iter().for_each(Waker::wake);
        (given_up, left)
    }
}

impl Supervised for BackendChannel {
    /// Tells of requests that take long, each once.
    fn look(&self, now: u64) {
        let mut stuck: Vec<RequestInfo> = Vec::new();
        for entry in self.requests.borrow_mut().all().filter(|entry| !entry.told) {
            // Whoever sets a limit wants requests to wait.
            if entry.waits_for != WaitsFor::Limit && now.saturating_sub(entry.started) >= STUCK_NS {
                entry.told = true;
                stuck.push(entry.info(now));
            }
        }
        let Some(oldest) = stuck.iter().max_by_key(|request| request.age_ns) else { return };
        let others = stuck.len() - 1;
        tracing::warn!("\"{}\": a request hangs: {oldest} (and {others} more)", self.label());
        let (device, request, count) = (self.label().to_owned(), *oldest, stuck.len() as u64);
        event::emit(BlockEvent::RequestsStuck { device, request, count });
    }
}

impl BlockBackend {
    /// What is under way, the oldest first. Waits for iothreads, but not long. Not on an iothread.
    ///
    /// # Errors
    /// An iothread does not answer.
    pub fn requests(&self) -> OpenResult<Vec<RequestInfo>> {
        let answers = self.each_channel_within(ANSWER_TIME, |channel| channel.requests())?;
        let mut all: Vec<RequestInfo> = answers.into_iter().flatten().collect();
        all.sort_by_key(|request| std::cmp::Reverse(request.age_ns));
        Ok(all)
    }

    /// Has requests fail that wait for the end of a drained section or their turn in a throttle group. Returns how many
    /// those are, and how many are left, since a driver or the kernel works on them. Not on an iothread.
    ///
    /// # Errors
    /// An iothread does not answer.
    pub fn give_requests_up(&self) -> OpenResult<(u64, u64)> {
        let answers = self.each_channel_within(ANSWER_TIME, |channel| channel.give_up())?;
        Ok(answers.into_iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1)))
    }

    fn each_channel_within<T: Send + 'static>(
        &self,
        time: Duration,
        ask: impl Fn(&BackendChannel) -> T + Copy + Send + 'static,
    ) -> OpenResult<Vec<T>> {
        let (number, mut answers) = (self.number, Vec::new());
        for remote in self.remotes() {
            let answer = remote.call_within(time, move |context, answer| {
                if let Some(channel) = context.local::<BackendChannel>(number) {
                    answer.give(ask(&channel));
                }
            });
            let silent = |()| OpenError(format!("\"{}\": an iothread does not answer", self.label));
            answers.extend(answer.map_err(silent)?);
        }
        Ok(answers)
    }

    /// The same as [`BlockBackend::wait_until_idle`], but only until `deadline`.
    ///
    /// # Errors
    /// It is over; the error says what is under way.
    pub(crate) fn wait_until_idle_by(&self, deadline: Instant) -> OpenResult {
        let number = self.number;
        let left = || deadline.saturating_duration_since(Instant::now());
        for remote in self.remotes() {
            let idle = remote.call_within(left(), move |context, answer| super::wait_idle(context, number, answer));
            idle.map_err(|()| self.hangs())?;
        }
        while self.device().is_some_and(|device| device.drained_poll()) {
            if left().is_zero() {
                return Err(self.hangs());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn hangs(&self) -> OpenError {
        let label = &self.label;
        match self.requests() {
            Ok(requests) => {
                let at_work: Vec<_> = requests.iter().filter(|one| one.waits_for != WaitsFor::Drain).collect();
                match at_work.first() {
                    Some(oldest) => {
                        let others = at_work.len() - 1;
                        OpenError(format!("\"{label}\" cannot be drained: {oldest} (and {others} more)"))
                    }
                    None => OpenError(format!("\"{label}\" cannot be drained in time; try again")),
                }
            }
            Err(error) => error,
        }
    }
}
