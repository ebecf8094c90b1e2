//! The contract of the BlockBackend, row by row, through the public interface. The project's `tests/contract.rs` lists
//! the rows with their tests.

mod backends;
mod contexts;
mod errors;
mod graph;
mod helpers;
mod media;
mod reopen;
mod requests;
mod statistics;
#[path = "../../testing/mod.rs"]
mod testing;
mod throttling;

const ENGINE: blockport_block::aio::AioEngine = blockport_block::aio::AioEngine::IoUring;
