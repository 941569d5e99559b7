//! The journal's bytes: a header, and records that each say where some granules are. All numbers are little-endian.
//!
//! | | |
//! |---|---|
//! | header | magic `CLADEJ01`, the disk's size, the image's inode, when that was made (ns since 1970; 0 where the file system does not say), checksum: 8 bytes each |
//! | record | its number, how many entries: 8 bytes each; the entries; checksum of all that, 8 bytes |
//! | entry | first granule, the granule after its last, the overlay's number or all ones for zeros: 8 bytes each |
//!
//! Checksums are XXH3-64. The first record comes with the header and is always whole, because a journal is given its name when both are durable. A record after it may
//! be torn, or be what a longer one that failed has left: records count from 0, and the journal ends before the first that is not whole or not the next.

use std::ops::Range;

const MAGIC: &[u8; 8] = b"CLADEJ01";
const HEADER: usize = 40;
/// Bytes of an entry; as many as a record has besides.
pub(super) const ENTRY: usize = 24;
/// In place of an overlay's number.
const ZEROS: u64 = u64::MAX;

/// Where some granules are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) granules: Range<u64>,
    /// The overlay's number. None if they are zeros.
    pub(super) overlay: Option<u64>,
}

/// Which image a journal belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) size: u64,
    pub(super) inode: u64,
    /// An inode's number is soon another file's.
    pub(super) born: u64,
}

fn put(bytes: &mut Vec<u8>, word: u64) {
    bytes.extend_from_slice(&word.to_le_bytes());
}

fn seal(bytes: &mut Vec<u8>, from: usize) {
    let sum = twox_hash::XxHash3_64::oneshot(&bytes[from..]);
    put(bytes, sum);
}

pub(super) fn header(image: Image) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    put(&mut bytes, image.size);
    put(&mut bytes, image.inode);
    put(&mut bytes, image.born);
    seal(&mut bytes, 0);
    bytes
}

pub(super) fn record(number: u64, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((1 + entries.len()) * ENTRY);
    put(&mut bytes, number);
    put(&mut bytes, entries.len() as u64);
    for entry in entries {
        put(&mut bytes, entry.granules.start);
        put(&mut bytes, entry.granules.end);
        put(&mut bytes, entry.overlay.unwrap_or(ZEROS));
    }
    seal(&mut bytes, 0);
    bytes
}

/// Bytes that are no journal, or not this disk's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// No whole header, or no whole first record.
    #[error("it is damaged: its beginning is not what was written")]
    Damaged,
    /// The image has been replaced or resized.
    #[error("it belongs to another image: of {size} bytes, inode {inode}, or one that had that number before")]
    Other {
        /// That image's size.
        size: u64,
        /// That image's inode.
        inode: u64,
    },
    /// The directory it is in is another user's, or others may write in it.
    #[error("its directory is not this user's alone")]
    NotOurs,
    /// A record whose checksum is right says what cannot be.
    #[error("it has granules {start:#x} to {end:#x} of a disk that has {granules:#x}")]
    OffDisk {
        /// The first.
        start: u64,
        /// The granule after the last.
        end: u64,
        /// How many there are.
        granules: u64,
    },
}

struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }
}

/// What follows a whole record, and its entries.
fn next_record(bytes: &[u8], number: u64) -> Option<(&[u8], Vec<Entry>)> {
    let mut reader = Reader(bytes);
    let (found, count) = (reader.word()?, usize::try_from(reader.word()?).ok()?);
    let sealed = count.checked_mul(ENTRY)?.checked_add(16)?;
    // Before anything is allocated for as many.
    let (body, mut rest) = bytes.split_at_checked(sealed).map(|(body, rest)| (body, Reader(rest)))?;
    if found != number || rest.word()? != twox_hash::XxHash3_64::oneshot(body) {
        return None;
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let granules = reader.word()?..reader.word()?;
        let overlay = Some(reader.word()?).filter(|overlay| *overlay != ZEROS);
        entries.push(Entry { granules, overlay });
    }
    Some((rest.0, entries))
}

