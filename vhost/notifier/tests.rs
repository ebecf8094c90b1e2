//! Tests of the notifier: what can hold us up is refused, and nothing else does.

use std::io::Read;

use blockport_block::aio::{AioContext, AioEngine, AioSettings, Signal};

use super::*;
use crate::testing::{Event, ends, memfd};

/// The largest value that an eventfd's counter takes.
const FULL: u64 = u64::MAX - 1;

/// Long after which a machine would be too busy for anything.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(20);

const ENGINES: [AioEngine; 2] = [AioEngine::IoUring, AioEngine::Threads];

fn context(engine: AioEngine) -> AioContext {
    AioContext::new(AioSettings { engine, ..AioSettings::default() }).expect("both engines work here")
}

/// Signals, and lets the loop go on for a while.
fn signal(context: &AioContext, fd: &Arc<OwnedFd>, times: usize) {
    let signal = Signal::new(fd.clone());
    for _ in 0..times {
        context.signal(&signal);
        context.run_until(context.sleep(std::time::Duration::from_millis(1)));
    }
}

#[test]
fn each_signal_adds_one() {
    for (engine, event) in ENGINES.into_iter().flat_map(|e| [(e, Event::blocking()), (e, Event::non_blocking())]) {
        let context = context(engine);
        signal(&context, &take_notifier(event.file()).expect("an eventfd will do"), 2);
        // A worker thread writes when it gets to it.
        let (mut sum, start) = (0, std::time::Instant::now());
        while sum < 2 && start.elapsed() < DEADLINE {
            context.run_until(context.sleep(std::time::Duration::from_millis(1)));
            sum += event.take().unwrap_or(0);
        }
        assert_eq!((sum, event.take()), (2, None));
    }
}

#[test]
fn what_blocks_whatever_its_flags_say_is_refused() {
    let null = File::options().write(true).open("/dev/null").expect("it is there");
    for file in [memfd(8), null] {
        assert!(take_notifier(file).is_none());
    }
}

#[test]
fn a_full_counter_blocks_nobody_even_if_the_front_end_makes_it_blocking_again() {
    for (engine, cleared) in ENGINES.into_iter().flat_map(|engine| [(engine, false), (engine, true)]) {
        let event = Event::non_blocking();
        let fd = take_notifier(event.file()).expect("an eventfd will do");
        event.add(FULL);
        if cleared {
            // The flag belongs to the open file, which the front-end has too.
            fcntl_setfl(&fd, OFlags::RDWR).expect("it is ours as well");
        }
        ends(move || signal(&context(engine), &fd, 3));
        fcntl_setfl(event.file(), OFlags::RDWR | OFlags::NONBLOCK).expect("it is ours as well");
        assert_eq!(event.take(), Some(FULL));
    }
}

#[test]
fn a_full_or_closed_pipe_does_not_block() {
    for engine in ENGINES {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let fd = take_notifier(OwnedFd::from(writer).into()).expect("a pipe will do");
        let mut filler = File::from(fd.try_clone().expect("a copy"));
        while std::io::Write::write(&mut filler, &[0; 4096]).is_ok() {}
        let fd = ends(move || {
            signal(&context(engine), &fd, 3);
            fd
        });
        let mut some = [0; 4096];
        reader.read_exact(&mut some).expect("it is full");
        drop(reader);
        ends(move || signal(&context(engine), &fd, 3));
    }
}
