//! Opening: from options and header to an image with its children. It owns the options and which files an image may
//! name; tables are read at activation.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use super::super::own_loop::on_own_loop;
use super::Qcow2;
use super::data::PayloadCipher;
use super::geometry::Geometry;
use super::header::{Header, HeaderSector};
use super::load::{CacheSizes, read_header};
use super::state::{Image, State};
use crate::child::Child;
use crate::driver::BlockDriver;
use crate::drivers::luks;
use crate::error::{OpenError, OpenResult};
use crate::graph::{OpenContext, StatedFile};
use crate::node::SECTOR;
use crate::options::Options;

const L2_CACHE_BYTES: u64 = 32 << 20;
const REFCOUNT_CACHE_BYTES: u64 = 2 << 20;
const SLICE_BYTES: u64 = 4096;

/// What only the options say.
struct Settings {
    caches: CacheSizes,
    slice_bytes: u64,
    pass_discards: bool,
    /// `None`: as the image says.
    lazy: Option<bool>,
    for_repair: bool,
}

impl Settings {
    fn take(options: &mut Options, discard: bool) -> crate::options::Result<Self> {
        let l2 = options.take_size("l2-cache-size")?;
        let refcounts = options.take_size("refcount-cache-size")?;
        let caches = match (options.take_size("cache-size")?, l2, refcounts) {
            (None, l2, refcounts) => {
                CacheSizes { l2: l2.unwrap_or(L2_CACHE_BYTES), refcounts: refcounts.unwrap_or(REFCOUNT_CACHE_BYTES) }
            }
            (Some(_), Some(_), Some(_)) => return Err(options.conflict("cache-size", "refcount-cache-size")),
            (Some(all), l2, refcounts) => {
                let part = l2.or(refcounts).unwrap_or(0);
                let Some(rest) = all.checked_sub(part) else {
                    return Err(options.invalid("cache-size", all, "no less than the size of one of the caches"));
                };
                match (l2, refcounts) {
                    (Some(l2), _) => CacheSizes { l2, refcounts: rest },
                    (None, Some(refcounts)) => CacheSizes { l2: rest, refcounts },
                    (None, None) => CacheSizes { l2: all - all / 8, refcounts: all / 8 },
                }
            }
        };
        let slice_bytes = match options.take_size("l2-cache-entry-size")? {
            None => SLICE_BYTES,
            Some(bytes) if bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes) => bytes,
            Some(bytes) => {
                let expected = "a power of two from 512 to the size of a cluster";
                return Err(options.invalid("l2-cache-entry-size", bytes, expected));
            }
        };
        let pass_discards = options.take_bool("pass-discard-request")?.unwrap_or(discard);
        let lazy = options.take_bool("lazy-refcounts")?;
        let for_repair = options.take_bool("x-repair")?.unwrap_or(false);
        let checks = [("constant", ()), ("cached", ()), ("all", ())];
        options.take_enum("overlap-check", &checks)?;
        options.take_unsupported(&[
            "pass-discard-snapshot",
            "pass-discard-other",
            "discard-no-unref",
            "cache-clean-interval",
        ])?;
        Ok(Self { caches, slice_bytes, pass_discards, lazy, for_repair })
    }
}

