//! The worker's turns, one at a time: the effect of each, and the state passed on by a fork between
//! two of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clade_host_io::Gate;
use clade_memory::{GuestRam, Quiesced, RamImage, RamLayout, Store};
use clade_test_support::{Patience, Watchdog, wait_until};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::service::{BATCH, BlockService, DISK as DISK_EVENT, IdleDisk};
use super::{Block, BlockOptions, BlockState, DiskNotTaken, InFlight, SEG_MAX};
use crate::irq::Irq;
use crate::virtio::interrupt::InterruptState;
use crate::virtio::limiter::{Limiter, Limits, Rate};
use crate::virtio::{Activation, Interrupt, QueueState, Service, Turn, VirtioDevice, Virtqueue, Wake, YieldRequest};
use clade_block::{Disk, DiskConfig, DiskImage, ISSUE_BYTES, MAX_TRANSFER_BYTES};

const RAM: u64 = 32 << 20;
const QUEUE: u16 = 256;
/// Rings of a queue: descriptors, available, used.
const RINGS: u64 = 0x1_0000;
/// Headers and statuses of requests, by their first descriptor.
const HEADERS: u64 = 0x10_0000;
const DATA: u64 = 0x40_0000;
const DISK: usize = 24 << 20;
const PAGE: u64 = 4096;
const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
/// Longer than a test: operations given to the kernel do not end.
const FOR_EVER: Duration = Duration::from_secs(3600);
const MODERN: u64 = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX;

/// A service without a thread, and its driver.
struct Rig {
    ram: GuestRam,
    service: BlockService,
    interrupt: Arc<Interrupt>,
    /// Empty in a child.
    events: Vec<Arc<EventFd>>,
    available: Vec<u16>,
    used: Vec<u16>,
    next: Vec<u16>,
    features: u64,
}

/// The state that a fork passes on.
struct Moment {
    ram: RamImage,
    disk: DiskImage,
    in_flight: Vec<InFlight>,
    queues: Vec<Option<QueueState>>,
}

struct Options {
    queues: u16,
    features: u64,
    limits: Limits,
    latency: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 1, features: MODERN, limits: Limits::default(), latency: None }
    }
}

fn file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, pattern(0, DISK)).unwrap();
    (dir, path)
}

/// The initial contents of the disk, from `offset` on.
fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(|at| (at / 512 % 251) as u8).collect()
}

fn rings(queue: u16) -> u64 {
    RINGS + u64::from(queue) * 0x8000
}

fn events(queues: usize) -> Vec<Arc<EventFd>> {
    (0..queues).map(|_| Arc::new(clade_host_io::eventfd().unwrap())).collect()
}

fn activation(ram: &GuestRam, features: u64, states: &[Option<QueueState>]) -> (Activation, Arc<Interrupt>) {
    activation_by(&events(states.len()), ram, features, states)
}

/// The same, with the eventfds of the queues.
fn activation_by(
    events: &[Arc<EventFd>],
    ram: &GuestRam,
    features: u64,
    states: &[Option<QueueState>],
) -> (Activation, Arc<Interrupt>) {
    let interrupt = Arc::new(Interrupt::new(&Arc::new(Irq::new().unwrap()), InterruptState::default()));
    let queues = (0..)
        .zip(states)
        .zip(events)
        .map(|((index, state), event)| state.map(|state| Virtqueue::new(index, &state, features, ram, event).unwrap()));
    let with = Activation {
        ram: ram.clone(),
        queues: queues.collect(),
        features,
        interrupt: Arc::clone(&interrupt),
        held: false,
    };
    (with, interrupt)
}

