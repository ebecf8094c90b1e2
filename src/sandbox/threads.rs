//! What is given up thread by thread: new privileges, capabilities, the file system. The kernel keeps these for each
//! thread, and only threads made later inherit them, so every thread is made to give them up by itself, in a signal
//! handler, as the C library does when it changes the user.
#![allow(unsafe_code)] // A signal handler and bare system calls; each block says why it is sound.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// How long a thread may take to come round.
const PATIENCE: Duration = Duration::from_secs(10);

/// The kernel's own threads in our process, for io_uring, which take no signals: PF_IO_WORKER in /proc/PID/stat.
const PF_IO_WORKER: u64 = 0x10;

/// Capabilities are in two words of 32.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// The descriptor with the rules; -1: none.
static RULES: AtomicI32 = AtomicI32::new(-1);
/// What the thread that was asked last made of it: not done yet, done, or an errno.
static RESULT: AtomicI32 = AtomicI32::new(0);
const NOT_YET: i32 = -1;
const DONE: i32 = 0;

/// Has every thread give up new privileges, capabilities, and what the rules do not allow.
///
/// # Errors
/// The first that a thread met. Some threads are confined then and others are not: the process must not go on.
pub(super) fn confine_all(rules: Option<&OwnedFd>) -> io::Result<()> {
    RULES.store(rules.map_or(-1, AsRawFd::as_raw_fd), Ordering::SeqCst);
    let signal = libc::SIGRTMIN() + 1;
    let old = set_handler(signal, confine_on_signal as *const () as usize)?;
    let result = confine_others(signal).and_then(|()| match confine_this_thread() {
        DONE => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    });
    set_handler(signal, old)?;
    result
}

fn confine_others(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: takes nothing and cannot fail.
    let own = unsafe { libc::gettid() };
    let mut done = vec![own];
    // A thread that is not confined yet may make another one, so until a look at them all shows nothing new.
    loop {
        let mut any = false;
        for entry in std::fs::read_dir("/proc/self/task")? {
            let name = entry?.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            if !done.contains(&thread) {
                confine_thread(thread, signal)?;
                done.push(thread);
                any = true;
            }
        }
        if !any {
            return Ok(());
        }
    }
}

fn confine_thread(thread: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    if is_kernels_own(thread) {
        return Ok(());
    }
    RESULT.store(NOT_YET, Ordering::SeqCst);
    // SAFETY: takes numbers only; the thread is one of ours, and the handler is set.
    if unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) } != 0 {
        let error = io::Error::last_os_error();
        // It has ended meanwhile.
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) };
    }
    let end = Instant::now() + PATIENCE;
    loop {
        match RESULT.load(Ordering::SeqCst) {
            DONE => return Ok(()),
            NOT_YET if !std::path::Path::new(&format!("/proc/self/task/{thread}")).exists() => return Ok(()),
            NOT_YET if Instant::now() > end => return Err(io::Error::other("a thread does not come round")),
            NOT_YET => std::thread::yield_now(),
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// The ninth field of its stat file; the second, in parentheses, may hold anything.
fn is_kernels_own(thread: libc::pid_t) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let flags = fields.split_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_IO_WORKER != 0)
}

fn set_handler(signal: libc::c_int, handler: libc::sighandler_t) -> io::Result<libc::sighandler_t> {
    // SAFETY: the structures are plain data for which zero is a value, and `handler` is one that was there before or
    // `confine_on_signal`, which does only what a handler may.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        let mut old: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler;
        new.sa_flags = libc::SA_RESTART;
        match libc::sigaction(signal, &raw const new, &raw mut old) {
            0 => Ok(old.sa_sigaction),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

extern "C" fn confine_on_signal(_signal: libc::c_int) {
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    RESULT.store(confine_this_thread(), Ordering::SeqCst);
    // SAFETY: as above; whatever the signal interrupted finds it as it was.
    unsafe { *libc::__errno_location() = errno };
}

/// System calls only: it runs in a signal handler. Returns `DONE` or an errno.
fn confine_this_thread() -> i32 {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    let header = Header { version: CAPABILITY_VERSION, pid: 0 };
    // Effective, permitted and inheritable, for the low and the high capabilities: none.
    let none = [0u32; 6];
    let rules = RULES.load(Ordering::SeqCst);
    // SAFETY: system calls that take numbers, but for capset, which reads the two structures above.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return last_errno();
        }
        if rules >= 0 && libc::syscall(libc::SYS_landlock_restrict_self, rules, 0) != 0 {
            return last_errno();
        }
        // What an exec could give back. There may be no right to drop them, and then there are none to drop.
        let mut capability = 0;
        while libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == 0 {
            capability += 1;
        }
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        if libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) != 0 {
            return last_errno();
        }
    }
    DONE
}

fn last_errno() -> i32 {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() }
}
