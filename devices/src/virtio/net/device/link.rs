//! The link of a network device: whether it is up, and whether the host lets packets pass.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;

use super::{BATCH, DOWN_RETRY, Net};
use crate::virtio::YieldRequest;
use crate::virtio::net::Link;
use crate::virtio::sync_device::{FatalError, QueueCtx};

/// Minimum time for which a child's link stays down.
const DOWN: Duration = Duration::from_millis(250);
/// Time for which the link stays down if the driver does not read the status. A driver that reads
/// it only after the link is up again has missed the change.
const MAX_DOWN: Duration = Duration::from_secs(30);
/// Interval of checks whether the driver has read the status.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Offset of the status in the configuration space, after the address.
const STATUS: u64 = 6;
const UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// The initial status of a link.
pub(super) fn initial_status(link: Link) -> u16 {
    match link {
        Link::Open => UP,
        Link::Closed => 0,
    }
}

impl Net {
    /// Whether packets pass.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link
    }

    /// Opens or closes the device. The link goes down at once, and comes up again some time after
    /// the driver has seen it down, in a turn that the caller must bring about. Packets that
    /// arrived while the device was closed are dropped. Returns whether the state has changed.
    pub fn set_link(&mut self, link: Link) -> bool {
        if self.link == link {
            return false;
        }
        if link == Link::Open {
            // Before opening: a waiting packet arrived while the device was closed.
            for pair in 0..self.backend.queues() {
                self.discard(pair, usize::from(u16::MAX));
            }
        }
        self.link = link;
        // In either case: an open link begins down.
        self.set_status(0);
        self.renew = true;
        true
    }

    /// Drops up to `most` packets of the interface. Returns whether there may be more.
    pub(super) fn discard(&mut self, pair: usize, most: usize) -> bool {
        for _ in 0..most {
            match self.backend.discard(pair) {
                Ok(true) => self.stats.blocked_received += 1,
                Ok(false) => {
                    self.readable[pair] = false;
                    self.arm(pair);
                    return false;
                }
                Err(_) if self.backend.has_ended() => {
                    self.readable[pair] = false;
                    return false;
                }
                Err(error) => {
                    tracing::debug!(%error, interface = self.backend.name(), "nothing is dropped");
                    self.readable[pair] = false;
                    self.wait_until(Instant::now() + DOWN_RETRY);
                    self.arm(pair);
                    return false;
                }
            }
        }
        true
    }

    /// Drops the driver's packets. Returns whether there may be more.
    pub(super) fn refuse_some(
        &mut self,
        io: &mut QueueCtx,
        pair: usize,
        should_yield: &YieldRequest<'_>,
    ) -> Result<bool, FatalError> {
        let queue = 2 * pair + 1;
        for _ in 0..BATCH {
            let Some(chain) = io.pop(queue)? else { return Ok(false) };
            self.stats.blocked_sent += 1;
            io.add_used(queue, chain.head, 0)?;
            if should_yield.is_set() {
                break;
            }
        }
        Ok(true)
    }

    /// The driver has announced its guest. The link may have gone down again since the request.
    pub(super) fn announced(&self) {
        let mut status = [0; 2];
        self.config.read(STATUS, &mut status);
        self.set_status(u16::from_le_bytes(status) & !ANNOUNCE);
    }

    pub(super) fn set_status(&self, status: u16) {
        self.config.write(STATUS, &status.to_le_bytes());
    }

    /// Takes the link down and up again, for a guest whose address has changed.
    pub(super) fn renew(&mut self, io: &QueueCtx) {
        if std::mem::take(&mut self.renew) {
            self.set_status(0);
            io.config_changed();
            self.down_since = (self.link == Link::Open).then(Instant::now);
        } else if self.down_since.is_some_and(|since| self.may_come_up(since)) {
            self.down_since = None;
            let announces = io.features & (1 << VIRTIO_NET_F_GUEST_ANNOUNCE) != 0;
            self.set_status(UP | if announces { ANNOUNCE } else { 0 });
            io.config_changed();
        }
    }

    fn may_come_up(&self, down_since: Instant) -> bool {
        let down = down_since.elapsed();
        down >= MAX_DOWN || (down >= DOWN && self.config.is_seen(STATUS))
    }

    /// The time of the next turn needed for the link.
    pub(super) fn link_deadline(&self) -> Option<Instant> {
        // Once the link may come up, the status is checked at intervals.
        self.down_since.map(|since| (since + DOWN).max(Instant::now() + POLL_INTERVAL))
    }
}
