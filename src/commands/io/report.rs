//! Report: what is said of a request that was carried out, of bytes, and of errors. It owns the wording, which scripts read.

use std::time::Duration;

use blockport_block::BlockError;

use crate::commands::img::cut_size;

/// A request that was carried out.
pub struct Report {
    pub verb: &'static str,
    pub offset: u64,
    pub bytes: u64,
    pub total: u64,
    pub took: Duration,
    /// For programs, in one line.
    pub compact: bool,
}

impl Report {
    /// In two lines, or one.
    pub fn text(&self) -> String {
        let seconds = self.took.as_secs_f64().max(1e-9);
        let (speed, rate) = (self.total as f64 / seconds, 1.0 / seconds);
        let (whole, hundredths) = (self.took.as_secs(), self.took.subsec_millis() / 10);
        if self.compact {
            let time = format!("{}:{:02}:{:02}.{hundredths:02}", whole / 3600, whole / 60 % 60, whole % 60);
            return format!("{},1,{time},{speed:.3},{rate:.3}\n", self.total);
        }
        let time = match whole {
            0..60 => format!("{whole:02}.{hundredths:02} sec"),
            _ => format!("{}:{:02}:{:02}.{hundredths:02}", whole / 3600, whole / 60 % 60, whole % 60),
        };
        format!(
            "{} {}/{} bytes at offset {}\n{}, 1 ops; {time} ({}/sec and {rate:.4} ops/sec)\n",
            self.verb,
            self.total,
            self.bytes,
            self.offset,
            cut_size(self.total as f64),
            cut_size(speed),
        )
    }
}

/// Bytes, 16 a line.
pub fn dump(bytes: &[u8], offset: u64) -> String {
    let mut text = String::new();
    for (line, part) in bytes.chunks(16).enumerate() {
        text += &format!("{:08x}:  ", offset + line as u64 * 16);
        part.iter().for_each(|byte| text += &format!("{byte:02x} "));
        text.push(' ');
        text.extend(part.iter().map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' }));
        text.push('\n');
    }
    text
}

/// An error as the host would call it.
pub fn named(error: BlockError) -> String {
    let errno = match error {
        BlockError::OutOfRange => libc::EIO,
        BlockError::ReadOnly => libc::EPERM,
        BlockError::NoMedium => libc::ENOMEDIUM,
        BlockError::NotSupported => libc::ENOTSUP,
        BlockError::NoSpace => libc::ENOSPC,
        BlockError::Invalid(_) => libc::EINVAL,
        BlockError::Host(errno) => errno,
    };
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
