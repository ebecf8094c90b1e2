//! Backing: the files that an image names. It owns how a name becomes options (relative to the image, with a format that
//! is stated and never guessed) and the detection of chains that lead back to themselves; `graph.rs` opens the nodes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{OpenError, OpenResult};
use crate::graph::StatedFile;
use crate::options::Options;

/// How many images may lie over one another: opening them nests.
const CHAIN_MAX: usize = 200;

/// The images from the top to one of them, while they are opened.
pub(crate) struct ImageChain<'a> {
    /// Device and inode; `None` where the image is no file of the host.
    file: Option<(u64, u64)>,
    above: Option<&'a ImageChain<'a>>,
}

impl<'a> ImageChain<'a> {
    /// Adds the image in the file `path` below `above`.
    ///
    /// # Errors
    /// It is one of those above, or they are too many.
    pub(crate) fn new(path: Option<&str>, above: Option<&'a ImageChain<'a>>) -> OpenResult<Self> {
        let file = path.and_then(|path| std::fs::metadata(path).ok()).map(|meta| (meta.dev(), meta.ino()));
        let (mut next, mut length) = (above, 1);
        while let Some(image) = next {
            if file.is_some() && image.file == file {
                return Err(OpenError::new("the chain of backing files leads back to this image"));
            }
            length += 1;
            next = image.above;
        }
        if length > CHAIN_MAX {
            return Err(OpenError(format!("the chain of backing files is longer than {CHAIN_MAX}")));
        }
        Ok(Self { file, above })
    }
}

/// The path of a file that the image in the file `image` names.
///
/// # Errors
/// The name is no path, or relative to an image that has none.
pub fn resolve(name: &str, image: Option<&str>) -> OpenResult<String> {
    let path = match name.split_once(':') {
        Some(("file", path)) => path,
        // As in a URL; a colon after a slash is a part of the path.
        Some((protocol, _)) if !protocol.is_empty() && protocol.chars().all(is_protocol) => {
            return Err(OpenError(format!("\"{name}\" names no file: the protocol \"{protocol}\" is not supported")));
        }
        _ => name,
    };
    if Path::new(path).is_absolute() {
        return Ok(path.to_owned());
    }
    let Some(image) = image else {
        return Err(OpenError(format!("\"{name}\" is relative to an image whose path is not known")));
    };
    let folder = Path::new(image).parent().unwrap_or(Path::new(""));
    // Both parts were text.
    Ok(folder.join(path).to_string_lossy().into_owned())
}

fn is_protocol(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')
}

/// The options of a backing file, of which `given` may define a part, as the image in the file `image` states it.
///
/// # Errors
/// Its format is not stated, or its name leads nowhere.
pub(crate) fn complete(mut given: Options, stated: &StatedFile, image: Option<&str>) -> OpenResult<Options> {
    if let Some(text) = stated.name.strip_prefix("json:").filter(|_| given.is_empty()) {
        given = Options::parse_json(text).map_err(OpenError::new)?;
        if !given.contains("driver") {
            return Err(OpenError::new(given.missing("driver")));
        }
        return Ok(given.with_subject("the image's backing file"));
    }
    if !given.contains("driver") {
        let Some(format) = &stated.format else {
            return Err(OpenError(format!(
                "the format of its backing file \"{}\" is not stated, and is never guessed: give backing.driver, or \
                 state it in the image (qemu-img rebase -u -F FORMAT)",
                stated.name
            )));
        };
        given.set_str("driver", format);
    }
    let stands_on_a_file = given.peek_str("driver") != Some("file");
    let key = if stands_on_a_file { "file" } else { "filename" };
    if !given.contains(key) {
        let path = resolve(&stated.name, image)?;
        if stands_on_a_file {
            given.set_str("file.driver", "file").set_str("file.filename", path);
        } else {
            given.set_str("filename", path);
        }
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_image() {
        let image = Some("/images/vm/top.qcow2");
        for (name, expected) in [
            ("base.raw", "/images/vm/base.raw"),
            ("../base.raw", "/images/vm/../base.raw"),
            ("/base.raw", "/base.raw"),
            ("file:base.raw", "/images/vm/base.raw"),
            ("./a:b", "/images/vm/./a:b"),
        ] {
            assert_eq!(resolve(name, image).as_deref(), Ok(expected));
        }
        assert_eq!(resolve("base", Some("top.qcow2")).as_deref(), Ok("base"));
        assert!(resolve("nbd://host/disk", image).is_err());
        assert!(resolve("fat:rw:/etc", image).is_err());
        assert!(resolve("base.raw", None).is_err());
        assert_eq!(resolve("/base.raw", None).as_deref(), Ok("/base.raw"));
    }

    #[test]
    fn the_format_is_stated_or_refused() {
        let stated = |format: Option<&str>| StatedFile { name: "b".to_owned(), format: format.map(str::to_owned) };
        let complete = |given: &str, format| {
            let given = Options::parse_json(given).expect("JSON");
            complete(given, &stated(format), Some("/i/top")).map(|options| options.to_json())
        };
        let raw = serde_json::json!({"driver": "raw", "file": {"driver": "file", "filename": "/i/b"}});
        assert_eq!(complete("{}", Some("raw")), Ok(raw.clone()));
        assert_eq!(complete(r#"{"driver": "raw"}"#, None), Ok(raw));
        let other = r#"{"driver": "qcow2", "file": "node0"}"#;
        assert_eq!(complete(other, Some("raw")), Ok(serde_json::json!({"driver": "qcow2", "file": "node0"})));
        assert!(complete("{}", None).is_err_and(|error| error.0.contains("backing.driver")));
    }
}
