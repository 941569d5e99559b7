//! The guest: a thread that writes words around the disk's buffers and in all other pages, and
//! records its writes.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clade_memory::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use crate::disk;

/// Three whole blocks and a part of one.
pub(crate) const BYTES: u64 = (3 * 512 + 70) * PAGE_SIZE;
const WORDS: usize = (BYTES / 8) as usize;
/// Words written between two checks for a stop.
const TURN: usize = 256;

/// Ranges of bytes between the disk's buffers.
fn gaps() -> impl Iterator<Item = Range<u64>> {
    let starts = std::iter::once(0).chain((0..disk::SLOTS).map(|slot| disk::buffer(slot).end));
    let ends = (0..disk::SLOTS).map(|slot| disk::buffer(slot).start).chain(std::iter::once(BYTES));
    starts.zip(ends).map(|(start, end)| start..end)
}

/// The guest's writes: a word for each address, zero before its first write.
pub(crate) struct Guest {
    words: Vec<u64>,
    /// Addresses in the order of writing: the words next to the buffers repeatedly, and one word of
    /// every other page in turn.
    order: Vec<u64>,
    next: usize,
    count: u64,
}

impl Default for Guest {
    fn default() -> Self {
        let mut order = Vec::new();
        let beside: Vec<u64> = gaps().flat_map(|gap| [gap.start, gap.end - 8]).filter(|at| *at < BYTES).collect();
        for gap in gaps() {
            for page in gap.start.div_ceil(PAGE_SIZE)..gap.end / PAGE_SIZE {
                order.push(page * PAGE_SIZE + page * 8 % PAGE_SIZE);
                if page % 8 == 0 {
                    order.extend(&beside);
                }
            }
        }
        Self { words: vec![0; WORDS], order, next: 0, count: 0 }
    }
}

impl Guest {
    /// Writes until `stop` is set; pauses while the lock is held by another thread.
    pub(crate) fn run(guest: &Mutex<Self>, ram: &GuestRam, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            guest.lock().unwrap().turn(ram);
            // The lock is not fair.
            thread::yield_now();
        }
    }

    fn turn(&mut self, ram: &GuestRam) {
        for _ in 0..TURN {
            let at = self.order[self.next];
            self.next = (self.next + 1) % self.order.len();
            self.count += 1;
            ram.memory().write_obj(self.count, GuestAddress(at)).unwrap();
            self.words[(at / 8) as usize] = self.count;
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.words.clone())
    }
}

/// The guest's writes at one instant.
pub(crate) struct Snapshot(Vec<u64>);

impl Snapshot {
    /// Number of bytes of `ram` outside the disk's buffers that differ.
    pub(crate) fn wrong_bytes(&self, ram: &GuestRam) -> u64 {
        let mut got = vec![0u8; BYTES as usize];
        ram.memory().read_slice(&mut got, GuestAddress(0)).unwrap();
        let wrong = |gap: Range<u64>| {
            let got = got[gap.start as usize..gap.end as usize].chunks_exact(8);
            let want = &self.0[(gap.start / 8) as usize..(gap.end / 8) as usize];
            got.zip(want).filter(|(got, want)| **got != want.to_ne_bytes()).count() as u64 * 8
        };
        gaps().map(wrong).sum()
    }
}
