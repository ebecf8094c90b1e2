//! Graph: the opened nodes by name. It owns the options that all nodes share and how a definition becomes nodes,
//! children first; what a driver's own options mean is the driver's business. `graph/` changes it under load.

mod reopen;
mod replace;
mod snapshot;

pub use snapshot::Snapshot;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::backends::Backends;
use crate::backing::{self, ImageChain};
use crate::child::{Child, EdgeKind, Parent};
use crate::driver::BlockDriver;
use crate::drivers;
use crate::error::{OpenError, OpenResult};
use crate::handover::Handover;
use crate::node::{DetectZeroes, Node, NodeOptions, Operation, SECTOR};
use crate::options::{ChildRef, Options, is_valid_id};
use crate::permissions::Permissions;
use crate::secret::{Secret, Secrets};
use crate::throttle::ThrottleGroups;

/// The nodes of a process by name, and its BlockBackends. Changed by the control thread only.
#[derive(Default)]
pub struct Graph {
    /// Every node that lives.
    nodes: Mutex<BTreeMap<String, Entry>>,
    pub(crate) backends: Backends,
    next_anonymous: AtomicU64,
    throttle_groups: ThrottleGroups,
    pub(crate) handover: Handover,
    secrets: Secrets,
}

struct Entry {
    node: Weak<Node>,
    /// Set if the user defined it by itself: it lives until `blockdev_del`. An inline child goes with its last user.
    owned: Option<Arc<Node>>,
}

/// What a driver is opened with, besides its own options.
pub struct OpenContext<'a> {
    graph: &'a Graph,
    /// The options that every node has.
    pub node: &'a NodeOptions,
    /// The driver that is behind the node so far, if it is being reopened. It has let its locks go.
    previous: Option<&'a dyn BlockDriver>,
    /// The images of which this is a backing file.
    chain: Option<&'a ImageChain<'a>>,
}

/// A file that an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatedFile {
    /// As the image says it.
    pub name: String,
    /// The name of its driver, if the image says that.
    pub format: Option<String>,
}

/// What an inline child takes over from its parent where it does not say otherwise.
#[derive(Clone, Copy)]
struct Inherited<'a> {
    read_only: bool,
    auto_read_only: bool,
    cache_direct: bool,
    cache_no_flush: bool,
    force_share: bool,
    /// The parent decides what is discarded, so an inline child passes on whatever reaches it.
    discard: bool,
    chain: Option<&'a ImageChain<'a>>,
}

impl Inherited<'_> {
    /// Of a node without a parent.
    const TOP: Self = Self {
        read_only: false,
        auto_read_only: false,
        cache_direct: false,
        cache_no_flush: false,
        force_share: false,
        discard: false,
        chain: None,
    };
}

impl Graph {
    /// Opens the node that `options` define, with every inline child, and activates it, unless they say `active=off`. Its
    /// name must be given.
    ///
    /// # Errors
    /// The definition is wrong, a name is taken, or a driver could not open; the error names option, node or file.
    pub fn blockdev_add(&self, options: Options) -> OpenResult<Arc<Node>> {
        if !options.contains("node-name") {
            return Err(OpenError::new(options.missing("node-name")));
        }
        let node = self.open(options, Inherited::TOP)?;
        if let Some(entry) = self.nodes().get_mut(node.name()) {
            entry.owned = Some(node.clone());
        }
        Ok(node)
    }

    /// Opens a node that closes with its last user. It needs no name.
    ///
    /// # Errors
    /// As for [`Graph::blockdev_add`].
    pub fn open_unowned(&self, options: Options) -> OpenResult<Arc<Node>> {
        self.open(options, Inherited::TOP)
    }

    /// Closes a node that [`Graph::blockdev_add`] opened.
    ///
    /// # Errors
    /// There is none of that name, or it is in use; the error names the user.
    pub fn blockdev_del(&self, name: &str) -> OpenResult {
        let node = self.find(name).ok_or_else(|| OpenError(format!("there is no node \"{name}\"")))?;
        self.check_unused(&node)?;
        node.check_operation(Operation::Delete)?;
        let mut nodes = self.nodes();
        let owned = nodes.get_mut(name).and_then(|entry| entry.owned.take());
        drop(nodes);
        match owned {
            Some(_) => Ok(()),
            None => Err(OpenError(format!("node \"{name}\" was not defined by itself; it goes with its last user"))),
        }
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.nodes().get(name).and_then(|entry| entry.node.upgrade())
    }

