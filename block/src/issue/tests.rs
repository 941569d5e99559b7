//! Transfers against a model: bytes in order, one end each, bounds, failures and cancellation.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use clade_host_io::{Fragment, OpError};
use proptest::prelude::*;

use super::*;
use crate::map::CLUSTER;
use crate::testutil::{SOON, buffer, read};
use crate::transfers::{MAX_PIECES, MAX_TRANSFER_BYTES};
use crate::{DiskConfig, DiskDone, SECTOR};

const SIZE: u64 = 4 << 20;
/// Longer than a test: operations given to the kernel do not end.
const FOR_EVER: Duration = Duration::from_secs(3600);

fn file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, contents(0, SIZE)).unwrap();
    (dir, path)
}

/// The initial contents of the disk.
fn contents(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at / SECTOR % 251) as u8).collect()
}

/// The memory that was handed out for a transfer, and the failure to come.
#[derive(Default)]
struct Memory {
    /// Bytes to write.
    data: Vec<u8>,
    pieces: Vec<(Transfer, Vec<Fragment>)>,
    /// The number of the piece that has no memory.
    fails_at: Option<usize>,
}

impl Memory {
    fn next(&mut self, piece: &Transfer, start: u64) -> Result<Vec<Fragment>, DiskError> {
        if self.fails_at == Some(self.pieces.len()) {
            return Err(DiskError::Memory("no memory".into()));
        }
        let at = (piece.offset - start) as usize;
        let bytes = if piece.is_write {
            self.data[at..at + piece.len as usize].to_vec()
        } else {
            vec![0xee; piece.len as usize]
        };
        let fragments = buffer(&bytes);
        self.pieces.push((*piece, fragments.clone()));
        Ok(fragments)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (piece, fragments) in &self.pieces {
            let mut bytes = vec![0; piece.len as usize];
            fragments[0].slice().copy_to(&mut bytes);
            all.extend(bytes);
        }
        all
    }
}

fn transfer(token: u64, is_write: bool, offset: u64, len: u64) -> Transfer {
    Transfer { token, is_write, offset, len }
}

/// Takes the ended requests, and waits for some if there is nothing else to do.
fn ended(disk: &mut Disk) -> Vec<DiskDone> {
    disk.kick().unwrap();
    let mut done = disk.take_done();
    done.extend(disk.reap().unwrap());
    if done.is_empty() && !disk.may_issue() && disk.in_flight() > 0 {
        assert!(disk.requests.transfers().pieces > 0, "a transfer without a piece does not end");
        disk.wait(SOON).unwrap();
    }
    done
}

