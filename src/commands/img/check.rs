//! `img check`: whether what an image says of itself is true. It owns the report; the driver checks.

use blockport_block::drivers::qcow2::{self, CheckReport, Repair};
use clap::Args;
use serde_json::{Map, Value};

use super::image::{ImageArgs, Opening};
use super::task::Session;
use super::{CacheName, Outcome, OutputArgs, complain, pretty, say};

/// The exit statuses besides 0.
const ERRORS: u8 = 2;
const LEAKS: u8 = 3;
const NOT_SUPPORTED: u8 = 63;

/// The arguments, with their help.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit status: 0 all is well, 1 the check could not be made, 2 there are errors, 3 there are leaks and no \
errors, 63 the format has nothing to be checked."
)]
pub struct CheckArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// Put right what can be: leaks, or all
    #[arg(short, long, value_name = "WHAT", num_args = 0..=1, default_missing_value = "all")]
    repair: Option<String>,

    /// Say nothing; the exit status tells
    #[arg(short, long)]
    quiet: bool,

    /// How the host caches the image
    #[arg(short = 'T', long, value_name = "MODE", value_enum, default_value = "writeback")]
    cache: CacheName,

    #[command(flatten)]
    output: OutputArgs,

    /// The image
    filename: Option<String>,
}

impl CheckArgs {
    /// Carries it out.
    pub fn run(mut self) -> Outcome {
        let mut repair = Repair::Nothing;
        if let Some(what) = self.repair.take() {
            repair = match what.as_str() {
                "leaks" => Repair::Leaks,
                "all" => Repair::All,
                // Before the image, without a value.
                _ if self.filename.is_none() => {
                    self.filename = Some(what);
                    Repair::All
                }
                _ => return Err(format!("--repair must be leaks or all, not \"{what}\"").into()),
            };
        }
        let filename = self.filename.take().ok_or("the image is missing")?;
        let session = Session::new()?;
        let name = self.image.name(&filename);
        let for_repair = repair == Repair::All;
        let opening = Opening {
            writable: repair != Repair::Nothing,
            for_repair,
            cache: self.cache,
            alone: false,
            ..self.image.reading()
        };
        let image = session.open(&name, opening)?;
        let format = image.node.driver_name();
        if format != "qcow2" {
            if !self.quiet {
                complain(format_args!("\"{filename}\": the format {format} has nothing to be checked"));
            }
            return Ok(NOT_SUPPORTED);
        }
        let report = match repair {
            Repair::Leaks => {
                let report = qcow2::check(&image.node, false)?;
                let repairable = report.errors == 0 && report.leaks > 0;
                if repairable { qcow2::check_and_repair(&image.node, repair)? } else { report }
            }
            repair => qcow2::check_and_repair(&image.node, repair)?,
        };
        if self.output.is_json() {
            say(pretty(&as_json(&report, &filename, format))?)?;
        } else if !self.quiet {
            say(as_text(&report))?;
        }
        session.close(image)?;
        Ok(match report {
            CheckReport { errors: 1.., .. } => ERRORS,
            CheckReport { leaks: 1.., .. } => LEAKS,
            _ => 0,
        })
    }
}

fn as_json(report: &CheckReport, filename: &str, format: &str) -> Value {
    let mut answer = Map::new();
    answer.insert("filename".into(), filename.into());
    answer.insert("format".into(), format.into());
    answer.insert("check-errors".into(), 0.into());
    for (key, number) in [
        ("image-end-offset", report.image_end),
        ("corruptions", report.errors),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.errors_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if number > 0 {
            answer.insert(key.into(), number.into());
        }
    }
    answer.into()
}

fn as_text(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.errors_fixed > 0 || report.leaks_fixed > 0 {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             The repaired image was checked once more:\n",
            report.leaks_fixed, report.errors_fixed
        );
    }
    if report.errors == 0 && report.leaks == 0 {
        text += "No errors were found on the image.\n";
    }
    if report.errors > 0 {
        text += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or become so when the image is written.\n",
            report.errors
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\nThey take space, and do no harm to data.\n",
            report.leaks
        );
    }
    let percent = |part: u64, all: u64| part as f64 * 100.0 / all as f64;
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        text += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end > 0 {
        text += &format!("Image end offset: {}\n", report.image_end);
    }
    text
}
