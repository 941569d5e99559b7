//! The VMs of this process by name, each with a control socket and a console socket.

mod batch;
mod dir;
mod ended;
mod error;
mod release;
mod room;

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::console::Line;
use clade_vmm::vm::{ChildIdentity, ChildOptions, Context, ForkImage, ForkReport, Vm, VmError};

pub use batch::Cancel;
use batch::{Batch, Parent};

pub use dir::{
    LONGEST_NAME, LONGEST_SOCKET_PATH, check_name, console_path, runtime_dir, socket_path, virtio_console_path,
};
use dir::{NameClaim, RuntimeDir};
pub(crate) use ended::last_output;
pub use ended::{EndedVm, ended_vms};
pub use error::{CancelReason, FleetError, MAX_CHILDREN};
use release::{InUse, Release, Tail};
pub use room::RoomError;

/// How long a stopped VM may take to give back its interfaces, sockets and name. Disks wait for the kernel for 2 s.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Member {
    vm: Arc<Vm>,
    parent: Option<String>,
    release: Arc<Release>,
    /// Its sockets are served until this is dropped.
    _serving: Serving,
}

/// Children to be made of one instant.
#[derive(Clone, Debug)]
pub struct Children<'a> {
    /// How many.
    pub count: usize,
    /// Their names, `{n}` standing for a number; the parent's name and a number if not given.
    pub pattern: Option<&'a str>,
    /// What is chosen for their devices.
    pub identity: &'a ChildIdentity,
}

/// A VM of the fleet, as it is listed.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Whose child it is.
    pub parent: Option<String>,
}

/// The sockets of a VM, bound and not yet served.
pub(crate) struct Sockets {
    pub(crate) control: UnixListener,
    pub(crate) consoles: Vec<(Line, UnixListener)>,
}

/// Dropped, no connection is accepted any more. Those there are go on.
pub(crate) struct Serving {
    _until_dropped: Box<dyn Send + Sync>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serving")
    }
}

impl Serving {
    pub(crate) fn new(until_dropped: impl Send + Sync + 'static) -> Self {
        Self { _until_dropped: Box::new(until_dropped) }
    }
}

/// How members' sockets are served.
pub(crate) trait Serve: Send + Sync {
    /// Begins to serve a member's sockets.
    fn begin(&self, sockets: Sockets, vm: &Arc<Vm>) -> Serving;
    /// Answers what has been asked, and serves nobody any more.
    fn finish(&self);
}

/// A child that is made, holds still, and is in no list.
struct Unlisted {
    vm: Arc<Vm>,
    sockets: Sockets,
    release: Arc<Release>,
}

/// Clones are handles to the same fleet.
#[derive(Clone)]
pub struct Fleet(Arc<Inner>);

struct Inner {
    context: Context,
    dir: RuntimeDir,
    members: Mutex<BTreeMap<String, Member>>,
    /// Whether it takes nobody any more. Only read and written under the lock of the members.
    closed: AtomicBool,
    in_use: Arc<InUse>,
    serve: Box<dyn Serve>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fleet({} VMs in {})", self.members().len(), self.0.dir.path().display())
    }
}

/// A fleet that may be gone: what its servers hold.
#[derive(Clone)]
pub(crate) struct WeakFleet(Weak<Inner>);

impl WeakFleet {
    pub(crate) fn upgrade(&self) -> Option<Fleet> {
        self.0.upgrade().map(Fleet)
    }
}

