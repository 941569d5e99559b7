//! Deliberate breaks, one for each invariant, which prove that the tests below detect violations.
//! Compiled only for tests.

/// A deliberate break. I8 is broken in the model of `ownership/word.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// I1: a pin gives a device a page that is not the VM's own.
    PinInPlace,
    /// I2: a freeze shares pages and leaves the VM their bits.
    KeepBits,
    /// I3: a freeze remaps pages under their pins.
    RemapPinned,
    /// I3: a freeze leaves pinned pages out of the layer.
    ForgetPinned,
    /// I4: the base file stays writable after it has become a layer.
    WriteLayer,
    /// I5: a freeze trusts the table although the kernel knows better.
    BelieveTable,
    /// I6: pinning a part of a block counts all of it.
    CountBlock,
    /// I7: a discard ignores pins.
    DropPinned,
    /// I9: a long-term read pin does not unshare.
    ReadInPlace,
    /// I10: reference pages are marked exclusive.
    OwnReference,
    /// I11: a child inherits no-fork pages.
    InheritAll,
    /// I12: splitting a block loses the state of its pages.
    SplitBare,
    /// I13: a refused freeze does not restore the bits.
    ForgetUndo,
    /// I14: mapped pages are not entered in the map.
    LeaveMap,
    /// I15: a long-term pin leaves pages clean.
    LeaveClean,
    /// I8: a pin checks the bit and counts in two steps. Detected by the schedules, like the breaks
    /// below.
    CountUnchecked,
    /// I3: a background freeze leaves pinned pages to be copied later.
    CopyPinnedLater,
    /// D4: a protected page is released before it is copied.
    ReleaseUncopied,
    /// D4: a run is mapped over its copy although it may have been written since.
    ShareWritten,
}

/// Whether to apply a break.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn broken(_how: Break) -> bool {
    false
}

