//! Failures in the middle of forks: descriptors and mappings that run out, and images that do not fit.

use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_harness::BareVcpu;
use clade_memory::{Access, GuestRam, PageRange, PinLifetime, RamError, RamLayout};
use clade_tests::{Guest, Holdings, Writer, expect_nothing_held, in_a_process_of_its_own, open_files_limit};
use clade_vmm::vm::{Vm, VmError};
use vm_memory::{Bytes, GuestAddress};

use super::{MIB, PAUSED, alone, turn};

/// A child is refused for lack of a descriptor at every place where it takes one (I13).
#[test]
fn children_refused_for_descriptors_leave_nothing_behind() {
    if !in_a_process_of_its_own("refused::children_refused_for_descriptors_leave_nothing_behind") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 2);
    parent.fill(Writer::Guest, 0, 2048, 1);
    let (image, _) = parent.fork();
    drop(Guest::child(&context, &image));
    let before = Holdings::count(context.store());
    let mut refused = 0;
    for extra in 0..24 {
        let made = {
            let _limit = open_files_limit(extra);
            Vm::from_image(&context, "child", &image, PAUSED)
        };
        match made {
            Ok(child) => Guest::from(child).expect(0, 2048, Some(1), "a child that was made after all"),
            Err(error) => {
                refused += 1;
                let text = clade_vmm::error_chain(&error);
                assert!(text.contains("os error 24") || text.contains("Too many open files"), "{extra}: {text}");
            }
        }
        before.expect_same(context.store(), &format!("refused at descriptor {extra}"));
    }
    assert!(refused >= 4, "a VM with two vCPUs has more descriptors than {refused}");
    parent.expect(0, 2048, Some(1), "parent");
    Guest::child(&context, &image).expect(0, 2048, Some(1), "a child afterwards");
}

/// A fork that cannot make its layer leaves the parent unchanged, and running (I13).
#[test]
fn a_fork_refused_for_descriptors_changes_nothing() {
    if !in_a_process_of_its_own("refused::a_fork_refused_for_descriptors_changes_nothing") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, 2048, 1);
    drop(parent.fork());
    parent.fill(Writer::Guest, 500, 1000, 2);
    let before = Holdings::count(context.store());
    let owned = parent.owned_work_pages();
    parent.vm().resume().unwrap();
    let error = {
        let _limit = open_files_limit(0);
        parent.vm().fork().unwrap_err()
    };
    assert!(matches!(error, VmError::Ram(RamError::Store(_))), "{error:?}");
    // The parent runs on: it answers without a resume.
    let [wrong, ..] =
        BareVcpu::new(parent.vm(), 0).run(Command::Verify { start: WORK_BASE, pages: 500, seed: 1 }).unwrap();
    assert_eq!(wrong, 0);
    parent.vm().pause().unwrap();
    assert_eq!(parent.owned_work_pages(), owned, "nothing was shared");
    before.expect_same(context.store(), "a refused fork");
    let child = parent.fork_child();
    parent.fill(Writer::Guest, 0, 2048, 3);
    child.expect(0, 500, Some(1), "the next fork's child");
    child.expect(500, 1000, Some(2), "the next fork's child");
}