impl Rig {
    fn new(path: &std::path::Path, options: &Options) -> Self {
        let ram = GuestRam::reserve(&RamLayout::new(RAM).unwrap(), &Store::open_small().unwrap()).unwrap();
        ram.populate().unwrap();
        let state = |index| QueueState {
            ready: true,
            descriptors: rings(index),
            available: rings(index) + 0x2000,
            used: rings(index) + 0x4000,
            ..QueueState::new(QUEUE)
        };
        let states: Vec<_> = (0..options.queues).map(|index| Some(state(index))).collect();
        let events = events(states.len());
        let (with, interrupt) = activation_by(&events, &ram, options.features, &states);
        let disk = Disk::open(&DiskConfig { latency: options.latency, ..DiskConfig::new(path) }).unwrap();
        let idle = IdleDisk { disk, limiter: Limiter::new(&options.limits) };
        let service = BlockService::new(idle, with, [].into());
        let count = usize::from(options.queues);
        let (available, used, next) = (vec![0; count], vec![0; count], vec![0; count]);
        Self { ram, service, interrupt, events, available, used, next, features: options.features }
    }

    /// Makes a request available. Returns its head.
    fn offer(&mut self, queue: u16, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let index = usize::from(queue);
        let head = self.next[index];
        let header = HEADERS + u64::from(queue) * 0x1_0000 + u64::from(head) * 32;
        let memory = self.ram.memory();
        memory.write_obj(kind, GuestAddress(header)).unwrap();
        memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(header + 16)).unwrap();
        let mut buffers = vec![(header, 16, false)];
        buffers.extend(data.iter().map(|&(at, len)| (at, len, [IN, GET_ID].contains(&kind))));
        buffers.push((header + 16, 1, true));
        for (n, (at, len, write)) in buffers.iter().enumerate() {
            let slot = rings(queue) + u64::from((head + n as u16) % QUEUE) * 16;
            let flags = u16::from(n + 1 < buffers.len()) | if *write { 2 } else { 0 };
            memory.write_obj(*at, GuestAddress(slot)).unwrap();
            memory.write_obj(*len, GuestAddress(slot + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(slot + 12)).unwrap();
            memory.write_obj((head + n as u16 + 1) % QUEUE, GuestAddress(slot + 14)).unwrap();
        }
        self.next[index] = (head + buffers.len() as u16) % QUEUE;
        let slot = rings(queue) + 0x2004 + u64::from(self.available[index] % QUEUE) * 2;
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available[index] = self.available[index].wrapping_add(1);
        memory.write_obj(self.available[index], GuestAddress(rings(queue) + 0x2002)).unwrap();
        head
    }

    /// Makes a request for a range to discard or zero available.
    fn offer_range(&mut self, kind: u32, sector: u64, sectors: u32) -> u16 {
        let at = DATA - PAGE;
        self.ram.memory().write_obj(sector, GuestAddress(at)).unwrap();
        self.ram.memory().write_obj(sectors, GuestAddress(at + 8)).unwrap();
        self.ram.memory().write_obj(0u32, GuestAddress(at + 12)).unwrap();
        self.offer(0, kind, 0, &[(at, 16)])
    }

    fn turn(&mut self, wake: Wake) -> Turn {
        self.service.turn(wake, &YieldRequest::of(&AtomicBool::new(false)))
    }

    /// Runs turns until one has no more work for now. Returns their number.
    fn settle(&mut self) -> usize {
        let mut turns = 1;
        while self.turn(Wake::Start) == Turn::Again {
            turns += 1;
            assert!(turns < 100_000, "it never has enough");
        }
        turns
    }

    /// The next head given back to a queue, and the status of its request.
    fn used(&mut self, queue: u16) -> Option<(u16, u8)> {
        let at = rings(queue) + 0x4000;
        let index: u16 = self.ram.memory().read_obj(GuestAddress(at + 2)).unwrap();
        let seen = &mut self.used[usize::from(queue)];
        if index == *seen {
            return None;
        }
        let head: u32 = self.ram.memory().read_obj(GuestAddress(at + 4 + u64::from(*seen % QUEUE) * 8)).unwrap();
        *seen = seen.wrapping_add(1);
        let status = HEADERS + u64::from(queue) * 0x1_0000 + u64::from(head) * 32 + 16;
        Some((head as u16, self.ram.memory().read_obj(GuestAddress(status)).unwrap()))
    }

