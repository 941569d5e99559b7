//! Conditions that a flush waits for.

use super::*;

/// The flush would name one more overlay, though the journal already has too many.
#[test]
fn a_flush_waits_until_overlays_that_take_too_much_are_merged() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let child = disk.fork();
    let mut waited = 0;
    for round in 0..24u64 {
        drop(disk.fork());
        let start = 37 * round * CLUSTER;
        write(&mut disk, start, &vec![round as u8 + 10; (SIZE - start) as usize]);
        flush(&mut disk);
        if !disk.chain.merges_first() {
            continue;
        }
        waited += 1;
        flush_while_merging(&mut disk, round);
    }
    assert!(waited > 0, "nothing was ever merged");
    drop(child);
}

/// Submits a flush while overlays are to be merged: the flush begins after the merge.
fn flush_while_merging(disk: &mut Disk, round: u64) {
    disk.submit(DiskOp::Flush, 5).unwrap();
    // No completion was reaped since the merge was requested.
    let mut done = disk.take_done();
    assert!(done.is_empty() && !disk.durability.is_flushing(), "round {round}: begun, or done, before they are merged");
    disk.kick().unwrap();
    done.extend(disk.take_done());
    let mut begun = false;
    while done.is_empty() {
        let merging = disk.chain.merges_first();
        assert!(begun || !merging || !disk.durability.is_flushing(), "round {round}: begun while overlays are merged");
        begun |= disk.durability.is_flushing();
        disk.wait(SOON).unwrap();
        done.extend(disk.reap().unwrap());
    }
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
}

/// The commit's own flush can begin to fold. Clusters that it has read must not be written into the
/// image after the commit has freed their room in the overlay.
#[test]
fn a_commit_that_fails_half_way_and_folding_do_not_mix() {
    const BYTES: usize = 16 * 4096;
    let late = |steps: Option<usize>| {
        let bench = Bench::new();
        let mut disk = bench.open();
        drop(disk.fork());
        write(&mut disk, 0, &[2; BYTES]);
        flush(&mut disk);
        if let Some(engine) = disk.requests.engine_mut() {
            engine.set_latency(Some(Duration::from_millis(100)));
        }
        let (committed, done) = traced(steps, || disk.commit());
        (bench, committed, done)
    };
    let (bench, committed, all) = late(None);
    committed.map_err(|refused| refused.1).unwrap();
    assert!(bench.image()[..BYTES] == [2; BYTES]);
    // Just after one piece is durable in the image.
    let pieces =
        (1..all.len()).filter(|at| all[*at].starts_with("write disk.img") && all[*at - 1].starts_with("sync journal"));
    let mut failed = 0;
    for step in pieces {
        let (bench, committed, done) = late(Some(step));
        let Err(refused) = committed else { continue };
        let (mut disk, error) = *refused;
        assert!(matches!(error, CommitError::Partial { .. }), "{error}: {done:?}");
        failed += 1;
        settle(&mut disk);
        assert!(read(&mut disk, 0, BYTES) == [2; BYTES], "after step {step}: {done:?}");
        drop(disk);
        drop(bench.open());
        assert!(bench.image()[..BYTES] == [2; BYTES], "after step {step}: {done:?}");
    }
    assert!(failed > 0, "{all:?}");
}
