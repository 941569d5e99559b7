//! The power button: the guest powers off, or the VM is stopped when the time is over.

use std::time::{Duration, Instant};

use super::{VmEntry, VmHost};
use clade_api::DaemonError;
use clade_vmm::vm::Vm;

/// Interval of the checks whether the guest has powered off.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The outcome of a press of the power button.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// Whether the guest powered itself off, or reset itself. Otherwise its power was cut.
    pub by_itself: bool,
    /// Whether the guest's kernel noticed that the button was pressed.
    pub noticed: bool,
}

impl VmHost {
    /// Presses a VM's power button, waits up to `time` until its guest has powered itself off, and
    /// then stops it as [`VmHost::stop`] does.
    ///
    /// # Errors
    /// When there is no such VM, it has no power button, or it is paused: then it is not stopped.
    /// As [`VmHost::stop`] afterwards.
    pub(crate) fn shut_down<T>(
        &self,
        name: &str,
        time: Duration,
        describe: impl FnOnce(&VmEntry, Shutdown) -> T,
    ) -> Result<T, DaemonError> {
        let entry = self.get(name)?;
        entry.vm.press_power_button()?;
        let by_itself = ends_by_itself(&entry.vm, time);
        let shutdown = Shutdown { by_itself, noticed: entry.vm.power_button_noticed() };
        if by_itself {
            // Recorded like any VM that ends by itself.
            self.remove();
        }
        self.stop_entry(entry, |entry| describe(entry, shutdown))
    }
}

/// Waits up to `time` for the end of a VM. Returns whether its guest has ended it.
fn ends_by_itself(vm: &Vm, time: Duration) -> bool {
    let begun = Instant::now();
    loop {
        let left = time.saturating_sub(begun.elapsed());
        if let Some(reason) = vm.wait(left.min(POLL_INTERVAL)) {
            return reason.is_guests_end();
        }
        if left.is_zero() {
            return false;
        }
        // A guest suspended since would sleep until it is stopped. The next check notices a stopped
        // VM.
        let _ = vm.wake();
    }
}
