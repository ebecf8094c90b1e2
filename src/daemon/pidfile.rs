//! The pidfile: a file with our process id, locked while we live and removed at the end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use blockport_block::{OpenError, OpenResult};

/// The file with our process id, locked while we live and removed at the end.
pub struct Pidfile {
    path: PathBuf,
    file: File,
    /// Whether the file is ours to remove.
    ours: bool,
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
        Ok(Self { path: std::path::absolute(&path).unwrap_or(path), file, ours: true })
    }
}

impl Pidfile {
    /// The same file for a process after us, with our lock.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub fn share(&self) -> io::Result<(PathBuf, OwnedFd)> {
        Ok((self.path.clone(), self.file.try_clone()?.into()))
    }

    /// The file of the process before us, with its lock. It has that process's id in it until [`Pidfile::settle`], and
    /// is not removed before.
    pub fn adopt(path: PathBuf, file: OwnedFd) -> Self {
        Self { path, file: file.into(), ours: false }
    }

    /// Writes our process id into an adopted file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn settle(&mut self) -> OpenResult {
        self.ours = true;
        let pid = format!("{}\n", std::process::id());
        let written = self.file.write_all_at(pid.as_bytes(), 0).and_then(|()| self.file.set_len(pid.len() as u64));
        written.map_err(|e| OpenError(format!("pidfile {}: {e}", self.path.display())))
    }

    /// It belongs to a process after us.
    pub fn give_away(&mut self) {
        self.ours = false;
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Only our own: somebody may have put another one there.
        if !self.ours {
            return;
        }
        let ours = self.file.metadata().ok().zip(std::fs::metadata(&self.path).ok());
        if ours.is_some_and(|(ours, there)| (ours.dev(), ours.ino()) == (there.dev(), there.ino())) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
