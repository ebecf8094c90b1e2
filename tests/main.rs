//! Tests of the whole daemon from outside, over its socket. One binary, so that it is linked once.

#[allow(dead_code)]
mod backend;
// Until the tests of rings and messages use all of it.
#[allow(dead_code)]
mod frontend;
mod image;

mod config_space;
mod differential;
mod features;
mod framings;
mod hostile_messages;
mod hostile_rings;
mod memory_regions;
mod notifications;
mod requests;
mod rings;
mod write_cache;
