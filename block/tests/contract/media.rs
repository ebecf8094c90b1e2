//! Rows: change_media, eject_request, is_tray_open, is_medium_locked, availability; and section 3, media change, with
//! devices that virtio-blk is none of: with a tray and a lock.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use blockport_block::event::BlockEvent;
use blockport_block::{Attached, BlockBackend, BlockError, Graph, Operation, TrayOpening};

use crate::helpers::{TestDevice, add, iothread, keep_channel, read, set_sink, write};
use crate::testing::writer;

/// A drive with a medium "first" in it, and a second one beside it.
struct Drive {
    graph: Graph,
    backend: Arc<BlockBackend>,
    device: Arc<TestDevice>,
    attached: Option<Attached>,
}

impl Drive {
    fn new(device: TestDevice) -> Self {
        let graph = Graph::default();
        add(&graph, "memory,node-name=first,size=1M");
        add(&graph, "memory,node-name=second,size=2M");
        let backend = graph.create_backend("cd0");
        backend.insert(graph.find("first").expect("it is there"), writer()).expect("nobody objects");
        let device = Arc::new(device);
        let attached = backend.attach(device.clone()).ok();
        Self { graph, backend, device, attached }
    }

    fn node(&self, name: &str) -> Arc<blockport_block::Node> {
        self.graph.find(name).expect("it is there")
    }

    fn medium(&self) -> Option<String> {
        self.backend.root().map(|node| node.name().to_owned())
    }

    /// What the device was told of media, without drains.
    fn told(&self) -> Vec<String> {
        self.device.told().into_iter().filter(|what| !what.starts_with("drained")).collect()
    }
}

type TrayEvents = Arc<Mutex<Vec<(String, bool)>>>;

/// What happens to trays in this process from now on.
fn tray_events() -> (MutexGuard<'static, ()>, TrayEvents) {
    let events = TrayEvents::default();
    let log = events.clone();
    let alone = set_sink(move |event| {
        if let BlockEvent::TrayMoved { device, tray_open } = event {
            log.lock().expect("no panic").push((device, tray_open));
        }
    });
    (alone, events)
}

#[test]
fn without_a_tray_eject_empties_the_drive_and_insert_fills_it_and_the_device_is_told_of_each() {
    let drive = Drive::new(TestDevice::new());
    let io = iothread();
    keep_channel(&io, &drive.backend);
    assert_eq!(drive.backend.open_tray(false), Ok(TrayOpening::NoTray));
    assert!(drive.told().is_empty(), "opening a tray that is not there does nothing");
    drive.backend.eject(false).expect("nothing is in the way");
    assert_eq!(drive.told(), ["eject"]);
    assert_eq!((drive.backend.length(), drive.medium()), (Err(BlockError::NoMedium), None));
    assert_eq!(read(&io, &drive.backend, 0, 512), Err(BlockError::NoMedium));
    let failed = drive.backend.statistics().failed();
    assert_eq!(failed, 1, "and it is counted");
    drive.backend.eject(false).expect("once more does nothing");
    assert!(drive.told().is_empty());
    drive.backend.insert_medium(drive.node("second")).expect("the drive is empty");
    assert_eq!(drive.told(), ["load"]);
    assert_eq!(write(&io, &drive.backend, (2 << 20) - 512, 512, 1), Ok(()));
    let refused = drive.backend.insert_medium(drive.node("first")).expect_err("it is full");
    assert!(refused.0.contains("\"cd0\" has a medium"), "{refused}");
    drive.backend.close_tray().expect("nothing to close");
    assert!(drive.told().is_empty());
}

#[test]
fn a_change_of_medium_ejects_the_old_one_and_loads_the_new_one() {
    let drive = Drive::new(TestDevice::new());
    let io = iothread();
    drive.backend.change_medium(drive.node("second"), false).expect("nothing is in the way");
    assert_eq!(drive.told(), ["eject", "load"]);
    assert_eq!(drive.backend.length(), Ok(2 << 20));
    assert_eq!(write(&io, &drive.backend, 0, 512, 4), Ok(()));
    assert!(drive.node("first").users().is_empty(), "the old one is free");
}

#[test]
fn a_change_that_fails_brings_the_old_medium_back() {
    let drive = Drive::new(TestDevice::new());
    let io = iothread();
    assert_eq!(write(&io, &drive.backend, 0, 512, 4), Ok(()));
    let alone =
        blockport_block::Permissions { held: blockport_block::PermissionSet::WRITE, shared: Default::default() };
    let user = blockport_block::Child::attach(drive.node("second"), "job \"j0\"", alone, 512).expect("it is free");
    let refused = drive.backend.change_medium(drive.node("second"), false).expect_err("the job has it");
    assert!(refused.0.contains("job \"j0\""), "{refused}");
    assert_eq!(drive.medium().as_deref(), Some("first"));
    assert_eq!(read(&io, &drive.backend, 0, 512), Ok(vec![4; 512]));
    drop(user);
    drive.told();
    drive.device.refuses.store(true, Ordering::SeqCst);
    let refused = drive.backend.insert_medium(drive.node("second"));
    assert!(refused.is_err(), "there is one already");
    drive.backend.eject(false).expect("ejecting never fails");
    let refused = drive.backend.insert_medium(drive.node("second")).expect_err("the device refuses");
    assert!(refused.0.contains("does not like"), "{refused}");
    assert_eq!(drive.medium(), None, "what was inserted is out again");
    drive.device.refuses.store(false, Ordering::SeqCst);
    drive.backend.insert_medium(drive.node("first")).expect("it may be tried again");
}

