//! Tests of the block drivers through the public interface, in one binary.

mod conformance;
#[path = "../../testing/mod.rs"]
mod testing;
