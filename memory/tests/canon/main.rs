//! The kernel's own tests of copy-on-write, pins and tracking (cow.c, gup_longterm.c, and those of
//! userfaultfd, pagemap, mkdirty and ksm), adapted to VMs: one table of rows, each run over its
//! axes.
//!
//! ```text
//!   page state   birth | shared | exclusive | reference | filling | evicted | mixed | one left
//!   backing      huge | 4 KiB
//!   actor        CPU | device read | device write   (a thread; io_uring's registered buffers)
//!   order        fork | snapshot | reset            (child at once; image adopted later; VM reset)
//!   freeze       eager | in the background
//! ```
//!
//! "Not loaded" is two states here: being filled (by a background freeze that has not reached the
//! page) and evicted. Rows 22 and 23 are rows 1-14 again, over mixed blocks and over pages that are
//! not loaded. A combination that is meaningless, or unsupported by this host, is *skipped*: listed
//! once with its reason, and not counted as run.
//!
//! Rows 31 (one fault per page of a lazy restore), 32 (an unavailable page is a named error) and 34
//! (a corrupt page stops only its VM) are with the tests of devices and snapshots. The interface
//! has no dirty query; rows 36-38 check the statistics and the pages taken by a freeze instead.

#![allow(clippy::unwrap_used, reason = "a test, although not every function of it is one")]

mod case;
#[path = "../dma/mod.rs"]
mod dma;
mod rows_cow;
mod rows_pin;
mod rows_special;
mod rows_track;
mod runner;

mod vm;

use case::State;
use runner::{Row, Run};

/// Rows of which rows 22 and 23 are made.
const AGAIN: std::ops::RangeInclusive<u32> = 1..=14;

fn table() -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(rows_cow::rows());
    rows.extend(rows_pin::rows());
    rows.push(Row {
        number: 22,
        name: "partial",
        guards: "a block taken for what its first page is; one page left of a discarded block",
        run: Run::Again(&[State::Mixed, State::OneLeft]),
    });
    rows.push(Row {
        number: 23,
        name: "swapped",
        guards: "pages that are not there yet: read as zeros, or filled again over what was written",
        run: Run::Again(&[State::BackgroundCopy, State::Evicted, State::Restored]),
    });
    rows.extend(rows_track::rows());
    rows.extend(rows_special::rows());
    rows.sort_by_key(|row| row.number);
    rows
}

#[test]
fn canon() {
    runner::run(&table());
}

#[test]
fn the_table_is_complete() {
    let mut numbers: Vec<u32> = table().iter().map(|row| row.number).collect();
    numbers.dedup();
    let elsewhere = [31, 32, 34];
    let want: Vec<u32> = (1..=41).filter(|n| !elsewhere.contains(n)).collect();
    assert_eq!(numbers, want);
}
