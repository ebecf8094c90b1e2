//! `blockport io` beside qemu-io: scripts that both carry out, with the same output, exit status and image.
//!
//! A script (`NN-name.io`) has lines of three kinds before its commands: `# ` is a comment, `$ ` has qemu-img prepare
//! something, `@ ` has the arguments. Each further line is a command. How long things took is masked.

use std::path::{Path, PathBuf};

use crate::img::{Place, Ran};

struct Script {
    name: String,
    preparations: Vec<Vec<String>>,
    args: Vec<String>,
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

impl Script {
    fn read(path: &Path) -> Self {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let mut script = Self { name, preparations: Vec::new(), args: Vec::new() };
        let text = std::fs::read_to_string(path).expect("a script");
        let mut commands = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            match line.split_at_checked(2) {
                Some(("$ ", rest)) => script.preparations.push(words(rest)),
                Some(("@ ", rest)) => script.args = words(rest),
                _ => commands.extend(["-c".to_owned(), line.to_owned()]),
            }
        }
        script.args.splice(0..0, commands);
        script
    }
}

/// All scripts, in order.
fn scripts() -> Vec<Script> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/io");
    let entries = std::fs::read_dir(folder).expect("the folder of scripts");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "io"));
    paths.sort();
    paths.iter().map(|path| Script::read(path)).collect()
}

/// Without what differs from run to run, and from program to program.
fn masked(text: &str) -> String {
    let line = |line: &str| {
        let line = line.strip_prefix("qemu-io: ").or(line.strip_prefix("blockport: ")).unwrap_or(line);
        if let Some((what, _)) = line.split_once(" ops; ") {
            return format!("{what} ops; TIMES\n");
        }
        let fields: Vec<&str> = line.split(',').collect();
        match fields.as_slice() {
            [total, count, _, _, _] if total.parse::<u64>().is_ok() => format!("{total},{count},TIMES\n"),
            _ => format!("{line}\n"),
        }
    };
    text.lines().map(line).collect()
}

/// What a program made of a script, and where.
fn run(script: &Script, ours: bool) -> Option<(Place, Ran)> {
    let place = Place::new();
    for preparation in &script.preparations {
        if !place.qemu_img(&preparation.iter().map(String::as_str).collect::<Vec<_>>()) {
            return None;
        }
    }
    let args: Vec<&str> = script.args.iter().map(String::as_str).collect();
    let ran = if ours { Some(place.io(&args)) } else { place.qemu("qemu-io", &args) };
    ran.map(|ran| (place, ran))
}

#[test]
fn scripts_say_and_do_what_they_do_under_qemu_io() {
    let scripts = scripts();
    assert!(scripts.len() >= 30, "{} scripts", scripts.len());
    let mut differences = String::new();
    for script in &scripts {
        let (Some((their_place, theirs)), Some((our_place, ours))) = (run(script, false), run(script, true)) else {
            return;
        };
        for (what, ours, theirs) in [
            ("output", masked(&ours.out), masked(&theirs.out)),
            ("errors", masked(&ours.err), masked(&theirs.err)),
            ("status", ours.status.to_string(), theirs.status.to_string()),
        ] {
            if ours != theirs {
                differences += &format!("--- {}, {what}: ours\n{ours}\n--- theirs\n{theirs}\n", script.name);
            }
        }
        if script.preparations.is_empty() {
            continue;
        }
        let format = if script.args.iter().any(|word| word == "qcow2") { "qcow2" } else { "raw" };
        let theirs = their_place.path("disk").to_string_lossy().into_owned();
        let compare = ["compare", "-f", format, "-F", format, "disk", &theirs];
        let check = ["check", "-q", "-f", format, "disk"];
        for words in [&compare[..], &check].iter().take(if format == "qcow2" { 2 } else { 1 }) {
            let ran = our_place.qemu("qemu-img", words).expect("installed");
            if ran.status != 0 {
                differences += &format!("--- {}, image: {}{}\n", script.name, ran.out, ran.err);
            }
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn commands_are_read_from_standard_input() {
    let place = Place::new();
    place.raw("disk.raw", 1);
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_blockport"))
        .args(["io", "disk.raw"])
        .current_dir(place.path("."))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("our own program");
    let mut input = child.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut input, b"write -P 3 0 4k\n\nlength\nquit\nlength\n").expect("it reads");
    drop(input);
    let output = child.wait_with_output().expect("it ends");
    let text = masked(&String::from_utf8_lossy(&output.stdout));
    assert_eq!(text, "wrote 4096/4096 bytes at offset 0\n4 KiB, 1 ops; TIMES\n1 MiB\n");
    assert!(output.status.success());
    assert!(std::fs::read(place.path("disk.raw")).expect("it exists")[..4096].iter().all(|byte| *byte == 3));
}
