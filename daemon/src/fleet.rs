//! The VMs of this process by name, each with a control socket and a console socket.

mod batch;
mod dir;
mod ended;
mod error;
mod labels;
mod problem;
mod release;
mod room;
mod shutdown;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
#[cfg(test)]
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::console::Line;
use clade_vmm::vm::{ChildIdentity, ChildOptions, Context, ForkImage, ForkReport, Leases, Vm, VmError};

use batch::Batch;
pub use batch::Cancel;
pub(crate) use batch::{Parent, check_names, claim_names};

pub(crate) use dir::about;
pub use dir::{
    LONGEST_NAME, LONGEST_SOCKET_PATH, check_name, console_path, image_path, open_log, runtime_dir, socket_path,
    supervisor_path, virtio_console_path,
};
pub(crate) use dir::{NameClaim, RuntimeDir, SupervisorClaim, vm_names};
pub use ended::{EndedVm, ended_vms};
pub(crate) use ended::{forget as forget_ended, last_output, record_end, recorded_reason, settle};
pub use error::{CancelReason, FleetError, MAX_CHILDREN};
use labels::LabelBook;
pub use labels::{Label, LabelError, Labels};
use release::{InUse, Release, Tail};
pub use room::RoomError;
pub(crate) use room::{Needs, check as check_room};
pub use shutdown::Shutdown;

/// How long a stopped VM may take to release its interfaces, sockets and name. Disks wait for the
/// kernel for 2 s.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Member {
    vm: Arc<Vm>,
    parent: Option<String>,
    release: Arc<Release>,
    /// Where its end is recorded, if not in the runtime directory.
    record: Option<File>,
    /// Its sockets are served until this is dropped.
    _serving: Serving,
}

/// A request for children of one instant.
#[derive(Clone, Debug)]
pub struct Children<'a> {
    /// The number of children.
    pub count: usize,
    /// The pattern of their names, in which `{n}` stands for a number. Default: the parent's name
    /// and a number.
    pub pattern: Option<&'a str>,
    /// Chosen values for their interfaces, addresses and sockets.
    pub identity: &'a ChildIdentity,
}

/// A VM of the fleet, as it is listed.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The VM.
    pub vm: Arc<Vm>,
    /// The name of its parent, if it has one.
    pub parent: Option<String>,
    /// Its labels.
    pub labels: Labels,
}

/// The sockets of a VM, bound and not yet served.
pub(crate) struct Sockets {
    pub(crate) control: UnixListener,
    /// Where other processes ask for its image.
    pub(crate) image: OwnedFd,
    pub(crate) consoles: Vec<(Line, UnixListener)>,
}

/// Accepts connections on the sockets of a VM until it is dropped. Open connections stay.
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

/// The server of members' sockets.
pub(crate) trait Serve: Send + Sync {
    /// Begins to serve a member's sockets. Images that other processes use are held in `leases`.
    fn begin(&self, sockets: Sockets, vm: &Arc<Vm>, leases: &Leases) -> Serving;
    /// Answers the requests that are open, and accepts no others.
    fn finish(&self);
}

/// A child that is made and paused, but not listed yet.
struct Unlisted {
    vm: Arc<Vm>,
    sockets: Sockets,
    release: Arc<Release>,
    record: Option<File>,
}

/// The VMs of a process by name. A clone is a handle to the same fleet.
#[derive(Clone)]
pub struct Fleet(Arc<Inner>);

struct Inner {
    context: Context,
    dir: RuntimeDir,
    members: Mutex<BTreeMap<String, Member>>,
    /// Whether it takes no more VMs. Written under the lock of the members, and read under it
    /// before VMs are listed.
    closed: AtomicBool,
    in_use: Arc<InUse>,
    labels: LabelBook,
    /// Images that VMs in other processes use.
    leases: Leases,
    serve: Box<dyn Serve>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fleet({} VMs in {})", self.members().len(), self.0.dir.path().display())
    }
}

/// A handle that does not keep a fleet alive: the fleet's server holds one.
#[derive(Clone)]
pub(crate) struct WeakFleet(Weak<Inner>);

impl WeakFleet {
    pub(crate) fn upgrade(&self) -> Option<Fleet> {
        self.0.upgrade().map(Fleet)
    }
}

impl Fleet {
    /// An empty fleet with its sockets in `dir`, served by the result of `serve`.
    #[cfg(test)]
    pub(crate) fn new(
        context: &Context,
        dir: &Path,
        serve: impl FnOnce(WeakFleet) -> Box<dyn Serve>,
    ) -> Result<Self, FleetError> {
        Ok(Self::in_dir(context, RuntimeDir::create(dir)?, serve))
    }