/// The same for lack of mappings, in a fork and in the start of a child.
#[test]
fn a_fork_refused_for_mappings_changes_nothing() {
    if !in_a_process_of_its_own("refused::a_fork_refused_for_mappings_changes_nothing") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, 2048, 1);
    drop(parent.fork());
    // More pages than a freeze leaves in place, in two places.
    parent.fill(Writer::Guest, 100, 600, 2);
    let (image, _) = parent.fork();
    let before = Holdings::count(context.store());

    let layout = RamLayout::new(PAGE_SIZE).unwrap();
    let mut hogs = Vec::new();
    let full = loop {
        match GuestRam::reserve(&layout, context.store()) {
            Ok(hog) => hogs.push(hog),
            Err(error) => break error,
        }
    };
    assert!(matches!(full, RamError::Budget(_)), "{full:?}");
    let error = Vm::from_image(&context, "child", &image, PAUSED).unwrap_err();
    assert!(matches!(error, VmError::Ram(RamError::Budget(_))), "{error:?}");
    // Room for the shell, but not for the image's mappings.
    hogs.pop();
    let error = Vm::from_image(&context, "child", &image, PAUSED).unwrap_err();
    assert!(matches!(error, VmError::Ram(RamError::Budget(_))), "{error:?}");
    hogs.push(GuestRam::reserve(&layout, context.store()).unwrap());
    // A fork may be refused or do without new mappings; either way the parent is intact.
    let newborn_fork = {
        parent.fill(Writer::Guest, 1000, 600, 3);
        parent.vm().resume().unwrap();
        let forked = parent.vm().fork();
        parent.vm().pause().unwrap();
        forked
    };
    parent.expect(0, 100, Some(1), "parent");
    parent.expect(100, 600, Some(2), "parent");
    parent.expect(1000, 600, Some(3), "parent");
    drop(hogs);
    if let Ok((image, _)) = &newborn_fork {
        parent.fill(Writer::Guest, 1000, 600, 4);
        Guest::child(&context, image).expect(1000, 600, Some(3), "a fork in spite of it");
    }
    drop(newborn_fork);
    let child = Guest::child(&context, &image);
    child.expect(100, 600, Some(2), "a child afterwards");
    drop(child);
    let now = Holdings::count(context.store());
    // Without the files of the layers that the parent has been frozen to meanwhile.
    let others = |held: &Holdings| held.fds - held.layers;
    assert_eq!(others(&now).abs_diff(others(&before)) / 2, 0, "{now:?}, was {before:?}");
    drop((parent, image));
    expect_nothing_held(context.store(), "parent and image");
}

/// The first fork of a booted VM, which remaps everything, refused for mappings.
#[test]
fn a_first_fork_refused_for_mappings_changes_nothing() {
    if !in_a_process_of_its_own("refused::a_first_fork_refused_for_mappings_changes_nothing") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, 2048, 1);
    // A pinned page cuts the region into three mappings.
    let region = &parent.vm().ram().regions()[0];
    let pin = region.pin(PageRange::new(5000, 5001), Access::Write, PinLifetime::Transient).unwrap();
    let layout = RamLayout::new(PAGE_SIZE).unwrap();
    let hogs: Vec<GuestRam> = std::iter::from_fn(|| GuestRam::reserve(&layout, context.store()).ok()).collect();
    parent.vm().resume().unwrap();
    let error = parent.vm().fork().unwrap_err();
    assert!(matches!(error, VmError::Ram(RamError::Budget(_))), "{error:?}");
    parent.vm().pause().unwrap();
    let stats = parent.vm().memory_stats().unwrap();
    assert_eq!(
        (stats.exclusive, stats.shared, stats.reference),
        ((MIB << 20) / PAGE_SIZE, 0, 0),
        "all is its own still"
    );
    for page in [0, 5000, 8191] {
        assert!(region.ownership().get(page).0, "I2: page {page} is exclusive again");
    }
    parent.fill(Writer::Guest, 0, 100, 2);
    drop((hogs, pin));
    let child = parent.fork_child();
    parent.fill(Writer::Guest, 0, 2048, 3);
    child.expect(0, 100, Some(2), "the next fork's child");
    child.expect(100, 1948, Some(1), "the next fork's child");
}

#[test]
fn an_image_of_another_shape_is_refused() {
    let Some((_turn, context)) = alone() else { return };
    let parent = Guest::boot(&context, MIB, 1);
    let (image, _) = parent.fork();
    let before = Holdings::count(context.store());
    let ram = GuestRam::reserve(&RamLayout::new((MIB << 20) + PAGE_SIZE).unwrap(), context.store()).unwrap();
    let error = ram.adopt(image.ram()).unwrap_err();
    assert!(matches!(error, RamError::Shape { .. }), "{error:?}");
    assert!(error.to_string().contains(&(MIB << 20).to_string()), "{error}");
    assert!(ram.memory().read_obj::<u8>(GuestAddress(0)).is_err(), "it is empty still");
    ram.populate().unwrap();
    drop(ram);
    before.expect_same(context.store(), "a refused image");
}
