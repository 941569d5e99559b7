//! Short files that are replaced as a whole.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// Writes or replaces the file `path`. A reader finds the earlier content or the new one, also after
/// a power cut, and the new one once this function has returned.
///
/// # Errors
/// When the file or its directory cannot be written. The earlier content may then stay, or be
/// replaced already.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Hidden: directories of records are listed by their visible names.
    let mut file = NamedTempFile::with_prefix_in(".", dir)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // Makes the name durable, too.
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        for content in [&b"a longer first content"[..], b"second", b""] {
            write_durably(&path, content).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        // A directory cannot be replaced.
        let taken = dir.path().join("taken");
        fs::create_dir(&taken).unwrap();
        write_durably(&taken, b"content").unwrap_err();
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["record", "taken"]);
        let missing = write_durably(&dir.path().join("no/record"), b"").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
