//! `img info`: what an image is. It owns the shape of the answer, for people and in JSON.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use blockport_block::drivers::qcow2::{self, BitmapInfo, SnapshotInfo};
use blockport_block::{Node, resolve_path};
use clap::Args;
use serde_json::{Map, Value, json};

use super::image::{ImageArgs, ImageName, Opening, identity};
use super::task::{Session, child_node, own_file};
use super::units::rounded;
use super::{Failure, Outcome, OutputArgs, pretty, say, snapshot};

/// Under this key the list of snapshots for people stands until it is printed.
const TABLE: &str = "";

/// The arguments, with their help.
#[derive(Args, Debug)]
pub struct InfoArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// Tell of the backing files as well
    #[arg(short, long)]
    backing_chain: bool,

    #[command(flatten)]
    output: OutputArgs,

    /// The image
    filename: String,
}

impl InfoArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let session = Session::new()?;
        let opening = Opening { alone: true, ..self.image.reading() };
        let mut next = Some(self.image.name(&self.filename));
        let mut infos = Vec::new();
        let mut seen = Vec::new();
        while let Some(name) = next {
            if let Some(place) = identity(&name.text) {
                if seen.contains(&place) {
                    return Err(format!(
                        "the chain of backing files of \"{}\" leads back to \"{}\"",
                        self.filename, name.text
                    )
                    .into());
                }
                seen.push(place);
            }
            let image = session.open(&name, opening)?;
            let mut info = of_node(&image.node, &image.name);
            add_lists(&mut info, &image.node)?;
            next = if self.backing_chain { backing_of(&info)? } else { None };
            infos.push(info);
        }
        if self.output.is_json() {
            infos.iter_mut().filter_map(Value::as_object_mut).for_each(|info| {
                info.remove(TABLE);
            });
            let answer =
                if self.backing_chain { Value::Array(infos) } else { infos.into_iter().next().unwrap_or_default() };
            say(pretty(&answer)?)?;
        } else {
            let texts: Vec<String> = infos.iter().map(|info| text(info, None)).collect();
            say(texts.join("\n"))?;
        }
        Ok(0)
    }
}

/// The backing file that an answer names.
fn backing_of(info: &Value) -> Result<Option<ImageName>, Failure> {
    let Some(stated) = info["backing-filename"].as_str() else { return Ok(None) };
    let path = info["full-backing-filename"].as_str().unwrap_or(stated);
    match info["backing-filename-format"].as_str() {
        Some(format) => Ok(Some(ImageName::file(path, Some(format.to_owned())))),
        None if stated.starts_with("json:") => Ok(Some(ImageName::file(stated, None))),
        None => {
            let image = info["filename"].as_str().unwrap_or_default();
            Err(format!(
                "\"{image}\" does not state the format of its backing file \"{stated}\", which is never guessed: \
                 img rebase -u -b {stated} -F FORMAT states it"
            )
            .into())
        }
    }
}

/// The name of a node's file, as it was given; else how the driver is called.
fn file_of(node: &Arc<Node>) -> String {
    own_file(node).unwrap_or_else(|| format!("json:{}", json!({"driver": node.driver_name()})))
}

/// What a node is, as `query-block` and qemu-img tell it.
fn of_node(node: &Arc<Node>, name: &str) -> Value {
    let file = file_of(node);
    let children: Vec<Value> = node
        .driver()
        .children()
        .iter()
        .filter(|child| child.role() == "file")
        .map(|child| {
            let node = child.node();
            json!({"name": child.role(), "info": of_node(&node, &file_of(&node))})
        })
        .collect();
    let mut info = Map::new();
    info.insert("children".into(), children.into());
    info.insert("virtual-size".into(), node.length().into());
    info.insert("filename".into(), name.into());
    info.insert("format".into(), node.driver_name().into());
    if let Ok(meta) = std::fs::metadata(&file) {
        info.insert("actual-size".into(), (meta.blocks() * 512).into());
    }
    info.insert("dirty-flag".into(), false.into());
    if child_node(node, "file").is_none() && matches!(node.driver_name(), "file" | "host_device") {
        info.insert("format-specific".into(), json!({"type": node.driver_name(), "data": {}}));
    }
    if let Ok(image) = qcow2::info(node) {
        add_qcow2(&mut info, &image, &file);
    }
    info.into()
}

/// The snapshots and bitmaps of an image.
fn add_lists(info: &mut Value, node: &Arc<Node>) -> Result<(), Failure> {
    if node.driver_name() != "qcow2" {
        return Ok(());
    }
    let image = qcow2::info(node)?;
    let snapshots = if image.snapshots > 0 { qcow2::snapshots(node)? } else { Vec::new() };
    if !snapshots.is_empty() {
        let entry = |snapshot: &SnapshotInfo| {
            let mut entry = json!({
                "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_bytes,
                "date-sec": snapshot.date_sec, "date-nsec": snapshot.date_nsec,
                "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
                "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
            });
            if let Some(count) = snapshot.icount {
                entry["icount"] = count.into();
            }
            entry
        };
        info["snapshots"] = snapshots.iter().map(entry).collect();
        info[TABLE] = snapshot::table(&snapshots).into();
    }
    let bitmaps = if image.bitmaps > 0 { qcow2::bitmaps(node)? } else { Vec::new() };
    if !bitmaps.is_empty() {
        let entry = |bitmap: &BitmapInfo| {
            let flags = [("in-use", bitmap.in_use), ("auto", bitmap.enabled)];
            let flags: Vec<&str> = flags.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
            json!({"name": bitmap.name, "granularity": bitmap.granularity, "flags": flags})
        };
        info["format-specific"]["data"]["bitmaps"] = bitmaps.iter().map(entry).collect();
    }
    Ok(())
}