    /// All nodes, inline children included, in the order of their names.
    pub fn all_nodes(&self) -> Vec<Arc<Node>> {
        self.nodes().values().filter_map(|entry| entry.node.upgrade()).collect()
    }

    /// The throttle groups that nodes and backends name.
    pub fn throttle_groups(&self) -> &ThrottleGroups {
        &self.throttle_groups
    }

    /// The secrets that nodes name.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// Forgets all nodes; they close when their last user lets go.
    pub fn clear(&self) {
        // Dropped without the lock: a driver that closes may look at the graph.
        let nodes = std::mem::take(&mut *self.nodes());
        drop(nodes);
    }

    /// A node over a driver that is no row of the register: one that a test simulates.
    ///
    /// # Errors
    /// As [`Graph::blockdev_add`].
    #[doc(hidden)]
    pub fn add_driver(&self, mut options: Options, driver: Box<dyn BlockDriver>) -> OpenResult<Arc<Node>> {
        let definition = options.clone();
        let name = self.take_name(&mut options).map_err(OpenError::new)?;
        let node = self.node_options(&mut options, name, Inherited::TOP).map_err(OpenError::new)?;
        self.check_name(&node.name)?;
        let node = Node::new(node, definition, "simulated", driver)?;
        self.nodes().insert(node.name().to_owned(), Entry { node: Arc::downgrade(&node), owned: Some(node.clone()) });
        Ok(node)
    }

    fn open(&self, mut options: Options, inherited: Inherited<'_>) -> OpenResult<Arc<Node>> {
        let definition = options.clone();
        let driver = options.require_str("driver").map_err(OpenError::new)?;
        let row = drivers::find(&driver)
            .ok_or_else(|| OpenError::new(options.invalid("driver", &driver, drivers::names().join(", "))))?;
        let name = self.take_name(&mut options).map_err(OpenError::new)?;
        let node = self.node_options(&mut options, name, inherited).map_err(OpenError::new)?;
        self.check_name(&node.name)?;
        let context = OpenContext { graph: self, node: &node, previous: None, chain: inherited.chain };
        let driver: Box<dyn BlockDriver> = (row.open)(&mut options, &context)?;
        options.finish().map_err(OpenError::new)?;
        // Once more: one of its own children, defined with it, may have it now.
        self.check_name(&node.name)?;
        let node = Node::new(node, definition, row.name, driver)?;
        let mut nodes = self.nodes();
        nodes.retain(|_, entry| entry.node.strong_count() > 0);
        nodes.insert(node.name().to_owned(), Entry { node: Arc::downgrade(&node), owned: None });
        Ok(node)
    }

    fn take_name(&self, options: &mut Options) -> crate::options::Result<String> {
        match options.take_str("node-name")? {
            Some(name) if is_valid_id(&name) && name.len() <= 31 => Ok(name),
            Some(name) => {
                let expected = "a letter followed by up to 30 letters, digits, '-', '.' or '_'";
                Err(options.invalid("node-name", name, expected))
            }
            None => Ok(format!("#block{}", self.next_anonymous.fetch_add(1, Ordering::Relaxed))),
        }
    }

