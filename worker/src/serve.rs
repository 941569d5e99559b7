//! A worker's own side.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use clade_host_io::seqpacket;
use clade_memory::GuestRam;
use tokio::runtime::Handle;

use super::detach::detach;
use super::open::open;
use super::parent_death::ParentDeath;
use super::save::save;
use super::{
    ConfinedWorker, Inherited, PassedFds, Program, StartBootRequest, StartChildRequest, WorkerAnswer, WorkerRequest,
    failed, receive, send,
};
use crate::ahead::ChildAhead;
use crate::heap::touch_ahead;
use crate::image::network_of;
use crate::rpc::serve_vm;
use crate::vm_host::{VmDescription, VmHost};
use clade_api::secrets::Secrets;
use clade_api::{DaemonError, NameClaim, ProblemKind, VmFiles, flight};
use clade_vmm::boot::{BootError, BootImage, BootSource};
use clade_vmm::vm::{Admission, ChildOptions, Context, Endpoints, ForkImage, Overlays, SealedParts, Vm, VmError};

/// A worker's VM, which runs.
#[derive(Debug)]
pub struct Served {
    /// Its VM host: its name, its sockets, its end.
    pub vm_host: VmHost,
    /// The VM.
    pub vm: Arc<Vm>,
    /// The pages it copies ahead, and the note at its end.
    pub ahead: Option<ChildAhead>,
    /// Whether it was booted and not forked: at its end, everything written to its disks since its
    /// forks is merged into their images.
    pub was_booted: bool,
    /// Ends the process with the command of the VM's session. Dropped when the VM has ended: the
    /// writes to its disks are merged whatever the command does.
    pub parent_death: Option<ParentDeath>,
}

/// Steps of the process beside its VM.
#[derive(Clone, Copy)]
pub struct WorkerHooks<'a> {
    /// Called once the worker is prepared for a VM, which may be long before there is one.
    pub prepared: &'a dyn Fn() -> io::Result<()>,
    /// Called when the VM has a name, before the VM is made.
    pub before_it_runs: &'a dyn Fn() -> io::Result<()>,
}

impl std::fmt::Debug for WorkerHooks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkerHooks")
    }
}

/// Carries out the requests of the process behind `socket`, until there is a VM, in a VM host of
/// its own that `runtime` serves. Returns once the VM runs, or with `None` if the starter no longer
/// wants one.
///
/// # Errors
/// When the VM cannot be made. The other process gets the error too.
pub fn serve(
    context: &Context,
    confined: &ConfinedWorker,
    socket: &OwnedFd,
    runtime: &Handle,
    program: &Program,
    hooks: WorkerHooks<'_>,
) -> Result<Option<Served>, DaemonError> {
    let launcher = VmLauncher { context, confined, socket, runtime, program, hooks };
    loop {
        let (request, files) = match receive(socket) {
            // The worker waited in a pool, and its starter has gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other.map_err(failed)?,
        };
        let kernel = if let WorkerRequest::Boot(request) = &request { Some(request.kernel.clone()) } else { None };
        let done = match request {
            WorkerRequest::Confine(_) => Err(failed(io::Error::other("a second request to confine the worker"))),
            WorkerRequest::Prepare(config) => match context.prepare_vms(&Arc::from(config), 1) {
                Ok(()) => {
                    (hooks.prepared)().map_err(failed)?;
                    touch_ahead();
                    send(socket, &WorkerAnswer::Ready, &[]).map_err(failed)?;
                    continue;
                }
                Err(error) => Err(error.into()),
            },
            WorkerRequest::Save(request) => save(context, socket, &request).and_then(|saved| {
                send(socket, &WorkerAnswer::Saved(Box::new(saved)), &[]).map_err(failed)?;
                Ok(None)
            }),
            WorkerRequest::Open(request) => open(context, socket, *request).map(|()| None),
            WorkerRequest::Detach(request) => detach(context, socket, *request).map(|()| None),
            WorkerRequest::Fork(request) => launcher.fork(*request, files),
            WorkerRequest::Boot(request) => launcher.boot(*request, files),
        };
        return done.inspect_err(|error| {
            // A missing file, or one that is not a disk: the request named it.
            let is_input = kernel.is_some() && matches!(error, DaemonError::Vm(VmError::Devices(_)));
            let kind = if is_input { ProblemKind::BadConfig } else { error.problem() };
            let text = clade_vmm::error_chain(error);
            // The error is about the file's contents, and does not name it.
            let text = match &kernel {
                Some(kernel) if is_of_kernel(error) => format!("{}: {text}", kernel.display()),
                _ => text,
            };
            let answer = WorkerAnswer::Failed { kind, text };
            // The starter may have gone.
            let _ = send(socket, &answer, &[]);
        });
    }
}

