//! Images behind images: rebase and commit keep what a guest sees.

use super::Place;

/// Three images, the middle one shorter than both, and the disk as the top shows it. False without QEMU's programs.
fn chain(place: &Place) -> bool {
    place.raw("base.raw", 4);
    if !place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2", "2M"]) {
        return false;
    }
    place.write("qcow2", "middle.qcow2", &["write -P 2 300k 200k", "write -z 1M 64k"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "5M"]);
    place.write("qcow2", "top.qcow2", &["write -P 3 350k 10k", "write -P 4 2500k 3k", "write -z 0 64k"]);
    place.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "disk.raw"])
}

#[test]
fn commits_show_nothing_stale() {
    let place = Place::new();
    if !chain(&place) {
        return;
    }
    // To the next one, which grows; the top is empty then.
    place.img(&["commit", "top.qcow2"]).ok();
    place.same("raw", "disk.raw", "qcow2", "middle.qcow2");
    place.same("raw", "disk.raw", "qcow2", "top.qcow2");
    assert_eq!(place.img(&["map", "--output", "json", "top.qcow2"]).ok().matches("\"depth\":0").count(), 0);
}

#[test]
fn a_shorter_layer_hides_what_lies_behind_its_end() {
    let place = Place::new();
    if !chain(&place) {
        return;
    }
    place.img(&["commit", "-b", "base.raw", "top.qcow2"]).ok();
    // The base had data from 2 MiB on, where the middle had ended.
    place.same("raw", "disk.raw", "raw", "base.raw");
    place.img(&["commit", "-b", "nowhere.raw", "top.qcow2"]).fails(1, &["nowhere.raw"]);
}

#[test]
fn rebased_images_show_the_same() {
    let place = Place::new();
    if !chain(&place) {
        return;
    }
    place.raw("other.raw", 6);
    for (file, format) in [("base.raw", "raw"), ("other.raw", "raw"), ("middle.qcow2", "qcow2"), ("", "")] {
        let words = if file.is_empty() { vec!["-b", ""] } else { vec!["-b", file, "-F", format] };
        place.img(&[&["rebase"], words.as_slice(), &["top.qcow2"]].concat()).ok();
        place.same("raw", "disk.raw", "qcow2", "top.qcow2");
        let info = place.img(&["info", "--json", "top.qcow2"]).json();
        assert_eq!(info["backing-filename"].as_str().unwrap_or(""), file);
    }
}

#[test]
fn unsafe_rebases_change_the_name_alone() {
    let place = Place::new();
    if !chain(&place) {
        return;
    }
    let before = std::fs::read(place.path("top.qcow2")).expect("it exists");
    place.img(&["rebase", "-u", "-b", "elsewhere.qcow2", "-F", "qcow2", "top.qcow2"]).ok();
    let info = place.img(&["info", "--json", "top.qcow2"]).json();
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&"elsewhere.qcow2".into(), &"qcow2".into())
    );
    place.img(&["rebase", "-u", "top.qcow2"]).ok();
    assert!(place.img(&["info", "--json", "top.qcow2"]).json().get("backing-filename").is_none());
    place.img(&["rebase", "-u", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2"]).ok();
    let after = std::fs::read(place.path("top.qcow2")).expect("it exists");
    assert!(before[65536..] == after[65536..]);
    place.same("raw", "disk.raw", "qcow2", "top.qcow2");
}

#[test]
fn chains_that_lead_back_are_found() {
    let place = Place::new();
    if !chain(&place) {
        return;
    }
    place.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "middle.qcow2"]);
    place.img(&["info", "--backing-chain", "top.qcow2"]).fails(1, &["top.qcow2", "leads back"]);
    place.img(&["commit", "top.qcow2"]).fails(1, &[]);
    place.img(&["convert", "top.qcow2", "x.raw"]).fails(1, &["leads back"]);
    assert!(!place.path("x.raw").exists());
}
