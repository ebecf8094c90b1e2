//! Server: an export's control thread. It owns the socket: it accepts one front-end after the other, hands whole
//! messages to the vhost crate, and ends a connection that breaks the protocol. It never sees a request.

mod handover;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::export::ExportState;
use crate::extra_messages::{self, Arrived, Header};
use crate::session::Session;
use crate::socket::Endpoint;
pub use handover::HandingOver;
pub(crate) use handover::Resumed;

/// How long a front-end may take to send the rest of a message, or to read a reply.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after an accept that failed for lack of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// The control thread's stack; it only parses messages.
const STACK_BYTES: usize = 256 << 10;

/// The control thread. Dropping it ends the connection and the thread.
pub(crate) struct Server {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// How the main thread interrupts the control thread.
struct Control {
    stop: EventFd,
    stopping: AtomicBool,
    /// Front-ends are served; until then they wait in the socket's queue.
    begun: AtomicBool,
    /// Whether the front-end that is connected is the last one.
    retiring: AtomicBool,
    /// The connection being served, to be shut down when its peer does not read.
    connection: Mutex<Option<UnixStream>>,
    /// Set when another process is to go on with the export.
    handing_over: Mutex<Option<handover::Request>>,
}

impl Server {
    pub(crate) fn start(
        export: Arc<ExportState>,
        endpoint: Endpoint,
        resumed: Option<Resumed>,
        on_end: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Self> {
        let control = Arc::new(Control {
            stop: EventFd::new(EFD_NONBLOCK)?,
            stopping: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            retiring: AtomicBool::new(false),
            connection: Mutex::default(),
            handing_over: Mutex::default(),
        });
        let shared = control.clone();
        // The kernel shows 15 characters.
        let name = format!("vhost-{}", export.settings.id);
        let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            // A panic, which is a bug, ends the process: an export that nobody serves any more would look alive.
            let _abort = AbortOnPanic;
            while !shared.begun.load(Ordering::Acquire) && !shared.stopping() {
                std::thread::park();
            }
            serve(&export, endpoint, resumed, &shared);
            if !shared.stopping() {
                on_end();
            }
        })?;
        Ok(Self { control, thread: Some(thread) })
    }

    /// Begins to serve front-ends.
    pub(crate) fn begin(&self) {
        self.control.begun.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Takes no further front-end; when the one that is connected has left, nobody is served any more, and `on_end` is
    /// called. Without one, the server is to be dropped.
    pub(crate) fn retire(&self) {
        self.control.retiring.store(true, Ordering::Release);
    }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.control.stopping.store(true, Ordering::Release);
        let _ = self.control.stop.write(1);
        if let Some(connection) = &*self.control.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = connection.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

impl Control {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn set_connection(&self, connection: Option<UnixStream>) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }
}

/// Waits for one descriptor or the stop. Edge-triggered, so that half a message costs nothing while the rest is
/// awaited.
struct Waiter(Epoll);

/// Why a wait ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    Arrived,
    /// The peer sends nothing more; what it has sent is still there.
    HungUp,
    Deadline,
}

