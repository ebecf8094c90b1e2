//! Bitmaps of a qcow2 image that is served: made and changed by command, marked by the guest, there at the next start.

use blockport_block::Graph;
use blockport_block::drivers::qcow2::{BitmapInfo, CreateOptions, bitmap_ranges, bitmaps, new_image};
use blockport_block::options::parse_keyval;
use serde_json::json;

use super::client::Monitored;
use crate::backend::Setup;
use crate::frontend::blk::{OK, Request};
use crate::frontend::device::Profile;
use crate::image::{Image, pattern};

const PIECE: u64 = 64 << 10;

#[test]
fn bitmaps_are_made_and_changed_by_command() {
    // Beside the image, and gone with it.
    let image = Image::empty(0);
    let bytes = new_image(&CreateOptions { size: 4 << 20, ..CreateOptions::default() }).expect("valid options");
    std::fs::write(image.path(), bytes).expect("the directory is writable");
    let file = image.path().display();
    let node = format!("driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename={file}");
    let daemon = Monitored::start(Setup::new("d0", &[&node]));
    let mut client = daemon.client();
    let mut device = daemon.backend.device(&Profile::qemu());
    let mut write = |at: u64| {
        let request = Request::write(at * PIECE / 512, &pattern(1, 4096));
        assert_eq!(device.queue().request(&request).status, OK);
    };
    let add = |name: &str, disabled: bool| json!({"node": "d0", "name": name, "persistent": true, "granularity": PIECE, "disabled": disabled});
    client.ok("block-dirty-bitmap-add", add("a", false));
    client.ok("block-dirty-bitmap-add", add("b", true));
    client.ok("block-dirty-bitmap-add", add("gone", false));
    client.refused("block-dirty-bitmap-add", add("a", false));
    client.refused("block-dirty-bitmap-add", json!({"node": "d0", "name": "c"}));
    write(0);
    client.ok("block-dirty-bitmap-clear", json!({"node": "d0", "name": "a"}));
    write(3);
    client.ok("block-dirty-bitmap-disable", json!({"node": "d0", "name": "a"}));
    client.ok("block-dirty-bitmap-enable", json!({"node": "d0", "name": "b"}));
    write(5);
    let sources = json!(["a", {"node": "d0", "name": "b"}]);
    client.ok("block-dirty-bitmap-merge", json!({"node": "d0", "target": "b", "bitmaps": sources}));
    client.refused("block-dirty-bitmap-merge", json!({"node": "d0", "target": "b", "bitmaps": [7]}));
    client.ok("block-dirty-bitmap-remove", json!({"node": "d0", "name": "gone"}));
    client.refused("block-dirty-bitmap-remove", json!({"node": "d0", "name": "gone"}));
    drop((device, client));
    daemon.backend.stop();

    let graph = Graph::default();
    let options = format!("qcow2,node-name=d0,read-only=on,file.driver=file,file.filename={file}");
    let node = graph.blockdev_add(parse_keyval(&options, Some("driver")).expect("syntax")).expect("it opens");
    let list: Vec<(String, bool)> = bitmaps(&node)
        .expect("they can be read")
        .into_iter()
        .map(|BitmapInfo { name, enabled, .. }| (name, enabled))
        .collect();
    assert_eq!(list, [("a".to_owned(), false), ("b".to_owned(), true)]);
    let piece = |at: u64| (at * PIECE, PIECE);
    assert_eq!(bitmap_ranges(&node, "a").expect("it can be used"), [piece(3)]);
    assert_eq!(bitmap_ranges(&node, "b").expect("it can be used"), [piece(3), piece(5)]);
}
