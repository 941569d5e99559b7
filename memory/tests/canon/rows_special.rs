//! Rows without axes except the backing: 25, 39, 41.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use clade_memory::{
    Access, BackgroundError, Backing, FreezeMode, GuestRam, PAGE_SIZE, PageRange, PinLifetime, Quiesced, RamError,
    RamLayout, Store, StoreError,
};
use clade_test_support::Patience;
use vm_memory::{Bytes, GuestAddress};

use crate::dma::Device;
use crate::runner::{Row, Run};
use crate::vm::{ARENA, Content, Image, Vm};

pub(crate) fn rows() -> Vec<Row> {
    let row = |number, name, guards, run| Row { number, name, guards, run: Run::Once(run) };
    vec![
        row(
            25,
            "API",
            "a kernel feature that is missing and found out about in the middle of a freeze",
            named_at_the_start,
        ),
        row(39, "transact", "a write between a fetch and its clear, in no image for ever", nothing_lost),
        row(41, "ksm unmerge", "a frame that the kernel merged left writable, or taken for the VM's own", merged),
    ]
}

// --- 25 ---

/// Set in the process that lacks a system call.
const WITHOUT: &str = "CLADE_CANON_WITHOUT";
const SECCOMP_DATA_NR: u32 = 0;
const SECCOMP_DATA_ARG1: u32 = 24;
const USERFAULTFD_IOC_NEW: u32 = 0xaa00;
const PAGEMAP_SCAN: u32 = 0xc060_6610;

/// Permanently denies one system call, or one ioctl, to this thread and its children.
fn refuse(call: libc::c_long, command: Option<u32>) {
    let load =
        |at| libc::sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: at };
    let unless = |k, jf| libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf, k };
    let give = |k| libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k };
    let mut filter = vec![load(SECCOMP_DATA_NR), unless(call as u32, if command.is_some() { 3 } else { 1 })];
    if let Some(command) = command {
        filter.extend([load(SECCOMP_DATA_ARG1), unless(command, 1)]);
    }
    filter.extend([give(libc::SECCOMP_RET_ERRNO | libc::ENOTTY as u32), give(libc::SECCOMP_RET_ALLOW)]);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: no memory is named.
    let kept = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(kept, 0);
    // SAFETY: the program and its filter live until the kernel has copied them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

fn named_at_the_start(store: &Store) -> Result<(), (&'static str, String)> {
    for (without, says) in [("userfaultfd", "userfaultfd"), ("pagemap", "PAGEMAP_SCAN"), ("mount", "4 KiB pages")] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["rows_special::without_a_kernel_feature", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(WITHOUT, format!("{without} {}", store.backing().name()));
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "without {without}:\n{text}");
        assert!(text.contains(says), "without {without} it is not named:\n{text}");
    }
    Ok(())
}

/// Runs in a process of its own, started by row 25; does nothing elsewhere.
#[test]
fn without_a_kernel_feature() {
    let Ok(without) = std::env::var(WITHOUT) else { return };
    let (without, backing) = without.split_once(' ').unwrap();
    match without {
        "userfaultfd" => {
            refuse(libc::SYS_ioctl, Some(USERFAULTFD_IOC_NEW));
            refuse(libc::SYS_userfaultfd, None);
        }
        "pagemap" => refuse(libc::SYS_ioctl, Some(PAGEMAP_SCAN)),
        _ => refuse(libc::SYS_fsopen, None),
    }
    let store = match if backing == "huge" { Store::open() } else { Store::open_small() } {
        Err(error @ StoreError::Pagemap(_)) if without == "pagemap" => return println!("{error}"),
        other => other.unwrap(),
    };
    assert_ne!(without, "pagemap", "freezes would fail later");
    match without {
        "mount" => {
            assert_eq!(store.backing(), Backing::Small, "it does without");
            println!("{}", store.warning().unwrap_or("memory layers live in 4 KiB pages, as was asked for"));
        }
        _ => {
            let error = store.start_background().unwrap_err();
            assert!(matches!(error, BackgroundError::Refused(_)), "{error}");
            println!("{error}");
        }
    }
    // Everything else works: a freeze in mode Auto is eager, and one that must run in the
    // background is refused without a change.
    let mut vm = Vm::with_pages(&store, "VM", 2048);
    vm.ram.populate().unwrap();
    drop(vm.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap());
    vm.write(PageRange::new(0, 2000), 2);
    if without == "userfaultfd" {
        let refused = vm.ram.freeze_in(FreezeMode::Background, &Quiesced::by(&clade_memory::NoWriters));
        assert!(matches!(refused, Err(RamError::Background(_))), "{refused:?}");
        vm.check("after a freeze was refused");
    }
    let (ram, report) = vm.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
    assert!(report.copied >= 2000);
    let image = Image { ram, model: vm.model.clone(), report, store: store.clone() };
    vm.write(PageRange::new(0, 2000), 3);
    image.check("after its source has gone on");
}

