//! A virtqueue in guest memory, where a driver offers chains of buffers.
//!
//! The crate `virtio-queue` implements the rings; `chain.rs` walks chains.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clade_memory::GuestRam;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, DESCRIPTOR, Walk};

/// Bytes before the elements of a used ring, and of one of them.
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// Offset of the index in a used ring.
const USED_INDEX: u64 = 2;
/// The same of an available ring. The used event is behind its elements.
const AVAILABLE_HEADER: u64 = 4;
const AVAILABLE_ELEMENT: u64 = 2;

/// How a driver has broken the rules of a queue. The device then needs a reset.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueError {
    /// A descriptor's index is not in the queue.
    #[error("descriptor {index} of a queue of {size}")]
    Index {
        /// The descriptor's index.
        index: u16,
        /// Descriptors in the queue.
        size: u16,
    },
    /// A chain has more buffers than the queue has descriptors; most often because of a loop.
    #[error("the chain at {head} does not end within {size} descriptors")]
    Endless {
        /// The chain's head.
        head: u16,
        /// Descriptors in the queue.
        size: u16,
    },
    /// A chain has an indirect table, which was not negotiated.
    #[error("the chain at {head} has an indirect table, which was not negotiated")]
    Indirect {
        /// The chain's head.
        head: u16,
    },
    /// A chain continues behind its indirect table.
    #[error("the chain at {head} goes on behind its indirect table")]
    BehindTable {
        /// The chain's head.
        head: u16,
    },
    /// An indirect table refers to another one.
    #[error("the chain at {head} has an indirect table in its indirect table")]
    Nested {
        /// The chain's head.
        head: u16,
    },
    /// The length of an indirect table is not a multiple of a descriptor's, or the table has more
    /// descriptors than the queue.
    #[error("the chain at {head} has an indirect table of {len} bytes, not of 1 to {size} descriptors of {DESCRIPTOR}")]
    TableLength {
        /// The chain's head.
        head: u16,
        /// The table's length in bytes.
        len: u32,
        /// Descriptors in the queue.
        size: u16,
    },
    /// A descriptor's index is not in its indirect table.
    #[error("descriptor {index} of an indirect table of {entries}, in the chain at {head}")]
    TableIndex {
        /// The chain's head.
        head: u16,
        /// The descriptor's index.
        index: u16,
        /// Descriptors in the table.
        entries: u32,
    },
    /// A buffer is empty.
    #[error("the chain at {head} has a buffer of no bytes")]
    Empty {
        /// The chain's head.
        head: u16,
    },
    /// A buffer is not in RAM, or not in one region.
    #[error("the chain at {head} has {len:#x} bytes at {address:#x}, which are not in RAM")]
    Outside {
        /// The chain's head.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// The buffer's length in bytes.
        len: u32,
    },
    /// A chain has more bytes than the specification allows.
    #[error("the chain at {head} has more than 4 GiB")]
    TooLong {
        /// The chain's head.
        head: u16,
    },
    /// A buffer for the device to read follows one for it to write.
    #[error("the chain at {head} has a buffer to read behind one to write")]
    Order {
        /// The chain's head.
        head: u16,
    },
    /// The driver offers more chains than the queue has descriptors.
    #[error("more than {size} buffers are available at once")]
    Flood {
        /// Descriptors in the queue.
        size: u16,
    },
    /// A ring is not in RAM.
    #[error("the rings of queue {index} are not in RAM, or not ready")]
    Rings {
        /// The queue's number.
        index: u16,
    },
    /// A chain's content is not a valid request.
    #[error("the chain at {head} {what}")]
    Content {
        /// The chain's head.
        head: u16,
        /// The fault of the content.
        what: &'static str,
    },
}

/// The state of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Maximum number of descriptors that the device allows.
    pub max_size: u16,
    /// Descriptors that the driver has chosen.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// The next entry of the available ring to read.
    pub next_available: u16,
    /// The next entry of the used ring to write.
    pub next_used: u16,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

impl QueueState {
    /// A queue that no driver has set up.
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
            event_idx: false,
        }
    }
}

