//! The page of figures: what stands there, and what its readers can do to the daemon.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::backend::{Backend, Setup};
use crate::frontend::blk::{self, Request};
use crate::frontend::device::Profile;
use crate::frontend::wait::{DEADLINE, until};

/// A daemon whose figures are at a unix socket.
struct Measured {
    backend: Backend,
    page: PathBuf,
    _dir: TempDir,
}

impl Measured {
    fn start(setup: Setup) -> Self {
        let dir = tempfile::Builder::new().prefix("blockport-").tempdir().expect("a directory");
        let page = dir.path().join("figures");
        let backend = setup.more(vec!["--metrics".to_owned(), format!("unix:{}", page.display())]).start();
        Self { backend, page, _dir: dir }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.page).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.set_write_timeout(Some(DEADLINE)).expect("a timeout");
        stream
    }

    fn figures(&self) -> BTreeMap<String, f64> {
        figures(&asked(self.connect(), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))
    }
}

/// The whole answer to a request.
fn asked(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer, and its end");
    answer
}

/// The figures of an answer, by name and labels.
fn figures(answer: &str) -> BTreeMap<String, f64> {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    let figure = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        (name.to_owned(), value.parse().expect("a number"))
    };
    lines.map(figure).collect()
}

#[test]
fn the_page_tells_what_was_done() {
    let daemon = Measured::start(Setup::null(1 << 20).export("num-queues=2"));
    let before = daemon.figures();
    assert_eq!(before["blockport_export_connected{export=\"e0\"}"], 0.0);
    assert_eq!(before["blockport_export_size_bytes{export=\"e0\"}"], f64::from(1 << 20));
    assert!(!before.keys().any(|name| name.starts_with("blockport_queue_")), "none is started: {before:?}");
    assert!(!before.contains_key("blockport_export_idle_seconds{export=\"e0\"}"), "nothing was done yet");

    let mut device = daemon.backend.device(&Profile::qemu());
    for sector in 0..7 {
        assert_eq!(device.queue().request(&Request::read(sector, 512)).status, blk::OK);
    }
    assert_eq!(device.queue().request(&Request::read(1 << 40, 512)).status, blk::IOERR);
    let after = daemon.figures();
    let of = |name: &str, labels: &str| after[&format!("{name}{{export=\"e0\"{labels}}}")];
    let read = ",operation=\"read\"";
    assert_eq!(of("blockport_operations_total", read), 7.0);
    assert_eq!(of("blockport_bytes_total", read), 7.0 * 512.0);
    assert_eq!(of("blockport_invalid_total", read) + of("blockport_errors_total", read), 1.0);
    assert_eq!(of("blockport_latency_seconds_count", read), 7.0);
    assert_eq!(of("blockport_latency_seconds_bucket", ",operation=\"read\",le=\"+Inf\""), 7.0);
    assert!(of("blockport_latency_seconds_sum", read) > 0.0);
    assert_eq!(of("blockport_export_iostatus", ",status=\"ok\""), 1.0);
    assert_eq!(of("blockport_export_connected", ""), 1.0);
    assert_eq!(of("blockport_export_in_flight", ""), 0.0);
    assert!(of("blockport_export_idle_seconds", "") < DEADLINE.as_secs_f64());
    let queue = |name: &str| of(&format!("blockport_queue_{name}"), ",queue=\"0\",iothread=\"t0\"");
    assert_eq!(queue("requests_total"), 8.0);
    assert!((1.0..=8.0).contains(&queue("batches_total")), "{}", queue("batches_total"));
    assert!(queue("size") > 1.0 && queue("kicks_total") > 0.0 && queue("calls_total") > 0.0, "{after:?}");
    assert!(after["blockport_iothread_sleeps_total{iothread=\"t0\"}"] > 0.0);
    drop(device);
    until("the ring is stopped", || {
        daemon.figures()["blockport_queue_size{export=\"e0\",queue=\"0\",iothread=\"t0\"}"] == 0.0
    });
    daemon.backend.stop();
    assert!(!daemon.page.exists(), "its socket is removed");
}

