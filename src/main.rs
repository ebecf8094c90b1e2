//! The blockport daemon and its commands.
fn main() {}
