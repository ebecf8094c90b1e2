//! `ctl iothread …` and `ctl throttle …`: the objects that exports and nodes refer to.

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::Client;
use super::table::table;
use super::{Failure, Output, entries, text_at};

/// Verbs about iothreads.
#[derive(Subcommand, Debug)]
pub enum IothreadVerb {
    /// List the iothreads
    List,
    /// Start an iothread
    Add {
        /// Its name
        id: String,
        /// How long it polls for work before it sleeps, at most, in nanoseconds; 0 never polls
        #[arg(long, value_name = "NS")]
        poll_max_ns: Option<u64>,
    },
    /// End an iothread that no export uses
    Del {
        /// The iothread
        id: String,
    },
    /// Change how an iothread polls, at once
    Set {
        /// The iothread
        id: String,
        /// poll-max-ns, poll-grow or poll-shrink
        property: String,
        /// The new value
        value: u64,
    },
}

impl IothreadVerb {
    /// Carries it out.
    pub fn run(self, client: &mut Client) -> Result<Output, Failure> {
        let (command, arguments) = match self {
            Self::List => {
                let threads = client.execute("query-iothreads", json!({}))?;
                let row = |thread: &Value| {
                    ["/id", "/thread-id", "/poll-max-ns", "/poll-grow", "/poll-shrink", "/x-blockport-aio-engine"]
                        .map(|pointer| text_at(thread, pointer))
                };
                let rows: Vec<_> = entries(&threads).map(row).collect();
                let headings = ["IOTHREAD", "THREAD", "POLL-MAX-NS", "POLL-GROW", "POLL-SHRINK", "ENGINE"];
                return Ok(Output { text: table(headings, &rows), json: threads });
            }
            Self::Add { id, poll_max_ns } => {
                let mut arguments = json!({"qom-type": "iothread", "id": id});
                if let Some(poll_max_ns) = poll_max_ns {
                    arguments["poll-max-ns"] = poll_max_ns.into();
                }
                ("object-add", arguments)
            }
            Self::Del { id } => ("object-del", json!({"id": id})),
            Self::Set { id, property, value } => {
                ("qom-set", json!({"path": format!("/objects/{id}"), "property": property, "value": value}))
            }
        };
        client.execute(command, arguments).map(Output::done)
    }
}

/// Verbs about throttle groups.
#[derive(Subcommand, Debug)]
pub enum ThrottleVerb {
    /// List the throttle groups with their limits
    List,
    /// Make a throttle group
    Add {
        /// Its name
        id: String,
        /// Its limits
        #[arg(value_name = "LIMIT=N")]
        limits: Vec<String>,
    },
    /// Forget a throttle group that no node uses
    Del {
        /// The group
        id: String,
    },
    /// Change limits of a throttle group, at once; those that are not named stay
    Set {
        /// The group
        id: String,
        /// The limits, such as iops-total=1000 or bps-write=10M; 0 lifts one
        #[arg(value_name = "LIMIT=N", required = true)]
        limits: Vec<String>,
    },
}

impl ThrottleVerb {
    /// Carries it out.
    pub fn run(self, client: &mut Client) -> Result<Output, Failure> {
        let (command, arguments) = match self {
            Self::List => return list(client),
            Self::Add { id, limits } => {
                let limits: String = limits.iter().map(|limit| format!(",limits.{limit}")).collect();
                let definition = format!("throttle-group,id={id}{limits}");
                ("x-blockport-add", json!({"kind": "object", "definition": definition}))
            }
            Self::Del { id } => ("object-del", json!({"id": id})),
            Self::Set { id, limits } => {
                let mut value = json!({});
                for limit in limits {
                    let (name, number) = limit.split_once('=').ok_or_else(|| format!("{limit}: write LIMIT=N"))?;
                    let number = blockport_block::options::parse_size(number);
                    value[name] = number.ok_or_else(|| format!("{limit}: {name} must be a number"))?.into();
                }
                ("qom-set", json!({"path": format!("/objects/{id}"), "property": "limits", "value": value}))
            }
        };
        client.execute(command, arguments).map(Output::done)
    }
}

fn list(client: &mut Client) -> Result<Output, Failure> {
    let objects = client.execute("qom-list", json!({"path": "/objects"}))?;
    let mut groups = json!({});
    let mut rows = Vec::new();
    for object in entries(&objects).filter(|object| object["type"] == "child<throttle-group>") {
        let id = text_at(object, "/name");
        let limits = client.execute("qom-get", json!({"path": format!("/objects/{id}"), "property": "limits"}))?;
        let set = limits.as_object().into_iter().flatten().filter(|(name, value)| {
            // How long a burst may last says nothing where there is none.
            let shown = name.strip_suffix("-length").and_then(|burst| limits.get(burst)).unwrap_or(value);
            shown.as_u64() != Some(0)
        });
        let set: Vec<String> = set.map(|(name, value)| format!("{name}={value}")).collect();
        rows.push([id.clone(), if set.is_empty() { "-".to_owned() } else { set.join(" ") }]);
        groups[id] = limits;
    }
    Ok(Output { text: table(["GROUP", "LIMITS"], &rows), json: groups })
}
