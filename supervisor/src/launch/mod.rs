//! Children and booted VMs: starts the workers that make them, all of a request or none (I13).
//!
//! The steps of a request, in their order: from `assign` on in `steps.rs`, for anything that is a
//! [`steps::Launch`]. A failure undoes the earlier steps, by the drop of their results:
//!
//! | step | where | undone by |
//! |---|---|---|
//! | the parent's record is read, the host's limits are checked, names are claimed | `claim` | `NameClaim` |
//! | the request for the parent's image is sent: it is taken while workers start | `begin_fork` | its drop: the parent runs on |
//! | workers are taken from the pool, or started; each is in its group and confined | `assign` | `Workers`, `Group` |
//! | interfaces, addresses, sockets, files and the record of each VM are made, and sent | `WorkerResources::make` | `WorkerResources` |
//! | the network hook connects the interfaces | `NetHook::up` | `Up` |
//! | closed networks are closed | `close_links` | `WorkerResources` |
//! | the image is there; the prepared worker of an only child is raised | `await_image`, `raise_start` | `RaisedStart` |
//! | workers get the image: from here on they read the memory of another process | `give_image` | `Workers` |
//! | the processes are recorded: a VM may end at once | `Processes::add` | `Processes::remove` |
//! | all VMs are made; networks of unknown state are settled | `run_together` | `Workers` |
//! | the VMs run. A failure of one ends only that one | `run_together` | nothing |
//! | files, interfaces and names are left to the VMs | `keep`, `leave` | nothing |

mod boot;
mod fork;
mod limits;
mod steps;

use std::cell::{Cell, OnceCell};
use std::sync::Arc;
use std::time::Instant;

use super::checkpoint::Checkpoint;
use super::launched_vm::LaunchedVm;
use super::launching::LaunchGuard;
use super::reidentify::expect_reachable;
use super::vm_record::VmRecord;
use super::{ImagePermit, Supervisor};
use clade_api::http::Cancel;
use clade_api::{DaemonError, ErasedInfo, ForkAnswer, ForkRequest, NameClaim, ProblemKind, check_names, claim_names};
use clade_devices::virtio::net::Link;
use clade_worker::VmTemplate;
use clade_worker::ahead::Learning;
use clade_worker::host_limits::{ResourceDemand, check_host_limits, check_share};
use fork::Children;

/// The source of children.
pub(super) struct ChildSource<'a> {
    pub(super) vm_record: &'a VmRecord,
    /// The VM, if it is not the image of a snapshot.
    pub(super) vm: Option<&'a str>,
    /// Whether the network of its children is open unless they are made with another state. None
    /// until a worker has read the state of its devices.
    pub(super) network: Option<Link>,
    /// Learns the pages that its children write, if that is wanted.
    pub(super) learning: Option<&'a Arc<Learning>>,
    /// Returns the image once it is there: it is requested after the workers have their requests.
    pub(super) image: &'a dyn Fn() -> Result<&'a Checkpoint, DaemonError>,
}

/// Refuses to detach children of a checkpoint or a snapshot.
///
/// # Errors
/// When that is requested.
pub(super) fn expect_no_detach(request: &ForkRequest) -> Result<(), DaemonError> {
    if !request.detach {
        return Ok(());
    }
    let text = "detach: only the fork of a VM is detached. Take a detached checkpoint, and fork that".to_owned();
    Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text })
}

/// Returns the count of secrets erased in each of the children made without secrets.
fn erased(made: &[LaunchedVm], request: &ForkRequest) -> Option<ErasedInfo> {
    made.first().filter(|_| request.without_secrets).map(|child| child.erased)
}

impl Supervisor {
    /// Forks a VM, in whichever process it runs, into children of one instant.
    ///
    /// # Errors
    /// When there is no such VM, or a child cannot be made: then none is made (I13). The parent
    /// runs on.
    pub(crate) fn fork_vm(
        &self,
        vm: &str,
        request: &ForkRequest,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        check_names(request.count, request.name.as_deref())?;
        if request.detach {
            return self.fork_detached(vm, request, permit, cancel);
        }
        // Before the request for its image: when that is there, the VM's files may be another's.
        let vm_record = VmRecord::expect(&self.0.dir, vm)?;
        self.expect_enforced(vm_record.bounds)?;
        let line = self.0.kept_lines.now(vm, vm_record.process);
        // Before the parent is paused: a refused request costs it nothing.
        let (claims, _launching) = self.claim(vm, request, &vm_record.template, cancel)?;
        let claimed = Instant::now();
        // Its fork and the starts of the children's workers run side by side.
        let (pending_fork, raised) = self.begin_fork(vm, &vm_record)?;
        let pending_fork = Cell::new(Some((pending_fork, raised, permit)));
        let taken = OnceCell::new();
        let image = || match (taken.get(), pending_fork.take()) {
            (Some(taken), _) => Ok(taken),
            (None, Some((pending_fork, _raised, _permit))) => {
                let check = || self.check(0, request.count, cancel);
                let before = (vm_record.clone(), line.clone());
                let checkpoint = Checkpoint::of_pending(&self.0.dir, vm, before, pending_fork, &check)?;
                tracing::debug!(vm, claim = ?claimed - begun, image = ?claimed.elapsed(), "fork");
                Ok(taken.get_or_init(|| checkpoint))
            }
            // The request for it has failed.
            (None, None) => Err(DaemonError::Ending),
        };
        let made = self.start_children(
            &ChildSource {
                vm_record: &vm_record,
                vm: Some(vm),
                network: vm_record.network,
                learning: None,
                image: &image,
            },
            claims,
            request,
            cancel,
        )?;
        Ok(self.forked(vm, request, made, image()?, begun))
    }

