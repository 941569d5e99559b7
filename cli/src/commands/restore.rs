//! `clade restore`: starts VMs from a snapshot.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

use crate::commands::args::RestoreArgs;
use crate::commands::run::{foreground, say, wait_for_all, with_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome};
use clade_daemon::control::serve_fleet;
use clade_daemon::fleet::{Children, FleetError, runtime_dir};
use clade_vmm::vm::{
    ChildIdentity, ChildOptions, Context, ForkImage, RestoreLoad, RestoreOptions, SnapshotError, VmError,
};

/// Errors of the snapshot and of the arguments are input errors; errors of this host are not.
fn failure(error: FleetError) -> Failure {
    use clade_snapshot::Error;
    match error {
        FleetError::Vm(VmError::VcpuState(_) | VmError::Call { .. } | VmError::Thread(_) | VmError::Ram(_)) => {
            Failure::run(error)
        }
        FleetError::Snapshot(ref cause)
            if matches!(**cause, SnapshotError::Vm(_) | SnapshotError::Files(Error::Memory(_))) =>
        {
            Failure::run(error)
        }
        _ => Failure::input(error),
    }
}

/// Derives a VM's name from the directory's name.
fn stem(dir: &Path) -> String {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let fits = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let name: String = name.chars().map(fits).take(32).collect();
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) { name } else { format!("vm{name}") }
}

pub(crate) fn main(args: &RestoreArgs) -> Outcome {
    let begun = Instant::now();
    let context = Context::open().map_err(Failure::input)?;
    let load = match (args.preload, args.working_set) {
        (true, _) => RestoreLoad::Preload,
        (_, true) => RestoreLoad::WorkingSet,
        _ => RestoreLoad::Lazy,
    };
    let options = RestoreOptions { load, overlays: args.overlays.clone(), sockets: Some(runtime_dir()) };
    // Absolute, but links are not resolved: the path names the directory as the user does.
    let dir = std::path::absolute(&args.dir).map_err(Failure::input)?;
    let image = ForkImage::restore(&context, &dir, &options).map_err(|error| failure(error.into()))?;
    with_runtime(|runtime| start(args, &context, &dir, image, begun, runtime))
}

fn start(
    args: &RestoreArgs,
    context: &Context,
    dir: &Path,
    image: Arc<ForkImage>,
    begun: Instant,
    runtime: &Handle,
) -> Outcome {
    // Before there is anything to clean up.
    let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
    let fleet = serve_fleet(context, &runtime_dir(), runtime).map_err(Failure::input)?;
    let identity = ChildIdentity { nets: args.child.net.clone(), vsock: args.child.vsock.clone() };
    let wanted = Children { count: args.count, pattern: args.pattern.as_deref(), identity: &identity };
    let child = ChildOptions { paused: args.child.paused, before_start: None };
    let vms = fleet.start(&stem(dir), &wanted, &image, child, shutdown.making());
    drop(image);
    let vms = match vms {
        Ok(vms) => vms,
        Err(error) => return Err(shutdown.signal().map_or_else(|| failure(error), Failure::Signal)),
    };
    let took = begun.elapsed().as_secs_f64() * 1e3;
    let vm = match <[_; 1]>::try_from(vms) {
        Ok([vm]) => vm,
        Err(vms) => {
            for vm in &vms {
                drop(writeln!(io::stdout(), "{}", vm.name()));
            }
            say!("{} VMs restored from {} in {took:.1} ms", vms.len(), dir.display());
            drop(vms);
            wait_for_all(&fleet, &shutdown);
            fleet.finish();
            return shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)));
        }
    };
    say!("{} restored from {} in {took:.1} ms\r", vm.name(), dir.display());
    foreground(&fleet, vm, args.detached, &shutdown, runtime)
}
