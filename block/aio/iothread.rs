//! Iothread: a named thread that runs one AioContext. It owns the thread: dropping it stops the loop and joins.

use std::cell::Cell;
use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::{AioContext, AioRemote, AioSettings};

thread_local! {
    static IS_IOTHREAD: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is an iothread, and so must never wait for one.
pub fn is_iothread() -> bool {
    IS_IOTHREAD.get()
}

/// A named thread with an event loop, shared by any number of exports.
pub struct Iothread {
    id: String,
    remote: AioRemote,
    thread: Option<JoinHandle<()>>,
}

impl Iothread {
    /// Starts the thread and waits until its loop runs.
    ///
    /// # Errors
    /// The thread or its engine could not be made; the error says why.
    pub fn start(id: &str, settings: impl Into<AioSettings>) -> io::Result<Self> {
        let settings = settings.into();
        let (sender, receiver) = mpsc::channel();
        // The kernel shows 15 characters of a thread's name.
        let thread = std::thread::Builder::new().name(id.to_owned()).spawn(move || {
            IS_IOTHREAD.set(true);
            match AioContext::new(settings) {
                Ok(context) => {
                    let closing = CloseOnDrop(context.remote());
                    let _ = sender.send(Ok(context.remote()));
                    context.run();
                    context.release_all();
                    drop(closing);
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            };
        })?;
        let remote = receiver.recv().map_err(|_| io::Error::other("the thread ended before it began"))??;
        Ok(Self { id: id.to_owned(), remote, thread: Some(thread) })
    }

    /// The name given at the start.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The handle on its loop.
    pub fn remote(&self) -> &AioRemote {
        &self.remote
    }
}

/// Closes the mailbox when the loop ends: tasks that are left hold on to the context, so it does not close by itself,
/// and who calls then would wait for ever. A panic, which is a bug, ends the process: requests of every disk on the
/// thread would hang otherwise, while nothing shows it.
struct CloseOnDrop(AioRemote);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
        self.0.close();
    }
}

impl Drop for Iothread {
    fn drop(&mut self) {
        self.remote.post(AioContext::stop);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}
