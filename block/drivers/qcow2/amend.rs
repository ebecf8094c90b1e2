//! Amend: properties of an image that change after it was made: version, lazy refcounts, width of refcounts, names of
//! other files. It owns what may change into what. With no request in flight.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::channel::Channel;
use super::clear::Clear;
use super::header::{
    AUTOCLEAR_RAW_DATA, COMPATIBLE_LAZY_REFCOUNTS, EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES, Header, incompatible,
};
use super::header_cluster::HeaderCluster;
use super::mapping::Kind;
use crate::aio::AioContext;
use crate::error::{BlockResult, OpenError, OpenResult};
use crate::iovec::AlignedBuffer;

/// What is to change; `None` stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AmendOptions {
    /// 2 or 3 (compat 0.10 or 1.1).
    pub version: Option<u32>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// A power of two from 1 to 64.
    pub refcount_bits: Option<u32>,
    /// Name and format of the backing file; `Some(None)`: none.
    pub backing: Option<Option<(String, Option<String>)>>,
    /// The name of the external data file, in an image that has one.
    pub data_file: Option<String>,
    /// Whether the external data file is a raw image by itself. Can only be given up.
    pub data_file_raw: Option<bool>,
}

/// How many bytes of zeroes are written at a time.
const ZEROES_BYTES: u64 = 256 << 10;

impl Qcow2 {
    pub(super) fn amend(&self, options: &AmendOptions, progress: &(dyn Fn(u64, u64) + Sync)) -> OpenResult {
        let header = self.image.lock().header.clone();
        let version = options.version.unwrap_or(header.version);
        if !(2..=3).contains(&version) {
            return Err(OpenError::new("the version of the format must be 2 or 3"));
        }
        let lazy = options.lazy_refcounts.unwrap_or(header.has_lazy_refcounts() && version == 3);
        let bits = options.refcount_bits.unwrap_or(1 << header.refcount_order);
        if !bits.is_power_of_two() || bits > 64 {
            return Err(OpenError::new("the width of refcounts must be a power of two from 1 to 64"));
        }
        if version == 2 && (lazy || bits != 16) {
            return Err(OpenError::new("lazy refcounts and other widths of refcounts than 16 bits need version 3"));
        }
        if options.data_file.is_some() && !header.has_data_file() {
            return Err(OpenError::new("the image's data is in the image: it has no external data file to be named"));
        }
        let raw = header.is_raw_data();
        if options.data_file_raw == Some(true) && !raw {
            return Err(OpenError::new("that the external data file is a raw image cannot be said afterwards"));
        }
        let total = header.size.max(1);
        progress(0, total);
        if version == 2 && header.version == 3 {
            self.check_for_version_2(&header)?;
            self.expand_zeroes()?;
        }
        if version > header.version {
            self.edit_header(|header| {
                // Features: none; counts of 2^4 bits; fields of 112 bytes; compressed by zlib.
                let numbers = [0, 0, 0, 4 << 32 | 112, 0u64];
                header.set_version(3, &numbers.iter().flat_map(|number| number.to_be_bytes()).collect::<Vec<u8>>());
                Ok(())
            })?;
        }
        if bits.ilog2() != header.refcount_order {
            self.change_refcount_width(bits.ilog2())?;
        }
        self.amend_fields(options, version, lazy)?;
        progress(total, total);
        // Until it is opened anew, the node knows it as it was; that may go on only where it does no harm.
        let changed = (version == 2 && header.version == 3)
            || bits.ilog2() != header.refcount_order
            || (raw && options.data_file_raw == Some(false));
        self.image.broken.store(changed, Ordering::Relaxed);
        if !changed && version == header.version {
            self.image.lazy.store(lazy, Ordering::Relaxed);
        }
        Ok(())
    }

    fn edit_header(&self, edit: impl FnOnce(&mut HeaderCluster) -> OpenResult + Send + 'static) -> OpenResult {
        self.write_back()?;
        self.blocking(async move |channel| channel.edit_header(edit).await)
    }

