//! Traces: one event per linearization point, replayed against the specification while the process
//! runs.
//!
//! Only with the `trace` feature, and then only if `CLADE_TRACE` is set. Without the feature
//! `off.rs` replaces this module with zero-sized types and empty functions.
//!
//! # Why the order is right
//!
//! There is one log, under one lock. A step on a record is performed *while the log is locked*
//! ([`step`]): the compare-and-swap and its place in the log are inseparable, so the log has the
//! steps of a record in the order in which they took effect, and steps on two records in an order
//! that no thread can contradict. The registry of views and the count of handles are logged in the
//! same way.
//!
//! System calls are not made under the log's lock. A mapping is logged after the call, by the
//! thread that holds the lock which orders it: the region's state lock, or the lock of the
//! background copy. Every dependent step follows the release of that lock, or goes through a
//! record, so it is logged later. Resources that are *handed out* (a pin, a section) are logged as
//! held after they are taken and as released before they are: the log has them for a shorter time
//! than they are held, so no correct step is refused.
//!
//! A guest's write is in no log. Such a write is the specification's `Write`, allowed at any time
//! while the VM is not stopped; the log has it when the kernel reports page ownership.
//!
//! The log's lock is a leaf: no other lock is taken under it.

pub(crate) mod check;
pub(crate) mod event;
mod frames;
pub(crate) mod records;
mod region;
mod step;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::HashMap;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::layer::{LayerId, LayerMap};
use crate::ownership::word::{Ownership, Word};
use crate::region::dont_fork::{self, DontForkMap};
use crate::trace::check::Checker;
use crate::trace::event::{Event, FileId};
use crate::trace::records::Record;
pub(crate) use crate::trace::step::WordStep;
use crate::units::PageRange;
use crate::{Access, PinLifetime};

/// Events per chunk.
const CHUNK: usize = 4096;
/// Chunks that wait for the validator. With more, the logging thread waits.
const WAITING: usize = 64;

/// An event, and the number of its thread.
pub(crate) type Entry = (u64, Event);

enum Message {
    Events(Vec<Entry>),
    End(SyncSender<String>),
}

struct Log {
    events: Vec<Entry>,
    validator: SyncSender<Message>,
}

static LOG: LazyLock<Option<Mutex<Log>>> = LazyLock::new(|| {
    std::env::var_os("CLADE_TRACE")?;
    let (validator, events) = sync_channel(WAITING);
    let spawned = std::thread::Builder::new().name("trace".into()).spawn(move || validate(&events));
    spawned.map_err(|error| eprintln!("trace: no thread: {error}")).ok()?;
    // SAFETY: `at_exit` is a function of the C ABI that takes nothing and does not unwind.
    unsafe { libc::atexit(at_exit) };
    Some(Mutex::new(Log { events: Vec::with_capacity(CHUNK), validator }))
});

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A unique number. Relaxed: only uniqueness matters.
fn number() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

thread_local! {
    static THREAD: u64 = number();
    static DEVICE: Cell<u64> = const { Cell::new(0) };
}

