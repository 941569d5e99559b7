//! VMs that are made together: all of them or none.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use super::dir::{NameClaim, RuntimeDir};
use super::error::{CancelReason, FleetError, MAX_CHILDREN};
use super::{Children, Fleet, release, room};
use clade_vmm::vm::{ChildIdentity, ChildOptions, Endpoints, ForkImage, Vm, VmConfig, VmError};

/// Cancels a request. A clone cancels the same request.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicU8>);

const CLIENT_GONE: u8 = 1;
const ENDING: u8 = 2;

impl Cancel {
    /// Cancels because the client has gone.
    pub(crate) fn client_gone(&self) {
        self.set(CLIENT_GONE);
    }

    /// Cancels because the process ends.
    pub fn ending(&self) {
        self.set(ENDING);
    }

    fn set(&self, reason: u8) {
        // Relaxed: read between two children, and nothing is published through it.
        self.0.store(reason, Ordering::Relaxed);
    }

    pub(crate) fn reason(&self) -> Option<CancelReason> {
        match self.0.load(Ordering::Relaxed) {
            CLIENT_GONE => Some(CancelReason::ClientGone),
            ENDING => Some(CancelReason::Ending),
            _ => None,
        }
    }
}

/// The VM that a batch is forked from. It may end meanwhile: the request holds no handle.
pub(crate) struct Parent {
    name: String,
    vm: Weak<Vm>,
}

impl Parent {
    pub(crate) fn new(vm: &Arc<Vm>) -> Self {
        Self { name: vm.name().to_owned(), vm: Arc::downgrade(vm) }
    }

    fn has_stopped(&self) -> bool {
        self.vm.upgrade().is_none_or(|vm| vm.stopped().is_some())
    }
}

/// VMs that are made together.
pub(crate) struct Batch<'a> {
    pub(super) fleet: &'a Fleet,
    pub(super) count: usize,
    pub(super) parent: Option<Parent>,
    pub(super) cancel: &'a Cancel,
    /// Held because the disks of their image are in use before the first VM exists.
    pub(super) _in_use: release::Use,
}

/// Refuses a number of children that cannot be, or that `pattern` has no names for.
pub(crate) fn check_names(count: usize, pattern: Option<&str>) -> Result<(), FleetError> {
    if !(1..=MAX_CHILDREN).contains(&count) {
        return Err(FleetError::Count { count });
    }
    match pattern {
        Some(pattern) if count > 1 && !pattern.contains("{n}") => {
            Err(FleetError::Pattern { pattern: pattern.to_owned() })
        }
        _ => Ok(()),
    }
}

/// Claims the names of `wanted` children of `stem`. Those that `is_listed` are known to be taken.
pub(crate) fn claim_names(
    dir: &RuntimeDir,
    stem: &str,
    wanted: &Children<'_>,
    is_listed: impl Fn(&str) -> bool,
    check: impl Fn() -> Result<(), FleetError>,
) -> Result<Vec<NameClaim>, FleetError> {
    check_names(wanted.count, wanted.pattern)?;
    numbered(dir, wanted.count, stem, wanted.pattern, is_listed, |claim| check().map(|()| Some(claim)))
}

/// Claims `count` names and makes something of each. `{n}` in `pattern` counts up from 1; a name
/// that is taken, or of which nothing can be made, is skipped. A pattern without `{n}` is the name.
fn numbered<T>(
    dir: &RuntimeDir,
    count: usize,
    stem: &str,
    pattern: Option<&str>,
    is_listed: impl Fn(&str) -> bool,
    mut make: impl FnMut(NameClaim) -> Result<Option<T>, FleetError>,
) -> Result<Vec<T>, FleetError> {
    let default = format!("{stem}-{{n}}");
    let pattern = pattern.unwrap_or(&default);
    if !pattern.contains("{n}") {
        let made = make(NameClaim::new(dir, pattern)?)?;
        return made.map(|made| vec![made]).ok_or_else(|| FleetError::Taken { name: pattern.to_owned() });
    }
    let mut all = Vec::with_capacity(count);
    for name in (1u64..).map(|n| pattern.replace("{n}", &n.to_string())) {
        if is_listed(&name) {
            continue;
        }
        match NameClaim::new(dir, &name) {
            // The name of another request's VM, or of another process's.
            Err(FleetError::Taken { .. }) => continue,
            claim => all.extend(make(claim?)?),
        }
        if all.len() == count {
            break;
        }
    }
    Ok(all)
}