    fn node_options(
        &self,
        options: &mut Options,
        name: String,
        inherited: Inherited<'_>,
    ) -> crate::options::Result<NodeOptions> {
        let on_off = [("unmap", true), ("on", true), ("ignore", false), ("off", false)];
        let detect = [("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)];
        let read_only = options.take_bool("read-only")?.unwrap_or(inherited.read_only);
        let force_share = options.take_bool("force-share")?.unwrap_or(inherited.force_share);
        let node = NodeOptions {
            name,
            read_only,
            auto_read_only: options.take_bool("auto-read-only")?.unwrap_or(inherited.auto_read_only),
            discard: options.take_enum("discard", &on_off)?.unwrap_or(inherited.discard),
            detect_zeroes: options.take_enum("detect-zeroes", &detect)?.unwrap_or_default(),
            cache_direct: options.take_bool("cache.direct")?.unwrap_or(inherited.cache_direct),
            cache_no_flush: options.take_bool("cache.no-flush")?.unwrap_or(inherited.cache_no_flush),
            active: options.take_bool("active")?.unwrap_or(true),
            force_share,
            file_name: options.peek_str("filename").map(str::to_owned),
        };
        if node.detect_zeroes == DetectZeroes::Unmap && !node.discard {
            return Err(options.invalid("detect-zeroes", "unmap", "off or on unless discard=unmap is given as well"));
        }
        if force_share && !read_only {
            return Err(options.invalid("force-share", "on", "off unless read-only=on is given as well"));
        }
        Ok(node)
    }
}

impl From<&NodeOptions> for Inherited<'_> {
    /// Of an inline child of such a node.
    fn from(parent: &NodeOptions) -> Self {
        Self {
            read_only: parent.read_only,
            auto_read_only: parent.auto_read_only,
            cache_direct: parent.cache_direct,
            cache_no_flush: parent.cache_no_flush,
            force_share: parent.force_share,
            discard: true,
            chain: None,
        }
    }
}

impl OpenContext<'_> {
    /// The driver that is behind the node so far, if it is being reopened: what lives only in it must be taken over. It
    /// has let its locks go, and takes them again if the reopening fails.
    pub fn previous<T: BlockDriver>(&self) -> Option<&T> {
        let previous: &dyn Any = self.previous?;
        previous.downcast_ref()
    }

