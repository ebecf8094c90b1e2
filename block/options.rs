//! Options: the tree of keys and values that a block driver, an object or an export is configured from.
//!
//! This file owns the tree and the typed takers that consume it; `options/notation.rs` reads the two notations in which
//! it is written (`key=value,…` with dotted keys, and JSON), `options/error.rs` words every complaint. Nothing here
//! knows which options exist: whoever is configured takes what it understands and calls [`Options::finish`], which
//! refuses the rest. Nothing here opens, looks up or checks anything outside the tree.
//!
//! The key=value notation is the one users of QEMU write:
//!
//! - `key=value` pairs separated by commas; `,,` stands for a comma inside a value; a comma at the end is harmless.
//! - A dotted key nests: `cache.direct=on` is `direct` inside `cache`. Numbers count list elements from 0:
//!   `iothreads.0=a,iothreads.1=b`.
//! - The first pair may leave out its key where the option implies one (`null-co,size=1G`).
//! - A key given twice holds its last value.
//! - A whole argument that starts with `{` is JSON instead.
//!
//! A value written as key=value gets its type from whoever takes it. A JSON value has a type already and must match.
//!
//! ```
//! use blockport_block::options::{ChildRef, Options, parse_keyval};
//!
//! # fn main() -> Result<(), blockport_block::options::OptionsError> {
//! let mut options = parse_keyval("raw,file.driver=file,file.filename=a,,b.img,size=1M", Some("driver"))?;
//! assert_eq!(options.require_str("driver")?, "raw");
//! assert_eq!(options.take_size("size")?, Some(1 << 20));
//! let ChildRef::Inline(mut file) = options.require_child("file")? else { panic!("not a reference") };
//! options.finish()?;
//! assert_eq!(file.require_str("driver")?, "file");
//! let left = file.finish().unwrap_err();
//! assert_eq!(left.to_string(), r#"option "file.filename" is unknown"#);
//! # Ok(())
//! # }
//! ```

mod error;
mod notation;
mod take;

use std::fmt;

pub use error::{OptionsError, OptionsErrorKind, Result};
use notation::parse_json;
pub use notation::{parse_keyval, parse_size};

/// One value of the tree.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    /// Written as key=value: a string, boolean, number or name, as whoever takes it decides.
    Text(String),
    /// A JSON string: nothing but a string.
    String(String),
    Bool(bool),
    Number(serde_json::Number),
    Null,
    List(Vec<Value>),
    Dict(Vec<(String, Value)>),
}

/// What a driver names as its child.
#[derive(Clone, Debug, PartialEq)]
pub enum ChildRef {
    /// The node-name of a node defined elsewhere.
    Reference(String),
    /// The definition of a node that exists for this parent.
    Inline(Options),
}

/// A tree of options, consumed by taking from it.
///
/// Every taker accepts a dotted key (`"cache.direct"`), removes the value it returns, and answers `None` when the
/// option is not given. A taker that fails leaves no promise about the rest of the tree.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whose options these are, as errors say it: `blockdev "disk0"`. Empty: errors begin with the option.
    subject: String,
    /// Where this tree stands in the one it was taken from: `"file."`, or empty at the top.
    prefix: String,
    /// In the order given, so that complaints name the first wrong option.
    entries: Vec<(String, Value)>,
}

/// Two trees are equal when [`Options::to_json`] gives the same for both: order, notation and origin do not count.
impl PartialEq for Options {
    fn eq(&self, other: &Self) -> bool {
        self.to_json() == other.to_json()
    }
}

/// Whether `name` may name a node, an object or an export: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_valid_id(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

impl From<serde_json::Value> for Value {
    fn from(value: serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Self::Null,
            serde_json::Value::Bool(value) => Self::Bool(value),
            serde_json::Value::Number(value) => Self::Number(value),
            serde_json::Value::String(value) => Self::String(value),
            serde_json::Value::Array(list) => Self::List(list.into_iter().map(Self::from).collect()),
            serde_json::Value::Object(map) => {
                Self::Dict(map.into_iter().map(|(key, value)| (key, Self::from(value))).collect())
            }
        }
    }
}

impl Value {
    /// As complaints show it.
    fn shown(&self) -> String {
        match self {
            Self::Text(text) | Self::String(text) => text.clone(),
            Self::Bool(value) => value.to_string(),
            Self::Number(number) => number.to_string(),
            Self::Null => "null".to_owned(),
            Self::List(_) => "a list".to_owned(),
            Self::Dict(_) => "a group of options".to_owned(),
        }
    }

    /// The path, below `path`, of the first option in here.
    fn first_path(&self, path: String) -> String {
        match self {
            Self::Dict(entries) => match entries.first() {
                Some((key, value)) => value.first_path(format!("{path}.{key}")),
                None => path,
            },
            Self::List(list) => match list.first() {
                Some(value) => value.first_path(format!("{path}.0")),
                None => path,
            },
            _ => path,
        }
    }

    fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Text(text) | Self::String(text) => text.as_str().into(),
            Self::Bool(value) => (*value).into(),
            Self::Number(number) => number.clone().into(),
            Self::Null => serde_json::Value::Null,
            Self::List(list) => list.iter().map(Self::to_json).collect(),
            Self::Dict(entries) => entries.iter().map(|(key, value)| (key.clone(), value.to_json())).collect(),
        }
    }
}

/// Making a tree.
impl Options {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tree from a JSON object that is parsed already. Fails if it is not an object.
    pub fn from_json(json: serde_json::Value) -> Result<Self> {
        match Value::from(json) {
            Value::Dict(entries) => Ok(Self { entries, ..Self::default() }),
            other => Err(OptionsError::syntax("", format!("expected a JSON object, not {:?}", other.shown()))),
        }
    }

