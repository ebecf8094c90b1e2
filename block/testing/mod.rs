//! What the tests of block drivers share: fixtures for every driver, an oracle with random requests, and small helpers.
//! It is compiled into tests only and drives drivers through the public interface alone.
#![allow(dead_code)] // A test binary need not use all of it.

pub mod fixtures;
pub mod imports;
pub mod loop_device;
pub mod oracle;
pub mod random;

use std::future::{Future, poll_fn};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use blockport_block::aio::{AioContext, AioSettings};
use blockport_block::options::parse_keyval;
use blockport_block::secret::Secret;
use blockport_block::throttle::{Limited, Rate, ThrottleLimits};
use blockport_block::{Child, ChildChannel, Graph, Node, OpenResult, Permissions};

/// A directory that is removed with everything in it.
pub struct TempDir(PathBuf);

impl TempDir {
    /// On the disk that the project is built on.
    pub fn on_disk() -> Self {
        Self::below(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    /// On a tmpfs.
    pub fn in_memory() -> Self {
        Self::below(Path::new("/dev/shm"))
    }

    fn below(parent: &Path) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("blockport-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        std::fs::create_dir(&path).expect("the directory for temporary files is writable");
        Self(path)
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().expect("test paths are UTF-8")
    }

    /// Makes a sparse file of `size` bytes and returns its path.
    pub fn file(&self, name: &str, size: u64) -> String {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("the directory was just made");
        file.set_len(size).expect("a sparse file takes no room");
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The settings of an event loop on the engine that the test binary is for.
pub fn settings() -> AioSettings {
    AioSettings { engine: crate::ENGINE, ..AioSettings::default() }
}

/// An event loop of the calling thread.
pub fn context() -> AioContext {
    AioContext::new(settings()).expect("the engine works here")
}

/// What the secret `secret` of every graph holds.
pub const PASSPHRASE: &[u8] = b"open sesame";

/// Opens one node from its options as key=value, in a graph of its own, which has the throttle groups `unlimited`,
/// `limited` and `far` (from its limit), and the secret `secret`.
pub fn open(options: &str) -> OpenResult<(Graph, Arc<Node>)> {
    let graph = Graph::default();
    for (name, average) in [("unlimited", 0), ("limited", 3000), ("far", 1_000_000_000)] {
        let mut limits = ThrottleLimits::default();
        limits.set_rate(Limited::IopsTotal, Rate { average, ..Rate::default() });
        graph.throttle_groups().create(name, limits)?;
    }
    graph.secrets().add("secret", Secret::new(PASSPHRASE.to_vec()))?;
    let node =
        graph.blockdev_add(parse_keyval(&format!("{options},node-name=top"), Some("driver")).expect("syntax"))?;
    Ok((graph, node))
}

/// Opens one node in a graph that is there.
pub fn opened_in(graph: &Graph, options: &str) -> Arc<Node> {
    let opened = graph.blockdev_add(parse_keyval(options, Some("driver")).expect("syntax"));
    opened.unwrap_or_else(|error| panic!("{options}: {error}"))
}

/// Opens a node in a graph of its own, where it must work.
pub fn opened(options: &str) -> (Graph, Arc<Node>) {
    open(options).unwrap_or_else(|error| panic!("{options}: {error}"))
}

/// A writer, as a device is.
pub fn writer() -> Permissions {
    Permissions::device(true)
}

/// A user of `node` that writes in units of `granularity` bytes.
pub fn user(node: &Arc<Node>, granularity: u32) -> Arc<Child> {
    Child::attach(node.clone(), "the test", writer(), granularity).expect("nobody else uses the node")
}

/// The edge's half on `context`.
pub fn channel(child: &Child, context: &AioContext) -> Rc<ChildChannel> {
    child.channel(context).expect("the node is active")
}

/// Runs all futures at once, to their ends; the results in the same order.
pub async fn join_all<F: Future + Unpin>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|future| (Some(future), None)).collect();
    poll_fn(move |cx| {
        for (future, output) in &mut futures {
            if let Some(running) = future
                && let Poll::Ready(value) = Pin::new(running).poll(cx)
            {
                *output = Some(value);
                *future = None;
            }
        }
        if futures.iter().any(|(future, _)| future.is_some()) {
            return Poll::Pending;
        }
        Poll::Ready(futures.iter_mut().filter_map(|(_, output)| output.take()).collect())
    })
    .await
}
