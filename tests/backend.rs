//! Back-end processes: started on a socket in a directory of their own, stopped with SIGTERM, their exit status checked.
//!
//! blockport is tested. `BLOCKPORT_TEST_BACKEND=qsd` runs the same tests on qemu-storage-daemon, which shows what is
//! wrong with a test rather than with the daemon: it passes where the specification says that it is right.
//! `BLOCKPORT_TEST_AIO_ENGINE` selects the engine of blockport's iothreads.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use crate::frontend::device::{Device, Profile};
use crate::frontend::wait::{self, DEADLINE};
use crate::frontend::wire::Connection;

/// A program that serves the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Blockport,
    QemuStorageDaemon,
}

impl Program {
    /// The one that the environment selects.
    pub fn under_test() -> Self {
        match std::env::var("BLOCKPORT_TEST_BACKEND").as_deref() {
            Ok("qsd") => Self::QemuStorageDaemon,
            Ok("blockport") | Err(_) => Self::Blockport,
            Ok(other) => panic!("BLOCKPORT_TEST_BACKEND={other}: blockport or qsd"),
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Blockport => env!("CARGO_BIN_EXE_blockport"),
            Self::QemuStorageDaemon => "qemu-storage-daemon",
        }
    }

    /// Whether it can be run here.
    pub fn is_there(self) -> bool {
        let version = Command::new(self.path()).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok()
    }
}

