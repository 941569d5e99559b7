//! The balloon device.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use clade_memory::{GuestRam, PAGE_SHIFT, PageRange};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddress, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::state::BalloonState;
use crate::virtio::plain::{Config, DeviceOps, FatalError, OWN, QueueCtx};
use crate::virtio::{ActivateError, Backend, Chain, DeviceState, QueueError, Segment, Turn, Wake, YieldRequest, dma};

/// Feature bits, which the bindings do not have.
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
/// Chains in a turn: a chain is up to some hundred pages to discard.
const BATCH: usize = 4;
/// Page numbers in a chain at most; Linux sends 256.
const MAX_PAGES: usize = 4096;
/// Of `struct virtio_balloon_config`.
const NUM_PAGES: u64 = 0;
const ACTUAL: u64 = 4;
const CONFIG_LEN: usize = 16;

/// What a guest says of its memory, by the specification's tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonStat {
    /// Bytes swapped in.
    SwapIn,
    /// Bytes swapped out.
    SwapOut,
    /// Major faults.
    MajorFaults,
    /// Minor faults.
    MinorFaults,
    /// Bytes not used for anything.
    Free,
    /// Bytes in all.
    Total,
    /// Bytes that could be had without swapping.
    Available,
    /// Bytes of disk caches.
    Caches,
    /// Huge pages allocated.
    HugetlbAllocated,
    /// Huge pages not to be had.
    HugetlbFailures,
}

const TAGS: [BalloonStat; 10] = [
    BalloonStat::SwapIn,
    BalloonStat::SwapOut,
    BalloonStat::MajorFaults,
    BalloonStat::MinorFaults,
    BalloonStat::Free,
    BalloonStat::Total,
    BalloonStat::Available,
    BalloonStat::Caches,
    BalloonStat::HugetlbAllocated,
    BalloonStat::HugetlbFailures,
];

/// What a balloon knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Pages the guest is asked to give up.
    pub target: u32,
    /// Pages it says it has given up.
    pub actual: u32,
    /// Pages discarded so far, by inflation and by reporting.
    pub discarded: u64,
    /// Pages that were to be discarded and are pinned.
    pub pinned: u64,
    /// What the guest said last. It is asked again by [`Balloon::ask`].
    pub guest: Vec<(BalloonStat, u64)>,
    /// How often it has said something.
    pub answers: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Balloon {
    queue_sizes: [u16; 4],
    config: Config,
    /// The chain in which the guest tells of its memory, until it is asked to again.
    stats_chain: Option<u16>,
    /// The guest is to be asked.
    asked: bool,
    bell: Arc<EventFd>,
    known: BalloonStats,
}

impl Balloon {
    /// A balloon as it was saved, or an empty one.
    ///
    /// # Errors
    /// When there is no eventfd to be had.
    pub fn new(state: &BalloonState) -> std::io::Result<Self> {
        let config = Config::new(vec![0; CONFIG_LEN]);
        config.write(NUM_PAGES, &state.target.to_le_bytes());
        config.write(ACTUAL, &state.actual.to_le_bytes());
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let known = BalloonStats::default();
        Ok(Self { queue_sizes: [64; 4], config, stats_chain: state.stats_chain, asked: false, bell, known })
    }

    /// Asks the guest to have `pages` given up in all. The driver must be told that the configuration has changed.
    pub fn set_target(&mut self, pages: u32) {
        self.config.write(NUM_PAGES, &pages.to_le_bytes());
    }

