//! Options: the tree of keys and values that a block driver, an object or an export is configured from.
//!
//! This file owns the two notations in which a tree is written (`key=value,…` with dotted keys, and JSON), the typed
//! takers that consume it, and the wording of every complaint about an option. It never knows which options exist:
//! whoever is configured takes what it understands and calls [`Options::finish`], which refuses the rest. It never
//! opens, looks up or checks anything outside the tree.
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

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

/// The deepest nesting of a dotted key. It bounds recursion; real trees are a handful of levels deep.
const DEPTH_MAX: usize = 64;

/// The longest component of a dotted key, in bytes.
const COMPONENT_LENGTH_MAX: usize = 127;

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
    /// Two options that exclude each other are given.
    Conflict {
        /// The full dotted path of the other option.
        other: String,
    },
}

/// A complaint about one option: whose, which (full dotted path), and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionsError {
    subject: String,
    path: String,
    kind: OptionsErrorKind,
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, OptionsError>;

impl OptionsError {
    fn syntax(path: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            subject: String::new(),
            path: path.into(),
            kind: OptionsErrorKind::Syntax(found.into()),
        }
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
                write!(
                    f,
                    "option {path:?} is used both with a value and with options nested in it"
                )
            }
            OptionsErrorKind::Conflict { other } => {
                write!(f, "options {path:?} and {other:?} exclude each other")
            }
        }
    }
}

impl std::error::Error for OptionsError {}

/// Whether `name` may name a node, an object or an export: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_valid_id(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// Reads one argument: key=value pairs, or JSON if it starts with `{`.
///
/// `implied_key` is the key of a first part without `=`, if the option has one.
///
/// Fails on text that follows neither notation, on a key used both with a value and with options nested in it, and on
/// list numbers with gaps.
pub fn parse_keyval(text: &str, implied_key: Option<&str>) -> Result<Options> {
    if text.starts_with('{') {
        return Options::parse_json(text);
    }
    let mut entries = Vec::new();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let key_end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, value) = match implied_key.take() {
            // Without '=', all up to the comma is the value. An empty first part is no value: "=x" and ",x" fall
            // through to the complaint about an empty key.
            Some(implied) if key_end > 0 && !rest[key_end..].starts_with('=') => (implied, rest),
            _ => {
                let key = &rest[..key_end];
                check_key(key)?;
                let value = rest[key_end..].strip_prefix('=').ok_or_else(|| {
                    OptionsError::syntax(key, "has no value: write it as key=value")
                })?;
                (key, value)
            }
        };
        let (value, after) = split_value(value);
        insert_text(&mut entries, key, value)?;
        rest = after;
    }
    let entries = entries
        .into_iter()
        .map(|(key, value)| Ok((key.clone(), numbers_to_list(key, value)?)))
        .collect::<Result<_>>()?;
    Ok(Options {
        entries,
        ..Options::default()
    })
}

/// Splits off a value at the first single comma; `,,` becomes a comma in it.
fn split_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
    value.push_str(rest);
    (value, "")
}

/// Whether a key component is a list number.
fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|b| b.is_ascii_digit())
}

/// Refuses keys whose components are empty, too long or too many, or hold characters no option name has.
fn check_key(key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(OptionsError::syntax(
            "",
            "an option has no name: write it as key=value",
        ));
    }
    for (index, component) in key.split('.').enumerate() {
        let complaint = if component.is_empty() {
            "has an empty part in its name"
        } else if component.len() > COMPONENT_LENGTH_MAX {
            "has too long a name"
        } else if index >= DEPTH_MAX {
            "is nested too deeply"
        } else if index > 0 && is_number(component) {
            continue;
        } else if !component.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            || !component
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        {
            "has no valid name: a letter, then letters, digits, '-' and '_'"
        } else {
            continue;
        };
        return Err(OptionsError::syntax(key, complaint));
    }
    Ok(())
}

