//! No request allocates memory on `null-co`, `memory` and `file`, once the loop has warmed up.
#![allow(unsafe_code)] // A global allocator is unsafe to implement; this one counts and passes on.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use blockport_block::drivers::qcow2::{CreateOptions, new_image};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::{BlockBackend, BlockResult};

use crate::testing::{TempDir, channel, context, opened, user, writer};

struct Counting;

thread_local! {
    /// Of this thread only: tests run beside each other.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn count() {
    // While a thread ends, its counter is gone.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn the_counter_counts() {
    let before = allocations();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(allocations() - before, 1);
}

#[test]
fn requests_do_not_allocate() {
    let (disk, memory) = (TempDir::on_disk(), TempDir::in_memory());
    let (path, tmpfs) = (disk.file("disk", 1 << 20), memory.file("disk", 1 << 20));
    for options in [
        "null-co,size=1M".to_owned(),
        "memory,size=1M".to_owned(),
        format!("file,filename={path}"),
        format!("file,filename={path},cache.direct=on"),
        format!("file,filename={tmpfs}"),
        format!("raw,file.driver=file,file.filename={path}"),
        format!("raw,offset=4096,size=512K,file.driver=file,file.filename={tmpfs}"),
        "throttle,throttle-group=unlimited,file.driver=memory,file.size=1M".to_owned(),
        "throttle,throttle-group=far,file.driver=memory,file.size=1M".to_owned(),
        "blkdebug,inject-error.0.event=read_aio,inject-error.0.sector=2000,image.driver=memory,image.size=1M"
            .to_owned(),
    ] {
        assert_eq!(allocating_turns(&options), [], "turns and their allocations on {options}");
    }
}

/// Writes and reads the first 108 KiB again and again; the turns that allocated, with how often.
fn allocating_turns(options: &str) -> Vec<(u64, u64)> {
    let (_graph, node) = opened(options);
    let backend = BlockBackend::with_root("b", node, writer()).expect("nobody else uses the node");
    let context = context();
    let channel = backend.channel(&context).expect("the node is active");
    context.run_until(async move {
        let buffer = AlignedBuffer::new(8192, 4096);
        let pieces: Vec<_> = (0..16).map(|i| buffer.iov().part(i * 512, 512)).collect();
        let mut counted = Vec::new();
        for turn in 0..200u64 {
            let before = allocations();
            let mut results: [BlockResult; 3] = [Ok(()); 3];
            results[0] = channel.pwritev(turn * 512, &[buffer.iov()]).await;
            results[1] = channel.preadv(turn * 512, &pieces).await;
            if turn % 64 == 0 {
                results[2] = channel.flush().await;
            }
            let now = allocations() - before;
            assert_eq!(results, [Ok(()); 3]);
            // The loop's own lists find their sizes in the first turns.
            if turn >= 10 && now > 0 {
                counted.push((turn, now));
            }
        }
        counted
    })
}

#[test]
fn requests_to_mapped_clusters_do_not_allocate() {
    for (cluster_size, extended_l2) in [(4096, false), (65536, false), (16384, true)] {
        let place = TempDir::on_disk();
        let path = place.path("disk");
        let create = CreateOptions { size: 1 << 20, cluster_size, extended_l2, ..CreateOptions::default() };
        std::fs::write(&path, new_image(&create).expect("valid options")).expect("the directory is writable");
        let options = format!("qcow2,file.driver=file,file.filename={path}");
        let (graph, node) = opened(&options);
        let child = user(&node, 512);
        let context = context();
        let channel = channel(&child, &context);
        context.run_until(async move {
            let buffer = AlignedBuffer::new(1 << 20, 4096);
            assert_eq!(channel.pwritev(0, &[buffer.iov()], Default::default()).await, Ok(()));
        });
        drop((child, node, graph));
        assert_eq!(allocating_turns(&options), [], "turns and their allocations in clusters of {cluster_size} bytes");
    }
}
