//! Tests of the format qcow2, in one binary: against a model, against QEMU's programs, after crashes, on hostile images.

mod bitmaps;
mod checks;
mod compressed;
mod crash;
mod differential;
mod foreign;
mod hostile;
mod images;
mod kept;
mod properties;
mod snapshots;
#[path = "../../testing/mod.rs"]
mod testing;

const ENGINE: blockport_block::aio::AioEngine = blockport_block::aio::AioEngine::IoUring;