impl Fleet {
    /// An empty fleet with its sockets in `dir`, served by what `serve` makes.
    pub(crate) fn new(
        context: &Context,
        dir: &Path,
        serve: impl FnOnce(WeakFleet) -> Box<dyn Serve>,
    ) -> Result<Self, FleetError> {
        let dir = RuntimeDir::create(dir)?;
        Ok(Self(Arc::new_cyclic(|weak| Inner {
            context: context.clone(),
            dir,
            members: Mutex::default(),
            closed: AtomicBool::new(false),
            in_use: Arc::default(),
            serve: serve(WeakFleet(weak.clone())),
        })))
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<String, Member>> {
        self.0.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what was asked answered before the process ends: who stops the last VM wants to hear that it is stopped.
    pub fn finish(&self) {
        self.0.serve.finish();
    }

    /// Makes a VM under a name that is claimed before and given back if it fails.
    ///
    /// # Errors
    /// When the name is bad or taken, or the VM cannot be made.
    pub fn launch(
        &self,
        name: &str,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
    ) -> Result<Arc<Vm>, FleetError> {
        let made = self.make(NameClaim::new(&self.0.dir, name)?, make)?;
        let vm = Arc::clone(&made.vm);
        self.publish(vec![made], None)?;
        Ok(vm)
    }

    /// Makes a VM and its sockets. Nobody is served on them yet.
    fn make(
        &self,
        claim: NameClaim,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
    ) -> Result<Unlisted, FleetError> {
        let control = claim.bind("sock")?;
        let mut consoles = vec![(Line::Serial, claim.bind("console")?)];
        let mut vm = make(&self.0.context)?;
        if vm.virtio_console().is_some() {
            consoles.push((Line::Virtio, claim.bind("hvc")?));
        }
        ended::forget(&self.0.dir, &claim.name);
        let release = Arc::<Release>::default();
        // Dropped after its devices: a name is free when nothing of its VM is in use any more.
        vm.drop_last(Tail::new(claim, &release, self.0.in_use.enter()));
        Ok(Unlisted { vm: Arc::new(vm), sockets: Sockets { control, consoles }, release })
    }

    /// Lists VMs and begins to serve their sockets: all of them or none.
    fn publish(&self, made: Vec<Unlisted>, parent: Option<&str>) -> Result<(), FleetError> {
        let mut members = self.members();
        if self.0.closed.load(Ordering::Relaxed) {
            // Not under the lock: what is made is dropped, and that takes its time.
            drop(members);
            return Err(FleetError::Ending);
        }
        for Unlisted { vm, sockets, release } in made {
            let serving = self.0.serve.begin(sockets, &vm);
            let parent = parent.map(str::to_owned);
            members.insert(vm.name().to_owned(), Member { vm, parent, release, _serving: serving });
        }
        Ok(())
    }

    /// The VM called `name`.
    ///
    /// # Errors
    /// When there is none in this process.
    pub fn get(&self, name: &str) -> Result<Listed, FleetError> {
        let members = self.members();
        let member = members.get(name).ok_or_else(|| FleetError::NoSuchVm { name: name.to_owned() })?;
        Ok(Listed { vm: Arc::clone(&member.vm), parent: member.parent.clone() })
    }

    /// All VMs, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        self.members().values().map(|m| Listed { vm: Arc::clone(&m.vm), parent: m.parent.clone() }).collect()
    }

    /// Stops a VM, and waits until its name, interfaces, addresses and sockets are free. Returns it as it was when it stopped.
    ///
    /// # Errors
    /// When there is no such VM, or something of it stays in use.
    pub fn stop<T>(&self, name: &str, describe: impl FnOnce(&Listed) -> T) -> Result<T, FleetError> {
        let (listed, release) = {
            let members = self.members();
            let member = members.get(name).ok_or_else(|| FleetError::NoSuchVm { name: name.to_owned() })?;
            let listed = Listed { vm: Arc::clone(&member.vm), parent: member.parent.clone() };
            (listed, Arc::clone(&member.release))
        };
        listed.vm.stop();
        let described = describe(&listed);
        // The last handle is another's if not this one.
        drop(listed);
        // Its threads are joined here, unless somebody else has taken it out or is just looking at it.
        drop(self.take(name, &release));
        if !release.wait(RELEASE_TIMEOUT) {
            return Err(FleetError::Unreleased { name: name.to_owned(), seconds: RELEASE_TIMEOUT.as_secs() });
        }
        Ok(described)
    }

    /// Takes out the VM that `release` is of, if it is there: another may have its name by now.
    fn take(&self, name: &str, release: &Arc<Release>) -> Option<Member> {
        let mut members = self.members();
        let is_it = members.get(name).is_some_and(|member| Arc::ptr_eq(&member.release, release));
        if is_it { members.remove(name) } else { None }
    }

    /// Takes a VM out. It ends with its last handle. Why it ended is kept ([`EndedVm`]) if it did so by itself.
    pub fn remove(&self, vm: &Arc<Vm>) {
        let member = self.take_vm(vm);
        if let Some(member) = member {
            ended::record(&self.0.dir, &member.vm, member.parent.as_deref());
            member.vm.stop();
        }
    }

    /// Takes a VM out whose end was seen by whoever started it: nothing is kept.
    pub fn forget(&self, vm: &Arc<Vm>) {
        drop(self.take_vm(vm));
    }

    fn take_vm(&self, vm: &Arc<Vm>) -> Option<Member> {
        let mut members = self.members();
        let is_it = members.get(vm.name()).is_some_and(|member| Arc::ptr_eq(&member.vm, vm));
        if is_it { members.remove(vm.name()) } else { None }
    }

    /// Takes VMs out that nobody is to have had. They are gone when this returns, unless somebody is just looking at one.
    fn withdraw(&self, vms: Vec<Arc<Vm>>) {
        vms.iter().for_each(|vm| vm.stop());
        for vm in vms {
            self.forget(&vm);
        }
    }

    fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Relaxed)
    }

    /// Waits until nothing is in use by a VM any more, listed or not, nor by a request that makes some, for at most
    /// `patience`. Returns whether it is so: then no VM can come any more.
    pub fn wait_until_unused(&self, patience: Duration) -> bool {
        self.0.in_use.wait_for_none(patience)
    }

    fn batch<'a>(&'a self, count: usize, parent: Option<Parent>, cancel: &'a Cancel) -> Batch<'a> {
        Batch { fleet: self, count, parent, cancel, _in_use: self.0.in_use.enter() }
    }

    /// Stops all VMs, and takes no more: also those that a request is just making.
    pub fn close(&self) {
        let members = self.members();
        self.0.closed.store(true, Ordering::Relaxed);
        members.values().for_each(|member| member.vm.stop());
    }

    /// Takes out the VMs that have stopped, but `except`.
    pub fn reap(&self, except: Option<&str>) {
        let gone = |listed: &Listed| listed.vm.stopped().is_some() && Some(listed.vm.name()) != except;
        self.list().into_iter().filter(gone).for_each(|listed| self.remove(&listed.vm));
    }

    /// Forks a VM into children of one instant. All or none are made (I13); none runs before all are made.
    ///
    /// # Errors
    /// When there is no room for all, a name, an interface, an address or a socket is taken, a child cannot be made, or
    /// it is cancelled. The parent runs on.
    pub(crate) fn fork(
        &self,
        name: &str,
        wanted: &Children<'_>,
        options: ChildOptions<'_>,
        cancel: &Cancel,
    ) -> Result<(Vec<Arc<Vm>>, ForkReport), FleetError> {
        let parent = self.get(name)?.vm;
        let batch = self.batch(wanted.count, Some(Parent::new(&parent)), cancel);
        // Before the parent is paused: what cannot be had costs it nothing.
        let by_name = wanted.identity.names_socket();
        let taken = batch.take(name, wanted.pattern, parent.config(), by_name, |name| {
            parent.child_endpoints(name, wanted.identity)
        })?;
        let (image, report) = parent.fork()?;
        // Whoever stops it does not wait for its children.
        drop(parent);
        Ok((batch.launch(taken, &image, options)?, report))
    }

    /// Starts VMs from an image, called `name` and a number unless a pattern is given; just `name` if it is one alone. All
    /// or none are made (I13).
    ///
    /// # Errors
    /// As for a fork.
    pub fn start(
        &self,
        name: &str,
        wanted: &Children<'_>,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
        cancel: &Cancel,
    ) -> Result<Vec<Arc<Vm>>, FleetError> {
        let pattern = wanted.pattern.or((wanted.count == 1).then_some(name));
        let batch = self.batch(wanted.count, None, cancel);
        let by_name = wanted.identity.names_socket();
        let taken =
            batch.take(name, pattern, image.config(), by_name, |name| image.endpoints(name, wanted.identity))?;
        batch.launch(taken, image, options)
    }
}

#[cfg(test)]
pub(crate) mod tests;
