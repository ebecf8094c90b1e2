//! The types of option trees: exports, objects and nodes, from the tables that their readers check them with.
//!
//! This file owns how a table becomes a type. It never reads an option.

use super::schema::{Member, QapiType, Schema};
use crate::options::table::{OptionKind, OptionRow};
use crate::options::{EXPORT_OPTIONS, IOTHREAD_OPTIONS};

/// An export's options.
pub fn export(schema: &mut Schema) -> String {
    schema.object("BlockExportOptions", |schema| members(schema, EXPORT_OPTIONS))
}

/// An object's options.
pub fn object(schema: &mut Schema) -> String {
    schema.union("ObjectOptions", "qom-type", |schema| {
        let kinds = [("iothread", "IothreadProperties", IOTHREAD_OPTIONS)];
        let names: Vec<&str> = kinds.iter().map(|(kind, ..)| *kind).collect();
        let tag = schema.choice("ObjectType", &names);
        let common = vec![member("qom-type", tag, true), member("id", String::describe(schema), true)];
        let variants = kinds.iter().map(|(kind, name, table)| {
            let own: Vec<OptionRow> = table.iter().filter(|row| row.name != "id").copied().collect();
            ((*kind).to_owned(), schema.object(name, |schema| members(schema, &own)))
        });
        (common, variants.collect())
    })
}

fn member(name: &'static str, kind: String, required: bool) -> Member {
    Member { name, kind, optional: !required }
}

fn members(schema: &mut Schema, table: &[OptionRow]) -> Vec<Member> {
    table.iter().map(|row| member(row.name, kind(schema, row.kind), row.required)).collect()
}

fn kind(schema: &mut Schema, kind: OptionKind) -> String {
    match kind {
        OptionKind::Text => String::describe(schema),
        OptionKind::Flag => bool::describe(schema),
        OptionKind::Number => u64::describe(schema),
        OptionKind::Choice(name, values) => schema.choice(name, values),
        OptionKind::TextOrList => {
            schema.alternate("StrOrList", |schema| vec![String::describe(schema), Vec::<String>::describe(schema)])
        }
        OptionKind::Address => schema.union("SocketAddress", "type", |schema| {
            let unix = schema.object("UnixSocketOptions", |schema| {
                let (text, flag) = (String::describe(schema), bool::describe(schema));
                vec![member("path", text, true), member("abstract", flag.clone(), false), member("tight", flag, false)]
            });
            let fd = schema.object("FdSocketOptions", |schema| vec![member("str", String::describe(schema), true)]);
            let tag = schema.choice("SocketAddressType", &["unix", "fd"]);
            (vec![member("type", tag, true)], vec![("unix".into(), unix), ("fd".into(), fd)])
        }),
    }
}
