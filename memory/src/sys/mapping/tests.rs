use std::fs::{File, read_to_string};
use std::os::fd::AsFd;

use super::*;

const PAGES: u64 = 1024;
const WHOLE: PageRange = PageRange { start: 0, end: PAGES };

fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..PAGES).flat_map(|page| [page as u8; 1 << PAGE_SHIFT]).collect();
    std::io::Write::write_all(&mut &file, &bytes).unwrap();
    file
}

/// Pages of the reservation that are mapped according to /proc/self/maps.
fn there(at: &Reservation) -> u64 {
    let (first, last) = (at.addr(0) as usize, at.addr(PAGES) as usize);
    let maps = read_to_string("/proc/self/maps").unwrap();
    let ranges = maps.lines().map(|line| line.split(' ').next().unwrap().split_once('-').unwrap());
    let ranges = ranges.map(|(start, end)| [start, end].map(|at| usize::from_str_radix(at, 16).unwrap()));
    let bytes = ranges.map(|[start, end]| end.min(last).saturating_sub(start.max(first)));
    (bytes.sum::<usize>() >> PAGE_SHIFT) as u64
}

/// Whether the kernel may put `page` into a huge page, as /proc/self/smaps has it.
fn may_be_huge(at: &Reservation, page: u64) -> bool {
    let addr = at.addr(page) as usize;
    let smaps = read_to_string("/proc/self/smaps").unwrap();
    let mut is_its = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let ends = range.map(|(start, end)| [start, end].map(|at| usize::from_str_radix(at, 16)));
        if let Some([Ok(start), Ok(end)]) = ends {
            is_its = (start..end).contains(&addr);
        } else if is_its && let Some(flags) = line.strip_prefix("VmFlags:") {
            return !flags.split_whitespace().any(|flag| flag == "nh");
        }
    }
    panic!("page {page} is not mapped");
}

fn first_byte(at: &Reservation, page: u64) -> u8 {
    // SAFETY: the caller has mapped the page for reading.
    unsafe { at.addr(page).read_volatile() }
}

fn vacant() -> Reservation {
    let at = Reservation::new(PAGES).unwrap();
    assert!(at.is_apart && APART.contains(&(at.addr(0) as usize)));
    assert_eq!(there(&at), PAGES);
    at.vacate();
    assert_eq!(there(&at), 0);
    at
}

#[test]
fn what_is_vacant_is_mapped_piece_by_piece_and_then_no_more_than_reserved() {
    let (at, file) = (vacant(), file());
    let pieces = [PageRange::new(512, 1024), PageRange::new(0, 100), PageRange::new(100, 512)];
    for (piece, all) in pieces.into_iter().zip([512, 612, 1024]) {
        at.map_private(piece, file.as_fd(), piece.start).unwrap();
        assert_eq!(there(&at), all);
    }
    assert!(at.mapped().is_none());
    assert_eq!([0, 99, 100, 700].map(|page| first_byte(&at, page)), [0, 99, 100, 700u64 as u8]);
    // Over existing mappings.
    at.map_zero(PageRange::new(90, 110)).unwrap();
    assert_eq!([89, 90, 109, 110].map(|page| first_byte(&at, page)), [89, 0, 0, 110]);
    at.protect_none().unwrap();
    assert_eq!(there(&at), PAGES);
}

#[test]
fn pieces_that_overlap_are_ours_and_what_was_vacant_is_so_again_when_it_is_emptied() {
    let (at, file) = (vacant(), file());
    at.map_private(PageRange::new(100, 200), file.as_fd(), 100).unwrap();
    at.map_none(PageRange::new(150, 160)).unwrap();
    at.map_zero(PageRange::new(190, 300)).unwrap();
    assert_eq!(there(&at), 200);
    assert_eq!([149, 160, 190, 299].map(|page| first_byte(&at, page)), [149, 160, 0, 0]);
    at.protect_none().unwrap();
    assert_eq!(there(&at), 0);
    at.map_shared(WHOLE, file.as_fd(), 0).unwrap();
    assert_eq!((there(&at), at.mapped().is_none()), (PAGES, true));
}

