//! The shape of the source, held by tests: which crate knows what, where `unsafe` may stand, what every file and every
//! dependency must say of itself. A rule that is broken is named with file and line; an exception stands here with its
//! reason, or nowhere.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use blockport_block::drivers::DRIVERS;

/// The files that may hold `unsafe`, each with its reason. ARCHITECTURE.md marks them with **[u]**.
const UNSAFE: &[(&str, &str)] = &[
    ("block/aio/uring.rs", "the kernel is given addresses, and answers later"),
    ("block/drivers/luks/xts.rs", "a function for CPUs that have more instructions"),
    ("block/iovec.rs", "raw memory that a guest or the kernel also writes"),
    ("block/sys.rs", "system calls that take addresses"),
    ("block/tests/drivers/allocations.rs", "a global allocator that counts"),
    ("src/background.rs", "fork"),
    ("src/commands/bench/memory.rs", "memory shared with the daemon, which writes at any time"),
    ("src/commands/bench/ring/library.rs", "raw buffers for the client's library"),
    ("src/sandbox/threads.rs", "a signal handler that gives up privileges"),
    ("src/sandbox/violation.rs", "a signal handler that reports a blocked system call"),
    ("tests/frontend/memory.rs", "guest memory, which the back-end writes at any time"),
    ("tests/profiles/vhost_crate.rs", "descriptors are handed to the `vhost` crate in its own type"),
    ("tests/reference/disk.rs", "system calls that take addresses"),
    ("vhost/dirty_log.rs", "memory shared with the front-end"),
    ("vhost/guest_memory.rs", "guest memory is mapped, and its addresses handed out"),
    ("vhost/inflight.rs", "memory shared with the front-end"),
    ("vhost/mapping.rs", "mmap"),
    ("vhost/sigbus.rs", "a signal handler"),
    ("vhost/socket.rs", "an inherited descriptor is taken over"),
    ("vhost/testing/step.rs", "fork and ptrace"),
    ("vhost/virtqueue/packed.rs", "ring memory, which the guest writes at any time"),
    ("vhost/virtqueue/split.rs", "ring memory, which the guest writes at any time"),
];

/// How long a Rust file may be, in lines.
const LINES_MAX: usize = 500;

/// The files that are longer, and how long they may be: a number that is only ever lowered.
const LONGER: &[(&str, usize)] = &[];

/// What may stand at the top of the project.
const TOP_LEVEL: &[&str] = &[
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-BSD-3-Clause",
    "README.md",
    "block",
    "docs",
    "rustfmt.toml",
    "scripts",
    "src",
    "target",
    "tests",
    "vhost",
];

/// What only tests may say.
const FOR_TESTS: &[&str] = &[".unwrap()", ".expect(", "todo!", "unimplemented!", "dbg!"];

/// A file of the project.
struct Source {
    /// From the top of the project.
    path: String,
    text: String,
}

impl Source {
    fn is_test(&self) -> bool {
        let parts: Vec<&str> = self.path.split(['/', '.']).collect();
        parts.iter().any(|part| ["tests", "testing", "benches"].contains(part))
    }

    /// Lines with their numbers, without comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(at, line)| (at + 1, line.split("//").next().unwrap_or("")));
        lines.filter(|(_, line)| !line.trim().is_empty())
    }

    /// The same without the tests of the file's own, which stand at its end.
    fn code_without_tests(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut gated = false;
        self.code().take_while(move |(_, line)| {
            let ends = gated && line.starts_with("mod tests {");
            gated = line.trim() == "#[cfg(test)]";
            !ends
        })
    }
}

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files under some folders whose names end so.
fn files(folders: &[&str], extension: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut left: Vec<PathBuf> = folders.iter().map(|folder| top().join(folder)).collect();
    while let Some(folder) = left.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the project") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                let text = std::fs::read_to_string(&path).expect("a file of the project");
                let path = path.strip_prefix(top()).expect("inside the project").to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no file in {folders:?}");
    found
}

/// All of the project's Rust.
fn rust() -> Vec<Source> {
    files(&["src", "block", "vhost", "tests"], "rs")
}