fn add_qcow2(info: &mut Map<String, Value>, image: &qcow2::ImageInfo, file: &str) {
    info.insert("cluster-size".into(), image.cluster_size.into());
    info.insert("dirty-flag".into(), image.dirty.into());
    if let Some(backing) = &image.backing {
        info.insert("backing-filename".into(), backing.clone().into());
        if let Ok(full) = resolve_path(backing, Some(file)) {
            info.insert("full-backing-filename".into(), full.into());
        }
        if let Some(format) = &image.backing_format {
            info.insert("backing-filename-format".into(), format.clone().into());
        }
    }
    let mut data = Map::new();
    data.insert("compat".into(), if image.version == 3 { "1.1" } else { "0.10" }.into());
    data.insert("compression-type".into(), if image.zstd { "zstd" } else { "zlib" }.into());
    data.insert("refcount-bits".into(), image.refcount_bits.into());
    if image.version == 3 {
        data.insert("lazy-refcounts".into(), image.lazy_refcounts.into());
        if let Some(name) = &image.data_file {
            data.insert("data-file".into(), name.clone().into());
        }
        if image.has_data_file {
            data.insert("data-file-raw".into(), image.data_file_raw.into());
        }
        data.insert("corrupt".into(), image.corrupt.into());
        data.insert("extended-l2".into(), image.extended_l2.into());
    }
    info.insert("format-specific".into(), json!({"type": "qcow2", "data": data}));
}

/// An answer for people. `child` is the path to a child of the image.
fn text(info: &Value, child: Option<&str>) -> String {
    let number = |key: &str| info[key].as_u64();
    let word = |key: &str| info[key].as_str();
    let mut lines = Vec::new();
    let names = match child {
        None => ("image", "file format", "virtual size"),
        Some(_) if info["children"].as_array().is_some_and(Vec::is_empty) => {
            ("filename", "protocol type", "file length")
        }
        Some(_) => ("filename", "file format", "virtual size"),
    };
    lines.push(format!("{}: {}", names.0, word("filename").unwrap_or_default()));
    lines.push(format!("{}: {}", names.1, word("format").unwrap_or_default()));
    let size = number("virtual-size").unwrap_or(0);
    lines.push(format!("{}: {} ({size} bytes)", names.2, rounded(size)));
    lines.push(format!("disk size: {}", number("actual-size").map_or("unavailable".to_owned(), rounded)));
    if let Some(cluster) = number("cluster-size") {
        lines.push(format!("cluster_size: {cluster}"));
    }
    if info["dirty-flag"] == true {
        lines.push("cleanly shut down: no".to_owned());
    }
    if let Some(backing) = word("backing-filename") {
        let full = word("full-backing-filename").filter(|full| *full != backing);
        lines.push(format!(
            "backing file: {backing}{}",
            full.map_or(String::new(), |full| format!(" (actual path: {full})"))
        ));
        if let Some(format) = word("backing-filename-format") {
            lines.push(format!("backing file format: {format}"));
        }
    }
    if let Some(table) = word(TABLE) {
        lines.extend(table.lines().map(str::to_owned));
    }
    lines.extend(details(info));
    for entry in info["children"].as_array().into_iter().flatten() {
        let path = format!("{}/{}", child.unwrap_or(""), entry["name"].as_str().unwrap_or_default());
        lines.push(format!("Child node '{path}':"));
        lines.extend(text(&entry["info"], Some(&path)).lines().map(|line| format!("    {line}")));
    }
    lines.join("\n") + "\n"
}

fn bitmap_lines(at: usize, bitmap: &Value) -> Vec<String> {
    let mut lines = vec![format!("        [{at}]:"), "            flags:".to_owned()];
    let flags = bitmap["flags"].as_array().into_iter().flatten().enumerate();
    lines.extend(flags.map(|(at, flag)| format!("                [{at}]: {}", flag.as_str().unwrap_or_default())));
    lines.push(format!("            name: {}", bitmap["name"].as_str().unwrap_or_default()));
    lines.push(format!("            granularity: {}", bitmap["granularity"]));
    lines
}

/// What only images of its format have.
fn details(info: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(data) = info["format-specific"]["data"].as_object().filter(|data| !data.is_empty()) {
        lines.push("Format specific information:".to_owned());
        for key in [
            "compat",
            "compression-type",
            "lazy-refcounts",
            "refcount-bits",
            "data-file",
            "data-file-raw",
            "corrupt",
            "extended-l2",
        ] {
            if let Some(Value::Array(bitmaps)) = data.get(key) {
                lines.push(format!("    {key}:"));
                bitmaps.iter().enumerate().for_each(|(at, bitmap)| lines.extend(bitmap_lines(at, bitmap)));
            } else if let Some(value) = data.get(key) {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                lines.push(format!("    {}: {value}", key.replace('-', " ")));
            }
        }
    }
    lines
}

/// What only images of its format have, for people.
pub fn format_details(node: &Arc<Node>) -> String {
    let mut info = of_node(node, "");
    // Lists that cannot be read are left out.
    let _ = add_lists(&mut info, node);
    details(&info).iter().map(|line| format!("{line}\n")).collect()
}
