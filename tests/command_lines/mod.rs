//! Command lines as users of qemu-storage-daemon write them, run by that program and by this daemon.
//!
//! Each `*.sh` file here is one line, in the notation of a shell: blanks, quotes, a backslash at the end of a line.
//! `$DIR` is a directory made for one run of one program. Comments before it say what to expect:
//!
//! - `# listens: PATH...`: the sockets that must answer;
//! - `# inherits: PATH`: a listening socket that is bound here and passed as descriptor 3, and must answer;
//! - `# pidfile: PATH`: the command goes to the background and writes its process id there.
//!
//! A socket answers when it tells its features, which both programs must do alike as to whether the disk is read-only.
//! What happens to requests is no business of this test.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longer than any start takes, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// VIRTIO_BLK_F_RO.
const FEATURE_READ_ONLY: u64 = 1 << 5;

/// VHOST_USER_GET_FEATURES, protocol version 1, no payload.
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// What a test may fail with: prose.
type Result<T> = std::result::Result<T, String>;

/// One file of this folder.
struct CommandLine {
    name: String,
    /// The arguments, without the program's name.
    args: Vec<String>,
    /// The words of the comments, by their key.
    listens: Vec<String>,
    inherits: Option<String>,
    pidfile: Option<String>,
}

impl CommandLine {
    fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/command_lines");
        let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
            .expect("the folder of command lines")
            .map(|entry| entry.expect("an entry of the folder").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "sh"))
            .collect();
        paths.sort();
        paths.iter().map(|path| Self::read(path)).collect()
    }

    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("a command line");
        let comment = |key: &str| -> Vec<String> {
            let prefix = format!("# {key}: ");
            let line = text.lines().find_map(|line| line.strip_prefix(prefix.as_str()));
            line.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let command: String =
            text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
        let mut words = words(&command);
        assert_eq!(words.first().map(String::as_str), Some("qemu-storage-daemon"), "{}", path.display());
        Self {
            name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            args: words.split_off(1),
            listens: comment("listens"),
            inherits: comment("inherits").pop(),
            pidfile: comment("pidfile").pop(),
        }
    }

    /// Starts `program` with this line, asks every socket for its features, and ends it. Returns the features.
    fn run(&self, program: &str) -> Result<Vec<u64>> {
        let directory = Directory::new(&self.name, program)?;
        let expanded = |text: &str| text.replace("$DIR", &directory.0.to_string_lossy());

        let mut command = Command::new("sh");
        let log = fs::File::create(directory.0.join("log")).map_err(|error| format!("log: {error}"))?;
        command.stdout(Stdio::null()).stderr(log);
        match &self.inherits {
            None => {
                command.stdin(Stdio::null()).args(["-c", r#"exec "$@""#]);
            }
            Some(path) => {
                // The shell moves the descriptor to where the line expects it. This process keeps no copy, so that
                // only the program can answer.
                let listener = UnixListener::bind(expanded(path)).map_err(|error| format!("bind: {error}"))?;
                command.stdin(OwnedFd::from(listener)).args(["-c", r#"exec "$@" 3<&0 </dev/null"#]);
            }
        }
        command.args(["sh", program]).args(self.args.iter().map(|arg| expanded(arg)));
        let child = command.spawn().map_err(|error| format!("cannot start sh: {error}"))?;
        drop(command);
        let mut daemon = Daemon { child, pid: None, ended: None };

        let sockets = self.listens.iter().chain(&self.inherits);
        let result = match &self.pidfile {
            None => Ok(()),
            Some(pidfile) => daemon.followed_to_the_background(Path::new(&expanded(pidfile))),
        };
        let result = result.and_then(|()| sockets.map(|path| daemon.features_at(&expanded(path))).collect());
        let stopped = daemon.stop();
        let log = fs::read_to_string(directory.0.join("log")).unwrap_or_default();
        let features = result.map_err(|error: String| format!("{error}\n{log}"))?;
        stopped.map_err(|error| format!("{error}\n{log}"))?;
        Ok(features)
    }
}

/// Splits text into words as a shell does, without expanding anything.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (Some(open), _) if c == open => quote = None,
            (None | Some('"'), '\\') => match chars.next() {
                Some('\n') | None => {}
                Some(escaped) => word.get_or_insert_default().push(escaped),
            },
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// A directory with the images that the lines name; it goes with its owner.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str, program: &str) -> Result<Self> {
        let program = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
        // Short, because the path of a socket has room for 107 bytes only.
        let path = std::env::temp_dir().join(format!("{program}-{name}-{}", std::process::id()));
        let made = || {
            // Another run with the same process id may have been killed here.
            if path.exists() {
                fs::remove_dir_all(&path)?;
            }
            fs::create_dir(&path)?;
            for image in ["disk.img", "data.img", "thin,old disk.img"] {
                fs::File::create(path.join(image))?.set_len(16 << 20)?;
            }
            std::io::Result::Ok(())
        };
        made().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program under test.
struct Daemon {
    child: Child,
    /// The process that went to the background, if that is not the child.
    pid: Option<u32>,
    /// How the child ended, once it has.
    ended: Option<ExitStatus>,
}

impl Daemon {
    /// The child's exit status, if it has ended.
    fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(|error| format!("wait: {error}"))?;
        }
        Ok(self.ended)
    }

    /// Waits for the child to leave with status 0 and reads who stays.
    fn followed_to_the_background(&mut self, pidfile: &Path) -> Result<()> {
        let status = until("the command to return", || self.status())?;
        if !status.success() {
            return Err(format!("the command returned with {status}"));
        }
        let text = fs::read_to_string(pidfile).map_err(|error| format!("{}: {error}", pidfile.display()))?;
        let pid = text.trim().parse().map_err(|_| format!("{}: {text:?} is no process id", pidfile.display()))?;
        self.pid = Some(pid);
        Ok(())
    }

    /// Waits until the socket at `path` can be connected to and asks for the features.
    fn features_at(&mut self, path: &str) -> Result<u64> {
        let mut socket = until("a socket", || {
            if self.pid.is_none()
                && let Some(status) = self.status()?
            {
                return Err(format!("ended with {status} before it listened at {path}"));
            }
            Ok(UnixStream::connect(path).ok())
        })
        .map_err(|error| format!("{path}: {error}"))?;
        let mut reply = [0; 20];
        socket
            .set_read_timeout(Some(DEADLINE))
            .and_then(|()| socket.write_all(&GET_FEATURES))
            .and_then(|()| socket.read_exact(&mut reply))
            .map_err(|error| format!("{path}: no answer: {error}"))?;
        let [.., a, b, c, d, e, f, g, h] = reply;
        Ok(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
    }

    /// Sends SIGTERM and waits for the end.
    fn stop(&mut self) -> Result<()> {
        if self.pid.is_none()
            && let Some(status) = self.status()?
        {
            return Err(format!("ended by itself with {status}"));
        }
        let pid = self.pid.unwrap_or(self.child.id());
        let signalled = Command::new("sh").args(["-c", r#"kill "$0""#, &pid.to_string()]).status();
        if !signalled.is_ok_and(|status| status.success()) {
            return Err(format!("cannot end process {pid}"));
        }
        if self.pid.is_some() {
            let entry = PathBuf::from(format!("/proc/{pid}/stat"));
            // A process that nobody waits for stays as a zombie where process 1 does not collect them.
            return until("the process in the background to end", || {
                let stat = fs::read_to_string(&entry).unwrap_or_default();
                let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
                Ok(matches!(state, None | Some('Z')).then_some(()))
            });
        }
        let status = until("the daemon to end", || self.status())?;
        if status.success() { Ok(()) } else { Err(format!("ended with {status} after SIGTERM")) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Does nothing to a child that has ended; what is in the background ends by `stop`.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again and again until there is an answer.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if start.elapsed() > DEADLINE {
            return Err(format!("waited {} s for {what}", DEADLINE.as_secs()));
        }
        sleep(Duration::from_millis(10));
    }
}

/// Ten command lines bring up both programs, with the same sockets and the same idea of who may write.
#[test]
fn lines_for_qemu_storage_daemon_work_unchanged() {
    let lines = CommandLine::all();
    assert!(lines.len() >= 10, "{} command lines", lines.len());
    let mut failures = Vec::new();
    for line in &lines {
        let mut features = Vec::new();
        for program in ["qemu-storage-daemon", env!("CARGO_BIN_EXE_blockport")] {
            match line.run(program) {
                Ok(found) => features.push(found),
                Err(error) => failures.push(format!("{} on {program}: {error}", line.name)),
            }
        }
        if let [theirs, ours] = features.as_slice() {
            let read_only = |features: &[u64]| -> Vec<bool> {
                features.iter().map(|features| features & FEATURE_READ_ONLY != 0).collect()
            };
            if theirs.is_empty() || read_only(theirs) != read_only(ours) {
                failures.push(format!("{}: features {theirs:x?} there, {ours:x?} here", line.name));
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn words_are_split_as_a_shell_does() {
    let text = "a 'b c' \"d e\"f \\\n  --g='{\"h\": \"i\"}' \"j,,k\\\"l\"\n";
    assert_eq!(words(text), ["a", "b c", "d ef", "--g={\"h\": \"i\"}", "j,,k\"l"]);
}
