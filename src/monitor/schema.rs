//! The types of what goes over the wire, as `query-qmp-schema` tells them.
//!
//! This file owns the declarations from which both sides are made: [`arguments!`] is a struct, its parser and its schema;
//! [`answer!`] a struct, its writer and its schema; [`choice!`] all of it for an enumeration. So none can disagree with
//! the others. It knows no command.

use std::borrow::Cow;
use std::collections::BTreeMap;

use blockport_block::options::{Options, Result};
use serde_json::{Value, json};

/// The types that were described so far, by name.
#[derive(Default)]
pub struct Schema {
    types: BTreeMap<String, Value>,
}

/// A type on the wire.
pub trait QapiType {
    /// Describes the type, and those it is made of, once. Returns its name.
    fn describe(schema: &mut Schema) -> String;
}

/// A member of an object.
pub struct Member {
    /// As it is written.
    pub name: Cow<'static, str>,
    /// The name of its type.
    pub kind: String,
    /// Whether it may be left out.
    pub optional: bool,
}

impl Member {
    /// A member that must be given.
    pub fn required(name: impl Into<Cow<'static, str>>, kind: impl Into<String>) -> Self {
        Self { name: name.into(), kind: kind.into(), optional: false }
    }

    /// A member that may be left out.
    pub fn optional(name: impl Into<Cow<'static, str>>, kind: impl Into<String>) -> Self {
        Self { name: name.into(), kind: kind.into(), optional: true }
    }
}

impl Schema {
    /// An object with these members, which are described only once.
    pub fn object(&mut self, name: &str, members: impl FnOnce(&mut Self) -> Vec<Member>) -> String {
        self.once(name, |schema| json!({"meta-type": "object", "members": shown(members(schema))}))
    }

    /// An object whose further members depend on the value of its member `tag`: a list of values, each with a type.
    pub fn union(
        &mut self,
        name: &str,
        tag: &'static str,
        parts: impl FnOnce(&mut Self) -> (Vec<Member>, Vec<(String, String)>),
    ) -> String {
        self.once(name, |schema| {
            let (members, variants) = parts(schema);
            let variants: Vec<Value> =
                variants.iter().map(|(case, kind)| json!({"case": case, "type": kind})).collect();
            json!({"meta-type": "object", "members": shown(members), "tag": tag, "variants": variants})
        })
    }

    /// A string that is one of these.
    pub fn choice(&mut self, name: &str, values: &[&str]) -> String {
        let members: Vec<Value> = values.iter().map(|value| json!({"name": value})).collect();
        self.once(name, |_| json!({"meta-type": "enum", "members": members, "values": values}))
    }

    /// One type or another, told apart by their JSON.
    pub fn alternate(&mut self, name: &str, kinds: impl FnOnce(&mut Self) -> Vec<String>) -> String {
        self.once(name, |schema| {
            let members: Vec<Value> = kinds(schema).iter().map(|kind| json!({"type": kind})).collect();
            json!({"meta-type": "alternate", "members": members})
        })
    }

    /// A list.
    pub fn array(&mut self, element: &str) -> String {
        self.once(&format!("[{element}]"), |_| json!({"meta-type": "array", "element-type": element}))
    }

    /// A type that JSON has.
    pub fn builtin(&mut self, name: &str, json_type: &str) -> String {
        self.once(name, |_| json!({"meta-type": "builtin", "json-type": json_type}))
    }

    /// All of it, in the form of `query-qmp-schema`.
    pub fn into_list(self) -> Vec<Value> {
        self.types.into_values().collect()
    }

    /// Adds what is no type: a command or an event.
    pub fn add(&mut self, name: &str, info: Value) {
        self.once(name, |_| info);
    }

    fn once(&mut self, name: &str, describe: impl FnOnce(&mut Self) -> Value) -> String {
        if !self.types.contains_key(name) {
            // Known before its members are described, as one of them may be of this type again.
            self.types.insert(name.to_owned(), Value::Null);
            let mut info = describe(self);
            info["name"] = name.into();
            self.types.insert(name.to_owned(), info);
        }
        name.to_owned()
    }
}

