//! Tests of socket files and inherited sockets: whose they are, and what is left of them.

use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::FileTypeExt;

use tempfile::TempDir;

use super::*;

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::Builder::new().prefix("blockport-").tempdir().expect("a directory for a socket");
    let path = dir.path().join("sock");
    (dir, path)
}

fn address(path: &Path) -> SocketAddress {
    SocketAddress::Unix { path: path.to_owned(), mode: None, group: None }
}

fn listening(path: &Path) -> Listener {
    match Endpoint::open(&address(path)) {
        Ok(Endpoint::Listening(listener)) => listener,
        Ok(Endpoint::Connected(_)) => panic!("a path is listened on"),
        Err(error) => panic!("{error}"),
    }
}

fn refusal(address: &SocketAddress) -> String {
    Endpoint::open(address).err().expect("it must be refused").to_string()
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[test]
fn a_front_end_reaches_the_socket_and_its_file_goes_away_with_it() {
    let (_dir, path) = place();
    let listener = listening(&path);
    let _stream = UnixStream::connect(&path).expect("it listens");
    assert!(listener.accept().is_ok());
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_socket_without_a_file_is_reached_by_its_name() {
    for tight in [false, true] {
        let (_dir, path) = place();
        let address = SocketAddress::Abstract { name: path.display().to_string(), tight };
        let Ok(Endpoint::Listening(listener)) = Endpoint::open(&address) else { panic!("a name is listened on") };
        assert!(Endpoint::connect(&address).is_ok() && listener.accept().is_ok());
        assert!(!path.exists());
        let other = SocketAddress::Abstract { name: path.display().to_string(), tight: !tight };
        assert!(Endpoint::connect(&other).is_err(), "the padded name is another name");
    }
}

#[test]
fn a_stale_socket_file_is_replaced() {
    let (_dir, path) = place();
    drop(UnixListener::bind(&path).expect("a socket"));
    assert!(is_socket(&path), "the standard library leaves it behind");
    let _listener = listening(&path);
    assert!(UnixStream::connect(&path).is_ok());
}

#[test]
fn a_socket_that_is_served_is_left_to_its_owner() {
    let (_dir, path) = place();
    let owner = UnixListener::bind(&path).expect("a socket");
    let refused = refusal(&address(&path));
    assert!(refused.contains("another process is serving it"), "{refused}");
    assert!(refused.contains(&path.display().to_string()), "{refused}");
    assert!(is_socket(&path));
    assert!(owner.accept().is_ok());
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let (dir, path) = place();
    std::fs::write(&path, "precious").expect("a file");
    assert!(refusal(&address(&path)).contains("not a socket"));
    assert_eq!(std::fs::read(&path).ok().as_deref(), Some(&b"precious"[..]));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("a link");
    assert!(refusal(&address(&link)).contains("not a socket"));
    let directory = dir.path().join("directory");
    std::fs::create_dir(&directory).expect("a directory");
    assert!(refusal(&address(&directory)).contains("not a socket"));
}

#[test]
fn a_socket_file_that_is_no_longer_ours_is_left_alone() {
    let (_dir, path) = place();
    let listener = listening(&path);
    std::fs::remove_file(&path).expect("it is there");
    let other = UnixListener::bind(&path).expect("the name is free");
    drop(listener);
    assert!(is_socket(&path));
    drop(other);
}

#[test]
fn a_socket_file_has_the_mode_asked_for() {
    for mode in [0o600, 0o660] {
        let (_dir, path) = place();
        let address = SocketAddress::Unix { path: path.clone(), mode: Some(mode), group: None };
        let _endpoint = Endpoint::open(&address).expect("a socket");
        let metadata = std::fs::metadata(&path).expect("it is there");
        assert_eq!(metadata.permissions().mode() & 0o777, mode);
    }
}

#[test]
fn a_place_that_does_not_exist_or_is_too_long_is_refused() {
    let (dir, path) = place();
    assert!(refusal(&address(&path.join("sock"))).contains("No such file"));
    let long = dir.path().join("x".repeat(120));
    assert!(refusal(&address(&long)).contains("too long"), "{}", refusal(&address(&long)));
}

/// A descriptor as it is when this process was started with it: not to be closed on exec.
fn inherit(fd: impl IntoRawFd + AsFd) -> RawFd {
    rustix::io::fcntl_setfd(&fd, FdFlags::empty()).expect("it is open");
    fd.into_raw_fd()
}

#[test]
fn a_descriptor_is_taken_over_once_and_only_if_it_was_inherited() {
    let (one, other) = UnixStream::pair().expect("sockets");
    assert!(refusal(&SocketAddress::Fd(one.as_raw_fd())).contains("not inherited"), "we made it ourselves");
    let fd = inherit(other);
    let _taken = Endpoint::open(&SocketAddress::Fd(fd)).expect("it was inherited");
    assert!(refusal(&SocketAddress::Fd(fd)).contains("not inherited"), "it has an owner");
}

#[test]
fn an_inherited_socket_is_listened_on_or_served_as_it_is() {
    let (_dir, path) = place();
    let listener = inherit(UnixListener::bind(&path).expect("a socket"));
    match Endpoint::open(&SocketAddress::Fd(listener)).expect("it listens") {
        Endpoint::Listening(listener) => {
            let _stream = UnixStream::connect(&path).expect("it listens");
            assert!(listener.accept().is_ok());
        }
        Endpoint::Connected(_) => panic!("it listens"),
    }
    assert!(is_socket(&path), "who made the file removes it");
    let (one, _other) = UnixStream::pair().expect("sockets");
    let opened = Endpoint::open(&SocketAddress::Fd(inherit(one))).expect("it is connected");
    assert!(matches!(opened, Endpoint::Connected(_)));
}

#[test]
fn an_inherited_descriptor_that_is_no_socket_is_refused() {
    assert!(refusal(&SocketAddress::Fd(1 << 20)).contains("not open"));
    for fd in 0..3 {
        assert!(refusal(&SocketAddress::Fd(fd)).contains("standard input"));
    }
    let file = inherit(crate::testing::memfd(0));
    assert!(refusal(&SocketAddress::Fd(file)).contains("not a Unix stream socket"));
}
