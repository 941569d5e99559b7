//! The memory-mapped I/O bus.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::ranges::RangeMap;

/// A device at a range of addresses. All vCPUs call it concurrently.
pub trait MmioDevice: Send + Sync + fmt::Debug {
    /// The guest reads `data.len()` bytes at `offset` from the device's base.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` from the device's base.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device cannot have a range.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MmioBusError {
    /// The addresses of two devices overlap.
    #[error("addresses {base:#x}..{end:#x} overlap a device at {other:#x}")]
    Overlap {
        /// First address of the new device.
        base: u64,
        /// The address after the new device's last one.
        end: u64,
        /// First address of the other device.
        other: u64,
    },
    /// The range is empty, or leaves the address space.
    #[error("invalid address range: {len:#x} bytes at {base:#x}")]
    NoRange {
        /// First address of the range.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// The devices on addresses. Addresses without a device read as all ones and ignore writes.
#[derive(Clone, Debug, Default)]
pub struct MmioBus {
    devices: RangeMap<Arc<dyn MmioDevice>>,
}

impl MmioBus {
    /// Adds a device at `base..base + len`.
    ///
    /// # Errors
    /// When another device has one of the addresses, or the range is not valid.
    pub fn add(&mut self, base: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<(), MmioBusError> {
        let end = base.checked_add(len).filter(|end| *end > base).ok_or(MmioBusError::NoRange { base, len })?;
        self.devices.insert(base..end, device).map_err(|other| MmioBusError::Overlap { base, end, other })
    }

    /// Handles the guest's load.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.devices.find(address, data.len() as u64) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Handles the guest's store.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.devices.find(address, data.len() as u64) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Last(Mutex<Vec<(u64, Vec<u8>)>>);
    impl MmioDevice for Last {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn routes_by_range_and_floats_elsewhere() {
        let mut bus = MmioBus::default();
        let device = Arc::new(Last::default());
        bus.add(0xd000_0000, 0x1000, device.clone()).unwrap();
        let overlap = bus.add(0xd000_0fff, 1, device.clone()).unwrap_err();
        assert_eq!(overlap.to_string(), "addresses 0xd0000fff..0xd0001000 overlap a device at 0xd0000000");
        assert!(matches!(bus.add(u64::MAX, 2, device.clone()), Err(MmioBusError::NoRange { .. })));
        assert!(matches!(bus.add(0, 0, device.clone()), Err(MmioBusError::NoRange { .. })));
        bus.add(0xd000_1000, 0x1000, Arc::new(Last::default())).unwrap();
        let mut bytes = [0; 4];
        bus.read(0xd000_0010, &mut bytes);
        assert_eq!(bytes, [0x10; 4]);
        // Across the end of a device: no device has all of it.
        bus.read(0xd000_0ffe, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        bus.write(0xd000_0050, &[1, 0, 0, 0]);
        bus.write(0xd000_0ffe, &[9; 4]);
        bus.write(0xc000_0000, &[9; 4]);
        assert_eq!(*device.0.lock().unwrap(), vec![(0x50, vec![1, 0, 0, 0])]);
    }
}
