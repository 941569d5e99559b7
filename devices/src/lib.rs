//! Device models of Clade.
//!
//! Devices here do not know KVM. They get the guest's accesses from a [`PioBus`] or an [`MmioBus`],
//! raise interrupts through an [`Irq`], and save themselves as plain values. The devices in
//! [`virtio`] do DMA, through pins, and have a thread each while a driver uses them. The
//! storage of the block device is in `clade_block`.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod bus;
mod console;
mod i8042;
mod irq;
mod mmio;
mod power;
mod ranges;
mod report;
mod serial;
pub mod virtio;

pub use bus::{BusError, PioBus, PioDevice};
pub use console::Console;
pub use i8042::{I8042, I8042_BASE, I8042_PORTS};
pub use irq::Irq;
pub use mmio::{MmioBus, MmioBusError, MmioDevice};
pub use power::{BUTTON, POWER_BASE, POWER_PORTS, PowerControl, PowerSwitch, SLEEP_CONTROL, SLEEP_STATUS, SOFT_OFF};
pub use report::{DOORBELL, PortReport, REPORT_PORT, REPORT_PORTS, ReportPort};
pub use serial::{COM1_BASE, COM1_GSI, SERIAL_PORTS, SerialConsole, SerialState};