/// Puts `value` at the dotted `key`. Lists are still dictionaries with numbers for keys here.
fn insert_text(entries: &mut Vec<(String, Value)>, key: &str, value: String) -> Result<()> {
    let inconsistent = |end: usize| OptionsError {
        subject: String::new(),
        path: key[..end].to_owned(),
        kind: OptionsErrorKind::Inconsistent,
    };
    let mut entries = entries;
    let mut start = 0;
    while let Some(dot) = key[start..].find('.') {
        let end = start + dot;
        let found = entry(entries, &key[start..end], || Value::Dict(Vec::new()));
        let Value::Dict(nested) = found else {
            return Err(inconsistent(end));
        };
        entries = nested;
        start = end + 1;
    }
    match entry(entries, &key[start..], || Value::Text(String::new())) {
        Value::Text(text) => *text = value,
        _ => return Err(inconsistent(key.len())),
    }
    Ok(())
}

/// The value at `key`, made first if there is none.
fn entry<'a>(
    entries: &'a mut Vec<(String, Value)>,
    key: &str,
    make: impl FnOnce() -> Value,
) -> &'a mut Value {
    let index = entries
        .iter()
        .position(|(name, _)| name == key)
        .unwrap_or_else(|| {
            entries.push((key.to_owned(), make()));
            entries.len() - 1
        });
    &mut entries[index].1
}

/// Turns every dictionary whose keys are numbers into a list. `path` is where `value` stands.
fn numbers_to_list(path: String, value: Value) -> Result<Value> {
    let Value::Dict(entries) = value else {
        return Ok(value);
    };
    let numbers = entries.iter().filter(|(key, _)| is_number(key)).count();
    let mut values = Vec::with_capacity(entries.len());
    let mut entries = entries;
    if numbers == 0 {
        for (key, value) in entries {
            let value = numbers_to_list(format!("{path}.{key}"), value)?;
            values.push((key, value));
        }
        return Ok(Value::Dict(values));
    }
    if numbers < entries.len() {
        return Err(OptionsError::syntax(
            path,
            "is used both as a list and with named options in it",
        ));
    }
    let mut list = Vec::with_capacity(entries.len());
    for index in 0..entries.len() {
        let number = index.to_string();
        let element_path = format!("{path}.{number}");
        let Some(found) = entries.iter().position(|(key, _)| *key == number) else {
            return Err(OptionsError {
                subject: String::new(),
                path: element_path,
                kind: OptionsErrorKind::Missing,
            });
        };
        // The order of the others no longer matters: they are looked up by number.
        list.push(numbers_to_list(element_path, entries[found].1.clone())?);
        entries[found].1 = Value::Null;
    }
    Ok(Value::List(list))
}

/// Turns single-quoted strings, which QEMU's JSON allows and shell scripts like, into double-quoted ones.
fn with_double_quotes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(open), _) if c == open => {
                quote = None;
                out.push('"');
            }
            (Some('\''), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            _ => out.push(c),
        }
    }
    out
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

/// Builds the tree straight from JSON, because serde_json's own keeps the last of two equal keys without a word.
struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> std::result::Result<Value, E> {
        serde_json::Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element()? {
            list.push(value);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut entries: Vec<(String, Value)> = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if entries.iter().any(|(known, _)| *known == key) {
                return Err(A::Error::custom(format_args!("key {key:?} is given twice")));
            }
            entries.push((key, map.next_value()?));
        }
        Ok(Value::Dict(entries))
    }
}

impl From<serde_json::Value> for Value {
    fn from(value: serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Self::Null,
            serde_json::Value::Bool(value) => Self::Bool(value),
            serde_json::Value::Number(value) => Self::Number(value),
            serde_json::Value::String(value) => Self::String(value),
            serde_json::Value::Array(list) => {
                Self::List(list.into_iter().map(Self::from).collect())
            }
            serde_json::Value::Object(map) => Self::Dict(
                map.into_iter()
                    .map(|(key, value)| (key, Self::from(value)))
                    .collect(),
            ),
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
            Self::Dict(entries) => entries
                .iter()
                .map(|(key, value)| (key.clone(), value.to_json()))
                .collect(),
        }
    }
}

