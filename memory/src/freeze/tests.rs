//! What a freeze has promised to it before it touches anything (D5).

use super::*;
use crate::{Access, DmaPin, GuestRam, PAGE_SIZE, PinLifetime, Quiesced, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 600;
/// Pages that devices hold, each between two runs that become a layer's.
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
    let (before, promised) = (state.mappings.len(), state.promise.count());
    assert_eq!(before, 1, "nothing is mapped anew yet");
    region.commit_freeze(&mut state, &table, &plan, prepared).unwrap();
    let made = state.mappings.len() as u64;
    assert_eq!(made, 2 * PINNED + 1);
    assert!(promised >= made, "{made} mappings were made, and {promised} promised");
    assert_eq!(state.promise.count(), made, "what was not needed is given back");
    drop((table, state, pins));
    ram.check(&Quiesced::by(&crate::NoWriters)).unwrap();
}
