//! A loop for the control thread, which has none: work that takes I/O runs on a thread of its own, and is waited for.

use crate::aio::{AioContext, AioEngine, AioSettings};
use crate::error::{OpenError, OpenResult};

/// Runs work on a loop of its own, on a thread of that name that ends with it.
///
/// # Errors
/// The host has no thread or no loop for us, or the work fails.
pub(super) fn on_own_loop<T: Send>(
    name: &str,
    work: impl FnOnce(&AioContext) -> OpenResult<T> + Send,
) -> OpenResult<T> {
    std::thread::scope(|scope| {
        let run = || {
            // Without a ring: the sandbox allows no new ones, and there is nothing to be gained by one here.
            let settings = AioSettings { engine: AioEngine::Threads, ..AioSettings::default() };
            let context = AioContext::new(settings);
            let context = context.map_err(|e| OpenError(format!("no event loop can be made: {e}")))?;
            work(&context)
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, run);
        let thread = thread.map_err(|e| OpenError(format!("no thread can be started: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(OpenError::new("the work on the image was broken off")))
    })
}
