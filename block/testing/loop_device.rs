//! LoopDevice: a block device over a file, where the machine has them and we are root.

use std::process::Command;

/// A block device over a file, detached when it is dropped.
pub struct LoopDevice(String);

impl LoopDevice {
    /// Makes one of `path`; `more` are further arguments of losetup. The error says why there is none here.
    pub fn new(path: &str, more: &[&str]) -> Result<Self, String> {
        let made = Command::new("losetup").args(["--find", "--show"]).args(more).arg(path).output();
        let made = made.map_err(|error| format!("losetup: {error}"))?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).trim().to_owned());
        }
        Ok(Self(String::from_utf8_lossy(&made.stdout).trim().to_owned()))
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.0
    }

    /// Has the kernel look at the size of the file again.
    pub fn refresh(&self) {
        let refreshed = Command::new("losetup").args(["--set-capacity", &self.0]).status().expect("it made the device");
        assert!(refreshed.success());
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
