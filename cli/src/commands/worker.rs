//! A worker: one VM, for the supervisor.

use std::cell::OnceCell;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use crate::commands::run::{say, with_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome};
use clade_api::flight;
use clade_block::Disk;
use clade_guests::abi;
use clade_harness::{BareError, BareMailbox, BareVcpu, GuestWords};
use clade_memory::{GuestRam, HugeTmpfs};
use clade_vmm::boot::BootImage;
use clade_vmm::vm::{Context, Vm};
use clade_worker::vm_host::VmHost;
use clade_worker::{Program, Served, UNMERGED, WorkerHooks};

/// The interval at which the end of the VM is polled.
const TURN: Duration = Duration::from_millis(200);
/// Interval of the checks for the end of VMs in other processes.
const LEASE_POLL: Duration = Duration::from_millis(20);
/// Time after which the wait for them is reported.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// Time limit of open requests after a signal.
const LAST_WORK: Duration = Duration::from_secs(10);

/// Set for measured workers: to [`SPINNING`] for children that then spin, otherwise children are
/// idle.
pub const MEASURE: &str = "CLADE_BENCH_WORKER";
pub const SPINNING: &str = "spinning";
/// The same for children of the demo, which stop what their parent does, announce themselves, and run on.
pub(super) const ANNOUNCING: &str = "announcing";
/// The same for children that write [`ANSWER_PAGES`] pages, report a checksum of as many that they have inherited, and
/// run on, as their parent does.
pub const ANSWERING: &str = "answering";
/// Pages that such a child writes, from the first one of its work on. As many behind them are those whose checksum it
/// reports.
pub const ANSWER_PAGES: u64 = 64;
/// The seed of the words that it writes.
pub const ANSWER_SEED: u64 = 2;
/// The name of the embedded guest, in place of a kernel's file.
pub const BARE: &str = "bare";

/// Returns the context of all VMs of a worker, with memory files in `mount`.
pub(super) fn context(mount: Option<HugeTmpfs>) -> Result<Context, Failure> {
    let context = Context::open_on(mount).map_err(Failure::input)?;
    Ok(if measures() { context.with_report_port() } else { context })
}

/// Runs the VM requested by the process behind `socket`.
pub(super) fn work(context: &Context, socket: OwnedFd) -> Outcome {
    // Before a second thread, which would not be confined.
    let Some(confined) = clade_worker::confine_worker(context, &socket).map_err(Failure::run)? else { return Ok(()) };
    with_runtime(|runtime| {
        let mut program = Program { kernel, before_start: None, booted: None, started: None, said: None };
        match std::env::var_os(MEASURE) {
            None => {}
            Some(kind) if kind == ANNOUNCING => {
                program.before_start = Some(order_stop);
                program.started = Some(await_stop);
            }
            Some(kind) if kind == ANSWERING => {
                program.booted = Some(fill);
                program.before_start = Some(order_writes);
                program.started = Some(await_answer);
            }
            Some(kind) => {
                program.booted = Some(fill_and_pause);
                let spins = kind == SPINNING;
                program.before_start = Some(if spins { order_announcement } else { order_announcement_and_halt });
                program.started = Some(await_announcement);
                program.said = Some(if spins { spin } else { pause });
            }
        }
        let shutdown = OnceCell::new();
        let signals = || match shutdown.get() {
            Some(signal) => Ok(signal),
            None => ShutdownSignal::prepare(runtime).map(|signal| shutdown.get_or_init(|| signal)),
        };
        // Until the second a signal ends the process at once, and its starter clears up.
        let hooks = WorkerHooks {
            prepared: &|| signals().map(drop),
            before_it_runs: &|| signals().map(ShutdownSignal::record),
        };
        let served = clade_worker::serve(context, &confined, &socket, runtime, &program, hooks);
        // The starter got the error.
        let served = served.inspect_err(|error| tracing::debug!(%error, "no VM")).ok().flatten();
        let (Some(served), Some(shutdown)) = (served, shutdown.into_inner()) else { return Ok(()) };
        drop(socket);
        let vm_host = served.vm_host.clone();
        let is_merged = wait_for_end(served, &shutdown);
        vm_host.finish();
        if !is_merged {
            return Err(Failure::Exit(UNMERGED, None));
        }
        shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)))
    })
}

