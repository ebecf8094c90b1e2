//! Tables for people: columns as wide as they must be.

/// Rows below their headings, aligned; numbers to the right.
pub fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([headings[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let is_number = |cell: &str| cell.starts_with(|c: char| c.is_ascii_digit());
    let to_right: [bool; N] =
        std::array::from_fn(|column| !rows.is_empty() && rows.iter().all(|row| is_number(&row[column])));
    let line = |cells: &[String; N]| {
        let padded = cells.iter().zip(widths).zip(to_right).map(|((cell, width), right)| match right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let headings = headings.map(str::to_owned);
    std::iter::once(&headings).chain(rows).map(line).collect()
}

/// A number of bytes in the largest unit that leaves a number above 1: `1.5 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = UNITS.iter().enumerate().rev().find(|(power, _)| bytes >> (10 * (power + 1)) > 0);
    match unit {
        None => format!("{bytes} B"),
        Some((power, unit)) => {
            let size = 1_u64 << (10 * (power + 1));
            let (whole, tenths) = (bytes / size, u128::from(bytes % size) * 10 / u128::from(size));
            if tenths == 0 { format!("{whole} {unit}") } else { format!("{whole}.{tenths} {unit}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["a".to_owned(), "1".to_owned()], ["long one".to_owned(), "200".to_owned()]];
        assert_eq!(table(["NAME", "N"], &rows), "NAME        N\na           1\nlong one  200\n");
        assert_eq!(table(["NAME", "N"], &[]), "NAME  N\n");
    }

    #[test]
    fn sizes() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }
}
