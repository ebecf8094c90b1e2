//! Tests of a queue whose requests fail on the host, on an event loop of the test's own thread.

use std::time::{Duration, Instant};

use blockport_block::{IoStatus, OnErrorPolicy, RequestKind};

use crate::queue::tests::{Fixture, STATUS};

const OK: u8 = 0;
const IOERR: u8 = 1;
/// What the guest left where the status goes.
const NONE: u8 = 0xee;

/// A queue over a disk on which the first `count` flushes find no space, with more to say about how.
fn failing(count: usize, how: &str, timeout: Option<Duration>) -> Fixture {
    let rule = |n: usize| {
        let (state, next) = (n + 1, n + 2);
        format!(
            "inject-error.{n}.event=flush_to_disk,inject-error.{n}.errno=28,inject-error.{n}.state={state},{how}\
             set-state.{n}.event=flush_to_disk,set-state.{n}.state={state},set-state.{n}.new_state={next}"
        )
        .replace('@', &n.to_string())
    };
    let rules: Vec<String> = (0..count).map(rule).collect();
    let options = format!("blkdebug,node-name=d,{},image.driver=memory,image.size=1M", rules.join(","));
    Fixture::over(&options, timeout, true, true)
}

/// They fail before the queue has turned round.
fn full(count: usize, timeout: Option<Duration>) -> Fixture {
    failing(count, "inject-error.@.immediately=on,", timeout)
}

/// They fail later.
fn full_later(count: usize) -> Fixture {
    failing(count, "delay.@.iotype=flush,delay.@.ns=1000000,", None)
}

fn status(fixture: &Fixture) -> u8 {
    let [status] = fixture.guest.read(STATUS);
    status
}

/// Offers a request that fails, and waits until it is kept.
fn stop(fixture: &mut Fixture) {
    fixture.offer();
    fixture.kick();
    fixture.takes_one();
    turn_until(fixture, |fixture| fixture.device_stop.is_stopped());
    fixture.settle();
}

/// Runs the loop until something holds.
#[track_caller]
fn turn_until(fixture: &Fixture, holds: impl Fn(&Fixture) -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds(fixture) {
        assert!(Instant::now() < end, "it does not happen");
        fixture.run(std::future::ready(()));
    }
}

#[test]
fn a_request_that_stops_the_device_is_kept_and_done_again_when_it_goes_on() {
    for later in [false, true] {
        // One event loop a thread.
        let mut fixture = if later { full_later(1) } else { full(1, None) };
        stop(&mut fixture);
        assert_eq!((fixture.completed(), status(&fixture)), (0, NONE), "nothing is answered");
        assert_eq!(fixture.backend.iostatus(), IoStatus::NoSpace);
        let failed = fixture.backend.statistics().failed();
        assert_eq!((fixture.queue.in_flight(), failed), (1, 0), "it is in flight, and has not failed");
        fixture.device_stop.resume();
        fixture.completes(1);
        assert_eq!(status(&fixture), OK);
        assert!(!fixture.device_stop.is_stopped());
        assert_eq!(fixture.queue.in_flight(), 0);
    }
}

#[test]
fn a_stopped_device_pops_nothing_until_it_goes_on() {
    let mut fixture = full(1, None);
    stop(&mut fixture);
    fixture.offer();
    fixture.kick();
    fixture.settle();
    assert_eq!((fixture.completed(), fixture.queue.in_flight()), (0, 1));
    fixture.device_stop.resume();
    fixture.completes(2);
}

#[test]
fn a_request_that_fails_again_stops_the_device_again() {
    for later in [false, true] {
        // One event loop a thread.
        let mut fixture = if later { full_later(3) } else { full(3, None) };
        stop(&mut fixture);
        for _ in 0..2 {
            fixture.backend.reset_iostatus();
            fixture.device_stop.resume();
            turn_until(&fixture, |fixture| fixture.backend.iostatus() != IoStatus::Ok);
            fixture.settle();
            assert!(fixture.device_stop.is_stopped() && fixture.completed() == 0);
        }
        fixture.offer();
        fixture.device_stop.resume();
        fixture.completes(2);
        fixture.offer();
        fixture.kick();
        fixture.completes(3);
    }
}

