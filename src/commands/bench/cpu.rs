//! The CPU time a process used, io_uring's workers included. It reads /proc and touches no process.

use std::collections::HashMap;
use std::fs;
use std::io;

/// A process' CPU time at one moment.
pub struct CpuTimes {
    /// By thread, ns on a CPU, from /proc/PID/task/*/schedstat: exact, but a thread takes its time with it.
    threads: HashMap<u32, u64>,
    /// Of the process and all threads it ever had, in ns, from /proc/PID/stat: in whole ticks.
    user_ns: u64,
    system_ns: u64,
}

/// CPU time used between two moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CpuUsed {
    /// In user space and in the kernel, in ns.
    pub ns: u64,
    /// The part in user space, 0 to 1; 0 when less than a tick was used.
    pub user_share: f64,
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
        let (user, system) = user_and_system_ticks(&stat)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form")))?;
        Ok(Self { threads, user_ns: user * tick_ns(), system_ns: system * tick_ns() })
    }

    /// What was used since `before`.
    ///
    /// Threads' sum, unless the process' own count says that threads came and went in between: each of its two
    /// readings is up to two ticks off. Its ticks are what user space and kernel are told apart by.
    pub fn since(&self, before: &Self) -> CpuUsed {
        let threads: u64 =
            self.threads.iter().map(|(tid, ns)| ns.saturating_sub(before.threads.get(tid).copied().unwrap_or(0))).sum();
        let user = self.user_ns.saturating_sub(before.user_ns);
        let process = user + self.system_ns.saturating_sub(before.system_ns);
        CpuUsed {
            ns: if process > threads + 4 * tick_ns() { process } else { threads },
            user_share: if process == 0 { 0.0 } else { user as f64 / process as f64 },
        }
    }
}

fn tick_ns() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

fn first_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// Fields 14 and 15 of /proc/PID/stat. The name before them may contain anything, parentheses included.
fn user_and_system_ticks(stat: &str) -> Option<(u64, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user, system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_fields_behind_a_hostile_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 120 34 0 0 20 0 1 0 55";
        assert_eq!(user_and_system_ticks(stat), Some((120, 34)));
        assert_eq!(user_and_system_ticks("7 (a"), None);
    }

    #[test]
    fn own_time_grows_while_it_is_spent() {
        let before = CpuTimes::sample(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        // On a busy machine it may take long until this thread has had its millisecond.
        while CpuTimes::sample(std::process::id()).unwrap().since(&before).ns <= 1_000_000 {
            assert!(start.elapsed().as_secs() < 20, "no time was counted");
        }
    }

    #[test]
    fn threads_that_ended_are_counted_by_the_process() {
        let before = CpuTimes { threads: HashMap::from([(1, 10), (2, 50)]), user_ns: 0, system_ns: 0 };
        let tick = tick_ns();
        let after = CpuTimes { threads: HashMap::from([(1, 30), (3, 5)]), user_ns: 25 * tick, system_ns: 75 * tick };
        assert_eq!(after.since(&before), CpuUsed { ns: 100 * tick, user_share: 0.25 });
        let after = CpuTimes { user_ns: tick, system_ns: 0, ..after };
        assert_eq!(after.since(&before), CpuUsed { ns: 25, user_share: 1.0 });
    }
}