#[cfg(test)]
pub(crate) use tests::broken;

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use vm_memory::{Bytes, GuestAddress};

    use super::Break;
    use crate::region::pin::{Access, DmaPin, PinLifetime};
    use crate::testing::failpoint::plan;
    use crate::units::{BLOCK_PAGES, PAGE_SIZE, PageRange};
    use crate::{DontFork, FreezeMode, GuestRam, Quiesced, RamImage, RamLayout, Store};

    thread_local! {
        static BROKEN: Cell<Option<Break>> = const { Cell::new(None) };
    }

    pub(crate) fn broken(how: Break) -> bool {
        BROKEN.get() == Some(how)
    }

    /// Runs `work` with a deliberate break, and returns its panic.
    pub(crate) fn with_break(how: Break, work: impl FnOnce()) -> std::thread::Result<()> {
        BROKEN.set(Some(how));
        let noticed = catch_unwind(AssertUnwindSafe(work));
        BROKEN.set(None);
        noticed
    }

    const PAGES: u64 = 3 * BLOCK_PAGES;

    struct Rig {
        store: Store,
        ram: GuestRam,
    }

    impl Rig {
        fn base() -> Self {
            let store = Store::open().unwrap();
            let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
            ram.populate().unwrap();
            let rig = Self { store, ram };
            (0..PAGES).for_each(|page| rig.put(page, page + 1));
            rig
        }

        fn put(&self, page: u64, word: u64) {
            self.ram.memory().write_obj(word, GuestAddress(page * PAGE_SIZE)).unwrap();
        }

        fn get(&self, page: u64) -> u64 {
            word(&self.ram, page)
        }

        fn freeze(&self) -> RamImage {
            self.ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters)).unwrap().0
        }

        fn child(&self, image: &RamImage) -> GuestRam {
            let child = GuestRam::reserve(image.layout(), &self.store).unwrap();
            child.adopt(image).unwrap();
            child
        }

        fn check(&self) {
            self.ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
        }
    }

    fn word(ram: &GuestRam, page: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
    }

    /// A device's write through a pin reaches the guest, and no other VM.
    fn device_writes(first: u64, pages: u64) {
        let rig = Rig::base();
        let image = rig.freeze();
        let region = &rig.ram.regions()[0];
        let pin = region.pin(PageRange::with_len(first, pages), Access::Write, PinLifetime::Transient).unwrap();
        // Before the first write: a CPU's write would break COW, and hide that the pin did not.
        rig.check();
        pin.slice().write_obj(77u64, 0).unwrap();
        assert_eq!(rig.get(first), 77);
        drop(pin);
        assert_eq!(word(&rig.child(&image), first), first + 1);
        rig.check();
    }

    /// A pin is held across a freeze: device and guest continue to see each other's writes, and the
    /// child sees the instant of the freeze.
    fn pin_across_a_freeze() {
        use crate::dma::Device;
        let rig = Rig::base();
        let range = PageRange::new(700, 710);
        let mut device = Device::attach(rig.ram.regions()[0].pin(range, Access::Write, PinLifetime::LongTerm).unwrap());
        let image = rig.freeze();
        rig.put(705, 4);
        let seen = device.read();
        assert_eq!(seen[5 * PAGE_SIZE as usize], 4, "the device reads a frame the guest has left");
        device.write(9);
        assert_eq!(rig.get(705), u64::from_ne_bytes([9; 8]), "the guest does not see what the device wrote");
        let child = rig.child(&image);
        range_words(range).for_each(|page| assert_eq!(word(&child, page), page + 1, "page {page} of the child"));
        rig.check();
    }

    fn range_words(range: PageRange) -> std::ops::Range<u64> {
        range.start..range.end
    }

    fn freeze_twice() {
        let rig = Rig::base();
        let first = rig.freeze();
        rig.check();
        (0..PAGES).step_by(3).for_each(|page| rig.put(page, 5));
        let second = rig.freeze();
        rig.check();
        (0..PAGES).for_each(|page| rig.put(page, 6));
        let (one, two) = (rig.child(&first), rig.child(&second));
        for page in 0..PAGES {
            assert_eq!(word(&one, page), page + 1);
            assert_eq!(word(&two, page), if page % 3 == 0 { 5 } else { page + 1 });
        }
    }

    fn pins_are_exact() {
        let rig = Rig::base();
        let region = &rig.ram.regions()[0];
        let pins = [(3, 4), (0, 1024), (500, 600)]
            .map(|(a, b)| region.pin(PageRange::new(a, b), Access::Write, PinLifetime::Transient).unwrap());
        let pinned = |page: u64| u32::from(page == 3) + u32::from(page < 1024) + u32::from((500..600).contains(&page));
        let wrong = (0..PAGES).find(|page| region.ownership().get(*page) != (true, pinned(*page)));
        if let Some(page) = wrong {
            // Dropping the miscounted pins would panic during the panic.
            std::mem::forget(pins);
            panic!("page {page} is {:?}, with {} pins", region.ownership().get(page), pinned(page));
        }
        drop(pins);
        assert_eq!(region.ownership().counts(region.range()).pins, 0);
    }

    fn discard_under_a_pin() {
        let rig = Rig::base();
        let region = &rig.ram.regions()[0];
        let pin = region.pin(PageRange::new(8, 10), Access::Write, PinLifetime::LongTerm).unwrap();
        region.discard(PageRange::new(0, 100)).unwrap();
        rig.check();
        assert_eq!((rig.get(7), rig.get(8), rig.get(9), rig.get(10)), (0, 9, 10, 0));
        drop(pin);
    }

    /// A reader that uses its frames as they are, like a device: the kernel splices them into a
    /// pipe. (io_uring would have the kernel unshare them first, and hide that the pin did not.)
    fn splice(pin: &DmaPin) -> OwnedFd {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut bytes = libc::iovec { iov_base: pin.host_address().cast(), iov_len: pin.len() };
        // SAFETY: the bytes are pinned guest memory, which lives as long as the pin; there is no
        // Rust reference into it.
        let spliced = unsafe { libc::vmsplice(write.as_raw_fd(), &raw mut bytes, 1, 0) };
        assert_eq!(spliced, pin.len() as isize, "{}", std::io::Error::last_os_error());
        read
    }

    fn long_read() {
        let rig = Rig::base();
        let image = rig.freeze();
        let pin = rig.ram.regions()[0].pin(PageRange::with_len(30, 1), Access::Read, PinLifetime::LongTerm).unwrap();
        let device = splice(&pin);
        rig.put(30, 6);
        let mut seen = [0; 8];
        assert_eq!(rustix::io::read(&device, &mut seen).unwrap(), 8);
        assert_eq!(u64::from_ne_bytes(seen), 6, "the device does not see the guest's later write");
        assert_eq!(word(&rig.child(&image), 30), 31);
    }

    fn reference_pages() {
        let rig = Rig::base();
        rig.freeze();
        let page = rig.store.reference_page(&[3; PAGE_SIZE as usize]).unwrap();
        let region = &rig.ram.regions()[0];
        region.map_reference(PageRange::new(40, 80), &page).unwrap();
        rig.check();
        let pin = region.pin(PageRange::with_len(41, 1), Access::Write, PinLifetime::Transient).unwrap();
        pin.slice().write_obj(1u64, 0).unwrap();
        assert_eq!((rig.get(41), rig.get(42)), (1, u64::from_ne_bytes([3; 8])));
    }

    fn dont_fork() {
        let rig = Rig::base();
        rig.ram.regions()[0].set_dont_fork(PageRange::new(20, 24), Some(DontFork::Zeroed)).unwrap();
        let first = rig.child(&rig.freeze());
        assert_eq!((word(&first, 19), word(&first, 20), word(&first, 24)), (20, 0, 25));
        assert_eq!(rig.get(20), 21, "the parent keeps it");
    }

    fn refused_freeze() {
        let rig = Rig::base();
        let region = &rig.ram.regions()[0];
        let pin = region.pin(PageRange::new(1, 2), Access::Write, PinLifetime::LongTerm).unwrap();
        plan().arm(0, false);
        let refused = rig.ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&crate::NoWriters));
        assert!(plan().disarm().is_some() && refused.is_err());
        (0..PAGES).for_each(|page| assert!(region.ownership().get(page).0, "page {page} has lost its bit"));
        drop(pin);
    }

    /// Pages that only a device has written survive the kernel's reclaim.
    fn device_writes_and_memory_is_short() {
        use crate::dma::Device;
        for store in [Store::open().unwrap(), Store::open_small().unwrap()] {
            let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), &store).unwrap();
            ram.populate().unwrap();
            let region = &ram.regions()[0];
            for (range, reads_first) in [(PageRange::new(3, 7), true), (PageRange::new(600, 620), false)] {
                let look = |page: u64| word(&ram, page);
                if reads_first {
                    // Mapped, hence writable, and clean.
                    range_words(range).for_each(|page| assert_eq!(look(page), 0));
                }
                let pin = region.pin(range, Access::Write, PinLifetime::LongTerm).unwrap();
                let at = pin.host_address();
                let mut device = Device::attach(pin);
                device.write(9);
                drop(device);
                // The kernel passes over pages that another processor has just put on its list.
                for _ in 0..20 {
                    // SAFETY: the pages stay mapped; their contents may only be written out.
                    let shrunk = unsafe { libc::madvise(at.cast(), range.bytes(), libc::MADV_PAGEOUT) };
                    assert_eq!(shrunk, 0, "{}", std::io::Error::last_os_error());
                    for page in range_words(range) {
                        assert_eq!(look(page), u64::from_ne_bytes([9; 8]), "what a device wrote to {page:#x} is lost");
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
    }

    /// For each break: its invariant, and the scenario that detects it.
    const TABLE: [(&str, Break, fn()); 16] = [
        ("I1", Break::PinInPlace, || device_writes(600, 1)),
        ("I1 (a whole block)", Break::PinInPlace, || device_writes(512, 512)),
        ("I2", Break::KeepBits, freeze_twice),
        ("I3", Break::RemapPinned, pin_across_a_freeze),
        ("I3 (the layer's copy)", Break::ForgetPinned, pin_across_a_freeze),
        ("I4", Break::WriteLayer, freeze_twice),
        ("I5", Break::BelieveTable, freeze_twice),
        ("I6", Break::CountBlock, pins_are_exact),
        ("I7", Break::DropPinned, discard_under_a_pin),
        ("I9", Break::ReadInPlace, long_read),
        ("I10", Break::OwnReference, reference_pages),
        ("I11", Break::InheritAll, dont_fork),
        ("I12", Break::SplitBare, pins_are_exact),
        ("I13", Break::ForgetUndo, refused_freeze),
        ("I14", Break::LeaveMap, reference_pages),
        ("I15", Break::LeaveClean, device_writes_and_memory_is_short),
    ];

    /// The scenario that detects a break.
    #[cfg(feature = "trace")]
    pub(crate) fn scenario_of(how: Break) -> fn() {
        TABLE.iter().find(|(_, of, _)| *of == how).expect("each break has its scenario").2
    }

    #[test]
    fn every_break_of_an_invariant_is_noticed() {
        for (invariant, how, scenario) in TABLE {
            scenario();
            let noticed = with_break(how, scenario);
            plan().disarm();
            let Err(told) = noticed else { panic!("{invariant}: {how:?} goes unnoticed") };
            let told = told.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned());
            println!("{invariant}: {how:?} is noticed: {told}");
        }
    }
}
