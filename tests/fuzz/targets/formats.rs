//! Images of the formats that are only read, of any content: opened and read. No panic, no hang, no memory without bound;
//! what is said to be zero reads as zeroes.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use blockport_block::aio::{AioContext, PollSettings};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::Options;
use blockport_block::{Child, Graph, Permissions};
use libfuzzer_sys::fuzz_target;

struct Bench {
    context: AioContext,
    file: File,
    path: String,
    _dir: tempfile::TempDir,
}

fn bench() -> Bench {
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
/// The structures of a VHDX image lie far from each other; an input has them one after the other.
const FAR: [(usize, u64); 5] = [(0, 0), (512, 64 << 10), (4608, 192 << 10), (5632, 1 << 20), (6656, 2 << 20)];

fuzz_target!(|data: &[u8]| {
    let Some((choice, image)) = data.split_first() else { return };
    BENCH.with_borrow_mut(|bench| {
        let format = ["vdi", "vpc", "vmdk", "vhdx"][usize::from(choice & 3)];
        bench.file.set_len(0).expect("an image");
        if format == "vhdx" {
            for (number, (start, at)) in FAR.into_iter().enumerate() {
                let end = FAR.get(number + 1).map_or(image.len(), |(end, _)| *end).min(image.len());
                bench.file.write_all_at(image.get(start..end).unwrap_or_default(), at).expect("an image");
            }
        } else {
            bench.file.write_all_at(image, 0).expect("an image");
        }
        let options = format!(
            r#"{{"driver": "{format}", "node-name": "n", "file": {{"driver": "file", "filename": "{}"}}}}"#,
            bench.path
        );
        let graph = Graph::default();
        // What an image names is only read.
        let Ok(node) = graph.blockdev_add(Options::parse_json(&options).expect("JSON")) else { return };
        let length = node.length();
        let child = Child::attach(node, "fuzz", Permissions::device(false), 512).expect("a reader");
        let Ok(channel) = child.channel(&bench.context) else { return };
        let choice = u64::from(*choice);
        bench.context.run_until(async move {
            for place in [0, length / 2 & !511, length.saturating_sub(BYTES as u64) & !511, choice << 9] {
                if place + BYTES as u64 > length {
                    continue;
                }
                let mut buffer = AlignedBuffer::new(BYTES, 4096);
                buffer.fill_from(&[0xdd; BYTES]);
                let read = channel.preadv(place, &[buffer.iov()]).await;
                let status = channel.block_status(place, BYTES as u64).await;
                if let (Ok(()), Ok(status)) = (read, status) {
                    let part = &buffer.to_vec()[..status.bytes as usize];
                    assert!(!status.zero || part.iter().all(|byte| *byte == 0), "what is zero does not read as zero");
                }
            }
        });
        drop(child);
        graph.clear();
    });
});
