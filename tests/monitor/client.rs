//! A client of the monitor that shares no code with it: one line is one answer or event, as the daemon writes them.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::backend::{Backend, Setup};
use crate::frontend::wait::{DEADLINE, until};

/// A connection to a monitor.
pub struct Client {
    lines: BufReader<UnixStream>,
    /// Events that came before what was waited for.
    events: VecDeque<Value>,
    greeting: Value,
}

/// An error's class and description.
pub type Refusal = (String, String);

impl Client {
    /// Connects and reads the greeting.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let mut stream = None;
        until("the monitor listens", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        Self::over(stream.expect("a connection"))
    }

    /// Reads the greeting.
    #[track_caller]
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.set_write_timeout(Some(DEADLINE)).expect("a timeout");
        let mut client = Self { lines: BufReader::new(stream), events: VecDeque::new(), greeting: Value::Null };
        client.greeting = client.line().expect("a greeting");
        client
    }

    /// Connects and negotiates.
    #[track_caller]
    pub fn open(path: &Path) -> Self {
        let mut client = Self::connect(path);
        client.ok("qmp_capabilities", json!({}));
        client
    }

    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("send");
    }

    /// Sends bytes as they are; an error when the other side has closed.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.lines.get_mut().write_all(bytes)
    }

    pub fn stream(&self) -> &UnixStream {
        self.lines.get_ref()
    }

    /// The next line; `None` when the other side has closed.
    #[track_caller]
    pub fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("no line: {error}"),
        }
    }

    /// The next line that is no event.
    #[track_caller]
    pub fn answer(&mut self) -> Option<Value> {
        loop {
            let line = self.line()?;
            if line.get("event").is_none() {
                return Some(line);
            }
            self.events.push_back(line);
        }
    }

    /// Carries a command out.
    #[track_caller]
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value, Refusal> {
        let command = json!({"execute": name, "arguments": arguments, "id": name});
        self.send(command.to_string().as_bytes());
        let mut answer = self.answer().unwrap_or_else(|| panic!("{name}: closed without an answer"));
        assert_eq!(answer["id"], name);
        match answer.get("error") {
            Some(error) => {
                let text = |key: &str| error[key].as_str().expect("text").to_owned();
                Err((text("class"), text("desc")))
            }
            None => Ok(answer["return"].take()),
        }
    }

    /// Carries a command out, which must succeed.
    #[track_caller]
    pub fn ok(&mut self, name: &str, arguments: Value) -> Value {
        match self.execute(name, arguments.clone()) {
            Ok(answer) => answer,
            Err((class, description)) => panic!("{name} {arguments}: {class}: {description}"),
        }
    }

    /// Carries a command out, which must be refused; gives the description.
    #[track_caller]
    pub fn refused(&mut self, name: &str, arguments: Value) -> String {
        match self.execute(name, arguments.clone()) {
            Ok(answer) => panic!("{name} {arguments} is not refused: {answer}"),
            Err((_, description)) => description,
        }
    }

    /// Waits for an event of that name; those before it are dropped. Gives its data.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let mut event = match self.events.pop_front() {
                Some(event) => event,
                None => self.line().unwrap_or_else(|| panic!("closed without {name}")),
            };
            if event["event"] == name {
                assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000), "{event}");
                return event["data"].take();
            }
        }
    }

    /// The events that have come and that nobody has waited for, by name.
    pub fn events_seen(&self) -> Vec<&str> {
        self.events.iter().filter_map(|event| event["event"].as_str()).collect()
    }
}

/// A daemon with a monitor.
pub struct Monitored {
    pub backend: Backend,
    path: PathBuf,
    dir: TempDir,
}

impl Monitored {
    /// Starts it.
    #[track_caller]
    pub fn start(setup: Setup) -> Self {
        let dir = tempfile::Builder::new().prefix("blockport-").tempdir().expect("a directory for sockets");
        let path = dir.path().join("monitor");
        let chardev = format!("socket,id=mon0,path={},server=on,wait=off", path.display());
        let more = ["--chardev", &chardev, "--monitor", "chardev=mon0"].map(str::to_owned).to_vec();
        let backend = setup.more(more).start();
        // The monitor comes after the disk.
        drop(Client::connect(&path));
        Self { backend, path, dir }
    }

    /// Starts one that serves a disk that keeps nothing.
    #[track_caller]
    pub fn null() -> Self {
        Self::start(Setup::null(1 << 20))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path for a further socket or image.
    pub fn place(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    pub fn client(&self) -> Client {
        Client::open(&self.path)
    }

    /// Anonymous memory, in KiB.
    pub fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(self.backend.proc("status")).expect("status");
        let line = status.lines().find(|line| line.starts_with("RssAnon")).expect("RssAnon");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number of KiB")
    }

    /// How many threads it has, but for those that the kernel adds and takes away for io_uring, and those that stay in
    /// reserve where there is none.
    pub fn threads(&self) -> usize {
        let tasks = std::fs::read_dir(self.backend.proc("task")).expect("threads");
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
        tasks
            .flatten()
            .filter_map(name)
            .filter(|name| !["iou-wrk", "aio-"].iter().any(|kind| name.starts_with(kind)))
            .count()
    }
}
