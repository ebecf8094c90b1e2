//! One disk, as `serve` and the vhost-user conventions describe it: an image file, its format and its cache mode.
//!
//! This file owns how such a description becomes iothreads, a node and an export. The only looks it takes at the host are
//! whether the image is a block device, and can be opened for direct I/O; it never keeps the image open.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use blockport_block::options::Options;
use clap::ValueEnum;

use super::{Config, ExportConfig, IothreadConfig, QueueMapping, Step, UsageError};

/// The formats that follow from how a file's name ends.
const FORMATS: [(&str, &str); 7] = [
    ("luks", "luks"),
    ("qcow2", "qcow2"),
    ("vdi", "vdi"),
    ("vhd", "vpc"),
    ("vhdx", "vhdx"),
    ("vmdk", "vmdk"),
    ("vpc", "vpc"),
];

/// How the host caches an image, by the names of `qemu-img -t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Direct I/O past the host's page cache; the guest flushes
    None,
    /// Through the host's page cache; the guest flushes
    Writeback,
    /// Through the host's page cache; every write is stable when it is answered
    Writethrough,
    /// Direct I/O; every write is stable when it is answered
    Directsync,
    /// Through the host's page cache, flushes are not passed on: a crash of the host loses data
    Unsafe,
}

impl CacheMode {
    /// The mode of an image that none is stated for, and what the user should know about the choice.
    fn for_image(path: &Path) -> (Self, Option<String>) {
        match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let notice = format!("{}: no direct I/O on this file system, using cache writeback", path.display());
                (Self::Writeback, Some(notice))
            }
            // Any other error comes back, with its context, when the node is opened.
            Ok(_) | Err(_) => (Self::None, None),
        }
    }
}

/// One disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image. Must be UTF-8, as every option is.
    pub path: PathBuf,
    /// The block driver of its format.
    pub format: String,
    /// Whether the image is opened for reading only.
    pub read_only: bool,
    /// None: direct I/O where the file system has it, else writeback with a notice.
    pub cache: Option<CacheMode>,
}

impl Disk {
    /// The name of the disk's node, and of its export.
    pub const NODE_NAME: &str = "disk";
    /// The name of its iothreads, before their number.
    pub const IOTHREAD_NAME: &str = "iothread";

