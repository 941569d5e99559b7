//! The power switch of a guest with ACPI: soft off for the guest, and the button that the host
//! presses.
//!
//! | offset | name | use |
//! |---|---|---|
//! | 0 | sleep control | sleep state and enable bit, written by the guest; S5 ends the VM |
//! | 1 | sleep status | 0: the VM never wakes from a sleep |
//! | 2 | button | 1 if the button was pressed since the last read, which clears it |
//!
//! A press is never saved. A child, a restored VM and a VM that was reset find the button not
//! pressed, because a press for one VM must not end another.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::PioDevice;

/// First port.
pub const POWER_BASE: u16 = 0x600;
/// Number of its ports.
pub const POWER_PORTS: u16 = 3;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the button's register.
pub const BUTTON: u16 = 2;
/// The sleep state of soft off, as in `_S5_`.
pub const SOFT_OFF: u8 = 5;
/// Position of the sleep state in the control register, and its number of bits.
const STATE_SHIFT: u8 = 2;
const STATE_MASK: u8 = 7;
/// Enters the state.
const ENABLE: u8 = 1 << 5;

#[derive(Debug, Default)]
struct Lines {
    is_off: AtomicBool,
    is_pressed: AtomicBool,
    is_noticed: AtomicBool,
}

/// The host's side of the switch. Clones refer to the same one.
#[derive(Clone, Debug, Default)]
pub struct PowerSwitch(Arc<Lines>);

impl PowerSwitch {
    /// Presses the button. The guest reads it once it is interrupted.
    pub fn press(&self) {
        self.0.is_noticed.store(false, Ordering::Relaxed);
        // Release: pairs with the guest's read.
        self.0.is_pressed.store(true, Ordering::Release);
    }

    /// Whether the guest has read the last press.
    #[must_use]
    pub fn is_noticed(&self) -> bool {
        self.0.is_noticed.load(Ordering::Relaxed)
    }

    /// Whether the guest has switched itself off.
    #[must_use]
    pub fn is_off(&self) -> bool {
        // Relaxed: the vCPU thread that wrote the port reads it.
        self.0.is_off.load(Ordering::Relaxed)
    }

    /// Back to the state of a VM that starts: neither off nor pressed.
    pub fn rewind(&self) {
        for line in [&self.0.is_off, &self.0.is_pressed, &self.0.is_noticed] {
            line.store(false, Ordering::Relaxed);
        }
    }
}

/// The registers.
#[derive(Default)]
pub struct PowerControl(PowerSwitch);

impl fmt::Debug for PowerControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PowerControl(off: {})", self.0.is_off())
    }
}

impl PowerControl {
    /// The host's side.
    #[must_use]
    pub fn switch(&self) -> PowerSwitch {
        self.0.clone()
    }
}

impl PioDevice for PowerControl {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        // Acquire: pairs with the press.
        if offset == BUTTON
            && let Some(first) = data.first_mut()
            && self.0.0.is_pressed.swap(false, Ordering::Acquire)
        {
            *first = 1;
            self.0.0.is_noticed.store(true, Ordering::Relaxed);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        let soft_off = ENABLE | SOFT_OFF << STATE_SHIFT;
        if let (SLEEP_CONTROL, Some(value)) = (offset, data.first())
            && value & (ENABLE | STATE_MASK << STATE_SHIFT) == soft_off
        {
            self.0.0.is_off.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn button(device: &mut PowerControl) -> u8 {
        let mut byte = [0xff];
        device.read(BUTTON, &mut byte);
        byte[0]
    }

    #[test]
    fn only_soft_off_with_the_enable_bit_switches_off() {
        let mut device = PowerControl::default();
        let switch = device.switch();
        for value in [0, SOFT_OFF << 2, ENABLE, ENABLE | 3 << 2, ENABLE | 4 << 2] {
            device.write(SLEEP_CONTROL, &[value]);
            assert!(!switch.is_off(), "{value:#x}");
        }
        device.write(SLEEP_STATUS, &[0x34]);
        device.write(BUTTON, &[0x34]);
        assert!(!switch.is_off());
        device.write(SLEEP_CONTROL, &[0x34]);
        assert!(switch.is_off());
        switch.rewind();
        assert!(!switch.is_off());
    }

    #[test]
    fn a_press_is_read_once_and_a_rewind_forgets_it() {
        let mut device = PowerControl::default();
        let switch = device.switch();
        assert_eq!((button(&mut device), switch.is_noticed()), (0, false));
        switch.press();
        let mut status = [0xff];
        device.read(SLEEP_STATUS, &mut status);
        assert_eq!((status, switch.is_noticed()), ([0], false), "another register");
        assert_eq!((button(&mut device), switch.is_noticed(), button(&mut device)), (1, true, 0));
        switch.press();
        assert!(!switch.is_noticed(), "that was the press before");
        switch.rewind();
        assert_eq!((button(&mut device), switch.is_noticed()), (0, false));
    }
}
