//! What the sandbox blocks and what it leaves, each tried in a process of its own: this program again, told to run the
//! same test confined; on a thread that was there before, on the one that confines, and on one made afterwards.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blockport_block::aio::{AioEngine, AioSettings, Iothread};
use nix::errno::Errno;

use super::*;
use crate::options::{MonitorConfig, Step};

const CONFINED: &str = "BLOCKPORT_TEST_CONFINED";

/// Runs `probe` confined, in another process.
#[track_caller]
fn run_confined(test: &str, setup: fn(&Path) -> Config, probe: fn(&Path)) -> Output {
    if let Some(folder) = std::env::var_os(CONFINED) {
        let folder = PathBuf::from(folder);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let earlier = {
            let folder = folder.clone();
            std::thread::spawn(move || {
                let _ = wait.recv();
                probe(&folder);
            })
        };
        let mut config = setup(&folder);
        config.sandbox.mode = SandboxMode::Strict;
        let sandbox = Sandbox::prepare(&config).expect("this machine has Landlock");
        sandbox.confine().expect("this machine has seccomp");
        probe(&folder);
        drop(go);
        earlier.join().expect("the thread that was there before");
        let folder = folder.clone();
        std::thread::spawn(move || probe(&folder)).join().expect("a thread made afterwards");
        std::process::exit(0);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let this = std::env::current_exe().expect("this program");
    let name = format!("sandbox::tests::{test}");
    let output = Command::new(this).args(["--exact", &name, "--nocapture"]).env(CONFINED, folder.path()).output();
    output.expect("this program again")
}

/// The same, where nothing in the probe fails.
#[track_caller]
fn confined(test: &str, setup: fn(&Path) -> Config, probe: fn(&Path)) -> String {
    let output = run_confined(test, setup, probe);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {said}", output.status);
    said
}

fn nothing(_folder: &Path) -> Config {
    Config::default()
}

#[test]
fn no_other_program_can_be_run() {
    let said = confined("no_other_program_can_be_run", nothing, |_| {
        let path = c"/bin/true";
        assert_eq!(nix::unistd::execv(path, &[path]), Err(Errno::EPERM));
    });
    let line = format!("sandbox: system call {} was blocked", nix::libc::SYS_execve);
    assert_eq!(said.matches(&line).count(), 1, "once, however often: {said}");
}

#[test]
fn no_process_can_be_made() {
    let output = run_confined("no_process_can_be_made", nothing, |_| {
        let made = Command::new("/bin/true").status();
        panic!("{made:?}");
    });
    // The C library forks with all signals blocked, so there is no return from it.
    assert_eq!(output.status.signal(), Some(nix::libc::SIGSYS), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn no_other_file_can_be_opened() {
    confined("no_other_file_can_be_opened", nothing, |folder| {
        for path in ["/etc/passwd", "/proc/self/status", "/dev/zero"] {
            let error = File::open(path).expect_err(path);
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{path}: {error}");
        }
        assert!(File::create(folder.join("new")).is_err());
        assert!(std::fs::read_dir("/").is_err());
        assert!(UnixListener::bind(folder.join("socket")).is_err());
        File::open("/dev/null").expect("/dev/null");
    });
}

#[test]
fn there_is_no_network() {
    confined("there_is_no_network", nothing, |_| {
        let error = std::net::TcpListener::bind("127.0.0.1:0").expect_err("no socket");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err());
        std::os::unix::net::UnixStream::pair().expect("local sockets");
    });
}

#[test]
fn other_processes_are_out_of_reach() {
    confined("other_processes_are_out_of_reach", nothing, |_| {
        assert_eq!(nix::sys::ptrace::traceme(), Err(Errno::EPERM));
        let parent = nix::unistd::Pid::parent();
        assert_eq!(nix::sys::ptrace::attach(parent), Err(Errno::EPERM));
        assert_eq!(nix::sys::signal::kill(parent, None), Err(Errno::EPERM));
        assert_eq!(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER), Err(Errno::EPERM));
        assert_eq!(nix::unistd::chroot("/"), Err(Errno::EPERM));
        assert_eq!(nix::unistd::setuid(nix::unistd::Uid::from_raw(1)), Err(Errno::EPERM));
    });
}

fn late_iothread() -> io::Result<Iothread> {
    let settings = AioSettings { engine: AioEngine::IoUring, ..AioSettings::default() };
    Iothread::start("late", settings)
}

#[test]
fn no_ring_can_be_made_where_no_iothread_can_follow() {
    confined("no_ring_can_be_made_where_no_iothread_can_follow", nothing, |_| {
        assert!(late_iothread().is_err());
    });
}

#[test]
fn an_iothread_can_follow_where_things_may_be_made_later() {
    let setup = |_: &Path| {
        let mut config = Config::default();
        config.steps.push(Step::Monitor(MonitorConfig::new("c")));
        config
    };
    confined("an_iothread_can_follow_where_things_may_be_made_later", setup, |_| {
        late_iothread().expect("an iothread");
    });
}

#[test]
fn what_is_named_can_be_opened_again_and_our_own_files_made_and_removed() {
    const TEST: &str = "what_is_named_can_be_opened_again_and_our_own_files_made_and_removed";
    let setup = |folder: &Path| {
        let image = folder.join("disk.raw");
        std::fs::write(&image, b"disk").expect("an image");
        let base = folder.join("base.raw");
        std::fs::write(&base, b"base").expect("an image");
        std::fs::create_dir(folder.join("run")).expect("a folder");
        let mut config = Config::default();
        let text = format!(
            "driver=raw,node-name=d,file.driver=file,file.filename={},other.read-only=on,other.file.filename={}",
            image.display(),
            base.display()
        );
        let node = blockport_block::options::parse_keyval(&text, None).expect("options");
        config.steps.push(Step::Blockdev(node));
        config.pidfile = Some(folder.join("run/pid"));
        config
    };
    confined(TEST, setup, |folder| {
        let mut file = File::options().read(true).write(true).open(folder.join("disk.raw")).expect("the image");
        file.write_all(b"DISK").expect("written");
        file.set_len(1 << 20).expect("resized");
        File::open(folder.join("base.raw")).expect("the base");
        assert!(File::options().write(true).open(folder.join("base.raw")).is_err(), "it is read only");
        let socket = folder.join(format!("run/{:?}", std::thread::current().id()));
        UnixListener::bind(&socket).expect("a socket");
        std::fs::remove_file(&socket).expect("removed");
        assert!(File::create(folder.join("run/file")).is_err());
    });
}

#[test]
fn what_is_open_can_be_opened_again_with_the_same_access() {
    let setup = |folder: &Path| {
        for (name, write) in [("read", false), ("written", true)] {
            std::fs::write(folder.join(name), b"data").expect("a file");
            let file = File::options().read(true).write(write).open(folder.join(name)).expect("the file");
            std::mem::forget(file);
        }
        std::fs::write(folder.join("closed"), b"data").expect("a file");
        Config::default()
    };
    confined("what_is_open_can_be_opened_again_with_the_same_access", setup, |folder| {
        File::open(folder.join("read")).expect("it is open");
        File::options().read(true).write(true).open(folder.join("written")).expect("it is open");
        assert!(File::options().write(true).open(folder.join("read")).is_err(), "it is open for reading only");
        assert!(File::open(folder.join("closed")).is_err());
    });
}

#[test]
fn in_an_allowed_folder_images_are_opened_and_made() {
    let setup = |folder: &Path| {
        let mut config = Config::default();
        config.sandbox.allow.push(folder.to_owned());
        config
    };
    confined("in_an_allowed_folder_images_are_opened_and_made", setup, |folder| {
        let path = folder.join(format!("{:?}.raw", std::thread::current().id()));
        File::create_new(&path).expect("a new image").write_all(b"data").expect("written");
        let mut text = String::new();
        File::open(&path).expect("the image").read_to_string(&mut text).expect("read");
        assert_eq!(text, "data");
        std::fs::remove_file(&path).expect("removed");
        assert!(File::open(folder.join("../../etc/passwd")).is_err());
    });
}

#[test]
fn what_is_not_there_is_an_error_before_anything_is_made() {
    let complaint = |config: &Config| match Sandbox::prepare(config) {
        Ok(_) => panic!("it is not there"),
        Err(error) => error.to_string(),
    };
    let mut config = Config::default();
    config.sandbox.allow.push("/nowhere".into());
    assert_eq!(complaint(&config), "--sandbox-allow /nowhere: No such file or directory (os error 2)");
    config.sandbox.allow = vec!["/dev/null".into()];
    assert_eq!(complaint(&config), "--sandbox-allow /dev/null: it is no folder");
    config.sandbox.run_as = Some("no-such-user".into());
    assert_eq!(complaint(&config), "--runas: there is no user \"no-such-user\"");
}
