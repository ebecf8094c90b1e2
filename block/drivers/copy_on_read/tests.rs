//! Copy-on-read over an image with a layer behind it, which takes its time and counts what is written to it.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::aio::PollSettings;
use crate::graph::Graph;
use crate::iovec::AlignedBuffer;
use crate::node::{Node, SECTOR};
use crate::options::parse_keyval;

const SECTORS: usize = 64;

/// An image of which some sectors are there, and the others lie behind it.
struct Layered {
    image: Arc<Mutex<Layers>>,
}

struct Layers {
    /// By sector: what it is filled with.
    top: [Option<u8>; SECTORS],
    behind: [u8; SECTORS],
    writes: u64,
    error: Option<BlockError>,
}

impl BlockDriver for Layered {
    fn limits(&self) -> BlockLimits {
        BlockLimits { request_alignment: SECTOR as u32, ..BlockLimits::default() }
    }
    fn length(&self) -> u64 {
        SECTORS as u64 * SECTOR
    }
    fn children(&self) -> &[Arc<Child>] {
        &[]
    }
    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }
    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }
    fn resize(&self, _: u64) -> OpenResult {
        Err(OpenError::new("no"))
    }
    fn activate(&self) -> OpenResult {
        Ok(())
    }
    fn inactivate(&self) -> OpenResult {
        Ok(())
    }
    fn drained_begin(&self) {}
    fn drained_end(&self) {}
    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        Ok(Rc::new(LayeredChannel { image: self.image.clone(), context: context.clone() }))
    }
}

struct LayeredChannel {
    image: Arc<Mutex<Layers>>,
    context: AioContext,
}

fn sectors(offset: u64, bytes: u64) -> std::ops::Range<usize> {
    (offset / SECTOR) as usize..((offset + bytes) / SECTOR) as usize
}

impl IoChannel for LayeredChannel {
    fn preadv(&self, offset: u64, iov: &[IoVec]) -> BlockFuture {
        let (image, context, iov) = (self.image.clone(), self.context.clone(), iov.to_vec());
        BlockFuture::boxed(async move {
            let bytes: Vec<u8> = {
                let image = image.lock().unwrap();
                let sectors = sectors(offset, iovec::total_len(&iov));
                sectors.flat_map(|at| [image.top[at].unwrap_or(image.behind[at]); SECTOR as usize]).collect()
            };
            iovec::fill_from(&iov, &bytes);
            // The content of a moment ago: whoever writes meanwhile would be lost.
            context.sleep(Duration::from_millis(2)).await;
            Ok(())
        })
    }
    fn pwritev(&self, offset: u64, iov: &[IoVec], _: WriteFlags) -> BlockFuture {
        let mut bytes = vec![0; iovec::total_len(iov) as usize];
        iovec::copy_to(iov, &mut bytes);
        let mut image = self.image.lock().unwrap();
        image.writes += 1;
        if let Some(error) = image.error {
            return BlockFuture::ready(Err(error));
        }
        for (at, sector) in sectors(offset, bytes.len() as u64).zip(bytes.chunks(SECTOR as usize)) {
            image.top[at] = Some(sector[0]);
        }
        BlockFuture::ready(Ok(()))
    }
    fn flush(&self) -> BlockFuture {
        BlockFuture::ready(Ok(()))
    }
    fn pdiscard(&self, _: u64, _: u64) -> BlockFuture {
        BlockFuture::ready(Ok(()))
    }
    fn pwrite_zeroes(&self, _: u64, _: u64, _: WriteFlags) -> BlockFuture {
        BlockFuture::ready(Err(BlockError::NotSupported))
    }
    fn block_status(&self, offset: u64, bytes: u64) -> BoxFuture<BlockResult<BlockStatus>> {
        let image = self.image.lock().unwrap();
        let mut all =
            sectors(offset / SECTOR * SECTOR, bytes.next_multiple_of(SECTOR)).map(|at| image.top[at].is_some());
        let allocated = all.next().unwrap();
        let bytes = (1 + all.take_while(|next| *next == allocated).count()) as u64 * SECTOR - offset % SECTOR;
        Box::pin(std::future::ready(Ok(BlockStatus {
            bytes: bytes.min(SECTORS as u64 * SECTOR),
            zero: false,
            allocated,
            ..BlockStatus::default()
        })))
    }
}

struct Fixture {
    image: Arc<Mutex<Layers>>,
    context: AioContext,
    channel: Rc<ChildChannel>,
    _user: Arc<Child>,
}

