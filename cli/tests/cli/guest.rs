//! Guests of a few instructions, as ELFs with a PVH entry.
//!
//! | guest | after `ready` it waits for | then |
//! |---|---|---|
//! | [`write_guest`] | a byte on its serial line | writes `bye`, and resets the machine |
//! | [`write_button_guest`] | its power button | writes `bye`, and powers itself off |
//! | [`write_hasty_guest`] | nothing | writes `bye`, and powers itself off |
//! | [`write_echo_guest`] | bytes on its serial line | writes each in the other case, and one page of memory |
//! | [`write_login_guest`] | nothing, and writes `login: ` instead, without a line end | halts |
//! | [`write_faulting_guest`] | nothing | faults with no handler: a triple fault |

use std::path::Path;

const LOAD: u32 = 0x10_0000;
const COM1: u16 = 0x3f8;
/// Offset of the code in the file: after the header, two program headers and the note.
const HEADERS: u64 = 64 + 2 * 56;
const NOTE: usize = 20;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PVH_ENTRY: u32 = 18;

/// 32-bit code that writes `text` to the serial line.
fn write(code: &mut Vec<u8>, text: &str) {
    // mov edx, COM1
    code.push(0xba);
    code.extend(u32::from(COM1).to_le_bytes());
    for byte in text.bytes() {
        // mov al, byte; out dx, al
        code.extend([0xb0, byte, 0xee]);
    }
}

fn code() -> Vec<u8> {
    let mut code = Vec::new();
    write(&mut code, "ready\n");
    // mov edx, COM1 + 5; again: in al, dx; test al, 1; jz again
    code.push(0xba);
    code.extend(u32::from(COM1 + 5).to_le_bytes());
    code.extend([0xec, 0xa8, 0x01, 0x74, 0xfb]);
    write(&mut code, "bye\n");
    // mov al, 0xfe; out 0x64, al; jmp $
    code.extend([0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe]);
    code
}

/// Address that the echoing guest writes to.
const FILLED: u32 = 0x40_0000;
/// Pages that it fills.
pub(crate) const ECHO_PAGES: u32 = 512;

/// The power button's port, and the sleep control port with the value that switches off.
const BUTTON: u16 = 0x602;
const SLEEP_CONTROL: u16 = 0x600;
const SOFT_OFF: u8 = 5 << 2 | 1 << 5;

fn button_code() -> Vec<u8> {
    let mut code = Vec::new();
    write(&mut code, "ready\n");
    // mov edx, BUTTON; again: in al, dx; test al, 1; jz again
    code.push(0xba);
    code.extend(u32::from(BUTTON).to_le_bytes());
    code.extend([0xec, 0xa8, 0x01, 0x74, 0xfb]);
    power_off(code)
}

/// Returns code that writes `bye`, and switches off.
fn power_off(mut code: Vec<u8>) -> Vec<u8> {
    write(&mut code, "bye\n");
    // mov edx, SLEEP_CONTROL; mov al, SOFT_OFF; out dx, al; jmp $
    code.push(0xba);
    code.extend(u32::from(SLEEP_CONTROL).to_le_bytes());
    code.extend([0xb0, SOFT_OFF, 0xee, 0xeb, 0xfe]);
    code
}

/// Writes the guest that ends after a byte of input.
pub(crate) fn write_guest(path: &Path) {
    write_elf(path, &code());
}

/// Writes the guest that ends at its power button.
pub(crate) fn write_button_guest(path: &Path) {
    write_elf(path, &button_code());
}

/// Writes the guest that ends at once.
pub(crate) fn write_hasty_guest(path: &Path) {
    write_elf(path, &power_off(Vec::new()));
}

/// Writes the guest that echoes input: letters in the other case. The guest first fills
/// [`ECHO_PAGES`] pages, and writes to the next of them with each byte.
pub(crate) fn write_echo_guest(path: &Path) {
    let mut code = vec![0xb9];
    code.extend(ECHO_PAGES.to_le_bytes());
    // mov ecx, ECHO_PAGES; mov edi, FILLED; fill: mov [edi], edi; add edi, 4096; dec ecx; jnz fill
    code.push(0xbf);
    code.extend(FILLED.to_le_bytes());
    code.extend([0x89, 0x3f, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x49, 0x75, 0xf5]);
    write(&mut code, "ready\r\n");
    // mov edi, FILLED; again: mov edx, COM1 + 5; wait: in al, dx; test al, 1; jz wait
    code.push(0xbf);
    code.extend(FILLED.to_le_bytes());
    code.push(0xba);
    code.extend(u32::from(COM1 + 5).to_le_bytes());
    code.extend([0xec, 0xa8, 0x01, 0x74, 0xfb]);
    // mov edx, COM1; in al, dx; mov [edi], eax; add edi, 4096; xor al, 0x20; out dx, al; jmp again
    code.push(0xba);
    code.extend(u32::from(COM1).to_le_bytes());
    code.extend([0xec, 0x89, 0x07, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x34, 0x20, 0xee, 0xeb, 0xe3]);
    write_elf(path, &code);
}

/// Writes the guest whose output ends within its first line.
pub(crate) fn write_login_guest(path: &Path) {
    let mut code = Vec::new();
    write(&mut code, "login: ");
    // again: hlt; jmp again
    code.extend([0xf4, 0xeb, 0xfd]);
    write_elf(path, &code);
}

/// Writes the guest that faults.
pub(crate) fn write_faulting_guest(path: &Path) {
    let mut code = Vec::new();
    write(&mut code, "ready\n");
    // lidt [no_table]; ud2; no_table: a limit of 0.
    code.extend([0x0f, 0x01, 0x1d]);
    let table = LOAD + code.len() as u32 + 4 + 2;
    code.extend(table.to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code.extend([0; 6]);
    write_elf(path, &code);
}

fn write_elf(path: &Path, code: &[u8]) {
    let at = HEADERS + NOTE as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // ET_EXEC for x86-64, its entry, program headers behind the header, no sections.
    elf.extend([2u16, 62].map(u16::to_le_bytes).concat());
    elf.extend(1u32.to_le_bytes());
    elf.extend([u64::from(LOAD), 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    let mut segment = |kind: u32, offset: u64, address: u64, size: u64| {
        elf.extend([kind, 7].map(u32::to_le_bytes).concat());
        elf.extend([offset, address, address, size, size, 4].map(u64::to_le_bytes).concat());
    };
    segment(1, at, LOAD.into(), code.len() as u64);
    segment(4, HEADERS, 0, NOTE as u64);
    elf.extend([4u32, 4, PVH_ENTRY].map(u32::to_le_bytes).concat());
    elf.extend(b"Xen\0");
    elf.extend(LOAD.to_le_bytes());
    assert_eq!(elf.len() as u64, at);
    elf.extend(code);
    std::fs::write(path, elf).unwrap();
}