/// Reads a whole number as C programs do: decimal, `0x` hexadecimal, or octal after a leading zero.
fn parse_u64(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    // from_str_radix takes a sign, this notation has none.
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

/// Reads a size in bytes: a decimal number, with a fraction if a unit larger than the byte follows, or a `0x`
/// hexadecimal number without a unit. Units are powers of 1024: B K M G T P E in either case. A fraction is rounded to
/// the nearest byte.
///
/// `None` for anything else and for more than 2^63 − 1 bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let bytes = if text.starts_with("0x") || text.starts_with("0X") {
        u128::from(parse_u64(text)?)
    } else {
        let digits_end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits_end);
        let shift = match unit {
            "" | "b" | "B" => 0,
            "k" | "K" => 10,
            "m" | "M" => 20,
            "g" | "G" => 30,
            "t" | "T" => 40,
            "p" | "P" => 50,
            "e" | "E" => 60,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if !is_number(whole) || (number.contains('.') && (shift == 0 || !is_number(fraction))) {
            return None;
        }
        let whole = u128::from(whole.parse::<u64>().ok()?) << shift;
        // 18 digits are finer than a byte in any unit.
        let fraction = &fraction[..fraction.len().min(18)];
        let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        let fraction = if fraction.is_empty() {
            0
        } else {
            u128::from(fraction.parse::<u64>().ok()?)
        };
        whole + ((fraction << shift) + scale / 2) / scale
    };
    u64::try_from(bytes)
        .ok()
        .filter(|&bytes| i64::try_from(bytes).is_ok())
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
            Value::Dict(entries) => Ok(Self {
                entries,
                ..Self::default()
            }),
            other => Err(OptionsError::syntax(
                "",
                format!("expected a JSON object, not {:?}", other.shown()),
            )),
        }
    }

    /// A tree from the text of a JSON object. Strings may stand in single quotes. Fails on anything else, a key given
    /// twice included.
    pub fn parse_json(text: &str) -> Result<Self> {
        match serde_json::from_str(&with_double_quotes(text)) {
            Ok(Value::Dict(entries)) => Ok(Self {
                entries,
                ..Self::default()
            }),
            Ok(other) => Err(OptionsError::syntax(
                "",
                format!("expected a JSON object, not {:?}", other.shown()),
            )),
            Err(error) => Err(OptionsError::syntax("", format!("JSON: {error}"))),
        }
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
        self.entries
            .iter()
            .map(|(key, value)| (key.clone(), value.to_json()))
            .collect()
    }

    fn find(&self, key: &str) -> Option<&Value> {
        let mut entries = &self.entries;
        let mut rest = key;
        loop {
            let (first, after) = rest
                .split_once('.')
                .map_or((rest, None), |(first, after)| (first, Some(after)));
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
        OptionsError {
            subject: self.subject.clone(),
            path: self.path_of(key),
            kind,
        }
    }

    /// Option `key` has a `value` that is not `expected` (worded to follow "must be").
    pub fn invalid(
        &self,
        key: &str,
        value: impl fmt::Display,
        expected: impl Into<String>,
    ) -> OptionsError {
        self.error(
            key,
            OptionsErrorKind::Invalid {
                value: value.to_string(),
                expected: expected.into(),
            },
        )
    }

    /// Option `key` is needed and not given.
    pub fn missing(&self, key: &str) -> OptionsError {
        self.error(key, OptionsErrorKind::Missing)
    }

    /// Option `key` is known, its `value` is not supported yet.
    pub fn unsupported_value(&self, key: &str, value: impl Into<String>) -> OptionsError {
        self.error(
            key,
            OptionsErrorKind::UnsupportedValue {
                value: value.into(),
            },
        )
    }

    /// Options `key` and `other` are both given and exclude each other.
    pub fn conflict(&self, key: &str, other: &str) -> OptionsError {
        self.error(
            key,
            OptionsErrorKind::Conflict {
                other: self.path_of(other),
            },
        )
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
                Err(self.invalid(
                    group,
                    shown,
                    format!("a group of options such as {:?}", self.path_of(key)),
                ))
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
            Some(other) => {
                Err(self.invalid(key, other.shown(), "true or false (without quotes in JSON)"))
            }
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
            Some(other) => Err(self.invalid(
                key,
                other.shown(),
                "a whole number from 0 (without quotes in JSON)",
            )),
        }
    }

    /// Takes a whole number in `range`.
    pub fn take_u64_in(
        &mut self,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>> {
        let value = self.take_u64(key)?;
        match value {
            Some(value) if !range.contains(&value) => Err(self.invalid(
                key,
                value,
                format!("from {} to {}", range.start(), range.end()),
            )),
            _ => Ok(value),
        }
    }

    /// Takes a size in bytes, at most 2^63 − 1, as [`parse_size`] reads it; in JSON a number of bytes.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        const EXPECTED: &str =
            "a size below 8E, in bytes or with a unit (such as 512, 64K or 1.5G)";
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(text)) => match parse_size(&text) {
                Some(bytes) => Ok(Some(bytes)),
                None => Err(self.invalid(key, text, EXPECTED)),
            },
            Some(Value::Number(number)) => match number
                .as_u64()
                .filter(|&bytes| i64::try_from(bytes).is_ok())
            {
                Some(bytes) => Ok(Some(bytes)),
                None => Err(self.invalid(key, number, "a number of bytes below 2^63")),
            },
            Some(other) => Err(self.invalid(
                key,
                other.shown(),
                "a number of bytes (without quotes in JSON)",
            )),
        }
    }

    /// Takes one of the names in `choices` and returns what it stands for.
    pub fn take_enum<T: Clone>(&mut self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let names = || {
            choices
                .iter()
                .map(|(name, _)| *name)
                .collect::<Vec<_>>()
                .join(", ")
        };
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(text) | Value::String(text)) => {
                match choices.iter().find(|(name, _)| *name == text) {
                    Some((_, choice)) => Ok(Some(choice.clone())),
                    None => Err(self.invalid(key, text, format!("one of {}", names()))),
                }
            }
            Some(other) => Err(self.invalid(
                key,
                other.shown(),
                format!("one of {} (a string in JSON)", names()),
            )),
        }
    }

    /// Takes a child: a string refers to a node by its name, a group of options defines one.
    pub fn take_child(&mut self, key: &str) -> Result<Option<ChildRef>> {
        match self.take(key)? {
            None => Ok(None),
            Some(Value::Text(name) | Value::String(name)) => Ok(Some(ChildRef::Reference(name))),
            Some(Value::Dict(entries)) => Ok(Some(ChildRef::Inline(self.nested(key, entries)))),
            Some(other) => Err(self.invalid(
                key,
                other.shown(),
                "a node-name, or a group of options that defines a node",
            )),
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
            Some(other) => Err(self.invalid(
                key,
                other.shown(),
                format!("a list, its elements numbered from {key:?}.0"),
            )),
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
        Options {
            subject: self.subject.clone(),
            prefix: format!("{}{key}.", self.prefix),
            entries,
        }
    }
}

