//! Files with holes in place of zeros.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Zeros of this length are not written.
const HOLE: usize = 64 << 10;

/// Writes to a file that is empty from here on. Long runs of zeros become holes: a file of a guest
/// may be large and take no space.
#[derive(Debug)]
pub struct SparseWriter<'a> {
    file: &'a File,
    at: u64,
    /// Whether the file ends before the last byte written.
    is_short: bool,
}

impl<'a> SparseWriter<'a> {
    /// Writes from `at` on.
    #[must_use]
    pub fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, is_short: false }
    }

    /// The position behind the last byte written.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Gives the file its length.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(self) -> io::Result<()> {
        if self.is_short { self.file.set_len(self.at) } else { Ok(()) }
    }
}

impl Write for SparseWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(HOLE)];
        self.is_short = piece.len() == HOLE && piece.iter().all(|byte| *byte == 0);
        if !self.is_short {
            self.file.write_all_at(piece, self.at)?;
        }
        self.at += piece.len() as u64;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_has_all_bytes_and_holes_for_zeros() {
        let mut bytes = vec![0; 10 << 20];
        bytes[5 << 20] = 7;
        for tail in [0, 1, HOLE] {
            let mut file = tempfile::tempfile().unwrap();
            let wanted = [&bytes[..], &vec![0; tail]].concat();
            let mut writer = SparseWriter::new(&file, 0);
            writer.write_all(b"head").unwrap();
            writer.write_all(&wanted).unwrap();
            assert_eq!(writer.position(), wanted.len() as u64 + 4);
            writer.finish().unwrap();
            let mut found = Vec::new();
            io::Seek::rewind(&mut file).unwrap();
            file.read_to_end(&mut found).unwrap();
            assert!(found[..4] == *b"head" && found[4..] == wanted);
            assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20, "{tail}");
        }
    }
}
