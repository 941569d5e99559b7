//! The devices of one VM and their buses: made, saved, restored and rewound together.

pub(crate) mod control;
mod reports;
mod virtio;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clade_block::DiskError;
use clade_devices::virtio::block::Block;
use clade_devices::virtio::net::EgressError;
use clade_devices::virtio::sync_device::{DeviceOps, SyncDevice};
use clade_devices::virtio::vsock::{GuestExit, GuestNotice, Vsock};
use clade_devices::virtio::{Backend, MMIO_LEN, RestoreError, SaveError, TransportState, VirtioMmio};
use clade_devices::{
    BusError, Console, DOORBELL, I8042, I8042_PORTS, Irq, MmioBus, MmioBusError, POWER_PORTS, PioBus, PowerControl,
    PowerSwitch, REPORT_PORT, REPORT_PORTS, ReportPort, SERIAL_PORTS, SerialConsole, SerialState,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::Trigger;

use crate::kvm::messages;
use crate::platform::{COM1_BASE, I8042_BASE, POWER_BASE, virtio_slot};
use crate::vm::config::VmConfig;
use crate::vm::identity::Endpoints;
use crate::vm::prepared::PreparedVm;
use crate::vm::stop::StopReason;
pub use reports::Reports;
use virtio::Hvc;

/// Why devices could not be made, or saved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The host has no free descriptor for a device.
    #[error("the devices could not be made")]
    Io(#[source] io::Error),
    /// Two devices claim one port.
    #[error(transparent)]
    Ports(#[from] BusError),
    /// Two devices claim one address.
    #[error(transparent)]
    Addresses(#[from] MmioBusError),
    /// A disk could not be opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The saved state of a virtio device is refused.
    #[error("a saved virtio device")]
    Restore(#[from] RestoreError),
    /// A virtio device could not be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A device has no interface or socket on the host.
    #[error("there is no interface or socket for {device} {number}")]
    NoEnd {
        /// The kind of device.
        device: &'static str,
        /// Its number among devices of that kind.
        number: usize,
    },
    /// A child's egress rules do not fit with those of its parent.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// The state is of a VM with other devices.
    #[error("state of {found} virtio devices for a VM with {wanted}, or of devices of other kinds")]
    Mismatch {
        /// Virtio devices in the state.
        found: usize,
        /// Virtio devices in the configuration.
        wanted: usize,
    },
}

/// Saved state of all devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    pub(crate) serial: SerialState,
    /// The virtio devices, by slot.
    pub(crate) virtio: Vec<TransportState>,
}

impl DevicesState {
    /// The number of requests in flight: popped, and not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.virtio.iter().map(|state| state.device.in_flight()).sum()
    }
}

/// Devices at one instant: their serializable state, and the disks.
pub(crate) type SavedDevices = (DevicesState, Vec<Backend>);

/// A VM's devices.
#[derive(Debug)]
pub(crate) struct Devices {
    bus: PioBus,
    mmio: MmioBus,
    /// The virtio devices, by slot.
    virtio: Vec<Arc<VirtioMmio>>,
    serial: Arc<Mutex<SerialConsole>>,
    pub(crate) console: Console,
    /// The virtio console, if there is one.
    pub(crate) hvc: Option<Hvc>,
    pub(crate) reports: Reports,
    reset: Arc<AtomicBool>,
    power: PowerSwitch,
    /// The interrupt of ACPI events, if the guest has ACPI.
    events: Option<Arc<Irq>>,
    /// Whether the guest may be the bare guest. A guest with ACPI is notified of its start from a
    /// saved state by an event.
    has_doorbell: bool,
}

impl Devices {
    /// Makes fresh devices, or restores saved ones. Either way they are quiesced until
    /// [`Devices::resume`].
    pub(crate) fn new(
        saved: Option<(&DevicesState, &[Backend])>,
        config: &VmConfig,
        prepared: &PreparedVm,
        ends: &mut Endpoints,
        report_port: bool,
    ) -> Result<Self, DeviceError> {
        let console = Console::default();
        let irq = Irq::new().map_err(DeviceError::Io)?;
        let serial = match saved {
            None => SerialConsole::new(irq, console.clone()),
            Some((state, _)) => SerialConsole::restore(&state.serial, irq, console.clone()).map_err(DeviceError::Io)?,
        };
        let serial = Arc::new(Mutex::new(serial));
        let i8042 = I8042::default();
        let reset = i8042.reset_line();
        let reports = Reports::default();

        let mut bus = PioBus::default();
        bus.add(COM1_BASE, SERIAL_PORTS, serial.clone())?;
        bus.add(I8042_BASE, I8042_PORTS, Arc::new(Mutex::new(i8042)))?;
        let control = PowerControl::default();
        let power = control.switch();
        let events = prepared.events.clone();
        if events.is_some() {
            bus.add(POWER_BASE, POWER_PORTS, Arc::new(Mutex::new(control)))?;
        }
        if report_port {
            let to = reports.clone();
            let port = ReportPort::new(move |report| to.push(report));
            bus.add(REPORT_PORT, REPORT_PORTS, Arc::new(Mutex::new(port)))?;
        }
        let has_doorbell = report_port && events.is_none();
        let made = virtio::make(saved, config, prepared, ends)?;
        let (virtio, hvc) = (made.devices, made.hvc);
        let mut mmio = MmioBus::default();
        for (at, device) in virtio.iter().enumerate() {
            let (base, _) = virtio_slot(at).ok_or(DeviceError::Mismatch { found: at, wanted: virtio.len() })?;
            mmio.add(base.0, MMIO_LEN, device.clone())?;
        }
        Ok(Self { bus, mmio, virtio, serial, console, hvc, reports, reset, power, events, has_doorbell })
    }

    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    /// Stops all work of the devices in guest memory, except transfers that the kernel holds. Calls
    /// are counted.
    pub(crate) fn quiesce(&self) {
        self.virtio.iter().for_each(|device| device.quiesce());
    }

    /// Undoes one [`Devices::quiesce`], or the one that devices are made with.
    pub(crate) fn resume(&self) {
        self.virtio.iter().for_each(|device| device.resume());
    }

    /// Runs `with` on the block device number `index`. Returns None without such a device.
    pub(crate) fn with_block<T>(&self, index: usize, with: impl FnOnce(&mut Block) -> T) -> Option<T> {
        // Disks have the first slots.
        self.virtio.get(index)?.with_device(|device| device.as_any().downcast_mut().map(with))
    }

    /// Runs `with` on device number `number` among those handled by `H`. Returns None without such
    /// a device.
    pub(crate) fn with_sync_device<H: DeviceOps, T>(
        &self,
        number: usize,
        with: impl FnOnce(&mut SyncDevice<H>) -> T,
    ) -> Option<T> {
        let is = |device: &&Arc<VirtioMmio>| device.with_device(|device| device.as_any().is::<SyncDevice<H>>());
        let device = self.virtio.iter().filter(is).nth(number)?;
        device.with_device(|device| device.as_any().downcast_mut().map(with))
    }

    pub(crate) fn pio_read(&self, port: u16, width: usize, data: &mut [u8]) {
        self.bus.read(port, width, data);
    }

    /// Returns a stop reason if the write ends the VM.
    pub(crate) fn pio_write(&self, port: u16, width: usize, data: &[u8]) -> Option<StopReason> {
        self.bus.write(port, width, data);
        // Relaxed: only this call sets it.
        let ended = if self.reset.load(Ordering::Relaxed) {
            StopReason::Reset
        } else if self.power.is_off() {
            StopReason::PowerOff
        } else {
            return None;
        };
        let exit = self.guest_notice().and_then(|notice| notice.exit);
        Some(exit.map_or(ended, |GuestExit { status, text }| StopReason::Exited { status, text }))
    }

    /// Returns what the guest has reported to its socket device. None without one.
    pub(crate) fn guest_notice(&self) -> Option<GuestNotice> {
        self.with_sync_device(0, |device| device.with(|vsock: &mut Vsock| vsock.notices().get())).flatten()
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        // Before the interrupt, at which the guest reads it.
        self.power.press();
        self.notify_events();
    }

    /// Whether the guest has read the last press of the power button.
    pub(crate) fn power_button_noticed(&self) -> bool {
        self.power.is_noticed()
    }

    /// Types into the console.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).type_in(bytes)
    }

    /// Runs `with` on the console's interrupt line.
    pub(crate) fn with_serial_irq<T>(&self, with: impl FnOnce(&Irq) -> T) -> T {
        with(self.serial.lock().unwrap_or_else(PoisonError::into_inner).irq())
    }

    /// Raises pending interrupts again: a spurious interrupt is harmless, a lost one hangs its
    /// driver.
    pub(crate) fn reraise(&self) {
        self.virtio.iter().for_each(|device| device.reraise());
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).reraise();
    }

    /// Rings the doorbell of all vCPUs of a guest that starts from a saved state: its mailbox may
    /// have changed since its vCPUs halted. Called after the interrupt controllers are restored,
    /// because a restore would lose the interrupt.
    pub(crate) fn ring_doorbells(&self, vm: &VmFd, cpus: u8) -> Result<(), kvm_ioctls::Error> {
        let rung = if self.has_doorbell { cpus } else { 0 };
        (0..rung).try_for_each(|vcpu| messages::interrupt(vm, vcpu, DOORBELL))
    }

    /// Notifies the guest of an ACPI event: its new generation, or the power button. Called after
    /// the interrupt controllers are restored, because a restore would lose the interrupt.
    pub(crate) fn notify_events(&self) {
        if let Some(irq) = &self.events
            && let Err(error) = irq.trigger()
        {
            // The eventfd's counter is full, so an interrupt is pending anyway.
            tracing::debug!(%error, "cannot signal an event to the guest again");
        }
    }

    /// Whether [`Devices::rewind`] to `state` is possible. Changes nothing.
    pub(crate) fn check(&self, state: &DevicesState) -> Result<(), DeviceError> {
        let (found, wanted) = (state.virtio.len(), self.virtio.len());
        if found != wanted {
            return Err(DeviceError::Mismatch { found, wanted });
        }
        Ok(self.virtio.iter().zip(&state.virtio).try_for_each(|(device, state)| device.check(state))?)
    }

    /// Cancels the transfers that the kernel holds, within `timeout` in total. Only while the
    /// devices are quiesced. Returns the place of the first device whose transfers do not end.
    /// After a resume, the devices submit them again.
    pub(crate) fn halt(&self, timeout: Duration) -> Option<usize> {
        let deadline = Instant::now() + timeout;
        self.virtio.iter().position(|device| !device.halt(deadline.saturating_duration_since(Instant::now())))
    }

    /// Restores another instant in place. Only while the devices are quiesced and halted.
    pub(crate) fn rewind(&self, state: &DevicesState, backends: &[Backend]) -> Result<(), DeviceError> {
        self.check(state)?;
        for ((device, state), backend) in self.virtio.iter().zip(&state.virtio).zip(backends) {
            device.rewind(state, backend)?;
        }
        // Reports, reset requests and presses until now belong to the time before the reset.
        self.reports.clear();
        self.reset.store(false, Ordering::Relaxed);
        self.power.rewind();
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).rewind(&state.serial).map_err(DeviceError::Io)
    }

    /// Saves all devices at this instant. Only while they are quiesced.
    pub(crate) fn save(&self) -> Result<SavedDevices, DeviceError> {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner).save();
        let saved = self.virtio.iter().map(|device| device.save()).collect::<Result<Vec<_>, _>>()?;
        let (virtio, backends) = saved.into_iter().unzip();
        Ok((DevicesState { serial, virtio }, backends))
    }
}
