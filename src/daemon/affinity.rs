//! Which CPUs a thread may run on.
//!
//! This file owns the words about those that it may not. What runs on the thread it does not know.

use blockport_block::{OpenError, OpenResult};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, getpid};

use crate::options::Cpus;

/// Binds a thread of ours to CPUs.
///
/// # Errors
/// The daemon may not use one of them, or the machine has not got it.
pub fn bind(thread: Pid, cpus: &Cpus) -> OpenResult {
    let refuse = |error: Errno| OpenError(format!("cpu-affinity {cpus}: {}", error.desc()));
    // The main thread's, which nobody changes: what the daemon was started with.
    let usable = sched_getaffinity(getpid()).map_err(refuse)?;
    let mut set = CpuSet::new();
    for cpu in cpus.iter() {
        // The kernel leaves out what is not there, as long as one is.
        if !usable.is_set(cpu).unwrap_or(false) {
            return Err(OpenError(format!("cpu-affinity {cpus}: the daemon cannot use CPU {cpu} here")));
        }
        set.set(cpu).map_err(refuse)?;
    }
    sched_setaffinity(thread, &set).map_err(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_runs_where_it_is_bound_and_nowhere_that_is_not_there() {
        let usable = sched_getaffinity(getpid()).expect("this process runs");
        let first = (0..CpuSet::count()).find(|cpu| usable.is_set(*cpu) == Ok(true)).expect("it runs somewhere");
        let missing = (0..CpuSet::count()).find(|cpu| usable.is_set(*cpu) == Ok(false)).expect("few have 1024");
        let bound = std::thread::spawn(move || {
            let this = nix::unistd::gettid();
            let refused = bind(this, &format!("{first},{missing}").parse().expect("a set"));
            let unchanged = sched_getaffinity(this);
            bind(this, &first.to_string().parse().expect("a set")).expect("it runs there");
            (refused, unchanged, sched_getaffinity(this))
        });
        let (refused, unchanged, bound) = bound.join().expect("no panic");
        let error = refused.expect_err("it is not there").0;
        assert!(error.contains(&format!("cannot use CPU {missing}")), "{error}");
        assert_eq!(unchanged, Ok(usable));
        let mut only = CpuSet::new();
        only.set(first).expect("in bounds");
        assert_eq!(bound, Ok(only));
    }
}
