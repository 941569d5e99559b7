//! Runs the table, and reports the rows run, the rows skipped with their reasons, and the failures.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clade_memory::{Backing, FreezeMode, GuestRam, PAGE_SIZE, RamLayout, Store};
use clade_test_support::{Watchdog, wait_eq};

use crate::AGAIN;
use crate::case::{Axis, Case, FILLING, State};

/// The condition under which a combination is left out, and the reason.
pub(crate) type Skip = (fn(&Axis) -> bool, &'static str);

pub(crate) enum Run {
    /// Every combination except the skipped ones.
    Axes(&'static [Skip], fn(&Case<'_>)),
    /// Rows 1-14 in these states.
    Again(&'static [State]),
    /// Once per backing; an error is the reason for skipping, after its tier.
    Once(fn(&Store) -> Result<(), (&'static str, String)>),
}

pub(crate) struct Row {
    pub(crate) number: u32,
    pub(crate) name: &'static str,
    /// The leak that the row guards against.
    pub(crate) guards: &'static str,
    pub(crate) run: Run,
}

/// Skipped in every row.
const ALWAYS: &[Skip] = &[(
    |axis| matches!(axis.state, State::Evicted | State::Restored) && axis.mode == FreezeMode::Background,
    "pages over a file on a disk cannot be write-protected, and are frozen eagerly",
)];

/// Number of failures after which the rest of a row is skipped.
const ENOUGH: usize = 3;
const HANG_LIMIT: Duration = Duration::from_secs(600);

#[derive(Default)]
struct Tally {
    ran: usize,
    took: Duration,
    skipped: BTreeMap<String, usize>,
    failures: Vec<String>,
}

/// The run over one backing.
struct Walk<'t> {
    table: &'t [Row],
    backing: Backing,
    store: Store,
    background: Result<(), String>,
    at: Arc<Mutex<String>>,
    tallies: Vec<Tally>,
    /// Combinations that are skipped in every row.
    always: BTreeMap<&'static str, usize>,
}

fn open(backing: Backing) -> Store {
    let store = match backing {
        Backing::Huge => Store::open(),
        Backing::Small => Store::open_small(),
    };
    store.unwrap()
}

impl<'t> Walk<'t> {
    fn new(table: &'t [Row], backing: Backing) -> Self {
        let store = open(backing);
        let background = store.start_background().map_err(|error| error.to_string());
        let tallies = table.iter().map(|_| Tally::default()).collect();
        Self { table, backing, store, background, at: Arc::default(), tallies, always: BTreeMap::new() }
    }

    fn walk(&mut self) {
        if self.store.backing() != self.backing {
            let warning = self.store.warning().unwrap_or("");
            clade_test_support::skipped(&format!("everything in {} pages: {warning}", self.backing.name()));
            return;
        }
        for at in 0..self.table.len() {
            match &self.table[at].run {
                Run::Axes(skips, run) => self.axes(at, at, skips, *run, None),
                Run::Again(states) => {
                    for (inner, row) in self.table.iter().enumerate() {
                        if let Run::Axes(skips, run) = &row.run
                            && AGAIN.contains(&row.number)
                        {
                            self.axes(at, inner, skips, *run, Some(states));
                        }
                    }
                }
                Run::Once(run) => {
                    let what = self.title(at);
                    let mut outcome = Ok(());
                    let ran = self.attempt(at, &what, |store| outcome = run(store));
                    self.nothing_held(at, &what);
                    if let (true, Err((tier, reason))) = (ran, outcome) {
                        self.tallies[at].ran -= 1;
                        clade_test_support::skip(tier, &format!("{what}: {reason}"));
                        *self.tallies[at].skipped.entry(reason).or_default() += 1;
                    }
                }
            }
        }
    }

    fn title(&self, at: usize) -> String {
        let row = &self.table[at];
        format!("{} {} ({}), {} pages", row.number, row.name, row.guards, self.backing.name())
    }

    /// Runs the combinations of row `inner` on behalf of row `at`.
    fn axes(&mut self, at: usize, inner: usize, skips: &[Skip], run: fn(&Case<'_>), states: Option<&[State]>) {
        let again = AGAIN.contains(&self.table[inner].number);
        let stride = clade_test_support::stride();
        let wanted = |(_, axis): &(usize, Axis)| states.is_none_or(|states| states.contains(&axis.state));
        for (index, axis) in Axis::all().enumerate().filter(wanted) {
            if states.is_none() && again && axis.state.is_another_rows() {
                self.skip(at, "in these states it is row 22 or 23");
                continue;
            }
            if let Some((_, why)) = ALWAYS.iter().find(|(left_out, _)| left_out(&axis)) {
                *self.always.entry(why).or_default() += 1;
                continue;
            }
            if let Some((_, why)) = skips.iter().find(|(left_out, _)| left_out(&axis)) {
                self.skip(at, why);
                continue;
            }
            // Ensures that each value of an axis meets each of the others in some row.
            let diagonal = index % 6 + index / 6 + index / 18 + self.table[inner].number as usize;
            if !diagonal.is_multiple_of(stride) {
                self.skip(at, "with a stride of more than 1 (CLADE_TEST_STRIDE)");
                continue;
            }
            if let Err(why) = &self.background
                && (axis.mode == FreezeMode::Background || axis.state == State::BackgroundCopy)
            {
                let why = why.clone();
                clade_test_support::skip("uffd", &format!("{axis:?}: {why}"));
                self.skip(at, &why);
                continue;
            }
            if self.tallies[at].failures.len() >= ENOUGH {
                return;
            }
            let what = format!("{}, {axis:?}", self.title(inner));
            self.attempt(at, &what, |store| run(&Case::new(store, axis)));
        }
        self.nothing_held(at, &format!("{}, after all its combinations", self.title(inner)));
    }

    /// Layers are freed a moment after their last user is dropped: waiting for that after each
    /// combination would take longer than the combination.
    fn nothing_held(&mut self, at: usize, what: &str) {
        let ran = self.tallies[at].ran;
        self.attempt(at, what, expect_nothing_held);
        self.tallies[at].ran = ran;
    }

    fn skip(&mut self, at: usize, why: &str) {
        *self.tallies[at].skipped.entry(why.to_owned()).or_default() += 1;
    }

    fn attempt(&mut self, at: usize, what: &str, run: impl FnOnce(&Store)) -> bool {
        what.clone_into(&mut self.at.lock().unwrap());
        let begun = Instant::now();
        let tried = catch_unwind(AssertUnwindSafe(|| run(&self.store)));
        self.tallies[at].took += begun.elapsed();
        match tried {
            Ok(()) => self.tallies[at].ran += 1,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                self.tallies[at].failures.push(format!("{what}: {text}"));
                // The next case does not share its leftovers.
                self.store = open(self.backing);
            }
        }
        self.tallies[at].failures.is_empty()
    }
}

fn expect_nothing_held(store: &Store) {
    // A thread of the store frees layers.
    wait_eq("a layer or a mapping outlived its last user", &(0, 0), || (store.live_layers(), store.budget().used()));
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs the table over both backings, one thread each.
pub(crate) fn run(table: &[Row]) {
    // The first region leaves one permanent descriptor in the process: an eventfd.
    let store = Store::open_small().unwrap();
    drop(GuestRam::reserve(&RamLayout::new(PAGE_SIZE).unwrap(), &store).unwrap());
    drop(store);
    let files = open_files();
    let begun = Instant::now();
    let tallies: Vec<Vec<Tally>> = {
        let mut walks: Vec<Walk<'_>> = [Backing::Huge, Backing::Small].map(|b| Walk::new(table, b)).into();
        let places: Vec<_> = walks.iter().map(|walk| Arc::clone(&walk.at)).collect();
        let place = |at: &Arc<Mutex<String>>| at.try_lock().map(|at| at.clone()).unwrap_or_default();
        let _watchdog = Watchdog::new(HANG_LIMIT, move || places.iter().map(place).collect::<Vec<_>>().join("; "));
        thread::scope(|scope| {
            let started: Vec<_> = walks.iter_mut().map(|walk| scope.spawn(|| walk.walk())).collect();
            // Joined, not just waited for: a thread's devices are freed at its end.
            started.into_iter().for_each(|thread| thread.join().expect("a walk that goes through"));
        });
        for (why, count) in walks.iter().flat_map(|walk| &walk.always) {
            println!("in all rows, {count:4} skipped: {why}");
        }
        walks.into_iter().map(|walk| walk.tallies).collect()
    };
    let mut failed = Vec::new();
    for (at, row) in table.iter().enumerate() {
        let of = |count: fn(&Tally) -> usize| tallies.iter().filter_map(|t| t.get(at)).map(count).sum::<usize>();
        let ran = of(|tally| tally.ran);
        let took: Duration = tallies.iter().filter_map(|tally| tally.get(at)).map(|tally| tally.took).sum();
        let (took, failures) = (took.as_secs_f64(), of(|tally| tally.failures.len()));
        println!("{:2} {:32} {ran:4} ran, {failures} failed, {took:4.1} s    {}", row.number, row.name, row.guards);
        let mut skipped = BTreeMap::<&str, usize>::new();
        for (why, count) in tallies.iter().filter_map(|tally| tally.get(at)).flat_map(|tally| &tally.skipped) {
            *skipped.entry(why).or_default() += count;
        }
        skipped.iter().for_each(|(why, count)| println!("   {:32} {count:4} skipped: {why}", ""));
        failed.extend(tallies.iter().filter_map(|tally| tally.get(at)).flat_map(|tally| &tally.failures));
        assert!(ran > 0 || !skipped.is_empty() || !failed.is_empty(), "row {} tests nothing", row.number);
    }
    let ran: usize = tallies.iter().flatten().map(|tally| tally.ran).sum();
    println!("{ran} combinations in {:.1} s", begun.elapsed().as_secs_f64());
    let [over, filling] = [0, 1].map(|n| FILLING[n].load(Ordering::Relaxed));
    println!("of {} VMs that were to be filled, {filling} were not when their rows began", over + filling);
    assert!(
        failed.is_empty(),
        "{} failed:\n{}",
        failed.len(),
        failed.iter().map(|f| format!("row {f}\n")).collect::<String>()
    );
    // A host without background freezes has skipped them.
    assert!(filling > 0 || over == 0, "the state \"being filled\" was never met");
    wait_eq("files are left open", &files, open_files);
}
