//! The threads of a worker.

use std::fs;
use std::path::PathBuf;

use super::{VCPU, WORKER};
use crate::processes::ProcessId;
use clade_worker::image::IMAGE_THREAD;

/// The most threads of a worker that are raised: a worker with more is left alone.
const MAX_THREADS: usize = 256;

/// The prefix of the names of vCPU threads.
pub(super) const VCPU_NAME: &str = "clade-vcpu";

/// What a worker is raised for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// It takes an image.
    Image,
    /// It starts a child.
    Start,
}

/// The kind of a worker's thread, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Vcpu,
    /// It answers image requests.
    Image,
    Other,
}

impl Kind {
    fn of(name: &[u8]) -> Self {
        match name {
            name if name.starts_with(VCPU_NAME.as_bytes()) => Self::Vcpu,
            name if name.trim_ascii_end() == IMAGE_THREAD.as_bytes() => Self::Image,
            _ => Self::Other,
        }
    }

    /// Returns the priority that a thread of this kind is raised to.
    pub(super) fn priority(self) -> u32 {
        if self == Self::Vcpu { VCPU } else { WORKER }
    }
}

/// A thread of a worker.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) tid: u32,
    pub(super) kind: Kind,
}

impl Thread {
    /// Returns whether the worker cannot do `task` without a thread of this kind.
    pub(super) fn does(&self, task: Task) -> bool {
        self.kind == if task == Task::Image { Kind::Image } else { Kind::Vcpu }
    }
}

/// Returns the directory of the threads of `process`.
fn threads_dir(process: ProcessId) -> PathBuf {
    PathBuf::from(format!("/proc/{}/task", process.pid()))
}

/// Returns the ids of the threads of `process`. None if it has ended.
pub(super) fn thread_ids(process: ProcessId) -> Option<impl Iterator<Item = u32>> {
    let entries = fs::read_dir(threads_dir(process)).ok()?;
    Some(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// Returns the threads of `process`. None if it has ended, or has too many.
pub(super) fn threads_of(process: ProcessId) -> Option<Vec<Thread>> {
    let dir = threads_dir(process);
    let ids: Vec<u32> = thread_ids(process)?.take(MAX_THREADS + 1).collect();
    if ids.len() > MAX_THREADS {
        return None;
    }
    let named = |tid: u32| {
        // A thread may have ended since.
        let name = fs::read(dir.join(format!("{tid}/comm"))).ok()?;
        Some(Thread { tid, kind: Kind::of(&name) })
    };
    Some(ids.into_iter().filter_map(named).collect())
}

/// Returns whether `process` has the thread `tid`.
pub(super) fn exists(process: ProcessId, tid: u32) -> bool {
    fs::exists(threads_dir(process).join(tid.to_string())).unwrap_or(false)
}