// --- 39 ---

const WRITERS: u64 = 6;
const PAGES_EACH: u64 = 8;
/// Minimum rounds, and the maximum until enough freezes have coincided with writes.
const ROUNDS: u64 = 1_000;
const MAX_ROUNDS: u64 = 100 * ROUNDS;
const FREEZES: u32 = 20;
/// Writers by DMA; the others are CPUs, which stop for each freeze.
const DEVICES: u64 = 3;

struct Writer {
    pages: PageRange,
    /// The round that is being written, and the last complete one.
    begun: AtomicU64,
    done: AtomicU64,
}

fn write_rounds(writer: &Writer, ram: &GuestRam, device: bool, standing: &RwLock<()>, is_enough: &AtomicBool) {
    let region = &ram.regions()[0];
    for round in 1..=MAX_ROUNDS {
        if round > ROUNDS && is_enough.load(Ordering::Acquire) {
            break;
        }
        let pages = |value: u64| value.to_le_bytes().repeat(writer.pages.bytes() / 8);
        writer.begun.store(round, Ordering::Release);
        if device {
            // A pin per request: most of them meet pages that a freeze has just taken.
            let pin = region.pin(writer.pages, Access::Write, PinLifetime::Transient).unwrap();
            Device::attach(pin).put(0, &pages(round));
        } else {
            let _running = standing.read().unwrap();
            ram.memory().write_slice(&pages(round), GuestAddress(writer.pages.offset())).unwrap();
        }
        writer.done.store(round, Ordering::Release);
        if !device {
            // Yields the lock, which would never be free otherwise.
            thread::sleep(Duration::from_micros(20));
        }
    }
}

/// A word of a writer's pages that belongs to no round in between.
fn stray(ram: &GuestRam, writer: &Writer, from: u64, to: u64) -> Option<u64> {
    let mut got = vec![0; writer.pages.bytes()];
    ram.memory().read_slice(&mut got, GuestAddress(writer.pages.offset())).unwrap();
    got.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).find(|round| !(from..=to).contains(round))
}

fn nothing_lost(store: &Store) -> Result<(), (&'static str, String)> {
    let background = store.start_background().is_ok();
    let pages = 512 + 200;
    let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), store).unwrap();
    ram.populate().unwrap();
    let writer = |n| Writer {
        pages: PageRange::with_len(470 + n * 11, PAGES_EACH),
        begun: AtomicU64::new(0),
        done: AtomicU64::new(0),
    };
    let writers: Vec<Writer> = (0..WRITERS).map(writer).collect();
    let (standing, is_enough, mut freezes, mut late) = (RwLock::new(()), AtomicBool::new(false), 0u32, 0u64);
    thread::scope(|scope| {
        for (n, writer) in (0..).zip(&writers) {
            let (ram, standing, is_enough) = (&ram, &standing, &is_enough);
            scope.spawn(move || write_rounds(writer, ram, n < DEVICES, standing, is_enough));
        }
        let is_done = |writer: &Writer| writer.done.load(Ordering::Acquire) >= ROUNDS;
        while !is_enough.load(Ordering::Acquire) {
            let mode = if background && freezes % 2 == 1 { FreezeMode::Background } else { FreezeMode::Eager };
            let standing = standing.write().unwrap();
            let before: Vec<u64> = writers.iter().map(|writer| writer.done.load(Ordering::Acquire)).collect();
            // Fetch and clear: pages written since go into the image, and are no longer the VM's
            // own.
            let (image, _) = ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
            let after: Vec<u64> = writers.iter().map(|writer| writer.begun.load(Ordering::Acquire)).collect();
            drop(standing);
            freezes += 1;
            let fetched = GuestRam::reserve(image.layout(), store).unwrap();
            fetched.adopt(&image).unwrap();
            for ((writer, from), to) in writers.iter().zip(before).zip(after) {
                let stray = stray(&fetched, writer, from, to);
                assert_eq!(stray, None, "{}: rounds {from} to {to} were fetched", writer.pages);
                late += u64::from(to > from);
            }
            let is_over = writers.iter().any(|writer| writer.done.load(Ordering::Acquire) == MAX_ROUNDS);
            let met = freezes > FREEZES && late > 0;
            is_enough.store(is_over || met && writers.iter().all(is_done), Ordering::Release);
        }
    });
    let (image, _) = ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
    let fetched = GuestRam::reserve(image.layout(), store).unwrap();
    fetched.adopt(&image).unwrap();
    for writer in &writers {
        for (vm, who) in [(&ram, "the VM"), (&fetched, "the last image")] {
            let last = writer.done.load(Ordering::Acquire);
            assert_eq!(stray(vm, writer, last, last), None, "{who} has lost a write");
        }
    }
    println!(
        "39 transact: {} writes of {PAGES_EACH} pages beside {freezes} freezes, {late} of them in flight",
        writers.iter().map(|writer| writer.done.load(Ordering::Acquire)).sum::<u64>()
    );
    assert!(freezes > FREEZES && late > 0, "too few freezes met writes: {freezes}, {late}");
    Ok(())
}

