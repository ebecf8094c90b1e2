//! Create: what the file of a new image begins with. It owns the layout of an empty image; it writes nothing itself.

use super::geometry::Geometry;
use super::header::{AUTOCLEAR_RAW_DATA, Header, incompatible};
use super::on_own_loop;
use super::preallocate::Preallocation;
use crate::child::Child;
use crate::driver::WriteFlags;
use crate::error::{OpenError, OpenResult};
use crate::graph::Graph;
use crate::iovec::AlignedBuffer;
use crate::node::SECTOR;
use crate::options::Options;
use crate::permissions::{PermissionSet, Permissions};

/// What a new image is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The size of the disk in bytes.
    pub size: u64,
    /// A power of two from 512 to 2 MiB, from 16 KiB with `extended_l2`.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// A power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Allocate in 32nds of a cluster.
    pub extended_l2: bool,
    /// Compressed clusters are to be compressed by zstd rather than zlib.
    pub zstd: bool,
    /// Name and format of the backing file.
    pub backing: Option<(String, String)>,
    /// The name of an external data file.
    pub data_file: Option<String>,
    /// The external data file is to be a raw image by itself.
    pub data_file_raw: bool,
    /// The guest's data is to be encrypted: the header with the keys, as [`crate::drivers::luks::new_volume`] makes it.
    pub luks: Option<Vec<u8>>,
    /// Refcounts may be written late, and are made anew after a crash.
    pub lazy_refcounts: bool,
    /// What is allocated at once. [`new_image`] leaves that to [`create`].
    pub preallocation: Preallocation,
}

