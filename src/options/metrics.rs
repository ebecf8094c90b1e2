//! Where the daemon's figures can be read: the option that all styles of command line share.
//!
//! This file owns its form, and that only this machine can read. It opens nothing.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::export::check_socket_path;

/// Where the figures are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// A loopback address; port 0: the kernel chooses one, and the log says which.
    Tcp(SocketAddr),
    /// A socket file, which only the daemon's own user may connect to.
    Unix(PathBuf),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = check_socket_path(path).map_err(|expected| format!("behind unix: must be {expected}"))?;
            return Ok(Self::Unix(path));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Tcp(address)),
            Ok(address) => Err(format!("{} is no loopback address: others could read there", address.ip())),
            Err(_) => Err("must be 127.0.0.1:PORT, [::1]:PORT or unix:PATH".to_owned()),
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The option, with its help.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Figures for monitoring systems")]
pub struct MetricsArgs {
    /// Serve figures over HTTP, in the text format of Prometheus, at 127.0.0.1:PORT, [::1]:PORT or unix:PATH
    ///
    /// The page is /metrics. Nobody but this machine can reach it; every user of it can, unless it is a unix socket.
    #[arg(long, value_name = "ADDR", overrides_with = "metrics")]
    #[allow(rustdoc::broken_intra_doc_links, reason = "the comment is a help text")]
    metrics: Option<MetricsAddress>,
}

impl MetricsArgs {
    /// The option, if it stands on the command line.
    pub fn given(matches: &ArgMatches) -> Option<String> {
        let given = matches.value_source("metrics") == Some(ValueSource::CommandLine);
        given.then(|| "--metrics".to_owned())
    }

    /// What it means.
    pub fn address(self) -> Option<MetricsAddress> {
        self.metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_can_be_told_of() {
        for text in ["127.0.0.1:9100", "127.9.9.9:0", "[::1]:9100", "unix:/run/m"] {
            assert_eq!(text.parse::<MetricsAddress>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
        for (text, complaint) in [
            ("0.0.0.0:9100", "0.0.0.0 is no loopback address"),
            ("[::]:9100", ":: is no loopback address"),
            ("192.168.0.1:9100", "192.168.0.1 is no loopback address"),
            ("[::ffff:127.0.0.1]:9100", "is no loopback address"),
            ("localhost:9100", "must be 127.0.0.1:PORT"),
            ("9100", "must be 127.0.0.1:PORT"),
            ("127.0.0.1", "must be 127.0.0.1:PORT"),
            ("127.0.0.1:65536", "must be 127.0.0.1:PORT"),
            ("unix:", "behind unix: must be"),
        ] {
            let said = text.parse::<MetricsAddress>().expect_err(text);
            assert!(said.contains(complaint), "{text}: {said}");
        }
    }
}
