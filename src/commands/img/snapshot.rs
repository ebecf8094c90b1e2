//! `img snapshot`: snapshots inside an image. It owns how they are listed.

use blockport_block::drivers::qcow2::{self, SnapshotInfo};
use clap::Args;

use super::image::{ImageArgs, Opening};
use super::task::Session;
use super::units::rounded;
use super::{Outcome, say};

/// The arguments, with their help.
#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("operation").args(["list", "create", "apply", "delete"])))]
pub struct SnapshotArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// List the snapshots (what is done unless something else is asked)
    #[arg(short, long)]
    list: bool,

    /// Take a snapshot of that name
    #[arg(short, long, value_name = "SNAPSHOT")]
    create: Option<String>,

    /// Make the disk what it was at the snapshot of that id or name
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Option<String>,

    /// Delete the snapshot of that id or name
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Option<String>,

    /// Say nothing
    #[arg(short, long)]
    quiet: bool,

    /// The image
    filename: String,
}

impl SnapshotArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let session = Session::new()?;
        let changes = self.create.is_some() || self.apply.is_some() || self.delete.is_some();
        let image =
            session.open(&self.image.name(&self.filename), Opening { writable: changes, ..self.image.reading() })?;
        if image.node.driver_name() != "qcow2" {
            if !changes {
                return Ok(0);
            }
            let format = image.node.driver_name();
            return Err(format!("\"{}\": the format {format} has no snapshots", self.filename).into());
        }
        match (&self.create, &self.apply, &self.delete) {
            (Some(name), ..) => {
                qcow2::snapshot_create(&image.node, name)?;
            }
            (_, Some(name), _) => qcow2::snapshot_apply(&image.node, name)?,
            (.., Some(name)) => qcow2::snapshot_delete(&image.node, name)?,
            _ => {
                let snapshots = qcow2::snapshots(&image.node)?;
                if !snapshots.is_empty() {
                    say(table(&snapshots))?;
                }
            }
        }
        session.close(image)?;
        Ok(0)
    }
}

/// The snapshots for people.
pub fn table(snapshots: &[SnapshotInfo]) -> String {
    let mut text = "Snapshot list:\n".to_owned();
    let heads = ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"].map(str::to_owned);
    let rows = snapshots.iter().map(|snapshot| {
        let seconds = snapshot.vm_clock_nsec / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            snapshot.vm_clock_nsec / 1_000_000 % 1000
        );
        [
            snapshot.id.clone(),
            snapshot.name.clone(),
            rounded(snapshot.vm_state_bytes),
            date(snapshot.date_sec),
            clock,
            snapshot.icount.map_or("--".to_owned(), |count| count.to_string()),
        ]
    });
    for [id, name, size, date, clock, count] in std::iter::once(heads).chain(rows) {
        text += &format!("{id:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {count:>10}\n");
    }
    text
}

/// A moment in the time of this host.
fn date(seconds: u32) -> String {
    let time = libc::time_t::from(seconds as i32);
    match nix_time(time) {
        Some(text) => text,
        None => seconds.to_string(),
    }
}

/// Universal time, as the standard library knows no zones.
fn nix_time(seconds: libc::time_t) -> Option<String> {
    let seconds = u64::try_from(seconds).ok()?;
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Years that begin in March end with the leap day.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day = shifted % 146_097;
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    Some(format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_796_087_600), "2026-12-01 01:13:20");
    }
}
