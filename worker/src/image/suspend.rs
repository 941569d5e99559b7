//! Suspending a VM whose process may not open files: the client passes one.
//!
//! The request goes over the VM's image socket ([`crate::image`]), which stays open while the VM is
//! suspended.
//!
//! | message | from | what |
//! |---|---|---|
//! | 1 | client | the byte of the request, with the file's descriptors: one to write it, one to read it |
//! | 2 | VM's process | the report, as JSON; or the error |
//! | 3 | VM's process | one byte, when the VM is woken. End of file instead: the VM has gone |

use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use clade_host_io::seqpacket::{self, Message};
use clade_memory::SuspendFile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};

use crate::image::{connected, read_answer};
use clade_api::{DaemonError, ProblemKind, SuspendAnswer, flight};
use clade_vmm::vm::{RequestSource, SuspendReport, Vm};

/// The byte of the request.
pub(crate) const SUSPEND: u8 = 4;
/// Time limit of a VM's process: it writes as much as the VM owns.
const PATIENCE: Duration = Duration::from_secs(600);
/// Interval of the checks whether the client still wants it.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Serialize, Deserialize)]
enum SuspendReply {
    Suspended(SuspendAnswer),
    Refused {
        /// The kind of the error.
        kind: ProblemKind,
        text: String,
    },
}

/// Suspends the VM of this process, and wakes it on the first request to its devices.
pub(crate) fn answer(socket: &OwnedFd, vm: &Weak<Vm>, files: Vec<OwnedFd>) -> io::Result<()> {
    let suspended = vm.upgrade().ok_or(DaemonError::Ending).and_then(|vm| suspended(&vm, files));
    let answer = match &suspended {
        Ok((answer, _)) => SuspendReply::Suspended(answer.clone()),
        Err(error) => {
            let text = clade_vmm::error_chain(error);
            flight::note(&format!("not suspended: {text}"));
            SuspendReply::Refused { kind: error.problem(), text }
        }
    };
    let told = seqpacket::send(socket, &serde_json::to_vec(&answer)?, &[]);
    // Without the watch no request would wake the VM, even if its client has gone.
    if let Some(mut watch) = suspended.ok().and_then(|(_, watch)| watch) {
        watch.socket = socket.try_clone().ok();
        let name = "clade-waker".to_owned();
        let (of, begun) = (Weak::clone(vm), thread::Builder::new().name(name).spawn(move || watch.run()));
        if let Err(error) = begun {
            tracing::warn!(%error, "a suspended VM is woken: no thread waits for requests");
            of.upgrade().map_or(Ok(()), |vm| vm.wake().map(drop)).map_err(io::Error::other)?;
        }
    }
    told
}

fn suspended(vm: &Arc<Vm>, files: Vec<OwnedFd>) -> Result<(SuspendAnswer, Option<RequestWatch>), DaemonError> {
    let failed = |source| DaemonError::Worker { source };
    let count = files.len();
    let [write, read] = <[OwnedFd; 2]>::try_from(files)
        .map_err(|_| failed(io::Error::other(format!("a request to suspend with {count} descriptors"))))?;
    let file = SuspendFile::of(write, read).map_err(failed)?;
    let begun = Instant::now();
    // Made before the suspension: without descriptors the VM stays awake.
    // And looked at before it: a request that comes from here on wakes the VM, however late the thread
    // begins that waits for it.
    let sources = announcing(vm.request_sources().map_err(failed)?).map_err(failed)?;
    let SuspendReport { was_suspended, memory, halt, write, has_input } = vm.suspend(file)?;
    // An earlier suspension has its own watch. A pipe that nobody reads would stay until the wake.
    let woken = (!was_suspended).then(|| vm.woken().map_err(failed).inspect_err(|_| drop(vm.wake()))).transpose()?;
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    flight::note(&format!("suspended in {} us: {} pages written", begun.elapsed().as_micros(), memory.written));
    let answer = SuspendAnswer {
        name: vm.name().to_owned(),
        was_suspended,
        written_pages: memory.written,
        zero_pages: memory.zeros,
        kept_pages: memory.kept,
        halt_us: us(halt),
        write_us: us(write),
        total_us: us(begun.elapsed()),
    };
    let watch = woken.map(|woken| RequestWatch { vm: Arc::downgrade(vm), sources, woken, has_input, socket: None });
    Ok((answer, watch))
}

