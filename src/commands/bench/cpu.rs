//! The CPU time a process used, io_uring's workers included. It reads /proc and touches no process.

use std::collections::HashMap;
use std::fs;
use std::io;

/// A process' CPU time at one moment.
pub struct CpuTimes {
    /// By thread, ns on a CPU, from /proc/PID/task/*/schedstat: exact, but a thread takes its time with it.
    threads: HashMap<u32, u64>,
    /// Of the process and all threads it ever had, in ns, from /proc/PID/stat: in whole ticks.
    process_ns: u64,
}

impl CpuTimes {
    /// Reads the times of a process.
    pub fn sample(pid: u32) -> io::Result<Self> {
        let mut threads = HashMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let entry = entry?;
            let Some(tid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A thread may end between the two calls; what it used is then in process_ns only.
            if let Ok(text) = fs::read_to_string(entry.path().join("schedstat"))
                && let Some(ns) = first_number(&text)
            {
                threads.insert(tid, ns);
            }
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let ticks = user_and_system_ticks(&stat)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form")))?;
        Ok(Self { threads, process_ns: ticks * tick_ns() })
    }

    /// The ns used since `before`.
    ///
    /// Threads' sum, unless the process' own count says that threads came and went in between: each of its two
    /// readings is up to two ticks off.
    pub fn since(&self, before: &Self) -> u64 {
        let threads: u64 =
            self.threads.iter().map(|(tid, ns)| ns.saturating_sub(before.threads.get(tid).copied().unwrap_or(0))).sum();
        let process = self.process_ns.saturating_sub(before.process_ns);
        if process > threads + 4 * tick_ns() { process } else { threads }
    }
}

fn tick_ns() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

fn first_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// Fields 14 and 15 of /proc/PID/stat. The name before them may contain anything, parentheses included.
fn user_and_system_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_fields_behind_a_hostile_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 120 34 0 0 20 0 1 0 55";
        assert_eq!(user_and_system_ticks(stat), Some(154));
        assert_eq!(user_and_system_ticks("7 (a"), None);
    }

    #[test]
    fn own_time_grows_by_about_what_is_spent() {
        let before = CpuTimes::sample(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 30 {
            std::hint::spin_loop();
        }
        let used = CpuTimes::sample(std::process::id()).unwrap().since(&before);
        assert!(used > 1_000_000, "{used} ns");
    }

    #[test]
    fn threads_that_ended_are_counted_by_the_process() {
        let before = CpuTimes { threads: HashMap::from([(1, 10), (2, 50)]), process_ns: 0 };
        let after = CpuTimes { threads: HashMap::from([(1, 30), (3, 5)]), process_ns: 100 * tick_ns() };
        assert_eq!(after.since(&before), 100 * tick_ns());
        let after = CpuTimes { process_ns: tick_ns(), ..after };
        assert_eq!(after.since(&before), 25);
    }
}
