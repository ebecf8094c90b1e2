//! The floor under every sleeping client: two threads that wake each other over eventfds, and nothing else. It
//! needs no daemon.

use std::io;
use std::os::fd::OwnedFd;
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
    }
}
