//! Tests of the block drivers through the public interface, in one binary, on io_uring.
//! `tests/drivers_threads` is the same on worker threads.

mod allocations;
mod conformance;
mod faults;
mod file;
mod filters;
mod host_device;
mod imports;
#[path = "../../testing/mod.rs"]
mod testing;
mod throttle;

const ENGINE: blockport_block::aio::AioEngine = blockport_block::aio::AioEngine::IoUring;
