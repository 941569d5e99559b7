//! Transfers between files and pinned guest memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_host_io::{AlignedBuf, CachePolicy, Completion, Engine, Fragment, IoFile, OpError, Request};
use clade_memory::{Access, DmaPin, GuestRam, PageRange, PinLifetime, RamLayout, Store};
use vm_memory::{Bytes, GuestAddress};

const SIZE: usize = 1 << 20;

/// The latency of an operation that ends only by being cancelled.
const FOR_EVER: Duration = Duration::from_secs(86_400);

fn ram() -> GuestRam {
    let ram = GuestRam::reserve(&RamLayout::new(4 << 20).unwrap(), &Store::open_small().unwrap()).unwrap();
    ram.populate().unwrap();
    ram
}

fn pin(ram: &GuestRam, first: u64, pages: u64) -> Arc<DmaPin> {
    let range = PageRange::with_len(first, pages);
    Arc::new(ram.regions()[0].pin_as("test", range, Access::Write, PinLifetime::Transient).unwrap())
}

fn bytes() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 7 % 251) as u8).collect()
}

/// A directory on a disk: memory file systems do not support O_DIRECT.
fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn file(dir: &Path, policy: CachePolicy) -> Arc<IoFile> {
    let path = dir.join("file");
    std::fs::write(&path, bytes()).unwrap();
    Arc::new(IoFile::open(&path, true, policy).unwrap())
}

fn engine() -> Engine<u32> {
    Engine::new(8, clade_host_io::eventfd().unwrap()).unwrap()
}

/// Waits for `count` completions.
fn finish(engine: &mut Engine<u32>, count: usize) -> Vec<Completion<u32>> {
    let mut patience = clade_test_support::Patience::default();
    let mut done = Vec::new();
    engine.flush().unwrap();
    while done.len() < count {
        assert!(patience.tick(), "{} of {count}", done.len());
        engine.wait(Duration::from_millis(100)).unwrap();
        engine.reap(|completion| done.push(completion)).unwrap();
    }
    done.sort_by_key(|completion| completion.token);
    done
}

#[test]
fn pieces_of_pages_are_read_and_written() {
    for policy in [CachePolicy::Host, CachePolicy::Direct] {
        let (dir, ram) = (dir(), ram());
        let (file, mut engine) = (file(dir.path(), policy), engine());
        let pages = pin(&ram, 16, 40);
        // Odd places in memory, in two pieces, of a whole number of blocks in the file; more
        // operations than the kernel gets at once.
        for n in 0..20u32 {
            let at = n as usize * 8192;
            let buffers = vec![
                Fragment::pinned(&pages, at + 100, 3000).unwrap(),
                Fragment::pinned(&pages, at + 3200, 1096).unwrap(),
            ];
            engine.submit(Request::Read { file: Arc::clone(&file), offset: u64::from(n) * 4096, buffers }, n);
        }
        assert_eq!(finish(&mut engine, 20).iter().filter(|done| done.result.is_ok()).count(), 20);
        for n in 0..20 {
            let mut got = vec![0; 4296];
            ram.memory().read_slice(&mut got, GuestAddress(16 * 4096 + n * 8192)).unwrap();
            let want = &bytes()[n as usize * 4096..];
            assert!(got[100..3100] == want[..3000] && got[3200..] == want[3000..4096], "{policy:?} {n}");
            assert!(got[..100] == [0; 100] && got[3100..3200] == [0; 100], "{policy:?} {n}: what is between");
        }
        let stats = engine.stats();
        if file.policy() == CachePolicy::Direct {
            assert_eq!((stats.bounced, stats.cached), (20, 0), "memory that does not fit is copied");
        } else {
            assert_eq!((stats.cached, stats.direct, stats.bounced), (20, 0, 0));
        }
        // A write that fits in the file, and one that does not.
        ram.memory().write_slice(&[0xab; 4096], GuestAddress(16 * 4096)).unwrap();
        let whole = |len| vec![Fragment::pinned(&pages, 0, len).unwrap()];
        engine.submit(Request::Write { file: Arc::clone(&file), offset: 8192, buffers: whole(4096) }, 0);
        engine.submit(Request::Write { file: Arc::clone(&file), offset: 512, buffers: whole(512) }, 1);
        engine.submit(
            Request::Write {
                file: Arc::clone(&file),
                offset: 40960,
                buffers: vec![Fragment::pinned(&pages, 7, 4000).unwrap(), Fragment::pinned(&pages, 0, 96).unwrap()],
            },
            2,
        );
        assert!(finish(&mut engine, 3).iter().all(|done| done.result.is_ok()));
        engine.submit(Request::Sync { file: Arc::clone(&file), all: false }, 3);
        assert!(finish(&mut engine, 1)[0].result.is_ok());
        let mut want = bytes();
        for range in [8192..12288, 512..1024, 40960..45056] {
            want[range].fill(0xab);
        }
        assert!(std::fs::read(dir.path().join("file")).unwrap() == want, "{policy:?}");
        drop(pages);
        assert_eq!(ram.stats().unwrap().pinned, 0, "completions gave the pins back");
    }
}

