//! Any saved state: it is refused, or a device goes on from it and can be saved, reset and dropped.
#![no_main]

use std::sync::OnceLock;

use clade_devices::MmioDevice;
use clade_devices::virtio::balloon::{Balloon, BalloonState};
use clade_devices::virtio::plain::Plain;
use clade_devices::virtio::{DeviceState, TransportState, VirtioMmio, Wiring, regs};
use clade_memory::{GuestRam, RamLayout, Store};
use libfuzzer_sys::fuzz_target;

fn ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    RAM.get_or_init(|| {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(1 << 20).expect("a layout"), &store).expect("memory");
        ram.birth().expect("memory");
        ram
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(state) = serde_json::from_slice::<TransportState>(bytes) else { return };
    let own = match &state.device {
        DeviceState::Balloon(state) => *state,
        _ => BalloonState::default(),
    };
    let device = Box::new(Plain::new(Balloon::new(&own).expect("a balloon")));
    let wiring = Wiring::new(4).expect("wires");
    let Ok(device) = VirtioMmio::restore(device, ram(), wiring, &state) else { return };
    device.resume();
    device.quiesce();
    let saved = device.save();
    device.resume();
    assert!(saved.is_ok());
    device.write(regs::STATUS, &0u32.to_le_bytes());
});
