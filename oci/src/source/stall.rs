//! Stalled bodies. A read that waits for a server without end would hold the store's lock.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// Bytes of a part, and number of parts read ahead.
const PART: usize = 64 << 10;
const AHEAD: usize = 4;

/// Reads a body on a thread of its own, which ends with the body or with its connection.
#[derive(Debug)]
pub(super) struct Stalling {
    parts: Receiver<io::Result<Vec<u8>>>,
    part: Vec<u8>,
    at: usize,
    limit: Duration,
    has_ended: bool,
}

impl Stalling {
    /// A body with a limit on stalls: after `limit` without data, a read fails with
    /// [`io::ErrorKind::TimedOut`].
    ///
    /// # Errors
    /// When there is no thread.
    pub(super) fn new(mut body: impl Read + Send + 'static, limit: Duration) -> io::Result<Self> {
        let (send, parts) = sync_channel(AHEAD);
        let read = move || {
            loop {
                let mut part = vec![0; PART];
                let read = body.read(&mut part).map(|length| {
                    part.truncate(length);
                    part
                });
                let is_last = read.as_ref().map_or(true, Vec::is_empty);
                // The reader may have been dropped.
                if send.send(read).is_err() || is_last {
                    return;
                }
            }
        };
        thread::Builder::new().name("blob".to_owned()).spawn(read)?;
        Ok(Self { parts, part: Vec::new(), at: 0, limit, has_ended: false })
    }
}

impl Read for Stalling {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.part.len() && !self.has_ended {
            let part = self.parts.recv_timeout(self.limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => {
                    let why = format!("the server has sent nothing for {} s", self.limit.as_secs_f64());
                    io::Error::new(io::ErrorKind::TimedOut, why)
                }
                // The thread ends after an error.
                RecvTimeoutError::Disconnected => io::ErrorKind::UnexpectedEof.into(),
            })??;
            self.has_ended = part.is_empty();
            (self.part, self.at) = (part, 0);
        }
        let length = buffer.len().min(self.part.len() - self.at);
        buffer[..length].copy_from_slice(&self.part[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_body_comes_as_it_is_and_a_halt_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut body = Stalling::new(ours, Duration::from_millis(50)).unwrap();
        let bytes: Vec<u8> = (0..3 * PART).map(|at| at as u8).collect();
        let sent = bytes.clone();
        let sends = thread::spawn(move || {
            theirs.write_all(&sent).unwrap();
            theirs
        });
        let mut got = vec![0; bytes.len()];
        // The limit applies to a stalled server, and not to this test.
        let mut at = 0;
        while at < got.len() {
            match body.read(&mut got[at..]) {
                Ok(length) => at += length,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
            }
        }
        assert_eq!(got, bytes);
        let theirs = sends.join().unwrap();
        assert_eq!(body.read(&mut got).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        let ended = loop {
            match body.read(&mut got) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                other => break other.unwrap(),
            }
        };
        assert_eq!(ended, 0);
        assert_eq!(body.read(&mut got).unwrap(), 0);
    }
}
