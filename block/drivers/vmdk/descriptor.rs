//! Descriptor: the text that says what a disk of VMware consists of. It owns its grammar and its bounds; it opens nothing
//! that is named in it.

use crate::drivers::import::Reader;
use crate::error::{OpenError, OpenResult};
use crate::node::SECTOR;

/// The longest text that is read.
const BYTES_MAX: u64 = 1 << 20;
/// The most extents: each may be a file.
const EXTENTS_MAX: usize = 4096;
/// The identity of a parent that is none.
const NO_PARENT: &str = "ffffffff";

/// What an extent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ExtentKind {
    /// Nothing: it reads as zeroes.
    Zero,
    /// The bytes of a file from an offset on.
    Flat { name: String, offset: u64 },
    /// A file with tables of its own.
    Sparse { name: String },
}

/// A line about an extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StatedExtent {
    pub sectors: u64,
    pub kind: ExtentKind,
}

/// What the text says, as far as it matters for reading.
#[derive(Debug, Default)]
pub(super) struct Descriptor {
    parent: Option<String>,
    pub extents: Vec<StatedExtent>,
}

impl Descriptor {
    pub(super) async fn read(reader: &Reader, offset: u64, bytes: u64) -> OpenResult<Self> {
        let bytes = reader.read(offset, bytes.min(BYTES_MAX), "the descriptor").await?;
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> OpenResult<Self> {
        // Behind its end it is filled up with zeroes. Names in other encodings than UTF-8 are not found.
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines().map(str::trim);
        if !lines.next().is_some_and(|line| line.starts_with("# Disk DescriptorFile")) {
            return Err(OpenError::new("it is no image of VMware, and no descriptor of one"));
        }
        let mut found = Self::default();
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some((key, value)) = line.split_once('=').filter(|(key, _)| !key.contains(['"', ' '])) {
                if key.trim().eq_ignore_ascii_case("parentCID") {
                    found.parent = Some(value.trim().trim_matches('"').to_owned());
                }
            } else if let Some(extent) = extent(line)? {
                found.extents.push(extent);
            }
            if found.extents.len() > EXTENTS_MAX {
                return Err(OpenError(format!("it has more than {EXTENTS_MAX} extents")));
            }
        }
        Ok(found)
    }

    /// That the image stands on no other one.
    pub(super) fn check_parent(&self) -> OpenResult {
        match &self.parent {
            Some(parent) if !parent.eq_ignore_ascii_case(NO_PARENT) => {
                Err(OpenError::new("it stands on another image (parentCID), which is not supported"))
            }
            _ => Ok(()),
        }
    }
}

/// Reads `ACCESS SECTORS KIND ["NAME" [OFFSET]]`. `None`: the line is something else.
fn extent(line: &str) -> OpenResult<Option<StatedExtent>> {
    let refuse = |why: &str| Err(OpenError(format!("its extent {line:?} {why}")));
    let mut words = line.splitn(4, char::is_whitespace);
    let access = words.next().unwrap_or_default();
    if !["RW", "RDONLY", "NOACCESS"].contains(&access) {
        return Ok(None);
    }
    let (sectors, kind, rest) = (words.next().unwrap_or_default(), words.next(), words.next().unwrap_or_default());
    let Ok(sectors) = sectors.parse::<u64>() else { return refuse("does not say how long it is") };
    if access == "NOACCESS" && kind != Some("ZERO") {
        return refuse("is not to be read");
    }
    // Between quotes; behind them, where it begins in the file.
    let mut parts = rest.trim().trim_start_matches('"').rsplitn(2, '"');
    let (behind, name) = (parts.next().unwrap_or_default().trim(), parts.next().unwrap_or_default().to_owned());
    let kind = match kind {
        Some("ZERO") => ExtentKind::Zero,
        Some("SPARSE") if !name.is_empty() => ExtentKind::Sparse { name },
        Some("FLAT" | "VMFS") if !name.is_empty() => {
            let offset = behind.split_whitespace().next().unwrap_or("0").parse::<u64>().ok();
            let Some(offset) = offset.and_then(|sectors| sectors.checked_mul(SECTOR)) else {
                return refuse("begins nowhere");
            };
            ExtentKind::Flat { name, offset }
        }
        Some("SPARSE" | "FLAT" | "VMFS") => return refuse("has no name"),
        Some(other) => return refuse(&format!("is of the kind {other}, which is not supported")),
        None => return refuse("has no kind"),
    };
    Ok(Some(StatedExtent { sectors, kind }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_in_all_their_forms() {
        let text = "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"custom\"\n# Extent\n\
                    RW 20 SPARSE \"a b-s001.vmdk\"\nRW 30 FLAT \"x\"y.vmdk\" 8\r\nRDONLY 40 VMFS \"z\"\nNOACCESS 7 ZERO\n\
                    ddb.adapterType = \"ide\"\n";
        let found = Descriptor::parse(text.as_bytes()).expect("sound");
        assert_eq!(found.check_parent(), Ok(()));
        let flat = |name: &str, offset| ExtentKind::Flat { name: name.to_owned(), offset };
        let expected = [
            (20, ExtentKind::Sparse { name: "a b-s001.vmdk".to_owned() }),
            (30, flat("x\"y.vmdk", 4096)),
            (40, flat("z", 0)),
            (7, ExtentKind::Zero),
        ];
        assert_eq!(found.extents, expected.map(|(sectors, kind)| StatedExtent { sectors, kind }));
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        for line in [
            "RW x FLAT \"a\" 0",
            "RW 1 FLAT \"\" 0",
            "RW 1 FLAT \"a\" 99999999999999999999",
            "RW 1 SESPARSE \"a\"",
            "RW 1 VMFSSPARSE \"a\"",
            "RW 1",
            "NOACCESS 1 FLAT \"a\" 0",
            "RW 1 FLAT",
        ] {
            let error = Descriptor::parse(format!("# Disk DescriptorFile\n{line}\n").as_bytes()).expect_err(line);
            assert!(error.0.contains("its extent"), "{error}");
        }
        assert!(Descriptor::parse(b"RW 1 ZERO").is_err());
        let parent = Descriptor::parse(b"# Disk DescriptorFile\nparentCID=12345678\n").expect("sound");
        assert!(parent.check_parent().is_err());
    }
}