    /// Runs turns until a request is given back.
    fn wait(&mut self) -> (u16, u8) {
        let mut patience = Patience::default();
        loop {
            if let Some(used) = self.used(0) {
                return used;
            }
            assert!(patience.tick(), "nothing is given back");
            self.turn(Wake::Start);
        }
    }

    fn fill(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Bytes pinned for the kernel.
    fn pinned(&self) -> u64 {
        self.ram.stats().unwrap().pinned * PAGE
    }

    fn fork(&mut self) -> Moment {
        let (ram, _) = self.ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        let (in_flight, queues) = (self.service.in_flight(), self.service.queue_states());
        Moment { ram, disk: self.service.disk.fork(), in_flight, queues }
    }

    fn child(&self, moment: &Moment) -> Self {
        let ram = GuestRam::reserve(moment.ram.layout(), &Store::open_small().unwrap()).unwrap();
        ram.adopt(&moment.ram).unwrap();
        let (mut with, interrupt) = activation(&ram, self.features, &moment.queues);
        for chain in &moment.in_flight {
            with.queues[usize::from(chain.queue)].as_mut().unwrap().restore_in_flight();
        }
        let again = moment.in_flight.iter().copied().collect();
        let idle = IdleDisk { disk: moment.disk.open().unwrap(), limiter: Limiter::new(&Limits::default()) };
        let service = BlockService::new(idle, with, again);
        let (available, used, next) = (self.available.clone(), self.used.clone(), self.next.clone());
        Self { ram, service, interrupt, events: Vec::new(), available, used, next, features: self.features }
    }
}

#[test]
fn a_turn_is_bounded_in_bytes_whatever_a_request_asks_for() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { latency: Some(FOR_EVER), ..Options::default() });
    let len = 20u32 << 20;
    rig.offer(0, IN, 0, &[(DATA, len)]);
    let mut turns = 0;
    loop {
        let before = rig.pinned();
        let turn = rig.turn(Wake::Start);
        turns += 1;
        let done = rig.pinned() - before;
        assert!(done <= ISSUE_BYTES, "{done} bytes in one turn");
        if turn == Turn::Done {
            break;
        }
        assert_eq!(done, ISSUE_BYTES, "a turn does what it may");
    }
    // The kernel has the maximum, and the rest waits.
    assert_eq!(rig.pinned(), MAX_TRANSFER_BYTES);
    assert_eq!(turns, MAX_TRANSFER_BYTES / ISSUE_BYTES);
    assert_eq!(rig.service.in_flight().len(), 1);
    assert!(rig.service.abandon(), "and all of it can be given up");
    assert_eq!(rig.pinned(), 0);
}

#[test]
fn a_turn_that_somebody_waits_for_begins_nothing() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { latency: Some(FOR_EVER), ..Options::default() });
    rig.offer(0, IN, 0, &[(DATA, 1 << 20)]);
    assert_eq!(rig.turn(Wake::Start), Turn::Again);
    let before = rig.pinned();
    let waits = AtomicBool::new(true);
    assert_eq!(rig.service.turn(Wake::Again, &YieldRequest::of(&waits)), Turn::Again);
    assert_eq!(rig.pinned(), before);
}