#[test]
fn a_tray_opens_before_the_medium_goes_and_closes_after_it_came_and_events_tell_when_it_moved() {
    let (_alone, events) = tray_events();
    let drive = Drive::new(TestDevice::with_tray());
    let io = iothread();
    keep_channel(&io, &drive.backend);
    let refused = drive.backend.remove_medium().expect_err("the tray is closed");
    assert!(refused.0.contains("tray"), "{refused}");
    assert_eq!(drive.backend.open_tray(false), Ok(TrayOpening::Open));
    assert_eq!(drive.told(), ["eject"]);
    assert!(drive.backend.is_inserted() && !drive.backend.is_available());
    assert_eq!(drive.backend.length(), Err(BlockError::NoMedium));
    assert_eq!(read(&io, &drive.backend, 0, 512), Err(BlockError::NoMedium), "an open tray is no medium");
    assert_eq!(drive.backend.open_tray(false), Ok(TrayOpening::Open), "it is open");
    drive.backend.remove_medium().expect("the tray is open");
    drive.backend.insert_medium(drive.node("second")).expect("the tray is open");
    assert!(drive.told().is_empty(), "it has seen its tray open, and will see it close");
    assert_eq!(read(&io, &drive.backend, 0, 512), Err(BlockError::NoMedium), "still open");
    drive.backend.close_tray().expect("nothing is in the way");
    assert_eq!(drive.told(), ["load"]);
    assert_eq!(read(&io, &drive.backend, 1 << 20, 512), Ok(vec![0; 512]));
    let refused = drive.backend.insert_medium(drive.node("first")).expect_err("the tray is closed");
    assert!(refused.0.contains("tray"), "{refused}");
    drive.backend.change_medium(drive.node("first"), false).expect("it opens and closes by itself");
    assert_eq!(drive.told(), ["eject", "load"]);
    drive.device.tray_open.store(true, Ordering::SeqCst);
    drive.backend.tray_moved();
    assert_eq!(read(&io, &drive.backend, 0, 512), Err(BlockError::NoMedium), "the guest opened it");
    let moves: Vec<bool> = events.lock().expect("no panic").iter().map(|(_, open)| *open).collect();
    assert_eq!(moves, [true, false, true, false, true]);
    assert!(events.lock().expect("no panic").iter().all(|(device, _)| device == "cd0"));
}

#[test]
fn a_locked_tray_opens_only_by_force_and_the_guest_is_asked() {
    let drive = Drive::new(TestDevice::with_tray());
    drive.device.locked.store(true, Ordering::SeqCst);
    assert!(drive.backend.is_medium_locked());
    assert_eq!(drive.backend.open_tray(false), Ok(TrayOpening::Asked));
    assert_eq!(drive.told(), ["eject request"]);
    for refused in [drive.backend.eject(false), drive.backend.change_medium(drive.node("second"), false)] {
        let refused = refused.expect_err("it is locked");
        assert!(refused.0.contains("locked") && refused.0.contains("force"), "{refused}");
    }
    assert_eq!(drive.told(), ["eject request", "eject request"]);
    assert_eq!(drive.medium().as_deref(), Some("first"));
    drive.backend.eject(true).expect("by force");
    assert_eq!(drive.told(), ["eject request, forced", "eject"]);
    assert!(!drive.backend.is_medium_locked() && drive.medium().is_none());
}

#[test]
fn a_device_that_does_not_take_part_is_not_removable_and_a_drive_without_one_is() {
    let mut drive = Drive::new(TestDevice { removable: false, ..TestDevice::new() });
    let second = drive.node("second");
    let backend = drive.backend.clone();
    for refused in [
        backend.eject(true),
        backend.remove_medium(),
        backend.insert_medium(second.clone()),
        backend.change_medium(second.clone(), true),
        backend.open_tray(true).map(drop),
        backend.close_tray(),
    ] {
        let refused = refused.expect_err("it is fixed");
        assert!(refused.0.contains("\"cd0\" is not removable"), "{refused}");
    }
    drive.attached.take();
    backend.change_medium(second, false).expect("nobody is there to object");
    assert_eq!(drive.medium().as_deref(), Some("second"));
}

#[test]
fn a_blocked_medium_is_not_ejected() {
    let drive = Drive::new(TestDevice::with_tray());
    let blocker = drive.node("first").block_operations(&[Operation::Eject], "job \"j0\" copies it");
    for refused in [drive.backend.eject(true), drive.backend.change_medium(drive.node("second"), true)] {
        assert!(refused.expect_err("it is blocked").0.contains("job \"j0\""));
        assert_eq!(drive.medium().as_deref(), Some("first"));
    }
    assert!(!drive.backend.is_tray_open(), "as before");
    drop(blocker);
    drive.backend.eject(true).expect("the job has gone");
}

#[test]
fn a_medium_that_cannot_be_written_goes_into_any_drive_and_the_next_one_is_written_again() {
    let drive = Drive::new(TestDevice::new());
    let io = iothread();
    let sealed = add(&drive.graph, "memory,node-name=sealed,size=1M,read-only=on");
    drive.backend.change_medium(sealed, false).expect("for reading");
    assert_eq!(write(&io, &drive.backend, 0, 512, 1), Err(BlockError::ReadOnly));
    assert_eq!(read(&io, &drive.backend, 0, 512), Ok(vec![0; 512]));
    drive.backend.change_medium(drive.node("second"), false).expect("nothing is in the way");
    assert_eq!(write(&io, &drive.backend, 0, 512, 1), Ok(()));
    assert_eq!(drive.node("second").total_permissions(), writer());
}
