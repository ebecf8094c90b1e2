//! What is wrong with an option, and the words that say it.
//!
//! This file owns the wording of every complaint about an option. It never decides that something is wrong.

use std::fmt;

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionsErrorKind {
    /// The text follows neither notation; says what was found.
    Syntax(String),
    /// The option is needed and not given.
    Missing,
    /// Nobody here knows the option.
    Unknown,
    /// The value is not one of those the option takes.
    Invalid {
        /// The value as given.
        value: String,
        /// What it must be, worded to follow "must be".
        expected: String,
    },
    /// The option exists in QEMU and not here.
    Unsupported,
    /// The option is known, this value of it exists in QEMU and not here.
    UnsupportedValue {
        /// The value as given.
        value: String,
    },
    /// The key is used both with a value and with options nested in it.
    Inconsistent,
    /// Options of a group that do not go together; says which.
    Contradiction(String),
    /// Two options that exclude each other are given.
    Conflict {
        /// The full dotted path of the other option.
        other: String,
    },
}

/// A complaint about one option: whose, which (full dotted path), and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionsError {
    pub(super) subject: String,
    pub(super) path: String,
    pub(super) kind: OptionsErrorKind,
}

/// The result of reading or taking options.
pub type Result<T> = std::result::Result<T, OptionsError>;

impl OptionsError {
    pub(super) fn syntax(path: impl Into<String>, found: impl Into<String>) -> Self {
        Self { subject: String::new(), path: path.into(), kind: OptionsErrorKind::Syntax(found.into()) }
    }

    /// Says whose options these are, unless that is known already.
    #[must_use]
    pub fn about(mut self, subject: impl Into<String>) -> Self {
        if self.subject.is_empty() {
            self.subject = subject.into();
        }
        self
    }

    /// The full dotted path of the option; empty when the complaint is about the argument as a whole.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What is wrong with it.
    pub fn kind(&self) -> &OptionsErrorKind {
        &self.kind
    }
}

impl fmt::Display for OptionsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.subject.is_empty() {
            write!(f, "{}: ", self.subject)?;
        }
        let path = &self.path;
        match &self.kind {
            OptionsErrorKind::Syntax(found) if path.is_empty() => f.write_str(found),
            OptionsErrorKind::Syntax(found) => write!(f, "option {path:?} {found}"),
            OptionsErrorKind::Missing => write!(f, "option {path:?} is missing"),
            OptionsErrorKind::Unknown => write!(f, "option {path:?} is unknown"),
            OptionsErrorKind::Invalid { value, expected } => {
                write!(f, "option {path:?} must be {expected}, not {value:?}")
            }
            OptionsErrorKind::Unsupported => write!(f, "option {path:?} is not supported yet"),
            OptionsErrorKind::UnsupportedValue { value } => {
                write!(f, "option {path:?}: {value:?} is not supported yet")
            }
            OptionsErrorKind::Inconsistent => {
                write!(f, "option {path:?} is used both with a value and with options nested in it")
            }
            OptionsErrorKind::Contradiction(complaint) => write!(f, "option {path:?}: {complaint}"),
            OptionsErrorKind::Conflict { other } => {
                write!(f, "options {path:?} and {other:?} exclude each other")
            }
        }
    }
}

impl std::error::Error for OptionsError {}
