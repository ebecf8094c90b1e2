//! The sandbox: what the daemon gives up once everything is open and before the first guest is served. It owns the order
//! in which things are given up and the words about it; what each part blocks is in `seccomp.rs` and `landlock.rs`.
//! It never opens an image or a socket.

mod landlock;
mod seccomp;
#[cfg(test)]
mod tests;
mod threads;
mod user;
mod violation;

use ::landlock::RulesetCreated;
use blockport_block::{OpenError, OpenResult};
use nix::unistd::User;

use crate::options::{Config, SandboxMode, Step};

/// What will be given up, ready to be, with nothing given up yet.
pub struct Sandbox {
    mode: SandboxMode,
    user: Option<User>,
    rules: Option<RulesetCreated>,
    /// A monitor may ask for iothreads.
    grows: bool,
}

impl Sandbox {
    /// Finds out what a configuration asks for, before anything is made.
    ///
    /// # Errors
    /// The user or an allowed folder is not there; in strict mode, the kernel has no Landlock.
    pub fn prepare(config: &Config) -> OpenResult<Self> {
        let sandbox = &config.sandbox;
        let mode = sandbox.mode;
        let user = sandbox.run_as.as_deref().map(user::find).transpose()?;
        let grows = config.steps.iter().any(|step| matches!(step, Step::Monitor(_)));
        if mode == SandboxMode::Off {
            return Ok(Self { mode, user, rules: None, grows });
        }
        landlock::check_allowed(&sandbox.allow)?;
        let rules = landlock::rules(&landlock::Paths::of(config), mode == SandboxMode::Strict);
        Ok(Self { mode, user, rules: available("Landlock", mode, rules)?, grows })
    }

    /// Gives up, on all threads there are and all that will be, what serving disks does not take: the user, if another is
    /// asked for, new privileges, capabilities, files, and system calls.
    ///
    /// # Errors
    /// The user cannot be had; in strict mode, the kernel has no seccomp. The process must not go on then.
    pub fn confine(self) -> OpenResult {
        // While threads may still change it; the C library sees to all of them.
        if let Some(user) = &self.user {
            user::become_user(user)?;
        }
        if self.mode == SandboxMode::Off {
            return Ok(());
        }
        let failed = |error| OpenError(format!("--sandbox: privileges cannot be given up: {error}"));
        let rules = self.rules.and_then(landlock::with_open_files);
        threads::confine_all(rules.as_ref()).map_err(failed)?;
        // Last, as it forbids what the others need.
        let filter = available("seccomp", self.mode, seccomp::install(self.grows))?;
        let files = rules.map(|_| ", files");
        let calls = filter.map(|()| ", system calls");
        tracing::info!(
            "sandbox: given up: privileges, capabilities{}{}",
            files.unwrap_or_default(),
            calls.unwrap_or_default()
        );
        Ok(())
    }
}

/// What the kernel has of a part. In strict mode it must have it.
fn available<T>(part: &str, mode: SandboxMode, result: Result<T, String>) -> OpenResult<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(why) if mode == SandboxMode::Strict => {
            Err(OpenError(format!("--sandbox strict: no {part} on this machine: {why}")))
        }
        Err(why) => {
            tracing::warn!("sandbox: goes on without {part}: {why}");
            Ok(None)
        }
    }
}
