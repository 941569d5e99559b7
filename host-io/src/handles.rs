//! The open handles of a file: through the page cache, and past it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, StatxFlags, statx};
use serde::{Deserialize, Serialize};

use crate::buffer::ALIGN;

/// Whether transfers go through the host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// Through the page cache: the host's memory has data that many VMs read once.
    #[default]
    Host,
    /// Around the page cache (O_DIRECT), where the file system supports it, and offset and length are multiples of its
    /// block size (most often 512 bytes).
    Direct,
}

/// The alignment that the file system asks for in transfers past its cache (Linux 6.1), or else
/// [`ALIGN`].
fn alignment(file: &File) -> usize {
    let said = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let said = said.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let wanted = said.map(|stat| stat.stx_dio_mem_align.max(stat.stx_dio_offset_align) as usize);
    wanted.filter(|align| align.is_power_of_two()).map_or(ALIGN, |align| align.clamp(512, ALIGN))
}

/// A second handle past the page cache, if it is wanted and available.
fn direct_handle(cached: &File, write: bool, policy: CachePolicy, path: &Path) -> Option<File> {
    if policy == CachePolicy::Host {
        return None;
    }
    // By its descriptor, so that it is the same file, even if the name leads elsewhere.
    let same = format!("/proc/self/fd/{}", cached.as_raw_fd());
    let opened = OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(same);
    opened
        .inspect_err(|error| {
            tracing::warn!(path = %path.display(), %error, "no O_DIRECT here: the page cache is used");
        })
        .ok()
}

/// The handles of an open file.
#[derive(Debug)]
pub(crate) struct Handles {
    pub(crate) cached: File,
    pub(crate) direct: Option<File>,
    /// The alignment of offsets, lengths and addresses in transfers past the page cache.
    pub(crate) align: usize,
}

impl Handles {
    /// `path` is the file's path in warnings.
    pub(crate) fn new(cached: File, write: bool, policy: CachePolicy, path: &Path) -> Self {
        let direct = direct_handle(&cached, write, policy, path);
        Self::of(cached, direct)
    }

    pub(crate) fn of(cached: File, direct: Option<File>) -> Self {
        let align = direct.as_ref().map_or(ALIGN, alignment);
        Self { cached, direct, align }
    }
}
