//! Child processes: started, and reaped, by one thread.
//!
//! Only the agent's thread starts children, and only the task here, on the same thread, reaps them.
//! So a child's end is never seen before the child is known, and no two children share a number. As
//! PID 1 the agent also reaps orphans.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};

use clade_agent_proto::process::signal_name;
use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::lock::lock;
use crate::program::Program;
use crate::vfork::{self, ChildStack};

type Waiting = Arc<Mutex<HashMap<u32, oneshot::Sender<ExitStatus>>>>;

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

    /// Starts a child. The receiver gets its exit status.
    pub(crate) fn spawn(&self, program: &Program) -> io::Result<(u32, oneshot::Receiver<ExitStatus>)> {
        let pid = vfork::spawn(program, &mut lock(&self.stack))?.as_raw_nonzero().get().unsigned_abs();
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(pid, sender);
        Ok((pid, receiver))
    }
}

fn reap(waiting: &Waiting) {
    // Signals are merged: reaps every ended child.
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        if let Some(sender) = lock(waiting).remove(&pid) {
            // The receiver may have been dropped.
            let _ = sender.send(ExitStatus::from_raw(status.as_raw()));
        }
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
