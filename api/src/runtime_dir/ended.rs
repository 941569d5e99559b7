//! Records of VMs that ended by themselves: the reason, and the last console output.
//!
//! Each record is a file `NAME.ended` in the runtime directory, until the name is used again. The
//! newest [`MAX_RECORDS`] are kept.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{END, RuntimeDir, check_name};
use crate::DaemonError;
use crate::flight::FlightEvent;
use clade_vmm::vm::StopReason;

/// Records kept.
const MAX_RECORDS: usize = 100;
/// Bytes of console output kept in each.
pub const MAX_OUTPUT: u64 = 32 << 10;
/// Most bytes of the reason given by an untrusted process.
const MAX_REASON: usize = 1 << 10;
const ENDING: &str = ".ended";

/// Keeps the beginning of a text.
fn shorten(text: &mut String, most: usize) {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
}

/// A process that the zygote has reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerExit {
    /// Its pid.
    pub pid: u32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its exit code, if it ended by itself.
    pub code: Option<i32>,
}

/// A VM that ended by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EndedVm {
    /// Its name.
    pub name: String,
    /// The reason why it ended.
    pub stopped: StopReason,
    /// The reason in words.
    pub reason: String,
    /// The name of its parent, if it had one.
    pub parent: Option<String>,
    /// Forks between it and the VM that was booted.
    pub generation: u32,
    /// Its age at the end, in seconds.
    pub age_s: f64,
    /// When it ended, in seconds since 1970.
    pub ended_at: u64,
    /// The pid of its process.
    pub pid: u32,
    /// The last output on its console.
    pub console: String,
    /// The last events of its process's flight record, the oldest first.
    #[serde(default)]
    pub flight: Vec<FlightEvent>,
}

/// The end of a VM's process, as others know it.
#[derive(Clone, Debug)]
pub struct KnownEnd {
    /// The end of the process.
    pub exit: WorkerExit,
    /// The VM that this one was forked from.
    pub parent: Option<String>,
    /// The last events of its flight record, the oldest first.
    pub flight: Vec<FlightEvent>,
}

/// Records the end of a VM whose process may not write into the directory: as reported by the
/// process itself, otherwise from its `exit`. Records nothing if it was stopped on request.
pub fn settle(dir: &RuntimeDir, name: &str, end: KnownEnd, was_orderly: bool) {
    let said = dir.read(&format!("{name}.{END}")).ok().flatten();
    let said = said.and_then(|bytes| serde_json::from_slice::<EndedVm>(&bytes).ok());
    match said.filter(|said| said.name == name) {
        // A compromised process may have given another pid.
        Some(mut said) => {
            said.pid = end.exit.pid;
            said.flight = end.flight;
            shorten(&mut said.reason, MAX_REASON);
            shorten(&mut said.console, MAX_OUTPUT as usize);
            write(dir, &said);
        }
        None if was_orderly => {}
        None => record_lost(dir, name, end),
    }
}

/// Records the end of a VM whose process has ended without a report.
fn record_lost(dir: &RuntimeDir, name: &str, end: KnownEnd) {
    let exit = end.exit;
    // The process may have reported the reason itself, and waited for others afterwards.
    let said = dir.read(&format!("{name}{ENDING}")).ok().flatten();
    if said.and_then(|bytes| serde_json::from_slice::<EndedVm>(&bytes).ok()).is_some_and(|said| said.pid == exit.pid) {
        return;
    }
    record_end(dir, name, StopReason::Process { signal: exit.signal, code: exit.code }, end);
}

/// Records the end of a VM for a known reason, without a report of its process.
pub fn record_end(dir: &RuntimeDir, name: &str, stopped: StopReason, end: KnownEnd) {
    let KnownEnd { exit, parent, flight } = end;
    let ended = EndedVm {
        name: name.to_owned(),
        reason: stopped.to_string(),
        stopped,
        parent,
        generation: 0,
        age_s: 0.0,
        ended_at: unix_seconds(),
        pid: exit.pid,
        console: String::new(),
        flight,
    };
    write(dir, &ended);
}

/// Returns the time, in seconds since 1970.
#[must_use]
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn write(dir: &RuntimeDir, ended: &EndedVm) {
    let written = serde_json::to_vec(ended)
        .map_err(std::io::Error::other)
        .and_then(|bytes| dir.write(&format!("{}{ENDING}", ended.name), &bytes));
    if let Err(error) = written.and_then(|()| prune(dir)) {
        tracing::warn!(%error, name = ended.name, "the end of a VM is not on record");
    }
}

fn prune(dir: &RuntimeDir) -> std::io::Result<()> {
    let mut records: Vec<(i64, String)> =
        names(dir)?.into_iter().filter_map(|file| Some((dir.written_at(&file)?, file))).collect();
    records.sort_unstable();
    let over = records.len().saturating_sub(MAX_RECORDS);
    records[..over].iter().for_each(|(_, file)| dir.forget(file));
    Ok(())
}

