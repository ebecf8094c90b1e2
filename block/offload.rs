//! Offload: threads for work that takes CPU rather than I/O, so that no loop stands still meanwhile. It owns the threads
//! and how many there are, over all images; what the work is it does not know.

use std::future::poll_fn;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Poll, Waker};

/// The most threads.
const THREADS_MAX: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

struct Done<T> {
    output: Option<Option<T>>,
    waker: Option<Waker>,
}

/// Runs `work` on one of the threads. `None`: it panicked, which is a bug; the request fails rather than wait for ever.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let done = Arc::new(Mutex::new(Done { output: None, waker: None }));
    let theirs = done.clone();
    let job: Job = Box::new(move || {
        let output = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).ok();
        let mut done = theirs.lock().unwrap_or_else(PoisonError::into_inner);
        done.output = Some(output);
        if let Some(waker) = done.waker.take() {
            waker.wake();
        }
    });
    match threads() {
        Some(queue) => {
            // The threads live as long as the process.
            let _ = queue.lock().unwrap_or_else(PoisonError::into_inner).send(job);
        }
        None => job(),
    }
    poll_fn(|cx| {
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        match done.output.take() {
            Some(output) => Poll::Ready(output),
            None => {
                done.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    })
    .await
}

/// The queue of the threads, which start when first needed. `None` where the host has no thread for us.
fn threads() -> Option<&'static Mutex<Sender<Job>>> {
    static QUEUE: OnceLock<Option<Mutex<Sender<Job>>>> = OnceLock::new();
    QUEUE
        .get_or_init(|| {
            let (sender, receiver) = channel::<Job>();
            let receiver = Arc::new(Mutex::new(receiver));
            let count = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
            let started = (0..count).filter(|_| start_thread(receiver.clone())).count();
            (started > 0).then(|| Mutex::new(sender))
        })
        .as_ref()
}

fn start_thread(jobs: Arc<Mutex<Receiver<Job>>>) -> bool {
    let run = move || {
        // Wherever the iothread is bound that happened to need it first.
        crate::sys::run_anywhere();
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match job {
                Ok(job) => job(),
                Err(_) => return,
            }
        }
    };
    std::thread::Builder::new().name("offload".to_owned()).spawn(run).is_ok()
}
