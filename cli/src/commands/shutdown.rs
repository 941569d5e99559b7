//! Signals that end a process with VMs properly: no files or VMs stay.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::Signal;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::commands::terminal;

/// Signals that end the process, unless they were ignored when it started (`nohup`, a shell's
/// background).
const SIGNALS: [Signal; 3] = [Signal::TERM, Signal::INT, Signal::HUP];

/// In place of a signal's number: any signal ends the process at once.
const AT_ONCE: i32 = -1;

/// Whether the process must end, and by which signal.
#[derive(Clone, Debug)]
pub(super) struct ShutdownSignal(Arc<AtomicI32>, watch::Receiver<bool>);

impl ShutdownSignal {
    /// Starts to listen. The first signal is only recorded; a second one ends the process at once.
    pub(super) fn listen(runtime: &Handle) -> io::Result<Self> {
        let signal = Self::prepare(runtime)?;
        signal.record();
        Ok(signal)
    }

    /// Starts to listen. Each signal ends the process at once, until [`Self::record`].
    pub(super) fn prepare(runtime: &Handle) -> io::Result<Self> {
        let ignored = ignored()?;
        let (first, (came, coming)) = (Arc::new(AtomicI32::new(AT_ONCE)), watch::channel(false));
        let _entered = runtime.enter();
        for number in SIGNALS.map(Signal::as_raw).into_iter().filter(|number| ignored >> (number - 1) & 1 == 0) {
            let mut arrivals = signal(SignalKind::from_raw(number))?;
            let (first, came) = (Arc::clone(&first), came.clone());
            runtime.spawn(async move {
                while arrivals.recv().await.is_some() {
                    // Relaxed: the word publishes no other data. Its consequences happen under
                    // locks.
                    if first.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                        terminal::restore();
                        std::process::exit(128 + number);
                    }
                    // Without a receiver no task waits.
                    let _ = came.send(true);
                }
            });
        }
        Ok(Self(first, coming))
    }

    /// Has the next signal only recorded.
    pub(super) fn record(&self) {
        // Relaxed, and no failure: as where a signal is recorded. One that has come before ends the process.
        let _ = self.0.compare_exchange(AT_ONCE, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Returns once a signal has come.
    pub(super) async fn wait(&self) {
        // Without a sender there is no signal that could come.
        if self.1.clone().wait_for(|has_come| *has_come).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns the first signal, if one has come.
    pub(super) fn signal(&self) -> Option<i32> {
        Some(self.0.load(Ordering::Relaxed)).filter(|number| *number > 0)
    }
}

/// Ends this process by the first signal, after `clean_up`.
///
/// # Errors
/// When the signals cannot be listened to.
pub fn exit_on_signal(runtime: &Handle, clean_up: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let shutdown = ShutdownSignal::listen(runtime)?;
    runtime.spawn(async move {
        shutdown.wait().await;
        clean_up();
        terminal::restore();
        std::process::exit(128 + shutdown.signal().unwrap_or_default());
    });
    Ok(())
}

/// Returns a bit mask of the signals that the process ignores.
fn ignored() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/status has no SigIgn"))
}
