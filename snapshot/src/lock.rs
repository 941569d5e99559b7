//! Locks of snapshot directories against concurrent replacement.
//!
//! The lock is the directory's own (flock), so it ends with its holder. A save on top of a base
//! holds the base's lock shared, while it checks the base, writes its note there, and is published.
//! A save that replaces a directory holds its lock exclusively, while it reads the notes and
//! renames. Both are short: the long work is done before.
//!
//! Several locks are taken together or not at all, so that two saves cannot wait for each other.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::dir::{Dir, identity};
use crate::error::Error;
use crate::files::{FileOp, FileOps};

/// Time between attempts.
const AGAIN: Duration = Duration::from_millis(5);

/// How a directory is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Together with other shared holders.
    Shared,
    /// Without any other holder.
    Exclusive,
}

/// Locks directories by their paths, which must not be links. A directory that does not exist has
/// no lock. While the locks are held, the paths lead to these directories, if all processes take
/// locks.
///
/// # Errors
/// [`Error::Locked`] when a lock is not free in time, or the error of `go_on`.
pub(crate) fn lock(
    files: &FileOps,
    wanted: &[(&Path, How)],
    go_on: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Vec<Option<Dir>>, Error> {
    let begun = Instant::now();
    loop {
        let contended = match lock_all(files, wanted)? {
            Ok(locked) => return Ok(locked),
            Err(path) => path,
        };
        go_on()?;
        let timeout = files.lock_timeout();
        if begun.elapsed() >= timeout {
            return Err(Error::Locked { path: contended.to_owned(), seconds: timeout.as_secs() });
        }
        std::thread::sleep(AGAIN);
    }
}

/// Takes all locks, or returns the path of one that is not free.
fn lock_all<'a>(files: &FileOps, wanted: &[(&'a Path, How)]) -> Result<Result<Vec<Option<Dir>>, &'a Path>, Error> {
    let mut locked = Vec::with_capacity(wanted.len());
    for (path, how) in wanted {
        match lock_one(files, path, *how)? {
            Tried::Locked(dir) => locked.push(Some(dir)),
            Tried::Missing => locked.push(None),
            Tried::Contended => return Ok(Err(path)),
        }
    }
    Ok(Ok(locked))
}

enum Tried {
    Locked(Dir),
    Missing,
    Contended,
}

fn lock_one(files: &FileOps, path: &Path, how: How) -> Result<Tried, Error> {
    let dir = match files.whole_dir(path) {
        Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Tried::Missing),
        other => other?,
    };
    let operation = match how {
        How::Shared => FlockOperation::NonBlockingLockShared,
        How::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    let had = files.run(FileOp::Lock, path, |_| match flock(dir.file(), operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    });
    let had = had.map_err(|source| Error::file("locked", path, source))?;
    // The previous holder may have put another directory in its place.
    let there = path.symlink_metadata().ok().map(|meta| identity(&meta));
    Ok(if had && dir.identity() == there { Tried::Locked(dir) } else { Tried::Contended })
}
