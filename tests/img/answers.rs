//! What is said of images: the same as qemu-img says, in JSON field by field, for people word by word.

use super::Place;

/// Images of many kinds, as `(name, format)`; empty without QEMU's programs.
fn images(place: &Place) -> Vec<(&'static str, &'static str)> {
    place.raw("base.raw", 2);
    let create = |words: &[&str]| place.qemu_img(&[&["create", "-q", "-f", "qcow2"], words].concat());
    if !create(&["plain.qcow2", "3M"]) {
        return Vec::new();
    }
    create(&["-o", "compat=0.10", "old.qcow2", "3M"]);
    create(&["-o", "cluster_size=4k,refcount_bits=1", "small.qcow2", "3M"]);
    create(&["-o", "extended_l2=on,compression_type=zstd", "extended.qcow2", "3M"]);
    create(&["-o", "lazy_refcounts=on", "lazy.qcow2", "3M"]);
    create(&["-b", "base.raw", "-F", "raw", "overlay.qcow2", "3M"]);
    create(&["-b", "overlay.qcow2", "-F", "qcow2", "top.qcow2"]);
    create(&["-o", "data_file=data.raw,data_file_raw=on", "data.qcow2", "3M"]);
    let names = ["plain", "old", "small", "extended", "lazy", "overlay", "data"];
    for name in names.map(|name| format!("{name}.qcow2")) {
        let zeroes = if name.starts_with("data") { "length" } else { "write -z 256k 128k" };
        place.write("qcow2", &name, &["write -P 1 0 128k", "write -P 2 1M 64k", zeroes, "write -P 4 2M 64k"]);
    }
    for name in ["plain.qcow2", "small.qcow2", "extended.qcow2"] {
        place.write("qcow2", name, &["write -c -P 3 512k 64k"]);
    }
    place.write("qcow2", "top.qcow2", &["write -P 6 64k 64k", "write -z 1M 64k"]);
    vec![
        ("base.raw", "raw"),
        ("plain.qcow2", "qcow2"),
        ("old.qcow2", "qcow2"),
        ("small.qcow2", "qcow2"),
        ("extended.qcow2", "qcow2"),
        ("lazy.qcow2", "qcow2"),
        ("overlay.qcow2", "qcow2"),
        ("top.qcow2", "qcow2"),
        ("data.qcow2", "qcow2"),
    ]
}

#[test]
fn answers_in_json_are_those_of_qemu_img() {
    let place = Place::new();
    for (name, format) in images(&place) {
        for question in [
            &["info"][..],
            &["info", "--backing-chain"],
            &["map"],
            &["map", "--start-offset", "100k", "--max-length", "1M"],
            &["check"],
            &["measure", "-O", "qcow2"],
            &["measure", "-O", "raw"],
            &["measure", "-O", "qcow2", "-o", "cluster_size=2M"],
            &["measure", "-O", "qcow2", "-o", "extended_l2=on,preallocation=full"],
        ] {
            let words = [question, &["--output", "json", "-f", format, name]].concat();
            let theirs = place.qemu("qemu-img", &words).expect("it made the image");
            let ours = place.img(&words);
            assert_eq!(ours.status, theirs.status, "{words:?}: {}", ours.err);
            if theirs.status == 0 {
                assert_eq!(ours.json(), theirs.json(), "{words:?}");
            }
        }
    }
}

#[test]
fn answers_for_people_are_those_of_qemu_img() {
    let place = Place::new();
    for (name, format) in images(&place) {
        for question in [&["info"][..], &["info", "--backing-chain"], &["map"], &["check"], &["measure", "-O", "qcow2"]]
        {
            let words = [question, &["-f", format, name]].concat();
            let theirs = place.qemu("qemu-img", &words).expect("it made the image");
            let ours = place.img(&words);
            assert_eq!((ours.status, &ours.out), (theirs.status, &theirs.out), "{words:?}: {}", ours.err);
        }
    }
}