#[derive(Clone, Debug)]
struct Plan {
    is_write: bool,
    /// In sectors.
    len: u64,
    fails_at: Option<usize>,
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    // Each has a part of the disk for itself.
    let plan = (any::<bool>(), 1..=SIZE / 4 / SECTOR, prop::option::weighted(0.3, 0usize..4))
        .prop_map(|(is_write, len, fails_at)| Plan { is_write, len, fails_at });
    prop::collection::vec(plan, 1..=4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn transfers_end_once_with_their_bytes_in_order(
        plans in plans(),
        start in 0..8u64,
        forked in any::<bool>(),
        yields in prop::collection::vec(any::<bool>(), 1..6),
    ) {
        let (_dir, path) = file();
        let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
        let _image = forked.then(|| disk.fork());
        let mut model = contents(0, SIZE);
        let (mut memory, mut all) = (HashMap::new(), HashMap::new());
        for (token, plan) in (1u64..).zip(&plans) {
            let offset = (token - 1) * SIZE / 4 + if plan.len < 100 { start * SECTOR } else { 0 };
            let len = plan.len * SECTOR;
            let data = vec![0x80 + token as u8; len as usize];
            memory.insert(token, Memory { data, fails_at: plan.fails_at, ..Memory::default() });
            let whole = transfer(token, plan.is_write, offset, len);
            all.insert(token, whole);
            disk.begin_transfer(whole).unwrap();
        }
        let mut results = HashMap::new();
        let mut yields = yields.into_iter().cycle();
        while disk.in_flight() > 0 {
            let before = disk.requests.transfers().bytes;
            let yields_at = if yields.next() == Some(true) { 1 } else { 100 };
            let asked = std::cell::Cell::new(0);
            disk.issue(
                |piece| {
                    asked.set(asked.get() + 1);
                    memory.get_mut(&piece.token).unwrap().next(piece, all[&piece.token].offset)
                },
                || asked.get() >= yields_at,
            );
            prop_assert!(asked.get() <= yields_at.min(ISSUE_PIECES));
            let queue = disk.requests.transfers();
            prop_assert!(queue.bytes.saturating_sub(before) <= ISSUE_BYTES);
            prop_assert!(queue.bytes <= MAX_TRANSFER_BYTES && queue.pieces <= MAX_PIECES);
            for done in ended(&mut disk) {
                prop_assert!(results.insert(done.token, done.result).is_none(), "{} has ended twice", done.token);
            }
        }
        let queue = disk.requests.transfers();
        prop_assert_eq!((queue.unissued(), queue.pieces, queue.bytes), (0, 0, 0));
        for (token, whole) in &all {
            let mine = &memory[token];
            let mut at = whole.offset;
            for (piece, _) in &mine.pieces {
                prop_assert_eq!((piece.offset, piece.is_write), (at, whole.is_write));
                prop_assert!(piece.len > 0 && piece.len.is_multiple_of(SECTOR));
                at += piece.len;
                let ends_well = at.is_multiple_of(CLUSTER) || at == whole.offset + whole.len;
                prop_assert!(ends_well || piece.len < 2 * CLUSTER);
            }
            let range = whole.offset as usize..at as usize;
            if whole.is_write {
                model[range.clone()].copy_from_slice(&mine.data[..range.len()]);
            } else {
                prop_assert_eq!(mine.bytes(), contents(whole.offset, range.len() as u64));
            }
            match &results[token] {
                Ok(()) => prop_assert_eq!(at, whole.offset + whole.len),
                Err(error) => {
                    prop_assert!(matches!(error, DiskError::Memory(_)), "{}", error);
                    prop_assert_eq!(Some(mine.pieces.len()), mine.fails_at);
                }
            }
        }
        prop_assert!(read(&mut disk, 0, SIZE as usize) == model);
    }
}

#[test]
fn nothing_begins_of_a_transfer_whose_piece_has_failed() {
    let (_dir, path) = file();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    // Behind the first MiB, reads meet the file's end.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    disk.begin_transfer(transfer(1, false, (1 << 20) - ISSUE_BYTES, 3 << 20)).unwrap();
    disk.begin_transfer(transfer(2, false, 0, 1 << 20)).unwrap();
    let (mut asked, mut results) = (HashMap::new(), HashMap::new());
    while disk.in_flight() > 0 {
        disk.issue(
            |piece| {
                *asked.entry(piece.token).or_insert(0) += piece.len;
                Ok(buffer(&vec![0; piece.len as usize]))
            },
            || false,
        );
        // The kernel's answer comes before the next piece.
        while disk.requests.transfers().pieces > 0 {
            results.extend(ended(&mut disk).into_iter().map(|done| (done.token, done.result)));
        }
        results.extend(ended(&mut disk).into_iter().map(|done| (done.token, done.result)));
    }
    assert_eq!((asked[&1], asked[&2]), (2 * ISSUE_BYTES, 1 << 20), "one piece behind the end");
    assert!(matches!(results[&1], Err(DiskError::Transfer(_))) && results[&2].is_ok(), "{results:?}");
}

#[test]
fn cancelled_transfers_end_and_leave_room_for_others() {
    let (_dir, path) = file();
    let mut disk = Disk::open(&DiskConfig { latency: Some(FOR_EVER), ..DiskConfig::new(&path) }).unwrap();
    (1..=3).for_each(|token| disk.begin_transfer(transfer(token, true, (token - 1) << 20, 1 << 20)).unwrap());
    // The first two have pieces in the kernel, the third is all rest.
    disk.issue(|piece| Ok(buffer(&vec![9; piece.len as usize])), || false);
    disk.issue(|piece| Ok(buffer(&vec![9; piece.len as usize])), || false);
    disk.kick().unwrap();
    assert_eq!((disk.in_flight(), disk.unissued()), (3, 3));
    disk.cancel();
    let mut done = disk.reap().unwrap();
    done.sort_unstable_by_key(|done| done.token);
    let cancelled = |done: &DiskDone| matches!(done.result, Err(DiskError::Transfer(OpError::Cancelled)));
    assert!(done.iter().all(cancelled), "{done:?}");
    assert_eq!(done.iter().map(|done| done.token).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!((disk.in_flight(), disk.unissued(), disk.may_issue()), (0, 0, false));
    let queue = disk.requests.transfers();
    assert_eq!((queue.pieces, queue.bytes), (0, 0));
    assert_eq!(std::fs::read(&path).unwrap(), contents(0, SIZE));
    // The tokens are free again.
    disk.begin_transfer(transfer(1, false, 0, 512)).unwrap();
    assert!(disk.may_issue());
    disk.cancel();
    assert_eq!(disk.reap().unwrap().len(), 1);
}

#[test]
fn invalid_transfers_are_refused_whole() {
    let (_dir, path) = file();
    let mut disk = Disk::open(&DiskConfig { read_only: true, ..DiskConfig::new(&path) }).unwrap();
    let beyond = disk.begin_transfer(transfer(1, false, SIZE - 512, 1024));
    assert!(matches!(beyond, Err(DiskError::OutOfRange { len: 1024, .. })), "{beyond:?}");
    let overflowing = disk.begin_transfer(transfer(1, false, u64::MAX - 511, 1024));
    assert!(matches!(overflowing, Err(DiskError::OutOfRange { .. })), "{overflowing:?}");
    let write = disk.begin_transfer(transfer(1, true, 0, 512));
    assert!(matches!(write, Err(DiskError::ReadOnly { .. })), "{write:?}");
    assert_eq!((disk.in_flight(), disk.unissued()), (0, 0));
    // One without bytes is complete.
    disk.begin_transfer(transfer(1, false, SIZE, 0)).unwrap();
    assert_eq!(disk.take_done().len(), 1);
    assert_eq!(disk.in_flight(), 0);
}

/// The bounds as numbers: a driver of the kernel and a fork depend on them.
#[test]
fn pieces_are_bounded_in_number_and_in_bytes() {
    let (_dir, path) = file();
    let for_ever = DiskConfig { latency: Some(FOR_EVER), ..DiskConfig::new(&path) };
    let mut disk = Disk::open(&for_ever).unwrap();
    let fill = |disk: &mut Disk| {
        let mut most = 0;
        while disk.may_issue() {
            let mut asked = 0;
            disk.issue(
                |piece| {
                    asked += 1;
                    Ok(buffer(&vec![0; piece.len as usize]))
                },
                || false,
            );
            most = most.max(asked);
        }
        let queue = disk.requests.transfers();
        (most, queue.pieces, queue.bytes)
    };
    (1..=300).for_each(|token| disk.begin_transfer(transfer(token, false, token * SECTOR, SECTOR)).unwrap());
    assert_eq!(fill(&mut disk), (8, 256, 256 * SECTOR));
    disk.cancel();
    assert_eq!(disk.reap().unwrap().len(), 300);
    // One sector, and then more than fits: the last piece is cut to the room.
    disk.begin_transfer(transfer(1, false, 0, SECTOR)).unwrap();
    (2..=4).for_each(|token| disk.begin_transfer(transfer(token, false, 0, SIZE)).unwrap());
    let (_, pieces, bytes) = fill(&mut disk);
    assert_eq!(bytes, 8 << 20);
    assert!(pieces < 50, "{pieces}");
    disk.cancel();
    assert_eq!((disk.reap().unwrap().len(), disk.in_flight()), (4, 0));
}

#[test]
fn memory_of_another_length_fails_the_transfer_and_a_panic_loses_nothing() {
    let (_dir, path) = file();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    let _image = disk.fork();
    for len in [0, 4096 - 512, 8192] {
        disk.begin_transfer(transfer(1, true, 0, 4096)).unwrap();
        disk.issue(|_| Ok(buffer(&vec![7; len])), || false);
        let done = ended(&mut disk);
        assert!(matches!(done[..], [DiskDone { token: 1, result: Err(DiskError::Memory(_)) }]), "{done:?}");
    }
    disk.begin_transfer(transfer(2, true, 0, 4096)).unwrap();
    let panics = std::panic::AssertUnwindSafe(|| disk.issue(|_| panic!("on purpose"), || false));
    std::panic::catch_unwind(panics).unwrap_err();
    assert_eq!((disk.in_flight(), disk.unissued()), (1, 1));
    disk.cancel();
    assert_eq!((disk.reap().unwrap().len(), disk.in_flight()), (1, 0));
    assert_eq!(read(&mut disk, 0, 4096), contents(0, 4096));
}
