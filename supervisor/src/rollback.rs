//! Rolling a VM back to a checkpoint of its line: its own, or one of an ancestor.

use std::time::Duration;

use super::checkpoint::Checkpoint;
use super::processes::ProcessId;
use super::reidentify::expect_reachable;
use super::vm_record::VmRecord;
use super::{ImagePermit, Supervisor};
use clade_api::http::Cancel;
use clade_api::{DaemonError, ProblemKind, ResetAnswer};
use clade_worker::has_ended;
use clade_worker::image::rollback::RollbackClient;

fn refused(text: String) -> DaemonError {
    DaemonError::Refused { kind: ProblemKind::WrongState, text }
}

/// Refuses a checkpoint that is not of the line of the VM called `vm`, or has secrets that
/// the VM may not have.
/// Returns whether it is one of the VM itself. Of secrets that were not recorded, only the VM's own image
/// has the same.
///
/// # Errors
/// When the VM cannot be rolled back to it.
fn expect_of_line(
    (vm, vm_record): (&str, &VmRecord),
    (name, of, is_detached): (&str, &VmRecord, bool),
    secrets_are_same: Option<bool>,
) -> Result<bool, DaemonError> {
    let is_own = of.process.is_some() && of.process == vm_record.process;
    let is_of_ancestor = of.process.is_some_and(|process| vm_record.ancestors.contains(&process));
    if !is_own && !is_of_ancestor {
        return Err(refused(format!(
            "the checkpoint {name:?} is neither of {vm:?} nor of a VM that {vm:?} was forked from; `clade fork {name}` \
             starts another VM from it"
        )));
    }
    if !secrets_are_same.unwrap_or(is_own) {
        return Err(refused(format!("the checkpoint {name:?} has other secrets than {vm:?}")));
    }
    if vm_record.template.images().ne(of.template.images()) {
        return Err(refused(format!(
            "{vm:?} has other files for its disks than the checkpoint {name:?}: the disks of one are copies"
        )));
    }
    // Not by the template of the checkpoint's VM, which may descend from copies itself.
    if !is_own && vm_record.template.detached && !is_detached {
        return Err(refused(format!(
            "{vm:?} descends from copies, and the process of an ancestor may write the checkpoint {name:?}"
        )));
    }
    Ok(is_own)
}

impl Supervisor {
    /// Rolls the VM called `vm` back to the checkpoint called `name`. `ready` refuses a VM without a way to
    /// its agent, before anything is changed.
    ///
    /// # Errors
    /// When there is no such VM or checkpoint, or the VM cannot be rolled back to it: it then runs on.
    pub(super) fn roll_back(
        &self,
        vm: &str,
        name: &str,
        ready: bool,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<ResetAnswer, DaemonError> {
        let _busy = self.0.busy.read();
        let vm_record = VmRecord::expect(&self.0.dir, vm)?;
        if ready {
            expect_reachable(vm, &vm_record.template.config)?;
        }
        let on_disk = || refused(format!("the checkpoint {name:?} is only on the disk: it is of no VM that runs"));
        let checkpoint = self.checkpoints().get(name, |_| Err(on_disk()))?;
        let secrets = checkpoint.secrets();
        let secrets_are_same = vm_record.secrets.as_ref().map(|recorded| recorded.is_of(secrets));
        let is_detached = checkpoint.is_detached();
        let of = (name, checkpoint.vm_record(), is_detached);
        let is_own = expect_of_line((vm, &vm_record), of, secrets_are_same)?;
        let image = (is_own && !is_detached, Checkpoint::parts(&checkpoint));
        let client = RollbackClient::connect(self.dir(), vm)?;
        // After the connection: while its process lives, the name and the socket are that process's.
        let pidfd = vm_record.process.and_then(ProcessId::open);
        let lives = pidfd.is_some_and(|pidfd| !has_ended(&pidfd, Duration::ZERO));
        let has_name = VmRecord::read(&self.0.dir, vm)?.is_some_and(|now| now.process == vm_record.process);
        if !lives || !has_name {
            return Err(DaemonError::NoSuchVm { name: vm.to_owned() });
        }
        let answer = client.roll_back(image, &|| self.check(0, 0, cancel))?;
        drop(permit);
        vm_record.process.into_iter().for_each(|process| self.0.kept_lines.begin(vm, process, &checkpoint.line()));
        tracing::info!(vm, checkpoint = name, us = answer.total_us, "rolled back");
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::super::vm_record::tests::record_with;
    use super::*;

    #[test]
    fn a_vm_goes_back_to_checkpoints_of_its_line_alone() {
        let own = ProcessId::of(std::process::id());
        let parent = ProcessId::of(std::os::unix::process::parent_id());
        let record = |process, ancestors: Option<ProcessId>| VmRecord {
            process,
            ancestors: ancestors.into_iter().collect(),
            ..record_with(None)
        };
        let vm = record(own, parent);
        let check = |of: &VmRecord, same| {
            let checked = expect_of_line(("web", &vm), ("base", of, false), same);
            checked.map_err(|error| (error.problem(), error.to_string()))
        };
        assert_eq!(check(&record(own, None), Some(true)), Ok(true));
        assert_eq!(check(&record(own, None), None), Ok(true));
        assert_eq!(check(&record(parent, None), Some(true)), Ok(false));
        for (of, same, what) in [
            (record(ProcessId::of(1), parent), Some(true), "neither of"),
            // An image of a snapshot is of no process.
            (record(None, None), Some(true), "neither of"),
            (record(parent, None), Some(false), "other secrets"),
            (record(own, None), Some(false), "other secrets"),
            (record(parent, None), None, "other secrets"),
        ] {
            let (kind, text) = check(&of, same).unwrap_err();
            assert!(kind == ProblemKind::WrongState && text.contains(what), "{text}");
        }
        // A child of copies shares no files with its ancestors' processes.
        let mut detached = vm.clone();
        detached.template.detached = true;
        let plain = record(parent, None);
        let copied = VmRecord { template: detached.template.clone(), ..plain.clone() };
        let check = |of: &VmRecord, copy| expect_of_line(("web", &detached), ("base", of, copy), Some(true));
        // An ancestor may descend from copies too, whatever its later checkpoints are.
        for of in [&plain, &copied] {
            assert!(check(of, false).is_err_and(|error| error.to_string().contains("copies")));
        }
        assert!(matches!(check(&copied, true), Ok(false)) && matches!(check(&record(own, None), false), Ok(true)));
        let nobody = record(None, None);
        assert!(expect_of_line(("web", &nobody), ("base", &record(None, None), false), Some(true)).is_err());
    }
}
