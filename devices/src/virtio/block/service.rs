//! The block device's work.
//!
//! ```text
//!   ring ──pop──► limiter ──► disk (pins, kernel) ──reap──► status byte ──► used ring ──► interrupt
//!           └──────── in flight: saved at a fork ─────────┘
//! ```

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_memory::{Access, GuestRam};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::GuestAddress;

use super::request::{Kind, Request};
use super::state::{BlockState, InFlight};
use crate::disk::{Disk, DiskDone, DiskError, DiskImage, DiskOp};
use crate::virtio::limiter::Limiter;
use crate::virtio::plain::same_queues;
use crate::virtio::{Activation, Hurry, Interrupt, QueueError, QueueState, Service, Turn, Virtqueue, Wake, dma};

/// The number of the disk's eventfd among the worker's sources; queues have their own numbers.
pub(super) const DISK: u32 = 1 << 16;
/// Requests begun before the kernel is given them, and before others get a look in: what a turn does is what a pause waits for.
const BATCH: usize = 8;
/// The same for their bytes, since the kernel copies what is in its cache at once.
const BATCH_BYTES: u64 = 256 << 10;
/// Bytes of an id.
const ID_LEN: usize = 20;

/// How soon the kernel is asked again when it had no memory.
const RETRY: Duration = Duration::from_millis(1);
/// Whose pins they are.
const OWNER: &str = "virtio-blk";

/// A request that was popped and not given back.
#[derive(Debug)]
struct Pending {
    queue: u16,
    head: u16,
    status: GuestAddress,
    /// Bytes the device has written if it goes well, without the status.
    written: u32,
}

/// A request that waits for the limiter. Popped, so it counts as in flight.
#[derive(Debug)]
struct Delayed {
    queue: u16,
    request: Request,
    until: Instant,
}

#[derive(Debug)]
pub(super) struct BlockService {
    // First: what is in flight ends while memory and queues are still there.
    pub(super) disk: Disk,
    ram: GuestRam,
    queues: Vec<Option<Virtqueue>>,
    interrupt: Arc<Interrupt>,
    limiter: Limiter,
    id: Vec<u8>,
    /// By token: the order in which they were popped.
    pending: BTreeMap<u64, Pending>,
    next_token: u64,
    /// Chains to be done again, because they were in flight when the state was saved.
    again: VecDeque<InFlight>,
    /// Those of them that have begun. Nothing new is popped before they are done: until then the disk may show what somebody else, who has
    /// the same request in flight, is writing there.
    redone: HashSet<u64>,
    delayed: Option<Delayed>,
    /// When to give the kernel again what it had no memory for.
    retry: Option<Instant>,
    /// Queues to look into.
    ready: Vec<bool>,
    /// Queues with something given back since the driver was last told.
    used: Vec<bool>,
    /// Nothing is given back: what ends now is done again.
    halting: bool,
    /// The driver has broken the rules, or the device is broken: nothing is popped or given back any more.
    broken: bool,
}

impl BlockService {
    pub(super) fn new(
        disk: Disk,
        ram: GuestRam,
        queues: Vec<Option<Virtqueue>>,
        interrupt: Arc<Interrupt>,
        limiter: Limiter,
        again: VecDeque<InFlight>,
    ) -> Self {
        let config = disk.config();
        let name = config.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut id = config.id.clone().or(name).unwrap_or_default().into_bytes();
        id.resize(ID_LEN, 0);
        let count = queues.len();
        Self {
            disk,
            ram,
            queues,
            interrupt,
            limiter,
            id,
            pending: BTreeMap::new(),
            next_token: 0,
            again,
            redone: HashSet::new(),
            delayed: None,
            retry: None,
            ready: vec![false; count],
            used: vec![false; count],
            halting: false,
            broken: false,
        }
    }

    /// Everything popped and not given back, in the order it was popped: what runs, then what is still to be done again, then what
    /// waits for the limiter.
    pub(super) fn in_flight(&self) -> Vec<InFlight> {
        let pending = self.pending.values().map(|p| InFlight { queue: p.queue, head: p.head });
        let delayed = self.delayed.iter().map(|d| InFlight { queue: d.queue, head: d.request.head });
        pending.chain(self.again.iter().copied()).chain(delayed).collect()
    }

    pub(super) fn queue_states(&self) -> Vec<Option<QueueState>> {
        self.queues.iter().map(|queue| queue.as_ref().map(Virtqueue::save)).collect()
    }

    /// Stops for good: what the kernel can give up is given up. Returns whether nothing is in flight any more.
    pub(super) fn abandon(&mut self) -> bool {
        self.broken = true;
        self.again.clear();
        self.delayed = None;
        self.disk.cancel();
        self.reap();
        self.disk.in_flight() == 0
    }

