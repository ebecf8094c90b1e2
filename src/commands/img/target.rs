//! Target: new images. It owns how a file becomes an image: under its locks, emptied, and taken away again if what was to
//! be written to it is not whole.

use std::fs::OpenOptions;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::rc::Rc;

use blockport_block::drivers::qcow2::{self, CreateOptions, new_image};
use blockport_block::options::Options;
use blockport_block::{BlockResult, Child, ChildChannel, PermissionSet, Permissions, resolve_path};
use clap::ValueEnum;
use nix::fcntl::{FallocateFlags, fallocate};

use super::Failure;
use super::format::Format;
use super::image::{CacheName, ImageName, Opening, identity};
use super::task::{Image, Session, buffer};

/// What the space of a new image is given at once.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing
    #[default]
    Off,
    /// A place in the image for all of it
    Metadata,
    /// The same, and space on the host
    Falloc,
    /// The same, by writing zeroes
    Full,
}

/// How much is written at a time.
const CHUNK: usize = 2 << 20;

impl Preallocation {
    pub const NAMES: [(&str, Self); 4] =
        [("off", Self::Off), ("metadata", Self::Metadata), ("falloc", Self::Falloc), ("full", Self::Full)];

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, how)| *how == self).map_or("off", |(name, _)| name)
    }

    pub fn of_qcow2(self) -> qcow2::Preallocation {
        match self {
            Self::Off => qcow2::Preallocation::Off,
            Self::Metadata => qcow2::Preallocation::Metadata,
            Self::Falloc => qcow2::Preallocation::Falloc,
            Self::Full => qcow2::Preallocation::Full,
        }
    }

    /// Gives a range of a raw image its space.
    ///
    /// # Errors
    /// The image is no raw file, or the host has no such space.
    pub fn fill(self, session: &Session, image: &Image, range: Range<u64>) -> Result<(), Failure> {
        if self == Self::Off {
            return Ok(());
        }
        let path = image.node.driver().children().first().and_then(|child| child.node().file_name());
        let path = path.filter(|_| image.node.driver_name() == "raw");
        let path = path
            .ok_or_else(|| format!("\"{}\": preallocation={} is not supported for it yet", image.name, self.name()))?;
        match self {
            Self::Off => Ok(()),
            Self::Metadata => Err("preallocation=metadata is for qcow2".into()),
            Self::Falloc => allocate(&path, range),
            Self::Full => {
                let channel = image.channel.clone();
                let written = session.run(write_zeroes(channel, range));
                Ok(written.map_err(|e| format!("\"{path}\" cannot be filled: {e}"))?)
            }
        }
    }
}

/// Has the host set space aside.
fn allocate(path: &str, range: Range<u64>) -> Result<(), Failure> {
    let file = OpenOptions::new().write(true).open(path).map_err(|e| format!("\"{path}\": {e}"))?;
    let (offset, length) = (range.start as libc::off_t, (range.end - range.start) as libc::off_t);
    if length > 0 {
        fallocate(file.as_fd(), FallocateFlags::empty(), offset, length)
            .map_err(|e| format!("\"{path}\": {length} bytes cannot be set aside: {e}"))?;
    }
    Ok(())
}

async fn write_zeroes(channel: Rc<ChildChannel>, range: Range<u64>) -> BlockResult {
    let zeroes = buffer(CHUNK);
    let mut at = range.start;
    while at < range.end {
        let bytes = (range.end - at).min(CHUNK as u64);
        channel.pwritev(at, &[zeroes.iov().part(0, bytes as usize)], Default::default()).await?;
        at += bytes;
    }
    Ok(())
}

/// A file that was made and is not whole yet: it is removed, unless it is kept.
#[derive(Debug, Default)]
pub struct Made(Vec<(String, Option<(u64, u64)>)>);

impl Made {
    /// All that was to be written is there.
    pub fn keep(mut self) {
        self.0.clear();
    }

    fn add(&mut self, path: &str) {
        self.0.push((path.to_owned(), identity(path)));
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for (path, place) in &self.0 {
            // Somebody may have put something else there.
            if identity(path) == *place
                && let Err(error) = std::fs::remove_file(path)
            {
                super::complain(format_args!("\"{path}\" is not whole, and cannot be removed: {error}"));
            }
        }
    }
}

