//! The floors under every client, measured without a daemon: how often two sleeping threads can wake each other over
//! eventfds, and how long two polling ones take to hand a cache line over. Both depend on where a hypervisor has put
//! the CPUs, and vary by a factor of ten; no figure of a client means much without them.

use std::hint::spin_loop;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};

/// Round trips a second between two threads that sleep on eventfds, measured for `runtime`.
pub fn round_trips_per_second(runtime: Duration) -> io::Result<f64> {
    let there = eventfd(0, EventfdFlags::CLOEXEC)?;
    let back = eventfd(0, EventfdFlags::CLOEXEC)?;
    thread::scope(|scope| {
        let echo = scope.spawn(|| -> io::Result<()> {
            while receive(&there)? == GO_ON {
                send(&back, GO_ON)?;
            }
            Ok(())
        });
        let start = Instant::now();
        let mut trips = 0u64;
        while start.elapsed() < runtime {
            send(&there, GO_ON)?;
            receive(&back)?;
            trips += 1;
        }
        let rate = trips as f64 / start.elapsed().as_secs_f64();
        send(&there, STOP)?;
        match echo.join() {
            Ok(result) => result.map(|()| rate),
            Err(_) => Err(io::Error::other("the other thread panicked")),
        }
    })
}

/// Nanoseconds from a store on one CPU to the load on another that sees it, measured for `runtime`. On a single CPU it
/// is the scheduler that is measured.
pub fn cache_line_ns(runtime: Duration) -> f64 {
    /// Alone on its cache line.
    #[repr(align(128))]
    struct Line(AtomicU64);
    let line = Line(AtomicU64::new(0));
    // Even: the first thread's turn; odd: the second's.
    let wait_for = |value: u64| loop {
        match line.0.load(Ordering::Acquire) {
            END => return false,
            found if found == value => return true,
            _ => spin_loop(),
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut turn = 1;
            while wait_for(turn) {
                line.0.store(turn + 1, Ordering::Release);
                turn += 2;
            }
        });
        let start = Instant::now();
        let mut turn = 0;
        // Of many short stretches the median: a mean would count the times when one of the two had no CPU.
        let mut stretches = Vec::new();
        while start.elapsed() < runtime {
            let begin = Instant::now();
            for _ in 0..STRETCH {
                line.0.store(turn + 1, Ordering::Release);
                turn += 2;
                wait_for(turn);
            }
            stretches.push(begin.elapsed().as_nanos() as f64 / f64::from(2 * STRETCH));
        }
        line.0.store(END, Ordering::Release);
        stretches.sort_by(f64::total_cmp);
        stretches.get(stretches.len() / 2).copied().unwrap_or(f64::NAN)
    })
}

/// Hand-overs there and back between two looks at the clock, which costs as much as one.
const STRETCH: u32 = 256;

/// Ends the other thread of `cache_line_ns`; never reached by counting.
const END: u64 = u64::MAX;

/// What an eventfd carries: the sum of what was written, so the two must differ and never meet.
const GO_ON: u64 = 1;
const STOP: u64 = 2;

fn send(event: &OwnedFd, value: u64) -> io::Result<()> {
    write(event, &value.to_ne_bytes())?;
    Ok(())
}

fn receive(event: &OwnedFd) -> io::Result<u64> {
    let mut bytes = [0; 8];
    read(event, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_something_and_ends() {
        assert!(round_trips_per_second(Duration::from_millis(20)).unwrap() > 0.0);
        assert!(cache_line_ns(Duration::from_millis(20)) > 0.0);
    }
}
