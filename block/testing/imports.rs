//! Writers of the formats that are only read: the smallest images that hold given content, with holes where whole units
//! are zero. What they make is what the specifications say, not what some program happens to.

use std::io::Write;

/// The content of fixtures: data, holes and zeroes, `size` bytes rounded up to sectors.
pub fn content(size: u64) -> Vec<u8> {
    let size = size.next_multiple_of(512) as usize;
    let byte = |at: usize| match at / 12288 % 3 {
        1 => 0,
        _ => (at / 512 * 31 + at % 251) as u8 | 1,
    };
    (0..size).map(byte).collect()
}

/// The units of `content`, the last one filled up with zeroes; `None` where all is zero.
fn units(content: &[u8], bytes: usize) -> Vec<Option<Vec<u8>>> {
    let unit = |part: &[u8]| {
        let mut unit = part.to_vec();
        unit.resize(bytes, 0);
        unit.iter().any(|byte| *byte != 0).then_some(unit)
    };
    content.chunks(bytes).map(unit).collect()
}

fn put(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if image.len() < at + bytes.len() {
        image.resize(at + bytes.len(), 0);
    }
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An image for VirtualBox, its blocks in reverse order.
pub fn vdi(content: &[u8]) -> Vec<u8> {
    let block = 8192;
    let units = units(content, block);
    let (table, data) = (512, 512 + (units.len() * 4).next_multiple_of(512));
    let mut image = vec![0; data];
    put(&mut image, 0x40, &0xbeda_107f_u32.to_le_bytes());
    put(&mut image, 0x44, &0x0001_0001_u32.to_le_bytes());
    put(&mut image, 0x4c, &1u32.to_le_bytes());
    put(&mut image, 0x154, &(table as u32).to_le_bytes());
    put(&mut image, 0x158, &(data as u32).to_le_bytes());
    put(&mut image, 0x168, &512u32.to_le_bytes());
    put(&mut image, 0x170, &(content.len() as u64).to_le_bytes());
    put(&mut image, 0x178, &(block as u32).to_le_bytes());
    put(&mut image, 0x180, &(units.len() as u32).to_le_bytes());
    let mut left = units.iter().flatten().count();
    for (index, unit) in units.iter().enumerate() {
        let entry = match unit {
            Some(unit) => {
                left -= 1;
                put(&mut image, data + left * block, unit);
                left as u32
            }
            None => [u32::MAX, u32::MAX - 1][index % 2],
        };
        put(&mut image, table + index * 4, &entry.to_le_bytes());
    }
    image
}

fn set_sum(structure: &mut [u8], at: usize) {
    let sum: u32 = structure.iter().map(|byte| u32::from(*byte)).sum();
    structure[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

fn vhd_footer(size: usize, kind: u32, header_at: u64) -> Vec<u8> {
    let mut footer = vec![0; 512];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 12, &0x0001_0000_u32.to_be_bytes());
    put(&mut footer, 16, &header_at.to_be_bytes());
    put(&mut footer, 28, b"win ");
    put(&mut footer, 48, &(size as u64).to_be_bytes());
    put(&mut footer, 56, &[0, 3, 4, 17]);
    put(&mut footer, 60, &kind.to_be_bytes());
    set_sum(&mut footer, 64);
    footer
}

/// An image for Hyper-V: the disk, then the footer.
pub fn vhd_fixed(content: &[u8]) -> Vec<u8> {
    [content, &vhd_footer(content.len(), 2, u64::MAX)].concat()
}

/// An image for Hyper-V that grows.
pub fn vhd_dynamic(content: &[u8]) -> Vec<u8> {
    let block = 16384;
    let units = units(content, block);
    let footer = vhd_footer(content.len(), 3, 512);
    let mut image = footer.clone();
    let mut header = vec![0; 1024];
    put(&mut header, 0, b"cxsparse");
    put(&mut header, 8, &[0xff; 8]);
    put(&mut header, 16, &1536u64.to_be_bytes());
    put(&mut header, 28, &(units.len() as u32).to_be_bytes());
    put(&mut header, 32, &(block as u32).to_be_bytes());
    set_sum(&mut header, 36);
    image.extend(header);
    image.resize(1536 + (units.len() * 4).next_multiple_of(512), 0xff);
    for (index, unit) in units.iter().enumerate() {
        if let Some(unit) = unit {
            let sector = (image.len() / 512) as u32;
            put(&mut image, 1536 + index * 4, &sector.to_be_bytes());
            image.extend([0xff; 512]);
            image.extend(unit);
        }
    }
    image.extend(footer);
    image
}

fn vmdk_header(capacity: usize, grain: usize, flags: u32, directory: u64) -> Vec<u8> {
    let mut header = vec![0; 512];
    put(&mut header, 0, b"KDMV");
    put(&mut header, 4, &if flags >> 16 == 0 { 1u32 } else { 3 }.to_le_bytes());
    put(&mut header, 8, &flags.to_le_bytes());
    put(&mut header, 12, &(capacity as u64 / 512).to_le_bytes());
    put(&mut header, 20, &(grain as u64 / 512).to_le_bytes());
    put(&mut header, 44, &4u32.to_le_bytes());
    put(&mut header, 56, &directory.to_le_bytes());
    put(&mut header, 77, &u16::from(flags >> 16 != 0).to_le_bytes());
    header
}

/// A sparse extent of VMware, with tables of four grains.
pub fn vmdk_sparse(content: &[u8]) -> Vec<u8> {
    let grain = 8192;
    let units = units(content, grain);
    let mut image = vmdk_header(content.len(), grain, 4, 1);
    let tables = units.chunks(4).count();
    image.resize(512 + (tables * 4).next_multiple_of(512), 0);
    for (number, table) in units.chunks(4).enumerate() {
        if table.iter().all(Option::is_none) {
            continue;
        }
        let table_at = image.len();
        put(&mut image, 512 + number * 4, &((table_at / 512) as u32).to_le_bytes());
        image.resize(table_at + 512, 0);
        for (index, unit) in table.iter().enumerate() {
            let sector = match unit {
                Some(unit) => {
                    image.extend(unit);
                    ((image.len() - grain) / 512) as u32
                }
                None => (index % 2) as u32,
            };
            put(&mut image, table_at + index * 4, &sector.to_le_bytes());
        }
    }
    image
}

/// An image of VMware that is compressed for streaming: the directory and its header stand behind the data.
pub fn vmdk_stream(content: &[u8]) -> Vec<u8> {
    let (grain, flags) = (8192, 1 << 16 | 1 << 17);
    let mut image = vmdk_header(content.len(), grain, flags, u64::MAX);
    let mut directory = Vec::new();
    for (number, table) in units(content, grain).chunks(4).enumerate() {
        let mut entries = Vec::new();
        for (index, unit) in table.iter().enumerate() {
            let mut sector = 0;
            if let Some(unit) = unit {
                sector = (image.len() / 512) as u32;
                let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
                packed.write_all(unit).expect("to memory");
                let packed = packed.finish().expect("to memory");
                image.extend((((number * 4 + index) * grain / 512) as u64).to_le_bytes());
                image.extend((packed.len() as u32).to_le_bytes());
                image.extend(packed);
                image.resize(image.len().next_multiple_of(512), 0);
            }
            entries.extend(sector.to_le_bytes());
        }
        directory.extend(((image.len() / 512) as u32).to_le_bytes());
        image.extend(entries);
        image.resize(image.len().next_multiple_of(512), 0);
    }
    let directory_at = image.len() as u64 / 512;
    image.extend(directory);
    image.resize(image.len().next_multiple_of(512), 0);
    let mut marker = vec![0; 512];
    put(&mut marker, 12, &3u32.to_le_bytes());
    image.extend(marker);
    image.extend(vmdk_header(content.len(), grain, flags, directory_at));
    image.resize(image.len() + 512, 0);
    image
}

/// A descriptor of VMware with these lines about extents.
pub fn vmdk_descriptor(extents: &str) -> String {
    format!("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\n# Extent description\n{extents}\n")
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn set_crc(structure: &mut [u8]) {
    let sum = crc32c(structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// From its text.
fn guid(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hexadecimal");
    let mut bytes: Vec<u8> = digits.chunks(2).map(pair).collect();
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// An image for Hyper-V in the newer format. `log`: it was not closed properly.
pub fn vhdx(content: &[u8], log: bool) -> Vec<u8> {
    let (kib, mib) = (1 << 10, 1 << 20);
    let units = units(content, mib);
    let mut image = b"vhdxfile".to_vec();
    for (number, at) in [64 * kib, 128 * kib].into_iter().enumerate() {
        let mut header = vec![0; 4096];
        put(&mut header, 0, b"head");
        put(&mut header, 8, &(number as u64).to_le_bytes());
        put(&mut header, 48, &[u8::from(log); 16]);
        put(&mut header, 66, &1u16.to_le_bytes());
        set_crc(&mut header);
        put(&mut image, at, &header);
    }
    let mut regions = vec![0; 64 * kib];
    put(&mut regions, 0, b"regi");
    put(&mut regions, 8, &2u32.to_le_bytes());
    let known = ["2DC27766-F623-4200-9D64-115E9BFD4A08", "8B7CA206-4790-4B9A-B8FE-575F050F886E"];
    for (number, text) in known.into_iter().enumerate() {
        put(&mut regions, 16 + number * 32, &guid(text));
        put(&mut regions, 32 + number * 32, &((1 + number as u64) * mib as u64).to_le_bytes());
        put(&mut regions, 40 + number * 32, &(mib as u32).to_le_bytes());
    }
    set_crc(&mut regions);
    put(&mut image, 192 * kib, &regions);
    put(&mut image, 256 * kib, &regions);
    let mut metadata = b"metadata".to_vec();
    put(&mut metadata, 10, &3u16.to_le_bytes());
    let items: [(&str, Vec<u8>); 3] = [
        ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", (mib as u64).to_le_bytes().to_vec()),
        ("2FA54224-CD1B-4876-B211-5DBED83BF4B8", (content.len() as u64).to_le_bytes().to_vec()),
        ("8141BF1D-A96F-4709-BA47-F233A8FAAB5F", 512u32.to_le_bytes().to_vec()),
    ];
    for (number, (text, value)) in items.iter().enumerate() {
        let (entry, at) = (32 + number * 32, 64 * kib + number * 16);
        put(&mut metadata, entry, &guid(text));
        put(&mut metadata, entry + 16, &(at as u32).to_le_bytes());
        put(&mut metadata, entry + 20, &(value.len() as u32).to_le_bytes());
        put(&mut metadata, entry + 24, &4u32.to_le_bytes());
        put(&mut metadata, at, value);
    }
    put(&mut image, 2 * mib, &metadata);
    image.resize(3 * mib, 0);
    for (index, unit) in units.iter().enumerate() {
        let entry = match unit {
            Some(unit) => {
                image.extend(unit);
                (image.len() - mib) as u64 | 6
            }
            None => 2,
        };
        // Behind each 4096 blocks the table has one entry of another kind; there are fewer here.
        put(&mut image, mib + index * 8, &entry.to_le_bytes());
    }
    image
}
