//! The keyboard controller. A microVM needs only its reset line.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

use crate::bus::PioDevice;

/// Its first port: data at 0x60.
pub const I8042_BASE: u16 = 0x60;
/// Number of its ports, up to the command port at 0x64.
pub const I8042_PORTS: u16 = 5;

#[derive(Clone, Default)]
struct ResetLine(Arc<AtomicBool>);

impl Trigger for ResetLine {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        // Relaxed: only the vCPU thread that wrote the port reads it.
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// An i8042 that records a reset by the guest.
pub struct I8042 {
    device: I8042Device<ResetLine>,
    line: ResetLine,
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "I8042(reset asked for: {})", self.line.0.load(Ordering::Relaxed))
    }
}

impl Default for I8042 {
    fn default() -> Self {
        let line = ResetLine::default();
        Self { device: I8042Device::new(line.clone()), line }
    }
}

impl I8042 {
    /// Whether the guest has pulled the reset line. The handle can be read without the device.
    #[must_use]
    pub fn reset_line(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.line.0)
    }
}

impl PioDevice for I8042 {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.device.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let Some(first) = data.first() {
            let Ok(()) = self.device.write(offset as u8, *first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_asks_for_a_reset() {
        let mut device = I8042::default();
        let line = device.reset_line();
        device.write(4, &[0xd1]);
        device.write(0, &[0xfe]);
        assert!(!line.load(Ordering::Relaxed));
        device.write(4, &[0xfe]);
        assert!(line.load(Ordering::Relaxed));
    }
}
