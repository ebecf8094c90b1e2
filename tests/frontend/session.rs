//! Typed messages over a connection: what a front-end says, one method a message, and how the back-end took it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::memory::{Placement, Region};
use super::wire::{Connection, NEED_REPLY, NoReply, Reply, code};

/// Protocol feature bits (vhost-user, "Protocol features").
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const XEN_MMAP: u64 = 1 << 17;
    pub const DEVICE_STATE: u64 = 1 << 19;
    pub const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
}

/// In the payload of KICK, CALL and ERR: no descriptor comes with it.
pub const NO_FD: u64 = 1 << 8;

/// How the back-end took a message that changes something.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    Accepted,
    /// Acknowledged with a value other than 0.
    Refused,
    /// The connection was closed instead.
    Closed,
}

impl Ack {
    #[track_caller]
    pub fn accepted(self) {
        assert_eq!(self, Self::Accepted);
    }

    /// Refused, and the connection goes on.
    #[track_caller]
    pub fn refused(self) {
        assert_eq!(self, Self::Refused);
    }

    /// Refused or closed: for messages that are already refused while they are parsed.
    #[track_caller]
    pub fn not_accepted(self) {
        assert_ne!(self, Self::Accepted);
    }
}

/// Addresses of a ring in the front-end's address space, as SET_VRING_ADDR carries them.
#[derive(Debug, Clone, Copy)]
pub struct VringAddresses {
    pub flags: u32,
    pub descriptors: u64,
    pub used: u64,
    pub avail: u64,
    pub log: u64,
}

/// A connection and what was agreed on it.
#[derive(Debug)]
pub struct Session {
    pub connection: Connection,
    pub features: u64,
    pub protocol_features: u64,
}

impl Session {
    pub fn new(connection: Connection) -> Self {
        Self { connection, features: 0, protocol_features: 0 }
    }

    fn has(&self, protocol_feature: u64) -> bool {
        self.protocol_features & protocol_feature != 0
    }

    /// Sends a message that changes something and learns how it was taken: from the acknowledgement where REPLY_ACK is
    /// agreed, else from whether the connection still answers.
    pub fn tell(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Ack {
        let acknowledged = self.has(protocol::REPLY_ACK);
        let flags = if acknowledged { NEED_REPLY } else { 0 };
        if self.connection.send(code, flags, payload, fds).is_err() {
            return Ack::Closed;
        }
        let answer =
            if acknowledged { self.connection.receive() } else { self.connection.ask(code::GET_FEATURES, &[]) };
        match answer {
            Ok(reply) if acknowledged => {
                assert_eq!(reply.code, code, "the acknowledgement is of another message");
                if reply.u64() == 0 { Ack::Accepted } else { Ack::Refused }
            }
            Ok(_) => Ack::Accepted,
            Err(NoReply::Closed) => Ack::Closed,
            Err(NoReply::Silent) => panic!("no answer to message {code}"),
        }
    }

    #[track_caller]
    fn ask(&self, code: u32, payload: &[u8]) -> Reply {
        match self.connection.ask(code, payload) {
            Ok(reply) => reply,
            Err(why) => panic!("message {code}: {why:?}"),
        }
    }

    #[track_caller]
    pub fn get_features(&self) -> u64 {
        self.ask(code::GET_FEATURES, &[]).u64()
    }

    /// True when the connection still answers.
    pub fn alive(&self) -> bool {
        self.connection.ask(code::GET_FEATURES, &[]).is_ok()
    }

    pub fn set_features(&mut self, features: u64) -> Ack {
        let ack = self.tell(code::SET_FEATURES, &features.to_ne_bytes(), &[]);
        if ack == Ack::Accepted {
            self.features = features;
        }
        ack
    }

    #[track_caller]
    pub fn get_protocol_features(&self) -> u64 {
        self.ask(code::GET_PROTOCOL_FEATURES, &[]).u64()
    }

    pub fn set_protocol_features(&mut self, features: u64) -> Ack {
        let ack = self.tell(code::SET_PROTOCOL_FEATURES, &features.to_ne_bytes(), &[]);
        if ack == Ack::Accepted {
            self.protocol_features = features;
        }
        ack
    }

    pub fn set_owner(&self) -> Ack {
        self.tell(code::SET_OWNER, &[], &[])
    }

    pub fn reset_device(&self) -> Ack {
        self.tell(code::RESET_DEVICE, &[], &[])
    }

    #[track_caller]
    pub fn get_queue_num(&self) -> u64 {
        self.ask(code::GET_QUEUE_NUM, &[]).u64()
    }

    #[track_caller]
    pub fn get_max_mem_slots(&self) -> u64 {
        self.ask(code::GET_MAX_MEM_SLOTS, &[]).u64()
    }

    pub fn set_mem_table(&self, regions: &[&Region]) -> Ack {
        let placements: Vec<Placement> = regions.iter().map(|region| region.placement).collect();
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.as_fd()).collect();
        self.set_mem_table_raw(&placements, &fds)
    }

