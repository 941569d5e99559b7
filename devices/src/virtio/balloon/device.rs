//! The balloon device.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use clade_memory::{GuestRam, PAGE_SHIFT, PageRange};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddress, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::state::BalloonState;
use crate::virtio::sync_device::{ConfigSpace, DeviceOps, FatalError, OWN, QueueCtx};
use crate::virtio::{ActivateError, Backend, Chain, DeviceState, QueueError, Segment, Turn, Wake, YieldRequest, dma};

/// Feature bits that the bindings do not define.
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
/// Chains in a turn: a chain is up to some hundred pages to discard.
const BATCH: usize = 4;
/// Maximum number of page numbers in a chain; Linux sends 256.
const MAX_PAGES: usize = 4096;
/// Offsets in `struct virtio_balloon_config`.
const NUM_PAGES: u64 = 0;
const ACTUAL: u64 = 4;
const CONFIG_LEN: usize = 16;

/// A guest's statistics of its memory, by the specification's tags.
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
    /// Bytes that are free.
    Free,
    /// Bytes in total.
    Total,
    /// Bytes available without swapping.
    Available,
    /// Bytes of disk caches.
    Caches,
    /// Huge pages allocated.
    HugetlbAllocated,
    /// Huge pages that could not be allocated.
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

/// The state of a balloon, and the guest's statistics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Pages that the guest should give up.
    pub target: u32,
    /// Pages that the guest has given up, as reported by the guest.
    pub actual: u32,
    /// Pages discarded so far, by inflation and by reporting.
    pub discarded: u64,
    /// Pages that were not discarded because they are pinned.
    pub pinned: u64,
    /// The guest's latest statistics. [`Balloon::ask`] requests new ones.
    pub guest: Vec<(BalloonStat, u64)>,
    /// Number of statistics received from the guest.
    pub answers: u64,
}

/// A memory balloon.
#[derive(Debug)]
pub struct Balloon {
    config: ConfigSpace,
    /// The chain with the guest's statistics, held until new ones are requested.
    stats_chain: Option<u16>,
    /// Whether the guest should send statistics.
    asked: bool,
    bell: Arc<EventFd>,
    known: BalloonStats,
}

impl Balloon {
    /// A balloon in a saved state. The default state is an empty balloon.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(state: &BalloonState) -> std::io::Result<Self> {
        let config = ConfigSpace::new(vec![0; CONFIG_LEN]);
        config.write(NUM_PAGES, &state.target.to_le_bytes());
        config.write(ACTUAL, &state.actual.to_le_bytes());
        let bell = Arc::new(clade_host_io::eventfd()?);
        let known = BalloonStats::default();
        Ok(Self { config, stats_chain: state.stats_chain, asked: false, bell, known })
    }

    /// Sets the total number of pages that the guest should give up. The caller must then interrupt
    /// the driver for a changed configuration.
    pub fn set_target(&mut self, pages: u32) {
        self.config.write(NUM_PAGES, &pages.to_le_bytes());
    }

    /// The state of the balloon, and the guest's statistics.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        let (target, actual) = (self.config.u32(NUM_PAGES), self.config.u32(ACTUAL));
        BalloonStats { target, actual, ..self.known.clone() }
    }

    /// Requests statistics from the guest. [`Balloon::stats`] has them some time later.
    pub fn ask(&mut self) {
        self.asked = true;
        // A full counter wakes the device as well.
        let _ = self.bell.write(1);
    }

    /// Discards pages that are not pinned. A page that cannot be discarded keeps its memory.
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

    /// Discards free pages that the guest reports. The guest finds zeros in them later.
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
        /// Size of `struct virtio_balloon_stat`: a tag of 2 bytes and a number of 8, packed.
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

    /// Receives statistics. The guest posts a chain with them, and again after the chain is used. Returns whether there
    /// may be more.
    fn listen(&mut self, io: &mut QueueCtx) -> Result<bool, FatalError> {
        if self.asked
            && let Some(head) = self.stats_chain.take()
        {
            self.asked = false;
            io.add_used(STATS, head, 0)?;
        }
        for _ in 0..BATCH {
            let Some(chain) = io.pop(STATS)? else { return Ok(false) };
            self.note(io, &chain)?;
            if let Some(before) = self.stats_chain.replace(chain.head) {
                io.add_used(STATS, before, 0)?;
            }
        }
        Ok(true)
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

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64; 4]
    }

    fn config(&self) -> &ConfigSpace {
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
        // The statistics are newer than the saved state.
        self.known.guest.clear();
        Ok(())
    }

    fn turn(&mut self, io: &mut QueueCtx, wake: Wake, should_yield: &YieldRequest<'_>) -> Result<Turn, FatalError> {
        if wake == Wake::Source(OWN) {
            let _ = self.bell.read();
        }
        let more = self.listen(io)?;
        for _ in 0..BATCH {
            let mut idle = true;
            if let Some(chain) = io.pop(INFLATE)? {
                self.inflate(io, &chain)?;
                io.add_used(INFLATE, chain.head, 0)?;
                idle = false;
            }
            // The guest may use the pages before it reports the deflation. Discarded pages already
            // read as zeros.
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
                return Ok(if more { Turn::Again } else { Turn::Done });
            }
            if should_yield.is_set() {
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
