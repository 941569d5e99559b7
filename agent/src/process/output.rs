//! The output of a process, for all its followers.
//!
//! A chunk is read when every follower has received the one before. So a slow follower slows the
//! process down, and no output is buffered. Output without followers is dropped.

use std::cell::RefCell;
use std::io;
use std::process::ExitStatus;
use std::sync::Arc;

use bytes::Bytes;
use clade_agent_proto::Base64;
use clade_agent_proto::process::{DataEvent, EndEvent, ProcessEvent, Signal};
use rustix::io::{Errno, ioctl_fionread};
use tokio::sync::oneshot;

use super::Process;
use crate::children::describe;
use crate::stream::Stream;

/// Maximum bytes of an event.
const CHUNK: usize = 32 << 10;
/// More bytes than a terminal holds: 4 KiB in its line discipline, which alone are counted, and 8 KiB before that.
const PTY_BUFFER: usize = 16 << 10;

thread_local! {
    /// Output is read into this buffer before it is copied to one of its length, so that 1,000
    /// silent processes do not need 1,000 buffers.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into());
}

/// The stream that output was read from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OutputSource {
    Stdout,
    Stderr,
    Pty,
}

/// One stream, until its end.
#[derive(Debug)]
struct Output {
    stream: Option<Arc<Stream>>,
    source: OutputSource,
}

impl Output {
    /// The next chunk; `None` at the end. Never returns if the stream has already ended.
    async fn read(&mut self) -> Option<Bytes> {
        let Some(stream) = &self.stream else { return std::future::pending().await };
        let chunk = stream.async_io(tokio::io::Interest::READABLE, read_now).await;
        let chunk = chunk.ok().filter(|chunk| !chunk.is_empty());
        if chunk.is_none() {
            self.stream = None;
        }
        chunk
    }

    /// The output that is there now. Bytes that other processes write while it is read are not part of it.
    fn rest(&mut self) -> impl Iterator<Item = Bytes> {
        let waiting = self.stream.as_ref().and_then(|stream| ioctl_fionread(stream.get_ref()).ok());
        let waiting = waiting.map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let mut left = if matches!(self.source, OutputSource::Pty) { waiting.max(PTY_BUFFER) } else { waiting };
        std::iter::from_fn(move || {
            let chunk = if left > 0 { self.read_rest() } else { None };
            left = left.saturating_sub(chunk.as_ref().map_or(0, Bytes::len));
            chunk
        })
    }

    /// A chunk that can be read without waiting.
    fn read_rest(&mut self) -> Option<Bytes> {
        let chunk = read_now(self.stream.as_ref()?.get_ref()).ok().filter(|chunk| !chunk.is_empty());
        if chunk.is_none() {
            self.stream = None;
        }
        chunk
    }
}

fn read_now(fd: &std::os::fd::OwnedFd) -> io::Result<Bytes> {
    SCRATCH.with_borrow_mut(|scratch| match rustix::io::read(fd, &mut scratch[..]) {
        Ok(length) => Ok(Bytes::copy_from_slice(&scratch[..length])),
        // The last program has closed the terminal.
        Err(Errno::IO) => Ok(Bytes::new()),
        Err(error) => Err(error.into()),
    })
}

fn event(source: OutputSource, chunk: &Bytes) -> ProcessEvent {
    let bytes = Some(Base64(chunk.to_vec()));
    let data = match source {
        OutputSource::Stdout => DataEvent { stdout: bytes, ..DataEvent::default() },
        OutputSource::Stderr => DataEvent { stderr: bytes, ..DataEvent::default() },
        OutputSource::Pty => DataEvent { pty: bytes, ..DataEvent::default() },
    };
    ProcessEvent { data: Some(data), ..ProcessEvent::default() }
}

/// The end of a process, for its followers.
pub(crate) fn end_event(status: Option<ExitStatus>) -> EndEvent {
    let Some(status) = status else {
        let status = "unknown".to_owned();
        return EndEvent { exit_code: -1, exited: false, error: Some(status.clone()), status };
    };
    let described = describe(status);
    EndEvent {
        exit_code: status.code().unwrap_or(-1),
        exited: status.code().is_some(),
        error: (!status.success()).then(|| described.clone()),
        status: described,
    }
}