    /// The format of an image that none is stated for. By its name alone: what a guest writes must never choose it.
    pub fn format_by_name(path: &Path) -> &'static str {
        let extension = path.extension().and_then(|extension| extension.to_str());
        let known = FORMATS.iter().find(|(known, _)| extension == Some(known));
        known.map_or("raw", |(_, format)| format)
    }

    fn is_device(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| meta.file_type().is_block_device())
    }

    /// Adds the steps that serve this disk: `iothreads` iothreads like `iothread`, which gives them its name with a
    /// number, a node, and `export` spread over the iothreads.
    pub fn configure(
        &self,
        config: &mut Config,
        export: ExportConfig,
        iothreads: u16,
        iothread: &IothreadConfig,
    ) -> Result<(), UsageError> {
        let Some(filename) = self.path.to_str() else {
            return Err(UsageError::new(format!("{:?}: the path of an image must be UTF-8", self.path)));
        };
        let (cache, notice) = match self.cache {
            Some(cache) => (cache, None),
            None => CacheMode::for_image(&self.path),
        };
        config.notices.extend(notice);

        let names: Vec<String> = (0..iothreads).map(|index| format!("{}{index}", iothread.id)).collect();
        for name in &names {
            config.steps.push(Step::Iothread(IothreadConfig { id: name.clone(), ..iothread.clone() }));
        }
        config.steps.push(Step::Blockdev(self.node(filename, cache)));
        config.steps.push(Step::Export(ExportConfig {
            queue_mapping: QueueMapping { iothreads: names, queues: Vec::new() },
            writethrough: matches!(cache, CacheMode::Writethrough | CacheMode::Directsync),
            ..export
        }));
        Ok(())
    }

    /// The node: the format over the file.
    fn node(&self, filename: &str, cache: CacheMode) -> Options {
        let mut file = Options::new();
        file.set_str("driver", if self.is_device() { "host_device" } else { "file" })
            .set_str("filename", filename)
            .set_bool("read-only", self.read_only)
            // What the guest discards gives its space back to the host.
            .set_str("discard", "unmap")
            .set_bool("cache.direct", matches!(cache, CacheMode::None | CacheMode::Directsync))
            .set_bool("cache.no-flush", cache == CacheMode::Unsafe);
        let mut node = Options::new().with_subject(format!("image {filename:?}"));
        node.set_str("driver", &self.format)
            .set_str("node-name", Self::NODE_NAME)
            .set_bool("read-only", self.read_only)
            .set_str("discard", "unmap")
            .set_options("file", file);
        node
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::SocketAddress;

    fn disk(cache: Option<CacheMode>) -> Disk {
        Disk { path: "/images/a,b.raw".into(), format: "raw".into(), read_only: false, cache }
    }

    fn steps(cache: CacheMode) -> (Options, ExportConfig) {
        let export = ExportConfig::new("disk", "disk", SocketAddress::Fd(3));
        let mut config = Config::default();
        let iothread = IothreadConfig { poll_max_ns: 7, ..IothreadConfig::new(Disk::IOTHREAD_NAME) };
        disk(Some(cache)).configure(&mut config, export, 2, &iothread).expect("a config");
        let mut steps = config.steps.into_iter();
        for name in ["iothread0", "iothread1"] {
            let expected = IothreadConfig { poll_max_ns: 7, ..IothreadConfig::new(name) };
            assert_eq!(steps.next(), Some(Step::Iothread(expected)));
        }
        match (steps.next(), steps.next(), steps.next()) {
            (Some(Step::Blockdev(node)), Some(Step::Export(export)), None) => (node, export),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_disk_is_iothreads_a_node_and_an_export() {
        let (node, export) = steps(CacheMode::None);
        let expected = serde_json::json!({
            "driver": "raw", "node-name": "disk", "read-only": false, "discard": "unmap",
            "file": {
                "driver": "file", "filename": "/images/a,b.raw", "read-only": false, "discard": "unmap",
                "cache": {"direct": true, "no-flush": false},
            },
        });
        assert_eq!(node.to_json(), expected);
        assert_eq!(export.queue_mapping.iothreads, ["iothread0", "iothread1"]);
    }

    #[test]
    fn cache_modes_mean_what_they_mean_to_qemu_img() {
        for (cache, direct, no_flush, writethrough) in [
            (CacheMode::None, true, false, false),
            (CacheMode::Writeback, false, false, false),
            (CacheMode::Writethrough, false, false, true),
            (CacheMode::Directsync, true, false, true),
            (CacheMode::Unsafe, false, true, false),
        ] {
            let (mut node, export) = steps(cache);
            let found = (
                node.take_bool("file.cache.direct").expect("a boolean"),
                node.take_bool("file.cache.no-flush").expect("a boolean"),
                export.writethrough,
            );
            assert_eq!(found, (Some(direct), Some(no_flush), writethrough), "{cache:?}");
        }
    }

    #[test]
    fn the_format_follows_from_the_name() {
        for (path, format) in [
            ("a.qcow2", "qcow2"),
            ("a.raw", "raw"),
            ("a.img", "raw"),
            ("/dev/sda", "raw"),
            ("a.qcow2.b", "raw"),
            ("/vm/a.vmdk", "vmdk"),
            ("a.vdi", "vdi"),
            ("a.vhd", "vpc"),
            ("a.vhdx", "vhdx"),
        ] {
            assert_eq!(Disk::format_by_name(Path::new(path)), format);
        }
    }

    #[test]
    fn an_image_that_cannot_be_opened_is_left_to_the_driver() {
        assert_eq!(CacheMode::for_image(Path::new("/nowhere/at/all")), (CacheMode::None, None));
    }
}
