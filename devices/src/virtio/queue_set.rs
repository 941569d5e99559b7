//! The queues that a driver has set up, and their interrupt for used chains.

use std::mem;
use std::sync::Arc;

use super::{Interrupt, QueueError, QueueState, Virtqueue};

/// Every queue of an active device. Queues not in use by the driver are absent.
#[derive(Debug)]
pub(super) struct QueueSet {
    queues: Vec<Option<Virtqueue>>,
    /// For each queue, whether chains were added to its used ring since the last
    /// [`QueueSet::notify`].
    used: Vec<bool>,
    interrupt: Arc<Interrupt>,
}

impl QueueSet {
    pub(super) fn new(queues: Vec<Option<Virtqueue>>, interrupt: Arc<Interrupt>) -> Self {
        Self { used: vec![false; queues.len()], queues, interrupt }
    }

    /// Replaces the queues at a rewind. No interrupt is due for the new ones.
    pub(super) fn replace(&mut self, queues: Vec<Option<Virtqueue>>) {
        self.used.fill(false);
        self.queues = queues;
    }

    /// Number of queues of the device.
    pub(super) fn len(&self) -> usize {
        self.queues.len()
    }

    pub(super) fn get(&self, index: usize) -> Option<&Virtqueue> {
        self.queues.get(index).and_then(Option::as_ref)
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.queues.get_mut(index).and_then(Option::as_mut)
    }

    /// Whether the driver has set up the same queues as in `others`.
    pub(super) fn is_same_as(&self, others: &[Option<Virtqueue>]) -> bool {
        self.queues.iter().map(Option::is_some).eq(others.iter().map(Option::is_some))
    }

    /// The queues as they are saved.
    pub(super) fn save(&self) -> Vec<Option<QueueState>> {
        self.queues.iter().map(|queue| queue.as_ref().map(Virtqueue::save)).collect()
    }

    /// Takes a notification of queue `index`. Returns whether the queue exists.
    pub(super) fn acknowledge(&mut self, index: usize) -> bool {
        let Some(queue) = self.get_mut(index) else { return false };
        // Before reading the queue.
        queue.acknowledge();
        queue.disable_notifications();
        true
    }

    /// Adds a chain with `len` bytes written to the used ring of queue `index`.
    pub(super) fn add_used(&mut self, index: usize, head: u16, len: u32) -> Result<(), QueueError> {
        self.add_all_used(index, &[(head, len)])
    }

    /// Adds several chains at once ([`Virtqueue::add_used`]).
    pub(super) fn add_all_used(&mut self, index: usize, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(queue) = self.get_mut(index) else { return Err(QueueError::Rings { index: index as u16 }) };
        queue.add_used(chains)?;
        self.used[index] = true;
        Ok(())
    }

    /// Interrupts the driver, if a queue has used chains for which it wants an interrupt.
    pub(super) fn notify(&mut self) {
        let mut wanted = false;
        for (used, queue) in self.used.iter_mut().zip(&mut self.queues) {
            if mem::take(used) {
                wanted |= queue.as_mut().is_some_and(Virtqueue::needs_notification);
            }
        }
        if wanted {
            self.interrupt.used();
        }
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }
}