/// All entries of a journal of `image`, in their order, on a disk of so many granules.
pub(super) fn entries(bytes: &[u8], image: Image, granules: u64) -> Result<Vec<Entry>, JournalError> {
    let (head, mut rest) = bytes.split_at_checked(HEADER).ok_or(JournalError::Damaged)?;
    let mut reader = Reader(&head[MAGIC.len()..]);
    let [size, inode, born, sum] = [(); 4].map(|()| reader.word().unwrap_or_default());
    if !head.starts_with(MAGIC) || sum != twox_hash::XxHash3_64::oneshot(&head[..HEADER - 8]) {
        return Err(JournalError::Damaged);
    }
    let of = Image { size, inode, born };
    if of != image {
        return Err(JournalError::Other { size: of.size, inode: of.inode });
    }
    let (mut all, mut number) = (Vec::new(), 0);
    while let Some((after, entries)) = next_record(rest, number) {
        for Range { start, end } in entries.iter().map(|entry| entry.granules.clone()) {
            if start >= end || end > granules {
                return Err(JournalError::OffDisk { start, end, granules });
            }
        }
        all.extend(entries);
        (rest, number) = (after, number + 1);
    }
    if number == 0 { Err(JournalError::Damaged) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IMAGE: Image = Image { size: 100 * 4096, inode: 7, born: 99 };

    fn some_entries() -> impl Strategy<Value = Vec<Entry>> {
        let entry = (0..99u64, 1..40u64, proptest::option::of(0..9u64));
        let entry = entry.prop_map(|(start, len, overlay)| Entry { granules: start..(start + len).min(100), overlay });
        proptest::collection::vec(entry, 0..5)
    }

    fn journal(records: &[Vec<Entry>]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut ends) = (header(IMAGE), Vec::new());
        for (number, entries) in records.iter().enumerate() {
            bytes.extend(record(number as u64, entries));
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    proptest! {
        /// Cut anywhere, or with one bit turned over, it has the whole records before that, or is refused: never anything else.
        #[test]
        fn what_is_read_is_what_was_written_up_to_the_damage(
            records in proptest::collection::vec(some_entries(), 1..5),
            at in any::<prop::sample::Index>(),
            bit in 0..8u8,
            cut in any::<bool>(),
        ) {
            let (mut bytes, ends) = journal(&records);
            prop_assert_eq!(entries(&bytes, IMAGE, 100), Ok(records.concat()));
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            let whole = ends.iter().take_while(|end| **end <= at).count();
            let want = if whole == 0 { Err(JournalError::Damaged) } else { Ok(records[..whole].concat()) };
            prop_assert_eq!(entries(&bytes, IMAGE, 100), want);
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()) {
            if framed {
                let tail = std::mem::replace(&mut bytes, header(IMAGE));
                bytes.extend(tail);
            }
            prop_assert_eq!(entries(&bytes, IMAGE, 100), Err(JournalError::Damaged));
        }
    }

    #[test]
    fn another_image_and_granules_off_the_disk_are_refused_by_value() {
        let (bytes, _) = journal(&[vec![]]);
        for other in [Image { size: 8192, ..IMAGE }, Image { inode: 8, ..IMAGE }, Image { born: 98, ..IMAGE }] {
            let refused = entries(&bytes, other, 100);
            assert_eq!(refused, Err(JournalError::Other { size: IMAGE.size, inode: IMAGE.inode }));
        }
        for (start, end) in [(0, 101), (5, 5), (6, 5), (u64::MAX, u64::MAX), (0, u64::MAX)] {
            let (bytes, _) = journal(&[vec![], vec![Entry { granules: start..end, overlay: None }]]);
            assert_eq!(entries(&bytes, IMAGE, 100), Err(JournalError::OffDisk { start, end, granules: 100 }));
        }
    }

    #[test]
    fn what_a_longer_record_has_left_is_no_record() {
        let entry = |overlay| Entry { granules: 1..2, overlay: Some(overlay) };
        let (mut bytes, ends) = journal(&[vec![entry(0)], vec![entry(1), entry(2)]]);
        // The second failed; the next is shorter, and then lies what is left of it: here even a record that is whole.
        bytes.truncate(ends[0]);
        bytes.extend(record(1, &[entry(3)]));
        bytes.extend(record(1, &[entry(4)]));
        assert_eq!(entries(&bytes, IMAGE, 100), Ok(vec![entry(0), entry(3)]));
    }
}
