//! What an iothread is configured with.
//!
//! This file owns [`IothreadConfig`], its defaults and its reading from an option tree. It never starts a thread.

use blockport_block::aio::AioEngine;
use blockport_block::options::{Options, Result, is_valid_id};

use super::cpus::Cpus;
use super::table::{self, OptionKind, OptionRow, optional, required};

/// How long an iothread polls at most before it sleeps, in nanoseconds, unless stated.
pub const POLL_MAX_NS_DEFAULT: u64 = 32768;

/// A thread that runs queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IothreadConfig {
    /// The name of the iothread, unique among objects.
    pub id: String,
    /// The longest it polls before it sleeps, in nanoseconds. 0: never polls.
    pub poll_max_ns: u64,
    /// The factor by which the polling time grows while polling would have helped. 0: the daemon's own (2).
    pub poll_grow: u64,
    /// The divisor by which the polling time shrinks after polling in vain. 0: back to no polling at once.
    pub poll_shrink: u64,
    /// What carries its I/O out.
    pub aio_engine: AioEngine,
    /// The CPUs it may run on. `None`: all that the daemon may.
    pub cpu_affinity: Option<Cpus>,
}

/// All options of an iothread, less `qom-type`.
pub const IOTHREAD_OPTIONS: &[OptionRow] = &[
    required("id", OptionKind::Text),
    optional("poll-max-ns", OptionKind::Number),
    optional("poll-grow", OptionKind::Number),
    optional("poll-shrink", OptionKind::Number),
    optional("aio-engine", OptionKind::Choice("AioEngine", &["auto", "io_uring", "threads"])),
    optional("cpu-affinity", OptionKind::Cpus),
];

impl IothreadConfig {
    /// An iothread with the defaults.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            poll_max_ns: POLL_MAX_NS_DEFAULT,
            poll_grow: 0,
            poll_shrink: 0,
            aio_engine: AioEngine::Auto,
            cpu_affinity: None,
        }
    }

    /// Reads an iothread from the options of `--object`, less `qom-type`, all of them.
    ///
    /// Fails on options that are missing, unknown, out of bounds, or known to qemu-storage-daemon only.
    pub fn from_options(mut options: Options) -> Result<Self> {
        // What an i64 holds, as in qemu-storage-daemon.
        const RANGE: std::ops::RangeInclusive<u64> = 0..=i64::MAX.unsigned_abs();
        options.take_unsupported(&["aio-max-batch", "thread-pool-min", "thread-pool-max"])?;
        table::check(&options, IOTHREAD_OPTIONS)?;
        let id = options.require_str("id")?;
        if !is_valid_id(&id) {
            return Err(options.invalid("id", id, "a letter, then letters, digits, '-', '.' and '_'"));
        }
        let mut iothread = Self::new(id);
        if let Some(nanoseconds) = options.take_u64_in("poll-max-ns", RANGE)? {
            iothread.poll_max_ns = nanoseconds;
        }
        if let Some(factor) = options.take_u64_in("poll-grow", RANGE)? {
            iothread.poll_grow = factor;
        }
        if let Some(divisor) = options.take_u64_in("poll-shrink", RANGE)? {
            iothread.poll_shrink = divisor;
        }
        if let Some(engine) = options.take_enum("aio-engine", &AioEngine::NAMES)? {
            iothread.aio_engine = engine;
        }
        iothread.cpu_affinity = Cpus::take(&mut options, "cpu-affinity")?;
        options.finish()?;
        Ok(iothread)
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;

    use super::*;

    #[test]
    fn the_table_is_what_is_read() {
        let valid = serde_json::json!({"id": "t"});
        table::tests::every_row_is_read(IOTHREAD_OPTIONS, &valid, IothreadConfig::from_options);
    }

    fn read(text: &str) -> Result<IothreadConfig> {
        IothreadConfig::from_options(parse_keyval(text, None).expect(text))
    }

    #[test]
    fn defaults_and_everything_set() {
        assert_eq!(read("id=t").expect("minimal"), IothreadConfig::new("t"));
        let all = IothreadConfig {
            poll_max_ns: 0,
            poll_grow: 3,
            poll_shrink: 4,
            aio_engine: AioEngine::Threads,
            cpu_affinity: Some("0-1".parse().expect("a set")),
            ..IothreadConfig::new("t")
        };
        assert_eq!(
            read("id=t,poll-max-ns=0,poll-grow=3,poll-shrink=4,aio-engine=threads,cpu-affinity=0-1").expect("all"),
            all
        );
    }

    #[test]
    fn refusals() {
        for (text, complaint) in [
            ("poll-grow=1", r#"option "id" is missing"#),
            ("id=0", r#"option "id" must be a letter, then letters, digits, '-', '.' and '_', not "0""#),
            ("id=t,poll-max-ns=1k", r#"option "poll-max-ns" must be a whole number from 0, not "1k""#),
            ("id=t,aio-max-batch=1", r#"option "aio-max-batch" is not supported yet"#),
            ("id=t,thread-pool-max=1", r#"option "thread-pool-max" is not supported yet"#),
            ("id=t,aio-engine=native", r#"option "aio-engine" must be one of auto, io_uring, threads, not "native""#),
            ("id=t,x=1", r#"option "x" is unknown"#),
        ] {
            assert_eq!(read(text).expect_err(text).to_string(), complaint, "{text}");
        }
        let large = read("id=t,poll-max-ns=0x8000000000000000").expect_err("too large").to_string();
        assert!(large.contains("must be from 0 to 9223372036854775807"), "{large}");
    }
}
