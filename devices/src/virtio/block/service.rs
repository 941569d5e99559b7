//! The work of the block device.
//!
//! ```text
//!   ring ──pop──► limiter ──► disk (pieces, pins, kernel) ──reap──► status byte ──► used ring ──► interrupt
//!           └───────────── in flight: saved at a fork ─────────────┘
//! ```
//!
//! The disk transfers a request in pieces, so that a turn is short even for a long request. The
//! request is used when the disk says that all of it has ended. A fork between two pieces passes on
//! the whole request. The child repeats all of it, including the pieces that its disk has already.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use clade_memory::GuestRam;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_SEG_MAX;

use super::SEG_MAX;
use super::issue::InFlightRequest;
use super::request::{BlockRequest, RequestKind};
use super::state::{BlockState, InFlight};
use crate::virtio::limiter::Limiter;
use crate::virtio::queue_set::QueueSet;
use crate::virtio::sync_device::FatalError;
use crate::virtio::{Activation, QueueError, QueueState, Service, Turn, Virtqueue, Wake, YieldRequest, dma};
use clade_block::{Disk, DiskDone, DiskImage};

/// The number of the disk's eventfd among the worker's sources; queues have their own numbers.
pub(super) const DISK: u32 = 1 << 16;
/// Requests popped in one turn. Pausing the VM waits for the end of a turn.
pub(super) const BATCH: usize = 8;
/// Bytes of a disk's id.
const ID_LEN: usize = 20;

/// Delay before a submission is retried for which the kernel had no memory.
const RETRY: Duration = Duration::from_millis(1);

/// Delay before requests are repeated for whose pages the host had no memory.
pub(super) const MEMORY_WAIT: Duration = Duration::from_millis(20);

/// The interval of the warnings about that.
pub(super) const MEMORY_WARN: Duration = Duration::from_secs(10);

/// A request that waits for the limiter. Since it was popped, it counts as in flight.
#[derive(Debug)]
struct Delayed {
    queue: u16,
    request: BlockRequest,
    until: Instant,
}

/// The disk of a device that is not active, and its limits: a reset of the device fills no bucket.
#[derive(Debug)]
pub(super) struct IdleDisk {
    pub(super) disk: Disk,
    pub(super) limiter: Limiter,
}

#[derive(Debug)]
pub(super) struct BlockService {
    // Dropped first, as the first field: operations in flight end while memory and queues still
    // exist.
    pub(super) disk: Disk,
    pub(super) ram: GuestRam,
    queues: QueueSet,
    limiter: Limiter,
    pub(super) id: Vec<u8>,
    pub(super) features: u64,
    /// Requests in flight by token, which is the order in which they were popped.
    pub(super) pending: BTreeMap<u64, InFlightRequest>,
    /// The last token of a request.
    last_token: u64,
    /// Chains to repeat, because they were in flight when the state was saved, or because the host had no memory for
    /// their pages.
    pub(super) replay_queue: VecDeque<InFlight>,
    /// Requests of repeated chains that have begun. No new chain is popped before they are done:
    /// until then the disk may show data that the parent is writing, since it has the same request
    /// in flight.
    pub(super) replaying: HashSet<u64>,
    delayed: Option<Delayed>,
    /// When to repeat a submission for which the kernel had no memory.
    retry: Option<Instant>,
    /// When to repeat requests for whose pages the host had no memory. None is repeated before.
    pub(super) memory_wait: Option<Instant>,
    /// When the log last said that.
    pub(super) memory_warned: Option<Instant>,
    /// For each queue, whether it must be read.
    ready: Vec<bool>,
    /// The queue that is read first.
    first: usize,
    /// Whether completed requests stay in flight, to be repeated.
    pub(super) halting: bool,
    /// Whether the driver has broken the rules, or the device is broken. No chain is popped or used
    /// from then on.
    pub(super) broken: bool,
    /// Whether the kernel seems to work on requests for ever.
    #[cfg(test)]
    pub(super) is_stuck: bool,
    /// Whether the host seems to have no memory.
    #[cfg(test)]
    pub(super) is_short_of_memory: bool,
}

