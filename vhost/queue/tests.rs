//! Tests of a queue on an event loop of the test's own thread, so that what happens in which turn is known.

use std::future::Future;
use std::time::Instant;

use blockport_block::aio::{AioSettings, PollSettings, reserve_locals};
use blockport_block::options::parse_keyval;
use blockport_block::{BlockBackend, Graph, Permissions};

use super::*;
use crate::config_space::RangeLimits;
use crate::notifier::take_notifier;
use crate::testing::guest::{BUFFERS, Descriptor, Guest, NEXT, WRITE};
use crate::testing::{Event, aio_settings};
use crate::virtqueue::RingFeatures;

const EVENTS: RingFeatures = RingFeatures { event_idx: true, indirect: false, packed: false };
/// Where a request's header and its room for a status are.
const HEADER: u64 = BUFFERS[0].guest;
pub(super) const STATUS: u64 = BUFFERS[1].guest;
/// How long something may take that takes no time when it works.
const DEADLINE: Duration = Duration::from_secs(20);

pub(super) struct Fixture {
    pub(super) context: AioContext,
    pub(super) guest: Guest,
    pub(super) queue: Rc<Queue>,
    pub(super) device_stop: Arc<DeviceStop>,
    kick: Event,
    call: Event,
    error: Event,
    offered: u16,
    pub(super) backend: Arc<BlockBackend>,
}

impl Fixture {
    /// A started queue of 8 entries over a disk that keeps nothing; its requests take `latency`.
    fn new(latency: Duration, has_kick: bool, is_enabled: bool) -> Self {
        let options = format!("null-co,node-name=d,size=1M,read-zeroes=on,latency-ns={}", latency.as_nanos());
        Self::over(&options, None, has_kick, is_enabled)
    }

    /// The same over any node. A stopped device gives up after `timeout`.
    pub(super) fn over(options: &str, timeout: Option<Duration>, has_kick: bool, is_enabled: bool) -> Self {
        let options = parse_keyval(options, Some("driver")).expect("syntax");
        let node = Graph::default().blockdev_add(options).expect("a disk");
        let backend = BlockBackend::with_root("b", node, Permissions::device(true)).expect("nobody else uses it");
        // Without spinning, so that an idle loop sleeps at once.
        let polling = PollSettings { poll_max_ns: 0, ..PollSettings::default() };
        let context = AioContext::new(AioSettings { polling, ..aio_settings() }).expect("the engine works here");
        let channel = backend.channel(&context).expect("the node is active");
        let device = DeviceModel {
            serial: [0; 20],
            writable: true,
            can_discard: true,
            block_size: 512,
            ranges: RangeLimits::new(&backend.limits(), 512),
        };
        let guest = Guest::new(8, 0);
        let [kick, call, error] = std::array::from_fn(|_| Event::non_blocking());
        let notifier = |event: &Event| take_notifier(event.file());
        let number = reserve_locals(1);
        let device_stop = DeviceStop::new(vec![(context.remote(), number)], timeout);
        let setup = QueueSetup {
            name: "the queue under test".into(),
            index: 0,
            device_stop: device_stop.clone(),
            ring: guest.device(EVENTS, 0),
            device: Arc::new(device),
            kick: has_kick.then(|| Arc::new(kick.file().into())),
            notifiers: Notifiers { call: notifier(&call), error: notifier(&error) },
            enabled: is_enabled,
            size: 8,
            figures: Arc::default(),
        };
        let queue = Queue::start(setup, &context, channel);
        let weak: std::rc::Weak<Queue> = Rc::downgrade(&queue);
        context.set_local(number, weak);
        Self { context, guest, queue, device_stop, kick, call, error, offered: 0, backend }
    }

    fn instant() -> Self {
        Self::new(Duration::ZERO, true, true)
    }

    /// Offers a flush, without a kick.
    pub(super) fn offer(&mut self) {
        let flush = [&4u32.to_le_bytes()[..], &[0; 12]].concat();
        self.guest.write(HEADER, &flush);
        self.guest.write(STATUS, &[0xee]);
        let header = Descriptor { addr: HEADER, len: 16, flags: NEXT, next: 1 };
        self.guest.set_table(self.guest.desc, &[header, Descriptor { addr: STATUS, len: 1, flags: WRITE, next: 0 }]);
        self.guest.offer(self.offered, &[0]);
        self.offered += 1;
    }

    pub(super) fn kick(&self) {
        self.kick.add(1);
    }

    /// How many requests are completed.
    pub(super) fn completed(&self) -> u16 {
        self.guest.used_idx()
    }

    pub(super) fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.context.run_until(future)
    }

    /// Runs the loop until it has slept, and so has done all that there was to do.
    pub(super) fn settle(&self) {
        self.run(self.context.sleep(Duration::from_millis(3)));
    }

    /// Runs the loop until a request is in flight.
    #[track_caller]
    pub(super) fn takes_one(&self) {
        let end = Instant::now() + DEADLINE;
        while self.queue.in_flight() == 0 {
            assert!(Instant::now() < end, "no request is in flight");
            self.run(std::future::ready(()));
        }
    }

    /// Runs the loop until so many requests are completed.
    #[track_caller]
    pub(super) fn completes(&self, count: u16) {
        let end = Instant::now() + DEADLINE;
        while self.completed() != count {
            assert!(self.completed() < count && Instant::now() < end, "{} of {count} are completed", self.completed());
            self.run(self.context.sleep(Duration::from_micros(200)));
        }
    }
}

