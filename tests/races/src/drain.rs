//! Flags that are copied (`BlockBackend::channel` and `quiesce`; exemptions from limits are handed over in the same way): a
//! section that begins while an iothread makes its channel finds the channel in the list, or the channel finds the section
//! begun.

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

#[derive(Default)]
struct Backend {
    /// `is_quiesced`.
    quiesced: AtomicBool,
    /// `channels`: each with its own copy of the flag.
    channels: Mutex<Vec<Arc<AtomicBool>>>,
}

#[test]
fn a_channel_that_is_made_while_a_section_begins_is_quiesced() {
    loom::model(|| {
        let backend = Arc::new(Backend::default());
        let makes = backend.clone();
        let maker = thread::spawn(move || {
            let mut channels = makes.channels.lock().unwrap();
            let channel = Arc::new(AtomicBool::new(false));
            channels.push(channel.clone());
            channel.store(makes.quiesced.load(Ordering::Acquire), Ordering::Relaxed);
            channel
        });
        backend.quiesced.store(true, Ordering::Release);
        let channels: Vec<_> = backend.channels.lock().unwrap().clone();
        channels.iter().for_each(|channel| channel.store(true, Ordering::Relaxed));
        let channel = maker.join().unwrap();
        assert!(channel.load(Ordering::Relaxed));
    });
}
