//! Fixtures: for every driver of the register at least one way to open it. A new driver gets its lines here, and every
//! check of the conformance suite runs on it.

use blockport_block::drivers::luks::{LuksOptions, new_volume};
use blockport_block::drivers::qcow2::{CreateOptions, new_image};

use super::loop_device::LoopDevice;
use super::{PASSPHRASE, TempDir, imports, open, opened};

/// A node to be opened, with whatever it stands on.
pub struct Fixture {
    /// What failures are reported under.
    pub name: &'static str,
    /// The driver that it is for.
    pub driver: &'static str,
    /// How to open it, as key=value.
    pub options: String,
    /// Reads give what was written.
    pub keeps: bool,
    /// So they do after closing and opening again.
    pub persists: bool,
    /// It can change its size.
    pub resizes: bool,
    /// It is only read, and this is what it holds.
    pub holds: Option<Vec<u8>>,
    // Detached before its file goes.
    _device: Option<LoopDevice>,
    _place: Option<TempDir>,
}

const PLAIN: Fixture = Fixture {
    name: "",
    driver: "",
    options: String::new(),
    keeps: true,
    persists: false,
    resizes: true,
    holds: None,
    _device: None,
    _place: None,
};

/// One fixture of each kind, about `size` bytes long: exactly that long where the driver has no unit of its own.
pub fn all(size: u64) -> Vec<Fixture> {
    let mut all = vec![
        Fixture {
            name: "null-co",
            driver: "null-co",
            options: format!("null-co,read-zeroes=on,size={size}"),
            keeps: false,
            ..PLAIN
        },
        Fixture {
            name: "null-co with latency",
            driver: "null-co",
            options: format!("null-co,read-zeroes=on,latency-ns=20000,size={size}"),
            keeps: false,
            ..PLAIN
        },
        Fixture { name: "memory", driver: "memory", options: format!("memory,size={size}"), ..PLAIN },
        on_file("file, buffered", "file", TempDir::on_disk(), size, |path| format!("file,filename={path}")),
        on_file("file, direct", "file", TempDir::on_disk(), size, |path| {
            format!("file,cache.direct=on,aio=native,filename={path}")
        }),
        on_file("file, unsafe", "file", TempDir::on_disk(), size, |path| {
            format!("file,cache.no-flush=on,locking=off,filename={path}")
        }),
        on_file("file, tmpfs", "file", TempDir::in_memory(), size, |path| format!("file,filename={path}")),
        on_file("raw on a direct file", "raw", TempDir::on_disk(), size, |path| {
            format!("raw,cache.direct=on,file.driver=file,file.filename={path}")
        }),
        on_file("raw from an offset on", "raw", TempDir::in_memory(), size + 1536, |path| {
            format!("raw,offset=1536,file.driver=file,file.filename={path}")
        }),
        on_file("raw window of a direct file", "raw", TempDir::on_disk(), size + 8192, |path| {
            let size = size / 512 * 512;
            format!("raw,offset=2560,size={size},cache.direct=on,file.driver=file,file.filename={path}")
        }),
        Fixture {
            name: "raw window of a demanding node",
            driver: "raw",
            options: format!(
                "raw,offset=1536,size={},file.driver=blkdebug,file.align=4096,file.image.driver=memory,\
                 file.image.size={}",
                size / 512 * 512,
                size + 16384
            ),
            resizes: false,
            ..PLAIN
        },
        Fixture {
            name: "blkdebug",
            driver: "blkdebug",
            options: format!("blkdebug,image.driver=memory,image.size={size}"),
            ..PLAIN
        },
        Fixture {
            name: "blkdebug, demanding",
            driver: "blkdebug",
            options: format!(
                "blkdebug,align=4096,max-transfer=12K,opt-write-zero=8K,max-write-zero=20K,opt-discard=4K,\
                 max-discard=16K,delay.0.iotype=write,delay.0.ns=100,delay.0.sector=64,image.driver=memory,\
                 image.size={size}"
            ),
            ..PLAIN
        },
        on_file("blkdebug on a direct file", "blkdebug", TempDir::on_disk(), size, |path| {
            format!(
                "blkdebug,max-transfer=1536,align=512,cache.direct=on,image.driver=raw,image.file.driver=file,\
                 image.file.filename={path}"
            )
        }),
        qcow2("qcow2", TempDir::on_disk(), "", CreateOptions { size, ..CreateOptions::default() }),
        qcow2(
            "qcow2, direct, in small clusters",
            TempDir::on_disk(),
            ",cache.direct=on,discard=unmap",
            CreateOptions { size, cluster_size: 4096, refcount_bits: 1, ..CreateOptions::default() },
        ),
        qcow2(
            "qcow2 in the smallest clusters, with small caches",
            TempDir::in_memory(),
            ",l2-cache-size=2K,l2-cache-entry-size=512,refcount-cache-size=2K,discard=unmap",
            CreateOptions { size, cluster_size: 512, version: 2, ..CreateOptions::default() },
        ),
        qcow2(
            "qcow2 with subclusters",
            TempDir::in_memory(),
            ",discard=unmap",
            CreateOptions { size, cluster_size: 16384, extended_l2: true, ..CreateOptions::default() },
        ),
    ];
    all.extend([
        Fixture {
            name: "blkverify",
            driver: "blkverify",
            options: format!("blkverify,test.driver=memory,test.size={size},raw.driver=memory,raw.size={size}"),
            ..PLAIN
        },
        Fixture {
            name: "copy-on-read",
            driver: "copy-on-read",
            options: format!("copy-on-read,file.driver=memory,file.size={size}"),
            ..PLAIN
        },
        Fixture {
            name: "blklogwrites",
            driver: "blklogwrites",
            options: format!("blklogwrites,file.driver=memory,file.size={size},log.driver=memory,log.size=256M"),
            ..PLAIN
        },
        on_file("blklogwrites in larger sectors", "blklogwrites", TempDir::in_memory(), size, |path| {
            format!(
                "blklogwrites,log-sector-size=4096,log-super-update-interval=3,file.driver=file,file.filename={path},\
                 log.driver=memory,log.size=256M"
            )
        }),
    ]);
    let place = TempDir::on_disk();
    let (test, raw) = (place.file("test", size), place.file("raw", size));
    all.push(Fixture {
        name: "blkverify of a direct file",
        driver: "blkverify",
        options: format!(
            "blkverify,test.driver=file,test.filename={test},test.cache.direct=on,raw.driver=file,raw.filename={raw}"
        ),
        persists: true,
        _place: Some(place),
        ..PLAIN
    });
    for (name, cache) in [("host_device", "off"), ("host_device, direct", "on")] {
        let place = TempDir::on_disk();
        match LoopDevice::new(&place.file("disk", size), &[]) {
            Ok(device) => all.push(Fixture {
                name,
                driver: "host_device",
                options: format!("host_device,cache.direct={cache},filename={}", device.path()),
                persists: true,
                resizes: false,
                _device: Some(device),
                _place: Some(place),
                ..PLAIN
            }),
            Err(error) => eprintln!("SKIP {}: no loop device: {error}", name.replace([' ', ','], "-")),
        }
    }
    for group in ["unlimited", "limited"] {
        all.push(Fixture {
            name: group,
            driver: "throttle",
            options: format!("throttle,throttle-group={group},file.driver=memory,file.size={size}"),
            ..PLAIN
        });
    }
    all.extend([
        luks("luks", TempDir::in_memory(), "", size, LuksOptions::default()),
        luks("luks, direct", TempDir::on_disk(), ",cache.direct=on", size, LuksOptions::default()),
        luks(
            "luks, in another mode",
            TempDir::in_memory(),
            "",
            size,
            LuksOptions {
                cipher: "aes-128".to_owned(),
                mode: "cbc".to_owned(),
                iv: "essiv".to_owned(),
                ..LuksOptions::default()
            },
        ),
    ]);
    all.extend(imported(size));
    for fixture in &mut all {
        fixture.resizes &= fixture.name != "raw window of a direct file";
    }
    // The project may be built where there is no direct I/O.
    all.retain(|fixture| {
        let refused = open(&fixture.options).err().filter(|error| error.0.contains("does not do direct I/O"));
        if let Some(error) = &refused {
            eprintln!("SKIP {}: {error}", fixture.name.replace([' ', ','], "-"));
        }
        refused.is_none()
    });
    all
}

