//! Taking: the typed takers that consume a tree of options.
//!
//! This file owns what each type accepts in each notation. It never knows which options exist.

use super::notation::{parse_size, parse_u64};
use super::{ChildRef, Options, OptionsErrorKind, Result, Value};

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
        self.take(key)?.map(|value| self.u64_of(key, value)).transpose()
    }

    fn u64_of(&self, key: &str, value: Value) -> Result<u64> {
        match value {
            Value::Text(text) => parse_u64(&text).ok_or_else(|| self.invalid(key, text, "a whole number from 0")),
            Value::Number(number) => number.as_u64().ok_or_else(|| self.invalid(key, number, "a whole number from 0")),
            other => Err(self.invalid(key, other.shown(), "a whole number from 0 (without quotes in JSON)")),
        }
    }

    /// Takes a list of whole numbers from 0.
    pub fn take_u64_list(&mut self, key: &str) -> Result<Option<Vec<u64>>> {
        let Some(list) = self.take_list(key)? else {
            return Ok(None);
        };
        let number = |(index, value)| self.u64_of(&format!("{key}.{index}"), value);
        list.into_iter().enumerate().map(number).collect::<Result<_>>().map(Some)
    }

    /// Takes whatever stands at the dotted key, as JSON.
    pub fn take_json(&mut self, key: &str) -> Result<Option<serde_json::Value>> {
        Ok(self.take(key)?.map(|value| value.to_json()))
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

    /// Fails, naming the first option at this level that `is_known` does not know.
    pub fn only(&self, is_known: impl Fn(&str) -> bool) -> Result<()> {
        match self.entries.iter().position(|(key, _)| !is_known(key)) {
            Some(at) => Self { entries: vec![self.entries[at].clone()], ..self.clone() }.finish(),
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