    /// Has the kernel give up what it is busy with, or waits for it. What was popped and not given back is done again afterwards, from the beginning:
    /// nothing is given back here. Returns whether nothing is in flight any more.
    pub(super) fn halt(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut list = self.in_flight();
        self.halting = true;
        loop {
            // Each time: what waited for others begins when those end.
            self.disk.cancel();
            self.reap();
            let over = self.disk.in_flight() == 0 || Instant::now() >= deadline;
            if over || self.disk.wait(Duration::from_millis(1)).is_err() {
                break;
            }
        }
        self.halting = false;
        // What is still there goes on, and is given back when it is done.
        let stays = |chain: &InFlight| self.pending.values().any(|p| (p.queue, p.head) == (chain.queue, chain.head));
        list.retain(|chain| !stays(chain));
        self.again = list.into();
        self.delayed = None;
        self.redone.retain(|token| self.pending.contains_key(token));
        self.disk.in_flight() == 0
    }

    pub(super) fn has_queues(&self, queues: &[Option<Virtqueue>]) -> bool {
        same_queues(&self.queues, queues)
    }

    /// Goes back to a saved state, on its disk at that instant. Returns whether it could: nothing may be in flight.
    pub(super) fn rewind(&mut self, state: &BlockState, image: &DiskImage, with: Activation) -> bool {
        if !self.disk.rewind(image) {
            return false;
        }
        self.queues = with.queues;
        self.again = state.in_flight.iter().copied().collect();
        for chain in &self.again {
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(chain.queue)) {
                queue.count_out();
            }
        }
        self.pending.clear();
        self.redone.clear();
        (self.delayed, self.retry) = (None, None);
        self.ready.fill(true);
        self.used.fill(false);
        self.broken = false;
        true
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        if !self.broken {
            tracing::warn!(%error, disk = %self.disk.config().path.display(), "a block device needs a reset");
            self.broken = true;
            self.interrupt.fail();
        }
    }

    /// Begins with chain `head` of `queue`. Returns how many bytes it moves.
    fn chain(&mut self, queue: u16, head: u16, limited: bool) -> Result<u64, QueueError> {
        let Some(Some(ring)) = self.queues.get(usize::from(queue)) else {
            return Err(QueueError::Rings { index: queue });
        };
        let chain = ring.chain(head)?;
        let request = Request::parse(&self.ram, &chain)?;
        let cost = request.cost();
        if limited && let Err(until) = self.limiter.take(cost) {
            self.delayed = Some(Delayed { queue, request, until });
            return Ok(0);
        }
        self.begin(queue, &request);
        Ok(cost)
    }

    fn begin(&mut self, queue: u16, request: &Request) {
        let token = self.next_token;
        self.next_token += 1;
        let written = if matches!(request.kind, Kind::Read { .. }) { request.len() as u32 } else { 0 };
        let mut pending = Pending { queue, head: request.head, status: request.status, written };
        let given = match self.operation(request, &mut pending) {
            Ok(Some(operation)) => {
                // Before the disk, which may be done with it at once.
                self.pending.insert(token, pending);
                if let Err(error) = self.disk.submit(operation, token) {
                    self.finish(token, Err(&error));
                }
                return;
            }
            Ok(None) => VIRTIO_BLK_S_OK,
            Err(status) => status,
        };
        self.give_back(&pending, given);
    }

    /// What the disk is to do for `request`, with its memory pinned; nothing, if it is done already; or its status.
    fn operation(&self, request: &Request, pending: &mut Pending) -> Result<Option<DiskOp>, u32> {
        let pin = |access| {
            dma::pin(&self.ram, OWNER, &request.data, access).map_err(|error| {
                tracing::warn!(%error, "memory of a request");
                VIRTIO_BLK_S_IOERR
            })
        };
        Ok(Some(match request.kind {
            // The device writes to memory, so the pages must be this VM's own before the kernel has their address (I3).
            Kind::Read { offset } => DiskOp::Read { offset, buffers: pin(Access::Write)? },
            Kind::Write { offset } => DiskOp::Write { offset, buffers: pin(Access::Read)? },
            Kind::Flush => DiskOp::Flush,
            Kind::Discard { offset, len } => DiskOp::Discard { offset, len },
            Kind::Zero { offset, len, unmap } => DiskOp::Zero { offset, len, unmap },
            Kind::Id => {
                let copied = dma::copy_out(&self.ram, &request.data, &self.id);
                pending.written = copied.map_err(|_| VIRTIO_BLK_S_IOERR)? as u32;
                return Ok(None);
            }
            Kind::Impossible => return Err(VIRTIO_BLK_S_IOERR),
            Kind::Unknown => return Err(VIRTIO_BLK_S_UNSUPP),
        }))
    }

    fn finish(&mut self, token: u64, result: Result<(), &DiskError>) {
        let Some(mut pending) = self.pending.remove(&token) else { return };
        self.redone.remove(&token);
        let status = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(error) => {
                tracing::debug!(%error, "a request to a disk failed");
                pending.written = 0;
                VIRTIO_BLK_S_IOERR
            }
        };
        self.give_back(&pending, status);
    }

    /// Tells the driver how a request ended: the status before the used ring, whose index is stored last and with release.
    fn give_back(&mut self, pending: &Pending, status: u32) {
        if self.broken || self.halting {
            return;
        }
        let index = usize::from(pending.queue);
        let done = dma::write(&self.ram, pending.status, &[status as u8]).map_err(|error| error.to_string());
        let queue = self.queues.get_mut(index).and_then(Option::as_mut);
        let done = done.and_then(|()| match queue {
            Some(queue) => queue.give_back(pending.head, pending.written + 1).map_err(|error| error.to_string()),
            None => Err(QueueError::Rings { index: pending.queue }.to_string()),
        });
        match done {
            Ok(()) => self.used[index] = true,
            Err(error) => self.fail(&error),
        }
    }

    /// Gives back what the disk is done with.
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

    /// Gives the kernel what was begun.
    fn kick(&mut self) {
        if let Err(error) = self.disk.kick() {
            self.fail(&error);
        }
        self.retry = self.disk.is_stalled().then(|| Instant::now() + RETRY);
        let done = self.disk.take_done();
        self.finish_all(done);
    }

    /// Does again what was in flight when the state was saved, up to a batch.
    fn redo(&mut self) {
        for _ in 0..BATCH {
            let Some(InFlight { queue, head }) = self.again.pop_front() else { return };
            let token = self.next_token;
            // The limits were kept when it was first popped.
            if let Err(error) = self.chain(queue, head, false) {
                return self.fail(&error);
            }
            if self.pending.contains_key(&token) {
                self.redone.insert(token);
            }
        }
    }

    /// Whether new requests may be popped.
    fn may_pop(&self) -> bool {
        !self.broken && self.again.is_empty() && self.redone.is_empty() && self.delayed.is_none()
    }

    /// Pops and begins requests, up to a batch. Returns whether there may be more to do.
    fn pop(&mut self, hurry: &Hurry<'_>) -> bool {
        let (mut begun, mut bytes) = (0, 0);
        for index in 0..self.queues.len() {
            while self.ready[index] {
                if begun == BATCH || bytes >= BATCH_BYTES || hurry.up() {
                    return true;
                }
                let Some(queue) = &mut self.queues[index] else {
                    self.ready[index] = false;
                    break;
                };
                let popped = queue.pop().and_then(|head| match head {
                    Some(head) => self.chain(index as u16, head, true).map(Some),
                    None => Ok(None),
                });
                match popped {
                    Ok(Some(cost)) => (begun, bytes) = (begun + 1, bytes + cost),
                    // Asked for notifications before the last look, or one that comes in between is lost.
                    Ok(None) => {
                        self.ready[index] = self.queues[index].as_mut().is_some_and(Virtqueue::enable_notifications);
                    }
                    Err(error) => self.fail(&error),
                }
                if self.broken || self.delayed.is_some() {
                    return false;
                }
            }
        }
        false
    }

    /// Lets the request that waits for the limiter go, if it may.
    fn release(&mut self) {
        let Some(delayed) = self.delayed.take_if(|delayed| Instant::now() >= delayed.until) else { return };
        match self.limiter.take(delayed.request.cost()) {
            Ok(()) => self.begin(delayed.queue, &delayed.request),
            Err(until) => self.delayed = Some(Delayed { until, ..delayed }),
        }
    }

    fn tell(&mut self) {
        let mut tell = false;
        for (used, queue) in self.used.iter_mut().zip(&mut self.queues) {
            if std::mem::take(used) {
                tell |= queue.as_mut().is_some_and(Virtqueue::wants_interrupt);
            }
        }
        if tell {
            self.interrupt.used();
        }
    }
}

