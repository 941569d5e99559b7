//! Images taken apart and put together again, and invalid parts.

use std::sync::Arc;

use clade_block::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_guests::BARE_ELF;
use clade_memory::{DontFork, PageRange, Store};
use clade_snapshot::SaveProgress;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{BootImage, BootSource};
use crate::kvm::testutil::host;
use crate::vm::tests::storm::{Pair, boot, goes_on};
use crate::vm::{
    ChildOptions, Context, DiskSpec, ForkImage, ImageParts, Leases, Overlays, SnapshotError, SnapshotOptions,
    TransferError, Vm, VmConfig,
};

const PAIRS: [Pair; 1] = [Pair::Relay];
/// A page that the guest does not use.
const PAGE: u64 = 1500;

impl ImageParts {
    fn copy(&self) -> Self {
        Self { bytes: self.bytes.clone(), files: self.files.iter().map(|file| file.try_clone().unwrap()).collect() }
    }
}

fn context() -> Option<Context> {
    Some(Context::new(Arc::new(host()?), Store::open_small().unwrap()).unwrap())
}

#[test]
fn an_image_that_is_imported_starts_the_vm_that_was_exported() {
    let (Some(giver), Some(receiver)) = (context(), context()) else { return };
    let parent = boot(&giver, &PAIRS);
    let memory = parent.ram().memory();
    let gpa = |page: u64| GuestAddress(page * 4096);
    (0..6).for_each(|page| memory.write_obj(page + 1, gpa(PAGE + page)).unwrap());
    let page = giver.store().reference_page(&[0x5a; 4096]).unwrap();
    let region = &parent.ram().regions()[0];
    for (at, what) in [(1, DontFork::Absent), (2, DontFork::Zeroed), (3, DontFork::Fresh(page))] {
        region.set_dont_fork(PageRange::with_len(PAGE + at, 1), Some(what)).unwrap();
    }
    let (image, _) = parent.fork().unwrap();
    let leases = Leases::default();
    let parts = image.export(&leases).unwrap();
    let there = ForkImage::import(&receiver, parts, Overlays::AsNamed).unwrap();
    assert_eq!(there.generation(), image.generation());
    // Ranges that grandchildren do not inherit are declared there too.
    let child = Vm::from_image(&receiver, "child", &there, ChildOptions::default()).unwrap();
    let grandchild =
        Vm::from_image(&receiver, "grandchild", &child.fork().unwrap().0, ChildOptions::default()).unwrap();
    for vm in [&child, &grandchild] {
        let word = |at: u64| vm.ram().memory().read_obj::<u64>(gpa(PAGE + at)).unwrap();
        assert_eq!([0, 2, 3, 4, 5].map(word), [1, 0, 0x5a5a_5a5a_5a5a_5a5a, 5, 6]);
        assert_eq!(vm.ram().regions()[0].dont_fork().len(), 3);
        goes_on(vm, &PAIRS).unwrap();
    }
    goes_on(&parent, &PAIRS).unwrap();
    drop((image, there, child));
    assert_eq!(leases.count(), 1, "the grandchild shows its layers");
    drop(grandchild);
    receiver.store().sweep();
    clade_test_support::wait_eq("leases of what no VM shows any more", &0, || leases.count());
}

#[test]
fn images_that_are_given_away_after_an_idle_time_are_watched_as_well() {
    let Some(context) = context() else { return };
    let (image, _) = boot(&context, &PAIRS).fork().unwrap();
    let leases = Leases::default();
    let export = || image.export(&leases).unwrap();
    let count = |expected: usize| clade_test_support::wait_eq("images in use", &expected, || leases.count());
    for round in 0..2 {
        let (first, second, third) = (export(), export(), export());
        assert!(leases.is_watched() && leases.count() == 3, "{round}");
        drop(second);
        count(2);
        drop((first, third));
        count(0);
        clade_test_support::wait_eq("the thread of a process that gives no images away", &false, || {
            leases.is_watched()
        });
    }
}

