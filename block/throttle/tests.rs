//! Throttling on a simulated clock: how exact the rates are, who waits for whom, and what a change of limits does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::limits::{Limited, Rate, ThrottleLimits};
use super::line::{Line, MemberId, Next};
use super::meter::{Direction, Nanoseconds};

const SECOND: Nanoseconds = 1_000_000_000;
const MICROSECOND: Nanoseconds = 1_000;

fn limits(rates: &[(Limited, u64)]) -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    for (of, average) in rates {
        limits.set_rate(*of, Rate { average: *average, ..Rate::default() });
    }
    limits.check().expect("sound");
    limits
}

fn line(limits: ThrottleLimits) -> Line<usize> {
    let mut line = Line::new();
    line.set_limits(limits, 0);
    line
}

/// Somebody who keeps `depth` requests under way.
#[derive(Clone, Copy)]
struct Client {
    member: MemberId,
    direction: Direction,
    bytes: u64,
    depth: usize,
    /// From the moment a request goes to the next one.
    service: Nanoseconds,
}

impl Client {
    fn new(member: MemberId, direction: Direction, bytes: u64, depth: usize) -> Self {
        Self { member, direction, bytes, depth, service: 50 * MICROSECOND }
    }
}

/// What came of it, client by client.
#[derive(Debug, Clone, Default)]
struct Outcome {
    operations: u64,
    bytes: u64,
    longest_wait: Nanoseconds,
}

/// The world of a line: clients, a clock, and timers that fire late.
struct Simulation {
    line: Line<usize>,
    clients: Vec<Client>,
    now: Nanoseconds,
    /// Requests to come: when, whose.
    coming: BinaryHeap<Reverse<(Nanoseconds, usize)>>,
    /// By ticket: whose, and since when it waits.
    waiting: Vec<(usize, Nanoseconds)>,
    outcomes: Vec<Outcome>,
    /// State of the random lateness.
    random: u64,
}

impl Simulation {
    fn new(limits: ThrottleLimits, clients: &[Client]) -> Self {
        let mut coming = BinaryHeap::new();
        for (index, client) in clients.iter().enumerate() {
            (0..client.depth).for_each(|_| coming.push(Reverse((0, index))));
        }
        let outcomes = vec![Outcome::default(); clients.len()];
        let clients = clients.to_vec();
        Self { line: line(limits), clients, now: 0, coming, waiting: Vec::new(), outcomes, random: 1 }
    }

    fn lateness(&mut self) -> Nanoseconds {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % (100 * MICROSECOND)
    }

    fn goes(&mut self, index: usize, since: Nanoseconds) {
        let (client, outcome) = (self.clients[index], &mut self.outcomes[index]);
        outcome.operations += 1;
        outcome.bytes += client.bytes;
        outcome.longest_wait = outcome.longest_wait.max(self.now - since);
        self.coming.push(Reverse((self.now + client.service, index)));
    }

    /// Runs on for so long and returns what was done meanwhile.
    fn run(&mut self, duration: Nanoseconds) -> Vec<Outcome> {
        let end = self.now + duration;
        self.outcomes.fill(Outcome::default());
        loop {
            let timer = loop {
                match self.line.next(self.now) {
                    Next::Goes(ticket) => {
                        let (index, since) = self.waiting[ticket];
                        self.goes(index, since);
                    }
                    Next::NotBefore(at, _) => break Some(at + self.lateness()),
                    Next::Nobody => break None,
                }
            };
            let arrival = self.coming.peek().map(|Reverse((at, _))| *at);
            let Some(next) = [timer, arrival].into_iter().flatten().min().filter(|next| *next < end) else { break };
            self.now = self.now.max(next);
            while let Some(Reverse((at, index))) = self.coming.peek().copied()
                && at <= self.now
            {
                self.coming.pop();
                let client = self.clients[index];
                if self.line.passes(client.direction, client.bytes, self.now) {
                    self.goes(index, self.now);
                } else {
                    self.waiting.push((index, self.now));
                    self.line.add(client.member, client.direction, client.bytes, self.waiting.len() - 1);
                }
            }
        }
        self.now = end;
        self.outcomes.clone()
    }
}