#[test]
fn requests_of_any_length_are_whole() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options::default());
    // Into buffers split at odd places, from a sector in the middle of a cluster.
    let data = [(DATA + 3, 5 << 20), (DATA + (6 << 20), 700), (DATA + (7 << 20) + 1, (3 << 20) + 324)];
    let len: u32 = data.iter().map(|(_, len)| len).sum();
    rig.offer(0, IN, 3, &data);
    assert_eq!(rig.wait(), (0, 0));
    let read: Vec<u8> = data.iter().flat_map(|&(at, len)| rig.bytes(at, len as usize)).collect();
    assert!(read == pattern(3 * 512, len as usize), "not what the disk has");
    // The same bytes elsewhere.
    rig.offer(0, OUT, 9001, &data);
    assert_eq!(rig.wait().1, 0);
    let disk = std::fs::read(&path).unwrap();
    assert!(disk[9001 * 512..][..len as usize] == read, "not what was written");
    assert!(disk[..9001 * 512] == pattern(0, 9001 * 512), "something before it was written");
    let end = 9001 * 512 + len as usize;
    assert!(disk[end..] == pattern(end, DISK - end), "something behind it was written");
    // A request that ends beyond the disk does nothing, although its first pieces would fit.
    rig.offer(0, OUT, (DISK as u64 - (1 << 20)) / 512, &[(DATA, 2 << 20)]);
    assert_eq!(rig.wait().1, 1);
    assert!(std::fs::read(&path).unwrap()[end..] == pattern(end, DISK - end), "a part of it was written");
    assert_eq!(rig.pinned(), 0);
}

#[test]
fn a_long_request_keeps_neither_short_ones_nor_other_queues_waiting() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { queues: 2, ..Options::default() });
    let long = rig.offer(0, IN, 0, &[(DATA, 16 << 20)]);
    let short = rig.offer(0, IN, 8, &[(DATA + (17 << 20), 4096)]);
    let other = rig.offer(1, IN, 16, &[(DATA + (18 << 20), 4096)]);
    for _ in 0..4 {
        assert_eq!(rig.turn(Wake::Start), Turn::Again);
    }
    assert_eq!((rig.used(0), rig.used(1)), (Some((short, 0)), Some((other, 0))));
    assert_eq!(rig.used(0), None, "the long one is on its way");
    assert_eq!(rig.wait(), (long, 0));
}

#[test]
fn a_busy_queue_does_not_starve_another() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { queues: 2, ..Options::default() });
    (0..80u64).for_each(|n| {
        rig.offer(0, IN, n, &[(DATA + n * PAGE, 512)]);
    });
    let other = rig.offer(1, IN, 7, &[(DATA + 100 * PAGE, 512)]);
    rig.turn(Wake::Start);
    rig.turn(Wake::Again);
    assert_eq!(rig.used(1), Some((other, 0)));
    let count = std::iter::from_fn(|| rig.used(0)).count();
    assert!(count < 2 * BATCH, "{count} of the busy queue");
}

#[test]
fn a_notification_is_seen_beside_a_queue_that_is_always_full() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { queues: 2, ..Options::default() });
    let events = rig.events.clone();
    // As a hostile driver would, with requests that need no disk.
    let fill = |rig: &mut Rig| {
        (0..20u64).for_each(|n| {
            rig.offer(0, GET_ID, 0, &[(DATA + n * PAGE, 20)]);
        });
        std::iter::from_fn(|| rig.used(0)).count()
    };
    fill(&mut rig);
    assert_eq!(rig.turn(Wake::Start), Turn::Again);
    let other = rig.offer(1, GET_ID, 0, &[(DATA + 100 * PAGE, 20)]);
    events[1].write(1).unwrap();
    for _ in 0..2 {
        fill(&mut rig);
        rig.turn(Wake::Again);
    }
    assert_eq!(rig.used(1), Some((other, 0)), "the other queue starves");
}

#[test]
fn the_number_of_segments_that_is_offered_holds() {
    for (features, segments, status) in
        [(MODERN, SEG_MAX, 0), (MODERN, SEG_MAX + 1, 1), (1 << VIRTIO_BLK_F_FLUSH, SEG_MAX + 1, 0)]
    {
        let (_dir, path) = file();
        let mut rig = Rig::new(&path, &Options { features, ..Options::default() });
        let data: Vec<_> = (0..u64::from(segments)).map(|n| (DATA + n * PAGE, 512)).collect();
        let head = rig.offer(0, OUT, 0, &data);
        assert_eq!(rig.wait(), (head, status), "{segments} segments");
        let untouched = std::fs::read(&path).unwrap() == pattern(0, DISK);
        assert_eq!(untouched, status == 1);
        assert!(!rig.interrupt.needs_reset(), "the others go on");
    }
}