/// Passes on the output of a process, until the process has ended and its streams have. After a
/// signal was sent to it, output that other processes hold open is not waited for. With `kill_rest`
/// the rest of its group is killed at its end.
pub(crate) async fn pump(
    process: Arc<Process>,
    streams: Vec<(Arc<Stream>, OutputSource)>,
    mut end: oneshot::Receiver<ExitStatus>,
    kill_rest: bool,
) -> EndEvent {
    let mut outputs = streams.into_iter().map(|(stream, source)| Output { stream: Some(stream), source });
    let none = || Output { stream: None, source: OutputSource::Stderr };
    let (mut first, mut second) = (outputs.next().unwrap_or_else(none), outputs.next().unwrap_or_else(none));
    let mut status = None;
    let mut is_reaped = false;
    while !is_reaped || first.stream.is_some() || second.stream.is_some() {
        if is_reaped && process.is_signalled() {
            for output in [&mut first, &mut second] {
                let source = output.source;
                for chunk in output.rest() {
                    process.publish(event(source, &chunk)).await;
                }
            }
            break;
        }
        let (source, chunk) = tokio::select! {
            chunk = first.read() => (first.source, chunk),
            chunk = second.read() => (second.source, chunk),
            ended = &mut end, if !is_reaped => {
                (status, is_reaped) = (ended.ok(), true);
                if kill_rest {
                    // There may be no others.
                    let _ = process.signal(Signal::KILL.0);
                }
                continue;
            }
            () = process.signalled(), if is_reaped => continue,
        };
        if let Some(chunk) = chunk {
            process.publish(event(source, &chunk)).await;
        }
    }
    end_event(status)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    /// A program of another session may write on for ever.
    #[test]
    fn the_rest_of_an_output_is_what_was_there() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _entered = runtime.enter();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let stream = crate::stream::register(reader, tokio::io::Interest::READABLE).unwrap();
        let mut output = Output { stream: Some(Arc::new(stream)), source: OutputSource::Stdout };
        let write = |bytes: &[u8]| assert_eq!(rustix::io::write(&writer, bytes).unwrap(), bytes.len());
        let first = vec![b'a'; CHUNK + 7];
        write(&first);
        let mut read = Vec::new();
        for chunk in output.rest().take(9) {
            read.extend_from_slice(&chunk);
            write(&chunk);
        }
        assert!(read.starts_with(&first) && read.len() <= first.len() + CHUNK, "{} bytes", read.len());
        // At most a chunk that was written meanwhile. The stream is not at its end.
        assert!(output.stream.is_some() && output.rest().next().is_some());
    }

    #[test]
    fn the_rest_of_a_terminal_is_more_than_its_line_discipline_holds() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _entered = runtime.enter();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        let stream = crate::stream::register(master, tokio::io::Interest::READABLE).unwrap();
        let mut output = Output { stream: Some(Arc::new(stream)), source: OutputSource::Pty };
        let written = vec![b'a'; 8 << 10];
        assert_eq!(rustix::io::write(&terminal, &written).unwrap(), written.len());
        let counted = ioctl_fionread(output.stream.as_ref().unwrap().get_ref()).unwrap();
        assert!(counted < written.len() as u64, "{counted}");
        let read: Vec<u8> = output.rest().flatten().collect();
        assert!(read == written, "{} bytes", read.len());
    }

    #[test]
    fn ends_are_said_as_envd_says_them() {
        let of = |raw| end_event(Some(ExitStatus::from_raw(raw)));
        let good = of(0);
        assert_eq!((good.exit_code, good.exited, good.status.as_str(), good.error), (0, true, "exit status 0", None));
        let bad = of(3 << 8);
        assert_eq!((bad.exit_code, bad.error.as_deref()), (3, Some("exit status 3")));
        let killed = of(9);
        assert_eq!((killed.exit_code, killed.exited, killed.status.as_str()), (-1, false, "signal: killed"));
        assert_eq!(of(11 | 0x80).status, "signal: segmentation fault (core dumped)");
    }
}
