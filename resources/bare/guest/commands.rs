//! The commands that take time. All accesses to guest memory are volatile: other vCPUs, devices and
//! the host also access it.

use crate::{
    apic, disk,
    abi::{Command, Event, PAGE_SIZE, PAGE_WORDS, POLL_OPS, Status, fill_word, touch_word, write_op},
    mailbox::Mailbox,
};
use core::{
    arch::x86_64::_rdtsc,
    hint,
    ops::ControlFlow,
    sync::atomic::{AtomicU64, Ordering},
};

/// The outcome of a command.
pub struct Outcome {
    pub status: Status,
    pub result: [u64; 4],
}

impl Outcome {
    fn new(flow: ControlFlow<()>, result: [u64; 4]) -> Self {
        let status = if flow.is_break() { Status::Interrupted } else { Status::Complete };
        Self { status, result }
    }

    pub fn progress(mailbox: &Mailbox, flow: ControlFlow<()>) -> Self {
        Self::new(flow, [mailbox.progress(), 0, 0, 0])
    }
}

pub fn run(mailbox: &Mailbox, command: Command) -> Outcome {
    match command {
        Command::Spin => Outcome::progress(mailbox, spin(mailbox)),
        Command::Fill { start, pages, seed } => fill(mailbox, start, pages, seed),
        Command::Verify { start, pages, seed } => verify(mailbox, start, pages, seed),
        Command::Write { start, pages, window, seed, count, first } => {
            let end = if count == 0 { u64::MAX } else { first.saturating_add(count) };
            mailbox.set_progress(first);
            let flow = (first..end).try_for_each(|i| {
                let op = write_op(seed, i, pages, window);
                store(start + (op.page * PAGE_WORDS + op.slot) * 8, op.value);
                mailbox.set_progress(i + 1);
                poll(mailbox)
            });
            Outcome::progress(mailbox, flow)
        }
        Command::Count { start, pages, stride } => count(mailbox, start, pages, stride),
        Command::Read { start, pages, passes, words } => read(mailbox, start, pages, passes, words),
        Command::Touch { start, pages, value } => touch(mailbox, start, pages, value),
        Command::SharedCount { address, count } => shared_count(mailbox, address, count),
        Command::DiskOpen { slot, area, size } => disk::open(slot, area, size),
        Command::DiskRun(run) => disk::run(mailbox, run),
        Command::DiskReset { area } => disk::reset(area),
        Command::Relay { peer, first } => apic::relay(mailbox, peer, first),
        Command::Restart { peer } => apic::restart(mailbox, peer),
        // Handled by the command loop.
        Command::Idle | Command::Announce | Command::AnnounceAndHalt | Command::Halt => Outcome { status: Status::Rejected, result: [0; 4] },
    }
}

// With ring 0, in one page: see `poll`.
#[inline(never)]
#[unsafe(link_section = ".text.timed")]
fn spin(mailbox: &Mailbox) -> ControlFlow<()> {
    (1..).try_for_each(|n| {
        mailbox.set_progress(n);
        hint::spin_loop();
        poll(mailbox)
    })
}

fn fill(mailbox: &Mailbox, start: u64, pages: u64, seed: u64) -> Outcome {
    let flow = (0..pages).try_for_each(|page| {
        for gpa in words(start, page, PAGE_WORDS) {
            store(gpa, fill_word(seed, gpa));
        }
        mailbox.set_progress(page + 1);
        poll(mailbox)
    });
    Outcome::progress(mailbox, flow)
}

fn verify(mailbox: &Mailbox, start: u64, pages: u64, seed: u64) -> Outcome {
    let mut result = [0; 4];
    let flow = (0..pages).try_for_each(|page| {
        for gpa in words(start, page, PAGE_WORDS) {
            let (found, expected) = (load(gpa), fill_word(seed, gpa));
            if found != expected {
                if result[0] == 0 {
                    result = [0, gpa, found, expected];
                }
                result[0] += 1;
            }
        }
        mailbox.set_progress(page + 1);
        poll(mailbox)
    });
    match Outcome::new(flow, result) {
        Outcome { status: Status::Complete, result } if result[0] > 0 => Outcome { status: Status::Mismatch, result },
        outcome => outcome,
    }
}

