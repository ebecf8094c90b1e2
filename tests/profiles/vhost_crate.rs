//! What monitors on the `vhost` crate have in common: the crate's own front-end, given a guest of ours.

// The crate takes eventfds of its own type, which can be made of a descriptor only so.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};

use vhost::vhost_user::Frontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::Guest;
use crate::frontend::wait::Event;

/// The same counter in the crate's type.
fn eventfd(event: &Event) -> EventFd {
    let own = event.as_fd().try_clone_to_owned().expect("dup of an eventfd");
    // SAFETY: the descriptor is an eventfd, and nobody else owns it.
    unsafe { EventFd::from_raw_fd(own.into_raw_fd()) }
}

pub fn set_mem_table(vu: &Frontend, guest: &Guest) {
    let regions = guest.memory.regions();
    let table: Vec<VhostUserMemoryRegionInfo> = regions
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.placement.guest,
            memory_size: region.placement.size,
            userspace_addr: region.placement.user,
            mmap_offset: region.placement.file_offset,
            mmap_handle: region.as_fd().as_raw_fd(),
        })
        .collect();
    vu.set_mem_table(&table).expect("SET_MEM_TABLE");
}

pub fn set_vring_num(vu: &Frontend, guest: &Guest, queue: usize) {
    vu.set_vring_num(queue, guest.queues[queue].ring.size).expect("SET_VRING_NUM");
}

pub fn set_vring_addr(vu: &Frontend, guest: &Guest, queue: usize) {
    let ring = guest.queues[queue].ring;
    let config = VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: 0,
        desc_table_addr: guest.user_address(ring.descriptors),
        used_ring_addr: guest.user_address(ring.used),
        avail_ring_addr: guest.user_address(ring.avail),
        log_addr: None,
    };
    vu.set_vring_addr(queue, &config).expect("SET_VRING_ADDR");
}

pub fn set_vring_call(vu: &Frontend, guest: &Guest, queue: usize) {
    vu.set_vring_call(queue, &eventfd(&guest.queues[queue].call)).expect("SET_VRING_CALL");
}

pub fn set_vring_kick(vu: &Frontend, guest: &Guest, queue: usize) {
    vu.set_vring_kick(queue, &eventfd(&guest.queues[queue].kick)).expect("SET_VRING_KICK");
}