#[track_caller]
fn assert_within(found: u64, expected: u64, percent: f64, what: &str) {
    let off = (found as f64 / expected as f64 - 1.0).abs() * 100.0;
    assert!(off <= percent, "{what}: {found}, expected {expected}, {off:.2} % off");
}

#[test]
fn every_rate_is_kept_within_3_percent_over_10_seconds_from_the_first_request_on() {
    use Direction::{Read, Write};
    for (of, directions) in [
        (Limited::IopsTotal, &[Read, Write][..]),
        (Limited::IopsRead, &[Read]),
        (Limited::IopsWrite, &[Write]),
        (Limited::BpsTotal, &[Read, Write]),
        (Limited::BpsRead, &[Read]),
        (Limited::BpsWrite, &[Write]),
    ] {
        let is_bytes = of as usize >= Limited::BpsTotal as usize;
        for rate in [100, 1_000, 10_000] {
            for (depth, bytes) in [(1, 4096), (32, 512), (4, 1 << 20)] {
                // Bytes are limited to as many requests.
                let average = if is_bytes { rate * bytes } else { rate };
                let clients: Vec<Client> = directions
                    .iter()
                    .enumerate()
                    .map(|(member, d)| Client { service: 0, ..Client::new(member as u64, *d, bytes, depth) })
                    .collect();
                let outcomes = Simulation::new(limits(&[(of, average)]), &clients).run(10 * SECOND);
                let done: u64 = outcomes.iter().map(|o| if is_bytes { o.bytes } else { o.operations }).sum();
                let what = format!("{} of {average}, depth {depth}, {bytes} bytes", of.name());
                assert_within(done, average * 10, 3.0, &what);
            }
        }
    }
}

#[test]
fn a_million_operations_a_second_are_as_exact() {
    let client = Client { service: 0, ..Client::new(0, Direction::Read, 512, 64) };
    let mut simulation = Simulation::new(limits(&[(Limited::IopsTotal, 1_000_000)]), &[client]);
    simulation.run(SECOND / 4);
    assert_within(simulation.run(SECOND / 2)[0].operations, 500_000, 3.0, "half a second");
}

#[test]
fn requests_larger_than_what_passes_in_a_second_keep_the_rate_too() {
    let client = Client { service: 0, ..Client::new(0, Direction::Write, 3 << 20, 8) };
    let outcomes = Simulation::new(limits(&[(Limited::BpsTotal, 1 << 20)]), &[client]).run(30 * SECOND);
    assert_eq!(outcomes[0].operations, 10, "one every 3 seconds, the first at once");
}

#[test]
fn below_the_limit_nobody_waits() {
    // Depth 1 with a service of 1 ms: almost 1000 a second.
    let client = Client { service: SECOND / 1000, ..Client::new(0, Direction::Read, 4096, 1) };
    for (of, average) in [(Limited::IopsTotal, 1010), (Limited::BpsRead, 1010 * 4096)] {
        let outcomes = Simulation::new(limits(&[(of, average)]), &[client]).run(10 * SECOND);
        assert_eq!(outcomes[0].longest_wait, 0, "{}", of.name());
        assert_eq!(outcomes[0].operations, 10_000);
    }
    // And in clumps of 32 once in 100 ms, 320 a second.
    let client = Client { service: SECOND / 10, ..Client::new(0, Direction::Read, 4096, 32) };
    let outcomes = Simulation::new(limits(&[(Limited::IopsTotal, 330)]), &[client]).run(10 * SECOND);
    assert_eq!(outcomes[0].longest_wait, 0, "a clump of a tenth of a second's worth");
}

#[test]
fn a_burst_goes_at_its_rate_for_its_length_and_then_at_the_average() {
    let mut limits = ThrottleLimits::default();
    limits.set_rate(Limited::IopsTotal, Rate { average: 100, burst: 2000, burst_seconds: 6 });
    let client = Client { service: 0, ..Client::new(0, Direction::Read, 4096, 32) };
    let mut simulation = Simulation::new(limits, &[client]);
    assert_within(simulation.run(6 * SECOND)[0].operations, 12_000, 3.0, "the burst");
    // It has leaked meanwhile: 600 operations more at the burst's rate.
    simulation.run(SECOND);
    assert_within(simulation.run(10 * SECOND)[0].operations, 1000, 3.0, "after the burst");
    // A bucket of 12 000 that is half empty after a minute without requests.
    simulation.clients[0].service = 60 * SECOND;
    simulation.run(60 * SECOND);
    simulation.clients[0].service = 0;
    let bursts = simulation.run(4 * SECOND)[0].operations;
    assert_within(bursts, 6000 + 400, 4.0, "what a minute's rest earns");
}