    /// What is known.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        let (target, actual) = (self.config.u32(NUM_PAGES), self.config.u32(ACTUAL));
        BalloonStats { target, actual, ..self.known.clone() }
    }

    /// Asks the guest what it has to say of its memory. The answer is in [`Balloon::stats`] some time later.
    pub fn ask(&mut self) {
        self.asked = true;
        // Full is as good as rung.
        let _ = self.bell.write(1);
    }

    /// Discards pages, where nobody has them pinned. A page that cannot be discarded costs what it cost.
    fn discard(&mut self, ram: &GuestRam, mut pages: Vec<u64>) {
        pages.sort_unstable();
        pages.dedup();
        let mut at = 0;
        while at < pages.len() {
            let first = pages[at];
            let Some((region, page)) = ram.locate(GuestAddress(first << PAGE_SHIFT)) else {
                at += 1;
                continue;
            };
            // A run within one region.
            let left = (region.len() >> PAGE_SHIFT) - page;
            let run = (1..).take_while(|n| pages.get(at + *n as usize) == Some(&(first + n)) && *n < left).count() + 1;
            self.discard_run(region, PageRange::with_len(page, run as u64));
            at += run;
        }
    }

    fn discard_run(&mut self, region: &clade_memory::GuestRegion, range: PageRange) {
        match region.discard(range) {
            Ok(done) => {
                self.known.discarded += done.discarded;
                self.known.pinned += done.pinned;
            }
            Err(error) => tracing::debug!(%error, %range, "pages of a balloon stay"),
        }
    }

    fn inflate(&mut self, io: &QueueCtx, chain: &Chain) -> Result<(), FatalError> {
        let len = dma::len_of(&chain.readable) as usize;
        if !len.is_multiple_of(4) || len / 4 > MAX_PAGES {
            let (head, what) = (chain.head, "is no list of page numbers");
            return Err(QueueError::Content { head, what }.into());
        }
        let mut bytes = vec![0; len];
        dma::copy_in(&io.ram, &chain.readable, &mut bytes)?;
        let number = |bytes: &[u8]| u64::from(bytes.iter().rev().fold(0, |all: u32, byte| all << 8 | u32::from(*byte)));
        self.discard(&io.ram, bytes.chunks_exact(4).map(number).collect());
        Ok(())
    }

    /// Free pages: their bytes are of no use to anyone, and the guest finds zeros when it uses them again.
    fn report(&mut self, ram: &GuestRam, segments: &[Segment]) {
        for segment in segments {
            let (start, end) = (segment.address.0, segment.address.0 + u64::from(segment.len));
            let Some((region, _)) = ram.locate(segment.address) else { continue };
            let base = region.start_addr().0;
            // Whole pages only.
            let first = (start - base).div_ceil(1 << PAGE_SHIFT);
            let last = (end - base) >> PAGE_SHIFT;
            if first < last {
                self.discard_run(region, PageRange::new(first, last));
            }
        }
    }

    fn note(&mut self, io: &QueueCtx, chain: &Chain) -> Result<(), FatalError> {
        /// Of `struct virtio_balloon_stat`: a tag of 2 bytes and a number of 8, packed.
        const STAT: usize = 10;
        let mut bytes = vec![0; (dma::len_of(&chain.readable) as usize).min(64 * STAT)];
        dma::copy_in(&io.ram, &chain.readable, &mut bytes)?;
        let stat = |bytes: &[u8]| {
            let tag = TAGS.get(usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))?;
            let value = bytes[2..].iter().rev().fold(0, |all: u64, byte| all << 8 | u64::from(*byte));
            Some((*tag, value))
        };
        self.known.guest = bytes.chunks_exact(STAT).filter_map(stat).collect();
        self.known.answers += 1;
        Ok(())
    }

    /// The guest posts a chain with what it has to say, and posts it again when it has it back.
    fn listen(&mut self, io: &mut QueueCtx) -> Result<(), FatalError> {
        if self.asked
            && let Some(head) = self.stats_chain.take()
        {
            self.asked = false;
            io.add_used(STATS, head, 0)?;
        }
        while let Some(chain) = io.pop(STATS)? {
            self.note(io, &chain)?;
            if let Some(before) = self.stats_chain.replace(chain.head) {
                io.add_used(STATS, before, 0)?;
            }
        }
        Ok(())
    }
}

impl DeviceOps for Balloon {
    const NAME: &'static str = "clade-balloon";
    const TYPE: u32 = VIRTIO_ID_BALLOON;

    fn features(&self) -> u64 {
        [
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BALLOON_F_STATS_VQ,
            VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
            VIRTIO_BALLOON_F_REPORTING,
        ]
        .iter()
        .fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn writable_config(&self) -> std::ops::Range<u64> {
        ACTUAL..ACTUAL + 4
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.bell.as_raw_fd(), OWN)]
    }

    fn begin(&mut self, io: &mut QueueCtx) {
        match self.stats_chain {
            Some(_) if io.has(STATS) => io.restore_in_flight(STATS),
            _ => self.stats_chain = None,
        }
    }

    fn end(&mut self) {
        self.stats_chain = None;
        self.config.write(ACTUAL, &0u32.to_le_bytes());
    }

    fn rewind(&mut self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Balloon(state) = state else { return Err(ActivateError::Kind { found: state.kind() }) };
        self.config.write(NUM_PAGES, &state.target.to_le_bytes());
        self.config.write(ACTUAL, &state.actual.to_le_bytes());
        (self.stats_chain, self.asked) = (state.stats_chain, false);
        // What the guest said, it said later.
        self.known.guest.clear();
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, hurry: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        if wake == Wake::Source(OWN) {
            let _ = self.bell.read();
        }
        self.listen(io)?;
        for _ in 0..BATCH {
            let mut idle = true;
            if let Some(chain) = io.pop(INFLATE)? {
                self.inflate(io, &chain)?;
                io.add_used(INFLATE, chain.head, 0)?;
                idle = false;
            }
            // The guest may use its pages again before it says so; they have been zeros since they were discarded.
            if let Some(chain) = io.pop(DEFLATE)? {
                io.add_used(DEFLATE, chain.head, 0)?;
                idle = false;
            }
            if let Some(chain) = io.pop(REPORTING)? {
                self.report(&io.ram, &chain.writable);
                io.add_used(REPORTING, chain.head, 0)?;
                idle = false;
            }
            if idle {
                return Ok(Turn::Done);
            }
            if hurry.is_set() {
                break;
            }
        }
        Ok(Turn::Again)
    }

    fn save(&self) -> (DeviceState, Backend) {
        let (target, actual) = (self.config.u32(NUM_PAGES), self.config.u32(ACTUAL));
        (DeviceState::Balloon(BalloonState { target, actual, stats_chain: self.stats_chain }), Backend::None)
    }
}
