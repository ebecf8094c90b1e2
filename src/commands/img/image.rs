//! Image: how an image is named on the command line, and what options it is opened with. It owns the rule that a format is
//! stated or told by the name, and never by the content; it opens nothing.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use blockport_block::SECTOR;
use blockport_block::drivers::{self, DriverKind};
use blockport_block::options::{Options, parse_keyval};
use clap::{Args, ValueEnum};

use super::Failure;
use crate::options::Disk;

/// How the host caches an image, by the names of `qemu-img -t`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheName {
    /// Direct I/O past the host's page cache
    None,
    /// Through the host's page cache, stable at the end
    Writeback,
    /// Through the host's page cache, every write stable when it is done
    Writethrough,
    /// Direct I/O, every write stable when it is done
    Directsync,
    /// Through the host's page cache, and left to it
    Unsafe,
}

impl CacheName {
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Every write is stable when it is done.
    pub fn writes_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}

/// Arguments of all verbs that open one image.
#[derive(Args, Debug, Clone)]
pub struct ImageArgs {
    /// The format of the image [default: told by the end of its name, as .qcow2, else raw; its content is never looked at]
    #[arg(short, long, value_name = "DRIVER")]
    format: Option<String>,

    /// The image is given as options of a node, as --blockdev takes them, rather than by its file name
    #[arg(long, conflicts_with = "format")]
    image_opts: bool,

    /// Share the image with other processes that write to it; what is read may change meanwhile
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl ImageArgs {
    /// The image of that name.
    pub fn name(&self, text: impl Into<String>) -> ImageName {
        ImageName { text: text.into(), format: self.format.clone(), is_options: self.image_opts }
    }

    /// For reading.
    pub fn reading(&self) -> Opening {
        Opening { force_share: self.force_share, ..Opening::default() }
    }
}

/// An image as it is named.
#[derive(Debug, Clone)]
pub struct ImageName {
    /// A path, `json:` with options, or options.
    pub text: String,
    /// The driver of its format, if it is stated.
    pub format: Option<String>,
    /// The text is options, as `driver=qcow2,file.filename=…`.
    pub is_options: bool,
}

/// What an image is opened for.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    pub writable: bool,
    pub cache: CacheName,
    pub force_share: bool,
    /// Without what is behind it.
    pub alone: bool,
    /// Only to be repaired.
    pub for_repair: bool,
    /// Discards are passed on.
    pub discard: bool,
    /// The unit of its writes in bytes.
    pub granularity: u32,
}

impl Default for Opening {
    fn default() -> Self {
        Self {
            writable: false,
            cache: CacheName::Writeback,
            force_share: false,
            alone: false,
            for_repair: false,
            discard: true,
            granularity: SECTOR as u32,
        }
    }
}

/// The format of a file whose format is not stated.
pub fn format_by_name(path: &str) -> &'static str {
    Disk::format_by_name(Path::new(path))
}

/// Whether a path leads to a block device.
pub fn is_device(path: &str) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// The driver of the file at a path.
fn file_driver(path: &str) -> &'static str {
    if is_device(path) { "host_device" } else { "file" }
}

impl ImageName {
    /// A file, with its format if it is stated.
    pub fn file(path: impl Into<String>, format: Option<String>) -> Self {
        Self { text: path.into(), format, is_options: false }
    }

    /// The driver of its format.
    pub fn driver(&self) -> String {
        match self.stated_options() {
            Some(Ok(options)) => options.peek_str("driver").unwrap_or("raw").to_owned(),
            _ => self.format.clone().unwrap_or_else(|| format_by_name(&self.text).to_owned()),
        }
    }

    fn stated_options(&self) -> Option<Result<Options, Failure>> {
        let options = match self.text.strip_prefix("json:") {
            _ if self.is_options => parse_keyval(&self.text, None),
            Some(json) => Options::parse_json(json),
            None => return None,
        };
        Some(options.map(|options| options.with_subject(format!("image {:?}", self.text))).map_err(Failure::from))
    }

    /// The options of its node.
    ///
    /// # Errors
    /// The format is unknown, or the options cannot be read.
    pub fn options(&self, opening: Opening) -> Result<Options, Failure> {
        let mut options = match self.stated_options() {
            Some(options) => self.completed(options?)?,
            None => self.of_file()?,
        };
        let row = options.peek_str("driver").and_then(drivers::find);
        let stands_on_file = options.peek_str("file.driver").is_some();
        let place = if stands_on_file { "file." } else { "" };
        let mut default = |key: &str, value: bool| {
            if !options.contains(key) {
                options.set_bool(key, value);
            }
        };
        default("read-only", !opening.writable);
        if opening.force_share {
            default("force-share", true);
        }
        default(&format!("{place}cache.direct"), opening.cache.is_direct());
        default(&format!("{place}cache.no-flush"), opening.cache == CacheName::Unsafe);
        for key in ["discard", "file.discard"].into_iter().take(1 + usize::from(stands_on_file)) {
            if !options.contains(key) {
                options.set_str(key, if opening.discard { "unmap" } else { "ignore" });
            }
        }
        let has = |option: &str| row.is_some_and(|row| row.options.iter().any(|(name, _)| *name == option));
        if opening.for_repair && has("x-repair") {
            options.set_bool("x-repair", true);
        }
        if opening.alone && has("backing") {
            let mut json = options.to_json();
            json["backing"] = serde_json::Value::Null;
            options = Options::from_json(json)?.with_subject(options.subject().to_owned());
        }
        Ok(options)
    }

    /// The drivers that are usually meant where options leave them out.
    fn completed(&self, mut options: Options) -> Result<Options, Failure> {
        if let Some(path) = options.peek_str("file.filename").map(str::to_owned)
            && !options.contains("file.driver")
        {
            options.set_str("file.driver", file_driver(&path));
        }
        if !options.contains("driver") {
            return Err(options.missing("driver").into());
        }
        Ok(options)
    }

    fn of_file(&self) -> Result<Options, Failure> {
        let driver = self.driver();
        let row = drivers::find(&driver);
        let row = row.ok_or_else(|| {
            format!("{:?}: the format \"{driver}\" is unknown: there are {}", self.text, drivers::names().join(", "))
        })?;
        let mut options = Options::new().with_subject(format!("image {:?}", self.text));
        options.set_str("driver", &driver);
        match row.kind {
            DriverKind::Protocol => options.set_str("filename", &self.text),
            DriverKind::Format | DriverKind::Filter => {
                options.set_str("file.driver", file_driver(&self.text)).set_str("file.filename", &self.text)
            }
        };
        Ok(options)
    }
}

/// Device and inode of a file; `None` where there is none.
pub fn identity(path: &str) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    // Device nodes of one device are one.
    Some(if meta.file_type().is_block_device() { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) })
}
