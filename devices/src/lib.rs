//! Device models of Clade.
//!
//! Devices here know no KVM: they are handed port accesses by a [`PioBus`], raise interrupts through an [`Irq`], and save
//! themselves as plain values. What they do not do: they do not touch guest memory (no device here does DMA), and they start no threads.

#![forbid(unsafe_code)]

mod bus;
mod console;
mod i8042;
mod irq;
mod report;
mod serial;

pub use bus::{BusError, PioBus, PioDevice};
pub use console::Console;
pub use i8042::{I8042, I8042_BASE, I8042_PORTS};
pub use irq::Irq;
pub use report::{REPORT_PORTS, Report, ReportPort};
pub use serial::{COM1_BASE, COM1_GSI, SERIAL_PORTS, SerialConsole, SerialState};
