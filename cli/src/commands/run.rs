//! `clade run`: boots a kernel with its console on this terminal.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_devices::disk::Disk;
use clade_devices::virtio::limiter::Limits;

use hyper::Method;
use tokio::runtime::Handle;

use crate::commands::args::{DEFAULT_CMDLINE, RunArgs};
use crate::commands::many::limit;
use crate::commands::remote::ask;
use crate::commands::serve::ensure;
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::terminal::{RawMode, type_stdin};
use crate::commands::worker::{BARE, kernel};
use crate::commands::{Failure, Outcome};
use clade_daemon::console::OutputThread;
use clade_daemon::control::{BootRequest, Client, VmInfo, VmLimits, serve_fleet};
use clade_daemon::fleet::{Fleet, FleetError, Labels, runtime_dir};
use clade_vmm::boot::{BootError, BootSource, Image};
use clade_vmm::vm::{Context, Irqchip, StopReason, Vm, VmConfig, VmError};

/// Writes a line to standard error. A failure is ignored: a VM does not end because its terminal or
/// log has gone.
macro_rules! say {
    ($($text:tt)*) => {
        drop(::std::io::Write::write_fmt(&mut ::std::io::stderr(), format_args!("{}\n", format_args!($($text)*))))
    };
}
pub(super) use say;

/// The interval at which the end of the process's VMs is polled.
const TURN: Duration = Duration::from_millis(200);
/// How often the end of VMs in other processes is looked for.
const LEASE_POLL: Duration = Duration::from_millis(20);
/// When it is said that they are waited for.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// How long open requests may take to end after a signal.
const LAST_WORK: Duration = Duration::from_secs(10);

/// Runs `work` with the runtime that serves the sockets of the process's VMs.
pub(super) fn with_runtime(work: impl FnOnce(&Handle) -> Outcome) -> Outcome {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(Failure::run)?;
    let outcome = work(runtime.handle());
    // Does not wait for requests: those that matter have ended.
    runtime.shutdown_background();
    outcome
}

fn config(args: &RunArgs, bare: bool) -> Result<VmConfig, Failure> {
    let mut config = VmConfig::new(args.mem, args.cpus).map_err(Failure::input)?;
    if !args.overcommit {
        config.check_host_memory().map_err(Failure::input)?;
    }
    config.pit = args.pit;
    config.cpu = args.cpu_template;
    config.hide = args.cpu_hide.clone().unwrap_or_default();
    config.pmu = args.pmu;
    config.acpi = !(bare || args.no_acpi);
    config.irqchip = Irqchip::Full;
    config.disks.clone_from(&args.disk);
    config.nets.clone_from(&args.net);
    config.vsock.clone_from(&args.vsock);
    config.rng = (args.rng || !(bare || args.no_rng)).then(Limits::default);
    config.balloon = args.balloon;
    config.virtio_console = args.virtio_console;
    config.check_devices().map_err(Failure::input)?;
    Ok(config)
}

pub(crate) fn main(args: &RunArgs) -> Outcome {
    let config = config(args, args.kernel == Path::new(BARE))?;
    let default_cmdline =
        || args.append.iter().fold(DEFAULT_CMDLINE.to_owned(), |cmdline, more| format!("{cmdline} {more}"));
    let cmdline = args.cmdline.clone().unwrap_or_else(default_cmdline);
    let name = args.name.clone().unwrap_or_else(|| format!("clade-{}", std::process::id()));
    if args.background {
        return background(args, name, config, cmdline);
    }
    let context = Context::open().map_err(Failure::input)?;
    let config = Arc::new(config);
    let initrd = args.initrd.clone().map(Image::File);
    let source = BootSource { kernel: kernel(&args.kernel), initrd, cmdline };
    with_runtime(|runtime| {
        // Before there is anything to clean up.
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        let fleet = serve_fleet(&context, &runtime_dir(), runtime).map_err(Failure::input)?;
        fleet.set_labels(&name, Labels::of(&args.label).map_err(Failure::input)?);
        let boot = |context: &Context| Vm::boot(context, &name, &config, &source);
        let vm = fleet.launch(&name, boot).map_err(|error| refused(args, error))?;
        foreground(&fleet, vm, args.detached, &shutdown, runtime)
    })
}

/// Has the supervisor boot the VM, in a process of its own.
fn background(args: &RunArgs, name: String, config: VmConfig, cmdline: String) -> Outcome {
    // It has another working directory.
    let file = |path: &PathBuf| std::path::absolute(path).map_err(Failure::input);
    let kernel = if args.kernel == Path::new(BARE) { args.kernel.clone() } else { file(&args.kernel)? };
    let initrd = args.initrd.as_ref().map(file).transpose()?;
    let mut config = config;
    for disk in &mut config.disks {
        disk.disk.path = file(&disk.disk.path)?;
        disk.disk.overlays = disk.disk.overlays.as_ref().map(file).transpose()?;
    }
    if let Some(vsock) = &mut config.vsock {
        vsock.socket = file(&vsock.socket)?;
    }
    if !Client::default().is_remote() {
        ensure()?;
    }
    let labels = Labels::of(&args.label).map_err(Failure::input)?;
    let limits = VmLimits { memory_mib: args.memory_limit.map(|bytes| bytes >> 20), cpus: args.cpu_limit };
    let request = BootRequest { name, config, kernel, initrd, cmdline, labels, limits };
    let info: VmInfo = ask(Client::default().supervisor(Method::POST, "/v1/vms", Some(&request)))?;
    let limited = limit(std::slice::from_ref(&info.name), args.ttl);
    drop(writeln!(io::stdout(), "{}", info.name));
    limited
}