/// Fails with all places where a rule is broken.
#[track_caller]
fn none(broken: impl IntoIterator<Item = String>, rule: &str) {
    let mut report = String::new();
    for place in broken {
        let _ = write!(report, "\n  {place}");
    }
    assert!(report.is_empty(), "{rule}:{report}");
}

/// The places, outside comments, where one of the words stands.
fn places(source: &Source, without_tests: bool, words: &[&str]) -> Vec<String> {
    let lines: Box<dyn Iterator<Item = (usize, &str)>> =
        if without_tests { Box::new(source.code_without_tests()) } else { Box::new(source.code()) };
    lines
        .filter(|(_, line)| words.iter().any(|word| line.contains(word)))
        .map(|(number, line)| format!("{}:{number}: {}", source.path, line.trim()))
        .collect()
}

#[test]
fn the_block_layer_knows_nothing_of_virtio() {
    let sources = files(&["block"], "rs").into_iter().chain(files(&["block"], "toml"));
    let lower = sources.map(|source| Source { text: source.text.to_lowercase(), ..source });
    let broken: Vec<String> = lower.flat_map(|source| places(&source, false, &["virtio", "vhost"])).collect();
    none(broken, "block/ names virtio or vhost");
}

#[test]
fn the_device_model_knows_only_backends_and_loops() {
    let words = ["blockport_block::options", "blockport_block::drivers", "Graph", "blockport_block::Node"];
    let sources = files(&["vhost"], "rs").into_iter().filter(|source| !source.is_test());
    let broken: Vec<String> = sources.flat_map(|source| places(&source, true, &words)).collect();
    none(broken, "vhost/ knows of options, the graph, nodes or drivers");
}

#[test]
fn unsafe_code_stands_in_few_files_each_with_a_reason() {
    let mut found: Vec<String> = Vec::new();
    for source in rust() {
        let allowed = source.text.lines().filter(|line| line.trim_start().starts_with('#'));
        let allowed: Vec<&str> = allowed.filter(|line| line.contains("allow(unsafe_code)")).collect();
        if !allowed.is_empty() && source.path != "tests/architecture.rs" {
            found.push(source.path);
        }
    }
    let listed: Vec<&str> = UNSAFE.iter().map(|(path, _)| *path).collect();
    assert_eq!(found, listed, "the files that allow unsafe code, and those that may");
    assert!(UNSAFE.iter().all(|(_, reason)| !reason.is_empty()));
}

#[test]
fn the_document_marks_the_files_with_unsafe_code() {
    let document = std::fs::read_to_string(top().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let mut marked: Vec<&str> = Vec::new();
    // `name.rs` **[u]**
    for part in document.split("` **[u]**") {
        marked.extend(part.rsplit('`').next().filter(|name| name.ends_with(".rs")));
    }
    let missing = UNSAFE.iter().filter(|(path, _)| !marked.iter().any(|name| path.ends_with(name)));
    none(missing.map(|(path, _)| path.to_string()), "ARCHITECTURE.md does not mark");
    let surplus = marked.iter().filter(|name| !UNSAFE.iter().any(|(path, _)| path.ends_with(**name)));
    none(surplus.map(|name| name.to_string()), "ARCHITECTURE.md marks without a reason");
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut broken = Vec::new();
    for source in rust().iter().filter(|source| source.path != "tests/architecture.rs") {
        let lines: Vec<&str> = source.text.lines().collect();
        for (number, line) in source.code() {
            if !line.contains("unsafe {") && !line.contains("unsafe impl") {
                continue;
            }
            // The comment may stand before the statement that the block is in.
            let mut code_between = 0;
            let explained = lines[..number].iter().rev().skip(1).find_map(|before| {
                let before = before.trim_start();
                if before.starts_with("//") {
                    return before.contains("SAFETY").then_some(true);
                }
                code_between += 1;
                (code_between > 3).then_some(false)
            });
            if explained != Some(true) && !lines[number - 1].contains("SAFETY") {
                broken.push(format!("{}:{number}", source.path));
            }
        }
    }
    none(broken, "unsafe without a SAFETY comment");
}

#[test]
fn every_file_begins_with_what_it_is() {
    let broken = rust().into_iter().filter(|source| !source.text.starts_with("//! "));
    none(broken.map(|source| source.path), "files without a //! header");
}

#[test]
fn what_is_for_tests_stands_in_tests() {
    let sources = files(&["block", "vhost"], "rs").into_iter().filter(|source| !source.is_test());
    none(sources.flat_map(|source| places(&source, true, FOR_TESTS)), "these are for tests");
}

#[test]
fn every_module_of_tests_is_part_of_the_binary() {
    let main = std::fs::read_to_string(top().join("tests/main.rs")).expect("tests/main.rs");
    let mut missing = Vec::new();
    for entry in std::fs::read_dir(top().join("tests")).expect("tests") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let is_module = path.extension().is_some_and(|found| found == "rs") || path.join("mod.rs").exists();
        if is_module && name != "main" && !main.lines().any(|line| line == format!("mod {name};")) {
            missing.push(name);
        }
    }
    none(missing, "tests/main.rs lacks the mod line of");
}

