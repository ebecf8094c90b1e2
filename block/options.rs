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

use std::fmt;

pub use error::{OptionsError, OptionsErrorKind, Result};
use notation::{parse_json, parse_u64};
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

    /// Options `key` and `other` are both given and exclude each other.
    pub fn conflict(&self, key: &str, other: &str) -> OptionsError {
        self.error(key, OptionsErrorKind::Conflict { other: self.path_of(other) })
    }
}

/// Taking.
impl Options {
    /// Removes and returns what stands at the dotted key. Fails where a group was expected on the way and is none.
    fn take(&mut self, key: &str) -> Result<Option<Value>> {
        match take_from(&mut self.entries, key) {
            Ok(value) => Ok(value),
            Err((end, shown)) => {
                let group = &key[..end];
                Err(self.invalid(group, shown, format!("a group of options such as {:?}", self.path_of(key))))
            }
        }
    }

    /// Takes a string. Fails on a JSON value of another type.
    pub fn take_str(&mut self, key: &str) -> Result<Option<String>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(text) | Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(key, other.shown(), "a string")),
        }
    }

    /// Takes a string that must be given.
    pub fn require_str(&mut self, key: &str) -> Result<String> {
        self.take_str(key)?.ok_or_else(|| self.missing(key))
    }

    /// Takes a boolean: on, yes, true, y, off, no, false or n; in JSON true or false.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::Text(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(self.invalid(key, text, "on or off")),
            },
            Some(other) => Err(self.invalid(key, other.shown(), "true or false (without quotes in JSON)")),
        }
    }

    /// Takes a whole number from 0 to 2^64 − 1: decimal, hexadecimal after `0x`, octal after `0`; in JSON a number.
    pub fn take_u64(&mut self, key: &str) -> Result<Option<u64>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(text)) => match parse_u64(&text) {
                Some(value) => Ok(Some(value)),
                None => Err(self.invalid(key, text, "a whole number from 0")),
            },
            Some(Value::Number(number)) => match number.as_u64() {
                Some(value) => Ok(Some(value)),
                None => Err(self.invalid(key, number, "a whole number from 0")),
            },
            Some(other) => Err(self.invalid(key, other.shown(), "a whole number from 0 (without quotes in JSON)")),
        }
    }

    /// Takes a whole number in `range`.
    pub fn take_u64_in(&mut self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let value = self.take_u64(key)?;
        match value {
            Some(value) if !range.contains(&value) => {
                Err(self.invalid(key, value, format!("from {} to {}", range.start(), range.end())))
            }
            _ => Ok(value),
        }
    }

    /// Takes a size in bytes, at most 2^63 − 1, as [`parse_size`] reads it; in JSON a number of bytes.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        const EXPECTED: &str = "a size below 8E, in bytes or with a unit (such as 512, 64K or 1.5G)";
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(text)) => match parse_size(&text) {
                Some(bytes) => Ok(Some(bytes)),
                None => Err(self.invalid(key, text, EXPECTED)),
            },
            Some(Value::Number(number)) => match number.as_u64().filter(|&bytes| i64::try_from(bytes).is_ok()) {
                Some(bytes) => Ok(Some(bytes)),
                None => Err(self.invalid(key, number, "a number of bytes below 2^63")),
            },
            Some(other) => Err(self.invalid(key, other.shown(), "a number of bytes (without quotes in JSON)")),
        }
    }

    /// Takes one of the names in `choices` and returns what it stands for.
    pub fn take_enum<T: Clone>(&mut self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(text) | Value::String(text)) => match choices.iter().find(|(name, _)| *name == text) {
                Some((_, choice)) => Ok(Some(choice.clone())),
                None => Err(self.invalid(key, text, format!("one of {}", names()))),
            },
            Some(other) => Err(self.invalid(key, other.shown(), format!("one of {} (a string in JSON)", names()))),
        }
    }

    /// Takes a child: a string refers to a node by its name, a group of options defines one.
    pub fn take_child(&mut self, key: &str) -> Result<Option<ChildRef>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(name) | Value::String(name)) => Ok(Some(ChildRef::Reference(name))),
            Some(Value::Dict(entries)) => Ok(Some(ChildRef::Inline(self.nested(key, entries)))),
            Some(other) => {
                Err(self.invalid(key, other.shown(), "a node-name, or a group of options that defines a node"))
            }
        }
    }

    /// Takes a child that must be given.
    pub fn require_child(&mut self, key: &str) -> Result<ChildRef> {
        self.take_child(key)?.ok_or_else(|| self.missing(key))
    }

    /// Takes a JSON null: true if there was one. What else stands there is left for another taker.
    pub fn take_null(&mut self, key: &str) -> bool {
        let found = matches!(self.find(key), Some(Value::Null));
        found && self.take(key).is_ok()
    }

    /// Takes a group of options.
    pub fn take_options(&mut self, key: &str) -> Result<Option<Options>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Dict(entries)) => Ok(Some(self.nested(key, entries))),
            Some(other) => Err(self.invalid(key, other.shown(), "a group of options")),
        }
    }

    /// Takes a list of strings: `key.0=a,key.1=b`.
    pub fn take_str_list(&mut self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(list) = self.take_list(key)? else {
            return Ok(None);
        };
        let mut strings = Vec::with_capacity(list.len());
        for (index, value) in list.into_iter().enumerate() {
            match value {
                Value::Text(text) | Value::String(text) => strings.push(text),
                other => {
                    return Err(self.invalid(&format!("{key}.{index}"), other.shown(), "a string"));
                }
            }
        }
        Ok(Some(strings))
    }

    /// Takes one string or a list of them: `key=a` or `key.0=a,key.1=b`.
    pub fn take_str_or_list(&mut self, key: &str) -> Result<Option<Vec<String>>> {
        if self.peek_str(key).is_some() {
            return Ok(self.take_str(key)?.map(|value| vec![value]));
        }
        self.take_str_list(key)
    }

    /// Takes a list of groups of options: `key.0.a=1,key.0.b=2,key.1.a=3`. Each is to be finished on its own.
    pub fn take_options_list(&mut self, key: &str) -> Result<Option<Vec<Options>>> {
        let Some(list) = self.take_list(key)? else {
            return Ok(None);
        };
        let mut groups = Vec::with_capacity(list.len());
        for (index, value) in list.into_iter().enumerate() {
            let key = format!("{key}.{index}");
            match value {
                Value::Dict(entries) => groups.push(self.nested(&key, entries)),
                other => return Err(self.invalid(&key, other.shown(), "a group of options")),
            }
        }
        Ok(Some(groups))
    }

    fn take_list(&mut self, key: &str) -> Result<Option<Vec<Value>>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(other) => {
                Err(self.invalid(key, other.shown(), format!("a list, its elements numbered from {key:?}.0")))
            }
        }
    }

    /// Refuses, as not supported yet, the options of `names` (dotted keys) that are given.
    pub fn take_unsupported(&mut self, names: &[&str]) -> Result<()> {
        match names.iter().find(|name| self.contains(name)) {
            Some(name) => Err(self.error(name, OptionsErrorKind::Unsupported)),
            None => Ok(()),
        }
    }

    /// Ends the taking: fails, naming the first option nobody took.
    pub fn finish(self) -> Result<()> {
        let Some((key, value)) = self.entries.first() else {
            return Ok(());
        };
        if key.contains('.') {
            // Only JSON can hold such a key, and a user who writes it means something else.
            let found = "is unknown: JSON nests objects where key=value has dotted keys";
            return Err(self.error(key, OptionsErrorKind::Syntax(found.to_owned())));
        }
        Err(self.error(&value.first_path(key.clone()), OptionsErrorKind::Unknown))
    }

    fn nested(&self, key: &str, entries: Vec<(String, Value)>) -> Options {
        Options { subject: self.subject.clone(), prefix: format!("{}{key}.", self.prefix), entries }
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

/// Removes what stands at the dotted key, and the groups that are empty then, so that taking every option of a group
/// takes the group. The error is where in `key` something other than a group stands, and that value.
fn take_from(entries: &mut Vec<(String, Value)>, key: &str) -> std::result::Result<Option<Value>, (usize, String)> {
    let (first, after) = key.split_once('.').map_or((key, None), |(first, after)| (first, Some(after)));
    let Some(index) = entries.iter().position(|(name, _)| name == first) else {
        return Ok(None);
    };
    let Some(after) = after else {
        return Ok(Some(entries.remove(index).1));
    };
    let Value::Dict(nested) = &mut entries[index].1 else {
        return Err((first.len(), entries[index].1.shown()));
    };
    let taken = take_from(nested, after).map_err(|(end, shown)| (first.len() + 1 + end, shown))?;
    if nested.is_empty() {
        entries.remove(index);
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Options {
        parse_keyval(text, Some("driver")).expect(text)
    }

    #[test]
    fn takers_consume_and_convert() {
        let mut options = parse("raw,read-only=on,cache.direct=off,offset=0x200,size=1.5K,locking=auto,n=010");
        assert_eq!(options.take_str("driver").unwrap().as_deref(), Some("raw"));
        assert_eq!(options.take_str("driver").unwrap(), None);
        assert_eq!(options.take_bool("read-only").unwrap(), Some(true));
        assert_eq!(options.take_bool("cache.direct").unwrap(), Some(false));
        assert_eq!(options.take_bool("cache.no-flush").unwrap(), None);
        assert_eq!(options.take_u64("offset").unwrap(), Some(512));
        assert_eq!(options.take_size("size").unwrap(), Some(1536));
        assert_eq!(options.take_u64("n").unwrap(), Some(8));
        assert_eq!(options.take_enum("locking", &[("auto", 1), ("on", 2)]).unwrap(), Some(1));
        options.finish().unwrap();
    }

    #[test]
    fn takers_consume_json_of_their_own_type_only() {
        let text = r#"{"s": "x", "b": true, "n": 7, "z": 4096, "e": "on", "c": {"d": false}, "empty": {}}"#;
        let mut options = parse(text);
        assert_eq!(options.take_str("s").unwrap().as_deref(), Some("x"));
        assert_eq!(options.take_bool("b").unwrap(), Some(true));
        assert_eq!(options.take_u64("n").unwrap(), Some(7));
        assert_eq!(options.take_size("z").unwrap(), Some(4096));
        assert_eq!(options.take_enum("e", &[("on", ())]).unwrap(), Some(()));
        assert_eq!(options.take_bool("c.d").unwrap(), Some(false));
        assert_eq!(options.take_bool("empty.x").unwrap(), None);
        options.finish().unwrap();

        let refuse = |json: serde_json::Value, take: fn(&mut Options) -> Option<OptionsError>| {
            let mut options = Options::from_json(json!({ "x": json })).unwrap();
            take(&mut options).expect("refused").to_string()
        };
        let bool_of = |o: &mut Options| o.take_bool("x").err();
        let u64_of = |o: &mut Options| o.take_u64("x").err();
        let size_of = |o: &mut Options| o.take_size("x").err();
        let str_of = |o: &mut Options| o.take_str("x").err();
        assert_eq!(
            refuse(json!("on"), bool_of),
            r#"option "x" must be true or false (without quotes in JSON), not "on""#
        );
        assert_eq!(refuse(json!(1.5), u64_of), r#"option "x" must be a whole number from 0, not "1.5""#);
        assert_eq!(refuse(json!(-1), u64_of), r#"option "x" must be a whole number from 0, not "-1""#);
        assert!(refuse(json!("1"), u64_of).contains("without quotes"));
        assert!(refuse(json!("1k"), size_of).contains("without quotes"));
        assert!(refuse(json!(1u64 << 63), size_of).contains("below 2^63"));
        assert_eq!(refuse(json!([]), str_of), r#"option "x" must be a string, not "a list""#);
        assert_eq!(refuse(json!({}), str_of), r#"option "x" must be a string, not "a group of options""#);
    }

    #[test]
    fn booleans() {
        for (text, value) in [
            ("on", Some(true)),
            ("yes", Some(true)),
            ("true", Some(true)),
            ("y", Some(true)),
            ("off", Some(false)),
            ("no", Some(false)),
            ("false", Some(false)),
            ("n", Some(false)),
            ("", None),
            ("On", None),
            ("1", None),
        ] {
            assert_eq!(parse(&format!("b={text}")).take_bool("b").ok().flatten(), value, "{text}");
        }
    }

    #[test]
    fn errors_name_subject_path_value_and_expectation() {
        let options =
            || parse("raw,node-name=disk0,file.driver=file,file.locking=maybe").with_subject(r#"blockdev "disk0""#);
        let mut parent = options();
        let ChildRef::Inline(mut file) = parent.require_child("file").unwrap() else { panic!("inline") };
        let locking = file.take_enum("locking", &[("auto", 0), ("on", 1), ("off", 2)]).unwrap_err();
        assert_eq!(
            locking.to_string(),
            r#"blockdev "disk0": option "file.locking" must be one of auto, on, off, not "maybe""#
        );
        assert_eq!(locking.path(), "file.locking");
        assert_eq!(
            file.require_str("filename").unwrap_err().to_string(),
            r#"blockdev "disk0": option "file.filename" is missing"#
        );
        assert_eq!(
            options().take_unsupported(&["aio", "file.driver"]).unwrap_err().to_string(),
            r#"blockdev "disk0": option "file.driver" is not supported yet"#
        );
        assert_eq!(
            options().take_bool("node-name.x").unwrap_err().to_string(),
            r#"blockdev "disk0": option "node-name" must be a group of options such as "node-name.x", not "disk0""#
        );
        assert_eq!(
            options().take_u64_in("file.driver", 1..=2).unwrap_err().to_string(),
            r#"blockdev "disk0": option "file.driver" must be a whole number from 0, not "file""#
        );
        assert_eq!(
            options().conflict("a", "b").to_string(),
            r#"blockdev "disk0": options "a" and "b" exclude each other"#
        );
        assert_eq!(
            options().unsupported_value("aio", "native").to_string(),
            r#"blockdev "disk0": option "aio": "native" is not supported yet"#
        );
        let syntax = parse_keyval("a", None).unwrap_err().about("--blockdev");
        assert_eq!(syntax.to_string(), r#"--blockdev: option "a" has no value: write it as key=value"#);
    }

    #[test]
    fn finish_names_the_first_left_over_option() {
        let mut options = parse("raw,file.driver=file,file.x.y=1,z=2");
        options.take_str("driver").unwrap();
        options.take_str("file.driver").unwrap();
        assert_eq!(options.finish().unwrap_err().to_string(), r#"option "file.x.y" is unknown"#);
        assert_eq!(parse("l.0.a=1").finish().unwrap_err().to_string(), r#"option "l.0.a" is unknown"#);
        let dotted = parse(r#"{"file.driver": "null-co"}"#).finish().unwrap_err();
        assert_eq!(
            dotted.to_string(),
            r#"option "file.driver" is unknown: JSON nests objects where key=value has dotted keys"#
        );
    }

    #[test]
    fn children_groups_and_lists() {
        let mut options = parse("raw,file=disk0,backing.driver=null-co,i.0=a,i.1=b,r.0.x=1,r.1.y=2,s=one");
        assert_eq!(options.take_child("file").unwrap(), Some(ChildRef::Reference("disk0".into())));
        assert_eq!(options.take_child("none").unwrap(), None);
        let mut backing = options.take_options("backing").unwrap().unwrap();
        assert_eq!(backing.path_of("x"), "backing.x");
        assert_eq!(backing.require_str("driver").unwrap(), "null-co");
        assert_eq!(options.take_str_or_list("s").unwrap(), Some(vec!["one".into()]));
        assert_eq!(options.take_str_or_list("i").unwrap(), Some(vec!["a".into(), "b".into()]));
        let mut rules = options.take_options_list("r").unwrap().unwrap();
        let second = rules.pop().unwrap();
        assert_eq!(second.finish().unwrap_err().to_string(), r#"option "r.1.y" is unknown"#);
        assert_eq!(options.require_child("f").unwrap_err().kind(), &OptionsErrorKind::Missing);

        let mut json = Options::from_json(json!({"backing": null, "file": 1})).unwrap();
        assert!(!json.take_null("file"));
        assert!(json.take_null("backing"));
        assert!(json.take_child("file").is_err());
        json.finish().unwrap();
    }

    #[test]
    fn trees_can_be_built_in_code() {
        let mut file = Options::new();
        file.set_str("driver", "file").set_bool("cache.direct", true).set_u64("n", 1);
        let mut options = Options::new();
        options.set_str("driver", "raw").set_str("file", "x").set_options("file", file).set_bool("file.n", false);
        let tree = json!({"driver": "raw", "file": {"driver": "file", "cache": {"direct": true}, "n": false}});
        assert_eq!(options.to_json(), tree);
        assert_eq!(options.peek_str("file.driver"), Some("file"));
        assert_eq!(options.peek_str("file"), None);
        assert_eq!(options.keys().collect::<Vec<_>>(), ["driver", "file"]);
        assert_eq!(options, Options::from_json(tree).unwrap());
    }

    #[test]
    fn names() {
        for name in ["a", "disk0", "a-b.c_d"] {
            assert!(is_valid_id(name), "{name}");
        }
        for name in ["", "0a", "_a", "#block1", "a b", "ä"] {
            assert!(!is_valid_id(name), "{name}");
        }
    }
}
