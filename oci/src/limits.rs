//! Limits of an image, and streams that enforce them.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use thiserror::Error;

/// Maximum length of an entry's path, as in the kernel.
pub(crate) const MAX_PATH: usize = 4096;
/// Maximum length of a name.
pub(crate) const MAX_NAME: usize = 255;
/// Maximum length of a manifest, an index or a configuration.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;
/// Maximum length of an entry's extended header.
pub(crate) const MAX_PAX: u64 = 1 << 20;
/// Maximum depth of directories.
pub(crate) const MAX_DEPTH: usize = 1024;
/// Maximum number of links to one file, as in ext4.
pub(crate) const MAX_LINKS: u32 = 65_000;
/// Maximum bytes of names, links and attributes of all entries.
const MAX_NAMES: u64 = 512 << 20;
/// Bytes of memory that an attribute takes beside its name and value.
pub(crate) const XATTR_COST: usize = 64;
/// Maximum number of components of links that paths of an image lead over. The links of a distribution take a few for
/// each entry.
pub(crate) const MAX_LINK_STEPS: u64 = 16 << 20;
/// Unpacked bytes from which on the ratio is checked.
const RATIO_FROM: u64 = 64 << 20;

/// The limits of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Layers.
    pub layers: usize,
    /// Entries of all layers together.
    pub entries: u64,
    /// Bytes of all layers together, unpacked.
    pub bytes: u64,
    /// Unpacked bytes of a layer per compressed byte, beyond its first 64 MiB.
    pub ratio: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { layers: 128, entries: 1_000_000, bytes: 64 << 30, ratio: 256 }
    }
}

/// A limit that an image exceeds.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LimitError {
    /// Too many layers.
    #[error("the image has {found} layers; {limit} are allowed")]
    Layers {
        /// The number of layers.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many entries.
    #[error("the image has more than {0} entries")]
    Entries(u64),
    /// Names, links and attributes are too large in total.
    #[error("the image has more than {0} bytes of names and attributes")]
    Names(u64),
    /// Paths lead over too many symbolic links.
    #[error("the image's paths lead over more than {0} components of symbolic links")]
    LinkSteps(u64),
    /// Too many bytes.
    #[error("the image has more than {0} bytes")]
    Bytes(u64),
    /// The compression ratio is too high.
    #[error("{compressed} bytes of the layer are {unpacked} unpacked; {ratio} to 1 are allowed")]
    Ratio {
        /// Compressed bytes read.
        compressed: u64,
        /// Bytes unpacked from them.
        unpacked: u64,
        /// The limit.
        ratio: u64,
    },
}

/// The rest of an image's limits.
#[derive(Debug)]
pub(crate) struct Budget {
    limits: ImageLimits,
    entries: u64,
    names: u64,
    bytes: u64,
}

impl Budget {
    pub(crate) fn new(limits: &ImageLimits) -> Self {
        Self { limits: limits.clone(), entries: limits.entries, names: MAX_NAMES, bytes: limits.bytes }
    }

    /// Counts an entry with that many bytes of names and attributes, which are kept in memory.
    pub(crate) fn take_entry(&mut self, names: usize) -> Result<(), LimitError> {
        self.names = self.names.checked_sub(names as u64).ok_or(LimitError::Names(MAX_NAMES))?;
        self.entries = self.entries.checked_sub(1).ok_or(LimitError::Entries(self.limits.entries))?;
        Ok(())
    }

    fn take_bytes(&mut self, bytes: u64) -> Result<(), LimitError> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or(LimitError::Bytes(self.limits.bytes))?;
        Ok(())
    }

    /// Checks that a file of that size has room, before its bytes are read.
    pub(crate) fn allows(&self, bytes: u64) -> Result<(), LimitError> {
        if bytes > self.bytes { Err(LimitError::Bytes(self.limits.bytes)) } else { Ok(()) }
    }
}

/// Counts the bytes read.
#[derive(Debug)]
pub(crate) struct CountedReader<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R> CountedReader<R> {
    pub(crate) fn new(inner: R) -> (Self, Rc<Cell<u64>>) {
        let count = Rc::new(Cell::new(0));
        (Self { inner, count: Rc::clone(&count) }, count)
    }
}

impl<R: Read> Read for CountedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count.set(self.count.get() + read as u64);
        Ok(read)
    }
}

/// An unpacked layer whose stream fails at the limit.
pub(crate) struct Bounded<'a, R> {
    inner: R,
    compressed: Rc<Cell<u64>>,
    unpacked: u64,
    budget: &'a mut Budget,
}

impl<'a, R: Read> Bounded<'a, R> {
    pub(crate) fn new(inner: R, compressed: Rc<Cell<u64>>, budget: &'a mut Budget) -> Self {
        Self { inner, compressed, unpacked: 0, budget }
    }

    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    pub(crate) fn budget(&mut self) -> &mut Budget {
        self.budget
    }
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.unpacked += read as u64;
        self.budget.take_bytes(read as u64).map_err(io::Error::other)?;
        let (compressed, ratio) = (self.compressed.get(), self.budget.limits.ratio);
        if self.unpacked > RATIO_FROM && self.unpacked / compressed.max(1) > ratio {
            return Err(io::Error::other(LimitError::Ratio { compressed, unpacked: self.unpacked, ratio }));
        }
        Ok(read)
    }
}
