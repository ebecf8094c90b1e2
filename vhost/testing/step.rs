//! Runs a piece of code one machine instruction at a time, in a process of its own, and keeps what memory that it shares
//! with us held after each store: every state in which it could have been killed.
#![allow(unsafe_code)] // fork and ptrace; each block gives its reason.

/// Every state that `look` saw change while `run` ran, the first one included. `None`: this machine allows no tracing.
///
/// # Panics
/// If `run` panics, or the process dies.
pub(crate) fn states<T: PartialEq>(look: impl Fn() -> T, run: impl FnOnce()) -> Option<Vec<T>> {
    let mut states = vec![look()];
    // SAFETY: the child only runs `run`, which allocates at most (glibc keeps its allocator usable over a fork), and ends
    // without unwinding into the harness.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        // SAFETY: requests about this process itself.
        let refused = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } != 0;
        if !refused {
            // SAFETY: stops this process until its tracer goes on.
            unsafe { libc::raise(libc::SIGSTOP) };
        }
        let ended = !refused && std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_ok();
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(if refused { 2 } else { i32::from(!ended) }) };
    }
    loop {
        let mut status = 0;
        // SAFETY: waits for our own child; `status` is a valid place.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        if libc::WIFEXITED(status) {
            match libc::WEXITSTATUS(status) {
                0 => return Some(states),
                2 => return None,
                _ => panic!("what was stepped through panicked"),
            }
        }
        assert!(libc::WIFSTOPPED(status), "it ended with status {status:#x}");
        let now = look();
        if states.last() != Some(&now) {
            states.push(now);
        }
        // SAFETY: the child is stopped, and is ours to continue for one instruction.
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, pid, 0, 0) }, 0, "it can be continued");
    }
}
