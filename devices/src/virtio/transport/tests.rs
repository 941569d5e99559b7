#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use clade_block::{Disk, DiskConfig};
use clade_memory::{GuestRam, RamLayout, Store};

use super::*;
use crate::virtio::block::{Block, BlockOptions};

/// The driver of a longer queue would have more requests at once than the device is made for.
#[test]
fn a_saved_queue_that_is_longer_than_the_devices_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let ram = GuestRam::reserve(&RamLayout::new(1 << 20).unwrap(), &Store::open_small().unwrap()).unwrap();
    let device = || {
        let config = DiskConfig { read_only: true, ..DiskConfig::new(file.path()) };
        Box::new(Block::new(Disk::open(&config).unwrap(), &BlockOptions::default()))
    };
    let restored = |state: &TransportState| {
        let event_fds = EventFds::new(1).unwrap();
        VirtioMmio::restore(device(), &ram, event_fds, state)
    };
    let original = VirtioMmio::new(device(), &ram, EventFds::new(1).unwrap(), true);
    let (state, _) = original.save().unwrap();
    assert!(restored(&state).is_ok() && original.check(&state).is_ok());
    let max = state.queues[0].max_size;
    for (size, max_size) in [(max, 2 * max), (2 * max, max), (2 * max, 2 * max)] {
        let mut longer = state.clone();
        (longer.queues[0].size, longer.queues[0].max_size) = (size, max_size);
        let expected = format!("saved queue 0 has {} descriptors, and that of the device up to {max}", 2 * max);
        assert_eq!(restored(&longer).unwrap_err().to_string(), expected);
        assert_eq!(original.check(&longer).unwrap_err().to_string(), expected);
    }
}
