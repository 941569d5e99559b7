//! Failing copies: the parent's state, and the errors reported to its children.

use super::*;

fn is_lost(result: std::io::Result<()>) -> bool {
    matches!(result.map_err(|e| e.raw_os_error()), Err(Some(libc::EFAULT)))
}

fn expect_failed(rig: &Rig, image: &RamImage, child: &GuestRam, told: &mpsc::Receiver<String>) {
    // I13: the parent is whole, and writable.
    for page in 0..PAGES {
        assert_eq!(read(&rig.parent, page), all(&MANY, page), "page {page:#x}");
    }
    write(&rig.parent, 700, 0x70);
    write(&rig.parent, 700, mark(700));
    // The image can no longer be adopted. (A parent's write is allowed a moment before the failure
    // is visible to all.)
    wait_until("the image's failure", || image.failure().is_some());
    assert!(!image.is_pending());
    let late = GuestRam::reserve(image.layout(), &rig.store).unwrap();
    assert!(matches!(late.adopt(image), Err(RamError::Lost(_))));
    // A running child sees the failure, and reads no zeros.
    assert!(child.failure().is_some());
    receive("the callback", told);
    assert!(is_lost(touch(child, 1050)), "canon 32: an error, never zeros");
    assert!(touch(child, 1300).is_ok(), "what was never in the delta is still there");
    assert!(child.regions()[0].pin(PageRange::new(1050, 1051), Access::Write, PinLifetime::Transient).is_err());
    assert!(matches!(child.freeze(&Quiesced::by(&crate::NoWriters)), Err(RamError::Lost(_))));
    // A lost page does not return as zeros after a discard either.
    let at = (child.regions()[0].host_address() + 1050 * PAGE_SIZE) as *mut libc::c_void;
    // SAFETY: a page of the child's own memory, to which no Rust reference exists.
    assert_eq!(unsafe { libc::madvise(at, PAGE_SIZE as usize, libc::MADV_DONTNEED) }, 0);
    assert!(is_lost(touch(child, 1050)), "canon 32");
    // A device of the child may be at work in this process: its access is not the end of other VMs.
    read(child, 1050);
    assert!(child.failure().is_some());
    // The next freeze works as if the failed one had not happened.
    let (again, _) = rig.parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters)).unwrap();
    expect_image(rig, &again, &MANY);
    again.finish_background().unwrap();
    expect_image(rig, &again, &MANY);
}

fn tell(child: &GuestRam) -> mpsc::Receiver<String> {
    let (tell, told) = mpsc::channel();
    child.on_failure(move |error| drop(tell.send(error.to_string())));
    told
}

#[test]
fn i13_a_copy_that_fails_leaves_the_parent_whole_and_stops_the_child() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let told = tell(&child);
        assert_eq!(read(&child, 10), mark(10));
        // A child's access waits while the copy fails.
        let waiting = child.clone();
        rig.engine.hooks.left.store(0, Ordering::Release);
        let waiter = thread::spawn(move || touch(&waiting, 1040));
        assert!(is_lost(waiter.join().unwrap()), "canon 32");
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        assert_eq!(read(&child, 10), mark(10), "what it has got it keeps");
        rig.let_run();
        expect_failed(&rig, &image, &child, &told);
    }
}

#[test]
fn i13_a_parents_write_survives_a_copy_that_fails() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let told = tell(&child);
        rig.engine.hooks.left.store(0, Ordering::Release);
        write(&rig.parent, 600, mark(600));
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        rig.let_run();
        expect_failed(&rig, &image, &child, &told);
    }
}

#[test]
fn a_thread_that_panics_stops_the_child_and_goes_on_for_others() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let told = tell(&child);
        rig.engine.hooks.panic.store(true, Ordering::Release);
        rig.let_run();
        receive("the callback", &told);
        let told = tell(&child);
        expect_failed(&rig, &image, &child, &told);
    }
}

#[test]
fn a_refused_freeze_leaves_nothing_protected() {
    let rig = Rig::new(Store::open_small().unwrap(), &MANY);
    rig.engine.lose_userfaultfd();
    let refused = rig.parent.freeze_in(FreezeMode::Background, &Quiesced::by(&crate::NoWriters));
    assert!(matches!(refused, Err(RamError::Background(_))), "canon 25: by name");
    let (image, report) = rig.parent.freeze_in(FreezeMode::Auto, &Quiesced::by(&crate::NoWriters)).unwrap();
    assert_eq!(report.pending, 0, "eager instead");
    expect_image(&rig, &image, &MANY);
}

