//! The flight record of a VM: the last events of the VM, kept even if its process is killed.
//!
//! The supervisor makes a file in memory of fixed size, and hands it to the VM's process with the
//! request. The process notes events in it, each in a slot, the oldest replaced first. When the
//! process has ended, the supervisor reads the file, which may hold anything: it takes two numbers
//! and a text of bounded length from a slot. A supervisor that has not started the VM asks the
//! process for the file, and checks it first (`checked`).
//!
//! | bytes of a slot | content |
//! |---|---|
//! | 0-7 | the event's number, from 1 on; 0: an empty slot |
//! | 8-15 | time, in microseconds since 1970 |
//! | 16-17 | length of the text |
//! | 18-255 | the text |

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Slots of a record.
const SLOTS: u64 = 64;
/// Bytes of a slot. No slot crosses a page, so a process that is killed leaves whole slots.
const SLOT: usize = 256;
const HEAD: usize = 18;
/// Most bytes of a text.
const MAX_TEXT: usize = SLOT - HEAD;
/// Seals against a change of size.
const SEALED: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK);

/// An event in the life of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FlightEvent {
    /// Time, in seconds since 1970.
    pub at: f64,
    /// Description of the event.
    pub event: String,
}

/// The recorder of this process, which has one VM.
static RECORDER: OnceLock<Recorder> = OnceLock::new();

#[derive(Debug)]
struct Recorder {
    file: File,
    /// Number of the next event.
    number: Mutex<u64>,
}

/// Makes the file for a VM's record, sealed against a change of size.
///
/// # Errors
/// When there is no memory or descriptor for it.
pub fn make() -> io::Result<OwnedFd> {
    let file = memfd_create("clade-flight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, SLOTS * SLOT as u64)?;
    fcntl_add_seals(&file, SEALED | SealFlags::SEAL)?;
    Ok(file)
}

/// Checks the file that a VM's process sends as its record: reading it then takes no more time and
/// memory than reading a record.
///
/// # Errors
/// When it is not a file in memory, or not sealed at a record's size.
pub fn checked(file: OwnedFd) -> io::Result<OwnedFd> {
    let refused = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    // First: only files in memory have seals. A read of another file could block this process.
    let seals = fcntl_get_seals(&file).map_err(|errno| refused(format!("no file in memory: {errno}")))?;
    let (bytes, wanted) = (fstat(&file)?.st_size, (SLOTS * SLOT as u64) as i64);
    if !seals.contains(SEALED) || bytes != wanted {
        return Err(refused(format!("a file of {bytes} bytes with {seals:?}, not of {wanted} with {SEALED:?}")));
    }
    Ok(file)
}

/// Has this process note events in `file` from now on. Later calls change nothing.
pub fn install(file: OwnedFd) {
    if RECORDER.get().is_some() {
        return;
    }
    let file = File::from(file);
    // Takes its first page now: the first event is noted on the way to the guest's first instruction. The slot stays
    // empty.
    let _ = file.write_all_at(&[0], 0);
    let _ = RECORDER.set(Recorder { file, number: Mutex::new(1) });
}

/// Notes an event of this process's VM. Does nothing in a process without a record.
pub fn note(event: &str) {
    if let Some(recorder) = RECORDER.get() {
        recorder.note(event);
    }
}

/// Returns the events noted in this process.
pub fn noted() -> Vec<FlightEvent> {
    RECORDER.get().map(|recorder| read(&recorder.file)).unwrap_or_default()
}

/// An event of this moment that is shown but not noted.
pub fn now(event: String) -> FlightEvent {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    FlightEvent { at: since.as_secs_f64(), event }
}

/// Returns the file of this process's record, for another process.
///
/// # Errors
/// When there is no record, or no descriptor is left.
pub fn descriptor() -> io::Result<OwnedFd> {
    let recorder = RECORDER.get().ok_or(io::ErrorKind::NotFound)?;
    recorder.file.as_fd().try_clone_to_owned()
}

impl Recorder {
    fn note(&self, event: &str) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        let end = (0..=MAX_TEXT.min(event.len())).rev().find(|end| event.is_char_boundary(*end)).unwrap_or(0);
        let mut number = self.number.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = [0; SLOT];
        slot[..8].copy_from_slice(&number.to_le_bytes());
        slot[8..16].copy_from_slice(&at.to_le_bytes());
        slot[16..HEAD].copy_from_slice(&(end as u16).to_le_bytes());
        slot[HEAD..HEAD + end].copy_from_slice(&event.as_bytes()[..end]);
        // Only a lack of memory makes it fail, and then there is no place to note that.
        let _ = self.file.write_all_at(&slot, *number % SLOTS * SLOT as u64);
        *number += 1;
    }
}

