//! The devices of one VM, on its bus.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clade_devices::{
    COM1_BASE, Console, I8042, I8042_BASE, I8042_PORTS, Irq, PioBus, REPORT_PORTS, Report, ReportPort, SERIAL_PORTS,
    SerialConsole, SerialState,
};
use clade_guests::abi::REPORT_PORT;
use serde::{Deserialize, Serialize};

/// Most reports kept for a reader that does not come. A guest can write the port for ever; the oldest go first.
const MOST_REPORTS: usize = 4_096;

/// What the bare guest has reported and nobody has read yet.
#[derive(Clone, Debug, Default)]
pub struct Reports(Arc<(Mutex<VecDeque<Report>>, Condvar)>);

impl Reports {
    fn push(&self, report: Report) {
        let mut queue = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() == MOST_REPORTS {
            queue.pop_front();
        }
        queue.push_back(report);
        self.0.1.notify_all();
    }

    /// The next report, if one comes within `patience`.
    #[must_use]
    pub fn next(&self, patience: Duration) -> Option<Report> {
        let deadline = Instant::now() + patience;
        let mut queue = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(report) = queue.pop_front() {
                return Some(report);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            queue = self.0.1.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Saved state of all devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    serial: SerialState,
}

/// A VM's devices.
#[derive(Debug)]
pub(crate) struct Devices {
    bus: PioBus,
    serial: Arc<Mutex<SerialConsole>>,
    pub(crate) console: Console,
    pub(crate) reports: Reports,
    reset: Arc<AtomicBool>,
}

impl Devices {
    /// Fresh devices, or devices as they were saved.
    pub(crate) fn new(state: Option<&DeviceState>, report_port: bool) -> io::Result<Self> {
        let console = Console::default();
        let serial = match state {
            None => SerialConsole::new(Irq::new()?, console.clone()),
            Some(state) => SerialConsole::restore(&state.serial, Irq::new()?, console.clone())?,
        };
        let serial = Arc::new(Mutex::new(serial));
        let i8042 = I8042::default();
        let reset = i8042.reset_line();
        let reports = Reports::default();

        let mut bus = PioBus::default();
        bus.add(COM1_BASE, SERIAL_PORTS, serial.clone()).map_err(io::Error::other)?;
        bus.add(I8042_BASE, I8042_PORTS, Arc::new(Mutex::new(i8042))).map_err(io::Error::other)?;
        if report_port {
            let to = reports.clone();
            let port = ReportPort::new(move |report| to.push(report));
            bus.add(REPORT_PORT, REPORT_PORTS, Arc::new(Mutex::new(port))).map_err(io::Error::other)?;
        }
        Ok(Self { bus, serial, console, reports, reset })
    }

    pub(crate) fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.read(port, data);
    }

    /// Returns whether the guest has asked for a reset by it.
    pub(crate) fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        self.bus.write(port, data);
        // Relaxed: set by this very call, if at all.
        self.reset.load(Ordering::Relaxed)
    }

    /// Types into the console.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).type_in(bytes)
    }

    /// Runs `with` on the console's interrupt line.
    pub(crate) fn with_serial_irq<T>(&self, with: impl FnOnce(&Irq) -> T) -> T {
        with(self.serial.lock().unwrap_or_else(PoisonError::into_inner).irq())
    }

    /// Raises again what the console has pending: a spurious interrupt does no harm, a lost one hangs the console.
    pub(crate) fn reraise(&self) {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).reraise();
    }

    pub(crate) fn save(&self) -> DeviceState {
        DeviceState { serial: self.serial.lock().unwrap_or_else(PoisonError::into_inner).save() }
    }
}
