//! `blockport img` beside qemu-img: the same answers about the same images, images that the other one reads, and what is
//! refused.

mod answers;
mod chains;
mod convert;
mod inside;
mod refusals;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A directory for images, on a real file system.
pub struct Place(TempDir);

/// What a program did.
pub struct Ran {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().expect("it was not killed"),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}{}", self.out, self.err);
        self.out
    }

    /// Fails with that status, and says each of these.
    #[track_caller]
    pub fn fails(self, status: i32, says: &[&str]) {
        assert_eq!(self.status, status, "{}{}", self.out, self.err);
        for words in says {
            assert!(self.err.contains(words), "{words:?} is missing in {:?}", self.err);
        }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("img-").tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        Self(dir.expect("a directory for images"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `blockport img` here.
    pub fn img(&self, words: &[&str]) -> Ran {
        self.run(env!("CARGO_BIN_EXE_blockport"), &[&["img"], words].concat()).expect("our own program")
    }

    /// Runs `blockport io` here.
    pub fn io(&self, words: &[&str]) -> Ran {
        self.run(env!("CARGO_BIN_EXE_blockport"), &[&["io"], words].concat()).expect("our own program")
    }

    /// Runs one of QEMU's programs here. `None`, and a note, where there is none.
    pub fn qemu(&self, program: &str, words: &[&str]) -> Option<Ran> {
        let provided = std::env::var("BLOCKPORT_PROVISION").map(|place| format!("{place}/programs/{program}"));
        let command = provided.ok().filter(|path| Path::new(path).exists()).unwrap_or_else(|| program.to_owned());
        let ran = self.run(&command, words);
        if ran.is_none() {
            eprintln!("SKIP comparison-with-{program}: it is not installed");
        }
        ran
    }

    fn run(&self, program: &str, words: &[&str]) -> Option<Ran> {
        Command::new(program).args(words).current_dir(self.0.path()).output().ok().map(Ran::from)
    }

    /// Runs qemu-img, which must succeed. False where there is none.
    #[track_caller]
    pub fn qemu_img(&self, words: &[&str]) -> bool {
        self.qemu("qemu-img", words).map(Ran::ok).is_some()
    }

    /// Has qemu-io write to an image. False where there is none.
    #[track_caller]
    pub fn write(&self, format: &str, image: &str, commands: &[&str]) -> bool {
        let mut words = vec!["-f", format];
        commands.iter().for_each(|command| words.extend(["-c", command]));
        words.push(image);
        self.qemu("qemu-io", &words).map(Ran::ok).is_some()
    }

    /// QEMU finds the image whole, and with the content of the other one.
    #[track_caller]
    pub fn same(&self, format: &str, image: &str, other_format: &str, other: &str) {
        if format == "qcow2" {
            self.qemu_img(&["check", "-q", "-f", format, image]);
        }
        if other_format == "qcow2" {
            self.qemu_img(&["check", "-q", "-f", other_format, other]);
        }
        self.qemu_img(&["compare", "-f", format, "-F", other_format, image, other]);
    }

    /// A raw image of `mib` MiB with data that does not compress, data that does, and holes.
    pub fn raw(&self, name: &str, mib: usize) {
        let mut content = vec![0; mib << 20];
        for (at, part) in content.chunks_mut(1 << 18).enumerate() {
            match at % 5 {
                0 => part.copy_from_slice(&crate::image::pattern(at as u32, part.len())),
                1 => part.fill(at as u8 + 1),
                2 => part[70_000..90_000].fill(7),
                _ => {}
            }
        }
        let file = std::fs::File::create(self.path(name)).expect("room for an image");
        file.set_len(content.len() as u64).expect("room");
        for (at, part) in content.chunks(4096).enumerate().filter(|(_, part)| part.iter().any(|byte| *byte != 0)) {
            std::os::unix::fs::FileExt::write_all_at(&file, part, at as u64 * 4096).expect("room");
        }
    }
}
