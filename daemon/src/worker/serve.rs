//! A worker's own side.

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
/// `runtime` serves. Returns once the VM runs, with `None` if none is wanted any more.
///
/// # Errors
/// When the VM cannot be made, which the other process is told.
pub fn serve(
    context: &Context,
    socket: &OwnedFd,
    runtime: &Handle,
    program: &Program,
) -> Result<Option<Served>, FleetError> {
    let failed = |source| FleetError::Worker { source };
    let (fleet, vm, paused, boots) = loop {
        let (order, files) = match receive(socket) {
            // It waited in a pool, and whoever kept it there has gone.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other.map_err(failed)?,
        };
        let paused = matches!(&order, Order::Fork(order) if order.paused);
        let boots = matches!(&order, Order::Boot(_));
        let done = match order {
            Order::Prepare(config) => {
                context.prepare_vms(&Arc::from(config), 1).map(|()| None).map_err(FleetError::from)
            }
            Order::Fork(order) => fork(context, &order, files, socket, runtime, program).map(Some),
            Order::Boot(order) => boot(context, &order, files, runtime, program).map(Some),
        };
        match done {
            Ok(Some((fleet, vm))) => break (fleet, vm, paused, boots),
            Ok(None) => send(socket, &Answer::Ready, &[]).map_err(failed)?,
            Err(error) => {
                // A file that is not there, or no disk: whoever asks has named it.
                let is_input = boots && matches!(error, FleetError::Vm(VmError::Devices(_)));
                let status = if is_input { BAD_REQUEST } else { status_of(&error) };
                let answer = Answer::Failed { status, text: clade_vmm::error_chain(&error) };
                // Whoever ordered it may have gone.
                let _ = send(socket, &answer, &[]);
                return Err(error);
            }
        }
    };
    let answer = Answer::Made { name: vm.name().to_owned(), identity: IdentityInfo::of(&vm) };
    if send(socket, &answer, &[]).and_then(|()| seqpacket::receive(socket, 1)).is_err() {
        fleet.close();
        return Ok(None);
    }
    if !paused {
        // Another request may have stopped it already: it is listed.
        let _ = vm.resume();
        if let Some(started) = program.started {
            started(&vm);
        }
    }
    let _ = send(socket, &Answer::Running, &[]);
    if let Some(said) = program.said.filter(|_| !paused) {
        said(&vm);
    }
    Ok(Some(Served { fleet, booted: boots.then_some(vm) }))
}

/// The claim whose lock came with an order.
fn claimed(fleet: &Fleet, name: &str, files: Vec<OwnedFd>) -> Result<NameClaim, FleetError> {
    let [lock] = <[OwnedFd; 1]>::try_from(files).map_err(|files| FleetError::Worker {
        source: std::io::Error::other(format!("an order with {} descriptors", files.len())),
    })?;
    NameClaim::adopt(fleet.dir(), name, lock)
}

fn fork(
    context: &Context,
    order: &ForkOrder,
    files: Vec<OwnedFd>,
    socket: &OwnedFd,
    runtime: &Handle,
    program: &Program,
) -> Result<(Fleet, Arc<Vm>), FleetError> {
    let begun = Instant::now();
    let parts = SealedParts::receive(socket)?.open()?;
    let received = Instant::now();
    let image = ForkImage::import(context, parts)?;
    let imported = Instant::now();
    let fleet = serve_fleet(context, &order.dir, runtime)?;
    let claim = claimed(&fleet, &order.name, files)?;
    let (receive, import) = (received - begun, imported - received);
    tracing::debug!(name = order.name, ?receive, ?import, claim = ?imported.elapsed(), "worker");
    let before_start = program.before_start.as_ref().map(|hook| hook as &dyn Fn(&GuestRam));
    let options = ChildOptions { paused: true, before_start };
    let vm = fleet.start_claimed(claim, order.parent.as_deref(), &order.identity, &image, options)?;
    Ok((fleet, vm))
}

fn boot(
    context: &Context,
    order: &BootOrder,
    files: Vec<OwnedFd>,
    runtime: &Handle,
    program: &Program,
) -> Result<(Fleet, Arc<Vm>), FleetError> {
    let fleet = serve_fleet(context, &order.dir, runtime)?;
    let claim = claimed(&fleet, &order.name, files)?;
    let source = BootSource {
        kernel: (program.kernel)(&order.kernel),
        initrd: order.initrd.clone().map(Image::File),
        cmdline: order.cmdline.clone(),
    };
    let config = Arc::new(order.config.clone());
    let vm = fleet.launch_claimed(claim, |context| Vm::boot(context, &order.name, &config, &source))?;
    Ok((fleet, vm))
}
