//! `img measure`: how large a new image will be. It owns the count of what an image holds; the format knows the rest.

use blockport_block::BlockResult;
use blockport_block::drivers::qcow2;
use clap::Args;
use serde_json::{Map, Value};

use super::convert::snapshot_name;
use super::format::{self, Format};
use super::image::ImageArgs;
use super::task::{Image, Session};
use super::{Failure, Outcome, OutputArgs, pretty, say, target, units};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct MeasureArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The format of the new image
    #[arg(short = 'O', long, value_name = "DRIVER", default_value = "raw")]
    target_format: String,

    /// Options of the new image's format, as KEY=VALUE,...; `-o help` lists them
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    options: Vec<String>,

    /// The size of the disk of an image that holds nothing
    #[arg(short, long, value_name = "SIZE", conflicts_with = "filename")]
    size: Option<String>,

    /// Take what the image was at a snapshot: its id or name
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    #[command(flatten)]
    output: OutputArgs,

    /// The image that is to be converted
    filename: Option<String>,
}

impl MeasureArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        if format::is_question(&self.options)
            && let Some(help) = format::help(&self.target_format)
        {
            say(help)?;
            return Ok(0);
        }
        let format = Format::parse(&self.target_format, &self.options)?;
        let session = Session::new()?;
        let (size, image) = match (&self.size, &self.filename) {
            (Some(size), _) => (units::size("--size", size)?, None),
            (None, Some(filename)) => {
                let image = session.open(&self.image.name(filename), self.image.reading())?;
                if let Some(snapshot) = &self.snapshot {
                    qcow2::snapshot_load(&image.node, &snapshot_name(snapshot)?)?;
                }
                (image.length(), Some(image))
            }
            (None, None) => return Err("give an image, or --size".into()),
        };
        let size = size.next_multiple_of(512);
        let mut answer = Map::new();
        match &format.qcow2 {
            None => {
                answer.insert("required".into(), size.into());
                answer.insert("fully-allocated".into(), size.into());
            }
            Some(_) => {
                let options = format.qcow2_options(size);
                let backed = format.backing.is_some();
                let whole = matches!(format.preallocation, target::Preallocation::Falloc | target::Preallocation::Full);
                let data = match &image {
                    // How much of it is behind the new image is not known.
                    _ if whole || (backed && image.is_some()) => size.next_multiple_of(options.cluster_size),
                    Some(image) => stored(&session, image, options.cluster_size)?,
                    None => 0,
                };
                let measured = qcow2::measure(&options, data)?;
                answer.insert("required".into(), measured.required.into());
                answer.insert("fully-allocated".into(), measured.fully_allocated.into());
                if options.version == 3
                    && let Some(image) =
                        image.as_ref().filter(|image| qcow2::info(&image.node).is_ok_and(|info| info.version == 3))
                {
                    answer.insert("bitmaps".into(), bitmaps(image, options.cluster_size)?.into());
                }
            }
        }
        if self.output.is_json() {
            say(pretty(&Value::Object(answer))?)?;
        } else {
            let number = |key: &str| answer.get(key).and_then(Value::as_u64);
            say(format_args!("required size: {}\n", number("required").unwrap_or(0)))?;
            say(format_args!("fully allocated size: {}\n", number("fully-allocated").unwrap_or(0)))?;
            if let Some(bytes) = number("bitmaps") {
                say(format_args!("bitmaps size: {bytes}\n"))?;
            }
        }
        Ok(0)
    }
}

/// How many bytes, in whole clusters of that size, an image does not know to be zero.
fn stored(session: &Session, image: &Image, cluster: u64) -> Result<u64, Failure> {
    let channel = image.fresh_channel(session)?;
    let counted = session.run(async move {
        let (mut at, mut bytes, end) = (0, 0, channel.length());
        while at < end {
            let status = channel.block_status(at, end - at).await?;
            let mut stop = at + status.bytes;
            if !status.zero {
                stop = stop.next_multiple_of(cluster);
                bytes += at % cluster + (stop - at);
            }
            at = stop;
        }
        BlockResult::Ok(bytes)
    });
    Ok(counted.map_err(|e| format!("\"{}\": {e}", image.name))?)
}

/// The room that the bitmaps of an image take in clusters of that size.
fn bitmaps(image: &Image, cluster: u64) -> Result<u64, Failure> {
    if qcow2::info(&image.node)?.bitmaps == 0 {
        return Ok(0);
    }
    let mut bytes = 0;
    let mut directory = 0;
    for bitmap in qcow2::bitmaps(&image.node)?.iter().filter(|bitmap| !bitmap.inconsistent) {
        let bits = image.length().div_ceil(bitmap.granularity);
        let content = bits.div_ceil(8).div_ceil(cluster);
        let table = (content * 8).div_ceil(cluster);
        bytes += (content + table) * cluster;
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(bytes + directory.next_multiple_of(cluster))
}
