//! Words that identify their origin, and the record of the allowed contents of each page.
//!
//! A page has two lanes: the CPU writes the lower half, devices write the upper half. Every word of
//! a lane is the same stamp. A stamp names its writer, its page, its lane and its place in the
//! order of all writes. So a foreign, stale or misplaced page is known from its bytes alone.
//!
//! | bits | |
//! |---|---|
//! | 46..64 | writer: one number for each life of a VM. A reset begins a new life |
//! | 34..46 | page, counted over all regions |
//! | 33 | lane |
//! | 0..33 | count: drawn from one clock, so it grows along every line of descent |
//!
//! A lane has one writing thread. It records a count before each write and again after it. A reader
//! loads the lower bound before it reads and the upper bound after. Zeros count as a write: birth
//! and discards make them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use clade_memory::PAGE_SIZE;

const COUNT_BITS: u32 = 33;
const LANE_BIT: u32 = COUNT_BITS;
const PAGE_SHIFT: u32 = LANE_BIT + 1;
const WRITER_SHIFT: u32 = PAGE_SHIFT + 12;

/// Bytes of a lane.
pub(crate) const LANE: usize = PAGE_SIZE as usize / 2;

/// The half of a page, and its writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Cpu,
    Device,
}

pub(crate) const LANES: [Lane; 2] = [Lane::Cpu, Lane::Device];

impl Lane {
    /// Offset in the page.
    pub(crate) fn offset(self) -> usize {
        self as usize * LANE
    }
}

fn stamp(writer: u64, page: u64, lane: Lane, count: u64) -> u64 {
    writer << WRITER_SHIFT | page << PAGE_SHIFT | (lane as u64) << LANE_BIT | count
}

/// A stamp as printed in a failure.
fn spelled(word: u64) -> String {
    if word == 0 {
        return "zeros".to_owned();
    }
    let lane = if word >> LANE_BIT & 1 == 0 { Lane::Cpu } else { Lane::Device };
    let page = word >> PAGE_SHIFT & 0xfff;
    format!("writer {} page {page:#x} {lane:?} count {}", word >> WRITER_SHIFT, word & ((1 << COUNT_BITS) - 1))
}

/// Source of counts and writers' numbers.
#[derive(Debug)]
pub(crate) struct Clock {
    count: AtomicU64,
    writers: AtomicU64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { count: AtomicU64::new(1), writers: AtomicU64::new(1) }
    }

    fn next(&self) -> u64 {
        let count = self.count.fetch_add(1, Ordering::SeqCst);
        assert!(count < 1 << COUNT_BITS, "counts fit their bits");
        count
    }

    /// The last count drawn.
    pub(crate) fn now(&self) -> u64 {
        self.count.load(Ordering::SeqCst) - 1
    }

    fn writer(&self) -> u64 {
        let writer = self.writers.fetch_add(1, Ordering::Relaxed);
        assert!(writer < 1 << (64 - WRITER_SHIFT), "writers fit their bits");
        writer
    }
}

/// Allowed contents of a lane of a page: counts `low..=high`, and zeros if they were written at
/// `low` or later.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) low: u64,
    high: u64,
    zeroed: u64,
}

#[derive(Debug)]
struct Record {
    done: AtomicU64,
    begun: AtomicU64,
    zeroed: AtomicU64,
}

/// The visible writers: each with the last count that was inherited.
pub(crate) type Line = Arc<Vec<(u64, u64)>>;

/// Allowed contents of a VM's pages, during one life of it.
#[derive(Debug)]
pub(crate) struct Model {
    clock: Arc<Clock>,
    writer: u64,
    line: Line,
    records: [Vec<Record>; 2],
}

/// Required contents of an image.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    pub(crate) line: Line,
    spans: [Vec<Span>; 2],
}

/// A write in progress.
#[must_use]
pub(crate) struct Begun<'m> {
    record: &'m Record,
    count: u64,
    word: u64,
    was: Span,
}