    /// A tree from the text of a JSON object. Strings may stand in single quotes. Fails on anything else, a key given
    /// twice included.
    pub fn parse_json(text: &str) -> Result<Self> {
        parse_json(text)
    }

    /// Says whose options these are; errors begin with it. For example `blockdev "disk0"`.
    #[must_use]
    pub fn with_subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = subject.into();
        self
    }

    /// The same options as if they stood alone: complaints name them without what they were nested in.
    #[must_use]
    pub fn at_top(mut self) -> Self {
        self.prefix.clear();
        self
    }

    /// Sets a string at a dotted key, in place of whatever was there.
    pub fn set_str(&mut self, key: &str, value: impl Into<String>) -> &mut Self {
        self.set(key, Value::String(value.into()))
    }

    /// Sets a boolean at a dotted key, in place of whatever was there.
    pub fn set_bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.set(key, Value::Bool(value))
    }

    /// Sets a number at a dotted key, in place of whatever was there.
    pub fn set_u64(&mut self, key: &str, value: u64) -> &mut Self {
        self.set(key, Value::Number(value.into()))
    }

    /// Sets a JSON null at a dotted key, in place of whatever was there.
    pub fn set_null(&mut self, key: &str) -> &mut Self {
        self.set(key, Value::Null)
    }

    /// Sets a nested tree (an inline child, say) at a dotted key, in place of whatever was there.
    pub fn set_options(&mut self, key: &str, value: Options) -> &mut Self {
        self.set(key, Value::Dict(value.entries))
    }

    fn set(&mut self, key: &str, value: Value) -> &mut Self {
        let mut entries = &mut self.entries;
        let mut rest = key;
        while let Some((first, after)) = rest.split_once('.') {
            let found = entry(entries, first, || Value::Null);
            if !matches!(found, Value::Dict(_)) {
                *found = Value::Dict(Vec::new());
            }
            let Value::Dict(nested) = found else {
                return self;
            };
            entries = nested;
            rest = after;
        }
        *entry(entries, rest, || Value::Null) = value;
        self
    }
}

/// Looking without taking.
impl Options {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a value or a group stands at the dotted key.
    pub fn contains(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// The string at the dotted key. `None` also when something else than a string stands there.
    pub fn peek_str(&self, key: &str) -> Option<&str> {
        match self.find(key)? {
            Value::Text(text) | Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether a JSON null stands at the dotted key.
    pub fn is_null(&self, key: &str) -> bool {
        matches!(self.find(key), Some(Value::Null))
    }

    /// The names at this level, in the order given.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(key, _)| key.as_str())
    }

    /// Whose options these are, as errors say it; empty if nobody said.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The full dotted path of `key` in the tree that this one was taken from.
    pub fn path_of(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The tree as a JSON object. Values written as key=value, whose type nobody has decided, become strings.
    pub fn to_json(&self) -> serde_json::Value {
        self.entries.iter().map(|(key, value)| (key.clone(), value.to_json())).collect()
    }

    fn find(&self, key: &str) -> Option<&Value> {
        let mut entries = &self.entries;
        let mut rest = key;
        loop {
            let (first, after) = rest.split_once('.').map_or((rest, None), |(first, after)| (first, Some(after)));
            let (_, value) = entries.iter().find(|(name, _)| name == first)?;
            match (after, value) {
                (None, value) => return Some(value),
                (Some(after), Value::Dict(nested)) => {
                    entries = nested;
                    rest = after;
                }
                (Some(_), _) => return None,
            }
        }
    }
}

/// Complaints of whoever takes the options, in the same words as those of the takers.
impl Options {
    fn error(&self, key: &str, kind: OptionsErrorKind) -> OptionsError {
        OptionsError { subject: self.subject.clone(), path: self.path_of(key), kind }
    }

    /// Option `key` has a `value` that is not `expected` (worded to follow "must be").
    pub fn invalid(&self, key: &str, value: impl fmt::Display, expected: impl Into<String>) -> OptionsError {
        self.error(key, OptionsErrorKind::Invalid { value: value.to_string(), expected: expected.into() })
    }

    /// Option `key` is needed and not given.
    pub fn missing(&self, key: &str) -> OptionsError {
        self.error(key, OptionsErrorKind::Missing)
    }

    /// Option `key` is known, its `value` is not supported yet.
    pub fn unsupported_value(&self, key: &str, value: impl Into<String>) -> OptionsError {
        self.error(key, OptionsErrorKind::UnsupportedValue { value: value.into() })
    }

    /// The options of group `key` do not go together: `complaint` says which and why.
    pub fn inconsistent(&self, key: &str, complaint: impl Into<String>) -> OptionsError {
        self.error(key, OptionsErrorKind::Contradiction(complaint.into()))
    }

    /// Options `key` and `other` are both given and exclude each other.
    pub fn conflict(&self, key: &str, other: &str) -> OptionsError {
        self.error(key, OptionsErrorKind::Conflict { other: self.path_of(other) })
    }
}

/// The value at `key`, made first if there is none.
fn entry<'a>(entries: &'a mut Vec<(String, Value)>, key: &str, make: impl FnOnce() -> Value) -> &'a mut Value {
    let index = entries.iter().position(|(name, _)| name == key).unwrap_or_else(|| {
        entries.push((key.to_owned(), make()));
        entries.len() - 1
    });
    &mut entries[index].1
}

#[cfg(test)]
mod tests;
