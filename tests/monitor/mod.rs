//! The monitor from outside: its wire, its commands, and what happens to the disks meanwhile.

pub mod client;

mod commands;
mod ctl;
mod dirty_bitmaps;
mod hostile;
mod hot;
mod hung;
mod nodes;
mod oracle;
mod reach;
mod snapshots;
mod under_load;
mod wire;