    /// The same in a runtime directory that is open.
    pub(crate) fn in_dir(context: &Context, dir: RuntimeDir, serve: impl FnOnce(WeakFleet) -> Box<dyn Serve>) -> Self {
        Self(Arc::new_cyclic(|weak| Inner {
            context: context.clone(),
            dir,
            members: Mutex::default(),
            closed: AtomicBool::new(false),
            in_use: Arc::default(),
            labels: LabelBook::default(),
            leases: Leases::default(),
            serve: serve(WeakFleet(weak.clone())),
        }))
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<String, Member>> {
        self.0.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers open requests before the process ends: a client that stops the last VM waits for its
    /// answer.
    pub fn finish(&self) {
        self.0.serve.finish();
    }

    /// Makes a VM. Its name is claimed first, and free again if the VM cannot be made.
    ///
    /// # Errors
    /// When the name is bad or taken, or the VM cannot be made.
    pub fn launch(
        &self,
        name: &str,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
    ) -> Result<Arc<Vm>, FleetError> {
        let made = self.launch_claimed(NameClaim::new(&self.0.dir, name)?, None, make, |_| true)?;
        made.ok_or(FleetError::Ending)
    }

    /// Makes a VM and its sockets, on which no connection is accepted yet.
    fn make(
        &self,
        mut claim: NameClaim,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
    ) -> Result<Unlisted, FleetError> {
        let control = claim.bind("sock")?;
        let image = claim.bind_image()?;
        let mut consoles = vec![(Line::Serial, claim.bind("console")?)];
        let mut vm = make(&self.0.context)?;
        if vm.virtio_console().is_some() {
            consoles.push((Line::Virtio, claim.bind("hvc")?));
        }
        let record = claim.take_record();
        if claim.owns_files() {
            ended::forget(&self.0.dir, &claim.name);
        }
        let release = Arc::<Release>::default();
        // Dropped after its devices: a name is free only when nothing of its VM is in use any more.
        vm.drop_last(Tail::new(claim, &release, self.0.in_use.enter()));
        Ok(Unlisted { vm: Arc::new(vm), sockets: Sockets { control, image, consoles }, release, record })
    }

    /// Lists VMs and begins to serve their sockets: all of them or none.
    fn publish(&self, made: Vec<Unlisted>, parent: Option<&str>) -> Result<(), FleetError> {
        let mut members = self.members();
        if self.0.closed.load(Ordering::Relaxed) {
            // Not under the lock: dropping the VMs takes time.
            drop(members);
            return Err(FleetError::Ending);
        }
        for Unlisted { vm, sockets, release, record } in made {
            let serving = self.0.serve.begin(sockets, &vm, &self.0.leases);
            let parent = parent.map(str::to_owned);
            members.insert(vm.name().to_owned(), Member { vm, parent, release, record, _serving: serving });
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
        Ok(self.listed(member))
    }

    fn listed(&self, member: &Member) -> Listed {
        let labels = self.0.labels.get(member.vm.name());
        Listed { vm: Arc::clone(&member.vm), parent: member.parent.clone(), labels }
    }

    /// The labels of the VM called `name`: none if there is none.
    #[must_use]
    pub fn labels(&self, name: &str) -> Labels {
        self.0.labels.get(name)
    }

    /// Gives the VM that will be listed as `name` labels. They go with it.
    pub fn set_labels(&self, name: &str, labels: Labels) {
        self.0.labels.set(name, labels);
    }

    /// Gives a VM that is listed labels. One that has gone meanwhile gets none, and neither does
    /// another with its name.
    pub(crate) fn label(&self, vm: &Arc<Vm>, labels: Labels) {
        let members = self.members();
        if members.get(vm.name()).is_some_and(|member| Arc::ptr_eq(&member.vm, vm)) {
            self.0.labels.set(vm.name(), labels);
        }
    }

    /// All VMs, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        self.members().values().map(|member| self.listed(member)).collect()
    }

    /// Stops a VM, and waits until its name, interfaces, addresses and sockets are free. Returns
    /// the result of `describe`, which is called when the VM has stopped.
    ///
    /// # Errors
    /// When there is no such VM, or something of it stays in use.
    pub fn stop<T>(&self, name: &str, describe: impl FnOnce(&Listed) -> T) -> Result<T, FleetError> {
        let (listed, release) = {
            let members = self.members();
            let member = members.get(name).ok_or_else(|| FleetError::NoSuchVm { name: name.to_owned() })?;
            let listed = self.listed(member);
            (listed, Arc::clone(&member.release))
        };
        self.stop_listed(listed, &release, describe)
    }

    fn stop_listed<T>(
        &self,
        listed: Listed,
        release: &Arc<Release>,
        describe: impl FnOnce(&Listed) -> T,
    ) -> Result<T, FleetError> {
        let name = listed.vm.name().to_owned();
        listed.vm.stop();
        let described = describe(&listed);
        // Another thread may hold the last handle.
        drop(listed);
        // Its threads are joined here, unless another thread has removed it or still holds a
        // handle.
        drop(self.take(&name, release));
        if !release.wait(RELEASE_TIMEOUT) {
            return Err(FleetError::Unreleased { name, seconds: RELEASE_TIMEOUT.as_secs() });
        }
        Ok(described)
    }

    /// Removes the VM of `release`, if it is listed: another VM may have its name by now.
    fn take(&self, name: &str, release: &Arc<Release>) -> Option<Member> {
        let mut members = self.members();
        let is_it = members.get(name).is_some_and(|member| Arc::ptr_eq(&member.release, release));
        if is_it { self.unlist(&mut members, name) } else { None }
    }

    /// Removes a VM. It ends with its last handle. If it stopped by itself, the reason is recorded
    /// ([`EndedVm`]).
    pub fn remove(&self, vm: &Arc<Vm>) {
        let member = self.take_vm(vm);
        if let Some(member) = member {
            ended::record(&self.0.dir, member.record.as_ref(), &member.vm, member.parent.as_deref());
            member.vm.stop();
        }
    }

    /// Removes a VM without a record: its starter has seen its end.
    pub fn forget(&self, vm: &Arc<Vm>) {
        drop(self.take_vm(vm));
    }

    fn take_vm(&self, vm: &Arc<Vm>) -> Option<Member> {
        let mut members = self.members();
        let is_it = members.get(vm.name()).is_some_and(|member| Arc::ptr_eq(&member.vm, vm));
        if is_it { self.unlist(&mut members, vm.name()) } else { None }
    }

    fn unlist(&self, members: &mut BTreeMap<String, Member>, name: &str) -> Option<Member> {
        self.0.labels.forget(name);
        members.remove(name)
    }

    /// Removes VMs of a request that failed. They are gone when this returns, unless another thread
    /// holds a handle.
    fn withdraw(&self, vms: Vec<Arc<Vm>>) {
        vms.iter().for_each(|vm| vm.stop());
        for vm in vms {
            self.forget(&vm);
        }
    }

    /// Images that VMs in other processes use.
    #[must_use]
    pub fn leases(&self) -> &Leases {
        &self.0.leases
    }

    /// The runtime directory.
    pub(crate) fn dir(&self) -> &RuntimeDir {
        &self.0.dir
    }

    fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Relaxed)
    }

