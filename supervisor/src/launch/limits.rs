//! Limits of a VM: its control group's, and the memory that a child may copy ahead.

use super::ChildSource;
use crate::Supervisor;
use crate::cgroups::Bounds;
use clade_api::{DaemonError, ForkRequest, ProblemKind, VmLimits};

/// Most memory that a child may have copies of ahead, in MiB.
const MAX_AHEAD_MIB: u32 = 4096;
/// The least memory of a VM's process, in MiB.
const MIN_LIMIT_MIB: u64 = 32;
/// Least processor time of a VM's limit.
const MIN_CPUS: f64 = 0.01;
const MAX_CPUS: f64 = 1024.0;

impl Supervisor {
    /// Returns the number of pages that a child of `origin` may copy ahead.
    pub(super) fn ahead_pages(&self, origin: &ChildSource<'_>, request: &ForkRequest) -> Result<u64, DaemonError> {
        let refused = |text: String| Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text });
        let mib = match (request.ahead_mib, origin.learning) {
            (Some(mib @ 1..), None) => {
                return refused(format!("ahead_mib: {mib}: nothing is learned of a VM's forks: fork a checkpoint"));
            }
            (Some(mib), _) if mib > MAX_AHEAD_MIB => {
                return refused(format!("ahead_mib: {mib} is more than {MAX_AHEAD_MIB}"));
            }
            (Some(mib), _) => mib,
            (None, _) => self.0.ahead_mib,
        };
        Ok((u64::from(mib) << 20) / clade_memory::PAGE_SIZE)
    }

    /// Returns the resource limits of a VM, if they are requested and can be enforced.
    pub(super) fn bounds(&self, limits: VmLimits) -> Result<Bounds, DaemonError> {
        let bounds = in_range(limits)?;
        self.expect_enforced(bounds)?;
        Ok(bounds)
    }

    /// Refuses resource limits that cannot be enforced.
    pub(crate) fn expect_enforced(&self, bounds: Bounds) -> Result<(), DaemonError> {
        if bounds.is_none() || self.0.cgroups.as_ref().is_some_and(|groups| groups.enforces(bounds)) {
            return Ok(());
        }
        let text = "limits need control groups (v2), which this supervisor has not got: see --cgroup".to_owned();
        Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text })
    }
}

/// Refuses resource limits that are out of range.
fn in_range(VmLimits { memory_mib, cpus }: VmLimits) -> Result<Bounds, DaemonError> {
    let refused = |text: String| Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text });
    if let Some(mib @ ..MIN_LIMIT_MIB) = memory_mib {
        return refused(format!("limits.memory_mib: {mib}: a VM's process takes {MIN_LIMIT_MIB} MiB at least"));
    }
    if let Some(cpus) = cpus.filter(|cpus| !(MIN_CPUS..=MAX_CPUS).contains(cpus)) {
        return refused(format!("limits.cpus: {cpus}: a limit is {MIN_CPUS} to {MAX_CPUS} processors"));
    }
    Ok(Bounds { memory_mib, cpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_out_of_range_is_refused_by_its_value() {
        let limits = |memory_mib, cpus| VmLimits { memory_mib, cpus };
        for good in [limits(None, None), limits(Some(32), Some(0.01)), limits(Some(u64::MAX), Some(1024.0))] {
            let bounds = in_range(good).unwrap();
            assert_eq!((bounds.memory_mib, bounds.cpus), (good.memory_mib, good.cpus));
        }
        for (bad, named) in [
            (limits(Some(31), None), "limits.memory_mib: 31: "),
            (limits(Some(0), None), "limits.memory_mib: 0: "),
            (limits(None, Some(0.0)), "limits.cpus: 0: "),
            (limits(None, Some(1024.5)), "limits.cpus: 1024.5: "),
            (limits(None, Some(f64::NAN)), "limits.cpus: NaN: "),
        ] {
            let refused = in_range(bad).unwrap_err().to_string();
            assert!(refused.starts_with(named), "{refused}");
        }
    }
}
