//! `img rebase`: another image behind an image, which keeps its contents. It owns what has to be copied for that; the
//! driver changes the name.

use std::rc::Rc;

use blockport_block::driver::BoxFuture;
use blockport_block::drivers::qcow2;
use blockport_block::iovec::{self, IoVec};
use blockport_block::options::Options;
use blockport_block::{BlockResult, ChildChannel, resolve_path};
use clap::Args;

use super::commit::stated_backing;
use super::copy::{CHUNK, Part, Settings, Source, What, both, copy};
use super::image::{CacheName, ImageArgs, ImageName, Opening, identity};
use super::progress::Progress;
use super::task::{Image, Session, buffer, files_of, own_file};
use super::{Failure, Outcome};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct RebaseArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The image that is to be behind it; a relative name is so to the image; "" for none
    #[arg(short, long, value_name = "FILE", visible_alias = "base")]
    backing: Option<String>,

    /// The format of that, which is never guessed
    #[arg(short = 'F', long, value_name = "DRIVER")]
    backing_format: Option<String>,

    /// Change the name and nothing else: the contents are the user's business; without -b there is none then
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// Store what has to be copied compressed
    #[arg(short, long)]
    compress: bool,

    /// How the host caches the image
    #[arg(short = 't', long, value_name = "MODE", value_enum, default_value = "writeback")]
    cache: CacheName,

    /// How the host caches the images behind
    #[arg(short = 'T', long, value_name = "MODE", value_enum, default_value = "writeback")]
    backing_cache: CacheName,

    /// Show how far it has come
    #[arg(short, long)]
    progress: bool,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// The image
    filename: String,
}

impl RebaseArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let new = self.backing.as_deref().filter(|name| !name.is_empty());
        let name_alone = self.backing_unsafe;
        if self.backing.is_none() && !name_alone {
            return Err("-b is missing: the image that is to be behind it, or \"\" for none".into());
        }
        if new.is_some() && self.backing_format.is_none() {
            return Err("-F is missing: the format of the image behind is never guessed".into());
        }
        let session = Session::new()?;
        let opening = Opening { writable: true, cache: self.cache, alone: name_alone, ..self.image.reading() };
        let name = self.image.name(&self.filename);
        if name.driver() != "qcow2" {
            return Err(format!(
                "\"{}\": an image of the format {} has nothing behind it",
                self.filename,
                name.driver()
            )
            .into());
        }
        let new_name = new.map(|name| (name, self.backing_format.as_deref()));
        let image = if name_alone {
            session.open(&name, opening)?
        } else {
            self.copy_difference(&session, &name, opening, new)?
        };
        qcow2::set_backing(&image.node, new_name)?;
        session.close(image)?;
        Ok(0)
    }

    /// Opens the image over the one that is to be behind it, and copies what that would show otherwise.
    fn copy_difference(
        &self,
        session: &Session,
        name: &ImageName,
        opening: Opening,
        new: Option<&str>,
    ) -> Result<Image, Failure> {
        let behind = Opening { cache: self.backing_cache, ..Opening::default() };
        let (own, stated) = {
            let alone = session.open(name, Opening { alone: true, writable: false, ..opening })?;
            (own_file(&alone.node), stated_backing(&alone)?)
        };
        let old = stated.map(|stated| session.open(&stated, behind)).transpose()?;
        let new = match new {
            None => None,
            Some(new) => {
                let is_own = |path: &str| {
                    own.as_deref().is_some_and(|own| identity(own).is_some() && identity(own) == identity(path))
                };
                let path = if new.starts_with("json:") { new.to_owned() } else { resolve_path(new, own.as_deref())? };
                // Before it is opened, which the image's own locks would refuse with less to say.
                if is_own(&path) {
                    return Err(format!("\"{}\" cannot be behind itself", self.filename).into());
                }
                let stated = ImageName::file(path, self.backing_format.clone());
                let image = session.open(&stated, behind)?;
                if files_of(&image.node).iter().any(|file| is_own(file)) {
                    return Err(format!("\"{}\" is behind \"{new}\" already", self.filename).into());
                }
                Some((stated, image))
            }
        };
        let mut options = name.options(opening)?.to_json();
        options["backing"] = match &new {
            Some((stated, _)) => stated.options(behind)?.to_json(),
            None => serde_json::Value::Null,
        };
        let image = session.open_as(name, Options::from_json(options)?, opening)?;
        let length = image.length();
        let channel = |image: &Image| image.channel.clone();
        let source = Rc::new(Difference {
            image: channel(&image),
            old: old.as_ref().map(channel),
            new: new.as_ref().map(|(_, image)| channel(image)),
        });
        let settings = Settings { compressed: self.compress, ..Settings::default() };
        copy(session, source, &image, settings, Progress::new(self.progress && !self.quiet, length))?;
        let channel = channel(&image);
        let flushed = session.run(async move { channel.flush().await });
        flushed.map_err(|e| format!("\"{}\" cannot be flushed: {e}", self.filename))?;
        Ok(image)
    }
}

