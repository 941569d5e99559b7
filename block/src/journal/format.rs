//! The journal's bytes: a header, and records of where clusters are. All numbers are little-endian,
//! 8 bytes each.
//!
//! | part | fields |
//! |---|---|
//! | header | magic `CLADEJ02`; disk size; image id (16 bytes); inode, birth time; checksum |
//! | record | number; state; image length, mtime, ctime; entry count; entries; checksum of all |
//! | entry | first cluster; cluster after the last; overlay number (ones: zeros; ones - 1: image) |
//!
//! Times are in ns since 1970. An absent id and an unknown birth time are 0. Checksums are XXH3-64.
//! The journal gets its name when the header and the first record are durable, so the first record
//! is always whole. A later record may be torn, or may be the rest of a longer one that failed.
//! Records count from 0. The journal ends before the first record that is not whole or has the
//! wrong number.
//!
//! A record's state is 0 if the image must have the length and the times in the record, and 1 from
//! the moment the VMM itself begins to write into the image.

use std::fmt;
use std::ops::Range;

const MAGIC: &[u8; 8] = b"CLADEJ02";
pub(super) const HEADER: usize = 56;
/// Bytes of an entry.
pub(super) const ENTRY: usize = 24;
/// Bytes of a record before its entries.
const RECORD: usize = 48;
/// Values of an entry's `stored_in` that are not overlay numbers.
const ZEROS: u64 = u64::MAX;
const IMAGE: u64 = u64::MAX - 1;
/// A record's state while the VMM writes into the image.
const WRITING: u64 = 1;

/// The file that contains clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoredIn {
    /// The image again.
    Image,
    /// No file: zeros.
    Zeros,
    /// The overlay of this number.
    Overlay(u64),
}

/// Clusters, and the file that contains them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JournalEntry {
    pub(super) clusters: Range<u64>,
    pub(super) stored_in: StoredIn,
}

/// An id that an image and its journal share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalId(pub(super) u128);

impl fmt::Display for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The image that a journal belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JournalHeader {
    pub(super) size: u64,
    /// None where the file system has no extended attributes.
    pub(super) id: Option<JournalId>,
    pub(super) inode: u64,
    /// Birth time of the inode (ns since 1970, 0 if unknown): inode numbers are used again.
    pub(super) born: u64,
}

/// An image's length in bytes, mtime and ctime (ns since 1970).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) len: u64,
    pub(super) mtime: u64,
    pub(super) ctime: u64,
}

/// The image's state in a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ImageStatus {
    pub(super) stamp: Stamp,
    /// Whether the VMM is writing into the image: the stamp is then invalid.
    pub(super) writing: bool,
}

/// A journal's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) header: JournalHeader,
    /// Entries of all records, in order: a later one replaces an earlier one.
    pub(super) entries: Vec<JournalEntry>,
    /// The image's state in the last record.
    pub(super) seen: ImageStatus,
    pub(super) records: u64,
    /// Offset of the next record.
    pub(super) end: u64,
}

fn put(bytes: &mut Vec<u8>, word: u64) {
    bytes.extend_from_slice(&word.to_le_bytes());
}

fn seal(bytes: &mut Vec<u8>) {
    let sum = twox_hash::XxHash3_64::oneshot(bytes);
    put(bytes, sum);
}

pub(super) fn header(header: JournalHeader) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    put(&mut bytes, header.size);
    bytes.extend_from_slice(&header.id.map_or(0, |id| id.0).to_le_bytes());
    put(&mut bytes, header.inode);
    put(&mut bytes, header.born);
    seal(&mut bytes);
    bytes
}

pub(super) fn record(number: u64, seen: ImageStatus, entries: &[JournalEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RECORD + entries.len() * ENTRY + 8);
    put(&mut bytes, number);
    put(&mut bytes, if seen.writing { WRITING } else { 0 });
    put(&mut bytes, seen.stamp.len);
    put(&mut bytes, seen.stamp.mtime);
    put(&mut bytes, seen.stamp.ctime);
    put(&mut bytes, entries.len() as u64);
    for entry in entries {
        put(&mut bytes, entry.clusters.start);
        put(&mut bytes, entry.clusters.end);
        let stored_in = match entry.stored_in {
            StoredIn::Image => IMAGE,
            StoredIn::Zeros => ZEROS,
            StoredIn::Overlay(number) => number,
        };
        put(&mut bytes, stored_in);
    }
    seal(&mut bytes);
    bytes
}