fn log() -> Option<MutexGuard<'static, Log>> {
    LOG.as_ref().map(|log| log.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Log {
    fn push(&mut self, event: Event) {
        self.events.push((THREAD.try_with(|id| *id).unwrap_or(0), event));
        if self.events.len() == CHUNK {
            let full = std::mem::replace(&mut self.events, Vec::with_capacity(CHUNK));
            // A validator that has ended has printed the reason.
            let _ = self.validator.send(Message::Events(full));
        }
    }
}

/// Ends the process. Steps after a refused one are meaningless.
fn end(told: &str) -> ! {
    // Bypasses the print macros: tests, and threads started by tests, may have their output
    // captured.
    let _ = writeln!(std::io::stderr(), "{told}");
    // SAFETY: ends the process without running any of its code. Not an abort: no core is wanted.
    unsafe { libc::_exit(101) }
}

fn validate(events: &Receiver<Message>) {
    let replayed = catch_unwind(AssertUnwindSafe(|| replay(events)));
    if let Err(panic) = replayed {
        let text = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
        end(&format!("trace: the validator has failed: {text}"));
    }
}

fn replay(events: &Receiver<Message>) {
    let mut checker = Checker::default();
    for message in events {
        match message {
            Message::Events(entries) => {
                for (thread, event) in entries {
                    if let Err(refused) = checker.step(thread, event) {
                        end(&refused.to_string());
                    }
                }
            }
            Message::End(told) => {
                let _ = told.send(checker.summary());
                return;
            }
        }
    }
}

extern "C" fn at_exit() {
    let Some(mut log) = log() else { return };
    let (tell, told) = sync_channel(1);
    let rest = std::mem::take(&mut log.events);
    let sent = log.validator.send(Message::Events(rest)).and_then(|()| log.validator.send(Message::End(tell)));
    drop(log);
    if let (Ok(()), Ok(summary)) = (sent, told.recv()) {
        let _ = writeln!(std::io::stdout(), "{summary}");
        let _ = std::io::stdout().flush();
    }
}

/// Logs an operation that has been done.
pub(crate) fn emit(event: impl FnOnce() -> Event) {
    if LOG.is_some() {
        let event = event();
        if let Some(mut log) = log() {
            log.push(event);
        }
    }
}

/// Does `work` and logs it, as one step.
pub(crate) fn step<T>(work: impl FnOnce() -> T, event: impl FnOnce(&T) -> Event) -> T {
    let mut log = log();
    let done = work();
    if let Some(log) = &mut log {
        log.push(event(&done));
    }
    done
}

fn record(ownership: Ownership) -> Record {
    match (ownership.is_split(), ownership.is_exclusive(), ownership.pins()) {
        (true, ..) => Record::Ask,
        (false, exclusive, pins) => Record::Says { exclusive, pins },
    }
}

/// The number of an ownership table.
#[derive(Debug)]
pub(crate) struct Table(u64);

impl Table {
    pub(crate) fn new(pages: u64) -> Self {
        let table = number();
        emit(|| Event::Table { table, pages });
        Self(table)
    }

    pub(crate) fn on<T>(
        &self,
        block: usize,
        page: Option<u64>,
        step: WordStep,
        word: &Word,
        work: impl FnOnce(&Word) -> T,
    ) -> T {
        let Some(mut log) = log() else { return work(word) };
        let before = word.load().unused();
        let done = work(word);
        let after = word.load().unused();
        if before != after {
            let (before, after, device) = (record(before), record(after), DEVICE.get());
            let page = page.map(|page| (page % crate::BLOCK_PAGES) as usize);
            log.push(Event::Word { table: self.0, block, page, step, before, after, device });
        }
        done
    }

    pub(crate) fn space(&self, at: u64) {
        emit(|| Event::Space { at, table: self.0 });
    }

    pub(crate) fn freeze_begun(&self) {
        emit(|| Event::FreezeBegun { table: self.0 });
    }

    pub(crate) fn freeze_failed(&self) {
        emit(|| Event::FreezeFailed { table: self.0 });
    }

    pub(crate) fn left(&self) {
        emit(|| Event::Left { table: self.0 });
    }

    pub(crate) fn reset_begun(&self) {
        emit(|| Event::ResetBegun { table: self.0 });
    }

    pub(crate) fn settled(&self, map: &LayerMap) {
        emit(|| Event::Settled { table: self.0, map: pieces(map) });
    }

    pub(crate) fn image(&self, map: &LayerMap, declared: &DontForkMap) {
        emit(|| Event::Image { table: self.0, map: pieces(map), declared: dont_fork::runs(declared) });
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        emit(|| Event::TableGone { table: self.0 });
    }
}

/// Proof that the table's lock is held.
#[derive(Debug)]
pub(crate) struct TraceLocked(u64);

impl TraceLocked {
    pub(crate) fn new(table: &Table) -> Self {
        emit(|| Event::Lock { table: table.0 });
        Self(table.0)
    }
}

impl Drop for TraceLocked {
    fn drop(&mut self) {
        emit(|| Event::Unlock { table: self.0 });
    }
}

/// One pin, from its request to its end.
#[derive(Debug)]
pub(crate) struct Device(u64);

impl Device {
    pub(crate) fn pin(table: &Table, range: PageRange, access: Access, term: PinLifetime) -> Self {
        let device = number();
        DEVICE.set(device);
        let (write, long) = (access == Access::Write, term == PinLifetime::LongTerm);
        emit(|| Event::Pin { device, table: table.0, range, write, long });
        Self(device)
    }

    pub(crate) fn held(&self, counted: Option<&[PageRange]>, section: bool) {
        emit(|| Event::Held { device: self.0, counted: counted.map(<[_]>::to_vec), section });
        DEVICE.set(0);
    }

    pub(crate) fn close(&self) {
        emit(|| Event::Closing { device: self.0 });
        DEVICE.set(self.0);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        DEVICE.set(0);
        emit(|| Event::Done { device: self.0 });
    }
}

fn pieces(map: &LayerMap) -> Vec<(PageRange, u64, u64)> {
    map.iter().map(|(range, source)| (range, source.layer.id().0, source.at)).collect()
}

/// A view was registered, under the registry's lock.
pub(crate) fn view(view: u64, map: &LayerMap, born: bool) {
    emit(|| Event::View { view, born, map: pieces(map) });
}

/// A file's identity.
pub(crate) fn file(file: impl AsFd) -> FileId {
    rustix::fs::fstat(file).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino))
}

/// A sweep checks handles for the last time.
pub(crate) fn swept<V>(seen: &mut HashMap<LayerId, V>, ask: impl FnOnce(&mut HashMap<LayerId, V>)) {
    let ask = || {
        ask(seen);
        seen.keys().map(|layer| layer.0).collect::<Vec<u64>>()
    };
    step(ask, |layers| Event::Swept { layers: layers.clone() });
}

/// Counts a handle.
pub(crate) fn handle(layer: LayerId, count: impl FnOnce() -> u64) {
    step(count, |_| Event::Handle { layer: layer.0 });
}
