//! `img create`: a new image. It owns what the arguments mean together; `target.rs` makes it.

use blockport_block::resolve_path;
use clap::Args;

use super::format::{self, Format};
use super::image::{ImageName, Opening, format_by_name};
use super::task::Session;
use super::{Failure, Outcome, complain, say, target, units};

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// The format of the new image [default: told by the end of its name, as .qcow2, else raw]
    #[arg(short, long, value_name = "DRIVER")]
    format: Option<String>,

    /// Options of the format, as KEY=VALUE,...; `-o help` lists them
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,

    /// The image behind it; a name that is relative is so to the new image
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,

    /// The format of the image behind it, which is never guessed
    #[arg(short = 'F', long, value_name = "DRIVER")]
    backing_format: Option<String>,

    /// Do not look whether the image behind it is there; SIZE is needed then
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// The new image; what was there is lost
    filename: Option<String>,

    /// The size of its disk in bytes, or with a unit [default: that of the image behind it]
    size: Option<String>,
}

impl CreateArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let name = self.filename.as_deref();
        let driver = self.format.clone().unwrap_or_else(|| format_by_name(name.unwrap_or_default()).to_owned());
        if format::is_question(&self.options)
            && let Some(help) = format::help(&driver)
        {
            say(help)?;
            return Ok(0);
        }
        let path = name.ok_or("the name of the new image is missing")?;
        let mut format = Format::parse(&driver, &self.options)?;
        if let Some(name) = &self.backing {
            format.set_backing(name, self.backing_format.as_deref())?;
        }
        let session = Session::new()?;
        let backing = self.backing_size(&session, path, &format)?;
        let stated = self.size.as_deref().map(|text| units::size("SIZE", text)).transpose()?;
        let size = stated.or(format.size).or(backing);
        let size = size
            .ok_or_else(|| Failure::from(format!("\"{path}\": a size is needed where there is no image behind it")))?;
        if size > i64::MAX as u64 - 511 {
            return Err(format!("\"{path}\": a disk of {size} bytes is too large").into());
        }
        if !self.quiet {
            say(format.summary(path, size))?;
        }
        target::create(&session, path, &format, size.next_multiple_of(512))?.keep();
        Ok(0)
    }

    /// The size of the image behind the new one, which must not be the new one.
    fn backing_size(&self, session: &Session, path: &str, format: &Format) -> Result<Option<u64>, Failure> {
        let Some((name, stated)) = &format.backing else { return Ok(None) };
        let Some(driver) = stated else {
            return Err(format!(
                "the format of the image behind it, \"{name}\", is not stated and is never guessed: give -F"
            )
            .into());
        };
        let place = if name.starts_with("json:") { name.clone() } else { resolve_path(name, Some(path))? };
        let image = session
            .open(&ImageName::file(place, Some(driver.clone())), Opening { force_share: true, ..Opening::default() });
        match image {
            Ok(image) => {
                image.is_not_at(path)?;
                Ok(Some(image.length()))
            }
            Err(failure) if self.backing_unsafe => {
                complain(format_args!("{failure}; the new image names it all the same"));
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }
}