fn fixture(read_only: bool) -> Fixture {
    let graph = Graph::default();
    let options = parse_keyval("memory,node-name=some,size=512", Some("driver")).unwrap();
    let mut options = (*graph.blockdev_add(options).unwrap().options()).clone();
    options.read_only = read_only;
    let mut top = [None; SECTORS];
    top[8..12].fill(Some(8));
    let behind = std::array::from_fn(|at| at as u8);
    let image = Arc::new(Mutex::new(Layers { top, behind, writes: 0, error: None }));
    let layered =
        Node::new(options.clone(), Options::new(), "layered", Box::new(Layered { image: image.clone() })).unwrap();
    let file = Child::attach(layered, "the filter", Permissions::UNUSED, SECTOR as u32).unwrap();
    let shared = Shared { name: "cor".to_owned(), ranges: Arc::default(), has_failed: AtomicBool::new(false) };
    let filter = CopyOnRead { file: [file], shared: Arc::new(shared) };
    let filter = Node::new(options, Options::new(), "copy-on-read", Box::new(filter)).unwrap();
    let user = Child::attach(filter, "the test", Permissions::device(!read_only), SECTOR as u32).unwrap();
    let context = AioContext::new(PollSettings::default()).unwrap();
    let channel = user.channel(&context).unwrap();
    Fixture { image, context, channel, _user: user }
}

impl Fixture {
    fn read(&self, first: usize, count: usize) -> Vec<u8> {
        let channel = self.channel.clone();
        self.context.run_until(async move {
            let buffer = AlignedBuffer::new(count * SECTOR as usize, 512);
            assert_eq!(channel.preadv(first as u64 * SECTOR, &[buffer.iov()]).await, Ok(()));
            buffer.to_vec().chunks(SECTOR as usize).map(|sector| sector[0]).collect()
        })
    }

    fn top(&self) -> [Option<u8>; SECTORS] {
        self.image.lock().unwrap().top
    }

    fn writes(&self) -> u64 {
        self.image.lock().unwrap().writes
    }
}

#[test]
fn what_is_read_is_there_afterwards_and_nothing_else() {
    let fixture = fixture(false);
    let expected = [6, 7, 8, 8, 8, 8, 12, 13];
    assert_eq!(fixture.read(6, 8), expected);
    let top = fixture.top();
    assert_eq!(top[6..14], expected.map(Some));
    assert!(top[..6].iter().chain(&top[14..]).all(Option::is_none));
    assert_eq!(fixture.writes(), 2, "what was there is not written again");
    assert_eq!(fixture.read(6, 8), expected);
    assert_eq!(fixture.writes(), 2, "nothing is copied twice");
    assert_eq!(fixture.read(0, 1), [0]);
    assert_eq!(fixture.top()[0], Some(0), "zeroes, too");
}

#[test]
fn what_a_guest_writes_meanwhile_is_not_overwritten() {
    let fixture = fixture(false);
    let done = Rc::new(Cell::new(0));
    for round in 0..4u8 {
        let channel = fixture.channel.clone();
        let done = done.clone();
        fixture.context.run_until(async move {
            let (read, mut written) = (AlignedBuffer::new(4096, 512), AlignedBuffer::new(4096, 512));
            written.fill_from(&[200 + round; 4096]);
            // The write covers the second half of what is read, and as much behind it.
            let offset = (12 + 13 * u64::from(round)) * SECTOR;
            let half = offset + 4 * SECTOR;
            let (read, write) = if round % 2 == 0 {
                let read = channel.preadv(offset, &[read.iov()]);
                (read, channel.pwritev(half, &[written.iov()], WriteFlags::default()))
            } else {
                let write = channel.pwritev(half, &[written.iov()], WriteFlags::default());
                (channel.preadv(offset, &[read.iov()]), write)
            };
            // Both at once: the one that begins first must not keep the other from getting on.
            let (mut read, mut write) = (Some(read), Some(write));
            std::future::poll_fn(|cx| {
                for slot in [&mut read, &mut write] {
                    if let Some(future) = slot
                        && let std::task::Poll::Ready(result) = std::pin::Pin::new(future).poll(cx)
                    {
                        assert_eq!(result, Ok(()));
                        *slot = None;
                    }
                }
                if read.is_some() || write.is_some() { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
            })
            .await;
            done.set(done.get() + 1);
        });
        let at = 16 + 13 * usize::from(round);
        assert_eq!(fixture.top()[at..at + 8], [Some(200 + round); 8], "round {round}");
    }
    assert_eq!(done.get(), 4);
}

#[test]
fn a_copy_that_fails_does_not_fail_the_read() {
    let fixture = fixture(false);
    fixture.image.lock().unwrap().error = Some(BlockError::NoSpace);
    assert_eq!(fixture.read(20, 4), [20, 21, 22, 23]);
    assert_eq!(fixture.writes(), 1);
    assert_eq!(fixture.top()[20], None);
}

#[test]
fn nothing_is_copied_into_a_read_only_image() {
    let fixture = fixture(true);
    assert_eq!(fixture.read(20, 4), [20, 21, 22, 23]);
    assert_eq!(fixture.writes(), 0);
}
