//! Tests of the loop.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use super::*;

#[test]
fn tasks_timers_and_messages_run() {
    let context = AioContext::new(PollSettings::default()).expect("io_uring works here");
    let remote = context.remote();
    let (sender, receiver) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        let answer = remote.call(|context, answer| {
            let sleep = context.sleep(Duration::from_millis(5));
            context.spawn(async move {
                sleep.await;
                answer.give(42);
            });
        });
        sender.send(answer).expect("the test waits");
        remote.post(AioContext::stop);
    });
    context.run();
    other.join().expect("no panic");
    assert_eq!(receiver.recv(), Ok(Some(42)));
}

#[test]
fn a_waker_called_on_another_thread_wakes_a_sleeping_loop() {
    let context = AioContext::new(PollSettings::default()).expect("io_uring works here");
    let woken = Rc::new(Cell::new(false));
    let seen = woken.clone();
    context.run_until(std::future::poll_fn(move |cx| {
        if seen.replace(true) {
            return std::task::Poll::Ready(());
        }
        let waker = cx.waker().clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        std::task::Poll::Pending
    }));
    assert!(woken.get());
}

#[test]
fn a_call_to_a_loop_that_has_gone_answers_none() {
    let remote = AioContext::new(PollSettings::default()).expect("io_uring works here").remote();
    assert_eq!(remote.call::<()>(|_, answer| answer.give(())), None);
}

#[test]
fn a_call_to_an_iothread_that_has_ended_answers_none() {
    let iothread = Iothread::start("ended", PollSettings::default()).expect("io_uring works here");
    // A task that never ends, and holds on to the context.
    iothread.remote().post(|context| {
        let held = context.clone();
        context.spawn(async move {
            std::future::pending::<()>().await;
            drop(held);
        });
    });
    assert_eq!(iothread.remote().call(|_, answer| answer.give(1)), Some(1));
    let remote = iothread.remote().clone();
    drop(iothread);
    assert_eq!(remote.call(|_, answer| answer.give(2)), None);
}