#[test]
fn parts_that_are_cut_changed_or_mixed_up_are_refused_or_are_an_image() {
    let Some(context) = context() else { return };
    let parent = boot(&context, &PAIRS);
    let (image, _) = parent.fork().unwrap();
    let leases = Leases::default();
    let parts = image.export(&leases).unwrap();
    let import = |parts: ImageParts| ForkImage::import(&context, parts, Overlays::AsNamed);
    import(parts.copy()).unwrap();

    for len in (0..parts.bytes.len()).step_by(parts.bytes.len() / 200 + 1) {
        let mut cut = parts.copy();
        cut.bytes.truncate(len);
        let error = import(cut).unwrap_err();
        assert!(matches!(error, TransferError::Malformed { .. }), "{len}: {error:?}");
    }
    let mut longer = parts.copy();
    longer.bytes.push(0);
    assert!(import(longer).unwrap_err().to_string().contains("1 bytes behind"));
    for lost in 0..parts.files.len() {
        let mut fewer = parts.copy();
        fewer.files.remove(lost);
        let error = import(fewer).unwrap_err();
        assert!(matches!(error, TransferError::Malformed { .. } | TransferError::Layer(_)), "{lost}: {error:?}");
    }
    // A changed byte may cause an error or another image, and no more.
    let head = u64::from_le_bytes(*parts.bytes.first_chunk().unwrap()) as usize;
    let mut random = clade_test_support::Random::new(0);
    let mut images = 0;
    for _ in 0..1500 {
        let mut changed = parts.copy();
        let at = random.below(head as u64 + 8) as usize;
        changed.bytes[at] ^= 1 << random.below(8);
        images += usize::from(import(changed).is_ok());
    }
    assert!(images < 1500, "some are refused");
    goes_on(&parent, &PAIRS).unwrap();
}

#[test]
fn a_layer_that_could_be_written_is_refused() {
    let Some(context) = context() else { return };
    let parent = boot(&context, &PAIRS);
    let (image, _) = parent.fork().unwrap();
    let mut parts = image.export(&Leases::default()).unwrap();
    let layer = image.ram().maps().next().unwrap().iter().next().map(|(_, source)| source.layer.clone()).unwrap();
    // A descriptor as this process has it, open for writing.
    parts.files[0] = std::os::fd::AsFd::as_fd(&layer).try_clone_to_owned().unwrap();
    let error = ForkImage::import(&context, parts, Overlays::AsNamed).unwrap_err();
    assert!(crate::error_chain(&error).contains("reading only"), "{}", crate::error_chain(&error));
}

/// The base of an incremental snapshot may be of an earlier VM of the name.
#[test]
fn a_snapshot_based_on_an_image_with_other_disks_is_refused() {
    let Some(context) = context() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut config = VmConfig::bare(32 << 20, 1).unwrap();
    let image = |config: &VmConfig| {
        let source = BootSource::new(BootImage::Bytes(BARE_ELF.into()));
        let vm = Vm::boot(&context, "disks", &Arc::new(config.clone()), &source).unwrap();
        vm.fork().unwrap().0
    };
    let none = image(&config);
    config.disks.push(DiskSpec { disk: DiskConfig::new(&path), device: BlockOptions::default() });
    let one = image(&config);
    let watch = SaveProgress::none();
    let base = dir.path().join("base");
    let (place, _) = none.save(&base, None, SnapshotOptions::default(), &watch).unwrap();
    let options = SnapshotOptions { incremental: true, ..SnapshotOptions::default() };
    let refused = one.save(&dir.path().join("next"), Some((&place, &none)), options, &watch).unwrap_err();
    assert!(matches!(refused, SnapshotError::Disks { found: 0, wanted: 1 }), "{refused:?}");
    assert!(!dir.path().join("next").exists());
}