    fn amend_fields(&self, options: &AmendOptions, version: u32, lazy: bool) -> OpenResult {
        let (options, header) = (options.clone(), self.image.lock().header.clone());
        let edit = move |cluster: &mut HeaderCluster| {
            if let Some(backing) = options.backing {
                let (name, format) = backing.unwrap_or_default();
                cluster.set_extension(EXTENSION_BACKING_FORMAT, format.map(String::into_bytes));
                cluster.set_backing(&name);
            }
            if let Some(name) = options.data_file {
                cluster.set_extension(EXTENSION_DATA_FILE, Some(name.into_bytes()));
            }
            if options.data_file_raw == Some(false) {
                cluster.put(88, header.autoclear & !AUTOCLEAR_RAW_DATA);
            }
            if version == 2 {
                cluster.set_extension(EXTENSION_FEATURE_NAMES, None);
                cluster.set_version(2, &[]);
            } else {
                let others = header.compatible & !COMPATIBLE_LAZY_REFCOUNTS;
                cluster.put(80, others | if lazy { COMPATIBLE_LAZY_REFCOUNTS } else { 0 });
            }
            Ok(())
        };
        self.write_back()?;
        // What is read anew after a change of version would be another image than the one that was opened.
        self.blocking(async move |channel| channel.edit_header(edit).await)
    }

    fn check_for_version_2(&self, header: &Header) -> OpenResult {
        let no = |what: &str| Err(OpenError(format!("version 2 of the format has no {what}")));
        match header.incompatible {
            _ if header.snapshots > 0 => Err(OpenError::new("an image that has snapshots stays in version 3")),
            _ if !self.bitmaps()?.is_empty() => no("bitmaps"),
            bits if bits & incompatible::DATA_FILE != 0 => no("external data files"),
            bits if bits & incompatible::COMPRESSION != 0 => no("compression by zstd"),
            bits if bits & incompatible::EXTENDED_L2 != 0 => no("extended L2 entries"),
            _ => Ok(()),
        }
    }

    /// Has zero flags go: what reads as zeroes by one is written, or not there with nothing behind it.
    fn expand_zeroes(&self) -> OpenResult {
        self.blocking(async move |channel| {
            let done = channel.expand_zeroes().await;
            done.map_err(|e| OpenError(format!("zeroes cannot be written: {e}")))
        })
    }

    fn change_refcount_width(&self, order: u32) -> OpenResult {
        self.write_back()?;
        self.blocking(async move |channel| {
            let header = channel.image.lock().header.clone();
            let geometry = channel.image.geometry.with_refcount_order(order);
            let references = channel.count_references(&header).await?;
            let (offset, clusters) = channel.write_refcounts(geometry, &header, &references.counts).await?;
            channel
                .edit_header(|header| {
                    header.put(48, offset);
                    header.put_short(56, clusters);
                    header.put_short(96, order);
                    Ok(())
                })
                .await
        })
    }
}

impl Channel {
    async fn expand_zeroes(self: &Rc<Self>) -> BlockResult {
        let geometry = self.image.geometry;
        let end = self.image.size.load(Ordering::Relaxed).next_multiple_of(geometry.cluster_size());
        let disk_end = self.image.size.load(Ordering::Relaxed);
        let zeroes = AlignedBuffer::new(ZEROES_BYTES as usize, 4096);
        let mut at = 0;
        while at < end {
            let run = self.attempt(|state| state.run(at, (end - at).min(ZEROES_BYTES))).await?;
            let stop = at + run.bytes;
            if run.kind == Kind::Zero {
                if at >= self.backing_length() {
                    self.clear_range(at, stop, Clear::Drop).await?;
                } else {
                    let bytes = stop.min(disk_end) - at;
                    self.write(at, &[zeroes.iov().part(0, bytes as usize)]).await?;
                }
            }
            at = stop;
            AioContext::breathe().await;
        }
        self.flush().await
    }
}
