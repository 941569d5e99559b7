//! The mappings that a freeze reserves before any change (D5), the pages that it leaves with its
//! VM, and the time of its copies.

use super::*;
use crate::budget::MappingBudget;
use crate::units::BLOCK_PAGES;
use crate::{
    Access, Config, DmaPin, DontFork, GuestRam, NoWriters, PAGE_SIZE, PinLifetime, Quiesced, RamLayout, Store,
};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 600;
/// Private pages that a freeze leaves to the background.
const BACKGROUND: u64 = 1_024;
/// Pages of devices that a freeze leaves in place.
const RECENTLY_PINNED: u64 = 2_048;
/// Pages held by devices, each between two runs that become a layer's.
const PINNED: u64 = 20;

fn with_pins(store: &Store) -> (GuestRam, Vec<DmaPin>) {
    let ram = GuestRam::reserve(&RamLayout::new(PAGES * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    (0..PAGES).for_each(|page| ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap());
    let pin = |at| ram.regions()[0].pin(PageRange::with_len(at, 1), Access::Write, PinLifetime::LongTerm).unwrap();
    let pins = (0..PINNED).map(|nth| pin(10 + nth * 20)).collect();
    (ram, pins)
}

#[test]
fn d5_all_mappings_of_a_freeze_are_promised_before_the_first_is_made() {
    let store = Store::open_small().unwrap();
    let (ram, pins) = with_pins(&store);
    let region = &ram.regions()[0];
    let mut state = region.checked(region.range()).unwrap();
    let table = region.table.lock();
    let plan = region.plan(&state, &table).unwrap();
    let prepared = region.prepare_freeze(&mut state, &plan, FreezeMode::Eager).unwrap();
    let (before, promised) = (state.space.mappings().len(), state.space.promised());
    assert_eq!(before, 1, "nothing is mapped anew yet");
    assert_eq!(promised, 1 + 2 * (PINNED + 1), "each run adds itself and splits what it lies in");
    region.commit_freeze(&mut state, &table, &plan, prepared).unwrap();
    let made = state.space.mappings().len() as u64;
    assert_eq!(made, 2 * PINNED + 1);
    assert!(promised >= made, "{made} mappings were made, and {promised} promised");
    assert_eq!(state.space.promised(), made, "what was not needed is given back");
    drop((table, state, pins));
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}

/// A VM of `pages` pages, each of which holds a word that names it.
fn named(store: &Store, pages: u64) -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    write(&ram, PageRange::new(0, pages));
    ram
}

fn write(ram: &GuestRam, range: PageRange) {
    (range.start..range.end).for_each(|page| ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap());
}

fn freeze_in(ram: &GuestRam, mode: FreezeMode) -> FreezeReport {
    ram.freeze_in(mode, &Quiesced::by(&NoWriters)).unwrap().1
}

#[test]
fn reports_of_regions_are_added_up() {
    let mut report = FreezeReport { remapped: 2, copied: 3, pending: 4, pinned: 5 };
    report += FreezeReport { remapped: 20, copied: 30, pending: 40, pinned: 50 };
    assert_eq!(report, FreezeReport { remapped: 22, copied: 33, pending: 44, pinned: 55 });
}

#[test]
fn whole_blocks_come_first_in_a_delta() {
    let run = PageRange::new;
    let packed = |runs: &[PageRange]| {
        let packed = Packed::of(runs);
        (packed.runs, packed.pages, packed.grain)
    };
    let (end, small) = (3 * BLOCK_PAGES, run(1600, 1610));
    let over = run(BLOCK_PAGES - 2, end + 5);
    let order = vec![run(BLOCK_PAGES, end), run(BLOCK_PAGES - 2, BLOCK_PAGES), run(end, end + 5), small];
    assert_eq!(packed(&[over, small]), (order, 2 * BLOCK_PAGES + 17, Backing::Huge));
    let exact = run(BLOCK_PAGES, 2 * BLOCK_PAGES);
    assert_eq!(packed(&[run(3, 4), exact]), (vec![exact, run(3, 4)], BLOCK_PAGES + 1, Backing::Huge));
    // Across the edge of a block, and without a whole block.
    let edge = run(BLOCK_PAGES - 2, BLOCK_PAGES + 2);
    assert_eq!(packed(&[edge]), (vec![edge], 4, Backing::Small));
    let nearly = run(1, 2 * BLOCK_PAGES - 1);
    assert_eq!(packed(&[nearly]), (vec![nearly], 2 * BLOCK_PAGES - 2, Backing::Small));
}

#[test]
fn many_pages_are_left_to_the_background_and_few_are_not() {
    let store = Store::open_small().unwrap();
    let ram = named(&store, BACKGROUND + 600);
    freeze_in(&ram, FreezeMode::Eager);
    write(&ram, PageRange::with_len(100, BACKGROUND - 1));
    assert_eq!(freeze_in(&ram, FreezeMode::Auto).pending, 0);
    // All pages are shown from their copies now, except those that stay in any case.
    write(&ram, PageRange::with_len(100, BACKGROUND));
    assert!(freeze_in(&ram, FreezeMode::Auto).pending > 0);
    ram.finish_background().unwrap();
}

#[test]
fn as_many_pages_stay_with_the_vm_after_a_background_as_the_config_says() {
    for (keep_pages, stay) in [(0, 0), (256, 200)] {
        let config = Config { backing: Some(Backing::Small), keep_pages, ..Config::default() };
        let store = Store::with_config(config).unwrap();
        let ram = named(&store, 600);
        freeze_in(&ram, FreezeMode::Eager);
        (0..3).for_each(|nth| write(&ram, PageRange::with_len(200 * nth, 100)));
        freeze_in(&ram, FreezeMode::Background);
        ram.finish_background().unwrap();
        assert_eq!(ram.stats().unwrap().exclusive, stay, "{keep_pages} pages are to stay");
    }
}

#[test]
fn what_only_devices_have_is_not_left_to_the_background() {
    let store = Store::open_small().unwrap();
    let (ram, pins) = with_pins(&store);
    let report = freeze_in(&ram, FreezeMode::Background);
    assert_eq!((report.copied, report.pending, report.pinned), (PINNED, 0, PINNED));
    assert!(ram.regions()[0].state().freezing.is_none(), "nothing is left for it");
    drop(pins);
}

#[test]
fn without_a_background_many_pages_are_copied_at_once() {
    let store = Store::open_small().unwrap();
    let ram = named(&store, BACKGROUND + 600);
    freeze_in(&ram, FreezeMode::Eager);
    write(&ram, PageRange::with_len(100, BACKGROUND + 100));
    store.background().unwrap().lose_userfaultfd();
    assert!(ram.freeze_in(FreezeMode::Background, &Quiesced::by(&NoWriters)).is_err());
    let report = freeze_in(&ram, FreezeMode::Auto);
    assert_eq!((report.copied, report.pending), (BACKGROUND + 100, 0));
}

#[test]
fn what_devices_had_lately_stays_with_the_vm_up_to_a_bound() {
    let store = Store::open_small().unwrap();
    let ram = named(&store, 3000);
    let region = &ram.regions()[0];
    // Two runs, with a no-fork page between them.
    region.set_dont_fork(PageRange::new(1500, 1501), Some(DontFork::Zeroed)).unwrap();
    drop(region.pin(PageRange::new(0, 3000), Access::Write, PinLifetime::Transient).unwrap());
    freeze_in(&ram, FreezeMode::Eager);
    assert_eq!(pages_in(&region.state().space.mappings().base_runs()), RECENTLY_PINNED);
    ram.check(&Quiesced::by(&NoWriters)).unwrap();
}

/// The base pages of a VM that was frozen with `declared` as no-fork.
fn base_left(declared: &[PageRange], pinned: Option<PageRange>) -> Vec<PageRange> {
    let store = Store::open_small().unwrap();
    let ram = named(&store, 3000);
    let region = &ram.regions()[0];
    declared.iter().for_each(|run| region.set_dont_fork(*run, Some(DontFork::Zeroed)).unwrap());
    let pin = pinned.map(|range| region.pin(range, Access::Write, PinLifetime::LongTerm).unwrap());
    freeze_in(&ram, FreezeMode::Eager);
    let left = region.state().space.mappings().base_runs();
    for page in declared.iter().flat_map(|run| run.start..run.end) {
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap(), page + 1, "page {page}");
        assert!(region.ownership().get(page).0, "I2: page {page} is the VM's own, wherever it lies");
    }
    drop(pin);
    ram.check(&Quiesced::by(&NoWriters)).unwrap();
    left
}

