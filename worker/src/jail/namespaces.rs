//! One empty set of namespaces for all workers of a zygote.
//!
//! A set for each worker would separate them no further: a network namespace without interfaces and
//! one without System V objects have nothing to share. Landlock separates the rest: signals,
//! abstract sockets and ptrace stay within a worker's own domain. A set for each worker costs half
//! a millisecond.

use std::fs;
use std::io;

use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves this process, which has one thread, and its children to empty namespaces of their own. A
/// user other than root needs a user namespace for that.
pub(crate) fn enter_empty() -> io::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    let mut flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    if !uid.is_root() {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: the flags unshare no descriptor table and no file system attributes, and the process
    // has one thread.
    unsafe { unshare_unsafe(flags) }?;
    if !uid.is_root() {
        // Itself and no other: files are this user's as before.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{uid} {uid} 1", uid = uid.as_raw()))?;
        fs::write("/proc/self/gid_map", format!("{gid} {gid} 1", gid = gid.as_raw()))?;
    }
    Ok(())
}