/// A write of 4 MiB: at the fork the disk has some pieces, and has done some of them.
#[test]
fn a_fork_in_the_middle_of_a_long_request_hands_on_all_of_it() {
    let (_dir, path) = file();
    let len = 4usize << 20;
    for turns in [1, 2, 5, 15] {
        std::fs::write(&path, pattern(0, DISK)).unwrap();
        let mut rig = Rig::new(&path, &Options::default());
        rig.fill(DATA, &vec![0x77; len]);
        let head = rig.offer(0, OUT, 5, &[(DATA, len as u32)]);
        for _ in 0..turns {
            assert_eq!(rig.turn(Wake::Start), Turn::Again);
        }
        let moment = rig.fork();
        assert_eq!(moment.in_flight, [InFlight { queue: 0, head }]);
        assert_eq!(rig.used(0), None);
        let mut child = rig.child(&moment);
        let read_back = |side: &mut Rig| side.offer(0, IN, 5, &[(DATA + (8 << 20), len as u32)]);
        assert_eq!(rig.wait(), (head, 0));
        read_back(&mut rig);
        // The parent's later use of its buffer does not affect the child.
        rig.fill(DATA, &vec![0xff; len]);
        // Offered at once: the child does the write first.
        read_back(&mut child);
        assert_eq!(child.wait(), (head, 0));
        for side in [&mut rig, &mut child] {
            assert_eq!(side.wait().1, 0);
            assert!(side.bytes(DATA + (8 << 20), len) == vec![0x77; len], "after {turns} turns");
            assert_eq!((side.used(0), side.service.in_flight()), (None, Vec::new()), "each once");
        }
    }
}

#[test]
fn a_child_pops_nothing_new_before_what_was_in_flight_is_done() {
    let (dir, path) = file();
    let mut rig = Rig::new(&path, &Options::default());
    let gate = Gate::close(dir.path()).unwrap();
    rig.fill(DATA, &[0x77; 4096]);
    let written = rig.offer(0, OUT, 8, &[(DATA, 4096)]);
    rig.turn(Wake::Start);
    let moment = rig.fork();
    assert_eq!(moment.in_flight.len(), 1);
    let mut child = rig.child(&moment);
    let read = child.offer(0, IN, 8, &[(DATA + PAGE, 4096)]);
    let popped = |rig: &Rig| rig.service.queue_states()[0].unwrap().next_available;
    let mut turns = 0;
    while child.used(0).is_none() {
        turns += 1;
        if turns == 3 {
            gate.open();
        }
        child.turn(Wake::Start);
        if !child.service.in_flight().iter().any(|chain| chain.head == written) {
            break;
        }
        assert_eq!(popped(&child), 1, "it pops while its list is not done");
        assert_eq!(child.service.in_flight().len(), 1);
    }
    child.used[0] = 1;
    assert_eq!(child.wait(), (read, 0));
    assert!(child.bytes(DATA + PAGE, 4096) == [0x77; 4096]);
}

#[test]
fn what_waits_for_the_limiter_is_in_flight_at_a_fork() {
    let (_dir, path) = file();
    let one = Rate { per_second: 1, burst: Some(1), once: 0 };
    let limits = Limits { operations: Some(one), bytes: None };
    let mut rig = Rig::new(&path, &Options { limits, ..Options::default() });
    let heads: Vec<u16> = (0..3u64).map(|n| rig.offer(0, IN, n, &[(DATA + n * PAGE, 512)])).collect();
    rig.turn(Wake::Start);
    rig.turn(Wake::Again);
    assert_eq!(rig.used(0), Some((heads[0], 0)));
    // The second was popped and waits; the third is still the driver's.
    let moment = rig.fork();
    assert_eq!(moment.in_flight, [InFlight { queue: 0, head: heads[1] }]);
    assert_eq!(moment.queues[0].unwrap().next_available, 2);
    let mut child = rig.child(&moment);
    assert_eq!((child.wait(), child.wait()), ((heads[1], 0), (heads[2], 0)));
    assert_eq!(child.bytes(DATA + PAGE, 512), [1; 512]);
}

