//! A kernel or an initramfs: a file, or bytes in memory.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

/// A kernel or an initramfs.
#[derive(Clone)]
pub enum BootImage {
    /// A file, read when the guest is loaded.
    File(PathBuf),
    /// Bytes in memory, such as a guest built into the program.
    Bytes(Cow<'static, [u8]>),
}

/// Why an image could not be read or copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootImageError {
    /// The file could not be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file's path.
        path: PathBuf,
        /// The error of the open or read.
        #[source]
        source: io::Error,
    },
    /// The image is empty.
    #[error("{image} is empty")]
    Empty {
        /// The image's name.
        image: String,
    },
    /// The image is too large.
    #[error("{image} is larger than {limit} bytes")]
    TooLarge {
        /// The image's name.
        image: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The image could not be copied into the guest.
    #[error("cannot copy {len} bytes of {image} to guest address {addr:#x}")]
    Copy {
        /// The image's name.
        image: String,
        /// The number of bytes to copy.
        len: u64,
        /// The guest-physical address.
        addr: u64,
        /// The error of the access.
        #[source]
        source: GuestMemoryError,
    },
}

impl std::fmt::Debug for BootImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl From<&Path> for BootImage {
    fn from(path: &Path) -> Self {
        Self::File(path.to_owned())
    }
}

impl From<PathBuf> for BootImage {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

impl From<&'static [u8]> for BootImage {
    fn from(bytes: &'static [u8]) -> Self {
        Self::Bytes(Cow::Borrowed(bytes))
    }
}

impl From<Vec<u8>> for BootImage {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(Cow::Owned(bytes))
    }
}

impl BootImage {
    /// The image's name in error messages.
    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Bytes(bytes) => format!("the built-in image of {} bytes", bytes.len()),
        }
    }

    /// The whole image. More than `limit` bytes are an error.
    pub(super) fn read(&self, limit: u64) -> Result<Cow<'_, [u8]>, BootImageError> {
        let bytes = match self {
            Self::Bytes(bytes) => Cow::Borrowed(&**bytes),
            Self::File(path) => {
                let failed = |source| BootImageError::Read { path: path.clone(), source };
                let mut bytes = Vec::new();
                let file = File::open(path).map_err(failed)?;
                file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
                Cow::Owned(bytes)
            }
        };
        match bytes.len() as u64 {
            0 => Err(BootImageError::Empty { image: self.name() }),
            len if len > limit => Err(BootImageError::TooLarge { image: self.name(), limit }),
            _ => Ok(bytes),
        }
    }

    /// Opens the image for copying into the guest, without a buffer in this process.
    pub(super) fn open(&self) -> Result<OpenImage<'_>, BootImageError> {
        let (source, len) = match self {
            Self::Bytes(bytes) => (OpenSource::Bytes(bytes), bytes.len() as u64),
            Self::File(path) => {
                let failed = |source| BootImageError::Read { path: path.clone(), source };
                let file = File::open(path).map_err(failed)?;
                let meta = file.metadata().map_err(failed)?;
                if !meta.is_file() {
                    return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
                }
                (OpenSource::File(file), meta.len())
            }
        };
        if len == 0 {
            return Err(BootImageError::Empty { image: self.name() });
        }
        Ok(OpenImage { image: self, source, len })
    }
}

enum OpenSource<'a> {
    File(File),
    Bytes(&'a [u8]),
}

/// An open image of known length, ready to be copied.
pub(super) struct OpenImage<'a> {
    image: &'a BootImage,
    source: OpenSource<'a>,
    len: u64,
}

impl OpenImage<'_> {
    /// Length in bytes, never 0.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Copies the whole image to `addr`.
    pub(super) fn copy_to<M: GuestMemoryBackend>(mut self, mem: &M, addr: GuestAddress) -> Result<(), BootImageError> {
        let copied = match &mut self.source {
            OpenSource::Bytes(bytes) => mem.write_slice(bytes, addr),
            // The file's length is at most the guest's RAM (checked by the caller), so it fits a
            // usize.
            OpenSource::File(file) => mem.read_exact_volatile_from(addr, file, self.len as usize),
        };
        copied.map_err(|source| BootImageError::Copy { image: self.image.name(), len: self.len, addr: addr.0, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named() {
        let error = BootImage::from(Path::new("/nonexistent/vmlinux")).read(1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/vmlinux");
    }

    #[test]
    fn a_directory_and_an_empty_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(BootImage::from(dir.path()).open(), Err(BootImageError::Read { .. })));
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        let error = BootImage::from(empty.as_path()).read(10).unwrap_err();
        assert_eq!(error.to_string(), format!("{} is empty", empty.display()));
        assert!(matches!(BootImage::from(empty).open(), Err(BootImageError::Empty { .. })));
    }

    #[test]
    fn the_limit_is_exact() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 10]).unwrap();
        let image = BootImage::from(file.path());
        assert_eq!(image.read(10).unwrap().len(), 10);
        assert!(matches!(image.read(9), Err(BootImageError::TooLarge { limit: 9, .. })));
    }
}