// --- 41 ---

const KSM: &str = "/sys/kernel/mm/ksm";
/// Number of the kernel's scans within which it must have merged the pages.
const MAX_SCANS: u64 = 20;

/// Switches merging on for the whole host, and restores the settings on drop, also in a panic. The
/// lock excludes tests of other processes meanwhile.
struct Merging {
    was: Vec<(&'static str, String)>,
    _lock: fs::File,
}

impl Merging {
    fn start() -> std::io::Result<Self> {
        let lock = fs::File::create(std::env::temp_dir().join("clade-test-ksm.lock"))?;
        lock.lock()?;
        let mut merging = Self { was: Vec::new(), _lock: lock };
        for (name, value) in [("sleep_millisecs", "1"), ("pages_to_scan", "5000"), ("run", "1")] {
            let path = Path::new(KSM).join(name);
            merging.was.push((name, fs::read_to_string(&path)?));
            fs::write(&path, value)?;
        }
        Ok(merging)
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        for (name, value) in self.was.iter().rev() {
            let _ = fs::write(Path::new(KSM).join(name), value.trim());
        }
    }
}

/// Pages of this process that share a merged frame.
fn merged_pages() -> u64 {
    fs::read_to_string("/proc/self/ksm_merging_pages").ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Number of complete scans of all mergeable memory. The kernel merges pages that two scans have
/// found unchanged.
fn full_scans() -> u64 {
    fs::read_to_string(Path::new(KSM).join("full_scans")).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn merged(store: &Store) -> Result<(), (&'static str, String)> {
    /// Both backings' walks share the process's count of merged pages, and the switch.
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let _merging = Merging::start().map_err(|error| ("ksm", format!("{KSM} cannot be switched on: {error}")))?;
    // Private copies with the same bytes in two unrelated VMs.
    let twin = |who| {
        let mut vm = Vm::born(store, who);
        drop(vm.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap());
        let bytes = Content::Byte(0x6b).bytes(0).repeat(ARENA.len() as usize);
        vm.ram.memory().write_slice(&bytes, GuestAddress(ARENA.offset())).unwrap();
        vm.holds(ARENA, Content::Byte(0x6b));
        let at = (vm.region().host_address() + ARENA.offset()) as *mut libc::c_void;
        // SAFETY: merging does not change the pages' contents.
        let allowed = unsafe { libc::madvise(at, ARENA.bytes(), libc::MADV_MERGEABLE) };
        (allowed == 0).then_some(vm).ok_or(("ksm", "MADV_MERGEABLE is refused".to_owned()))
    };
    let (mut one, mut two) = (twin("VM")?, twin("twin")?);
    let (scans, mut patience) = (full_scans(), Patience::default());
    while merged_pages() < ARENA.len() {
        // The patience covers a kernel that does not scan at all.
        if full_scans() > scans + MAX_SCANS || !patience.tick() {
            return Err(("ksm", format!("the kernel has merged nothing in {MAX_SCANS} scans of the memory")));
        }
        thread::sleep(Duration::from_millis(2));
    }
    let quarter = |n: u64| PageRange::with_len(ARENA.start() + n * 10, 10);
    // Written, written by a device, discarded, protected: each on merged frames.
    one.write(quarter(0), 2);
    let mut device = two.device(quarter(1), Access::Write, PinLifetime::LongTerm);
    device.write(0xd1);
    two.holds(quarter(1), Content::Byte(0xd1));
    two.check_device(&mut device, "on merged pages");
    drop(device);
    one.region().discard(quarter(2)).unwrap();
    one.holds(quarter(2), Content::Zero);
    for mode in [FreezeMode::Eager, FreezeMode::Background] {
        let (ram, report) = match two.ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)) {
            Err(RamError::Background(error)) => return Err(("uffd", error.to_string())),
            other => other.unwrap(),
        };
        let image = Image { ram, model: two.model.clone(), report, store: store.clone() };
        two.write(quarter(3), 4);
        image.check("of merged pages");
    }
    for vm in [&one, &two] {
        vm.check("after the kernel has merged its pages");
    }
    Ok(())
}