#[test]
fn large_transfers_through_a_bounce_buffer_come_in_parts() {
    let (dir, ram) = (dir(), ram());
    let path = dir.path().join("large");
    let want: Vec<u8> = (0..3 << 20).map(|at: usize| (at / 4096) as u8).collect();
    std::fs::write(&path, &want).unwrap();
    let file = Arc::new(IoFile::open(&path, false, CachePolicy::Direct).unwrap());
    let pages = pin(&ram, 0, 1024);
    let mut engine = engine();
    let buffers = vec![Fragment::pinned(&pages, 8, 3 << 20).unwrap()];
    engine.submit(Request::Read { file: Arc::clone(&file), offset: 0, buffers }, 0);
    assert!(finish(&mut engine, 1)[0].result.is_ok());
    let mut got = vec![0; 3 << 20];
    ram.memory().read_slice(&mut got, GuestAddress(8)).unwrap();
    assert!(got == want);
    if file.policy() == CachePolicy::Direct {
        assert_eq!((engine.stats().bounced, engine.stats().continued), (3, 2));
    }
}

#[test]
fn holes_are_punched_and_the_end_of_a_file_is_an_error() {
    let (dir, ram) = (dir(), ram());
    let (file, mut engine) = (file(dir.path(), CachePolicy::Host), engine());
    engine.submit(Request::Punch { file: Arc::clone(&file), offset: 4096, len: 8192 }, 0);
    engine.submit(Request::Zero { file: Arc::clone(&file), offset: 20000, len: 100 }, 1);
    let done = finish(&mut engine, 2);
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    let mut want = bytes();
    want[4096..12288].fill(0);
    want[20000..20100].fill(0);
    assert!(std::fs::read(dir.path().join("file")).unwrap() == want);
    let pages = pin(&ram, 0, 2);
    let read = |offset| Request::Read {
        file: Arc::clone(&file),
        offset,
        buffers: vec![Fragment::pinned(&pages, 0, 8192).unwrap()],
    };
    engine.submit(read(SIZE as u64 - 4096), 0);
    let done = finish(&mut engine, 1);
    assert!(matches!(done[0].result, Err(OpError::Short { missing: 4096, .. })), "{done:?}");
    let read_only = Arc::new(IoFile::open(Path::new("/proc/self/exe"), false, CachePolicy::Host).unwrap());
    engine.submit(
        Request::Write { file: read_only, offset: 0, buffers: vec![Fragment::pinned(&pages, 0, 1).unwrap()] },
        1,
    );
    let done = finish(&mut engine, 1);
    assert_eq!(done[0].result.as_ref().unwrap_err().errno(), Some(libc::EBADF), "{done:?}");
}