/// Connects this terminal to the VM, unless it is `detached`. Waits until the VM and its children
/// have ended.
pub(super) fn foreground(
    fleet: &Fleet,
    vm: Arc<Vm>,
    detached: bool,
    shutdown: &ShutdownSignal,
    runtime: &Handle,
) -> Outcome {
    let raw = if detached { None } else { RawMode::enter().map_err(Failure::run)? };
    let stdout = OutputThread::attach(vm.console(), runtime, io::stdout()).map_err(Failure::run)?;
    if !detached {
        type_stdin(&vm).map_err(Failure::run)?;
    }
    let name = vm.name().to_owned();
    let ended = wait_for_exit(fleet, vm, detached, shutdown);
    fleet.finish();
    stdout.finish();
    drop(raw);
    if let Some(number) = shutdown.signal() {
        return Err(Failure::Signal(number));
    }
    match ended {
        StopReason::Requested | StopReason::Reset | StopReason::PowerOff => Ok(()),
        reason => Err(Failure::Run(anyhow::anyhow!("{name}: {reason}"))),
    }
}

/// Adds the file's name to an error that knows only its contents.
fn refused(args: &RunArgs, error: FleetError) -> Failure {
    use BootError::{BzImage, Elf, NotAKernel, Unpack};
    match error {
        FleetError::Vm(VmError::VcpuState(_) | VmError::Call { .. } | VmError::Thread(_)) => Failure::run(error),
        FleetError::Vm(VmError::Boot(NotAKernel { .. } | BzImage(_) | Unpack(_) | Elf(_))) => {
            Failure::input(anyhow::Error::new(error).context(args.kernel.display().to_string()))
        }
        _ => Failure::input(error),
    }
}

/// Waits for the VM, and then for the children that live in this process. A signal ends them all.
///
/// The VM is dropped when it has stopped. Its resources are then free, also while its children run
/// on.
pub(super) fn wait_for_exit(fleet: &Fleet, vm: Arc<Vm>, detached: bool, shutdown: &ShutdownSignal) -> StopReason {
    let reason = loop {
        fleet.reap(Some(vm.name()));
        close_at_end(fleet, shutdown);
        if let Some(reason) = vm.wait(TURN) {
            break reason;
        }
    };
    let name = vm.name().to_owned();
    let disks = vm.take_disks();
    if detached {
        fleet.remove(&vm);
    } else {
        // Its console was on this terminal, and its end is reported here.
        fleet.forget(&vm);
    }
    drop(vm);
    let children = fleet.list().len();
    if children > 0 && shutdown.signal().is_none() {
        say!("\r\nclade: {name} has ended; {children} of its children run on in this process\r");
    }
    wait_for_all(fleet, shutdown);
    wait_for_processes(fleet, &disks, shutdown);
    // After all VMs have ended: no disk may be written that another VM's map refers to.
    commit_overlays(disks);
    reason
}

/// Waits until no VM and no request that works with one is left. Their resources are then free.
pub(super) fn wait_for_all(fleet: &Fleet, shutdown: &ShutdownSignal) {
    let mut until = None;
    loop {
        close_at_end(fleet, shutdown);
        fleet.reap(None);
        if fleet.wait_until_unused(TURN) {
            return;
        }
        if shutdown.signal().is_some() && *until.get_or_insert(Instant::now() + LAST_WORK) < Instant::now() {
            say!("\r\nclade: a request has not ended {} s after the signal, and is cut off\r", LAST_WORK.as_secs());
            return;
        }
    }
}

/// Waits until no VM in another process reads files of `disks` that have overlays to be committed.
/// A signal ends the wait, and the overlays are kept as far as they can be.
fn wait_for_processes(fleet: &Fleet, disks: &[Disk], shutdown: &ShutdownSignal) {
    if !disks.iter().any(has_overlays) {
        return;
    }
    let begun = Instant::now();
    let mut said = false;
    while fleet.leases().count() > 0 && shutdown.signal().is_none() {
        if !said && begun.elapsed() > SAY_AFTER {
            say!(
                "\r\nclade: disks are given what was written since the fork when the children in other processes have ended\r"
            );
            said = true;
        }
        std::thread::sleep(LEASE_POLL);
    }
}

/// Whether a disk has overlays that belong in its image.
fn has_overlays(disk: &Disk) -> bool {
    disk.is_forked() && !disk.config().read_only && !disk.config().ephemeral
}

fn close_at_end(fleet: &Fleet, shutdown: &ShutdownSignal) {
    if shutdown.signal().is_some() {
        fleet.close();
    }
}

/// Writes the overlays of disks back to their files, if possible, and reports the result.
fn commit_overlays(disks: Vec<Disk>) {
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
                let error = clade_vmm::error_chain(&failed.1);
                say!("\r\nclade: what was written since the VM was forked is not in {path}: {error}\r");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clade_harness::host;

    #[test]
    fn the_end_waits_for_a_vm_that_is_in_no_list_any_more() {
        if host().is_none() {
            return;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shutdown = ShutdownSignal::listen(runtime.handle()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let context = Context::open().unwrap();
        let fleet = serve_fleet(&context, dir.path(), runtime.handle()).unwrap();
        let config = Arc::new(VmConfig::bare(32 << 20, 1).unwrap());
        let kernel = Image::Bytes(clade_guests::BARE_ELF.into());
        let source = BootSource::new(kernel);
        let one = fleet.launch("one", |context| Vm::boot(context, "one", &config, &source)).unwrap();
        fleet.remove(&one);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| wait_for_all(&fleet, &shutdown));
            std::thread::sleep(3 * TURN);
            assert!(!waits.is_finished(), "its disks are in use");
            drop(one);
        });
        assert!(fleet.wait_until_unused(Duration::ZERO));
    }
}
