//! A test that hangs must fail, and say where.

use std::io::Write;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Ends the process when it is still held after its time.
pub(crate) struct Deadline(Option<(Sender<()>, JoinHandle<()>)>);

impl Deadline {
    /// Starts the clock; `place` says what took so long.
    pub(crate) fn new(patience: Duration, place: impl Fn() -> String + Send + 'static) -> Self {
        let (done, finished) = mpsc::channel();
        let thread = thread::spawn(move || {
            if finished.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                // Past the test harness, which would take what it captured with it.
                let _ = writeln!(std::io::stderr(), "not done after {patience:?}: {}", place());
                std::process::abort();
            }
        });
        Self(Some((done, thread)))
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.0.take() {
            drop(done);
            let _ = thread.join();
        }
    }
}
