//! Any sequence of port accesses and keystrokes: the UART goes on, and a saved one continues as the original does.
#![no_main]

use clade_devices::{Console, Irq, PioDevice, SerialConsole};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<(u8, u8, Vec<u8>)>| {
    let mut uart = SerialConsole::new(Irq::new().expect("an eventfd"), Console::default());
    for (what, port, bytes) in steps {
        let offset = u16::from(port % 8);
        match what % 4 {
            0 => uart.write(offset, &bytes),
            1 => uart.read(offset, &mut bytes.clone()),
            2 => drop(uart.type_in(&bytes)),
            _ => {
                let state = uart.save();
                let irq = Irq::new().expect("an eventfd");
                let restored = SerialConsole::restore(&state, irq, Console::default()).expect("its own state");
                assert_eq!(restored.save(), state);
            }
        }
    }
});