impl Begun<'_> {
    /// The bytes of the lane.
    pub(crate) fn bytes(&self) -> [u8; LANE] {
        let mut bytes = [0; LANE];
        bytes.as_chunks_mut::<8>().0.fill(self.word.to_le_bytes());
        bytes
    }

    /// Completes the write.
    pub(crate) fn done(self) {
        fence(Ordering::SeqCst);
        self.record.done.store(self.count, Ordering::SeqCst);
    }

    /// Cancels the write, which has had no effect. No other write may have begun.
    pub(crate) fn undone(self) {
        self.record.zeroed.store(self.was.zeroed, Ordering::SeqCst);
        self.record.begun.store(self.was.high, Ordering::SeqCst);
    }
}

impl Model {
    /// The model of a newly born VM: zeros.
    pub(crate) fn born(clock: &Arc<Clock>, pages: u64) -> Self {
        let zero = Span { low: 0, high: 0, zeroed: 0 };
        let spans = || vec![zero; pages as usize];
        Self::of(clock, &Frozen { line: Line::default(), spans: [spans(), spans()] })
    }

    /// The model of a VM made of an image, or reset to it.
    pub(crate) fn of(clock: &Arc<Clock>, image: &Frozen) -> Self {
        let record = |span: &Span| Record {
            done: AtomicU64::new(span.low),
            begun: AtomicU64::new(span.high),
            zeroed: AtomicU64::new(span.zeroed),
        };
        let records = image.spans.each_ref().map(|spans| spans.iter().map(record).collect());
        Self { clock: Arc::clone(clock), writer: clock.writer(), line: Arc::clone(&image.line), records }
    }

    fn record(&self, page: u64, lane: Lane) -> &Record {
        &self.records[lane as usize][page as usize]
    }

    fn begin(&self, page: u64, lane: Lane, zero: bool) -> Begun<'_> {
        let record = self.record(page, lane);
        let was = self.span(page, lane, 0);
        let count = self.clock.next();
        if zero {
            record.zeroed.store(count, Ordering::SeqCst);
        }
        record.begun.store(count, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let word = if zero { 0 } else { stamp(self.writer, page, lane, count) };
        Begun { record, count, word, was }
    }

    /// Begins a write by the lane's only writer.
    pub(crate) fn write(&self, page: u64, lane: Lane) -> Begun<'_> {
        self.begin(page, lane, false)
    }

    /// Begins the zeroing of a lane, while there are no other writers.
    pub(crate) fn zero(&self, page: u64, lane: Lane) -> Begun<'_> {
        self.begin(page, lane, true)
    }

    /// The lower bound for reads from now on.
    pub(crate) fn low(&self, page: u64, lane: Lane) -> u64 {
        let low = self.record(page, lane).done.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        low
    }

    /// Allowed contents for reads that ended before now.
    pub(crate) fn span(&self, page: u64, lane: Lane, low: u64) -> Span {
        fence(Ordering::SeqCst);
        let record = self.record(page, lane);
        let high = record.begun.load(Ordering::SeqCst);
        Span { low, high, zeroed: record.zeroed.load(Ordering::SeqCst) }
    }

    /// The lower bounds of a whole VM, lane by lane.
    pub(crate) fn lows(&self) -> [Vec<u64>; 2] {
        LANES.map(|lane| (0..self.records[0].len() as u64).map(|page| self.low(page, lane)).collect())
    }

    /// Required contents of an image that was begun when the bounds were `lows` and is complete
    /// now.
    pub(crate) fn frozen(&self, lows: &[Vec<u64>; 2]) -> Frozen {
        let spans = LANES.map(|lane| {
            let lows = (0..).zip(&lows[lane as usize]);
            lows.map(|(page, low)| self.span(page, lane, *low)).collect()
        });
        let mut line = self.line.to_vec();
        line.push((self.writer, self.clock.now()));
        Frozen { line: Arc::new(line), spans }
    }

    /// The error in the bytes of a lane, if any.
    pub(crate) fn wrong(&self, page: u64, lane: Lane, span: Span, got: &[u8]) -> Option<String> {
        let wrong = wrong((&self.line, self.writer), (page, lane), span, got)?;
        Some(format!("life {}: {wrong}", self.writer))
    }
}