#[test]
fn new_images_are_those_that_qemu_img_makes() {
    let place = Place::new();
    place.raw("base.raw", 2);
    for (options, backing) in [
        ("cluster_size=64k", false),
        ("compat=0.10", false),
        ("compat=v3,cluster_size=512,refcount_bits=64", false),
        ("cluster_size=2M,extended_l2=on", false),
        ("compression_type=zstd", true),
        ("cluster_size=4k", true),
        ("lazy_refcounts=on", false),
        ("data_file=DATA,data_file_raw=on", false),
    ] {
        let create = |name: &str| {
            let options = options.replace("DATA", &format!("{name}.data"));
            let mut words = vec!["create", "-f", "qcow2", "-o", &options];
            words.extend(if backing { &["-b", "base.raw", "-F", "raw"][..] } else { &[] });
            words.push(name);
            words.extend((!backing).then_some("5M"));
            words.into_iter().map(str::to_owned).collect::<Vec<String>>()
        };
        let theirs = create("theirs");
        let theirs: Vec<&str> = theirs.iter().map(String::as_str).collect();
        let Some(said) = place.qemu("qemu-img", &theirs) else { return };
        let ours = create("ours");
        let ours: Vec<&str> = ours.iter().map(String::as_str).collect();
        assert_eq!(place.img(&ours).ok(), said.ok().replace("theirs", "ours"), "{options}");
        let info = |name: &str| {
            let ran = place.qemu("qemu-img", &["info", "--output", "json", "-f", "qcow2", name]).expect("installed");
            let mut info = ran.json();
            info["children"] = serde_json::Value::Null;
            info["actual-size"] = serde_json::Value::Null;
            info.to_string().replace(name, "NAME")
        };
        assert_eq!(info("ours"), info("theirs"), "{options}");
        place.write("qcow2", "ours", &["write -P 1 1M 1M", "read -P 1 1M 1M"]);
        place.qemu_img(&["check", "-q", "-f", "qcow2", "ours"]);
    }
}

#[test]
fn raw_images_get_the_space_that_is_asked_for() {
    let place = Place::new();
    for (how, blocks) in [("off", 0), ("falloc", 2048), ("full", 2048)] {
        place.img(&["create", "-q", "-f", "raw", "-o", &format!("preallocation={how}"), "disk", "1M"]).ok();
        let meta = std::fs::metadata(place.path("disk")).expect("it was made");
        assert_eq!(meta.len(), 1 << 20);
        assert!(std::os::unix::fs::MetadataExt::blocks(&meta) >= blocks, "{how}");
    }
}

#[test]
fn damaged_images_are_found_and_repaired() {
    let place = Place::new();
    if !place.qemu_img(&["create", "-q", "-f", "qcow2", "leak.qcow2", "4M"]) {
        return;
    }
    place.write("qcow2", "leak.qcow2", &["write -P 1 0 1M"]);
    let image = std::fs::read(place.path("leak.qcow2")).expect("it exists");
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes")) as usize;
    let block = word(word(48));
    let (mut leaks, mut errors) = (image.clone(), image.clone());
    // A cluster that nothing refers to, and one in use, with another refcount each.
    leaks.resize(41 << 16, 0);
    leaks[block + 2 * 40 + 1] = 1;
    errors[block + 2 * 8 + 1] = 0;
    for (name, content, status, key) in [("leak.qcow2", leaks, 3, "leaks"), ("error.qcow2", errors, 2, "corruptions")] {
        std::fs::write(place.path(name), content).expect("room");
        let words = ["check", "--output", "json", "-f", "qcow2", name];
        let ours = place.img(&words);
        let theirs = place.qemu("qemu-img", &words).expect("installed");
        assert_eq!((ours.status, theirs.status), (status, status), "{}", ours.err);
        assert!(ours.json()[key].as_u64() > Some(0), "{}", ours.out);
        // Repairs of leaks leave errors alone.
        let after = place.img(&["check", "-q", "-r", "leaks", "-f", "qcow2", name]).status;
        assert_eq!(after, if status == 3 { 0 } else { 2 });
        assert_eq!(place.img(&["check", "--repair", name]).status, 0);
        place.qemu_img(&["check", "-q", "-f", "qcow2", name]);
    }
}

#[test]
fn images_are_compared_as_qemu_img_does() {
    let place = Place::new();
    place.raw("a.raw", 2);
    place.raw("longer.raw", 3);
    if !place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"]) {
        return;
    }
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "other.qcow2"]);
    place.write("qcow2", "other.qcow2", &["write -P 9 1300k 1k"]);
    place.qemu_img(&["create", "-q", "-f", "raw", "empty.raw", "2M"]);
    place.qemu_img(&["create", "-q", "-f", "raw", "long.raw", "3M"]);
    for words in [
        &["-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"][..],
        &["-f", "raw", "-F", "qcow2", "a.raw", "other.qcow2"],
        &["-f", "raw", "-F", "raw", "a.raw", "longer.raw"],
        &["-s", "-f", "raw", "-F", "raw", "a.raw", "longer.raw"],
        &["-f", "raw", "-F", "raw", "empty.raw", "long.raw"],
        &["-f", "raw", "-F", "raw", "empty.raw", "a.raw"],
        &["-q", "-f", "raw", "-F", "raw", "empty.raw", "a.raw"],
    ] {
        let words = [&["compare"], words].concat();
        let theirs = place.qemu("qemu-img", &words).expect("installed");
        let ours = place.img(&words);
        assert_eq!((ours.status, ours.out), (theirs.status, theirs.out), "{words:?}: {}", ours.err);
    }
    place.img(&["compare", "a.raw", "nowhere.raw"]).fails(2, &["nowhere.raw"]);
}
