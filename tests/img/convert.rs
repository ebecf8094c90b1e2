//! Images converted in all directions: what a guest sees stays the same, and QEMU finds the results whole.

use std::os::unix::fs::MetadataExt;

use super::Place;

#[test]
fn contents_survive_every_conversion() {
    let place = Place::new();
    place.raw("source.raw", 9);
    for (number, options) in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "extended_l2=on",
        "data_file=data,data_file_raw=on",
    ]
    .iter()
    .enumerate()
    {
        for more in [&[][..], &["-W", "-m", "16"], &["-S", "64k"], &["-S", "0", "-m", "1"]] {
            let words = [&["convert", "-O", "qcow2", "-o", options], more, &["source.raw", "made.qcow2"]].concat();
            place.img(&words).ok();
            place.same("raw", "source.raw", "qcow2", "made.qcow2");
            // Back, and from qcow2 to qcow2.
            place.img(&["convert", "made.qcow2", "back.raw"]).ok();
            place.same("raw", "source.raw", "raw", "back.raw");
            if number % 2 == 0 {
                place.img(&["convert", "made.qcow2", "again.qcow2"]).ok();
                place.same("qcow2", "made.qcow2", "qcow2", "again.qcow2");
            }
        }
    }
}

#[test]
fn holes_stay_holes() {
    let place = Place::new();
    place.raw("source.raw", 8);
    let blocks = |name: &str| std::fs::metadata(place.path(name)).expect("it was made").blocks();
    place.img(&["convert", "source.raw", "sparse.raw"]).ok();
    place.img(&["convert", "source.raw", "made.qcow2"]).ok();
    assert!(blocks("sparse.raw") <= blocks("source.raw") + 64);
    assert!(blocks("made.qcow2") <= blocks("source.raw") * 2, "clusters hold at least one block of data");
    place.img(&["convert", "-S", "0", "source.raw", "whole.raw"]).ok();
    assert!(blocks("whole.raw") >= 8 * 2048, "{}", blocks("whole.raw"));
    place.same("raw", "source.raw", "raw", "whole.raw");
}

#[test]
fn several_images_become_one() {
    let place = Place::new();
    place.raw("a.raw", 1);
    place.raw("b.raw", 2);
    std::fs::write(place.path("odd.raw"), [5; 1000]).expect("room");
    place.img(&["convert", "-O", "qcow2", "a.raw", "odd.raw", "b.raw", "all.qcow2"]).ok();
    place.img(&["convert", "all.qcow2", "all.raw"]).ok();
    let read = |name: &str| std::fs::read(place.path(name)).expect("it exists");
    // The odd one is filled up to a sector.
    assert!(read("all.raw") == [read("a.raw"), read("odd.raw"), vec![0; 24], read("b.raw")].concat());
}

#[test]
fn a_target_over_a_backing_file_holds_the_difference() {
    let place = Place::new();
    place.raw("base.raw", 4);
    let overlay = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "overlay.qcow2", "6M"];
    if !place.qemu_img(&overlay) {
        return;
    }
    place.write("qcow2", "overlay.qcow2", &["write -P 3 1M 64k", "write -z 0 128k", "write -P 8 5M 1k"]);
    place.img(&["convert", "-B", "base.raw", "-F", "raw", "overlay.qcow2", "copy.qcow2"]).ok();
    place.same("qcow2", "overlay.qcow2", "qcow2", "copy.qcow2");
    let bytes = std::fs::metadata(place.path("copy.qcow2")).expect("it was made").len();
    assert!(bytes < 1 << 20, "{bytes} bytes");
    // An image of its own shows none of what is behind the new one.
    place.qemu_img(&["create", "-q", "-f", "qcow2", "empty.qcow2", "6M"]);
    place.img(&["convert", "-B", "base.raw", "-F", "raw", "empty.qcow2", "zero.qcow2"]).ok();
    place.same("qcow2", "empty.qcow2", "qcow2", "zero.qcow2");
}

#[test]
fn a_target_that_is_there_is_written_over_in_place() {
    let place = Place::new();
    place.raw("source.raw", 3);
    if !place.qemu_img(&["create", "-q", "-f", "qcow2", "target.qcow2", "5M"]) {
        return;
    }
    place.write("qcow2", "target.qcow2", &["write -P 1 0 5M"]);
    place.img(&["convert", "-n", "source.raw", "target.qcow2"]).ok();
    place.img(&["resize", "-q", "--shrink", "target.qcow2", "3M"]).ok();
    place.same("raw", "source.raw", "qcow2", "target.qcow2");
    // Nothing is written where the target is said to be zero.
    place.write("qcow2", "target.qcow2", &["write -P 1 768k 64k"]);
    place.img(&["convert", "-n", "--target-is-zero", "source.raw", "target.qcow2"]).ok();
    place.write("qcow2", "target.qcow2", &["read -P 1 768k 64k"]);
    place.img(&["resize", "-q", "--shrink", "target.qcow2", "1M"]).ok();
    place.img(&["convert", "-n", "source.raw", "target.qcow2"]).fails(1, &["target.qcow2", "needed"]);
}

#[test]
fn blocks_are_copied_by_dd() {
    let place = Place::new();
    place.raw("source.raw", 1);
    let source = std::fs::read(place.path("source.raw")).expect("it exists");
    let copied = |words: &[&str]| {
        place.img(&[&["dd", "if=source.raw", "of=copy.raw"], words].concat()).ok();
        std::fs::read(place.path("copy.raw")).expect("it was made")
    };
    assert!(copied(&[]) == source);
    assert!(copied(&["bs=1k", "skip=3", "count=5"]) == source[3072..8192]);
    assert!(copied(&["bs=1M", "skip=7"]).is_empty());
    place.img(&["dd", "-O", "qcow2", "bs=64k", "count=8", "if=source.raw", "of=copy.qcow2"]).ok();
    place.img(&["convert", "copy.qcow2", "copy.raw"]).ok();
    assert!(std::fs::read(place.path("copy.raw")).expect("it was made") == source[..8 * 65536]);
}
