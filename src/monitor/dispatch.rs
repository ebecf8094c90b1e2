//! From a message to a command and back to an answer: requests, errors, and what a command is.
//!
//! This file owns the form of requests and errors, and [`Command`], the seam between the wire and what the daemon can do.
//! It never changes anything itself.

use blockport_block::OpenError;
use blockport_block::options::{Options, OptionsError};
use serde::Serialize;
use serde_json::{Value, json};

use super::commands;
use super::schema::{Arguments, QapiType, Schema};
use crate::daemon::Daemon;

/// The classes of errors. All but the first tell a client something that it may act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// The description says it all.
    GenericError,
    /// There is no such command, or not at this time.
    CommandNotFound,
    /// There is no such device or object.
    DeviceNotFound,
}

/// Why a command was not carried out. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandError {
    /// For programs.
    pub class: ErrorClass,
    /// For people: names what is wrong.
    pub description: String,
}

/// What a command gives.
pub type CommandResult<T> = Result<T, CommandError>;

impl CommandError {
    /// An error of no particular class.
    pub fn new(description: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, description: description.into() }
    }

    /// There is no such command, or not at this time.
    pub fn command_not_found(description: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, description: description.into() }
    }

    /// There is no such device or object.
    pub fn device_not_found(description: impl Into<String>) -> Self {
        Self { class: ErrorClass::DeviceNotFound, description: description.into() }
    }

    /// The answer's `error`.
    pub fn to_json(&self) -> Value {
        json!({"class": self.class, "desc": self.description})
    }
}

