//! Exposition: families of figures in the text format of Prometheus, version 0.0.4.
//!
//! This file owns how names, labels and numbers are written. Which figures there are is `collect.rs`'s.

use std::fmt::Write;

/// What a family's figures are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// How many of something took how long.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// Upper bounds in seconds, rising, each with how many were below it and not below the one before.
    pub buckets: Vec<(f64, u64)>,
    /// How many were not below the last bound.
    pub above: u64,
    /// How long all took together, in seconds.
    pub sum: f64,
}

/// A page of figures.
#[derive(Debug, Default)]
pub struct Exposition(String);

/// A label's name and value.
pub type Label<'a> = (&'static str, &'a str);

impl Exposition {
    /// The text.
    pub fn into_text(self) -> String {
        self.0
    }

    /// A family: all figures of one name. Without any, it is left out.
    pub fn family(&mut self, kind: Kind, name: &'static str, help: &str, add: impl FnOnce(&mut Family<'_>)) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.named(kind, name, help, |text| add(&mut Family { name, text }));
    }

    /// The same of distributions.
    pub fn histograms(&mut self, name: &'static str, help: &str, add: impl FnOnce(&mut Histograms<'_>)) {
        self.named("histogram", name, help, |text| add(&mut Histograms { name, text }));
    }

    fn named(&mut self, kind: &str, name: &str, help: &str, add: impl FnOnce(&mut String)) {
        let start = self.0.len();
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        let head = self.0.len();
        add(&mut self.0);
        if self.0.len() == head {
            self.0.truncate(start);
        }
    }
}

/// Where the figures of one name are added.
pub struct Family<'a> {
    name: &'static str,
    text: &'a mut String,
}

impl Family<'_> {
    /// Adds one.
    pub fn add(&mut self, labels: &[Label<'_>], value: impl Into<Number>) {
        sample(self.text, self.name, "", labels, None, value.into());
    }
}

/// Where the distributions of one name are added.
pub struct Histograms<'a> {
    name: &'static str,
    text: &'a mut String,
}

impl Histograms<'_> {
    /// Adds one.
    pub fn add(&mut self, labels: &[Label<'_>], of: &Distribution) {
        let mut count = 0_u64;
        for (bound, more) in &of.buckets {
            count = count.saturating_add(*more);
            let bound = Number::from(*bound).to_string();
            sample(self.text, self.name, "_bucket", labels, Some(&bound), count.into());
        }
        count = count.saturating_add(of.above);
        sample(self.text, self.name, "_bucket", labels, Some("+Inf"), count.into());
        sample(self.text, self.name, "_sum", labels, None, of.sum.into());
        sample(self.text, self.name, "_count", labels, None, count.into());
    }
}

fn sample(text: &mut String, name: &str, suffix: &str, labels: &[Label<'_>], bound: Option<&str>, value: Number) {
    let _ = write!(text, "{name}{suffix}");
    let labels = labels.iter().copied().chain(bound.map(|bound| ("le", bound)));
    let mut separator = '{';
    for (label, value) in labels {
        let _ = write!(text, "{separator}{label}=\"");
        text.extend(value.chars().flat_map(|c| match c {
            '\\' => vec!['\\', '\\'],
            '"' => vec!['\\', '"'],
            '\n' => vec!['\\', 'n'],
            plain => vec![plain],
        }));
        text.push('"');
        separator = ',';
    }
    if separator == ',' {
        text.push('}');
    }
    let _ = writeln!(text, " {value}");
}

/// A figure, as it is written: counts stay exact.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// A count.
    Whole(u64),
    /// Seconds and the like.
    Real(f64),
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<bool> for Number {
    fn from(value: bool) -> Self {
        Self::Whole(value.into())
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole(value) => value.fmt(f),
            Self::Real(value) => value.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_labels_and_distributions() {
        let mut page = Exposition::default();
        page.family(Kind::Counter, "a_total", "What a is.", |family| {
            family.add(&[], u64::MAX);
            family.add(&[("x", "1"), ("y", "a\"b\\c\nd")], 2_u64);
        });
        page.family(Kind::Gauge, "nothing", "Is left out.", |_| {});
        page.histograms("t_seconds", "How long.", |family| {
            let of = Distribution { buckets: vec![(0.001, 2), (1.0, 3)], above: 1, sum: 2.5 };
            family.add(&[("x", "1")], &of);
        });
        let expected = "\
# HELP a_total What a is.
# TYPE a_total counter
a_total 18446744073709551615
a_total{x=\"1\",y=\"a\\\"b\\\\c\\nd\"} 2
# HELP t_seconds How long.
# TYPE t_seconds histogram
t_seconds_bucket{x=\"1\",le=\"0.001\"} 2
t_seconds_bucket{x=\"1\",le=\"1\"} 5
t_seconds_bucket{x=\"1\",le=\"+Inf\"} 6
t_seconds_sum{x=\"1\"} 2.5
t_seconds_count{x=\"1\"} 6
";
        assert_eq!(page.into_text(), expected);
    }
}