    /// Waits up to `timeout` until no VM, listed or not, and no request that makes VMs uses the
    /// fleet. Returns whether that is so. No VM can be made then any more.
    pub fn wait_until_unused(&self, timeout: Duration) -> bool {
        self.0.in_use.wait_for_none(timeout)
    }

    pub(crate) fn batch<'a>(&'a self, count: usize, parent: Option<Parent>, cancel: &'a Cancel) -> Batch<'a> {
        Batch { fleet: self, count, parent, cancel, _in_use: self.0.in_use.enter() }
    }

    /// Stops all VMs and refuses new ones, also those that a request is making now.
    pub fn close(&self) {
        let members = self.members();
        self.0.closed.store(true, Ordering::Relaxed);
        members.values().for_each(|member| member.vm.stop());
    }

    /// Removes the VMs that have stopped, but not `except`.
    pub fn reap(&self, except: Option<&str>) {
        let gone = |listed: &Listed| listed.vm.stopped().is_some() && Some(listed.vm.name()) != except;
        self.list().into_iter().filter(gone).for_each(|listed| self.remove(&listed.vm));
    }

    /// Forks a VM into children of one instant. All or none are made (I13); none runs before all
    /// are made.
    ///
    /// # Errors
    /// When there is no room for all, or a name, an interface, an address or a socket is taken.
    /// When a child cannot be made, or the request is cancelled. The parent runs on.
    pub(crate) fn fork(
        &self,
        name: &str,
        wanted: &Children<'_>,
        options: ChildOptions<'_>,
        cancel: &Cancel,
    ) -> Result<(Vec<Arc<Vm>>, ForkReport), FleetError> {
        let parent = self.get(name)?.vm;
        let batch = self.batch(wanted.count, Some(Parent::new(&parent)), cancel);
        // Before the parent is paused: a refused request costs it nothing.
        let by_name = wanted.identity.names_socket();
        let taken = batch.take(name, wanted.pattern, parent.config(), by_name, |name| {
            parent.child_endpoints(name, wanted.identity)
        })?;
        let (image, report) = parent.fork()?;
        // Stopping the parent does not wait for its children.
        drop(parent);
        Ok((batch.launch(taken, &image, options)?, report))
    }

    /// Makes a VM under a name that is claimed. It is listed, and its sockets are served, once
    /// `is_wanted` says so: nobody else can let it run before. `parent` is in another process.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn launch_claimed(
        &self,
        claim: NameClaim,
        parent: Option<&str>,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
        is_wanted: impl FnOnce(&Vm) -> bool,
    ) -> Result<Option<Arc<Vm>>, FleetError> {
        let _in_use = self.0.in_use.enter();
        let made = self.make(claim, make)?;
        if !is_wanted(&made.vm) {
            return Ok(None);
        }
        let vm = Arc::clone(&made.vm);
        self.publish(vec![made], parent)?;
        Ok(Some(vm))
    }

    /// Starts VMs from an image. Without a pattern they are called `name` and a number, or just
    /// `name` if there is one. All or none are made (I13).
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
        batch.start(name, pattern, wanted.identity, image, options)
    }
}

#[cfg(test)]
pub(crate) mod tests;
