//! A task and those who wake it (`block/aio/task.rs`): a wake-up is never lost, whether the task runs, waits for its turn
//! or waits for the wake-up.

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::eventfd::Eventfd;
use crate::handoff::Scheduled;

struct Task {
    scheduled: Scheduled,
    /// What it waits for: events that are told without a lock.
    happened: [AtomicBool; 2],
    /// The ready list of its loop, with what wakes that.
    ready: Mutex<u32>,
    event: Eventfd,
}

impl Task {
    /// As `TaskHeader::wake` on another thread.
    fn wake(&self) {
        if self.scheduled.wants_turn() {
            *self.ready.lock().unwrap() += 1;
            self.event.write();
        }
    }

    /// As `Tasks::run`, until all that the task waits for has happened.
    fn run(&self) {
        // It is scheduled from the start.
        loop {
            self.scheduled.turn_begins();
            if self.happened.iter().all(|event| event.load(Ordering::Relaxed)) {
                return;
            }
            loop {
                let mut ready = self.ready.lock().unwrap();
                if *ready > 0 {
                    *ready -= 1;
                    break;
                }
                drop(ready);
                self.event.wait();
            }
        }
    }
}

#[test]
fn a_wake_up_is_never_lost() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let task = Arc::new(Task {
            scheduled: Scheduled::new(),
            happened: [AtomicBool::new(false), AtomicBool::new(false)],
            ready: Mutex::new(0),
            event: Eventfd::new(),
        });
        for event in 0..2 {
            let task = task.clone();
            thread::spawn(move || {
                task.happened[event].store(true, Ordering::Relaxed);
                task.wake();
            });
        }
        task.run();
    });
}
