//! `img commit`: what an image holds, written to an image behind it. It owns which layers that takes and what they show
//! together; each is opened by itself, so that the lowest can be written.

use std::rc::Rc;

use blockport_block::driver::BoxFuture;
use blockport_block::drivers::qcow2;
use blockport_block::iovec::IoVec;
use blockport_block::{BlockError, BlockResult, resolve_path};
use clap::Args;

use super::copy::{Part, Settings, Source, What, copy};
use super::image::{CacheName, ImageArgs, ImageName, Opening, identity};
use super::progress::Progress;
use super::task::{Image, Session, own_file};
use super::{Failure, Outcome, say};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct CommitArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The image behind it to write to, if it is not the next one; implies --drop
    #[arg(short, long, value_name = "FILE")]
    base: Option<String>,

    /// Leave the image as it is, rather than to empty it: it is of no use any more
    #[arg(short, long)]
    drop: bool,

    /// How the host caches the images
    #[arg(short = 't', long, value_name = "MODE", value_enum, default_value = "writeback")]
    cache: CacheName,

    /// Show how far it has come
    #[arg(short, long)]
    progress: bool,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// The image
    filename: String,
}

impl CommitArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let session = Session::new()?;
        let empties = !self.drop && self.base.is_none();
        let opening = Opening { alone: true, writable: true, cache: self.cache, ..self.image.reading() };
        let top = session.open(&self.image.name(&self.filename), Opening { writable: empties, ..opening })?;
        let mut layers = vec![top];
        let base = loop {
            let last = layers.last().ok_or("the image is missing")?;
            let next = stated_backing(last)?.ok_or_else(|| match &self.base {
                Some(base) => format!("\"{base}\" is not behind \"{}\"", self.filename),
                None => format!("\"{}\" has nothing behind it", self.filename),
            })?;
            if layers.iter().any(|layer| is_same(own_file(&layer.node).as_deref(), &next.text)) {
                return Err(format!(
                    "the chain of backing files of \"{}\" leads back to \"{}\"",
                    self.filename, next.text
                )
                .into());
            }
            let is_base = match &self.base {
                None => true,
                Some(base) => base == &next.text || is_same(Some(base), &next.text),
            };
            if is_base {
                break next;
            }
            layers.push(session.open(&next, Opening { writable: false, ..opening })?);
        };
        // With what is behind it: clusters that are not wholly written are completed from there.
        let mut base = session.open(&base, Opening { alone: false, ..opening })?;
        let length = layers.first().map_or(0, Image::length);
        if base.length() < length {
            session.resize(&mut base, length)?;
        }
        let layers = Rc::new(Layers(layers));
        let progress = Progress::new(self.progress && !self.quiet, length);
        copy(&session, layers.clone(), &base, Settings::default(), progress)?;
        // The image is emptied only when the other one has all of it for good.
        session.close(base)?;
        let layers = Rc::try_unwrap(layers).map_err(|_| "the copying has not ended")?.0;
        if empties && let Some(top) = layers.into_iter().next() {
            qcow2::make_empty(&top.node)?;
            session.close(top)?;
        }
        if !self.quiet {
            say("Image committed.\n")?;
        }
        Ok(0)
    }
}

fn is_same(file: Option<&str>, other: &str) -> bool {
    file.is_some_and(|file| identity(file).is_some() && identity(file) == identity(other))
}

/// The image behind an image, as it states it.
///
/// # Errors
/// Its format is not stated.
pub fn stated_backing(image: &Image) -> Result<Option<ImageName>, Failure> {
    let Ok(info) = qcow2::info(&image.node) else { return Ok(None) };
    let Some(name) = info.backing else { return Ok(None) };
    if name.starts_with("json:") {
        return Ok(Some(ImageName::file(name, None)));
    }
    let path = resolve_path(&name, own_file(&image.node).as_deref())?;
    match info.backing_format {
        Some(format) => Ok(Some(ImageName::file(path, Some(format)))),
        None => Err(format!(
            "\"{}\" does not state the format of its backing file \"{name}\", which is never guessed",
            image.name
        )
        .into()),
    }
}

/// The images above the base, from the top, each by itself.
struct Layers(Vec<Image>);

impl Layers {
    /// In which layer the bytes from `offset` on are, and how many of them; `None`: in the base.
    async fn find(&self, offset: u64, mut bytes: u64) -> BlockResult<(Option<usize>, What, u64)> {
        for (depth, layer) in self.0.iter().enumerate() {
            let there = layer.length().saturating_sub(offset);
            if there == 0 {
                // Past the end of a shorter image there are zeroes, whatever lies below.
                return Ok((Some(depth), What::Zero, bytes));
            }
            bytes = bytes.min(there);
            let status = layer.channel.block_status(offset, bytes).await?;
            bytes = bytes.min(status.bytes);
            if status.allocated {
                return Ok((Some(depth), if status.zero { What::Zero } else { What::Data }, bytes));
            }
        }
        Ok((None, What::Skip, bytes))
    }
}

impl Source for Layers {
    fn length(&self) -> u64 {
        self.0.first().map_or(0, Image::length)
    }

    fn part(self: Rc<Self>, offset: u64, bytes: u64) -> BoxFuture<BlockResult<Part>> {
        Box::pin(async move {
            let (_, what, bytes) = self.find(offset, bytes).await?;
            Ok(Part { bytes, what })
        })
    }

    fn read(self: Rc<Self>, offset: u64, iov: IoVec) -> BoxFuture<BlockResult> {
        Box::pin(async move {
            let (depth, ..) = self.find(offset, iov.len() as u64).await?;
            let layer = depth.and_then(|depth| self.0.get(depth)).ok_or(BlockError::OutOfRange)?;
            layer.channel.preadv(offset, &[iov]).await
        })
    }
}
