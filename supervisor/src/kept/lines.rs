//! The kept checkpoints that running VMs descend from: the bases of their next ones.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::data::DataId;
use crate::processes::ProcessId;

/// Most kept checkpoints of a line.
const MAX_LINE: usize = 32;

/// The kept checkpoints that a VM descended from at an instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeptLine {
    /// Their data, the nearest first.
    pub(crate) data: Vec<DataId>,
    /// The ordinal of the instant, among those of all VMs.
    pub(crate) at: u64,
}

#[derive(Debug, Default)]
struct Lines {
    /// By the VMs' names, with the ordinal of the instant that the line is of.
    all: BTreeMap<String, (ProcessId, KeptLine)>,
    last: u64,
}

/// The lines of VMs. A later supervisor starts with an empty list: its opened checkpoints share no layer
/// with running VMs.
#[derive(Debug, Default)]
pub(crate) struct KeptLines(Mutex<Lines>);

impl KeptLines {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the line of the VM called `vm` now, if it has this process: another VM may have the name by
    /// now.
    pub(crate) fn now(&self, vm: &str, process: Option<ProcessId>) -> KeptLine {
        let mut lines = self.lines();
        lines.last += 1;
        let line = lines.all.get(vm).filter(|(of, _)| Some(*of) == process);
        KeptLine { data: line.map(|(_, line)| line.data.clone()).unwrap_or_default(), at: lines.last }
    }

    /// Notes the line of the VM called `vm`, which starts from an image or is back at one.
    pub(crate) fn begin(&self, vm: &str, process: ProcessId, data: &[DataId]) {
        let mut lines = self.lines();
        lines.last += 1;
        let line = KeptLine { data: nearest(data), at: lines.last };
        lines.all.insert(vm.to_owned(), (process, line));
    }

    /// Notes that the VM called `vm` has descended from a kept checkpoint since the instant `at`. A VM that
    /// was rolled back since, or has a later kept checkpoint, keeps its line.
    pub(crate) fn extend(&self, vm: &str, process: ProcessId, data: &[DataId], at: u64) {
        let mut lines = self.lines();
        let is_later = lines.all.get(vm).is_some_and(|(of, line)| *of == process && line.at > at);
        if !is_later {
            lines.all.insert(vm.to_owned(), (process, KeptLine { data: nearest(data), at }));
        }
    }

    /// Forgets a VM that has ended.
    pub(crate) fn forget(&self, vm: &str) {
        self.lines().all.remove(vm);
    }
}

fn nearest(data: &[DataId]) -> Vec<DataId> {
    data.iter().take(MAX_LINE).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_of_one_vm() {
        let (lines, line) = (KeptLines::default(), [DataId::random().unwrap()]);
        let ours = ProcessId::of(std::process::id()).unwrap();
        let other = ProcessId::of(std::os::unix::process::parent_id());
        lines.begin("web", ours, &line);
        assert_eq!(lines.now("web", Some(ours)).data, line);
        for (vm, process) in [("web", other), ("web", None), ("db", Some(ours))] {
            assert!(lines.now(vm, process).data.is_empty(), "{vm} {process:?}");
        }
        lines.forget("web");
        assert!(lines.now("web", Some(ours)).data.is_empty());
    }

    #[test]
    fn a_vm_keeps_the_line_of_its_latest_instant() {
        let lines = KeptLines::default();
        let [first, second, abandoned] = [0; 3].map(|_| [DataId::random().unwrap()]);
        let ours = ProcessId::of(std::process::id()).unwrap();
        let now = || lines.now("web", Some(ours));
        let (earlier, later) = (now().at, now().at);
        // The later one is kept first.
        lines.extend("web", ours, &second, later);
        lines.extend("web", ours, &first, earlier);
        assert_eq!(now().data, second);
        // Rolled back to a checkpoint that descends from no kept one. An image from before is kept.
        let before = now().at;
        lines.begin("web", ours, &[]);
        lines.extend("web", ours, &abandoned, before);
        assert!(now().data.is_empty());
        lines.extend("web", ours, &first, now().at);
        assert_eq!(now().data, first);
    }
}