#[test]
fn an_engine_that_is_dropped_lets_go_of_nothing_too_early_and_of_everything_at_last() {
    let (dir, ram) = (dir(), ram());
    let file = file(dir.path(), CachePolicy::Host);
    let mut engine = engine();
    engine.set_latency(Some(FOR_EVER));
    for n in 0..12 {
        let buffers = vec![Fragment::pinned(&pin(&ram, u64::from(n), 1), 0, 4096).unwrap()];
        engine.submit(Request::Write { file: Arc::clone(&file), offset: 0, buffers }, n);
    }
    engine.flush().unwrap();
    assert_eq!((engine.in_flight(), engine.waiting()), (12, 4), "as many as the kernel gets");
    assert!(file.has_writes() && !file.settle(Duration::from_millis(10)));
    assert_eq!(ram.stats().unwrap().pinned, 12);
    drop(engine);
    assert_eq!(ram.stats().unwrap().pinned, 0);
    assert!(file.settle(Duration::ZERO), "no write is on its way");
    assert!(std::fs::read(dir.path().join("file")).unwrap() == bytes(), "and none was done");
}

#[test]
fn operations_stand_in_the_kernel_until_their_gate_is_opened() {
    let (dir, mut engine) = (dir(), engine());
    let file = file(dir.path(), CachePolicy::Host);
    let buffer = Arc::new(AlignedBuf::new(4096));
    let read = || Request::Read {
        file: Arc::clone(&file),
        offset: 4096,
        buffers: vec![Fragment::owned(&buffer, 0, 4096).unwrap()],
    };
    let gate = clade_host_io::Gate::close(dir.path()).unwrap();
    (0..3).for_each(|n| engine.submit(read(), n));
    engine.flush().unwrap();
    engine.wait(Duration::from_millis(50)).unwrap();
    engine.reap(|done| panic!("{done:?}")).unwrap();
    assert_eq!(engine.in_flight(), 3);
    gate.open();
    assert!(finish(&mut engine, 3).iter().all(|done| done.result.is_ok()));
    engine.submit(read(), 9);
    assert!(finish(&mut engine, 1)[0].result.is_ok(), "an open gate holds nothing");
    // Held operations are cancelled like all others.
    let _gate = clade_host_io::Gate::close(dir.path()).unwrap();
    engine.submit(read(), 10);
    engine.flush().unwrap();
    engine.cancel(|_| {});
    assert!(matches!(finish(&mut engine, 1)[0].result, Err(OpError::Cancelled)));
}

#[test]
fn what_is_cancelled_comes_back_and_the_engine_goes_on() {
    let (dir, mut engine) = (dir(), engine());
    let file = file(dir.path(), CachePolicy::Host);
    let buffer = Arc::new(AlignedBuf::new(4096));
    let read = || Request::Read {
        file: Arc::clone(&file),
        offset: 4096,
        buffers: vec![Fragment::owned(&buffer, 0, 4096).unwrap()],
    };
    engine.set_latency(Some(FOR_EVER));
    (0..3).for_each(|n| engine.submit(read(), n));
    engine.flush().unwrap();
    engine.submit(read(), 3);
    let mut cancelled = Vec::new();
    engine.cancel(|completion| cancelled.push(completion));
    assert_eq!(cancelled.len(), 1, "what the kernel did not have yet");
    cancelled.extend(finish(&mut engine, 3));
    assert!(cancelled.iter().all(|done| matches!(done.result, Err(OpError::Cancelled))), "{cancelled:?}");
    assert_eq!(Arc::strong_count(&buffer), 5, "the memory came back with them");
    engine.set_latency(Some(Duration::from_millis(30)));
    let begun = Instant::now();
    engine.submit(read(), 9);
    assert!(finish(&mut engine, 1)[0].result.is_ok());
    assert!(begun.elapsed() >= Duration::from_millis(30), "late, as asked");
    let mut got = [0; 4096];
    buffer.slice().copy_to(&mut got);
    assert!(got[..] == bytes()[4096..8192]);
}
