//! Meter: leaky buckets that say when a request may go. The clock is passed in, never read. It knows no waiting request
//! and no member of a group.
//!
//! What is done is poured into a bucket, which leaks at the average rate; a request may go when there is room for it.
//! Without bursts the bucket holds a tenth of a second, so that requests need not come evenly. With bursts it holds what
//! a burst of full length amounts to, and a second, small bucket that leaks at the burst's rate holds the rate down
//! meanwhile. What is larger than a bucket goes when that is empty, so that the rate is exact for large requests, too.

use super::limits::{Limited, Rate, ThrottleLimits};

/// Nanoseconds of a clock that never goes back; only differences count.
pub(crate) type Nanoseconds = u64;

/// Which way the data of a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes, and what is like them: write-zeroes and discards.
    Write,
}

impl Direction {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// The share of a second, as a divisor, that fits into a bucket which allows no bursts.
const SLACK_DIVISOR: f64 = 10.0;

const SECOND: f64 = 1e9;

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    level: f64,
    /// Leaks per nanosecond; 0: no limit.
    leak: f64,
    size: f64,
}

impl Bucket {
    fn passes(&mut self, nanoseconds: f64) {
        self.level = (self.level - nanoseconds * self.leak).max(0.0);
    }

    /// By how much `cost` is more than there is room for; at most 0: there is room.
    fn excess(&self, cost: f64) -> f64 {
        // Not f64::max, which asks whether either is no number.
        let size = if self.size > cost { self.size } else { cost };
        self.level + cost - size
    }

    /// How long `cost` has to wait.
    fn wait(&self, cost: f64) -> f64 {
        let excess = self.excess(cost);
        if self.leak > 0.0 && excess > 0.0 { excess / self.leak } else { 0.0 }
    }

    fn set(&mut self, leak: f64, size: f64) {
        *self = Self { level: self.level.min(size), leak, size };
    }
}

/// The two buckets of one rate that is limited.
#[derive(Debug, Clone, Copy)]
struct Buckets {
    of: Limited,
    main: Bucket,
    /// Holds down the rate during a burst. It does not leak where a burst may come all at once.
    burst: Bucket,
}

impl Buckets {
    fn new(of: Limited) -> Self {
        Self { of, main: Bucket::default(), burst: Bucket::default() }
    }

    fn set(&mut self, rate: Rate) {
        let (average, burst, seconds) = (rate.average as f64, rate.burst as f64, rate.burst_seconds as f64);
        let size = if rate.burst == 0 { average / SLACK_DIVISOR } else { burst * seconds };
        self.main.set(average / SECOND, size);
        let held_down = if rate.burst_seconds > 1 { burst } else { 0.0 };
        self.burst.set(held_down / SECOND, held_down / SLACK_DIVISOR);
    }

    fn passes(&mut self, nanoseconds: f64) {
        self.main.passes(nanoseconds);
        self.burst.passes(nanoseconds);
    }

    fn has_room(&self, cost: f64) -> bool {
        self.main.excess(cost) <= 0.0 && (self.burst.leak == 0.0 || self.burst.excess(cost) <= 0.0)
    }

    fn wait(&self, cost: f64) -> f64 {
        self.main.wait(cost).max(self.burst.wait(cost))
    }

    fn pour(&mut self, cost: f64) {
        self.main.level += cost;
        if self.burst.leak > 0.0 {
            self.burst.level += cost;
        }
    }

    /// What a request costs here; `None`: nothing, as it goes the other way.
    fn cost(&self, request: Request) -> Option<f64> {
        match (self.of, request.direction) {
            (Limited::IopsTotal, _) | (Limited::IopsRead, Direction::Read) | (Limited::IopsWrite, Direction::Write) => {
                Some(request.operations)
            }
            (Limited::BpsTotal, _) | (Limited::BpsRead, Direction::Read) | (Limited::BpsWrite, Direction::Write) => {
                Some(request.bytes)
            }
            _ => None,
        }
    }

    /// The room left; 0 once it is half used up.
    fn room_while_far(&self) -> f64 {
        let far = |bucket: &Bucket| if bucket.level * 2.0 < bucket.size { bucket.size - bucket.level } else { 0.0 };
        let burst = if self.burst.leak > 0.0 { far(&self.burst) } else { f64::INFINITY };
        far(&self.main).min(burst)
    }

    fn is_of_bytes(&self) -> bool {
        matches!(self.of, Limited::BpsTotal | Limited::BpsRead | Limited::BpsWrite)
    }

    fn is_shared(&self) -> bool {
        matches!(self.of, Limited::IopsTotal | Limited::BpsTotal)
    }
}

/// A request as buckets see it.
#[derive(Clone, Copy)]
struct Request {
    direction: Direction,
    operations: f64,
    bytes: f64,
}

/// How long a request must wait, in nanoseconds, by who is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wait {
    /// What only requests of its direction use.
    pub own: Nanoseconds,
    /// What both directions share.
    pub shared: Nanoseconds,
}

