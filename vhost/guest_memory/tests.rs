//! Tests of memory regions and tables: what is refused, and where addresses lead.

use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;
use crate::testing::memfd;

/// A region of a file of its own, `size` bytes from its start.
fn region(guest_addr: u64, user_addr: u64, size: u64) -> Arc<MemoryRegion> {
    Arc::new(MemoryRegion::map(guest_addr, user_addr, size, 0, memfd(size)).expect("it fits its file"))
}

fn refusal(guest_addr: u64, user_addr: u64, size: u64, mmap_offset: u64, file: File) -> String {
    let refused = MemoryRegion::map(guest_addr, user_addr, size, mmap_offset, file).err();
    refused.expect("it must be refused").to_string()
}

fn table(regions: &[&Arc<MemoryRegion>]) -> Result<GuestMemory, String> {
    GuestMemory::new(regions.iter().copied().cloned().collect()).map_err(|error| error.to_string())
}

fn pieces(memory: &GuestMemory, guest_addr: u64, len: u32) -> Option<Vec<(usize, usize)>> {
    let mut iov = Vec::new();
    memory.push_iovecs(guest_addr, len, &mut iov).then(|| iov.iter().map(|v| (v.base() as usize, v.len())).collect())
}

#[test]
fn a_region_shows_its_part_of_the_file() {
    // The end is no multiple of a page.
    for offset in [0, 0x1000, 0x5000] {
        let file = memfd(0x10000);
        file.write_all_at(b"the first byte", offset).expect("room");
        let mapped = MemoryRegion::map(0x4000, 0x9000, 0x2345, offset, file).expect("it fits");
        let memory = table(&[&Arc::new(mapped)]).expect("one region");
        let mut iov = Vec::new();
        assert!(memory.push_iovecs(0x4000, 14, &mut iov));
        let mut bytes = [0; 14];
        blockport_block::iovec::copy_to(&iov, &mut bytes);
        assert_eq!(&bytes, b"the first byte");
        let last = pieces(&memory, 0x4000 + 0x2344, 1).expect("the last byte");
        assert_eq!(last, [(iov[0].base() as usize + 0x2344, 1)]);
        assert_eq!(pieces(&memory, 0x4000 + 0x2345, 1), None, "the byte after it");
    }
}

#[test]
fn a_region_that_begins_inside_a_page_is_refused() {
    assert!(refusal(0, 0, 0x1000, 0x1234, memfd(0x4000)).contains("not page-aligned"));
}

#[test]
fn a_region_must_fit_its_file() {
    assert!(refusal(0, 0, 0x1001, 0, memfd(0x1000)).contains("ends at 0x1001"));
    assert!(refusal(0, 0, 0x1000, 0x1000, memfd(0x1fff)).contains("ends at 0x2000"));
    assert!(refusal(0, 0, 1, 0, memfd(0)).contains("ends at 0x1"));
    assert!(MemoryRegion::map(0, 0, 0x1000, 0x1000, memfd(0x2000)).is_ok());
}

#[test]
fn a_region_that_wraps_around_or_is_empty_is_refused() {
    let (near_end, size) = (u64::MAX - 0xfff, 0x2000);
    for (guest, user, size, offset) in [
        (near_end, 0, size, 0),
        (0, near_end, size, 0),
        (0, 0, size, near_end),
        (0, 0, u64::MAX, 1),
        (0, 0, 1 << 63, 0),
        (0, 0, 0, 0),
    ] {
        let refused = refusal(guest, user, size, offset, memfd(0x4000));
        assert!(refused.contains("wrap around"), "{refused}");
    }
}

#[test]
fn a_region_that_cannot_be_mapped_is_refused() {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(b"x").expect("room");
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    assert!(refusal(0, 0, 0x1000, 0, pipe).contains("mmap"));
    let read_only = File::open(std::env::current_exe().expect("a test runs from a file")).expect("it can be read");
    assert!(refusal(0, 0, 0x1000, 0, read_only).contains("mmap"));
}

#[test]
fn huge_pages_are_mapped_whole() {
    const HUGE: u64 = 2 << 20;
    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("huge", flags).map(File::from);
    let mapped = file.map_err(|e| e.to_string()).and_then(|file| {
        file.set_len(2 * HUGE).map_err(|e| e.to_string())?;
        // Neither end is a multiple of a huge page.
        MemoryRegion::map(0, 0, HUGE, 0x1000, file).map_err(|e| e.to_string())
    });
    match mapped {
        Ok(region) => assert_eq!((region.mapping.len, region.host - region.mapping.start), (2 * HUGE as usize, 0x1000)),
        // A test that is not run says so where the harness does not swallow it.
        Err(why) => {
            let name = "huge_pages_are_mapped_whole";
            let _ = writeln!(std::io::stderr(), "SKIP {name}: no huge pages here: {why}");
        }
    }
}

