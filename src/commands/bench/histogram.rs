//! A compact log-linear histogram of durations. It owns counting and percentiles; it reads no clock.

/// Buckets an octave is divided into, as a power of two: 64 of them bound the error of a percentile to 1.6 %.
const OCTAVE_BITS: u32 = 6;
/// Everything longer than 2^42 ns (73 minutes) counts as that.
const VALUE_MAX: u64 = (1 << 42) - 1;

/// Counts of durations in nanoseconds.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl Histogram {
    /// An empty histogram; the only place where it allocates.
    pub fn new() -> Self {
        Self { counts: vec![0; bucket(VALUE_MAX) + 1], count: 0, sum: 0, min: u64::MAX, max: 0 }
    }

    /// Counts one duration.
    pub fn record(&mut self, ns: u64) {
        // In range by construction: bucket() grows with its argument and the last one was allocated.
        self.counts[bucket(ns.min(VALUE_MAX))] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(ns);
        self.min = self.min.min(ns);
        self.max = self.max.max(ns);
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        for (to, from) in self.counts.iter_mut().zip(&other.counts) {
            *to += from;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// The duration in ns that a `share` (0 to 1) of all do not exceed; 0 when nothing was counted.
    pub fn percentile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return bucket_end(index).min(self.max);
            }
        }
        self.max
    }

    /// The shortest duration in ns; 0 when nothing was counted.
    pub fn min(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    /// The longest duration in ns, exact.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The mean in ns; 0 when nothing was counted.
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }
}

/// The bucket of a value: exact below 128, then 64 buckets an octave.
fn bucket(value: u64) -> usize {
    let significant = u64::BITS - (value | 1 << OCTAVE_BITS).leading_zeros();
    let shift = significant - (OCTAVE_BITS + 1);
    ((u64::from(shift) << OCTAVE_BITS) + (value >> shift)) as usize
}

/// The largest value in a bucket.
fn bucket_end(index: usize) -> u64 {
    let index = index as u64;
    let shift = (index >> OCTAVE_BITS).saturating_sub(1);
    ((index - (shift << OCTAVE_BITS) + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut previous = 0;
        for index in 1..=bucket(VALUE_MAX) {
            let (start, end) = (bucket_end(index - 1) + 1, bucket_end(index));
            assert_eq!(bucket(start), index);
            assert_eq!(bucket(end), index);
            assert!((end - start) as f64 <= start as f64 / 64.0);
            assert!(end > previous);
            previous = end;
        }
        assert_eq!(previous, VALUE_MAX);
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut h = Histogram::new();
        (1..=100_000).for_each(|ns| h.record(ns));
        for (share, exact) in [(0.5, 50_000.0), (0.99, 99_000.0), (0.999, 99_900.0)] {
            let found = h.percentile(share) as f64;
            assert!((found / exact - 1.0).abs() < 0.016, "{share}: {found}");
        }
        assert_eq!((h.min(), h.max(), h.percentile(1.0), h.mean()), (1, 100_000, 100_000, 50_000));
    }

    #[test]
    fn nothing_counted_is_zero() {
        let h = Histogram::new();
        assert_eq!((h.min(), h.max(), h.mean(), h.percentile(0.99)), (0, 0, 0, 0));
    }

    #[test]
    fn merging_equals_counting_together() {
        let (mut a, mut b, mut both) = (Histogram::new(), Histogram::new(), Histogram::new());
        for ns in 0..1000 {
            if ns % 3 == 0 { &mut a } else { &mut b }.record(ns * ns);
            both.record(ns * ns);
        }
        a.merge(&b);
        assert_eq!(a.percentile(0.9), both.percentile(0.9));
        assert_eq!((a.count, a.mean()), (both.count, both.mean()));
    }
}