/// Makes a new image with a disk of `size` bytes at `path`.
///
/// # Errors
/// The file cannot be made or is in use, or an option is wrong; nothing new is left then.
pub fn create(session: &Session, path: &str, format: &Format, size: u64) -> Result<Made, Failure> {
    let mut made = Made::default();
    match &format.qcow2 {
        None => {
            let image = open_new(session, &mut made, path, Some(size))?;
            match format.preallocation {
                Preallocation::Off | Preallocation::Metadata => {}
                Preallocation::Falloc => allocate(path, 0..size)?,
                Preallocation::Full => {
                    let written = session.run(write_zeroes(image.channel.clone(), 0..size));
                    written.map_err(|e| format!("\"{path}\" cannot be filled: {e}"))?;
                }
            }
            session.close(image)?;
        }
        Some(_) => {
            let options = format.qcow2_options(size);
            let bytes = new_image(&options).map_err(|e| Failure::from(e).context(format_args!("\"{path}\"")))?;
            if let Some(name) = &options.data_file {
                let data = resolve_path(name, Some(path))?;
                if identity(&data).is_some() && identity(&data) == identity(path) {
                    return Err(format!("\"{path}\" cannot be an image and the file of its data as well").into());
                }
                let image = open_new(session, &mut made, &data, Some(size))?;
                session.close(image)?;
            }
            let image = open_new(session, &mut made, path, None)?;
            if options.preallocation != qcow2::Preallocation::Off {
                session.close(image)?;
                preallocate(session, path, &options)?;
                return Ok(made);
            }
            let channel = image.channel.clone();
            let written = session.run(async move {
                let mut head = buffer(bytes.len());
                head.fill_from(&bytes);
                channel.pwritev(0, &[head.iov()], Default::default()).await
            });
            written.map_err(|e| format!("\"{path}\" cannot be written: {e}"))?;
            session.close(image)?;
        }
    }
    Ok(made)
}

/// Makes a qcow2 image whose clusters have their places from the start.
fn preallocate(session: &Session, path: &str, options: &CreateOptions) -> Result<(), Failure> {
    const NODES: [&str; 2] = ["new-image", "new-data"];
    let data = options.data_file.as_ref().map(|name| resolve_path(name, Some(path))).transpose()?;
    let mut nodes = Vec::new();
    for (name, path) in NODES.iter().zip([Some(path), data.as_deref()]) {
        if let Some(path) = path {
            let mut node = ImageName::file(path, Some("file".to_owned())).options(Opening {
                writable: true,
                cache: CacheName::Unsafe,
                ..Opening::default()
            })?;
            node.set_str("node-name", *name);
            nodes.push(session.graph.open_unowned(node)?);
        }
    }
    let data = data.map(|_| NODES[1]);
    Ok(qcow2::create(&session.graph, NODES[0], data, options).map_err(|e| e.context(format_args!("\"{path}\"")))?)
}

/// Opens the file for a new image, alone, and empties it; it has `size` bytes then. A block device keeps what it has.
fn open_new(session: &Session, made: &mut Made, path: &str, size: Option<u64>) -> Result<Image, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::from(format!("\"{path}\" cannot be made: {e}"));
    let meta = std::fs::metadata(path);
    let is_device = meta.as_ref().is_ok_and(|meta| meta.file_type().is_block_device());
    if meta.is_err() {
        OpenOptions::new().write(true).create_new(true).open(path).map_err(|e| failed(&e))?;
        made.add(path);
    }
    let mut options = Options::new().with_subject(format!("image {path:?}"));
    options
        .set_str("driver", if is_device { "host_device" } else { "file" })
        .set_str("filename", path)
        .set_str("discard", "unmap")
        // Nobody reads it before it is whole.
        .set_bool("cache.no-flush", true);
    let node = session.graph.open_unowned(options).map_err(|e| failed(&e))?;
    let permissions = Permissions {
        held: PermissionSet::CONSISTENT_READ | PermissionSet::WRITE | PermissionSet::RESIZE,
        shared: PermissionSet::NONE,
    };
    let child = Child::attach_growing(node.clone(), "this command", permissions, 1).map_err(|e| failed(&e))?;
    if is_device {
        if let Some(size) = size.filter(|size| *size > node.length()) {
            return Err(failed(&format_args!("the device has {} bytes, and {size} are needed", node.length())));
        }
    } else {
        if meta.is_ok() {
            // Once it is emptied, it is ours.
            made.add(path);
        }
        node.resize(0).map_err(|e| failed(&e))?;
        node.resize(size.unwrap_or(0)).map_err(|e| failed(&e))?;
    }
    let channel = child.channel(&session.context)?;
    Ok(Image::new(path, node, channel, child, CacheName::Unsafe))
}
