//! The blockport daemon and its commands.
//!
//! This file owns the dispatch and the exit status: 0 after a clean stop, 1 for a failed start, 2 for a command line
//! that cannot be understood.

mod background;
mod commands;
mod daemon;
mod options;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use options::Invocation;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match options::parse(std::env::args_os()) {
        Ok(Invocation::Start(config)) => {
            for notice in &config.notices {
                eprintln!("blockport: {notice}");
            }
            start_logging();
            match daemon::run(config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("blockport: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        #[cfg(feature = "bench")]
        Ok(Invocation::Bench(args)) => match commands::bench::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("blockport: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(Invocation::Print(text)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => ExitCode::from(error.report()),
    }
}

/// Logs go to standard error, from level info on; BLOCKPORT_LOG says otherwise (`debug`, `warn`, `blockport_vhost=debug`).
fn start_logging() {
    let filter = EnvFilter::try_from_env("BLOCKPORT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .init();
}
