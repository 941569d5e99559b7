//! A worker's own side.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use clade_io::seqpacket;
use clade_memory::GuestRam;
use tokio::runtime::Handle;

use super::{Answer, BootOrder, ForkOrder, Order, Program, receive, send};
use crate::control::{IdentityInfo, serve_fleet, status_of};
use crate::fleet::{Fleet, FleetError, NameClaim};
use clade_vmm::boot::{BootSource, Image};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, SealedParts, Vm, VmError};

/// The HTTP status of a request that cannot be done as it is.
const BAD_REQUEST: u16 = 400;

/// A worker's VM, which runs.
#[derive(Debug)]
pub struct Served {
    /// The fleet that it is in.
    pub fleet: Fleet,
    /// The VM, if it was booted and not forked: what it has written to its disks since its forks
    /// belongs in their images when it ends.
    pub booted: Option<Arc<Vm>>,
}

/// Does what the process behind `socket` orders, until there is a VM, in a fleet of its own that
/// `runtime` serves. Returns once the VM runs, with `None` if none is wanted any more. Calls
/// `before_it_runs` when the VM is wanted, before it is listed.
///
/// # Errors
/// When the VM cannot be made, which the other process is told.
pub fn serve(
    context: &Context,
    socket: &OwnedFd,
    runtime: &Handle,
    program: &Program,
    before_it_runs: &dyn Fn() -> io::Result<()>,
) -> Result<Option<Served>, FleetError> {
    let maker = Maker { context, socket, runtime, program, before_it_runs };
    loop {
        let (order, files) = match receive(socket) {
            // It waited in a pool, and whoever kept it there has gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other.map_err(failed)?,
        };
        let boots = matches!(&order, Order::Boot(_));
        let done = match order {
            Order::Prepare(config) => match context.prepare_vms(&Arc::from(config), 1) {
                Ok(()) => {
                    send(socket, &Answer::Ready, &[]).map_err(failed)?;
                    continue;
                }
                Err(error) => Err(error.into()),
            },
            Order::Fork(order) => maker.fork(&order, files),
            Order::Boot(order) => maker.boot(&order, files),
        };
        return done.inspect_err(|error| {
            // A file that is not there, or no disk: whoever asks has named it.
            let is_input = boots && matches!(error, FleetError::Vm(VmError::Devices(_)));
            let status = if is_input { BAD_REQUEST } else { status_of(error) };
            let answer = Answer::Failed { status, text: clade_vmm::error_chain(error) };
            // Whoever ordered it may have gone.
            let _ = send(socket, &answer, &[]);
        });
    }
}

fn failed(source: io::Error) -> FleetError {
    FleetError::Worker { source }
}

/// The claim whose lock came with an order.
fn claimed(fleet: &Fleet, name: &str, files: Vec<OwnedFd>) -> Result<NameClaim, FleetError> {
    let [lock] = <[OwnedFd; 1]>::try_from(files)
        .map_err(|files| failed(io::Error::other(format!("an order with {} descriptors", files.len()))))?;
    NameClaim::adopt(fleet.dir(), name, lock)
}

/// Makes the worker's VM.
struct Maker<'a> {
    context: &'a Context,
    socket: &'a OwnedFd,
    runtime: &'a Handle,
    program: &'a Program,
    before_it_runs: &'a dyn Fn() -> io::Result<()>,
}

impl Maker<'_> {
    /// Says that the VM is made. Returns whether it is wanted, once that is known: when all others
    /// of the request are made.
    fn is_wanted(&self, vm: &Vm) -> bool {
        let answer = Answer::Made { name: vm.name().to_owned(), identity: IdentityInfo::of(vm) };
        let told = send(self.socket, &answer, &[]).and_then(|()| seqpacket::receive(self.socket, 1));
        told.is_ok_and(|_| match (self.before_it_runs)() {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "the VM cannot run");
                false
            }
        })
    }

    fn fork(&self, order: &ForkOrder, files: Vec<OwnedFd>) -> Result<Option<Served>, FleetError> {
        let begun = Instant::now();
        let parts = SealedParts::receive(self.socket)?.open()?;
        let received = Instant::now();
        let image = ForkImage::import(self.context, parts)?;
        let imported = Instant::now();
        let fleet = serve_fleet(self.context, &order.dir, self.runtime)?;
        let claim = claimed(&fleet, &order.name, files)?;
        fleet.set_labels(&order.name, order.labels.clone());
        let (receive, import) = (received - begun, imported - received);
        tracing::debug!(name = order.name, ?receive, ?import, claim = ?imported.elapsed(), "worker");
        let before_start = self.program.before_start.as_ref().map(|hook| hook as &dyn Fn(&GuestRam));
        let options = ChildOptions { paused: true, before_start };
        let make = |context: &Context| {
            let ends = image.endpoints(&order.name, &order.identity)?;
            Vm::from_image_as(context, &order.name, &image, ends, options)
        };
        let made = fleet.launch_claimed(claim, order.parent.as_deref(), make, |vm| self.is_wanted(vm))?;
        let Some(vm) = made else { return Ok(None) };
        if !order.paused {
            // Another request may have stopped it already: it is listed.
            let _ = vm.resume();
            if let Some(started) = self.program.started {
                started(&vm);
            }
        }
        let _ = send(self.socket, &Answer::Running, &[]);
        if let Some(said) = self.program.said.filter(|_| !order.paused) {
            said(&vm);
        }
        Ok(Some(Served { fleet, booted: None }))
    }

    fn boot(&self, order: &BootOrder, files: Vec<OwnedFd>) -> Result<Option<Served>, FleetError> {
        let fleet = serve_fleet(self.context, &order.dir, self.runtime)?;
        let claim = claimed(&fleet, &order.name, files)?;
        fleet.set_labels(&order.name, order.labels.clone());
        let source = BootSource {
            kernel: (self.program.kernel)(&order.kernel),
            initrd: order.initrd.clone().map(Image::File),
            cmdline: order.cmdline.clone(),
        };
        let config = Arc::new(order.config.clone());
        let make = |context: &Context| Vm::boot(context, &order.name, &config, &source);
        let Some(vm) = fleet.launch_claimed(claim, None, make, |vm| self.is_wanted(vm))? else { return Ok(None) };
        let _ = send(self.socket, &Answer::Running, &[]);
        Ok(Some(Served { fleet, booted: Some(vm) }))
    }
}