impl Batch<'_> {
    /// Fails if the request is cancelled, `made` VMs having been made.
    pub(crate) fn check(&self, made: usize) -> Result<(), FleetError> {
        let reason = if let Some(reason) = self.cancel.reason() {
            reason
        } else if self.parent.as_ref().is_some_and(Parent::has_stopped) {
            CancelReason::ParentStopped
        } else if self.fleet.is_closed() {
            CancelReason::Ending
        } else {
            return Ok(());
        };
        Err(FleetError::Cancelled { made, count: self.count, reason })
    }

    /// Takes the name and the endpoints of each VM. `{n}` counts up from 1, skipping names that are
    /// taken.
    ///
    /// `by_name`: the socket's path contains the name. If the path is taken, the next number is
    /// tried.
    pub(super) fn take(
        &self,
        stem: &str,
        pattern: Option<&str>,
        config: &VmConfig,
        by_name: bool,
        mut endpoints: impl FnMut(&str) -> Result<Endpoints, VmError>,
    ) -> Result<Vec<(NameClaim, Endpoints)>, FleetError> {
        let count = self.count;
        check_names(count, pattern)?;
        room::check(count, room::Needs::of(config)).map_err(|source| FleetError::Room { count, source })?;
        let dir = &self.fleet.0.dir;
        let is_listed = |name: &str| self.fleet.members().contains_key(name);
        numbered(dir, count, stem, pattern, is_listed, |claim| {
            self.check(0)?;
            match endpoints(&claim.name) {
                // The socket of a VM with the same name in another runtime directory.
                Err(VmError::Identity(error)) if by_name && error.is_socket_taken() => Ok(None),
                ends => Ok(Some((claim, ends?))),
            }
        })
    }

    /// Starts the VMs from an image, with the defaults of the image for what `identity` does not say.
    pub(super) fn start(
        &self,
        stem: &str,
        pattern: Option<&str>,
        identity: &ChildIdentity,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
    ) -> Result<Vec<Arc<Vm>>, FleetError> {
        let by_name = identity.names_socket();
        let taken = self.take(stem, pattern, image.config(), by_name, |name| image.endpoints(name, identity))?;
        self.launch(taken, image, options)
    }

    /// Makes all VMs, then lists them and lets them run.
    pub(super) fn launch(
        &self,
        taken: Vec<(NameClaim, Endpoints)>,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
    ) -> Result<Vec<Arc<Vm>>, FleetError> {
        // Of several VMs, none may run while others are made: it would take processors that their
        // making needs.
        let held = ChildOptions { paused: options.paused || self.count > 1, ..options };
        let mut made = Vec::with_capacity(self.count);
        for (claim, ends) in taken {
            self.check(made.len())?;
            let name = claim.name.clone();
            made.push(self.fleet.make(claim, |context| Vm::from_image_as(context, &name, image, ends, held))?);
        }
        self.check(made.len())?;
        let children: Vec<Arc<Vm>> = made.iter().map(|child| Arc::clone(&child.vm)).collect();
        self.fleet.publish(made, self.parent.as_ref().map(|parent| parent.name.as_str()))?;
        if held.paused && !options.paused {
            // The client has no handle to any of them yet, so all of them can still be removed.
            if let Err(error) = self.run(&children) {
                self.fleet.withdraw(children);
                return Err(error);
            }
        }
        Ok(children)
    }

    /// Resumes the listed children.
    fn run(&self, children: &[Arc<Vm>]) -> Result<(), FleetError> {
        for child in children {
            self.check(children.len())?;
            match child.resume() {
                // It is listed, so another request may have stopped it.
                Err(VmError::Stopped(_)) => {}
                other => other?,
            }
        }
        // Cancelled meanwhile?
        self.check(children.len())
    }
}
