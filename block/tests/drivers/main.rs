//! Tests of the block drivers through the public interface, in one binary.

mod allocations;
mod conformance;
mod faults;
mod file;
#[path = "../../testing/mod.rs"]
mod testing;
mod throttle;