#[test]
fn a_burst_of_one_second_may_come_all_at_once() {
    let mut limits = ThrottleLimits::default();
    limits.set_rate(Limited::BpsWrite, Rate { average: 1 << 20, burst: 10 << 20, burst_seconds: 1 });
    let client = Client { service: 0, ..Client::new(0, Direction::Write, 65536, 200) };
    let outcomes = Simulation::new(limits, &[client]).run(SECOND / 100);
    assert_within(outcomes[0].bytes, 10 << 20, 1.0, "at once");
}

#[test]
fn members_share_evenly_however_many_requests_each_has_waiting() {
    for of in [Limited::IopsTotal, Limited::IopsRead, Limited::BpsTotal, Limited::BpsRead] {
        let average = if of.name().starts_with("iops") { 2000 } else { 2000 * 4096 };
        let clients = [1, 2, 16, 256].map(|depth| Client::new(depth, Direction::Read, 4096, depth as usize));
        let mut simulation = Simulation::new(limits(&[(of, average)]), &clients);
        let outcomes = simulation.run(10 * SECOND);
        for outcome in outcomes {
            assert_within(outcome.operations, 5000, 5.0, of.name());
        }
    }
}

#[test]
fn a_member_that_reads_and_writes_gets_no_more_than_one_that_reads() {
    let clients = [
        Client::new(0, Direction::Read, 4096, 16),
        Client::new(0, Direction::Write, 4096, 16),
        Client::new(1, Direction::Read, 4096, 16),
    ];
    let outcomes = Simulation::new(limits(&[(Limited::IopsTotal, 1000)]), &clients).run(10 * SECOND);
    let [reads, writes, other] = [0, 1, 2].map(|client| outcomes[client].operations);
    assert_within(reads + writes, 5000, 3.0, "both ways");
    assert_within(reads, writes, 3.0, "each way");
    assert_within(other, 5000, 3.0, "the other member");
}

#[test]
fn large_requests_do_not_starve_behind_a_stream_of_small_ones() {
    for (large, small) in [(Direction::Read, Direction::Write), (Direction::Write, Direction::Read)] {
        for small in [large, small] {
            let clients = [Client::new(0, large, 4 << 20, 1), Client::new(1, small, 512, 64)];
            let outcomes = Simulation::new(limits(&[(Limited::BpsTotal, 8 << 20)]), &clients).run(60 * SECOND);
            assert!(outcomes[0].operations >= 100, "{large:?} among {small:?}: {outcomes:?}");
            assert!(outcomes[1].operations >= 100, "{large:?} among {small:?}: {outcomes:?}");
        }
    }
}

#[test]
fn what_only_one_direction_waits_for_does_not_hold_up_the_other() {
    let clients = [Client::new(0, Direction::Read, 4096, 64), Client::new(0, Direction::Write, 4096, 64)];
    let limits = limits(&[(Limited::BpsRead, 4096), (Limited::IopsTotal, 10_000)]);
    let outcomes = Simulation::new(limits, &clients).run(10 * SECOND);
    assert_eq!(outcomes[0].operations, 10);
    assert_within(outcomes[1].operations, 99_990, 3.0, "writes");
}

#[test]
fn long_operations_count_as_several() {
    let mut limits = limits(&[(Limited::IopsTotal, 1000)]);
    limits.iops_size = 4096;
    for (bytes, operations) in [(512, 10_000), (4096, 10_000), (6144, 6667), (65536, 625)] {
        let client = Client { service: 0, ..Client::new(0, Direction::Read, bytes, 32) };
        let outcomes = Simulation::new(limits, &[client]).run(10 * SECOND);
        assert_within(outcomes[0].operations, operations, 3.0, &format!("of {bytes} bytes"));
    }
}

