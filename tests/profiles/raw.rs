//! Messages as monitors with a protocol library of their own send them: each as it is called, acknowledged or not.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::Guest;
use crate::frontend::memory::Region;
use crate::frontend::session::{single_region_bytes, vring_state};
use crate::frontend::wait::DEADLINE;
use crate::frontend::wire::{Connection, NEED_REPLY, Reply, code};

/// GET_CONFIG and SET_CONFIG flags: the field is writable, "set by the guest's driver".
pub const CONFIG_WRITABLE: u32 = 1;

pub struct Raw(Connection);

impl Raw {
    #[track_caller]
    pub fn connect(socket: &Path) -> Self {
        Self(Connection::open(socket, DEADLINE).expect("connect"))
    }

    /// Sends and goes on.
    #[track_caller]
    pub fn send(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.0.send(code, 0, payload, fds).expect("send");
    }

    /// Sends and waits for the acknowledgement.
    #[track_caller]
    pub fn send_acked(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.0.send(code, NEED_REPLY, payload, fds).expect("send");
        let reply = self.0.receive().expect("an acknowledgement");
        assert_eq!((reply.code, reply.u64()), (code, 0), "message {code}");
    }

    #[track_caller]
    pub fn ask(&self, code: u32, payload: &[u8]) -> Reply {
        self.0.ask(code, payload).unwrap_or_else(|why| panic!("message {code}: {why:?}"))
    }

    #[track_caller]
    pub fn get(&self, code: u32) -> u64 {
        self.ask(code, &[]).u64()
    }

    /// GET_CONFIG; what a monitor sees of the reply.
    #[track_caller]
    pub fn get_config(&self, offset: u32, size: u32, flags: u32) -> Vec<u8> {
        let mut payload = [offset, size, flags].map(u32::to_ne_bytes).concat();
        payload.resize(12 + size as usize, 0);
        let reply = self.ask(code::GET_CONFIG, &payload);
        assert_eq!(reply.payload.len(), 12 + size as usize, "GET_CONFIG of {size} bytes at {offset:#x}");
        reply.payload[12..].to_vec()
    }

    #[track_caller]
    pub fn get_vring_base(&self, queue: u32) -> u32 {
        let reply = self.ask(code::GET_VRING_BASE, &vring_state(queue, 0));
        u32::from_ne_bytes(reply.payload[4..8].try_into().expect("a vring state"))
    }
}

/// The payload of SET_MEM_TABLE.
pub fn table_bytes(regions: &[&Region]) -> Vec<u8> {
    let mut payload = (regions.len() as u64).to_ne_bytes().to_vec();
    for region in regions {
        payload.extend(&single_region_bytes(&region.placement)[8..]);
    }
    payload
}

/// The payload of SET_VRING_ADDR.
pub fn address_bytes(guest: &Guest, queue: usize) -> Vec<u8> {
    let ring = guest.queues[queue].ring;
    let mut payload = vring_state(queue as u32, 0);
    for address in [ring.descriptors, ring.used, ring.avail] {
        payload.extend(guest.user_address(address).to_ne_bytes());
    }
    payload.extend([0; 8]);
    payload
}

/// SET_MEM_TABLE of all of a guest's memory.
#[track_caller]
pub fn set_mem_table(raw: &Raw, guest: &Guest, acked: bool) {
    let regions = guest.memory.regions();
    let regions: Vec<&Region> = regions.iter().map(AsRef::as_ref).collect();
    let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.as_fd()).collect();
    match acked {
        true => raw.send_acked(code::SET_MEM_TABLE, &table_bytes(&regions), &fds),
        false => raw.send(code::SET_MEM_TABLE, &table_bytes(&regions), &fds),
    }
}
