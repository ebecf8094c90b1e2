//! The commands: one file a theme, each with its table. This file is the list of them.

pub mod chardevs;
pub mod dirty_bitmaps;
pub mod exports;
pub mod general;
pub mod media;
pub mod nodes;
pub mod notation;
pub mod objects;
pub mod requests;
pub mod statistics;
pub mod throttling;
pub mod transaction;

use super::dispatch::Command;

/// The tables.
const THEMES: &[&[&dyn Command]] = &[
    general::COMMANDS,
    nodes::COMMANDS,
    media::COMMANDS,
    statistics::COMMANDS,
    requests::COMMANDS,
    throttling::COMMANDS,
    transaction::COMMANDS,
    dirty_bitmaps::COMMANDS,
    exports::COMMANDS,
    notation::COMMANDS,
    objects::COMMANDS,
    chardevs::COMMANDS,
];

/// All commands.
pub fn all() -> impl Iterator<Item = &'static dyn Command> {
    THEMES.iter().flat_map(|theme| theme.iter().copied())
}

/// The command of that name.
pub fn find(name: &str) -> Option<&'static dyn Command> {
    all().find(|command| command.name() == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<&str> = all().map(|command| command.name()).collect();
        assert_eq!(names.len(), all().count());
    }

    /// Every name of a type that stands somewhere in the schema.
    fn mentioned(schema: &[Value]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for info in schema {
            found.extend(["arg-type", "ret-type", "element-type"].iter().filter_map(|key| info[key].as_str()));
            for list in ["members", "variants"] {
                found.extend(info[list].as_array().into_iter().flatten().filter_map(|member| member["type"].as_str()));
            }
        }
        found.into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn the_schema_defines_every_type_once_and_none_without_use() {
        let schema = general::schema();
        let names: Vec<&str> = schema.iter().filter_map(|info| info["name"].as_str()).collect();
        assert_eq!(names.len(), schema.len());
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "a name stands twice");
        let mentioned = mentioned(&schema);
        let is_type = |info: &&Value| !matches!(info["meta-type"].as_str(), Some("command" | "event"));
        let types: BTreeSet<String> =
            schema.iter().filter(is_type).filter_map(|info| info["name"].as_str()).map(str::to_owned).collect();
        assert_eq!(types, mentioned);
        for command in all() {
            assert!(names.contains(&command.name()), "{} is not described", command.name());
        }
    }
}
