//! Becoming another user. It knows names and numbers; it decides nothing.

use std::ffi::CString;

use blockport_block::{OpenError, OpenResult};
use nix::unistd::{Gid, Uid, User, initgroups, setresgid, setresuid};

/// A user by name or number.
///
/// # Errors
/// There is none.
pub(super) fn find(name: &str) -> OpenResult<User> {
    let user = match name.parse() {
        Ok(number) => User::from_uid(Uid::from_raw(number)),
        Err(_) => User::from_name(name),
    };
    match user {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(OpenError(format!("--runas: there is no user \"{name}\""))),
        Err(error) => Err(OpenError(format!("--runas {name}: {error}"))),
    }
}

/// Becomes a user, with that user's groups, for good.
///
/// # Errors
/// Only root can.
pub(super) fn become_user(user: &User) -> OpenResult {
    if user.uid == Uid::effective() && user.gid == Gid::effective() {
        return Ok(());
    }
    let refuse = |error: &dyn std::fmt::Display| OpenError(format!("--runas {}: {error}", user.name));
    let name = CString::new(user.name.as_str()).map_err(|e| refuse(&e))?;
    initgroups(&name, user.gid)
        .and_then(|()| setresgid(user.gid, user.gid, user.gid))
        .and_then(|()| setresuid(user.uid, user.uid, user.uid))
        .map_err(|e| refuse(&e))
}