/// What an image has shown of the images behind it, as far as those that are behind it now show something else.
struct Difference {
    image: Rc<ChildChannel>,
    old: Option<Rc<ChildChannel>>,
    new: Option<Rc<ChildChannel>>,
}

/// Whether an image, if there is one, reads as zeroes, and for how many bytes that, or the opposite, holds.
async fn zeroes(image: Option<&Rc<ChildChannel>>, offset: u64, bytes: u64) -> BlockResult<(bool, u64)> {
    match image {
        Some(image) if offset < image.length() => {
            let status = image.block_status(offset, bytes).await?;
            Ok((status.zero, status.bytes))
        }
        _ => Ok((true, bytes)),
    }
}

/// Reads an image, if there is one; zeroes otherwise, and past its end.
async fn read(image: Option<&Rc<ChildChannel>>, offset: u64, iov: IoVec) -> BlockResult {
    let length = image.map_or(0, |image| image.length());
    let there = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX).min(iov.len());
    iovec::fill(&[iov.part(there, iov.len() - there)], 0);
    match image {
        Some(image) if there > 0 => image.preadv(offset, &[iov.part(0, there)]).await,
        _ => Ok(()),
    }
}

impl Difference {
    /// Whether both show the same from `offset` on, and for how many bytes that, or the opposite, holds.
    async fn compare(&self, offset: u64, bytes: u64) -> BlockResult<(bool, u64)> {
        let cluster = u64::from(self.image.limits().cluster_size).max(4096);
        let bytes = bytes.min(CHUNK - offset % CHUNK);
        let buffers = [buffer(bytes as usize), buffer(bytes as usize)];
        let old = read(self.old.as_ref(), offset, buffers[0].iov());
        let (old, new) = both(old, read(self.new.as_ref(), offset, buffers[1].iov())).await;
        old.and(new)?;
        let contents = buffers.each_ref().map(|buffer| buffer.to_vec());
        let mut found: Option<bool> = None;
        let mut at = 0;
        while at < bytes {
            let stop = ((offset + at + 1).next_multiple_of(cluster) - offset).min(bytes);
            let range = at as usize..stop as usize;
            let same = contents[0][range.clone()] == contents[1][range];
            if found.is_some_and(|found| found != same) {
                break;
            }
            found = Some(same);
            at = stop;
        }
        Ok((found.unwrap_or(true), at))
    }
}

impl Source for Difference {
    fn length(&self) -> u64 {
        self.image.length()
    }

    fn part(self: Rc<Self>, offset: u64, bytes: u64) -> BoxFuture<BlockResult<Part>> {
        Box::pin(async move {
            let status = self.image.block_status(offset, bytes).await?;
            if status.allocated {
                return Ok(Part { bytes: status.bytes, what: What::Skip });
            }
            let (old, bytes) = zeroes(self.old.as_ref(), offset, status.bytes).await?;
            let (new, bytes) = zeroes(self.new.as_ref(), offset, bytes).await?;
            match (old, new) {
                (true, true) => Ok(Part { bytes, what: What::Skip }),
                _ => {
                    let (same, bytes) = self.compare(offset, bytes).await?;
                    Ok(Part { bytes, what: if same { What::Skip } else { What::Data } })
                }
            }
        })
    }

    fn read(self: Rc<Self>, offset: u64, iov: IoVec) -> BoxFuture<BlockResult> {
        Box::pin(async move { read(self.old.as_ref(), offset, iov).await })
    }
}