#[test]
fn what_another_has_put_where_nothing_was_is_neither_replaced_nor_unmapped() {
    let (at, file) = (vacant(), file());
    let others = PageRange::new(600, 610);
    let how = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: with this flag existing mappings are not replaced.
    let raw = unsafe { mmap_anonymous(at.addr(600).cast(), others.bytes(), RAM_PROT, how) }.unwrap();
    // SAFETY: it was just mapped, for writing.
    unsafe { raw.cast::<u8>().write_volatile(0xaa) };
    for range in [WHOLE, PageRange::new(605, 700)] {
        let refused = at.map_private(range, file.as_fd(), 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EEXIST), "{refused}");
    }
    at.map_private(PageRange::new(0, 600), file.as_fd(), 0).unwrap();
    // Partly over existing mappings.
    assert!(at.map_zero(PageRange::new(500, 700)).is_err());
    assert_eq!([599, 600].map(|page| first_byte(&at, page)), [599u64 as u8, 0xaa]);
    at.protect_none().unwrap();
    assert_eq!(there(&at), others.len());
    drop(at);
    // SAFETY: the mapping still exists, or this faults.
    assert_eq!(unsafe { raw.cast::<u8>().read_volatile() }, 0xaa);
    // SAFETY: this test has mapped it.
    unsafe { munmap(raw, others.bytes()) }.unwrap();
}

#[test]
fn what_is_vacant_is_no_other_reservations() {
    let at = vacant();
    let (start, len) = (at.addr(0) as usize, WHOLE.bytes());
    let others = [(start, len), (start - len / 2, len), (start + len - 4096, 4096), (start - 4096, 2 * len)];
    for (place, len) in others {
        assert_eq!(Reservation::apart_at(place, len), None, "{place:#x}, {len:#x}");
    }
    let beside = [start - len, start + len].map(|place| Reservation::apart_at(place, len).unwrap());
    for base in beside {
        drop(Reservation {
            base,
            pages: PAGES,
            is_apart: true,
            mapped: Mutex::default(),
            is_torn: AtomicBool::new(false),
        });
    }
    drop(at);
    let base = Reservation::apart_at(start, len).unwrap();
    drop(Reservation { base, pages: PAGES, is_apart: true, mapped: Mutex::default(), is_torn: AtomicBool::new(false) });
}

#[test]
fn a_failed_step_leaves_what_it_has_mapped_noted() {
    let at = vacant();
    let not_a_file = std::io::pipe().unwrap().0;
    assert!(at.map_private(PageRange::new(0, 10), not_a_file.as_fd(), 0).is_err());
    assert_eq!(there(&at), 0);
    at.map_zero(PageRange::new(4, 6)).unwrap();
    // The parts are reserved first, then the mapping fails.
    assert!(at.map_private(PageRange::new(0, 10), not_a_file.as_fd(), 0).is_err());
    assert_eq!(there(&at), 10);
    drop(at);
}

#[test]
fn a_mapping_that_fails_half_way_leaves_no_address_to_others() {
    let at = Reservation::new(PAGES).unwrap();
    at.map_private(WHOLE, file().as_fd(), 0).unwrap();
    // Refused before anything is removed.
    let pipe = std::io::pipe().unwrap().0;
    at.map_private(PageRange::new(3, 7), pipe.as_fd(), 0).unwrap_err();
    assert!(!at.is_torn() && first_byte(&at, 3) == 3);
    // The mmap of a socket fails when the old mapping has been removed.
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    at.map_private(PageRange::new(3, 7), socket.as_fd(), 0).unwrap_err();
    assert!(at.is_torn());
    assert_eq!(there(&at), PAGES);
    assert_eq!([2, 7].map(|page| first_byte(&at, page)), [2, 7]);
    at.map_zero(PageRange::new(3, 7)).unwrap();
    assert!(at.is_torn(), "its bytes are lost");
}

/// Linux replaces zeros by the zero page when it splits a huge page, and the pagemap then shows no page of this
/// mapping's own.
#[test]
fn anonymous_guest_memory_is_never_in_huge_pages() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        clade_test_support::skipped("this kernel has no huge pages");
        return;
    }
    let (at, file) = (vacant(), file());
    at.map_zero(PageRange::new(0, 512)).unwrap();
    at.map_private(PageRange::new(512, 600), file.as_fd(), 512).unwrap();
    at.replace_private(PageRange::new(520, 530), file.as_fd(), 0).unwrap();
    assert!(!may_be_huge(&at, 0) && !may_be_huge(&at, 520));
    // A private page of a file is small without it.
    assert!(may_be_huge(&at, 512));
}