#[test]
fn r19_what_is_not_inherited_leaves_the_base_file_but_for_what_devices_hold() {
    let run = PageRange::new;
    assert_eq!(base_left(&[run(100, 110), run(500, 530)], None), []);
    assert_eq!(base_left(&[run(100, 110), run(500, 530)], Some(run(505, 507))), [run(505, 507)]);
    // At most the number that a pause allows.
    assert_eq!(base_left(&[run(0, MAX_PRIVATIZED + 1), run(2000, 2010)], None), [run(0, MAX_PRIVATIZED + 1)]);
    assert_eq!(base_left(&[run(0, MAX_PRIVATIZED), run(2000, 2001)], None), [run(2000, 2001)]);
    assert_eq!(base_left(&[run(0, 1000), run(2000, 2024), run(2100, 2101)], None), [run(2100, 2101)]);
}

#[test]
fn d5_what_leaves_the_base_file_is_promised_its_mappings() {
    let store = Store::open_small().unwrap();
    let ram = named(&store, 600);
    let region = &ram.regions()[0];
    (0..10).for_each(|nth| {
        region.set_dont_fork(PageRange::with_len(20 * nth + 5, 2), Some(DontFork::Zeroed)).unwrap();
    });
    let mut state = region.checked(region.range()).unwrap();
    let table = region.table.lock();
    region.privatize_dont_fork(&mut state, &table);
    let (made, promised) = (state.space.mappings().len() as u64, state.space.promised());
    assert_eq!(made, 21);
    assert!(promised >= made, "{made} mappings were made, and {promised} promised");
}

