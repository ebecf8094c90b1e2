//! Images of the formats that are only read, damaged on purpose: a clear error in bounded time and memory, and never
//! zeroes in place of what is lost.

use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockError, Child, Permissions};

use crate::images::create_raw;
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, imports, open};

const SIZE: u64 = 200 * 512;

/// Opens and reads all of it, sector by sector. The first number counts sectors that were read, the second errors.
fn try_all(format: &str, image: &[u8]) -> Result<(u64, u64), String> {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create_raw(&path, image);
    let (_graph, node) = open(&format!("{format},file.driver=file,file.filename={path}")).map_err(|e| e.0)?;
    let child = Child::attach(node, "the test", Permissions::device(false), 512).expect("nobody else uses the node");
    let context = context();
    let channel = channel(&child, &context);
    Ok(context.run_until(async move {
        let buffer = AlignedBuffer::new(512, 512);
        let (mut good, mut bad) = (0, 0);
        // A damaged header may make the disk longer.
        for sector in 0..channel.length().min(SIZE) / 512 {
            match channel.preadv(sector * 512, &[buffer.iov()]).await {
                Ok(()) => good += 1,
                Err(BlockError::Host(libc::EIO)) => bad += 1,
                Err(other) => panic!("sector {sector}: {other}"),
            }
        }
        let _ = channel.block_status(0, channel.length()).await;
        (good, bad)
    }))
}

fn images() -> [(&'static str, Vec<u8>); 6] {
    let content = imports::content(SIZE);
    [
        ("vdi", imports::vdi(&content)),
        ("vpc", imports::vhd_fixed(&content)),
        ("vpc", imports::vhd_dynamic(&content)),
        ("vhdx", imports::vhdx(&content, false)),
        ("vmdk", imports::vmdk_sparse(&content)),
        ("vmdk", imports::vmdk_stream(&content)),
    ]
}

#[test]
fn random_damage_is_an_error_or_does_no_harm() {
    let mut random = Random::new(11);
    for (format, image) in images() {
        assert_eq!(try_all(format, &image), Ok((SIZE / 512, 0)), "{format} as it was made");
        // Where headers and tables are.
        let places: &[(u64, u64)] = match format {
            "vhdx" => &[(0, 8), (64 << 10, 100), (192 << 10, 100), (1 << 20, 64), (2 << 20, 200), (2112 << 10, 64)],
            _ => &[(0, 512), (512, 512), (512, 1024), (0, image.len() as u64)],
        };
        for round in 0..30 {
            let mut image = image.clone();
            let (start, len) = places[round % places.len()];
            for _ in 0..=random.below(4) {
                let at = (start + random.below(len)) as usize;
                let bytes = [vec![0xff; 8], vec![0; 8], random.bytes(8), vec![random.next() as u8]];
                let bytes = &bytes[random.below(4) as usize];
                let end = (at + bytes.len()).min(image.len());
                image[at..end].copy_from_slice(&bytes[..end - at]);
            }
            if let Err(error) = try_all(format, &image) {
                assert!(error.contains("image"), "{error}");
            }
        }
    }
}

#[test]
fn what_was_cut_off_is_an_error_and_not_zero() {
    for (format, image) in images() {
        // Where the last block is, which is what is cut into.
        let keep = match format {
            "vhdx" => image.len() - (1 << 20) + 512,
            _ => image.len().saturating_sub(13_000).max(2048),
        };
        match try_all(format, &image[..keep]) {
            Ok((_, bad)) => assert!(bad > 0, "{format}: what is lost reads as something"),
            // Its end says what it is.
            Err(error) => {
                assert!(error.contains("footer") || error.contains("header") || error.contains("short"), "{error}")
            }
        }
    }
    // Less than a sector of it is there: a node is a whole number of sectors long, and the rest of that one would be zero.
    let content = vec![9; 4096];
    let (format, image) = ("vdi", imports::vdi(&content));
    let cut = &image[..image.len() - 4096 - 100];
    assert_eq!(try_all(format, cut), Ok((7, 1)));
}

#[test]
fn tables_are_not_read_whole_whatever_is_said_of_them() {
    // A disk of 8 EiB would have a table that no memory holds.
    let mut image = imports::vhdx(&imports::content(SIZE), false);
    image[(2 << 20) + (64 << 10) + 16..][..8].copy_from_slice(&(1u64 << 46).to_le_bytes());
    assert!(try_all("vhdx", &image).expect_err("the table is short").contains("too short"));
    let mut image = imports::vmdk_sparse(&imports::content(SIZE));
    image[12..20].copy_from_slice(&(1u64 << 50).to_le_bytes());
    assert_eq!(try_all("vmdk", &image), Ok((SIZE / 512, 0)), "a sparse one of 512 PiB is served");
    let mut image = imports::vmdk_sparse(&imports::content(SIZE));
    image[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(try_all("vmdk", &image).is_err());
    for grain in [0u64, 3, 1 << 22, 1 << 63] {
        let mut image = imports::vmdk_sparse(&imports::content(SIZE));
        image[20..28].copy_from_slice(&grain.to_le_bytes());
        assert!(try_all("vmdk", &image).expect_err("no such grain").contains("grains"));
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let content = imports::content(SIZE);
    let log = try_all("vhdx", &imports::vhdx(&content, true)).expect_err("there is a log");
    assert!(log.contains("log"), "{log}");
    let child = imports::vmdk_descriptor("RW 8 ZERO").replace("parentCID=ffffffff", "parentCID=12345678");
    let error = try_all("vmdk", child.as_bytes()).expect_err("it has a parent");
    assert!(error.contains("parentCID"), "{error}");
    let mut vdi = imports::vdi(&content);
    vdi[0x4c] = 4;
    assert!(try_all("vdi", &vdi).expect_err("a differencing one").contains("another image"));
    for (format, other) in [("vdi", "vmdk"), ("vmdk", "vhdx"), ("vhdx", "vpc"), ("vpc", "vdi")] {
        let image = images().into_iter().find(|(name, _)| *name == other).expect("it is in the list").1;
        assert!(try_all(format, &image).is_err());
        assert!(try_all(format, &[]).is_err());
        assert!(try_all(format, &[0; 100]).is_err());
    }
}

#[test]
fn a_descriptor_opens_no_more_than_it_may() {
    for (lines, expected) in [
        ("RW 8 FLAT \"nowhere.vmdk\" 0", "nowhere.vmdk"),
        ("RW 8 FLAT \"nbd://host/disk\" 0", "protocol"),
        ("RW 18446744073709551615 ZERO", "size"),
        ("RW 9223372036854775807 ZERO", "size"),
        ("RW 8 SPARSE \"disk\"", "header"),
    ] {
        let error = try_all("vmdk", imports::vmdk_descriptor(lines).as_bytes()).expect_err(lines);
        assert!(error.contains(expected), "{error}");
    }
    let many = "RW 1 ZERO\n".repeat(5000);
    assert!(try_all("vmdk", imports::vmdk_descriptor(&many).as_bytes()).expect_err("too many").contains("4096"));
}
