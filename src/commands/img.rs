//! `blockport img`: images made, looked at, changed and converted, in the language of qemu-img.
//!
//! This file owns the verbs and their exit statuses. Each verb is a file; `task.rs` opens images and runs the work,
//! `image.rs` knows how images are named, `target.rs` makes new ones.

mod amend;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod copy;
mod create;
mod dd;
mod format;
mod image;
mod info;
mod map;
mod measure;
mod progress;
mod rebase;
mod resize;
mod snapshot;
mod target;
mod task;
mod units;

use std::io::Write;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

pub use image::{CacheName, ImageName, Opening};
pub use info::format_details;
pub use task::{BUFFER_ALIGNMENT, Image, Session};
pub use units::cut_size;

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct ImgArgs {
    #[command(subcommand)]
    verb: Verb,
}

/// What can be done.
#[derive(Subcommand, Debug)]
enum Verb {
    /// Change properties of an image
    Amend(amend::AmendArgs),
    /// Make, change and remove the bitmaps of an image, which say what was written
    Bitmap(bitmap::BitmapArgs),
    /// Check an image; with --repair, put right what can be
    Check(check::CheckArgs),
    /// Write what an image holds to the image behind it
    Commit(commit::CommitArgs),
    /// Compare the contents of two images
    Compare(compare::CompareArgs),
    /// Copy images to a new one, in another format
    Convert(convert::ConvertArgs),
    /// Make a new image
    Create(create::CreateArgs),
    /// Copy blocks of an image to a new one
    Dd(dd::DdArgs),
    /// Tell what an image is
    Info(info::InfoArgs),
    /// Tell where the contents of an image are
    Map(map::MapArgs),
    /// Tell how large a new image will be
    Measure(measure::MeasureArgs),
    /// Put another image behind an image
    Rebase(rebase::RebaseArgs),
    /// Change the size of an image
    Resize(resize::ResizeArgs),
    /// List, take, apply and delete snapshots inside an image
    Snapshot(snapshot::SnapshotArgs),
}

/// Why a verb was not carried out.
#[derive(Debug)]
pub struct Failure {
    status: u8,
    text: String,
}

/// What a verb gives: its exit status, or why it was not carried out.
pub type Outcome = Result<u8, Failure>;

impl Failure {
    /// The same with another exit status than 1.
    #[must_use]
    pub fn with_status(self, status: u8) -> Self {
        Self { status, ..self }
    }

    /// The same with what was being done in front.
    #[must_use]
    pub fn context(self, context: impl std::fmt::Display) -> Self {
        Self { text: format!("{context}: {}", self.text), ..self }
    }
}

impl<T: Into<Box<dyn std::error::Error>>> From<T> for Failure {
    fn from(error: T) -> Self {
        Self { status: 1, text: error.into().to_string() }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// How a verb answers.
#[derive(Args, Debug, Clone, Copy)]
pub struct OutputArgs {
    /// How to answer
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "human")]
    output: OutputKind,

    /// The same as --output json
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum OutputKind {
    /// For people
    Human,
    /// For programs, in the shape of qemu-img's answers
    Json,
}

impl OutputArgs {
    fn is_json(self) -> bool {
        self.json || self.output == OutputKind::Json
    }
}

/// The exit status of a command line that cannot be understood. Of `compare` it must not be the one that says that images
/// differ.
pub fn usage_status(verb: Option<&str>) -> u8 {
    if verb == Some("compare") { 2 } else { 1 }
}

/// Carries a verb out. Returns the exit status; complaints have been printed.
pub fn run(args: ImgArgs) -> u8 {
    let outcome = match args.verb {
        Verb::Amend(args) => args.run(),
        Verb::Bitmap(args) => args.run(),
        Verb::Check(args) => args.run(),
        Verb::Commit(args) => args.run(),
        Verb::Compare(args) => args.run(),
        Verb::Convert(args) => args.run(),
        Verb::Create(args) => args.run(),
        Verb::Dd(args) => args.run(),
        Verb::Info(args) => args.run(),
        Verb::Map(args) => args.run(),
        Verb::Measure(args) => args.run(),
        Verb::Rebase(args) => args.run(),
        Verb::Resize(args) => args.run(),
        Verb::Snapshot(args) => args.run(),
    };
    match outcome {
        Ok(status) => status,
        Err(failure) => {
            complain(&failure);
            failure.status
        }
    }
}

/// Prints to standard error, as far as somebody reads it.
pub fn complain(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "blockport: {text}");
}

/// Prints to standard output.
pub fn say(text: impl std::fmt::Display) -> Result<(), Failure> {
    Ok(write!(std::io::stdout(), "{text}")?)
}

/// JSON with the indentation of qemu-img.
fn pretty(value: &Value) -> Result<String, Failure> {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    serde::Serialize::serialize(value, &mut serializer)?;
    out.push(b'\n');
    Ok(String::from_utf8_lossy(&out).into_owned())
}
