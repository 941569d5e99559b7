//! A VM's consoles on Unix sockets.
//!
//! A guest never waits for a reader. Each reader has a bounded buffer. Output that does not fit is
//! dropped, and the reader gets a line with the number of bytes dropped.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use clade_devices::Console;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore};

use clade_api::http::Acceptor;
use clade_vmm::vm::Vm;

/// The most bytes buffered for a reader. More than a console replays to a new reader.
const MAX_WAITING: usize = 256 << 10;
/// Connections to the consoles of a VM.
pub(crate) const MAX_CONNECTIONS: usize = 16;
/// Time limit of a reader for the last output of a VM that has ended.
pub(crate) const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// One of a VM's consoles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Serial,
    Virtio,
}

impl Line {
    fn of(self, vm: &Vm) -> Option<&Console> {
        match self {
            Self::Serial => Some(vm.console()),
            Self::Virtio => vm.virtio_console(),
        }
    }

    fn type_in(self, vm: &Vm, bytes: &[u8]) -> usize {
        match self {
            Self::Serial => vm.type_in(bytes),
            Self::Virtio => vm.type_in_virtio(bytes),
        }
    }
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    dropped: u64,
    /// The console or the reader has gone.
    is_closed: bool,
}

#[derive(Default)]
struct ConsoleShared {
    waiting: Mutex<Waiting>,
    /// Wakes [`OutputReader::next`].
    changed: Notify,
    /// Wakes [`OutputReader::overdue`].
    closed: Notify,
}

impl ConsoleShared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.waiting().is_closed = true;
        self.changed.notify_one();
        self.closed.notify_one();
    }
}