/// Why a journal cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The header or the first record is not whole.
    #[error("it is damaged: its header does not match its checksum")]
    Damaged,
    /// The image has another id, another size, or is another file.
    #[error(
        "it belongs to another image, of {size} bytes and {}; this one has {found_size} bytes and {}",
        id_text(*id), id_text(*found)
    )]
    Other {
        /// The size of the journal's image in bytes.
        size: u64,
        /// The id of the journal's image.
        id: Option<JournalId>,
        /// The size of this image in bytes.
        found_size: u64,
        /// The id of this image.
        found: Option<JournalId>,
    },
    /// Another program has written to the image, or has moved or copied it.
    #[error("the image was changed by something else since the last flush: its {what} was {was} and is {now}")]
    Changed {
        /// The attribute that has changed: length, mtime or ctime.
        what: &'static str,
        /// Its value in the journal (bytes, or ns since 1970).
        was: u64,
        /// Its value now.
        now: u64,
    },
    /// The journal's directory belongs to another user, or other users may write in it.
    #[error("its directory is not this user's alone")]
    NotOurs,
    /// A record with a right checksum has clusters that the disk does not have.
    #[error("it has clusters {start:#x} to {end:#x} of a disk that has {clusters:#x}")]
    OffDisk {
        /// The entry's first cluster.
        start: u64,
        /// The cluster after the entry's last one.
        end: u64,
        /// How many clusters the disk has.
        clusters: u64,
    },
}

fn id_text(id: Option<JournalId>) -> String {
    id.map_or_else(|| "no id".to_owned(), |id| format!("id {id}"))
}

struct WordReader<'b>(&'b [u8]);

impl WordReader<'_> {
    fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }
}

/// Reads a record. Returns the bytes after it, the image's state, and the entries.
fn next_record(bytes: &[u8], number: u64) -> Option<(&[u8], ImageStatus, Vec<JournalEntry>)> {
    let mut reader = WordReader(bytes);
    let (found, state) = (reader.word()?, reader.word()?);
    let stamp = Stamp { len: reader.word()?, mtime: reader.word()?, ctime: reader.word()? };
    let count = usize::try_from(reader.word()?).ok()?;
    let sealed = count.checked_mul(ENTRY)?.checked_add(RECORD)?;
    // Checked before the entries are allocated.
    let (body, mut rest) = bytes.split_at_checked(sealed).map(|(body, rest)| (body, WordReader(rest)))?;
    if found != number || rest.word()? != twox_hash::XxHash3_64::oneshot(body) {
        return None;
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let clusters = reader.word()?..reader.word()?;
        let stored_in = match reader.word()? {
            ZEROS => StoredIn::Zeros,
            IMAGE => StoredIn::Image,
            number => StoredIn::Overlay(number),
        };
        entries.push(JournalEntry { clusters, stored_in });
    }
    Some((rest.0, ImageStatus { stamp, writing: state == WRITING }, entries))
}

/// Reads the header alone.
pub(super) fn read_header(bytes: &[u8]) -> Result<JournalHeader, JournalError> {
    let head = bytes.get(..HEADER).ok_or(JournalError::Damaged)?;
    let mut reader = WordReader(&head[MAGIC.len()..]);
    let [size, low, high, inode, born, sum] = [(); 6].map(|()| reader.word().unwrap_or_default());
    if !head.starts_with(MAGIC) || sum != twox_hash::XxHash3_64::oneshot(&head[..HEADER - 8]) {
        return Err(JournalError::Damaged);
    }
    let id = u128::from(high) << 64 | u128::from(low);
    Ok(JournalHeader { size, id: (id != 0).then_some(JournalId(id)), inode, born })
}

