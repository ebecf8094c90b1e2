//! Taking over: another process goes on with the disks of the one that serves, and no front-end notices; or it does not,
//! and that one goes on.

mod disks;
mod refusals;
mod relay;
mod steps;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::backend::{Backend, Program, Setup};
use crate::frontend::blk::{Framing, OK, Request};
use crate::frontend::device::Device;
use crate::frontend::wait::{Stop, until};
use crate::image::{Image, pattern};

/// A folder for the sockets, which outlives every process.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("blockport-").tempdir().expect("a directory for sockets"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// This, at the place's sockets, for the next process to take over.
    fn setup(&self, setup: Setup) -> Setup {
        setup.at(&self.path("disk")).more(arguments("--control", &self.path("control")))
    }

    /// The same, taking over by the control socket of that name.
    fn taking_over(&self, setup: &Setup, control: &str) -> Setup {
        setup.clone().more(arguments("--take-over", &self.path(control)))
    }

    /// Has a process with this setup take over; the one before it ends well.
    #[track_caller]
    fn upgrade(&self, setup: &Setup, old: Backend) -> Backend {
        let new = self.taking_over(setup, "control").start();
        let said = old.ended_well();
        assert!(said.contains("another process serves"), "{said}");
        new
    }

    /// Has a process with this setup fail to take over from one that goes on. What it said.
    #[track_caller]
    fn fails(&self, setup: &Setup, control: &str) -> String {
        let (status, said) = match self.taking_over(setup, control).try_start() {
            // It had the sockets for a while.
            Ok(new) => new.ended(),
            Err(ended) => ended,
        };
        assert_eq!(status.code(), Some(1), "{said}");
        said
    }
}

fn arguments(option: &str, path: &Path) -> Vec<String> {
    vec![option.to_owned(), path.display().to_string()]
}

fn is_qsd() -> bool {
    Program::under_test() != Program::Blockport
}

/// What a client under load has seen.
#[derive(Debug, Default)]
struct Load {
    /// Rounds that were completed.
    rounds: u64,
    /// The longest time between two completions.
    gap: Duration,
}

/// Blocks that each queue writes again and again, every time with other data.
const BLOCKS: u64 = 16;
const BLOCK: u64 = 4096;

fn data(queue: usize, block: u64, round: u64) -> Vec<u8> {
    pattern((queue as u32) << 20 | (round as u32 % 4096) << 8 | block as u32, BLOCK as usize)
}

fn sector(queue: usize, block: u64) -> u64 {
    (queue as u64 * BLOCKS + block) * BLOCK / 512
}

/// Writes all blocks of all queues in each round, reads back what was written, and goes on until it is told to stop.
fn work(device: &mut Device, stop: &Stop) -> Load {
    let mut load = Load::default();
    let mut last = Instant::now();
    let free: Vec<_> = device.queues.iter().map(|queue| queue.arena.mark()).collect();
    while !stop.is_set() {
        let round = load.rounds;
        for is_read in [false, true] {
            let mut tickets = Vec::new();
            for block in 0..BLOCKS {
                for (queue, at) in device.queues.iter_mut().zip(0..) {
                    let request = match is_read {
                        true => Request::read(sector(at, block), BLOCK as u32),
                        false => Request::write(sector(at, block), &data(at, block, round)),
                    };
                    tickets.push((at, block, queue.start(&request, &Framing::default())));
                }
            }
            for (at, queue) in device.queues.iter_mut().enumerate() {
                let mine: Vec<_> = tickets.extract_if(.., |(of, ..)| *of == at).collect();
                let mut left: Vec<_> = mine.into_iter().map(|(_, block, ticket)| (block, ticket)).collect();
                while !left.is_empty() {
                    let used = queue.take();
                    load.gap = load.gap.max(last.elapsed());
                    last = Instant::now();
                    let found = left.iter().position(|(_, ticket)| u32::from(ticket.head) == used.id);
                    let (block, ticket) = left.remove(found.expect("a completion of what was started, once"));
                    let answer = queue.answer(&ticket, used);
                    assert_eq!(answer.status, OK);
                    assert!(!is_read || answer.data == data(at, block, round), "queue {at}, block {block}");
                }
                queue.arena.release(&free[at]);
            }
        }
        load.rounds += 1;
    }
    load
}

/// Runs `upgrades` while the device is at work; then the host finds on the image what was written last.
#[track_caller]
fn under_load(device: &mut Device, upgrades: impl FnOnce(), read: impl Fn(u64, usize) -> Vec<u8>) -> Load {
    let stop = Stop::default();
    let load = std::thread::scope(|scope| {
        let worker = scope.spawn(|| work(device, &stop));
        let _guard = stop.guard();
        upgrades();
        stop.set();
        worker.join().expect("the load")
    });
    assert!(load.rounds > 0);
    for queue in 0..device.queues.len() {
        assert!(!device.queues[queue].has_completion(), "something is completed twice");
        assert_eq!(device.queue().request(&Request::flush()).status, OK);
        for block in 0..BLOCKS {
            let offset = sector(queue, block) * 512;
            assert!(
                read(offset, BLOCK as usize) == data(queue, block, load.rounds - 1),
                "queue {queue}, block {block}"
            );
        }
    }
    load
}

/// Waits until this many processes have the image open.
#[track_caller]
fn until_gone(path: &Path) {
    until("the socket file goes away", || !path.exists());
}

/// An image for some queues.
fn image(queues: u64) -> Image {
    Image::empty(queues * BLOCKS * BLOCK)
}
