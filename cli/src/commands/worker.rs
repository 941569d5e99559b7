//! `clade worker`: one VM, for the process that started this one.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};

use clade_daemon::worker;
use clade_vmm::vm::Context;

use crate::commands::run::{wait_for_all, with_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome};

pub(crate) fn main() -> Outcome {
    let socket = standard_input().map_err(Failure::run)?;
    // A key on the terminal of the other process is not for this one. Fails only for a leader of
    // a session, which needs none.
    let _ = rustix::process::setsid();
    let context = Context::open().map_err(Failure::input)?;
    with_runtime(|runtime| {
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        let Some(fleet) = worker::serve(&context, &socket, runtime).map_err(Failure::run)? else { return Ok(()) };
        drop(socket);
        wait_for_all(&fleet, &shutdown);
        fleet.finish();
        shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)))
    })
}

/// Takes the socket off standard input, which reads nothing from then on.
fn standard_input() -> std::io::Result<OwnedFd> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let nothing = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(nothing)?;
    Ok(socket)
}