#[test]
fn the_tests_of_drivers_run_on_both_engines() {
    let modules = |path: &str| {
        let main = std::fs::read_to_string(top().join(path)).expect("the list of its modules");
        main.lines().filter(|line| line.starts_with("mod ")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(modules("block/tests/drivers/main.rs"), modules("block/tests/drivers_threads/main.rs"));
}

#[test]
fn every_driver_is_documented_and_covered_by_the_conformance_suite() {
    let fixtures = std::fs::read_to_string(top().join("block/testing/fixtures.rs")).expect("the fixtures");
    for row in DRIVERS {
        assert!(!row.summary.is_empty(), "{} has no summary", row.name);
        assert!(!row.options.is_empty(), "{} has no option", row.name);
        for (option, meaning) in row.options {
            assert!(!option.is_empty() && !meaning.is_empty(), "{}: option \"{option}\" has no meaning", row.name);
        }
        assert!(fixtures.contains(&format!("\"{}\"", row.name)), "{} has no fixture", row.name);
    }
}

#[test]
fn every_dependency_says_what_it_is_for() {
    let manifests = ["Cargo.toml", "block/Cargo.toml", "vhost/Cargo.toml", "tests/reference/Cargo.toml"];
    let mut broken = Vec::new();
    for manifest in manifests {
        let text = std::fs::read_to_string(top().join(manifest)).expect("a manifest");
        let (mut dependencies, mut explained) = (false, false);
        for (at, line) in text.lines().enumerate() {
            if line.starts_with('[') {
                dependencies = line.trim_end_matches(']').ends_with("dependencies");
            }
            let is_entry = dependencies && line.contains('=') && !line.starts_with('#');
            let ours = line.contains("workspace = true") || line.contains("path = ");
            if is_entry && !explained && !ours {
                broken.push(format!("{manifest}:{}: {line}", at + 1));
            }
            explained = line.starts_with("# ");
        }
    }
    none(broken, "a dependency without a comment above it that says why");
}

#[test]
fn no_file_grows_long() {
    for source in rust() {
        let lines = source.text.lines().count();
        let most = LONGER.iter().find(|(path, _)| *path == source.path).map_or(LINES_MAX, |(_, most)| *most);
        assert!(lines <= most, "{} has {lines} lines, and may have {most}: split it", source.path);
    }
    let shorter = LONGER.iter().filter(|(path, _)| {
        let text = std::fs::read_to_string(top().join(path)).unwrap_or_default();
        text.lines().count() <= LINES_MAX
    });
    none(shorter.map(|(path, _)| path.to_string()), "no longer needs its exception");
}

#[test]
fn the_document_of_the_architecture_stays_short() {
    let document = std::fs::read_to_string(top().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    assert!(document.lines().count() <= 250, "{} lines", document.lines().count());
}

#[test]
fn the_top_level_is_fixed() {
    let entries = std::fs::read_dir(top()).expect("the project");
    let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    // What begins with a dot is an editor's, a tool's or git's.
    let surplus: Vec<String> =
        names.filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str())).collect();
    none(surplus, "these do not belong at the top of the project");
}
