//! Operations that must be refused, and memory that must stay hidden.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use clade_memory::{
    Access, DontFork, GuestRam, ImageMap, LayerSource, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamImage, RefPage,
    Store,
};
use vm_memory::{Bytes, GuestAddress};

use crate::{HIGH, address, born, child, fill_all, freeze, high, layout, stores};

const WAYS: [(Access, PinLifetime); 4] = [
    (Access::Read, PinLifetime::Transient),
    (Access::Read, PinLifetime::LongTerm),
    (Access::Write, PinLifetime::Transient),
    (Access::Write, PinLifetime::LongTerm),
];

#[test]
fn r19_no_pin_of_what_is_absent_is_granted() {
    for store in stores() {
        let parent = born(&store, 1);
        high(&parent).set_dont_fork(PageRange::new(100, 110), Some(DontFork::Absent)).unwrap();
        let child = child(&freeze(&parent), &store);
        for (access, term) in WAYS {
            for pages in [PageRange::new(100, 110), PageRange::new(104, 105), PageRange::new(109, 111)] {
                let pin = high(&child).pin(pages, access, term);
                assert!(pin.is_err(), "{access:?} {term:?}: a device was given {pages}, which are absent");
            }
            drop(high(&child).pin(PageRange::new(110, 111), access, term).expect("what is there is pinned"));
        }
        let counts = high(&child).ownership().counts(high(&child).range());
        assert_eq!(counts.pins, 0, "a pin that was refused leaves nothing pinned");
    }
}

/// The end of a range is computed from a start and a length that a guest may choose.
#[test]
fn a_range_whose_end_wraps_is_refused() {
    let store = Store::open_small().unwrap();
    let ram = born(&store, 1);
    let region = high(&ram);
    let before = region.ownership().counts(region.range());
    for (start, len) in [(u64::MAX - 2, 8), (u64::MAX, 1), (u64::MAX - 2, 2), (1 << 63, 1 << 63), (5, u64::MAX - 2)] {
        let range = catch_unwind(|| PageRange::with_len(start, len));
        let range = range.unwrap_or_else(|_| panic!("{len} pages from {start:#x} cannot even be named"));
        for (access, term) in WAYS {
            assert!(region.pin(range, access, term).is_err(), "{access:?} {term:?} {range}");
        }
        assert!(region.discard(range).is_err(), "{range}");
        assert!(region.map_reference(range, &RefPage::zero()).is_err(), "{range}");
        assert!(region.set_dont_fork(range, Some(DontFork::Zeroed)).is_err(), "{range}");
        assert!(
            region.evict(range, Path::new("/dev/shm"), &Quiesced::by(&clade_memory::NoWriters)).is_err(),
            "{range}"
        );
    }
    assert_eq!(region.ownership().counts(region.range()), before, "nothing has changed");
    crate::check_all(&ram, 1, "after refusals");
}

/// Memory over a truncated file must not be frozen into zeros for other VMs.
#[test]
fn memory_that_is_lost_is_not_frozen() {
    let store = Store::open_small().unwrap();
    let mut file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::io::Write::write_all(&mut file, &vec![7; (HIGH * PAGE_SIZE) as usize]).unwrap();
    let layer = store.file_layer(file.try_clone().unwrap(), HIGH).unwrap();
    let mut map = ImageMap::new();
    map.insert(PageRange::new(0, HIGH), LayerSource { layer, at: 0 });
    // The file backs the second region's memory.
    let parts = vec![(ImageMap::new(), Vec::new()), (map, Vec::new())];
    let image = RamImage::from_parts(&store, &layout(), parts).unwrap();
    let ram = child(&image, &store);
    let (told, hear) = mpsc::channel();
    ram.on_failure(move |_| told.send(()).unwrap());
    file.set_len(0).unwrap();
    // The value read now is meaningless, but the read succeeds.
    let _ = ram.memory().read_obj::<u8>(GuestAddress(address(1, 30))).unwrap();
    clade_test_support::receive("the callback", &hear);
    assert!(ram.failure().is_some());
    for mode in [clade_memory::FreezeMode::Eager, clade_memory::FreezeMode::Auto] {
        let frozen = ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters));
        assert!(frozen.is_err(), "{mode:?}: lost memory was frozen for others to be given");
    }
}

/// The files mapped in a VM's regions, by device and inode.
fn mapped_files(ram: &GuestRam) -> BTreeSet<(u64, u64)> {
    let inside = |start: u64| {
        let of = |region: &std::sync::Arc<clade_memory::GuestRegion>| {
            let from = region.host_address();
            (from..from + region.pages() * PAGE_SIZE).contains(&start)
        };
        ram.regions().iter().any(of)
    };
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut files = BTreeSet::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let start = u64::from_str_radix(fields[0].split('-').next().unwrap(), 16).unwrap();
        let (major, minor) = fields[3].split_once(':').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let inode: u64 = fields[4].parse().unwrap();
        if inside(start) && inode != 0 {
            files.insert((rustix::fs::makedev(number(major) as u32, number(minor) as u32), inode));
        }
    }
    files
}

/// The files that this process has open.
fn open_files() -> BTreeMap<(u64, u64), PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let fds = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    fds.filter_map(|path| fs::metadata(&path).ok().map(|meta| ((meta.dev(), meta.ino()), path))).collect()
}

/// Whether a file contains the word anywhere.
fn holds_word(path: &Path, word: u64) -> bool {
    let file = File::open(path).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.as_chunks::<8>().0.contains(&word.to_le_bytes())
}

#[test]
fn r19_what_is_evicted_is_in_no_file_that_a_child_maps() {
    const SECRET: u64 = 0x5ec1_2e7d_a7a5;
    for (store, frozen) in stores().into_iter().flat_map(|store| [(store.clone(), false), (store, true)]) {
        let parent = born(&store, 1);
        let region = high(&parent);
        let secret = PageRange::new(100, 110);
        region.set_dont_fork(secret, Some(DontFork::Zeroed)).unwrap();
        if frozen {
            drop(freeze(&parent));
            fill_all(&parent, 1);
        }
        (secret.start()..secret.end()).for_each(|page| crate::put(&parent, 1, page, SECRET));
        region.evict(PageRange::new(80, 130), Path::new("/dev/shm"), &Quiesced::by(&clade_memory::NoWriters)).unwrap();
        let child = child(&freeze(&parent), &store);
        (secret.start()..secret.end()).for_each(|page| assert_eq!(crate::word(&child, 1, page), 0));
        (secret.start()..secret.end()).for_each(|page| assert_eq!(crate::word(&parent, 1, page), SECRET));
        let (mapped, open) = (mapped_files(&child), open_files());
        let found: Vec<&PathBuf> = mapped.iter().filter_map(|file| open.get(file)).collect();
        assert!(!found.is_empty(), "a child maps files");
        assert_eq!(found.len(), mapped.len(), "and all of them are looked at");
        let told = found.iter().any(|path| holds_word(path, SECRET));
        assert!(!told, "R19: a child maps a file with what it must not inherit (frozen before: {frozen})");
    }
}