    /// SET_MEM_TABLE with placements that need not be those of the descriptors.
    pub fn set_mem_table_raw(&self, placements: &[Placement], fds: &[BorrowedFd<'_>]) -> Ack {
        let mut payload = (placements.len() as u64).to_ne_bytes().to_vec();
        for placement in placements {
            payload.extend(region_bytes(placement));
        }
        self.tell(code::SET_MEM_TABLE, &payload, fds)
    }

    pub fn add_mem_reg(&self, region: &Region) -> Ack {
        self.add_mem_reg_raw(&region.placement, region.as_fd())
    }

    /// ADD_MEM_REG with a placement that need not be that of the descriptor.
    pub fn add_mem_reg_raw(&self, placement: &Placement, fd: BorrowedFd<'_>) -> Ack {
        self.tell(code::ADD_MEM_REG, &single_region_bytes(placement), &[fd])
    }

    pub fn rem_mem_reg(&self, placement: &Placement) -> Ack {
        self.tell(code::REM_MEM_REG, &single_region_bytes(placement), &[])
    }

    /// REM_MEM_REG as old front-ends send it, with the descriptor of the region.
    pub fn rem_mem_reg_with_fd(&self, region: &Region) -> Ack {
        self.tell(code::REM_MEM_REG, &single_region_bytes(&region.placement), &[region.as_fd()])
    }

    pub fn set_vring_num(&self, queue: u32, num: u32) -> Ack {
        self.tell(code::SET_VRING_NUM, &vring_state(queue, num), &[])
    }

    pub fn set_vring_base(&self, queue: u32, base: u32) -> Ack {
        self.tell(code::SET_VRING_BASE, &vring_state(queue, base), &[])
    }

    pub fn set_vring_enable(&self, queue: u32, enable: u32) -> Ack {
        self.tell(code::SET_VRING_ENABLE, &vring_state(queue, enable), &[])
    }

    pub fn set_vring_addr(&self, queue: u32, addresses: &VringAddresses) -> Ack {
        let mut payload = vring_state(queue, addresses.flags);
        for address in [addresses.descriptors, addresses.used, addresses.avail, addresses.log] {
            payload.extend(address.to_ne_bytes());
        }
        self.tell(code::SET_VRING_ADDR, &payload, &[])
    }

    pub fn set_vring_kick(&self, queue: u64, fd: Option<BorrowedFd<'_>>) -> Ack {
        self.tell_vring_fd(code::SET_VRING_KICK, queue, fd)
    }

    pub fn set_vring_call(&self, queue: u64, fd: Option<BorrowedFd<'_>>) -> Ack {
        self.tell_vring_fd(code::SET_VRING_CALL, queue, fd)
    }

    pub fn set_vring_err(&self, queue: u64, fd: Option<BorrowedFd<'_>>) -> Ack {
        self.tell_vring_fd(code::SET_VRING_ERR, queue, fd)
    }

    fn tell_vring_fd(&self, code: u32, queue: u64, fd: Option<BorrowedFd<'_>>) -> Ack {
        let value = if fd.is_some() { queue } else { queue | NO_FD };
        self.tell(code, &value.to_ne_bytes(), fd.as_slice())
    }

    /// Stops a ring; returns where it stands: the index of the next available entry of a split one.
    #[track_caller]
    pub fn get_vring_base(&self, queue: u32) -> u32 {
        let reply = self.ask(code::GET_VRING_BASE, &vring_state(queue, 0));
        assert_eq!(reply.payload.len(), 8, "a vring state");
        assert_eq!(reply.payload[0..4], queue.to_ne_bytes(), "the base of another queue");
        u32::from_ne_bytes(reply.payload[4..8].try_into().expect("4 bytes"))
    }

    /// Has the back-end make an in-flight region.
    #[track_caller]
    pub fn get_inflight_fd(&self, num_queues: u16, queue_size: u16) -> Inflight {
        let mut reply = self.ask(code::GET_INFLIGHT_FD, &inflight_bytes(0, 0, num_queues, queue_size));
        let size = u64::from_ne_bytes(reply.payload[..8].try_into().expect("8 bytes"));
        let expected = inflight_bytes(size, 0, num_queues, queue_size);
        // The rest is padding.
        assert_eq!((reply.payload.len(), &reply.payload[..20]), (24, &expected[..20]), "the region's description");
        Inflight { fd: reply.fds.pop().expect("a descriptor"), size, offset: 0, num_queues, queue_size }
    }

    pub fn set_inflight_fd(&self, region: &Inflight) -> Ack {
        let bytes = inflight_bytes(region.size, region.offset, region.num_queues, region.queue_size);
        self.tell(code::SET_INFLIGHT_FD, &bytes, &[region.fd.as_fd()])
    }

    /// Asks for part of the config space; what comes back, empty when it is refused.
    #[track_caller]
    pub fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let reply = self.ask(code::GET_CONFIG, &config_bytes(offset, size, &vec![0; size as usize]));
        assert_eq!(reply.payload[0..4], offset.to_ne_bytes(), "the offset comes back as it was asked");
        let replied = u32::from_ne_bytes(reply.payload[4..8].try_into().expect("4 bytes"));
        assert_eq!(replied as usize, reply.payload.len() - 12, "the size of a config reply");
        reply.payload[12..].to_vec()
    }

