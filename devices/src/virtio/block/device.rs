//! The block device behind the transport: features, configuration space, activation.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::SEG_MAX;
use super::request::MAX_RANGE_SECTORS;
use super::service::{BlockService, DISK, IdleDisk};
use super::state::{BlockState, InFlight};
use crate::virtio::limiter::{Limiter, Limits};
use crate::virtio::{
    ActivateError, Activation, Backend, DeviceState, DeviceThread, SaveError, SavedDevice, VirtioDevice,
};
use clade_block::{CLUSTER, Disk, SECTOR};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most queues of a block device.
pub const MAX_QUEUES: u16 = 16;
/// Bytes of the configuration space, up to the last field of an offered feature.
const CONFIG_LEN: usize = 60;
/// How long one attempt at a reset waits for the kernel. After it, the driver polls the status.
const RESET_PATIENCE: Duration = Duration::from_secs(2);

/// The configuration of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct BlockOptions {
    /// Number of queues.
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 16))]
    pub queues: u16,
    /// Limits of its throughput.
    pub limits: Limits,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self { queues: 1, limits: Limits::default() }
    }
}

/// Why a device gives no disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DiskNotTaken {
    /// The kernel still works on its requests.
    #[error("the disk's requests have not ended")]
    InUse,
    /// It was taken before, or the device's worker has failed.
    #[error("the device has no disk")]
    Gone,
}

/// The owner of the disk.
#[derive(Debug)]
enum DiskOwner {
    /// The device, while it is not active.
    Inactive(Box<IdleDisk>),
    /// The worker.
    Working(DeviceThread<BlockService>),
    /// No owner: the worker's thread could not be ended, or could not be started. Every reset and
    /// activation reports it.
    Lost,
}

impl From<Option<BlockService>> for DiskOwner {
    /// Takes the disk back from a worker's service. None if the worker could not be ended.
    fn from(service: Option<BlockService>) -> Self {
        service.map_or(Self::Lost, |service| Self::Inactive(Box::new(service.into_idle())))
    }
}

/// A block device. While it is active, its worker owns the disk.
#[derive(Debug)]
pub struct Block {
    queue_sizes: Vec<u16>,
    config: [u8; CONFIG_LEN],
    features: u64,
    owner: DiskOwner,
    /// Chains that were in flight in the saved state, and have not begun again yet.
    replay_queue: VecDeque<InFlight>,
}

impl Block {
    /// A new device on `disk`.
    #[must_use]
    pub fn new(disk: Disk, options: &BlockOptions) -> Self {
        let read_only = disk.config().read_only;
        let queues = options.queues.clamp(1, MAX_QUEUES);
        let mut features = bits(&[
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_RING_F_EVENT_IDX,
        ]);
        if queues > 1 {
            features |= bits(&[VIRTIO_BLK_F_MQ]);
        }
        features |=
            if read_only { bits(&[VIRTIO_BLK_F_RO]) } else { bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]) };
        Self {
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            config: config_space(disk.size(), queues),
            features,
            owner: DiskOwner::Inactive(Box::new(IdleDisk { disk, limiter: Limiter::new(&options.limits) })),
            replay_queue: VecDeque::new(),
        }
    }

    /// A device that continues from a saved state, on a disk of the same instant.
    #[must_use]
    pub fn restore(state: &BlockState, disk: Disk, options: &BlockOptions) -> Self {
        Self { replay_queue: state.in_flight.iter().copied().collect(), ..Self::new(disk, options) }
    }

    /// Runs `with` on the disk, between two turns of the worker. Returns None if the disk is lost.
    pub fn with_disk<T>(&mut self, with: impl FnOnce(&mut Disk) -> T) -> Option<T> {
        match &mut self.owner {
            DiskOwner::Inactive(idle) => Some(with(&mut idle.disk)),
            DiskOwner::Working(worker) => Some(worker.with(|service| with(&mut service.disk))),
            DiskOwner::Lost => None,
        }
    }

    /// Runs `with` on the worker's service, if the device is active.
    #[cfg(test)]
    pub(super) fn with_service<T>(&mut self, with: impl FnOnce(&mut BlockService) -> T) -> Option<T> {
        match &self.owner {
            DiskOwner::Working(worker) => Some(worker.with(with)),
            DiskOwner::Inactive(_) | DiskOwner::Lost => None,
        }
    }

    /// Stops the device for good, and returns its disk.
    ///
    /// # Errors
    /// When requests of the disk have not ended within 2 s. The device keeps the disk, which another call may take.
    pub fn take_disk(&mut self) -> Result<Disk, DiskNotTaken> {
        if !self.deactivate() {
            return Err(DiskNotTaken::InUse);
        }
        match std::mem::replace(&mut self.owner, DiskOwner::Lost) {
            DiskOwner::Inactive(idle) => Ok(idle.disk),
            DiskOwner::Working(_) | DiskOwner::Lost => Err(DiskNotTaken::Gone),
        }
    }
}

fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |all, bit| all | 1 << bit)
}

