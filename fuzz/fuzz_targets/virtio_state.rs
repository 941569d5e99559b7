//! Any saved state: it is refused, or a device goes on from it and can be saved, reset, put back to
//! it and dropped.
#![no_main]

use std::sync::OnceLock;
use std::time::Duration;

use clade_devices::MmioDevice;
use clade_devices::virtio::balloon::{Balloon, BalloonState};
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::{Backend, DeviceState, EventFds, TransportState, VirtioMmio, regs};
use clade_memory::{GuestRam, RamLayout, Store};
use libfuzzer_sys::fuzz_target;

fn ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    RAM.get_or_init(|| {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(1 << 20).expect("a layout"), &store).expect("memory");
        ram.populate().expect("memory");
        ram
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(state) = serde_json::from_slice::<TransportState>(bytes) else { return };
    let own = match &state.device {
        DeviceState::Balloon(state) => *state,
        _ => BalloonState::default(),
    };
    let device = Box::new(SyncDevice::new(Balloon::new(&own).expect("a balloon")));
    let event_fds = EventFds::new(4).expect("eventfds");
    let Ok(device) = VirtioMmio::restore(device, ram(), event_fds, &state) else { return };
    device.resume();
    device.quiesce();
    let saved = device.save();
    device.resume();
    assert!(saved.is_ok());
    device.write(regs::STATUS, &0u32.to_le_bytes());
    // And back to the saved state, in place: after a driver's use, and in a device without one.
    for _ in 0..2 {
        device.quiesce();
        assert!(device.halt(Duration::ZERO));
        assert!(device.check(&state).is_ok(), "a device went on from it before");
        let back = device.rewind(&state, &Backend::None);
        assert_eq!(back.is_ok(), matches!(state.device, DeviceState::Balloon(_)));
        device.resume();
        if back.is_err() {
            return;
        }
    }
});
