//! Binds a journal to its image: an id in an extended attribute, and the image's length and times.

use clade_host_io::{FileError, IoFile};
use rustix::fs::{StatxFlags, XattrFlags, fgetxattr, fremovexattr, fsetxattr, statx};
use rustix::io::Errno;

use super::format::{ImageStatus, JournalError, JournalHeader, JournalId, Stamp};
use crate::directory::failed;
use crate::steps_trace::step;

/// The image's extended attribute: the id of its journal, in hexadecimal.
pub(super) const XATTR: &str = "user.clade.journal";

/// The journal's id in an image's attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// The file system has no extended attributes.
    Unsupported,
    /// The image has no journal.
    None,
    /// The image has the journal of this id.
    Id(JournalId),
}

impl Mark {
    pub(super) fn id(self) -> Option<JournalId> {
        match self {
            Self::Id(id) => Some(id),
            Self::None | Self::Unsupported => None,
        }
    }
}

/// A random id.
pub(super) fn new_id() -> Result<JournalId, rustix::io::Errno> {
    let mut bytes = [0; 16];
    // Not 0, which stands for no id.
    bytes[0] = 1;
    rustix::rand::getrandom(&mut bytes[1..], rustix::rand::GetRandomFlags::empty())?;
    Ok(JournalId(u128::from_le_bytes(bytes)))
}

pub(super) fn read_mark(image: &IoFile) -> Result<Mark, FileError> {
    let mut text = [0; 64];
    match fgetxattr(image, XATTR, &mut text) {
        Ok(len) => {
            let text = std::str::from_utf8(&text[..len]).ok().and_then(|text| u128::from_str_radix(text, 16).ok());
            // A value that is not one of our ids matches no journal. The image is refused as for
            // another journal's id.
            Ok(Mark::Id(JournalId(text.unwrap_or(0))))
        }
        Err(Errno::NODATA) => Ok(Mark::None),
        Err(Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => Ok(Mark::Unsupported),
        Err(Errno::RANGE) => Ok(Mark::Id(JournalId(0))),
        Err(error) => Err(failed(image.path(), "asked for its journal's id")(error.into())),
    }
}

pub(super) fn set_mark(image: &IoFile, id: JournalId) -> Result<(), FileError> {
    let wrong = || failed(image.path(), "given its journal's id");
    step(|| "mark image".to_owned()).map_err(wrong())?;
    let text = id.to_string();
    fsetxattr(image, XATTR, text.as_bytes(), XattrFlags::empty()).map_err(|error| wrong()(error.into()))
}

pub(super) fn clear_mark(image: &IoFile) -> Result<(), FileError> {
    let wrong = || failed(image.path(), "rid of its journal's id");
    step(|| "unmark image".to_owned()).map_err(wrong())?;
    match fremovexattr(image, XATTR) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) | Ok(()) => Ok(()),
        Err(error) => Err(wrong()(error.into())),
    }
}

/// The image's length and times now.
pub(super) fn stamp(image: &IoFile) -> Result<Stamp, FileError> {
    let wanted = StatxFlags::SIZE | StatxFlags::MTIME | StatxFlags::CTIME;
    let stat = statx(image, "", rustix::fs::AtFlags::EMPTY_PATH, wanted)
        .map_err(|error| failed(image.path(), "looked at")(error.into()))?;
    let ns = |time: rustix::fs::StatxTimestamp| {
        (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(u64::from(time.tv_nsec))
    };
    Ok(Stamp { len: stat.stx_size, mtime: ns(stat.stx_mtime), ctime: ns(stat.stx_ctime) })
}

/// Compares the image's stamp `now` with the record's in `seen`.
pub(super) fn unchanged(seen: ImageStatus, now: Stamp) -> Result<(), JournalError> {
    let was = seen.stamp;
    let pairs = [("length", was.len, now.len), ("mtime", was.mtime, now.mtime), ("ctime", was.ctime, now.ctime)];
    match pairs.into_iter().find(|(_, was, now)| was != now).filter(|_| !seen.writing) {
        Some((what, was, now)) => Err(JournalError::Changed { what, was, now }),
        None => Ok(()),
    }
}

/// Whether the headers of a journal and of an image agree.
pub(super) fn belongs(header: &JournalHeader, image: &JournalHeader) -> Result<(), JournalError> {
    let same_file = (header.inode, header.born) == (image.inode, image.born);
    let same = match header.id {
        Some(id) => image.id == Some(id),
        None => image.id.is_none() && same_file,
    };
    if same && header.size == image.size {
        return Ok(());
    }
    Err(JournalError::Other { size: header.size, id: header.id, found_size: image.size, found: image.id })
}
