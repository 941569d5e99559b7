//! The harness's view of a VM: its guest's memory in words, and whether it runs. The VM may be in
//! this process, or in another that this one asks.

use std::error::Error;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clade_memory::GuestRam;
use clade_vmm::vm::{StopReason, Vm, VmError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Reason why guest memory could not be read or written.
pub type WordsError = Box<dyn Error + Send + Sync>;

/// Guest memory as aligned words of 8 bytes. Reads and writes of a word are atomic.
pub trait GuestWords {
    /// Reads a word. Later reads see everything that the guest has written before it. The default
    /// implementation requires that a read of eight aligned bytes is a read of one word, and so for
    /// a write.
    ///
    /// # Errors
    /// When it is not in guest memory.
    fn load(&self, address: u64) -> Result<u64, WordsError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes words. The guest sees those of earlier calls before them.
    ///
    /// # Errors
    /// When they are not in guest memory.
    fn store(&self, address: u64, words: &[u64]) -> Result<(), WordsError> {
        self.write(address, &bytes_of(words))
    }

    /// Writes words as [`GuestWords::store`], and wakes a vCPU that waits for them. The memory of a
    /// VM that has not started wakes none: a vCPU is woken when it starts.
    ///
    /// # Errors
    /// When they are not in guest memory, or there is no such vCPU.
    fn store_and_ring(&self, address: u64, words: &[u64], vcpu: u64) -> Result<(), WordsError>;

    /// Reads bytes, in any order.
    ///
    /// # Errors
    /// When they are not in guest memory.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError>;

    /// Writes bytes, in any order.
    ///
    /// # Errors
    /// When they are not in guest memory.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError>;

    /// Returns the best number of words to read at a time: they fit in the second-level cache.
    fn chunk(&self) -> usize {
        16 << 10
    }
}

/// Returns words as they are in guest memory.
#[must_use]
pub fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A VM whose guest is driven.
pub trait Machine: GuestWords {
    /// Returns its name.
    fn name(&self) -> String;

    /// Returns the reason why it has stopped, if it has.
    fn stopped(&self) -> Option<StopReason>;

    /// Waits until its guest may have a report, up to `limit`.
    fn await_report(&self, limit: Duration);
}

impl GuestWords for GuestRam {
    fn store_and_ring(&self, address: u64, words: &[u64], _: u64) -> Result<(), WordsError> {
        self.store(address, words)
    }

    fn load(&self, address: u64) -> Result<u64, WordsError> {
        // Acquire: pairs with the guest's store of this word (x86 keeps stores in order).
        Ok(self.memory().load(GuestAddress(address), Ordering::Acquire)?)
    }

    fn store(&self, address: u64, words: &[u64]) -> Result<(), WordsError> {
        // Release: the guest sees a command before its number.
        let mut each = (address..).step_by(8).zip(words);
        each.try_for_each(|(at, word)| Ok(self.memory().store(*word, GuestAddress(at), Ordering::Release)?))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError> {
        self.memory().get_slice(GuestAddress(address), bytes.len())?.copy_to(bytes);
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError> {
        self.memory().get_slice(GuestAddress(address), bytes.len())?.copy_from(bytes);
        Ok(())
    }
}

impl GuestWords for Vm {
    fn load(&self, address: u64) -> Result<u64, WordsError> {
        self.ram().load(address)
    }

    fn store(&self, address: u64, words: &[u64]) -> Result<(), WordsError> {
        self.ram().store(address, words)
    }

    fn store_and_ring(&self, address: u64, words: &[u64], vcpu: u64) -> Result<(), WordsError> {
        self.store(address, words)?;
        match self.ring_doorbell(vcpu) {
            // The memory of a stopped VM can still be written.
            Ok(()) | Err(VmError::Stopped(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError> {
        self.ram().read(address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError> {
        self.ram().write(address, bytes)
    }
}

impl Machine for Vm {
    fn name(&self) -> String {
        Self::name(self).to_owned()
    }

    fn stopped(&self) -> Option<StopReason> {
        Self::stopped(self)
    }

    fn await_report(&self, limit: Duration) {
        // A report only ends the wait early: it may be another vCPU's.
        let _ = self.reports().next(limit);
    }
}