fn shown(members: Vec<Member>) -> Vec<Value> {
    let of = |Member { name, kind, optional }: Member| match optional {
        // No option has a default that is worth telling; null is what QEMU says, too.
        true => json!({"name": name, "type": kind, "default": null}),
        false => json!({"name": name, "type": kind}),
    };
    members.into_iter().map(of).collect()
}

/// What can be taken out of options.
pub trait Take: Sized {
    /// Takes the value at `key`; `None` if it is not given.
    fn take(options: &mut Options, key: &str) -> Result<Option<Self>>;
}

/// A member of a struct: required, or in an `Option`.
pub trait Field: Sized {
    /// Whether it may be left out.
    const OPTIONAL: bool;

    /// Describes its type.
    fn describe_field(schema: &mut Schema) -> String;
}

/// A member that is parsed.
pub trait TakeField: Field {
    /// Takes the member out of the options.
    fn take_field(options: &mut Options, key: &str) -> Result<Self>;
}

/// A member that is written.
pub trait SkipField: Field {
    /// Whether there is nothing to write.
    fn is_absent(&self) -> bool;
}

impl<T: QapiType> Field for T {
    const OPTIONAL: bool = false;

    fn describe_field(schema: &mut Schema) -> String {
        T::describe(schema)
    }
}

impl<T: QapiType> Field for Option<T> {
    const OPTIONAL: bool = true;

    fn describe_field(schema: &mut Schema) -> String {
        T::describe(schema)
    }
}

impl<T: QapiType + Take> TakeField for T {
    fn take_field(options: &mut Options, key: &str) -> Result<Self> {
        T::take(options, key)?.ok_or_else(|| options.missing(key))
    }
}

impl<T: QapiType + Take> TakeField for Option<T> {
    fn take_field(options: &mut Options, key: &str) -> Result<Self> {
        T::take(options, key)
    }
}

impl<T: QapiType> SkipField for T {
    fn is_absent(&self) -> bool {
        false
    }
}

impl<T: QapiType> SkipField for Option<T> {
    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

/// For `serde`, which cannot name a method of a trait.
pub fn is_absent<T: SkipField>(member: &T) -> bool {
    member.is_absent()
}

macro_rules! builtin {
    ($($kind:ty: $name:literal, $json:literal;)*) => {
        $(impl QapiType for $kind {
            fn describe(schema: &mut Schema) -> String {
                schema.builtin($name, $json)
            }
        })*
    };
}

builtin! {
    String: "str", "string";
    bool: "bool", "boolean";
    u64: "int", "int";
    f64: "number", "number";
    Value: "any", "value";
}

impl<T: QapiType> QapiType for Vec<T> {
    fn describe(schema: &mut Schema) -> String {
        let element = T::describe(schema);
        schema.array(&element)
    }
}

macro_rules! taken_by {
    ($($kind:ty: $taker:ident;)*) => {
        $(impl Take for $kind {
            fn take(options: &mut Options, key: &str) -> Result<Option<Self>> {
                options.$taker(key)
            }
        })*
    };
}

taken_by! {
    String: take_str;
    bool: take_bool;
    u64: take_u64;
    Value: take_json;
    Vec<String>: take_str_list;
    Vec<u64>: take_u64_list;
}

/// A struct that is parsed from options: `"key" => field: Type`, with `Option<Type>` for what may be left out.
macro_rules! arguments {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $key:literal => $field:ident: $kind:ty,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone)]
        pub struct $name {
            $($(#[$doc])* pub $field: $kind,)*
        }

        impl $crate::monitor::schema::QapiType for $name {
            fn describe(schema: &mut $crate::monitor::schema::Schema) -> String {
                schema.object(stringify!($name), |_schema| vec![$($crate::monitor::schema::Member {
                    name: $key.into(),
                    kind: <$kind as $crate::monitor::schema::Field>::describe_field(_schema),
                    optional: <$kind as $crate::monitor::schema::Field>::OPTIONAL,
                }),*])
            }
        }

        impl $crate::monitor::schema::Arguments for $name {
            fn from_options(mut _options: blockport_block::options::Options) -> blockport_block::options::Result<Self> {
                let taken = Self {
                    $($field: $crate::monitor::schema::TakeField::take_field(&mut _options, $key)?,)*
                };
                _options.finish()?;
                Ok(taken)
            }
        }

        impl $crate::monitor::schema::Take for $name {
            fn take(
                options: &mut blockport_block::options::Options,
                key: &str,
            ) -> blockport_block::options::Result<Option<Self>> {
                options.take_options(key)?.map($crate::monitor::schema::Arguments::from_options).transpose()
            }
        }

        impl $crate::monitor::schema::Take for Vec<$name> {
            fn take(
                options: &mut blockport_block::options::Options,
                key: &str,
            ) -> blockport_block::options::Result<Option<Self>> {
                let groups = options.take_options_list(key)?;
                groups
                    .map(|groups| groups.into_iter().map($crate::monitor::schema::Arguments::from_options).collect())
                    .transpose()
            }
        }
    };
}

