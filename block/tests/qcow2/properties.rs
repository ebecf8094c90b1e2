//! Properties of images: made with every option, preallocated, amended, with lazy refcounts.

use blockport_block::drivers::qcow2::{
    AmendOptions, CreateOptions, Preallocation, amend, check, create as create_in, info, measure, resize,
};

use crate::images::{check_clean, compare, create, create_raw, qemu};
use crate::testing::oracle::{Oracle, read};
use crate::testing::random::Random;
use crate::testing::{TempDir, channel, context, open, opened, opened_in, user};
use blockport_block::Graph;

fn options(path: &str) -> String {
    format!("qcow2,discard=unmap,file.driver=file,file.filename={path}")
}

/// Random requests to an image; returns what a guest sees then.
fn use_it(seed: u64, options: &str) -> Vec<u8> {
    let (graph, node) = opened(options);
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let content = context.run_until(async move {
        let mut oracle = Oracle::new(channel, true, seed).await;
        for _ in 0..12 {
            oracle.batch().await;
        }
        oracle.verify().await;
        oracle.content().to_vec()
    });
    drop((child, node, graph));
    content
}

#[test]
fn images_are_made_with_what_is_asked_for_already_there() {
    for (seed, (mode, cluster_size, extended_l2, data)) in (1..).zip([
        (Preallocation::Off, 65536, false, false),
        (Preallocation::Metadata, 65536, false, false),
        (Preallocation::Metadata, 512, false, false),
        (Preallocation::Falloc, 4096, false, false),
        (Preallocation::Full, 16384, true, false),
        (Preallocation::Metadata, 65536, false, true),
        (Preallocation::Full, 4096, false, true),
    ]) {
        let place = TempDir::on_disk();
        let path = place.path("disk");
        create_raw(&path, &[0xee; 100_000]);
        create_raw(&place.path("data"), &[]);
        let graph = Graph::default();
        let file = opened_in(&graph, &format!("file,node-name=f,filename={path}"));
        let other = opened_in(&graph, &format!("file,node-name=d,filename={}", place.path("data")));
        let create_options = CreateOptions {
            size: (1 << 20) + 1024,
            cluster_size,
            extended_l2,
            data_file: data.then(|| place.path("data")),
            preallocation: mode,
            ..Default::default()
        };
        create_in(&graph, "f", data.then_some("d"), &create_options).expect("it can be made");
        drop((file, other, graph));
        check_clean(&path);
        compare(&path, &vec![0; (1 << 20) + 1024]);
        let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).expect("it exists")) * 512;
        let reserved = matches!(mode, Preallocation::Falloc | Preallocation::Full) && !data;
        assert_eq!(used >= 1 << 20, reserved, "{mode:?}: {used} bytes");
        if mode != Preallocation::Off {
            let (_graph, node) = opened(&format!("{},read-only=on", options(&path)));
            let report = check(&node, false).expect("it can be read");
            assert_eq!(report.allocated_clusters, report.total_clusters);
        }
        if mode != Preallocation::Off && !data {
            let measured = measure(&create_options, 0).expect("the options are right");
            let length = std::fs::metadata(&path).expect("it exists").len();
            assert!(length <= measured.fully_allocated + 2 * cluster_size, "{length}, {measured:?}");
        }
        compare(&path, &use_it(seed, &options(&path)));
        check_clean(&path);
    }
}

#[test]
fn a_disk_grows_with_what_is_asked_for_already_there() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 1 << 20, ..Default::default() });
    let content = use_it(3, &options(&path));
    let (graph, node) = opened(&options(&path));
    resize(&node, 2 << 20, Preallocation::Metadata).expect("it can grow");
    drop((node, graph));
    check_clean(&path);
    compare(&path, &[content.as_slice(), &vec![0; 1 << 20]].concat());
}

#[test]
fn sizes_are_measured_as_qemu_measures_them() {
    for (size, cluster_size, extended_l2, refcount_bits) in
        [(1u64 << 30, 65536, false, 16), (123 << 20, 512, false, 64), (5 << 30, 16384, true, 16), (0, 65536, false, 1)]
    {
        let create_options = CreateOptions { size, cluster_size, extended_l2, refcount_bits, ..Default::default() };
        let ours = measure(&create_options, 0).expect("the options are right");
        let extended = if extended_l2 { "on" } else { "off" };
        let given = format!("cluster_size={cluster_size},extended_l2={extended},refcount_bits={refcount_bits}");
        let size = size.to_string();
        let measured = qemu("qemu-img", &["measure", "-O", "qcow2", "-o", &given, "--size", &size]);
        let Some(measured) = measured else { return };
        let measured = measured.expect("the options are right");
        let number = |name: &str| -> u64 {
            let line = measured.lines().find(|line| line.starts_with(name)).expect("it says so");
            line.rsplit(' ').next().expect("a number").parse().expect("a number")
        };
        assert_eq!((ours.required, ours.fully_allocated), (number("required"), number("fully allocated")), "{given}");
    }
}