fn is_of_kernel(error: &DaemonError) -> bool {
    use BootError::{BzImage, Elf, NotAKernel, Unpack};
    matches!(error, DaemonError::Vm(VmError::Boot(NotAKernel { .. } | BzImage(_) | Unpack(_) | Elf(_))))
}

/// Unpacks a request's descriptors: the claim with its lock, the VM's files, and its interfaces.
/// From here on the process ends with the command of its session, if it has one.
fn claimed(
    confined: &ConfinedWorker,
    name: &str,
    passed_fds: PassedFds,
    files: Vec<OwnedFd>,
    runtime: &Handle,
) -> Result<(NameClaim, VmFiles, Endpoints, Option<ParentDeath>), DaemonError> {
    let count = files.len();
    let few = || failed(io::Error::other(format!("a request with {count} descriptors")));
    let mut files = files.into_iter();
    let claim = NameClaim::adopt(&confined.dir, name, files.next().ok_or_else(few)?)?;
    let PassedFds { ends_with_command, sockets, ends } = passed_fds;
    let record = files.next().ok_or_else(few)?;
    flight::install(files.next().ok_or_else(few)?);
    let command = if ends_with_command { Some(files.next().ok_or_else(few)?) } else { None };
    let parent_death = command.map(|command| ParentDeath::watch(command, runtime)).transpose().map_err(failed)?;
    let sockets: BTreeMap<String, OwnedFd> = sockets.into_iter().zip(files.by_ref()).collect();
    let ends = Endpoints::handed_in(ends, files.collect()).map_err(VmError::from)?;
    Ok((claim, VmFiles::of(sockets, record).map_err(failed)?, ends, parent_death))
}

/// Reports that a VM is `made` to the process behind `socket`. Returns whether it is wanted, once that is known: when all
/// others of the request are made.
fn is_wanted(socket: &OwnedFd, made: &WorkerAnswer) -> bool {
    let told = send(socket, made, &[]).and_then(|()| seqpacket::receive(socket, 1));
    told.is_ok()
}

/// Makes the worker's VM.
struct VmLauncher<'a> {
    context: &'a Context,
    confined: &'a ConfinedWorker,
    socket: &'a OwnedFd,
    runtime: &'a Handle,
    program: &'a Program,
    hooks: WorkerHooks<'a>,
}