// With ring 0, in one page: see `poll`.
#[inline(never)]
#[unsafe(link_section = ".text.timed")]
fn count(mailbox: &Mailbox, start: u64, pages: u64, stride: u64) -> Outcome {
    let step = if stride == 0 { PAGE_SIZE } else { stride.saturating_mul(8) };
    let end = start + pages * PAGE_SIZE;
    let mut gpa = start;
    let flow = (1..).try_for_each(|n| {
        store(gpa, load(gpa).wrapping_add(1));
        gpa = match gpa.checked_add(step) {
            Some(next) if next < end => next,
            _ => start,
        };
        mailbox.set_progress(n);
        poll(mailbox)
    });
    Outcome::progress(mailbox, flow)
}

fn read(mailbox: &Mailbox, start: u64, pages: u64, passes: u64, words_per_page: u64) -> Outcome {
    let passes = if passes == 0 { u64::MAX } else { passes };
    let words_per_page = words_per_page.clamp(1, PAGE_WORDS);
    let (mut sum, mut done) = (0u64, 0);
    let begin = cycles();
    let flow = (0..passes).try_for_each(|_| {
        in_chunks(pages, (POLL_OPS / words_per_page).max(1), |chunk| {
            done += chunk.end - chunk.start;
            if words_per_page == 1 {
                for page in chunk {
                    sum = sum.wrapping_add(load(start + page * PAGE_SIZE));
                }
            } else {
                for gpa in chunk.flat_map(|page| words(start, page, words_per_page)) {
                    sum = sum.wrapping_add(load(gpa));
                }
            }
            mailbox.set_progress(done);
            poll(mailbox)
        })
    });
    Outcome::new(flow, [sum, cycles() - begin, 0, 0])
}

fn touch(mailbox: &Mailbox, start: u64, pages: u64, value: u64) -> Outcome {
    let mut done = 0;
    let begin = cycles();
    let flow = in_chunks(pages, POLL_OPS, |chunk| {
        done = chunk.end;
        for page in chunk {
            let gpa = start + page * PAGE_SIZE;
            store(gpa, touch_word(value, gpa));
        }
        mailbox.set_progress(done);
        poll(mailbox)
    });
    Outcome::new(flow, [done, cycles() - begin, 0, 0])
}

fn shared_count(mailbox: &Mailbox, address: u64, count: u64) -> Outcome {
    // SAFETY: the command's decoder checked the alignment, and an access to an unmapped address
    // faults.
    let word = unsafe { AtomicU64::from_ptr(address as *mut u64) };
    let flow = in_chunks(count, POLL_OPS, |chunk| {
        let end = chunk.end;
        for _ in chunk {
            // Relaxed: the count publishes no other data.
            word.fetch_add(1, Ordering::Relaxed);
        }
        mailbox.set_progress(end);
        poll(mailbox)
    });
    Outcome::progress(mailbox, flow)
}

/// Runs `body` on consecutive ranges of at most `size`.
#[inline(always)]
fn in_chunks(total: u64, size: u64, mut body: impl FnMut(core::ops::Range<u64>) -> ControlFlow<()>) -> ControlFlow<()> {
    let mut start = 0;
    while start < total {
        let end = (start + size).min(total);
        body(start..end)?;
        start = end;
    }
    ControlFlow::Continue(())
}

/// Breaks if a new command has come.
#[inline(always)]
pub fn poll(mailbox: &Mailbox) -> ControlFlow<()> {
    let Some(seq) = mailbox.pending() else { return ControlFlow::Continue(()) };
    if mailbox.is_announce_and_halt() {
        // Here, in the loop's own page and without the stack: a clone timed by this report takes a
        // fault for each page that it touches before.
        mailbox.report_as(Event::Announce, seq);
        // SAFETY: it stops this vCPU, and nothing waits for it.
        unsafe { crate::park() }
    }
    ControlFlow::Break(())
}

/// The addresses of a page's first `count` words.
#[inline(always)]
fn words(start: u64, page: u64, count: u64) -> impl Iterator<Item = u64> {
    let base = start + page * PAGE_SIZE;
    (0..count).map(move |word| base + word * 8)
}

#[inline(always)]
pub fn load(gpa: u64) -> u64 {
    // SAFETY: the host owns the range that it gave, and an access to an unmapped address faults and
    // is reported.
    unsafe { (gpa as *const u64).read_volatile() }
}

#[inline(always)]
pub fn store(gpa: u64, value: u64) {
    // SAFETY: as for `load`.
    unsafe { (gpa as *mut u64).write_volatile(value) }
}

pub fn cycles() -> u64 {
    // SAFETY: CR4.TSD is clear, so ring 3 may read the counter.
    unsafe { _rdtsc() }
}
