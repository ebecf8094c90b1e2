//! qcow2 images of any content: opened, read, written, flushed. No panic, no hang, no memory without bound; what was
//! written and answered well is read back.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use blockport_block::aio::{AioContext, PollSettings};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::Options;
use blockport_block::{BlockBackend, Graph, Permissions};
use landlock::{ABI, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus};
use libfuzzer_sys::fuzz_target;

struct Bench {
    context: AioContext,
    file: File,
    path: String,
    _dir: tempfile::TempDir,
}

/// An image may name other files, and a fuzzer any name. Nothing but what is the fuzzer's own may be written.
fn confine() {
    let write = AccessFs::from_write(ABI::V5);
    let own = ["/dev/shm", "/tmp", concat!(env!("CARGO_MANIFEST_DIR"), "/../..")];
    let status = Ruleset::default()
        .handle_access(write)
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(landlock::path_beneath_rules(own, write)))
        .and_then(landlock::RulesetCreated::restrict_self)
        .expect("Landlock");
    assert_ne!(status.ruleset, RulesetStatus::NotEnforced, "this target needs Landlock");
}

fn bench() -> Bench {
    confine();
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let path = dir.path().join("image").display().to_string();
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("a file");
    let context = AioContext::new(PollSettings { poll_max_ns: 0, ..PollSettings::default() }).expect("a loop");
    Bench { context, file, path, _dir: dir }
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(bench());
}

const BYTES: usize = 1024;

fuzz_target!(|data: &[u8]| {
    let Some((choice, image)) = data.split_first() else { return };
    BENCH.with_borrow_mut(|bench| {
        bench.file.set_len(0).and_then(|()| bench.file.write_all_at(image, 0)).expect("an image");
        // Never a file that the image names: a fuzzer may name any of the host's.
        let options = format!(
            r#"{{"driver": "qcow2", "node-name": "n", "backing": null, "file": {{"driver": "file", "filename": "{}"}}}}"#,
            bench.path
        );
        let graph = Graph::default();
        let Ok(node) = graph.blockdev_add(Options::parse_json(&options).expect("JSON")) else { return };
        let backend = BlockBackend::new("b");
        if backend.insert(node, Permissions::device(true)).is_err() {
            return;
        }
        let length = backend.length().expect("a medium");
        let Ok(channel) = backend.channel(&bench.context) else { return };
        let choice = u64::from(*choice);
        bench.context.run_until(async move {
            let places = [0, length / 2 & !511, length.saturating_sub(BYTES as u64) & !511, (choice << 9) % (length | 1) & !511];
            for (place, turn) in places.into_iter().zip(0u8..) {
                if place + BYTES as u64 > length {
                    continue;
                }
                let mut buffer = AlignedBuffer::new(BYTES, 4096);
                let _ = channel.preadv(place, &[buffer.iov()]).await;
                if choice & 1 != 0 {
                    buffer.fill_from(&[turn | 0x80; BYTES]);
                    let written = channel.pwritev(place, &[buffer.iov()]).await;
                    buffer.fill_from(&[0; BYTES]);
                    let read = channel.preadv(place, &[buffer.iov()]).await;
                    if written.is_ok() && read.is_ok() {
                        assert!(buffer.to_vec().iter().all(|byte| *byte == turn | 0x80), "what was written at {place} is not there");
                    }
                }
            }
            let _ = channel.flush().await;
        });
        drop(backend);
        graph.clear();
    });
});
