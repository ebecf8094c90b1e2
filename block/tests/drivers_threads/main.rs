//! The tests of `tests/drivers` once more, on worker threads in place of io_uring.

#[path = "../drivers/allocations.rs"]
mod allocations;
#[path = "../drivers/conformance.rs"]
mod conformance;
#[path = "../drivers/faults.rs"]
mod faults;
#[path = "../drivers/file.rs"]
mod file;
#[path = "../drivers/filters.rs"]
mod filters;
#[path = "../drivers/host_device.rs"]
mod host_device;
#[path = "../drivers/imports.rs"]
mod imports;
#[path = "../../testing/mod.rs"]
mod testing;
#[path = "../drivers/throttle.rs"]
mod throttle;

const ENGINE: blockport_block::aio::AioEngine = blockport_block::aio::AioEngine::Threads;
