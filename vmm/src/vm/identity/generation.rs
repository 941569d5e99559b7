//! The generation of a VM, which a guest reads to detect that it was cloned or reset.
//!
//! Two pages of the guest's memory, announced in ACPI:
//!
//! - the 128-bit generation id, from which Linux and Windows seed their random number generators
//!   anew;
//! - a VMClock, whose counter user space may map and read without a system call.
//!
//! Both change in every child, in every restored VM and at every reset, before its first
//! instruction. An interrupt notifies the guest. The VMClock does not provide the time: precise
//! time comes from the kvm-clock.

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::platform::{GENERATION_ID, PAGE_SIZE, VMCLOCK};

/// "VCLK".
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
/// No counter provides the time.
const COUNTER_INVALID: u8 = 0xff;
const TIME_TAI: u8 = 1;
/// A generation counter, and notifications.
const FLAGS: u64 = 1 << 7 | 1 << 8;
const SEQ_COUNT: u64 = 0x0c;
const DISRUPTION_MARKER: u64 = 0x10;
const FLAGS_AT: u64 = 0x18;
const GENERATION_COUNTER: u64 = 0x68;

/// A VM's generation id: random, and different in every VM and after every reset.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GenerationId(pub [u8; 16]);

impl fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Hidden, because the guest seeds its random numbers from the id.
        f.write_str("GenerationId(..)")
    }
}

/// Why a VM has no new generation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// The host has no random bytes.
    #[error("no random bytes for a generation id")]
    Random(#[source] io::Error),
    /// The pages of the id and the VMClock cannot be read or written.
    #[error("the generation id cannot be put into the guest's memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the first generation of a booting VM to its memory.
pub(crate) fn begin<M: GuestMemoryBackend>(mem: &M) -> Result<(), GenerationError> {
    let field = |at: u64| GuestAddress(VMCLOCK.0 + at);
    mem.write_obj(MAGIC, field(0))?;
    mem.write_obj(PAGE_SIZE as u32, field(4))?;
    mem.write_obj(VERSION, field(8))?;
    mem.write_slice(&[COUNTER_INVALID, TIME_TAI], field(10))?;
    mem.write_obj(FLAGS, field(FLAGS_AT))?;
    renew(mem)
}

/// Writes another generation to the memory of a VM, whose vCPUs must not run.
pub(crate) fn renew<M: GuestMemoryBackend>(mem: &M) -> Result<(), GenerationError> {
    let mut id = [0; 16];
    // getrandom never returns part of up to 256 bytes.
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| GenerationError::Random(error.into()))?;
    let field = |at: u64| GuestAddress(VMCLOCK.0 + at);
    let add = |at: u64, more: u64| -> Result<(), GuestMemoryError> {
        mem.write_obj(mem.read_obj::<u64>(field(at))?.wrapping_add(more), field(at))
    };
    let seq = mem.read_obj::<u32>(field(SEQ_COUNT))?;
    // Odd in between and even after, for any value that the guest has written there. No vCPU runs
    // between the two writes, but the pause may have stopped a reader in the middle of its read.
    mem.write_obj(seq | 1, field(SEQ_COUNT))?;
    mem.write_slice(&id, GENERATION_ID)?;
    add(GENERATION_COUNTER, 1)?;
    // The TSC continues from another instant.
    add(DISRUPTION_MARKER, 1)?;
    mem.write_obj((seq | 1).wrapping_add(1), field(SEQ_COUNT))?;
    Ok(())
}

impl GenerationId {
    /// Reads the id from guest memory `mem`.
    ///
    /// # Errors
    /// When the memory cannot be read.
    pub fn of<M: GuestMemoryBackend>(mem: &M) -> Result<Self, GuestMemoryError> {
        let mut id = [0; 16];
        mem.read_slice(&mut id, GENERATION_ID)?;
        Ok(Self(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn a_generation_is_another_each_time() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        let at = |at: u64| mem.read_obj::<u64>(GuestAddress(VMCLOCK.0 + at)).unwrap();
        let word = |at: u64| mem.read_obj::<u32>(GuestAddress(VMCLOCK.0 + at)).unwrap();
        begin(&mem).unwrap();
        assert_eq!((word(0), word(4), word(8) as u16), (0x4b4c_4356, 4096, 1));
        assert_eq!((at(0x18), at(0x10), at(0x68), word(0x0c)), (0x180, 1, 1, 2));
        let mut ids = vec![GenerationId::of(&mem).unwrap()];
        for count in 2..5 {
            renew(&mem).unwrap();
            assert_eq!((at(0x10), at(0x68), u64::from(word(0x0c))), (count, count, 2 * count));
            let id = GenerationId::of(&mem).unwrap();
            assert!(!ids.contains(&id));
            ids.push(id);
        }
        // The count is even even if the guest has overwritten it.
        mem.write_obj(u32::MAX, GuestAddress(VMCLOCK.0 + 0x0c)).unwrap();
        renew(&mem).unwrap();
        assert_eq!(word(0x0c), 0);
    }
}
