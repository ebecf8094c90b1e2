//! `img resize`: another size for an image. It owns what the size may be; the driver changes it.

use blockport_block::drivers::qcow2;
use clap::Args;

use super::image::{ImageArgs, Opening};
use super::target::Preallocation;
use super::task::Session;
use super::{Failure, Outcome, say, units};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct ResizeArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// Cut data off, if the new size is smaller
    #[arg(long)]
    shrink: bool,

    /// What the added part is given at once
    #[arg(long, value_name = "HOW", value_enum, default_value = "off")]
    preallocation: Preallocation,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// The image
    filename: String,

    /// The new size, or after + or - the difference
    #[arg(allow_hyphen_values = true)]
    size: String,
}

impl ResizeArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let session = Session::new()?;
        let opening = Opening { writable: true, ..self.image.reading() };
        let (sign, digits) = match self.size.split_at_checked(1) {
            Some((sign @ ("+" | "-"), digits)) => (sign, digits),
            _ => ("", self.size.as_str()),
        };
        let size = units::size("SIZE", digits)?;
        let mut image = session.open(&self.image.name(&self.filename), opening)?;
        let now = image.length();
        let wanted = match sign {
            "+" => now.checked_add(size),
            "-" => now.checked_sub(size).filter(|wanted| *wanted > 0),
            _ => Some(size).filter(|wanted| *wanted > 0),
        };
        let wanted =
            wanted.and_then(|wanted| wanted.checked_next_multiple_of(512)).filter(|wanted| *wanted <= i64::MAX as u64);
        let wanted = wanted.ok_or_else(|| Failure::from("the new size must be above 0 and below 8E"))?;
        if wanted < now && !self.shrink {
            return Err(format!(
                "\"{}\" has {now} bytes: what lies behind {wanted} would be lost; --shrink allows it",
                self.filename
            )
            .into());
        }
        if wanted <= now && self.preallocation != Preallocation::Off {
            return Err("--preallocation is for images that grow".into());
        }
        if self.preallocation != Preallocation::Off && image.node.driver_name() == "qcow2" {
            qcow2::resize(&image.node, wanted, self.preallocation.of_qcow2())?;
        } else {
            session.resize(&mut image, wanted)?;
            self.preallocation.fill(&session, &image, now..wanted)?;
        }
        session.close(image)?;
        if !self.quiet {
            say("Image resized.\n")?;
        }
        Ok(0)
    }
}