/// Waits until the VM has ended and none of its resources is in use. A signal ends it.
///
/// Returns whether the writes since a fork are in the disks. The VM is dropped when it has stopped.
/// Its resources are then free, even while children in other processes read its disks.
fn wait_for_end(served: Served, shutdown: &ShutdownSignal) -> bool {
    let Served { vm_host, vm, ahead, was_booted, parent_death } = served;
    while vm.wait(TURN).is_none() {
        vm.end_start();
        if shutdown.signal().is_some() {
            vm.stop();
        }
    }
    // Before the name is free: the command may end as soon as it is.
    drop(parent_death);
    flight::note(&vm.stopped().map_or_else(|| "ended".to_owned(), |reason| format!("ended: {reason}")));
    if let Some(ahead) = ahead {
        ahead.end(&vm);
    }
    let (disks, is_left) = if was_booted { take_disks(&vm, shutdown) } else { (Vec::new(), false) };
    vm_host.remove();
    drop(vm);
    let until = Instant::now() + LAST_WORK;
    while !vm_host.wait_until_unused(TURN) {
        if shutdown.signal().is_some() && until < Instant::now() {
            say!("clade: a request has not ended {} s after the signal, and is cut off", LAST_WORK.as_secs());
            return !is_left && !disks.iter().any(has_overlays);
        }
    }
    wait_for_children(&vm_host, &disks, shutdown);
    // After the end of all readers: no disk may be written that another VM's map refers to.
    commit_overlays(disks) && !is_left
}

/// Takes the disks of a stopped VM. Waits for the kernel to end the requests of those with overlays: such a disk loses
/// what was written since a fork when it is dropped before. A signal ends a wait of more than [`LAST_WORK`].
///
/// Returns also whether a disk is left with overlays to be committed.
fn take_disks(vm: &Vm, shutdown: &ShutdownSignal) -> (Vec<Disk>, bool) {
    let begun = Instant::now();
    let (mut disks, mut said) = (Vec::new(), false);
    loop {
        let taken = vm.take_disks();
        disks.extend(taken.disks);
        let is_forked = |at: &usize| vm.with_disk(*at, |disk| has_overlays(disk)).unwrap_or(true);
        let left: Vec<usize> = taken.in_use.into_iter().filter(is_forked).collect();
        if left.is_empty() {
            return (disks, false);
        }
        if !said && begun.elapsed() > SAY_AFTER {
            say!("\r\nclade: the VM's last requests to its disks have not ended: waiting for them\r");
            said = true;
        }
        if shutdown.signal().is_some() && begun.elapsed() > LAST_WORK {
            for spec in left.iter().filter_map(|at| vm.config().disks.get(*at)) {
                let path = spec.disk.path.display();
                let why = "its requests have not ended";
                say!("\r\nclade: what was written since the VM was forked is not in {path}: {why}\r");
            }
            return (disks, true);
        }
        std::thread::sleep(LEASE_POLL);
    }
}

/// Waits until no VM in another process reads files of `disks` that have overlays to be committed.
/// A signal ends the wait, and the overlays are kept as far as they can be.
fn wait_for_children(vm_host: &VmHost, disks: &[Disk], shutdown: &ShutdownSignal) {
    if !disks.iter().any(has_overlays) {
        return;
    }
    let begun = Instant::now();
    let mut said = false;
    while vm_host.leases().count() > 0 && shutdown.signal().is_none() {
        if !said && begun.elapsed() > SAY_AFTER {
            say!("\r\nclade: disks are given what was written since the fork when the children have ended\r");
            said = true;
        }
        std::thread::sleep(LEASE_POLL);
    }
}

/// Returns whether a disk has overlays that belong in its image.
fn has_overlays(disk: &Disk) -> bool {
    disk.is_forked() && !disk.config().read_only && !disk.config().ephemeral
}

/// Writes the overlays of disks back to their files, if possible, and reports the result. Returns
/// whether all are written.
fn commit_overlays(disks: Vec<Disk>) -> bool {
    let mut is_merged = true;
    for disk in disks {
        if !has_overlays(&disk) {
            continue;
        }
        let path = disk.config().path.display().to_string();
        match disk.commit() {
            Ok(report) => {
                let bytes = report.copied + report.zeroed;
                say!("\r\nclade: {path} has been given the {bytes} bytes written since the VM was forked\r");
            }
            Err(failed) => {
                is_merged = false;
                let error = clade_vmm::error_chain(&failed.1);
                say!("\r\nclade: what was written since the VM was forked is not in {path}: {error}\r");
            }
        }
    }
    is_merged
}

