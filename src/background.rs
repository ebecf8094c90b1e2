//! Going to the background: the parent waits until the child is ready or has failed, and leaves with its status.
#![allow(unsafe_code)] // fork; one call, before any thread exists.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe, setsid};

/// In the child: the way to tell the parent that all is up.
pub struct Background {
    ready: File,
}

impl Background {
    /// Forks. Only the child returns; the parent exits with 0 once the child is ready, with 1 if it ends before.
    /// Must be called before any thread or io_uring exists.
    pub fn fork() -> io::Result<Self> {
        let (from_child, to_parent) = pipe()?;
        // SAFETY: the process has one thread, so the child may go on as if nothing had happened.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => {
                drop(to_parent);
                let mut byte = [0];
                let ready = File::from(from_child).read_exact(&mut byte).is_ok();
                std::process::exit(i32::from(!ready));
            }
            ForkResult::Child => {
                setsid()?;
                Ok(Self { ready: to_parent.into() })
            }
        }
    }

    /// Lets go of the terminal and the parent.
    pub fn ready(mut self) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(null.as_fd())?;
        dup2_stdout(null.as_fd())?;
        dup2_stderr(null.as_fd())?;
        self.ready.write_all(&[1])
    }
}
