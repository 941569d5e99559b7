//! Flight records of VMs that another supervisor has started, requested from their processes.
//!
//! A process may be compromised, or not answer. Its file is checked and read like any record, so
//! that at worst that VM's record is lost. All processes are asked at once, and waited for
//! together.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::processes::ProcessId;
use clade_api::flight;
use clade_api::flight::FlightEvent;
use clade_worker::image::AskedRecord;

/// Processes asked at once.
const BATCH: usize = 64;
/// Time limit for the request to one.
const ASK_TIMEOUT: Duration = Duration::from_millis(100);
/// Time limit for the answers of a batch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The record of a VM, from its process.
#[derive(Debug)]
struct ProcessRecord {
    /// The VM's process: a later VM may have the name.
    process: ProcessId,
    file: OwnedFd,
}

/// The records, by the VMs' names.
#[derive(Debug, Default)]
pub(super) struct Records(Mutex<BTreeMap<String, ProcessRecord>>);

impl Records {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, ProcessRecord>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the processes of VMs in `dir` for their records.
    pub(super) fn fetch(&self, dir: &Path, vms: &[(String, ProcessId)]) {
        self.fetch_within(dir, vms, ANSWER_TIMEOUT);
    }

    fn fetch_within(&self, dir: &Path, vms: &[(String, ProcessId)], limit: Duration) {
        for batch in vms.chunks(BATCH) {
            let asked: Vec<_> = batch.iter().map(|(name, _)| AskedRecord::begin(dir, name, ASK_TIMEOUT)).collect();
            let deadline = Instant::now() + limit;
            for ((name, process), asked) in batch.iter().zip(asked) {
                let given = asked.map_err(|error| clade_vmm::error_chain(&error));
                match given.and_then(|asked| asked.file(deadline).map_err(|error| error.to_string())) {
                    Ok(file) => _ = self.all().insert(name.clone(), ProcessRecord { process: *process, file }),
                    // The process has most likely ended.
                    Err(error) => tracing::debug!(error, name, "a VM's flight record is not to be had"),
                }
            }
        }
    }

    /// Takes the record of the VM called `name`, which is `process` and has ended.
    pub(super) fn take(&self, name: &str, process: Option<ProcessId>) -> Vec<FlightEvent> {
        let record = self.all().remove(name).filter(|record| Some(record.process) == process);
        record.map(|record| flight::read(&record.file)).unwrap_or_default()
    }

    /// Drops the records of VMs that are not `there`.
    pub(super) fn retain(&self, there: &BTreeSet<String>) {
        self.all().retain(|name, _| there.contains(name));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::thread;

    use clade_host_io::seqpacket;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with};

    use super::*;
    use clade_api::image_path;

    /// Binds a socket like that of a VM called `name`.
    fn listener(dir: &Path, name: &str, backlog: i32) -> OwnedFd {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(image_path(dir, name)).unwrap()).unwrap();
        listen(&socket, backlog).unwrap();
        socket
    }

    #[test]
    fn what_processes_give_is_kept_if_it_is_a_record_and_the_others_are_given_up() {
        let mut limit = Duration::from_millis(300);
        // A busy machine may need more time for the valid record.
        while !gives_the_good_record(limit) {
            limit *= 2;
        }
    }

    /// Returns whether the one valid record came within `limit`. No other is kept.
    fn gives_the_good_record(limit: Duration) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let this = ProcessId::of(std::process::id()).unwrap();
        // The answers of the processes. None: no answer.
        let gives: [(&str, Option<OwnedFd>); 4] = [
            ("good", Some(flight::make().unwrap())),
            ("silent", None),
            ("pipe", Some(std::io::pipe().unwrap().0.into())),
            ("file", Some(tempfile::tempfile().unwrap().into())),
        ];
        let vms: Vec<_> = gives.iter().map(|(name, _)| ((*name).to_owned(), this)).collect();
        let vms = [&vms[..], &[("gone".to_owned(), this), ("full".to_owned(), this)]].concat();
        let full = listener(dir.path(), "full", 0);
        let waits = AskedRecord::begin(dir.path(), "full", ASK_TIMEOUT).unwrap();
        let answer = |name: &'static str, file: Option<OwnedFd>| {
            let socket = listener(dir.path(), name, 8);
            thread::spawn(move || {
                let client = accept_with(&socket, SocketFlags::CLOEXEC).unwrap();
                assert_eq!(seqpacket::receive(&client, 1).unwrap().bytes, [3]);
                match file {
                    // The client may have given up.
                    Some(file) => drop(seqpacket::send(&client, &[3], &[file.as_fd()])),
                    // Until the client has gone.
                    None => assert!(seqpacket::receive(&client, 1).is_err()),
                }
            })
        };
        let processes: Vec<_> = gives.into_iter().map(|(name, file)| answer(name, file)).collect();
        let records = Records::default();
        records.fetch_within(dir.path(), &vms, limit);
        if records.all().is_empty() {
            return false;
        }
        processes.into_iter().for_each(|process| process.join().unwrap());
        drop((full, waits));
        assert_eq!(records.all().keys().collect::<Vec<_>>(), ["good"]);
        // A record goes with its VM, even if another has the name.
        records.retain(&BTreeSet::from(["good".to_owned()]));
        assert_eq!(records.take("good", None), []);
        assert!(records.all().is_empty());
        true
    }

    #[test]
    fn the_record_of_a_process_is_no_other_processes() {
        let this = ProcessId::of(std::process::id()).unwrap();
        let parent = ProcessId::of(std::os::unix::process::parent_id()).unwrap();
        let records = Records::default();
        let noted = || {
            let file = std::fs::File::from(flight::make().unwrap());
            std::os::unix::fs::FileExt::write_all_at(&file, &[1; 1], 0).unwrap();
            records.all().insert("web".to_owned(), ProcessRecord { process: this, file: file.into() });
        };
        noted();
        assert_eq!(records.take("web", Some(this)).len(), 1);
        noted();
        assert_eq!(records.take("web", Some(parent)), []);
        noted();
        records.retain(&BTreeSet::new());
        assert_eq!(records.take("web", Some(this)), []);
    }
}
