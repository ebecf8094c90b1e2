//! `blockport-reference`: a virtio-blk device built on vhost-user-backend and virtio-queue as their documents
//! suggest. It owns the command line and the accept loop.
//!
//! Tests compare answers with it, benches compare cost with it. It is never a product: no daemon life cycle, no
//! asynchronous I/O, no migration, and no tuning that a first user of the framework would not do.

mod config;
mod device;
mod disk;
mod request;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::device::Device;
use crate::disk::Disk;

/// A synchronous virtio-blk device on the vhost-user-backend framework: the yardstick of blockport's tests and benches.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Listen on this Unix socket; an old file there is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Serve this file (or block device).
    #[arg(long, value_name = "FILE", conflicts_with = "null", required_unless_present = "null")]
    file: Option<PathBuf>,
    /// Serve a disk of SIZE bytes that stores nothing and leaves read buffers as they are.
    #[arg(long, value_name = "SIZE")]
    null: Option<u64>,
    /// Open the file with O_DIRECT.
    #[arg(long, requires = "file")]
    direct: bool,
    /// Refuse everything that writes.
    #[arg(long)]
    read_only: bool,
    /// Virtqueues, each with a thread of its own (the framework's masks end at 64).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// What GET_ID answers.
    #[arg(long, default_value = "reference", value_parser = serial)]
    serial: String,
}

/// A serial that fits the 20 bytes of GET_ID.
fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        0..=20 => Ok(text.to_owned()),
        n => Err(format!("{n} bytes, and a serial has at most 20")),
    }
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blockport-reference: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), String> {
    let disk = match (&options.file, options.null) {
        (Some(path), _) => Disk::open(path, options.direct, options.read_only)
            .map_err(|e| format!("--file {}: {e}", path.display()))?,
        (None, Some(size)) => Disk::null(size, options.read_only),
        (None, None) => return Err("one of --file and --null is needed".to_owned()),
    };
    let disk = Arc::new(disk);
    let mut listener =
        Listener::new(&options.socket, true).map_err(|e| format!("--socket {}: {e}", options.socket.display()))?;
    println!("blockport-reference: serving {} bytes on {}", disk.size, options.socket.display());

    // The framework's daemon serves one connection in its life, so each connection gets a new one.
    loop {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let device = Device::new(Arc::clone(&disk), memory.clone(), options.queues, &options.serial);
        let mut daemon =
            VhostUserDaemon::new("reference".to_owned(), Arc::new(device), memory).map_err(|e| e.to_string())?;
        daemon.start(&mut listener).map_err(|e| e.to_string())?;
        match daemon.wait() {
            Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {}
            Err(e) => eprintln!("blockport-reference: connection closed: {e}"),
        }
    }
}
