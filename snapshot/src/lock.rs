//! Who may put something else in a snapshot's place, and when.
//!
//! The lock is the directory's own (flock), so that it ends with its holder. It is shared while a
//! dependent makes sure of its base, notes itself in it and is published. It is exclusive while
//! somebody looks at the notes and puts another directory in its place. Both are short: what takes
//! long is done before.
//!
//! Several are taken all at once, or none, so that two saves cannot wait for each other.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::dir::{Dir, identity};
use crate::error::Error;
use crate::files::{Files, Op};

/// How long another's lock is waited for.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// How often it is tried.
const AGAIN: Duration = Duration::from_millis(5);

/// How a directory is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// With other dependents.
    Shared,
    /// By nobody else.
    Exclusive,
}

/// Locks directories by their paths, which are no links; none for one that is not there. They are
/// what the paths lead to, for as long as everybody takes locks.
///
/// # Errors
/// [`Error::Locked`] when another has one of them for too long; what `go_on` returns.
pub(crate) fn lock(
    files: &Files,
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
        if begun.elapsed() >= TIMEOUT {
            return Err(Error::Locked { path: contended.to_owned(), seconds: TIMEOUT.as_secs() });
        }
        std::thread::sleep(AGAIN);
    }
}

/// All of them, or the path of one that cannot be had now.
fn lock_all<'a>(files: &Files, wanted: &[(&'a Path, How)]) -> Result<Result<Vec<Option<Dir>>, &'a Path>, Error> {
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

fn lock_one(files: &Files, path: &Path, how: How) -> Result<Tried, Error> {
    let dir = match files.whole_dir(path) {
        Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Tried::Missing),
        other => other?,
    };
    let operation = match how {
        How::Shared => FlockOperation::NonBlockingLockShared,
        How::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    let had = files.run(Op::Lock, path, |_| match flock(dir.file(), operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    });
    let had = had.map_err(|source| Error::file("locked", path, source))?;
    // Whoever had it before may have put another in its place.
    let there = path.symlink_metadata().ok().map(|meta| identity(&meta));
    Ok(if had && dir.identity() == there { Tried::Locked(dir) } else { Tried::Contended })
}
