//! Commands about objects: iothreads, and their properties in the object model that users of QEMU know.

use blockport_block::options::Options;
use serde_json::Value;

use super::super::dispatch::{Command, CommandError, CommandResult, command, query};
use super::super::options_schema;
use super::super::schema::{Arguments, Done, NoArguments, QapiType, Schema, answer, arguments};
use crate::daemon::{Daemon, IothreadObject};
use crate::options::IothreadConfig;

/// This theme's table.
pub const COMMANDS: &[&dyn Command] = &[
    &command("object-add", object_add),
    &command("object-del", object_del),
    &query("query-iothreads", query_iothreads),
    &query("qom-list", qom_list),
    &query("qom-get", qom_get),
    &command("qom-set", qom_set),
];

/// The arguments of `object-add`, by kind.
enum ObjectAdd {
    Iothread(IothreadConfig),
}

impl Arguments for ObjectAdd {
    fn from_options(mut options: Options) -> blockport_block::options::Result<Self> {
        match options.require_str("qom-type")?.as_str() {
            "iothread" => IothreadConfig::from_options(options).map(Self::Iothread),
            other => Err(options.invalid("qom-type", other, "iothread")),
        }
    }
}

impl QapiType for ObjectAdd {
    fn describe(schema: &mut Schema) -> String {
        options_schema::object(schema)
    }
}

fn object_add(daemon: &mut Daemon, object: ObjectAdd) -> CommandResult<Done> {
    match object {
        ObjectAdd::Iothread(config) => daemon.objects.add_iothread(config)?,
    }
    Ok(Done {})
}

arguments! {
    /// An object.
    ObjectId {
        "id" => id: String,
    }
}

fn object_del(daemon: &mut Daemon, arguments: ObjectId) -> CommandResult<Done> {
    let users = daemon.exports.users_of(&arguments.id);
    daemon.objects.remove(&arguments.id, &users)?;
    Ok(Done {})
}

answer! {
    /// An iothread.
    IothreadInfo {
        "id" => id: String,
        "thread-id" => thread_id: u64,
        "poll-max-ns" => poll_max_ns: u64,
        "poll-grow" => poll_grow: u64,
        "poll-shrink" => poll_shrink: u64,
        /// Always 0: a batch is whatever one turn of the loop brings together.
        "aio-max-batch" => aio_max_batch: u64,
    }
}

fn query_iothreads(daemon: &mut Daemon, _: NoArguments) -> CommandResult<Vec<IothreadInfo>> {
    let info = |object: &IothreadObject| {
        let IothreadConfig { id, poll_max_ns, poll_grow, poll_shrink, .. } = object.config().clone();
        IothreadInfo { id, thread_id: object.thread_id(), poll_max_ns, poll_grow, poll_shrink, aio_max_batch: 0 }
    };
    Ok(daemon.objects.iothreads().map(info).collect())
}

/// The properties of an iothread.
const PROPERTIES: &[&str] = &["poll-grow", "poll-max-ns", "poll-shrink"];

/// Where an object model's path leads.
enum Place<'a> {
    Root,
    Objects,
    Iothread(&'a IothreadObject),
}

/// Follows a path: "/", "/objects", "/objects/ID", or an id by itself.
fn find<'a>(daemon: &'a Daemon, path: &str) -> CommandResult<Place<'a>> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let place = match parts.as_slice() {
        [] => Some(Place::Root),
        ["objects"] => Some(Place::Objects),
        ["objects", id] => daemon.objects.iothread(id).map(Place::Iothread),
        [id] if !path.starts_with('/') => daemon.objects.iothread(id).map(Place::Iothread),
        _ => None,
    };
    place.ok_or_else(|| CommandError::device_not_found(format!("Device '{path}' not found")))
}

arguments! {
    /// A path of the object model.
    QomPath {
        "path" => path: String,
    }
}

answer! {
    /// A property or a child of an object.
    ObjectPropertyInfo {
        "name" => name: String,
        "type" => kind: String,
    }
}

fn qom_list(daemon: &mut Daemon, arguments: QomPath) -> CommandResult<Vec<ObjectPropertyInfo>> {
    let property = |name: &str, kind: &str| ObjectPropertyInfo { name: name.to_owned(), kind: kind.to_owned() };
    let mut list = vec![property("type", "string")];
    match find(daemon, &arguments.path)? {
        Place::Root => list.push(property("objects", "child<container>")),
        Place::Objects => {
            list.extend(daemon.objects.iothreads().map(|object| property(&object.config().id, "child<iothread>")));
        }
        Place::Iothread(_) => list.extend(PROPERTIES.iter().map(|name| property(name, "int"))),
    }
    Ok(list)
}

arguments! {
    /// A property of an object.
    QomProperty {
        "path" => path: String,
        "property" => property: String,
    }
}

fn no_property(kind: &str, property: &str) -> CommandError {
    CommandError::new(format!("Property '{kind}.{property}' not found"))
}

fn qom_get(daemon: &mut Daemon, arguments: QomProperty) -> CommandResult<Value> {
    let QomProperty { path, property } = arguments;
    match (find(daemon, &path)?, property.as_str()) {
        (Place::Root | Place::Objects, "type") => Ok("container".into()),
        (Place::Root | Place::Objects, _) => Err(no_property("container", &property)),
        (Place::Iothread(_), "type") => Ok("iothread".into()),
        (Place::Iothread(object), "poll-max-ns") => Ok(object.config().poll_max_ns.into()),
        (Place::Iothread(object), "poll-grow") => Ok(object.config().poll_grow.into()),
        (Place::Iothread(object), "poll-shrink") => Ok(object.config().poll_shrink.into()),
        (Place::Iothread(_), _) => Err(no_property("iothread", &property)),
    }
}

arguments! {
    /// A property of an object and what it is to be.
    QomSet {
        "path" => path: String,
        "property" => property: String,
        "value" => value: Value,
    }
}

fn qom_set(daemon: &mut Daemon, arguments: QomSet) -> CommandResult<Done> {
    let QomSet { path, property, value } = arguments;
    let Place::Iothread(object) = find(daemon, &path)? else { return Err(no_property("container", &property)) };
    if !PROPERTIES.contains(&property.as_str()) {
        return Err(no_property("iothread", &property));
    }
    // Read as `object-add` reads it, so that the bounds are the same.
    let old = object.config();
    let mut options = serde_json::json!({
        "id": old.id, "poll-max-ns": old.poll_max_ns, "poll-grow": old.poll_grow, "poll-shrink": old.poll_shrink,
    });
    options[property.as_str()] = value;
    let config = IothreadConfig::from_options(Options::from_json(options)?)?;
    daemon.objects.set_iothread(config)?;
    Ok(Done {})
}
