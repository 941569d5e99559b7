//! The source of memory files: a tmpfs in huge pages that other processes see only if they receive
//! it, and memfd.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, fchmod, fstat, fstatfs, ftruncate, memfd_create, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use crate::testing::failpoint::{Call, failpoint};
use crate::units::PAGE_SHIFT;

/// `TMPFS_MAGIC`, as reported by `statfs`.
pub(super) const TMPFS: u64 = 0x0102_1994;

/// A tmpfs mounted `huge=always`, detached: it has no path, and is freed when its last file is
/// closed. Its root may be passed to other processes, whose memory is then in the same mount.
#[derive(Clone, Debug)]
pub struct HugeTmpfs(Arc<OwnedFd>);

impl HugeTmpfs {
    /// Mounts it. Needs CAP_SYS_ADMIN and transparent huge pages.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount() -> io::Result<Self> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "source", "clade")?;
        fsconfig_set_string(&fs, "huge", "always")?;
        // The mount has no limit of its own: a VM's size is checked when the VM is made.
        fsconfig_set_string(&fs, "size", "0")?;
        fsconfig_set_string(&fs, "nr_inodes", "0")?;
        fsconfig_set_string(&fs, "mode", "0700")?;
        fsconfig_create(&fs)?;
        let attrs =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        Ok(Self(Arc::new(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs)?)))
    }

    /// Mounts it, or logs a warning for the operator.
    ///
    /// # Errors
    /// The logged text.
    pub fn mount_or_warn() -> Result<Self, String> {
        Self::mount().map_err(|error| {
            let warning = format!(
                "memory layers live in 4 KiB pages, because a tmpfs in huge pages cannot be mounted ({error}): reads of \
                 shared memory and freezes cost up to 100 times more. Run with CAP_SYS_ADMIN on a kernel with transparent \
                 huge pages to mend it"
            );
            tracing::warn!("{warning}");
            warning
        })
    }

    /// Uses a mount whose root was passed in by another process.
    ///
    /// # Errors
    /// When it is not a directory of a tmpfs.
    pub fn handed_in(root: OwnedFd) -> io::Result<Self> {
        let is_directory = FileType::from_raw_mode(fstat(&root)?.st_mode).is_dir();
        let kind = fstatfs(&root)?.f_type as u64;
        if !is_directory || kind != TMPFS {
            let what = format!("the root of a tmpfs is a directory of file system {TMPFS:#x}, not of {kind:#x}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(Self(Arc::new(root)))
    }

    /// The root directory.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// An unnamed file of `pages` pages, all holes.
    pub(crate) fn file(&self, pages: u64) -> io::Result<File> {
        failpoint(Call::File)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        // Mode for reading: a receiver of a descriptor cannot reopen the file for writing.
        let fd = openat(&*self.0, ".", flags, Mode::RUSR)?;
        failpoint(Call::Size)?;
        ftruncate(&fd, pages << PAGE_SHIFT)?;
        Ok(fd.into())
    }
}

impl AsFd for HugeTmpfs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A file of `pages` pages in 4 KiB pages, all holes.
pub(crate) fn small_file(pages: u64) -> io::Result<File> {
    failpoint(Call::File)?;
    let fd = memfd_create("clade-layer", MemfdFlags::CLOEXEC)?;
    // As above.
    fchmod(&fd, Mode::RUSR)?;
    failpoint(Call::Size)?;
    ftruncate(&fd, pages << PAGE_SHIFT)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// A process that has a file open for reading must not be able to reopen it for writing,
    /// through procfs.
    #[test]
    fn files_of_both_kinds_are_their_owners_to_read_alone() {
        let mode = |file: &File| file.metadata().unwrap().mode() & 0o7777;
        assert_eq!(mode(&small_file(1).unwrap()), 0o400);
        let Ok(huge) = HugeTmpfs::mount() else {
            return clade_test_support::skipped("no tmpfs in huge pages can be mounted");
        };
        assert_eq!(mode(&huge.file(1).unwrap()), 0o400);
    }

    #[test]
    fn a_root_that_is_handed_in_is_of_the_same_mount_or_refused() {
        for other in ["/proc", "/dev/null"] {
            let error = HugeTmpfs::handed_in(File::open(other).unwrap().into()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{other}: {error}");
        }
        let Ok(huge) = HugeTmpfs::mount() else {
            return clade_test_support::skipped("no tmpfs in huge pages can be mounted");
        };
        let device = |fs: &HugeTmpfs| fs.file(1).unwrap().metadata().unwrap().dev();
        let copy = HugeTmpfs::handed_in(huge.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(device(&copy), device(&huge));
        assert_ne!(device(&HugeTmpfs::mount().unwrap()), device(&huge));
        let file = huge.file(1).unwrap();
        assert!(HugeTmpfs::handed_in(file.into()).is_err(), "a file is no root");
    }
}
