//! Units: sizes as they are written and read. It owns the wording of numbers of bytes in answers.

use blockport_block::options::parse_size;

use super::Failure;

/// A number of bytes in the unit that suits it, with three digits.
pub fn rounded(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // From 1000 on a number needs four digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        ..1.0 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    let mut text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{text} {}", UNITS[unit])
}

/// A number with a unit, without zeroes behind the point: as reports of transfers have it.
pub fn cut_size(value: f64) -> String {
    const UNITS: [(u32, &str); 6] = [(60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = UNITS.iter().find(|(bits, _)| value >= 2f64.powi(*bits as i32));
    let (text, unit) = match unit {
        Some((bits, name)) => (format!("{:.3}", value / 2f64.powi(*bits as i32)), *name),
        None => (format!("{value:.6}"), "bytes"),
    };
    match text.find(".000") {
        Some(at) => format!("{} {unit}", &text[..at]),
        None => format!("{text} {unit}"),
    }
}

/// A size that an argument states.
pub fn size(argument: &str, text: &str) -> Result<u64, Failure> {
    parse_size(text).ok_or_else(|| {
        format!("{argument}: \"{text}\" is no size: write a number of bytes, or one with a unit (k, M, G, T, P or E)")
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (335_872, "328 KiB"),
            (1536 << 10, "1.5 MiB"),
            (10 << 30, "10 GiB"),
            (1_234_567_890, "1.15 GiB"),
        ] {
            assert_eq!(rounded(bytes), text);
        }
    }

    #[test]
    fn transfers_have_three_places_or_none() {
        for (value, text) in [
            (512.0, "512 bytes"),
            (65536.0, "64 KiB"),
            (1536.0, "1.500 KiB"),
            (3.769 * 1024.0 * 1024.0, "3.769 MiB"),
            (0.5, "0.500000 bytes"),
        ] {
            assert_eq!(cut_size(value), text);
        }
    }
}
