//! Counts what a read costs whose mapping is in memory: `lookup DRIVER READS`, under callgrind. The difference between two
//! numbers of reads is theirs alone. DRIVER is raw or qcow2, over a node in memory.

use std::error::Error;

use blockport_block::aio::{AioContext, AioSettings};
use blockport_block::drivers::qcow2::{CreateOptions, create};
use blockport_block::iovec::AlignedBuffer;
use blockport_block::options::parse_keyval;
use blockport_block::{Child, Graph, Permissions};

const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo adds arguments of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let [driver, reads] = arguments.as_slice() else { return Ok(()) };
    let reads: u64 = reads.parse()?;
    let graph = Graph::default();
    let add = |options: &str| {
        graph.blockdev_add(parse_keyval(options, Some("driver")).map_err(|e| e.to_string())?).map_err(|e| e.0)
    };
    let _memory = add(&format!("memory,node-name=m,size={}", 2 * SIZE))?;
    if driver == "qcow2" {
        create(&graph, "m", None, &CreateOptions { size: SIZE, ..CreateOptions::default() }).map_err(|e| e.0)?;
    }
    let node = add(&format!("{driver},node-name=n,file=m"))?;
    let child = Child::attach(node, "the bench", Permissions::device(true), 512).map_err(|e| e.0)?;
    let context = AioContext::new(AioSettings::default())?;
    let channel = child.channel(&context).map_err(|e| e.0)?;
    context.run_until(async move {
        let buffer = AlignedBuffer::new(1 << 20, 4096);
        for at in (0..SIZE).step_by(1 << 20) {
            channel.pwritev(at, &[buffer.iov()], Default::default()).await?;
        }
        let mut place = 1u64;
        for _ in 0..reads {
            place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (place >> 33) % (SIZE / BLOCK) * BLOCK;
            channel.preadv(at, &[buffer.iov().part(0, BLOCK as usize)]).await?;
        }
        Ok::<(), blockport_block::BlockError>(())
    })?;
    Ok(())
}
