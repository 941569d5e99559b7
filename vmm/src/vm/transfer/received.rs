//! Descriptors received with an image. Their sender may be compromised, so each is checked before its use.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, OFlags, Statx, StatxFlags, fcntl_getfl, fstat, statx};

use super::TransferError;

/// The received descriptors. Each file is used once; a kept descriptor may be used any number of
/// times.
pub(super) struct Received {
    files: Vec<Option<OwnedFd>>,
    kept: HashMap<usize, Arc<OwnedFd>>,
}

impl Received {
    pub(super) fn new(files: Vec<OwnedFd>) -> Self {
        Self { files: files.into_iter().map(Some).collect(), kept: HashMap::new() }
    }

    pub(super) fn take(&mut self, at: usize) -> Result<OwnedFd, TransferError> {
        let file = self.files.get_mut(at).and_then(Option::take);
        file.ok_or_else(|| TransferError::malformed(format!("there is no descriptor {at}, or it is used already")))
    }

    pub(super) fn keep(&mut self, at: usize) -> Result<Arc<OwnedFd>, TransferError> {
        if let Some(kept) = self.kept.get(&at) {
            return Ok(Arc::clone(kept));
        }
        let kept = self.take(at)?;
        // A lease is the writing end of a pipe. A lock is on a file.
        let stat = fstat(&kept).map_err(|errno| TransferError::system("looked at")(errno.into()))?;
        if !FileType::from_raw_mode(stat.st_mode).is_fifo() && !is_read_only(&kept)? {
            return Err(TransferError::malformed("a descriptor to be kept can be written"));
        }
        let kept = Arc::new(kept);
        self.kept.insert(at, Arc::clone(&kept));
        Ok(kept)
    }
}

/// Device, inode, and the inode's birth time, because inode numbers are reused.
pub type FileId = (u32, u32, u64, i64, u32);

/// The identity of the file at `path`, which may not be a symbolic link.
///
/// # Errors
/// When there is none.
pub fn file_id_at(path: &Path) -> std::io::Result<FileId> {
    let stat = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO | StatxFlags::BTIME)?;
    Ok(id_of(&stat))
}

fn id_of(stat: &Statx) -> FileId {
    let born = stat.stx_btime;
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino, born.tv_sec, born.tv_nsec)
}

pub(super) fn file_id(file: impl AsFd) -> Result<FileId, TransferError> {
    let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)
        .map_err(|errno| TransferError::system("looked at")(errno.into()))?;
    Ok(id_of(&stat))
}

/// Whether a descriptor is open for reading only.
pub(super) fn is_read_only(file: impl AsFd) -> Result<bool, TransferError> {
    let flags = fcntl_getfl(file).map_err(|errno| TransferError::system("looked at")(errno.into()))?;
    Ok(flags & OFlags::ACCMODE == OFlags::RDONLY)
}

/// A file or a block device that is open for reading only.
pub(super) fn readable(file: OwnedFd) -> Result<File, TransferError> {
    let file = File::from(file);
    let kind = file.metadata().map_err(TransferError::system("looked at"))?.file_type();
    if !(kind.is_file() || kind.is_block_device()) || !is_read_only(&file)? {
        return Err(TransferError::malformed("a disk's file is none, or can be written"));
    }
    Ok(file)
}

/// Reopens the file of `id`, for reading only, past the page cache.
pub(super) fn past_the_cache(file: OwnedFd, id: FileId) -> Result<File, TransferError> {
    let file = readable(file)?;
    let flags = fcntl_getfl(&file).map_err(|errno| TransferError::system("looked at")(errno.into()))?;
    if !flags.contains(OFlags::DIRECT) || file_id(&file)? != id {
        return Err(TransferError::malformed("a disk's file past the page cache is another, or goes through it"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn a_descriptor_that_is_kept_is_a_pipe_or_cannot_be_written() {
        let keep = |file: OwnedFd| Received::new(vec![file]).keep(0).map(drop).map_err(|error| error.to_string());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"x").unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        keep(writer.into()).unwrap();
        keep(reader.into()).unwrap();
        keep(File::open(&path).unwrap().into()).unwrap();
        for options in [File::options().write(true), File::options().read(true).write(true)] {
            let refused = keep(options.open(&path).unwrap().into()).unwrap_err();
            assert!(refused.contains("can be written"), "{refused}");
        }
    }

    #[test]
    fn a_file_past_the_page_cache_is_the_same_file_and_goes_past_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str, flags| {
            let path = dir.path().join(name);
            let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
            drop(file.unwrap());
            File::options().read(true).custom_flags(flags).open(path)
        };
        let id = file_id(open("disk", 0).unwrap()).unwrap();
        let check = |file: File| past_the_cache(file.into(), id).map(drop).map_err(|error| error.to_string());
        let refused = check(open("disk", 0).unwrap()).unwrap_err();
        assert!(refused.contains("goes through it"), "{refused}");
        let Ok(direct) = open("disk", libc::O_DIRECT) else {
            return clade_test_support::skipped(&format!("no O_DIRECT in {}", dir.path().display()));
        };
        check(direct).unwrap();
        let refused = check(open("other", libc::O_DIRECT).unwrap()).unwrap_err();
        assert!(refused.contains("is another"), "{refused}");
        let writable = File::options().write(true).custom_flags(libc::O_DIRECT).open(dir.path().join("disk"));
        let refused = check(writable.unwrap()).unwrap_err();
        assert!(refused.contains("can be written"), "{refused}");
    }
}