#[test]
fn zeros_and_discards_are_paid_for() {
    for kind in [ZEROES, DISCARD] {
        let (_dir, path) = file();
        let rate = Rate::per_second(1 << 20);
        let limits = Limits { bytes: Some(rate), operations: None };
        let mut rig = Rig::new(&path, &Options { limits, ..Options::default() });
        let begun = Instant::now();
        rig.offer_range(kind, 0, 16 << 11);
        assert_eq!(rig.wait().1, 0);
        rig.offer(0, IN, 0, &[(DATA, 512)]);
        rig.turn(Wake::Start);
        // 16 MiB at 1 MiB a second; the bucket had one MiB.
        let until = rig.service.deadline().expect("the next one waits");
        assert!(until - begun > Duration::from_secs(14), "{kind} cost {:?}", until - begun);
        assert_eq!(rig.service.in_flight().len(), 1);
    }
}

#[test]
fn without_flush_a_change_is_durable_when_it_is_done() {
    for (features, syncs) in [(1 << VIRTIO_BLK_F_SEG_MAX, 1), (MODERN, 0)] {
        let (_dir, path) = file();
        let mut rig = Rig::new(&path, &Options { features, ..Options::default() });
        let mut expected = 0;
        // A request of many pieces is made durable once.
        rig.offer(0, OUT, 0, &[(DATA, 1 << 20)]);
        assert_eq!(rig.wait().1, 0);
        expected += syncs;
        assert_eq!(rig.service.disk.stats().synced, expected, "a write");
        for kind in [ZEROES, DISCARD] {
            rig.offer_range(kind, 64, 64);
            assert_eq!(rig.wait().1, 0);
            expected += syncs;
            assert_eq!(rig.service.disk.stats().synced, expected, "request {kind}");
        }
        rig.offer(0, IN, 0, &[(DATA, 1 << 20)]);
        assert_eq!(rig.wait().1, 0);
        assert_eq!(rig.service.disk.stats().synced, expected, "a read");
    }
}

/// Three writes of parts of clusters after a fork: the first moves cluster 0, the second needs 0
/// and 1, the third needs 1 alone.
#[test]
fn who_waits_for_clusters_goes_before_who_came_later() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { latency: Some(Duration::from_millis(300)), ..Options::default() });
    let _moment = rig.fork();
    for (n, byte, sector, len) in [(0, 1, 1, 512), (1, 2, 2, 8 * 512), (2, 3, 9, 512)] {
        rig.fill(DATA + n * 2 * PAGE, &vec![byte; len]);
        rig.offer(0, OUT, sector, &[(DATA + n * 2 * PAGE, len as u32)]);
    }
    (0..3).for_each(|_| assert_eq!(rig.wait().1, 0));
    rig.offer(0, IN, 0, &[(DATA, 8192)]);
    assert_eq!(rig.wait().1, 0);
    let read = rig.bytes(DATA, 8192);
    let sectors: Vec<u8> = read.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 10, 11, 12, 13, 14, 15]);
}

