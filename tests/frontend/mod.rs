//! A raw vhost-user front-end: bare sockets, guest memory, the driver side of split rings. It shares no code with the
//! daemon, so that no mistake is made on both sides, and it can send anything, malformed things above all.
//!
//! From the bottom: `wait` (deadlines, eventfds), `wire` (messages as bytes), `session` (typed messages), `memory` and
//! `arena` (guest memory), `queue` (a split ring), `blk` (virtio-blk requests), `device` (all of it, brought up).

pub mod arena;
pub mod blk;
pub mod device;
pub mod memory;
pub mod packed;
pub mod queue;
pub mod session;
pub mod wait;
pub mod wire;
