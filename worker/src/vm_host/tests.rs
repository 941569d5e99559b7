use super::*;
use crate::image::tests::BEFORE_SEALING;
use crate::image::{FORK, PendingFork};
use clade_api::secrets::Secrets;
use clade_api::{ProblemKind, RuntimeDir};
use clade_host_io::seqpacket;
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::kvm::Host;
use clade_vmm::vm::{Endpoints, TransferError, VmConfig};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with};
use serde_json::{Value, json};

struct Nobody;

impl Serve for Nobody {
    fn begin(&self, sockets: Sockets, _vm: &Arc<Vm>, _leases: &Leases) -> Serving {
        Serving::new((sockets.control, sockets.consoles))
    }
    fn finish(&self) {}
}

/// The host, or `None` after printing why the test is skipped.
pub(crate) fn host() -> Option<Host> {
    Host::open().map_err(|error| clade_test_support::skip("kvm", &clade_vmm::error_chain(&error))).ok()
}

/// A VM host with a bare guest `one` if it `is_wanted`, and the starter's claim of its name.
pub(crate) fn vm_host_of_one(dir: &RuntimeDir, is_wanted: bool) -> (VmHost, Option<Arc<Vm>>, NameClaim) {
    let vm_host = VmHost::new(&Context::open().unwrap(), |_| Box::new(Nobody));
    let config = Arc::new(VmConfig::bare(32 << 20, 1).unwrap());
    let source = BootSource::new(BootImage::Bytes(clade_guests::BARE_ELF.into()));
    let starter = NameClaim::new(dir, "one").unwrap();
    let (sockets, record) = starter.hand_over(false).unwrap();
    let lock = starter.lock().unwrap().try_clone_to_owned().unwrap();
    let claim = NameClaim::adopt(dir, "one", lock).unwrap();
    let files = VmFiles::of(sockets, record).unwrap();
    let make = |context: &Context| Vm::boot_as(context, "one", &config, &source, Endpoints::boot(&config)?, true);
    let labels = Labels::of(&["tier=web".parse().unwrap()]).unwrap();
    let vm = vm_host.launch(
        claim,
        files,
        VmDescription { parent: Some("zero".to_owned()), labels, secrets: Secrets::None, reports_ready: false },
        make,
        |vm| {
            assert!(vm.is_paused() && vm_host.entry().is_none(), "nobody can let it run yet");
            is_wanted
        },
    );
    (vm_host, vm.unwrap(), starter)
}

fn runtime_dir() -> (tempfile::TempDir, RuntimeDir) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = RuntimeDir::create(dir.path()).unwrap();
    (dir, runtime)
}

#[test]
fn it_is_listed_by_its_name_once_it_is_wanted() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    let entry = vm_host.get("one").unwrap();
    assert!(Arc::ptr_eq(&entry.vm, &vm.unwrap()));
    assert_eq!((entry.parent.as_deref(), entry.labels.text().as_str()), (Some("zero"), "tier=web"));
    assert!(matches!(vm_host.get("two"), Err(DaemonError::NoSuchVm { .. })));
    drop((vm_host, starter));

    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, false);
    assert!(vm.is_none() && vm_host.entry().is_none());
    assert!(vm_host.wait_until_unused(Duration::ZERO), "it is gone already");
    drop(starter);
    NameClaim::new(&runtime, "one").unwrap();
}

/// A program that a test beside this one starts inherits the name's lock, for a moment.
fn expect_free_name(runtime: &RuntimeDir) {
    clade_test_support::wait_until("the name is free", || NameClaim::new(runtime, "one").is_ok());
}

#[test]
fn what_somebody_has_a_handle_to_is_in_use() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    starter.leave();
    vm_host.remove();
    assert!(vm_host.entry().is_none());
    assert!(!vm_host.wait_until_unused(Duration::ZERO), "somebody has it still");
    assert!(matches!(NameClaim::new(&runtime, "one"), Err(DaemonError::Taken { .. })));
    drop(vm);
    assert!(vm_host.wait_until_unused(Duration::ZERO));
    expect_free_name(&runtime);
}

/// The supervisor compares the list of secrets with its record: an image without the list would be
/// refused as another VM's.
#[test]
fn a_vm_that_has_ended_gives_no_image_without_its_secrets() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    let vm = vm.unwrap();
    let (forked, _image) = crate::image::forked(&vm, &vm_host.downgrade()).unwrap();
    assert_eq!(forked.labels.text(), "tier=web");
    // The VM leaves the list before its vCPUs stop.
    drop(vm_host.take());
    let refused = crate::image::forked(&vm, &vm_host.downgrade()).map(|(forked, _)| forked.secrets);
    assert!(matches!(&refused, Err(DaemonError::NoSuchVm { name }) if name == "one"), "{refused:?}");
    starter.leave();
}

