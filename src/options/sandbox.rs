//! What the daemon gives up once all is open: the options that all styles of command line share.
//!
//! This file owns their meaning. It confines nothing.

use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, ValueEnum};

/// How much the daemon gives up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// Nothing
    Off,
    /// All that the kernel can withhold; what it cannot is a line in the log
    #[default]
    On,
    /// All of it, or the start fails
    Strict,
}

/// What the daemon gives up, and what it keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxConfig {
    /// How much.
    pub mode: SandboxMode,
    /// Folders whose files can still be opened.
    pub allow: Vec<PathBuf>,
    /// The user to become, a name or a number. None: the one who started it.
    pub run_as: Option<String>,
}

/// The options, with their help.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "What the daemon gives up once all is open")]
pub struct SandboxArgs {
    /// How much the daemon gives up before it serves the first guest
    ///
    /// Privileges, capabilities, system calls, and all files but those named. docs/sandbox.md says what is left.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = SandboxMode::On)]
    sandbox: SandboxMode,

    /// A folder whose images can be opened, and sockets made, later on; may be repeated
    #[arg(long, value_name = "FOLDER")]
    sandbox_allow: Vec<PathBuf>,

    /// The user to become, a name or a number; only root can [default: stay]
    #[arg(long, value_name = "USER")]
    runas: Option<String>,
}

impl SandboxArgs {
    /// One of them that stands on the command line, as it is written.
    pub fn given(matches: &ArgMatches) -> Option<String> {
        let arguments = Self::augment_args(clap::Command::new(""));
        let given = |arg: &&clap::Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        arguments.get_arguments().find(given).and_then(|arg| Some(format!("--{}", arg.get_long()?)))
    }

    /// What they mean.
    pub fn config(self) -> SandboxConfig {
        SandboxConfig { mode: self.sandbox, allow: self.sandbox_allow, run_as: self.runas }
    }
}
