//! The blockport daemon and its commands.
//!
//! This file owns the dispatch and the exit status: 0 after a clean stop, 1 for a failed start, 2 for a command line
//! that cannot be understood; those of `img` and `io` are QEMU's.

mod background;
mod chardev;
mod commands;
mod daemon;
mod logging;
mod metrics;
mod monitor;
mod options;
mod sandbox;
mod takeover;

use std::io::Write;
use std::process::ExitCode;

use options::Invocation;

fn main() -> ExitCode {
    match options::parse(std::env::args_os()) {
        Ok(Invocation::Start(config)) => {
            for notice in &config.notices {
                let _ = writeln!(std::io::stderr(), "blockport: {notice}");
            }
            match daemon::run(config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    let _ = writeln!(std::io::stderr(), "blockport: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        #[cfg(feature = "bench")]
        Ok(Invocation::Bench(args)) => match commands::bench::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "blockport: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(Invocation::Ctl(args)) => match commands::ctl::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "blockport: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(Invocation::Img(args)) => ExitCode::from(commands::img::run(args)),
        Ok(Invocation::Io(args)) => ExitCode::from(commands::io::run(args)),
        Ok(Invocation::Print(text)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            let args: Vec<_> = std::env::args_os().skip(1).take(2).collect();
            let status = error.report();
            ExitCode::from(match args.first() {
                Some(command) if (command == "img" || command == "io") && status > 0 => {
                    commands::img::usage_status(args.get(1).and_then(|verb| verb.to_str()))
                }
                _ => status,
            })
        }
    }
}
