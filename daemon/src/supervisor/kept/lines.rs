//! The kept checkpoints that running VMs descend from: the bases of their next ones.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::data::DataId;
use crate::supervisor::processes::ProcessId;

/// Most kept checkpoints of a line.
const MAX_LINE: usize = 32;

/// The data of the kept checkpoints that VMs descend from, the nearest first, by the VMs' names. A
/// later supervisor starts with an empty list: its opened checkpoints share no layer with running VMs.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct KeptLines(Mutex<BTreeMap<String, (ProcessId, Vec<DataId>)>>);

impl KeptLines {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, (ProcessId, Vec<DataId>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the line of the VM called `vm`: of its nearest [`MAX_LINE`] kept checkpoints.
    pub(in crate::supervisor) fn note(&self, vm: &str, process: ProcessId, line: &[DataId]) {
        if line.is_empty() {
            self.forget(vm);
        } else {
            self.all().insert(vm.to_owned(), (process, line.iter().take(MAX_LINE).cloned().collect()));
        }
    }

    /// Returns the line of the VM called `vm`, if it has this process: another VM may have the name by now.
    pub(in crate::supervisor) fn of(&self, vm: &str, process: Option<ProcessId>) -> Vec<DataId> {
        let all = self.all();
        let line = all.get(vm).filter(|(of, _)| Some(*of) == process);
        line.map(|(_, line)| line.clone()).unwrap_or_default()
    }

    /// Forgets a VM that has ended.
    pub(in crate::supervisor) fn forget(&self, vm: &str) {
        self.all().remove(vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_of_one_vm() {
        let (lines, line) = (KeptLines::default(), [DataId::random().unwrap()]);
        let ours = ProcessId::of(std::process::id()).unwrap();
        let other = ProcessId::of(std::os::unix::process::parent_id());
        lines.note("web", ours, &line);
        assert_eq!(lines.of("web", Some(ours)), line);
        for (vm, process) in [("web", other), ("web", None), ("db", Some(ours))] {
            assert!(lines.of(vm, process).is_empty(), "{vm} {process:?}");
        }
        // Rolled back to a checkpoint that no kept one is before.
        lines.note("web", ours, &[]);
        assert!(lines.of("web", Some(ours)).is_empty());
        lines.note("web", ours, &line);
        lines.forget("web");
        assert!(lines.of("web", Some(ours)).is_empty());
    }
}
