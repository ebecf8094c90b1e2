//! The side that takes over: what it asks for, and what it checks before it says that it serves.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockport_block::handover::{HandedFile, disk_identity, file_identity_of};
use blockport_block::{OpenError, OpenResult};
use blockport_vhost::handover::Descriptors;
use serde_json::Value;

use super::message::{ExportOffer, FromNew, FromOld, GuestSettings, Offer, SocketOffer, State, VERSION};
use super::sockets::{Handed, Sockets};
use super::wire;
use crate::daemon::{Export, Exports, export_settings};
use crate::options::{Config, Step};

/// How long the other process may take to answer; it waits for requests in flight.
const PATIENCE: Duration = Duration::from_secs(20);

/// A process that is being taken over.
pub struct Taking {
    socket: UnixStream,
    offers: Vec<ExportOffer>,
    pidfile: Option<(PathBuf, OwnedFd)>,
}

impl Taking {
    /// Asks what there is, and whether it is among what we are to serve. Returns its sockets, too.
    ///
    /// # Errors
    /// Nobody is there, or it has something that we have not, or not in this way. It goes on.
    pub fn begin(path: &Path, config: &Config) -> OpenResult<(Self, Sockets)> {
        let failed = |e: &dyn std::fmt::Display| OpenError(format!("--take-over {}: {e}", path.display()));
        let socket = UnixStream::connect(path).map_err(|e| failed(&e))?;
        check_user(&socket).map_err(|e| failed(&e))?;
        socket
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| socket.set_write_timeout(Some(PATIENCE)))
            .map_err(|e| failed(&e))?;
        let hello = FromNew::Hello { version: VERSION, program: env!("CARGO_PKG_VERSION").to_owned() };
        let (offer, descriptors) = ask(&socket, &hello).map_err(|e| failed(&e))?;
        let FromOld::Offer(offer) = offer else { return Err(failed(&"it does not say what it serves")) };
        let Offer { version, exports: offers, sockets, pidfile, .. } = offer;
        if version != VERSION {
            return Err(failed(&format_args!("it speaks version {version} of the hand-over, and this one {VERSION}")));
        }
        check_offers(&offers, config).map_err(|e| failed(&e))?;
        let mut descriptors = Descriptors::from(descriptors);
        let mut listening = Vec::new();
        for SocketOffer { file, tcp, descriptor } in sockets {
            let socket = descriptors.take(descriptor).map_err(|e| failed(&e))?;
            listening.push(Some(Handed { socket, file, tcp }));
        }
        let pidfile = match pidfile {
            Some(offer) => Some((offer.path, descriptors.take(offer.descriptor).map_err(|e| failed(&e))?)),
            None => None,
        };
        let of_exports: BTreeMap<_, _> = offers.iter().map(|offer| (offer.id.clone(), offer.socket)).collect();
        Ok((Self { socket, offers, pidfile }, Sockets::handed(listening, of_exports)))
    }

    /// Has the other process stop, and takes all that it knows: returns its image files, and puts what belongs to sockets
    /// there.
    ///
    /// # Errors
    /// It does not stop, or it says something else than before. It goes on.
    pub fn state(&self, sockets: &mut Sockets) -> OpenResult<Vec<HandedFile>> {
        let (state, descriptors) = ask(&self.socket, &FromNew::Ready)?;
        let FromOld::State(State { files, exports }) = state else {
            return Err(OpenError::new("it does not say where it stands"));
        };
        let mut descriptors = descriptors.into_iter();
        let mut take = |count: usize| -> OpenResult<Vec<OwnedFd>> {
            let taken: Vec<OwnedFd> = descriptors.by_ref().take(count).collect();
            if taken.len() == count { Ok(taken) } else { Err(OpenError::new("descriptors are missing")) }
        };
        let opened = take(files.len())?;
        let files = files.into_iter().zip(opened);
        let files = files.map(|(file, descriptor)| HandedFile { descriptor, flush_errno: file.flush_errno }).collect();
        if !exports.iter().map(|export| &export.id).eq(self.offers.iter().map(|offer| &offer.id)) {
            return Err(OpenError::new("its exports were changed meanwhile"));
        }
        let mut states = BTreeMap::new();
        for export in exports {
            let descriptors = Descriptors::from(take(export.descriptors)?);
            states.insert(export.id.clone(), (export, descriptors));
        }
        sockets.set_states(states);
        Ok(files)
    }

    /// Whether what we have opened is what was offered.
    ///
    /// # Errors
    /// It is something else.
    pub fn check(&self, exports: &Exports) -> OpenResult {
        self.offers.iter().try_for_each(|offer| {
            let about = |why: String| OpenError(format!("export \"{}\": {why}", offer.id));
            let export = exports.find(&offer.id).ok_or_else(|| about("it was not made".into()))?;
            if let Some(difference) = offer.settings.difference(&GuestSettings::from(export.settings())) {
                return Err(about(difference));
            }
            if is_active(export) && !offer.active {
                return Err(about("its node is inactive there, and must not be active here".into()));
            }
            let (length, disk) = medium(export)?;
            match (length == offer.length, disk == offer.disk) {
                (true, true) => Ok(()),
                (_, false) => Err(about(format!(
                    "it is another disk: {} there, and {} here",
                    offer.disk.join(", "),
                    disk.join(", ")
                ))),
                (false, true) => Err(about(format!(
                    "it has {} bytes there, and {} here",
                    offer.length.unwrap_or(0),
                    length.unwrap_or(0)
                ))),
            }
        })
    }

    /// The pidfile of the other process, if it is the one at this path.
    pub fn pidfile(&mut self, path: &Path) -> Option<(PathBuf, OwnedFd)> {
        let path = std::path::absolute(path).ok()?;
        self.pidfile.take_if(|(theirs, _)| *theirs == path)
    }

    /// Says that we serve. From here on it is so, whatever becomes of the other process.
    ///
    /// # Errors
    /// It has given up waiting, and goes on itself.
    pub fn commit(&self, sockets: &mut Sockets, pidfile: bool) -> OpenResult {
        let commit = FromNew::Commit { sockets: sockets.kept(), pidfile };
        if let Err(error) = wire::send(&self.socket, &commit, &[]) {
            // One that gives up says so. One that says nothing has died, and nobody but us can go on.
            match wire::receive::<FromOld>(&self.socket) {
                Ok((FromOld::Refused { why }, _)) => return Err(refused(&why)),
                Ok(_) => return Err(OpenError(format!("it does not hear us: {error}"))),
                Err(_) => tracing::warn!("the process that served until now has died; going on"),
            }
        }
        sockets.settle();
        Ok(())
    }
}