impl From<OpenError> for CommandError {
    fn from(error: OpenError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<OptionsError> for CommandError {
    fn from(error: OptionsError) -> Self {
        Self::new(error.to_string())
    }
}

/// A command to be carried out.
#[derive(Debug, Clone)]
pub struct Request {
    /// What the client calls it; the answer carries it.
    pub id: Option<Value>,
    /// The command's name.
    pub name: String,
    /// What it is given.
    pub arguments: Options,
    /// Whether it overtakes those that wait.
    pub out_of_band: bool,
}

/// A message that is no request: what is wrong, and the id, if it has one that could be read.
#[derive(Debug)]
pub struct BadRequest {
    /// What the client calls it.
    pub id: Option<Value>,
    /// What is wrong.
    pub error: CommandError,
}

impl Request {
    /// Reads a message. `out_of_band`: whether the client has agreed on requests that overtake others.
    pub fn read(message: &[u8], out_of_band: bool) -> Result<Self, BadRequest> {
        let nameless = |description: String| BadRequest { id: None, error: CommandError::new(description) };
        let text = std::str::from_utf8(message).map_err(|_| nameless("JSON: it is not UTF-8".to_owned()))?;
        let mut options = Options::parse_json(text).map_err(|error| nameless(error.to_string()))?;
        let id = options.take_json("id").unwrap_or_default();
        match Self::take(&mut options, out_of_band) {
            Ok((name, arguments, out_of_band)) => Ok(Self { id, name, arguments, out_of_band }),
            Err(error) => Err(BadRequest { id, error }),
        }
    }

    fn take(options: &mut Options, out_of_band: bool) -> CommandResult<(String, Options, bool)> {
        let overtaking = if out_of_band { options.take_str("exec-oob")? } else { None };
        let (name, overtakes) = match (options.take_str("execute")?, overtaking) {
            (Some(_), Some(_)) => return Err(options.conflict("execute", "exec-oob").into()),
            (None, Some(name)) => (name, true),
            (Some(name), None) => (name, false),
            (None, None) => return Err(options.missing("execute").into()),
        };
        let arguments = options.take_options("arguments")?.unwrap_or_default();
        std::mem::take(options).finish()?;
        Ok((name, arguments.at_top(), overtakes))
    }
}

/// The answer to a request.
pub fn answer(id: Option<Value>, result: CommandResult<Value>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": error.to_json()}),
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer
}

/// One command of the monitor.
pub trait Command: Sync {
    /// Its name on the wire.
    fn name(&self) -> &'static str;

    /// Whether it may overtake commands that wait: it changes nothing and never waits itself.
    fn is_quick(&self) -> bool;

    /// Carries it out, or changes nothing.
    fn run(&self, daemon: &mut Daemon, arguments: Options) -> CommandResult<Value>;

    /// Describes what it takes and gives.
    fn describe(&self, schema: &mut Schema);
}

/// A command from its types and its function.
pub struct Typed<A, R> {
    name: &'static str,
    is_quick: bool,
    run: fn(&mut Daemon, A) -> CommandResult<R>,
}

/// A command that changes something, or may wait for something.
pub const fn command<A, R>(name: &'static str, run: fn(&mut Daemon, A) -> CommandResult<R>) -> Typed<A, R> {
    Typed { name, is_quick: false, run }
}

/// A command that only tells what the daemon knows.
pub const fn query<A, R>(name: &'static str, run: fn(&mut Daemon, A) -> CommandResult<R>) -> Typed<A, R> {
    Typed { name, is_quick: true, run }
}

impl<A: Arguments, R: QapiType + Serialize> Command for Typed<A, R> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn is_quick(&self) -> bool {
        self.is_quick
    }

    fn run(&self, daemon: &mut Daemon, arguments: Options) -> CommandResult<Value> {
        let answer = (self.run)(daemon, A::from_options(arguments)?)?;
        serde_json::to_value(answer).map_err(|error| CommandError::new(error.to_string()))
    }

    fn describe(&self, schema: &mut Schema) {
        let (arguments, answer) = (A::describe(schema), R::describe(schema));
        let mut info = json!({"meta-type": "command", "arg-type": arguments, "ret-type": answer});
        if self.is_quick {
            info["allow-oob"] = true.into();
        }
        schema.add(self.name, info);
    }
}

/// Carries a request out.
pub fn run(daemon: &mut Daemon, request: &mut Request) -> CommandResult<Value> {
    let name = &request.name;
    let Some(command) = commands::find(name) else {
        return Err(CommandError::command_not_found(format!("The command {name} has not been found")));
    };
    if request.out_of_band && !command.is_quick() {
        return Err(CommandError::new(format!("The command {name} does not support OOB")));
    }
    tracing::debug!("monitor: {name}");
    command.run(daemon, std::mem::take(&mut request.arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Request {
        Request::read(text.as_bytes(), true).expect(text)
    }

    fn refusal(text: &str, out_of_band: bool) -> (Option<Value>, String) {
        let bad = Request::read(text.as_bytes(), out_of_band).expect_err(text);
        assert_eq!(bad.error.class, ErrorClass::GenericError);
        (bad.id, bad.error.description)
    }

    #[test]
    fn requests() {
        let request = read(r#"{"execute": "a", "id": [1, {"b": null}], "arguments": {"c": {"d": 1}}}"#);
        assert_eq!((request.name.as_str(), request.out_of_band), ("a", false));
        assert_eq!(request.id, Some(json!([1, {"b": null}])));
        assert_eq!(request.arguments.finish().expect_err("left over").to_string(), r#"option "c.d" is unknown"#);
        let request = read("{'exec-oob': 'a'}");
        assert!(request.out_of_band && request.id.is_none() && request.arguments.is_empty());
    }

    #[test]
    fn messages_that_are_no_requests() {
        for (text, complaint) in [
            ("[]", r#"expected a JSON object, not "a list""#),
            ("42", r#"expected a JSON object, not "42""#),
            (r#"{"id": 7}"#, r#"option "execute" is missing"#),
            (r#"{"execute": 5}"#, r#"option "execute" must be a string, not "5""#),
            (r#"{"execute": "a", "x": 1}"#, r#"option "x" is unknown"#),
            (r#"{"execute": "a", "exec-oob": "b"}"#, r#"options "execute" and "exec-oob" exclude each other"#),
            (r#"{"execute": "a", "arguments": []}"#, r#"option "arguments" must be a group of options, not "a list""#),
        ] {
            assert_eq!(refusal(text, true).1, complaint, "{text}");
        }
        for text in [r#"{"a": 1, "a": 2}"#, "{]", "xyz", r#"{"a" 1}"#, r#"{"id": "\ud83d"}"#, r#"{"id": 1e400}"#] {
            assert!(refusal(text, true).1.starts_with("JSON: "), "{text}");
        }
        assert_eq!(refusal(r#"{"id": 7}"#, true).0, Some(json!(7)));
        assert_eq!(refusal(r#"{"exec-oob": "a"}"#, false).1, r#"option "execute" is missing"#);
        assert!(Request::read(b"{\"id\": \"\xc3\x28\"}", true).is_err());
    }

    #[test]
    fn answers_carry_the_id() {
        assert_eq!(answer(Some(json!("x")), Ok(json!({}))), json!({"return": {}, "id": "x"}));
        let error = CommandError::device_not_found("no");
        assert_eq!(answer(None, Err(error)), json!({"error": {"class": "DeviceNotFound", "desc": "no"}}));
    }
}