    /// Forks a VM into children that start from copies of what its process can write.
    fn fork_detached(
        &self,
        vm: &str,
        request: &ForkRequest,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        let vm_record = VmRecord::expect(&self.0.dir, vm)?;
        self.expect_enforced(vm_record.bounds)?;
        let (claims, _launching) = self.claim(vm, request, &vm_record.template, cancel)?;
        let image = self.detached_image(vm, permit, cancel)?;
        let (vm_record, network) = (image.vm_record(), image.network());
        let origin = ChildSource { vm_record, vm: Some(vm), network, learning: None, image: &|| Ok(&image) };
        let made = self.start_children(&origin, claims, request, cancel)?;
        Ok(self.forked(vm, request, made, &image, begun))
    }

    /// Starts children from a checkpoint.
    ///
    /// # Errors
    /// As for a VM's.
    pub(crate) fn fork_checkpoint(
        &self,
        name: &str,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, DaemonError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        check_names(request.count, request.name.as_deref())?;
        expect_no_detach(request)?;
        let checkpoint = self.checkpoint_of(name, cancel)?;
        self.expect_enforced(checkpoint.vm_record().bounds)?;
        let (claims, _launching) = self.claim(name, request, &checkpoint.vm_record().template, cancel)?;
        let made = self.start_children_of(&checkpoint, claims, request, cancel)?;
        Ok(self.forked(name, request, made, &checkpoint, begun))
    }

    /// Reports children of `stem`, which `request` has made of `image` since `begun`. Returns the
    /// answer.
    fn forked(
        &self,
        stem: &str,
        request: &ForkRequest,
        made: Vec<LaunchedVm>,
        image: &Checkpoint,
        begun: Instant,
    ) -> ForkAnswer {
        let erased = erased(&made, request);
        let answer = image.answer(made, begun.elapsed(), erased);
        self.0.events.forked(stem, &answer.children, answer.pause_us);
        answer
    }

    /// Claims the names of children of `template`, after a check that the host has room, and marks them as being made.
    /// [`check_names`] comes first.
    pub(super) fn claim(
        &self,
        stem: &str,
        request: &ForkRequest,
        template: &VmTemplate,
        cancel: &Cancel,
    ) -> Result<(Vec<NameClaim>, LaunchGuard<'_>), DaemonError> {
        let count = request.count;
        if request.ready {
            expect_reachable(stem, &template.config)?;
        }
        check_host_limits(count, ResourceDemand::of(&template.config))
            .map_err(|source| DaemonError::HostLimit { count, source })?;
        let share = |running: usize| {
            if request.overcommit {
                return Ok(());
            }
            // Those made paused that are to be ready will run.
            let stay_paused = request.paused && !request.ready;
            let running = if stay_paused { None } else { Some(running) };
            check_share(count, running).map_err(|source| DaemonError::HostLimit { count, source })
        };
        let (mut launching, listed) = self.0.launching.begin_unnamed(count, || self.0.processes.names(), share)?;
        let check = || self.check(0, count, cancel);
        let listed = |name: &str| listed.contains(name);
        let claims = claim_names(&self.0.dir, stem, count, request.name.as_deref(), listed, check)?;
        launching.name(&claims);
        // Even if the children cannot be made: the drop of a claim removes what is known of an earlier VM.
        claims.iter().for_each(|claim| self.0.forget_earlier(&claim.name));
        Ok((claims, launching))
    }

    /// Starts children from an existing image.
    pub(super) fn start_children_of(
        &self,
        checkpoint: &Checkpoint,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<LaunchedVm>, DaemonError> {
        let learning = Some(checkpoint.learning());
        let origin = ChildSource {
            vm_record: checkpoint.vm_record(),
            vm: checkpoint.vm(),
            network: checkpoint.network(),
            learning,
            image: &|| Ok(checkpoint),
        };
        self.start_children(&origin, claims, request, cancel)
    }

    /// Starts children of `origin`: all or none (I13).
    ///
    /// # Errors
    /// When one cannot be made.
    pub(super) fn start_children(
        &self,
        origin: &ChildSource<'_>,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<LaunchedVm>, DaemonError> {
        let children = Children::new(self, origin, request, claims.len(), cancel)?;
        // Held while any is made: a worker's grants must name existing directories.
        let _overlays = self.0.overlays.hold(&origin.vm_record.template.written())?;
        let made = self.make(&children, &claims).map_err(|error| children.reason(error))?;
        // Of a worker that was replaced, the later process counts.
        self.note_children((origin.image)()?, &children.processes());
        claims.into_iter().for_each(NameClaim::leave);
        Ok(made)
    }
}
