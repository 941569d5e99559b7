//! The VMs of this process by name, each with a control socket and a console socket.

mod names;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use event_manager::SubscriberId;
use thiserror::Error;

use crate::console::{ConsoleListener, Line};
use crate::event_loop::{EventLoop, LoopError};
use crate::vm::{ChildIdentity, ChildOptions, Context, Endpoints, ForkImage, ForkReport, SnapshotError, Vm, VmError};

use names::{Claim, make_runtime_dir};
pub use names::{LONGEST_NAME, check_name, console_path, runtime_dir, socket_path, virtio_console_path};

/// Most children one request may make.
pub const MOST_CHILDREN: usize = 10_000;

/// What the fleet refuses.
#[derive(Debug, Error)]
pub enum FleetError {
    /// Not a name.
    #[error(
        "{name:?} is not a name: 1 to {LONGEST_NAME} letters, digits, '-', '_' or '.', starting with a letter or digit"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// Taken.
    #[error("the name {name:?} is taken by a running VM")]
    Taken {
        /// Which.
        name: String,
    },
    /// No such VM.
    #[error("there is no VM {name:?}")]
    NoSuchVm {
        /// Which.
        name: String,
    },
    /// A pattern that makes all names equal.
    #[error("{pattern:?} names every child the same: {{n}} stands for the child's number")]
    Pattern {
        /// Which.
        pattern: String,
    },
    /// Too many, or none.
    #[error("{count} children: one fork makes 1 to {MOST_CHILDREN}")]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// No VM is made any more.
    #[error("the process is ending")]
    Ending,
    /// Sockets and their directory.
    #[error("{} cannot be used", path.display())]
    Runtime {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// See [`LoopError`].
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// See [`VmError`].
    #[error(transparent)]
    Vm(#[from] VmError),
    /// See [`SnapshotError`].
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

#[derive(Debug)]
struct Member {
    vm: Arc<Vm>,
    parent: Option<String>,
    consoles: Vec<SubscriberId>,
    _claim: Claim,
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

type Begin = Box<dyn Fn(UnixListener, &str) + Send + Sync>;

/// How members' control sockets are served.
pub(crate) struct Serve {
    /// Begins to serve a member's.
    pub(crate) begin: Begin,
    /// Answers what has been asked, and serves nobody any more.
    pub(crate) finish: Box<dyn Fn() + Send + Sync>,
}

/// Clones are handles to the same fleet.
#[derive(Clone)]
pub struct Fleet(Arc<Inner>);

struct Inner {
    context: Context,
    dir: PathBuf,
    events: EventLoop,
    members: Mutex<BTreeMap<String, Member>>,
    /// Whether it takes nobody any more. Only read and written under the lock of the members.
    closed: AtomicBool,
    /// Serves HTTP on a member's control socket.
    serve: Serve,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fleet({} VMs in {})", self.members().len(), self.0.dir.display())
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
    /// An empty fleet with its sockets in `dir`; `serve` is given each VM's control socket.
    pub(crate) fn new(
        context: &Context,
        dir: &Path,
        serve: impl FnOnce(WeakFleet) -> Serve,
    ) -> Result<Self, FleetError> {
        make_runtime_dir(dir)?;
        let events = EventLoop::start()?;
        Ok(Self(Arc::new_cyclic(|weak| Inner {
            context: context.clone(),
            dir: dir.to_owned(),
            events,
            members: Mutex::default(),
            closed: AtomicBool::new(false),
            serve: serve(WeakFleet(weak.clone())),
        })))
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<String, Member>> {
        self.0.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what was asked answered before the process ends: who stops the last VM wants to hear that it is stopped.
    pub fn finish(&self) {
        (self.0.serve.finish)();
    }

    /// The device loop.
    #[must_use]
    pub fn events(&self) -> &EventLoop {
        &self.0.events
    }

    /// Makes a VM under a name that is claimed before and given back if it fails.
    ///
    /// # Errors
    /// When the name is bad or taken, or the VM cannot be made.
    pub fn launch(
        &self,
        name: &str,
        parent: Option<&str>,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
    ) -> Result<Arc<Vm>, FleetError> {
        self.launch_as(Claim::new(&self.0.dir, name)?, parent, make)
    }

    fn launch_as(
        &self,
        claim: Claim,
        parent: Option<&str>,
        make: impl FnOnce(&Context) -> Result<Vm, VmError>,
    ) -> Result<Arc<Vm>, FleetError> {
        let name = &claim.name.clone();
        let control = claim.bind(&socket_path(&self.0.dir, name))?;
        let console = claim.bind(&console_path(&self.0.dir, name))?;
        let vm = Arc::new(make(&self.0.context)?);
        let mut consoles = vec![self.serve_console(console, &vm, Line::Serial)?];
        if vm.virtio_console().is_some() {
            let served = claim
                .bind(&virtio_console_path(&self.0.dir, name))
                .and_then(|console| self.serve_console(console, &vm, Line::Virtio));
            consoles.push(served.inspect_err(|_| consoles.iter().for_each(|id| self.0.events.remove(*id)))?);
        }
        let parent = parent.map(str::to_owned);
        {
            let mut members = self.members();
            if self.0.closed.load(Ordering::Relaxed) {
                consoles.iter().for_each(|id| self.0.events.remove(*id));
                return Err(FleetError::Ending);
            }
            members.insert(name.to_owned(), Member { vm: Arc::clone(&vm), parent, consoles, _claim: claim });
        }
        (self.0.serve.begin)(control, name);
        Ok(vm)
    }

    fn serve_console(&self, socket: UnixListener, vm: &Arc<Vm>, line: Line) -> Result<SubscriberId, FleetError> {
        let listener = ConsoleListener::new(socket, vm, line, self.0.events.clone())
            .map_err(|source| FleetError::Runtime { path: console_path(&self.0.dir, vm.name()), source })?;
        Ok(self.0.events.add(Box::new(listener))?)
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

    /// Takes a VM out and gives its name back. The VM itself ends with its last handle.
    pub fn remove(&self, name: &str) {
        let member = self.members().remove(name);
        if let Some(member) = member {
            member.consoles.iter().for_each(|console| self.0.events.remove(*console));
            member.vm.stop();
        }
    }

    /// Stops all VMs, and takes no more: also those that a request is just making.
    pub fn close(&self) {
        let members = self.members();
        self.0.closed.store(true, Ordering::Relaxed);
        members.values().for_each(|member| member.vm.stop());
    }

    /// Takes out the VMs that have stopped.
    pub fn reap(&self) {
        let stopped: Vec<String> =
            self.list().iter().filter(|l| l.vm.stopped().is_some()).map(|l| l.vm.name().to_owned()).collect();
        stopped.iter().for_each(|name| self.remove(name));
    }

    /// Forks a VM into children of one instant. All or none are made (I13).
    ///
    /// # Errors
    /// When a name, an interface, an address or a socket is taken or a child cannot be made; the parent runs on.
    pub fn fork(
        &self,
        name: &str,
        wanted: &Children<'_>,
        options: ChildOptions<'_>,
    ) -> Result<(Vec<Arc<Vm>>, ForkReport), FleetError> {
        let count = wanted.count;
        if !(1..=MOST_CHILDREN).contains(&count) {
            return Err(FleetError::Count { count });
        }
        let parent = self.get(name)?.vm;
        let claims = self.claim_children(name, count, wanted.pattern)?;
        // Before the parent is paused: what cannot be had costs it nothing.
        let taken = claims.into_iter().map(|claim| {
            let ends = parent.child_endpoints(&claim.name, wanted.identity)?;
            Ok((claim, ends))
        });
        let taken = taken.collect::<Result<Vec<_>, FleetError>>()?;
        let (image, report) = parent.fork()?;
        Ok((self.launch_all(taken, Some(name), &image, options)?, report))
    }

    /// Starts VMs from an image, called `name` and a number unless a pattern is given; just `name` if it is one alone. All or none are made (I13).
    ///
    /// # Errors
    /// When a name, an interface, an address or a socket is taken or a VM cannot be made.
    pub fn start(
        &self,
        name: &str,
        wanted: &Children<'_>,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
    ) -> Result<Vec<Arc<Vm>>, FleetError> {
        let count = wanted.count;
        if !(1..=MOST_CHILDREN).contains(&count) {
            return Err(FleetError::Count { count });
        }
        let pattern = wanted.pattern.or((count == 1).then_some(name));
        let taken = self.claim_children(name, count, pattern)?.into_iter().map(|claim| {
            let ends = image.endpoints(&claim.name, wanted.identity)?;
            Ok((claim, ends))
        });
        let taken = taken.collect::<Result<Vec<_>, FleetError>>()?;
        self.launch_all(taken, None, image, options)
    }

    fn launch_all(
        &self,
        taken: Vec<(Claim, Endpoints)>,
        parent: Option<&str>,
        image: &Arc<ForkImage>,
        options: ChildOptions<'_>,
    ) -> Result<Vec<Arc<Vm>>, FleetError> {
        let mut children = Vec::with_capacity(taken.len());
        for (claim, ends) in taken {
            let child = claim.name.clone();
            let make = |context: &Context| Vm::from_image_as(context, &child, image, ends, options);
            match self.launch_as(claim, parent, make) {
                Ok(vm) => children.push(vm),
                Err(error) => {
                    children.iter().for_each(|made: &Arc<Vm>| self.remove(made.name()));
                    return Err(error);
                }
            }
        }
        Ok(children)
    }

    /// Claims the children's names before there are any. `{n}` counts up from 1, past the names that are taken.
    fn claim_children(&self, parent: &str, count: usize, pattern: Option<&str>) -> Result<Vec<Claim>, FleetError> {
        let default = format!("{parent}-{{n}}");
        let pattern = pattern.unwrap_or(&default);
        if !pattern.contains("{n}") {
            if count > 1 {
                return Err(FleetError::Pattern { pattern: pattern.to_owned() });
            }
            return Ok(vec![Claim::new(&self.0.dir, pattern)?]);
        }
        let mut claims = Vec::with_capacity(count);
        for name in (1u64..).map(|n| pattern.replace("{n}", &n.to_string())) {
            if self.members().contains_key(&name) {
                continue;
            }
            match Claim::new(&self.0.dir, &name) {
                Ok(claim) => claims.push(claim),
                // Another request's, or another process's.
                Err(FleetError::Taken { .. }) => {}
                Err(error) => return Err(error),
            }
            if claims.len() == count {
                break;
            }
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{BootSource, Image};
    use crate::kvm::testutil::host;
    use crate::vm::VmConfig;

    #[test]
    fn a_closed_fleet_stops_its_vms_and_takes_no_more() {
        if host().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let serve = |_| Serve { begin: Box::new(|_, _| {}), finish: Box::new(|| {}) };
        let fleet = Fleet::new(&Context::open().unwrap(), dir.path(), serve).unwrap();
        let kernel = Image::Bytes(clade_guests::BARE_ELF.into());
        let source = BootSource { kernel, initrd: None, cmdline: String::new(), cpus: 1, rsdp: None };
        let mut config = VmConfig::new(32 << 20, 1).unwrap();
        (config.report_port, config.acpi) = (true, false);
        let config = Arc::new(config);
        let boot = |name: &'static str| {
            let (config, source) = (&config, &source);
            move |context: &Context| Vm::boot(context, name, config, source)
        };
        let one = fleet.launch("one", None, boot("one")).unwrap();
        // Closed while another is being made.
        let late = fleet.launch("late", None, |context| {
            fleet.close();
            boot("late")(context)
        });
        assert!(matches!(late, Err(FleetError::Ending)), "{late:?}");
        assert!(one.stopped().is_some());
        fleet.remove("one");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nobody's sockets are left");
    }
}
