//! Tests of the notifier: what can hold us up is refused, and nothing else does.

use std::io::Read;
use std::os::fd::OwnedFd;

use super::*;
use crate::testing::{Event, ends, memfd};

/// The largest value that an eventfd's counter takes.
const FULL: u64 = u64::MAX - 1;

#[test]
fn each_signal_adds_one() {
    for event in [Event::blocking(), Event::non_blocking()] {
        let notifier = Notifier::new(event.file()).expect("an eventfd will do");
        notifier.signal();
        notifier.signal();
        assert_eq!(event.take(), Some(2));
    }
}

#[test]
fn what_blocks_whatever_its_flags_say_is_refused() {
    let null = File::options().write(true).open("/dev/null").expect("it is there");
    for file in [memfd(8), null] {
        assert!(Notifier::new(file).is_none());
    }
}

#[test]
fn a_full_counter_does_not_block() {
    for event in [Event::blocking(), Event::non_blocking()] {
        event.add(FULL);
        let notifier = Notifier::new(event.file()).expect("an eventfd will do");
        let notifier = ends(move || {
            notifier.signal();
            notifier
        });
        assert_eq!(event.take(), Some(FULL));
        notifier.signal();
        assert_eq!(event.take(), Some(1), "it works again");
    }
}

#[test]
fn a_full_or_closed_pipe_does_not_block() {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let notifier = Notifier::new(OwnedFd::from(writer).into()).expect("a pipe will do");
    let notifier = ends(move || {
        // More than any pipe holds.
        (0..1 << 18).for_each(|_| notifier.signal());
        notifier
    });
    let mut one = [0; 8];
    reader.read_exact(&mut one).expect("it was signalled");
    assert_eq!(u64::from_ne_bytes(one), 1);
    drop(reader);
    ends(move || notifier.signal());
}