impl Waiter {
    fn new(fd: BorrowedFd<'_>, control: &Control) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let epoll = Epoll::new()?;
        let edge = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(edge, 0))?;
        epoll.ctl(ControlOperation::Add, control.stop.as_raw_fd(), EpollEvent::new(EventSet::IN, 1))?;
        Ok(Self(epoll))
    }

    /// Waits for something to come, until the deadline at most. A stop counts as something.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<Woken> {
        loop {
            let timeout_ms = match deadline {
                None => -1,
                // Rounded up, or the last millisecond would spin.
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
                    i32::try_from(left).unwrap_or(i32::MAX)
                }
            };
            let mut events = [EpollEvent::default(); 2];
            match self.0.wait(timeout_ms, &mut events) {
                Ok(n) => {
                    let gone =
                        |event: &EpollEvent| event.event_set().intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP);
                    return Ok(match &events[..n] {
                        [] => Woken::Deadline,
                        events if events.iter().any(gone) => Woken::HungUp,
                        _ => Woken::Arrived,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The control thread: one front-end after the other.
fn serve(export: &Arc<ExportState>, endpoint: Endpoint, resumed: Option<Resumed>, control: &Control) {
    let was_resumed = resumed.is_some();
    if let Some(resumed) = resumed {
        serve_session(export, resumed, control);
    }
    let listener = match endpoint {
        Endpoint::Listening(listener) => listener,
        // It is the connection that was resumed.
        Endpoint::Connected(_) if was_resumed => return,
        Endpoint::Connected(stream) => return serve_front_end(export, stream, control),
    };
    let waiter = match Waiter::new(listener.as_fd(), control) {
        Ok(waiter) => waiter,
        Err(error) => return tracing::error!("{}: cannot wait for front-ends: {error}", export.name()),
    };
    if let Err(error) = listener.set_nonblocking() {
        return tracing::error!("{}: {error}", export.name());
    }
    while !control.stopping() && !control.retiring.load(Ordering::Acquire) {
        control.hand_over_if_wanted(export, None);
        match listener.accept() {
            Ok(stream) => serve_front_end(export, stream, control),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Err(error) = waiter.wait(None) {
                    return tracing::error!("{}: cannot wait for front-ends: {error}", export.name());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                // Out of descriptors, or the peer is gone already: the next one may have more luck.
                tracing::warn!("{}: a front-end could not be accepted: {error}", export.name());
                std::thread::sleep(ACCEPT_RETRY);
            }
        }
    }
}

fn serve_front_end(export: &Arc<ExportState>, stream: UnixStream, control: &Control) {
    tracing::info!("{}: a front-end connected", export.name());
    let session = Session::new(export.clone());
    export.write_cache.connected();
    match stream.try_clone() {
        Ok(copy) => {
            let handler = BackendReqHandler::from_stream(copy, session.clone());
            serve_session(export, Resumed { session, stream, handler }, control);
        }
        Err(error) => tracing::warn!("{}: the connection was closed: {error}", export.name()),
    }
}

/// Serves a session until its connection ends.
fn serve_session(export: &Arc<ExportState>, Resumed { session, stream, mut handler }: Resumed, control: &Control) {
    export.set_session(Some(session.clone()));
    let ended = run_connection(&session, stream, &mut handler, control);
    export.set_session(None);
    control.set_connection(None);
    let in_flight = session.stop_all();
    match &ended {
        Ok(()) => tracing::info!("{}: the front-end disconnected", export.name()),
        Err(why) => tracing::warn!("{}: the connection was closed: {why}", export.name()),
    }
    if in_flight > 0 {
        tracing::warn!("{}: {in_flight} requests were in flight when it left; nobody saw their answers", export.name());
    }
}

/// Serves messages until the connection ends; an error says why we ended it.
fn run_connection(
    session: &Arc<Session>,
    socket: UnixStream,
    handler: &mut BackendReqHandler<Session>,
    control: &Control,
) -> Result<(), String> {
    // As the crate reads and writes whole messages.
    socket.set_nonblocking(false).map_err(|e| e.to_string())?;
    control.set_connection(socket.try_clone().ok());
    let waiter = Waiter::new(socket.as_fd(), control).map_err(|e| e.to_string())?;
    let mut deadline = None;
    let mut hung_up = false;
    while !control.stopping() {
        control.hand_over_if_wanted(session.export(), Some((session, &socket)));
        match extra_messages::peek(&socket).map_err(|e| e.to_string())? {
            Arrived::Closed => return Ok(()),
            Arrived::Garbage(why) => return Err(why.into()),
            Arrived::Whole(header) => {
                deadline = None;
                wait_until_writable(&socket)?;
                serve_message(session, &socket, handler, header)?;
            }
            Arrived::Incomplete(begun) => {
                if hung_up {
                    return Err("the front-end left in the middle of a message".into());
                }
                let until = begun.then(|| *deadline.get_or_insert_with(|| Instant::now() + PATIENCE));
                match waiter.wait(until).map_err(|e| e.to_string())? {
                    Woken::Arrived => {}
                    Woken::HungUp => hung_up = true,
                    Woken::Deadline => {
                        return Err(format!("a message was not completed within {} s", PATIENCE.as_secs()));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Waits until there is room for a reply: the crate would try for ever to send one to a front-end that never reads. A
/// stop shuts the socket down, which ends the wait.
fn wait_until_writable(socket: &UnixStream) -> Result<(), String> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    loop {
        match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&patience)) {
            Ok(0) => return Err(format!("replies were not read within {} s", PATIENCE.as_secs())),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn serve_message(
    session: &Arc<Session>,
    socket: &UnixStream,
    handler: &mut BackendReqHandler<Session>,
    header: Header,
) -> Result<(), String> {
    if header.request == extra_messages::SET_BACKEND_REQ_FD {
        let channel = extra_messages::take_backend_channel(socket, header).map_err(|e| e.to_string())?;
        let ok = session.set_backend_channel(channel);
        return match (ok, session.acknowledges() && header.needs_reply()) {
            (_, true) => extra_messages::acknowledge(socket, header, ok).map_err(|e| e.to_string()),
            (true, false) => Ok(()),
            (false, false) => Err("SET_BACKEND_REQ_FD without a socket, or without BACKEND_REQ negotiated".into()),
        };
    }
    if header.request == extra_messages::SET_LOG_FD {
        // To be signalled when the log has changed; a front-end may look at any time, and those that there are do.
        extra_messages::take(socket, header).map_err(|e| e.to_string())?;
        return match session.acknowledges() && header.needs_reply() {
            true => extra_messages::acknowledge(socket, header, true).map_err(|e| e.to_string()),
            false => Ok(()),
        };
    }
    match handler.handle_request() {
        Ok(()) => Ok(()),
        // Refused by our own handler, and the front-end was told: the stream is in step, the connection goes on.
        Err(_) if session.take_refused() && header.is_acknowledged() && session.acknowledges() => Ok(()),
        Err(error) => Err(format!("message {}: {error}", header.request)),
    }
}