impl BlockService {
    pub(super) fn new(idle: IdleDisk, with: Activation, again: VecDeque<InFlight>) -> Self {
        let IdleDisk { disk, limiter } = idle;
        let Activation { ram, queues, features, interrupt, held: _ } = with;
        let config = disk.config();
        let name = config.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut id = config.id.clone().or(name).unwrap_or_default().into_bytes();
        id.resize(ID_LEN, 0);
        let count = queues.len();
        Self {
            disk,
            ram,
            queues: QueueSet::new(queues, interrupt),
            limiter,
            id,
            features,
            pending: BTreeMap::new(),
            last_token: 0,
            replay_queue: again,
            replaying: HashSet::new(),
            delayed: None,
            retry: None,
            memory_wait: None,
            memory_warned: None,
            ready: vec![false; count],
            first: 0,
            halting: false,
            broken: false,
            #[cfg(test)]
            is_stuck: false,
            #[cfg(test)]
            is_short_of_memory: false,
        }
    }

    /// Takes the disk back from a service that has ended.
    pub(super) fn into_idle(self) -> IdleDisk {
        IdleDisk { disk: self.disk, limiter: self.limiter }
    }

    /// All chains popped and not used, in the order of their pops: begun requests, then chains to
    /// repeat, then the request that waits for the limiter.
    pub(super) fn in_flight(&self) -> Vec<InFlight> {
        let pending = self.pending.values().map(|p| InFlight { queue: p.queue, head: p.head });
        let delayed = self.delayed.iter().map(|d| InFlight { queue: d.queue, head: d.request.head });
        pending.chain(self.replay_queue.iter().copied()).chain(delayed).collect()
    }

    pub(super) fn queue_states(&self) -> Vec<Option<QueueState>> {
        self.queues.save()
    }

    /// Chains of a queue that were popped and not used.
    #[cfg(test)]
    pub(super) fn chains_out(&self, queue: usize) -> u16 {
        self.queues.get(queue).map_or(0, Virtqueue::out)
    }

    /// Stops for good, and cancels the operations that the kernel can cancel. Returns whether none
    /// is left in flight.
    pub(super) fn abandon(&mut self) -> bool {
        self.broken = true;
        self.replay_queue.clear();
        self.delayed = None;
        self.disk.cancel();
        self.reap();
        let is_over = self.disk.in_flight() == 0;
        #[cfg(test)]
        let is_over = is_over && !self.is_stuck;
        if is_over {
            // The next driver's tokens begin anew.
            drop(self.disk.take_done());
        }
        is_over
    }

    /// Cancels the requests in flight, or waits for them. They stay in flight for the driver, and
    /// are repeated from the beginning. Returns whether the disk has no requests left.
    pub(super) fn halt(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut list = self.in_flight();
        self.halting = true;
        loop {
            // In each iteration, because jobs that waited for others begin when those end.
            self.disk.cancel();
            self.reap();
            let over = self.disk.in_flight() == 0 || Instant::now() >= deadline;
            if over || self.disk.wait(Duration::from_millis(1)).is_err() {
                break;
            }
        }
        self.halting = false;
        // Requests still in the disk continue. Parts of them may have been cancelled, so they are
        // repeated when they end.
        self.pending.values_mut().for_each(|pending| pending.redo = true);
        let stays = |chain: &InFlight| self.pending.values().any(|p| (p.queue, p.head) == (chain.queue, chain.head));
        list.retain(|chain| !stays(chain));
        self.replay_queue = list.into();
        self.delayed = None;
        self.replaying.retain(|token| self.pending.contains_key(token));
        self.disk.in_flight() == 0
    }

    pub(super) fn has_queues(&self, queues: &[Option<Virtqueue>]) -> bool {
        self.queues.is_same_as(queues)
    }

