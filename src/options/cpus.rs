//! A set of CPUs, as `cpu-affinity` and `--cpus` name it: ranges (`0-3,8`) or a list of numbers.
//!
//! This file owns how such a set is read. Whether the machine has these CPUs is found out when a thread is bound to them.

use blockport_block::options::{Options, Result};

/// The most CPUs that a set has room for, as the kernel's own type.
const CPUS_MAX: u64 = 1024;

/// The numbers, in order, each once; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

impl Cpus {
    /// Takes the set at this key: a text of ranges or a list of numbers.
    pub fn take(options: &mut Options, key: &str) -> Result<Option<Self>> {
        if let Some(text) = options.peek_str(key) {
            let text = text.to_owned();
            options.take_str(key)?;
            return text.parse().map(Some).map_err(|expected: String| options.invalid(key, &text, expected));
        }
        let Some(list) = options.take_u64_list(key)? else { return Ok(None) };
        match Self::of(list.iter().copied()) {
            Some(cpus) => Ok(Some(cpus)),
            None => Err(options.invalid(key, format!("{list:?}"), EXPECTED)),
        }
    }

    fn of(numbers: impl Iterator<Item = u64>) -> Option<Self> {
        let numbers = numbers.map(|cpu| usize::try_from(cpu).ok().filter(|_| cpu < CPUS_MAX));
        let mut numbers: Vec<usize> = numbers.collect::<Option<_>>()?;
        numbers.sort_unstable();
        numbers.dedup();
        (!numbers.is_empty()).then_some(Self(numbers))
    }

    /// The numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().copied()
    }
}

const EXPECTED: &str = "numbers of CPUs below 1024, as 0-3,8";

impl std::str::FromStr for Cpus {
    /// What it must be.
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse().ok()).flatten().filter(|cpu: &u64| *cpu < CPUS_MAX)
        };
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(first..=last)
        };
        let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
        ranges.and_then(|ranges| Self::of(ranges.into_iter().flatten())).ok_or_else(|| EXPECTED.to_owned())
    }
}

impl std::fmt::Display for Cpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&numbers.join(","))
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;

    use super::*;

    #[test]
    fn sets() {
        for (text, cpus) in
            [("0", vec![0]), ("8,0-3", vec![0, 1, 2, 3, 8]), ("5-5,4-6", vec![4, 5, 6]), ("1023", vec![1023])]
        {
            assert_eq!(text.parse::<Cpus>().expect(text), Cpus(cpus), "{text}");
        }
        for text in ["", "a", "3-1", "1-", "-1", "0,,1", "1024", "0-99999999999999999999", "+1", " 1"] {
            assert_eq!(text.parse::<Cpus>().expect_err(text), EXPECTED, "{text}");
        }
    }

    #[test]
    fn texts_and_lists_say_the_same() {
        for text in ["c=1-2", "c.0=2,c.1=1"] {
            let mut options = parse_keyval(text, None).expect(text);
            assert_eq!(Cpus::take(&mut options, "c").expect(text), Some(Cpus(vec![1, 2])), "{text}");
            options.finish().expect("all of it was read");
        }
        for text in ["c=x", "c.0=1024"] {
            let error = Cpus::take(&mut parse_keyval(text, None).expect(text), "c").expect_err(text).to_string();
            assert!(error.starts_with(&format!(r#"option "c" must be {EXPECTED}, not"#)), "{error}");
        }
    }
}
