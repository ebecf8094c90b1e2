//! Format: what the options of a new image mean, by its format. It owns their names and values; it makes nothing.

use blockport_block::drivers::qcow2::CreateOptions;
use blockport_block::options::{Options, parse_keyval};

use super::Failure;
use super::target::Preallocation;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct Format {
    /// The driver of its format.
    pub driver: String,
    /// The size of its disk in bytes, if that is stated.
    pub size: Option<u64>,
    pub preallocation: Preallocation,
    /// Name and format of its backing file.
    pub backing: Option<(String, Option<String>)>,
    /// The version of the format as it is stated.
    compat: Option<String>,
    /// Only if it is one.
    pub qcow2: Option<CreateOptions>,
}

/// The options of each format that can be made, with their meaning.
const OPTIONS: [(&str, &[(&str, &str)]); 2] = [
    ("raw", &[("size=<size>", "size of the disk"), ("preallocation=<str>", "off (default), falloc, full")]),
    (
        "qcow2",
        &[
            ("size=<size>", "size of the disk"),
            ("compat=<str>", "version of the format: 0.10 (v2) or 1.1 (v3, default)"),
            ("backing_file=<str>", "the image behind it"),
            ("backing_fmt=<str>", "the format of that"),
            ("cluster_size=<size>", "a power of two from 512 to 2M, default 64K"),
            ("data_file=<str>", "a file of its own for the guest's data"),
            ("data_file_raw=<bool>", "that file is a raw image by itself, default off"),
            ("preallocation=<str>", "off (default), metadata, falloc, full"),
            ("lazy_refcounts=<bool>", "refcounts are written late, default off"),
            ("refcount_bits=<num>", "the width of refcounts: a power of two from 1 to 64, default 16"),
            ("extended_l2=<bool>", "clusters are allocated in 32nds, default off"),
            ("compression_type=<str>", "of compressed clusters: zlib (default) or zstd"),
        ],
    ),
];

/// The options that a format has, a line each; `None` if it cannot be made.
pub fn help(driver: &str) -> Option<String> {
    let (_, options) = OPTIONS.iter().find(|(name, _)| *name == driver)?;
    let lines: Vec<String> = options.iter().map(|(name, meaning)| format!("  {name:<24} - {meaning}\n")).collect();
    Some(format!("Supported options:\n{}", lines.concat()))
}

/// Whether somebody asks which options there are.
pub fn is_question(options: &[String]) -> bool {
    options.iter().flat_map(|text| text.split(',')).any(|part| matches!(part, "help" | "list" | "?"))
}

impl Format {
    /// From the values of `-o`.
    ///
    /// # Errors
    /// The format cannot be made, or an option is wrong; the error names it.
    pub fn parse(driver: &str, texts: &[String]) -> Result<Self, Failure> {
        if help(driver).is_none() {
            let names: Vec<&str> = OPTIONS.iter().map(|(name, _)| *name).collect();
            return Err(format!("images of the format \"{driver}\" cannot be made: {} can", names.join(" and ")).into());
        }
        let mut options = parse_keyval(&texts.join(","), None)?.with_subject("-o");
        let mut format = Self {
            driver: driver.to_owned(),
            size: options.take_size("size")?,
            preallocation: options.take_enum("preallocation", &Preallocation::NAMES)?.unwrap_or_default(),
            backing: None,
            compat: options.peek_str("compat").map(str::to_owned),
            qcow2: None,
        };
        match driver {
            "qcow2" => format.take_qcow2(&mut options)?,
            _ if format.preallocation == Preallocation::Metadata => {
                return Err(options.invalid("preallocation", "metadata", "off, falloc or full").into());
            }
            _ => {}
        }
        options.finish()?;
        Ok(format)
    }

    fn take_qcow2(&mut self, options: &mut Options) -> Result<(), Failure> {
        let backing = options.take_str("backing_file")?;
        let backing_format = options.take_str("backing_fmt")?;
        if backing.is_none() && backing_format.is_some() {
            return Err(options
                .invalid("backing_fmt", backing_format.unwrap_or_default(), "given with backing_file")
                .into());
        }
        self.backing = backing.map(|name| (name, backing_format));
        let versions = [("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)];
        let compression = [("zlib", false), ("zstd", true)];
        let defaults = CreateOptions::default();
        self.qcow2 = Some(CreateOptions {
            cluster_size: options.take_size("cluster_size")?.unwrap_or(defaults.cluster_size),
            version: options.take_enum("compat", &versions)?.unwrap_or(defaults.version),
            refcount_bits: match options.take_u64("refcount_bits")? {
                None => defaults.refcount_bits,
                Some(bits) => u32::try_from(bits)
                    .map_err(|_| options.invalid("refcount_bits", bits, "a power of two from 1 to 64"))?,
            },
            extended_l2: options.take_bool("extended_l2")?.unwrap_or(false),
            zstd: options.take_enum("compression_type", &compression)?.unwrap_or(false),
            data_file: options.take_str("data_file")?,
            data_file_raw: options.take_bool("data_file_raw")?.unwrap_or(false),
            lazy_refcounts: options.take_bool("lazy_refcounts")?.unwrap_or(false),
            preallocation: self.preallocation.of_qcow2(),
            ..defaults
        });
        Ok(())
    }

    /// What a qcow2 image with a disk of that size is to be.
    pub fn qcow2_options(&self, size: u64) -> CreateOptions {
        let backing = self.backing.clone().map(|(name, format)| (name, format.unwrap_or_default()));
        CreateOptions { size, backing, ..self.qcow2.clone().unwrap_or_default() }
    }

    /// What is made, in a line.
    pub fn summary(&self, filename: &str, size: u64) -> String {
        let mut text = format!("Formatting '{filename}', fmt={}", self.driver);
        let on = |flag: bool| if flag { "on" } else { "off" };
        if let Some(image) = &self.qcow2 {
            text += &format!(" cluster_size={} extended_l2={}", image.cluster_size, on(image.extended_l2));
            if self.preallocation != Preallocation::Off {
                text += &format!(" preallocation={}", self.preallocation.name());
            }
            text += &format!(" compression_type={}", if image.zstd { "zstd" } else { "zlib" });
            text += &format!(" size={size}");
            text += &self.compat.as_ref().map_or(String::new(), |compat| format!(" compat={compat}"));
            if let Some((name, format)) = &self.backing {
                text += &format!(" backing_file={name}");
                text += &format.as_ref().map_or(String::new(), |format| format!(" backing_fmt={format}"));
            }
            if let Some(name) = &image.data_file {
                text += &format!(" data_file={name} data_file_raw={}", on(image.data_file_raw));
            }
            text += &format!(" lazy_refcounts={} refcount_bits={}", on(image.lazy_refcounts), image.refcount_bits);
        } else {
            text += &format!(" size={size}");
            if self.preallocation != Preallocation::Off {
                text += &format!(" preallocation={}", self.preallocation.name());
            }
        }
        text + "\n"
    }
}

impl Format {
    /// The image behind it.
    ///
    /// # Errors
    /// The format has no such thing, or the options name another one.
    pub fn set_backing(&mut self, name: &str, format: Option<&str>) -> Result<(), Failure> {
        if self.qcow2.is_none() {
            return Err(format!("an image of the format \"{}\" cannot have another one behind it", self.driver).into());
        }
        if self.backing.is_some() {
            return Err("-o: option \"backing_file\" is given, and so is -b".into());
        }
        self.backing = Some((name.to_owned(), format.map(str::to_owned)));
        Ok(())
    }
}
