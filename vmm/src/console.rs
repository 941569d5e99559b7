//! A VM's console for people: on a Unix socket, and on the terminal Clade was started from.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Weak};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::event_loop::EventLoop;
use crate::vm::Vm;

/// Which of a VM's consoles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Serial,
    Virtio,
}

/// Accepts people on a VM's console socket.
pub(crate) struct ConsoleListener {
    listener: UnixListener,
    vm: Weak<Vm>,
    line: Line,
    events: EventLoop,
}

impl ConsoleListener {
    pub(crate) fn new(listener: UnixListener, vm: &Arc<Vm>, line: Line, events: EventLoop) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, vm: Arc::downgrade(vm), line, events })
    }

    fn accept(&self) -> io::Result<()> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        let Some(vm) = self.vm.upgrade() else { return Ok(()) };
        // A reader too slow for the socket's buffer is let go: a guest never waits for whoever looks at it.
        let console = match self.line {
            Line::Serial => Some(vm.console()),
            Line::Virtio => vm.virtio_console(),
        };
        let Some(console) = console else { return Ok(()) };
        console.listen(Box::new(Output(stream.try_clone()?)));
        let client = ConsoleClient { stream, vm: self.vm.clone(), line: self.line };
        let events = self.events.clone();
        // From another thread: this one is the loop, and cannot wait for itself.
        std::thread::spawn(move || events.add(Box::new(client)));
        Ok(())
    }
}

impl MutEventSubscriber for ConsoleListener {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        if let Err(error) = self.accept()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::warn!(%error, "console connection");
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.listener, EventSet::IN)) {
            tracing::error!(%error, "console socket");
        }
    }
}

/// The output half: closes the connection when it can no longer follow, so that the reader knows.
struct Output(UnixStream);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wrote = self.0.write(bytes);
        if wrote.is_err() {
            let _ = self.0.shutdown(std::net::Shutdown::Both);
        }
        wrote
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// One person's connection.
struct ConsoleClient {
    stream: UnixStream,
    vm: Weak<Vm>,
    line: Line,
}

impl MutEventSubscriber for ConsoleClient {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        let mut bytes = [0; 4096];
        let typed = match self.stream.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            other => other.unwrap_or(0),
        };
        match self.vm.upgrade() {
            Some(vm) if typed > 0 => {
                match self.line {
                    Line::Serial => vm.type_in(&bytes[..typed]),
                    Line::Virtio => vm.type_in_virtio(&bytes[..typed]),
                };
            }
            _ => {
                let _ = ops.remove(Events::empty(&self.stream));
                let _ = self.stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.stream, EventSet::IN)) {
            tracing::error!(%error, "console connection");
        }
    }
}

/// What a person at a terminal asked for with Ctrl-A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Escape {
    Leave,
}

/// Separates what is for the guest from Ctrl-A commands: `x` leaves, a second Ctrl-A types one.
#[derive(Debug, Default)]
pub(crate) struct EscapeFilter {
    pending: bool,
}

impl EscapeFilter {
    pub(crate) fn feed(&mut self, typed: &[u8], to_guest: &mut Vec<u8>) -> Option<Escape> {
        const CTRL_A: u8 = 1;
        for byte in typed {
            match (std::mem::take(&mut self.pending), *byte) {
                (false, CTRL_A) => self.pending = true,
                (true, b'x' | b'X') => return Some(Escape::Leave),
                (true, CTRL_A) | (false, _) => to_guest.push(*byte),
                // Not a command: both reach the guest.
                (true, other) => to_guest.extend([CTRL_A, other]),
            }
        }
        None
    }
}

/// Standard input, typed into a VM.
pub(crate) struct Stdin {
    vm: Weak<Vm>,
    filter: EscapeFilter,
}

impl Stdin {
    pub(crate) fn new(vm: &Arc<Vm>) -> Self {
        Self { vm: Arc::downgrade(vm), filter: EscapeFilter::default() }
    }
}

impl MutEventSubscriber for Stdin {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        let mut bytes = [0; 1024];
        let typed = io::stdin().lock().read(&mut bytes).unwrap_or(0);
        let Some(vm) = self.vm.upgrade() else { return };
        let mut to_guest = Vec::new();
        let escape = self.filter.feed(&bytes[..typed], &mut to_guest);
        vm.type_in(&to_guest);
        if escape == Some(Escape::Leave) {
            vm.stop();
        }
        if typed == 0 {
            let _ = ops.remove(Events::empty(&io::stdin()));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // Refused for a plain file, which epoll does not take: then there is no input.
        if let Err(error) = ops.add(Events::new_raw(io::stdin().as_raw_fd(), EventSet::IN)) {
            tracing::debug!(%error, "standard input is not watched");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(parts: &[&[u8]]) -> (Vec<u8>, Option<Escape>) {
        let mut filter = EscapeFilter::default();
        let mut out = Vec::new();
        for part in parts {
            if let Some(escape) = filter.feed(part, &mut out) {
                return (out, Some(escape));
            }
        }
        (out, None)
    }

    #[test]
    fn ctrl_a_commands_are_not_typed() {
        assert_eq!(feed(&[b"ls\n"]), (b"ls\n".to_vec(), None));
        assert_eq!(feed(&[b"a\x01", b"xb"]), (b"a".to_vec(), Some(Escape::Leave)));
        assert_eq!(feed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), None));
        assert_eq!(feed(&[b"\x01q"]), (b"\x01q".to_vec(), None));
    }
}
