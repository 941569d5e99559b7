//! Where memory files come from: a tmpfs in huge pages that only this process can see, and memfd.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags, fchmod, ftruncate, memfd_create, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use crate::testing::failpoint::{Call, failpoint};
use crate::units::PAGE_SHIFT;

/// A tmpfs mounted `huge=always`, detached: it has no path, and goes when the last file on it is
/// closed.
#[derive(Clone, Debug)]
pub(crate) struct HugeTmpfs(Arc<OwnedFd>);

impl HugeTmpfs {
    /// Mounts it. Needs CAP_SYS_ADMIN and transparent huge pages.
    pub(crate) fn mount() -> io::Result<Self> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "source", "clade")?;
        fsconfig_set_string(&fs, "huge", "always")?;
        // No limit of its own: what a VM may have is checked where the VM is made.
        fsconfig_set_string(&fs, "size", "0")?;
        fsconfig_set_string(&fs, "nr_inodes", "0")?;
        fsconfig_set_string(&fs, "mode", "0700")?;
        fsconfig_create(&fs)?;
        let attrs =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        Ok(Self(Arc::new(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs)?)))
    }

    /// Its root.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// A nameless file of `pages` pages, all holes.
    pub(crate) fn file(&self, pages: u64) -> io::Result<File> {
        failpoint(Call::File)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        // For reading: nobody who gets a descriptor of it opens it again for writing.
        let fd = openat(&*self.0, ".", flags, Mode::RUSR)?;
        failpoint(Call::Size)?;
        ftruncate(&fd, pages << PAGE_SHIFT)?;
        Ok(fd.into())
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

    /// A process that has one open for reading must not open it again for writing, through procfs.
    #[test]
    fn files_of_both_kinds_are_their_owners_to_read_alone() {
        let mode = |file: &File| file.metadata().unwrap().mode() & 0o7777;
        assert_eq!(mode(&small_file(1).unwrap()), 0o400);
        let Ok(huge) = HugeTmpfs::mount() else {
            return println!("skipped: no tmpfs in huge pages can be mounted");
        };
        assert_eq!(mode(&huge.file(1).unwrap()), 0o400);
    }
}
