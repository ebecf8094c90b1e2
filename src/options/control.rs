//! Going on with the disks of a running daemon: the options that all styles of command line share.
//!
//! This file owns their meaning. It connects to nobody.

use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::{UsageError, check_socket_path};

/// The options, with their help.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Upgrade in place")]
pub struct ControlArgs {
    /// A unix socket by which another blockport, of the same user, can take over what this one serves
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Take over from the blockport whose --control this is, without a front-end noticing
    ///
    /// All disks that it serves must be among those of this command line, with the same options as far as guests see them.
    /// If anything is in the way, that one goes on and this one ends.
    #[arg(long, value_name = "PATH")]
    take_over: Option<PathBuf>,
}

/// Where another blockport finds us, and where we find one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlConfig {
    /// The socket by which others take over. None: nobody can.
    pub control: Option<PathBuf>,
    /// The socket of the process to take over from. None: a start from nothing.
    pub take_over: Option<PathBuf>,
}

impl ControlArgs {
    /// One of them that stands on the command line, as it is written.
    pub fn given(matches: &ArgMatches) -> Option<String> {
        let arguments = Self::augment_args(clap::Command::new(""));
        let given = |arg: &&clap::Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        arguments.get_arguments().find(given).and_then(|arg| Some(format!("--{}", arg.get_long()?)))
    }

    /// What they mean.
    ///
    /// Fails on a path that is no UTF-8 or too long for a socket.
    pub fn config(self) -> Result<ControlConfig, UsageError> {
        let checked = |path: Option<PathBuf>, option: &str| {
            let check = |path| {
                check_socket_path(path).map_err(|expected| UsageError::new(format!("{option} must be {expected}")))
            };
            path.map(check).transpose()
        };
        let control = checked(self.control, "--control")?;
        Ok(ControlConfig { control, take_over: checked(self.take_over, "--take-over")? })
    }
}