/// An encrypted volume, full of zeroes, with more options behind the file's.
fn luks(name: &'static str, place: TempDir, more: &str, size: u64, options: LuksOptions) -> Fixture {
    let path = place.path("disk.luks");
    let options = LuksOptions { iter_time_ms: 1, ..options };
    create_luks(&path, size, &options);
    let options = format!("luks,key-secret=secret,file.driver=file,file.filename={path}{more}");
    Fixture { name, driver: "luks", options, persists: true, _place: Some(place), ..PLAIN }
}

/// Makes an encrypted volume, opened by the secret `secret`, that reads as zeroes.
pub fn create_luks(path: &str, size: u64, options: &LuksOptions) {
    let header = new_volume(options, PASSPHRASE).expect("the options agree");
    std::fs::write(path, &header).expect("the directory is writable");
    // It grows by zeroes that are encrypted.
    let (_graph, node) = opened(&format!("luks,key-secret=secret,file.driver=file,file.filename={path}"));
    node.resize(size).expect("there is room");
}

/// Images in the formats that are only read.
fn imported(size: u64) -> Vec<Fixture> {
    let content = imports::content(size);
    // A disk in two extents.
    let (first, second) = content.split_at(content.len() / 1024 * 512);
    let sparse = |bytes: &[u8]| imports::vmdk_sparse(bytes);
    let lines = |kind: &str, from: u64| {
        let (first_sectors, second_sectors) = (first.len() / 512, second.len() / 512);
        let place = if kind == "FLAT" { format!(" {from}") } else { String::new() };
        let lines =
            format!("RW {first_sectors} {kind} \"a.vmdk\"{place}\nRW {second_sectors} {kind} \"b.vmdk\"{place}");
        imports::vmdk_descriptor(&lines).into_bytes()
    };
    let behind = |bytes: &[u8]| [&[0x55; 1024], bytes].concat();
    let images = [
        ("vdi", "vdi", imports::vdi(&content), vec![]),
        ("vpc, fixed", "vpc", imports::vhd_fixed(&content), vec![]),
        ("vpc, dynamic", "vpc", imports::vhd_dynamic(&content), vec![]),
        ("vhdx", "vhdx", imports::vhdx(&content, false), vec![]),
        ("vmdk, sparse", "vmdk", sparse(&content), vec![]),
        ("vmdk, compressed", "vmdk", imports::vmdk_stream(&content), vec![]),
        ("vmdk, sparse extents", "vmdk", lines("SPARSE", 0), vec![sparse(first), sparse(second)]),
        ("vmdk, flat extents", "vmdk", lines("FLAT", 2), vec![behind(first), behind(second)]),
    ];
    let fixture = |(name, driver, image, extents): (_, _, Vec<u8>, Vec<Vec<u8>>)| {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        std::fs::write(&path, image).expect("the directory is writable");
        for (extent, name) in extents.iter().zip(["a.vmdk", "b.vmdk"]) {
            std::fs::write(place.path(name), extent).expect("the directory is writable");
        }
        Fixture {
            name,
            driver,
            options: format!("{driver},file.driver=file,file.filename={path}"),
            resizes: false,
            holds: Some(content.clone()),
            _place: Some(place),
            ..PLAIN
        }
    };
    images.map(fixture).into()
}

/// An image in the format qcow2, with more options behind the file's.
fn qcow2(name: &'static str, place: TempDir, more: &str, create: CreateOptions) -> Fixture {
    let path = place.path("disk.qcow2");
    std::fs::write(&path, new_image(&create).expect("the options agree")).expect("the directory is writable");
    let options = format!("qcow2,file.driver=file,file.filename={path}{more}");
    Fixture { name, driver: "qcow2", options, persists: true, _place: Some(place), ..PLAIN }
}

fn on_file(
    name: &'static str,
    driver: &'static str,
    place: TempDir,
    size: u64,
    options: impl FnOnce(&str) -> String,
) -> Fixture {
    let path = place.file("disk", size);
    Fixture { name, driver, options: options(&path), persists: true, _place: Some(place), ..PLAIN }
}