impl VmLauncher<'_> {
    /// Returns the report that the VM is made.
    fn made(vm: &Vm) -> WorkerAnswer {
        let (identity, erased) = (crate::describe::identity(vm), vm.erased().into());
        WorkerAnswer::Made { identity, erased, network: network_of(vm) }
    }

    /// Lets a VM that was made paused run, unless it is no longer wanted or is to stay `paused`.
    /// Its sockets are served afterwards: connections wait until then. So no client can have
    /// stopped it. `note` comes first: a vCPU may stop the VM at its first instruction, and the
    /// record would have its end before its start.
    fn admit(&self, vm: &Vm, paused: bool, note: impl FnOnce()) -> bool {
        if !is_wanted(self.socket, &Self::made(vm)) {
            return false;
        }
        note();
        if !paused && let Err(error) = vm.resume() {
            tracing::error!(%error, name = vm.name(), "the VM does not run");
        }
        true
    }

    fn fork(&self, request: StartChildRequest, files: Vec<OwnedFd>) -> Result<Option<Served>, DaemonError> {
        let begun = Instant::now();
        let StartChildRequest { name, template, passed_fds, parent, paused } = request;
        // Preparations without the image come first: the parent may still be forked.
        let vm_host = serve_vm(self.context, self.runtime);
        let (claim, files, ends, parent_death) = claimed(self.confined, &name, passed_fds, files, self.runtime)?;
        (self.hooks.before_it_runs)().map_err(failed)?;
        let claimed = Instant::now();
        let (Inherited { labels, secrets, withhold, ahead }, files_ahead) = match receive(self.socket) {
            Ok(inherited) => inherited,
            // No image comes: the parent could not be forked, or another worker has failed.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let waited = Instant::now();
        let parts = SealedParts::receive(self.socket)?.open()?;
        let received = Instant::now();
        let image = ForkImage::import(self.context, parts, Overlays::In(&template.overlays))?;
        if template.config != **image.config() {
            return Err(failed(io::Error::other("the image is of a VM with another configuration")));
        }
        let (claim_took, receive_took) = (claimed - begun, received - waited);
        tracing::debug!(name, ?claim_took, ?receive_took, import_took = ?received.elapsed(), "worker");
        let before_start = self.program.before_start.as_ref().map(|hook| hook as &dyn Fn(&GuestRam));
        // The child is made without secrets, and this process drops them once it is made.
        let (withheld, secrets) = if withhold { (secrets, Secrets::Withheld) } else { (Secrets::None, secrets) };
        let of = parent.clone().unwrap_or_else(|| "a snapshot".to_owned());
        let note = move |vm: &Vm| {
            let state = if paused { ", paused" } else { "" };
            let mut lines = vec![format!("started as a child of {of}, generation {}{state}", vm.generation())];
            let (whole, parts) = (vm.erased().whole, vm.erased().parts);
            if whole + parts > 0 {
                lines.push(format!("secrets withheld: erased in {whole} places, and {parts} parts at pages' edges"));
            }
            lines
        };
        let socket = Arc::new(self.socket.try_clone().map_err(failed)?);
        let write = |lines: &[String]| lines.iter().for_each(|line| flight::note(line));
        // Asked by the vCPU's thread, which then runs the guest. As in `admit`, the note comes first.
        let admission = |vm: &Vm| -> Admission {
            let (socket, made, lines) = (Arc::clone(&socket), Self::made(vm), note(vm));
            Arc::new(move || {
                let is_wanted = is_wanted(&socket, &made);
                if is_wanted {
                    write(&lines);
                }
                is_wanted
            })
        };
        // Withheld secrets are dropped before the guest runs.
        let asks_itself = !paused && !withhold;
        let make = |context: &Context| {
            let options = ChildOptions { paused: !asks_itself, erase: &withheld.bytes(), before_start };
            let admission = asks_itself.then_some(&admission as &dyn Fn(&Vm) -> Admission);
            let made = Vm::from_image_if(context, &name, &image, ends, options, admission);
            drop(withheld);
            made
        };
        let run = |vm: &Vm| asks_itself || self.admit(vm, paused, || write(&note(vm)));
        let made =
            vm_host.launch(claim, files, VmDescription { parent, labels, secrets, reports_ready: false }, make, run);
        let vm = match made {
            Err(DaemonError::Vm(VmError::Unwanted)) | Ok(None) => return Ok(None),
            Ok(Some(vm)) => vm,
            Err(error) => return Err(error),
        };
        if let Some(started) = self.program.started.filter(|_| !paused) {
            started(&vm);
        }
        let _ = send(self.socket, &WorkerAnswer::Running, &[]);
        if let Some(said) = self.program.said.filter(|_| !paused) {
            said(&vm);
        }
        // The copies run on their own.
        let ahead = ahead.zip(<[OwnedFd; 2]>::try_from(files_ahead).ok());
        let ahead = ahead.map(|(request, [likely, note])| ChildAhead::begin(&vm, request, &likely, note));
        Ok(Some(Served { vm_host, vm, ahead, was_booted: false, parent_death }))
    }

    fn boot(&self, request: StartBootRequest, files: Vec<OwnedFd>) -> Result<Option<Served>, DaemonError> {
        let StartBootRequest {
            name,
            passed_fds,
            config,
            kernel,
            initrd,
            cmdline,
            labels,
            secrets,
            paused,
            reports_ready,
        } = request;
        let vm_host = serve_vm(self.context, self.runtime);
        let (claim, files, ends, parent_death) = claimed(self.confined, &name, passed_fds, files, self.runtime)?;
        (self.hooks.before_it_runs)().map_err(failed)?;
        let source =
            BootSource { kernel: (self.program.kernel)(&kernel), initrd: initrd.map(BootImage::File), cmdline };
        let config = Arc::new(config);
        let make = |context: &Context| Vm::boot_as(context, &name, &config, &source, ends, true);
        let run = |vm: &Vm| {
            self.admit(vm, paused, || {
                let state = if paused { ", paused" } else { "" };
                let (mib, cpus) = (vm.config().layout().bytes() >> 20, vm.config().cpus());
                flight::note(&format!("booted with {mib} MiB and {cpus} vCPUs{state}"));
            })
        };
        let description = VmDescription { parent: None, labels, secrets, reports_ready };
        let made = vm_host.launch(claim, files, description, make, run)?;
        let Some(vm) = made else { return Ok(None) };
        if let Some(booted) = self.program.booted {
            booted(&vm);
        }
        let _ = send(self.socket, &WorkerAnswer::Running, &[]);
        Ok(Some(Served { vm_host, vm, ahead: None, was_booted: true, parent_death }))
    }
}
