//! The SIGBUS guard: a front-end that truncates a file we have mapped makes the next access fault. The handler puts
//! anonymous memory over the whole mapping and marks it lost; the device fails, the daemon lives. A fault anywhere else
//! kills the process as it would without us.
#![allow(unsafe_code)] // A signal handler and mmap; each block gives its reason.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The most mappings guarded at once in the process. What does not fit is refused by the caller.
const MAPPINGS_MAX: usize = 16_384;

/// A guarded mapping. `start` is written last when it is registered and first when it is released, so that the handler
/// never sees half a slot.
struct Slot {
    used: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

static SLOTS: [Slot; MAPPINGS_MAX] = [const {
    Slot {
        used: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAPPINGS_MAX];

/// How many slots were ever used: the handler looks no further.
static SLOTS_USED: AtomicUsize = AtomicUsize::new(0);

/// Whether any mapping was ever lost: the common case is answered by one load.
static ANY_LOST: AtomicBool = AtomicBool::new(false);

static INSTALL: Once = Once::new();

/// Guards one mapping from its making until this is dropped, which must come before the mapping is undone.
pub(crate) struct SigbusGuard(usize);

impl SigbusGuard {
    /// Guards `len` bytes of a mapping at `start`. `None` when too many are guarded already.
    pub(crate) fn new(start: usize, len: usize) -> Option<Self> {
        INSTALL.call_once(install);
        let index = SLOTS
            .iter()
            .position(|slot| slot.used.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok())?;
        SLOTS_USED.fetch_max(index + 1, Ordering::AcqRel);
        let slot = &SLOTS[index];
        slot.lost.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Release);
        slot.start.store(start, Ordering::Release);
        Some(Self(index))
    }

    /// Whether the file behind the mapping was truncated, and the mapping now holds memory of our own.
    pub(crate) fn is_lost(&self) -> bool {
        SLOTS[self.0].lost.load(Ordering::Relaxed)
    }
}

/// Whether any mapping of the process was ever lost.
pub(crate) fn any_lost() -> bool {
    ANY_LOST.load(Ordering::Relaxed)
}

impl Drop for SigbusGuard {
    fn drop(&mut self) {
        let slot = &SLOTS[self.0];
        slot.start.store(0, Ordering::Release);
        slot.used.store(false, Ordering::Release);
    }
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid one, and every field that matters is set.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: `handler` has the signature that SA_SIGINFO asks for and calls only async-signal-safe functions.
    unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };
}

extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for a synchronous SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &SLOTS[..SLOTS_USED.load(Ordering::Acquire)] {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Acquire);
        // The same before and after, or the slot was given to another mapping in between.
        if start == 0 || address.wrapping_sub(start) >= len || slot.start.load(Ordering::Acquire) != start {
            continue;
        }
        slot.lost.store(true, Ordering::Relaxed);
        ANY_LOST.store(true, Ordering::Relaxed);
        // SAFETY: the range is a live mapping of ours, as its guard is; replacing it in place keeps every pointer into
        // it valid, now to memory of our own.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    // Not ours: die of it as usual, when the faulting instruction runs again.
    // SAFETY: both are async-signal-safe, and SIG_DFL is a valid disposition.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests;
