//! The channel between the bare guest and the host: the guest writes a port, and the host
//! interrupts a vCPU.

use std::fmt;
use std::time::Instant;

use crate::bus::PioDevice;

/// Its port.
pub const REPORT_PORT: u16 = 0xf4;
/// Number of its ports: one register of 32 bits.
pub const REPORT_PORTS: u16 = 4;

/// The vector of the interrupt that wakes a vCPU of the bare guest.
pub const DOORBELL: u8 = 48;

/// One word from the guest, and when it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortReport {
    /// The word written.
    pub word: u32,
    /// When the VMM saw it.
    pub at: Instant,
}

/// A port that calls back for every write of 32 bits, without state to save.
pub struct ReportPort(Box<dyn FnMut(PortReport) + Send>);

impl fmt::Debug for ReportPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReportPort")
    }
}

impl ReportPort {
    /// A port that calls `told` on the vCPU's thread.
    pub fn new(told: impl FnMut(PortReport) + Send + 'static) -> Self {
        Self(Box::new(told))
    }
}

impl PioDevice for ReportPort {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let (0, Ok(word)) = (offset, data.try_into().map(u32::from_le_bytes)) {
            (self.0)(PortReport { word, at: Instant::now() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn whole_words_only() {
        let (tx, rx) = mpsc::channel();
        let mut port = ReportPort::new(move |r| tx.send(r.word).unwrap());
        port.write(0, &[1]);
        port.write(0, &[1, 2, 0, 0]);
        port.write(2, &[1, 2, 0, 0]);
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), vec![0x201]);
    }
}
