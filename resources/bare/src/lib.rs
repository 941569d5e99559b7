//! The guests that tests and benchmarks boot.
//!
//! [`BARE_ELF`] is a kernel of a few kilobytes that takes orders through memory; [`abi`] is everything the host has to
//! know to give them. Its source is in `guest/`, and `build.rs` compiles it together with this crate.

pub mod abi;

/// The bare guest: an ELF image linked at 2 MiB with a PVH note, and a 64-bit Linux entry as its ELF entry point.
pub const BARE_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/clade-bare"));
