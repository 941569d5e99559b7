//! Leftovers of a completed copy: no memory stays watched, and no layer can be adopted by mistake.

use super::*;
use crate::layer::fill::AttachError;

/// Mappings of `ram` that the userfaultfd watches for missing pages, as the kernel has them.
fn watched(ram: &GuestRam) -> Vec<String> {
    let region = &ram.regions()[0];
    let inside = region.host_address()..region.host_address() + BYTES;
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut of, mut watched) = (None, Vec::new());
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap();
        if let Some((start, _)) = first.split_once('-') {
            let start = u64::from_str_radix(start, 16).unwrap();
            of = inside.contains(&start).then(|| line.to_owned());
        } else if first == "VmFlags:" && line.split_whitespace().any(|flag| flag == "um") {
            watched.extend(of.take());
        }
    }
    watched
}

#[test]
fn nothing_is_watched_once_all_pages_are_there() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let child = rig.child(&image);
        assert!(!watched(&child).is_empty(), "a hole is waited for");
        rig.let_run();
        image.finish_background().unwrap();
        assert_eq!(watched(&child), Vec::<String>::new(), "every fault of it would go round by the thread for ever");
        // Each target keeps its background copy, and another VM may reuse the address.
        assert_eq!(rig.engine.index().targets.len(), 0, "targets of a copy that is over");
        expect_image(&rig, &image, &MANY);
    }
}

#[test]
fn a_child_that_goes_first_is_no_target_any_more() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        let before = rig.engine.index().targets.len();
        let child = rig.child(&image);
        assert!(rig.engine.index().targets.len() > before);
        drop(child);
        assert_eq!(rig.engine.index().targets.len(), before, "its address may be another's now");
        rig.let_run();
        expect_image(&rig, &image, &MANY);
    }
}

/// The image was whole when it was checked, and its copy fails before the child's mapping is
/// watched.
#[test]
fn i13_a_child_that_comes_just_after_the_copy_failed_is_refused() {
    for store in stores() {
        let rig = Rig::new(store, &MANY);
        let (image, _) = rig.freeze_held();
        rig.engine.hooks.left.store(0, Ordering::Release);
        let bg_copy = Arc::clone(image.bg_copies().next().unwrap());
        assert!(bg_copy.finish().is_err());
        rig.engine.hooks.left.store(u64::MAX, Ordering::Release);
        let late = GuestRam::reserve(image.layout(), &rig.store).unwrap();
        let region = &late.regions()[0];
        let attached = bg_copy.attach(&region.at, MANY[0], 0, &region.failure);
        assert!(matches!(attached, Err(AttachError::Failed(_))), "it would read the holes as zeros");
        rig.let_run();
    }
}

/// The store is dropped, and with it the thread. Callbacks of VMs that lose memory later still run.
#[test]
fn who_loses_memory_after_the_thread_has_ended_is_told() {
    let engine = crate::freeze::background::CopyThread::start().unwrap();
    let shared = engine.shared().unwrap();
    drop(engine);
    let failure = Arc::<crate::freeze::background::LostMemory>::default();
    let (tell, told) = mpsc::channel();
    failure.on(Box::new(move |error| drop(tell.send(error.to_string()))));
    failure.set(&Arc::new(FillError::Gone));
    shared.tell_later(std::iter::once(failure));
    receive("the callback", &told);
}

/// A child's mapping of the middle of a file shows the file's pages from that place on.
#[test]
fn what_a_reader_shows_of_the_file_follows_its_own_place() {
    let at = Arc::new(crate::sys::Reservation::new(1100).unwrap());
    let (range, file) = (PageRange::new(500, 1000), PageRange::new(197, 697));
    let reader = crate::freeze::background::work::ReaderMapping { at, range, file, failure: Arc::default() };
    assert_eq!(reader.file_of(PageRange::new(0, 1100)), Some(file));
    assert_eq!(reader.file_of(PageRange::new(700, 710)), Some(PageRange::new(397, 407)));
    assert_eq!(reader.file_of(PageRange::new(450, 501)), Some(PageRange::new(197, 198)));
    assert_eq!(reader.file_of(PageRange::new(1000, 1001)), None);
}