#[test]
fn what_was_given_up_in_pieces_is_done_again_whole() {
    let (dir, path) = file();
    let mut rig = Rig::new(&path, &Options::default());
    let gate = Gate::close(dir.path()).unwrap();
    let heads: Vec<u16> = (0..3u64).map(|n| rig.offer(0, IN, n * 4096, &[(DATA + n * (2 << 20), 2 << 20)])).collect();
    (0..3).for_each(|_| assert_eq!(rig.turn(Wake::Start), Turn::Again));
    let watchdog = Watchdog::new(Duration::from_secs(120), || "a device halts".to_owned());
    assert!(rig.service.halt(FOR_EVER));
    drop(watchdog);
    assert_eq!(rig.pinned(), 0);
    let mut left: Vec<u16> = rig.service.in_flight().iter().map(|chain| chain.head).collect();
    left.sort_unstable();
    assert_eq!(left, heads, "each once");
    gate.open();
    let mut done: Vec<(u16, u8)> = heads.iter().map(|_| rig.wait()).collect();
    done.sort_unstable();
    assert_eq!(done, heads.iter().map(|head| (*head, 0)).collect::<Vec<_>>());
    rig.settle();
    assert_eq!(rig.used(0), None, "none twice");
    for n in 0..3usize {
        assert!(rig.bytes(DATA + n as u64 * (2 << 20), 2 << 20) == pattern(n * (2 << 20), 2 << 20));
    }
}

/// A chain that breaks the rules, in the same turn as a valid request before it.
#[test]
fn nothing_begins_once_the_driver_has_broken_the_rules() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options { latency: Some(FOR_EVER), ..Options::default() });
    rig.fill(DATA, &[0x77; 8192]);
    rig.offer(0, OUT, 0, &[(DATA, 8192)]);
    // Its only descriptor is out of memory.
    let head = rig.offer(0, OUT, 0, &[]);
    rig.ram.memory().write_obj(RAM, GuestAddress(rings(0) + u64::from(head) * 16)).unwrap();
    assert_eq!(rig.turn(Wake::Start), Turn::Done);
    assert!(rig.interrupt.needs_reset());
    assert_eq!(rig.pinned(), 0);
    assert!(rig.service.abandon());
}

/// A halt that does not wait: the second write, of many pieces, waits for the clusters of the first
/// one. Its first piece begins when that is cancelled, its others are cancelled. Both are repeated,
/// and used once.
#[test]
fn requests_that_go_on_after_a_halt_are_repeated() {
    for features in [MODERN, 1 << VIRTIO_BLK_F_SEG_MAX] {
        let (dir, path) = file();
        let mut rig = Rig::new(&path, &Options { features, ..Options::default() });
        let _moment = rig.fork();
        let gate = Gate::close(dir.path()).unwrap();
        let long = 1 << 20;
        let heads: Vec<u16> = [(0, 1, 512), (1, 2, long)]
            .map(|(n, byte, len)| {
                rig.fill(DATA + n * PAGE, &vec![byte; len]);
                rig.offer(0, OUT, n, &[(DATA + n * PAGE, len as u32)])
            })
            .into();
        rig.turn(Wake::Start);
        assert!(!rig.service.halt(Duration::ZERO), "the second one has begun");
        let mut left: Vec<u16> = rig.service.in_flight().iter().map(|chain| chain.head).collect();
        left.sort_unstable();
        assert_eq!(left, heads, "each once");
        gate.open();
        let mut done = vec![rig.wait(), rig.wait()];
        done.sort_unstable();
        assert_eq!(done, [(heads[0], 0), (heads[1], 0)]);
        rig.settle();
        assert_eq!((rig.used(0), rig.service.in_flight()), (None, Vec::new()), "none twice");
        let all = DATA + 2 * long as u64;
        rig.offer(0, IN, 0, &[(all, (512 + long) as u32)]);
        assert_eq!(rig.wait().1, 0);
        assert!(rig.bytes(all, 512 + long) == [vec![1; 512], vec![2; long]].concat(), "what was written");
    }
}

/// A driver that offers more chains than the queue has descriptors, counting those in flight in its
/// parent.
#[test]
fn what_is_in_flight_counts_against_the_queue_of_a_child_and_of_one_that_is_put_back() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options::default());
    let moment = Moment { in_flight: vec![InFlight { queue: 0, head: 0 }; 3], ..rig.fork() };
    let state = BlockState { in_flight: moment.in_flight.clone() };
    let (with, _interrupt) = activation(&rig.ram, MODERN, &moment.queues);
    let mut block = Block::restore(&state, moment.disk.open().unwrap(), &BlockOptions::default());
    block.activate(Activation { held: true, ..with }).unwrap();
    assert_eq!(block.with_service(|service| service.chains_out(0)), Some(3));
    let (with, _interrupt) = activation(&rig.ram, MODERN, &moment.queues);
    assert!(rig.service.rewind(&state, &moment.disk, with));
    assert_eq!(rig.service.chains_out(0), 3);
}