/// A fault that was read is answered after the copy has proceeded: by now the page has been
/// released, or is mapped over the delta.
#[test]
fn a_fault_that_is_answered_late_costs_the_parent_nothing() {
    for store in stores() {
        // Progress of the copy meanwhile: to the end, or step by step.
        for steps in [1, 5, 13, 14, 15, 16, 17, 18, u32::MAX] {
            let rig = Rig::new(store.clone(), &MANY);
            let (image, _) = rig.freeze_held();
            let hooks = &rig.engine.hooks;
            let before = hooks.faults_read.load(Ordering::Acquire);
            hooks.hold_answers.store(true, Ordering::Release);
            let writer = {
                let parent = rig.parent.clone();
                thread::spawn(move || write(&parent, 600, 0x66))
            };
            while hooks.faults_read.load(Ordering::Acquire) == before {
                thread::yield_now();
            }
            {
                let state = rig.parent.regions()[0].state();
                let bg_copy = background(state.freezing.as_ref().unwrap().layer.bg_copy().unwrap());
                (0..steps).take_while(|_| !bg_copy.step()).for_each(drop);
            }
            hooks.hold_answers.store(false, Ordering::Release);
            writer.join().unwrap();
            rig.let_run();
            rig.parent.finish_background().unwrap();
            assert!(image.failure().is_none(), "after {steps} steps: {:?}", image.failure());
            expect_image(&rig, &image, &MANY);
            // All pages are where the records place them: those that the VM owns and those of later
            // images.
            rig.parent.check(&Quiesced::by(&crate::NoWriters)).unwrap();
            write(&rig.parent, 700, 0x77);
            let now = |page| match page {
                600 => 0x66,
                700 => 0x77,
                _ => all(&MANY, page),
            };
            for _ in 0..2 {
                let (later, _) = rig.parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
                let child = rig.child(&later);
                (0..PAGES).for_each(|page| {
                    assert_eq!(read(&child, page), now(page), "after {steps} steps, page {page}");
                    assert_eq!(read(&rig.parent, page), now(page), "after {steps} steps, the parent's page {page}");
                });
            }
        }
    }
}

/// Every lift of a protection fails in turn, alone: before any run is mapped over the delta, in
/// between, and after. Neither parent nor child loses a byte.
#[test]
fn i14_a_release_that_fails_after_a_remap_loses_nothing() {
    let mut tried = 0;
    for nth in 0.. {
        let rig = Rig::new(Store::open_small().unwrap(), &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        write(&rig.parent, 600, 0x66);
        crate::testing::failpoint::plan().fail_call(Call::Release, nth);
        rig.parent.finish_background().unwrap();
        let fired = crate::testing::failpoint::plan().disarm().is_some();
        let want = |page| if page == 600 { 0x66 } else { all(&MANY, page) };
        for round in 0..2u8 {
            let (later, _) = rig.parent.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap();
            let second = rig.child(&later);
            for page in (0..PAGES).filter(|page| round == 0 || *page != 800) {
                assert_eq!(read(&second, page), want(page), "release {nth} failing, freeze {round}: page {page}");
                assert_eq!(read(&rig.parent, page), want(page), "release {nth} failing: the parent's page {page}");
            }
            write(&rig.parent, 800, 0x88);
        }
        if image.failure().is_none() {
            (0..PAGES).for_each(|page| assert_eq!(read(&child, page), all(&MANY, page), "the child's page {page}"));
        }
        if !fired {
            break;
        }
        tried += 1;
    }
    assert!(tried > 3, "{tried} releases");
}

/// A callback may query the VM: no lock is held, whichever thread noticed the failure.
#[test]
fn a_callback_may_ask_the_vm() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        let (tell, told) = mpsc::channel();
        let (own, parent) = (child.clone(), rig.parent.clone());
        child.on_failure(move |_| {
            let asked =
                (own.stats().is_ok(), own.finish_background().is_err(), parent.stats().is_ok(), own.is_inconsistent());
            tell.send(asked).unwrap();
        });
        rig.engine.hooks.left.store(0, Ordering::Release);
        // Noticed by a thread that holds the child's lock.
        let noticed = thread::spawn(move || child.finish_background().is_err());
        let asked = receive("a callback without a deadlock", &told);
        assert!(noticed.join().unwrap());
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        assert_eq!(asked, (true, true, true, false));
        rig.let_run();
    }
}

/// The last handle of a store may be dropped in a callback, on the store's own thread. The thread
/// cannot join itself.
#[test]
fn a_callback_may_let_go_of_the_store() {
    let rig = Rig::new(Store::open_small().unwrap(), &MANY);
    let (image, _) = rig.freeze_held();
    let child = rig.child(&image);
    let ((begin, begun), (go, may_go), (end, ended)) = (mpsc::channel(), mpsc::channel(), mpsc::channel());
    let store = rig.store.clone();
    child.on_failure(move |_| {
        begin.send(()).unwrap();
        let () = may_go.recv().unwrap();
        drop(store);
        end.send(()).unwrap();
    });
    rig.engine.hooks.fail_copies();
    rig.let_run();
    receive("the callback", &begun);
    rig.store.wait_reclaimed();
    drop((child, image, rig));
    go.send(()).unwrap();
    receive("the end of the callback that drops the store", &ended);
}
