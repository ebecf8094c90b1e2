//! Task: the images that a verb has open, and the loop on which their requests run. It owns how images are opened, closed
//! and walked; what is done with them is the verbs' business.
//!
//! A verb runs on the main thread, which has the graph of nodes and, for requests, an AioContext of its own.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use blockport_block::aio::{AioContext, AioSettings, PollSettings};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::Options;
use blockport_block::{BlockError, BlockResult, Child, ChildChannel, Graph, Node, PermissionSet, Permissions};

use super::image::{ImageName, Opening, identity};
use super::{CacheName, Failure};

/// What memory for requests is aligned to, for direct I/O.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// The graph and the loop.
pub struct Session {
    pub graph: Graph,
    pub context: AioContext,
}

/// An open image.
pub struct Image {
    /// As the command line names it.
    pub name: String,
    pub node: Arc<Node>,
    pub channel: Rc<ChildChannel>,
    /// Every write is to be stable when it is done.
    pub writes_through: bool,
    child: Arc<Child>,
}

impl Session {
    /// # Errors
    /// There is no event loop to be had.
    pub fn new() -> Result<Self, Failure> {
        // The work waits for the disk and for nothing else: there is nothing to poll for.
        let polling = PollSettings { poll_max_ns: 0, ..PollSettings::default() };
        let context =
            AioContext::new(AioSettings::from(polling)).map_err(|e| format!("no event loop can be made: {e}"))?;
        Ok(Self { graph: Graph::default(), context })
    }

    /// Opens an image.
    ///
    /// # Errors
    /// It cannot be opened, or somebody else uses it; the error names it.
    pub fn open(&self, name: &ImageName, opening: Opening) -> Result<Image, Failure> {
        let options = name.options(opening);
        let options = options.map_err(|e| e.context(format_args!("\"{}\" cannot be opened", name.text)))?;
        self.open_as(name, options, opening)
    }

    /// The same with options of the caller's.
    ///
    /// # Errors
    /// As for [`Session::open`].
    pub fn open_as(&self, name: &ImageName, options: Options, opening: Opening) -> Result<Image, Failure> {
        let named = |error: Failure| error.context(format_args!("\"{}\" cannot be opened", name.text));
        let node = self.graph.open_unowned(options).map_err(|e| named(e.into()))?;
        self.image(&name.text, node, opening).map_err(named)
    }

    /// An image from an open node.
    ///
    /// # Errors
    /// Somebody else uses it.
    fn image(&self, name: &str, node: Arc<Node>, opening: Opening) -> Result<Image, Failure> {
        let mut permissions = Permissions::device(opening.writable);
        if opening.writable {
            permissions.held = permissions.held | PermissionSet::RESIZE;
        }
        let child = Child::attach(node.clone(), "this command", permissions, opening.granularity)?;
        let channel = child.channel(&self.context)?;
        Ok(Image::new(name, node, channel, child, opening.cache))
    }

    /// Runs work to its end.
    pub fn run<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> T {
        self.context.run_until(work)
    }

    /// Changes the size of an image's disk.
    ///
    /// # Errors
    /// The driver cannot; the error names the image.
    pub fn resize(&self, image: &mut Image, bytes: u64) -> Result<(), Failure> {
        let named = |e| Failure::from(e).context(format_args!("\"{}\"", image.name));
        image.node.resize(bytes).map_err(named)?;
        image.channel = image.child.channel(&self.context).map_err(named)?;
        Ok(())
    }

    /// Makes all stable and closes the image.
    ///
    /// # Errors
    /// Something could not be written.
    pub fn close(&self, image: Image) -> Result<(), Failure> {
        let Image { name, node, channel, child, .. } = image;
        let flushed = match node.is_read_only() {
            true => Ok(()),
            false => self.run(async move { channel.flush().await }),
        };
        flushed.map_err(|e| format!("\"{name}\" cannot be flushed: {e}"))?;
        drop(child);
        Ok(node.inactivate().map_err(|e| format!("\"{name}\" cannot be closed: {e}"))?)
    }
}

impl Image {
    /// From its parts.
    pub fn new(name: &str, node: Arc<Node>, channel: Rc<ChildChannel>, child: Arc<Child>, cache: CacheName) -> Self {
        Self { name: name.to_owned(), node, channel, child, writes_through: cache.writes_through() }
    }

    /// Another channel, which sees what has changed.
    ///
    /// # Errors
    /// The driver cannot.
    pub fn fresh_channel(&self, session: &Session) -> Result<Rc<ChildChannel>, Failure> {
        Ok(self.child.channel(&session.context)?)
    }

    /// The size of the disk in bytes.
    pub fn length(&self) -> u64 {
        self.node.length()
    }

    /// Fails if the file at `path` is one of those that the image, or what is behind it, consists of.
    pub fn is_not_at(&self, path: &str) -> Result<(), Failure> {
        let Some(place) = identity(path) else { return Ok(()) };
        let files = files_of(&self.node);
        match files.iter().find(|file| identity(file) == Some(place)) {
            Some(file) if file == path => Err(format!("\"{path}\" is read here, and must not be written over").into()),
            Some(file) => {
                Err(format!("\"{path}\" is the file \"{file}\", which is read here: it must not be written over")
                    .into())
            }
            None => Ok(()),
        }
    }
}

/// All files below a node.
pub fn files_of(node: &Arc<Node>) -> Vec<String> {
    let mut files: Vec<String> = node.file_name().into_iter().collect();
    for child in node.driver().children() {
        files.extend(files_of(&child.node()));
    }
    files
}

/// The child of a node in that role.
pub fn child_node(node: &Node, role: &str) -> Option<Arc<Node>> {
    node.driver().children().iter().find(|child| child.role() == role).map(|child| child.node())
}

/// The file that an image is in.
pub fn own_file(node: &Arc<Node>) -> Option<String> {
    node.file_name().or_else(|| own_file(&child_node(node, "file")?))
}

/// Memory for a request.
pub fn buffer(bytes: usize) -> AlignedBuffer {
    AlignedBuffer::new(bytes, BUFFER_ALIGNMENT)
}

/// Reads into the start of `buffer`; zeroes past the end of the disk.
pub async fn read_padded(channel: &Rc<ChildChannel>, offset: u64, bytes: u64, buffer: &AlignedBuffer) -> BlockResult {
    let there = channel.length().saturating_sub(offset).min(bytes);
    let length = |bytes: u64| usize::try_from(bytes).map_err(|_| BlockError::OutOfRange);
    let iov = buffer.iov();
    if there > 0 {
        channel.preadv(offset, &[iov.part(0, length(there)?)]).await?;
    }
    blockport_block::iovec::fill(&[iov.part(length(there)?, length(bytes - there)?)], 0);
    Ok(())
}