/// Says that a test, or part of it, cannot run here; on the real stderr, where whoever counts skipped tests finds it.
pub fn skip(test: &str, reason: &str) {
    // Not eprintln, which the test harness swallows. On a line of its own, as the harness may have begun one, and in one
    // write, as it may go on with it.
    let line = format!("\nSKIP {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// What to serve, in the words of the command line that both programs understand.
#[derive(Debug, Clone)]
pub struct Setup {
    program: Program,
    wrapper: Vec<String>,
    iothreads: usize,
    objects: Vec<String>,
    engine: Option<String>,
    iothread_options: String,
    mapping: Option<String>,
    blockdevs: Vec<String>,
    node: String,
    export: String,
    socket: Option<PathBuf>,
    more: Vec<String>,
    /// All words of a command line of another style; nothing else is used then but the socket.
    words: Option<Vec<String>>,
}

impl Setup {
    /// A command line as it stands, of a style of blockport's own. Its socket is to be told with [`Setup::at`].
    pub fn bare(words: Vec<String>) -> Self {
        Self { words: Some(words), ..Self::new("", &[]) }
    }

    /// Nodes as given; the one called `node` is exported, writable with one queue.
    pub fn new(node: &str, blockdevs: &[&str]) -> Self {
        Self {
            program: Program::under_test(),
            wrapper: Vec::new(),
            iothreads: 1,
            objects: Vec::new(),
            engine: std::env::var("BLOCKPORT_TEST_AIO_ENGINE").ok(),
            iothread_options: String::new(),
            mapping: None,
            blockdevs: blockdevs.iter().map(ToString::to_string).collect(),
            node: node.to_string(),
            export: "writable=on".to_string(),
            socket: None,
            more: Vec::new(),
            words: None,
        }
    }

    /// A disk that answers at once and holds nothing.
    pub fn null(size: u64) -> Self {
        Self::new("d0", &[&format!("driver=null-co,node-name=d0,read-zeroes=on,discard=unmap,size={size}")])
    }

    /// The same, every request taking `latency`.
    pub fn slow(latency: Duration) -> Self {
        let latency = latency.as_nanos();
        let node = format!("driver=null-co,node-name=d0,read-zeroes=on,size=1048576,latency-ns={latency}");
        Self::new("d0", &[&node])
    }

    /// A raw image.
    pub fn file(path: &Path) -> Self {
        Self::file_with(path, "")
    }

    /// A raw image with further options for its node, each with a comma before it.
    pub fn file_with(path: &Path, options: &str) -> Self {
        let path = path.display();
        let node = format!("driver=raw,node-name=d0,discard=unmap,file.driver=file,file.filename={path}{options}");
        Self::new("d0", &[&node])
    }

    /// blkdebug with its rules over a raw image.
    pub fn faulty(path: &Path, rules: &str) -> Self {
        let mut setup = Self::file(path);
        setup.blockdevs.push(format!("driver=blkdebug,node-name=b0,discard=unmap,image=d0,{rules}"));
        setup.node = "b0".to_string();
        setup
    }

    /// Further options of the first node.
    pub fn node_options(mut self, options: &str) -> Self {
        self.blockdevs[0] += &format!(",{options}");
        self
    }

    /// Further options of the export. They replace the `writable=on` that stands there at first, if they say it too.
    pub fn export(mut self, options: &str) -> Self {
        if options.contains("writable=") {
            self.export.clear();
        }
        if !self.export.is_empty() {
            self.export.push(',');
        }
        self.export.push_str(options);
        self
    }

    /// With an object besides the iothreads, created before the nodes.
    pub fn object(mut self, object: &str) -> Self {
        self.objects.push(object.to_string());
        self
    }

    /// Every request that fails on the host fails for the guest, at once, as in a program that knows nothing else.
    pub fn reporting(self) -> Self {
        match self.program {
            Program::Blockport => self.export("werror=report"),
            Program::QemuStorageDaemon => self,
        }
    }

    pub fn read_only(self) -> Self {
        self.export("writable=off")
    }

    pub fn iothreads(self, iothreads: usize) -> Self {
        Self { iothreads, ..self }
    }

    /// The engine of the iothreads, whatever the environment selects.
    pub fn engine(self, engine: &str) -> Self {
        Self { engine: Some(engine.to_string()), ..self }
    }

    /// Further options of each iothread.
    pub fn iothread_options(self, options: &str) -> Self {
        Self { iothread_options: format!(",{options}"), ..self }
    }

    /// Which queues are on which iothreads, in place of all in turn.
    pub fn mapping(self, mapping: &[(&str, &[usize])]) -> Self {
        let entry = |(at, (iothread, vqs)): (usize, &(&str, &[usize]))| {
            let key = format!("iothread-vq-mapping.{at}");
            let vqs = vqs.iter().enumerate().map(|(n, vq)| format!(",{key}.vqs.{n}={vq}"));
            format!("{key}.iothread={iothread}{}", vqs.collect::<String>())
        };
        let mapping = mapping.iter().enumerate().map(entry).collect::<Vec<_>>().join(",");
        Self { mapping: Some(mapping), ..self }
    }

    pub fn program(self, program: Program) -> Self {
        Self { program, ..self }
    }

    /// Serves at this path instead of in a directory of its own.
    pub fn at(self, socket: &Path) -> Self {
        Self { socket: Some(socket.to_path_buf()), ..self }
    }

    /// Runs the program by another, which must replace itself with it.
    pub fn under(self, wrapper: &[&str]) -> Self {
        Self { wrapper: wrapper.iter().map(ToString::to_string).collect(), ..self }
    }

    fn command(&self, socket: &Path) -> Command {
        let mut words = self.wrapper.iter().map(String::as_str).chain([self.program.path()]);
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words);
        if let Some(words) = &self.words {
            command.args(words);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            return command;
        }
        let engine = self.engine.as_ref().filter(|_| self.program == Program::Blockport);
        let engine = engine.map(|engine| format!(",aio-engine={engine}")).unwrap_or_default();
        for iothread in 0..self.iothreads {
            command.args(["--object", &format!("iothread,id=t{iothread}{engine}{}", self.iothread_options)]);
        }
        for object in &self.objects {
            command.args(["--object", object]);
        }
        for blockdev in &self.blockdevs {
            command.args(["--blockdev", blockdev]);
        }
        let threads = match self.iothreads {
            _ if self.mapping.is_some() => self.mapping.clone().unwrap_or_default(),
            1 => "iothread=t0".to_string(),
            count => (0..count).map(|i| format!("iothreads.{i}=t{i}")).collect::<Vec<_>>().join(","),
        };
        let (node, export, socket) = (&self.node, &self.export, socket.display());
        command.args([
            "--export",
            &format!("type=vhost-user-blk,id=e0,node-name={node},addr.type=unix,addr.path={socket},{export},{threads}"),
        ]);
        command.args(&self.more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// With these arguments behind all others.
    pub fn more(mut self, arguments: Vec<String>) -> Self {
        self.more.extend(arguments);
        self
    }

    /// Starts it and waits until it listens.
    #[track_caller]
    pub fn start(&self) -> Backend {
        match self.try_start() {
            Ok(backend) => backend,
            Err((status, stderr)) => panic!("{:?} ended with {status} instead of serving:\n{stderr}", self.program),
        }
    }

    /// Starts it and waits until it listens, or gives its exit status and what it said.
    #[track_caller]
    pub fn try_start(&self) -> Result<Backend, (ExitStatus, String)> {
        let mut backend = self.launch();
        let end = Instant::now() + DEADLINE;
        while !backend.listens() {
            if wait::readable(&backend.ended, Duration::from_millis(2)) {
                let status = backend.reap();
                return Err((status, backend.said()));
            }
            assert!(Instant::now() < end, "{:?} does not listen:\n{}", self.program, backend.said());
        }
        Ok(backend)
    }

    /// Starts it and waits for nothing.
    pub fn launch(&self) -> Backend {
        let dir = tempfile::Builder::new().prefix("blockport-").tempdir().expect("a directory for a socket");
        let socket = self.socket.clone().unwrap_or_else(|| dir.path().join("sock"));
        let mut child = self.command(&socket).spawn().unwrap_or_else(|error| {
            panic!("{:?}: {error}", self.program);
        });
        let pid = Pid::from_child(&child);
        let ended = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd_open");
        let stderr = Arc::new(Mutex::new(String::new()));
        let reader = {
            let (mut pipe, stderr) = (child.stderr.take().expect("a pipe"), Arc::clone(&stderr));
            std::thread::spawn(move || collect(&mut pipe, &stderr))
        };
        Backend { child, pid, ended, stderr, reader: Some(reader), over: false, socket, _dir: dir }
    }
}

fn collect(pipe: &mut impl Read, into: &Mutex<String>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut buffer) {
        into.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

/// A back-end that runs. When it goes out of scope in a test that has not failed, it must end well.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    pid: Pid,
    ended: OwnedFd,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    over: bool,
    socket: PathBuf,
    _dir: TempDir,
}

impl Backend {
    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket, DEADLINE).unwrap_or_else(|error| panic!("connect: {error}\n{}", self.said()))
    }

    /// A device brought up on a new connection.
    #[track_caller]
    pub fn device(&self, profile: &Profile) -> Device {
        Device::negotiate(self.connect(), profile)
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it said on stderr so far.
    pub fn said(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn is_running(&self) -> bool {
        !wait::readable(&self.ended, Duration::ZERO)
    }

    /// A file under its /proc directory.
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.pid.as_raw_nonzero())).join(name)
    }

    /// CPU time of all its threads so far, in clock ticks of 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(self.proc("stat")).expect("stat of a running process");
        // The second field is the name, in parentheses; utime and stime are fields 14 and 15.
        let fields = stat.rsplit(')').next().expect("fields");
        let times = fields.split_whitespace().skip(11).take(2);
        times.map(|ticks| ticks.parse::<u64>().expect("a number of ticks")).sum()
    }

    /// Context switches of all threads so far, voluntary and not.
    pub fn context_switches(&self) -> u64 {
        let tasks = std::fs::read_dir(self.proc("task")).expect("threads of a running process").flatten();
        let of = |status: String| -> u64 {
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
        };
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok()).map(of).sum()
    }

    /// Whether an iothread has a ring.
    pub fn uses_io_uring(&self) -> bool {
        let fds = std::fs::read_dir(self.proc("fd")).expect("the descriptors of a running process").flatten();
        let mut links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.any(|link| link.as_os_str() == "anon_inode:[io_uring]")
    }

    /// The status of the thread of that name, as /proc has it.
    pub fn thread_status(&self, name: &str) -> String {
        let tasks = std::fs::read_dir(self.proc("task")).expect("threads of a running process").flatten();
        let mut status = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
        status.find(|status| status.starts_with(&format!("Name:\t{name}\n"))).expect(name)
    }

    /// How many descriptors it has open.
    pub fn open_fds(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).expect("the descriptors of a running process").count()
    }

    /// True when its socket listens, seen from outside: a connection made to find out would be its first front-end.
    fn listens(&self) -> bool {
        const LISTENING: &str = "00010000";
        let path = self.socket.display().to_string();
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let inodes: Vec<String> = sockets
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|row| row.len() == 8 && row[3] == LISTENING && row[7] == path)
            .map(|row| format!("socket:[{}]", row[6]))
            .collect();
        let Ok(fds) = std::fs::read_dir(self.proc("fd")) else {
            return false;
        };
        fds.flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|link| inodes.iter().any(|inode| link.as_os_str() == inode.as_str()))
    }

    /// Ends it with SIGKILL, leaving everything as it is.
    pub fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.reap();
    }

    /// Stops it with SIGTERM; it must end with status 0. Returns what it said on stderr.
    #[track_caller]
    pub fn stop(mut self) -> String {
        self.terminate()
    }

    /// Waits for its end, whatever it is. Its exit status, and what it said.
    #[track_caller]
    pub fn ended(mut self) -> (ExitStatus, String) {
        assert!(wait::readable(&self.ended, DEADLINE * 3), "it does not end:\n{}", self.said());
        (self.reap(), self.said())
    }

    /// Waits for its end, which it was told by other means than a signal; it must be with status 0.
    #[track_caller]
    pub fn ended_well(mut self) -> String {
        assert!(wait::readable(&self.ended, DEADLINE), "it does not stop within {DEADLINE:?}:\n{}", self.said());
        let status = self.reap();
        assert!(status.success(), "it ended with {status}:\n{}", self.said());
        self.said()
    }

    #[track_caller]
    fn terminate(&mut self) -> String {
        if !self.is_running() {
            let status = self.reap();
            panic!("it ended with {status} before it was told to:\n{}", self.said());
        }
        kill_process(self.pid, Signal::TERM).expect("SIGTERM");
        assert!(wait::readable(&self.ended, DEADLINE), "it does not stop within {DEADLINE:?}:\n{}", self.said());
        let status = self.reap();
        assert!(status.success(), "it ended with {status}:\n{}", self.said());
        assert!(!self.said().contains("sandbox: system call"), "its own sandbox stopped it:\n{}", self.said());
        self.said()
    }

    /// Takes the exit status of a process that has ended or is about to.
    fn reap(&mut self) -> ExitStatus {
        self.over = true;
        let status = self.child.wait().expect("wait for a child");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader of stderr");
        }
        status
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let status = (!self.over).then(|| {
                let _ = self.child.kill();
                self.reap()
            });
            eprintln!("the back-end ended with {status:?} and said:\n{}", self.said());
        } else if !self.over {
            self.terminate();
        }
    }
}
