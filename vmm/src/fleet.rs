//! The VMs of this process by name, each with a control socket and a console socket.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use event_manager::SubscriberId;
use thiserror::Error;

use crate::console::{ConsoleListener, Line};
use crate::event_loop::{EventLoop, LoopError};
use crate::vm::{ChildIdentity, ChildOptions, Context, Endpoints, ForkImage, ForkReport, SnapshotError, Vm, VmError};

/// Longest name: a socket's path must fit 108 bytes.
pub const LONGEST_NAME: usize = 48;
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

/// Where sockets live: `$CLADE_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/clade`, else `/tmp/clade-UID`.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("CLADE_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        return dir.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        Some(dir) => Path::new(&dir).join("clade"),
        None => PathBuf::from(format!("/tmp/clade-{}", rustix::process::getuid().as_raw())),
    }
}

/// Makes the runtime directory, for this user alone.
fn make_runtime_dir(dir: &Path) -> Result<(), FleetError> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |source| FleetError::Runtime { path: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let owner = fs::metadata(dir).map_err(failed)?.uid();
    if owner != rustix::process::getuid().as_raw() {
        // Under /tmp somebody else may have been there first.
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, format!("it belongs to user {owner}"))));
    }
    Ok(())
}

/// Checks a name.
///
/// # Errors
/// [`FleetError::BadName`].
pub fn check_name(name: &str) -> Result<(), FleetError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if first && rest && name.len() <= LONGEST_NAME {
        Ok(())
    } else {
        Err(FleetError::BadName { name: name.to_owned() })
    }
}

/// Paths of a VM's sockets.
#[must_use]
pub fn socket_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// Path of a VM's console.
#[must_use]
pub fn console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.console"))
}

/// Path of a VM's virtio console, if it has one.
#[must_use]
pub fn virtio_console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.hvc"))
}

/// A name held on this host. The lock goes with the process, so a crashed owner's name is free again.
#[derive(Debug)]
struct Claim {
    dir: PathBuf,
    name: String,
    _lock: File,
}

impl Claim {
    fn new(dir: &Path, name: &str) -> Result<Self, FleetError> {
        check_name(name)?;
        let path = dir.join(format!("{name}.lock"));
        let failed = |source| FleetError::Runtime { path: path.clone(), source };
        let lock = loop {
            let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(FleetError::Taken { name: name.to_owned() }),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            // An owner that left after the file was opened has removed it: what is locked then is no longer the name's.
            let locked = lock.metadata().map_err(failed)?;
            match fs::metadata(&path) {
                Ok(named) if (named.dev(), named.ino()) == (locked.dev(), locked.ino()) => break lock,
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        };
        Ok(Self { dir: dir.to_owned(), name: name.to_owned(), _lock: lock })
    }

    fn bind(&self, path: &Path) -> Result<UnixListener, FleetError> {
        let failed = |source| FleetError::Runtime { path: path.to_owned(), source };
        // The lock is ours, so a socket that is there is a dead owner's.
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        UnixListener::bind(path).map_err(failed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock file last: while it is locked nobody else binds these.
        for path in [socket_path, console_path, virtio_console_path] {
            let _ = fs::remove_file(path(&self.dir, &self.name));
        }
        let _ = fs::remove_file(self.dir.join(format!("{}.lock", self.name)));
    }
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
        self.members().insert(name.to_owned(), Member { vm: Arc::clone(&vm), parent, consoles, _claim: claim });
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

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", "../x", "a/b", ".hidden", "-x", "a b", "ä", &"x".repeat(49)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "web-1", "A.b_c", &"x".repeat(48)] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_after() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim::new(dir.path(), "a").unwrap();
        claim.bind(&socket_path(dir.path(), "a")).unwrap();
        assert!(matches!(Claim::new(dir.path(), "a"), Err(FleetError::Taken { .. })));
        drop(claim);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
        Claim::new(dir.path(), "a").unwrap();
    }

    #[test]
    fn a_dead_owners_sockets_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(socket_path(dir.path(), "a")).unwrap());
        assert!(socket_path(dir.path(), "a").exists());
        let claim = Claim::new(dir.path(), "a").unwrap();
        claim.bind(&socket_path(dir.path(), "a")).unwrap();
    }
}
