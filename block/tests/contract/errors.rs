//! Rows: on-error policy, iostatus, BLOCK_IO_ERROR, accounting of what failed. A device that stops is in `vhost/`.

use std::sync::{Arc, Mutex, MutexGuard};

use blockport_block::event::BlockEvent;
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockBackend, BlockError, ErrorAction, Graph, IoStatus, OnErrorPolicy, RequestKind};

use crate::helpers::{TestDevice, add, iothread, on_channel, set_sink};
use crate::testing::writer;

const EIO: BlockError = BlockError::Host(libc::EIO);

/// A drive whose requests nobody sends; the device asks what to do about errors.
struct Drive {
    _graph: Graph,
    backend: Arc<BlockBackend>,
    io: blockport_block::aio::Iothread,
}

impl Drive {
    fn new(read: OnErrorPolicy, write: OnErrorPolicy) -> Self {
        let graph = Graph::default();
        let node = add(&graph, "memory,node-name=disk,size=1M");
        let backend = BlockBackend::with_root("e0", node, writer()).expect("nobody objects");
        backend.set_on_error(read, write);
        Self { _graph: graph, backend, io: iothread() }
    }

    fn action(&self, kind: RequestKind, error: BlockError) -> ErrorAction {
        on_channel(&self.io, &self.backend, move |channel| {
            Box::pin(async move { channel.error_action(kind, error, true) })
        })
    }
}

fn events() -> (MutexGuard<'static, ()>, Arc<Mutex<Vec<BlockEvent>>>) {
    let events: Arc<Mutex<Vec<BlockEvent>>> = Arc::default();
    let log = events.clone();
    let alone = set_sink(move |event| log.lock().expect("no panic").push(event));
    (alone, events)
}

#[test]
fn each_policy_does_what_its_name_says_per_direction() {
    let _alone = set_sink(drop);
    use ErrorAction::{Ignore, Report, Stop};
    for (policy, of_eio, of_enospc) in [
        (OnErrorPolicy::Report, Report, Report),
        (OnErrorPolicy::Ignore, Ignore, Ignore),
        (OnErrorPolicy::Enospc, Report, Stop),
        (OnErrorPolicy::Stop, Stop, Stop),
    ] {
        for (read, other) in [(true, OnErrorPolicy::Report), (false, OnErrorPolicy::Report)] {
            let drive = if read { Drive::new(policy, other) } else { Drive::new(other, policy) };
            for kind in RequestKind::ALL {
                let ours = (kind == RequestKind::Read) == read;
                let expected = if ours { (of_eio, of_enospc) } else { (Report, Report) };
                let got = (drive.action(kind, EIO), drive.action(kind, BlockError::NoSpace));
                assert_eq!(got, expected, "{policy:?} of {kind:?}");
            }
        }
    }
    let auto = Drive::new(OnErrorPolicy::Auto, OnErrorPolicy::Auto);
    assert_eq!(auto.action(RequestKind::Read, BlockError::NoSpace), Report, "as a backend does by itself");
    assert_eq!(auto.action(RequestKind::Write, BlockError::NoSpace), Stop);
    assert_eq!(
        (auto.backend.on_error(true), auto.backend.on_error(false)),
        (OnErrorPolicy::Report, OnErrorPolicy::Enospc)
    );
}

#[test]
fn what_the_guest_did_itself_and_an_empty_drive_are_reported_whatever_the_policy() {
    let drive = Drive::new(OnErrorPolicy::Stop, OnErrorPolicy::Stop);
    let (_alone, events) = events();
    for error in [
        BlockError::OutOfRange,
        BlockError::ReadOnly,
        BlockError::NoMedium,
        BlockError::NotSupported,
        BlockError::Invalid("test"),
    ] {
        assert_eq!(drive.action(RequestKind::Write, error), ErrorAction::Report, "{error}");
    }
    assert_eq!(drive.backend.iostatus(), IoStatus::Ok);
    assert!(events.lock().expect("no panic").is_empty());
}