fn amended(path: &str, options_: &AmendOptions) {
    let (graph, node) = opened(&options(path));
    amend(&node, options_, &|_, _| {}).unwrap_or_else(|error| panic!("{options_:?}: {error}"));
    drop((node, graph));
    check_clean(path);
}

#[test]
fn properties_are_amended() {
    for backing in [false, true] {
        let place = TempDir::in_memory();
        let path = place.path("disk");
        create_raw(&place.path("base"), &Random::new(1).bytes(1 << 20));
        let backing = backing.then(|| ("base".to_owned(), "raw".to_owned()));
        create(&path, &CreateOptions { size: 1 << 20, cluster_size: 4096, backing, ..Default::default() });
        let mut content = use_it(1, &options(&path));
        for (step, change) in [
            AmendOptions { refcount_bits: Some(1), ..Default::default() },
            AmendOptions { refcount_bits: Some(64), ..Default::default() },
            AmendOptions { refcount_bits: Some(16), lazy_refcounts: Some(true), ..Default::default() },
            AmendOptions { version: Some(2), lazy_refcounts: Some(false), ..Default::default() },
            AmendOptions { version: Some(3), lazy_refcounts: Some(true), refcount_bits: Some(8), ..Default::default() },
        ]
        .iter()
        .enumerate()
        {
            amended(&path, change);
            compare(&path, &content);
            {
                let (_graph, node) = opened(&format!("{},read-only=on", options(&path)));
                let info = info(&node).expect("it is active");
                assert!(change.version.is_none_or(|version| version == info.version), "{info:?}");
                assert!(change.refcount_bits.is_none_or(|bits| bits == info.refcount_bits), "{info:?}");
                assert!(change.lazy_refcounts.is_none_or(|lazy| lazy == info.lazy_refcounts), "{info:?}");
            }
            content = use_it(step as u64 + 10, &options(&path));
            check_clean(&path);
            compare(&path, &content);
        }
        let renamed = AmendOptions { backing: Some(None), ..Default::default() };
        amended(&path, &renamed);
        let (_graph, node) = opened(&format!("{},read-only=on", options(&path)));
        assert_eq!(info(&node).expect("it is active").backing, None);
    }
}

#[test]
fn amendments_that_cannot_be_are_refused() {
    let place = TempDir::in_memory();
    let path = place.path("disk");
    create(&path, &CreateOptions { size: 1 << 20, cluster_size: 16384, extended_l2: true, ..Default::default() });
    let before = std::fs::read(&path).expect("it exists");
    let (graph, node) = opened(&options(&path));
    for change in [
        AmendOptions { version: Some(2), ..Default::default() },
        AmendOptions { version: Some(4), ..Default::default() },
        AmendOptions { version: Some(2), refcount_bits: Some(8), ..Default::default() },
        AmendOptions { refcount_bits: Some(3), ..Default::default() },
        AmendOptions { data_file: Some("x".to_owned()), ..Default::default() },
        AmendOptions { data_file_raw: Some(true), ..Default::default() },
    ] {
        assert!(amend(&node, &change, &|_, _| {}).is_err(), "{change:?}");
    }
    drop((node, graph));
    assert!(std::fs::read(&path).expect("it exists") == before);
}

#[test]
fn lazy_refcounts_are_made_anew_after_a_crash() {
    let place = TempDir::in_memory();
    let (path, copy) = (place.path("disk"), place.path("copy"));
    create(&path, &CreateOptions { size: 4 << 20, cluster_size: 4096, lazy_refcounts: true, ..Default::default() });
    let (graph, node) = opened(&options(&path));
    let child = user(&node, 512);
    let context = context();
    let channel = channel(&child, &context);
    let flags = |path: &str| std::fs::read(path).expect("it exists")[79];
    let path_ = path.clone();
    let content = context.run_until(async move {
        assert_eq!(flags(&path_) & 1, 0, "not before the first write");
        let mut oracle = Oracle::new(channel.clone(), true, 77).await;
        for _ in 0..20 {
            oracle.batch().await;
        }
        assert_eq!(channel.flush().await, Ok(()));
        assert_eq!(flags(&path_) & 1, 1);
        read(&channel, 0, channel.length()).await
    });
    std::fs::copy(&path, &copy).expect("there is room");
    drop((child, node, graph));
    assert_eq!(flags(&path) & 1, 0, "it was closed properly");
    check_clean(&path);
    compare(&path, &content);
    assert_eq!(flags(&copy) & 1, 1);
    let (graph, node) = opened(&options(&copy));
    drop((node, graph));
    assert_eq!(flags(&copy) & 1, 0);
    check_clean(&copy);
    compare(&copy, &content);

    create(&path, &CreateOptions { size: 1 << 20, version: 2, ..Default::default() });
    assert!(open(&format!("{},lazy-refcounts=on", options(&path))).is_err(), "version 2 has no mark for it");
}