/// What the names of a list stand for.
pub fn chosen<T: Copy>(options: &Options, key: &str, list: Vec<String>, choices: &[(&str, T)]) -> Result<Vec<T>> {
    let find = |(index, name): (usize, String)| match choices.iter().find(|(known, _)| *known == name) {
        Some((_, choice)) => Ok(*choice),
        None => {
            let known: Vec<&str> = choices.iter().map(|(known, _)| *known).collect();
            Err(options.invalid(&format!("{key}.{index}"), name, format!("one of {}", known.join(", "))))
        }
    };
    list.into_iter().enumerate().map(find).collect()
}

/// What a command takes: all of its options, or an error that names the one that is wrong.
pub trait Arguments: QapiType + Sized {
    /// Reads the arguments.
    fn from_options(options: Options) -> Result<Self>;
}

/// A struct that is written: `"key" => field: Type`, with `Option<Type>` for what may be missing.
macro_rules! answer {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $key:literal => $field:ident: $kind:ty,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, serde::Serialize)]
        pub struct $name {
            $(
                $(#[$doc])*
                #[serde(rename = $key, skip_serializing_if = "crate::monitor::schema::is_absent")]
                pub $field: $kind,
            )*
        }

        impl $crate::monitor::schema::QapiType for $name {
            fn describe(schema: &mut $crate::monitor::schema::Schema) -> String {
                schema.object(stringify!($name), |_schema| vec![$($crate::monitor::schema::Member {
                    name: $key.into(),
                    kind: <$kind as $crate::monitor::schema::Field>::describe_field(_schema),
                    optional: <$kind as $crate::monitor::schema::Field>::OPTIONAL,
                }),*])
            }
        }
    };
}

/// An enumeration, by the names on the wire.
macro_rules! choice {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $value:literal => $variant:ident,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
        pub enum $name {
            $($(#[$doc])* #[serde(rename = $value)] $variant,)*
        }

        impl $crate::monitor::schema::QapiType for $name {
            fn describe(schema: &mut $crate::monitor::schema::Schema) -> String {
                schema.choice(stringify!($name), &[$($value),*])
            }
        }

        impl $crate::monitor::schema::Take for $name {
            fn take(
                options: &mut blockport_block::options::Options,
                key: &str,
            ) -> blockport_block::options::Result<Option<Self>> {
                options.take_enum(key, &[$(($value, Self::$variant)),*])
            }
        }

        impl $crate::monitor::schema::Take for Vec<$name> {
            fn take(
                options: &mut blockport_block::options::Options,
                key: &str,
            ) -> blockport_block::options::Result<Option<Self>> {
                let choices = [$(($value, $name::$variant)),*];
                options.take_str_list(key)?.map(|list| $crate::monitor::schema::chosen(options, key, list, &choices)).transpose()
            }
        }
    };
}

pub(crate) use {answer, arguments, choice};

arguments! {
    /// A command without arguments.
    NoArguments {}
}

answer! {
    /// A command without an answer but that it was done.
    Done {}
}
