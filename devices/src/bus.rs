//! The port I/O bus.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::ranges::RangeMap;

/// A device at a range of ports.
pub trait PioDevice: Send + fmt::Debug {
    /// One IN of `data.len()` bytes, at `offset` from the device's base.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// One OUT of `data`, at `offset` from the device's base.
    fn write(&mut self, offset: u16, data: &[u8]);
}

/// The ports of two devices overlap.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("ports {base:#x}..{end:#x} overlap a device at {other:#x}")]
pub struct BusError {
    base: u16,
    end: u16,
    other: u16,
}

/// The devices on ports. Ports without a device read as all ones and ignore writes, as on a PC.
#[derive(Clone, Debug, Default)]
pub struct PioBus {
    devices: RangeMap<Arc<Mutex<dyn PioDevice>>>,
}

impl PioBus {
    /// Adds a device at `base..base + ports`.
    ///
    /// # Errors
    /// When another device has one of the ports.
    pub fn add(&mut self, base: u16, ports: u16, device: Arc<Mutex<dyn PioDevice>>) -> Result<(), BusError> {
        let range = u64::from(base)..u64::from(base) + u64::from(ports);
        let overlap = |other: u64| BusError { base, end: base.saturating_add(ports), other: other as u16 };
        self.devices.insert(range, device).map_err(overlap)
    }

    fn find(&self, port: u16) -> Option<(MutexGuard<'_, dyn PioDevice + 'static>, u16)> {
        let (device, offset) = self.devices.find(u64::from(port), 1)?;
        Some((device.lock().unwrap_or_else(PoisonError::into_inner), offset as u16))
    }

    /// Handles the guest's INs from one port, each `width` bytes wide: one, or as many as a string
    /// instruction (`rep ins`) makes. KVM exits once for all of them, and the device is read once
    /// for each.
    pub fn read(&self, port: u16, width: usize, data: &mut [u8]) {
        match self.find(port) {
            Some((mut device, offset)) => {
                data.chunks_mut(width.max(1)).for_each(|data| device.read(offset, data));
            }
            None => data.fill(0xff),
        }
    }

    /// Handles the guest's OUTs to one port, as [`PioBus::read`] handles INs.
    pub fn write(&self, port: u16, width: usize, data: &[u8]) {
        if let Some((mut device, offset)) = self.find(port) {
            data.chunks(width.max(1)).for_each(|data| device.write(offset, data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Last(Vec<(u16, Vec<u8>)>);
    impl PioDevice for Last {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u16, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn routes_by_range_and_floats_elsewhere() {
        let mut bus = PioBus::default();
        let device = Arc::new(Mutex::new(Last::default()));
        bus.add(0x3f8, 8, device.clone()).unwrap();
        assert!(bus.add(0x3ff, 1, device.clone()).is_err());
        bus.add(0x400, 1, Arc::new(Mutex::new(Last::default()))).unwrap();
        let mut byte = [0];
        bus.read(0x3fb, 1, &mut byte);
        assert_eq!(byte, [3]);
        bus.read(0x401, 1, &mut byte);
        assert_eq!(byte, [0xff]);
        bus.write(0x3f9, 2, &[1, 2]);
        bus.write(0x100, 1, &[9]);
        assert_eq!(device.lock().unwrap().0, vec![(1, vec![1, 2])]);
    }

    #[test]
    fn a_string_instruction_is_as_many_accesses_as_it_makes() {
        #[derive(Debug, Default)]
        struct Counter(u8);
        impl PioDevice for Counter {
            fn read(&mut self, _offset: u16, data: &mut [u8]) {
                self.0 += 1;
                data.fill(self.0);
            }
            fn write(&mut self, _offset: u16, data: &[u8]) {
                self.0 += data.len() as u8;
            }
        }
        let (mut bus, last) = (PioBus::default(), Arc::new(Mutex::new(Last::default())));
        bus.add(0, 1, Arc::new(Mutex::new(Counter::default()))).unwrap();
        bus.add(8, 1, last.clone()).unwrap();
        let mut bytes = [0; 4];
        bus.read(0, 1, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);
        bus.read(0, 2, &mut bytes);
        assert_eq!(bytes, [5, 5, 6, 6]);
        bus.write(8, 2, &[1, 2, 3, 4]);
        assert_eq!(last.lock().unwrap().0, vec![(0, vec![1, 2]), (0, vec![3, 4])]);
    }
}