impl Wait {
    pub(crate) fn longest(self) -> Nanoseconds {
        self.own.max(self.shared)
    }
}

/// What may be done without asking, while the buckets are far from full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Allowance {
    pub operations: u64,
    pub bytes: u64,
    /// The most bytes that count as one operation.
    pub operation_bytes: u64,
}

/// The part of the room left that an allowance is, as a divisor: small, so that several do no harm.
const ALLOWANCE_DIVISOR: f64 = 64.0;

/// The buckets of a set of limits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter {
    limits: ThrottleLimits,
    /// Only of what is limited.
    buckets: Vec<Buckets>,
    /// Bytes beyond which an operation counts as several; infinite where none does.
    iops_size: f64,
    /// Up to when the buckets have leaked.
    at: Nanoseconds,
}

impl Meter {
    pub(crate) fn limits(&self) -> &ThrottleLimits {
        &self.limits
    }

    /// Goes over to other limits. What is in the buckets stays, as far as it fits: nobody is given a new burst, and
    /// nobody waits at a lower rate for what was done at a higher one.
    pub(crate) fn set_limits(&mut self, limits: ThrottleLimits, now: Nanoseconds) {
        self.leak(now);
        let limited = Limited::ALL.into_iter().filter(|of| limits.rate(*of).average != 0);
        self.buckets = limited
            .map(|of| {
                let old = self.buckets.iter().find(|buckets| buckets.of == of);
                let mut buckets = old.copied().unwrap_or(Buckets::new(of));
                buckets.set(limits.rate(of));
                buckets
            })
            .collect();
        self.iops_size = if limits.iops_size == 0 { f64::INFINITY } else { limits.iops_size as f64 };
        self.limits = limits;
    }

    /// Lets the buckets leak. Threads that share a meter read their clocks at different moments, so `now` may lie
    /// before what was seen last; nothing leaks then.
    fn leak(&mut self, now: Nanoseconds) {
        let passed = now.saturating_sub(self.at);
        if passed > 0 {
            self.at = now;
            self.buckets.iter_mut().for_each(|buckets| buckets.passes(passed as f64));
        }
    }

    fn request(&self, direction: Direction, bytes: u64) -> Request {
        // By way of i64, which no request exceeds: a single instruction.
        let bytes = bytes as i64 as f64;
        let operations = if bytes > self.iops_size { bytes / self.iops_size } else { 1.0 };
        Request { direction, operations, bytes }
    }

    /// Counts a request if there is room for it.
    pub(crate) fn admits(&mut self, direction: Direction, bytes: u64, now: Nanoseconds) -> bool {
        self.leak(now);
        let request = self.request(direction, bytes);
        let admits = self.buckets.iter().all(|buckets| buckets.cost(request).is_none_or(|cost| buckets.has_room(cost)));
        if admits {
            self.count(request);
        }
        admits
    }

    /// How long a request must wait from `now` on.
    pub(crate) fn wait(&mut self, direction: Direction, bytes: u64, now: Nanoseconds) -> Wait {
        self.leak(now);
        let request = self.request(direction, bytes);
        let (mut own, mut shared) = (0.0f64, 0.0f64);
        for buckets in &self.buckets {
            let Some(cost) = buckets.cost(request) else { continue };
            let wait = if buckets.is_shared() { &mut shared } else { &mut own };
            *wait = wait.max(buckets.wait(cost));
        }
        // Never too early. The conversion saturates at centuries.
        Wait { own: own.ceil() as Nanoseconds, shared: shared.ceil() as Nanoseconds }
    }

    /// Counts a request that goes, whether or not there is room for it.
    pub(crate) fn pour(&mut self, direction: Direction, bytes: u64, now: Nanoseconds) {
        self.leak(now);
        self.count(self.request(direction, bytes));
    }

    /// Counts what was done of an allowance.
    pub(crate) fn pour_many(&mut self, direction: Direction, operations: u64, bytes: u64, now: Nanoseconds) {
        self.leak(now);
        self.count(Request { direction, operations: operations as f64, bytes: bytes as f64 });
    }

    /// What one iothread may do within a turn of its loop and tell later; nothing once a bucket is half full.
    pub(crate) fn allowance(&self) -> Allowance {
        let (mut operations, mut bytes) = (f64::INFINITY, f64::INFINITY);
        for buckets in &self.buckets {
            let room = if buckets.is_of_bytes() { &mut bytes } else { &mut operations };
            *room = room.min(buckets.room_while_far() / ALLOWANCE_DIVISOR);
        }
        // The conversions cut off, and saturate.
        Allowance { operations: operations as u64, bytes: bytes as u64, operation_bytes: self.iops_size as u64 }
    }

    fn count(&mut self, request: Request) {
        for buckets in &mut self.buckets {
            if let Some(cost) = buckets.cost(request) {
                buckets.pour(cost);
            }
        }
    }
}