#[test]
fn regions_must_not_overlap_in_guest_addresses() {
    let low = region(0x10000, 0x100_0000, 0x4000);
    for (start, size) in [(0x10000, 0x4000), (0x13000, 0x1000), (0xf000, 0x2000), (0x13fff, 0x1000), (0x11000, 0x100)] {
        assert!(table(&[&low, &region(start, 0x200_0000, size)]).is_err(), "{size:#x} bytes at {start:#x}");
    }
    for (start, size) in [(0x14000, 0x1000), (0xf000, 0x1000)] {
        assert!(table(&[&low, &region(start, 0x200_0000, size)]).is_ok(), "{size:#x} bytes at {start:#x}");
    }
}

#[test]
fn regions_must_not_overlap_in_the_front_end_s_addresses() {
    let low = region(0x10000, 0x100_0000, 0x4000);
    let between = region(0x80000, 0x300_0000, 0x1000);
    for (start, size) in [(0x100_0000, 0x4000), (0x100_3fff, 0x1000), (0xff_f000, 0x2000)] {
        let other = region(0x20000, start, size);
        let refused = table(&[&other, &between, &low]).err().expect("it must be refused");
        assert!(refused.contains("front-end"), "{refused}");
    }
    assert!(table(&[&low, &between, &region(0x20000, 0x100_4000, 0x1000)]).is_ok());
}

#[test]
fn a_table_holds_as_many_regions_as_it_says_and_no_more() {
    let many = |count: u64| (0..count).map(|at| region(at << 16, at << 20, 0x1000)).collect::<Vec<_>>();
    let memory = GuestMemory::new(many(REGIONS_MAX as u64)).expect("that many are allowed");
    for at in [0, 1, 255, 511u64] {
        assert!(pieces(&memory, at << 16, 0x1000).is_some());
        assert!(memory.user_to_host(at << 20, 0x1000, 1).is_some());
    }
    assert!(GuestMemory::new(many(REGIONS_MAX as u64 + 1)).is_err());
}

#[test]
fn an_empty_table_holds_nothing() {
    let memory = GuestMemory::new(Vec::new()).expect("an empty one is allowed");
    assert_eq!(pieces(&memory, 0, 1), None);
    assert_eq!(pieces(&memory, 0, 0), Some(Vec::new()));
    assert!(memory.user_to_host(0, 0, 1).is_none());
}

#[test]
fn bytes_in_a_gap_are_not_memory() {
    let (low, high) = (region(0x10000, 0x100_0000, 0x1000), region(0x12000, 0x200_0000, 0x1000));
    let memory = table(&[&high, &low]).expect("they do not overlap");
    for (start, len) in [(0x11000, 1), (0x10fff, 2), (0x11fff, 2), (0x10000, 0x3000), (0xffff, 1), (0x13000, 1)] {
        assert_eq!(pieces(&memory, start, len), None, "{len:#x} bytes at {start:#x}");
    }
    assert_eq!(pieces(&memory, 0x10000, 0x1000), Some(vec![(low.host, 0x1000)]));
    assert_eq!(pieces(&memory, 0x12fff, 1), Some(vec![(high.host + 0xfff, 1)]));
}

#[test]
fn bytes_across_neighbours_come_in_pieces_for_the_guest_and_not_at_all_for_the_front_end() {
    // Neighbours in both address spaces, in the same order.
    let (low, high) = (region(0x10000, 0x100_0000, 0x1000), region(0x11000, 0x100_1000, 0x1000));
    let memory = table(&[&low, &high]).expect("they do not overlap");
    assert_eq!(pieces(&memory, 0x10ff0, 0x20), Some(vec![(low.host + 0xff0, 0x10), (high.host, 0x10)]));
    assert!(memory.user_to_host(0x100_0ff0, 0x20, 1).is_none(), "a ring is in one region");
    assert!(memory.guest_to_host(0x10ff0, 0x20, 1).is_none());
    assert_eq!(memory.user_to_host(0x100_0ff0, 0x10, 16), Some((low.host + 0xff0) as *mut u8));
    assert!(memory.user_to_host(0x100_0ff8, 0x8, 16).is_none(), "not aligned");
}

#[test]
fn addresses_near_the_end_of_all_addresses_do_not_wrap() {
    let last = region(u64::MAX - 0xfff, u64::MAX - 0xfff, 0xfff);
    let memory = table(&[&last]).expect("one region");
    assert_eq!(pieces(&memory, u64::MAX - 0xfff, 0xfff), Some(vec![(last.host, 0xfff)]));
    assert_eq!(pieces(&memory, u64::MAX - 0xfff, 0x1000), None);
    assert_eq!(pieces(&memory, u64::MAX, 1), None);
    assert_eq!(pieces(&memory, u64::MAX - 1, u32::MAX), None);
    assert!(memory.user_to_host(u64::MAX - 1, u64::MAX, 1).is_none());
}

#[test]
fn a_table_keeps_its_regions_mapped() {
    let low = region(0x10000, 0x100_0000, 0x1000);
    let memory = table(&[&low]).expect("one region");
    drop(low);
    let mut iov = Vec::new();
    assert!(memory.push_iovecs(0x10000, 4, &mut iov));
    assert_eq!(blockport_block::iovec::fill_from(&iov, b"data"), 4);
}