/// The console's end of an output buffer: a listener that never blocks.
struct OutputWriter(Arc<ConsoleShared>);

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.waiting();
        if waiting.is_closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // After a gap, the buffer takes nothing until the reader has the line about it. So output
        // stays in order.
        let room = if waiting.dropped == 0 { MAX_WAITING - waiting.bytes.len() } else { 0 };
        let (taken, over) = bytes.split_at(bytes.len().min(room));
        waiting.bytes.extend(taken);
        waiting.dropped += over.len() as u64;
        drop(waiting);
        self.0.changed.notify_one();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for OutputWriter {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The reader's end of an output buffer.
pub(crate) struct OutputReader(Arc<ConsoleShared>);

fn output() -> (OutputWriter, OutputReader) {
    let shared = Arc::<ConsoleShared>::default();
    (OutputWriter(Arc::clone(&shared)), OutputReader(shared))
}

impl OutputReader {
    /// Returns the next output, or None once the console has gone and all output is read.
    pub(crate) async fn next(&self) -> Option<Vec<u8>> {
        loop {
            {
                let mut waiting = self.0.waiting();
                if !waiting.bytes.is_empty() {
                    return Some(std::mem::take(&mut waiting.bytes).into());
                }
                let dropped = std::mem::take(&mut waiting.dropped);
                if dropped > 0 {
                    return Some(format!("\r\n[clade: {dropped} bytes of output dropped]\r\n").into_bytes());
                }
                if waiting.is_closed {
                    return None;
                }
            }
            self.0.changed.notified().await;
        }
    }

    /// Returns some time after the console has gone.
    async fn overdue(&self) {
        // A notification before the wait is not lost.
        self.0.closed.notified().await;
        tokio::time::sleep(LAST_OUTPUT).await;
    }
}

impl Drop for OutputReader {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Accepts connections to a VM's console socket until the task is aborted.
pub(crate) async fn serve(listener: UnixListener, vm: Weak<Vm>, line: Line, connections: Arc<Semaphore>) {
    let Some(mut acceptor) = Acceptor::new(listener, "console socket") else { return };
    loop {
        let stream = acceptor.next().await;
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            let refusal = format!("[clade: {MAX_CONNECTIONS} connections to this VM's consoles are the limit]\r\n");
            let _ = stream.try_write(refusal.as_bytes());
            continue;
        };
        let vm = Weak::clone(&vm);
        tokio::spawn(async move {
            attend(stream, vm, line).await;
            drop(permit);
        });
    }
}

/// Drops a VM on a separate thread if this is its last handle. The drop waits for threads and for
/// the kernel, and all connections share one thread.
fn let_go(vm: Arc<Vm>) {
    if let Some(vm) = Arc::into_inner(vm) {
        drop_elsewhere(vm);
    }
}

fn drop_elsewhere(what: impl Send + 'static) {
    // If no thread can be created, the VM is dropped here, with the closure.
    let _ = thread::Builder::new().name("clade-drop".into()).spawn(move || drop(what));
}

/// Wakes a suspended VM on input. This takes as long as some disk reads.
async fn wake(vm: &Arc<Vm>) {
    if !vm.is_awake() {
        let vm = Arc::clone(vm);
        // A stopped VM reads nothing.
        let _ = tokio::task::spawn_blocking(move || {
            let woken = vm.wake();
            let_go(vm);
            woken.map(drop)
        })
        .await;
    }
}

/// Returns the console's last lines and all later output, or None if the VM has no such console.
pub(crate) fn follow(vm: &Vm, line: Line) -> Option<OutputReader> {
    let (writer, reader) = output();
    line.of(vm)?.listen(Box::new(writer));
    Some(reader)
}

/// Types into a console, and wakes a suspended VM. Returns None if the VM has gone; otherwise the
/// number of bytes taken, or None within if there is no such console.
pub(crate) async fn type_in(vm: &Weak<Vm>, line: Line, bytes: &[u8]) -> Option<Option<usize>> {
    let vm = vm.upgrade()?;
    wake(&vm).await;
    let taken = line.of(&vm).is_some().then(|| line.type_in(&vm, bytes));
    let_go(vm);
    Some(taken)
}

/// Serves one connection until it ends.
async fn attend(stream: UnixStream, vm: Weak<Vm>, line: Line) {
    let (mut from_person, mut to_person) = stream.into_split();
    let reader = {
        let Some(vm) = vm.upgrade() else { return };
        let reader = follow(&vm, line);
        let_go(vm);
        let Some(reader) = reader else { return };
        reader
    };
    let typing = async {
        let mut bytes = [0; 4096];
        loop {
            match from_person.read(&mut bytes).await {
                Ok(0) | Err(_) => return,
                Ok(typed) => {
                    if type_in(&vm, line, &bytes[..typed]).await.is_none() {
                        return;
                    }
                }
            }
        }
    };
    let showing = async {
        while let Some(bytes) = reader.next().await {
            if to_person.write_all(&bytes).await.is_err() {
                // A client that no longer reads may have sent input before: `typing` ends after
                // that input.
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        () = typing => {}
        () = showing => {}
        () = reader.overdue() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn a_reader_that_does_not_read_loses_output_and_is_told_how_much() {
        let (writer, reader) = output();
        let mut console = Console::default();
        console.listen(Box::new(writer));
        for _ in 0..MAX_WAITING / 1024 {
            console.write_all(&[b'a'; 1024]).unwrap();
        }
        console.write_all(b"lost").unwrap();
        let all = block_on(reader.next()).unwrap();
        assert_eq!(all, vec![b'a'; MAX_WAITING]);
        // Still lost: output after a gap must not precede the line about it.
        console.write_all(b"too").unwrap();
        let told = String::from_utf8(block_on(reader.next()).unwrap()).unwrap();
        assert!(told.contains("7 bytes of output dropped"), "{told}");
        console.write_all(b"again").unwrap();
        assert_eq!(block_on(reader.next()).unwrap(), b"again");
        drop(console);
        assert_eq!(block_on(reader.next()), None);
    }

    #[test]
    fn who_attaches_is_shown_the_last_lines() {
        let mut console = Console::default();
        console.write_all(b"login: ").unwrap();
        let (writer, reader) = output();
        console.listen(Box::new(writer));
        assert_eq!(block_on(reader.next()).unwrap(), b"login: ");
        drop(reader);
        console.write_all(b"x").unwrap();
    }

    #[test]
    fn what_takes_its_time_to_end_does_so_on_another_thread() {
        struct Slow(std::sync::mpsc::Sender<thread::ThreadId>);
        impl Drop for Slow {
            fn drop(&mut self) {
                self.0.send(thread::current().id()).unwrap();
            }
        }
        let (sender, dropped) = std::sync::mpsc::channel();
        drop_elsewhere(Slow(sender));
        assert_ne!(dropped.recv().unwrap(), thread::current().id());
    }
}
