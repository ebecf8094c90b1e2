//! Commands about objects: iothreads, throttle groups and secrets, and their properties in the object model that users of QEMU know.

use std::sync::Arc;

use blockport_block::aio::{AioEngine, LoopFigures};
use blockport_block::options::Options;
use blockport_block::throttle::ThrottleGroup;
use serde_json::{Value, json};

use super::super::dispatch::{Command, CommandError, CommandResult, command, query};
use super::super::options_schema;
use super::super::schema::{Arguments, Done, NoArguments, QapiType, Schema, answer, arguments};
use crate::daemon::{Daemon, IothreadObject};
use crate::options::{IothreadConfig, SecretConfig, ThrottleGroupConfig};

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
    ThrottleGroup(ThrottleGroupConfig),
    Secret(SecretConfig),
}

impl Arguments for ObjectAdd {
    fn from_options(mut options: Options) -> blockport_block::options::Result<Self> {
        match options.require_str("qom-type")?.as_str() {
            "iothread" => IothreadConfig::from_options(options).map(Self::Iothread),
            "throttle-group" => ThrottleGroupConfig::from_options(options).map(Self::ThrottleGroup),
            "secret" => SecretConfig::from_options(options).map(Self::Secret),
            other => Err(options.invalid("qom-type", other, "iothread, secret or throttle-group")),
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
        ObjectAdd::Iothread(config) => daemon.add_iothread(config)?,
        ObjectAdd::ThrottleGroup(config) => daemon.add_throttle_group(&config)?,
        ObjectAdd::Secret(config) => daemon.add_secret(&config)?,
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
    let id = &arguments.id;
    match daemon.graph.throttle_groups().find(id) {
        Some(_) => daemon.graph.throttle_groups().remove(id)?,
        // What was opened with a secret stays open.
        None if daemon.graph.secrets().remove(id) => {}
        None => daemon.objects.remove(id, &daemon.exports.users_of(id))?,
    }
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
        /// What was asked for: auto, io_uring or threads.
        "x-blockport-aio-engine" => aio_engine: String,
        /// Spins before a sleep that ended because something came.
        "x-blockport-polls-caught" => polls_caught: u64,
        /// Spins that ended with nothing.
        "x-blockport-polls-in-vain" => polls_in_vain: u64,
        /// How often it waited in the kernel.
        "x-blockport-sleeps" => sleeps: u64,
    }
}

fn query_iothreads(daemon: &mut Daemon, _: NoArguments) -> CommandResult<Vec<IothreadInfo>> {
    let info = |object: &IothreadObject| {
        let IothreadConfig { id, poll_max_ns, poll_grow, poll_shrink, aio_engine, .. } = object.config().clone();
        let (thread_id, aio_engine) = (object.thread_id(), engine_name(aio_engine).to_owned());
        let LoopFigures { polls_caught, polls_in_vain, sleeps } = object.figures();
        IothreadInfo {
            id,
            thread_id,
            poll_max_ns,
            poll_grow,
            poll_shrink,
            aio_max_batch: 0,
            aio_engine,
            polls_caught,
            polls_in_vain,
            sleeps,
        }
    };
    Ok(daemon.objects.iothreads().map(info).collect())
}

fn engine_name(engine: AioEngine) -> &'static str {
    AioEngine::NAMES.into_iter().find(|(_, known)| *known == engine).map_or("", |(name, _)| name)
}

/// The properties of an iothread that can be changed.
const PROPERTIES: &[&str] = &["poll-grow", "poll-max-ns", "poll-shrink"];

/// Those that cannot.
const FIXED_PROPERTIES: &[&str] = &["aio-engine", "cpu-affinity"];

/// Where an object model's path leads.
enum Place<'a> {
    Root,
    Objects,
    Iothread(&'a IothreadObject),
    ThrottleGroup(Arc<ThrottleGroup>),
    Secret,
}

impl Place<'_> {
    /// The name of its type.
    fn kind(&self) -> &'static str {
        match self {
            Self::Root | Self::Objects => "container",
            Self::Iothread(_) => "iothread",
            Self::ThrottleGroup(_) => "throttle-group",
            Self::Secret => "secret",
        }
    }

    /// The error of a property that it lacks.
    fn lacks(&self, property: &str) -> CommandError {
        CommandError::new(format!("Property '{}.{property}' not found", self.kind()))
    }
}

