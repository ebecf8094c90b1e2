//! The mailbox (`block/aio/mailbox.rs`): no message is left lying while the loop sleeps, however many post.

use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::eventfd::Eventfd;
use crate::handoff::Sleeper;

struct Mailbox {
    inbox: Mutex<Vec<u32>>,
    sleeper: Sleeper,
    event: Eventfd,
}

impl Mailbox {
    fn new() -> Arc<Self> {
        Arc::new(Self { inbox: Mutex::new(Vec::new()), sleeper: Sleeper::new(), event: Eventfd::new() })
    }

    /// As `Mailbox::post`.
    fn post(&self, message: u32) {
        self.inbox.lock().unwrap().push(message);
        if self.sleeper.must_be_woken() {
            self.event.write();
        }
    }

    /// The turns of a loop until it has got `count` messages.
    fn take(&self, count: usize) {
        let mut got = Vec::new();
        loop {
            if self.sleeper.has_something() {
                self.sleeper.takes();
                got.append(&mut self.inbox.lock().unwrap());
            }
            if got.len() == count {
                break;
            }
            if self.sleeper.may_sleep() {
                self.event.wait();
                self.sleeper.woke();
            }
        }
        got.sort_unstable();
        assert!(got.iter().copied().eq(0..count as u32), "each message once: {got:?}");
    }
}

fn posters(each: &[u32]) {
    let mailbox = Mailbox::new();
    let mut first = 0;
    for count in each {
        let (mailbox, from) = (mailbox.clone(), first);
        let count = *count;
        first += count;
        thread::spawn(move || (from..from + count).for_each(|message| mailbox.post(message)));
    }
    mailbox.take(first as usize);
}

/// Every interleaving in which no more than three times a thread is stopped that could go on. (All of those of two
/// messages are tried in five minutes.)
fn bounded(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn a_message_wakes_the_loop() {
    loom::model(|| posters(&[1]));
}

#[test]
fn two_messages_of_one_thread_wake_the_loop() {
    bounded(|| posters(&[2]));
}

#[test]
fn messages_of_two_threads_wake_the_loop() {
    bounded(|| posters(&[1, 1]));
}