#[test]
fn a_ring_that_stops_answers_what_is_kept_with_an_error() {
    for later in [false, true] {
        // One event loop a thread.
        let mut fixture = if later { full_later(1) } else { full(1, None) };
        stop(&mut fixture);
        let queue = fixture.queue.clone();
        fixture.run(queue.stop());
        assert_eq!((fixture.completed(), status(&fixture)), (1, IOERR));
        assert!(!fixture.device_stop.is_stopped(), "nothing is kept any more");
        assert_eq!(fixture.backend.statistics().of(RequestKind::Flush).failed, 1);
        assert_eq!(fixture.backend.iostatus(), IoStatus::NoSpace, "until somebody resets it");
    }
}

#[test]
fn a_request_that_fails_while_its_ring_stops_is_answered() {
    let mut fixture = full_later(1);
    fixture.offer();
    fixture.kick();
    fixture.takes_one();
    let queue = fixture.queue.clone();
    fixture.run(queue.stop());
    assert_eq!((fixture.completed(), status(&fixture)), (1, IOERR));
}

#[test]
fn a_change_of_memory_does_not_wait_for_what_is_kept() {
    let mut fixture = full(1, None);
    stop(&mut fixture);
    let (queue, memory) = (fixture.queue.clone(), fixture.guest.memory.clone());
    fixture.run(async move {
        queue.pause().await;
        queue.set_memory(memory);
        queue.resume();
    });
    fixture.device_stop.resume();
    fixture.completes(1);
    assert_eq!(status(&fixture), OK);
}

#[test]
fn what_is_kept_is_given_up_after_the_timeout_and_the_next_stop_has_its_own() {
    let timeout = Duration::from_millis(40);
    let mut fixture = full(2, Some(timeout));
    for done in 1..=2 {
        let begin = Instant::now();
        fixture.offer();
        fixture.kick();
        fixture.completes(done);
        assert_eq!(status(&fixture), IOERR);
        assert!(begin.elapsed() >= timeout, "{:?}", begin.elapsed());
    }
    fixture.offer();
    fixture.kick();
    fixture.completes(3);
    assert_eq!(status(&fixture), OK);
}

#[test]
fn a_timeout_does_not_end_a_stop_that_came_after_the_device_went_on() {
    let mut fixture = full(2, Some(Duration::from_millis(60)));
    stop(&mut fixture);
    fixture.run(fixture.context.sleep(Duration::from_millis(40)));
    fixture.backend.reset_iostatus();
    fixture.device_stop.resume();
    turn_until(&fixture, |fixture| fixture.backend.iostatus() != IoStatus::Ok);
    fixture.run(fixture.context.sleep(Duration::from_millis(35)));
    assert_eq!(fixture.completed(), 0, "its own timeout is not over");
    fixture.completes(1);
    assert_eq!(status(&fixture), IOERR);
}

#[test]
fn report_tells_the_guest_at_once_and_ignore_tells_it_that_all_is_well() {
    for (policy, expected) in [(OnErrorPolicy::Report, IOERR), (OnErrorPolicy::Ignore, OK)] {
        for later in [false, true] {
            // One event loop a thread.
            let mut fixture = if later { full_later(1) } else { full(1, None) };
            fixture.backend.set_on_error(OnErrorPolicy::Report, policy);
            fixture.offer();
            fixture.kick();
            fixture.completes(1);
            assert_eq!(status(&fixture), expected, "{policy:?}");
            assert!(!fixture.device_stop.is_stopped());
            assert_eq!(fixture.backend.statistics().failed(), 1);
        }
    }
}

#[test]
fn what_was_kept_does_not_go_to_the_next_medium() {
    let mut fixture = full(1, None);
    stop(&mut fixture);
    // As the export does when its medium goes.
    fixture.device_stop.give_up();
    fixture.completes(1);
    assert_eq!(status(&fixture), IOERR);
}