/// Leaves out the sources with a request that no driver takes: it would wake the VM for ever.
fn announcing(sources: Vec<RequestSource>) -> io::Result<Vec<RequestSource>> {
    let mut announcing = Vec::with_capacity(sources.len());
    for source in sources {
        let mut polled = [PollFd::new(&source.fd, PollFlags::IN)];
        if source.is_served || poll(&mut polled, Some(&Timespec::default()))? == 0 {
            announcing.push(source);
        }
    }
    Ok(announcing)
}

/// Waits for requests to a suspended VM.
struct RequestWatch {
    vm: Weak<Vm>,
    sources: Vec<RequestSource>,
    woken: PipeReader,
    /// Whether a request is there that no source announces: the VM is then woken at once.
    has_input: bool,
    /// Socket of the client that suspended the VM.
    socket: Option<OwnedFd>,
}

impl RequestWatch {
    fn run(self) {
        let is_request = self.wait().unwrap_or_else(|error| {
            tracing::warn!(%error, "a suspended VM is woken: its requests cannot be waited for");
            true
        });
        let Some(vm) = self.vm.upgrade() else { return };
        // Not after another's wake: the VM may be suspended again by now, with a watch of its own.
        if is_request {
            match vm.wake() {
                Ok(report) if report.was_suspended => {
                    flight::note(&format!("woken by a request in {} us", report.total.as_micros()));
                }
                Ok(_) => {}
                // The VM has stopped.
                Err(error) => return tracing::debug!(%error, "a suspended VM"),
            }
        }
        drop(vm);
        // The client may have gone.
        let _ = self.socket.map(|socket| seqpacket::send(socket, &[SUSPEND], &[]));
    }

    /// Returns true on a request, or false when the VM is awake or has gone.
    fn wait(&self) -> io::Result<bool> {
        if self.has_input {
            return Ok(true);
        }
        let mut awaited = vec![PollFd::new(&self.woken, PollFlags::IN)];
        awaited.extend(self.sources.iter().map(|source| PollFd::new(&source.fd, PollFlags::IN)));
        loop {
            match poll(&mut awaited, None) {
                Err(rustix::io::Errno::INTR) => {}
                other => {
                    other?;
                    return Ok(awaited[0].revents().is_empty());
                }
            }
        }
    }
}

/// A suspended VM, on the client's side.
#[derive(Debug)]
pub struct SuspendedVm(OwnedFd);

impl SuspendedVm {
    /// Ends [`Self::wait`] in another thread, unless the report of the wake is there.
    pub fn end_wait(&self) {
        // Fails only if the other end has gone, which ends it too.
        let _ = shutdown(&self.0, Shutdown::Read);
    }

    /// Waits until the VM is woken. Returns false if it has gone instead.
    pub fn wait(&self) -> bool {
        // Its process may be silent for as long as the VM sleeps.
        if set_socket_timeout(&self.0, Timeout::Recv, None).is_err() {
            return false;
        }
        matches!(seqpacket::receive(&self.0, 1), Ok(Message { bytes, .. }) if bytes == [SUSPEND])
    }
}

/// Suspends the VM called `name` to a file in `dir`. Calls `check` while it waits; the VM may be
/// suspended even if that fails.
///
/// # Errors
/// When there is no such VM, no file can be made in `dir`, or the VM cannot be suspended: it then
/// runs on.
pub fn suspend(
    runtime: &Path,
    name: &str,
    dir: &Path,
    check: &dyn Fn() -> Result<(), DaemonError>,
) -> Result<(SuspendAnswer, SuspendedVm), DaemonError> {
    let failed = |source| DaemonError::Worker { source };
    let socket = connected(runtime, name, CHECK_INTERVAL.max(PATIENCE / 60))?;
    let file = SuspendFile::create(dir).map_err(|source| DaemonError::SuspendDir { path: dir.to_owned(), source })?;
    seqpacket::send(&socket, &[SUSPEND], &file.descriptors()).map_err(failed)?;
    // The VM's process has its own descriptor.
    drop(file);
    let bytes = read_answer(&socket, name, Instant::now() + PATIENCE, check)?;
    match serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))? {
        SuspendReply::Suspended(answer) => Ok((answer, SuspendedVm(socket))),
        SuspendReply::Refused { kind, text } => {
            Err(DaemonError::Refused { kind, text: format!("to a file in {}: {text}", dir.display()) })
        }
    }
}
