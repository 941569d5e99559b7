//! A worker's own side.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use clade_io::seqpacket;
use clade_memory::GuestRam;
use tokio::runtime::Handle;

use super::open::open;
use super::save::save;
use super::tie::Tie;
use super::{Answer, BootOrder, Entered, ForkOrder, Handed, Inherited, Order, Program, failed, receive, send};
use crate::ahead::ChildAhead;
use crate::control::{IdentityInfo, ProblemKind, serve_vm};
use crate::fleet::{Description, Fleet, FleetError, NameClaim, VmFiles};
use crate::flight;
use crate::secrets::Secrets;
use clade_vmm::boot::{BootError, BootImage, BootSource};
use clade_vmm::vm::{ChildOptions, Context, Endpoints, ForkImage, Overlays, SealedParts, Vm, VmError};

/// A worker's VM, which runs.
#[derive(Debug)]
pub struct Served {
    /// Its fleet: its name, its sockets, its end.
    pub fleet: Fleet,
    /// The VM.
    pub vm: Arc<Vm>,
    /// The pages it copies ahead, and the note at its end.
    pub ahead: Option<ChildAhead>,
    /// Whether it was booted and not forked: at its end, everything written to its disks since its
    /// forks is merged into their images.
    pub was_booted: bool,
    /// Ends the process with the command of the VM's session. Dropped when the VM has ended: the
    /// writes to its disks are merged whatever the command does.
    pub tie: Option<Tie>,
}

/// Carries out the orders of the process behind `socket`, until there is a VM, in a fleet of its
/// own that `runtime` serves. Returns once the VM runs, or with `None` if the starter no longer
/// wants one. Calls `before_it_runs` when its VM has a name, before it is made.
///
/// # Errors
/// When the VM cannot be made. The other process gets the error too.
pub fn serve(
    context: &Context,
    entered: &Entered,
    socket: &OwnedFd,
    runtime: &Handle,
    program: &Program,
    before_it_runs: &dyn Fn() -> io::Result<()>,
) -> Result<Option<Served>, FleetError> {
    let maker = Maker { context, entered, socket, runtime, program, before_it_runs };
    loop {
        let (order, files) = match receive(socket) {
            // The worker waited in a pool, and its starter has gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other.map_err(failed)?,
        };
        let kernel = if let Order::Boot(order) = &order { Some(order.kernel.clone()) } else { None };
        let done = match order {
            Order::Enter(_) => Err(failed(io::Error::other("it is where it was told to stay"))),
            Order::Prepare(config) => match context.prepare_vms(&Arc::from(config), 1) {
                Ok(()) => {
                    send(socket, &Answer::Ready, &[]).map_err(failed)?;
                    continue;
                }
                Err(error) => Err(error.into()),
            },
            Order::Save(order) => save(context, socket, &order).and_then(|saved| {
                send(socket, &Answer::Saved(Box::new(saved)), &[]).map_err(failed)?;
                Ok(None)
            }),
            Order::Open(order) => open(context, socket, *order).map(|()| None),
            Order::Fork(order) => maker.fork(*order, files),
            Order::Boot(order) => maker.boot(*order, files),
        };
        return done.inspect_err(|error| {
            // A missing file, or one that is not a disk: the request named it.
            let is_input = kernel.is_some() && matches!(error, FleetError::Vm(VmError::Devices(_)));
            let kind = if is_input { ProblemKind::BadConfig } else { error.problem() };
            let text = clade_vmm::error_chain(error);
            // The error is about the file's contents, and does not name it.
            let text = match &kernel {
                Some(kernel) if is_of_kernel(error) => format!("{}: {text}", kernel.display()),
                _ => text,
            };
            let answer = Answer::Failed { kind, text };
            // The starter may have gone.
            let _ = send(socket, &answer, &[]);
        });
    }
}

fn is_of_kernel(error: &FleetError) -> bool {
    use BootError::{BzImage, Elf, NotAKernel, Unpack};
    matches!(error, FleetError::Vm(VmError::Boot(NotAKernel { .. } | BzImage(_) | Unpack(_) | Elf(_))))
}

/// Unpacks an order's descriptors: the claim with its lock, the VM's files, and its interfaces.
/// From here on the process ends with the command of its session, if it has one.
fn claimed(
    entered: &Entered,
    name: &str,
    handed: Handed,
    files: Vec<OwnedFd>,
    runtime: &Handle,
) -> Result<(NameClaim, VmFiles, Endpoints, Option<Tie>), FleetError> {
    let count = files.len();
    let few = || failed(io::Error::other(format!("an order with {count} descriptors")));
    let mut files = files.into_iter();
    let claim = NameClaim::adopt(&entered.dir, name, files.next().ok_or_else(few)?)?;
    let Handed { is_tied, sockets, ends } = handed;
    let record = files.next().ok_or_else(few)?;
    flight::install(files.next().ok_or_else(few)?);
    let command = if is_tied { Some(files.next().ok_or_else(few)?) } else { None };
    let tie = command.map(|command| Tie::to(command, runtime)).transpose().map_err(failed)?;
    let sockets: BTreeMap<String, OwnedFd> = sockets.into_iter().zip(files.by_ref()).collect();
    let ends = Endpoints::handed_in(ends, files.collect()).map_err(VmError::from)?;
    Ok((claim, VmFiles::of(sockets, record).map_err(failed)?, ends, tie))
}