/// The specification's `struct virtio_blk_config`, little-endian.
fn config_space(size: u64, queues: u16) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    let cluster_sectors = (CLUSTER / SECTOR) as u32;
    put(0, &(size / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    // A single sector can be written. A whole cluster (2^3 sectors) is cheaper: a smaller write may
    // have to read the rest of it.
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[cluster_sectors.trailing_zeros() as u8]);
    put(26, &(cluster_sectors as u16).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &cluster_sectors.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_LEN);
        let there = &self.config[start..CONFIG_LEN.min(start.saturating_add(data.len()))];
        data[..there.len()].copy_from_slice(there);
    }

    fn activate(&mut self, mut with: Activation) -> Result<(), ActivateError> {
        if with.queues.iter().all(Option::is_none) {
            return Err(ActivateError::NoQueue { index: 0 });
        }
        let DiskOwner::Inactive(idle) = std::mem::replace(&mut self.owner, DiskOwner::Lost) else {
            return Err(ActivateError::NotReady);
        };
        let again = std::mem::take(&mut self.replay_queue);
        for chain in &again {
            if let Some(Some(queue)) = with.queues.get_mut(usize::from(chain.queue)) {
                queue.restore_in_flight();
            }
        }
        let mut sources: Vec<(RawFd, u32)> = vec![(idle.disk.event().as_raw_fd(), DISK)];
        sources.extend(with.queues.iter().flatten().map(|queue| (queue.event().as_raw_fd(), u32::from(queue.index()))));
        let held = with.held;
        let service = BlockService::new(*idle, with, again);
        match DeviceThread::spawn("clade-blk", service, &sources, held) {
            Ok(worker) => {
                self.owner = DiskOwner::Working(worker);
                Ok(())
            }
            Err(failed) => {
                let (error, service) = *failed;
                self.owner = service.into();
                Err(ActivateError::Worker(error))
            }
        }
    }

    fn deactivate(&mut self) -> bool {
        self.replay_queue.clear();
        let DiskOwner::Working(worker) = &self.owner else { return true };
        let deadline = Instant::now() + RESET_PATIENCE;
        let over = worker.with(|service| {
            while !service.abandon() {
                if Instant::now() >= deadline || service.disk.wait(Duration::from_millis(10)).is_err() {
                    return false;
                }
            }
            true
        });
        if over && let DiskOwner::Working(worker) = std::mem::replace(&mut self.owner, DiskOwner::Lost) {
            self.owner = worker.stop().into();
        }
        over
    }

    fn halt(&mut self, patience: Duration) -> bool {
        match &self.owner {
            DiskOwner::Working(worker) => {
                let over = worker.with(|service| service.halt(patience));
                // If the reset fails, the requests to be repeated begin again.
                worker.start_over();
                over
            }
            DiskOwner::Inactive(_) | DiskOwner::Lost => true,
        }
    }

    fn rewind(
        &mut self,
        state: &DeviceState,
        backend: &Backend,
        with: Option<Activation>,
    ) -> Result<(), ActivateError> {
        let (DeviceState::Block(state), Backend::Disk(image)) = (state, backend) else {
            return Err(ActivateError::Kind { found: state.kind() });
        };
        let Some(with) = with else {
            let rewound = self.deactivate() && self.with_disk(|disk| disk.rewind(image)) == Some(true);
            self.replay_queue = state.in_flight.iter().copied().collect();
            return if rewound { Ok(()) } else { Err(ActivateError::NotReady) };
        };
        // In place if the worker has waited for the same queues' events: starting a thread costs
        // more than all the rest.
        if let DiskOwner::Working(worker) = &self.owner
            && worker.is_alive()
            && worker.with(|service| service.has_queues(&with.queues))
        {
            if !worker.with(|service| service.rewind(state, image, with)) {
                return Err(ActivateError::NotReady);
            }
            worker.start_over();
            return Ok(());
        }
        self.rewind(&DeviceState::Block(state.clone()), backend, None)?;
        self.activate(with)
    }

    fn quiesce(&mut self) {
        if let DiskOwner::Working(worker) = &self.owner {
            worker.quiesce();
        }
    }

    fn resume(&mut self) {
        if let DiskOwner::Working(worker) = &self.owner {
            worker.resume();
        }
    }

    fn save(&mut self) -> Result<SavedDevice, SaveError> {
        let (in_flight, queues, image) = match &mut self.owner {
            DiskOwner::Inactive(idle) => {
                (self.replay_queue.iter().copied().collect(), vec![None; self.queue_sizes.len()], idle.disk.fork())
            }
            // The worker is paused, so no request is submitted between the list and the map.
            DiskOwner::Working(worker) => {
                worker.with(|service| (service.in_flight(), service.queue_states(), service.disk.fork()))
            }
            DiskOwner::Lost => return Err(SaveError { what: "a block device" }),
        };
        Ok(SavedDevice { state: DeviceState::Block(BlockState { in_flight }), backend: Backend::Disk(image), queues })
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}
