//! COM1: a 16550 on the console.

use std::collections::VecDeque;
use std::io;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState as Uart16550};
use vm_superio::{Serial, Trigger};

use crate::bus::PioDevice;
use crate::console::Console;
use crate::irq::Irq;

/// First port.
pub const COM1_BASE: u16 = 0x3f8;
/// Number of its ports.
pub const SERIAL_PORTS: u16 = 8;
/// Its GSI.
pub const COM1_GSI: u32 = 4;
/// Maximum bytes of input that wait for the guest. Further input is dropped, as a UART does.
const MAX_PENDING: usize = 64 << 10;

/// The saved state of a UART.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl From<Uart16550> for SerialState {
    fn from(s: Uart16550) -> Self {
        Self {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer,
        }
    }
}

impl From<&SerialState> for Uart16550 {
    fn from(s: &SerialState) -> Self {
        Self {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer.clone(),
        }
    }
}

/// A UART whose output goes to a [`Console`], and whose input comes from
/// [`SerialConsole::type_in`].
#[derive(Debug)]
pub struct SerialConsole {
    uart: Serial<Irq, NoEvents, Console>,
    console: Console,
    /// Input that is not yet in the UART's FIFO.
    pending: VecDeque<u8>,
}

impl SerialConsole {
    /// A UART after reset.
    #[must_use]
    pub fn new(irq: Irq, console: Console) -> Self {
        Self { uart: Serial::new(irq, console.clone()), console, pending: VecDeque::new() }
    }

    /// A UART in a saved state. Input that was not yet in the FIFO stays with the UART that got it.
    ///
    /// # Errors
    /// When the state is not a UART's, or the interrupt cannot be raised.
    pub fn restore(state: &SerialState, irq: Irq, console: Console) -> io::Result<Self> {
        let uart = Serial::from_state(&state.into(), irq, NoEvents, console.clone())
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("serial state: {e:?}")))?;
        Ok(Self { uart, console, pending: VecDeque::new() })
    }

    /// Goes back to a saved state, in place, on the same line and console. The console keeps its
    /// output. Input that was not yet in the FIFO is dropped.
    ///
    /// # Errors
    /// As [`SerialConsole::restore`]. The UART is as before then.
    pub fn rewind(&mut self, state: &SerialState) -> io::Result<()> {
        *self = Self::restore(state, self.irq().clone(), self.console.clone())?;
        Ok(())
    }

    /// The UART's registers and FIFO.
    #[must_use]
    pub fn save(&self) -> SerialState {
        self.uart.state().into()
    }

    /// The interrupt line.
    #[must_use]
    pub fn irq(&self) -> &Irq {
        self.uart.interrupt_evt()
    }

    /// Raises the interrupt again if one is pending.
    pub fn reraise(&self) {
        // Bit 0 of the identification register is clear while an interrupt is pending.
        if self.uart.state().interrupt_identification & 1 == 0
            && let Err(error) = self.irq().trigger()
        {
            tracing::warn!(%error, "the console's interrupt could not be raised");
        }
    }

    /// Adds input. Returns how many bytes were taken.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        let room = MAX_PENDING - self.pending.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.pending.extend(taken);
        self.refill();
        taken.len()
    }

    /// Moves input into the FIFO as far as it has room.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.pending.len());
        // In loopback the UART takes no input; the bytes wait.
        if room == 0 {
            return;
        }
        let next: Vec<u8> = self.pending.iter().take(room).copied().collect();
        match self.uart.enqueue_raw_bytes(&next) {
            Ok(taken) => drop(self.pending.drain(..taken)),
            Err(error) => tracing::warn!(?error, "console input was not taken"),
        }
    }
}

/// Registers are a byte wide. The bus splits a wider access into accesses to successive registers.
impl PioDevice for SerialConsole {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = if register < SERIAL_PORTS { self.uart.read(register as u8) } else { 0xff };
        }
        if offset == 0 && !self.pending.is_empty() {
            self.refill();
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        for (register, byte) in (offset..SERIAL_PORTS).zip(data) {
            if let Err(error) = self.uart.write(register as u8, *byte) {
                tracing::debug!(?error, "serial write");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bus::PioBus;

    fn read(serial: &mut SerialConsole, offset: u16) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_console_and_long_input_the_guest() {
        let console = Console::default();
        let mut serial = SerialConsole::new(Irq::new().unwrap(), console.clone());
        b"hello".iter().for_each(|byte| serial.write(0, &[*byte]));
        assert_eq!(console.since(0), b"hello");

        let typed: Vec<u8> = (0..500u32).map(|i| i as u8).collect();
        assert_eq!(serial.type_in(&typed), 500);
        let mut got = Vec::new();
        while read(&mut serial, 5) & 1 != 0 {
            got.push(read(&mut serial, 0));
        }
        assert_eq!(got, typed, "more than the FIFO holds arrives whole and in order");
    }

    #[test]
    fn a_string_instruction_moves_as_many_bytes_as_it_says() {
        let console = Console::default();
        let mut serial = SerialConsole::new(Irq::new().unwrap(), console.clone());
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(serial.type_in(&typed), 200);
        let mut bus = PioBus::default();
        bus.add(COM1_BASE, SERIAL_PORTS, Arc::new(Mutex::new(serial))).unwrap();
        let mut got = [0; 200];
        bus.read(COM1_BASE, 1, &mut got);
        assert_eq!(got, *typed, "rep insb, more than the FIFO holds at once");
        bus.write(COM1_BASE, 1, b"rep outsb");
        assert_eq!(console.since(0), b"rep outsb");
        // An inw of the data register reads the data and the interrupt enable register.
        bus.write(COM1_BASE + 1, 1, &[5]);
        let mut word = [0xaa; 2];
        bus.read(COM1_BASE, 2, &mut word);
        assert_eq!(word, [0, 5]);
        bus.write(COM1_BASE, 2, &[b'!', 1]);
        bus.read(COM1_BASE + 1, 1, &mut word[..1]);
        assert_eq!((console.since(0).last(), word[0]), (Some(&b'!'), 1));
        let mut beyond = [0; 2];
        bus.read(COM1_BASE + 7, 2, &mut beyond);
        assert_eq!(beyond[1], 0xff);
    }

    #[test]
    fn a_restored_uart_goes_on_where_it_was() {
        let mut serial = SerialConsole::new(Irq::new().unwrap(), Console::default());
        serial.write(7, &[0x5a]);
        serial.write(1, &[1]);
        serial.type_in(b"abc");
        let state = serial.save();
        let mut child = SerialConsole::restore(&state, Irq::new().unwrap(), Console::default()).unwrap();
        assert_eq!(child.save(), state);
        assert_eq!((read(&mut child, 7), read(&mut child, 0)), (0x5a, b'a'));
        assert_eq!(serial.save(), state, "the child reads its own FIFO");
    }

    #[test]
    fn input_beyond_all_bounds_is_dropped() {
        let mut serial = SerialConsole::new(Irq::new().unwrap(), Console::default());
        let taken = serial.type_in(&vec![b'x'; 10 * MAX_PENDING]);
        assert!((MAX_PENDING..2 * MAX_PENDING).contains(&taken));
    }
}
