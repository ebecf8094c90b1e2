//! What is refused: images that are in use, targets that are sources, options that are wrong; and what is left then.

use std::fs;
use std::os::unix::fs::symlink;

use super::Place;
use crate::backend::Setup;
use crate::image::Image;

#[test]
fn nothing_is_written_over_its_own_source() {
    let place = Place::new();
    place.raw("disk.raw", 1);
    let before = fs::read(place.path("disk.raw")).expect("it exists");
    symlink(place.path("disk.raw"), place.path("link.raw")).expect("room");
    fs::hard_link(place.path("disk.raw"), place.path("hard.raw")).expect("room");
    place.img(&["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "over.qcow2"]).ok();
    for target in ["disk.raw", "./disk.raw", "link.raw", "hard.raw"] {
        for source in ["disk.raw", "over.qcow2"] {
            place.img(&["convert", source, target]).fails(1, &[target]);
            place.img(&["convert", "-n", "-O", "raw", source, target]).fails(1, &[]);
            place.img(&["dd", &format!("if={source}"), &format!("of={target}")]).fails(1, &[target]);
        }
        place.img(&["create", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", target]).fails(1, &[target]);
        place.img(&["create", "-f", "qcow2", "-b", "over.qcow2", "-F", "qcow2", target]).fails(1, &[target]);
        place
            .img(&["convert", "-O", "qcow2", "-B", "over.qcow2", "-F", "qcow2", "over.qcow2", target])
            .fails(1, &[target]);
    }
    place.img(&["rebase", "-b", "over.qcow2", "-F", "qcow2", "over.qcow2"]).fails(1, &["behind itself"]);
    assert!(before == fs::read(place.path("disk.raw")).expect("it exists"));
}

#[test]
fn an_image_that_is_served_is_refused() {
    let image = Image::filled(1 << 20);
    let path = image.path().to_str().expect("UTF-8").to_owned();
    let node = format!("driver=raw,node-name=d0,file.driver=file,file.filename={path}");
    let backend = Setup::new("d0", &[&node]).start();
    let place = Place::new();
    place.raw("other.raw", 1);
    let before = image.read(0, 1 << 20);
    for words in [
        &["resize", &path, "2M"][..],
        &["create", "-f", "raw", &path, "1M"],
        &["create", "-f", "qcow2", &path, "1M"],
        &["convert", "other.raw", &path],
        &["convert", "-n", "other.raw", &path],
        &["dd", "if=other.raw", &format!("of={path}")],
        &["info", &path],
    ] {
        place.img(words).fails(1, &[&path, "lock"]);
    }
    place.img(&["info", "-U", &path]).ok();
    assert!(before == image.read(0, 1 << 20));
    backend.stop();
    place.img(&["resize", &path, "2M"]).ok();
}

#[test]
fn a_conversion_that_fails_leaves_no_image() {
    let place = Place::new();
    place.raw("source.raw", 2);
    place.img(&["convert", "-q", "-O", "qcow2", "source.raw", "damaged.qcow2"]).ok();
    // The first L2 table lies at no place of the file.
    let mut image = fs::read(place.path("damaged.qcow2")).expect("it exists");
    let l1 = u64::from_be_bytes(image[40..48].try_into().expect("eight bytes")) as usize;
    image[l1..l1 + 8].copy_from_slice(&0x8000_0000_0000_0200_u64.to_be_bytes());
    fs::write(place.path("damaged.qcow2"), image).expect("room");
    for target in ["target.raw", "target.qcow2"] {
        place.img(&["convert", "damaged.qcow2", target]).fails(1, &["source"]);
        assert!(!place.path(target).exists(), "{target}");
    }
    place.img(&["convert", "-c", "source.raw", "target.raw"]).fails(1, &["compressed"]);
    assert!(!place.path("target.raw").exists());
    place.img(&["convert", "nowhere.raw", "target.raw"]).fails(1, &["nowhere.raw"]);
    assert!(!place.path("target.raw").exists());
}

#[test]
fn formats_are_never_told_by_the_content() {
    let place = Place::new();
    place.img(&["create", "-q", "-f", "qcow2", "image.qcow2", "1M"]).ok();
    fs::copy(place.path("image.qcow2"), place.path("image.raw")).expect("room");
    assert_eq!(place.img(&["info", "--json", "image.qcow2"]).json()["format"], "qcow2");
    let raw = place.img(&["info", "--json", "image.raw"]).json();
    assert_eq!(raw["format"], "raw");
    // An image behind another one has to be stated.
    place.img(&["create", "-f", "qcow2", "-b", "image.qcow2", "over.qcow2"]).fails(1, &["never guessed", "-F"]);
    place.img(&["rebase", "-b", "image.qcow2", "image.qcow2"]).fails(1, &["never guessed", "-F"]);
    assert!(!place.path("over.qcow2").exists());
}

#[test]
fn wrong_options_are_named() {
    let place = Place::new();
    place.raw("disk.raw", 1);
    for (words, status, says) in [
        (&["create", "-f", "qcow2", "-o", "cluster_size=3k", "x", "1M"][..], 1, &["cluster size"][..]),
        (&["create", "-f", "qcow2", "-o", "cluster_sise=4k", "x", "1M"], 1, &["cluster_sise"]),
        (&["create", "-f", "qcow2", "-o", "compat=4", "x", "1M"], 1, &["compat", "4"]),
        (&["create", "-f", "raw", "-o", "preallocation=metadata", "x", "1M"], 1, &["preallocation"]),
        (&["create", "-f", "raw", "-b", "disk.raw", "-F", "raw", "x", "1M"], 1, &["raw"]),
        (&["create", "-f", "foo", "x", "1M"], 1, &["foo"]),
        (&["create", "-f", "qcow2", "x"], 1, &["size"]),
        (&["create", "-f", "qcow2", "x", "much"], 1, &["much"]),
        (&["resize", "disk.raw", "512"], 1, &["--shrink"]),
        (&["resize", "disk.raw", "-2M"], 1, &["size"]),
        (&["info", "nowhere.qcow2"], 1, &["nowhere.qcow2"]),
        (&["info", "-f", "foo", "disk.raw"], 1, &["foo", "qcow2"]),
        (&["check", "disk.raw"], 63, &["raw"]),
        (&["check", "--repair", "disk.raw", "x"], 1, &["leaks"]),
        (&["rebase", "-u", "disk.raw"], 1, &["raw"]),
        (&["rebase", "disk.raw"], 1, &["-b"]),
        (&["convert", "disk.raw"], 1, &["FILENAME"]),
        (&["dd", "if=disk.raw"], 1, &["of="]),
        (&["dd", "if=disk.raw", "of=x", "ibs=3"], 1, &["ibs"]),
        (&["measure", "-O", "qcow2"], 1, &["--size"]),
        (&["compare", "disk.raw"], 2, &[]),
        (&["bitmap", "disk.raw", "b"], 1, &["--add"]),
        (&["frobnicate"], 1, &["frobnicate"]),
    ] {
        place.img(words).fails(status, says);
        assert!(!place.path("x").exists(), "{words:?}");
    }
}
