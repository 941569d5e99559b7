//! Reading and writing the memory of a running VM from outside.

use crate::vm::error::VmError;
use crate::vm::machine::Vm;

impl Vm {
    /// Reads its memory from a guest-physical address on, as the guest sees it. Pages without
    /// memory read as zeros, and stay without memory.
    ///
    /// The bytes are from one instant with respect to forks, snapshots, resets, pauses and resumes.
    /// vCPUs and devices go on meanwhile: each aligned word of 8 bytes is read as a whole, in no
    /// order.
    ///
    /// # Errors
    /// When the range is not all RAM, the VM has stopped, a reset has failed half-way, or memory is
    /// lost. `bytes` is then undefined.
    pub fn read_memory(&self, address: u64, bytes: &mut [u8]) -> Result<(), VmError> {
        let _one = self.operations.take();
        self.expect_memory()?;
        Ok(self.ram().read_bytes(address, bytes)?)
    }

    /// Writes its memory from a guest-physical address on, as the guest would: shared pages become
    /// its own.
    ///
    /// A fork, a snapshot or a reset has all of the bytes or none. vCPUs and devices go on
    /// meanwhile: each aligned word of 8 bytes is written as a whole, in no order.
    ///
    /// # Errors
    /// When the range is not all RAM, the VM has stopped, or a reset has failed half-way: then
    /// memory is unchanged. When memory is lost.
    pub fn write_memory(&self, address: u64, bytes: &[u8]) -> Result<(), VmError> {
        let _one = self.operations.take();
        self.expect_memory()?;
        Ok(self.ram().write_bytes(address, bytes)?)
    }

    fn expect_memory(&self) -> Result<(), VmError> {
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        self.expect_whole()
    }
}