#[test]
fn a_started_queue_calls_once_and_looks_once_whatever_the_guest_says() {
    let mut fixture = Fixture::instant();
    fixture.guest.set_used_event(1000);
    fixture.offer();
    fixture.completes(1);
    fixture.settle();
    // One for the start; one for the completion, as the guest's wish may be from before the start.
    assert_eq!(fixture.call.take(), Some(2));
}

#[test]
fn a_kick_has_the_ring_looked_at() {
    let mut fixture = Fixture::instant();
    fixture.settle();
    fixture.offer();
    fixture.settle();
    assert_eq!(fixture.completed(), 0, "not kicked yet");
    fixture.kick();
    fixture.completes(1);
}

#[test]
fn a_stopped_queue_does_not_touch_guest_memory() {
    for requests in [0, 1] {
        let mut fixture = Fixture::instant();
        fixture.settle();
        (0..requests).for_each(|_| fixture.offer());
        // The loop is between two turns, with the queue among those that it polls.
        fixture.kick();
        fixture.queue.look();
        let base = fixture.run(fixture.queue.clone().stop());
        assert_eq!(base, u32::from(fixture.completed()), "what was popped is completed");
        // The memory is the guest's again.
        let region = &fixture.guest.memory.regions()[0];
        fixture.guest.write(region.guest_addr, &vec![0xaa; region.size as usize]);
        let before = fixture.guest.content();
        fixture.settle();
        assert!(fixture.guest.content() == before, "written to after the stop");
    }
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let mut fixture = Fixture::new(Duration::from_millis(50), true, true);
    fixture.offer();
    fixture.takes_one();
    assert_eq!(fixture.completed(), 0);
    let base = fixture.run(fixture.queue.clone().stop());
    assert_eq!((base, fixture.completed(), fixture.queue.in_flight()), (1, 1, 0));
    assert_eq!(fixture.guest.read(STATUS), [0]);
}

#[test]
fn a_disabled_queue_pops_nothing_and_remembers_the_kick() {
    let mut fixture = Fixture::new(Duration::ZERO, true, false);
    fixture.offer();
    fixture.kick();
    fixture.settle();
    assert_eq!(fixture.completed(), 0);
    fixture.queue.set_enabled(true);
    fixture.completes(1);
}

#[test]
fn without_a_kick_descriptor_the_ring_is_polled() {
    let mut fixture = Fixture::new(Duration::ZERO, false, true);
    fixture.settle();
    fixture.offer();
    fixture.completes(1);
}

#[test]
fn a_polled_ring_is_still_polled_after_a_change_of_memory() {
    let mut fixture = Fixture::new(Duration::from_millis(20), false, true);
    fixture.offer();
    fixture.takes_one();
    let (queue, memory) = (fixture.queue.clone(), fixture.guest.memory.clone());
    fixture.run(async move {
        queue.pause().await;
        queue.set_memory(memory);
        queue.resume();
    });
    fixture.completes(1);
    fixture.settle();
    fixture.offer();
    fixture.completes(2);
}

#[test]
fn a_polled_ring_that_gets_a_kick_descriptor_waits_for_kicks() {
    let mut fixture = Fixture::new(Duration::ZERO, false, true);
    fixture.settle();
    fixture.queue.set_kick(Some(Arc::new(fixture.kick.file().into())));
    fixture.settle();
    fixture.offer();
    fixture.settle();
    assert_eq!(fixture.completed(), 0, "not kicked yet");
    fixture.kick();
    fixture.completes(1);
}

#[test]
fn a_front_end_that_takes_kicks_away_again_and_again_gets_one_poller() {
    let mut fixture = Fixture::new(Duration::ZERO, false, true);
    fixture.settle();
    for _ in 0..100 {
        fixture.queue.set_kick(None);
        fixture.queue.set_kick(Some(Arc::new(fixture.kick.file().into())));
        fixture.queue.set_kick(None);
    }
    fixture.settle();
    // A task holds the queue, the loop may, and we do.
    assert!(Rc::strong_count(&fixture.queue) < 10, "a task each");
    fixture.offer();
    fixture.completes(1);
}

#[test]
fn a_ring_that_lies_is_reported_once_and_served_no_more() {
    let mut fixture = Fixture::instant();
    fixture.settle();
    fixture.guest.set_avail_idx(100);
    for _ in 0..3 {
        fixture.kick();
        fixture.settle();
    }
    assert_eq!(fixture.error.take(), Some(1));
    fixture.offer();
    fixture.kick();
    fixture.settle();
    assert_eq!(fixture.completed(), 0);
    fixture.run(fixture.queue.clone().stop());
}

#[test]
fn a_truncated_ring_is_reported_and_served_no_more() {
    let mut fixture = Fixture::instant();
    fixture.settle();
    fixture.offer();
    fixture.guest.memory.regions()[0].file.set_len(0).expect("a memfd shrinks");
    fixture.kick();
    fixture.settle();
    fixture.queue.mark_dirty();
    fixture.settle();
    assert_eq!(fixture.error.take(), Some(1));
    fixture.run(fixture.queue.clone().stop());
}
