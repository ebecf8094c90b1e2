//! The reference device.
fn main() {}
