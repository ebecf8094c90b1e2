//! What is inside an image besides its disk: snapshots, bitmaps, properties that change, clusters that have their place
//! from the start or are compressed. QEMU finds what we made, and we find what it made.

use super::Place;

/// Without dates, of which each program has its own, and counts of instructions, which no program counted.
fn undated(text: &str) -> String {
    let words = |line: &str| {
        let words = line
            .split_whitespace()
            .filter(|word| !word.starts_with("20") && word.matches(':').count() != 2 && !["0", "--"].contains(word));
        words.collect::<Vec<_>>().join(" ") + "\n"
    };
    text.lines().map(words).collect()
}

#[test]
fn snapshots_are_taken_applied_and_deleted() {
    let place = Place::new();
    if !place.qemu_img(&["create", "-q", "-f", "qcow2", "ours.qcow2", "4M"]) {
        return;
    }
    std::fs::copy(place.path("ours.qcow2"), place.path("theirs.qcow2")).expect("room");
    let both = |verb: &[&str], write: Option<&str>| {
        if let Some(write) = write {
            place.write("qcow2", "ours.qcow2", &[write]);
            place.write("qcow2", "theirs.qcow2", &[write]);
        }
        let ours = place.img(&[&["snapshot"], verb, &["ours.qcow2"]].concat());
        let theirs = place.qemu("qemu-img", &[&["snapshot"], verb, &["theirs.qcow2"]].concat()).expect("installed");
        assert_eq!((ours.status, undated(&ours.out)), (theirs.status, undated(&theirs.out)), "{verb:?}: {}", ours.err);
        place.same("qcow2", "ours.qcow2", "qcow2", "theirs.qcow2");
        let list = |name: &str| undated(&place.qemu("qemu-img", &["snapshot", "-l", name]).expect("installed").ok());
        assert_eq!(list("ours.qcow2"), list("theirs.qcow2"));
        assert_eq!(undated(&place.img(&["snapshot", "-l", "ours.qcow2"]).ok()), list("ours.qcow2"));
    };
    both(&["-c", "first"], Some("write -P 1 0 1M"));
    both(&["-c", "second"], Some("write -P 2 512k 1M"));
    both(&["-a", "first"], Some("write -P 3 0 3M"));
    let converted = |snapshot: &str| {
        place.img(&["convert", "-l", snapshot, "ours.qcow2", "ours.raw"]).ok();
        place.qemu_img(&["convert", "-l", snapshot, "-f", "qcow2", "-O", "raw", "theirs.qcow2", "theirs.raw"]);
        place.same("raw", "ours.raw", "raw", "theirs.raw");
    };
    converted("second");
    converted("snapshot.name=first");
    both(&["-d", "second"], None);
    both(&["-d", "nowhere"], None);
    let info = place.img(&["info", "--json", "ours.qcow2"]).json();
    assert_eq!(info["snapshots"].as_array().map(Vec::len), Some(1));
}

#[test]
fn bitmaps_are_made_merged_and_carried_over() {
    let place = Place::new();
    if !place.qemu_img(&["create", "-q", "-f", "qcow2", "disk.qcow2", "4M"]) {
        return;
    }
    place.img(&["bitmap", "--add", "-g", "64k", "disk.qcow2", "b0"]).ok();
    place.img(&["bitmap", "--add", "--disable", "disk.qcow2", "b1"]).ok();
    place.write("qcow2", "disk.qcow2", &["write -P 1 1M 64k", "write -P 1 3M 1k"]);
    place.img(&["bitmap", "--merge", "b0", "disk.qcow2", "b1"]).ok();
    let told = |name: &str| {
        let words = ["info", "--output", "json", "-f", "qcow2", name];
        let theirs = place.qemu("qemu-img", &words).expect("installed").json();
        let ours = place.img(&words).json();
        assert_eq!(ours["format-specific"], theirs["format-specific"]);
        theirs["format-specific"]["data"]["bitmaps"].clone()
    };
    let bitmaps = told("disk.qcow2");
    assert_eq!(bitmaps.as_array().map(Vec::len), Some(2), "{bitmaps}");
    place.qemu_img(&["check", "-q", "-f", "qcow2", "disk.qcow2"]);
    place.img(&["convert", "--bitmaps", "disk.qcow2", "copy.qcow2"]).ok();
    assert_eq!(told("copy.qcow2"), bitmaps);
    place.same("qcow2", "disk.qcow2", "qcow2", "copy.qcow2");
    for words in [&["--clear"][..], &["--enable"], &["--remove"]] {
        place.img(&[&["bitmap"], words, &["disk.qcow2", "b1"]].concat()).ok();
        place.qemu_img(&["check", "-q", "-f", "qcow2", "disk.qcow2"]);
    }
    place.img(&["bitmap", "--remove", "disk.qcow2", "b1"]).fails(1, &["b1"]);
    assert_eq!(told("disk.qcow2").as_array().map(Vec::len), Some(1));
}