    /// Takes the child `key` out of a filter's or format's options: a reference to a node, or one defined inline, which
    /// is opened here. The parent holds no permission on it until it has users itself.
    ///
    /// # Errors
    /// The child is missing, unknown, or could not be opened.
    pub fn child(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Child>> {
        self.edge(self.child_node(options, key)?, EdgeKind { role: key.to_owned(), ..self.edge_kind() })
    }

    /// The same for a format that is only read: its child is opened for reading only.
    ///
    /// # Errors
    /// As for [`OpenContext::child`].
    pub fn read_only_child(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Child>> {
        let inherited = Inherited { read_only: true, auto_read_only: false, ..Inherited::from(self.node) };
        let node = match options.require_child(key).map_err(OpenError::new)? {
            ChildRef::Reference(name) => self.reference(options, key, &name)?,
            ChildRef::Inline(child) => self.graph.open(child, inherited)?,
        };
        self.edge(node, EdgeKind { role: key.to_owned(), only_read: true, ..self.edge_kind() })
    }

    /// Opens a part of the disk that an image names, for reading only, as the child `key`. `file` is the image's own.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn stated_extent(&self, key: &str, file: &Child, name: &str) -> OpenResult<Arc<Child>> {
        let mut child = Options::new();
        let path = backing::resolve(name, file.node().file_name().as_deref())?;
        child.set_str("driver", "file").set_str("filename", path);
        let inherited = Inherited { read_only: true, auto_read_only: false, ..Inherited::from(self.node) };
        let node = self.graph.open(child, inherited)?;
        self.edge(node, EdgeKind { role: key.to_owned(), only_read: true, ..self.edge_kind() })
    }

    /// The same for a filter: it may write past the node's end, as far as whoever stands on the filter may.
    ///
    /// # Errors
    /// As for [`OpenContext::child`].
    pub fn filtered_child(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Child>> {
        self.growing_child(options, key, SECTOR as u32)
    }

    /// The same for a format's file: it grows when written past its end. `granularity` is the unit of all writes in bytes.
    ///
    /// # Errors
    /// As for [`OpenContext::child`].
    pub fn growing_child(&self, options: &mut Options, key: &str, granularity: u32) -> OpenResult<Arc<Child>> {
        let node = self.child_node(options, key)?;
        self.edge(node, EdgeKind { role: key.to_owned(), granularity, may_grow: true, ..self.edge_kind() })
    }

    /// Takes the child `key`, a backing file, out of a format's options. Where they do not define it, it is `current`, if
    /// the node is reopened and had one; else the one that the image states is opened. Options that define it in part are
    /// completed by what the image states. `file` is the image's own.
    ///
    /// # Errors
    /// As for [`OpenContext::child`]; its format is not known, as it is never guessed; the chain of images is a loop.
    pub fn backing_child(
        &self,
        options: &mut Options,
        key: &str,
        file: &Child,
        current: Option<Arc<Node>>,
        stated: Option<StatedFile>,
    ) -> OpenResult<Option<Arc<Child>>> {
        let image = file.node().file_name();
        let image = image.as_deref();
        let chain = ImageChain::new(image, self.chain)?;
        // Read and nothing else.
        let inherited = Inherited {
            read_only: true,
            auto_read_only: false,
            discard: false,
            chain: Some(&chain),
            ..Inherited::from(self.node)
        };
        if options.take_null(key) {
            return Ok(None);
        }
        let node = match (options.take_child(key).map_err(OpenError::new)?, current, stated) {
            (Some(ChildRef::Reference(name)), ..) => self.reference(options, key, &name)?,
            (Some(ChildRef::Inline(child)), _, None) => self.graph.open(child, inherited)?,
            (Some(ChildRef::Inline(child)), _, Some(stated)) => {
                self.graph.open(backing::complete(child, &stated, image)?, inherited)?
            }
            (None, Some(current), _) => current,
            (None, None, Some(stated)) => {
                let opened = self.graph.open(backing::complete(Options::new(), &stated, image)?, inherited);
                opened.map_err(|e| e.context(format_args!("backing file \"{}\"", stated.name)))?
            }
            (None, None, None) => return Ok(None),
        };
        self.edge(node, EdgeKind { role: key.to_owned(), only_read: true, ..self.edge_kind() }).map(Some)
    }

    /// Opens the external data file that an image names, as the child `key`. `file` is the image's own.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn stated_data_file(&self, key: &str, file: &Child, name: &str) -> OpenResult<Arc<Child>> {
        let mut child = Options::new();
        let path = backing::resolve(name, file.node().file_name().as_deref())?;
        child.set_str("driver", "file").set_str("filename", path);
        let node = self.graph.open(child, Inherited::from(self.node))?;
        self.edge(node, EdgeKind { role: key.to_owned(), may_grow: true, ..self.edge_kind() })
    }

    /// The secret `id`, which the option `key` names.
    ///
    /// # Errors
    /// There is none.
    pub fn secret(&self, options: &Options, key: &str, id: &str) -> OpenResult<Secret> {
        let missing =
            || OpenError::new(options.invalid(key, id, "the id of an object of type secret that was defined before"));
        self.graph.secrets.find(id).ok_or_else(missing)
    }

    /// The throttle groups that there are.
    pub(crate) fn throttle_groups(&self) -> &ThrottleGroups {
        self.graph.throttle_groups()
    }

    /// What other processes handed to us.
    pub(crate) fn handover(&self) -> &Handover {
        &self.graph.handover
    }

    fn edge_kind(&self) -> EdgeKind {
        EdgeKind::outside(&format!("node \"{}\"", self.node.name))
    }

    fn edge(&self, node: Arc<Node>, kind: EdgeKind) -> OpenResult<Arc<Child>> {
        Child::new(node, kind, Permissions::UNUSED, Parent::None)
    }

    fn reference(&self, options: &Options, key: &str, name: &str) -> OpenResult<Arc<Node>> {
        self.graph.find(name).ok_or_else(|| {
            OpenError::new(options.invalid(key, name, "the node-name of a node that was defined before"))
        })
    }

    fn child_node(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Node>> {
        match options.require_child(key).map_err(OpenError::new)? {
            ChildRef::Reference(name) => self.reference(options, key, &name),
            ChildRef::Inline(child) => self.graph.open(child, Inherited::from(self.node)),
        }
    }
}
