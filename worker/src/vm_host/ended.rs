//! The end of this process's VM, for its record.

use std::fs::File;
use std::io::Write;

use clade_api::{EndedVm, MAX_OUTPUT, unix_seconds};

use clade_vmm::vm::{StopReason, Vm};

/// The last output on a VM's console, at most [`MAX_OUTPUT`] bytes.
pub(crate) fn last_output(vm: &Vm) -> String {
    let console = vm.console();
    String::from_utf8_lossy(&console.since(console.position().saturating_sub(MAX_OUTPUT))).into_owned()
}

/// Records the end of `vm` in `file`, if it ended by itself, for the process that clears up after
/// this one.
pub(super) fn record(mut file: File, vm: &Vm, parent: Option<&str>) {
    let Some(stopped) = vm.stopped().filter(|reason| *reason != StopReason::Requested) else { return };
    let ended = EndedVm {
        name: vm.name().to_owned(),
        reason: stopped.to_string(),
        stopped,
        parent: parent.map(str::to_owned),
        generation: vm.generation(),
        age_s: vm.age().as_secs_f64(),
        ended_at: unix_seconds(),
        pid: std::process::id(),
        console: last_output(vm),
        flight: Vec::new(),
    };
    let written = serde_json::to_vec(&ended).map_err(std::io::Error::other).and_then(|bytes| file.write_all(&bytes));
    if let Err(error) = written {
        tracing::warn!(%error, name = ended.name, "the end of a VM is not on record");
    }
}
