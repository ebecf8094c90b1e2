//! The pidfile: a file with our process id, locked while we live and removed at the end.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use blockport_block::{OpenError, OpenResult};

/// The file with our process id, locked while we live and removed at the end.
pub struct Pidfile {
    path: PathBuf,
    file: File,
}

impl Pidfile {
    /// Writes and locks it.
    ///
    /// # Errors
    /// It cannot be written, or another process holds it.
    pub fn write(path: PathBuf) -> OpenResult<Self> {
        let refuse = |why: String| OpenError(format!("pidfile {}: {why}", path.display()));
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(|e| refuse(e.to_string()))?;
        file.try_lock().map_err(|_| refuse("another process holds it".into()))?;
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(|e| refuse(e.to_string()))?;
        // Its directory may be relative to where we were started, and we may leave there.
        Ok(Self { path: std::path::absolute(&path).unwrap_or(path), file })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Only our own: somebody may have put another one there.
        let ours = self.file.metadata().ok().zip(std::fs::metadata(&self.path).ok());
        if ours.is_some_and(|(ours, there)| (ours.dev(), ours.ino()) == (there.dev(), there.ino())) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
