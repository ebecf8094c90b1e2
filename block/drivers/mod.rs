//! The register of block drivers: `mod` lines and one table, nothing else.

mod blkdebug;
mod blklogwrites;
mod blkverify;
mod copy_on_read;
pub(crate) mod file;
mod import;
pub mod luks;
mod memory;
mod null;
mod own_loop;
pub mod qcow2;
pub(crate) mod raw;
mod throttle;
mod vdi;
mod vhdx;
mod vmdk;
mod vpc;

use crate::driver::BlockDriver;
use crate::error::OpenResult;
use crate::graph::OpenContext;
use crate::options::Options;

/// What a driver stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// Something outside the graph: memory, a file.
    Protocol,
    /// A child that holds an image format.
    Format,
    /// A child that it passes requests on to.
    Filter,
}

/// Opens a driver: takes its own options, opens its children through the context. What it leaves is an error.
pub type OpenDriver = fn(&mut Options, &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>>;

/// A row of the register.
pub struct DriverRow {
    /// The value of `driver=`.
    pub name: &'static str,
    /// What it stands on.
    pub kind: DriverKind,
    /// One line for `--help`.
    pub summary: &'static str,
    /// Its options, one line each: name, then meaning.
    pub options: &'static [(&'static str, &'static str)],
    /// Opens it.
    pub open: OpenDriver,
}

/// All drivers.
pub const DRIVERS: &[DriverRow] = &[
    blkdebug::ROW,
    blklogwrites::ROW,
    blkverify::ROW,
    copy_on_read::ROW,
    file::ROW,
    file::HOST_DEVICE,
    luks::ROW,
    memory::ROW,
    null::ROW,
    qcow2::ROW,
    raw::ROW,
    throttle::ROW,
    vdi::ROW,
    vhdx::ROW,
    vmdk::ROW,
    vpc::ROW,
];

/// The driver of that name.
pub fn find(name: &str) -> Option<&'static DriverRow> {
    DRIVERS.iter().find(|row| row.name == name)
}

/// All names.
pub fn names() -> Vec<&'static str> {
    DRIVERS.iter().map(|row| row.name).collect()
}
