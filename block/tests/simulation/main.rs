//! Simulation: the block layer over a disk that reorders, tears, fails and loses power by a seed. What a completed flush
//! or a stable write promised is there afterwards, and nothing that was never written appears.
//!
//! One seed is one run, the same on every machine. `SEED=N cargo test --test simulation` runs that one alone; SEEDS=N as
//! many as that.

mod client;
mod disk;
#[allow(dead_code)]
#[path = "../../testing/random.rs"]
mod random;

use client::Run;

/// Seeds in an ordinary run, and with `BLOCKPORT_TEST_DEEP`.
const SEEDS: u64 = 1000;
const SEEDS_DEEP: u64 = 200_000;

fn seeds() -> Box<dyn Iterator<Item = u64>> {
    let number =
        |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}={text}")));
    if let Some(seed) = number("SEED") {
        return Box::new(std::iter::once(seed));
    }
    let deep = std::env::var_os("BLOCKPORT_TEST_DEEP").is_some();
    Box::new(0..number("SEEDS").unwrap_or(if deep { SEEDS_DEEP } else { SEEDS }))
}

#[test]
fn what_was_promised_is_there_after_the_power_failed() {
    let (mut requests, mut crashes) = (0, 0);
    for seed in seeds() {
        let done = Run::new(seed).run();
        let done = done.unwrap_or_else(|broken| panic!("SEED={seed} cargo test --test simulation: {broken}"));
        requests += done.requests;
        crashes += done.crashes;
    }
    println!("{requests} requests, {crashes} crashes");
    assert!(crashes > 0 && requests > 0);
}

/// The simulation finds what it is there to find: a disk that lies about each promise is caught within few seeds.
fn is_caught(lie: disk::Lie) {
    let caught = (0..500).any(|seed| Run::over(seed, lie).run().is_err());
    assert!(caught, "{lie:?} goes unnoticed");
}

#[test]
fn a_disk_that_lies_about_its_promises_is_caught() {
    for lie in [disk::Lie::FlushDoesNothing, disk::Lie::StableWriteIsNot, disk::Lie::WriteIsLost] {
        is_caught(lie);
    }
}