impl Service for BlockService {
    fn turn(&mut self, wake: Wake, hurry: &Hurry<'_>) -> Turn {
        match wake {
            Wake::Start => self.ready.fill(true),
            Wake::Source(DISK) | Wake::Timer | Wake::Again => {}
            Wake::Source(index) => {
                if let Some(Some(queue)) = self.queues.get_mut(index as usize) {
                    // Before looking into the queue.
                    queue.acknowledge();
                    queue.disable_notifications();
                    self.ready[index as usize] = true;
                }
            }
        }
        self.reap();
        let mut more = false;
        if !self.broken {
            self.redo();
            self.release();
            if self.may_pop() {
                more = self.pop(hurry);
            }
            self.kick();
        }
        self.tell();
        // What waits behind those done again is looked at when the last of them is done: at the disk's event, or now if that was just now.
        let more = more || !self.again.is_empty() || (self.may_pop() && self.ready.contains(&true));
        if more && !self.broken { Turn::Again } else { Turn::Done }
    }

    fn deadline(&self) -> Option<Instant> {
        let delayed = self.delayed.as_ref().map(|delayed| delayed.until);
        [delayed, self.retry].into_iter().flatten().min()
    }

    fn broken(&mut self) {
        self.fail(&"its worker panicked");
    }
}