#[test]
fn what_is_no_question_for_the_figures_is_refused_with_a_status() {
    let daemon = Measured::start(Setup::null(1 << 20));
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), "404 "),
        ("DELETE /metrics HTTP/1.1\r\n\r\n".to_owned(), "405 "),
        ("GET /metrics HTTP/3.0\r\n\r\n".to_owned(), "505 "),
        ("{\"execute\": \"quit\"}\r\n\r\n".to_owned(), "400 "),
        (format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(9000)), "431 "),
    ] {
        let answer = asked(daemon.connect(), &request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {answer}");
    }
    let head = asked(daemon.connect(), "HEAD /metrics HTTP/1.0\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
    // Half a request and no more: closed without an answer.
    let mut stream = daemon.connect();
    stream.write_all(b"GET /met").expect("it reads");
    stream.shutdown(Shutdown::Write).expect("half closed");
    let mut answer = String::new();
    assert_eq!(stream.read_to_string(&mut answer).expect("the end"), 0);
    daemon.figures();
}

#[test]
fn readers_that_say_nothing_or_do_not_read_are_dropped_and_the_disk_does_not_notice() {
    let daemon = Measured::start(Setup::null(1 << 20));
    let mut device = daemon.backend.device(&Profile::qemu());
    let fds = daemon.backend.open_fds();
    // More than are served at once.
    let mut silent: Vec<UnixStream> = (0..40).map(|_| daemon.connect()).collect();
    device.queue().works();
    assert!(daemon.backend.open_fds() <= fds + 10, "no more than a few at once");
    // One with a question does not wait for them; those that were there longest make room.
    daemon.figures();
    let mut closed = |range: std::ops::Range<usize>| {
        silent[range].iter_mut().all(|stream| stream.read(&mut [0; 8]).expect("closed") == 0)
    };
    assert!(closed(0..33));
    assert!(closed(33..40), "when their time is over");
    drop(silent);
    device.queue().works();
    until("nothing is left of them", || daemon.backend.open_fds() <= fds);
}

#[test]
fn it_is_on_loopback_or_a_unix_socket_or_nowhere() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:9100", "localhost:9100", "9100"] {
        for style in [
            &["serve", "d.raw", "--socket", "s", "--metrics", address][..],
            &["--blockdev", "null-co,node-name=n", "--metrics", address],
            &["--socket-path=s", "--blk-file=d", "--metrics", address],
        ] {
            let output = Command::new(env!("CARGO_BIN_EXE_blockport")).args(style).output().expect("it runs");
            assert_eq!(output.status.code(), Some(2), "{style:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains("--metrics"), "{style:?}");
        }
    }
    for loopback in ["127.0.0.1:0", "[::1]:0"] {
        let backend = match Setup::null(1 << 20).more(vec!["--metrics".into(), loopback.into()]).try_start() {
            Ok(backend) => backend,
            Err((_, said)) if loopback.starts_with('[') && said.contains("--metrics") => {
                // A machine without IPv6.
                continue;
            }
            Err((status, said)) => panic!("{status}: {said}"),
        };
        let mut found = None;
        until("the log says where", || {
            let said = backend.said();
            let rest = said.split_once("http://").map(|(_, rest)| rest.to_owned());
            found = rest.and_then(|rest| rest.split_once("/metrics").map(|(address, _)| address.to_owned()));
            found.is_some()
        });
        let stream = TcpStream::connect(found.expect("an address")).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let figures = figures(&asked(stream, "GET /metrics HTTP/1.1\r\n\r\n"));
        assert!(figures.keys().any(|name| name.starts_with("blockport_build_info{")), "{figures:?}");
    }
}

#[test]
fn a_place_that_is_taken_is_named() {
    let daemon = Measured::start(Setup::null(1 << 20));
    let taken = format!("unix:{}", daemon.page.display());
    let refused = Setup::null(1 << 20).more(vec!["--metrics".into(), taken]).try_start();
    let Err((status, said)) = refused else { panic!("it is not refused") };
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("--metrics unix:") && Path::new(&daemon.page).exists(), "{said}");
    daemon.figures();
}