/// Reads a journal. The caller compares the header with the image.
pub(super) fn read(bytes: &[u8]) -> Result<Contents, JournalError> {
    let header = read_header(bytes)?;
    let clusters = header.size.div_ceil(super::CLUSTER);
    let mut rest = &bytes[HEADER..];
    let mut contents = Contents { header, entries: Vec::new(), seen: ImageStatus::default(), records: 0, end: 0 };
    while let Some((after, seen, entries)) = next_record(rest, contents.records) {
        for Range { start, end } in entries.iter().map(|entry| entry.clusters.clone()) {
            if start >= end || end > clusters {
                return Err(JournalError::OffDisk { start, end, clusters });
            }
        }
        contents.entries.extend(entries);
        contents.seen = seen;
        contents.records += 1;
        rest = after;
    }
    contents.end = (bytes.len() - rest.len()) as u64;
    if contents.records == 0 { Err(JournalError::Damaged) } else { Ok(contents) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: JournalHeader = JournalHeader { size: 100 * 4096, id: Some(JournalId(7)), inode: 7, born: 99 };

    fn some_entries() -> impl Strategy<Value = Vec<JournalEntry>> {
        let stored_in =
            prop_oneof![Just(StoredIn::Image), Just(StoredIn::Zeros), (0..9u64).prop_map(StoredIn::Overlay)];
        let entry = (0..99u64, 1..40u64, stored_in);
        let entry = entry
            .prop_map(|(start, len, stored_in)| JournalEntry { clusters: start..(start + len).min(100), stored_in });
        proptest::collection::vec(entry, 0..5)
    }

    fn seen(number: usize) -> ImageStatus {
        let number = number as u64;
        ImageStatus { stamp: Stamp { len: number, mtime: number + 1, ctime: number + 2 }, writing: number % 2 == 1 }
    }

    fn journal(records: &[Vec<JournalEntry>]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut ends) = (header(HEAD), Vec::new());
        for (number, entries) in records.iter().enumerate() {
            bytes.extend(record(number as u64, seen(number), entries));
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    fn contents(records: &[Vec<JournalEntry>], end: usize) -> Contents {
        let last = records.len() - 1;
        let records = records.len() as u64;
        Contents { header: HEAD, entries: Vec::new(), seen: seen(last), records, end: end as u64 }
    }

    proptest! {
        /// A journal cut anywhere, or with one bit flipped, has the whole records before that
        /// point, or is refused.
        #[test]
        fn what_is_read_is_what_was_written_up_to_the_damage(
            records in proptest::collection::vec(some_entries(), 1..5),
            at in any::<prop::sample::Index>(),
            bit in 0..8u8,
            cut in any::<bool>(),
        ) {
            let (mut bytes, ends) = journal(&records);
            let want = |whole: usize| {
                let read = contents(&records[..whole], ends[whole - 1]);
                Contents { entries: records[..whole].concat(), ..read }
            };
            prop_assert_eq!(read(&bytes), Ok(want(records.len())));
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            let whole = ends.iter().take_while(|end| **end <= at).count();
            let want = if whole == 0 { Err(JournalError::Damaged) } else { Ok(want(whole)) };
            prop_assert_eq!(read(&bytes), want);
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()) {
            if framed {
                let tail = std::mem::replace(&mut bytes, header(HEAD));
                bytes.extend(tail);
            }
            prop_assert_eq!(read(&bytes), Err(JournalError::Damaged));
        }
    }

    #[test]
    fn clusters_off_the_disk_are_refused_by_value() {
        for (start, end) in [(0, 101), (5, 5), (6, 5), (u64::MAX, u64::MAX), (0, u64::MAX)] {
            let (bytes, _) =
                journal(&[vec![], vec![JournalEntry { clusters: start..end, stored_in: StoredIn::Zeros }]]);
            assert_eq!(read(&bytes), Err(JournalError::OffDisk { start, end, clusters: 100 }));
        }
    }

    #[test]
    fn what_a_longer_record_has_left_is_no_record() {
        let entry = |overlay| JournalEntry { clusters: 1..2, stored_in: StoredIn::Overlay(overlay) };
        let (mut bytes, ends) = journal(&[vec![entry(0)], vec![entry(1), entry(2)]]);
        // The second record failed, and the next is shorter. After it lies the rest of the failed
        // one: here even a whole record.
        bytes.truncate(ends[0]);
        bytes.extend(record(1, seen(1), &[entry(3)]));
        bytes.extend(record(1, seen(1), &[entry(4)]));
        assert_eq!(read(&bytes).unwrap().entries, vec![entry(0), entry(3)]);
    }
}
