//! `img compare`: whether two images have the same contents. It owns the comparison, which reads only where one of them
//! may not be zero.

use std::rc::Rc;

use blockport_block::{BlockError, ChildChannel, SECTOR};
use clap::Args;

use super::image::{CacheName, ImageName, Opening};
use super::progress::Progress;
use super::task::{Image, Session, buffer, read_padded};
use super::{Failure, Outcome, say};

/// The exit statuses besides 0 and, of a command line, 1.
const DIFFERENT: u8 = 1;
const NOT_OPENED: u8 = 2;
const NO_STATUS: u8 = 3;
const NOT_READ: u8 = 4;

/// How much is read at a time.
const CHUNK: u64 = 2 << 20;

/// The arguments, with their help.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit status: 0 they are the same, 1 they differ, 2 one cannot be opened or the command line cannot be \
understood, 3 the status of a part cannot be told, 4 one cannot be read."
)]
pub struct CompareArgs {
    /// The format of the first image [default: told by the end of its name]
    #[arg(short = 'f', long = "a-format", value_name = "DRIVER")]
    format: Option<String>,

    /// The format of the second image [default: told by the end of its name]
    #[arg(short = 'F', long = "b-format", value_name = "DRIVER")]
    second_format: Option<String>,

    /// The images are given as options of nodes, as --blockdev takes them, rather than by their file names
    #[arg(long, conflicts_with_all = ["format", "second_format"])]
    image_opts: bool,

    /// Their sizes, and which parts of them are stored, must be the same as well
    #[arg(short, long)]
    strict: bool,

    /// How the host caches the images
    #[arg(short = 'T', long, value_name = "MODE", value_enum, default_value = "writeback")]
    cache: CacheName,

    /// Share the images with other processes that write to them
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Show how far it has come
    #[arg(short, long)]
    progress: bool,

    /// Say nothing; the exit status tells
    #[arg(short, long)]
    quiet: bool,

    /// The first image
    filename1: String,

    /// The second image
    filename2: String,
}

/// What was found.
enum Found {
    Same,
    /// Their bytes differ in the sector at this offset.
    Content(u64),
    /// One stores what the other does not.
    Status(u64),
}

impl CompareArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let session = Session::new()?;
        let open = |text: &str, format: &Option<String>| {
            let name = ImageName { text: text.to_owned(), format: format.clone(), is_options: self.image_opts };
            let opening = Opening { cache: self.cache, force_share: self.force_share, ..Opening::default() };
            session.open(&name, opening).map_err(|failure| failure.with_status(NOT_OPENED))
        };
        let images = [open(&self.filename1, &self.format)?, open(&self.filename2, &self.second_format)?];
        let lengths = [images[0].length(), images[1].length()];
        let tell = |text: String| if self.quiet { Ok(()) } else { say(text) };
        if lengths[0] != lengths[1] {
            if self.strict {
                tell("Strict mode: Image size mismatch!\n".to_owned())?;
                return Ok(DIFFERENT);
            }
            tell("Warning: Image size mismatch!\n".to_owned())?;
        }
        let progress = Progress::new(self.progress && !self.quiet, lengths[0].max(lengths[1]));
        let strict = self.strict;
        let names = [self.filename1.clone(), self.filename2.clone()];
        let channels = images.each_ref().map(|image: &Image| image.channel.clone());
        let found = session.run(async move {
            let found = compare(channels, names, strict, &progress).await;
            progress.finish();
            found
        })?;
        match found {
            Found::Same => {
                tell("Images are identical.\n".to_owned())?;
                Ok(0)
            }
            Found::Content(offset) => {
                tell(format!("Content mismatch at offset {offset}!\n"))?;
                Ok(DIFFERENT)
            }
            Found::Status(offset) => {
                tell(format!("Strict mode: Offset {offset} block status mismatch!\n"))?;
                Ok(DIFFERENT)
            }
        }
    }
}

async fn compare(
    channels: [Rc<ChildChannel>; 2],
    names: [String; 2],
    strict: bool,
    progress: &Progress,
) -> Result<Found, Failure> {
    let end = channels[0].length().max(channels[1].length());
    let buffers = [buffer(CHUNK as usize), buffer(CHUNK as usize)];
    let failed = |which: usize, offset: u64, status: u8, error: BlockError| {
        Failure::from(format!("\"{}\", at offset {offset}: {error}", names[which])).with_status(status)
    };
    let mut at = 0;
    while at < end {
        let mut bytes = end - at;
        let mut zero = [true; 2];
        let mut allocated = [false; 2];
        for which in 0..2 {
            // Past its end an image counts as zero.
            let there = channels[which].length().saturating_sub(at);
            if there > 0 {
                let status = channels[which].block_status(at, bytes.min(there)).await;
                let status = status.map_err(|e| failed(which, at, NO_STATUS, e))?;
                bytes = bytes.min(status.bytes);
                (zero[which], allocated[which]) = (status.zero, status.allocated);
            }
        }
        if strict && (zero[0] != zero[1] || allocated[0] != allocated[1]) {
            return Ok(Found::Status(at));
        }
        if !(zero[0] && zero[1]) {
            bytes = bytes.min(CHUNK);
            for which in 0..2 {
                let read = read_padded(&channels[which], at, bytes, &buffers[which]).await;
                read.map_err(|e| failed(which, at, NOT_READ, e))?;
            }
            let length = bytes as usize;
            let contents = buffers.each_ref().map(|buffer| buffer.to_vec());
            if contents[0][..length] != contents[1][..length] {
                let sector = SECTOR as usize;
                let pairs = contents[0][..length].chunks(sector).zip(contents[1][..length].chunks(sector));
                let same = pairs.take_while(|(first, second)| first == second).count() as u64;
                return Ok(Found::Content(at + same * SECTOR));
            }
        }
        progress.add(bytes);
        at += bytes;
    }
    Ok(Found::Same)
}