#[test]
fn properties_change_as_qemu_img_changes_them() {
    let place = Place::new();
    if !place.qemu_img(&["create", "-q", "-f", "qcow2", "ours.qcow2", "4M"]) {
        return;
    }
    place.write("qcow2", "ours.qcow2", &["write -P 1 1M 1M", "write -z 3M 64k"]);
    std::fs::copy(place.path("ours.qcow2"), place.path("theirs.qcow2")).expect("room");
    for options in
        ["lazy_refcounts=on", "lazy_refcounts=off", "compat=0.10", "compat=1.1", "refcount_bits=1", "size=6M"]
    {
        place.img(&["amend", "-o", options, "ours.qcow2"]).ok();
        place.qemu_img(&["amend", "-f", "qcow2", "-o", options, "theirs.qcow2"]);
        place.same("qcow2", "ours.qcow2", "qcow2", "theirs.qcow2");
        let info = |name: &str| {
            let info = place.qemu("qemu-img", &["info", "--output", "json", "-f", "qcow2", name]).expect("installed");
            info.json()["format-specific"].clone()
        };
        assert_eq!(info("ours.qcow2"), info("theirs.qcow2"), "{options}");
    }
    place.img(&["amend", "-o", "cluster_size=4k", "ours.qcow2"]).fails(1, &["cluster_size"]);
}

#[test]
fn preallocated_images_have_their_clusters() {
    let place = Place::new();
    place.raw("source.raw", 4);
    for how in ["metadata", "falloc", "full"] {
        let options = format!("preallocation={how}");
        place.img(&["create", "-q", "-f", "qcow2", "-o", &options, "made.qcow2", "4M"]).ok();
        place.img(&["check", "-q", "made.qcow2"]).ok();
        let check = place.img(&["check", "--json", "made.qcow2"]).json();
        assert_eq!(check["allocated-clusters"], check["total-clusters"], "{how}");
        place.qemu_img(&["check", "-q", "-f", "qcow2", "made.qcow2"]);
        place.img(&["convert", "-o", &options, "source.raw", "full.qcow2"]).ok();
        place.same("raw", "source.raw", "qcow2", "full.qcow2");
    }
    place.img(&["resize", "-q", "--preallocation", "metadata", "made.qcow2", "6M"]).ok();
    place.qemu_img(&["check", "-q", "-f", "qcow2", "made.qcow2"]);
}

#[test]
fn compressed_images_are_smaller_and_the_same() {
    let place = Place::new();
    place.raw("source.raw", 9);
    place.img(&["convert", "-O", "qcow2", "source.raw", "plain.qcow2"]).ok();
    let plain = std::fs::metadata(place.path("plain.qcow2")).expect("it was made").len();
    for options in
        ["compression_type=zlib", "compression_type=zstd", "cluster_size=4k", "cluster_size=2M", "compat=0.10"]
    {
        place.img(&["convert", "-c", "-O", "qcow2", "-o", options, "source.raw", "made.qcow2"]).ok();
        place.same("raw", "source.raw", "qcow2", "made.qcow2");
        let bytes = std::fs::metadata(place.path("made.qcow2")).expect("it was made").len();
        // Tables take whole clusters, too.
        assert!(bytes < plain || options.ends_with("2M"), "{options}: {bytes} of {plain} bytes");
        let check = place.img(&["check", "--json", "made.qcow2"]).json();
        assert!(check["compressed-clusters"].as_u64() > Some(0), "{options}: {check}");
        // Several images, whose seams lie inside clusters.
        std::fs::write(place.path("odd.raw"), [5; 5120]).expect("room");
        place.img(&["convert", "-c", "-O", "qcow2", "-o", options, "odd.raw", "source.raw", "all.qcow2"]).ok();
        place.qemu_img(&["convert", "-f", "raw", "-O", "raw", "odd.raw", "source.raw", "all.raw"]);
        place.same("raw", "all.raw", "qcow2", "all.qcow2");
    }
}
