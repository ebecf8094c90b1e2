//! An export that another process goes on with: its control thread stops between two messages, and waits until it is told
//! to go on. Also the beginning of one that goes on with a connection of another process's. It looks into no state.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use vhost::vhost_user::BackendReqHandler;

use super::{Control, Server};
use crate::export::ExportState;
use crate::handover::{Descriptors, ExportImage};
use crate::session::Session;
use crate::socket::put_in_place;

/// What the control thread is asked for.
pub(super) struct Request {
    until: Instant,
    answer: SyncSender<Result<(ExportImage, Descriptors), String>>,
    /// Ends when the export is to go on.
    wanted_back: Receiver<()>,
}

/// An export that stops, or has stopped, so that another process can go on with it. Dropping it has it go on.
pub struct HandingOver {
    answer: Receiver<Result<(ExportImage, Descriptors), String>>,
    until: Instant,
    _wanted_back: SyncSender<()>,
}

impl HandingOver {
    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// Prose: requests did not end in time, or cannot be told to another process. The export goes on as before.
    pub fn image(&self) -> Result<(ExportImage, Descriptors), String> {
        let left = self.until.saturating_duration_since(Instant::now());
        self.answer.recv_timeout(left).unwrap_or_else(|_| Err("its control thread is busy with a message".into()))
    }
}

impl Server {
    /// Has the control thread stop at the next message.
    pub(crate) fn hand_over(&self, until: Instant) -> HandingOver {
        let (answer, answered) = sync_channel(1);
        let (want_back, wanted_back) = sync_channel(0);
        *self.control.handing_over.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Request { until, answer, wanted_back });
        let _ = self.control.stop.write(1);
        HandingOver { answer: answered, until, _wanted_back: want_back }
    }
}

impl Control {
    /// Stops here, if that is wanted, until the export is to go on. `connection`: the front-end that is served, with its
    /// socket.
    pub(super) fn hand_over_if_wanted(&self, export: &ExportState, connection: Option<(&Session, &UnixStream)>) {
        let wanted = self.handing_over.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Request { until, answer, wanted_back }) = wanted else { return };
        // Whoever wants the thread to end writes it again.
        let _ = self.stop.read();
        let mut descriptors = Descriptors::default();
        let session = connection.map(|(session, socket)| session.hand_over(socket, until, &mut descriptors));
        let image = session.transpose().map(|session| {
            let image = ExportImage { write_cache: export.write_cache.known_value(), session };
            (image, descriptors)
        });
        let handed = image.is_ok();
        // If nobody waits for it any more, it is wanted back.
        let _ = answer.send(image);
        let _ = wanted_back.recv();
        if handed && let Some((session, _)) = connection {
            session.take_back();
        }
        if self.stopping() {
            let _ = self.stop.write(1);
        }
    }
}

/// A connection that another process has handed to us, ready to be served.
pub(crate) struct Resumed {
    pub(super) session: Arc<Session>,
    pub(super) stream: UnixStream,
    pub(super) handler: BackendReqHandler<Session>,
}

impl Resumed {
    /// Goes on with a session on its connection.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn new(session: Arc<Session>, stream: UnixStream) -> Result<Self, String> {
        let handler = handler(&session, &stream)?;
        Ok(Self { session, stream, handler })
    }

    /// Its session.
    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }
}

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;

/// A parser of messages that knows what was negotiated. The crate keeps that to itself and offers no way to set it, so the
/// parser is told by messages, on a connection with ourselves, in whose place the real one is put.
fn handler(session: &Arc<Session>, stream: &UnixStream) -> Result<BackendReqHandler<Session>, String> {
    let (mut teller, listener) = UnixStream::pair().map_err(|e| e.to_string())?;
    let mut handler = BackendReqHandler::from_stream(listener, session.clone());
    let mut tell = |request: u32, value: Option<u64>| -> Result<(), String> {
        let mut message = Vec::new();
        let size = if value.is_some() { 8 } else { 0 };
        for word in [request, 1, size] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend(value.iter().flat_map(|value| value.to_le_bytes()));
        teller.write_all(&message).map_err(|e| e.to_string())?;
        handler.handle_request().map_err(|e| format!("message {request} again: {e}"))?;
        if value.is_none() {
            let mut reply = [0; 20];
            teller.read_exact(&mut reply).map_err(|e| e.to_string())?;
        }
        Ok(())
    };
    let (features, protocol_features) = session.negotiated();
    tell(GET_FEATURES, None)?;
    if features != 0 {
        tell(SET_FEATURES, Some(features))?;
    }
    if let Some(protocol_features) = protocol_features {
        tell(GET_PROTOCOL_FEATURES, None)?;
        tell(SET_PROTOCOL_FEATURES, Some(protocol_features))?;
    }
    put_in_place(handler.as_raw_fd(), stream).map_err(|e| e.to_string())?;
    Ok(handler)
}