#[test]
fn a_change_of_limits_holds_from_its_moment_on_and_gives_no_new_burst() {
    let client = Client { service: 0, ..Client::new(0, Direction::Read, 4096, 32) };
    let mut simulation = Simulation::new(limits(&[(Limited::IopsTotal, 10)]), &[client]);
    simulation.run(2 * SECOND);
    for rate in [1000, 10, 5000, 200] {
        let now = simulation.now;
        simulation.line.set_limits(limits(&[(Limited::IopsTotal, rate)]), now);
        assert_within(simulation.run(10 * SECOND)[0].operations, 10 * rate, 3.0, "after the change");
    }
    // Again and again the same.
    let mut done = 0;
    for _ in 0..100 {
        let now = simulation.now;
        simulation.line.set_limits(limits(&[(Limited::IopsTotal, 200)]), now);
        done += simulation.run(SECOND / 10)[0].operations;
    }
    assert_within(done, 2000, 3.0, "set a hundred times");
    let now = simulation.now;
    simulation.line.set_limits(ThrottleLimits::default(), now);
    while let Next::Goes(_) = simulation.line.next(now) {}
    assert_eq!((simulation.line.len(), simulation.line.next(now)), (0, Next::Nobody), "no limits, nobody waits");
}

#[test]
fn what_is_released_counts_and_leaves_the_others_in_their_places() {
    let mut line = line(limits(&[(Limited::IopsTotal, 10)]));
    assert!(line.passes(Direction::Read, 512, 0));
    assert!(!line.passes(Direction::Read, 512, 0), "the second one of a tenth of a second");
    for ticket in 0..6 {
        let direction = if ticket < 4 { Direction::Read } else { Direction::Write };
        line.add(ticket as u64 % 2, direction, 512, ticket);
    }
    assert_eq!(line.release(0, 0), [0, 2, 4]);
    assert!(line.release(0, 0).is_empty());
    assert_eq!(line.len(), 3);
    // Four went at once, so the next one goes when the time for four is over.
    let next = line.next(0);
    assert_eq!(next, Next::NotBefore(4 * SECOND / 10, 1));
    line.remove(1);
    assert_eq!(line.next(4 * SECOND / 10), Next::Goes(3), "both ways in turn");
    assert_eq!(line.next(5 * SECOND / 10), Next::Goes(5));
    assert_eq!(line.next(SECOND), Next::Nobody);
}

#[test]
fn a_clock_that_differs_between_threads_gains_nobody_anything() {
    let mut line = line(limits(&[(Limited::IopsTotal, 1000)]));
    let mut done = 0;
    for step in 0..100_000u64 {
        // A second in steps of 10 µs, each with one thread that is 50 µs behind.
        let now = step * 10 * MICROSECOND;
        done += u64::from(line.passes(Direction::Read, 512, now.saturating_sub(50 * MICROSECOND * (step % 2))));
    }
    assert_within(done, 1000 + 100, 3.0, "with the tenth of a second at the start");
}

#[test]
fn what_may_go_unasked_is_little_and_only_far_from_the_limit() {
    let mut bursts = limits(&[(Limited::IopsTotal, 10_000), (Limited::BpsRead, 64 << 20)]);
    bursts.iops_size = 65536;
    let mut line = line(bursts);
    let allowance = line.allowance();
    // Of a tenth of a second's worth.
    assert_eq!((allowance.operations, allowance.bytes), (1000 / 64, (64 << 20) / 640));
    assert_eq!(allowance.operation_bytes, 65536, "longer ones count as several");
    line.pour_many(Direction::Read, 499, 0, 0);
    assert!(line.allowance().operations > 0);
    line.pour_many(Direction::Write, 1, 0, 0);
    assert_eq!(line.allowance().operations, 0, "half full");
    line.pour_many(Direction::Write, 500, 0, 0);
    assert!(!line.passes(Direction::Read, 512, 0), "all of it counts");
    line.add(0, Direction::Read, 512, 0);
    line.pour_many(Direction::Read, 0, 0, SECOND);
    assert_eq!(line.allowance().operations, 0, "somebody waits");
}
