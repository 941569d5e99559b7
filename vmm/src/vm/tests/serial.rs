//! The serial port, accessed by a guest's string instructions.

use std::sync::Arc;

use clade_memory::Store;
use clade_test_support::wait_until;

use crate::boot::{BootImage, BootSource};
use crate::kvm::testutil::{elf, host};
use crate::vm::{Context, Vm, VmConfig};

const TYPED: &[u8] = b"typed";

/// Waits for input at COM1, takes five bytes by `rep insb`, and writes them by `rep outsb`:
///
/// ```text
/// 1: mov dx, 0x3fd; in al, dx; test al, 1; jz 1b
/// mov dx, 0x3f8; mov ecx, 5; mov rdi, 0x180000; cld; rep insb
/// mov ecx, 5; mov rsi, 0x180000; rep outsb; 2: jmp 2b
/// ```
const ECHO: [u8; 44] = [
    0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xb9, 5, 0, 0, 0, 0x48, 0xc7, 0xc7,
    0, 0, 0x18, 0, 0xfc, 0xf3, 0x6c, 0xb9, 5, 0, 0, 0, 0x48, 0xc7, 0xc6, 0, 0, 0x18, 0, 0xf3, 0x6e, 0xeb, 0xfe,
];

#[test]
fn string_instructions_lose_no_byte_of_the_serial_port() {
    let Some(host) = host() else { return };
    let context = Context::new(Arc::new(host), Store::open_small().unwrap()).unwrap();
    let config = Arc::new(VmConfig::bare(32 << 20, 1).unwrap());
    let kernel = BootImage::Bytes(elf(&ECHO).into());
    let source = BootSource::new(kernel);
    let vm = Vm::boot(&context, "echo", &config, &source).unwrap();
    // All at once: the whole text is in the FIFO when the guest finds the first byte.
    assert_eq!(vm.type_in(TYPED), TYPED.len());
    wait_until("the echo of all that was typed", || {
        assert!(vm.stopped().is_none(), "{:?}", vm.stopped());
        vm.console().since(0).len() >= TYPED.len()
    });
    assert_eq!(vm.console().since(0), TYPED);
}