/// A disk that is dropped loses what was written since a fork.
#[test]
fn a_device_keeps_a_disk_whose_requests_have_not_ended() {
    let (_rig_dir, rig_path) = file();
    let rig = Rig::new(&rig_path, &Options::default());
    let (_dir, path) = file();
    let mut block = Block::new(Disk::open(&DiskConfig::new(&path)).unwrap(), &BlockOptions::default());
    let (with, _interrupt) = activation(&rig.ram, MODERN, &rig.service.queue_states());
    block.activate(Activation { held: true, ..with }).unwrap();
    block.with_service(|service| service.is_stuck = true).unwrap();
    assert!(matches!(block.take_disk(), Err(DiskNotTaken::InUse)));
    block.with_service(|service| service.is_stuck = false).unwrap();
    assert_eq!(block.take_disk().unwrap().config().path, path);
    assert!(matches!(block.take_disk(), Err(DiskNotTaken::Gone)));
}

/// Its worker would wait for an instant in the past, again and again.
#[test]
fn a_broken_device_waits_for_no_instant() {
    let (_dir, path) = file();
    let one = Rate { per_second: 1, burst: Some(1), once: 0 };
    let limits = Limits { operations: Some(one), bytes: None };
    let mut rig = Rig::new(&path, &Options { limits, ..Options::default() });
    for sector in 0..2 {
        rig.offer(0, IN, sector, &[(DATA, 512)]);
    }
    rig.turn(Wake::Start);
    rig.turn(Wake::Again);
    assert!(rig.service.deadline().is_some(), "the second request waits for the limiter");
    Service::broken(&mut rig.service);
    assert_eq!(rig.service.deadline(), None);
}

/// A guest gives up its file system after one error of its disk.
#[test]
fn a_request_without_memory_for_its_pages_waits_for_it() {
    let (_dir, path) = file();
    let mut rig = Rig::new(&path, &Options::default());
    rig.fill(DATA, &[0x55; 4096]);
    rig.service.is_short_of_memory = true;
    let heads = [rig.offer(0, OUT, 8, &[(DATA, 4096)]), rig.offer(0, IN, 8, &[(DATA + PAGE, 4096)])];
    assert_eq!(rig.turn(Wake::Start), Turn::Done, "its worker waits");
    let until = rig.service.deadline().unwrap();
    assert_eq!(rig.used(0), None);
    assert_eq!(rig.service.in_flight().len(), 2);
    // A child has them too.
    let moment = rig.fork();
    let mut child = rig.child(&moment);
    child.wait();
    assert_eq!(child.wait().1, 0);
    // Nothing is repeated before the instant, and then they wait again.
    rig.turn(Wake::Source(DISK_EVENT));
    assert!(rig.service.deadline().is_some_and(|later| later == until) || Instant::now() >= until);
    wait_until("the instant", || Instant::now() >= until);
    rig.turn(Wake::Timer);
    assert!(rig.service.deadline().is_some_and(|later| later > until));
    assert_eq!(rig.used(0), None);
    rig.service.is_short_of_memory = false;
    let mut done = vec![rig.wait(), rig.wait()];
    done.sort_unstable();
    assert_eq!(done, heads.map(|head| (head, 0)));
    assert_eq!(rig.service.deadline(), None);
    rig.offer(0, IN, 8, &[(DATA + 2 * PAGE, 4096)]);
    rig.wait();
    assert_eq!(rig.bytes(DATA + 2 * PAGE, 4096), [0x55; 4096]);
}
