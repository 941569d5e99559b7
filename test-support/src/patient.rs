//! A stream that is read with patience.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::Patience;

/// Time limit of one read of the socket.
const READ_TIME: Duration = Duration::from_millis(50);

/// A socket with reads that wait for bytes until patience ends. Each byte renews the patience.
#[derive(Debug)]
pub struct PatientStream<S>(S);

impl From<UnixStream> for PatientStream<UnixStream> {
    fn from(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(READ_TIME)).unwrap_or_else(|error| panic!("a socket: {error}"));
        Self(stream)
    }
}

impl From<TcpStream> for PatientStream<TcpStream> {
    fn from(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(READ_TIME)).unwrap_or_else(|error| panic!("a socket: {error}"));
        Self(stream)
    }
}

impl<S> PatientStream<S> {
    /// The socket.
    pub fn get_ref(&self) -> &S {
        &self.0
    }
}

impl<S: Read> Read for PatientStream<S> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let mut patience = Patience::default();
        loop {
            match self.0.read(to) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    assert!(patience.tick(), "no byte comes: waited {:?} of running time", patience.limit());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

impl<S: Write> Write for PatientStream<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_byte_that_comes_after_several_reads_is_read() {
        let (ours, mut theirs) = UnixStream::pair().unwrap_or_else(|error| panic!("{error}"));
        let writer = thread::spawn(move || {
            thread::sleep(3 * READ_TIME);
            theirs.write_all(b"late")
        });
        let mut text = String::new();
        let read = PatientStream::from(ours).read_to_string(&mut text);
        assert_eq!((read.ok(), text.as_str()), (Some(4), "late"));
        assert!(writer.join().is_ok_and(|written| written.is_ok()));
    }
}
