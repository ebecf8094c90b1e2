//! The notations: key=value pairs with dotted keys, JSON, whole numbers and sizes.
//!
//! This file owns how text becomes a tree or a number. It knows neither the names of options nor their types.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::{Options, OptionsError, OptionsErrorKind, Result, Value, entry};

/// The deepest nesting of a dotted key. It bounds recursion; real trees are a handful of levels deep.
const DEPTH_MAX: usize = 64;

/// The longest component of a dotted key, in bytes.
const COMPONENT_LENGTH_MAX: usize = 127;

/// Reads one argument: key=value pairs, or JSON if it starts with `{`.
///
/// `implied_key` is the key of a first part without `=`, if the option has one.
///
/// Fails on text that follows neither notation, on a key used both with a value and with options nested in it, and on
/// list numbers with gaps.
pub fn parse_keyval(text: &str, implied_key: Option<&str>) -> Result<Options> {
    if text.starts_with('{') {
        return parse_json(text);
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
                let value = rest[key_end..]
                    .strip_prefix('=')
                    .ok_or_else(|| OptionsError::syntax(key, "has no value: write it as key=value"))?;
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
    Ok(Options { entries, ..Options::default() })
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
        return Err(OptionsError::syntax("", "an option has no name: write it as key=value"));
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
            || !component.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
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
        return Err(OptionsError::syntax(path, "is used both as a list and with named options in it"));
    }
    let mut list = Vec::with_capacity(entries.len());
    for index in 0..entries.len() {
        let number = index.to_string();
        let element_path = format!("{path}.{number}");
        let Some(found) = entries.iter().position(|(key, _)| *key == number) else {
            return Err(OptionsError { subject: String::new(), path: element_path, kind: OptionsErrorKind::Missing });
        };
        let element = std::mem::replace(&mut entries[found].1, Value::Null);
        list.push(numbers_to_list(element_path, element)?);
    }
    Ok(Value::List(list))
}

/// Reads the text of a JSON object. Strings may stand in single quotes. Fails on anything else, a key given twice
/// included.
pub(super) fn parse_json(text: &str) -> Result<Options> {
    match serde_json::from_str(&with_double_quotes(text)) {
        Ok(Value::Dict(entries)) => Ok(Options { entries, ..Options::default() }),
        Ok(other) => Err(OptionsError::syntax("", format!("expected a JSON object, not {:?}", other.shown()))),
        Err(error) => Err(OptionsError::syntax("", format!("JSON: {error}"))),
    }
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
        serde_json::Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
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

/// Reads a whole number as C programs do: decimal, `0x` hexadecimal, or octal after a leading zero.
pub(super) fn parse_u64(text: &str) -> Option<u64> {
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
        let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
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
        let fraction = if fraction.is_empty() { 0 } else { u128::from(fraction.parse::<u64>().ok()?) };
        whole + ((fraction << shift) + scale / 2) / scale
    };
    u64::try_from(bytes).ok().filter(|&bytes| i64::try_from(bytes).is_ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Options {
        parse_keyval(text, Some("driver")).expect(text)
    }

    fn refusal(text: &str) -> String {
        parse_keyval(text, Some("driver")).expect_err(text).to_string()
    }

    #[test]
    fn keyval_makes_a_tree() {
        for (text, tree) in [
            ("", json!({})),
            ("null-co", json!({"driver": "null-co"})),
            ("null-co,size=1G", json!({"driver": "null-co", "size": "1G"})),
            ("driver=raw,file=disk0", json!({"driver": "raw", "file": "disk0"})),
            (
                "raw,file.driver=file,file.filename=/a",
                json!({"driver": "raw", "file": {"driver": "file", "filename": "/a"}}),
            ),
            ("a.b.c=1,a.b.d=2,a.e=3", json!({"a": {"b": {"c": "1", "d": "2"}, "e": "3"}})),
            ("raw,filename=a,,b,,,,c=d", json!({"driver": "raw", "filename": "a,b,,c=d"})),
            ("a=,b==", json!({"a": "", "b": "="})),
            ("a=1,a=2", json!({"a": "2"})),
            ("a=1,", json!({"a": "1"})),
            ("x,,y,a=1", json!({"driver": "x,y", "a": "1"})),
            ("l.1=b,l.0=a", json!({"l": ["a", "b"]})),
            ("l.0.x=1,l.0.y=2,l.1.x=3", json!({"l": [{"x": "1", "y": "2"}, {"x": "3"}]})),
            ("l.0.0=a,l.0.1=b", json!({"l": [["a", "b"]]})),
        ] {
            assert_eq!(parse(text).to_json(), tree, "{text}");
        }
    }

    #[test]
    fn keyval_refuses_what_it_cannot_read() {
        for (text, complaint) in [
            ("raw,size", r#"option "size" has no value: write it as key=value"#),
            ("raw,=1", "an option has no name: write it as key=value"),
            (",raw", "an option has no name: write it as key=value"),
            ("raw,a..b=1", r#"option "a..b" has an empty part in its name"#),
            ("raw,.a=1", r#"option ".a" has an empty part in its name"#),
            ("raw,0.a=1", r#"option "0.a" has no valid name: a letter, then letters, digits, '-' and '_'"#),
            ("raw,a/b=1", r#"option "a/b" has no valid name: a letter, then letters, digits, '-' and '_'"#),
            ("raw,a=1,a.b=2", r#"option "a" is used both with a value and with options nested in it"#),
            ("raw,x.a.b=1,x.a=2", r#"option "x.a" is used both with a value and with options nested in it"#),
            ("raw,l.0=a,l.2=b", r#"option "l.1" is missing"#),
            ("raw,x.l.00=a", r#"option "x.l.0" is missing"#),
            ("raw,l.0=a,l.b=b", r#"option "l" is used both as a list and with named options in it"#),
        ] {
            assert_eq!(refusal(text), complaint, "{text}");
        }
        assert!(refusal(&format!("raw,{}=1", "a".repeat(128))).ends_with("has too long a name"));
        // As deep as memory would allow: it must be an answer, not a stack overflow.
        assert!(refusal(&format!("raw,{}a=1", "a.".repeat(100_000))).ends_with("is nested too deeply"));
    }

    #[test]
    fn without_an_implied_key_the_first_part_needs_one() {
        let refused = parse_keyval("raw,size=1", None).expect_err("no key");
        assert_eq!(refused.to_string(), r#"option "raw" has no value: write it as key=value"#);
    }

    #[test]
    fn json_makes_the_same_tree() {
        let text = r#"{"driver": "raw", "file": {"driver": "file", "filename": "/a"}, "l": [1, true, null]}"#;
        let tree = json!({"driver": "raw", "file": {"driver": "file", "filename": "/a"}, "l": [1, true, null]});
        assert_eq!(parse(text).to_json(), tree);
        assert_eq!(Options::from_json(tree.clone()).expect("an object").to_json(), tree);
        assert_eq!(parse(r#"{'a': 'it\'s "x"', "b": "it's"}"#).to_json(), json!({"a": "it's \"x\"", "b": "it's"}));
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
}