/// Length and identity of what an export serves; nothing without a medium.
///
/// # Errors
/// It cannot go to another process.
pub fn medium(export: &Export) -> OpenResult<(Option<u64>, Vec<String>)> {
    let Some(root) = export.backend().root() else { return Ok((None, Vec::new())) };
    Ok((Some(root.length()), disk_identity(&root)?))
}

/// Whether its medium may be used by this process.
pub fn is_active(export: &Export) -> bool {
    export.backend().root().is_none_or(|root| root.is_active())
}

fn ask(socket: &UnixStream, message: &FromNew) -> OpenResult<(FromOld, Vec<OwnedFd>)> {
    // One that refuses may say so before it is asked.
    let sent = wire::send(socket, message, &[]);
    match wire::receive::<FromOld>(socket) {
        Ok((FromOld::Refused { why }, _)) => Err(refused(&why)),
        Ok(answer) => Ok(answer),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(OpenError::new("the process that serves has died"))
        }
        Err(error) => Err(OpenError(match sent {
            Err(sent) => format!("the process that serves does not hear us: {sent}"),
            Ok(()) => format!("the process that serves does not answer: {error}"),
        })),
    }
}

fn refused(why: &str) -> OpenError {
    OpenError(format!("the process that serves refuses: {why}"))
}

/// Whether the process that has the socket may be believed.
fn check_user(peer: &UnixStream) -> Result<(), String> {
    let peer = rustix::net::sockopt::socket_peercred(peer).map_err(|e| format!("its user is not known: {e}"))?.uid;
    let ours = nix::unistd::geteuid().as_raw();
    match peer.is_root() || peer.as_raw() == ours || ours == 0 {
        true => Ok(()),
        false => Err(format!("it belongs to user {}, and this is user {ours}", peer.as_raw())),
    }
}

/// What can be seen from the configuration alone, before the other process has to stop.
fn check_offers(offers: &[ExportOffer], config: &Config) -> OpenResult {
    let mut files = Vec::new();
    for step in &config.steps {
        if let Step::Blockdev(options) = step {
            add_files(&options.to_json(), &mut files);
        }
    }
    offers.iter().try_for_each(|offer| {
        let about = |why: String| OpenError(format!("export \"{}\": {why}", offer.id));
        let ours = config.steps.iter().find_map(|step| match step {
            Step::Export(export) if export.id == offer.id => Some(export),
            _ => None,
        });
        let ours = ours.ok_or_else(|| about("it is served there, and not here".into()))?;
        if let Some(difference) = offer.settings.difference(&GuestSettings::from(&export_settings(ours))) {
            return Err(about(difference));
        }
        // Backing files need not be named.
        match offer.disk.iter().find(|part| part.starts_with("file ")) {
            Some(file) if !files.contains(file) => Err(about(format!("it is another disk: {file} there"))),
            _ => Ok(()),
        }
    })
}

/// Takes the `filename` of a node, and those of the nodes defined in it.
fn add_files(node: &Value, files: &mut Vec<String>) {
    let Value::Object(options) = node else { return };
    if let Some(Value::String(path)) = options.get("filename")
        && let Ok(found) = std::fs::metadata(path)
    {
        files.push(file_identity_of(found.dev(), found.ino()));
    }
    options.values().for_each(|value| add_files(value, files));
}
