//! Permissions: what the users of a node may do, and what they let others do. It owns the arithmetic and the wording of
//! conflicts; `node.rs` keeps the users.

mod update;

use std::fmt;
use std::ops::{BitAnd, BitOr};

pub(crate) use update::PermissionUpdate;

/// A set of permissions. The numbers are those of the bytes that QEMU locks on image files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PermissionSet(u8);

impl PermissionSet {
    /// None at all.
    pub const NONE: Self = Self(0);
    /// Reading, and relying on what is read not to change under one's feet.
    pub const CONSISTENT_READ: Self = Self(1 << 0);
    /// Writing.
    pub const WRITE: Self = Self(1 << 1);
    /// Writing only what is there already.
    pub const WRITE_UNCHANGED: Self = Self(1 << 2);
    /// Changing the size.
    pub const RESIZE: Self = Self(1 << 3);
    /// Every permission.
    pub const ALL: Self = Self(0xf);

    /// The permissions with their numbers and names.
    pub const NAMES: [(u8, Self, &'static str); 4] = [
        (0, Self::CONSISTENT_READ, "consistent read"),
        (1, Self::WRITE, "write"),
        (2, Self::WRITE_UNCHANGED, "write unchanged"),
        (3, Self::RESIZE, "resize"),
    ];

    /// Whether all of `other` is in this set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in this set and not in `other`.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether it is the empty set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl BitOr for PermissionSet {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for PermissionSet {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for PermissionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Self::NAMES.iter().filter(|(_, set, _)| self.contains(*set)).map(|n| n.2).collect();
        f.write_str(&if names.is_empty() { "none".to_owned() } else { names.join(", ") })
    }
}

/// What one user needs of a node, and what it lets all others have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// What the user does.
    pub held: PermissionSet,
    /// What the user lets others do.
    pub shared: PermissionSet,
}

impl Permissions {
    /// What a node without users holds and shares.
    pub const UNUSED: Self = Self { held: PermissionSet::NONE, shared: PermissionSet::ALL };

    /// A device that reads, and writes if `writable`. Devices of one process share everything with each other, as the
    /// exports of qemu-storage-daemon do; what other processes may do to a file is the `file` driver's to say.
    pub fn device(writable: bool) -> Self {
        let write = if writable { PermissionSet::WRITE } else { PermissionSet::NONE };
        Self { held: PermissionSet::CONSISTENT_READ | write, shared: PermissionSet::ALL }
    }

    /// The same for a device whose medium cannot be written.
    pub fn without_writing(self) -> Self {
        let writing = PermissionSet::WRITE | PermissionSet::WRITE_UNCHANGED | PermissionSet::RESIZE;
        Self { held: self.held.without(writing), ..self }
    }

    /// What both users together hold, and what both share.
    pub fn and(self, other: Self) -> Self {
        Self { held: self.held | other.held, shared: self.shared & other.shared }
    }

    /// What one of the two holds and the other does not share; empty when they can live side by side.
    pub fn conflict(self, other: Self) -> PermissionSet {
        self.held.without(other.shared) | other.held.without(self.shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_holds_the_other_must_share() {
        let alone = Permissions {
            held: PermissionSet::CONSISTENT_READ | PermissionSet::WRITE,
            shared: PermissionSet::CONSISTENT_READ,
        };
        assert_eq!(alone.conflict(alone).to_string(), "write");
        assert!(alone.conflict(Permissions::device(false)).is_empty());
        assert!(Permissions::device(true).conflict(Permissions::device(true)).is_empty());
    }
}
