//! `img convert`: an image, or several one behind the other, as a new image in another format. It owns what the arguments
//! mean together; `copy.rs` moves the bytes.

use std::rc::Rc;

use blockport_block::driver::BoxFuture;
use blockport_block::drivers::qcow2;
use blockport_block::iovec::IoVec;
use blockport_block::options::parse_keyval;
use blockport_block::{BlockError, BlockResult, ChildChannel, resolve_path};
use clap::Args;

use super::copy::{Part, Settings, Source, What, copy};
use super::format::{self, Format};
use super::image::{CacheName, ImageArgs, ImageName, Opening, format_by_name};
use super::progress::Progress;
use super::target::Made;
use super::task::{Image, Session, child_node};
use super::{Failure, Outcome, say, target, units};

/// How many requests there may be at a time.
const PARALLEL_MAX: i64 = 64;

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The format of the new image [default: told by the end of its name, as .qcow2, else raw]
    #[arg(short = 'O', long, value_name = "DRIVER")]
    target_format: Option<String>,

    /// Options of the new image's format, as KEY=VALUE,...; `-o help` lists them
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    target_options: Vec<String>,

    /// The new image is given as options of a node rather than by its file name; needs -n
    #[arg(long, requires = "no_create", conflicts_with = "target_format")]
    target_image_opts: bool,

    /// The new image holds only what differs from this one, which is behind it
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,

    /// The format of the image behind it, which is never guessed
    #[arg(short = 'F', long, value_name = "DRIVER")]
    backing_format: Option<String>,

    /// Store the clusters of the new image compressed
    #[arg(short, long)]
    compress: bool,

    /// Write to an image that is there already, and large enough
    #[arg(short, long)]
    no_create: bool,

    /// The image that is there reads as zeroes everywhere
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,

    /// Take what the image was at a snapshot: its id or name, or snapshot.id=ID, or snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    source_snapshot: Option<String>,

    /// So many zero bytes at a time take no room in the new image; 0: all of it takes room
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k")]
    sparse_size: String,

    /// How many requests there are at a time
    #[arg(short = 'm', long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=PARALLEL_MAX))]
    parallel: u16,

    /// Let writes begin in any order, which may be faster and makes no order on the disk
    #[arg(short = 'W', long)]
    oob_writes: bool,

    /// Copy the bitmaps as well
    #[arg(long)]
    bitmaps: bool,

    /// Leave out bitmaps that are not up to date
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// Take for zero what cannot be read
    #[arg(long)]
    salvage: bool,

    /// How the host caches the images that are read
    #[arg(short = 'T', long, value_name = "MODE", value_enum, default_value = "writeback")]
    source_cache: CacheName,

    /// How the host caches the new image
    #[arg(short = 't', long, value_name = "MODE", value_enum, default_value = "unsafe")]
    target_cache: CacheName,

    /// Show how far it has come
    #[arg(short, long)]
    progress: bool,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// The images to read, then the new image
    #[arg(value_name = "FILENAME", num_args = 2.., required = true)]
    filenames: Vec<String>,
}

impl ConvertArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let Some((path, sources)) = self.filenames.split_last() else { return Err("the images are missing".into()) };
        let driver = self.target_format.clone().unwrap_or_else(|| format_by_name(path).to_owned());
        if format::is_question(&self.target_options)
            && let Some(help) = format::help(&driver)
        {
            say(help)?;
            return Ok(0);
        }
        let session = Session::new()?;
        let opening = Opening { cache: self.source_cache, ..self.image.reading() };
        let open = |text: &String| session.open(&self.image.name(text.as_str()), opening);
        let images: Vec<Image> = sources.iter().map(open).collect::<Result<_, _>>()?;
        if let Some(snapshot) = &self.source_snapshot {
            let [image] = images.as_slice() else { return Err("-l is for one image".into()) };
            qcow2::snapshot_load(&image.node, &snapshot_name(snapshot)?)?;
        }
        if !self.target_image_opts {
            images.iter().try_for_each(|image| image.is_not_at(path))?;
        }
        let source = Concatenated::new(&session, &images)?;
        let length = source.length;

        let (made, target) = self.open_target(&session, path, &driver, length)?;
        if target.length() < length {
            return Err(format!("\"{path}\" has {} bytes, and {length} are needed", target.length()).into());
        }
        images.iter().try_for_each(|image| {
            super::task::files_of(&target.node).iter().take(1).try_for_each(|file| image.is_not_at(file))
        })?;
        let behind = child_node(&target.node, "backing").map(|node| node.length());
        let is_device = super::task::own_file(&target.node).is_some_and(|file| super::image::is_device(&file));
        let sparse = units::size("-S", &self.sparse_size)?;
        let settings = Settings {
            parallel: self.parallel.into(),
            any_order: self.oob_writes,
            sparse,
            zero_from: match behind {
                _ if sparse == 0 => None,
                _ if self.no_create => self.target_is_zero.then_some(0),
                Some(behind) => Some(behind),
                None if is_device => None,
                None => Some(0),
            },
            compressed: self.compress,
            salvage: self.salvage,
        };
        let source = Rc::new(Concatenated { over_backing: !self.no_create && behind.is_some(), ..source });
        let progress = Progress::new(self.progress && !self.quiet, length);
        copy(&session, source, &target, settings, progress)?;
        if self.bitmaps {
            self.copy_bitmaps(&images, &target)?;
        }
        session.close(target)?;
        made.keep();
        Ok(0)
    }

    /// Makes the new image, unless it is there, and opens it.
    fn open_target(&self, session: &Session, path: &str, driver: &str, length: u64) -> Result<(Made, Image), Failure> {
        let opening = Opening { writable: true, cache: self.target_cache, ..Opening::default() };
        if self.no_create {
            if self.backing.is_some() || !self.target_options.is_empty() {
                return Err("-B and -o are for images that are made here, and -n makes none".into());
            }
            let stated = (!self.target_image_opts).then(|| driver.to_owned());
            let name = ImageName { text: path.to_owned(), format: stated, is_options: self.target_image_opts };
            return Ok((Made::default(), session.open(&name, opening)?));
        }
        let mut format = Format::parse(driver, &self.target_options)?;
        if let Some(name) = &self.backing {
            format.set_backing(name, self.backing_format.as_deref())?;
        }
        if let Some((name, stated)) = &format.backing {
            let stated = stated.clone().ok_or_else(|| {
                Failure::from(format!(
                    "the format of the image behind it, \"{name}\", is not stated and is never guessed: give -F"
                ))
            })?;
            let place = if name.starts_with("json:") { name.clone() } else { resolve_path(name, Some(path))? };
            session.open(&ImageName::file(place, Some(stated)), Opening::default())?.is_not_at(path)?;
        }
        let size = format.size.unwrap_or(length);
        let made = target::create(session, path, &format, size.next_multiple_of(512))?;
        let image = session.open(&ImageName::file(path, Some(driver.to_owned())), opening)?;
        Ok((made, image))
    }

    fn copy_bitmaps(&self, images: &[Image], target: &Image) -> Result<(), Failure> {
        let [image] = images else { return Err("--bitmaps is for one image".into()) };
        if qcow2::info(&image.node).is_ok_and(|info| info.bitmaps == 0) {
            return Ok(());
        }
        for bitmap in qcow2::bitmaps(&image.node)? {
            let name = &bitmap.name;
            if bitmap.inconsistent || bitmap.unknown {
                if self.skip_broken_bitmaps {
                    super::complain(format_args!("the bitmap \"{name}\" is not up to date, and is left out"));
                    continue;
                }
                return Err(
                    format!("the bitmap \"{name}\" is not up to date; --skip-broken-bitmaps leaves it out").into()
                );
            }
            let new = qcow2::NewBitmap { name: name.clone(), granularity: Some(bitmap.granularity), enabled: false };
            qcow2::bitmap_add(&target.node, &new)?;
            qcow2::bitmap_merge(&target.node, name, &image.node, name)?;
            qcow2::bitmap_enable(&target.node, name, bitmap.enabled)?;
        }
        Ok(())
    }
}

