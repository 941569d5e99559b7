//! The kind of problem that an error is to a client of the API.

use std::io::ErrorKind;

use super::{CancelReason, DaemonError, HookError};
use crate::ProblemKind;
use clade_memory::{AccessError, RamError};
use clade_vmm::vm::{DeviceError, SnapshotError, VmError};

impl DaemonError {
    /// Returns the kind of problem that this error is to a client.
    pub fn problem(&self) -> ProblemKind {
        match self {
            Self::BadName { .. } | Self::Pattern { .. } => ProblemKind::BadName,
            Self::Count { .. } => ProblemKind::BadCount,
            Self::LongPath { .. } | Self::Overlays { .. } | Self::SuspendDir { .. } => ProblemKind::BadPath,
            Self::NoSuchVm { .. } => ProblemKind::NoSuchVm,
            Self::NoSuchCheckpoint { .. } => ProblemKind::NoSuchCheckpoint,
            Self::Taken { .. } | Self::CheckpointTaken { .. } | Self::Supervised { .. } => ProblemKind::NameTaken,
            Self::Ending => ProblemKind::Ending,
            Self::Cancelled { reason: CancelReason::Ending, .. } => ProblemKind::Ending,
            Self::Cancelled { .. } => ProblemKind::Cancelled,
            Self::Vm(error) => of_vm(error),
            Self::Snapshot(error) => of_snapshot(error),
            Self::HostLimit { .. } => ProblemKind::NoRoom,
            Self::Keep { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                ProblemKind::NoRoom
            }
            // Nothing was made, and the interfaces of ended VMs will be down some time.
            Self::NetHook(error) if matches!(**error, HookError::Busy { .. }) => ProblemKind::TooMany,
            Self::NetHook(_) => ProblemKind::IdentityTaken,
            Self::Refused { kind, .. } => *kind,
            Self::Transfer(error) if error.is_no_room() => ProblemKind::NoRoom,
            // The process was most likely killed.
            Self::Worker { .. } | Self::Transfer(_) if is_of_the_dead(self) => ProblemKind::VmGone,
            Self::Runtime { .. }
            | Self::Unreleased { .. }
            | Self::Keep { .. }
            | Self::Link { .. }
            | Self::LinkedDir { .. }
            | Self::ForeignDir { .. }
            | Self::OpenDir { .. }
            | Self::Cgroup(_)
            | Self::Transfer(_)
            | Self::Worker { .. } => ProblemKind::Internal,
        }
    }
}

/// Whether a process at the other end of a socket has ended.
fn is_of_the_dead(error: &DaemonError) -> bool {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.any(|cause| {
        let kind = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        matches!(kind, Some(ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset))
    })
}

fn of_vm(error: &VmError) -> ProblemKind {
    match error {
        VmError::Unwanted => ProblemKind::Cancelled,
        VmError::Balloon { .. } => ProblemKind::BadRequest,
        VmError::Boot(_) | VmError::Config(_) | VmError::Layout(_) => ProblemKind::BadConfig,
        VmError::Stopped(_) | VmError::NoOrigin | VmError::Inconsistent | VmError::Paused => ProblemKind::WrongState,
        VmError::Access(error) => match error {
            AccessError::NotRam { .. } | AccessError::Absent { .. } | AccessError::Nothing { .. } => {
                ProblemKind::BadAddress
            }
            // The VM is about to stop.
            AccessError::Lost(_) => ProblemKind::WrongState,
            _ => ProblemKind::Internal,
        },
        // The pins or requests may end.
        VmError::Ram(RamError::Pinned { .. }) | VmError::InFlight { .. } => ProblemKind::WrongState,
        VmError::Ram(RamError::Suspend { source, .. })
            if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
        {
            ProblemKind::NoRoom
        }
        VmError::Devices(DeviceError::Egress(_)) => ProblemKind::BadRequest,
        VmError::NoDevice { .. } => ProblemKind::NoDevice,
        VmError::NoVcpu { .. } => ProblemKind::BadRequest,
        VmError::Identity(error) if error.is_choice() => ProblemKind::IdentityTaken,
        _ => ProblemKind::Internal,
    }
}

/// Whether the client or the host is at fault for a failed snapshot.
fn of_snapshot(error: &SnapshotError) -> ProblemKind {
    use clade_snapshot::Error;
    match error {
        SnapshotError::Files(Error::Path { .. }) => ProblemKind::BadPath,
        // No snapshot can be made in such a place.
        SnapshotError::Files(Error::File { source, .. })
            if matches!(
                source.kind(),
                ErrorKind::NotFound
                    | ErrorKind::NotADirectory
                    | ErrorKind::PermissionDenied
                    | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            ProblemKind::BadPath
        }
        SnapshotError::Files(Error::Cancelled) => ProblemKind::Cancelled,
        SnapshotError::Files(
            Error::NotASnapshot { .. }
            | Error::Parent { .. }
            | Error::Elsewhere { .. }
            | Error::Exchanged { .. }
            | Error::WrongId { .. }
            | Error::Cycle { .. }
            | Error::TooDeep { .. }
            | Error::Shape { .. }
            | Error::Needed { .. }
            | Error::Locked { .. }
            | Error::OwnChain { .. }
            | Error::NotAFile { .. }
            | Error::Damaged { .. }
            | Error::Incomplete { .. }
            | Error::Runs { .. }
            | Error::Space { .. }
            | Error::Twice { .. }
            | Error::Machine { .. },
        )
        | SnapshotError::NoBase { .. }
        | SnapshotError::Busy { .. }
        | SnapshotError::State(_)
        | SnapshotError::Host(_)
        | SnapshotError::Disks { .. }
        | SnapshotError::Cold { .. } => ProblemKind::SnapshotConflict,
        SnapshotError::Files(Error::Full { .. }) => ProblemKind::NoRoom,
        SnapshotError::Unpack { .. } => ProblemKind::BadPath,
        SnapshotError::Vm(error @ (VmError::Stopped(_) | VmError::Inconsistent)) => of_vm(error),
        _ => ProblemKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client repeats the request then.
    #[test]
    fn a_network_hook_that_is_busy_is_no_conflict() {
        let busy = HookError::Busy { program: "/hook".into(), left: 2, seconds: 60 };
        assert_eq!(DaemonError::from(Box::new(busy)).problem(), ProblemKind::TooMany);
        let start = HookError::Start { program: "/hook".into(), source: ErrorKind::NotFound.into() };
        assert_eq!(DaemonError::from(Box::new(start)).problem(), ProblemKind::IdentityTaken);
    }
}
