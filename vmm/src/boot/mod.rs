//! Loading a guest into memory, and the state in which its first vCPU starts.
//!
//! `load` writes the kernel, the initramfs, the command line, the memory map and the MP table. It
//! returns the `Entry` from which the boot vCPU's registers follow. Application processors wait for
//! INIT-SIPI and need nothing.
//!
//! A kernel image is recognized by its content, never by its name:
//!
//! | content | how it is started |
//! |---|---|
//! | ELF with a PVH note | `Entry::Pvh`: 32-bit, no paging, memory map in `hvm_start_info` |
//! | ELF without one | `Entry::Linux64`: long mode, memory map in the zero page |
//! | bzImage (a distribution's `vmlinuz`) | its payload is unpacked here, on the host; the ELF inside is started as above |
//! | an ELF compressed as a whole | the same |
//!
//! Not done here: real-mode boot, EFI, KASLR relocation, ACPI tables (their address is passed
//! through), 32-bit kernels.

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
pub use image::{Image, ImageError};
pub use initrd::InitrdError;
pub use layout::LayoutError;
pub(crate) use layout::RamLayout;
pub use load::{BootError, BootSource};
pub(crate) use load::{Entry, Firmware, load};
pub use mptable::MpTableError;
pub(crate) use regs::BOOT_MSRS;
#[cfg(feature = "fuzzing")]
pub(crate) use unpack::unpack;
pub use unpack::{Codec, UnpackError};