/// Returns the printable text of a slot: no control characters, at most as long as a slot's.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// Reads the events in a process's record, the oldest first. The file may hold anything.
pub fn read(file: impl AsFd) -> Vec<FlightEvent> {
    let mut bytes = vec![0; SLOTS as usize * SLOT];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(&file, &mut bytes[done..], done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "a flight record cannot be read");
                break;
            }
        }
    }
    let (slots, _) = bytes.as_chunks::<SLOT>();
    let word = |slot: &[u8; SLOT], at: usize| slot[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let mut events: Vec<(u64, FlightEvent)> = Vec::new();
    for slot in slots.iter().filter(|slot| word(slot, 0) != 0) {
        let length = usize::from(u16::from_le_bytes([slot[16], slot[17]])).min(MAX_TEXT);
        let at = word(slot, 8) as f64 / 1e6;
        events.push((word(slot, 0), FlightEvent { at, event: shown(&slot[HEAD..HEAD + length]) }));
    }
    events.sort_by_key(|(number, _)| *number);
    events.into_iter().map(|(_, event)| event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder() -> Recorder {
        Recorder { file: make().unwrap().into(), number: Mutex::new(1) }
    }

    #[test]
    fn the_last_events_are_kept_in_order() {
        let recorder = recorder();
        assert_eq!(read(&recorder.file), []);
        for n in 0..3 * SLOTS / 2 {
            recorder.note(&format!("event {n}"));
        }
        let events = read(&recorder.file);
        let texts: Vec<&str> = events.iter().map(|event| event.event.as_str()).collect();
        let expected: Vec<String> = (SLOTS / 2..3 * SLOTS / 2).map(|n| format!("event {n}")).collect();
        assert_eq!(texts, expected);
        assert!(events.windows(2).all(|two| two[0].at <= two[1].at) && events[0].at > 1e9);
    }

    #[test]
    fn a_text_is_cut_between_letters_and_cannot_move_a_cursor() {
        let recorder = recorder();
        // Two bytes a letter, so that the limit is in the middle of one.
        recorder.note(&format!("x{}", "ü".repeat(MAX_TEXT)));
        recorder.note("\x1b[2Jred\r\nover");
        let events = read(&recorder.file);
        assert_eq!(events[0].event, format!("x{}", "ü".repeat((MAX_TEXT - 1) / 2)));
        assert_eq!(events[1].event, " [2Jred  over");
    }

    #[test]
    fn garbage_is_read_as_numbers_and_texts_of_bounded_length_and_costs_no_more() {
        for byte in [0x00, 0x1b, 0x80, 0xff] {
            let file = File::from(make().unwrap());
            file.write_all_at(&vec![byte; SLOTS as usize * SLOT], 0).unwrap();
            assert!(file.write_all_at(&[1], SLOTS * SLOT as u64).is_err(), "it is as long as it was made");
            assert!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err());
            let events = read(&file);
            assert_eq!(events.len() as u64, if byte == 0 { 0 } else { SLOTS });
            for event in events {
                // A byte that is not UTF-8 is shown as a replacement character of three bytes.
                assert!(event.event.len() <= 3 * MAX_TEXT && !event.event.contains(char::is_control));
                assert!(event.at.is_finite());
            }
        }
        // A file of another length.
        assert_eq!(read(tempfile::tempfile().unwrap()), []);
    }

    #[test]
    fn a_file_that_is_said_to_be_a_record_is_one_or_refused() {
        let sealed = |bytes: u64, seals| {
            let file = memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            ftruncate(&file, bytes).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            file
        };
        let bytes = SLOTS * SLOT as u64;
        checked(make().unwrap()).unwrap();
        checked(sealed(bytes, SEALED | SealFlags::WRITE)).unwrap();
        for refused in [
            sealed(bytes, SealFlags::GROW),
            sealed(bytes, SealFlags::SHRINK),
            sealed(bytes + 1, SEALED),
            sealed(1 << 40, SEALED),
            tempfile::tempfile().unwrap().into(),
            io::pipe().unwrap().0.into(),
            File::open("/dev/zero").unwrap().into(),
        ] {
            let error = checked(refused).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
    }
}
