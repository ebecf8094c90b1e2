//! Guest memory as the front-end shares it: memfds mapped here, told to the back-end by guest-physical and by
//! front-end address, which are disjoint so that a translation by the wrong one cannot succeed.

// Shared memory is reached through raw pointers: another process writes it too, so no reference to it may exist.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Where a region stands in the three address spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Guest-physical address: what descriptors carry.
    pub guest: u64,
    /// Address in the front-end: what SET_VRING_ADDR carries. A number only, nothing is mapped there.
    pub user: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region starts in its memfd.
    pub file_offset: u64,
}

/// The regions that a device gets unless a test asks for others. The first two are neighbours for the guest and far
/// apart for the front-end; the guest's order is not the front-end's.
pub const USUAL: [Placement; 3] = [
    Placement { guest: 0x10_0000, user: 0x7000_0000_0000, size: 8 << 20, file_offset: 0 },
    Placement { guest: 0x90_0000, user: 0x6000_0000_0000, size: 8 << 20, file_offset: 0x3000 },
    Placement { guest: 0x1_0000_0000, user: 0x5000_0000_0000, size: 16 << 20, file_offset: 0x1000 },
];

/// One memfd and its mapping.
#[derive(Debug)]
pub struct Region {
    pub placement: Placement,
    memfd: OwnedFd,
    host: NonNull<u8>,
}

// SAFETY: the mapping lives as long as the region and every access to it goes through raw pointers or atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    pub fn new(placement: Placement) -> Self {
        let memfd = memfd_create("guest-memory", MemfdFlags::CLOEXEC).expect("memfd_create");
        ftruncate(&memfd, placement.file_offset + placement.size).expect("room for guest memory");
        let size = usize::try_from(placement.size).expect("a region that fits the address space");
        // SAFETY: a new shared mapping at an address of the kernel's choice, of a file that is long enough.
        let host = unsafe {
            mmap(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memfd,
                placement.file_offset,
            )
        }
        .expect("mmap of guest memory");
        let host = NonNull::new(host.cast()).expect("a mapping is not at 0");
        Self { placement, memfd, host }
    }

    /// Cuts the file under the mapping. Nothing here may touch the region afterwards.
    pub fn truncate_file(&self) {
        ftruncate(&self.memfd, 0).expect("ftruncate of a memfd");
    }

    fn offset_of(&self, guest: u64, bytes: u64) -> Option<usize> {
        let offset = guest.checked_sub(self.placement.guest)?;
        (offset.checked_add(bytes)? <= self.placement.size).then(|| usize::try_from(offset).expect("inside a mapping"))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, of that size; nothing points into it any more.
        let unmapped = unsafe { munmap(self.host.as_ptr().cast(), self.placement.size as usize) };
        unmapped.expect("munmap of guest memory");
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

/// The guest's memory: regions that may come and go while other threads use the rest.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: RwLock<Vec<Arc<Region>>>,
}

impl GuestMemory {
    pub fn new(placements: &[Placement]) -> Self {
        let memory = Self::default();
        for &placement in placements {
            memory.add(placement);
        }
        memory
    }

    pub fn add(&self, placement: Placement) -> Arc<Region> {
        let region = Arc::new(Region::new(placement));
        self.regions.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&region));
        region
    }

    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The front-end address of a guest-physical one.
    #[track_caller]
    pub fn user_address(&self, guest: u64) -> u64 {
        self.with(guest, 1, |region, offset| region.placement.user + offset as u64)
    }

    #[track_caller]
    pub fn read(&self, guest: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.with(guest, bytes, |region, offset| {
            // SAFETY: `with` checked the range; the buffer is ours alone. The back-end may write meanwhile, and a test
            // that lets it does not look at what it reads.
            unsafe { region.host.add(offset).copy_to_nonoverlapping(NonNull::from(&mut buffer[..]).cast(), bytes) }
        });
        buffer
    }

    #[track_caller]
    pub fn write(&self, guest: u64, data: &[u8]) {
        self.with(guest, data.len(), |region, offset| {
            // SAFETY: `with` checked the range, and `data` is not inside a mapping that only raw pointers reach.
            unsafe { region.host.add(offset).copy_from_nonoverlapping(NonNull::from(data).cast(), data.len()) }
        });
    }

    /// Loads an index that the back-end publishes; what it wrote before is visible afterwards.
    #[track_caller]
    pub fn load_u16(&self, guest: u64) -> u16 {
        self.atomic_u16(guest, |value| u16::from_le(value.load(Ordering::Acquire)))
    }

    /// Publishes an index to the back-end, after everything written before.
    #[track_caller]
    pub fn store_u16(&self, guest: u64, value: u16) {
        self.atomic_u16(guest, |target| target.store(value.to_le(), Ordering::Release));
    }

    #[track_caller]
    fn atomic_u16<T>(&self, guest: u64, access: impl FnOnce(&AtomicU16) -> T) -> T {
        assert!(guest.is_multiple_of(2), "an index at odd address {guest:#x}");
        self.with(guest, 2, |region, offset| {
            // SAFETY: in range by `with`, aligned by the assertion above (mappings and placements are page-aligned),
            // and both processes access indices atomically.
            access(unsafe { AtomicU16::from_ptr(region.host.add(offset).cast().as_ptr()) })
        })
    }

    #[track_caller]
    fn with<T>(&self, guest: u64, bytes: usize, access: impl FnOnce(&Region, usize) -> T) -> T {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let found = regions.iter().find_map(|region| Some((region, region.offset_of(guest, bytes as u64)?)));
        let (region, offset) = found.unwrap_or_else(|| panic!("{bytes} bytes at {guest:#x} are in no region"));
        access(region, offset)
    }
}
