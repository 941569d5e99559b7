//! Snapshots on disk on real KVM: bare guests saved while they run, and the VMs restored from them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clade_devices::virtio::vsock::VsockOptions;
use clade_guests::abi::Command;
use clade_guests::abi::disk::What;
use clade_memory::Backing;
use clade_snapshot::{Compression, Error, ParentDirs, compact, verify};
use clade_tests::{DiskFile, DiskGuest, Guest, Holdings, Turn, Writer, can_have_taps, expect_nothing_held};
use clade_vmm::kvm::{CpuTemplate, HostMismatch};
use clade_vmm::vm::{
    ChildOptions, Context, ForkImage, GenerationId, NetSpec, RestoreLoad, RestoreOptions, SnapshotError,
    SnapshotOptions, StopReason, Vm, VmConfig, VmError,
};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 48;
const PAGES: u64 = 4096;
const FULL: SnapshotOptions =
    SnapshotOptions { incremental: false, compression: Compression::None, replace: false, is_fixed: false };
const INCREMENTAL: SnapshotOptions =
    SnapshotOptions { incremental: true, compression: Compression::None, replace: false, is_fixed: false };
const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, erase: &[], before_start: None };
const LAZY: RestoreOptions =
    RestoreOptions { load: RestoreLoad::Lazy, overlays: None, sockets: None, parents: ParentDirs::siblings() };

fn turn() -> Option<(Turn, Context)> {
    let turn = Turn::take()?;
    let context = turn.context(Backing::Huge);
    Some((turn, context))
}

fn load(load: RestoreLoad) -> RestoreOptions {
    RestoreOptions { load, ..RestoreOptions::default() }
}

fn restored(context: &Context, dir: &Path, options: &RestoreOptions) -> Guest {
    Guest::child(context, &ForkImage::restore(context, dir, options).unwrap())
}

/// Saves a guest while it runs.
fn save(guest: &Guest, dir: &Path, options: SnapshotOptions) -> clade_vmm::vm::SnapshotReport {
    guest.vm().resume().unwrap();
    let report = guest.vm().snapshot(dir, options).unwrap();
    guest.vm().pause().unwrap();
    report
}