impl Frozen {
    /// The error in the bytes of a lane, if any.
    pub(crate) fn wrong(&self, page: u64, lane: Lane, got: &[u8]) -> Option<String> {
        wrong((&self.line, 0), (page, lane), self.spans[lane as usize][page as usize], got)
    }
}

fn wrong((line, writer): (&Line, u64), (page, lane): (u64, Lane), span: Span, got: &[u8]) -> Option<String> {
    let words = got.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let mut last = None;
    for (at, word) in words.enumerate() {
        if last == Some(word) {
            continue;
        }
        last = Some(word);
        let count = word & ((1 << COUNT_BITS) - 1);
        let from = word >> WRITER_SHIFT;
        let why = if word == 0 {
            if span.zeroed >= span.low { continue } else { "zeros" }
        } else if word != stamp(from, page, lane, count) {
            "of another page"
        } else if from != writer && !line.iter().any(|(of, limit)| *of == from && count <= *limit) {
            if line.iter().any(|(of, _)| *of == from) { "written after the fork" } else { "of another VM" }
        } else if count < span.low {
            "stale"
        } else if count > span.high {
            "from the future"
        } else {
            continue;
        };
        let zeros = if span.zeroed >= span.low { " or zeros" } else { "" };
        return Some(format!(
            "page {page:#x} {lane:?} word {at:#x} is {why}: expected counts {}..={}{zeros}, got {}",
            span.low,
            span.high,
            spelled(word)
        ));
    }
    None
}

/// Self-test of the oracle: it distinguishes each kind of wrong word.
#[test]
fn the_oracle_tells_what_is_wrong() {
    let clock = Arc::new(Clock::new());
    let parent = Model::born(&clock, 4);
    let put = |model: &Model, page| {
        let begun = model.write(page, Lane::Cpu);
        let bytes = begun.bytes();
        begun.done();
        bytes
    };
    let old = put(&parent, 1);
    let new = put(&parent, 1);
    let image = parent.frozen(&parent.lows());
    let later = put(&parent, 1);
    let child = Model::of(&clock, &image);
    let own = put(&child, 1);
    let verdict = |model: &Model, bytes: &[u8]| {
        let span = model.span(1, Lane::Cpu, model.low(1, Lane::Cpu));
        model.wrong(1, Lane::Cpu, span, bytes).unwrap_or_default()
    };
    assert_eq!(image.wrong(1, Lane::Cpu, &new), None);
    assert_eq!(verdict(&child, &own), "");
    assert!(image.wrong(1, Lane::Cpu, &later).is_some_and(|why| why.contains("after the fork")));
    assert!(image.wrong(1, Lane::Cpu, &old).is_some_and(|why| why.contains("stale")));
    assert!(image.wrong(2, Lane::Cpu, &new).is_some_and(|why| why.contains("another page")));
    assert!(image.wrong(1, Lane::Device, &new).is_some_and(|why| why.contains("another page")));
    assert!(image.wrong(1, Lane::Cpu, &[0; LANE]).is_some_and(|why| why.contains("zeros")));
    assert_eq!(image.wrong(2, Lane::Cpu, &[0; LANE]), None, "born as zeros");
    assert!(verdict(&child, &new).contains("stale"));
    assert!(verdict(&parent, &own).contains("another VM"));
    let torn = [&own[..8], &new[..8]].concat();
    assert!(verdict(&child, &torn).contains("word 0x1 is stale"));
    let ahead = child.write(1, Lane::Cpu);
    assert_eq!(verdict(&child, &ahead.bytes()), "", "a write under way");
    let bytes = ahead.bytes();
    ahead.undone();
    assert!(verdict(&child, &bytes).contains("future"));
}
