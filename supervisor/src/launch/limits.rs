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
        let refused = |text: &str| Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text: text.to_owned() });
        let VmLimits { memory_mib, cpus } = limits;
        let bounds = Bounds { memory_mib, cpus };
        if memory_mib.is_some_and(|mib| mib < MIN_LIMIT_MIB) {
            return refused(&format!("limits.memory_mib: a VM's process takes {MIN_LIMIT_MIB} MiB at least"));
        }
        if cpus.is_some_and(|cpus| !(MIN_CPUS..=MAX_CPUS).contains(&cpus)) {
            return refused(&format!("limits.cpus: {MIN_CPUS} to {MAX_CPUS} processors"));
        }
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