    /// Goes back to a saved state, on its disk at that instant. Returns false if the disk has
    /// requests in flight.
    pub(super) fn rewind(&mut self, state: &BlockState, image: &DiskImage, with: Activation) -> bool {
        if !self.disk.rewind(image) {
            return false;
        }
        self.queues.replace(with.queues);
        self.features = with.features;
        self.replay_queue = state.in_flight.iter().copied().collect();
        for chain in &self.replay_queue {
            if let Some(queue) = self.queues.get_mut(usize::from(chain.queue)) {
                queue.restore_in_flight();
            }
        }
        self.pending.clear();
        self.replaying.clear();
        (self.delayed, self.retry, self.memory_wait) = (None, None, None);
        self.ready.fill(true);
        self.broken = false;
        true
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        if !self.broken {
            tracing::warn!(%error, disk = %self.disk.config().path.display(), "a block device needs a reset");
            self.broken = true;
            self.queues.interrupt().fail();
        }
    }

    pub(super) fn chose(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// Adds a request in flight. Returns its token.
    pub(super) fn insert(&mut self, pending: InFlightRequest) -> u64 {
        self.last_token += 1;
        self.pending.insert(self.last_token, pending);
        self.last_token
    }

    /// Begins chain `head` of `queue`. Returns the request's token, unless it is already complete
    /// or waits for the limiter.
    fn chain(&mut self, queue: u16, head: u16, limited: bool) -> Result<Option<u64>, QueueError> {
        let Some(ring) = self.queues.get(usize::from(queue)) else {
            return Err(QueueError::Rings { index: queue });
        };
        let chain = ring.chain(head)?;
        let mut request = BlockRequest::parse(&self.ram, &chain)?;
        if self.chose(VIRTIO_BLK_F_SEG_MAX) && request.data.len() > SEG_MAX as usize {
            request.kind = RequestKind::Invalid;
        }
        if limited && let Err(until) = self.limiter.take(request.cost()) {
            self.delayed = Some(Delayed { queue, request, until });
            return Ok(None);
        }
        Ok(self.begin(queue, request))
    }

    /// Returns a request to the driver: writes the status before the used ring, whose index is
    /// stored last and with release.
    pub(super) fn add_used(&mut self, pending: &InFlightRequest, status: u32) {
        if self.broken || self.halting {
            return;
        }
        let done = dma::write(&self.ram, pending.status, &[status as u8]).map_err(FatalError::from);
        let done = done.and_then(|()| {
            let index = usize::from(pending.queue);
            Ok(self.queues.add_used(index, pending.head, pending.written + 1)?)
        });
        if let Err(error) = done {
            self.fail(&error);
        }
    }

    /// Handles the requests that have ended in the disk.
    fn reap(&mut self) {
        match self.disk.reap() {
            Ok(done) => self.finish_all(done),
            Err(error) => self.fail(&error),
        }
    }

    fn finish_all(&mut self, done: Vec<DiskDone>) {
        for done in done {
            self.finish(done.token, done.result.as_ref().copied());
        }
    }

    /// Submits the begun operations to the kernel.
    fn kick(&mut self) {
        loop {
            if let Err(error) = self.disk.kick() {
                self.fail(&error);
            }
            let done = self.disk.take_done();
            if done.is_empty() {
                break;
            }
            // The end of a request may have begun a flush: see `finish`.
            self.finish_all(done);
        }
        self.retry = self.disk.is_stalled().then(|| Instant::now() + RETRY);
    }

    /// Whether another request may begin. The disk gets the pieces of begun requests first.
    fn has_room(&self) -> bool {
        !self.broken && self.disk.unissued() < BATCH
    }

    /// Whether a chain can be repeated now.
    fn may_redo(&self) -> bool {
        self.memory_wait.is_none() && !self.replay_queue.is_empty() && self.has_room()
    }

    /// Begins again chains that were in flight when the state was saved, or for whose pages there was no memory: up
    /// to a batch.
    fn replay(&mut self) {
        for _ in 0..BATCH {
            if !self.may_redo() {
                return;
            }
            let Some(InFlight { queue, head }) = self.replay_queue.pop_front() else { return };
            // Not through the limiter, which counted the request when it was first popped.
            match self.chain(queue, head, false) {
                Ok(token) => self.replaying.extend(token),
                Err(error) => self.fail(&error),
            }
        }
    }

    /// Whether new requests may be popped.
    fn may_pop(&self) -> bool {
        self.has_room() && self.replay_queue.is_empty() && self.replaying.is_empty() && self.delayed.is_none()
    }

    /// Pops and begins requests, one of each queue in turn, up to a batch.
    fn pop(&mut self, should_yield: &YieldRequest<'_>) {
        for _ in 0..BATCH {
            if !self.may_pop() || should_yield.is_set() {
                return;
            }
            let count = self.queues.len();
            let Some(index) = (0..count).map(|n| (self.first + n) % count).find(|n| self.ready[*n]) else { return };
            // A queue that is always full must not delay the others.
            self.first = (index + 1) % count;
            self.pop_from(index);
        }
    }

    /// Pops and begins the next request of queue `index`.
    fn pop_from(&mut self, index: usize) {
        let Some(queue) = self.queues.get_mut(index) else {
            self.ready[index] = false;
            return;
        };
        let popped = queue.pop().and_then(|head| match head {
            Some(head) => self.chain(index as u16, head, true).map(|_| true),
            None => Ok(false),
        });
        match popped {
            Ok(true) => {}
            // Notifications are enabled before the last check; otherwise one that arrives in
            // between is lost.
            Ok(false) => {
                self.ready[index] = self.queues.get_mut(index).is_some_and(Virtqueue::enable_notifications);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Begins the request that waits for the limiter, if the limiter allows it.
    fn release(&mut self) {
        let Some(delayed) = self.delayed.take_if(|delayed| Instant::now() >= delayed.until) else { return };
        match self.limiter.take(delayed.request.cost()) {
            Ok(()) => {
                self.begin(delayed.queue, delayed.request);
            }
            Err(until) => self.delayed = Some(Delayed { until, ..delayed }),
        }
    }
}

impl Service for BlockService {
    fn turn(&mut self, wake: Wake, should_yield: &YieldRequest<'_>) -> Turn {
        match wake {
            Wake::Start => self.ready.fill(true),
            Wake::Source(DISK) | Wake::Timer => {}
            // The thread does not look at the eventfds while there is work: a queue that is always full would
            // hide the others' notifications.
            Wake::Again => {
                for (index, is_ready) in self.ready.iter_mut().enumerate().filter(|(_, is_ready)| !**is_ready) {
                    let Some(queue) = self.queues.get_mut(index) else { continue };
                    *is_ready = queue.acknowledge();
                    if *is_ready {
                        queue.disable_notifications();
                    }
                }
            }
            Wake::Source(index) => {
                if self.queues.acknowledge(index as usize) {
                    self.ready[index as usize] = true;
                }
            }
        }
        self.reap();
        // Cleared in any case: the worker would wait for an instant in the past, again and again.
        self.memory_wait.take_if(|until| Instant::now() >= *until);
        if !self.broken {
            self.replay();
            self.release();
            self.pop(should_yield);
            self.issue(should_yield);
            self.kick();
        }
        self.queues.notify();
        // Chains behind the repeated ones are popped when the last of these is done: at the disk's
        // event, or now if it has just ended. The same holds for pieces that wait for others in the
        // disk.
        let more = self.disk.may_issue() || self.may_redo() || (self.may_pop() && self.ready.contains(&true));
        if more && !self.broken { Turn::Again } else { Turn::Done }
    }

    fn deadline(&self) -> Option<Instant> {
        // A turn of a broken device begins nothing: an instant in the past would be waited for again and again.
        if self.broken {
            return None;
        }
        let delayed = self.delayed.as_ref().map(|delayed| delayed.until);
        [delayed, self.retry, self.memory_wait].into_iter().flatten().min()
    }

    fn broken(&mut self) {
        self.fail(&"its worker panicked");
    }
}
