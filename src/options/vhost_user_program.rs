//! The command line that management software expects of any vhost-user program.
//!
//! This file owns those options and the disk they describe: one raw file, one export. It never opens the file or the
//! descriptor.

use std::path::PathBuf;

use clap::Args;

use super::export::check_socket_path;
use super::{Config, Disk, ExportConfig, Invocation, IothreadConfig, SocketAddress, UsageError};

/// Queues of the export. A front-end that counts its own virtual CPUs refuses a back-end with fewer queues, and these
/// conventions have no option to ask for more; a queue that no front-end starts costs next to nothing.
const NUM_QUEUES: u16 = 64;

/// What management software is told, as the vhost-user specification's conventions have it.
const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

/// The options, with their help.
#[derive(Args, Debug)]
#[command(next_help_heading = "One raw disk, by the conventions of vhost-user programs")]
pub struct VhostUserProgramArgs {
    /// Listen on a unix socket
    #[arg(long, value_name = "PATH", overrides_with = "socket_path")]
    socket_path: Option<PathBuf>,

    /// Take an inherited socket; a connected one is served once
    #[arg(long, value_name = "FDNUM", overrides_with = "fd", value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<i32>,

    /// The file or block device to serve
    #[arg(long, value_name = "PATH", overrides_with = "blk_file")]
    blk_file: Option<PathBuf>,

    /// Refuse writes
    #[arg(long, overrides_with = "read_only")]
    read_only: bool,

    /// Print what this program can do, as JSON, and exit
    #[arg(long, overrides_with = "print_capabilities")]
    print_capabilities: bool,
}

impl VhostUserProgramArgs {
    /// What the options ask for.
    pub fn invocation(self) -> Result<Invocation, UsageError> {
        if self.print_capabilities {
            return Ok(Invocation::Print(CAPABILITIES.to_owned()));
        }
        let socket = match (self.socket_path, self.fd) {
            (Some(path), None) => SocketAddress::Unix {
                path: check_socket_path(path)
                    .map_err(|expected| UsageError::new(format!("--socket-path must be {expected}")))?,
                mode: None,
                group: None,
            },
            (None, Some(fd)) => SocketAddress::Fd(fd),
            (Some(_), Some(_)) => {
                return Err(UsageError::new("--socket-path and --fd exclude each other"));
            }
            (None, None) => {
                return Err(UsageError::new("--socket-path=PATH or --fd=FDNUM is missing"));
            }
        };
        let Some(path) = self.blk_file else {
            return Err(UsageError::new("--blk-file=PATH is missing"));
        };
        let format = Disk::format_by_name(&path).to_owned();
        let disk = Disk { path, format, read_only: self.read_only, cache: None };
        let export = ExportConfig {
            writable: !self.read_only,
            num_queues: NUM_QUEUES,
            ..ExportConfig::new(Disk::NODE_NAME, Disk::NODE_NAME, socket)
        };
        let mut config = Config::default();
        disk.configure(&mut config, export, 1, &IothreadConfig::new(Disk::IOTHREAD_NAME))?;
        Ok(Invocation::Start(config))
    }
}
