//! What a flush waits for.

use super::*;

/// A flush would give a name to one more overlay, of which the journal has too much already.
#[test]
fn a_flush_waits_until_overlays_that_take_too_much_are_merged() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let child = disk.fork();
    let mut waited = 0;
    for round in 0..24u64 {
        drop(disk.fork());
        let start = 37 * round * GRANULE;
        write(&mut disk, start, &vec![round as u8 + 10; (SIZE - start) as usize]);
        flush(&mut disk);
        if !disk.merges_first() {
            continue;
        }
        waited += 1;
        flush_while_merging(&mut disk, round);
    }
    assert!(waited > 0, "nothing was ever merged");
    drop(child);
}

/// Submits a flush while overlays are to be merged: it does not begin before they are.
fn flush_while_merging(disk: &mut Disk, round: u64) {
    disk.submit(DiskOp::Flush, 5).unwrap();
    disk.kick().unwrap();
    let mut done = disk.take_done();
    let mut begun = false;
    while done.is_empty() {
        let merging = disk.merges_first();
        assert!(begun || !merging || disk.flushing.is_none(), "round {round}: begun while overlays are merged");
        begun |= disk.flushing.is_some();
        disk.wait(SOON).unwrap();
        done.extend(disk.reap().unwrap());
    }
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
}