    pub fn set_config(&self, offset: u32, data: &[u8]) -> Ack {
        self.tell(code::SET_CONFIG, &config_bytes(offset, data.len() as u32, data), &[])
    }

    /// Gives a log. Accepted when the back-end says that it writes to no other any more.
    pub fn set_log_base(&self, log: BorrowedFd<'_>, size: u64, offset: u64) -> Ack {
        let payload = [size.to_ne_bytes(), offset.to_ne_bytes()].concat();
        if self.connection.send(code::SET_LOG_BASE, 0, &payload, &[log]).is_err() {
            return Ack::Closed;
        }
        match self.connection.receive() {
            Ok(reply) => {
                assert_eq!(reply.code, code::SET_LOG_BASE, "the reply answers another message");
                Ack::Accepted
            }
            Err(NoReply::Closed) => Ack::Closed,
            Err(NoReply::Silent) => panic!("no answer to SET_LOG_BASE"),
        }
    }

    /// Begins a transfer of the device's state, saved (0) or loaded (1). What the back-end says: 0x100 is well.
    #[track_caller]
    pub fn set_device_state_fd(&self, direction: u32, fd: BorrowedFd<'_>) -> u64 {
        let payload = [direction.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
        self.connection.send(code::SET_DEVICE_STATE_FD, 0, &payload, &[fd]).expect("sent");
        self.connection.receive().expect("a reply").u64()
    }

    /// How the transfer went: 0 is well.
    #[track_caller]
    pub fn check_device_state(&self) -> u64 {
        self.ask(code::CHECK_DEVICE_STATE, &[]).u64()
    }

    pub fn set_log_fd(&self, fd: BorrowedFd<'_>) -> Ack {
        self.tell(code::SET_LOG_FD, &0u64.to_ne_bytes(), &[fd])
    }

    pub fn set_backend_req_fd(&self, fd: BorrowedFd<'_>) -> Ack {
        self.tell(code::SET_BACKEND_REQ_FD, &[], &[fd])
    }
}

/// An in-flight region, kept for the back-end.
#[derive(Debug)]
pub struct Inflight {
    pub fd: OwnedFd,
    pub size: u64,
    pub offset: u64,
    pub num_queues: u16,
    pub queue_size: u16,
}

fn inflight_bytes(size: u64, offset: u64, num_queues: u16, queue_size: u16) -> Vec<u8> {
    [&size.to_ne_bytes()[..], &offset.to_ne_bytes(), &num_queues.to_ne_bytes(), &queue_size.to_ne_bytes(), &[0; 4]]
        .concat()
}

/// The payload of messages with a queue and a number.
pub fn vring_state(queue: u32, num: u32) -> Vec<u8> {
    [queue.to_ne_bytes(), num.to_ne_bytes()].concat()
}

fn region_bytes(placement: &Placement) -> Vec<u8> {
    [placement.guest, placement.size, placement.user, placement.file_offset].map(u64::to_ne_bytes).concat()
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region_bytes(placement: &Placement) -> Vec<u8> {
    [vec![0; 8], region_bytes(placement)].concat()
}

fn config_bytes(offset: u32, size: u32, data: &[u8]) -> Vec<u8> {
    [&offset.to_ne_bytes()[..], &size.to_ne_bytes(), &0u32.to_ne_bytes(), data].concat()
}
