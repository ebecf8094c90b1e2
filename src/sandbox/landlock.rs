//! Landlock: the part of the file system that can still be opened, made or removed. What is open stays open. It decides
//! nothing about system calls.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};
use blockport_block::{OpenError, OpenResult};
use serde_json::Value;

use crate::options::{ChardevKind, Config, MetricsAddress, SandboxMode, SocketAddress, Step};

/// The newest version of the kernel's interface that is used where it is there (Linux 6.15).
const WANTED: ABI = ABI::V7;
/// The oldest that strict mode takes: the first that covers truncation (Linux 6.2).
const NEEDED: ABI = ABI::V3;

/// What stays within reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Paths {
    /// Images that are read and written, to be opened again when access changes.
    images: Vec<PathBuf>,
    /// Images that are read only.
    read_only: Vec<PathBuf>,
    /// Folders of our own sockets and pidfile, which are removed at the end.
    ours: Vec<PathBuf>,
    /// Folders whose images may be opened later.
    allowed: Vec<PathBuf>,
    /// A monitor may open any image, as nobody said which.
    any: bool,
}

impl Paths {
    /// Those that a configuration names.
    pub(super) fn of(config: &Config) -> Self {
        let mut paths = Self { allowed: config.sandbox.allow.clone(), ..Self::default() };
        paths.ours.extend(config.pidfile.as_deref().map(folder));
        paths.ours.extend(config.control.control.as_deref().map(folder));
        let monitor = config.steps.iter().any(|step| matches!(step, Step::Monitor(_)));
        paths.any = monitor && paths.allowed.is_empty() && config.sandbox.mode != SandboxMode::Strict;
        if let Some(MetricsAddress::Unix(path)) = &config.metrics {
            paths.ours.push(folder(path));
        }
        for step in &config.steps {
            match step {
                Step::Blockdev(options) => paths.add_images(&options.to_json(), false),
                Step::Export(export) => paths.add_socket(&export.socket),
                Step::Chardev(chardev) => {
                    if let ChardevKind::Listening { address, .. } = &chardev.kind {
                        paths.add_socket(address);
                    }
                }
                Step::Iothread(_) | Step::ThrottleGroup(_) | Step::Secret(_) | Step::Monitor(_) => {}
            }
        }
        let lists = [&mut paths.images, &mut paths.read_only, &mut paths.ours, &mut paths.allowed];
        for path in lists.into_iter().flatten() {
            *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
        }
        paths
    }

    fn add_socket(&mut self, address: &SocketAddress) {
        if let SocketAddress::Unix { path, .. } = address {
            self.ours.push(folder(path));
        }
    }

    /// Takes the `filename` of a node, and those of the nodes defined in it.
    fn add_images(&mut self, node: &Value, read_only: bool) {
        let Value::Object(options) = node else { return };
        let on = |value: &Value| *value == Value::Bool(true) || *value == "on";
        let read_only = options.get("read-only").map_or(read_only, on);
        if let Some(Value::String(path)) = options.get("filename") {
            if read_only { &mut self.read_only } else { &mut self.images }.push(path.into());
        }
        for value in options.values() {
            self.add_images(value, read_only);
        }
    }
}

/// # Errors
/// A folder that is to be allowed is not there, or is none.
pub(super) fn check_allowed(folders: &[PathBuf]) -> OpenResult {
    for folder in folders {
        let refuse = |why: &dyn std::fmt::Display| OpenError(format!("--sandbox-allow {}: {why}", folder.display()));
        let found = std::fs::metadata(folder).map_err(|e| refuse(&e))?;
        if !found.is_dir() {
            return Err(refuse(&"it is no folder"));
        }
    }
    Ok(())
}

fn folder(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => ".".into(),
    }
}

/// The rules, as the kernel takes them.
///
/// # Errors
/// The kernel has no Landlock, or (strict) an old one.
pub(super) fn rules(paths: &Paths, strict: bool) -> Result<RulesetCreated, String> {
    let said = |error: ::landlock::RulesetError| error.to_string();
    let mut ruleset = Ruleset::default();
    if strict {
        ruleset = ruleset.set_compatibility(CompatLevel::HardRequirement);
        ruleset = ruleset.handle_access(AccessFs::from_all(NEEDED)).map_err(said)?;
        ruleset = ruleset.set_compatibility(CompatLevel::BestEffort);
    }
    let ruleset = ruleset.handle_access(AccessNet::from_all(WANTED)).and_then(|ruleset| ruleset.scope(Scope::Signal));
    if paths.any {
        tracing::info!("sandbox: all files stay within reach of the monitor; --sandbox-allow FOLDER limits that");
        return ruleset.and_then(Ruleset::create).map_err(said).and_then(if_there);
    }
    let ruleset = ruleset.and_then(|ruleset| ruleset.handle_access(AccessFs::from_all(WANTED)));
    let mut ruleset =
        ruleset.and_then(|ruleset| ruleset.scope(Scope::AbstractUnixSocket)).and_then(Ruleset::create).map_err(said)?;

    let read = BitFlags::from(AccessFs::ReadFile);
    let image = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let ours = AccessFs::MakeSock | AccessFs::RemoveFile;
    let allowed = image | AccessFs::ReadDir | AccessFs::MakeReg | ours;
    let null = [PathBuf::from("/dev/null")];
    let lists = [
        (null.as_slice(), read | AccessFs::WriteFile),
        (&paths.images, image),
        (&paths.read_only, read | AccessFs::IoctlDev),
        (&paths.ours, ours),
        (&paths.allowed, allowed),
    ];
    for (path, access) in lists.into_iter().flat_map(|(list, access)| list.iter().map(move |path| (path, access))) {
        let open = match PathFd::new(path) {
            Ok(open) => open,
            // What is not there cannot be opened, whatever the rules; the start fails on it by and by.
            Err(_) => continue,
        };
        // A right that the kernel does not know, it does not withhold either.
        ruleset = ruleset.add_rule(PathBeneath::new(open, access)).map_err(said)?;
    }
    if_there(ruleset)
}

fn if_there(ruleset: RulesetCreated) -> Result<RulesetCreated, String> {
    let copy = ruleset.try_clone().map_err(|e| e.to_string())?;
    match Option::<OwnedFd>::from(copy) {
        Some(_) => Ok(ruleset),
        None => Err("the kernel does not have it, or it is switched off".into()),
    }
}

/// The rules with what is open by now, to be opened again with the same access: backing files, which nobody named.
pub(super) fn with_open_files(mut ruleset: RulesetCreated) -> Option<OwnedFd> {
    for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        let path = entry.path();
        let kind = std::fs::metadata(&path).map(|found| found.file_type());
        if !kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device()) {
            continue;
        }
        let Ok(open) = PathFd::new(&path) else { continue };
        // The link's own mode tells the access of the descriptor.
        let writable = std::fs::symlink_metadata(&path).is_ok_and(|link| link.mode() & 0o200 != 0);
        let read = AccessFs::ReadFile | AccessFs::IoctlDev;
        let access = if writable { read | AccessFs::WriteFile | AccessFs::Truncate } else { read };
        // Files that are in no folder, as memory files are, take no rule and need none.
        let _ = (&mut ruleset).add_rule(PathBeneath::new(open, access));
    }
    ruleset.into()
}
