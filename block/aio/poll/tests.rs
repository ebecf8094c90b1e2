//! Tests of adaptive polling on a clock that stands still unless it is told to go on: how much is spun, and for what.

use super::*;

thread_local! {
    static TIME: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static START: Cell<Option<Instant>> = const { Cell::new(None) };
}

fn now() -> Instant {
    let start = START.get().unwrap_or_else(Instant::now);
    START.set(Some(start));
    start + TIME.get()
}

fn go_on(ns: u64) {
    TIME.set(TIME.get() + Duration::from_nanos(ns));
}

/// What one turn of a spinning loop takes.
const TURN_NS: u64 = 100;

/// When the next event comes.
#[derive(Clone, Copy)]
enum Event {
    /// So many nanoseconds after the last, whatever the loop does.
    After(u64),
    /// So many after the loop has gone to sleep: the sender needs the CPU.
    AfterSleep(u64),
    /// So many after the last, but the CPU is lost for that long at the first spin.
    Preempting(u64),
}

/// What a run of waits came to.
#[derive(Debug, Default)]
struct Outcome {
    waits: u64,
    caught: u64,
    spun_ns: u64,
    total_ns: u64,
}

fn polling(poll_max_ns: u64) -> AdaptivePolling {
    AdaptivePolling::with_clock(PollSettings { poll_max_ns, ..PollSettings::default() }, now)
}

/// Waits for one event after the other, as the loop does.
fn run(polling: &AdaptivePolling, waits: u64, event: Event) -> Outcome {
    let mut outcome = Outcome { waits, ..Outcome::default() };
    let began = TIME.get();
    for _ in 0..waits {
        let last = TIME.get();
        let elapsed = || (TIME.get() - last).as_nanos() as u64;
        polling.keep_polling(false, true);
        let mut is_there = false;
        while !is_there && polling.keep_polling(false, false) {
            match event {
                Event::Preempting(ns) => {
                    go_on(ns);
                    outcome.spun_ns += TURN_NS;
                    is_there = true;
                }
                Event::After(ns) => {
                    go_on(TURN_NS);
                    outcome.spun_ns += TURN_NS;
                    is_there = elapsed() >= ns;
                }
                Event::AfterSleep(_) => {
                    go_on(TURN_NS);
                    outcome.spun_ns += TURN_NS;
                }
            }
        }
        if is_there {
            outcome.caught += 1;
            continue;
        }
        let before = polling.before_sleep();
        go_on(match event {
            Event::AfterSleep(ns) => ns,
            Event::After(ns) | Event::Preempting(ns) => ns.saturating_sub(elapsed()),
        });
        polling.after_sleep(before);
    }
    outcome.total_ns = (TIME.get() - began).as_nanos() as u64;
    outcome
}

#[test]
fn an_event_that_comes_soon_enough_is_caught() {
    for (poll_max_ns, ns) in [(32_768, 3_000), (32_768, 10_000), (32_768, 30_000), (1_000_000, 900_000)] {
        let outcome = run(&polling(poll_max_ns), 200, Event::After(ns));
        assert!(outcome.caught >= 185, "{ns}: {outcome:?}");
    }
}

#[test]
fn events_that_are_late_at_times_do_not_end_it() {
    // A client that is woken in 20 to 45 us, as by a hypervisor that has put its CPU to sleep.
    for late in [2, 3] {
        let polling = polling(32_768);
        let mut caught = 0;
        for _ in 0..1_000 {
            caught += run(&polling, late, Event::After(45_000)).caught;
            caught += run(&polling, 3, Event::After(20_000)).caught;
            caught += run(&polling, 2, Event::After(30_000)).caught;
        }
        assert!(caught >= 3_900, "{caught} of the 5,000 that came in time");
    }
}

#[test]
fn where_the_sender_needs_the_cpu_next_to_nothing_is_spun() {
    for ns in [500, 3_000, 5_000, 10_000, 20_000, 31_000] {
        let polling = polling(32_768);
        run(&polling, 20_000, Event::AfterSleep(ns));
        let outcome = run(&polling, 100_000, Event::AfterSleep(ns));
        assert_eq!(outcome.caught, 0);
        assert!(outcome.spun_ns * 20 < outcome.total_ns, "more than 5 %, {ns}: {outcome:?}");
        assert!(outcome.spun_ns > 0, "it goes on to try, {ns}");
    }
}

#[test]
fn on_a_slow_disk_next_to_nothing_is_spun() {
    for ns in [33_000, 60_000, 100_000, 10_000_000] {
        let outcome = run(&polling(32_768), 100_000, Event::After(ns));
        assert!(outcome.spun_ns * 100 < outcome.total_ns, "more than 1 %, {ns}: {outcome:?}");
    }
}

#[test]
fn what_comes_while_the_cpu_is_away_is_not_taken_for_caught() {
    let polling = polling(1_000_000);
    let outcome = run(&polling, 50_000, Event::Preempting(200_000));
    assert!(outcome.caught * 50 < outcome.waits, "it goes on spinning: {outcome:?}");
}

#[test]
fn polling_comes_back_when_it_pays_again() {
    let polling = polling(32_768);
    run(&polling, 100_000, Event::AfterSleep(5_000));
    run(&polling, u64::from(REST_MAX) + 10, Event::After(10_000));
    let outcome = run(&polling, 1_000, Event::After(10_000));
    assert!(outcome.caught >= 990, "{outcome:?}");
}

#[test]
fn it_never_spins_if_told_so_and_begins_anew_when_told_otherwise() {
    let polling = polling(0);
    assert_eq!(run(&polling, 1_000, Event::After(1_000)).spun_ns, 0);
    polling.set(PollSettings::default());
    assert!(run(&polling, 1_000, Event::After(1_000)).caught >= 990);
    run(&polling, 100_000, Event::AfterSleep(5_000));
    polling.set(PollSettings::default());
    assert!(run(&polling, 1_000, Event::After(1_000)).caught >= 990, "the rest is over");
}
