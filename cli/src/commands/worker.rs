//! `clade worker`: one VM, for the process that started this one.

use std::cell::OnceCell;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use clade_daemon::worker::{self, Program, Served};
use clade_guests::abi;
use clade_harness::{BareMailbox, BareVcpu};
use clade_memory::GuestRam;
use clade_vmm::boot::Image;
use clade_vmm::vm::{Context, Vm};

use crate::commands::run::{wait_for_all, wait_for_exit, with_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome};

/// Set for workers that are measured.
pub(crate) const MEASURE: &str = "CLADE_BENCH_WORKER";
/// The name of the embedded guest, where a kernel's file is asked for.
pub(crate) const BARE: &str = "bare";

pub(crate) fn main() -> Outcome {
    let socket = standard_input().map_err(Failure::run)?;
    work(&context()?, socket)
}

/// What all VMs of a worker share.
pub(super) fn context() -> Result<Context, Failure> {
    let context = Context::open().map_err(Failure::input)?;
    Ok(if measures() { context.with_report_port() } else { context })
}

/// Runs the VM that the process behind `socket` orders.
pub(super) fn work(context: &Context, socket: OwnedFd) -> Outcome {
    // Before there is another thread, which would not be confined.
    let Some(entered) = worker::enter(context, &socket).map_err(Failure::run)? else { return Ok(()) };
    with_runtime(|runtime| {
        let mut program = Program { kernel, before_start: None, started: None, said: None };
        if measures() {
            program.before_start = Some(order_announcement);
            program.started = Some(await_announcement);
            program.said = Some(pause);
        }
        // Until then a signal ends the process at once, and whoever ordered the VM clears up.
        let shutdown = OnceCell::new();
        let listen = || ShutdownSignal::listen(runtime).map(|signal| drop(shutdown.set(signal)));
        let served = worker::serve(context, &entered, &socket, runtime, &program, &listen).map_err(Failure::run)?;
        let (Some(Served { fleet, booted }), Some(shutdown)) = (served, shutdown.into_inner()) else { return Ok(()) };
        drop(socket);
        match booted {
            Some(vm) => drop(wait_for_exit(&fleet, vm, true, &shutdown)),
            None => wait_for_all(&fleet, &shutdown),
        }
        fleet.finish();
        shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)))
    })
}

/// Whether `clade bench clones` has started this worker. A child of the bare guest then says that it
/// runs before the worker does.
fn measures() -> bool {
    std::env::var_os(MEASURE).is_some()
}

fn order_announcement(ram: &GuestRam) {
    if let Err(error) = BareMailbox::new(ram, 0).order(abi::Command::Announce) {
        tracing::error!(%error, "no order for the child");
    }
}

fn await_announcement(vm: &Vm) {
    if let Err(error) = BareVcpu::new(vm, 0).await_event(abi::Event::Announce) {
        tracing::error!(%error, "the child says nothing");
    }
}

fn pause(vm: &Vm) {
    // It would take a processor from those that are to run after it.
    let _ = vm.pause();
}

/// The kernel of a VM: a file, or the embedded guest.
pub(super) fn kernel(path: &Path) -> Image {
    if path == Path::new(BARE) { Image::Bytes(clade_guests::BARE_ELF.into()) } else { Image::File(path.to_owned()) }
}

/// Takes the socket off standard input, which reads nothing from then on. A key on the terminal of
/// the other process is not for this one.
pub(super) fn standard_input() -> std::io::Result<OwnedFd> {
    // Fails only for a leader of a session, which needs none.
    let _ = rustix::process::setsid();
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let nothing = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(nothing)?;
    Ok(socket)
}
