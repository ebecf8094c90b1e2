//! `img map`: where the contents of an image are, layer by layer. It owns the walk down the chain and the shape of the
//! answer; the drivers know the places.

use std::rc::Rc;
use std::sync::Arc;

use blockport_block::driver::BlockStatus;
use blockport_block::{BlockResult, Child, ChildChannel, Node, Permissions, SECTOR};
use clap::Args;
use serde_json::{Value, json};

use super::image::ImageArgs;
use super::task::{Session, child_node, own_file};
use super::{Failure, Outcome, OutputArgs, say, units};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct MapArgs {
    #[command(flatten)]
    image: ImageArgs,

    #[command(flatten)]
    output: OutputArgs,

    /// Where to begin, in bytes
    #[arg(long, value_name = "OFFSET")]
    start_offset: Option<String>,

    /// How much to tell of, in bytes [default: all]
    #[arg(long, value_name = "LENGTH")]
    max_length: Option<String>,

    /// The image
    filename: String,
}

/// One image of a chain.
pub struct Layer {
    pub channel: Rc<ChildChannel>,
    /// The file that it is in.
    pub file: Option<String>,
    _child: Arc<Child>,
}

/// So many bytes of which the same is true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    pub start: u64,
    pub bytes: u64,
    /// In which layer they are, 0 the top.
    pub depth: usize,
    /// Some layer stores them or knows that they are zero.
    pub present: bool,
    pub zero: bool,
    pub compressed: bool,
    pub place: Option<u64>,
}

/// An image and the images behind it, from the top.
pub fn layers(session: &Session, top: &Arc<Node>) -> Result<Vec<Layer>, Failure> {
    let mut layers = Vec::new();
    let mut next = Some(top.clone());
    while let Some(node) = next {
        let child = Child::attach(node.clone(), "this command", Permissions::device(false), SECTOR as u32)?;
        let channel = child.channel(&session.context)?;
        // What the guest sees may be in a file of its own.
        let file = child_node(&node, "data-file").unwrap_or_else(|| node.clone());
        layers.push(Layer { channel, file: own_file(&file), _child: child });
        next = child_node(&node, "backing");
    }
    Ok(layers)
}

/// What the bytes from `start` on are: at least 1 of them, at most `bytes`.
pub async fn extent(layers: &[Layer], start: u64, mut bytes: u64) -> BlockResult<Extent> {
    let nothing = Extent { start, bytes, depth: 0, present: false, zero: true, compressed: false, place: None };
    for (depth, layer) in layers.iter().enumerate() {
        let status: BlockStatus = layer.channel.block_status(start, bytes).await?;
        bytes = bytes.min(status.bytes);
        let behind = layers.get(depth + 1).map_or(0, |layer| layer.channel.length());
        if status.allocated {
            let BlockStatus { zero, compressed, place, .. } = status;
            return Ok(Extent { bytes, depth, present: true, zero, compressed, place, ..nothing });
        }
        if start >= behind {
            return Ok(Extent { bytes, depth, ..nothing });
        }
        bytes = bytes.min(behind - start);
    }
    Ok(Extent { bytes, ..nothing })
}

impl Extent {
    /// Takes `next` in, if the two are one.
    fn join(&mut self, next: &Self) -> bool {
        let one = Self { start: self.start, bytes: self.bytes, place: self.place, ..next.clone() } == *self;
        let goes_on = self.place.map(|place| place + self.bytes) == next.place;
        let joined = one && goes_on && self.start + self.bytes == next.start;
        if joined {
            self.bytes += next.bytes;
        }
        joined
    }

    fn json(&self) -> Value {
        let mut entry = json!({
            "start": self.start, "length": self.bytes, "depth": self.depth, "present": self.present,
            "zero": self.zero, "data": self.present && !self.zero, "compressed": self.compressed,
        });
        if let Some(place) = self.place {
            entry["offset"] = place.into();
        }
        entry
    }
}

impl MapArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let number =
            |name: &str, text: &Option<String>| text.as_deref().map(|text| units::size(name, text)).transpose();
        let start = number("--start-offset", &self.start_offset)?.unwrap_or(0);
        let most = number("--max-length", &self.max_length)?.unwrap_or(u64::MAX);
        let session = Session::new()?;
        let image = session.open(&self.image.name(&self.filename), self.image.reading())?;
        let end = image.length().min(start.saturating_add(most));
        let layers = layers(&session, &image.node)?;
        let files: Vec<Option<String>> = layers.iter().map(|layer| layer.file.clone()).collect();
        let extents = session.run(async move {
            let mut extents: Vec<Extent> = Vec::new();
            let mut at = start;
            while at < end {
                let next = extent(&layers, at, end - at).await?;
                at += next.bytes;
                if !extents.last_mut().is_some_and(|last| last.join(&next)) {
                    extents.push(next);
                }
            }
            BlockResult::Ok(extents)
        });
        let extents = extents.map_err(|e| format!("\"{}\": {e}", self.filename))?;
        if self.output.is_json() {
            let lines: Vec<String> = extents.iter().map(|extent| extent.json().to_string()).collect();
            say(format_args!("[{}]\n", lines.join(",\n")))?;
            return Ok(0);
        }
        say(format_args!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File"))?;
        for extent in extents.iter().filter(|extent| extent.present && !extent.zero) {
            let Some(place) = extent.place else {
                return Err(format!(
                    "\"{}\": parts of it are compressed, encrypted, or at no place in a file",
                    self.filename
                )
                .into());
            };
            let file = files.get(extent.depth).and_then(Option::as_deref).unwrap_or_default();
            say(format_args!("{:<16}{:<16}{:<16}{file}\n", hex(extent.start), hex(extent.bytes), hex(place)))?;
        }
        Ok(0)
    }
}

fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
