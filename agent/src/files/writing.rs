//! Files that uploads write. A client whose upload was broken off sends it again, and the agent may notice only later that
//! the first one has ended: its bytes must not come between those of the second.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

use crate::lock::lock;

/// Device and inode of a file.
type FileId = (u64, u64);

/// The newest upload to each file that is being written.
static WRITING: Mutex<BTreeMap<FileId, Arc<Mutex<bool>>>> = Mutex::new(BTreeMap::new());

/// The failure of a write to a file that another upload has begun to write.
#[derive(Debug)]
pub(super) enum WriteError {
    /// Another upload writes the file now.
    Superseded,
    /// The write has failed.
    File(io::Error),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

/// A file that an upload writes from its beginning. Uploads to it that began earlier write no more.
#[derive(Debug)]
pub(super) struct WrittenFile {
    file: File,
    id: FileId,
    /// Whether another upload has begun. Held during each write.
    is_superseded: Arc<Mutex<bool>>,
}

impl WrittenFile {
    /// Empties the file, after the write of an earlier upload that is in progress.
    pub(super) fn begin(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let id = (metadata.dev(), metadata.ino());
        let own = Self { file, id, is_superseded: Arc::default() };
        let earlier = lock(&WRITING).insert(id, Arc::clone(&own.is_superseded));
        if let Some(earlier) = earlier {
            *lock(&earlier) = true;
        }
        // Not by a later upload's bytes: its turn is noted under the lock.
        own.locked(|file| Ok(file.set_len(0)?)).or_else(|error| match error {
            WriteError::Superseded => Ok(()),
            WriteError::File(error) => Err(error),
        })?;
        Ok(own)
    }

    /// Runs `work` on the file, unless another upload writes it by now.
    pub(super) fn locked<T>(&self, work: impl FnOnce(&File) -> Result<T, WriteError>) -> Result<T, WriteError> {
        let is_superseded = lock(&self.is_superseded);
        if *is_superseded { Err(WriteError::Superseded) } else { work(&self.file) }
    }

    /// Writes `bytes` behind those written before.
    pub(super) fn write_all(&self, bytes: &[u8]) -> Result<(), WriteError> {
        self.locked(|mut file| Ok(file.write_all(bytes)?))
    }
}

impl Drop for WrittenFile {
    fn drop(&mut self) {
        let mut all = lock(&WRITING);
        if all.get(&self.id).is_some_and(|newest| Arc::ptr_eq(newest, &self.is_superseded)) {
            all.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_upload_writes_nothing_once_another_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let open = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let read = || std::fs::read_to_string(&path).unwrap();
        let first = WrittenFile::begin(open()).unwrap();
        first.write_all(b"first, and long").unwrap();
        let second = WrittenFile::begin(open()).unwrap();
        assert_eq!(read(), "");
        assert!(matches!(first.write_all(b"late"), Err(WriteError::Superseded)));
        second.write_all(b"second").unwrap();
        // The end of the earlier one forgets nothing of the later one.
        drop(first);
        let third = WrittenFile::begin(open()).unwrap();
        assert!(matches!(second.write_all(b"late"), Err(WriteError::Superseded)));
        drop((second, third));
        assert_eq!(read(), "");
        let id = {
            let last = WrittenFile::begin(open()).unwrap();
            last.write_all(b"last").unwrap();
            last.id
        };
        assert_eq!(read(), "last");
        assert!(!lock(&WRITING).contains_key(&id));
    }
}