fn names(dir: &RuntimeDir) -> std::io::Result<Vec<String>> {
    let is_record = |file: &String| file.strip_suffix(ENDING).is_some_and(|name| check_name(name).is_ok());
    Ok(dir.entries()?.into_iter().filter_map(|file| file.into_string().ok()).filter(is_record).collect())
}

/// Returns the recorded reason why the last VM of the name ended.
pub fn recorded_reason(dir: &RuntimeDir, name: &str) -> Option<String> {
    let bytes = dir.read(&format!("{name}{ENDING}")).ok().flatten()?;
    Some(serde_json::from_slice::<EndedVm>(&bytes).ok()?.reason)
}

/// Removes the record of an earlier VM of the name.
pub fn forget(dir: &RuntimeDir, name: &str) {
    dir.forget(&format!("{name}{ENDING}"));
}

/// Returns the recorded VMs of the runtime directory at `path`, in no order. Empty if the directory
/// is missing.
///
/// # Errors
/// When the directory cannot be read. A record that cannot be read is left out, with a warning.
pub fn ended_vms(path: &Path) -> Result<Vec<EndedVm>, DaemonError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let dir = RuntimeDir::open(path)?;
    let failed = |source| DaemonError::Runtime { path: path.to_owned(), source };
    let read = |file: String| {
        let bytes = dir.read(&file).and_then(|bytes| match bytes {
            Some(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            None => Ok(None),
        });
        bytes.unwrap_or_else(|error| {
            tracing::warn!(%error, file, "a record that cannot be read");
            None
        })
    };
    Ok(names(&dir).map_err(failed)?.into_iter().filter_map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_records_are_kept_and_damaged_ones_are_left_out() {
        let path = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(path.path()).unwrap();
        let ended = EndedVm {
            name: "x".into(),
            stopped: StopReason::Reset,
            reason: String::new(),
            parent: None,
            generation: 1,
            age_s: 1.5,
            ended_at: 7,
            pid: 1,
            console: "last words".into(),
            flight: Vec::new(),
        };
        for n in 0..MAX_RECORDS + 3 {
            let file = format!("vm-{n}{ENDING}");
            dir.write(&file, &serde_json::to_vec(&ended).unwrap()).unwrap();
            // One second apart: the sort compares seconds.
            let at = rustix::fs::Timespec { tv_sec: n as i64 + 1, tv_nsec: 0 };
            let times = rustix::fs::Timestamps { last_access: at, last_modification: at };
            let fd = std::fs::File::open(path.path().join(&file)).unwrap();
            rustix::fs::futimens(&fd, &times).unwrap();
        }
        prune(&dir).unwrap();
        let left = ended_vms(path.path()).unwrap();
        assert_eq!(left.len(), MAX_RECORDS);
        assert!(!path.path().join("vm-2.ended").exists() && path.path().join("vm-3.ended").exists());
        assert_eq!(left[0], ended);
        dir.write("vm-3.ended", b"{").unwrap();
        assert_eq!(ended_vms(path.path()).unwrap().len(), MAX_RECORDS - 1);
        assert_eq!(ended_vms(&path.path().join("none")).unwrap(), []);
    }

    #[test]
    fn what_a_worker_says_of_its_end_is_shortened_and_has_the_number_of_its_process() {
        let path = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(path.path()).unwrap();
        let said = EndedVm {
            name: "web".into(),
            stopped: StopReason::Reset,
            // Two bytes a character, so that the limit may be in the middle of one.
            reason: format!("x{}", "ü".repeat(MAX_REASON)),
            parent: None,
            generation: 1,
            age_s: 1.5,
            ended_at: 7,
            pid: 1,
            console: "y".repeat(2 * MAX_OUTPUT as usize),
            flight: vec![FlightEvent { at: 1.0, event: "what it says itself".into() }],
        };
        dir.write(&format!("web.{END}"), &serde_json::to_vec(&said).unwrap()).unwrap();
        let seen = vec![FlightEvent { at: 2.0, event: "paused".into() }];
        let end = |pid, signal, code| KnownEnd {
            exit: WorkerExit { pid, signal, code },
            parent: Some("base".to_owned()),
            flight: seen.clone(),
        };
        settle(&dir, "web", end(77, None, Some(0)), true);
        let record = ended_vms(path.path()).unwrap().remove(0);
        assert_eq!((record.reason.len(), record.console.len(), record.pid), (MAX_REASON - 1, MAX_OUTPUT as usize, 77));
        assert!(said.reason.starts_with(&record.reason));
        assert_eq!(record.flight, seen, "not what the process wrote into its record");
        // A record that names another VM is ignored.
        dir.write(&format!("other.{END}"), &serde_json::to_vec(&said).unwrap()).unwrap();
        settle(&dir, "other", end(78, Some(9), None), false);
        assert!(recorded_reason(&dir, "other").unwrap().contains("signal 9"));
        let other = ended_vms(path.path()).unwrap().into_iter().find(|ended| ended.name == "other").unwrap();
        assert_eq!(other.parent.as_deref(), Some("base"));
    }
}
