//! Tests of the guard, in a process of their own where one may die.

use std::os::unix::process::ExitStatusExt;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::guest_memory::{GuestMemory, MemoryRegion};
use crate::testing::{in_child, is_child, memfd};

const SIZE: u64 = 0x4000;

fn one_region(guest_addr: u64) -> (GuestMemory, std::fs::File) {
    let file = memfd(SIZE);
    let kept = file.try_clone().expect("a descriptor");
    let region = MemoryRegion::map(guest_addr, guest_addr, SIZE, 0, file).expect("it fits its file");
    (GuestMemory::new(vec![region.into()]).expect("one region"), kept)
}

#[test]
fn a_truncated_region_is_lost_and_the_process_lives() {
    let (hit, file) = one_region(0x10000);
    let (other, _) = one_region(0x10000);
    let write = |memory: &GuestMemory, at| memory.vm_memory().write_obj(1u8, GuestAddress(at));
    write(&hit, 0x10000).expect("inside");
    assert!(!hit.is_lost());
    file.set_len(0x1000).expect("a memfd shrinks");
    write(&hit, 0x10000).expect("inside");
    assert!(!hit.is_lost(), "that page is still there");
    write(&hit, 0x12000).expect("inside, as far as addresses go");
    assert!(hit.is_lost());
    assert!(!other.is_lost(), "another front-end's is not");
    // All of it is memory of ours now; what was there is gone.
    assert_eq!(hit.vm_memory().read_obj::<u8>(GuestAddress(0x12000)).ok(), Some(1));
    assert_eq!(hit.vm_memory().read_obj::<u8>(GuestAddress(0x10000)).ok(), Some(0));
}

#[test]
fn a_new_region_in_the_place_of_a_lost_one_is_not_lost() {
    let (hit, file) = one_region(0x10000);
    file.set_len(0).expect("a memfd shrinks");
    hit.vm_memory().write_obj(1u8, GuestAddress(0x10000)).expect("inside, as far as addresses go");
    assert!(hit.is_lost());
    drop(hit);
    assert!((0..8).all(|_| !one_region(0x10000).0.is_lost()));
}

#[test]
fn a_fault_elsewhere_kills_the_process() {
    if !is_child() {
        let output = in_child("sigbus::tests::a_fault_elsewhere_kills_the_process");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("still alive"), "{said}");
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{}: {said}", output.status);
        return;
    }
    // With the handler in place, and a mapping of its own.
    let _guarded = one_region(0x10000);
    let file = memfd(SIZE);
    let not_guarded: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(0),
        SIZE as usize,
        Some(FileOffset::new(file.try_clone().expect("a descriptor"), 0)),
    )])
    .expect("it fits its file");
    not_guarded.write_obj(1u8, GuestAddress(0)).expect("inside");
    println!("still alive");
    file.set_len(0).expect("a memfd shrinks");
    let _ = not_guarded.write_obj(1u8, GuestAddress(0));
    println!("the fault had no consequence");
}

#[test]
fn a_fault_after_the_region_is_gone_kills_the_process() {
    if !is_child() {
        let output = in_child("sigbus::tests::a_fault_after_the_region_is_gone_kills_the_process");
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{}", output.status);
        return;
    }
    let file = memfd(SIZE);
    let mapped: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(0),
        SIZE as usize,
        Some(FileOffset::new(file.try_clone().expect("a descriptor"), 0)),
    )])
    .expect("it fits its file");
    use vm_memory::GuestMemoryBackend;
    let start = mapped.get_host_address(GuestAddress(0)).expect("its first byte") as usize;
    drop(SigbusGuard::new(start, SIZE as usize));
    file.set_len(0).expect("a memfd shrinks");
    let _ = mapped.write_obj(1u8, GuestAddress(0));
}