/// Its process would end, or merge what was written into disks that the image shares.
#[test]
fn a_vm_is_in_use_until_its_image_is_leased() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    starter.leave();
    let vm = vm.unwrap();
    let (ours, theirs) = seqpacket::pair().unwrap();
    seqpacket::send(&ours, &[FORK], &[]).unwrap();
    let (weak, in_between) = (Arc::downgrade(&vm), vm_host.clone());
    BEFORE_SEALING.set(Some(Box::new(move || {
        // The VM is stopped meanwhile.
        drop((vm, in_between.take()));
        assert!(!in_between.wait_until_unused(Duration::ZERO), "its process would end");
        assert_eq!(in_between.leases().count(), 0);
        Ok(())
    })));
    crate::image::answer(&theirs, &weak, vm_host.leases(), &vm_host.downgrade()).unwrap();
    assert!(BEFORE_SEALING.take().is_none() && weak.upgrade().is_none());
    assert!(vm_host.wait_until_unused(Duration::ZERO));
    assert_eq!(vm_host.leases().count(), 1, "the image is in the socket");
    drop(ours);
}

/// The report is sent before the image is sealed, which may fail: for want of descriptors or memory.
#[test]
fn an_image_that_cannot_be_sealed_is_announced_and_refused() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    let vm = vm.unwrap();
    let (ours, theirs) = seqpacket::pair().unwrap();
    seqpacket::send(&ours, &[FORK], &[]).unwrap();
    let source = rustix::io::Errno::MFILE.into();
    BEFORE_SEALING.set(Some(Box::new(|| Err(TransferError::System { what: "sealed", source }))));
    crate::image::answer(&theirs, &Arc::downgrade(&vm), vm_host.leases(), &vm_host.downgrade()).unwrap();
    let answer = || -> Value { serde_json::from_slice(&seqpacket::receive(&ours, 1 << 20).unwrap().bytes).unwrap() };
    assert!(answer()["Forked"].is_object());
    let text = format!(
        "a child in a process of its own: the image could not be sealed: {}",
        std::io::Error::from(rustix::io::Errno::MFILE)
    );
    assert_eq!(answer(), json!({ "Refused": { "kind": ProblemKind::Internal, "text": text } }));
    // The VM can be forked again.
    crate::image::forked(&vm, &vm_host.downgrade()).unwrap();
    starter.leave();
}

#[test]
fn an_image_that_cannot_be_sealed_is_refused_by_its_reason() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    let (forked, _image) = crate::image::forked(&vm.unwrap(), &vm_host.downgrade()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(clade_api::image_path(dir.path(), "one")).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    let forked = json!({ "Forked": forked });
    let refused = json!({ "Refused": { "kind": ProblemKind::NoRoom, "text": "sent: no memory" } });
    for (second, kind, text) in [
        (&refused, ProblemKind::NoRoom, "sent: no memory"),
        (&forked, ProblemKind::Internal, "invalid data"),
        (&json!("no"), ProblemKind::Internal, "unknown variant"),
    ] {
        let pending = PendingFork::begin(dir.path(), "one").unwrap();
        let client = accept(&listener).unwrap();
        for answer in [&forked, second] {
            seqpacket::send(&client, &serde_json::to_vec(answer).unwrap(), &[]).unwrap();
        }
        let error = pending.image(&|| Ok(())).map(drop).unwrap_err();
        let shown = clade_vmm::error_chain(&error);
        assert!(error.problem() == kind && shown.contains(text), "{:?}: {shown}", error.problem());
    }
    starter.leave();
}

#[test]
fn stop_waits_for_who_is_just_looking_at_the_vm() {
    if host().is_none() {
        return;
    }
    let (_dir, runtime) = runtime_dir();
    let (vm_host, vm, starter) = vm_host_of_one(&runtime, true);
    starter.leave();
    drop(vm);
    let held = vm_host.get("one").unwrap();
    let (begin, begun) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let stops = scope.spawn(|| {
            begin.send(()).unwrap();
            vm_host.stop("one", |entry| Arc::downgrade(&entry.vm))
        });
        begun.recv().unwrap();
        held.vm.wait(Duration::MAX).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!(!stops.is_finished(), "its name is not free");
        drop(held);
        assert!(stops.join().unwrap().unwrap().upgrade().is_none());
    });
    expect_free_name(&runtime);
}
