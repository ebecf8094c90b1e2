//! The two error types of the block layer: one for requests, small and matchable, one for the control path, prose.
//! It never formats anything for a guest; the device model turns a [`BlockError`] into a status byte.

use std::fmt;
use std::io;

/// Why a request failed. Small and `Copy`: it is carried through every layer of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Offset and length do not lie within the node.
    #[error("the range lies outside the disk")]
    OutOfRange,
    /// A write, discard or write-zeroes on something opened read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// There is no medium, or the node is inactive.
    #[error("there is no medium")]
    NoMedium,
    /// The node or the host cannot do this at all; nothing was done.
    #[error("the operation is not supported")]
    NotSupported,
    /// The host is out of space (ENOSPC or EDQUOT).
    #[error("no space left on the host")]
    NoSpace,
    /// The request itself is wrong.
    #[error("the request is malformed: {0}")]
    Invalid(&'static str),
    /// The host refused the I/O; the value is an `errno`, always above 0.
    #[error("{}", Errno(*.0))]
    Host(i32),
}

/// The result of a request.
pub type BlockResult<T = ()> = Result<T, BlockError>;

impl BlockError {
    /// From a positive `errno`. 0 and negative values, which no caller should have, count as EIO.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY => Self::NotSupported,
            e if e <= 0 => Self::Host(libc::EIO),
            e => Self::Host(e),
        }
    }
}

impl From<io::Error> for BlockError {
    fn from(error: io::Error) -> Self {
        Self::from_errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// Prints an errno as the host names it.
struct Errno(i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.0))
    }
}

/// Why something could not be opened, changed or closed: one sentence for a person, which names the option, node or
/// file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(pub String);

/// The result of the control path.
pub type OpenResult<T = ()> = Result<T, OpenError>;

impl OpenError {
    /// An error from anything printable.
    pub fn new(message: impl fmt::Display) -> Self {
        Self(message.to_string())
    }

    /// The same error with what was being done in front: `"context: error"`.
    pub fn context(self, context: impl fmt::Display) -> Self {
        Self(format!("{context}: {}", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_is_told_apart_from_a_broken_one() {
        assert_eq!(BlockError::from_errno(libc::ENOSPC), BlockError::NoSpace);
        assert_eq!(BlockError::from_errno(libc::EDQUOT), BlockError::NoSpace);
        assert_eq!(BlockError::from_errno(libc::EIO), BlockError::Host(libc::EIO));
        assert_eq!(BlockError::from_errno(0), BlockError::Host(libc::EIO));
    }
}
