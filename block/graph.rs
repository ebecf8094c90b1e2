//! Graph: the opened nodes by name. It owns the options that all nodes share and how a definition becomes nodes,
//! children first; what a driver's own options mean is the driver's business.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::child::Child;
use crate::driver::BlockDriver;
use crate::drivers;
use crate::error::{OpenError, OpenResult};
use crate::node::{DetectZeroes, Node, NodeOptions};
use crate::options::{ChildRef, Options, is_valid_id};
use crate::permissions::Permissions;
use crate::throttle::ThrottleGroups;

/// The named nodes of a process.
#[derive(Default)]
pub struct Graph {
    nodes: Mutex<BTreeMap<String, Arc<Node>>>,
    next_anonymous: AtomicU64,
    throttle_groups: ThrottleGroups,
}

/// What a driver is opened with, besides its own options.
pub struct OpenContext<'a> {
    graph: &'a Graph,
    /// The options that every node has.
    pub node: &'a NodeOptions,
}

/// What an inline child takes over from its parent where it does not say otherwise.
#[derive(Clone, Copy)]
struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    cache_direct: bool,
    cache_no_flush: bool,
    force_share: bool,
    /// The parent decides what is discarded, so an inline child passes on whatever reaches it.
    discard: bool,
}

impl Graph {
    /// Opens the node that `options` define, with every inline child, and activates it. Its name must be given.
    ///
    /// # Errors
    /// The definition is wrong, a name is taken, or a driver could not open; the error names option, node or file.
    pub fn blockdev_add(&self, options: Options) -> OpenResult<Arc<Node>> {
        if !options.contains("node-name") {
            return Err(OpenError::new(options.missing("node-name")));
        }
        let top = Inherited {
            read_only: false,
            auto_read_only: false,
            cache_direct: false,
            cache_no_flush: false,
            force_share: false,
            discard: false,
        };
        let before: BTreeSet<String> = self.nodes().keys().cloned().collect();
        let result = self.open(options, top);
        if result.is_err() {
            // Inline children that had been opened go with it.
            self.nodes().retain(|name, _| before.contains(name));
        }
        result
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.nodes().get(name).cloned()
    }

    /// The throttle groups that nodes and backends name.
    pub fn throttle_groups(&self) -> &ThrottleGroups {
        &self.throttle_groups
    }

    /// Forgets all nodes; they close when their last user lets go.
    pub fn clear(&self) {
        self.nodes().clear();
    }

    fn open(&self, mut options: Options, inherited: Inherited) -> OpenResult<Arc<Node>> {
        let driver = options.require_str("driver").map_err(OpenError::new)?;
        let row = drivers::find(&driver)
            .ok_or_else(|| OpenError::new(options.invalid("driver", &driver, drivers::names().join(", "))))?;
        let node = self.node_options(&mut options, inherited).map_err(OpenError::new)?;
        if self.find(&node.name).is_some() {
            return Err(OpenError(format!("node-name \"{}\" is taken", node.name)));
        }
        let context = OpenContext { graph: self, node: &node };
        let driver: Box<dyn BlockDriver> = (row.open)(&mut options, &context)?;
        options.finish().map_err(OpenError::new)?;
        let name = node.name.clone();
        let node = Node::new(node, row.name, driver)?;
        match self.nodes().entry(name) {
            // One of its own children, defined with it.
            Entry::Occupied(taken) => Err(OpenError(format!("node-name \"{}\" is taken", taken.key()))),
            Entry::Vacant(free) => Ok(free.insert(node).clone()),
        }
    }

    fn node_options(&self, options: &mut Options, inherited: Inherited) -> crate::options::Result<NodeOptions> {
        let name = match options.take_str("node-name")? {
            Some(name) if is_valid_id(&name) && name.len() <= 31 => name,
            Some(name) => {
                let expected = "a letter followed by up to 30 letters, digits, '-', '.' or '_'";
                return Err(options.invalid("node-name", name, expected));
            }
            None => format!("#block{}", self.next_anonymous.fetch_add(1, Ordering::Relaxed)),
        };
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
            force_share,
        };
        if node.detect_zeroes == DetectZeroes::Unmap && !node.discard {
            return Err(options.invalid("detect-zeroes", "unmap", "off or on unless discard=unmap is given as well"));
        }
        if force_share && !read_only {
            return Err(options.invalid("force-share", "on", "off unless read-only=on is given as well"));
        }
        options.take_unsupported(&["active"])?;
        Ok(node)
    }
}

impl OpenContext<'_> {
    /// Takes the child `key` out of a filter's or format's options: a reference to a node, or one defined inline, which
    /// is opened here. The parent holds no permission on it until it has users itself.
    ///
    /// # Errors
    /// The child is missing, unknown, or could not be opened.
    pub fn child(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Child>> {
        self.child_node(options, key)
            .and_then(|node| Child::attach(node, &self.user(), Permissions::UNUSED, crate::node::SECTOR as u32))
    }

    /// The same for a format's file: it is written in bytes, and grows when written past its end.
    ///
    /// # Errors
    /// As for [`OpenContext::child`].
    pub fn growing_child(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Child>> {
        self.child_node(options, key).and_then(|node| Child::attach_growing(node, &self.user(), Permissions::UNUSED))
    }

    /// The throttle groups that there are.
    pub(crate) fn throttle_groups(&self) -> &ThrottleGroups {
        self.graph.throttle_groups()
    }

    fn user(&self) -> String {
        format!("node \"{}\"", self.node.name)
    }

    fn child_node(&self, options: &mut Options, key: &str) -> OpenResult<Arc<Node>> {
        match options.require_child(key).map_err(OpenError::new)? {
            ChildRef::Reference(name) => self.graph.find(&name).ok_or_else(|| {
                OpenError::new(options.invalid(key, &name, "the node-name of a node that was defined before"))
            }),
            ChildRef::Inline(child) => {
                let inherited = Inherited {
                    read_only: self.node.read_only,
                    auto_read_only: self.node.auto_read_only,
                    cache_direct: self.node.cache_direct,
                    cache_no_flush: self.node.cache_no_flush,
                    force_share: self.node.force_share,
                    discard: true,
                };
                self.graph.open(child, inherited)
            }
        }
    }
}
