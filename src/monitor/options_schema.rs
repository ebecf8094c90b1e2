//! The types of option trees: exports, objects and nodes, from the tables that their readers check them with.
//!
//! This file owns how a table becomes a type. It never reads an option.

use blockport_block::drivers::DRIVERS;
use blockport_block::throttle::ThrottleLimits;
use serde_json::Value;

use super::schema::{Member, QapiType, Schema};
use crate::options::table::{OptionKind, OptionRow};
use crate::options::{EXPORT_OPTIONS, IOTHREAD_OPTIONS, SECRET_OPTIONS};

/// An export's options.
pub fn export(schema: &mut Schema) -> String {
    schema.object("BlockExportOptions", |schema| members(schema, EXPORT_OPTIONS))
}

/// An object's options.
pub fn object(schema: &mut Schema) -> String {
    schema.union("ObjectOptions", "qom-type", |schema| {
        let tag = schema.choice("ObjectType", &["iothread", "secret", "throttle-group"]);
        let common = vec![Member::required("qom-type", tag), Member::required("id", String::describe(schema))];
        let own: Vec<OptionRow> = IOTHREAD_OPTIONS.iter().filter(|row| row.name != "id").copied().collect();
        let iothread = schema.object("IothreadProperties", |schema| members(schema, &own));
        let own: Vec<OptionRow> = SECRET_OPTIONS.iter().filter(|row| row.name != "id").copied().collect();
        let secret = schema.object("SecretProperties", |schema| members(schema, &own));
        let group = schema.object("ThrottleGroupProperties", |schema| {
            let limits = schema.object("ThrottleLimits", |schema| limits(schema, ""));
            let mut members = vec![Member::optional("limits", limits)];
            members.extend(self::limits(schema, "x-"));
            members
        });
        let variants =
            [("iothread".to_owned(), iothread), ("secret".to_owned(), secret), ("throttle-group".to_owned(), group)];
        (common, variants.to_vec())
    })
}

/// All limits, with `prefix` in front of each.
fn limits(schema: &mut Schema, prefix: &str) -> Vec<Member> {
    let names = ThrottleLimits::default().values();
    let limit = |(name, _)| Member::optional(format!("{prefix}{name}"), u64::describe(schema));
    names.into_iter().map(limit).collect()
}

fn members(schema: &mut Schema, table: &[OptionRow]) -> Vec<Member> {
    let member =
        |row: &OptionRow| Member { name: row.name.into(), kind: kind(schema, row.kind), optional: !row.required };
    table.iter().map(member).collect()
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
        OptionKind::Cpus => {
            schema.alternate("CpuSet", |schema| vec![String::describe(schema), Vec::<u64>::describe(schema)])
        }
        OptionKind::QueueMapping => {
            let entry = schema.object("IOThreadVirtQueueMapping", |schema| {
                let (iothread, vqs) = (String::describe(schema), Vec::<u64>::describe(schema));
                vec![Member::required("iothread", iothread), Member::optional("vqs", vqs)]
            });
            schema.array(&entry)
        }
        OptionKind::Address => schema.union("SocketAddress", "type", |schema| {
            let unix = schema.object("UnixSocketOptions", |schema| {
                let (text, flag) = (String::describe(schema), bool::describe(schema));
                vec![
                    Member::required("path", text),
                    Member::optional("abstract", flag.as_str()),
                    Member::optional("tight", flag),
                ]
            });
            let fd = schema.object("FdSocketOptions", |schema| vec![Member::required("str", String::describe(schema))]);
            let tag = schema.choice("SocketAddressType", &["unix", "fd"]);
            (vec![Member::required("type", tag)], vec![("unix".into(), unix), ("fd".into(), fd)])
        }),
    }
}

/// A node's options: those of all nodes, and those of its driver.
pub fn node(schema: &mut Schema) -> String {
    schema.union("BlockdevOptions", "driver", |schema| {
        let names: Vec<&str> = DRIVERS.iter().map(|row| row.name).collect();
        let (text, flag) = (String::describe(schema), bool::describe(schema));
        let cache = schema.object("BlockdevCacheOptions", |_| {
            vec![Member::optional("direct", flag.as_str()), Member::optional("no-flush", flag.as_str())]
        });
        let common = vec![
            Member::required("driver", schema.choice("BlockdevDriver", &names)),
            Member::optional("node-name", text),
            Member::optional("read-only", flag.as_str()),
            Member::optional("active", flag.as_str()),
            Member::optional("auto-read-only", flag.as_str()),
            Member::optional("force-share", flag.as_str()),
            Member::optional("discard", schema.choice("BlockdevDiscardOptions", &["ignore", "off", "on", "unmap"])),
            Member::optional("detect-zeroes", schema.choice("BlockdevDetectZeroesOptions", &["off", "on", "unmap"])),
            Member::optional("cache", cache),
        ];
        let variants = DRIVERS.iter().map(|row| {
            let options = schema.object(&format!("BlockdevOptions-{}", row.name), |schema| {
                // A driver says what an option means, not of which type it is.
                let any = Value::describe(schema);
                let mut names: Vec<&str> =
                    row.options.iter().map(|(name, _)| name.split('.').next().unwrap_or(name)).collect();
                names.dedup();
                names.into_iter().map(|name| Member::optional(name, any.as_str())).collect()
            });
            (row.name.to_owned(), options)
        });
        (common, variants.collect())
    })
}