/// The id or name in `snapshot.id=…`, `snapshot.name=…` or as it stands.
pub fn snapshot_name(text: &str) -> Result<String, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(text.to_owned());
    }
    let mut options = parse_keyval(text, None)?.with_subject("-l");
    let id = options.take_str("snapshot.id")?;
    let name = options.take_str("snapshot.name")?;
    options.finish()?;
    Ok(id.or(name).ok_or("-l: snapshot.id or snapshot.name is missing")?)
}

/// Images one behind the other.
struct Concatenated {
    /// Each with the offset at which it begins, and how far what is behind it reaches.
    parts: Vec<(u64, Rc<ChildChannel>, u64)>,
    length: u64,
    /// What the topmost layer does not store is behind the target, too.
    over_backing: bool,
}

impl Concatenated {
    fn new(session: &Session, images: &[Image]) -> Result<Self, Failure> {
        let mut parts = Vec::new();
        let mut length = 0u64;
        for image in images {
            // Made anew, for it may be a snapshot with a size of its own by now.
            let channel = image.fresh_channel(session)?;
            let bytes = channel.length();
            let behind = child_node(&image.node, "backing").map_or(0, |node| node.length());
            parts.push((length, channel, behind));
            length = length
                .checked_add(bytes)
                .filter(|length| *length <= i64::MAX as u64)
                .ok_or("the images together are too large")?;
        }
        Ok(Self { parts, length, over_backing: false })
    }

    /// The image in which an offset lies, the offset there, and how many bytes follow.
    fn place(&self, offset: u64) -> BlockResult<(Rc<ChildChannel>, u64, u64)> {
        let (start, channel, _) = self.at(offset)?;
        Ok((channel.clone(), offset - start, channel.length() - (offset - start)))
    }

    fn at(&self, offset: u64) -> BlockResult<&(u64, Rc<ChildChannel>, u64)> {
        let lies_in =
            |(start, channel, _): &&(u64, Rc<ChildChannel>, u64)| *start <= offset && offset - start < channel.length();
        self.parts.iter().rev().find(lies_in).ok_or(BlockError::OutOfRange)
    }
}

impl Source for Concatenated {
    fn length(&self) -> u64 {
        self.length
    }

    fn part(self: Rc<Self>, offset: u64, bytes: u64) -> BoxFuture<BlockResult<Part>> {
        Box::pin(async move {
            let (channel, at, rest) = self.place(offset)?;
            let behind = self.at(offset)?.2;
            // What is behind this image ends where a part ends.
            let most = if self.over_backing && at < behind { rest.min(behind - at) } else { rest };
            let status = channel.block_status(at, bytes.min(most)).await?;
            let what = match (status.zero, status.allocated) {
                (_, false) if self.over_backing && at < behind => What::Skip,
                (true, _) => What::Zero,
                (false, _) => What::Data,
            };
            Ok(Part { bytes: status.bytes, what })
        })
    }

    fn read(self: Rc<Self>, offset: u64, iov: IoVec) -> BoxFuture<BlockResult> {
        Box::pin(async move {
            let mut done = 0;
            while done < iov.len() {
                let (channel, at, rest) = self.place(offset + done as u64)?;
                let bytes = (iov.len() - done).min(usize::try_from(rest).unwrap_or(usize::MAX));
                channel.preadv(at, &[iov.part(done, bytes)]).await?;
                done += bytes;
            }
            Ok(())
        })
    }
}
