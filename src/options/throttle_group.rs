//! A throttle group: limits that nodes of the driver `throttle` share.
//!
//! This file owns the options of `--object throttle-group`. What the limits mean and which go together, the block layer
//! knows.

use blockport_block::options::{Options, Result, is_valid_id};
use blockport_block::throttle::ThrottleLimits;

/// A throttle group to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThrottleGroupConfig {
    /// The name that nodes refer to.
    pub id: String,
    /// What its members may do together.
    pub limits: ThrottleLimits,
}

impl ThrottleGroupConfig {
    /// Reads a throttle group from the options of `--object`, less `qom-type`, all of them. Limits stand under `limits.`,
    /// as in `limits.iops-total`, or behind the `x-` of old, as in `x-iops-total`.
    ///
    /// Fails on options that are missing, unknown or out of bounds, and on limits that contradict each other.
    pub fn from_options(mut options: Options) -> Result<Self> {
        let id = options.require_str("id")?;
        if !is_valid_id(&id) {
            return Err(options.invalid("id", id, "a letter, then letters, digits, '-', '.' and '_'"));
        }
        for (name, _) in ThrottleLimits::default().values() {
            let (plain, old) = (format!("limits.{name}"), format!("x-{name}"));
            if options.contains(&plain) && options.contains(&old) {
                return Err(options.conflict(&plain, &old));
            }
        }
        let limits = ThrottleLimits::default().updated(&mut options, "limits.")?.updated(&mut options, "x-")?;
        limits.check().map_err(|complaint| options.inconsistent("limits", complaint))?;
        options.finish()?;
        Ok(Self { id, limits })
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;
    use blockport_block::throttle::{Limited, Rate};

    use super::*;

    fn read(text: &str) -> Result<ThrottleGroupConfig> {
        ThrottleGroupConfig::from_options(parse_keyval(text, None).expect(text))
    }

    #[test]
    fn both_spellings_of_a_limit() {
        assert!(read("id=g").expect("no limit at all").limits.is_unlimited());
        let group = read("id=g,limits.bps-read=1M,limits.bps-read-max=2M,x-iops-total=100").expect("sound");
        assert_eq!(group.limits.rate(Limited::BpsRead), Rate { average: 1 << 20, burst: 2 << 20, burst_seconds: 1 });
        assert_eq!(group.limits.rate(Limited::IopsTotal).average, 100);
    }

    #[test]
    fn refusals() {
        for (text, complaint) in [
            ("limits.iops-total=1", r#"option "id" is missing"#),
            ("id=0", r#"option "id" must be a letter, then letters, digits, '-', '.' and '_', not "0""#),
            (
                "id=g,limits.iops-total=1,x-iops-total=1",
                r#"options "limits.iops-total" and "x-iops-total" exclude each other"#,
            ),
            ("id=g,limits.iops=1", r#"option "limits.iops" is unknown"#),
            ("id=g,iops-total=1", r#"option "iops-total" is unknown"#),
            ("id=g,x-iops-total-max=1", r#"option "limits": iops-total-max needs iops-total"#),
        ] {
            assert_eq!(read(text).expect_err(text).to_string(), complaint, "{text}");
        }
    }
}
