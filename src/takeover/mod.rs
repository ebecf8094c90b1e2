//! Taking over: one process goes on with the disks of another, and no front-end notices. What is said is in `message.rs`,
//! how in `wire.rs`; `give.rs` is the side that serves so far, `take.rs` the other, `sockets.rs` where that one's sockets
//! come from.
//!
//! Who serves is decided at one moment: when the new process has sent [`message::FromNew::Commit`]. Until then the old one
//! has everything and can go on; from then on it touches nothing. That a message was sent is known to both: a socket whose
//! other end was shut down takes none, and what it took can be read by the other end until it closes.

pub mod give;
pub mod message;
pub mod sockets;
pub mod take;
mod wire;
