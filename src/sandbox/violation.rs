//! What happens at a system call that the filter does not let through: it fails with EPERM and is reported once, on
//! standard error. The daemon goes on, as the disks of its guests are worth more than a clean death.
#![allow(unsafe_code)] // A signal handler; each block says why it is sound.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers below this are reported once each; all above share the last.
const NUMBERS: usize = 512;
static REPORTED: [AtomicU64; NUMBERS / 64] = [const { AtomicU64::new(0) }; NUMBERS / 64];

/// Catches SIGSYS, on all threads.
pub(super) fn catch() -> io::Result<()> {
    // SAFETY: the structure is plain data for which zero is a value; the handler does only what a handler may.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_violation as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The part of siginfo_t that the kernel fills in for SIGSYS.
#[repr(C)]
struct SigSys {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    _padding: libc::c_int,
    call_address: usize,
    number: libc::c_int,
    architecture: u32,
}

extern "C" fn on_violation(_signal: libc::c_int, info: *const SigSys, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel gave both pointers for this signal, which only it sends: the filter lets nobody else.
    unsafe {
        report((*info).number);
        // The register that holds a system call's result.
        #[cfg(target_arch = "x86_64")]
        {
            (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
        }
        #[cfg(target_arch = "aarch64")]
        {
            (*context).uc_mcontext.regs[0] = -i64::from(libc::EPERM) as u64;
        }
    }
}

fn report(number: libc::c_int) {
    let slot = usize::try_from(number).unwrap_or(NUMBERS).min(NUMBERS - 1);
    let bit = 1 << (slot % 64);
    if REPORTED[slot / 64].fetch_or(bit, Ordering::Relaxed) & bit != 0 {
        return;
    }
    let mut line = Line { bytes: [0; 96], used: 0 };
    line.text(b"blockport: sandbox: system call ");
    line.number(number.unsigned_abs());
    line.text(b" was blocked and fails with EPERM\n");
    // SAFETY: the bytes are there; a log that nobody reads is nothing to wait for, but neither is it common.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.used) };
}

/// A line put together without allocating, as a signal handler must.
struct Line {
    bytes: [u8; 96],
    used: usize,
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.used) {
                *place = *byte;
                self.used += 1;
            }
        }
    }

    fn number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.text(&digits[first..]);
    }
}
