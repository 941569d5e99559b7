//! Child processes: started, and reaped, by one thread.
//!
//! Only the agent's thread starts children, and only the task here, on the same thread, reaps them.
//! So a child's end is never seen before the child is known, and no two children share a number. As
//! PID 1 the agent also reaps orphans.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use clade_agent_proto::process::signal_name;
use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::lock::lock;
use crate::program::Program;
use crate::vfork::{self, ChildStack};

/// A child that has been started.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: u32,
    /// Gets its exit status.
    pub(crate) end: oneshot::Receiver<ExitStatus>,
    /// Set once its number may be another's, even if nobody has received its status yet.
    pub(crate) is_reaped: Arc<AtomicBool>,
}

#[derive(Debug)]
struct WaitedFor {
    end: oneshot::Sender<ExitStatus>,
    is_reaped: Arc<AtomicBool>,
}

type Waiting = Arc<Mutex<HashMap<u32, WaitedFor>>>;

/// Starts and reaps child processes.
#[derive(Debug)]
pub(crate) struct Children {
    waiting: Waiting,
    stack: Mutex<ChildStack>,
}

impl Children {
    /// Starts to reap.
    pub(crate) fn start() -> io::Result<Self> {
        let waiting = Waiting::default();
        let mut ends = signal(SignalKind::child())?;
        let reaped = Arc::clone(&waiting);
        tokio::spawn(async move {
            while ends.recv().await.is_some() {
                reap(&reaped);
            }
        });
        Ok(Self { waiting, stack: Mutex::new(ChildStack::new()?) })
    }

    /// Starts a child.
    pub(crate) fn spawn(&self, program: &Program) -> io::Result<Child> {
        let pid = vfork::spawn(program, &mut lock(&self.stack))?.as_raw_nonzero().get().unsigned_abs();
        let (sender, end) = oneshot::channel();
        let is_reaped = Arc::new(AtomicBool::new(false));
        lock(&self.waiting).insert(pid, WaitedFor { end: sender, is_reaped: Arc::clone(&is_reaped) });
        Ok(Child { pid, end, is_reaped })
    }
}

fn reap(waiting: &Waiting) {
    // Signals are merged: reaps every ended child.
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        note_end(waiting, pid.as_raw_nonzero().get().unsigned_abs(), ExitStatus::from_raw(status.as_raw()));
    }
}

fn note_end(waiting: &Waiting, pid: u32, status: ExitStatus) {
    if let Some(child) = lock(waiting).remove(&pid) {
        // Relaxed: all of the agent's tasks run on one thread.
        child.is_reaped.store(true, Ordering::Relaxed);
        // The receiver may have been dropped.
        let _ = child.end.send(status);
    }
}

/// An exit status in words, as in envd.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => {
            let core = if status.core_dumped() { " (core dumped)" } else { "" };
            format!("signal: {}{core}", signal_name(signal))
        }
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its number may be another's from then on, long before a slow follower of its output has the rest.
    #[test]
    fn a_child_is_known_to_be_reaped_before_anybody_receives_its_status() {
        let waiting = Waiting::default();
        let (sender, mut end) = oneshot::channel();
        let is_reaped = Arc::new(AtomicBool::new(false));
        lock(&waiting).insert(7, WaitedFor { end: sender, is_reaped: Arc::clone(&is_reaped) });
        note_end(&waiting, 8, ExitStatus::from_raw(0));
        assert!(!is_reaped.load(Ordering::Relaxed) && end.try_recv().is_err());
        note_end(&waiting, 7, ExitStatus::from_raw(0x100));
        assert!(is_reaped.load(Ordering::Relaxed));
        assert_eq!(end.try_recv().unwrap().code(), Some(1));
    }
}
