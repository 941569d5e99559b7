//! Guest memory and forked processes (R19): these inherit none of it, regardless of its kind of
//! mapping.

use std::fs;
use std::path::Path;
use std::time::Duration;

use clade_memory::{FreezeMode, GuestRam, PAGE_SIZE, PageRange, Quiesced};
use clade_test_support::wait_until;

use crate::{born, child, fill, fill_all, freeze, high, stores};

/// The accessible mappings of a VM's regions, each with the kernel's flags of it.
fn mapped(ram: &GuestRam) -> Vec<(String, Vec<String>)> {
    let inside = |start: u64| {
        let mut regions = ram.regions().iter().map(|region| (region.host_address(), region.pages() * PAGE_SIZE));
        regions.any(|(from, bytes)| (from..from + bytes).contains(&start))
    };
    let (mut mapped, mut of) = (Vec::new(), None);
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut fields = line.split_whitespace();
        let first = fields.next().unwrap();
        if let Some((start, _)) = first.split_once('-') {
            let start = u64::from_str_radix(start, 16).unwrap();
            let is_accessible = fields.next().unwrap().starts_with('r');
            of = (is_accessible && inside(start)).then(|| line.to_owned());
        } else if first == "VmFlags:"
            && let Some(of) = of.take()
        {
            mapped.push((of, fields.map(str::to_owned).collect()));
        }
    }
    mapped
}

/// `dc` is the kernel's VM_DONTCOPY. The thread of a background copy maps a run and then sets the
/// flag, so a mapping may lack it for a moment.
fn expect_not_inherited(ram: &GuestRam, what: &str) {
    assert!(!mapped(ram).is_empty(), "{what}: nothing is mapped");
    let mut last = None;
    wait_until(&format!("R19: {what}: that no forked process inherits a mapping"), || {
        let inherited = mapped(ram).into_iter().find(|(_, flags)| !flags.iter().any(|flag| flag == "dc"));
        if inherited.is_some() && inherited != last {
            eprintln!("{what}: a forked process inherits {inherited:?}");
        }
        last = inherited;
        last.is_none()
    });
}

#[test]
fn r19_a_forked_process_inherits_no_guest_memory() {
    for store in stores() {
        let ram = born(&store, 1);
        expect_not_inherited(&ram, "born");
        let first = freeze(&ram);
        expect_not_inherited(&ram, "frozen");
        fill(&ram, 1, PageRange::new(40, 440), 2);
        drop(freeze(&ram));
        expect_not_inherited(&ram, "with a delta mapped");
        fill_all(&ram, 3);
        let (image, _) = ram.freeze_in(FreezeMode::Background, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
        expect_not_inherited(&ram, "while it is copied");
        expect_not_inherited(&child(&image, &store), "a child");
        ram.finish_background().unwrap();
        expect_not_inherited(&ram, "with its copy mapped");
        high(&ram).discard(PageRange::new(100, 200)).unwrap();
        expect_not_inherited(&ram, "discarded");
        fill(&ram, 1, PageRange::new(300, 340), 4);
        high(&ram)
            .evict(PageRange::new(300, 340), Path::new("/var/tmp"), &Quiesced::by(&clade_memory::NoWriters))
            .unwrap();
        expect_not_inherited(&ram, "evicted");
        ram.reset(&first, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO).unwrap();
        expect_not_inherited(&ram, "reset");
    }
}
