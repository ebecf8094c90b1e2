//! What this crate's unit tests share: a guest, files in memory, eventfds, a deadline, a child process to die in.

pub(crate) mod guest;
pub(crate) mod packed_driver;
pub(crate) mod step;

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::Duration;

use blockport_block::aio::{AioEngine, AioSettings};
use rustix::event::EventfdFlags;

/// How long something may take that takes no time when it works.
const DEADLINE: Duration = Duration::from_secs(20);

/// A memfd of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(size).expect("room in a memfd");
    file
}

/// An eventfd.
pub(crate) struct Event(File);

impl Event {
    /// One that blocks, as front-ends may well pass.
    pub(crate) fn blocking() -> Self {
        Self::new(EventfdFlags::CLOEXEC)
    }

    pub(crate) fn non_blocking() -> Self {
        Self::new(EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
    }

    fn new(flags: EventfdFlags) -> Self {
        Self(rustix::event::eventfd(0, flags).expect("an eventfd").into())
    }

    /// Another descriptor of it.
    pub(crate) fn file(&self) -> File {
        self.0.try_clone().expect("a descriptor")
    }

    pub(crate) fn add(&self, count: u64) {
        (&self.0).write_all(&count.to_ne_bytes()).expect("room in the counter");
    }

    /// What has been added since the last time; `None` for nothing, if it does not block.
    pub(crate) fn take(&self) -> Option<u64> {
        let mut count = [0; 8];
        (&self.0).read_exact(&mut count).ok()?;
        Some(u64::from_ne_bytes(count))
    }
}

/// The settings of a loop on the engine that `BLOCKPORT_TEST_AIO_ENGINE` selects.
pub(crate) fn aio_settings() -> AioSettings {
    let name = std::env::var("BLOCKPORT_TEST_AIO_ENGINE").unwrap_or("io_uring".into());
    let known = AioEngine::NAMES.into_iter().find(|(known, _)| *known == name);
    let (_, engine) = known.unwrap_or_else(|| panic!("BLOCKPORT_TEST_AIO_ENGINE={name}"));
    AioSettings { engine, ..AioSettings::default() }
}

/// Runs what must not block.
///
/// # Panics
/// If it blocks.
pub(crate) fn ends<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(run()));
    receiver.recv_timeout(DEADLINE).expect("it blocks, or it panicked")
}

/// In how many cases a property is tried: more with `scripts/test --deep`.
pub(crate) fn cases(usual: u32) -> proptest::test_runner::Config {
    let times = if std::env::var_os("BLOCKPORT_TEST_DEEP").is_some() { 10 } else { 1 };
    let cases = usual.saturating_mul(times);
    // What fails is printed in its smallest form, to become a test of its own.
    proptest::test_runner::Config { failure_persistence: None, ..proptest::test_runner::Config::with_cases(cases) }
}

const CHILD: &str = "BLOCKPORT_TEST_CHILD";

/// Runs the test `name` (its whole path) again in a process of its own, where [`is_child`] is true.
pub(crate) fn in_child(name: &str) -> Output {
    let mut child = Command::new(std::env::current_exe().expect("a test runs from a file"));
    child.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, name);
    child.output().expect("the test's own file can be run")
}

/// Whether this process was started by [`in_child`].
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}
