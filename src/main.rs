//! The blockport daemon and its commands.
//!
//! This file owns the dispatch and the exit status: 0 after a clean stop, 1 for a failed start, 2 for a command line
//! that cannot be understood.

mod commands;
mod options;

use std::io::Write;
use std::process::ExitCode;

use options::Invocation;

fn main() -> ExitCode {
    match options::parse(std::env::args_os()) {
        Ok(Invocation::Start(config)) => {
            for notice in &config.notices {
                eprintln!("blockport: {notice}");
            }
            eprintln!("blockport: nothing runs a configuration yet");
            ExitCode::FAILURE
        }
        Ok(Invocation::Print(text)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => ExitCode::from(error.report()),
    }
}