#[test]
fn a_vm_goes_on_from_the_instant_it_was_saved_at() {
    let Some((_turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::boot(&context, MIB, 1);
    guest.fill(Writer::Guest, 0, 600, 1);
    let ways = [
        ("mapped", Compression::None, RestoreLoad::Lazy),
        ("preloaded", Compression::None, RestoreLoad::Preload),
        ("unpacked", Compression::Zstd, RestoreLoad::Lazy),
    ];
    for (name, compression, way) in ways {
        let at = dir.path().join(name);
        let report =
            save(&guest, &at, SnapshotOptions { incremental: false, compression, replace: false, is_fixed: false });
        assert!(report.saved.data_pages >= 600, "{report:?}");
        // Later writes are in no snapshot's past.
        guest.fill(Writer::Guest, 10, 20, 2);
        let one = restored(&context, &at, &load(way));
        let two = restored(&context, &at, &load(way));
        one.expect(0, 600, Some(1), name);
        one.fill(Writer::Guest, 0, 100, 3);
        two.expect(0, 600, Some(1), "its sibling has written, and nobody else");
        one.expect(0, 100, Some(3), name);
        guest.expect(10, 20, Some(2), "the VM that was saved runs on");
        guest.fill(Writer::Guest, 10, 20, 1);
        // Pages that the guest's code does not touch are zeros.
        two.expect(2000, 100, None, name);
        assert_eq!(two.vm().generation(), one.vm().generation());
    }
}

#[test]
fn incremental_snapshots_hold_what_changed_and_are_as_good_as_full_ones() {
    let Some((_turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let guest = Guest::boot(&context, MIB, 1);
    guest.vm().resume().unwrap();
    let error = guest.vm().snapshot(&at("first"), INCREMENTAL).unwrap_err();
    assert!(matches!(&error, SnapshotError::NoBase { name } if name == "guest"), "{error}");
    guest.vm().pause().unwrap();
    guest.fill(Writer::Guest, 0, PAGES, 1);
    let full = save(&guest, &at("full"), FULL);
    guest.fill(Writer::Guest, 100, 50, 2);
    let second = save(&guest, &at("second"), INCREMENTAL);
    assert!((50..400).contains(&second.saved.data_pages), "{:?} of {:?}", second.saved, full.saved);
    // A VM restored from the second, changed and saved in its turn: not the VM of the first two.
    let other = restored(&context, &at("second"), &LAZY);
    other.fill(Writer::Guest, 200, 10, 3);
    let third = save(&other, &at("third"), INCREMENTAL);
    assert!((10..400).contains(&third.saved.data_pages), "{:?}", third.saved);
    let check = |name: &str, way| {
        let vm = restored(&context, &at(name), &load(way));
        vm.expect(0, 100, Some(1), name);
        vm.expect(100, 50, Some(2), name);
        vm.expect(150, 50, Some(1), name);
        vm.expect(200, 10, Some(3), name);
        vm.expect(210, PAGES - 210, Some(1), name);
    };
    check("third", RestoreLoad::Lazy);
    check("third", RestoreLoad::Preload);
    assert_eq!(verify(&at("third"), &ParentDirs::siblings()).unwrap().snapshots, 3);
    // A full snapshot of a lazily loaded VM has all of its memory.
    let whole = save(&restored(&context, &at("third"), &LAZY), &at("whole"), FULL);
    assert!(whole.saved.data_pages >= full.saved.data_pages, "{:?} of {:?}", whole.saved, full.saved);
    assert_eq!(verify(&at("whole"), &ParentDirs::siblings()).unwrap().snapshots, 1);
    check("whole", RestoreLoad::Lazy);
    // Onto the files that its own memory is mapped from.
    let vm = restored(&context, &at("whole"), &LAZY);
    save(&vm, &at("whole"), FULL);
    vm.expect(0, 100, Some(1), "its files were replaced under it");
    check("whole", RestoreLoad::Lazy);
    // But never onto a snapshot that it depends on.
    vm.vm().resume().unwrap();
    let error = vm.vm().snapshot(&at("whole"), INCREMENTAL).unwrap_err();
    assert!(matches!(error, SnapshotError::Files(Error::OwnChain { .. })), "{error}");
    vm.vm().pause().unwrap();
    vm.expect(0, 100, Some(1), "and runs on");
    compact(&at("third"), &ParentDirs::siblings(), &clade_snapshot::SaveProgress::none()).unwrap();
    fs::remove_dir_all(at("full")).unwrap();
    fs::remove_dir_all(at("second")).unwrap();
    check("third", RestoreLoad::Lazy);
}

#[test]
fn a_disk_is_saved_with_the_vm_at_the_same_instant() {
    let Some((_turn, context)) = turn() else { return };
    let file = DiskFile::new(2 << 20, 7);
    let at = |name: &str| file.beside(name);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    let sectors = (2 << 20) / 512;
    let run = |what, sectors, seed| DiskGuest::whole(what, sectors, seed);
    parent.expect(run(What::Write, 512, 8), "written before");
    save(&parent.guest, &at("full"), FULL);
    parent.expect(run(What::Write, 64, 9), "written after");
    save(&parent.guest, &at("more"), INCREMENTAL);
    // In the middle of a write of everything.
    let seq = parent.begin(run(What::Write, sectors, 10));
    let report = parent.vm().snapshot(&at("midst"), INCREMENTAL).unwrap();
    assert_eq!(parent.finish(seq), (sectors / 8, 0, 0));
    assert!(report.saved.data_pages > 0);
    for (name, way) in [("full", RestoreLoad::Lazy), ("full", RestoreLoad::Preload)] {
        let vm = DiskGuest { guest: restored(&context, &at(name), &load(way)) };
        vm.expect(run(What::Verify, 512, 8), name);
        // Its own writes are private.
        vm.expect(run(What::Write, 32, 11), name);
        vm.expect(run(What::Verify, 32, 11), name);
        assert!(vm.vm().with_disk(0, |disk| disk.is_forked()).unwrap());
    }
    let vm = DiskGuest { guest: restored(&context, &at("more"), &LAZY) };
    vm.expect(run(What::Verify, 64, 9), "the base and what changed");
    drop(vm);
    // Requests in flight are done again, against its own disk.
    let vm = DiskGuest { guest: restored(&context, &at("midst"), &LAZY) };
    assert_eq!(vm.finish(seq), (sectors / 8, 0, 0));
    vm.expect(run(What::Verify, sectors, 10), "finished after it was restored");
    drop(vm);
    let vm = DiskGuest { guest: restored(&context, &at("full"), &LAZY) };
    vm.expect(run(What::Verify, 512, 8), "nobody wrote to the snapshot's files");
    for name in ["full", "more", "midst"] {
        verify(&at(name), &ParentDirs::siblings()).unwrap();
    }
    // Compressed, it is unpacked into a file of its own.
    save(
        &parent.guest,
        &at("small"),
        SnapshotOptions { incremental: false, compression: Compression::Zstd, replace: false, is_fixed: false },
    );
    let before = unnamed_in(at("small").parent().unwrap());
    let vm = DiskGuest { guest: restored(&context, &at("small"), &LAZY) };
    vm.expect(run(What::Verify, sectors, 10), "unpacked");
    // No process opens that file for writing again.
    let mut unpacked = unnamed_in(at("small").parent().unwrap());
    unpacked.retain(|inode, _| !before.contains_key(inode));
    assert!(!unpacked.is_empty() && unpacked.values().all(|mode| *mode == 0o400), "{unpacked:?}");
}

/// Returns inode and mode of the files without a name in a directory that this process has open.
fn unnamed_in(dir: &Path) -> HashMap<u64, u32> {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let is_unnamed =
        |file: PathBuf| file.starts_with(dir) && file.to_str().is_some_and(|file| file.ends_with("(deleted)"));
    let unnamed = descriptors.filter(|path| fs::read_link(path).is_ok_and(is_unnamed));
    unnamed.filter_map(|path| fs::metadata(path).ok()).map(|file| (file.ino(), file.mode() & 0o777)).collect()
}

#[test]
fn what_is_touched_first_is_recorded_and_read_ahead() {
    let Some((_turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("vm");
    let guest = Guest::boot(&context, MIB, 1);
    guest.fill(Writer::Guest, 0, PAGES, 1);
    save(&guest, &at, FULL);
    let error = ForkImage::restore(&context, &at, &load(RestoreLoad::WorkingSet)).unwrap_err();
    assert!(matches!(error, SnapshotError::Cold { .. }), "{error}");
    let first = restored(&context, &at, &LAZY);
    first.expect(0, 32, Some(1), "touched");
    let pages = first.vm().record_working_set().unwrap();
    assert!((32..PAGES).contains(&pages), "{pages} pages");
    let second = restored(&context, &at, &load(RestoreLoad::WorkingSet));
    second.expect(0, PAGES, Some(1), "read ahead, and the rest as ever");
    verify(&at, &ParentDirs::siblings()).unwrap();
}

/// The machine's shape, its CPU template and its generation id are saved with it; the id changes.
#[test]
fn restored_vms_have_another_generation_and_the_same_cpu() {
    let Some((turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("vm");
    let mut config = VmConfig::bare(MIB << 20, 2).unwrap();
    (config.irqchip, config.acpi) = (clade_vmm::vm::Irqchip::Full, true);
    // Every x86-64 host has it.
    config.cpu = CpuTemplate::V1;
    let guest = Guest::boot_as(&context, config);
    let id = |guest: &Guest| GenerationId::of(guest.vm().ram().memory()).unwrap();
    let report = save(&guest, &at, FULL);
    assert_eq!(guest.vm().config().cpu, CpuTemplate::V1);
    let fresh = turn.context(Backing::Huge);
    let mut ids = vec![id(&guest), id(&guest.fork_child())];
    for _ in 0..3 {
        let vm = restored(&fresh, &at, &LAZY);
        assert_eq!((vm.vm().config().cpu, vm.vm().config().cpus()), (CpuTemplate::V1, 2));
        ids.push(id(&vm));
        vm.run(Command::Idle);
    }
    let all = ids.len();
    let different: HashSet<GenerationId> = ids.into_iter().collect();
    assert_eq!(different.len(), all, "each has its own");
    assert!(report.times.pause <= report.took, "{report:?}");
}

#[test]
fn restored_vms_have_interfaces_and_addresses_of_their_own() {
    let Some((_turn, context)) = turn() else { return };
    if !can_have_taps() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("vm");
    let mut config = VmConfig::bare(MIB << 20, 1).unwrap();
    config.nets = vec![NetSpec::new("cladet%d")];
    let cid = clade_test_support::Cid::take();
    config.vsock = Some(VsockOptions { cid: cid.number().into(), socket: dir.path().join("vm.vsock") });
    let guest = Guest::boot_as(&context, config);
    save(&guest, &at, FULL);
    let sockets = tempfile::tempdir().unwrap();
    let options = RestoreOptions { sockets: Some(sockets.path().to_owned()), ..LAZY };
    let image = ForkImage::restore(&context, &at, &options).unwrap();
    // Beside the saved VM, which still has its own.
    let vms: Vec<Vm> = ["a", "b", "c"].map(|name| Vm::from_image(&context, name, &image, PAUSED).unwrap()).into();
    let all: Vec<&Vm> = vms.iter().chain([guest.vm()]).collect();
    let different = |what: &str, of: fn(&Vm) -> String| {
        let values: HashSet<String> = all.iter().map(|vm| of(vm)).collect();
        assert_eq!(values.len(), all.len(), "{what}: {values:?}");
    };
    different("MAC addresses", |vm| vm.identity().nets[0].mac.to_string());
    different("interfaces", |vm| vm.identity().nets[0].tap.clone());
    different("CIDs", |vm| vm.identity().vsock.as_ref().unwrap().cid.to_string());
    different("sockets", |vm| vm.identity().vsock.as_ref().unwrap().socket.display().to_string());
    // The snapshot's socket path and interface name are not trusted.
    assert!(vms[0].identity().vsock.as_ref().unwrap().socket.starts_with(sockets.path()));
    assert!(!vms[0].identity().nets[0].tap.starts_with("cladet"));
    let nowhere = ForkImage::restore(&context, &at, &LAZY).unwrap();
    assert!(Vm::from_image(&context, "d", &nowhere, PAUSED).is_err(), "nobody has chosen its socket");
    let before = vms[0].identity().nets[0].mac;
    vms[0].reset_to_origin().unwrap();
    assert_eq!(vms[0].identity().nets[0].mac, before, "a reset keeps its own");
}

#[test]
fn damaged_and_foreign_snapshots_are_refused_by_name() {
    let Some(turn) = Turn::alone() else { return };
    let context = turn.context(Backing::Huge);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let guest = Guest::boot(&context, MIB, 1);
    guest.fill(Writer::Guest, 0, 64, 1);
    save(&guest, &at("good"), FULL);
    let before = Holdings::count(context.store());
    let refused = |dir: &Path| ForkImage::restore(&context, dir, &LAZY).unwrap_err();
    assert!(matches!(refused(&at("none")), SnapshotError::Files(Error::File { .. })));
    let copy = |name: &str| {
        let to = at(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(at("good")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    };
    // A flipped bit of a small file; in the data only a preload, or a verification, sees it.
    for file in ["manifest.json", "state", "memory.index"] {
        let bad = copy(&format!("flipped-{file}"));
        let mut bytes = fs::read(bad.join(file)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(bad.join(file), bytes).unwrap();
        let error = clade_vmm::error_chain(&refused(&bad));
        assert!(error.contains(file), "{error}");
    }
    let bad = copy("flipped-data");
    let data = fs::File::options().write(true).read(true).open(bad.join("memory.data")).unwrap();
    let page = clade_guests::abi::WORK_BASE + 17;
    let mut byte = [0];
    data.read_exact_at(&mut byte, page).unwrap();
    data.write_all_at(&[byte[0] ^ 1], page).unwrap();
    drop(data);
    let error = ForkImage::restore(&context, &bad, &load(RestoreLoad::Preload)).unwrap_err();
    assert!(clade_vmm::error_chain(&error).contains("memory.data"), "{}", clade_vmm::error_chain(&error));
    verify(&bad, &ParentDirs::siblings()).unwrap_err();
    let bad = copy("short");
    let data = fs::File::options().write(true).open(bad.join("memory.data")).unwrap();
    data.set_len(4096).unwrap();
    drop(data);
    assert!(clade_vmm::error_chain(&refused(&bad)).contains("memory.data"));
    // A directory with other files is not replaced.
    let other: PathBuf = at("precious");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("letter"), "dear").unwrap();
    guest.vm().resume().unwrap();
    let error = guest.vm().snapshot(&other, FULL).unwrap_err();
    assert!(matches!(error, SnapshotError::Files(Error::NotASnapshot { .. })), "{error}");
    assert_eq!(fs::read(other.join("letter")).unwrap(), b"dear");
    guest.vm().pause().unwrap();
    guest.expect(0, 64, Some(1), "and the VM runs on");
    // The last one was of a VM that ran. It is refused after memory is frozen: the guest's writes
    // until then, if only on its stack after its last report, are a layer of the VM's.
    before.expect_a_layer_more_at_most(context.store(), "refusals leave nothing behind");
}

#[test]
fn a_host_that_lacks_what_the_guest_was_given_is_told_what() {
    let Some((_turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::boot(&context, MIB, 1);
    save(&guest, &dir.path().join("vm"), FULL);
    let snapshot = clade_snapshot::Snapshot::open(&dir.path().join("vm"), &ParentDirs::siblings()).unwrap();
    let facts = clade_vmm::vm::sections::host_requirements(snapshot.sections().iter()).unwrap();
    facts.check(context.host()).unwrap();
    let mut json = serde_json::to_value(&facts).unwrap();
    json["vendor"] = "ElbrusOfMCST".into();
    let other: clade_vmm::kvm::HostRequirements = serde_json::from_value(json).unwrap();
    let error = other.check(context.host()).unwrap_err();
    assert!(matches!(error, HostMismatch::Vendor { .. }), "{error}");
}

#[test]
fn a_stopped_vm_is_not_saved_and_nothing_is_left() {
    let Some((_turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("vm");
    let guest = Guest::boot(&context, MIB, 1);
    save(&guest, &at, FULL);
    guest.vm().stop();
    let error = guest.vm().snapshot(&at, FULL).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Vm(clade_vmm::vm::VmError::Stopped(StopReason::Requested))),
        "{}",
        clade_vmm::error_chain(&error)
    );
    verify(&at, &ParentDirs::siblings()).unwrap();
    drop(guest);
    let image: Arc<ForkImage> = ForkImage::restore(&context, &at, &LAZY).unwrap();
    let many: Vec<Vm> = (0..20).map(|_| Guest::child(&context, &image).into_vm()).collect();
    drop((many, image));
    expect_nothing_held(context.store(), "after twenty restored VMs");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporaries");
}

/// A long snapshot does not delay the stop of its VM, and leaves no partial files.
#[test]
fn stopping_a_vm_ends_its_snapshot() {
    let Some((_turn, context)) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::boot(&context, 384, 1);
    let (image, _) = guest.vm().fork().unwrap();
    // Incompressible data, so that the snapshot takes its time.
    let fill = |ram: &clade_memory::GuestRam| {
        let mut word = 88_172_645_463_325_252_u64;
        let mut noise = vec![0; 1 << 20];
        for mib in 64..320_u64 {
            for eight in noise.chunks_exact_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                eight.copy_from_slice(&word.to_ne_bytes());
            }
            ram.memory().write_slice(&noise, GuestAddress(mib << 20)).unwrap();
        }
    };
    let options = ChildOptions { paused: true, erase: &[], before_start: Some(&fill) };
    let zstd = SnapshotOptions { incremental: false, compression: Compression::Zstd, replace: false, is_fixed: false };
    // On a busy machine a snapshot may be done before its VM is stopped: then the test is repeated.
    let cancelled = (0..20).any(|n| {
        let vm = Vm::from_image(&context, &format!("noise-{n}"), &image, options).unwrap();
        let at = dir.path().join(format!("saved-{n}"));
        let saved = std::thread::scope(|scope| {
            let saves = scope.spawn(|| vm.snapshot(&at, zstd).map_err(Box::new));
            while !saves.is_finished() && vm.snapshot_progress().is_none_or(|(done, _)| done == 0) {
                std::thread::sleep(Duration::from_millis(1));
            }
            vm.stop();
            saves.join().unwrap()
        });
        let Err(error) = saved else { return false };
        assert!(matches!(*error, SnapshotError::Vm(VmError::Stopped(StopReason::Requested))), "{error:?}");
        assert!(!at.exists());
        true
    });
    assert!(cancelled, "none of twenty snapshots ended with its VM");
}