/// A freeze may replace the last view of a large layer: the paused VM does not free it.
#[test]
fn what_a_freeze_replaces_is_freed_by_the_reclaim_thread() {
    let store = Store::open_small().unwrap();
    let ram = named(&store, 600);
    freeze_in(&ram, FreezeMode::Eager);
    let layer = Arc::downgrade(&ram.regions()[0].state().space.map().get(5).unwrap().layer);
    write(&ram, PageRange::new(0, 600));
    let busy = crate::testing::busy::Busy::begin(&store);
    freeze_in(&ram, FreezeMode::Eager);
    let kept = layer.strong_count();
    drop(busy);
    assert!(kept > 0, "freed while the VM was paused");
    clade_test_support::wait_eq("handles of the replaced layer", &0, || layer.strong_count());
}

/// Number of mappings of a VM after a freeze that copied twenty runs, with budget `limit`, of which
/// others hold `held`.
fn mappings_after(limit: u64, held: u64) -> usize {
    let budget = MappingBudget::with_limit(limit);
    let store = Store::open_with_budget(budget);
    let ram = named(&store, 3000);
    freeze_in(&ram, FreezeMode::Eager);
    let others = store.budget().promise(held).unwrap();
    (0..20).for_each(|nth| write(&ram, PageRange::with_len(10 + 100 * nth, 50)));
    freeze_in(&ram, FreezeMode::Eager);
    drop(others);
    (0..3000).for_each(|page| {
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(page * PAGE_SIZE)).unwrap(), page + 1);
    });
    ram.regions()[0].state().space.mappings().len()
}

#[test]
fn d5_a_freeze_shares_copies_within_its_share_and_the_budget() {
    // A sixteenth of the rest is 9: four runs in the middle of one mapping.
    assert_eq!(mappings_after(150, 0), 9);
    // As many as needed: all but the 256 pages that stay the VM's own.
    assert_eq!(mappings_after(10_000, 0), 1 + 2 * 15);
    // One mapping is left, and a run needs two.
    assert_eq!(mappings_after(10, 8), 1);
}

/// The mappings of the privatized base pages and of the background are both reserved, not just the
/// larger number.
#[test]
fn d5_base_remaps_take_nothing_from_the_background() {
    let store = Store::open_small().unwrap();
    let (ram, pins) = with_pins(&store);
    let region = &ram.regions()[0];
    // Private runs of the VM's own, next to base pages with pinned ones between them.
    region.discard(PageRange::new(450, 600)).unwrap();
    (0..5).for_each(|nth| write(&ram, PageRange::with_len(455 + 30 * nth, 12)));
    let mut state = region.checked(region.range()).unwrap();
    let table = region.table.lock();
    let plan = region.plan(&state, &table).unwrap();
    let prepared = region.prepare_freeze(&mut state, &plan, FreezeMode::Background).unwrap();
    region.commit_freeze(&mut state, &table, &plan, prepared).unwrap();
    let (made, promised) = (state.space.mappings().len() as u64, state.space.promised());
    assert!(made > PINNED && promised >= made + 2 * 5, "{made} mappings were made, and {promised} promised");
    drop(plan);
    drop((table, state));
    ram.finish_background().unwrap();
    let state = region.state();
    assert_eq!(state.space.promised(), state.space.mappings().len() as u64);
    drop((state, pins));
}

#[test]
fn d5_the_background_is_promised_two_mappings_a_run() {
    let store = Store::open_small().unwrap();
    let ram = named(&store, 600);
    freeze_in(&ram, FreezeMode::Eager);
    (0..5).for_each(|nth| write(&ram, PageRange::with_len(100 * nth, 20)));
    let region = &ram.regions()[0];
    let mut state = region.checked(region.range()).unwrap();
    let table = region.table.lock();
    let plan = region.plan(&state, &table).unwrap();
    let prepared = region.prepare_freeze(&mut state, &plan, FreezeMode::Background).unwrap();
    assert_eq!(state.space.promised(), 1 + 2 * 5);
    region.commit_freeze(&mut state, &table, &plan, prepared).unwrap();
    drop(plan);
    drop((table, state));
    ram.finish_background().unwrap();
}
