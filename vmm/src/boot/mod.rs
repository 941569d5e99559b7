//! Loading a guest into memory, and the initial state of its boot vCPU.
//!
//! `load` writes the kernel, the initramfs, the command line, the memory map and the MP table. It
//! returns the `BootEntry`, which determines the boot vCPU's registers. Application processors wait
//! for INIT-SIPI and need nothing.
//!
//! A kernel image is recognized by its content, never by its name:
//!
//! | content | entry |
//! |---|---|
//! | ELF with a PVH note | `BootEntry::Pvh`: 32-bit, no paging, memory map in `hvm_start_info` |
//! | ELF without a PVH note | `BootEntry::Linux64`: long mode, memory map in the zero page |
//! | bzImage (a distribution's `vmlinuz`) | as the ELF in its payload, unpacked on the host |
//! | compressed ELF | as the ELF, unpacked on the host |
//!
//! `write_acpi_tables` writes the ACPI tables; `load` passes their address to the kernel.
//!
//! Not done here: real-mode boot, EFI, KASLR relocation, 32-bit kernels.

mod acpi;
mod bzimage;
mod elf;
mod image;
mod initrd;
mod layout;
mod linux64;
mod load;
mod mptable;
mod pvh;
mod regs;
#[cfg(test)]
mod testutil;
mod unpack;

pub(crate) use acpi::write_acpi_tables;
pub use bzimage::BzImageError;
pub use elf::ElfError;
pub use image::{BootImage, BootImageError};
pub use initrd::InitrdError;
pub(crate) use layout::GuestRamRanges;
pub use layout::LayoutError;
pub(crate) use load::{BootEntry, Firmware, load};
pub use load::{BootError, BootSource};
pub use mptable::MpTableError;
pub(crate) use regs::BOOT_MSRS;
#[cfg(feature = "fuzzing")]
pub(crate) use unpack::unpack;
pub use unpack::{Codec, UnpackError};
