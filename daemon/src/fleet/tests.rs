use super::*;
use clade_harness::host;
use clade_vmm::boot::{BootSource, Image};
use clade_vmm::vm::VmConfig;

pub(crate) struct Nobody;

impl Serve for Nobody {
    fn begin(&self, sockets: Sockets, _vm: &Arc<Vm>, _leases: &Leases) -> Serving {
        Serving::new((sockets.control, sockets.consoles))
    }
    fn finish(&self) {}
}

fn bare_config() -> Arc<VmConfig> {
    let mut config = VmConfig::new(32 << 20, 1).unwrap();
    config.acpi = false;
    Arc::new(config)
}

fn bare_source() -> BootSource {
    let kernel = Image::Bytes(clade_guests::BARE_ELF.into());
    BootSource::new(kernel)
}

/// Records for each listed VM whether it ran at that moment.
struct Notes(Arc<Mutex<Vec<bool>>>);

impl Serve for Notes {
    fn begin(&self, sockets: Sockets, vm: &Arc<Vm>, _leases: &Leases) -> Serving {
        self.0.lock().unwrap().push(!vm.is_paused());
        Serving::new((sockets.control, sockets.consoles))
    }
    fn finish(&self) {}
}

#[test]
fn of_several_children_none_runs_before_all_are_made() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let notes = Arc::<Mutex<Vec<bool>>>::default();
    let serve = Notes(Arc::clone(&notes));
    let fleet = Fleet::new(&Context::open().unwrap(), dir.path(), |_| Box::new(serve)).unwrap();
    let (config, source) = (bare_config(), bare_source());
    fleet.launch("one", |context| Vm::boot(context, "one", &config, &source)).unwrap();
    let identity = ChildIdentity::default();
    let fork = |count, paused, cancel: &Cancel| {
        let wanted = Children { count, pattern: None, identity: &identity };
        fleet.fork("one", &wanted, ChildOptions { paused, before_start: None }, cancel)
    };
    let (children, _) = fork(3, false, &Cancel::default()).unwrap();
    // The first entry is the parent's.
    assert_eq!(*notes.lock().unwrap(), [true, false, false, false]);
    assert!(children.iter().all(|child| !child.is_paused()), "they run once all are listed");
    let (kept, _) = fork(2, true, &Cancel::default()).unwrap();
    assert!(kept.iter().all(|child| child.is_paused()));

    let gone = Cancel::default();
    gone.client_gone();
    let before = std::fs::read_dir(dir.path()).unwrap().count();
    let refused = fork(2, false, &gone).unwrap_err();
    assert!(
        matches!(refused, FleetError::Cancelled { made: 0, count: 2, reason: CancelReason::ClientGone }),
        "{refused:?}"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before, "no name is left taken");
}

#[test]
fn a_closed_fleet_stops_its_vms_and_takes_no_more() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fleet = Fleet::new(&Context::open().unwrap(), dir.path(), |_| Box::new(Nobody)).unwrap();
    let (config, source) = (bare_config(), bare_source());
    let boot = |name: &'static str| {
        let (config, source) = (&config, &source);
        move |context: &Context| Vm::boot(context, name, config, source)
    };
    let one = fleet.launch("one", boot("one")).unwrap();
    // Closed while another is being made.
    let late = fleet.launch("late", |context| {
        fleet.close();
        boot("late")(context)
    });
    assert!(matches!(late, Err(FleetError::Ending)), "{late:?}");
    assert!(one.stopped().is_some());
    fleet.remove(&one);
    drop(one);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nobody's sockets are left");
}

/// A fleet with a bare guest `one` that runs.
pub(crate) fn fleet_of_one(dir: &Path, serve: impl Serve + 'static) -> Fleet {
    let fleet = Fleet::new(&Context::open().unwrap(), dir, |_| Box::new(serve)).unwrap();
    let (config, source) = (bare_config(), bare_source());
    fleet.launch("one", |context| Vm::boot(context, "one", &config, &source)).unwrap();
    fleet
}

fn fork(
    fleet: &Fleet,
    count: usize,
    options: ChildOptions<'_>,
    cancel: &Cancel,
) -> Result<(Vec<Arc<Vm>>, ForkReport), FleetError> {
    let identity = ChildIdentity::default();
    fleet.fork("one", &Children { count, pattern: None, identity: &identity }, options, cancel)
}

/// Calls the function when this many VMs have been listed.
struct AtListing<F>(std::sync::atomic::AtomicUsize, usize, F);

impl<F: Fn(&Arc<Vm>) + Send + Sync> Serve for AtListing<F> {
    fn begin(&self, sockets: Sockets, vm: &Arc<Vm>, _leases: &Leases) -> Serving {
        if self.0.fetch_add(1, Ordering::Relaxed) + 1 == self.1 {
            (self.2)(vm);
        }
        Serving::new((sockets.control, sockets.consoles))
    }
    fn finish(&self) {}
}

fn names(fleet: &Fleet) -> Vec<String> {
    fleet.list().iter().map(|listed| listed.vm.name().to_owned()).collect()
}

#[test]
fn a_fork_that_is_cancelled_when_its_children_are_listed_leaves_none() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cancel = Cancel::default();
    let cancels = cancel.clone();
    // The fourth is the last child: all are made and none has run.
    let fleet = fleet_of_one(dir.path(), AtListing(0.into(), 4, move |_: &Arc<Vm>| cancels.client_gone()));
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    let before = files();
    let refused = fork(&fleet, 3, ChildOptions::default(), &cancel).unwrap_err();
    assert!(
        matches!(refused, FleetError::Cancelled { made: 3, count: 3, reason: CancelReason::ClientGone }),
        "{refused:?}"
    );
    assert_eq!((names(&fleet), files()), (vec!["one".to_owned()], before));
}

