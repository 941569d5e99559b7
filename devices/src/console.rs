//! The output of a VM's console: a backlog, waiters and live listeners.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of output that are kept.
const BACKLOG: usize = 256 << 10;
/// Bytes of the backlog that a new listener gets: a few screens, and at most one socket buffer.
const REPLAY: usize = 32 << 10;

#[derive(Default)]
struct Backlog {
    backlog: VecDeque<u8>,
    /// Total bytes written; the backlog has the last of them.
    total: u64,
    listeners: Vec<Box<dyn Write + Send>>,
}

/// The output side of one VM's console. Clones are handles to the same console.
#[derive(Clone, Default)]
pub struct Console(Arc<(Mutex<Backlog>, Condvar)>);

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Console({} bytes)", self.position())
    }
}

impl Console {
    fn log(&self) -> MutexGuard<'_, Backlog> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes written so far: a position for [`Console::since`].
    #[must_use]
    pub fn position(&self) -> u64 {
        self.log().total
    }

    /// The output since `position`, as far as the backlog has it.
    #[must_use]
    pub fn since(&self, position: u64) -> Vec<u8> {
        let log = self.log();
        let fresh = usize::try_from(log.total.saturating_sub(position)).unwrap_or(usize::MAX).min(log.backlog.len());
        log.backlog.iter().skip(log.backlog.len() - fresh).copied().collect()
    }

    /// Waits until `text` is written after `position`. Returns everything since `position`, and
    /// whether `text` was in it in time.
    #[must_use]
    pub fn wait_for(&self, position: u64, text: &str, patience: Duration) -> (String, bool) {
        let deadline = Instant::now() + patience;
        loop {
            // Read before the waiting lock is taken again: a different length below shows that
            // output arrived in between.
            let seen = self.position();
            let got = String::from_utf8_lossy(&self.since(position)).into_owned();
            let now = Instant::now();
            if got.contains(text) || now >= deadline {
                let found = got.contains(text);
                return (got, found);
            }
            let log = self.log();
            let wait = self.0.1.wait_timeout_while(log, deadline - now, |log| log.total == seen);
            drop(wait.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Sends `listener` the end of the backlog and then all output, until it returns an error. The
    /// listener must not block: a console never waits for it.
    pub fn listen(&self, mut listener: Box<dyn Write + Send>) {
        let mut log = self.log();
        let skip = log.backlog.len().saturating_sub(REPLAY);
        let replay: Vec<u8> = log.backlog.iter().skip(skip).copied().collect();
        if listener.write_all(&replay).is_ok() {
            log.listeners.push(listener);
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = self.log();
        log.backlog.extend(bytes);
        let over = log.backlog.len().saturating_sub(BACKLOG);
        log.backlog.drain(..over);
        log.total += bytes.len() as u64;
        log.listeners.retain_mut(|l| l.write_all(bytes).and_then(|()| l.flush()).is_ok());
        drop(log);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_text_from_another_thread() {
        let console = Console::default();
        let mut writer = console.clone();
        let thread = std::thread::spawn(move || {
            for part in ["boot", "ing", " login: "] {
                writer.write_all(part.as_bytes()).unwrap();
            }
        });
        let (text, found) = console.wait_for(0, "login:", Duration::from_secs(600));
        thread.join().unwrap();
        assert!(found, "{text}");
        assert!(!console.wait_for(0, "password", Duration::from_millis(1)).1);
        assert_eq!(console.since(console.position() - 7), b"login: ");
    }

    #[test]
    fn keeps_the_newest_and_counts_all() {
        let mut console = Console::default();
        console.write_all(&vec![b'a'; BACKLOG]).unwrap();
        console.write_all(b"end").unwrap();
        assert_eq!(console.position(), BACKLOG as u64 + 3);
        let kept = console.since(0);
        assert_eq!(kept.len(), BACKLOG);
        assert!(kept.ends_with(b"aend"));
    }

    #[test]
    fn a_listener_that_fails_is_let_go() {
        struct Once(bool);
        impl Write for Once {
            fn write(&mut self, b: &[u8]) -> io::Result<usize> {
                if std::mem::replace(&mut self.0, true) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(b.len()) }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut console = Console::default();
        console.listen(Box::new(Once(false)));
        console.write_all(b"x").unwrap();
        console.write_all(b"y").unwrap();
        assert!(console.log().listeners.is_empty());
    }
}