/// An active queue: pops chains, adds them to the used ring, and counts those in between.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    ram: GuestRam,
    event: Arc<EventFd>,
    /// Whether chains may have indirect tables.
    indirect: bool,
    out: u16,
    /// Chains added to the used ring since the driver was last interrupted, or did not want it.
    added: u16,
}

impl Virtqueue {
    /// A queue in this state, for a driver that has chosen `features`. Chains that were popped and
    /// not used are counted afterwards, one by one.
    ///
    /// # Errors
    /// When the state is invalid, or a ring is not in RAM.
    pub fn new(
        index: u16,
        state: &QueueState,
        features: u64,
        ram: &GuestRam,
        event: &Arc<EventFd>,
    ) -> Result<Self, QueueError> {
        let chosen = |feature: u32| features & (1 << feature) != 0;
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size: state.max_size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: chosen(VIRTIO_RING_F_EVENT_IDX),
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        });
        let queue = queue.ok().filter(|queue| queue.is_valid(ram.memory())).ok_or(QueueError::Rings { index })?;
        let indirect = chosen(VIRTIO_RING_F_INDIRECT_DESC);
        Ok(Self { index, queue, ram: ram.clone(), event: Arc::clone(event), indirect, out: 0, added: 0 })
    }

    /// The queue's number in the device.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The eventfd that the driver's notifications signal.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Chains that were popped and not used.
    #[cfg(test)]
    pub(super) fn out(&self) -> u16 {
        self.out
    }

    /// Clears the eventfd. The queue must be read after it; otherwise a notification that arrives
    /// in between is lost.
    ///
    /// Returns whether there was a notification.
    pub(crate) fn acknowledge(&self) -> bool {
        // EAGAIN is fine: another read has cleared the eventfd.
        self.event.read().is_ok()
    }

    /// The queue's state, to be saved.
    #[must_use]
    pub fn save(&self) -> QueueState {
        let state = self.queue.state();
        QueueState {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
        }
    }

    /// Pops the next chain that the driver has made available. Returns its head.
    ///
    /// # Errors
    /// When the driver has broken the rules.
    pub fn pop(&mut self) -> Result<Option<u16>, QueueError> {
        let size = self.queue.size();
        let mut available = self.queue.iter(self.ram.memory()).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => QueueError::Flood { size },
            _ => QueueError::Rings { index: self.index },
        })?;
        let Some(chain) = available.next() else { return Ok(None) };
        // Otherwise a driver that offers a descriptor again before it came back could have any
        // number of chains in flight.
        if self.out == size {
            return Err(QueueError::Flood { size });
        }
        self.out += 1;
        Ok(Some(chain.head_index()))
    }

    /// Undoes the last [`Virtqueue::pop`].
    pub(crate) fn undo_pop(&mut self) {
        self.out = self.out.saturating_sub(1);
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Counts a chain as popped, because it was in flight when the queue's state was saved.
    pub(crate) fn restore_in_flight(&mut self) {
        self.out = self.out.saturating_add(1);
    }

    /// The chain at `head`, read once.
    ///
    /// # Errors
    /// When the driver has broken the rules.
    pub fn chain(&self, head: u16) -> Result<Chain, QueueError> {
        let size = self.queue.size();
        let table = GuestAddress(self.queue.desc_table());
        let mut walk = Walk::new(&self.ram, size, head);
        let mut next = Some(head);
        while let Some(index) = next {
            if index >= size {
                return Err(QueueError::Index { index, size });
            }
            let at = u64::from(index) * u64::from(DESCRIPTOR);
            let at = table.checked_add(at).ok_or(QueueError::Rings { index: self.index })?;
            let descriptor: Descriptor =
                self.ram.memory().read_obj(at).map_err(|_| QueueError::Rings { index: self.index })?;
            if !Walk::is_table(&descriptor) {
                next = walk.buffer(&descriptor)?;
            } else if self.indirect {
                walk.table(&descriptor)?;
                break;
            } else {
                return Err(QueueError::Indirect { head });
            }
        }
        Ok(walk.end())
    }

    /// Adds chains to the used ring, each with the bytes written to its writable part. The data must be in memory
    /// before. A driver that sees the first of them sees all: of a packet in several buffers it would otherwise take the
    /// first for the whole packet, and the next one for another packet.
    ///
    /// # Errors
    /// When the used ring is not in RAM.
    pub(crate) fn add_used(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let (memory, ring, size) = (self.ram.memory(), GuestAddress(self.queue.used_ring()), self.queue.size());
        let outside = || QueueError::Rings { index: self.index };
        let at = |offset: u64| ring.checked_add(offset).ok_or_else(outside);
        let mut next = self.queue.next_used();
        for &(head, len) in chains {
            let element = u64::from(head) | u64::from(len) << 32;
            let place = at(USED_HEADER + u64::from(next % size) * USED_ELEMENT)?;
            memory.write_obj(element.to_le(), place).map_err(|_| outside())?;
            next = next.wrapping_add(1);
        }
        // Last, and with release: a driver that sees the index sees the elements, the data and the status too.
        memory.store(next.to_le(), at(USED_INDEX)?, Ordering::Release).map_err(|_| outside())?;
        self.queue.set_next_used(next);
        let count = chains.len() as u16;
        (self.added, self.out) = (self.added.wrapping_add(count), self.out.saturating_sub(count));
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains used since this was last called.
    #[must_use]
    pub(crate) fn needs_notification(&mut self) -> bool {
        let memory = self.ram.memory();
        // The used index before the flag or the event: the driver sets those, then looks at the index.
        std::sync::atomic::fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags = memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed).unwrap_or(0);
            return u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = GuestAddress(self.queue.avail_ring())
            .checked_add(AVAILABLE_HEADER + u64::from(self.queue.size()) * AVAILABLE_ELEMENT)
            .and_then(|at| memory.load::<u16>(at, Ordering::Relaxed).ok());
        let Some(event) = event else { return true };
        // Whether the index has passed the event since the last call.
        let (next, added) = (self.queue.next_used(), mem::take(&mut self.added));
        next.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < added
    }

    /// Asks the driver not to notify, because the device is going to read the queue anyway.
    pub(crate) fn disable_notifications(&mut self) {
        // This is a hint. If the ring cannot be written, `add_used` reports it.
        let _ = self.queue.disable_notification(self.ram.memory());
    }

    /// Asks the driver to notify again. Returns whether chains have become available meanwhile,
    /// without a notification.
    #[must_use]
    pub(crate) fn enable_notifications(&mut self) -> bool {
        self.queue.enable_notification(self.ram.memory()).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use clade_memory::{RamLayout, Store};

    use super::*;

    const SIZE: u16 = 4;
    const AVAILABLE: u64 = 0x2000;

    /// A queue of four descriptors, each a chain of its own; the first `offered` are available.
    fn queue(offered: u16) -> Virtqueue {
        let ram = GuestRam::reserve(&RamLayout::new(2 << 20).unwrap(), &Store::open_small().unwrap()).unwrap();
        ram.populate().unwrap();
        let state = QueueState {
            ready: true,
            descriptors: 0x1000,
            available: AVAILABLE,
            used: 0x3000,
            ..QueueState::new(SIZE)
        };
        let event = Arc::new(clade_host_io::eventfd().unwrap());
        for n in 0..u64::from(SIZE) {
            ram.memory().write_obj(0x8000 + n * 0x100, GuestAddress(0x1000 + 16 * n)).unwrap();
            ram.memory().write_obj(0x100u32, GuestAddress(0x1000 + 16 * n + 8)).unwrap();
            ram.memory().write_obj(n as u16, GuestAddress(AVAILABLE + 4 + 2 * n)).unwrap();
        }
        ram.memory().write_obj(offered, GuestAddress(AVAILABLE + 2)).unwrap();
        Virtqueue::new(0, &state, 0, &ram, &event).unwrap()
    }

    #[test]
    fn a_chain_that_was_put_back_is_popped_again_and_counts_once() {
        let mut queue = queue(SIZE);
        for round in 0..3 * SIZE {
            assert_eq!(queue.pop(), Ok(Some(0)), "round {round}");
            queue.undo_pop();
        }
        for head in 0..SIZE {
            assert_eq!(queue.pop(), Ok(Some(head)));
        }
        assert_eq!(queue.pop(), Ok(None));
        queue.undo_pop();
        assert_eq!((queue.save().next_available, queue.pop()), (SIZE - 1, Ok(Some(SIZE - 1))));
    }

    #[test]
    fn chains_that_were_out_when_the_state_was_saved_count_against_the_queue() {
        let mut queue = queue(SIZE);
        (0..3).for_each(|_| queue.restore_in_flight());
        assert_eq!(queue.pop(), Ok(Some(0)));
        assert_eq!(queue.pop(), Err(QueueError::Flood { size: SIZE }), "four are out");
        // One of the chains in flight is used, which makes room for another.
        let mut queue = self::queue(SIZE);
        (0..SIZE).for_each(|_| queue.restore_in_flight());
        queue.add_used(&[(2, 0)]).unwrap();
        assert_eq!(queue.pop(), Ok(Some(0)));
        assert_eq!(queue.pop(), Err(QueueError::Flood { size: SIZE }));
    }

    /// Otherwise it would take the second buffer of a packet for another packet.
    #[test]
    fn a_driver_sees_several_chains_at_once() {
        const PARTS: u16 = 3;
        let mut queue = queue(0);
        let (ram, stop) = (queue.ram.clone(), std::sync::atomic::AtomicBool::new(false));
        let chains: Vec<(u16, u32)> = (0..PARTS).map(|n| (n, 0x10_0000 + u32::from(n))).collect();
        let ready = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let driver = scope.spawn(|| {
                let (mut seen, mut odd) = (0_u64, 0_u64);
                ready.wait();
                while !stop.load(Ordering::Relaxed) {
                    let index: u16 = ram.memory().load(GuestAddress(0x3002), Ordering::Acquire).unwrap();
                    odd += u64::from(!index.is_multiple_of(PARTS));
                    seen += 1;
                }
                (seen, odd)
            });
            ready.wait();
            for _ in 0..10_000 {
                queue.add_used(&chains).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            let (seen, odd) = driver.join().unwrap();
            assert_eq!(odd, 0, "of {seen}");
        });
        let end = 10_000 * PARTS;
        assert_eq!(queue.save().next_used, end);
        for at in 1..=PARTS {
            let place = 0x3004 + u64::from((end - at) % SIZE) * 8;
            let element: [u32; 2] = [0, 4].map(|part| ram.memory().read_obj(GuestAddress(place + part)).unwrap());
            let (head, len) = chains[usize::from(PARTS - at)];
            assert_eq!(element, [u32::from(head), len]);
        }
    }

    #[test]
    fn a_driver_is_interrupted_when_the_index_passes_its_event_and_not_before() {
        let mut queue = queue(0);
        queue = Virtqueue::new(0, &queue.save(), 1 << VIRTIO_RING_F_EVENT_IDX, &queue.ram, &queue.event).unwrap();
        let expect = |queue: &Virtqueue, event: u16| {
            queue.ram.memory().write_obj(event, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
        };
        // From the beginning, and over the end of the numbers.
        for first in [0, u16::MAX - 2] {
            queue.queue.set_next_used(first);
            expect(&queue, first.wrapping_add(2));
            let mut wanted = Vec::new();
            for count in [1, 1, 1, 1, 3] {
                queue.add_used(&vec![(0, 0); count]).unwrap();
                wanted.push(queue.needs_notification());
            }
            assert_eq!(wanted, [false, false, true, false, false], "from {first}");
            // Several are added at once, and one of them is the event.
            expect(&queue, first.wrapping_add(8));
            queue.add_used(&[(0, 0); 4]).unwrap();
            assert!(queue.needs_notification() && !queue.needs_notification());
        }
    }
}
