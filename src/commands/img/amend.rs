//! `img amend`: properties of an image that can change after it was made. It owns their names and values.

use std::sync::atomic::{AtomicU64, Ordering};

use blockport_block::drivers::qcow2::{self, AmendOptions};
use blockport_block::options::{Options, parse_keyval};
use clap::Args;

use super::image::{CacheName, ImageArgs, Opening};
use super::task::Session;
use super::{Failure, Outcome, say};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct AmendArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// What is to change, as KEY=VALUE,...: compat, lazy_refcounts, refcount_bits, size, backing_file, backing_fmt,
    /// data_file, data_file_raw
    #[arg(short, long, value_name = "OPTIONS", required = true)]
    options: Vec<String>,

    /// How the host caches the image
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

impl AmendArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let mut options = parse_keyval(&self.options.join(","), None)?.with_subject("-o");
        let size = options.take_size("size")?;
        let amended = amended(&mut options)?;
        options.finish()?;
        let session = Session::new()?;
        let opening = Opening { writable: true, cache: self.cache, ..self.image.reading() };
        let mut image = session.open(&self.image.name(&self.filename), opening)?;
        if let Some(size) = size {
            session.resize(&mut image, size.next_multiple_of(512))?;
        }
        let shown = self.progress && !self.quiet;
        let last = AtomicU64::new(u64::MAX);
        qcow2::amend(&image.node, &amended, &|done, total| {
            let hundredths = (u128::from(done) * 10_000 / u128::from(total.max(1))) as u64;
            if shown && last.swap(hundredths, Ordering::Relaxed) != hundredths {
                let _ = say(format_args!("    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100));
            }
        })?;
        // What changed is stable, and the node may know the image as it was: there is nothing that it could flush.
        let node = image.node.clone();
        drop(image);
        node.inactivate()?;
        if shown {
            say("    (100.00/100%)\n")?;
        }
        Ok(0)
    }
}

fn amended(options: &mut Options) -> Result<AmendOptions, Failure> {
    let name = options.take_str("backing_file")?;
    let format = options.take_str("backing_fmt")?;
    let bits = options.take_u64_in("refcount_bits", 1..=64)?;
    Ok(AmendOptions {
        version: options.take_enum("compat", &[("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)])?,
        lazy_refcounts: options.take_bool("lazy_refcounts")?,
        refcount_bits: bits.and_then(|bits| u32::try_from(bits).ok()),
        backing: match (name, format) {
            (None, None) => None,
            (Some(name), _) if name.is_empty() => Some(None),
            (Some(name), format) => Some(Some((name, format))),
            (None, Some(format)) => {
                return Err(options.invalid("backing_fmt", format, "given with backing_file").into());
            }
        },
        data_file: options.take_str("data_file")?,
        data_file_raw: options.take_bool("data_file_raw")?,
    })
}
