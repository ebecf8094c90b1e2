//! Tests of the whole daemon from outside, over its socket. One binary, so that it is linked once.

mod backend;
mod frontend;
mod image;

mod architecture;
mod command_lines;
mod config_space;
mod connections;
mod differential;
mod engines;
mod faults;
mod features;
mod framings;
mod hostile_messages;
mod hostile_rings;
mod idle;
mod memory_regions;
mod monitor;
mod multiqueue;
mod notifications;
mod profiles;
mod requests;
mod rings;
mod situations;
mod throttle;
mod write_cache;
