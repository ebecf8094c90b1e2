//! A secret: the passphrase of encrypted images.
//!
//! This file owns the options of `--object secret` and how they become bytes, by a file where they name one. Its content
//! is never printed, nor is what was given of it.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blockport_block::options::{Options, Result, is_valid_id};
use blockport_block::secret::Secret;
use blockport_block::{OpenError, OpenResult};
use zeroize::Zeroizing;

use super::table::{self, OptionKind, OptionRow, optional, required};

/// No passphrase is longer; in bytes.
const BYTES_MAX: u64 = 1 << 20;

/// Where a secret's bytes are.
#[derive(Clone, PartialEq, Eq)]
enum Source {
    /// In the option itself, which everybody sees who can list processes.
    Data(Zeroizing<String>),
    /// In a file.
    File(PathBuf),
}

/// A secret to create.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretConfig {
    /// The name that nodes refer to.
    pub id: String,
    source: Source,
    /// The bytes are in base64.
    base64: bool,
}

impl fmt::Debug for SecretConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretConfig({:?}, ..)", self.id)
    }
}

/// All options of a secret, less `qom-type`.
pub const SECRET_OPTIONS: &[OptionRow] = &[
    required("id", OptionKind::Text),
    optional("data", OptionKind::Text),
    optional("file", OptionKind::Text),
    optional("format", OptionKind::Choice("QCryptoSecretFormat", &["raw", "base64"])),
];

impl SecretConfig {
    /// Reads a secret from the options of `--object`, less `qom-type`, all of them.
    ///
    /// Fails on options that are missing, unknown, or known to qemu-storage-daemon only: secrets that are encrypted
    /// themselves (`keyid`, `iv`).
    pub fn from_options(mut options: Options) -> Result<Self> {
        options.take_unsupported(&["keyid", "iv"])?;
        table::check(&options, SECRET_OPTIONS)?;
        let id = options.require_str("id")?;
        if !is_valid_id(&id) {
            return Err(options.invalid("id", id, "a letter, then letters, digits, '-', '.' and '_'"));
        }
        let source = match (options.take_str("data")?, options.take_str("file")?) {
            (Some(data), None) => Source::Data(Zeroizing::new(data)),
            (None, Some(file)) => Source::File(file.into()),
            (Some(_), Some(_)) => return Err(options.conflict("data", "file")),
            (None, None) => return Err(options.missing("data")),
        };
        let base64 = options.take_enum("format", &[("raw", false), ("base64", true)])?.unwrap_or(false);
        options.finish()?;
        Ok(Self { id, source, base64 })
    }

    /// The secret itself. Reads the file, if there is one: all of it, as it is, an end of line included.
    ///
    /// # Errors
    /// The file cannot be read or is too long, or what should be base64 is not.
    pub fn load(&self) -> OpenResult<Secret> {
        let refuse = |why: &dyn fmt::Display| OpenError(format!("secret \"{}\": {why}", self.id));
        let bytes = match &self.source {
            Source::Data(text) => Zeroizing::new(text.as_bytes().to_vec()),
            Source::File(path) => {
                // Room for all at once, so that no copy is left behind.
                let mut bytes = Zeroizing::new(Vec::with_capacity(BYTES_MAX as usize + 1));
                let read = File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes));
                read.map_err(|e| refuse(&format_args!("{}: {e}", path.display())))?;
                bytes
            }
        };
        if bytes.len() as u64 > BYTES_MAX {
            return Err(refuse(&"it is longer than 1 MiB"));
        }
        if !self.base64 {
            return Ok(Secret::new(bytes.to_vec()));
        }
        let text: Zeroizing<Vec<u8>> =
            Zeroizing::new(bytes.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect());
        STANDARD.decode(&*text).map(Secret::new).map_err(|_| refuse(&"it is no base64"))
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;

    use super::*;

    fn read(text: &str) -> Result<SecretConfig> {
        SecretConfig::from_options(parse_keyval(text, None).expect(text))
    }

    #[test]
    fn from_the_option_or_a_file_as_it_is_or_in_base64() {
        let place = tempfile::tempdir().expect("a folder");
        let path = place.path().join("secret");
        std::fs::write(&path, "b3Blbg==\n").expect("a file");
        let file = path.display();
        for (text, expected) in [
            ("id=s,data=open".to_owned(), "open"),
            ("id=s,data=open,format=raw".to_owned(), "open"),
            ("id=s,data=b3Blbg==,format=base64".to_owned(), "open"),
            (format!("id=s,file={file},format=base64"), "open"),
            (format!("id=s,file={file}"), "b3Blbg==\n"),
        ] {
            let config = read(&text).expect(&text);
            assert_eq!(config.load().expect(&text).bytes(), expected.as_bytes(), "{text}");
            assert!(!format!("{config:?}").contains("open"));
        }
    }

    #[test]
    fn refusals_never_show_the_secret() {
        for (text, complaint) in [
            ("data=hunter2", r#"option "id" is missing"#),
            ("id=s", r#"option "data" is missing"#),
            ("id=s,data=hunter2,file=/f", r#"options "data" and "file" exclude each other"#),
            ("id=s,data=hunter2,keyid=k", r#"option "keyid" is not supported yet"#),
            ("id=s,data=hunter2,format=hex", r#"option "format" must be one of raw, base64, not "hex""#),
            ("id=s,data=hunter2,loaded=on", r#"option "loaded" is unknown"#),
        ] {
            let error = read(text).expect_err(text).to_string();
            assert_eq!(error, complaint, "{text}");
        }
        let bad = read("id=s,data=hunter2!,format=base64").expect("sound").load().expect_err("no base64");
        assert_eq!(bad.0, r#"secret "s": it is no base64"#);
        let missing = read("id=s,file=/nowhere").expect("sound").load().expect_err("no file");
        assert!(missing.0.contains("/nowhere"));
    }
}
