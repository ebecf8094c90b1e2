//! Tests of the formats of other programs, in one binary: images made by QEMU's programs, and hostile ones.

#[allow(dead_code)] // It has more than is needed here.
#[path = "../qcow2/images.rs"]
mod images;
mod imports;
mod imports_hostile;
mod luks;
#[path = "../../testing/mod.rs"]
mod testing;

const ENGINE: blockport_block::aio::AioEngine = blockport_block::aio::AioEngine::IoUring;
