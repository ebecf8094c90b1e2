//! ThrottleLimits: what a throttle group allows, under the names that users of QEMU write. It owns the names, the bounds
//! and the words about what does not go together; it meters nothing.

use crate::options::{Options, OptionsError};

/// What is limited: operations or bytes, of reads, of writes or of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// Operations of both directions.
    IopsTotal,
    /// Operations that read.
    IopsRead,
    /// Operations that write.
    IopsWrite,
    /// Bytes of both directions.
    BpsTotal,
    /// Bytes read.
    BpsRead,
    /// Bytes written.
    BpsWrite,
}

impl Limited {
    /// Everything that can be limited, in the order of [`ThrottleLimits`].
    pub const ALL: [Self; 6] =
        [Self::IopsTotal, Self::IopsRead, Self::IopsWrite, Self::BpsTotal, Self::BpsRead, Self::BpsWrite];

    /// Its name, as in `limits.NAME`.
    pub fn name(self) -> &'static str {
        match self {
            Self::IopsTotal => "iops-total",
            Self::IopsRead => "iops-read",
            Self::IopsWrite => "iops-write",
            Self::BpsTotal => "bps-total",
            Self::BpsRead => "bps-read",
            Self::BpsWrite => "bps-write",
        }
    }
}

/// The largest rate, and the largest burst, as in QEMU.
pub const RATE_MAX: u64 = 1_000_000_000_000_000;

/// How fast something may go, per second: operations or bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// In the long run. 0: without limit.
    pub average: u64,
    /// During a burst. 0: no bursts; else at least `average`.
    pub burst: u64,
    /// How long a burst at full rate may last, in seconds, at least 1. With 1, a second's worth may come all at once.
    pub burst_seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, burst: 0, burst_seconds: 1 }
    }
}

/// The limits of a throttle group. The default limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThrottleLimits {
    rates: [Rate; Limited::ALL.len()],
    /// Longer operations count as several: as many as this many bytes go into them. 0: each counts as one.
    pub iops_size: u64,
}

impl ThrottleLimits {
    /// The rate of one thing.
    pub fn rate(&self, of: Limited) -> Rate {
        self.rates[of as usize]
    }

    /// Sets the rate of one thing; [`ThrottleLimits::check`] says whether the whole makes sense.
    pub fn set_rate(&mut self, of: Limited, rate: Rate) {
        self.rates[of as usize] = rate;
    }

    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.rates.iter().all(|rate| rate.average == 0)
    }

    /// All values by name, as `limits.NAME` takes them.
    pub fn values(&self) -> Vec<(String, u64)> {
        let rates = Limited::ALL.iter().flat_map(|of| {
            let (name, rate) = (of.name(), self.rate(*of));
            [
                (name.to_owned(), rate.average),
                (format!("{name}-max"), rate.burst),
                (format!("{name}-max-length"), rate.burst_seconds),
            ]
        });
        rates.chain([("iops-size".to_owned(), self.iops_size)]).collect()
    }

    /// These limits with the values that `options` give by name (`iops-total`, `bps-read-max`, …), each with `prefix`
    /// in front, in place of its own; all of them are taken.
    ///
    /// # Errors
    /// A value is no number.
    pub fn updated(mut self, options: &mut Options, prefix: &str) -> Result<Self, OptionsError> {
        for of in Limited::ALL {
            let key = format!("{prefix}{}", of.name());
            let rate = &mut self.rates[of as usize];
            let mut take = |suffix: &str, value: &mut u64| {
                let key = format!("{key}{suffix}");
                *value = options.take_size(&key)?.unwrap_or(*value);
                Ok(())
            };
            take("", &mut rate.average)?;
            take("-max", &mut rate.burst)?;
            take("-max-length", &mut rate.burst_seconds)?;
        }
        self.iops_size = options.take_size(&format!("{prefix}iops-size"))?.unwrap_or(self.iops_size);
        Ok(self)
    }

    /// # Errors
    /// The values contradict each other or are out of bounds; the sentence names them.
    pub fn check(&self) -> Result<(), String> {
        for [total, read, write] in [
            [Limited::IopsTotal, Limited::IopsRead, Limited::IopsWrite],
            [Limited::BpsTotal, Limited::BpsRead, Limited::BpsWrite],
        ] {
            let given = |of: Limited| self.rate(of).average != 0 || self.rate(of).burst != 0;
            if given(total) && (given(read) || given(write)) {
                let (total, read, write) = (total.name(), read.name(), write.name());
                return Err(format!("{total} cannot be limited together with {read} or {write}"));
            }
        }
        if self.iops_size != 0
            && ![Limited::IopsTotal, Limited::IopsRead, Limited::IopsWrite].iter().any(|of| self.rate(*of).average != 0)
        {
            return Err("iops-size needs a limit of operations: iops-total, iops-read or iops-write".to_owned());
        }
        Limited::ALL.iter().try_for_each(|of| self.rate(*of).check(of.name()))
    }
}

