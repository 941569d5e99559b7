//! Child processes: started, and reaped, by one thread.
//!
//! Only the agent's thread starts children, and only the task here, on the same thread, reaps. So a child's end is never
//! seen before the child is known, and a number is never that of two of them. As PID 1 the agent also reaps what others
//! have left.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex};

use clade_agent_proto::process::signal_name;
use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::agent::lock;

type Waiting = Arc<Mutex<HashMap<u32, oneshot::Sender<ExitStatus>>>>;

/// Starts and reaps child processes.
#[derive(Debug)]
pub(crate) struct Children {
    waiting: Waiting,
}

impl Children {
    /// Reaps from now on.
    pub(crate) fn start() -> io::Result<Self> {
        let waiting = Waiting::default();
        let mut ends = signal(SignalKind::child())?;
        let reaped = Arc::clone(&waiting);
        tokio::spawn(async move {
            while ends.recv().await.is_some() {
                reap(&reaped);
            }
        });
        Ok(Self { waiting })
    }

    /// Starts a child. The receiver gets its end.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(u32, oneshot::Receiver<ExitStatus>)> {
        let pid = command.spawn()?.id();
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(pid, sender);
        Ok((pid, receiver))
    }
}

fn reap(waiting: &Waiting) {
    // Signals come together: all that have ended, until there is none.
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        if let Some(sender) = lock(waiting).remove(&pid) {
            // Its process may be of no interest any more.
            let _ = sender.send(ExitStatus::from_raw(status.as_raw()));
        }
    }
}

/// An end in words, as envd says it.
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