impl Default for CreateOptions {
    /// An empty disk in version 3, in clusters of 64 KiB.
    fn default() -> Self {
        Self {
            size: 0,
            cluster_size: 64 << 10,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            zstd: false,
            backing: None,
            data_file: None,
            data_file_raw: false,
            luks: None,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// The features that the table of names names: kind, bit, name.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
/// From this size of cluster on there is room for the table of names.
const FEATURE_NAMES_FROM: u64 = 4096;

impl CreateOptions {
    pub(super) fn header(&self) -> OpenResult<Header> {
        let power = |n: u64, min: u64, max: u64| n.is_power_of_two() && (min..=max).contains(&n);
        let fail = |text: &str| Err(OpenError::new(text));
        if !power(self.cluster_size, 512, 2 << 20) {
            return fail("the cluster size must be a power of two from 512 to 2M");
        }
        if !power(self.refcount_bits.into(), 1, 64) {
            return fail("the width of refcounts must be a power of two from 1 to 64");
        }
        let v3 = match self.version {
            2 => false,
            3 => true,
            _ => return fail("the version of the format must be 2 or 3"),
        };
        let needs_v3 = self.lazy_refcounts
            || self.extended_l2
            || self.zstd
            || self.data_file.is_some()
            || self.refcount_bits != 16;
        if !v3 && needs_v3 {
            return fail(
                "lazy refcounts, extended L2 entries, zstd, external data files and other widths of refcounts need version 3",
            );
        }
        if self.data_file_raw && (self.data_file.is_none() || self.backing.is_some()) {
            return fail("a raw external data file needs an external data file and excludes a backing file");
        }
        let bits = [
            (self.data_file.is_some(), incompatible::DATA_FILE),
            (self.zstd, incompatible::COMPRESSION),
            (self.extended_l2, incompatible::EXTENDED_L2),
        ];
        Ok(Header {
            version: self.version,
            cluster_bits: self.cluster_size.ilog2(),
            size: self.size,
            l1_entries: 0,
            l1_offset: 0,
            refcount_table_offset: self.cluster_size,
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: bits.iter().filter(|(set, _)| *set).fold(0, |sum, (_, bit)| sum | bit),
            compatible: u64::from(self.lazy_refcounts),
            autoclear: if self.data_file_raw { AUTOCLEAR_RAW_DATA } else { 0 },
            refcount_order: self.refcount_bits.ilog2(),
            compression: super::header::Compression::Zlib,
            backing: self.backing.as_ref().map(|(name, _)| name.clone()),
            backing_format: self.backing.as_ref().map(|(_, format)| format.clone()),
            data_file: self.data_file.clone(),
            bitmaps: None,
            encryption: None,
        })
    }
}

/// Makes a new image in the node `file`, whose content is lost, with preallocation; `data_file` is the node of the external
/// data file, if the options name one. Nobody else may use the nodes.
///
/// # Errors
/// As for [`new_image`]; a node is missing or in use; or I/O failed.
pub fn create(graph: &Graph, file: &str, data_file: Option<&str>, options: &CreateOptions) -> OpenResult {
    let image = new_image(options)?;
    if options.preallocation != Preallocation::Off && options.backing.is_some() {
        return Err(OpenError::new("preallocation would hide the backing file"));
    }
    if options.data_file.is_some() != data_file.is_some() {
        return Err(OpenError::new("the external data file is not there, or the image does not name it"));
    }
    let find = |name: &str| graph.find(name).ok_or_else(|| OpenError(format!("there is no node \"{name}\"")));
    let writer = Permissions {
        held: PermissionSet::WRITE | PermissionSet::RESIZE,
        shared: PermissionSet::ALL.without(PermissionSet::WRITE | PermissionSet::RESIZE),
    };
    {
        let child = Child::attach_growing(find(file)?, "a new image", writer, SECTOR as u32)?;
        // Devices keep their size.
        if let Err(error) = child.node().resize(0) {
            tracing::debug!("node \"{file}\": {error}");
        }
        on_own_loop("qcow2-create", |context| {
            let channel = child.channel(context)?;
            context.run_until(async move {
                let mut buffer = AlignedBuffer::new(image.len(), 4096);
                buffer.fill_from(&image);
                let written = match channel.pwritev(0, &[buffer.iov()], WriteFlags::default()).await {
                    Ok(()) => channel.flush().await,
                    error => error,
                };
                written.map_err(|e| OpenError(format!("the image cannot be written: {e}")))
            })
        })?;
    }
    if let Some(name) = data_file {
        let child = Child::attach_growing(find(name)?, "a new image", writer, SECTOR as u32)?;
        child.node().resize(options.size)?;
    }
    if options.preallocation == Preallocation::Off {
        return Ok(());
    }
    let mut opened = Options::default();
    opened.set_str("driver", "qcow2").set_str("file", file);
    if let Some(name) = data_file {
        opened.set_str("data-file", name);
    }
    let node = graph.open_unowned(opened)?;
    super::verbs::preallocate(&node, 0, options.size, options.preallocation)
}

/// The first bytes of a new image: header, refcounts, L1 table. The rest of the file is empty.
///
/// # Errors
/// The options contradict each other or the format's limits; the error says how.
pub fn new_image(options: &CreateOptions) -> OpenResult<Vec<u8>> {
    let mut header = options.header()?;
    let cluster = options.cluster_size;
    let geometry = Geometry::new(&header, cluster);
    let l1_entries = header.l1_entries_for(options.size).max(1);
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let luks_bytes = options.luks.as_ref().map_or(0, Vec::len) as u64;
    let luks_clusters = luks_bytes.div_ceil(cluster);
    // Header, refcount table, refcount blocks, L1 table, keys; the counts of all of them fit.
    let (mut table, mut blocks) = (1, 1);
    let clusters = loop {
        let clusters = 1 + table + blocks + l1_clusters + luks_clusters;
        let more_blocks = clusters.div_ceil(geometry.refcounts_per_block()).max(blocks);
        let more_table = (more_blocks * 8).div_ceil(cluster).max(table);
        if (more_blocks, more_table) == (blocks, table) {
            break clusters;
        }
        (blocks, table) = (more_blocks, more_table);
    };
    header.l1_entries = u32::try_from(l1_entries).unwrap_or(u32::MAX);
    header.l1_offset = (1 + table + blocks) * cluster;
    header.refcount_table_clusters = table as u32;
    let luks_at = header.l1_offset + l1_clusters * cluster;
    header.encryption = options.luks.as_ref().map(|_| (luks_at, luks_bytes));

    let mut image = header_cluster(&header, options)?;
    for block in 0..blocks {
        image.extend(((1 + table + block) * cluster).to_be_bytes());
    }
    image.resize(((1 + table) * cluster) as usize, 0);
    let mut counts = vec![0; (blocks * cluster / 8) as usize];
    for index in 0..clusters {
        let (at, word) = geometry.with_refcount(&counts, index, 1);
        if let Some(place) = counts.get_mut(at) {
            *place = word;
        }
    }
    image.extend(counts.iter().flat_map(|word: &u64| word.to_be_bytes()));
    if let Some(luks) = &options.luks {
        image.resize(luks_at as usize, 0);
        image.extend(luks);
    }
    image.resize((clusters * cluster) as usize, 0);
    // It must pass the checks of whoever opens it.
    Header::parse(&image[..cluster as usize])?;
    Ok(image)
}

fn header_cluster(header: &Header, options: &CreateOptions) -> OpenResult<Vec<u8>> {
    let cluster = options.cluster_size as usize;
    let mut extensions: Vec<u8> = Vec::new();
    let mut extension = |kind: u32, data: &[u8]| {
        extensions.extend(kind.to_be_bytes());
        extensions.extend((data.len() as u32).to_be_bytes());
        extensions.extend(data);
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    };
    if let Some(format) = &header.backing_format {
        extension(super::header::EXTENSION_BACKING_FORMAT, format.as_bytes());
    }
    if let Some(name) = &header.data_file {
        extension(super::header::EXTENSION_DATA_FILE, name.as_bytes());
    }
    if let Some((offset, bytes)) = header.encryption {
        extension(super::header::EXTENSION_ENCRYPTION, &[offset.to_be_bytes(), bytes.to_be_bytes()].concat());
    }
    if header.version == 3 && options.cluster_size >= FEATURE_NAMES_FROM {
        let mut names = Vec::new();
        for (kind, bit, name) in FEATURES {
            names.extend([kind, bit]);
            names.extend(name.as_bytes());
            names.resize(names.len().next_multiple_of(48), 0);
        }
        extension(super::header::EXTENSION_FEATURE_NAMES, &names);
    }
    extension(super::header::EXTENSION_END, &[]);

    let length: u32 = if header.version == 3 { 112 } else { 72 };
    let name = header.backing.as_deref().unwrap_or("");
    let name_at = length as usize + extensions.len();
    let mut bytes: Vec<u8> = Vec::with_capacity(cluster);
    bytes.extend(super::header::MAGIC.to_be_bytes());
    bytes.extend(header.version.to_be_bytes());
    bytes.extend(if name.is_empty() { 0 } else { name_at as u64 }.to_be_bytes());
    bytes.extend((name.len() as u32).to_be_bytes());
    bytes.extend(header.cluster_bits.to_be_bytes());
    bytes.extend(header.size.to_be_bytes());
    bytes.extend(header.encryption.map_or(0, |_| super::header::CRYPT_METHOD_LUKS).to_be_bytes());
    bytes.extend(header.l1_entries.to_be_bytes());
    bytes.extend(header.l1_offset.to_be_bytes());
    bytes.extend(header.refcount_table_offset.to_be_bytes());
    bytes.extend(header.refcount_table_clusters.to_be_bytes());
    bytes.extend(header.snapshots.to_be_bytes());
    bytes.extend(header.snapshots_offset.to_be_bytes());
    if header.version == 3 {
        bytes.extend(header.incompatible.to_be_bytes());
        bytes.extend(header.compatible.to_be_bytes());
        bytes.extend(header.autoclear.to_be_bytes());
        bytes.extend(header.refcount_order.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend([u8::from(options.zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes.extend(extensions);
    bytes.extend(name.as_bytes());
    if bytes.len() > cluster {
        return Err(OpenError(format!("the names of other files do not fit into the header's {cluster} bytes")));
    }
    bytes.resize(cluster, 0);
    Ok(bytes)
}