/// Makes the worker's VM.
struct Maker<'a> {
    context: &'a Context,
    entered: &'a Entered,
    socket: &'a OwnedFd,
    runtime: &'a Handle,
    program: &'a Program,
    before_it_runs: &'a dyn Fn() -> io::Result<()>,
}

impl Maker<'_> {
    /// Reports that the VM is made. Returns whether it is wanted, once that is known: when all
    /// others of the request are made.
    fn is_wanted(&self, vm: &Vm) -> bool {
        let (name, erased) = (vm.name().to_owned(), vm.erased().into());
        let answer = Answer::Made { name, identity: IdentityInfo::of(vm), erased };
        let told = send(self.socket, &answer, &[]).and_then(|()| seqpacket::receive(self.socket, 1));
        told.is_ok()
    }

    fn fork(&self, order: ForkOrder, files: Vec<OwnedFd>) -> Result<Option<Served>, FleetError> {
        let begun = Instant::now();
        let ForkOrder { name, shape, handed, parent, paused } = order;
        // Preparations without the image come first: the parent may still be forked.
        let fleet = serve_vm(self.context, self.runtime);
        let (claim, files, ends, tie) = claimed(self.entered, &name, handed, files, self.runtime)?;
        (self.before_it_runs)().map_err(failed)?;
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
        let image = ForkImage::import(self.context, parts, Overlays::In(&shape.overlays))?;
        if shape.config != **image.config() {
            return Err(failed(io::Error::other("the image is of a VM with another configuration")));
        }
        let (claim_took, receive_took) = (claimed - begun, received - waited);
        tracing::debug!(name, ?claim_took, ?receive_took, import_took = ?received.elapsed(), "worker");
        let before_start = self.program.before_start.as_ref().map(|hook| hook as &dyn Fn(&GuestRam));
        // The child is made without secrets, and this process drops them once it is made.
        let (withheld, secrets) = if withhold { (secrets, Secrets::Withheld) } else { (Secrets::None, secrets) };
        let make = |context: &Context| {
            let options = ChildOptions { paused: true, erase: &withheld.bytes(), before_start };
            let made = Vm::from_image_as(context, &name, &image, ends, options);
            drop(withheld);
            made
        };
        let of = parent.clone().unwrap_or_else(|| "a snapshot".to_owned());
        let run = |vm: &Vm| {
            if !self.is_wanted(vm) {
                return false;
            }
            // Its sockets are served afterwards: connections wait until then. So no client can have
            // stopped it.
            if !paused && let Err(error) = vm.resume() {
                tracing::error!(%error, name, "the VM does not run");
            }
            true
        };
        let made =
            fleet.launch(claim, files, Description { parent, labels, secrets, reports_ready: false }, make, run)?;
        let Some(vm) = made else { return Ok(None) };
        let state = if paused { ", paused" } else { "" };
        flight::note(&format!("started as a child of {of}, generation {}{state}", vm.generation()));
        let (whole, parts) = (vm.erased().whole, vm.erased().parts);
        if whole + parts > 0 {
            flight::note(&format!("secrets withheld: erased in {whole} places, and {parts} parts at pages' edges"));
        }
        if let Some(started) = self.program.started.filter(|_| !paused) {
            started(&vm);
        }
        let _ = send(self.socket, &Answer::Running, &[]);
        if let Some(said) = self.program.said.filter(|_| !paused) {
            said(&vm);
        }
        // The copies run on their own.
        let ahead = ahead.zip(<[OwnedFd; 2]>::try_from(files_ahead).ok());
        let ahead = ahead.map(|(order, [likely, note])| ChildAhead::begin(&vm, order, &likely, note));
        Ok(Some(Served { fleet, vm, ahead, was_booted: false, tie }))
    }

    fn boot(&self, order: BootOrder, files: Vec<OwnedFd>) -> Result<Option<Served>, FleetError> {
        let BootOrder { name, handed, config, kernel, initrd, cmdline, labels, secrets, paused, reports_ready } = order;
        let fleet = serve_vm(self.context, self.runtime);
        let (claim, files, ends, tie) = claimed(self.entered, &name, handed, files, self.runtime)?;
        (self.before_it_runs)().map_err(failed)?;
        let source =
            BootSource { kernel: (self.program.kernel)(&kernel), initrd: initrd.map(BootImage::File), cmdline };
        let config = Arc::new(config);
        let make = |context: &Context| Vm::boot_as(context, &name, &config, &source, ends, paused);
        let about = Description { parent: None, labels, secrets, reports_ready };
        let made = fleet.launch(claim, files, about, make, |vm| self.is_wanted(vm))?;
        let Some(vm) = made else { return Ok(None) };
        let state = if paused { ", paused" } else { "" };
        let (mib, cpus) = (vm.config().layout().bytes() >> 20, vm.config().cpus());
        flight::note(&format!("booted with {mib} MiB and {cpus} vCPUs{state}"));
        if let Some(booted) = self.program.booted {
            booted(&vm);
        }
        let _ = send(self.socket, &Answer::Running, &[]);
        Ok(Some(Served { fleet, vm, ahead: None, was_booted: true, tie }))
    }
}