#[test]
fn the_first_error_that_stops_sticks_until_reset_or_a_new_device() {
    let _alone = set_sink(drop);
    let drive = Drive::new(OnErrorPolicy::Stop, OnErrorPolicy::Stop);
    drive.action(RequestKind::Write, BlockError::NoSpace);
    assert_eq!(drive.backend.iostatus(), IoStatus::NoSpace);
    drive.action(RequestKind::Read, EIO);
    assert_eq!(drive.backend.iostatus(), IoStatus::NoSpace, "the first one");
    drive.backend.reset_iostatus();
    assert_eq!(drive.backend.iostatus(), IoStatus::Ok);
    drive.action(RequestKind::Read, EIO);
    assert_eq!(drive.backend.iostatus(), IoStatus::Failed);
    let attached = drive.backend.attach(Arc::new(TestDevice::new())).expect("no other device");
    assert_eq!(drive.backend.iostatus(), IoStatus::Ok);
    drop(attached);
    let reports = Drive::new(OnErrorPolicy::Report, OnErrorPolicy::Ignore);
    reports.action(RequestKind::Read, EIO);
    reports.action(RequestKind::Write, EIO);
    assert_eq!(reports.backend.iostatus(), IoStatus::Ok, "only what stops counts");
}

#[test]
fn an_event_names_device_node_operation_action_and_reason_and_comes_after_the_status() {
    let drive = Drive::new(OnErrorPolicy::Report, OnErrorPolicy::Enospc);
    let seen: Arc<Mutex<Vec<(BlockEvent, IoStatus)>>> = Arc::default();
    let (log, backend) = (seen.clone(), Arc::downgrade(&drive.backend));
    let _alone = set_sink(move |event| {
        let status = backend.upgrade().map_or(IoStatus::Ok, |backend| backend.iostatus());
        log.lock().expect("no panic").push((event, status));
    });
    drive.action(RequestKind::Write, BlockError::NoSpace);
    let expected = BlockEvent::IoError {
        device: "e0".into(),
        node_name: Some("disk".into()),
        is_read: false,
        action: ErrorAction::Stop,
        nospace: true,
        reason: BlockError::NoSpace.to_string(),
    };
    assert_eq!(*seen.lock().expect("no panic"), [(expected, IoStatus::NoSpace)]);
}

#[test]
fn events_come_once_a_second_for_a_device_but_for_those_that_stop_it() {
    let (_alone, events) = events();
    let drive = Drive::new(OnErrorPolicy::Report, OnErrorPolicy::Stop);
    let other = Drive::new(OnErrorPolicy::Ignore, OnErrorPolicy::Stop);
    for _ in 0..100 {
        drive.action(RequestKind::Read, EIO);
    }
    other.action(RequestKind::Read, EIO);
    let count = |wanted: ErrorAction| {
        let events = events.lock().expect("no panic");
        let is = |event: &&BlockEvent| matches!(event, BlockEvent::IoError { action, .. } if *action == wanted);
        events.iter().filter(is).count()
    };
    assert_eq!((count(ErrorAction::Report), count(ErrorAction::Ignore)), (1, 1), "each device has its own second");
    for _ in 0..5 {
        drive.action(RequestKind::Write, EIO);
    }
    assert_eq!(count(ErrorAction::Stop), 5);
    std::thread::sleep(std::time::Duration::from_millis(1010));
    drive.action(RequestKind::Read, EIO);
    assert_eq!(count(ErrorAction::Report), 2);
}

#[test]
fn a_request_that_is_kept_does_not_count_as_failed_until_it_is_given_up() {
    let _alone = set_sink(drop);
    let graph = Graph::default();
    let fault = "inject-error.0.event=write_aio,inject-error.0.errno=28";
    let node = add(&graph, &format!("blkdebug,node-name=disk,{fault},image.driver=memory,image.size=1M"));
    let backend = BlockBackend::with_root("e0", node, writer()).expect("nobody objects");
    let (io, shared) = (iothread(), backend.clone());
    let counts = on_channel(&io, &backend, move |channel| {
        Box::pin(async move {
            let failed = || shared.statistics().of(RequestKind::Write).failed;
            let buffer = AlignedBuffer::new(512, 512);
            let result = channel.pwritev(0, &[buffer.iov()]).await;
            assert_eq!(result, Err(BlockError::NoSpace));
            let mut counts = vec![failed()];
            channel.error_action(RequestKind::Write, BlockError::NoSpace, true);
            counts.push(failed());
            channel.account_given_up(RequestKind::Write);
            counts.push(failed());
            channel.account_invalid(RequestKind::Write);
            assert_eq!(shared.statistics().of(RequestKind::Write).invalid, 1, "refused before it got here");
            counts.push(failed());
            counts
        })
    });
    assert_eq!(counts, [1, 0, 1, 1]);
}