impl Rate {
    fn check(&self, name: &str) -> Result<(), String> {
        let Self { average, burst, burst_seconds } = *self;
        if average > RATE_MAX || burst > RATE_MAX {
            return Err(format!("{name} and {name}-max must be at most {RATE_MAX}"));
        }
        if burst_seconds == 0 {
            return Err(format!("{name}-max-length must be at least 1 second"));
        }
        if burst_seconds > 1 && burst == 0 {
            return Err(format!("{name}-max-length needs {name}-max"));
        }
        if burst != 0 && average == 0 {
            return Err(format!("{name}-max needs {name}"));
        }
        if burst != 0 && burst < average {
            return Err(format!("{name}-max must be at least {name}, which is {average}"));
        }
        if burst != 0 && burst_seconds > RATE_MAX / burst {
            return Err(format!("{name}-max-length is too long for {name}-max"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::parse_keyval;

    fn read(text: &str) -> Result<ThrottleLimits, String> {
        let mut options = parse_keyval(text, None).expect(text);
        let limits = ThrottleLimits::default().updated(&mut options, "").map_err(|e| e.to_string())?;
        options.finish().map_err(|e| e.to_string())?;
        limits.check().map(|()| limits)
    }

    #[test]
    fn every_value_goes_in_and_comes_out_under_its_name() {
        let limits =
            read("iops-read=10,iops-read-max=20,iops-read-max-length=3,bps-total=1M,iops-size=4K").expect("sound");
        assert_eq!(limits.rate(Limited::IopsRead), Rate { average: 10, burst: 20, burst_seconds: 3 });
        assert_eq!(limits.rate(Limited::BpsTotal).average, 1 << 20);
        let values = limits.values();
        assert_eq!(values.len(), 19);
        let text: Vec<String> = values.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(read(&text.join(",")), Ok(limits));
        assert!(ThrottleLimits::default().is_unlimited() && !limits.is_unlimited());
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        for (text, complaint) in [
            ("iops-total=1,iops-read=1", "iops-total cannot be limited together with iops-read or iops-write"),
            ("bps-total=1,bps-write-max=1", "bps-total cannot be limited together with bps-read or bps-write"),
            ("iops-size=1", "iops-size needs a limit of operations: iops-total, iops-read or iops-write"),
            ("bps-read-max=5", "bps-read-max needs bps-read"),
            ("iops-total=5,iops-total-max=3", "iops-total-max must be at least iops-total, which is 5"),
            ("iops-total=5,iops-total-max-length=3", "iops-total-max-length needs iops-total-max"),
            ("iops-total=5,iops-total-max-length=0", "iops-total-max-length must be at least 1 second"),
            ("bps-total=1000000000000001", "bps-total and bps-total-max must be at most 1000000000000000"),
            (
                "bps-read=1,bps-read-max=1000000000000000,bps-read-max-length=2",
                "bps-read-max-length is too long for bps-read-max",
            ),
            (
                "iops-total=x",
                "option \"iops-total\" must be a size below 8E, in bytes or with a unit (such as 512, 64K or 1.5G), not \"x\"",
            ),
            ("iops=1", "option \"iops\" is unknown"),
        ] {
            assert_eq!(read(text), Err(complaint.to_owned()), "{text}");
        }
    }
}
