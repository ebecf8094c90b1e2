//! Amend: properties of an image that change after it was made: version, lazy refcounts, width of refcounts, names of
//! other files. It owns what may change into what. With no request in flight.

use super::Qcow2;
use crate::error::{OpenError, OpenResult};

/// What is to change; `None` stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AmendOptions {
    /// 2 or 3 (compat 0.10 or 1.1).
    pub version: Option<u32>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// A power of two from 1 to 64.
    pub refcount_bits: Option<u32>,
    /// Name and format of the backing file; `Some(None)`: none.
    pub backing: Option<Option<(String, Option<String>)>>,
    /// The name of the external data file, in an image that has one.
    pub data_file: Option<String>,
    /// Whether the external data file is a raw image by itself. Can only be given up.
    pub data_file_raw: Option<bool>,
}

impl Qcow2 {
    pub(super) fn amend(&self, _options: &AmendOptions, _progress: &(dyn Fn(u64, u64) + Sync)) -> OpenResult {
        Err(OpenError::new("this is not possible yet"))
    }
}