/// Returns whether the demo or a benchmark has started this worker. A child of the bare guest then
/// reports that it runs before the worker does.
fn measures() -> bool {
    std::env::var_os(MEASURE).is_some()
}

fn fill_and_pause(vm: &Vm) {
    fill(vm);
    pause(vm);
}

fn fill(vm: &Vm) {
    let filled = BareVcpu::new(vm, 0)
        .await_ready()
        .map_err(Failure::run)
        .and_then(|_| clade_harness::fill(vm, vm.config()).map_err(Failure::run));
    if let Err(error) = filled {
        tracing::error!(%error, "the guest does not write its memory");
    }
}

fn order_announcement(ram: &GuestRam) {
    order(BareMailbox::new(ram, 0), abi::Command::Announce);
}

fn order_announcement_and_halt(ram: &GuestRam) {
    order(BareMailbox::new(ram, 0), abi::Command::AnnounceAndHalt);
}

fn order_writes(ram: &GuestRam) {
    let writes = abi::Command::Fill { start: abi::WORK_BASE, pages: ANSWER_PAGES, seed: ANSWER_SEED };
    order(BareMailbox::new(ram, 0), writes);
}

fn await_answer(vm: &Vm) {
    let (vcpu, start) = (BareVcpu::new(vm, 0), abi::WORK_BASE + ANSWER_PAGES * abi::PAGE_SIZE);
    let checksum = abi::Command::Read { start, pages: ANSWER_PAGES, passes: 1, words: abi::PAGE_WORDS };
    // By the reports: as many children as wait would take the processors by polling their mailboxes.
    let done = || vcpu.await_event(abi::Event::Done);
    if let Err(error) = done().and_then(|_| vcpu.mailbox().order(checksum)).and_then(|_| done()) {
        tracing::error!(%error, "the child does not answer");
    }
}

fn spin(vm: &Vm) {
    order(BareMailbox::new(vm, 0), abi::Command::Spin);
}

/// Stops all vCPUs of a child. The first announces itself. VMs with another guest run on.
fn order_stop(ram: &GuestRam) {
    let stop = |vcpu: u64| {
        let mailbox = BareMailbox::new(ram, vcpu);
        let runs = mailbox.exists()?;
        if runs {
            let command = if vcpu == 0 { abi::Command::Announce } else { abi::Command::Idle };
            mailbox.order_keeping_progress(command)?;
        }
        Ok::<_, BareError>(runs)
    };
    for vcpu in 0..abi::MAX_VCPUS {
        match stop(vcpu) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::error!(%error, "no order for the child");
                return;
            }
        }
    }
}

fn await_stop(vm: &Vm) {
    if BareMailbox::new(vm, 0).exists().is_ok_and(|exists| exists) {
        await_announcement(vm);
    }
}

fn order<M: GuestWords + ?Sized>(mailbox: BareMailbox<'_, M>, command: abi::Command) {
    if let Err(error) = mailbox.order(command) {
        tracing::error!(%error, "no order for the child");
    }
}

fn await_announcement(vm: &Vm) {
    if let Err(error) = BareVcpu::new(vm, 0).await_event(abi::Event::Announce) {
        tracing::error!(%error, "the child does not report");
    }
}

fn pause(vm: &Vm) {
    let _ = vm.pause();
}

/// Returns the kernel of a VM: a file, or the embedded guest.
pub(super) fn kernel(path: &Path) -> BootImage {
    if path == Path::new(BARE) {
        BootImage::Bytes(clade_guests::BARE_ELF.into())
    } else {
        BootImage::File(path.to_owned())
    }
}

/// Takes the socket off standard input, which then reads nothing. Keys on the other process's
/// terminal do not signal this one.
pub(super) fn standard_input() -> std::io::Result<OwnedFd> {
    // Fails only for a session leader, which does not need it.
    let _ = rustix::process::setsid();
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let nothing = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(nothing)?;
    Ok(socket)
}