/// Removes what stands at the dotted key, and the groups that are empty then, so that taking every option of a group
/// takes the group. The error is where in `key` something other than a group stands, and that value.
fn take_from(
    entries: &mut Vec<(String, Value)>,
    key: &str,
) -> std::result::Result<Option<Value>, (usize, String)> {
    let (first, after) = key
        .split_once('.')
        .map_or((key, None), |(first, after)| (first, Some(after)));
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

    fn refusal(text: &str) -> String {
        parse_keyval(text, Some("driver"))
            .expect_err(text)
            .to_string()
    }

    #[test]
    fn keyval_makes_a_tree() {
        for (text, tree) in [
            ("", json!({})),
            ("null-co", json!({"driver": "null-co"})),
            (
                "null-co,size=1G",
                json!({"driver": "null-co", "size": "1G"}),
            ),
            (
                "driver=raw,file=disk0",
                json!({"driver": "raw", "file": "disk0"}),
            ),
            (
                "raw,file.driver=file,file.filename=/a",
                json!({"driver": "raw", "file": {"driver": "file", "filename": "/a"}}),
            ),
            (
                "a.b.c=1,a.b.d=2,a.e=3",
                json!({"a": {"b": {"c": "1", "d": "2"}, "e": "3"}}),
            ),
            (
                "raw,filename=a,,b,,,,c=d",
                json!({"driver": "raw", "filename": "a,b,,c=d"}),
            ),
            ("a=,b==", json!({"a": "", "b": "="})),
            ("a=1,a=2", json!({"a": "2"})),
            ("a=1,", json!({"a": "1"})),
            ("x,,y,a=1", json!({"driver": "x,y", "a": "1"})),
            ("l.1=b,l.0=a", json!({"l": ["a", "b"]})),
            (
                "l.0.x=1,l.0.y=2,l.1.x=3",
                json!({"l": [{"x": "1", "y": "2"}, {"x": "3"}]}),
            ),
            ("l.0.0=a,l.0.1=b", json!({"l": [["a", "b"]]})),
        ] {
            assert_eq!(parse(text).to_json(), tree, "{text}");
        }
    }

    #[test]
    fn keyval_refuses_what_it_cannot_read() {
        for (text, complaint) in [
            (
                "raw,size",
                r#"option "size" has no value: write it as key=value"#,
            ),
            ("raw,=1", "an option has no name: write it as key=value"),
            (",raw", "an option has no name: write it as key=value"),
            (
                "raw,a..b=1",
                r#"option "a..b" has an empty part in its name"#,
            ),
            ("raw,.a=1", r#"option ".a" has an empty part in its name"#),
            (
                "raw,0.a=1",
                r#"option "0.a" has no valid name: a letter, then letters, digits, '-' and '_'"#,
            ),
            (
                "raw,a/b=1",
                r#"option "a/b" has no valid name: a letter, then letters, digits, '-' and '_'"#,
            ),
            (
                "raw,a=1,a.b=2",
                r#"option "a" is used both with a value and with options nested in it"#,
            ),
            (
                "raw,x.a.b=1,x.a=2",
                r#"option "x.a" is used both with a value and with options nested in it"#,
            ),
            ("raw,l.0=a,l.2=b", r#"option "l.1" is missing"#),
            ("raw,x.l.00=a", r#"option "x.l.0" is missing"#),
            (
                "raw,l.0=a,l.b=b",
                r#"option "l" is used both as a list and with named options in it"#,
            ),
        ] {
            assert_eq!(refusal(text), complaint, "{text}");
        }
        assert!(refusal(&format!("raw,{}=1", "a".repeat(128))).ends_with("has too long a name"));
        // As deep as memory would allow: it must be an answer, not a stack overflow.
        assert!(
            refusal(&format!("raw,{}a=1", "a.".repeat(100_000))).ends_with("is nested too deeply")
        );
    }

    #[test]
    fn without_an_implied_key_the_first_part_needs_one() {
        let refused = parse_keyval("raw,size=1", None).expect_err("no key");
        assert_eq!(
            refused.to_string(),
            r#"option "raw" has no value: write it as key=value"#
        );
    }

    #[test]
    fn json_makes_the_same_tree() {
        let text = r#"{"driver": "raw", "file": {"driver": "file", "filename": "/a"}, "l": [1, true, null]}"#;
        let tree = json!({"driver": "raw", "file": {"driver": "file", "filename": "/a"}, "l": [1, true, null]});
        assert_eq!(parse(text).to_json(), tree);
        assert_eq!(
            Options::from_json(tree.clone())
                .expect("an object")
                .to_json(),
            tree
        );
        assert_eq!(
            parse(r#"{'a': 'it\'s "x"', "b": "it's"}"#).to_json(),
            json!({"a": "it's \"x\"", "b": "it's"})
        );
    }

    #[test]
    fn json_refuses_what_it_cannot_read() {
        assert!(refusal(r#"{"a": 1, "a": 2}"#).contains(r#"key "a" is given twice"#));
        assert!(refusal(r#"{"a": 1,}"#).starts_with("JSON: "));
        assert!(refusal(r#"{"a": 1} x"#).starts_with("JSON: "));
        assert!(refusal("{").starts_with("JSON: "));
        assert!(refusal("{'a\\").starts_with("JSON: "));
        assert!(refusal(&format!("{{\"a\":{}", "[".repeat(100_000))).contains("recursion limit"));
        assert!(Options::from_json(json!([1])).is_err());
    }

    #[test]
    fn takers_consume_and_convert() {
        let mut options =
            parse("raw,read-only=on,cache.direct=off,offset=0x200,size=1.5K,locking=auto,n=010");
        assert_eq!(options.take_str("driver").unwrap().as_deref(), Some("raw"));
        assert_eq!(options.take_str("driver").unwrap(), None);
        assert_eq!(options.take_bool("read-only").unwrap(), Some(true));
        assert_eq!(options.take_bool("cache.direct").unwrap(), Some(false));
        assert_eq!(options.take_bool("cache.no-flush").unwrap(), None);
        assert_eq!(options.take_u64("offset").unwrap(), Some(512));
        assert_eq!(options.take_size("size").unwrap(), Some(1536));
        assert_eq!(options.take_u64("n").unwrap(), Some(8));
        assert_eq!(
            options
                .take_enum("locking", &[("auto", 1), ("on", 2)])
                .unwrap(),
            Some(1)
        );
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
        assert_eq!(
            refuse(json!(1.5), u64_of),
            r#"option "x" must be a whole number from 0, not "1.5""#
        );
        assert_eq!(
            refuse(json!(-1), u64_of),
            r#"option "x" must be a whole number from 0, not "-1""#
        );
        assert!(refuse(json!("1"), u64_of).contains("without quotes"));
        assert!(refuse(json!("1k"), size_of).contains("without quotes"));
        assert!(refuse(json!(1u64 << 63), size_of).contains("below 2^63"));
        assert_eq!(
            refuse(json!([]), str_of),
            r#"option "x" must be a string, not "a list""#
        );
        assert_eq!(
            refuse(json!({}), str_of),
            r#"option "x" must be a string, not "a group of options""#
        );
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
            assert_eq!(
                parse(&format!("b={text}")).take_bool("b").ok().flatten(),
                value,
                "{text}"
            );
        }
    }

    #[test]
    fn whole_numbers() {
        for (text, value) in [
            ("0", Some(0)),
            ("17", Some(17)),
            ("0x1F", Some(31)),
            ("0X1f", Some(31)),
            ("017", Some(15)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("", None),
            ("0x", None),
            ("+1", None),
            ("0x+1", None),
            ("-1", None),
            ("1k", None),
            ("08", None),
            (" 1", None),
            ("1.0", None),
        ] {
            assert_eq!(parse_u64(text), value, "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, value) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("512B", Some(512)),
            ("4k", Some(4096)),
            ("4K", Some(4096)),
            ("1.5G", Some(3 << 29)),
            ("2m", Some(2 << 20)),
            ("3T", Some(3 << 40)),
            ("1p", Some(1 << 50)),
            ("7E", Some(7 << 60)),
            ("7.999999999999999999E", Some((1 << 63) - 1)),
            ("8E", None),
            ("9223372036854775807", Some((1 << 63) - 1)),
            ("9223372036854775808", None),
            ("99999999999999999999", None),
            ("0x1000", Some(4096)),
            ("0.1K", Some(102)),
            ("1.1K", Some(1126)),
            ("1.0000000000000000000000000001K", Some(1024)),
            ("1.5", None),
            ("1.5B", None),
            (".5K", None),
            ("1.K", None),
            ("1..5K", None),
            ("1kB", None),
            ("1KiB", None),
            ("K", None),
            ("", None),
            ("-1", None),
            (" 1k", None),
            ("0x1k", None),
        ] {
            assert_eq!(parse_size(text), value, "{text}");
        }
    }

    #[test]
    fn errors_name_subject_path_value_and_expectation() {
        let options = || {
            parse("raw,node-name=disk0,file.driver=file,file.locking=maybe")
                .with_subject(r#"blockdev "disk0""#)
        };
        let mut parent = options();
        let ChildRef::Inline(mut file) = parent.require_child("file").unwrap() else {
            panic!("inline")
        };
        let locking = file
            .take_enum("locking", &[("auto", 0), ("on", 1), ("off", 2)])
            .unwrap_err();
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
            options()
                .take_unsupported(&["aio", "file.driver"])
                .unwrap_err()
                .to_string(),
            r#"blockdev "disk0": option "file.driver" is not supported yet"#
        );
        assert_eq!(
            options().take_bool("node-name.x").unwrap_err().to_string(),
            r#"blockdev "disk0": option "node-name" must be a group of options such as "node-name.x", not "disk0""#
        );
        assert_eq!(
            options()
                .take_u64_in("file.driver", 1..=2)
                .unwrap_err()
                .to_string(),
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
        assert_eq!(
            syntax.to_string(),
            r#"--blockdev: option "a" has no value: write it as key=value"#
        );
    }

    #[test]
    fn finish_names_the_first_left_over_option() {
        let mut options = parse("raw,file.driver=file,file.x.y=1,z=2");
        options.take_str("driver").unwrap();
        options.take_str("file.driver").unwrap();
        assert_eq!(
            options.finish().unwrap_err().to_string(),
            r#"option "file.x.y" is unknown"#
        );
        assert_eq!(
            parse("l.0.a=1").finish().unwrap_err().to_string(),
            r#"option "l.0.a" is unknown"#
        );
        let dotted = parse(r#"{"file.driver": "null-co"}"#).finish().unwrap_err();
        assert_eq!(
            dotted.to_string(),
            r#"option "file.driver" is unknown: JSON nests objects where key=value has dotted keys"#
        );
    }

    #[test]
    fn children_groups_and_lists() {
        let mut options =
            parse("raw,file=disk0,backing.driver=null-co,i.0=a,i.1=b,r.0.x=1,r.1.y=2,s=one");
        assert_eq!(
            options.take_child("file").unwrap(),
            Some(ChildRef::Reference("disk0".into()))
        );
        assert_eq!(options.take_child("none").unwrap(), None);
        let mut backing = options.take_options("backing").unwrap().unwrap();
        assert_eq!(backing.path_of("x"), "backing.x");
        assert_eq!(backing.require_str("driver").unwrap(), "null-co");
        assert_eq!(
            options.take_str_or_list("s").unwrap(),
            Some(vec!["one".into()])
        );
        assert_eq!(
            options.take_str_or_list("i").unwrap(),
            Some(vec!["a".into(), "b".into()])
        );
        let mut rules = options.take_options_list("r").unwrap().unwrap();
        let second = rules.pop().unwrap();
        assert_eq!(
            second.finish().unwrap_err().to_string(),
            r#"option "r.1.y" is unknown"#
        );
        assert_eq!(
            options.require_child("f").unwrap_err().kind(),
            &OptionsErrorKind::Missing
        );

        let mut json = Options::from_json(json!({"backing": null, "file": 1})).unwrap();
        assert!(!json.take_null("file"));
        assert!(json.take_null("backing"));
        assert!(json.take_child("file").is_err());
        json.finish().unwrap();
    }

    #[test]
    fn trees_can_be_built_in_code() {
        let mut file = Options::new();
        file.set_str("driver", "file")
            .set_bool("cache.direct", true)
            .set_u64("n", 1);
        let mut options = Options::new();
        options
            .set_str("driver", "raw")
            .set_str("file", "x")
            .set_options("file", file)
            .set_bool("file.n", false);
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