/// Follows a path: "/", "/objects", "/objects/ID", or an id by itself.
fn find<'a>(daemon: &'a Daemon, path: &str) -> CommandResult<Place<'a>> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let object = |id| {
        let group = || daemon.graph.throttle_groups().find(id).map(Place::ThrottleGroup);
        let secret = || daemon.graph.secrets().find(id).map(|_| Place::Secret);
        daemon.objects.iothread(id).map(Place::Iothread).or_else(group).or_else(secret)
    };
    let place = match parts.as_slice() {
        [] => Some(Place::Root),
        ["objects"] => Some(Place::Objects),
        ["objects", id] => object(id),
        [id] if !path.starts_with('/') => object(id),
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
            let groups = daemon.graph.throttle_groups().names();
            list.extend(groups.iter().map(|name| property(name, "child<throttle-group>")));
            list.extend(daemon.graph.secrets().ids().iter().map(|id| property(id, "child<secret>")));
        }
        // What it holds is for nodes alone.
        Place::Secret => {}
        Place::ThrottleGroup(group) => {
            list.push(property("limits", "ThrottleLimits"));
            list.extend(group.limits().values().iter().map(|(name, _)| property(&format!("x-{name}"), "int")));
        }
        Place::Iothread(_) => {
            list.extend(PROPERTIES.iter().map(|name| property(name, "int")));
            list.push(property("aio-engine", "AioEngine"));
            list.push(property("cpu-affinity", "str"));
        }
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

fn qom_get(daemon: &mut Daemon, arguments: QomProperty) -> CommandResult<Value> {
    let QomProperty { path, property } = arguments;
    let place = find(daemon, &path)?;
    let value = match (&place, property.as_str()) {
        (_, "type") => Some(place.kind().into()),
        (Place::Root | Place::Objects | Place::Secret, _) => None,
        (Place::Iothread(object), "poll-max-ns") => Some(object.config().poll_max_ns.into()),
        (Place::Iothread(object), "poll-grow") => Some(object.config().poll_grow.into()),
        (Place::Iothread(object), "poll-shrink") => Some(object.config().poll_shrink.into()),
        (Place::Iothread(object), "aio-engine") => Some(engine_name(object.config().aio_engine).into()),
        (Place::Iothread(object), "cpu-affinity") => {
            Some(object.config().cpu_affinity.as_ref().map(ToString::to_string).unwrap_or_default().into())
        }
        (Place::Iothread(_), _) => None,
        (Place::ThrottleGroup(group), "limits") => {
            Some(group.limits().values().into_iter().map(|(name, value)| (name, Value::from(value))).collect())
        }
        (Place::ThrottleGroup(group), name) => {
            let named = |(known, _): &(String, u64)| name.strip_prefix("x-") == Some(known);
            group.limits().values().into_iter().find(named).map(|(_, value)| value.into())
        }
    };
    value.ok_or_else(|| place.lacks(&property))
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
    let place = find(daemon, &path)?;
    match place {
        Place::Iothread(object) if PROPERTIES.contains(&property.as_str()) => {
            // Read as `object-add` reads it, so that the bounds are the same.
            let old = object.config();
            let mut options = json!({
                "id": old.id, "poll-max-ns": old.poll_max_ns, "poll-grow": old.poll_grow,
                "poll-shrink": old.poll_shrink, "aio-engine": engine_name(old.aio_engine),
            });
            options[property.as_str()] = value;
            let cpu_affinity = old.cpu_affinity.clone();
            let config = IothreadConfig { cpu_affinity, ..IothreadConfig::from_options(Options::from_json(options)?)? };
            daemon.objects.set_iothread(config)?;
        }
        Place::Iothread(_) if FIXED_PROPERTIES.contains(&property.as_str()) => {
            return Err(CommandError::new(format!("Property 'iothread.{property}' cannot be changed")));
        }
        // Limits that are not given stay as they are.
        Place::ThrottleGroup(group) if property == "limits" || property.starts_with("x-") => {
            let mut options = Options::from_json(json!({property.as_str(): value}))?;
            let limits = group.limits().updated(&mut options, "limits.")?.updated(&mut options, "x-")?;
            options.finish()?;
            group.set_limits(limits)?;
        }
        place => return Err(place.lacks(&property)),
    }
    Ok(Done {})
}
