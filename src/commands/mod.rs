//! The commands: one file each. This file is the list of them and says what each is turned into.

#[cfg(feature = "bench")]
pub mod bench;
pub mod manual;
pub mod serve;

use clap::Subcommand;

use crate::options::{Invocation, UsageError};

/// The commands and their arguments.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve one disk image
    ///
    /// Prints what it serves, how to plug it into QEMU and cloud-hypervisor, and, when front-ends can connect, a line
    /// that begins with "ready: ".
    Serve(serve::ServeArgs),

    /// Measure a vhost-user-blk daemon, without a VM
    #[cfg(feature = "bench")]
    Bench(bench::BenchArgs),

    /// Print the manual page, in roff
    #[command(hide = true)]
    Manual,
}

/// What a command asks for.
pub fn invocation(command: Command) -> Result<Invocation, UsageError> {
    match command {
        Command::Serve(args) => args.config().map(Invocation::Start).map_err(|error| error.see("blockport serve")),
        #[cfg(feature = "bench")]
        Command::Bench(args) => Ok(Invocation::Bench(args)),
        Command::Manual => Ok(Invocation::Print(manual::page())),
    }
}