/// Opens an image: its header says which other files it needs.
pub(super) fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let node = context.node;
    let settings = Settings::take(options, node.discard).map_err(OpenError::new)?;
    let file = context.growing_child(options, "file", SECTOR as u32)?;
    let named = |e: OpenError| e.context(format_args!("{}", image_name(&file, &node.name)));
    let (header, cluster) = on_own_loop("qcow2-control", |context| {
        let channel = file.channel(context)?;
        context.run_until(async move { read_header(&channel).await })
    })
    .map_err(named)?;
    let data = open_data_file(options, context, &file, &header).map_err(named)?;
    let stated = header.backing.clone().map(|name| StatedFile { name, format: header.backing_format.clone() });
    if stated.is_some() && header.is_raw_data() {
        return Err(named(OpenError::new(
            "it has a raw external data file and a backing file, which contradict each other",
        )));
    }
    let previous = context.previous::<Qcow2>().and_then(|image| image.backing()).map(|backing| backing.node());
    let backing = context.backing_child(options, "backing", &file, previous, stated).map_err(named)?;

    let cipher = open_cipher(options, context, &file, &header).map_err(named)?;

    let geometry = Geometry::new(&header, settings.slice_bytes);
    let is_read_only = |child: &Arc<Child>| child.node().is_read_only();
    let writable = !node.read_only && !is_read_only(&file) && !data.as_ref().is_some_and(is_read_only);
    let size = AtomicU64::new(header.size);
    if settings.lazy == Some(true) && !geometry.v3 {
        return Err(named(OpenError::new("lazy refcounts need version 3 of the format")));
    }
    let lazy = settings.lazy.unwrap_or(header.has_lazy_refcounts()) && geometry.v3;
    let sector = HeaderSector::new(&cluster);
    let image = Image {
        name: node.name.clone(),
        geometry,
        writable,
        for_repair: AtomicBool::new(settings.for_repair && writable),
        pass_discards: settings.pass_discards,
        lazy: AtomicBool::new(lazy),
        size,
        broken: AtomicBool::new(false),
        cipher,
        tracking: AtomicBool::new(false),
        bitmaps: Mutex::default(),
        state: Mutex::new(State::unloaded(geometry, header, sector, settings.caches)),
    };
    let (has_data_file, has_backing) = (data.is_some(), backing.is_some());
    Ok(Box::new(Qcow2 {
        image: Arc::new(image),
        caches: settings.caches,
        children: [Some(file), data, backing].into_iter().flatten().collect(),
        has_data_file,
        has_backing,
        active: AtomicBool::new(false),
    }))
}

/// The cipher of an encrypted image, opened by the secret that the options name.
fn open_cipher(
    options: &mut Options,
    context: &OpenContext<'_>,
    file: &Arc<Child>,
    header: &Header,
) -> OpenResult<Option<Arc<dyn PayloadCipher>>> {
    let format = options.take_enum("encrypt.format", &[("luks", ())]).map_err(OpenError::new)?;
    let key_secret = options.take_str("encrypt.key-secret").map_err(OpenError::new)?;
    let Some((start, bytes)) = header.encryption else {
        return match format.is_some() || key_secret.is_some() {
            true => Err(OpenError::new("options \"encrypt\" are given, and it is not encrypted")),
            false => Ok(None),
        };
    };
    let Some(key_secret) = key_secret else {
        return Err(OpenError::new(
            "it is encrypted by LUKS: give encrypt.key-secret, the id of an object of type secret",
        ));
    };
    let secret = context.secret(options, "encrypt.key-secret", &key_secret)?;
    let (cipher, _) = on_own_loop("qcow2-control", |context| {
        let channel = file.channel(context)?;
        context.run_until(async move { luks::unlock(&channel, start, bytes, secret.bytes()).await })
    })?;
    Ok(Some(Arc::new(cipher)))
}

fn open_data_file(
    options: &mut Options,
    context: &OpenContext<'_>,
    file: &Arc<Child>,
    header: &Header,
) -> OpenResult<Option<Arc<Child>>> {
    match (header.has_data_file(), options.contains("data-file"), &header.data_file) {
        (false, true, _) => Err(OpenError::new("option \"data-file\" is given, and the image's data is in the image")),
        (false, false, _) => Ok(None),
        (true, true, _) => context.growing_child(options, "data-file", SECTOR as u32).map(Some),
        (true, false, Some(name)) => context.stated_data_file("data-file", file, name).map(Some),
        (true, false, None) => {
            Err(OpenError::new("its data is in another file, which it does not name: give data-file"))
        }
    }
}

/// What errors call the image.
fn image_name(file: &Child, node: &str) -> String {
    match file.node().file_name() {
        Some(path) => format!("qcow2 image \"{path}\""),
        None => format!("node \"{node}\""),
    }
}
