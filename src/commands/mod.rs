//! The commands: one file each. This file is the list of them and says what each is turned into.

#[cfg(feature = "bench")]
pub mod bench;
pub mod ctl;
pub mod img;
pub mod io;
pub mod manual;
pub mod serve;

use clap::{CommandFactory, Subcommand};

use crate::options::{Cli, Invocation, UsageError};

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

    /// Command a running daemon
    ///
    /// The daemon must have a monitor: `serve --monitor PATH`, or --chardev and --monitor. With --json, the daemon's
    /// answers are printed as they are. The exit status is 1 if the daemon refused.
    Ctl(ctl::CtlArgs),

    /// Make, look at, change and convert images, as qemu-img does
    ///
    /// The format of an image is stated or told by the end of its name; what is in it is never looked at. Images that
    /// others use are refused. The exit statuses are qemu-img's.
    Img(img::ImgArgs),

    /// Send single requests to an image, as qemu-io does
    Io(io::IoArgs),

    /// Print a completion script for a shell
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },

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
        Command::Ctl(args) => Ok(Invocation::Ctl(args)),
        Command::Img(args) => Ok(Invocation::Img(args)),
        Command::Io(args) => Ok(Invocation::Io(args)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "blockport", &mut script);
            Ok(Invocation::Print(String::from_utf8_lossy(&script).into_owned()))
        }
        Command::Manual => Ok(Invocation::Print(manual::page())),
    }
}
