//! Rings of both layouts in guest memory of any content, which changes between two steps as a guest may change it. Every
//! buffer of a chain lies in guest memory and can be touched to its last byte; there are never more chains out than the
//! ring has entries; readable buffers come first; an error is the end of it.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockport_block::iovec;
use blockport_vhost::internals::{Chain, GuestMemory, MemoryRegion, RingFeatures, RingLayout, VirtQueue};
use libfuzzer_sys::fuzz_target;

/// Two regions, neighbours for the guest and apart for the front-end. Small, so that numbers hit something.
const REGION: u64 = 0x1000;
const GUEST: u64 = 0x1000;
const USER: [u64; 2] = [0x7000_0000, 0x6000_0000];

fn memory() -> (Arc<GuestMemory>, File) {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(2 * REGION).expect("room");
    let regions = USER.iter().zip(0u64..).map(|(user, at)| {
        let file = file.try_clone().expect("a descriptor");
        Arc::new(MemoryRegion::map(GUEST + at * REGION, *user, REGION, at * REGION, file).expect("a region"))
    });
    (Arc::new(GuestMemory::new(regions.collect()).expect("regions")), file)
}

thread_local! {
    static MEMORY: (Arc<GuestMemory>, File) = memory();
}

fuzz_target!(|data: &[u8]| {
    let [flags, exponent, base_low, base_high, data @ ..] = data else { return };
    MEMORY.with(|(memory, file)| {
        file.write_all_at(&[0; 2 * REGION as usize], 0).expect("written");
        let features = RingFeatures { event_idx: flags & 1 != 0, indirect: flags & 2 != 0, packed: flags & 4 != 0 };
        let size = 1 << (exponent % 6);
        let layout = RingLayout { size, desc: USER[0], avail: USER[0] + 0x400, used: USER[0] + 0x800, indirect_max: 8 };
        let base = u32::from(u16::from_le_bytes([*base_low, *base_high]));
        let base = if features.packed { base << 16 | base } else { base };
        let Ok(mut ring) = VirtQueue::new(memory.clone(), layout, features, base) else { return };
        let (mut chain, mut out, mut rest) = (Chain::default(), Vec::new(), data);
        while let [step, after @ ..] = rest {
            rest = after;
            match step % 8 {
                // The guest writes something somewhere.
                0..=2 => {
                    let [low, high, count, bytes @ ..] = rest else { return };
                    let at = u64::from(u16::from_le_bytes([*low, *high])) % (2 * REGION);
                    let count = usize::from(count % 33).min(bytes.len()).min((2 * REGION - at) as usize);
                    file.write_all_at(&bytes[..count], at).expect("written");
                    rest = &bytes[count..];
                }
                3 | 4 => match ring.pop(&mut chain) {
                    Ok(true) => {
                        check(&chain);
                        out.push(chain.head);
                        assert!(out.len() <= usize::from(size), "more out than there are");
                    }
                    Ok(false) => {}
                    // A ring that lies is not used again.
                    Err(_) => return,
                },
                5 if !out.is_empty() => {
                    let head = out.swap_remove(usize::from(step >> 3) % out.len());
                    ring.push(head, u32::from(*step));
                }
                6 => drop(ring.publish()),
                7 => match step & 8 {
                    0 => ring.suppress_kicks(),
                    _ => drop(ring.enable_kicks()),
                },
                _ => {}
            }
        }
    });
});

/// Touches all of a chain, as requests would.
fn check(chain: &Chain) {
    assert!(chain.readable <= chain.iov.len());
    assert!(chain.iov.iter().all(|buffer| !buffer.is_empty()), "an empty buffer");
    // The page tables say if some of it is not there.
    let mut copy = vec![0; iovec::total_len(&chain.iov) as usize];
    iovec::copy_to(&chain.iov, &mut copy);
    iovec::fill(&chain.iov[chain.readable..], 0x77);
}