#[test]
fn a_parent_that_stops_when_its_children_are_listed_cancels_them() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let parent = Arc::<Mutex<Option<Arc<Vm>>>>::default();
    let stops = Arc::clone(&parent);
    let stop = move |_: &Arc<Vm>| stops.lock().unwrap().take().unwrap().stop();
    let fleet = fleet_of_one(dir.path(), AtListing(0.into(), 3, stop));
    *parent.lock().unwrap() = Some(fleet.get("one").unwrap().vm);
    let refused = fork(&fleet, 2, ChildOptions::default(), &Cancel::default()).unwrap_err();
    assert!(
        matches!(refused, FleetError::Cancelled { made: 2, reason: CancelReason::ParentStopped, .. }),
        "{refused:?}"
    );
    assert_eq!(names(&fleet), ["one"]);
}

#[test]
fn a_child_that_somebody_else_has_stopped_costs_its_siblings_nothing() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fleet = fleet_of_one(dir.path(), AtListing(0.into(), 3, |vm: &Arc<Vm>| vm.stop()));
    let (children, _) = fork(&fleet, 3, ChildOptions::default(), &Cancel::default()).unwrap();
    let stopped: Vec<bool> = children.iter().map(|child| child.stopped().is_some()).collect();
    assert_eq!(stopped, [false, true, false]);
    assert!(children.iter().all(|child| child.stopped().is_some() || !child.is_paused()));
}

#[test]
fn a_parent_is_released_while_its_children_are_made() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fleet = fleet_of_one(dir.path(), Nobody);
    let stopped = std::cell::Cell::new(None);
    let stop_parent = |_: &clade_memory::GuestRam| {
        if stopped.take().is_none() {
            stopped.set(Some(fleet.stop("one", |_| ()).is_ok()));
        } else {
            stopped.set(Some(true));
        }
    };
    let options = ChildOptions { paused: false, before_start: Some(&stop_parent) };
    let refused = fork(&fleet, 2, options, &Cancel::default()).unwrap_err();
    assert_eq!(stopped.get(), Some(true), "it was not released within {} s", RELEASE_TIMEOUT.as_secs());
    assert!(matches!(refused, FleetError::Cancelled { reason: CancelReason::ParentStopped, .. }), "{refused:?}");
    assert!(fleet.wait_until_unused(RELEASE_TIMEOUT));
}

#[test]
fn what_is_in_no_list_is_in_use_until_it_is_dropped() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fleet = fleet_of_one(dir.path(), Nobody);
    let one = fleet.get("one").unwrap().vm;
    fleet.remove(&one);
    assert!(fleet.list().is_empty());
    assert!(!fleet.wait_until_unused(Duration::ZERO), "somebody has it still");
    drop(one);
    assert!(fleet.wait_until_unused(Duration::ZERO));

    // A request that makes the first VM of an image counts too: the image has disks.
    let fleet = fleet_of_one(&dir.path().join("other"), Nobody);
    let (image, _) = fleet.get("one").unwrap().vm.fork().unwrap();
    fleet.stop("one", |_| ()).unwrap();
    let seen = std::cell::Cell::new(None);
    let look = |_: &clade_memory::GuestRam| seen.set(Some(fleet.wait_until_unused(Duration::ZERO)));
    let identity = ChildIdentity::default();
    let wanted = Children { count: 1, pattern: None, identity: &identity };
    let options = ChildOptions { paused: true, before_start: Some(&look) };
    let made = fleet.start("two", &wanted, &image, options, &Cancel::default()).unwrap();
    assert_eq!((seen.get(), made.len()), (Some(false), 1));
}

#[test]
fn vms_that_are_started_when_the_process_is_to_end_are_not() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fleet = fleet_of_one(dir.path(), Nobody);
    let (image, _) = fleet.get("one").unwrap().vm.fork().unwrap();
    let cancel = Cancel::default();
    let made = std::cell::Cell::new(0);
    let end = |_: &clade_memory::GuestRam| {
        made.set(made.get() + 1);
        cancel.ending();
    };
    let identity = ChildIdentity::default();
    let wanted = Children { count: 100, pattern: None, identity: &identity };
    let options = ChildOptions { paused: false, before_start: Some(&end) };
    let refused = fleet.start("two", &wanted, &image, options, &cancel).unwrap_err();
    assert!(
        matches!(refused, FleetError::Cancelled { made: 1, count: 100, reason: CancelReason::Ending }),
        "{refused:?}"
    );
    assert_eq!((made.get(), names(&fleet)), (1, vec!["one".to_owned()]));
}

#[test]
fn stop_waits_for_who_is_just_looking_at_the_vm() {
    if host().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fleet = fleet_of_one(dir.path(), Nobody);
    let held = fleet.get("one").unwrap();
    let (begin, begun) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let stops = scope.spawn(|| {
            begin.send(()).unwrap();
            fleet.stop("one", |listed| Arc::downgrade(&listed.vm))
        });
        begun.recv().unwrap();
        held.vm.wait(RELEASE_TIMEOUT).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!(!stops.is_finished(), "its name is not free");
        drop(held);
        assert!(stops.join().unwrap().unwrap().upgrade().is_none());
    });
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
