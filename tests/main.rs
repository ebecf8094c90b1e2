//! Tests of the whole daemon from outside, over its socket. One binary, so that it is linked once.

/// Has tests of a module run once more, with packed rings.
macro_rules! on_packed_rings {
    ($($test:ident,)*) => {
        mod packed {
            $(#[test]
            fn $test() {
                crate::frontend::device::on_packed_rings(super::$test);
            })*
        }
    };
}
use on_packed_rings;

mod backend;
mod frontend;
mod image;

mod activation;
mod architecture;
mod command_lines;
mod config_space;
mod connections;
mod contract;
mod differential;
mod dirty_log;
mod engines;
mod error_policies;
mod faults;
mod features;
mod framings;
mod hostile_messages;
mod hostile_rings;
mod idle;
mod img;
mod inflight;
mod io;
mod memory_regions;
mod metrics;
mod monitor;
mod multiqueue;
mod notifications;
mod packed_rings;
mod profiles;
mod qcow2;
mod requests;
mod ring_descriptors;
mod rings;
mod sandbox;
mod situations;
mod takeover;
mod throttle;
mod write_cache;
