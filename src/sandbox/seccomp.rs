//! seccomp: the system calls that serving disks takes, and no others. A list of what is allowed, with conditions where a
//! call does more than is needed.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::violation;

/// Reading and writing what is open, and finding out about it.
const FILES: &[libc::c_long] = &[
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_sync_file_range,
    libc::SYS_write,
    libc::SYS_writev,
];

/// By path: within what Landlock leaves.
const PATHS: &[libc::c_long] = &[
    libc::SYS_chdir,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_getcwd,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_umask,
    libc::SYS_unlinkat,
];

/// The event loops, and waiting.
const EVENTS: &[libc::c_long] = &[
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_enter,
    libc::SYS_nanosleep,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
];

/// Sockets that are there. `socket` itself is among the conditions.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// What the C library and Rust's run-time need for threads, memory, time and the end.
const RUNTIME: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    // Answered by a second filter; see `install`.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Older forms of some of these, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[libc::c_long] = &[];

/// Rings for iothreads that are made later. A ring of ours can do no more than reads and writes; one that an intruder
/// makes could do more, so this is allowed only where it may be needed.
const RINGS: &[libc::c_long] = &[libc::SYS_io_uring_register, libc::SYS_io_uring_setup];

/// Of block devices, sockets and terminals.
const IOCTLS: &[u64] = &[
    libc::BLKPBSZGET,
    libc::BLKSSZGET,
    libc::BLKIOMIN,
    libc::BLKIOOPT,
    BLKALIGNOFF,
    BLKGETSIZE64,
    BLKDISCARD,
    BLKDISCARDZEROES,
    BLKZEROOUT,
    BLKROGET,
    BLKFLSBUF,
    HDIO_GETGEO,
    libc::FIONREAD,
    libc::FIONBIO,
    libc::TCGETS,
];
/// From linux/hdreg.h.
const HDIO_GETGEO: u64 = 0x0301;
/// From linux/fs.h.
const BLKROGET: u64 = 0x125e;
const BLKFLSBUF: u64 = 0x1261;
const BLKDISCARD: u64 = 0x1277;
const BLKALIGNOFF: u64 = 0x127a;
const BLKDISCARDZEROES: u64 = 0x127c;
const BLKZEROOUT: u64 = 0x127f;
const BLKGETSIZE64: u64 = 0x8008_1272;

/// PR_SET_VMA, by which allocators name their memory.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// PR_GET_AUXV, by which run-times learn the size of a page.
const PR_GET_AUXV: u64 = 0x4155_5856;

/// Installs the filter on all threads. `grows`: whether rings may still be made.
///
/// # Errors
/// The kernel has no seccomp, or not enough of it.
pub(super) fn install(grows: bool) -> Result<(), String> {
    violation::catch().map_err(|e| e.to_string())?;
    let allowed = filter(grows).map_err(|e| e.to_string())?;
    let no_clone3 = without_clone3().map_err(|e| e.to_string())?;
    for program in [&no_clone3, &allowed] {
        seccompiler::apply_filter_all_threads(program).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn architecture() -> Result<seccompiler::TargetArch, seccompiler::BackendError> {
    std::env::consts::ARCH.try_into()
}

fn filter(grows: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = conditions()?;
    let always = [FILES, PATHS, EVENTS, SOCKETS, RUNTIME, OLDER].into_iter().flatten();
    let rings = if grows { RINGS } else { &[] };
    for call in always.chain(rings) {
        rules.insert(*call, Vec::new());
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, architecture()?)?.try_into()
}

/// clone3 has its flags in memory, where a filter does not see them. Told that there is no such call, the C library
/// makes threads with clone, whose flags it does see.
fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let absent = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, absent, architecture()?)?.try_into()
}

/// Calls that are allowed in some forms.
fn conditions() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let any_of = |argument: u8, values: &[u64]| -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let rule = |value: &u64| {
            let equal = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
            SeccompRule::new(vec![equal])
        };
        values.iter().map(rule).collect()
    };
    let masked = |argument: u8, mask: u64, value: u64| {
        let bits =
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value & mask)?;
        Ok(vec![SeccompRule::new(vec![bits])?])
    };
    let number = |value: libc::c_int| u64::from(value.unsigned_abs());
    let unix = [number(libc::AF_UNIX)];
    let own = u64::from(std::process::id());
    let thread = number(libc::CLONE_THREAD);
    let executable = number(libc::PROT_EXEC);
    let descriptors = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_OFD_GETLK,
        libc::F_OFD_SETLK,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
    ];
    Ok(BTreeMap::from([
        // Threads, but no processes.
        (libc::SYS_clone, masked(0, thread, thread)?),
        (libc::SYS_tgkill, any_of(0, &[own])?),
        // No new code.
        (libc::SYS_mmap, masked(2, executable, 0)?),
        (libc::SYS_mprotect, masked(2, executable, 0)?),
        (libc::SYS_socket, any_of(0, &unix)?),
        (libc::SYS_socketpair, any_of(0, &unix)?),
        (libc::SYS_ioctl, any_of(1, IOCTLS)?),
        (libc::SYS_fcntl, any_of(1, &descriptors.map(number))?),
        (libc::SYS_prctl, any_of(0, &[number(libc::PR_SET_NAME), PR_SET_VMA, PR_GET_AUXV])?),
        (libc::SYS_prlimit64, any_of(0, &[0, own])?),
    ]))
}
