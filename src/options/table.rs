//! Tables of options: what can be said about an export or an object, with types.
//!
//! This file owns the form of such a table. The reader of the options refuses what its table lacks, and the monitor's
//! schema is made from the same table, so neither can know more than the other.

use blockport_block::options::{Options, Result};

/// What an option's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// Text.
    Text,
    /// On or off.
    Flag,
    /// A whole number from 0, or a size in bytes.
    Number,
    /// One of these.
    Choice(&'static str, &'static [&'static str]),
    /// Text, or a list of texts.
    TextOrList,
    /// Text of ranges, or a list of numbers.
    Cpus,
    /// A list of iothreads, each with a list of queues.
    QueueMapping,
    /// A socket's address.
    Address,
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct OptionRow {
    /// As it is written.
    pub name: &'static str,
    /// What its value is.
    pub kind: OptionKind,
    /// Whether it must be given.
    pub required: bool,
}

/// An option that must be given.
pub const fn required(name: &'static str, kind: OptionKind) -> OptionRow {
    OptionRow { name, kind, required: true }
}

/// An option that may be left out.
pub const fn optional(name: &'static str, kind: OptionKind) -> OptionRow {
    OptionRow { name, kind, required: false }
}

/// Refuses the first option that a table lacks.
pub fn check(options: &Options, table: &[OptionRow]) -> Result<()> {
    options.only(|key| table.iter().any(|row| row.name == key))
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    /// Every option of a table is one that `read` looks at: a value of a wrong type is refused as such, by its name.
    #[track_caller]
    pub fn every_row_is_read<T>(table: &[OptionRow], valid: &serde_json::Value, read: impl Fn(Options) -> Result<T>) {
        assert!(read(Options::from_json(valid.clone()).expect("an object")).is_ok(), "{valid}");
        for row in table {
            let mut options = valid.clone();
            options[row.name] = json!(null);
            let Err(error) = read(Options::from_json(options).expect("an object")) else {
                panic!("{} may be anything", row.name)
            };
            let error = error.to_string();
            assert!(error.contains(row.name) && !error.contains("unknown"), "{}: {error}", row.name);
        }
    }
}
